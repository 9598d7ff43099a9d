"""The image tokenizer of Chameleon: 512 x 512 pixels as 32 x 32 codes of 8,192.

    earlyfusion train image_tokenizer_512 data=photos perceptual_weights=vgg16.pth
    torchrun --nproc-per-node 8 -m earlyfusion train image_tokenizer_512 data=shards/*.tar,a.parquet
    earlyfusion train image_tokenizer_512 data=photos start=MODEL trainable=decoder

The numbers are those of the VQ-GAN that it is (Esser et al. 2021, section 4 and its released
settings): L1 and perceptual terms of weight 1, a codebook that learns by gradient with commitment
0.25, a patch discriminator of weight 0.8 that joins after half of the run, Adam 0.5 / 0.9 at
4.5e-6 times the batch, without decay. Chameleon's own data and steps are not public. Pictures are
cut to random squares and mirrored.

`perceptual_weights` is the state dict of torchvision's VGG-16 or of a whole LPIPS; with the first,
`perceptual_linear` may name LPIPS's small file. `perceptual=0 l2=1` does without, at the price of
blurred pictures. It ends with `model/`, which `earlyfusion convert --image-tokenizer` and `start=`
take. Machine: GPUs of 80 GB were in mind for `micro_batch`; it has not run at full size yet. Score:
`held_out_psnr` and `held_out_ssim` in `metrics.jsonl`, and the pictures in `samples/`.
"""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import PIL.Image
import torch

from earlyfusion import processes
from earlyfusion.checkpoints.meta import save_vqgan
from earlyfusion.config import PRESETS, VQConfig
from earlyfusion.data.mixture import Ahead
from earlyfusion.data.pictures import (
    CropConfig,
    PictureBatches,
    PicturesConfig,
    fixed_squares,
    hold_out,
    open_pictures,
    random_crop,
)
from earlyfusion.data.rows import Quarantine
from earlyfusion.errors import DataError, SettingError
from earlyfusion.train import checkpoint
from earlyfusion.train.image_tokenizer import (
    HeldOut,
    ImageTokenizerTask,
    VQLossConfig,
    build,
    check_terms,
    check_trainable,
    parts_of,
)
from earlyfusion.train.optim import OptimConfig
from earlyfusion.train.trainer import RunConfig, train


@dataclass
class ImageTokenizerConfig:
    batch: int = 32
    """Pictures of a step, over all processes."""
    micro_batch: int = 4
    """Pictures that one process computes at a time; 0: all that it has."""
    start: str = ""
    """A run, a model folder or a hub id whose image tokenizer this run begins with."""
    trainable: str = "all"
    """"all", or "decoder": encoder and codebook stay as they are, to the bit."""
    workers: int = 4
    """Threads that make the next batches while the network learns; 0: none."""
    pictures: PicturesConfig = field(default_factory=PicturesConfig)
    crop: CropConfig = field(default_factory=CropConfig)
    run: RunConfig = field(default_factory=RunConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    model: VQConfig = field(default_factory=VQConfig)
    loss: VQLossConfig = field(default_factory=VQLossConfig)

    def __post_init__(self) -> None:
        check_trainable(self.trainable, self.start)
        parts_of(self.batch, self.micro_batch)
        if self.workers < 0:
            raise SettingError(f"workers={self.workers} must be 0 up")

    @property
    def notes(self) -> Path:
        """Where a process writes of its pictures: a folder of its own where there are several."""
        several = processes.count() > 1
        return self.run.out / f"process-{processes.rank()}" if several else self.run.out


def opened(
    config: ImageTokenizerConfig, quarantine: Quarantine
) -> tuple[PictureBatches, torch.Tensor]:
    """The batches of the run, and the pictures that it is checked on, [B, 3, Y, X]."""
    own, side, cache = config.pictures, config.model.resolution, config.notes / "index"
    pictures = open_pictures(own.data, cache, own.rows)
    if own.held_out:
        others, chosen = open_pictures(own.held_out, cache, own.rows), None
        check = fixed_squares(others, hold_out(others, own.checked, 1.0)[0], side, quarantine)
    else:
        numbers, chosen = hold_out(pictures, own.checked)
        check = fixed_squares(pictures, numbers, side, quarantine)

    def crop(picture: PIL.Image.Image, rng: np.random.Generator) -> PIL.Image.Image:
        return random_crop(picture, side, config.crop, rng)

    batches = PictureBatches(pictures, chosen, config.batch, crop, config.run.seed, quarantine)
    batches.share = (processes.rank(), processes.count())
    if processes.rank() == 0:
        told = (pictures.fingerprint, config.batch, config.crop, own.checked, config.run.seed)
        check_same(config.run.out, told)
    return batches, check


def main(config: ImageTokenizerConfig) -> None:
    run = config.run
    check_terms(config.loss)
    quarantine = Quarantine(config.notes / "quarantine.jsonl", config.pictures.max_broken)
    batches, held_out = opened(config, quarantine)
    model = build(config.model, config.start, run)
    source = Ahead(batches, config.workers, depth=config.workers) if config.workers else batches
    parts = parts_of(config.batch, config.micro_batch)
    task = ImageTokenizerTask(model, config.loss, source, run.steps, config.trainable, parts)
    try:
        train(task, run, config.optim, HeldOut(model, held_out))
    finally:
        if isinstance(source, Ahead):
            source.close()
    if quarantine.broken:
        print(f"broken pictures: {quarantine.broken:,}, see {quarantine.path}", file=sys.stderr)
    if processes.rank() == 0:
        save_vqgan(run.out / "model", model)


config = ImageTokenizerConfig(
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
        critic_lr=4.5e-6 * 32,
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


def check_same(run: Path, told: object) -> None:
    """Refuse to go on with a run on other pictures, or other cuts of them, than it began with."""
    path, mark = run / "data.json", hashlib.sha256(repr(told).encode()).hexdigest()
    if checkpoint.steps(run) and path.exists():
        if json.loads(path.read_text(encoding="utf-8"))["fingerprint"] != mark:
            raise DataError(
                f"the pictures, or how they are cut and batched, are not what {run} began with: "
                "give the same, or another out folder"
            )
        return
    run.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"fingerprint": mark}) + "\n", encoding="utf-8")
