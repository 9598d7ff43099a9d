"""A model that reads but cannot draw, like the released Chameleon, and images to unlock it with.

python examples/lock.py data/emoji runs/unlock
earlyfusion train image_head_7b model=runs/unlock/locked data=runs/unlock/learn.jsonl \
    out=runs/unlock/run steps=250 rows=1 length=1024 lr=1e-2 precision=fp32
python examples/before_and_after.py runs/unlock/locked runs/unlock/run/model \
    runs/unlock/asked.jsonl unlock.png

The first command copies mini with zeros for the rows of its head that score image tokens, and
writes the first image of each thing (data/emoji/NOTICE.md names their authors).
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import torch

from earlyfusion.checkpoints import detect
from earlyfusion.checkpoints.hf import save_hf
from earlyfusion.mini.emoji.dataset import EmojiData, Row

ASKED = 24


def lock(name: str, folder: Path) -> None:
    loaded = detect.load(name)
    with torch.no_grad():
        loaded.transformer.lm_head.weight[loaded.processor.vocabulary.image_tokens] = 0
    text = loaded.processor.tokenizer_file.read_text(encoding="utf-8")
    defaults = loaded.generation_defaults
    save_hf(folder, loaded.transformer, loaded.vqgan, text, defaults, dtype=torch.float16)


def main(data_folder: str, out_folder: str) -> None:
    data, out = EmojiData(data_folder), Path(out_folder)
    first: dict[str, Row] = {}
    for id_ in data.split("train"):
        first.setdefault(data.row(id_)["codepoints"], data.row(id_))
    lock("mini", out / "locked")
    lines = []
    for thing, row in first.items():
        data.image(row["id"]).save(out / f"{thing}.png")
        prompt = {"role": "user", "content": f"Draw {row['en']}."}
        answer = {"role": "assistant", "content": [{"type": "image"}]}
        lines.append(json.dumps({"messages": [prompt, answer], "images": [f"{thing}.png"]}))
    asked = random.Random(0).sample(lines, min(ASKED, len(lines)))
    for name, chosen in (("learn", lines), ("asked", asked)):
        (out / f"{name}.jsonl").write_text("\n".join(chosen) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
