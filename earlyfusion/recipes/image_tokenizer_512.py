"""The image tokenizer of Chameleon: 512 x 512 pixels as 32 x 32 codes of 8,192.

    earlyfusion train image_tokenizer_512 data=photos perceptual_weights=vgg16.pth
    torchrun --nproc-per-node 8 -m earlyfusion train image_tokenizer_512 data=shards/*.tar,a.parquet
    earlyfusion train image_tokenizer_512 data=photos start=MODEL trainable=decoder

The numbers are those of the VQ-GAN (Esser et al. 2021, section 4 and its released settings): L1 and
perceptual terms of weight 1, a codebook that learns by gradient with commitment 0.25, a patch
discriminator of weight 0.8 that joins after half of the run, Adam 0.5 / 0.9 at 4.5e-6 times the
batch, without decay. Chameleon's own data and steps are not public. Images are cropped to random
squares and mirrored.

`perceptual_weights` is the state dict of torchvision's VGG-16 or of a whole LPIPS; with the first,
`perceptual_linear` may name LPIPS's small file. `perceptual=0 l2=1` does without, at the price of
blurred images. The run ends with `model/`, which `earlyfusion convert --image-tokenizer` and
`start=` take. Machine: `micro_batch` is meant for GPUs of 80 GB; the recipe has not been run at
full size yet. Score: `held_out_psnr` and `held_out_ssim` in `metrics.jsonl`, and the images in
`samples/`.
"""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import PIL.Image
import torch

from earlyfusion import processes
from earlyfusion.checkpoints.meta import save_vqgan
from earlyfusion.config import PRESETS
from earlyfusion.data.images import (
    CropConfig,
    ImageBatches,
    ImagesConfig,
    centre_crops,
    hold_out,
    open_images,
    random_crop,
)
from earlyfusion.data.mixture import PrefetchedStream
from earlyfusion.data.rows import Quarantine
from earlyfusion.fields import check_at_least
from earlyfusion.train.folder import check_same_data, notes_folder
from earlyfusion.train.image_tokenizer import (
    HeldOut,
    ImageTokenizerConfig,
    VQLossConfig,
    check_perceptual_files,
)
from earlyfusion.train.optim import OptimConfig
from earlyfusion.train.trainer import RunConfig, train


@dataclass
class SquaresConfig(ImageTokenizerConfig):
    """Training on random squares of any images."""

    micro_batch: int = 4
    """Images that one process computes at a time; 0: all of its share."""
    workers: int = 4
    """Threads that prepare the next batches while the network learns; 0: none."""
    pictures: ImagesConfig = field(default_factory=ImagesConfig)
    crop: CropConfig = field(default_factory=CropConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, workers=0)


def open_batches(
    config: SquaresConfig, quarantine: Quarantine, notes: Path
) -> tuple[ImageBatches, torch.Tensor]:
    """The batches of the run, and the held-out images that it is checked on, float32 [B, 3, Y, X].
    Raises `DataError` if the run began with other images."""
    data, side, cache = config.pictures, config.model.resolution, notes / "index"
    images = open_images(data.data, cache, data.rows)
    train_numbers: np.ndarray | None = None  # all
    if data.held_out:
        source = open_images(data.held_out, cache, data.rows)
        held_out_numbers, _ = hold_out(source, data.checked, max_share=1.0)
    else:
        source = images
        held_out_numbers, train_numbers = hold_out(images, data.checked)
    held_out = centre_crops(source, held_out_numbers, side, quarantine)

    def crop(image: PIL.Image.Image, rng: np.random.Generator) -> PIL.Image.Image:
        return random_crop(image, side, config.crop, rng)

    # Each process makes its block of every batch; all know the same order of images.
    share, seed = (processes.rank(), processes.count()), config.run.seed
    batches = ImageBatches(images, train_numbers, config.batch, crop, seed, quarantine, share)
    if processes.rank() == 0:
        # Without the number of processes: a run may continue on another number of GPUs.
        identity = (images.fingerprint, config.batch, config.crop, data.checked, seed)
        fingerprint = hashlib.sha256(repr(identity).encode()).hexdigest()
        check_same_data(
            config.run.out, fingerprint, "the images, or how they are cropped and batched, are"
        )
    return batches, held_out


def main(config: SquaresConfig) -> None:
    """Train, then write `model/`, an image tokenizer in Meta's files."""
    run, notes = config.run, notes_folder(config.run.out)
    check_perceptual_files(config.loss)
    quarantine = Quarantine(notes / "quarantine.jsonl", config.pictures.max_broken)
    batches, held_out = open_batches(config, quarantine, notes)
    model = config.build()
    workers = config.workers
    stream = PrefetchedStream(batches, workers, depth=workers) if workers else batches
    task = config.task(model, stream)
    try:
        train(task, run, config.optim, HeldOut(model, held_out))
    finally:
        if isinstance(stream, PrefetchedStream):
            stream.close()
    if quarantine.broken:
        print(f"broken images: {quarantine.broken:,}, see {quarantine.path}", file=sys.stderr)
    if processes.rank() == 0:
        save_vqgan(run.out / "model", model)


config = SquaresConfig(
    model=PRESETS["chameleon-7b"].vq_config,
    loss=VQLossConfig(
        l1=1.0,
        l2=0.0,
        commitment=0.25,
        codebook="gradient",
        ramp_steps=0,
        perceptual=1.0,
        perceptual_weights=Path("vgg16.pth"),
        adversarial=0.8,
        adversarial_from=250_000,
        critic_lr=4.5e-6 * 32,  # the released settings scale the rate by the batch
    ),
    run=RunConfig(
        out=Path("runs/image_tokenizer_512"),
        steps=500_000,
        precision="bf16",
        save_every=2500,
        sample_every=2500,
    ),
    optim=OptimConfig(
        lr=4.5e-6 * 32,
        beta1=0.5,
        beta2=0.9,
        eps=1e-8,
        weight_decay=0.0,
        warmup_steps=0,
        decay="constant",
        clip=0.0,
    ),
)
