"""Bars of what the comparisons measured, one PNG a file of results.

    python benchmarks/engine.py --json 1b.json
    python benchmarks/plots.py 1b.json llama.json --out benchmarks/plots

The length of a bar is the speed; beside it are the figure, and its ratio to the slowest of the row.
Made with Pillow, as the curves of a training run are.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from earlyfusion.bench.harness import RATES

WIDE, EDGE, LINE, BAR, NAME = 1100, 24, 26, 18, 250
INK, PALE = (40, 40, 40), (222, 222, 222)
COLOURS = ((31, 98, 189), (217, 119, 38), (120, 120, 120), (150, 190, 90), (160, 100, 170))


def chart(results: dict[str, Any], title: str) -> Image.Image:
    """One group of bars for each row that has more than one contender."""
    rows = [row for row in results["rows"] if len(row["values"]) > 1]
    names = list(dict.fromkeys(name for row in rows for name in row["values"]))
    height = sum(LINE * (len(row["values"]) + 1) + 12 for row in rows)
    image = Image.new("RGB", (WIDE, 3 * EDGE + LINE + height), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(15)
    pen.text((EDGE, EDGE), title, fill=INK, font=ImageFont.load_default(20))
    y = 2 * EDGE + LINE
    for row in rows:
        pen.text((EDGE, y), row["what"], fill=INK, font=font)
        y += LINE
        speeds = {n: v if row["unit"] in RATES else 1 / v for n, v in row["values"].items()}
        slowest, fastest = min(speeds.values()), max(speeds.values())
        for name, speed in speeds.items():
            length = (WIDE - NAME - 12 * EDGE) * speed / fastest
            box = (NAME + EDGE, y, NAME + EDGE + length, y + BAR)
            pen.text((EDGE + 14, y), name, fill=INK, font=font)
            pen.rectangle(box, fill=COLOURS[names.index(name) % len(COLOURS)])
            value = f"{row['values'][name]:,.4g} {row['unit']}"
            pen.text((box[2] + 8, y), f"{value}   {speed / slowest:.2f}x", fill=INK, font=font)
            y += LINE
        pen.line((EDGE, y + 4, WIDE - EDGE, y + 4), fill=PALE)
        y += 12
    return image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="+", help="files that --json wrote")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/plots"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for file in options.results:
        results = json.loads(file.read_text(encoding="utf-8"))
        words = ("shape", "dtype", "device")
        title = ", ".join([str(results[word]) for word in words if word in results])
        target = options.out / f"{file.stem}.png"
        chart(results, f"{title}, {results.get('threads', 1)} threads").save(target)
        print(target)


if __name__ == "__main__":
    main()
