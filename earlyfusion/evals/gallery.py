"""Evaluations of generated images: features, nearest images of the emoji data, distances.

The features of an image are two blocks of numbers: RGB at 16 x 16 after a light blur, and the mean
edge strength of its grey version in 16 x 16 cells. Each block is divided by its standard deviation
over the images of a gallery. The distance of two images is the mean squared difference of their
features, in which edges count half. Nothing here is learnt, so that results of different versions
can be compared.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import PIL.Image
from PIL import ImageFilter

from earlyfusion.mini.emoji.dataset import ICON, EmojiData, Row

Features: TypeAlias = npt.NDArray[np.float32]

COMPONENTS = 32
_THREADS = 8  # Pillow releases Python's lock
_PAIRS = 2000  # of which `between_styles` is the median


class Gallery:
    """The images that generated ones are compared with: those of one style, or all training images
    but icons. `dataset_rows` describe them, `rows` are their features, [n, 1024]."""

    def __init__(self, data: EmojiData, style: str | None = None) -> None:
        rows = [r for r in data.rows if r["style"] == style]
        if style is None:
            rows = [r for r in data.rows if r["split"] == "train" and r["style"] != ICON]
        self.dataset_rows: list[Row] = rows
        self.concepts = np.array([r["codepoints"] for r in rows])
        with ThreadPoolExecutor(_THREADS) as pool:
            blocks = list(pool.map(lambda row: features(data.image(row["id"])), rows))
        colours, edges = (np.stack(block) for block in zip(*blocks, strict=True))
        self.scales = (float(colours.std()) or 1.0, float(edges.std()) or 1.0)
        self.rows = np.stack([self._scale(*block) for block in blocks])

    def rank(self, image: PIL.Image.Image, concept: str) -> int:
        """How many other concepts have an image that is nearer than all images of this one; 0 if
        this one is the nearest."""
        distances = ((self.rows - self.embed(image)) ** 2).sum(1)
        nearest = distances[self.concepts == concept].min()
        return len(set(self.concepts[distances < nearest].tolist()) - {concept})

    def nearest(self, image: PIL.Image.Image) -> Row:
        """The row of the nearest image."""
        return self.dataset_rows[int(((self.rows - self.embed(image)) ** 2).sum(1).argmin())]

    def embed(self, image: PIL.Image.Image) -> Features:
        """The features of an image, scaled as those of `rows`: [1024]."""
        return self._scale(*features(image))

    def between_styles(self) -> float:
        """The median distance of two images of one thing in different styles; 1 if there are no
        such images."""
        rng, by_concept = random.Random(0), dict[str, list[int]]()
        for number, concept in enumerate(self.concepts.tolist()):
            by_concept.setdefault(concept, []).append(number)
        groups = [numbers for numbers in by_concept.values() if len(numbers) > 1]
        if not groups:
            return 1.0
        pairs = [rng.sample(rng.choice(groups), 2) for _ in range(_PAIRS)]
        distances = [
            float(((self.rows[a] - self.rows[b]) ** 2).sum())
            for a, b in pairs
            if self.dataset_rows[a]["style"] != self.dataset_rows[b]["style"]
        ]
        return float(np.median(distances)) if distances else 1.0

    def _scale(self, colours: Features, edges: Features) -> Features:
        """Both blocks as one vector, so that squared distances are those of this file's top."""
        weights = (
            1 / self.scales[0] / colours.size**0.5,
            0.5**0.5 / self.scales[1] / edges.size**0.5,
        )
        return np.concatenate([colours * weights[0], edges * weights[1]])


def features(image: PIL.Image.Image) -> tuple[Features, Features]:
    """Colours [768] and edges [256] of an image, each from 0 to 1: see the top of this file."""
    small = resized(image.convert("RGB"), (64, 64))
    blurred = small.filter(ImageFilter.GaussianBlur(2)).resize((16, 16), PIL.Image.Resampling.BOX)
    grey = np.asarray(small.convert("L"), np.float32) / 255
    vertical, horizontal = np.gradient(grey)
    edges = np.hypot(vertical, horizontal).reshape(16, 4, 16, 4).mean((1, 3))
    colours = np.asarray(blurred, np.float32).ravel() / np.float32(255)
    return colours, edges.astype(np.float32).ravel()


def resized(image: PIL.Image.Image, size: tuple[int, int]) -> PIL.Image.Image:
    """The image at a size (width, height)."""
    if image.size == size:
        return image
    return image.resize(size, PIL.Image.Resampling.LANCZOS)


def count_different(gallery: Gallery, images: Sequence[PIL.Image.Image]) -> int:
    """How many of the images differ from each other: in order, those whose distance to all images
    that count already is over half of `between_styles`."""
    threshold, counted = gallery.between_styles() / 2, list[Features]()
    for embedding in map(gallery.embed, images):
        if all(float(((embedding - other) ** 2).sum()) > threshold for other in counted):
            counted.append(embedding)
    return len(counted)


def frechet(
    gallery: Gallery, images_a: Sequence[PIL.Image.Image], images_b: Sequence[PIL.Image.Image]
) -> float:
    """The Frechet distance of two sets of images, as FID but in other features.

    The features are the `COMPONENTS` first principal components of the gallery's images, in units
    of the standard deviation of the first. Few images give a higher distance: compare figures of
    equal numbers.
    """
    centre = gallery.rows.mean(0)
    _, singular_values, axes = np.linalg.svd(gallery.rows - centre, full_matrices=False)
    unit = singular_values[0] / len(gallery.rows) ** 0.5
    axes = axes[:COMPONENTS] / (unit or 1.0)
    (mean_a, cov_a), (mean_b, cov_b) = (
        (components.mean(0), np.cov(components, rowvar=False))
        for components in (
            (np.stack([gallery.embed(image) for image in images]) - centre) @ axes.T
            for images in (images_a, images_b)
        )
    )
    # |mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2)), with a symmetric product.
    root_a = _matrix_root(cov_a)
    cross = np.trace(_matrix_root(root_a @ cov_b @ root_a))
    return float(((mean_a - mean_b) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)


def _matrix_root(matrix: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
    """The square root of a symmetric matrix without negative eigenvalues."""
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(values.clip(0))) @ vectors.T
