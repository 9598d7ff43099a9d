"""Pictures of any source by number: files of pictures, or the rows of tables.

    number -> source -> a picture file, or a row and one of its pictures

A picture that cannot be read goes to the quarantine and is replaced by the next one. A step's batch
depends only on the seed and the step's number.
"""

# Shapes: B batch, Y X pixels.

from __future__ import annotations

import glob
import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from earlyfusion.content import Image
from earlyfusion.data.forms import pictures_of
from earlyfusion.data.joined import Joined
from earlyfusion.data.mixture import Epochs
from earlyfusion.data.rows import Quarantine, Rows, RowSettings, open_rows
from earlyfusion.data.tables import SUFFIXES
from earlyfusion.errors import DataError, ImageError, SettingError
from earlyfusion.files import expanded
from earlyfusion.image_tokenizer import cropped

_PICTURE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
_TRIES = 1000


@dataclass
class PicturesConfig:
    """Which pictures are read. A folder or glob with picture files gives those, else its rows."""

    data: tuple[str, ...] = ()
    """Files, folders, globs or hub ids: pictures, JSONL, Parquet or tar."""
    held_out: tuple[str, ...] = ()
    """Sources to check on; without them, some pictures of `data` are held out."""
    checked: int = 64
    """Pictures to check on."""
    patterns: tuple[str, ...] = ()
    images: Path | None = None
    """Folder of the pictures that rows name; None: beside the file of the row."""
    max_broken: float = 1.0
    """Largest share of pictures that may be broken, once 100 are read; 1: any."""

    def __post_init__(self) -> None:
        if self.checked < 1:
            raise SettingError(f"checked={self.checked} must be at least 1")
        _ = self.rows

    @property
    def rows(self) -> RowSettings:
        return RowSettings(self.patterns, self.images, self.max_broken)


class Pictures(Protocol):
    fingerprint: str
    groups: list[int]
    is_random: bool

    def __len__(self) -> int: ...

    def read(self, number: int, which: float) -> PIL.Image.Image:
        """A picture; of several under one number, the one at `which`, a fraction from 0 to 1.
        Raises `DataError` or `ImageError`."""
        ...

    def find(self, number: int) -> tuple[Path, int]:
        """The file of a number, and the row in it, from 0."""
        ...


class PictureFiles:
    """Files of one picture each."""

    is_random = True

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        self.groups = [len(paths)]
        self.fingerprint = hashlib.sha256(
            "".join(f"{p.as_posix()} {p.stat().st_size}\n" for p in paths).encode()
        ).hexdigest()

    def __len__(self) -> int:
        return len(self._paths)

    def read(self, number: int, which: float) -> PIL.Image.Image:
        return _pixels(Image.open(self._paths[number]))

    def find(self, number: int) -> tuple[Path, int]:
        return self._paths[number], 0


class RowPictures:
    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self.groups, self.is_random = rows.groups, rows.is_random
        self.fingerprint = rows.fingerprint

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, number: int, which: float) -> PIL.Image.Image:
        table, at = self._rows.find(number)
        row = table.row(at)
        found = pictures_of(row)
        where = found[int(which * len(found))].where
        return _pixels(
            Image.from_bytes(table.read(row, where) if isinstance(where, str) else where)
        )

    def find(self, number: int) -> tuple[Path, int]:
        table, at = self._rows.find(number)
        return table.path, at


class JoinedPictures:
    """Several sources, one after another."""

    def __init__(self, sources: Sequence[Pictures]) -> None:
        self._sources = sources
        self._numbers = Joined(map(len, sources))
        self.groups = [group for source in sources for group in source.groups]
        self.is_random = all(source.is_random for source in sources)
        text = "".join(source.fingerprint for source in sources)
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._numbers)

    def read(self, number: int, which: float) -> PIL.Image.Image:
        source, at = self._numbers.find(number)
        return self._sources[source].read(at, which)

    def find(self, number: int) -> tuple[Path, int]:
        source, at = self._numbers.find(number)
        return self._sources[source].find(at)


def open_pictures(sources: Sequence[str], cache: Path, settings: RowSettings) -> JoinedPictures:
    """Open all sources as one; `cache` is the folder of the tables' indices. Raises `DataError`."""
    if not sources:
        raise SettingError("data is empty: give data=PATH, pictures or tables of them")
    opened: list[Pictures] = []
    for source in sources:
        files = _picture_files(source)
        opened.append(
            PictureFiles(files) if files else RowPictures(open_rows(source, cache, settings))
        )
    return JoinedPictures(opened)


