"""A fourth stage of `mini`, not shipped: naming in unseen styles, images in every style.

    earlyfusion train mini_styles data=DIR/emoji \\
        image_tokenizer=runs/mini_image_tokenizer start=runs/mini_drawings

The earlier stages memorise images, code for code. Here an image in a prompt has twelve augmented
variants, and a quarter of its codes are replaced by one of the nearest codewords, so that no exact
sequence of codes identifies it; and requests for an image name its style. The result names better
and generates worse images: figures, machine and run time are in docs/ablations.md.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from earlyfusion.mini import drawings as mini_drawings
from earlyfusion.mini.transformer import DocumentsConfig, main
from earlyfusion.train.trainer import RunConfig

__all__ = ["config", "main"]

config = replace(
    mini_drawings.config,
    start=Path("runs/mini_drawings"),
    run=RunConfig(out=Path("runs/mini_styles"), steps=6000, precision="bf16"),
    documents=DocumentsConfig(
        dialogues=150_000,
        tasks=mini_drawings.TASKS,
        seed=500,
        pairs=0.5,
        usual=0.07,
        studies=0.33,
        unchanged=0.3,
        bare=0.03,
        variants=12,
        noise=0.25,
    ),
    augment=replace(mini_drawings.config.augment, shift=0.08, scale=0.15),
)
