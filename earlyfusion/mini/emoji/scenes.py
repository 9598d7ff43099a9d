"""Synthetic images: scenes of several small images, scrambled images, noise.

The id of a synthetic image says how it is made, so that it can be made from the data alone:

  scene/3x2:noto/1f34e,noto/1f34c,,,,   small images in 3 columns and 2 rows; "" is an empty cell
  scrambled/7:noto/1f34e                its 16 tiles in random order; 7 is the seed
  noise/7                               patches of random colours; 7 is the seed

`scene_dialogues.py` writes dialogues about them.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from torch import Tensor

from earlyfusion.mini.emoji.dataset import EmojiData, Row
from earlyfusion.mini.emoji.phrases import with_article
from earlyfusion.mini.emoji.pools import VAGUE, Pools

ORDERED = 0.5  # share of scenes whose things are in the order of a requested scene
MAX_CELLS = 6
TILES = 4  # a scrambled image is split into 4 x 4 tiles
EMPTY = ""  # a cell without an image
_GRIDS = {4: (2, 2), 6: (3, 2)}
_COUNTED = {"animals-nature", "food-drink", "travel-places", "objects", "activities"}


class Scene(NamedTuple):
    """A grid of images: `cells` are their ids, row by row, `EMPTY` where there is none."""

    columns: int
    rows: int
    cells: tuple[str, ...]

    @property
    def id(self) -> str:
        return f"scene/{self.columns}x{self.rows}:{','.join(self.cells)}"

    @classmethod
    def of(cls, image_id: str) -> Scene:
        """The scene with this id."""
        size, cells = image_id.removeprefix("scene/").split(":")
        columns, rows = map(int, size.split("x"))
        return cls(columns, rows, tuple(cells.split(",")))

    def counts(self) -> dict[str, int]:
        """How many of each image there are, in the order of their first cells."""
        used = [cell for cell in self.cells if cell]
        return {cell: used.count(cell) for cell in dict.fromkeys(used)}

    def beside(self, cell: int, step: tuple[int, int]) -> str:
        """The image `step` (columns, rows) away from a cell; `EMPTY` if there is none."""
        row, column = divmod(cell, self.columns)
        column, row = column + step[0], row + step[1]
        is_inside = 0 <= column < self.columns and 0 <= row < self.rows
        return self.cells[row * self.columns + column] if is_inside else EMPTY


# ---- ids of synthetic images


def scenes(data: EmojiData, count: int, seed: int = 0) -> list[Scene]:
    """`count` scenes of training images, the same for the same seed. Empty if no thing of the data
    can be counted (`is_counted`)."""
    rng = random.Random(f"scenes-{seed}")
    pool = [row for row in Pools(data, "train").rows if is_counted(row)]
    if not pool:
        return []
    by_style: dict[str, list[Row]] = {}
    for row in pool:
        by_style.setdefault(row["style"], []).append(row)
    return [_scene(pool, by_style, rng) for _ in range(count)]


def _scene(pool: list[Row], by_style: dict[str, list[Row]], rng: random.Random) -> Scene:
    first = rng.choice(pool)
    other = rng.choice(by_style[first["style"]])
    numbers = [rng.randint(1, 4), rng.randint(1, 2)]
    one_kind = other["family"] == first["family"] or rng.random() < 0.35
    images = [first["id"]] * numbers[0] + ([] if one_kind else [other["id"]] * numbers[1])
    columns, rows = _GRIDS[4 if len(images) <= 4 else MAX_CELLS]
    cells = images + [EMPTY] * (columns * rows - len(images))
    if rng.random() >= ORDERED:
        rng.shuffle(cells)
    return Scene(columns, rows, tuple(cells))


def is_counted(row: Row) -> bool:
    """Whether one can say "two …s" of it: a thing with a short name and a regular plural."""
    name = row["en"]
    return (
        row["group"] in _COUNTED
        and row["subgroup"] not in VAGUE
        and len(name.split()) <= 2
        and with_article(name).startswith(("a ", "an "))
        and name.replace(" ", "").isalpha()
    )


def is_ordered(scene: Scene) -> bool:
    """Whether its things are in the cells of a requested scene."""
    names = [name for name, count in scene.counts().items() for _ in range(count)]
    return list(scene.cells[: len(names)]) == names


def unknown_image_ids(data: EmojiData, count: int, seed: int = 0) -> list[str]:
    """Ids of at most `count` images that show nothing known: noise, scrambled images, and icons if
    the data has any."""
    rng = random.Random(f"strangers-{seed}")
    known, icons = data.split("train"), data.split("unknown-train")
    ids = []
    for number in range(count):
        kind = rng.random()
        if icons and kind < 0.5:
            ids.append(rng.choice(icons))
        elif kind < 0.8:
            ids.append(f"scrambled/{seed * 100_000 + number}:{rng.choice(known)}")
        else:
            ids.append(f"noise/{seed * 100_000 + number}")
    return list(dict.fromkeys(ids))


# ---- pixels of synthetic images


def make_synthetic_images(
    ids: Sequence[str], table_PYXC: Tensor, numbers: Mapping[str, int]
) -> Tensor:
    """The pixels of synthetic images, on the device of the table: uint8 [len(ids), Y, X, 3]. Other
    ids give white images. `table_PYXC` has the images that they are made of; `numbers` maps the
    ids of these to rows of the table."""
    side = table_PYXC.shape[1]
    out = torch.full((len(ids), side, side, 3), 255, dtype=torch.uint8, device=table_PYXC.device)
    for columns, rows in sorted(set(_GRIDS.values())):
        prefix = f"scene/{columns}x{rows}:"
        of_grid = [n for n, image_id in enumerate(ids) if image_id.startswith(prefix)]
        if of_grid:
            _paste(out, of_grid, [Scene.of(ids[n]) for n in of_grid], table_PYXC, numbers)
    for n, image_id in enumerate(ids):
        if image_id.startswith("scrambled/"):
            seed, original = image_id.removeprefix("scrambled/").split(":")
            out[n] = _scramble(table_PYXC[numbers[original]], int(seed))
        elif image_id.startswith("noise/"):
            out[n] = _noise(side, int(image_id.removeprefix("noise/"))).to(out.device)
    return out


def _paste(
    out: Tensor,
    indices: list[int],
    scenes_of_grid: list[Scene],
    table_PYXC: Tensor,
    numbers: Mapping[str, int],
) -> None:
    """Paste the images of scenes of one grid, cell by cell, for all scenes at once."""
    columns, rows, device = scenes_of_grid[0].columns, scenes_of_grid[0].rows, table_PYXC.device
    used = sorted({cell for scene in scenes_of_grid for cell in scene.cells if cell})
    index_of = {name: number for number, name in enumerate(used)}
    side = table_PYXC.shape[1] // max(columns, rows)
    top = (table_PYXC.shape[1] - rows * side) // 2
    small = torch.cat(
        [
            _shrink(
                table_PYXC[torch.tensor([numbers[n] for n in used[k : k + 256]], device=device)],
                side,
            )
            for k in range(0, len(used), 256)
        ]
    )
    for cell in range(columns * rows):
        row, column = divmod(cell, columns)
        pairs = [
            (n, index_of[s.cells[cell]])
            for n, s in zip(indices, scenes_of_grid, strict=True)
            if s.cells[cell]
        ]
        if pairs:
            to, of = torch.tensor(pairs, device=device).T
            y, x = top + row * side, column * side
            out[to, y : y + side, x : x + side] = small[of]


def _shrink(images_BYXC: Tensor, side: int) -> Tensor:
    """Square images at another side, as bytes."""
    pixels = images_BYXC.permute(0, 3, 1, 2).float()
    small = F.interpolate(pixels, (side, side), mode="bilinear", antialias=True)
    return small.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def _scramble(image_YXC: Tensor, seed: int) -> Tensor:
    """The image with its tiles in random order; pixels that fill no tile become white."""
    side = image_YXC.shape[0] // TILES
    if not side:
        return image_YXC
    order = list(range(TILES * TILES))
    random.Random(f"tiles-{seed}").shuffle(order)
    inner = image_YXC[: side * TILES, : side * TILES]
    tiles = inner.reshape(TILES, side, TILES, side, 3).transpose(1, 2).reshape(-1, side, side, 3)
    shuffled = tiles[torch.tensor(order, device=tiles.device)]
    out = torch.full_like(image_YXC, 255)
    out[: side * TILES, : side * TILES] = (
        shuffled.reshape(TILES, TILES, side, side, 3).transpose(1, 2).reshape(inner.shape)
    )
    return out


def _noise(side: int, seed: int) -> Tensor:
    """Patches of random colours, of one of four sizes, with sharp or smooth edges."""
    generator = torch.Generator().manual_seed(seed)
    patches = (2, 4, 8, 16)[seed % 4]
    colours = torch.rand(1, 3, patches, patches, generator=generator) * 255
    smooth = seed // 4 % 2 == 0
    pixels = F.interpolate(colours, (side, side), mode="bilinear" if smooth else "nearest")
    return pixels[0].round().to(torch.uint8).permute(1, 2, 0)


def image_of(data: EmojiData, image_id: str) -> PIL.Image.Image:
    """The image with this id, from the data or synthetic: RGB, 128 x 128."""
    if image_id.startswith("scene/"):
        parts = list(Scene.of(image_id).counts())
    elif image_id.startswith("scrambled/"):
        parts = [image_id.split(":", 1)[1]]
    elif image_id.startswith("noise/"):
        parts = []
    else:
        return data.image(image_id)
    side = 128
    table = [np.asarray(data.image(part)) for part in parts] or [
        np.zeros((side, side, 3), np.uint8)
    ]
    numbers = {part: number for number, part in enumerate(parts)}
    images = make_synthetic_images([image_id], torch.from_numpy(np.stack(table)), numbers)
    return PIL.Image.fromarray(images[0].numpy())
