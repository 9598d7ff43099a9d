"""Watching a run: a progress bar, a JSONL file, and TensorBoard where it is installed."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Monitor:
    """Writes one line of `metrics.jsonl` a call of `log`, and moves the progress bar."""

    def __init__(self, run: Path, first: int, steps: int, tensorboard: bool = True) -> None:
        run.mkdir(parents=True, exist_ok=True)
        _drop_from(run / "metrics.jsonl", first)
        self._lines = (run / "metrics.jsonl").open("a", encoding="utf-8")
        self._board = _summary_writer(run, first) if tensorboard else None
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        console = Console(stderr=True)
        self._bar = Progress(*columns, console=console, disable=not sys.stderr.isatty())
        self._task = self._bar.add_task("training", total=steps, completed=first)
        self._bar.start()
        self._since, self._units = time.perf_counter(), 0.0

    def advance(self, step: int, units: float) -> None:
        """One step done that processed `units` tokens or pictures."""
        self._units += units
        self._bar.update(self._task, completed=step + 1)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        now = time.perf_counter()
        rate = self._units / max(now - self._since, 1e-9)
        self._since, self._units = now, 0.0
        known = {k: v if math.isfinite(v) else None for k, v in metrics.items()}
        row = {"step": step} | known
        self._lines.write(json.dumps(row | {"per_second": round(rate, 2)}) + "\n")
        self._lines.flush()
        for name, value in metrics.items():
            if self._board is not None:
                self._board.add_scalar(name, value, step)
        shown = "  ".join(f"{k} {v:.4g}" for k, v in list(metrics.items())[:3])
        self._bar.update(self._task, description=f"{shown}  {rate:,.0f}/s")

    def close(self) -> None:
        self._bar.stop()
        self._lines.close()
        if self._board is not None:
            self._board.close()


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Rows of a run's `metrics.jsonl`."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def _drop_from(path: Path, first: int) -> None:
    """Forget rows that a resumed run will write again."""
    if path.exists():
        kept = [r for r in read_metrics(path.parent) if r["step"] < first]
        path.write_text("".join(json.dumps(r) + "\n" for r in kept), encoding="utf-8")


def _summary_writer(run: Path, first: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(run / "tensorboard"), purge_step=first or None)
