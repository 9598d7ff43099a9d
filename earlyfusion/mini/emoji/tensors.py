"""The pictures of the emoji data as tensors on a device, and what they show as labels."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from earlyfusion.mini.emoji.dataset import EmojiData
from earlyfusion.train.semantic import UNKNOWN

_THREADS = 16  # decoding leaves Python's lock


@lru_cache(maxsize=1)
def opened(folder: Path) -> EmojiData:
    """The data of a folder, read once for all stages of a run."""
    return EmojiData(folder)


@lru_cache(maxsize=4)
def pictures(folder: Path, split: str, side: int, device: str) -> Tensor:
    """All pictures of a split in file order, on the device: uint8 [pictures, side, side, 3].

    They are kept for further calls: 534 MB for the training pictures at 128 pixels.
    """
    data = opened(folder)
    with ThreadPoolExecutor(_THREADS) as pool:
        rows = list(pool.map(partial(_square, data, side), data.split(split)))
    table = np.stack(rows) if rows else np.zeros((0, side, side, 3), np.uint8)
    return torch.from_numpy(table).to(device)


def _square(data: EmojiData, side: int, image_id: str) -> np.ndarray:
    picture = data.image(image_id)
    if picture.size != (side, side):
        picture = picture.resize((side, side), Image.Resampling.LANCZOS)
    return np.asarray(picture)


class Labels:
    """Numbers of what pictures show: the thing, its kind and the style.

    Things and kinds are those of the training pictures; others are `UNKNOWN`.
    """

    def __init__(self, data: EmojiData) -> None:
        self._data = data
        rows = [data.row(i) for i in data.split("train")]
        self._things = _numbers([r["codepoints"] for r in rows])
        self._kinds = _numbers([r["subgroup"] for r in rows])
        self._styles = _numbers([r["style"] for r in rows])

    @property
    def answers(self) -> tuple[int, int, int]:
        """How many there are of each."""
        return len(self._things), len(self._kinds), len(self._styles)

    def of(self, ids: list[str]) -> Tensor:
        """int64 [pictures, 3]."""
        rows = [self._data.row(i) for i in ids]
        found = [
            (
                self._things.get(r["codepoints"], UNKNOWN),
                self._kinds.get(r["subgroup"], UNKNOWN),
                self._styles.get(r["style"], UNKNOWN),
            )
            for r in rows
        ]
        return torch.tensor(found, dtype=torch.long).view(-1, 3)


def _numbers(values: list[str]) -> dict[str, int]:
    return {value: number for number, value in enumerate(dict.fromkeys(values))}
