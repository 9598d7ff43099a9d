"""Models of several sizes with random weights: speed does not depend on their values."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import torch

from earlyfusion.checkpoints.hf import save_hf
from earlyfusion.config import PRESETS, ModelConfig, VQConfig
from earlyfusion.errors import SettingError
from earlyfusion.model.transformer import Transformer
from earlyfusion.model.vqgan import VQGAN
from earlyfusion.processor import train_tokenizer

_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def _sized(preset: str, width: int, inner: int, layers: int, heads: int, words: int) -> ModelConfig:
    return replace(
        PRESETS[preset],
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=words,
        max_position_embeddings=2048,
    )


SHAPES: dict[str, ModelConfig] = {
    "tiny": replace(PRESETS["tiny"], vq_config=replace(PRESETS["tiny"].vq_config, resolution=8)),
    "mini": replace(PRESETS["mini"], max_position_embeddings=2048),
    "110m": _sized("mini", 768, 2048, 12, 12, 16384),
    "1b": replace(_sized("mini", 2048, 5632, 16, 16, 65536), vq_config=VQConfig()),
    "7b": PRESETS["chameleon-7b"],
}


def write_random(shape: str, folder: Path) -> ModelConfig:
    """Write a model of a shape into a new folder, in bf16 from 500 million parameters on.

    Its tokenizer is trained on made-up words until the vocabulary is full, so that as many rows of
    the head score text as in a real model. Raises `SettingError` for an unknown shape.
    """
    if shape not in SHAPES:
        raise SettingError(f"shape={shape!r} is unknown: use one of {', '.join(SHAPES)}")
    config = SHAPES[shape]
    dtype = torch.bfloat16 if config.hidden_size >= 2048 else torch.float32
    with torch.device("meta"):
        transformer = Transformer(config).to(dtype)
    transformer.to_empty(device="cpu").init_weights(torch.Generator().manual_seed(0))
    vqgan = VQGAN(config.vq_config)
    save_hf(folder, transformer, vqgan, _tokenizer(config), _defaults())
    return config


def _defaults() -> dict[str, dict[str, float]]:
    """Sampling from the whole distribution, with which a text seldom ends."""
    return {"chameleon": {"temperature": 1.0, "guidance_text": 3.0, "guidance_image": 1.2}}


def _tokenizer(config: ModelConfig) -> str:
    draw = random.Random(0)
    words = ("".join(draw.choices(_LETTERS, k=draw.randint(3, 9))) for _ in range(10**9))
    text = " ".join(next(words) for _ in range(config.vocab_size // 2))
    made = train_tokenizer([text], config.vq_config.num_embeddings, config.vocab_size)
    assert len(json.loads(made)["model"]["vocab"]) <= config.vocab_size
    return made
