"""Models of several sizes with random weights: speed does not depend on their values."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import torch

from earlyfusion.api import Chameleon
from earlyfusion.checkpoints.hf import save_hf
from earlyfusion.config import PRESETS, ModelConfig, VQConfig
from earlyfusion.devices import PACKED_BITS, move_to_huge_pages, torch_dtype
from earlyfusion.errors import SettingError
from earlyfusion.image_tokenizer import ImageTokenizer
from earlyfusion.kernels.twins import accelerate
from earlyfusion.model.quantise import quantise
from earlyfusion.model.transformer import Transformer
from earlyfusion.model.vqgan import VQGAN
from earlyfusion.processor import Processor, train_tokenizer
from earlyfusion.vocabulary import ImageLayout

_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def _config(
    preset: str, width: int, inner_width: int, layers: int, heads: int, vocab_size: int
) -> ModelConfig:
    return replace(
        PRESETS[preset],
        hidden_size=width,
        intermediate_size=inner_width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=vocab_size,
        max_position_embeddings=2048,
    )


SHAPES: dict[str, ModelConfig] = {
    "tiny": replace(PRESETS["tiny"], vq_config=replace(PRESETS["tiny"].vq_config, resolution=8)),
    "mini": replace(PRESETS["mini"], max_position_embeddings=2048),
    "110m": _config("mini", 768, 2048, 12, 12, 16384),
    "1b": replace(_config("mini", 2048, 5632, 16, 16, 65536), vq_config=VQConfig()),
    "7b": PRESETS["chameleon-7b"],
}


def write_random(shape: str, folder: Path) -> ModelConfig:
    """Write a model of a shape into a new folder, in bf16 from 500 million parameters on. Its
    tokenizer is trained on made-up words until the vocabulary is full, so that as many rows of the
    head score text as in a real model. Raises `SettingError` for an unknown shape."""
    if shape not in SHAPES:
        raise SettingError(f"shape={shape!r} is unknown: use one of {', '.join(SHAPES)}")
    config = SHAPES[shape]
    dtype = torch.bfloat16 if config.hidden_size >= 2048 else torch.float32
    with torch.device("meta"):
        transformer = Transformer(config).to(dtype)
    transformer.to_empty(device="cpu").init_weights(torch.Generator().manual_seed(0))
    vqgan = VQGAN(config.vq_config)
    save_hf(folder, transformer, vqgan, _tokenizer_json(config), _sampling_defaults())
    return config


def random_model(shape: str, device: torch.device, dtype: str, folder: Path) -> Chameleon:
    """A model of a shape, made on its device, without files of its weights. `folder` exists and
    gets its tokenizer. int8 and int4 are rounded from bf16."""
    config = SHAPES[shape]
    weights = torch.bfloat16 if dtype in PACKED_BITS else torch_dtype(dtype)
    transformer = random_transformer(config, device, weights)
    if dtype in PACKED_BITS:
        transformer = quantise(transformer, PACKED_BITS[dtype])
    file = folder / "tokenizer.json"
    file.write_text(_tokenizer_json(config), encoding="utf-8")
    grid = config.vq_config.grid
    processor = Processor(file, ImageLayout(grid, grid))
    vqgan = random_vqgan(config.vq_config, device)
    tokenizer = ImageTokenizer(vqgan, config.vq_config.resolution)
    return Chameleon(
        accelerate(transformer), tokenizer, processor, _sampling_defaults()["chameleon"]
    )


def random_transformer(
    config: ModelConfig, device: torch.device, dtype: torch.dtype
) -> Transformer:
    """A transformer made on its device, in eval mode, without gradients."""
    with torch.device("meta"):
        transformer = Transformer(config).to(dtype)
    transformer.to_empty(device=device).init_weights(torch.Generator(device).manual_seed(0))
    if device.type == "cpu":
        move_to_huge_pages(transformer)  # as a checkpoint that is loaded
    return transformer.eval().requires_grad_(False)


@torch.no_grad()
def random_vqgan(config: VQConfig, device: torch.device) -> VQGAN:
    """A VQ-GAN whose codewords lie among the latents of an image, so that many are used."""
    torch.manual_seed(0)
    with device:
        vqgan = accelerate(VQGAN(config).eval())
    pixels = random_images(1, config.resolution, seed=1).to(device)
    # Random codewords would be so far from the latents that a few were nearest to all of them.
    vectors = vqgan.latents(pixels).permute(0, 2, 3, 1).flatten(0, 2)
    chosen = torch.randint(len(vectors), (config.num_embeddings,)).to(device)
    noise = torch.randn(len(chosen), config.embed_dim).to(device)
    vqgan.codewords.copy_(vectors[chosen] + noise * vectors.std() / 4)
    return vqgan


def random_images(count: int, side: int, seed: int = 0) -> torch.Tensor:
    """Images [n, 3, side, side] in -1 to 1: soft colours behind rectangles of one colour."""
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.fft.fftfreq(side), torch.fft.fftfreq(side), indexing="ij")
    # The amplitudes of photographs fall with frequency.
    amplitude = 1 / (x.square() + y.square()).sqrt().clamp_min(1 / side)
    noise = torch.randn(count, 3, side, side, generator=generator)
    smooth = torch.fft.ifft2(torch.fft.fft2(noise) * amplitude).real
    smooth = smooth / smooth.std((2, 3), keepdim=True) / 2
    for image in smooth:
        for _ in range(6):
            top, left, height, width = (
                (torch.rand(4, generator=generator) * side / 2).int().tolist()
            )
            colour = torch.rand(3, 1, 1, generator=generator) * 2 - 1
            image[:, top : top + height + 1, left : left + width + 1] = colour
    return smooth.clamp(-1, 1)


def _sampling_defaults() -> dict[str, dict[str, float]]:
    """Sampling from the whole distribution, with which a text rarely ends."""
    return {"chameleon": {"temperature": 1.0, "guidance_text": 3.0, "guidance_image": 1.2}}


def _tokenizer_json(config: ModelConfig) -> str:
    """A tokenizer.json for made-up words, which fill the vocabulary."""
    rng = random.Random(0)
    words = ("".join(rng.choices(_LETTERS, k=rng.randint(3, 9))) for _ in range(10**9))
    text = " ".join(next(words) for _ in range(config.vocab_size // 2))
    tokenizer_json = train_tokenizer([text], config.vq_config.num_embeddings, config.vocab_size)
    assert len(json.loads(tokenizer_json)["model"]["vocab"]) <= config.vocab_size
    return tokenizer_json
