from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tolerances import assert_close, assert_same_losses
from torch.autograd import forward_ad

from earlyfusion.config import PRESETS
from earlyfusion.data.packing import PackedBatch, Packer, RoleWeights, pack_rows
from earlyfusion.errors import CheckpointError, DataError, SettingError
from earlyfusion.model.attention import CausalAttend
from earlyfusion.model.transformer import Transformer
from earlyfusion.model.vqgan import VQGAN
from earlyfusion.processor import (
    ANSWER_IMAGE,
    ANSWER_TEXT,
    CONTROL,
    END,
    PROMPT_TEXT,
    TokenSequence,
)
from earlyfusion.recipes.run import override
from earlyfusion.train import checkpoint
from earlyfusion.train.image_tokenizer import ImageTokenizerTask, VQLossConfig
from earlyfusion.train.language import BatchPrefetcher, LanguageTask, masked_mean
from earlyfusion.train.loss import head_loss, next_token_loss
from earlyfusion.train.monitor import read_metrics
from earlyfusion.train.optim import OptimConfig, learning_rate
from earlyfusion.train.trainer import RunConfig, train

TINY = PRESETS["tiny"]
OPTIM = OptimConfig(lr=1e-2, warmup_steps=2, eps=1e-8)


def document(number: int) -> TokenSequence:
    generator = torch.Generator().manual_seed(number)
    size = int(torch.randint(4, 12, (), generator=generator))
    ids = torch.randint(5, TINY.vocab_size, (size,), generator=generator).tolist()
    half = size // 2
    role = [CONTROL] + [PROMPT_TEXT] * (half - 1) + [ANSWER_TEXT] * (size - half - 1) + [END]
    return TokenSequence(ids=ids, role=role)


def language_task(device: torch.device | str = "cpu") -> LanguageTask:
    torch.manual_seed(0)
    model = Transformer(TINY, 0.1)
    model.init_weights()
    model.to(device)
    return LanguageTask(model, Packer(document, RoleWeights(), rows=2, length=32, pad=1))


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(run)]


def test_fifty_steps_twice_give_the_same_losses_to_the_bit(
    tmp_path: Path, device: torch.device
) -> None:
    for name in ("a", "b"):
        train(
            language_task(device),
            RunConfig(tmp_path / name, device=str(device), steps=50, log_every=1),
            OPTIM,
        )
    first = losses(tmp_path / "a")
    assert len(first) == 50
    assert_same_losses(first, losses(tmp_path / "b"), device)
    assert len(set(first)) > 40  # the run does move


def test_a_stopped_run_goes_on_as_if_it_had_not(tmp_path: Path, device: torch.device) -> None:
    uninterrupted = RunConfig(
        tmp_path / "whole", device=str(device), steps=20, log_every=1, save_every=7
    )
    train(language_task(device), uninterrupted, OPTIM)
    part = replace(uninterrupted, out=tmp_path / "part", stop_after=7)
    train(language_task(device), part, OPTIM)
    train(language_task(device), replace(part, stop_after=0), OPTIM)
    assert_same_losses(losses(part.out), losses(uninterrupted.out), device)
    assert checkpoint.steps(part.out) == [14, 20]


def _endless(out: str) -> None:
    torch.set_num_threads(1)  # sums in another order would differ in the last bit
    train(language_task(), RunConfig(Path(out), steps=5000, log_every=1, save_every=3), OPTIM)


def test_a_killed_run_goes_on_to_the_same_losses(tmp_path: Path) -> None:
    out = tmp_path / "killed"
    process = multiprocessing.get_context("spawn").Process(target=_endless, args=(str(out),))
    process.start()
    assert process.pid is not None
    deadline = time.monotonic() + 200
    while len(checkpoint.steps(out)) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    reached = checkpoint.steps(out)[-1]
    run = RunConfig(
        out, device="cpu", steps=5000, log_every=1, save_every=3, stop_after=reached + 100
    )
    train(language_task(), run, OPTIM)
    unbroken = replace(run, out=tmp_path / "unbroken")
    train(language_task(), unbroken, OPTIM)
    assert losses(out) == losses(unbroken.out)


