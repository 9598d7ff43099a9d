"""A random checkpoint on disk, wide enough for the 64-weight blocks of 4-bit layers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from tiny import CONFIG, tiny_processor

from earlyfusion.checkpoints.hf import save_hf
from earlyfusion.hf import ChameleonProcessor
from earlyfusion.model.transformer import Transformer
from earlyfusion.model.vqgan import VQGAN

WIDE = replace(CONFIG, hidden_size=64, intermediate_size=128)
IMAGE_TOKENS = WIDE.vq_config.grid**2 + 2
SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def wide_folder(folder: Path) -> Path:
    tiny_processor(folder)
    transformer = Transformer(WIDE).eval()
    transformer.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if "proj" in name or "lm_head" in name:
                parameter.mul_(10)
    torch.manual_seed(0)
    text = (folder / "tokenizer.json").read_text()
    ends = {"eos_token_id": 2, "pad_token_id": 1, "bos_token_id": 0}
    save_hf(folder / "model", transformer, VQGAN(WIDE.vq_config), text, ends)
    return folder / "model"


def make_image(colour: str) -> PIL.Image.Image:
    return PIL.Image.new("RGB", (40, 30), colour)


def example(folder: Path) -> Any:
    """One text with an image, as inputs of the model."""
    processor = ChameleonProcessor.from_pretrained(folder)
    return processor(images=[make_image("red")], text="What is this? <image> a red pear")
