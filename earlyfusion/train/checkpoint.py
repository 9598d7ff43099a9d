"""Checkpoints of a run: atomic folders `step-00001000`, of which the newest complete one counts.

A checkpoint is written under a temporary name, flushed to disk and renamed, so that a run that is
killed at any moment leaves either a whole checkpoint or none. Tensors are read with
`weights_only=True`: nothing in a checkpoint can run code.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from earlyfusion.errors import CheckpointError

_PREFIX, _PARTIAL = "step-", ".partial-"
TENSORS, STATE = "tensors.pt", "state.json"


def save(run: Path, step: int, tensors: dict[str, Any], state: dict[str, Any], keep: int) -> Path:
    """Write one checkpoint and remove all but the newest `keep`."""
    run.mkdir(parents=True, exist_ok=True)
    for rest in run.glob(f"{_PARTIAL}*"):
        shutil.rmtree(rest, ignore_errors=True)
    partial, final = run / f"{_PARTIAL}{step:08d}", run / f"{_PREFIX}{step:08d}"
    partial.mkdir()
    with (partial / TENSORS).open("wb") as file:
        torch.save(tensors, file)
        _flush(file.fileno(), file.flush)
    with (partial / STATE).open("w", encoding="utf-8") as text:
        json.dump(state | {"step": step}, text)
        _flush(text.fileno(), text.flush)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(partial, final)
    _flush_folder(run)
    for old in steps(run)[:-keep]:
        shutil.rmtree(run / f"{_PREFIX}{old:08d}", ignore_errors=True)
    return final


def steps(run: Path) -> list[int]:
    """Steps of the complete checkpoints of a run, oldest first."""
    names = (p.name.removeprefix(_PREFIX) for p in run.glob(f"{_PREFIX}*") if p.is_dir())
    return sorted(int(n) for n in names if n.isdigit())


def load(run: Path, step: int | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tensors and state of the given step, by default of the newest checkpoint."""
    found = steps(run)
    if not found or (step is not None and step not in found):
        raise CheckpointError(f"{run} holds no checkpoint of step {step or 'any'}: train it first")
    folder = run / f"{_PREFIX}{step or found[-1]:08d}"
    tensors = torch.load(folder / TENSORS, map_location="cpu", weights_only=True)
    return tensors, json.loads((folder / STATE).read_text(encoding="utf-8"))


def _flush(fileno: int, flush: Any) -> None:
    flush()
    os.fsync(fileno)


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
