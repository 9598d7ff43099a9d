"""An image tokenizer whose codes carry the names of things; images are augmented on the device.

    earlyfusion train mini_named_image_tokenizer data=DIR/emoji device=cuda minutes=3
    earlyfusion train mini_named_image_tokenizer data=DIR/emoji device=cuda minutes=1 \\
        start=runs/mini_named_image_tokenizer trainable=decoder naming=0 perturb=0.1 \\
        out=runs/decoder

The first stage of the larger `mini`. Trains a VQ-GAN of 128 x 128 pixels and 16 x 16 codes on the
emoji images (docs/mini.md), augmented anew each time: shifted, scaled, turned a little, in other
colours, grey. A classification head learns thing, kind and style from the codewords, and is dropped
at the end. The second command then trains the decoder alone, on codes of which a tenth are wrong.
On a CPU use `resolution=64`. A stage of `pretrain_mini`; measurements: docs/mini.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from earlyfusion import processes
from earlyfusion.config import VQConfig
from earlyfusion.devices import resolve_device
from earlyfusion.errors import SettingError
from earlyfusion.mini.emoji.dataset import EmojiData
from earlyfusion.mini.emoji.tensors import Labels, load_emoji, load_split
from earlyfusion.mini.image_tokenizer import OPTIM, batch_indices
from earlyfusion.model.vqgan import VQGAN
from earlyfusion.train.augment import ChangeConfig, changed, resized
from earlyfusion.train.image_tokenizer import (
    HeldOut,
    ImageTokenizerConfig,
    VQLossConfig,
    check_perceptual_files,
)
from earlyfusion.train.semantic import SemanticHead
from earlyfusion.train.trainer import RunConfig, train

NAMING_BATCH = 256  # images of val-pair that are classified at once


@dataclass
class NamedImageTokenizerConfig(ImageTokenizerConfig):
    """Training on the emoji images and the names of what they show. Raises `SettingError`."""

    data: Path = Path("data/emoji")
    """Folder of the emoji data (docs/mini.md)."""
    batch: int = 128
    """Images of a step."""
    checked: int = 64
    """Images of the validation split that are reconstructed and measured at `sample_every`."""
    change: ChangeConfig = field(default_factory=ChangeConfig)
    icons: Path | None = None
    """The folder of a set of icons (docs/mini.md) that join the training images."""

    def __post_init__(self) -> None:
        if processes.count() > 1:
            raise SettingError(
                "mini_named_image_tokenizer trains in one process: start it without torchrun, or "
                "take mini_image_tokenizer"
            )
        super().__post_init__()


class DeviceBatches:
    """Batches of images and labels, augmented on the device: batch k depends only on the seed and
    k. All training images stay on the device."""

    def __init__(self, data: EmojiData, config: NamedImageTokenizerConfig) -> None:
        device = resolve_device(config.run.device)
        side = config.model.resolution
        self._images = load_split(config.data, "train", side, str(device), config.icons)
        self._labels = Labels(data).of(data.split("train")).to(device)
        self._config = config

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        cfg = self._config
        chosen = batch_indices(step, cfg.batch, len(self._images), cfg.run.seed)
        # Not made on the device, which the host would wait for.
        indices = torch.tensor(chosen).to(self._images.device, non_blocking=True)
        generator = torch.Generator(self._images.device)
        generator.manual_seed(cfg.run.seed * 1_000_003 + step)
        pixels = resized(self._images[indices], cfg.model.resolution)
        return changed(pixels, cfg.change, generator), self._labels[indices]


class Validation:
    """The metrics of `HeldOut`, and the accuracy of the head on the images of val-pair: how often
    it names the right thing."""

    def __init__(
        self,
        data: EmojiData,
        model: VQGAN,
        head: SemanticHead | None,
        config: NamedImageTokenizerConfig,
    ) -> None:
        side, device = config.model.resolution, str(resolve_device(config.run.device))
        images = resized(load_split(config.data, "val", side, "cpu"), side)
        held_out = images[:: max(1, len(images) // config.checked)][: config.checked]
        self._held_out = HeldOut(model, held_out, batch=16)
        self._model, self._head = model, head
        self._images = load_split(config.data, "val-pair", side, device)
        self._labels = Labels(data).of(data.split("val-pair")).to(device)

    def __call__(self, step: int, folder: Path) -> dict[str, float]:
        metrics = self._held_out(step, folder)
        if self._head is None:
            return metrics
        return metrics | {"held_out_named": self._naming_accuracy(self._head)}

    @torch.no_grad()
    def _naming_accuracy(self, head: SemanticHead) -> float:
        num_correct, device = 0.0, self._images.device
        batches = zip(
            self._images.split(NAMING_BATCH), self._labels.split(NAMING_BATCH), strict=True
        )
        with torch.autocast(device.type, enabled=False):
            for images, labels in batches:
                codes = self._model.encode(resized(images, images.shape[1]))
                predicted = head(self._model.embed(codes))[0].argmax(1)
                num_correct += float((predicted == labels[:, 0]).sum())
        return num_correct / max(1, len(self._labels))


def main(config: NamedImageTokenizerConfig) -> None:
    check_perceptual_files(config.loss)
    data, model = load_emoji(config.data, config.icons), config.build()
    head = None
    if config.loss.naming:
        answers = Labels(data).answers
        head = SemanticHead(config.model.embed_dim, config.model.grid, answers)
        head.to(resolve_device(config.run.device))
    task = config.task(model, DeviceBatches(data, config), head)
    train(task, config.run, config.optim, Validation(data, model, head, config))


config = NamedImageTokenizerConfig(
    model=VQConfig(
        embed_dim=16,
        num_embeddings=1024,
        latent_channels=64,
        resolution=128,
        base_channels=32,
        channel_multiplier=(1, 2, 2, 4),
        num_res_blocks=1,
    ),
    run=RunConfig(
        out=Path("runs/mini_named_image_tokenizer"),
        steps=8000,
        precision="bf16",
        save_every=1000,
        keep=1,
    ),
    optim=OPTIM,
    loss=VQLossConfig(naming=0.05),
    change=ChangeConfig(
        shift=0.1, scale=0.15, turn=12, contrast=0.3, tint=0.2, grey=0.1, unchanged=0.2
    ),
)
