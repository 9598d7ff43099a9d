"""What the comparisons share: one random model in both libraries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import ChameleonConfig, ChameleonForConditionalGeneration

from earlyfusion.config import ModelConfig
from earlyfusion.model.transformer import Transformer

THEIRS = "transformers"


def ready(stock: Any) -> Any:
    """transformers' model, set to never end a reply early."""
    stock.generation_config.eos_token_id = None
    stock.generation_config.pad_token_id = 1
    return stock.eval()


def stock_from(folder: Path, dtype: torch.dtype, device: str) -> Any:
    """transformers' Chameleon with the weights of a folder."""
    model = ChameleonForConditionalGeneration.from_pretrained(folder, dtype=dtype)
    return ready(model.to(device))


def stock_config(config: ModelConfig) -> Any:
    """transformers' config of a model for text only: its vocabulary names codes and marks."""
    names = {"<s>": 0, "<pad>": 1, "</s>": 2, "<image>": 3}
    digits = str.maketrans("0123456789", "ABCDEFGHIJ")
    codes = range(config.vq_config.num_embeddings)
    names |= {f"IMGIMG{str(code).translate(digits)}Z": code + 4 for code in codes}
    settings = {k: v for k, v in config.to_dict().items() if k != "vocabulary_map"}
    return ChameleonConfig(**settings, vocabulary_map=names)


def stock_of(config: ModelConfig, ours: Transformer) -> Any:
    """transformers' Chameleon with our transformer's weights, in bf16, for text only."""
    stock = ChameleonForConditionalGeneration(stock_config(config))
    stock = stock.to(torch.bfloat16)
    stock.load_state_dict(ours.state_dict(), strict=False)
    return ready(stock)
