"""A random model of the "tiny" shape with a freshly trained tokenizer, for tests of generation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from earlyfusion.config import PRESETS
from earlyfusion.generation.request import Request
from earlyfusion.generation.settings import SamplingParams
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


def tiny_transformer(
    processor: Processor, begin_image: float = 0.0, device: torch.device | str = "cpu"
) -> Transformer:
    """`begin_image` makes images likelier: it is added to the scale of that token's logit."""
    transformer = Transformer(CONFIG).eval()
    transformer.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        transformer.lm_head.weight.mul_(20)
        transformer.lm_head.weight[processor.vocabulary.begin_image].mul_(1 + begin_image)
    return transformer.to(device)


def make_request(
    processor: Processor,
    seed: int,
    output: Any = "interleaved",
    with_image: bool = False,
    max_tokens: int = 80,
    images: int = 1,
    **settings: Any,
) -> Request:
    """A request that follows from its seed: text, behind an image where there is to be one."""
    vocabulary, image_ids = processor.vocabulary, list[int]()
    if with_image:
        codes = np.random.default_rng(seed).integers(0, 64, (8, 8))
        image_ids = processor.layout.spell(codes, vocabulary)
    text = processor.encode_text(TEXTS[seed % 3][: 4 + 3 * seed])
    ids = [vocabulary.bos, *image_ids, *text, vocabulary.end_of_turn]
    sampling = SamplingParams(seed=seed, **settings).resolved({})
    return Request(ids, output, sampling, 0 if output == "text" else images, max_tokens)
