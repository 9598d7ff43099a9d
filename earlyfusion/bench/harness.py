"""Shared by all measurements: a clock, contenders that take turns, and Markdown tables."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch

Name = TypeVar("Name")
Result = TypeVar("Result")

OURS = "earlyfusion"
RATES = ("tokens/s", "GB/s", "TFLOP/s")
"""Units of which more is better; all others are times, of which less is better."""


def seconds(
    call: Callable[[], object],
    device: torch.device | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """The duration of a call, including everything that it started on a GPU."""
    # A GPU's work is only queued when a call returns: wait for it before and after.
    _synchronize(device)
    start = clock()
    call()
    _synchronize(device)
    return clock() - start


def _synchronize(device: torch.device | None) -> None:
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)


def take_turns(
    contenders: Mapping[Name, Callable[[], Result]], rounds: int, warmup: int = 1
) -> dict[Name, list[Result]]:
    """What each contender returns in each round, without the first `warmup` rounds. In every round
    all measure, one after another, so that a busy machine slows all of them alike."""
    results: dict[Name, list[Result]] = {name: [] for name in contenders}
    for number in range(warmup + rounds):
        for name, measure in contenders.items():
            value = measure()
            if number >= warmup:
                results[name].append(value)
    return results


def medians(results: Mapping[Name, Iterable[float]], scale: float = 1.0) -> dict[Name, float]:
    """The median of each contender, times `scale`: 1e3 for seconds as milliseconds."""
    return {name: scale * median(values) for name, values in results.items()}


def heading(*names: str) -> str:
    """The first two lines of a Markdown table."""
    return "\n".join([line(*names), line(*["---"] * len(names))])


def line(*cells: object) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(map(str, cells))} |"


@dataclass
class Row:
    """One measured thing: a value for each contender, ours first. `floor` is the best that the
    machine's limits allow, in the unit of the values."""

    what: str
    unit: str
    values: dict[str, float]
    note: str = ""
    floor: float | None = None

    @property
    def ratio(self) -> float:
        """Ours as a share of the floor: 1 is the most that the machine can do."""
        ours = next(iter(self.values.values()))
        if not ours or not self.floor:
            return 0.0
        return ours / self.floor if self.unit in RATES else self.floor / ours


def table(rows: Iterable[Row]) -> str:
    """Markdown; "times as fast" compares ours with each of the others, in order."""
    lines = [heading("what", OURS, "others", "times as fast", "note")]
    for row in rows:
        (_, ours), *others = row.values.items()
        ratios = (ours / v if row.unit in RATES else v / ours for _, v in others)
        lines.append(
            line(
                row.what,
                f"{short(ours)} {row.unit}",
                ", ".join(f"{name} {short(value)}" for name, value in others),
                ", ".join(f"{ratio:.2f}" for ratio in ratios),
                row.note,
            )
        )
    return "\n".join(lines)


def short(value: float) -> str:
    """Three digits, or all before the decimal point of a large number."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def save(rows: Iterable[Row], file: Path | None, **settings: Any) -> None:
    """Write the rows as JSON, with the settings and the machine; nothing without a file."""
    if file is not None:
        machine = {"processor": platform.processor(), "torch": torch.__version__}
        results = settings | machine | {"rows": [asdict(row) for row in rows]}
        file.write_text(json.dumps(results, indent=1), encoding="utf-8")
