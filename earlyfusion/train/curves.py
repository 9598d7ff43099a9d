"""Curves of one run or of several as one image, made with Pillow: a small chart per metric."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from itertools import cycle
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from earlyfusion.train.monitor import read_metrics

# In pixels: the size of a chart, and the margin around its axes.
_WIDTH, _HEIGHT, _MARGIN = 420, 260, 44
_COLUMNS = 3
_TEXT_COLOUR, _GRID_COLOUR = (40, 40, 40), (222, 222, 222)
_LINE_COLOURS = (
    (31, 98, 189),
    (214, 69, 65),
    (38, 145, 75),
    (240, 150, 30),
    (130, 80, 180),
    (20, 170, 180),
    (150, 100, 60),
    (230, 90, 170),
)
_NOT_PLOTTED = {"step", "eta_seconds"}

Points = list[tuple[float, float]]


def draw_curves(run: Path) -> Path | None:
    """Write `curves.png` into a run's folder; None if no metric has two points yet."""
    curves = curves_of(read_metrics(run))
    if not curves:
        return None
    draw_charts({name: {"": points} for name, points in curves.items()}).save(run / "curves.png")
    return run / "curves.png"


def curves_of(rows: list[dict[str, Any]]) -> dict[str, Points]:
    """(step, value) of each metric in rows of `metrics.jsonl` that has more than one point."""
    names = dict.fromkeys(name for row in rows for name in row if name not in _NOT_PLOTTED)
    curves = {
        name: [(r["step"], r[name]) for r in rows if isinstance(r.get(name), int | float)]
        for name in names
    }
    return {name: points for name, points in curves.items() if len(points) > 1}


def draw_charts(
    charts: Mapping[str, Mapping[str, Points]], logarithmic: Collection[str] = ()
) -> Image.Image:
    """All charts as one image, with a legend below. `charts` maps a title to lines, and the name of
    a line to its points; those in `logarithmic` have a logarithmic y axis."""
    rows = math.ceil(len(charts) / _COLUMNS)
    names = list(dict.fromkeys(name for lines in charts.values() for name in lines if name))
    width, height = _WIDTH * min(_COLUMNS, len(charts)), _HEIGHT * rows
    sheet = Image.new("RGB", (width, height + 16 * math.ceil(len(names) / 4)), "white")
    for number, (title, lines) in enumerate(charts.items()):
        row, column = divmod(number, _COLUMNS)
        sheet.paste(_chart(title, lines, title in logarithmic), (column * _WIDTH, row * _HEIGHT))
    for number, (name, colour) in enumerate(zip(names, cycle(_LINE_COLOURS), strict=False)):
        row, column = divmod(number, 4)
        corner = (20 + column * width // 4, height + 16 * row)
        ImageDraw.Draw(sheet).text(corner, name, fill=colour)
    return sheet


def _chart(title: str, lines: Mapping[str, Points], logarithmic: bool) -> Image.Image:
    """One chart: three grid lines with their values, the first and last step, and the lines."""
    chart = Image.new("RGB", (_WIDTH, _HEIGHT), "white")
    draw = ImageDraw.Draw(chart)
    scale = _log10 if logarithmic else float
    points = [(x, scale(y)) for line in lines.values() for x, y in line]
    min_x, max_x = min(x for x, _ in points), max(x for x, _ in points)
    min_y, max_y = min(y for _, y in points), max(y for _, y in points)
    left, top, right, bottom = _MARGIN + 20, _MARGIN - 12, _WIDTH - 16, _HEIGHT - _MARGIN + 8
    for share in (0.0, 0.5, 1.0):
        y, value = bottom + share * (top - bottom), min_y + share * (max_y - min_y)
        draw.line((left, y, right, y), fill=_GRID_COLOUR)
        label = f"{10**value if logarithmic else value:.3g}"
        draw.text((6, y - 6), label, fill=_TEXT_COLOUR)
    draw.text((left, 8), title, fill=_TEXT_COLOUR)
    draw.text((left, bottom + 8), f"{min_x:,.0f}", fill=_TEXT_COLOUR)
    draw.text((right, bottom + 8), f"{max_x:,.0f}", fill=_TEXT_COLOUR, anchor="ra")
    range_x, range_y = max(max_x - min_x, 1e-12), max(max_y - min_y, 1e-12)
    for line, colour in zip(lines.values(), cycle(_LINE_COLOURS), strict=False):
        pixels = [
            (
                left + (x - min_x) / range_x * (right - left),
                bottom - (scale(y) - min_y) / range_y * (bottom - top),
            )
            for x, y in line
        ]
        draw.line(pixels, fill=colour, width=2, joint="curve")
    return chart


def _log10(value: float) -> float:
    return math.log10(max(value, 1e-12))
