"""The curves of a run as one PNG, drawn with Pillow: one small chart a figure."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from earlyfusion.train.monitor import read_metrics

_WIDE, _HIGH, _EDGE, _COLUMNS = 420, 260, 44, 3
_INK, _LINE, _GRID = (40, 40, 40), (31, 98, 189), (222, 222, 222)
_LEFT_OUT = {"step", "eta_seconds"}

Points = list[tuple[float, float]]


def draw_curves(run: Path) -> Path | None:
    """Write `curves.png` into the folder of a run; None where there is nothing to draw yet."""
    curves = _curves(read_metrics(run))
    if not curves:
        return None
    rows = math.ceil(len(curves) / _COLUMNS)
    sheet = Image.new("RGB", (_WIDE * min(_COLUMNS, len(curves)), _HIGH * rows), "white")
    for place, (name, points) in enumerate(curves.items()):
        down, along = divmod(place, _COLUMNS)
        sheet.paste(_chart(name, points), (along * _WIDE, down * _HIGH))
    sheet.save(run / "curves.png")
    return run / "curves.png"


def _curves(rows: list[dict[str, Any]]) -> dict[str, Points]:
    names = dict.fromkeys(name for row in rows for name in row if name not in _LEFT_OUT)
    found = {
        name: [(r["step"], r[name]) for r in rows if isinstance(r.get(name), int | float)]
        for name in names
    }
    return {name: points for name, points in found.items() if len(points) > 1}


def _chart(name: str, points: Points) -> Image.Image:
    chart = Image.new("RGB", (_WIDE, _HIGH), "white")
    draw = ImageDraw.Draw(chart)
    left, right = points[0][0], points[-1][0]
    low, high = min(y for _, y in points), max(y for _, y in points)
    box = (_EDGE + 20, _EDGE - 12, _WIDE - 16, _HIGH - _EDGE + 8)
    for share in (0.0, 0.5, 1.0):
        y = box[3] + share * (box[1] - box[3])
        draw.line((box[0], y, box[2], y), fill=_GRID)
        draw.text((6, y - 6), f"{low + share * (high - low):.3g}", fill=_INK)
    draw.text((box[0], 8), name, fill=_INK)
    draw.text((box[0], box[3] + 8), f"{left:,.0f}", fill=_INK)
    draw.text((box[2], box[3] + 8), f"{right:,.0f}", fill=_INK, anchor="ra")
    wide, tall = max(right - left, 1e-12), max(high - low, 1e-12)
    line = [
        (
            box[0] + (x - left) / wide * (box[2] - box[0]),
            box[3] - (y - low) / tall * (box[3] - box[1]),
        )
        for x, y in points
    ]
    draw.line(line, fill=_LINE, width=2, joint="curve")
    return chart
