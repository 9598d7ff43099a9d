"""Training through the public trainer: tokens a second, share of the peak, memory."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch

from earlyfusion.bench.harness import OURS, Row
from earlyfusion.bench.shapes import SHAPES
from earlyfusion.config import ModelConfig
from earlyfusion.data.packing import Packer, RoleWeights
from earlyfusion.model.transformer import Transformer
from earlyfusion.processor import ANSWER_TEXT, TokenSequence
from earlyfusion.train.language import LanguageTask, job_of
from earlyfusion.train.monitor import read_metrics
from earlyfusion.train.optim import OptimConfig
from earlyfusion.train.plan import GIB, flops_per_token, line
from earlyfusion.train.trainer import RunConfig, train
from gpu_parts.settings import Settings, free, peak_gigabytes

PEAK = 989e12
"""What the makers of an H100 and an H200 say of bf16; shares of what was measured stand beside."""
DOCUMENTS = 64


class Size(NamedTuple):
    name: str
    config: ModelConfig
    rows: int
    length: int
    documents: int
    """Documents of a row: above 1 they are packed."""


class _Enough(Exception):
    """Ends a run before it writes the checkpoint with which every run closes."""


class _Steps(LanguageTask):
    """A training that ends after `most` steps."""

    most = 1

    def after(self, step: int) -> dict[str, float]:
        if step >= self.most:
            raise _Enough
        return super().after(step)


def sizes(settings: Settings) -> list[Size]:
    if settings.rehearses:
        tiny = SHAPES["tiny"]
        return [Size("tiny", tiny, 2, 32, 1), Size("tiny, packed", tiny, 2, 32, 4)]
    blocks = replace(SHAPES["7b"], num_hidden_layers=4)
    return [
        Size("four blocks of the 7b", blocks, 4, 4096, 1),
        Size("four blocks of the 7b, packed", blocks, 4, 4096, 8),
        Size("1b", SHAPES["1b"], 8, 2048, 1),
        Size("110m", SHAPES["110m"], 32, 2048, 1),
    ]


def training(settings: Settings) -> Iterator[Row]:
    """Without compilation first: to compile a size takes longer than to train it here."""
    for compiled in (False,) if settings.rehearses else (False, True):
        for size in sizes(settings):
            yield from _measured(settings, size, compiled)
            free()


def _measured(settings: Settings, size: Size, compiled: bool) -> Iterator[Row]:
    device, config = settings.device, size.config
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with tempfile.TemporaryDirectory(dir=settings.work) as out:
        run = RunConfig(
            Path(out),
            steps=100,
            device=settings.device_name,
            precision="bf16",
            compile=compiled,
            log_every=1,
            save_every=10**6,
            peak_tflops=PEAK / 1e12,
        )
        _run(settings, size, run)
        # The first steps compile, and let the allocator find its sizes.
        rates = [row["per_second"] for row in read_metrics(Path(out))]
    rate = median(rates[len(rates) // 2 :])
    flops = rate * flops_per_token(config, size.length // size.documents)
    measured = settings.limits().products
    what = f"training, {size.name}, {size.rows} x {size.length:,} tokens"
    what += ", compiled" if compiled else ""
    note = f"MFU {flops / PEAK:.0%} of 989 TFLOP/s, {flops / measured:.0%} of the measured peak"
    floor = measured / flops_per_token(config, size.length // size.documents)
    yield Row(what, "tokens/s", {OURS: rate}, note, floor)
    if device.type == "cuda":
        promised = line(job_of(config, run, size.rows, size.length, 0.0), 1).total("none")
        note = f"--plan says {promised / GIB:.1f} GiB"
        yield Row(f"{what}: peak memory", "GB", {OURS: peak_gigabytes(device)}, note)


def _run(settings: Settings, size: Size, run: RunConfig) -> None:
    each = size.length // size.documents
    source = torch.Generator().manual_seed(0)
    words = torch.randint(size.config.vocab_size, (DOCUMENTS, each + 1), generator=source).tolist()

    def document(number: int) -> TokenSequence:
        ids = words[number % DOCUMENTS]
        return TokenSequence(ids=list(ids), role=[ANSWER_TEXT] * len(ids))

    with settings.device:
        model = Transformer(size.config)
        model.init_weights(torch.Generator(settings.device).manual_seed(0))
    task = _Steps(model, Packer(document, RoleWeights(), size.rows, size.length, pad=1))
    task.most = 3 if settings.rehearses else 10
    try:
        train(task, run, OptimConfig(lr=1e-4, warmup_steps=1, decay="constant"))
    except _Enough:
        pass
