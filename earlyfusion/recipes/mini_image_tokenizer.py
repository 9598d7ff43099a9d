"""The image tokenizer of `mini`: 64 x 64 pixels as 8 x 8 codes of 1,024.

    earlyfusion train mini_image_tokenizer data=DIR/emoji

Trains a 4 M-parameter VQ-GAN on the emoji pictures (docs/data.md) with random shifts, scales and
mirrors. The run is resumable: the same command goes on from the newest checkpoint. Machine, run
time and scores of the shipped weights: the model card, earlyfusion/pretrained/mini/README.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from earlyfusion.config import PRESETS, VQConfig
from earlyfusion.model.vqgan import VQGAN
from earlyfusion.recipes.emoji.dataset import EmojiData
from earlyfusion.train.image_tokenizer import ImageTokenizerTask, VQLossConfig
from earlyfusion.train.optim import OptimConfig
from earlyfusion.train.trainer import RunConfig, resolve_device, train


@dataclass
class AugmentConfig:
    """Share of pictures that are changed, and how far."""

    share: float = 0.6
    shift: float = 0.12
    scale: float = 0.15
    mirror: float = 0.3
    recolour: float = 0.1


@dataclass
class ImageTokenizerConfig:
    data: Path = Path("data/emoji")
    batch: int = 12
    run: RunConfig = field(default_factory=RunConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    model: VQConfig = field(default_factory=VQConfig)
    loss: VQLossConfig = field(default_factory=VQLossConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)


def augmented(
    picture: Image.Image, side: int, config: AugmentConfig, rng: np.random.Generator
) -> Image.Image:
    """The picture at `side` x `side`, often moved, scaled, mirrored or with channels swapped."""
    if rng.random() >= config.share:
        return picture.resize((side, side), Image.Resampling.LANCZOS)
    width = picture.width
    extent = width * (1 + rng.uniform(-config.scale, config.scale))
    left, top = ((width - extent) / 2 + rng.uniform(-1, 1, 2) * config.shift * width).tolist()
    margin = int(width * (config.shift + config.scale)) + 1
    canvas = Image.new("RGB", (width + 2 * margin,) * 2, "white")
    canvas.paste(picture, (margin, margin))
    box = (left + margin, top + margin, left + margin + extent, top + margin + extent)
    out = canvas.resize((side, side), Image.Resampling.LANCZOS, box=box)
    if rng.random() < config.mirror:
        out = out.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if rng.random() < config.recolour:
        bands = out.split()
        out = Image.merge("RGB", [bands[i] for i in rng.permutation(3)])
    return out


def to_pixels(pictures: list[Image.Image]) -> torch.Tensor:
    """Pictures of equal size as float32 [B, 3, Y, X] in [-1, 1]."""
    arrays = np.stack([np.asarray(p, np.uint8) for p in pictures])
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 255 * 2 - 1


class Pictures:
    """Batches of augmented training pictures: batch k follows from the seed and k."""

    def __init__(self, config: ImageTokenizerConfig) -> None:
        data = EmojiData(config.data)
        self._pictures = data.images(data.split("train"))
        self._config = config

    def __call__(self, step: int) -> torch.Tensor:
        cfg, count = self._config, len(self._pictures)
        rng = np.random.default_rng([cfg.run.seed, step])
        places = np.arange(step * cfg.batch, (step + 1) * cfg.batch)
        chosen = [_shuffled(count, cfg.run.seed, int(p // count))[p % count] for p in places]
        side = cfg.model.resolution
        return to_pixels([augmented(self._pictures[i], side, cfg.augment, rng) for i in chosen])


def _shuffled(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, 1_000_000 + epoch]).permutation(count)


def main(config: ImageTokenizerConfig) -> None:
    run = config.run
    torch.manual_seed(run.seed)
    model = VQGAN(config.model).to(resolve_device(run.device))
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    task = ImageTokenizerTask(model, config.loss, Pictures(config), run.steps, run.compile)
    train(task, run, config.optim)


config = ImageTokenizerConfig(
    model=PRESETS["mini"].vq_config,
    run=RunConfig(out=Path("runs/mini_image_tokenizer"), steps=4000, precision="bf16"),
    optim=OptimConfig(
        lr=1e-3,
        beta2=0.99,
        warmup_steps=100,
        decay="cosine",
        final_ratio=0.02,
        weight_decay=1e-4,
        eps=1e-8,
    ),
)
