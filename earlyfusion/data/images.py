"""Images of any source by number: image files, or the rows of tables.

    number -> source -> an image file, or a row and one of its images

An image that cannot be read goes to the quarantine and is replaced by the next one. The batch of a
step depends only on the seed and the number of the step.
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
from earlyfusion.data.forms import image_refs_of
from earlyfusion.data.joined import Joined
from earlyfusion.data.mixture import Epochs
from earlyfusion.data.rows import Quarantine, Rows, RowSettings, open_rows
from earlyfusion.data.tables import SUFFIXES
from earlyfusion.errors import DataError, ImageError, SettingError
from earlyfusion.fields import check_at_least, check_shares
from earlyfusion.files import expanded, files_under
from earlyfusion.image_tokenizer import cropped

_IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
_TRIES = 1000  # consecutive images that may be broken


@dataclass
class ImagesConfig:
    """Which images are read. A folder or glob with image files gives those, else its rows."""

    data: tuple[str, ...] = ()
    """Files, folders, globs or hub ids: images, JSONL, Parquet or tar."""
    held_out: tuple[str, ...] = ()
    """Sources to check on; without them, some images of `data` are held out."""
    checked: int = 64
    """Images to check on."""
    patterns: tuple[str, ...] = ()
    """Files of a folder or hub data set to take, such as `train/*.jpg`; none: all."""
    images: Path | None = None
    """Folder of the images that rows name; None: beside the file of the row."""
    max_broken: float = 1.0
    """Largest share of images that may be broken, once 100 are read; 1: any."""

    def __post_init__(self) -> None:
        check_at_least(self, checked=1)
        _ = self.rows  # checks `max_broken`

    @property
    def rows(self) -> RowSettings:
        """The settings of the reader of rows."""
        return RowSettings(self.patterns, self.images, self.max_broken)


class Images(Protocol):
    """The images of a source by number. `groups` are sizes of groups of numbers that are cheap to
    read together, in order; with `is_random` any number is as cheap to read as the next."""

    fingerprint: str
    groups: list[int]
    is_random: bool

    def __len__(self) -> int: ...

    def read(self, number: int, choice: float) -> PIL.Image.Image:
        """Image `number`. If a row has several images, `choice` selects one: 0 the first, just
        below 1 the last. Raises `DataError` or `ImageError`."""
        ...

    def find(self, number: int) -> tuple[Path, int]:
        """The file of image `number`, and its row in that file, from 0."""
        ...


class ImageFiles:
    """Files of one image each."""

    is_random = True

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        self.groups = [len(paths)]
        self.fingerprint = hashlib.sha256(
            "".join(f"{p.as_posix()} {p.stat().st_size}\n" for p in paths).encode()
        ).hexdigest()

    def __len__(self) -> int:
        return len(self._paths)

    def read(self, number: int, choice: float) -> PIL.Image.Image:
        return _pil(Image.open(self._paths[number]))

    def find(self, number: int) -> tuple[Path, int]:
        return self._paths[number], 0


class RowImages:
    """The images that rows of tables name or contain."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self.groups, self.is_random = rows.groups, rows.is_random
        self.fingerprint = rows.fingerprint

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, number: int, choice: float) -> PIL.Image.Image:
        table, table_row = self._rows.find(number)
        row = table.row(table_row)
        refs = image_refs_of(row)
        source = refs[int(choice * len(refs))].source
        data = table.read(row, source) if isinstance(source, str) else source
        return _pil(Image.from_bytes(data))

    def find(self, number: int) -> tuple[Path, int]:
        table, table_row = self._rows.find(number)
        return table.path, table_row


class JoinedImages:
    """Several sources, one after another."""

    def __init__(self, sources: Sequence[Images]) -> None:
        self._sources = sources
        self._numbers = Joined(map(len, sources))
        self.groups = [group for source in sources for group in source.groups]
        self.is_random = all(source.is_random for source in sources)
        text = "".join(source.fingerprint for source in sources)
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._numbers)

    def read(self, number: int, choice: float) -> PIL.Image.Image:
        source, index = self._numbers.find(number)
        return self._sources[source].read(index, choice)

    def find(self, number: int) -> tuple[Path, int]:
        source, index = self._numbers.find(number)
        return self._sources[source].find(index)


def open_images(sources: Sequence[str], cache: Path, settings: RowSettings) -> JoinedImages:
    """Open all sources as one; `cache` is the folder of the tables' indices. Raises `DataError`."""
    if not sources:
        raise SettingError("data is empty: give data=PATH, images or tables of them")
    parts: list[Images] = []
    for source in sources:
        files = _image_files(source)
        parts.append(ImageFiles(files) if files else RowImages(open_rows(source, cache, settings)))
    return JoinedImages(parts)


