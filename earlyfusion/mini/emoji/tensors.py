"""The images of the emoji data as tensors on a device, with labels of what they show."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from earlyfusion.mini.emoji.dataset import EmojiData
from earlyfusion.train.semantic import UNKNOWN

_THREADS = 16  # decoding releases Python's lock


@lru_cache(maxsize=1)
def load_emoji(folder: Path, icons: Path | None = None) -> EmojiData:
    """The data of a folder, with icons if their folder is given; read once for all stages."""
    return EmojiData(folder, icons)


@lru_cache(maxsize=4)
def load_split(
    folder: Path, split: str, side: int, device: str, icons: Path | None = None
) -> Tensor:
    """All images of a split in file order, on the device: uint8 [images, side, side, 3].

    They stay in memory for further calls: 534 MB for the training images at 128 pixels.
    """
    data = load_emoji(folder, icons)
    return load_images(data, data.split(split), side).to(device)


def load_images(data: EmojiData, ids: Sequence[str], side: int) -> Tensor:
    """The images with these ids, on the CPU: uint8 [len(ids), side, side, 3]."""
    with ThreadPoolExecutor(_THREADS) as pool:
        rows = list(pool.map(partial(_square, data, side), ids))
    return torch.from_numpy(np.stack(rows) if rows else np.zeros((0, side, side, 3), np.uint8))


def _square(data: EmojiData, side: int, image_id: str) -> np.ndarray:
    image = data.image(image_id)
    if image.size != (side, side):
        image = image.resize((side, side), Image.Resampling.LANCZOS)
    return np.asarray(image)


class Labels:
    """Labels of images: the numbers of the thing, of its subgroup and of the style; `UNKNOWN` for
    what no training image has."""

    def __init__(self, data: EmojiData) -> None:
        self._data = data
        rows = [data.row(i) for i in data.split("train")]
        self._things = _numbers([r["codepoints"] for r in rows])
        self._subgroups = _numbers([r["subgroup"] for r in rows])
        self._styles = _numbers([r["style"] for r in rows])

    @property
    def answers(self) -> tuple[int, int, int]:
        """How many things, subgroups and styles there are."""
        return len(self._things), len(self._subgroups), len(self._styles)

    def of(self, ids: list[str]) -> Tensor:
        """The labels of the images with these ids: int64 [len(ids), 3]."""
        rows = [self._data.row(i) for i in ids]
        labels = [
            (
                self._things.get(r["codepoints"], UNKNOWN),
                self._subgroups.get(r["subgroup"], UNKNOWN),
                self._styles.get(r["style"], UNKNOWN),
            )
            for r in rows
        ]
        return torch.tensor(labels, dtype=torch.long).view(-1, 3)


def _numbers(values: list[str]) -> dict[str, int]:
    return {value: number for number, value in enumerate(dict.fromkeys(values))}
