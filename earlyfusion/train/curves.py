"""Curves of one run or of several as one image: a small chart per figure, made with Pillow."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from itertools import cycle
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from earlyfusion.train.monitor import read_metrics

_WIDE, _HIGH, _EDGE, _COLUMNS = 420, 260, 44, 3
_INK, _GRID = (40, 40, 40), (222, 222, 222)
_LINES = (
    (31, 98, 189),
    (214, 69, 65),
    (38, 145, 75),
    (240, 150, 30),
    (130, 80, 180),
    (20, 170, 180),
    (150, 100, 60),
    (230, 90, 170),
)
_LEFT_OUT = {"step", "eta_seconds"}

Points = list[tuple[float, float]]


def draw_curves(run: Path) -> Path | None:
    """Write `curves.png` into a run's folder; None if there is nothing to draw yet."""
    curves = curves_of(read_metrics(run))
    if not curves:
        return None
    draw_sheet({name: {"": points} for name, points in curves.items()}).save(run / "curves.png")
    return run / "curves.png"


def curves_of(rows: list[dict[str, Any]]) -> dict[str, Points]:
    """Each figure that has more than one point, as (step, value)."""
    names = dict.fromkeys(name for row in rows for name in row if name not in _LEFT_OUT)
    found = {
        name: [(r["step"], r[name]) for r in rows if isinstance(r.get(name), int | float)]
        for name in names
    }
    return {name: points for name, points in found.items() if len(points) > 1}


def draw_sheet(
    charts: Mapping[str, Mapping[str, Points]], steep: Collection[str] = ()
) -> Image.Image:
    """One chart per title, one line per name; charts in `steep` have a logarithmic scale."""
    rows = math.ceil(len(charts) / _COLUMNS)
    names = list(dict.fromkeys(name for lines in charts.values() for name in lines if name))
    wide, high = _WIDE * min(_COLUMNS, len(charts)), _HIGH * rows
    sheet = Image.new("RGB", (wide, high + 16 * math.ceil(len(names) / 4)), "white")
    for number, (title, lines) in enumerate(charts.items()):
        down, along = divmod(number, _COLUMNS)
        sheet.paste(_chart(title, lines, title in steep), (along * _WIDE, down * _HIGH))
    for number, (name, colour) in enumerate(zip(names, cycle(_LINES), strict=False)):
        down, along = divmod(number, 4)
        ImageDraw.Draw(sheet).text((20 + along * wide // 4, high + 16 * down), name, fill=colour)
    return sheet


def _chart(title: str, lines: Mapping[str, Points], steep: bool) -> Image.Image:
    chart = Image.new("RGB", (_WIDE, _HIGH), "white")
    draw = ImageDraw.Draw(chart)
    down = _log10 if steep else float
    ends = [(x, down(y)) for points in lines.values() for x, y in points]
    left, right = min(x for x, _ in ends), max(x for x, _ in ends)
    low, high = min(y for _, y in ends), max(y for _, y in ends)
    box = (_EDGE + 20, _EDGE - 12, _WIDE - 16, _HIGH - _EDGE + 8)
    for share in (0.0, 0.5, 1.0):
        y, value = box[3] + share * (box[1] - box[3]), low + share * (high - low)
        draw.line((box[0], y, box[2], y), fill=_GRID)
        draw.text((6, y - 6), f"{10**value if steep else value:.3g}", fill=_INK)
    draw.text((box[0], 8), title, fill=_INK)
    draw.text((box[0], box[3] + 8), f"{left:,.0f}", fill=_INK)
    draw.text((box[2], box[3] + 8), f"{right:,.0f}", fill=_INK, anchor="ra")
    wide, tall = max(right - left, 1e-12), max(high - low, 1e-12)
    for points, colour in zip(lines.values(), cycle(_LINES), strict=False):
        line = [
            (
                box[0] + (x - left) / wide * (box[2] - box[0]),
                box[3] - (down(y) - low) / tall * (box[3] - box[1]),
            )
            for x, y in points
        ]
        draw.line(line, fill=colour, width=2, joint="curve")
    return chart


def _log10(value: float) -> float:
    return math.log10(max(value, 1e-12))
