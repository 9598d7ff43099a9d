"""Unlocking image generation in a 7B that only reads images, as Anole does (arXiv 2407.06135).

    earlyfusion train image_head_7b data=captions.jsonl model=MODEL
    torchrun --nproc-per-node 8 -m earlyfusion train image_head_7b data=shards model=MODEL
    earlyfusion train image_head_7b --plan

Only the 8,192 rows of the head that score image tokens are trained, 33.6 M weights: Anole's 8
images a step, three times over its 5,859 images, AdamW at 1e-3 with linear decay, without
weight decay, dropout or z-loss. Three things differ: the request comes before the image (Anole
trains on bare image tokens), image tokens compete with text tokens in the loss, and the rows start
from their present values. Machine, run time: Anole took 8 A100 and half an hour; `--plan` prints
the memory of others. The score to look at is `image_nats`; the run itself has not been made here,
but the same on `mini` has (docs/train.md).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from earlyfusion.recipes import finetune_7b
from earlyfusion.recipes.finetune import main
from earlyfusion.train.optim import OptimConfig

__all__ = ["config", "main"]

config = replace(
    finetune_7b.config,
    trainable="image_head",
    rows=8,
    length=1280,  # a request and its image
    dropout=0.0,
    z_weight=0.0,
    run=replace(finetune_7b.config.run, out=Path("runs/image_head_7b"), steps=2197),
    optim=OptimConfig(
        lr=1e-3, beta2=0.999, eps=1e-8, weight_decay=0.0, warmup_steps=0, decay="linear"
    ),
)