def _image_files(source: str) -> list[Path]:
    """The image files of a source, sorted by name; none for tables or a hub id."""
    path = expanded(source)
    if path.is_file():
        files = [] if path.suffix in SUFFIXES else [path]
    elif path.is_dir():
        files = [p for p in files_under(path) if p.suffix.lower() in _IMAGE_SUFFIXES]
    else:
        names = glob.glob(str(path), recursive=True) if glob.has_magic(source) else []
        files = [Path(n) for n in names if Path(n).suffix.lower() in _IMAGE_SUFFIXES]
    return sorted((p for p in files if p.is_file()), key=lambda p: p.as_posix())


def _pil(image: Image) -> PIL.Image.Image:
    assert image.pil is not None
    return image.pil


Crop = Callable[[PIL.Image.Image, np.random.Generator], PIL.Image.Image]
"""Makes an image square, at one size for all."""


@dataclass
class CropConfig:
    """Which random square of an image is taken."""

    smallest: float = 0.5
    """Shortest side of the square, as a share of the image's shorter side."""
    mirror: float = 0.5
    """Share of images that are mirrored."""

    def __post_init__(self) -> None:
        if not 0 < self.smallest <= 1:
            raise SettingError(f"smallest={self.smallest} must be a share above 0 and at most 1")
        check_shares(self, "mirror")


def random_crop(
    image: PIL.Image.Image, side: int, config: CropConfig, rng: np.random.Generator
) -> PIL.Image.Image:
    """A random square of the image, resized to `side` x `side` pixels and perhaps mirrored. It is
    enlarged only if the image is smaller than `side`."""
    # The box has fractional sides, and one filter crops and resizes.
    width, height = image.size
    shorter = min(width, height)
    box_side = max(rng.uniform(config.smallest, 1.0) * shorter, min(side, shorter))
    left, top = rng.uniform(0, width - box_side), rng.uniform(0, height - box_side)
    box = (left, top, left + box_side, top + box_side)
    square = image.resize((side, side), PIL.Image.Resampling.LANCZOS, box=box)
    if rng.random() < config.mirror:
        square = square.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT)
    return square


def to_pixels(images: Sequence[PIL.Image.Image]) -> Tensor:
    """Images of equal size as float32 [B, 3, Y, X] in [-1, 1]."""
    arrays = np.stack([np.asarray(p, np.uint8) for p in images])
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 255 * 2 - 1


class ImageBatches:
    """Batches of cropped images: float32 [B, 3, Y, X]; batch k depends only on the seed and k.

    `subset` are the numbers of the images to use, ascending (None: all). `batch` is the number of
    images of a step over all processes; `share`, the rank of this process and the number of
    processes, says which block of it is made. Raises `DataError` when too many images are broken.
    """

    def __init__(
        self,
        images: Images,
        subset: np.ndarray | None,
        batch: int,
        crop: Crop,
        seed: int,
        quarantine: Quarantine,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        self._share = share
        self._images, self._batch, self._crop = images, batch, crop
        # The key decides the order of the images: with another one, runs could not be repeated.
        self._epochs = Epochs(images, seed, "pictures", subset)
        self._seed, self._quarantine = seed, quarantine

    def __call__(self, step: int) -> Tensor:
        # Every process knows the whole batch, so a step does not depend on their number.
        rank, world_size = self._share
        size = self._batch // world_size
        first = step * self._batch + rank * size
        return to_pixels([self._image(number) for number in range(first, first + size)])

    def _image(self, number: int) -> PIL.Image.Image:
        """Image `number` of the run, or the first one after it that can be read."""
        for attempt in range(_TRIES):
            # By the number in the run, not the image's, so that each epoch crops differently.
            rng = np.random.default_rng([self._seed, number, attempt])
            image_number = self._epochs.number(*divmod(number + attempt, len(self._epochs)))
            image = read_or_quarantine(self._images, image_number, rng.random(), self._quarantine)
            if image is not None:
                return self._crop(image, rng)
        raise DataError(
            f"{_TRIES} images in a row cannot be read: see {self._quarantine.path}, and mend or "
            "remove them"
        )


def read_or_quarantine(
    images: Images, number: int, choice: float, quarantine: Quarantine
) -> PIL.Image.Image | None:
    """An image, or None if it went to the quarantine."""
    try:
        image = images.read(number, choice)
    except (DataError, ImageError) as error:
        path, row = images.find(number)
        quarantine.refuse(path, row + 1, str(error))
        return None
    quarantine.accept()
    return image


def hold_out(images: Images, count: int, max_share: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of `count` images to check on, but at most the share `max_share` of all, and the
    numbers of the others; both ascending."""
    # A fixed seed, so that runs of other seeds are measured on the same images.
    total = len(images)
    count = min(count, int(max_share * total))
    order = np.random.default_rng(0).permutation(total)
    return np.sort(order[:count]), np.sort(order[count:])


def centre_crops(
    images: Images, numbers: Iterable[int], side: int, quarantine: Quarantine
) -> Tensor:
    """The central squares of the images that can be read: float32 [B, 3, side, side]."""
    loaded = (read_or_quarantine(images, int(number), 0.0, quarantine) for number in numbers)
    squares = [cropped(image, side) for image in loaded if image is not None]
    return to_pixels(squares) if squares else torch.empty(0, 3, side, side)