def _picture_files(source: str) -> list[Path]:
    """The picture files of a source, sorted by name; none for tables or a hub id."""
    path = expanded(source)
    if path.is_file():
        found = [] if path.suffix in SUFFIXES else [path]
    elif path.is_dir():
        found = [p for p in path.rglob("*") if p.suffix.lower() in _PICTURE_SUFFIXES]
    else:
        names = glob.glob(str(path), recursive=True) if glob.has_magic(source) else []
        found = [Path(n) for n in names if Path(n).suffix.lower() in _PICTURE_SUFFIXES]
    return sorted((p for p in found if p.is_file()), key=lambda p: p.as_posix())


def _pixels(image: Image) -> PIL.Image.Image:
    assert image.pil is not None
    return image.pil


Crop = Callable[[PIL.Image.Image, np.random.Generator], PIL.Image.Image]


@dataclass
class CropConfig:
    """A random square of a picture, resized."""

    smallest: float = 0.5
    """Shortest side of the square, as a share of the picture's shorter side."""
    mirror: float = 0.5
    """Share of pictures that are mirrored."""

    def __post_init__(self) -> None:
        if not 0 < self.smallest <= 1 or not 0 <= self.mirror <= 1:
            raise SettingError(
                f"smallest={self.smallest} and mirror={self.mirror} are shares: give smallest "
                "above 0 to 1, mirror 0 to 1"
            )


def random_crop(
    picture: PIL.Image.Image, side: int, config: CropConfig, rng: np.random.Generator
) -> PIL.Image.Image:
    """A random square, resized to `side` x `side`. It covers at least `side` pixels of the picture
    if possible, so that nothing is enlarged."""
    # The box has fractional sides, so that cropping and resizing are one filter.
    width, height = picture.size
    shorter = min(width, height)
    extent = max(rng.uniform(config.smallest, 1.0) * shorter, min(side, shorter))
    left, top = rng.uniform(0, width - extent), rng.uniform(0, height - extent)
    box = (left, top, left + extent, top + extent)
    out = picture.resize((side, side), PIL.Image.Resampling.LANCZOS, box=box)
    if rng.random() < config.mirror:
        out = out.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT)
    return out


def to_pixels(pictures: Sequence[PIL.Image.Image]) -> Tensor:
    """Pictures of equal size as float32 [B, 3, Y, X] in [-1, 1]."""
    arrays = np.stack([np.asarray(p, np.uint8) for p in pictures])
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 255 * 2 - 1


class PictureBatches:
    """Batches of cropped pictures; batch k depends only on the seed and k. `share` (which process,
    of how many) says which block of each batch is made."""

    def __init__(
        self,
        pictures: Pictures,
        chosen: np.ndarray | None,
        batch: int,
        crop: Crop,
        seed: int,
        quarantine: Quarantine,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        self._share = share
        self._pictures, self._batch, self._crop = pictures, batch, crop
        self._epochs = Epochs(pictures, seed, "pictures", chosen)
        self._seed, self._quarantine = seed, quarantine

    def __call__(self, step: int) -> Tensor:
        # Every process knows the whole batch, so a step does not depend on their number.
        which, count = self._share
        size = self._batch // count
        first = step * self._batch + which * size
        return to_pixels([self._picture(number) for number in range(first, first + size)])

    def _picture(self, number: int) -> PIL.Image.Image:
        for turn in range(number, number + _TRIES):
            # By the number in the batch, not the picture's, so that each epoch crops differently.
            rng = np.random.default_rng([self._seed, number, turn - number])
            at = self._epochs.number(*divmod(turn, len(self._epochs)))
            picture = read_or_refuse(self._pictures, at, rng.random(), self._quarantine)
            if picture is not None:
                return self._crop(picture, rng)
        raise DataError(f"none of {_TRIES} pictures is whole: see {self._quarantine.path}")


def read_or_refuse(
    pictures: Pictures, number: int, which: float, quarantine: Quarantine
) -> PIL.Image.Image | None:
    """A picture, or None if it went to the quarantine."""
    try:
        picture = pictures.read(number, which)
    except (DataError, ImageError) as error:
        path, row = pictures.find(number)
        quarantine.refuse(path, row + 1, str(error))
        return None
    quarantine.accept()
    return picture


def hold_out(pictures: Pictures, wanted: int, most: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
    """Numbers to check on, at most this share, and the others; the same for every run's seed."""
    # A fixed seed, so that runs of other seeds are measured on the same pictures.
    count = len(pictures)
    held = min(wanted, int(most * count))
    order = np.random.default_rng(0).permutation(count)
    return np.sort(order[:held]), np.sort(order[held:])


def fixed_squares(
    pictures: Pictures, numbers: Iterable[int], side: int, quarantine: Quarantine
) -> Tensor:
    """The centres of the pictures that can be read: float32 [B, 3, side, side]."""
    found = (read_or_refuse(pictures, int(number), 0.0, quarantine) for number in numbers)
    squares = [cropped(picture, side) for picture in found if picture is not None]
    return to_pixels(squares) if squares else torch.empty(0, 3, side, side)
