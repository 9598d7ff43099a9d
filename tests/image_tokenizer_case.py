"""What the processes of test_image_tokenizer_512.py run: one tiny training of an image tokenizer.

`torchrun ... image_tokenizer_case.py FIELD=VALUE ...` runs the recipe with these fields.
"""

from __future__ import annotations

import sys

from earlyfusion.recipes.run import run

TINY = [
    "embed_dim=8",
    "num_embeddings=64",
    "latent_channels=16",
    "resolution=16",
    "base_channels=32",
    "channel_multiplier=1,1",
    "num_res_blocks=1",
    "precision=fp32",
    "perceptual=0",
    "adversarial=0",
    "l2=1",
    "lr=2e-3",
    "log_every=1",
    "checked=4",
    "workers=0",
]


def train(*fields: str, device: object = "cpu") -> None:
    run("image_tokenizer_512", [*TINY, f"device={device}", *fields])


if __name__ == "__main__":
    train(*sys.argv[1:])
