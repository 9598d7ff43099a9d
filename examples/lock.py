"""Make a model that reads images but cannot generate them, and data that teaches it to.

python examples/lock.py data/emoji runs/unlock
earlyfusion train image_head_7b model=runs/unlock/locked data=runs/unlock/train.jsonl \
    out=runs/unlock/run steps=250 rows=1 length=1024 lr=1e-2 precision=fp32
python examples/before_and_after.py runs/unlock/locked runs/unlock/run/model \
    runs/unlock/eval.jsonl unlock.png

The first command copies mini, but with zeros in the rows of the output head for image tokens, so
that it is like the released Chameleon. As training data it writes the first image of each thing
(data/emoji/NOTICE.md names the authors).
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

EVALUATED = 24


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
    evaluated = random.Random(0).sample(lines, min(EVALUATED, len(lines)))
    for name, chosen in (("train", lines), ("eval", evaluated)):
        (out / f"{name}.jsonl").write_text("\n".join(chosen) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
