"""What the comparisons share: one random model in both libraries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import ChameleonConfig, ChameleonForConditionalGeneration

from earlyfusion.bench.shapes import SHAPES
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


def stock_of(config: ModelConfig, ours: Transformer) -> Any:
    """transformers' Chameleon with our transformer's weights, in bf16, for text only."""
    names = {"<s>": 0, "<pad>": 1, "</s>": 2, "<image>": 3}
    letters = ["".join(chr(65 + i // 26**n % 26) for n in range(3)) for i in range(8192)]
    codes = config.vq_config.num_embeddings
    names |= {f"IMGIMG{letters[i]}Z": i + 4 for i in range(codes)}
    settings = {k: v for k, v in config.to_dict().items() if k != "vocabulary_map"}
    stock = ChameleonForConditionalGeneration(ChameleonConfig(**settings, vocabulary_map=names))
    stock = stock.to(torch.bfloat16)
    stock.load_state_dict(ours.state_dict(), strict=False)
    return ready(stock)


def random_transformer(shape: str, dtype: torch.dtype) -> Transformer:
    """Our transformer alone, with random weights."""
    with torch.device("meta"):
        model = Transformer(SHAPES[shape]).to(dtype)
    model.to_empty(device="cpu").init_weights(torch.Generator().manual_seed(0))
    return model.eval().requires_grad_(False)
