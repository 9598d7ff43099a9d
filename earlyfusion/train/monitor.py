"""Reports the metrics of a run: progress bar, `metrics.jsonl`, TensorBoard if it is installed, W&B
on request. Each row also has the speed in tokens or images per second (`per_second`), the share of
the devices' peak that this is (`mfu`), and the seconds that are left (`eta_seconds`)."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from earlyfusion.files import replacing, signals_wait

_SECONDS_PER_LINE = 60.0  # between printed lines, where there is no progress bar


class Monitor:
    """Reports on a run in the folder `run` that starts at `first_step` (not 0 if it continues).

    `flops` are the operations that one token or image takes, `peak()` those that all devices can do
    per second; without `peak`, no `mfu` is logged. `seconds_left(step_seconds, done)` are the
    seconds to the end after `done` steps if each takes `step_seconds`. A `quiet` monitor does
    nothing: of several processes only the first reports.
    """

    def __init__(
        self,
        run: Path,
        first_step: int,
        steps: int,
        wandb: bool = False,
        quiet: bool = False,
        flops: float = 0.0,
        peak: Callable[[], float] | None = None,
        seconds_left: Callable[[float, int], float] | None = None,
    ) -> None:
        self._seconds_left = seconds_left or (
            lambda step_seconds, done: step_seconds * (steps - done)
        )
        self._run, self._quiet, self._steps = run, quiet, steps
        self._flops, self._peak = flops, peak
        # When `log` was last called, and the units and steps that were done since then.
        self._log_time, self._units, self._steps_done = time.perf_counter(), 0.0, 0
        self._next_print = 0.0
        if quiet:
            return
        run.mkdir(parents=True, exist_ok=True)
        _drop_rows(run / "metrics.jsonl", first_step)
        self._metrics = (run / "metrics.jsonl").open("a", encoding="utf-8")
        self._tensorboard = _summary_writer(run, first_step)
        self._wandb = _wandb_run(run) if wandb else None
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        self._console = Console(stderr=True)
        self._bar = Progress(*columns, console=self._console, disable=not sys.stderr.isatty())
        self._task = self._bar.add_task("training", total=steps, completed=first_step)
        self._bar.start()

    def advance(self, step: int, units: float) -> None:
        """Count a step that processed `units` tokens or images."""
        self._units += units
        self._steps_done += 1
        if not self._quiet:
            self._bar.update(self._task, completed=step + 1)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Report the metrics of a step, and the speed since the previous call."""
        if self._quiet:
            return
        speed = self._speed(step)
        # JSON has neither NaN nor infinity.
        finite = {k: v if math.isfinite(v) else None for k, v in metrics.items()}
        self._metrics.write(json.dumps({"step": step} | finite | speed) + "\n")
        self._metrics.flush()
        with signals_wait():
            for name, value in (metrics | speed).items():
                if self._tensorboard is not None:
                    self._tensorboard.add_scalar(name, value, step)
            if self._wandb is not None:
                self._wandb.log(metrics | speed, step=step)
        first_metrics = "  ".join(f"{k} {v:.4g}" for k, v in list(metrics.items())[:3])
        mfu = f"  {speed['mfu']:.0%} of peak" if "mfu" in speed else ""
        status = f"{first_metrics}  {speed['per_second']:,.0f}/s{mfu}"
        self._bar.update(self._task, description=status)
        if self._bar.disable:
            self._print(step + 1, status, speed["eta_seconds"])

    def _print(self, done: int, status: str, seconds_left: float) -> None:
        """Without a terminal, print a line: the first, the last, and one per minute in between."""
        now = time.monotonic()
        if done >= self._steps or now >= self._next_print:
            self._next_print = now + _SECONDS_PER_LINE
            left = f"  {seconds_left:,.0f} s left" if done < self._steps else ""
            line = f"step {done:,} of {self._steps:,}  {status}{left}"
            print(line, file=sys.stderr, flush=True)

    def note(self, step: int, sentence: str) -> None:
        """Print a sentence, and append it to `notes.jsonl`."""
        if self._quiet:
            return
        with (self._run / "notes.jsonl").open("a", encoding="utf-8") as notes:
            notes.write(json.dumps({"step": step, "note": sentence}) + "\n")
        self._console.print(f"step {step}: {sentence}", highlight=False)

    def rewind(self, first_step: int) -> None:
        """Remove the metrics of steps from `first_step` on, which will be computed again."""
        if self._quiet:
            return
        self._metrics.close()
        _drop_rows(self._run / "metrics.jsonl", first_step)
        self._metrics = (self._run / "metrics.jsonl").open("a", encoding="utf-8")
        self._bar.update(self._task, completed=first_step)

    def close(self) -> None:
        """End the progress bar, and close the files and services."""
        if self._quiet:
            return
        self._bar.stop()
        self._metrics.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The time that the block takes does not count towards the speed."""
        start = time.perf_counter()
        yield
        self._log_time += time.perf_counter() - start

    def _speed(self, step: int) -> dict[str, float]:
        now = time.perf_counter()
        seconds = max(now - self._log_time, 1e-9)
        rate, step_seconds = self._units / seconds, seconds / max(1, self._steps_done)
        self._log_time, self._units, self._steps_done = now, 0.0, 0
        speed = {"per_second": round(rate, 2)}
        if self._peak is not None:
            speed["mfu"] = round(rate * self._flops / self._peak(), 4)
        return speed | {"eta_seconds": round(self._seconds_left(step_seconds, step + 1), 1)}


@lru_cache
def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a product of two square matrices, measured on the
    device: the fastest of six runs."""
    # Large enough to keep a GPU busy, small enough for a CPU's cache.
    size = 8192 if device.type == "cuda" else 512
    a, b = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
    fastest = math.inf
    for _ in range(6):
        _synchronize(device)
        begin = time.perf_counter()
        torch.mm(a, b)
        _synchronize(device)
        fastest = min(fastest, time.perf_counter() - begin)
    return float(2 * size**3 / fastest)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The rows of a run's `metrics.jsonl`, in the order of their steps."""
    rows: list[dict[str, Any]] = []
    for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        with suppress(ValueError):  # the last line may be cut short, as by a loss of power
            rows.append(json.loads(line))
    return rows


def _drop_rows(path: Path, first_step: int) -> None:
    """Remove the rows from `first_step` on, which a resumed run will write again."""
    if path.exists():
        earlier = [r for r in read_metrics(path.parent) if r["step"] < first_step]
        with replacing(path) as partial:
            partial.write_text("".join(json.dumps(r) + "\n" for r in earlier), encoding="utf-8")


def _summary_writer(run: Path, first_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    # TensorBoard hides earlier values of the steps from `first_step` on.
    return SummaryWriter(str(run / "tensorboard"), purge_step=first_step or None)


def _wandb_run(run: Path) -> Any:
    """A run of Weights & Biases, which a resumed training continues."""
    import wandb

    path = run / "wandb-id"
    if not path.exists():
        path.write_text(uuid4().hex[:16], encoding="utf-8")
    id_ = path.read_text(encoding="utf-8").strip()
    return wandb.init(project="earlyfusion", name=run.name, dir=str(run), id=id_, resume="allow")