def test_a_checkpoint_cut_short_does_not_count(tmp_path: Path) -> None:
    checkpoint.Saver(tmp_path, keep=2, in_background=False).save(
        1, {"x": torch.ones(2)}, {"note": 1}
    )
    (tmp_path / ".partial-00000002").mkdir()
    tensors, state = checkpoint.load(tmp_path)
    assert state == {"note": 1, "step": 1} and torch.equal(tensors["x"], torch.ones(2))
    for step in (3, 4):
        checkpoint.Saver(tmp_path, keep=2, in_background=False).save(step, {}, {})
    assert checkpoint.steps(tmp_path) == [3, 4]
    assert not list(tmp_path.glob(".partial*"))


def test_another_setting_in_the_same_folder_is_refused(
    tmp_path: Path, device: torch.device
) -> None:
    run = RunConfig(tmp_path, device=str(device), steps=4, stop_after=1)
    train(language_task(device), run, OPTIM)
    with pytest.raises(CheckpointError, match="steps"):
        train(language_task(device), replace(run, steps=9), OPTIM)
    with pytest.raises(CheckpointError, match="out folder"):
        train(language_task(device), run, replace(OPTIM, lr=1.0))
    other = language_task(device)
    other.model = Transformer(replace(TINY, num_hidden_layers=1))
    with pytest.raises(CheckpointError, match="another shape"):
        train(other, run, OPTIM)
    with pytest.raises(CheckpointError, match="train it first"):
        checkpoint.load(tmp_path / "nothing")


def test_the_logs_have_a_row_a_step_in_json_and_tensorboard(
    tmp_path: Path, device: torch.device
) -> None:
    train(
        language_task(device), RunConfig(tmp_path, device=str(device), steps=3, log_every=1), OPTIM
    )
    rows = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [0, 1, 2]
    assert {"loss", "text_nats", "image_nats", "log_z_squared", "grad_norm", "lr"} <= set(rows[0])
    assert list((tmp_path / "tensorboard").iterdir())


def test_a_loss_that_is_no_number_ends_the_run_with_a_sentence(
    tmp_path: Path, device: torch.device
) -> None:
    task = language_task(device)
    with torch.no_grad():
        task.model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(SettingError, match=r"step 0 is nan: lower lr=0\.01"):
        train(task, RunConfig(tmp_path, device=str(device)), OPTIM)


def test_figures_of_a_step_do_not_wait_for_the_device(device: torch.device) -> None:
    values, chosen = torch.rand(3, 5).to(device), (torch.arange(15).view(3, 5) % 3 == 0).to(device)
    values[0, 1] = torch.nan  # not chosen
    assert_close(masked_mean(values, chosen), values[chosen].mean())
    assert masked_mean(values, torch.zeros_like(chosen)).isnan()
    # On the meta device there are no values, so that a look at one fails.
    assert masked_mean(values.to("meta"), chosen.to("meta")).shape == ()


def test_loss_is_weighted_cross_entropy_plus_z_loss(device: torch.device) -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(2, 5, 11).to(device), torch.randint(0, 11, (2, 5)).to(device)
    weight = torch.rand(2, 5).to(device)
    weight[0, :2] = 0
    nats = -logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    log_z = logits.exp().sum(-1).log()
    expected = ((nats + 0.1 * log_z**2) * weight).sum() / weight.sum()
    loss = next_token_loss(logits, targets, weight, z_weight=0.1)
    assert_close(loss.total, expected)
    moved = logits.clone()
    moved[0, :2] += 3  # prompts are masked: no change
    assert_close(next_token_loss(moved, targets, weight, 0.1).total, expected)
    assert not torch.allclose(next_token_loss(logits, targets, weight, 0.0).total, expected)


