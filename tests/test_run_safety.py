"""A run that goes wrong: bad steps, kills while it saves, and what it reports."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from distributed_case import LENGTH, MODEL, OPTIM, document
from tolerances import assert_same, assert_same_losses
from torch._subclasses.fake_tensor import FakeTensorMode
from typer.testing import CliRunner

from earlyfusion import Chameleon
from earlyfusion.cli import app
from earlyfusion.config import PRESETS, ModelConfig
from earlyfusion.data.packing import Packer, RoleWeights, pack_rows
from earlyfusion.errors import SettingError
from earlyfusion.model.attention import Attend, CausalAttend
from earlyfusion.model.rotary import rotary_tables
from earlyfusion.model.transformer import Block, Transformer
from earlyfusion.parallel import ParallelConfig
from earlyfusion.processor import ANSWER_TEXT, CONTROL, TokenSequence
from earlyfusion.recipes.run import plan as recipe_plan
from earlyfusion.recipes.run import run
from earlyfusion.train import checkpoint, plan
from earlyfusion.train.curves import draw_curves
from earlyfusion.train.language import LanguageTask
from earlyfusion.train.loss import next_token_loss
from earlyfusion.train.monitor import matmul_peak, read_metrics
from earlyfusion.train.trainer import RunConfig, train
from earlyfusion.train.watch import Watch, WatchConfig


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_one_process_recomputes_and_compiles_if_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpointing: str, device: torch.device
) -> None:
    compiled: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda call, **_: compiled.append(call) or call)
    for name, parallel in (("plain", "none"), ("set", checkpointing)):
        run = RunConfig(
            tmp_path / name,
            3,
            device=str(device),
            log_every=1,
            compile=name == "set",
            parallel=ParallelConfig(checkpointing=parallel),
        )
        train(Spoiled(lambda *_: 1.0), run, OPTIM)
    rows = [[row["loss"] for row in read_metrics(tmp_path / n)] for n in ("plain", "set")]
    assert_same_losses(rows[1], rows[0], device)
    assert len(compiled) == MODEL.num_hidden_layers


class Spoiled(LanguageTask):
    """Its loss is spoiled from document `begin` to `end`, or wherever `when` says."""

    def __init__(self, factor: Callable[[int, int], float]) -> None:
        torch.manual_seed(0)
        model = Transformer(MODEL, dropout=0.1)
        model.init_weights()
        super().__init__(model, Packer(document, RoleWeights(), rows=2, length=LENGTH, pad=1))
        self.cursors: list[int] = []
        self._spoil = factor

    def loss(self, step: int) -> tuple[torch.Tensor, dict[str, torch.Tensor], float]:
        self.cursors.append(self._packer.cursor)
        loss, figures, units = super().loss(step)
        return loss * self._spoil(step, self.cursors[-1]), figures, units


def weights(task: LanguageTask) -> list[torch.Tensor]:
    return [p.detach().clone() for p in task.parameters()]


def notes(run: Path) -> list[str]:
    return [json.loads(line)["note"] for line in (run / "notes.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_a_bad_step_is_skipped_and_counted(
    tmp_path: Path, factor: float, device: torch.device
) -> None:
    recorded: list[list[torch.Tensor]] = []

    class Watched(Spoiled):
        def loss(self, step: int) -> tuple[torch.Tensor, dict[str, torch.Tensor], float]:
            recorded.append(weights(self))
            return super().loss(step)

    task = Watched(lambda step, _: factor if step == 3 else 1.0)
    train(task, RunConfig(tmp_path, 6, device=str(device), log_every=1), OPTIM)
    rows = read_metrics(tmp_path)
    assert [row.get("skipped", 0) for row in rows] == [0, 0, 0, 1, 1, 1]
    assert rows[3]["loss"] is None and all(row["loss"] for row in rows[4:])
    assert all(torch.equal(a, b) for a, b in zip(recorded[3], recorded[4], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(recorded[2][:1], recorded[3][:1], strict=True))
    assert checkpoint.load(tmp_path)[1]["watch"]["skipped"] == 1


def test_a_run_whose_last_steps_change_nothing_says_so(tmp_path: Path) -> None:
    task = Spoiled(lambda step, _: math.nan if step >= 2 else 1.0)
    train(task, RunConfig(tmp_path, 4, device="cpu"), OPTIM)
    assert "ends with the weights of step 2: since then the loss" in notes(tmp_path)[-1]


def test_a_spike_is_skipped_once_the_mean_is_known() -> None:
    watch = Watch(WatchConfig(spike=2.0))
    assert watch.accepts(0, 100.0, 1.0)
    assert all(watch.accepts(step, 5.0, 1.0) for step in range(1, 400))
    assert not watch.accepts(400, 11.0, 1.0) and watch.skipped == 1
    assert watch.accepts(401, 8.0, 1.0) and watch.in_row == 0
    assert not watch.accepts(402, 5.0, math.nan)
    assert Watch(WatchConfig()).accepts(0, 1e9, 1.0)


def test_several_bad_steps_roll_back_and_skip_their_documents(
    tmp_path: Path, device: torch.device
) -> None:
    """Documents 30 to 49 give no number: the run goes round them and ends."""
    task = Spoiled(lambda _, cursor: math.nan if 30 <= cursor < 50 else 1.0)
    run = RunConfig(tmp_path, 20, device=str(device), log_every=1, save_every=4)
    train(task, run, OPTIM)
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == list(range(20))
    state = checkpoint.load(tmp_path)[1]
    assert state["watch"]["roll_backs"] >= 1 and state["watch"]["skipped"] >= 3
    assert task.cursors == sorted(task.cursors)  # no document twice
    assert "rolled back to step" in notes(tmp_path)[0]
    assert all(torch.isfinite(w).all() for w in weights(task))


def test_a_diverged_run_ends_with_a_sentence(tmp_path: Path, device: torch.device) -> None:
    task = Spoiled(lambda step, _: math.nan if step >= 4 else 1.0)
    watch = WatchConfig(max_roll_backs=2)
    run = RunConfig(tmp_path, 20, device=str(device), save_every=4, watch=watch)
    with pytest.raises(SettingError, match=r"step 4 is nan: lower lr=0\.005"):
        train(task, run, OPTIM)
    assert len(notes(tmp_path)) == 2
    for wrong in ({"roll_back_after": 0}, {"spike": 0.5}, {"growth": 1.0}):
        with pytest.raises(SettingError):
            WatchConfig(**wrong)


def test_growth_of_the_output_is_reported(tmp_path: Path) -> None:
    watch = Watch(WatchConfig(growth=2.0))
    notes_of_step = [watch.growth_notes({"output_norm": 1.0 + step / 10}) for step in range(40)]
    noted_steps = [step for step, sentences in enumerate(notes_of_step) if sentences]
    assert 10 < noted_steps[0] < 20 and 1 <= len(noted_steps) <= 2
    assert "output_norm grew from 1 to 2" in notes_of_step[noted_steps[0]][0]
    assert not any(watch.growth_notes({"top_logit": math.nan, "loss": 9.0}) for _ in range(9))


def test_the_output_norm_is_that_of_the_last_block(tmp_path: Path) -> None:
    task = Spoiled(lambda *_: 1.0)
    task.model.eval()
    caught: list[torch.Tensor] = []
    task.model.model.layers[-1].register_forward_hook(lambda *a: caught.append(a[2]))
    _, figures, _ = task.loss(0)
    torch.testing.assert_close(figures["output_norm"], caught[0].detach().norm(dim=-1).mean())
    batch = Packer(document, RoleWeights(), rows=2, length=LENGTH, pad=1).next()
    assert 0 < figures["top_logit"] < 10 and batch.tokens_BT.shape == (2, LENGTH)


def _kill_while_saving(run: Path, kills: int, seed: int) -> None:
    """Kill a process that does nothing but save, at random moments, and read what is left."""
    generator, newest = random.Random(seed), 0
    script = Path(__file__).with_name("saving_case.py")
    with subprocess.Popen(
        [sys.executable, str(script), str(run)],
        env=os.environ | {"PYTHONPATH": str(script.parent.parent)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as parent:
        assert parent.stdin is not None and parent.stdout is not None
        pause = 0.0
        for number in range(kills):
            parent.stdin.write("beside\n" if number % 2 else "at once\n")
            parent.stdin.flush()
            pid = int(parent.stdout.readline())
            pause = pause or _time_of_a_save(run)
            time.sleep(generator.random() * 2 * pause)
            os.kill(pid, signal.SIGKILL)
            newest = _read_what_is_left(run, newest)
        parent.stdin.close()
    assert newest > 3 + kills // 10  # it did save between the kills


def _time_of_a_save(run: Path) -> float:
    start = time.monotonic()
    while (checkpoint.steps(run) or [0])[-1] < 3 and time.monotonic() < start + 60:
        time.sleep(0.001)
    return (time.monotonic() - start) / 3


def _read_what_is_left(run: Path, newest: int) -> int:
    tensors, state = checkpoint.load(run)
    step = int(state["step"])
    assert step >= newest and state["twice"] == 2 * step and int(tensors["y"]) == step
    assert torch.equal(tensors["model"]["x"], torch.full((64, 1024), float(step)))
    assert all(checkpoint.load(run, s)[1]["step"] == s for s in checkpoint.steps(run))
    return step


def test_ten_kills_while_saving_leave_a_complete_checkpoint(tmp_path: Path) -> None:
    _kill_while_saving(tmp_path, 10, seed=1)


@pytest.mark.slow
def test_two_hundred_kills_while_saving_leave_a_complete_checkpoint(tmp_path: Path) -> None:
    _kill_while_saving(tmp_path, 200, seed=2)


def test_a_checkpoint_written_in_the_background_is_that_of_its_step(
    tmp_path: Path, device: torch.device
) -> None:
    def learn(name: str, beside: bool) -> dict[str, torch.Tensor]:
        task = Spoiled(lambda *_: 1.0)
        run = RunConfig(tmp_path / name, 12, device=str(device), save_every=4, keep=9)
        train(task, replace(run, save_beside=beside), OPTIM)
        assert checkpoint.steps(run.out) == [4, 8, 12]
        model: dict[str, torch.Tensor] = checkpoint.load(run.out, 4)[0]["model"]
        return model

    at_once, beside = learn("at-once", False), learn("beside", True)
    for name, tensor in at_once.items():
        assert_same(beside[name].to(device), tensor)


def test_a_run_ends_with_its_curves_and_prints_its_speed(
    tmp_path: Path, device: torch.device
) -> None:
    task = Spoiled(lambda *_: 1.0)
    run = RunConfig(tmp_path, 6, device=str(device), log_every=1, peak_tflops=1e-3)
    train(task, run, OPTIM)
    row = read_metrics(tmp_path)[2]
    flops = plan.flops_per_token(MODEL, LENGTH)
    assert row["mfu"] == pytest.approx(row["per_second"] * flops / 1e9, rel=0.01)
    assert 0 <= row["eta_seconds"] < 60
    with PIL.Image.open(tmp_path / "curves.png") as chart:
        assert chart.width == 3 * 420 and chart.height >= 2 * 260
        blue = (np.asarray(chart) == (31, 98, 189)).all(-1).sum()
    assert blue > 1000
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "loss": 1.0}\n')
    assert draw_curves(tmp_path) is None
    assert 1e8 < matmul_peak(device, torch.float32) < 1e15


@pytest.mark.parametrize("name", ["tiny", "mini", "chameleon-7b", "chameleon-34b"])
def test_the_plan_counts_parameters_and_operations_as_the_model_does(name: str) -> None:
    config = PRESETS[name]
    with torch.device("meta"):
        model = Transformer(config)
    assert plan.parameters(config) == sum(p.numel() for p in model.parameters())
    names = ("norm", "embed_tokens")  # no products
    products = sum(
        p.numel() for n, p in model.named_parameters() if not any(name in n for name in names)
    )
    flops = plan.flops_per_token(config, config.max_position_embeddings)
    attention = 12 * config.num_hidden_layers * config.hidden_size * config.max_position_embeddings
    assert flops - attention == 6 * products


class _Flash(torch.autograd.Function):
    """Keeps what a fused attention keeps: its inputs, its output and a number a query."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:3], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, ...]:
        raise AssertionError("the plan runs no backward pass")


