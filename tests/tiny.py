"""A random model of the "tiny" shape with a freshly trained tokenizer, for tests of generation."""

from __future__ import annotations

from pathlib import Path

import torch

from earlyfusion.config import PRESETS
from earlyfusion.model.transformer import Transformer
from earlyfusion.processor import Processor, train_tokenizer
from earlyfusion.vocabulary import ImageLayout

CONFIG = PRESETS["tiny"]
TEXTS = [
    "Draw a red apple, please.",
    "What is this? This is a pear.",
    "사과를 그려 줘. 이것은 배야.",
]


def tiny_processor(folder: Path) -> Processor:
    vq = CONFIG.vq_config
    tokenizer = folder / "tokenizer.json"
    tokenizer.write_text(train_tokenizer(TEXTS, vq.num_embeddings, CONFIG.vocab_size))
    return Processor(tokenizer, ImageLayout(vq.grid, vq.grid))


def tiny_transformer(processor: Processor, begin_image: float = 0.0) -> Transformer:
    """`begin_image` makes pictures likelier: it is added to the scale of that token's logit."""
    transformer = Transformer(CONFIG).eval()
    transformer.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        transformer.lm_head.weight.mul_(20)
        transformer.lm_head.weight[processor.vocabulary.begin_image].mul_(1 + begin_image)
    return transformer
