"""What the processes of test_parallel.py run: tiny trainings whose losses can be compared.

`torchrun ... distributed_case.py FOLDER CASE ...` runs cases one after another in one group.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch

from earlyfusion.config import PRESETS, ModelConfig
from earlyfusion.data.packing import Packer, RoleWeights
from earlyfusion.model.transformer import Transformer
from earlyfusion.parallel import ParallelConfig
from earlyfusion.processor import ANSWER_TEXT, CONTROL, END, PROMPT_TEXT, TokenSequence
from earlyfusion.train import lora
from earlyfusion.train.language import LanguageTask
from earlyfusion.train.optim import OptimConfig
from earlyfusion.train.trainer import RunConfig, train

MODEL = PRESETS["tiny"]
SWIN = replace(MODEL, swin_norm=True)
# The paper's eps: with a smaller one the first steps turn rounding of tiny gradients into signs.
OPTIM = OptimConfig(lr=5e-3, warmup_steps=4, eps=1e-5)
MUON = replace(OPTIM, kind="muon", muon_lr=0.01)
ROWS, LENGTH, STEPS = 4, 32, 20
IMAGES = np.arange(5, 200)
"""Tokens whose rows of the head are trained where only these are."""


def document(number: int) -> TokenSequence:
    """One of five documents, so that there is something to learn; its first half is a prompt."""
    generator = torch.Generator().manual_seed(number % 5)
    size = int(torch.randint(4, 20, (), generator=generator))
    ids = torch.randint(5, MODEL.vocab_size, (size,), generator=generator).tolist()
    half = size // 2
    role = [CONTROL] + [PROMPT_TEXT] * (half - 1) + [ANSWER_TEXT] * (size - half - 1) + [END]
    return TokenSequence(ids=ids, role=role)


@dataclass
class Case:
    """One training; `folder` names its run, so that cases can go on with one another's."""

    folder: str
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    model: ModelConfig = MODEL
    micro_rows: int = 0
    stop_after: int = 0
    precision: str = "fp32"
    beside: bool = False
    on_meta: bool = False
    compiled: bool = False
    part: str = "all"
    """What of the model is trained: a key of `plan.TRAINABLE`."""
    optim: OptimConfig = field(default_factory=lambda: OPTIM)
    killed_at: int = -1
    """The last process kills itself in this step, if it was not started again already."""

    def run(self, out: Path, stream: Callable[[int], TokenSequence] = document) -> None:
        torch.manual_seed(0)
        with torch.device("meta" if self.on_meta else "cpu"):
            model = Transformer(self.model)
        if not self.on_meta:
            model.init_weights()
        if self.part == "adapters":
            lora.adapt(model, rank=4)
        elif self.part == "image_head":
            lora.train_image_head(model, IMAGES)
        packer = Packer(stream, RoleWeights(), ROWS, LENGTH, pad=1)
        run = RunConfig(
            out / self.folder,
            STEPS,
            device="cpu",
            precision=self.precision,
            compile=self.compiled,
            save_every=10,
            save_beside=self.beside,
            log_every=1,
            stop_after=self.stop_after,
            parallel=self.parallel,
        )
        task = LanguageTask(model, packer, z_weight=1e-2, micro_rows=self.micro_rows)
        if self.killed_at >= 0:
            task.after = self._die  # type: ignore[method-assign]
        # Muon in fp32 on every CPU, as in bf16 the losses of equal runs differ by rounding.
        with patch("earlyfusion.train.optim.has_fast_bf16", return_value=False):
            train(task, run, self.optim)

    def _die(self, step: int) -> dict[str, float]:
        last = os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1)
        if step == self.killed_at and last and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        return {}


TENSOR = ParallelConfig(tensor=2)
CASES = {
    "one": Case("one"),
    "one in parts": Case("one-parts", micro_rows=1),
    "one swin": Case("one-swin", model=SWIN),
    "one bf16": Case("one-bf16", precision="bf16"),
    "one meta": Case("one-meta", on_meta=True),
    "fsdp": Case("fsdp"),
    "fsdp killed": Case("fsdp-killed", killed_at=12),
    "fsdp in parts": Case("fsdp-parts", micro_rows=1),
    "fsdp selective": Case("fsdp-selective", ParallelConfig(checkpointing="selective")),
    "fsdp full": Case("fsdp-full", ParallelConfig(checkpointing="full")),
    "fsdp bf16": Case("fsdp-bf16", precision="bf16"),
    "fsdp meta": Case("fsdp-meta", on_meta=True, beside=True),
    "fsdp half": Case("half", stop_after=10),
    "tensor": Case("tensor", TENSOR),
    "tensor swin": Case("tensor-swin", TENSOR, SWIN),
    "tensor meta": Case(
        "tensor-meta", ParallelConfig(tensor=2, checkpointing="full"), on_meta=True
    ),
    "tensor bf16": Case("tensor-bf16", TENSOR, precision="bf16"),
    "hybrid": Case("hybrid", ParallelConfig(shard=2)),
    "tensor fsdp": Case("tensor-fsdp", TENSOR),
    "tensor fsdp meta": Case("tensor-fsdp-meta", TENSOR, on_meta=True),
    "go on": Case("half"),
    "from one": Case("from-one"),
    "one adapters": Case("one-adapters", part="adapters"),
    "one head": Case("one-head", part="image_head"),
    "fsdp adapters": Case("fsdp-adapters", ParallelConfig(checkpointing="full"), part="adapters"),
    "fsdp head in parts": Case("fsdp-head-parts", part="image_head", micro_rows=1),
    "hybrid head": Case("hybrid-head", ParallelConfig(shard=2), part="image_head"),
    "one muon": Case("one-muon", optim=MUON),
    "fsdp muon": Case("fsdp-muon", optim=MUON),
    "fsdp muon half": Case("muon-half", optim=MUON, stop_after=10),
    "tensor muon": Case("tensor-muon", TENSOR, optim=MUON),
    "muon go on": Case("muon-half", optim=MUON),
    "compiled": Case("compiled", compiled=True),
}


def run(name: str, out: Path) -> None:
    CASES[name].run(out)


if __name__ == "__main__":
    for name in sys.argv[2:]:
        run(name, Path(sys.argv[1]))
