"""Small corpora on disk, and a tiny model folder that reads them."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from tiny import CONFIG, tiny_processor, tiny_transformer

from earlyfusion.checkpoints.hf import save_hf
from earlyfusion.data.encoding import Encoder, EncodingSettings
from earlyfusion.image_tokenizer import ImageTokenizer
from earlyfusion.model.vqgan import VQGAN
from earlyfusion.processor import Processor


def png(seed: int, size: tuple[int, int] = (24, 16)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def jsonl(path: Path, rows: Sequence[Any]) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def pairs(folder: Path, count: int) -> Path:
    """Image-caption rows in `rows.jsonl`, with their images beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(count):
        (folder / f"{number}.png").write_bytes(png(number))
        rows.append({"image": f"{number}.png", "caption": f"pear {number}"})
    return jsonl(folder / "rows.jsonl", rows)


def tar(path: Path, members: Mapping[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def tiny_vqgan() -> VQGAN:
    torch.manual_seed(0)
    return VQGAN(CONFIG.vq_config).eval().requires_grad_(False)


def tiny_encoder(processor: Processor, **settings: Any) -> Encoder:
    tokenizer = ImageTokenizer(tiny_vqgan(), CONFIG.vq_config.resolution)
    return Encoder(processor, tokenizer, EncodingSettings(**settings))


def tiny_model(folder: Path) -> Path:
    """A model folder of random weights."""
    folder.mkdir(parents=True)
    processor = tiny_processor(folder)
    text = (folder / "tokenizer.json").read_text(encoding="utf-8")
    transformer = tiny_transformer(processor)
    save_hf(folder / "model", transformer, tiny_vqgan(), text, {"chameleon": {}})
    return folder / "model"
