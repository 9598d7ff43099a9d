"""The image tokenizer of `mini`: 64 x 64 pixels as 8 x 8 codes of 1,024.

    earlyfusion train mini_image_tokenizer data=DIR/emoji
    earlyfusion train mini_image_tokenizer data=DIR/emoji start=runs/mini_image_tokenizer \\
        trainable=decoder out=runs/mini_decoder

The first stage of `mini`. Trains a VQ-GAN of 4 M parameters on the emoji images (docs/mini.md)
with random shifts, scales and mirrors. Repeated, the command continues from the newest checkpoint.
Machine, run time and scores of the shipped weights are in the model card,
earlyfusion/pretrained/mini/README.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from earlyfusion import processes
from earlyfusion.config import PRESETS
from earlyfusion.data.images import to_pixels
from earlyfusion.mini.emoji.dataset import EmojiData
from earlyfusion.train.image_tokenizer import HeldOut, ImageTokenizerConfig, check_perceptual_files
from earlyfusion.train.optim import OptimConfig
from earlyfusion.train.trainer import RunConfig, train


@dataclass
class AugmentConfig:
    """How many images are augmented, and how far."""

    share: float = 0.6
    """Share of the images that are augmented."""
    shift: float = 0.12
    """The largest shift, as a share of the width."""
    scale: float = 0.15
    """Larger or smaller by at most this share."""
    mirror: float = 0.3
    """Share of the augmented images that are mirrored."""
    recolour: float = 0.1
    """Share of the augmented images whose colour channels are put in another order."""


@dataclass
class EmojiImageTokenizerConfig(ImageTokenizerConfig):
    """Training on the emoji images."""

    data: Path = Path("data/emoji")
    """Folder of the emoji data (docs/mini.md)."""
    batch: int = 12
    """Images of a step, over all processes."""
    checked: int = 64
    """Images of the validation split that are reconstructed and measured at `sample_every`."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)


def augment_image(
    image: Image.Image, side: int, config: AugmentConfig, rng: np.random.Generator
) -> Image.Image:
    """The image at `side` x `side` pixels, augmented by random numbers of `rng`. White comes in
    where its edge is shifted into the image."""
    if rng.random() >= config.share:
        return image.resize((side, side), Image.Resampling.LANCZOS)
    width = image.width
    extent = width * (1 + rng.uniform(-config.scale, config.scale))
    left, top = ((width - extent) / 2 + rng.uniform(-1, 1, 2) * config.shift * width).tolist()
    margin = int(width * (config.shift + config.scale)) + 1
    canvas = Image.new("RGB", (width + 2 * margin,) * 2, "white")
    canvas.paste(image, (margin, margin))
    box = (left + margin, top + margin, left + margin + extent, top + margin + extent)
    out = canvas.resize((side, side), Image.Resampling.LANCZOS, box=box)
    if rng.random() < config.mirror:
        out = out.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if rng.random() < config.recolour:
        bands = out.split()
        out = Image.merge("RGB", [bands[i] for i in rng.permutation(3)])
    return out


def batch_indices(step: int, batch: int, count: int, seed: int) -> list[int]:
    """Indices of the `batch` images of a step; each epoch has all `count` in a new order."""
    positions = [divmod(number, count) for number in range(step * batch, (step + 1) * batch)]
    orders = {
        epoch: np.random.default_rng([seed, 1_000_000 + epoch]).permutation(count)
        for epoch in {epoch for epoch, _ in positions}
    }
    return [int(orders[epoch][position]) for epoch, position in positions]


class AugmentedBatches:
    """Batches of augmented training images: batch k depends only on the seed and k. Each of
    several processes makes its block of a batch.

    This is not a `data.images.ImageBatches`, which has a random generator for each image. Here one
    generator augments all images of a batch in turn; anything else would change the losses of the
    shipped recipe.
    """

    def __init__(self, data: EmojiData, config: EmojiImageTokenizerConfig) -> None:
        self._images = data.images(data.split("train"))
        self._config = config

    def __call__(self, step: int) -> torch.Tensor:
        cfg = self._config
        rng, side = np.random.default_rng([cfg.run.seed, step]), cfg.model.resolution
        chosen = batch_indices(step, cfg.batch, len(self._images), cfg.run.seed)
        images = [augment_image(self._images[number], side, cfg.augment, rng) for number in chosen]
        size = cfg.batch // processes.count()
        return to_pixels(images[processes.rank() * size : (processes.rank() + 1) * size])


def held_out_images(data: EmojiData, config: EmojiImageTokenizerConfig) -> torch.Tensor:
    """Images of the validation split, evenly spread over it: float32 [B, 3, Y, X]."""
    ids, side = data.split("val"), config.model.resolution
    chosen = ids[:: max(1, len(ids) // config.checked)][: config.checked]
    rng, plain = np.random.default_rng(0), AugmentConfig(share=0.0)
    images = [augment_image(image, side, plain, rng) for image in data.images(chosen)]
    return to_pixels(images) if images else torch.empty(0, 3, side, side)


def main(config: EmojiImageTokenizerConfig) -> None:
    check_perceptual_files(config.loss)
    data, model = EmojiData(config.data), config.build()
    task = config.task(model, AugmentedBatches(data, config))
    train(task, config.run, config.optim, HeldOut(model, held_out_images(data, config), batch=16))


# Also those of the larger mini's image tokenizer (named_image_tokenizer.py).
OPTIM = OptimConfig(
    lr=1e-3,
    beta2=0.99,
    warmup_steps=100,
    decay="cosine",
    final_ratio=0.02,
    weight_decay=1e-4,
    eps=1e-8,
)

config = EmojiImageTokenizerConfig(
    model=PRESETS["mini"].vq_config,
    run=RunConfig(
        out=Path("runs/mini_image_tokenizer"), steps=4000, precision="bf16", sample_every=500
    ),
    optim=OPTIM,
)
