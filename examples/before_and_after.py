"""Draw the same things with two models, beside the images that the drawings should look like.

python examples/before_and_after.py MODEL MODEL ROWS.jsonl SHEET.png [COUNT]

Rows are as for `earlyfusion train finetune`: a request, and its image. The sheet has three lines:
the first model's drawings, the second's, the true images (of `COUNT` rows). Printed are, over all
rows, the mean difference of colours (0 to 1, at 16 x 16), the share of the area whose colours
differ between all drawings and all true images (0 to 1, in 8 bins), and the number of drawings
that are nearer to their own true image than to that of any other row (by `features` of
earlyfusion.evals.emoji).
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


def drawn(name: str, prompts: Sequence[str]) -> list[PIL.Image.Image]:
    model = Chameleon.load(name)
    replies = model.generate_batch(list(prompts), output="image", seed=0)
    return [reply.images[0] for reply in replies]


def palette(pictures: Sequence[PIL.Image.Image]) -> np.ndarray:
    """Shares of colours, with little or much of red, green and blue."""
    pixels = np.concatenate([np.asarray(p.convert("RGB")).reshape(-1, 3) // 128 for p in pictures])
    return np.bincount(pixels @ np.array([4, 2, 1]), minlength=8) / len(pixels)


def measured(pictures: Sequence[PIL.Image.Image], true: Sequence[PIL.Image.Image]) -> str:
    blocks = [np.stack(block) for block in zip(*map(features, pictures), strict=True)]
    wanted = [np.stack(block) for block in zip(*map(features, true), strict=True)]
    colours = np.abs(blocks[0] - wanted[0]).mean()
    others = np.abs(palette(pictures) - palette(true)).sum() / 2
    near = sum(
        weight * ((a[:, None] - b[None]) ** 2).mean(-1) / b.var()
        for a, b, weight in zip(blocks, wanted, (1.0, 0.5), strict=True)
    )
    found = (np.asarray(near).argmin(1) == np.arange(len(true))).sum()
    return (
        f"colours differ by {colours:.3f}, {others:.0%} are others; "
        f"{found} of {len(true)} nearest to their own"
    )


def sheet(lines: Sequence[Sequence[PIL.Image.Image]], side: int) -> PIL.Image.Image:
    made = PIL.Image.new("RGB", (side * len(lines[0]), side * len(lines)))
    for y, line in enumerate(lines):
        for x, picture in enumerate(line):
            made.paste(
                picture.resize((side, side), PIL.Image.Resampling.LANCZOS), (x * side, y * side)
            )
    return made


def main(before: str, after: str, rows: str, out: str, count: str = "10") -> None:
    path = Path(rows)
    parsed = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    prompts = [row["messages"][0]["content"] for row in parsed]
    true = [PIL.Image.open(path.parent / row["images"][0]).convert("RGB") for row in parsed]
    lines = [drawn(name, prompts) for name in (before, after)]
    for name, pictures in zip((before, after), lines, strict=True):
        print(f"{name}: {measured(pictures, true)}")
    shown = [line[: int(count)] for line in (*lines, true)]
    sheet(shown, lines[0][0].width).quantize().save(out, optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