def kept_by_a_block(config: ModelConfig, tokens: int, dropout: float) -> int:
    """Bytes that one block in bf16 keeps for its backward pass, counted without memory for it."""
    attend: Attend = _Flash.apply
    kept: dict[int, int] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        return x

    with FakeTensorMode():
        torch.set_default_dtype(torch.bfloat16)
        block = Block(config, dropout).train()
        torch.set_default_dtype(torch.float32)
        x = torch.empty(1, tokens, config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
        rotary = rotary_tables(config, torch.arange(tokens)[None])
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            out = block(x, rotary, attend)
    shared = {t.untyped_storage()._cdata for t in (*block.parameters(), *rotary)}
    assert out.shape == x.shape
    return sum(size for key, size in kept.items() if key not in shared)


@pytest.mark.parametrize(("name", "dropout"), [("chameleon-7b", 0.1), ("chameleon-34b", 0.0)])
def test_the_plan_knows_what_a_block_keeps(name: str, dropout: float) -> None:
    config, tokens = PRESETS[name], 4096
    estimated = plan.activation_bytes(config, tokens, tensor=1, dropout=dropout)
    counted = kept_by_a_block(config, tokens, dropout) * config.num_hidden_layers
    assert estimated["none"] == pytest.approx(counted, rel=0.1)
    assert estimated["full"] == 2 * config.hidden_size * tokens * config.num_hidden_layers
    assert estimated["full"] < estimated["selective"] < estimated["none"]


def test_the_plan_of_the_paper() -> None:
    """At the efficiency that its GPU hours say, its GPUs take its days."""
    for name, gpus, rows, hours in (
        ("chameleon-7b", 1024, 2048, 856_481),
        ("chameleon-34b", 3072, 3072, 4_282_407),
    ):
        job = plan.Job(PRESETS[name], ParallelConfig(), rows, 4096, 1, 9.2e12, peak_tflops=312)
        line = plan.line(job, gpus)
        assert 0.4 < line.days * 24 * gpus * plan.MFU / hours < 0.5
        assert line.states == pytest.approx(16 * plan.parameters(job.model) / gpus)


def test_the_plan_is_printed_and_says_what_is_impossible() -> None:
    done = CliRunner().invoke(app, ["train", "pretrain_34b", "--plan"])
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert lines[0].startswith("34,294,308,864 parameters; 3,072 rows x 4,096 = 12,582,912 tokens")
    results = [line.split() for line in lines if line.lstrip()[:1].isdigit()][1:]
    assert [row[0] for row in results] == ["64", "128", "256", "512", "1,024", "2,048", "3,072"]
    assert results[-1][1:6] == ["48", "x", "8", "x", "8"] and "Assumed:" in lines
    done = CliRunner().invoke(app, ["train", "pretrain_7b", "--plan", "rows=192", "micro_rows=2"])
    assert "64 x 8 x 1" not in done.output and "multiple of 256" in done.output
    said = [line for line in done.output.splitlines() if "cannot be shared" in line]
    assert [line.partition(":")[0] for line in said] == ["64 GPUs", "128 GPUs and more"]


def test_the_paper_is_in_the_recipes() -> None:
    from earlyfusion.recipes.pretrain_7b import config as small
    from earlyfusion.recipes.pretrain_34b import config as large

    for config in (small, large):
        optim = config.optim
        assert (optim.lr, optim.beta1, optim.beta2, optim.eps) == (1e-4, 0.9, 0.95, 1e-5)
        assert (optim.weight_decay, optim.warmup_steps, optim.clip) == (0.1, 4000, 1.0)
        assert optim.decay == "exponential" and config.z_weight == 1e-5 and config.length == 4096
        assert config.run.steps * config.rows * config.length == pytest.approx(9.2e12, rel=1e-6)
    assert (small.rows * small.length, large.rows * large.length) == (2**23, 3 * 2**22)
    assert (small.dropout, large.dropout) == (0.1, 0.0)
    assert not small.model.swin_norm and large.model.swin_norm


def test_the_recipe_of_the_paper_runs_small(tmp_path: Path) -> None:
    """Rows to a model folder that loads: what differs from the 7B is size, not path."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"What is {n}?"},
                {"role": "assistant", "content": "A number."},
            ]
        }
        for n in range(40)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    size = Chameleon.load("mini").config.vocab_size
    fields = [f"data={tmp_path / 'rows.jsonl'}", f"vocab_size={size}", "hidden_size=32"]
    fields += ["intermediate_size=64", "num_attention_heads=2", "num_hidden_layers=1", "rows=4"]
    fields += [f"out={tmp_path / 'run'}", "length=128", "steps=2", "log_every=1", "device=cpu"]
    with pytest.raises(SettingError, match="multiple of 8"):
        run("pretrain_7b", fields)
    run("pretrain_7b", [*fields, "shard=0"])
    assert len(read_metrics(tmp_path / "run")) == 2
    small = Chameleon.load(str(tmp_path / "run" / "model"))
    assert small.config.hidden_size == 32 and small.config.vocab_size == size
    with pytest.raises(SettingError, match="vocab_size="):
        run("pretrain_7b", ["steps=2", f"out={tmp_path / 'other'}"])
    with pytest.raises(SettingError, match="no plan"):
        recipe_plan("mini_image_tokenizer", [])


def test_a_stopped_run_with_long_documents_resumes_at_its_document(
    tmp_path: Path, device: torch.device
) -> None:
    """Several micro batches a step, a stop in the middle of the documents, dropout on."""

    def task() -> LanguageTask:
        torch.manual_seed(0)
        model = Transformer(MODEL, dropout=0.1)
        model.init_weights()
        packer = Packer(document, RoleWeights(), rows=4, length=LENGTH, pad=1)
        return LanguageTask(model, packer, micro_rows=1)

    uninterrupted = RunConfig(tmp_path / "whole", 12, device=str(device), log_every=1)
    train(task(), uninterrupted, OPTIM)
    part = replace(uninterrupted, out=tmp_path / "part", stop_after=5)
    train(task(), part, OPTIM)
    train(task(), replace(part, stop_after=0), OPTIM)
    rows = [[row["loss"] for row in read_metrics(run.out)] for run in (uninterrupted, part)]
    assert_same_losses(rows[1], rows[0], device)
    assert len(rows[0]) == 12


def test_packing_without_its_mask_would_change_the_gradient() -> None:
    """What tests/test_train.py shows equal is not equal anyway."""
    torch.manual_seed(0)
    model = Transformer(MODEL).double()
    model.init_weights()
    row = [document(n) for n in (1, 2, 3)]
    tokens, targets, number, positions, weight, _ = pack_rows([row], RoleWeights(), 60, pad=1)

    def gradient(attend: CausalAttend, weight: torch.Tensor, z: float) -> torch.Tensor:
        model.zero_grad()
        logits = model(tokens, positions, [attend] * MODEL.num_hidden_layers)
        next_token_loss(logits, targets, weight, z).total.backward()
        assert model.lm_head.weight.grad is not None
        return model.lm_head.weight.grad.clone()

    correct = gradient(CausalAttend(number), weight, 1.0)
    no_mask = gradient(CausalAttend(), weight, 1.0)
    prompts_too = gradient(CausalAttend(number), torch.ones_like(weight), 1.0)
    no_z = gradient(CausalAttend(number), weight, 0.0)
    for wrong in (no_mask, prompts_too, no_z):
        assert (wrong - correct).abs().max() > 1e-3 * correct.abs().max()


def test_a_packed_row_gives_its_documents_back() -> None:
    documents = [document(n) for n in (1, 2, 3)]
    packed_row = pack_rows([documents], RoleWeights(), 60, pad=1)
    tokens, targets, number, positions, _, _ = (column[0] for column in packed_row)
    for place, packed in enumerate(documents):
        actual = number == place
        assert positions[actual].tolist() == list(range(len(packed) - 1))
        assert tokens[actual].tolist() == packed.ids[:-1]
        assert targets[actual].tolist() == packed.ids[1:]
    assert set(tokens[number == 3].tolist()) == set(targets[number == 3].tolist()) == {1}


def test_documents_that_fill_a_row_exactly_are_packed() -> None:
    def sized(ids: int) -> TokenSequence:
        return TokenSequence([9] * ids, [CONTROL] + [ANSWER_TEXT] * (ids - 1))

    def packer(sizes: list[int]) -> Packer:
        stream = [sized(size) for size in sizes]
        return Packer(lambda number: stream[number % len(stream)], RoleWeights(), 2, 10, pad=1)

    for sizes in ([11], [6, 6], [3, 9]):
        batch, read = packer(sizes).next(), packer(sizes)
        assert (batch.tokens_BT == 9).all() and (batch.weight_BT[:, 1:] > 0).all()
        assert batch.document_BT.amax() == len(sizes) - 1
        read.next()
        assert read.cursor == 2 * len(sizes)
        [row] = read.batches([sized(size) for size in sizes], rows=1)
        assert torch.equal(row.tokens_BT[0], batch.tokens_BT[0])


def calls_of_a_run(
    out: Path, device: torch.device, **settings: Any
) -> tuple[int, list[str], list[bool]]:
    """How often a block's feed-forward ran, which threads wrote, and whether samples were
    generated in bf16."""
    task, calls, threads, bf16 = Spoiled(lambda *_: 1.0), [], [], []
    task.model.model.layers[0].mlp.register_forward_hook(lambda *_: calls.append(1))
    write = checkpoint._write

    def recording_write(*given: Any) -> None:
        threads.append(threading.current_thread().name)
        write(*given)

    def record_autocast(step: int, folder: Path) -> dict[str, float]:
        bf16.append(torch.is_autocast_enabled(device.type))
        return {}

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(checkpoint, "_write", recording_write)
        train(task, RunConfig(out, 3, device=str(device), **settings), OPTIM, record_autocast)
    return len(calls), [name.partition("_")[0] for name in threads], bf16


def test_settings_of_a_run_take_effect(tmp_path: Path, device: torch.device) -> None:
    """None of them changes what is learnt, so losses would not show it."""
    plain = calls_of_a_run(tmp_path / "plain", device)
    assert plain == (3, ["MainThread"], [False])
    for checkpointing in ("full", "selective"):
        parallel = ParallelConfig(checkpointing=checkpointing)
        assert calls_of_a_run(tmp_path / checkpointing, device, parallel=parallel)[0] == 6
    assert calls_of_a_run(tmp_path / "beside", device, save_beside=True)[1] == ["checkpoint"]
    assert calls_of_a_run(tmp_path / "bf16", device, precision="bf16")[2] == [True]


def test_random_numbers_of_a_run_follow_its_seed(tmp_path: Path, device: torch.device) -> None:
    """The weights begin alike; dropout alone tells one seed from another."""
    for name, seed in (("one", 1), ("again", 1), ("other", 2)):
        run = RunConfig(tmp_path / name, 3, device=str(device), log_every=1, seed=seed)
        train(Spoiled(lambda *_: 1.0), run, OPTIM)
    one, repeated, other = (
        [row["loss"] for row in read_metrics(tmp_path / name)] for name in ("one", "again", "other")
    )
    assert_same_losses(repeated, one, device)
    assert one[0] != other[0]
