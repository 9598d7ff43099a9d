"""Runs with a budget of minutes, Muon, and averaged weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from earlyfusion.config import PRESETS
from earlyfusion.data.packing import Packer, RoleWeights
from earlyfusion.errors import CheckpointError, SettingError
from earlyfusion.model.transformer import Transformer
from earlyfusion.processor import ANSWER_TEXT, CONTROL, END, TokenSequence
from earlyfusion.train import checkpoint, lora, trainer
from earlyfusion.train.language import LanguageTask
from earlyfusion.train.monitor import read_metrics
from earlyfusion.train.optim import (
    Muon,
    OptimConfig,
    WeightAverage,
    build_optimizer,
    learning_rate_at,
    orthogonal,
)
from earlyfusion.train.pace import Pace
from earlyfusion.train.trainer import RunConfig, train

TINY = PRESETS["tiny"]
OPTIM = OptimConfig(lr=1e-2, warmup_steps=2, decay="linear", final_ratio=0.1, eps=1e-8)


class Clock:
    """Seconds that pass only when told."""

    def __init__(self, each: float = 0.0) -> None:
        self.seconds, self.each = 0.0, each

    def __call__(self) -> float:
        return self.seconds


def document(number: int) -> TokenSequence:
    generator = torch.Generator().manual_seed(number % 4)
    ids = torch.randint(5, TINY.vocab_size, (8,), generator=generator).tolist()
    role = [CONTROL] + [ANSWER_TEXT] * 6 + [END]
    return TokenSequence(ids=ids, role=role)


class Timed(LanguageTask):
    """A task whose every step takes ten seconds of a clock."""

    progress = 0.0

    def __init__(self, clock: Clock) -> None:
        torch.manual_seed(0)
        model = Transformer(TINY)
        model.init_weights()
        super().__init__(model, Packer(document, RoleWeights(), rows=2, length=32, pad=1))
        self.clock, self.seen = clock, list[float]()

    def after(self, step: int) -> dict[str, float]:
        self.seen.append(self.progress)
        self.clock.seconds += 10
        return {}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    result = Clock()
    monkeypatch.setattr(
        trainer, "Pace", lambda steps, minutes, spent: Pace(steps, minutes, spent, now=result)
    )
    return result


def test_the_share_is_that_of_steps_or_of_time_whichever_is_nearer_the_end() -> None:
    clock = Clock()
    pace = Pace(100, 2.0, spent=30.0, now=clock)
    assert pace.share(0) == 0.25 and pace.share(50) == 0.5 and not pace.is_over(99)
    assert pace.is_over(100)
    clock.seconds = 60
    assert pace.share(50) == 0.75 and pace.seconds == 90
    assert pace.seconds_left(1.0, 60) == 30 and pace.seconds_left(1.0, 90) == 10
    clock.seconds = 90
    assert pace.is_over(1) and pace.share(1) == 1.0 and pace.seconds_left(1.0, 0) == 0.0
    unlimited = Pace(10, now=clock)
    assert unlimited.share(5) == 0.5 and not unlimited.is_over(9)


def test_the_rate_follows_the_clock_and_the_run_ends_with_its_time(
    tmp_path: Path, clock: Clock
) -> None:
    run, task = RunConfig(tmp_path, steps=1000, minutes=1.0, log_every=1), Timed(clock)
    train(task, run, OPTIM)
    rows = read_metrics(tmp_path)
    assert [r["step"] for r in rows] == [0, 1, 2, 3, 4, 5] and checkpoint.steps(tmp_path) == [6]
    assert task.seen == pytest.approx([0, 1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6])
    expected = [min((k + 1) / 2, 1 - 0.9 * k / 6) * 1e-2 for k in range(6)]
    assert [r["lr"] for r in rows] == pytest.approx(expected)
    assert [r["lr"] for r in rows] == pytest.approx(
        [learning_rate_at(OPTIM, k, k / 6) for k in range(6)]
    )


def test_time_before_a_resume_counts_and_a_run_out_of_time_stays(
    tmp_path: Path, clock: Clock
) -> None:
    run = RunConfig(tmp_path, steps=1000, minutes=1.0, log_every=1, stop_after=4)
    train(Timed(clock), run, OPTIM)
    clock.seconds = 5000.0  # the pause between the two does not count
    second = Timed(clock)
    train(second, replace(run, stop_after=0), OPTIM)
    assert second.seen == pytest.approx([4 / 6, 5 / 6])
    assert checkpoint.load_state(tmp_path)["seconds"] == 60
    third = Timed(clock)
    train(third, replace(run, stop_after=0), OPTIM)
    assert third.seen == [] and checkpoint.steps(tmp_path)[-1] == 6
    with pytest.raises(CheckpointError, match="minutes"):
        train(Timed(clock), replace(run, minutes=2.0), OPTIM)


def test_steps_end_a_run_that_has_time_left(tmp_path: Path, clock: Clock) -> None:
    train(Timed(clock), RunConfig(tmp_path, steps=3, minutes=1.0), OPTIM)
    assert checkpoint.steps(tmp_path) == [3]


def plain_muon(weight: torch.Tensor, gradients: list[torch.Tensor], lr: float) -> torch.Tensor:
    """Muon as its formula has it, with an exact singular value decomposition."""
    moment = torch.zeros_like(weight)
    for gradient in gradients:
        moment = 0.95 * moment + 0.05 * gradient
        u, _, v = torch.linalg.svd(0.05 * gradient + 0.95 * moment, full_matrices=False)
        scale = max(1.0, weight.shape[0] / weight.shape[1]) ** 0.5
        weight = weight * (1 - lr * 0.1) - lr * scale * (u @ v)
    return weight


@pytest.mark.parametrize("shape", [(24, 24), (48, 16), (16, 48)])
def test_a_step_of_muon_is_that_of_torch_and_near_the_exact_one(
    shape: tuple[int, int], device: torch.device
) -> None:
    torch.manual_seed(0)
    begin = torch.randn(2, *shape).to(device)
    gradients = [torch.randn(2, *shape).to(device) for _ in range(3)]
    parameters = [nn.Parameter(w.clone()) for w in begin]
    expected = [nn.Parameter(w.clone()) for w in begin]
    actual = Muon(parameters, lr=0.1, weight_decay=0.1)
    torchs = torch.optim.Muon(expected, lr=0.1, weight_decay=0.1)
    for gradient in gradients:
        for a, b, g in zip(parameters, expected, gradient, strict=True):
            a.grad, b.grad = g.clone(), g.clone()
        actual.step()
        torchs.step()
    for place, (a, b) in enumerate(zip(parameters, expected, strict=True)):
        moved = (a - begin[place]).norm()
        assert (a - b).norm() < 0.02 * moved  # theirs computes in bf16
        exact = plain_muon(begin[place], [g[place] for g in gradients], 0.1)
        assert (a - exact).norm() < 0.35 * moved  # five rounds: singular values 0.7 to 1.2


def test_orthogonal_keeps_singular_vectors_and_evens_out_their_values(device: torch.device) -> None:
    torch.manual_seed(0)
    scales = torch.tensor([1e-3, 1.0, 1e3])[:, None, None]
    turned = orthogonal((torch.randn(3, 20, 12) * scales).to(device)).float()
    values = torch.linalg.svdvals(turned)
    assert turned.shape == (3, 20, 12) and 0.6 < values.min() and values.max() < 1.3


def test_muon_takes_the_matrices_of_blocks_and_adamw_all_else() -> None:
    model = Transformer(TINY)
    optimizer = build_optimizer(model, model.parameters(), replace(OPTIM, kind="muon"))
    names = {id(p): n for n, p in model.named_parameters()}
    muon = {names[id(p)] for p in optimizer.param_groups[0]["params"]}
    rest = {names[id(p)] for group in optimizer.param_groups[1:] for p in group["params"]}
    assert muon | rest == set(names.values()) and not muon & rest
    assert all(n.endswith("_proj.weight") for n in muon) and len(muon) == 7 * 2
    lora.adapt(model, rank=2)  # leaves no matrix of a block to be trained
    with pytest.raises(SettingError, match="no matrix"):
        build_optimizer(model, model.parameters(), replace(OPTIM, kind="muon"))
    with pytest.raises(SettingError, match="kind='sgd'"):
        OptimConfig(kind="sgd")
    with pytest.raises(SettingError, match="no matrix"):
        build_optimizer(nn.Linear(2, 2), nn.Linear(2, 2).parameters(), OptimConfig(kind="muon"))


def untimed() -> LanguageTask:
    return Timed(Clock())


def test_a_run_with_muon_and_an_average_goes_on_to_the_bit(tmp_path: Path) -> None:
    optim = replace(OPTIM, kind="muon", average=0.8)
    uninterrupted = RunConfig(tmp_path / "whole", steps=12, log_every=1, save_every=5)
    unbroken = untimed()
    train(unbroken, uninterrupted, optim)
    part = replace(uninterrupted, out=tmp_path / "part")
    train(untimed(), replace(part, stop_after=5), optim)
    resumed = untimed()
    train(resumed, part, optim)
    losses = [[r["loss"] for r in read_metrics(run.out)] for run in (uninterrupted, part)]
    assert losses[0] == losses[1] and losses[0][-1] < losses[0][0]
    assert {r["lr"] for r in read_metrics(uninterrupted.out)} != {OPTIM.lr}
    for a, b in zip(unbroken.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)
    result, stored = (
        checkpoint.weights(uninterrupted.out),
        checkpoint.load(uninterrupted.out)[0]["model"],
    )
    after = unbroken.model.state_dict()
    assert all(torch.equal(result[n], after[n]) for n in after)
    assert not torch.equal(result["lm_head.weight"], stored["lm_head.weight"])


def test_the_average_is_that_of_its_formula_and_is_only_lent() -> None:
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(0.0)
        average, expected = WeightAverage(model, 0.5), 0.0
        for count in range(1, 6):
            model.weight.fill_(float(count))
            average.update()
            stays = min(0.5, (1 + count) / (10 + count))
            expected = stays * expected + (1 - stays) * count
    with average.applied():
        assert float(model.weight.detach()) == pytest.approx(expected)
    assert float(model.weight.detach()) == 5.0
    average.apply()
    assert float(model.weight.detach()) == pytest.approx(expected)


def test_an_older_run_without_the_new_settings_can_be_gone_on_with(tmp_path: Path) -> None:
    run = RunConfig(tmp_path, steps=4, stop_after=2)
    train(untimed(), run, OPTIM)
    path = tmp_path / "step-00000002" / "state.json"
    state = json.loads(path.read_text())
    for name in ("kind", "muon_lr", "average"):
        del state["optim"][name]
    del state["run"]["minutes"]
    path.write_text(json.dumps(state))
    train(untimed(), replace(run, stop_after=0), OPTIM)
    assert checkpoint.steps(tmp_path)[-1] == 4
