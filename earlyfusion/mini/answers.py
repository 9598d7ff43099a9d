"""The second stage of `mini`: questions about images, so that it learns to name things in them.

    earlyfusion train mini_answers data=DIR/emoji \\
        image_tokenizer=runs/mini_image_tokenizer start=runs/mini_transformer

After the first stage the model knows the forms of the tasks and what images look like. Here most
documents ask several questions about one image, and text tokens of an answer have a higher loss
weight than image tokens. Machine, run time and scores of the shipped weights are in the model
card, earlyfusion/pretrained/mini/README.md.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from earlyfusion.data.packing import RoleWeights
from earlyfusion.mini import transformer as mini_transformer
from earlyfusion.mini.transformer import DocumentsConfig, main
from earlyfusion.train.trainer import RunConfig

__all__ = ["config", "main"]

config = replace(
    mini_transformer.config,
    start=Path("runs/mini_transformer"),
    rows=1,
    run=RunConfig(out=Path("runs/mini_answers"), steps=5000, precision="bf16"),
    optim=replace(mini_transformer.config.optim, lr=1.5e-3, warmup_steps=50),
    documents=DocumentsConfig(
        dialogues=100_000, seed=200, pairs=0.15, studies=0.55, unchanged=0.6, bare=0.1
    ),
    weights=RoleWeights(prompt_image=0.03, answer_text=8.0, end=2.0),
)