@pytest.mark.parametrize("block", [7, 256])
def test_head_loss_is_the_loss_of_the_logits(block: int, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(block)
    x = torch.randn(3, 50, 16, generator=generator).to(device).requires_grad_()
    head = torch.randn(40, 16, generator=generator).to(device).requires_grad_()
    targets = torch.randint(0, 40, (3, 50), generator=generator).to(device)
    weight = torch.rand(3, 50, generator=generator)
    weight = (weight * (torch.rand(3, 50, generator=generator) > 0.4)).to(device)
    plain = next_token_loss(x @ head.T, targets, weight, z_weight=0.01)
    fused = head_loss(x, head, targets, weight, z_weight=0.01, block=block)
    assert_close(fused.total, plain.total)
    assert_close(fused.log_z_squared, plain.log_z_squared)
    counted = weight > 0
    assert_close(fused.nats_BT[counted], plain.nats_BT[counted])
    assert not fused.nats_BT[~counted].any()
    expected = torch.autograd.grad(3 * plain.total, (x, head))
    for actual, reference in zip(
        torch.autograd.grad(3 * fused.total, (x, head)), expected, strict=True
    ):
        assert_close(actual, reference)


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")  # torch's own
@pytest.mark.parametrize("way", ["graph", "constant", "functions", "hessian", "forward"])
def test_head_loss_has_every_derivative_of_the_loss_of_the_logits(
    way: str, device: torch.device
) -> None:
    generator = torch.Generator().manual_seed(1)
    x, head = (torch.randn(size, generator=generator).to(device) for size in ((2, 9, 8), (20, 8)))
    targets = torch.randint(0, 20, (2, 9), generator=generator).to(device)
    weight = torch.rand(2, 9, generator=generator).to(device)
    weight[0, :4] = 0

    def fused(x: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        return head_loss(x, head, targets, weight, z_weight=0.1, block=5).total

    def plain(x: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        return next_token_loss(x @ head.T, targets, weight, z_weight=0.1).total

    def twice(call: Callable[..., torch.Tensor]) -> tuple[torch.Tensor, ...]:
        given = [one.clone().requires_grad_() for one in (x, head)]
        loss = call(*given).square() if way == "graph" else call(*given)
        first = torch.autograd.grad(loss, given, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), given)

    def derived(call: Callable[..., torch.Tensor]) -> tuple[torch.Tensor, ...]:
        if way in ("graph", "constant"):
            return twice(call)
        if way == "functions":
            return torch.func.grad(call, (0, 1))(x, head)
        if way == "hessian":
            gradient = torch.func.grad(call, 1)
            return torch.func.jvp(lambda h: gradient(x, h), (head,), (head.sin(),))
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x.clone().requires_grad_(), x.cos())
            tangent = forward_ad.unpack_dual(call(dual, head)).tangent
            assert tangent is not None
            return (tangent.detach(),)

    for actual, expected in zip(derived(fused), derived(plain), strict=True):
        assert_close(actual, expected, atol=1e-5, rtol=1e-4)


def test_head_loss_of_nothing_is_zero(device: torch.device) -> None:
    x, head = (torch.randn(size, device=device).requires_grad_() for size in ((1, 4, 8), (5, 8)))
    targets = torch.zeros(1, 4, dtype=torch.long, device=device)
    loss = head_loss(x, head, targets, torch.zeros(1, 4, device=device))
    loss.total.backward()
    assert loss.total == 0 and x.grad is not None and not x.grad.any()


def test_packed_documents_give_the_gradient_of_the_documents_alone(device: torch.device) -> None:
    torch.manual_seed(0)
    model = Transformer(TINY).double()
    model.init_weights()
    model.to(device)
    documents = [document(n) for n in (3, 4, 5)]

    def gradients(rows: list[list[TokenSequence]]) -> dict[str, torch.Tensor]:
        model.zero_grad()
        for row in rows:
            batch = pack_rows([row], RoleWeights(), 40, 1).to(device)
            tokens, targets, number, positions, weight, _ = batch
            logits = model(tokens, positions, [CausalAttend(number)] * TINY.num_hidden_layers)
            loss = next_token_loss(logits.double(), targets, weight, 1e-5)
            (loss.total * weight.sum()).backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    packed, alone = gradients([documents]), gradients([[d] for d in documents])
    for name in alone:
        assert_close(packed[name], alone[name], atol=1e-5, rtol=1e-4)


def test_weights_follow_roles_and_targets_follow_tokens() -> None:
    role = [CONTROL, PROMPT_TEXT, CONTROL, ANSWER_TEXT, ANSWER_IMAGE, END]
    example = TokenSequence(ids=[0, 7, 8, 9, 10, 2], role=role)
    weights = RoleWeights(prompt_text=0.1, answer_text=3.0, answer_image=2.0, end=0.5)
    packed = pack_rows([[example]], weights, 7, pad=1)
    tokens, targets, number, positions, weight, image = (column[0] for column in packed)
    assert tokens.tolist() == [0, 7, 8, 9, 10, 1, 1]
    assert targets.tolist() == [7, 8, 9, 10, 2, 1, 1]
    assert positions.tolist() == [0, 1, 2, 3, 4, 0, 1]
    assert number.tolist() == [0, 0, 0, 0, 0, 1, 1]
    assert_close(weight, torch.tensor([0.1, 0, 3, 2, 0.5, 0, 0]))
    assert image.tolist() == [False, False, False, True, False, False, False]


def test_each_document_is_fetched_once_and_again_after_a_jump() -> None:
    fetched: list[int] = []

    def stream(number: int) -> TokenSequence:
        fetched.append(number)
        return document(number)

    packer = Packer(stream, RoleWeights(), rows=2, length=32, pad=1)
    first = packer.next()
    packer.next()
    assert fetched == list(range(packer.cursor + 1))  # one waits for the next row
    packer.cursor = 0
    assert all(torch.equal(one, other) for one, other in zip(packer.next(), first, strict=True))


class Noted:
    """A transfer that notes what it sends, for a device that is there at once."""

    def __init__(self) -> None:
        self.sent = 0

    def send(self, batch: PackedBatch) -> PackedBatch:
        self.sent += 1
        return batch

    def receive(self, batch: PackedBatch) -> PackedBatch:
        return batch


def test_batches_prepared_ahead_are_those_of_the_packer() -> None:
    def packer() -> Packer:
        return Packer(document, RoleWeights(), rows=2, length=32, pad=1)

    plain, noted = packer(), Noted()
    ahead = BatchPrefetcher(packer(), noted)
    for number in range(5):
        assert ahead.cursor == plain.cursor  # what is only prepared is not used up
        batches = ahead.next(), plain.next()
        assert all(torch.equal(a, b) for a, b in zip(*batches, strict=True))
        if number == 2:
            ahead.seek(40)
            plain.cursor = 40
    ahead.seek(0)  # waits for the last one
    assert noted.sent == 5 + 2


def test_an_error_of_a_batch_ahead_is_raised_when_it_is_asked_for() -> None:
    def stream(number: int) -> TokenSequence:
        if number > 8:
            raise DataError("no more")
        return document(number)

    ahead = BatchPrefetcher(Packer(stream, RoleWeights(), rows=1, length=32, pad=1), Noted())
    with pytest.raises(DataError, match="no more"):
        for _ in range(9):
            ahead.next()


def test_a_run_with_batches_ahead_goes_on_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    uninterrupted = RunConfig(
        tmp_path / "whole", device=str(device), steps=12, log_every=1, save_every=5
    )
    train(language_task(device), uninterrupted, OPTIM)

    def next_batch(task: Any, device: torch.device) -> PackedBatch:
        task._prefetcher = task._prefetcher or BatchPrefetcher(task._packer, Noted())
        return task._prefetcher.next()

    monkeypatch.setattr(LanguageTask, "_next_batch", next_batch)
    part = replace(uninterrupted, out=tmp_path / "part", stop_after=5)
    train(language_task(device), part, OPTIM)
    assert checkpoint.load_state(part.out)["next_document"] > 0
    train(language_task(device), replace(part, stop_after=0), OPTIM)
    assert_same_losses(losses(part.out), losses(uninterrupted.out), device)


def test_a_document_longer_than_a_row_is_refused() -> None:
    packer = Packer(document, RoleWeights(), rows=1, length=4, pad=1)
    with pytest.raises(DataError, match="limit 5"):
        for _ in range(10):
            packer.next()


@pytest.mark.parametrize("codebook", ["ema", "gradient"])
@pytest.mark.parametrize("adversarial", [0.0, 0.1])
def test_the_image_tokenizer_learns_and_resumes(
    tmp_path: Path, codebook: str, adversarial: float, device: torch.device
) -> None:
    def task() -> ImageTokenizerTask:
        torch.manual_seed(0)
        config = VQLossConfig(
            codebook=codebook,
            ramp_steps=3,
            revive_every=4,
            adversarial=adversarial,
            adversarial_from=6,
            critic_layers=1,
            critic_width=8,
        )

        colours = torch.tensor([[1.0, -1, -1], [-1, 1, -1], [-1, -1, 1], [1, 1, -1]])
        images = colours.view(4, 3, 1, 1).expand(4, 3, 16, 16).to(device)
        model = VQGAN(TINY.vq_config).to(device)
        return ImageTokenizerTask(model, config, lambda _: images, 40)

    run = RunConfig(tmp_path / "whole", device=str(device), steps=40, log_every=1, save_every=100)
    gentle = replace(OPTIM, lr=2e-3, decay="constant")
    train(task(), run, gentle)
    rows = read_metrics(run.out)
    assert rows[-1]["psnr"] > rows[0]["psnr"] + 3
    part = replace(run, out=tmp_path / "part")
    train(task(), replace(part, stop_after=11), gentle)
    train(task(), part, gentle)
    assert_same_losses(losses(part.out), losses(run.out), device)


@pytest.mark.parametrize("decay", ["exponential", "cosine", "constant"])
def test_learning_rate_warms_up_and_decays(decay: str) -> None:
    config = OptimConfig(lr=1.0, warmup_steps=10, decay=decay, final_ratio=0.1)
    rates = [learning_rate(config, step, 110) for step in range(111)]
    assert rates[0] == pytest.approx(0.1) and rates[10] == pytest.approx(1.0)
    assert rates[110] == pytest.approx(1.0 if decay == "constant" else 0.1)
    assert sorted(rates[10:], reverse=True) == rates[10:]


def test_overrides_reach_nested_fields_and_name_what_is_wrong() -> None:
    from earlyfusion.mini.image_tokenizer import config

    changed = override(config, ["steps=7", "run.out=runs/x", "attn_resolutions=16,8", "l2=0.5"])
    assert changed.run.steps == 7 and changed.run.out == Path("runs/x")
    assert changed.model.attn_resolutions == (16, 8) and changed.loss.l2 == 0.5
    assert config.run.steps != 7
    for item, words in [
        ("nothing=1", "unknown"),
        ("steps", "field=value"),
        ("steps=many", "cannot be read as int"),
        ("decay=steps", "choose one of"),
        ("precision=fp8", "use one of fp32, bf16"),
        ("perceptual=1", "perceptual_weights"),
        ("lr=nan", "lr='nan' cannot be read as float"),
        ("clip=inf", "clip='inf' cannot be read as float"),
        ("eps=0", "eps=0.0 must be positive"),
        ("seed=-1", "seed=-1 must be a whole number from 0"),
        ("seed=9223372036854775808", "must be a whole number from 0"),
    ]:
        with pytest.raises(SettingError, match=words):
            override(config, [item])
    for weight in (-1.0, float("nan")):
        with pytest.raises(SettingError, match=r"end=.* is not a weight of the loss"):
            RoleWeights(end=weight)
