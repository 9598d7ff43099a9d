"""Generate the same images with two models, and compare both with the true images.

python examples/before_and_after.py MODEL MODEL ROWS.jsonl SHEET.png [COUNT]

Each row is a prompt and its image, as for `earlyfusion train finetune`. The sheet shows COUNT rows
in three lines: images of the first model, images of the second, true images. For each model, this
prints over all rows

- the mean difference of colours from the true images (0 to 1, at 16 x 16 pixels);
- the share of the area whose colours differ (histograms of 8 colours over all images);
- how many images are nearer to their own true image than to that of any other row (by `features`
  of earlyfusion.evals.emoji).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import PIL.Image

from earlyfusion import Chameleon
from earlyfusion.evals.emoji import features


def generated(name: str, prompts: Sequence[str]) -> list[PIL.Image.Image]:
    model = Chameleon.load(name)
    replies = model.generate_batch(list(prompts), output="image", seed=0)
    return [reply.images[0] for reply in replies]


def histogram(images: Sequence[PIL.Image.Image]) -> np.ndarray:
    """Shares of 8 colours: red, green and blue, each below 128 or not."""
    pixels = np.concatenate([np.asarray(i.convert("RGB")).reshape(-1, 3) // 128 for i in images])
    return np.bincount(pixels @ np.array([4, 2, 1]), minlength=8) / len(pixels)


def comparison(images: Sequence[PIL.Image.Image], true: Sequence[PIL.Image.Image]) -> str:
    blocks = [np.stack(block) for block in zip(*map(features, images), strict=True)]
    wanted = [np.stack(block) for block in zip(*map(features, true), strict=True)]
    colours = np.abs(blocks[0] - wanted[0]).mean()
    area = np.abs(histogram(images) - histogram(true)).sum() / 2
    distances = sum(
        weight * ((a[:, None] - b[None]) ** 2).mean(-1) / b.var()
        for a, b, weight in zip(blocks, wanted, (1.0, 0.5), strict=True)
    )
    nearest = (np.asarray(distances).argmin(1) == np.arange(len(true))).sum()
    return (
        f"colours differ by {colours:.3f}, on {area:.0%} of the area; "
        f"{nearest} of {len(true)} are nearest to their own true image"
    )


def sheet(lines: Sequence[Sequence[PIL.Image.Image]], side: int) -> PIL.Image.Image:
    result = PIL.Image.new("RGB", (side * len(lines[0]), side * len(lines)))
    for y, line in enumerate(lines):
        for x, image in enumerate(line):
            result.paste(
                image.resize((side, side), PIL.Image.Resampling.LANCZOS), (x * side, y * side)
            )
    return result


def main(before: str, after: str, rows: str, out: str, count: str = "10") -> None:
    path = Path(rows)
    parsed = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    prompts = [row["messages"][0]["content"] for row in parsed]
    true = [PIL.Image.open(path.parent / row["images"][0]).convert("RGB") for row in parsed]
    lines = [generated(name, prompts) for name in (before, after)]
    for name, images in zip((before, after), lines, strict=True):
        print(f"{name}: {comparison(images, true)}")
    shown = [line[: int(count)] for line in (*lines, true)]
    sheet(shown, lines[0][0].width).quantize().save(out, optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
