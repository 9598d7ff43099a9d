"""Make data of a style that mini has not seen: things cut out of white paper, on blue.

python examples/new_style.py data/emoji runs/cutout
earlyfusion train finetune data=runs/cutout/train.jsonl out=runs/cutout/run lora=16 lr=3e-3 \
    steps=120 length=512 warmup_steps=10
python examples/before_and_after.py mini runs/cutout/run/model runs/cutout/eval.jsonl cutout.png

The first command writes 40 images to train on (`train.jsonl`), and 24 images of other things for
the comparison (`eval.jsonl`). They are made from Noto Emoji, Copyright Google Inc., Apache-2.0.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import PIL.Image
from PIL import ImageOps

from earlyfusion.mini.emoji.dataset import EmojiData, Row

KINDS = ("animals and nature", "food and drink", "travel and places", "activities", "objects")
TRAINED, EVALUATED = 40, 24


def cut_out(image: PIL.Image.Image) -> PIL.Image.Image:
    """The shape of an image in white, on blue."""
    shape = image.convert("L").point(lambda grey: 255 * (grey < 240))
    return ImageOps.colorize(shape, black="#1446a0", white="#ffffff")


def things(data: EmojiData) -> list[Row]:
    """Things that exist in Noto's style, in an order that is always the same."""
    rows = [data.row(id_) for id_ in data.split("train")]
    chosen = [r for r in rows if r["style"] == "noto" and r["group_en"] in KINDS]
    random.Random(0).shuffle(chosen)
    return chosen


def write(path: Path, data: EmojiData, rows: Sequence[Row]) -> None:
    """Write one request per line, and the images beside the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            name = f"{row['codepoints']}.png"
            cut_out(data.image(row["id"])).save(path.parent / name)
            prompt = {"role": "user", "content": f"Draw {row['en']} in cutout style."}
            answer = {"role": "assistant", "content": [{"type": "image"}]}
            print(json.dumps({"messages": [prompt, answer], "images": [name]}), file=file)


def main(folder: str, out: str) -> None:
    data = EmojiData(folder)
    chosen = things(data)
    write(Path(out) / "train.jsonl", data, chosen[:TRAINED])
    write(Path(out) / "eval.jsonl", data, chosen[TRAINED : TRAINED + EVALUATED])


if __name__ == "__main__":
    main(*sys.argv[1:])
