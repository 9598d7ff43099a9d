"""Forks a process for each line read, which saves checkpoints until it is killed."""

from __future__ import annotations

import os
import sys
from itertools import count
from pathlib import Path

import torch

from earlyfusion.train import checkpoint


def contents(step: int) -> dict[str, torch.Tensor | dict[str, torch.Tensor]]:
    return {"model": {"x": torch.full((64, 1024), float(step))}, "y": torch.tensor(step)}


def save_for_ever(run: Path, beside: bool) -> None:
    saver = checkpoint.Saver(run, keep=2, in_background=beside)
    step = (checkpoint.steps(run) or [0])[-1]
    for more in count(step + 1):
        saver.save(more, contents(more), {"twice": 2 * more})
        if more == step + 1:
            print(os.getpid(), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in sys.stdin:
        if os.fork() == 0:
            save_for_ever(Path(sys.argv[1]), line.strip() == "beside")
        os.wait()
