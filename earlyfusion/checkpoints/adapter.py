"""Low-rank adapters in the files of PEFT: `adapter_config.json`, `adapter_model.safetensors`.

Names are those of the model, which are transformers', behind `base_model.model.`; W + scale B A,
where scale is alpha / rank, or alpha / sqrt(rank) with `use_rslora`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from earlyfusion.checkpoints.hf import read_json
from earlyfusion.checkpoints.source import new_folder
from earlyfusion.errors import CheckpointError
from earlyfusion.model.transformer import Transformer

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_KEY = re.compile(rf"{re.escape(_PREFIX)}(.+)\.lora_([AB])(?:\.\w+)?\.weight")
# What changes more than products of matrices; each must be off.
_MORE = ("use_dora", "lora_bias", "modules_to_save", "trainable_token_indices", "target_parameters")


@dataclass(frozen=True)
class LowRank:
    """What is added to one linear layer: scale * b @ a, with a [rank, in] and b [out, rank]."""

    a: Tensor
    b: Tensor
    scale: float


def save_adapter(folder: Path, layers: Mapping[str, LowRank], base: str) -> None:
    """Write adapters of one rank and scale, by the names of their layers; whole or not at all.

    A folder that holds an adapter already is replaced; any other that is not empty is refused.
    """
    if folder.exists() and any(folder.iterdir()) and not (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder} is not empty and no adapter: choose another folder")
    first = next(iter(layers.values()))
    rank = len(first.a)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": first.scale * rank,
        "target_modules": sorted({name.rpartition(".")[2] for name in layers}),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    parts = [(name, kind, getattr(own, kind)) for name, own in layers.items() for kind in "ab"]
    tensors = {
        f"{_PREFIX}{name}.lora_{kind.upper()}.weight": value.detach().float().cpu().contiguous()
        for name, kind, value in parts
    }
    with new_folder(folder) as place:
        save_file(tensors, place / WEIGHTS, metadata={"format": "pt"})
        (place / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def read_adapter(folder: Path) -> dict[str, LowRank]:
    """The adapters of a folder by the names of their layers. Raises `CheckpointError`."""
    config = read_json(folder / CONFIG)
    _check(folder, config)
    halves: dict[str, dict[str, Tensor]] = {}
    for key, value in _tensors(folder / WEIGHTS).items():
        if key.endswith(".base_layer.weight"):  # PEFT keeps the adapted head's own weight beside
            continue
        found = _KEY.fullmatch(key)
        if found is None:
            raise CheckpointError(
                f"{folder / WEIGHTS} holds {key}, which is no adapter of a linear layer: merge it "
                "with PEFT and load the merged model"
            )
        halves.setdefault(found[1], {})[found[2]] = value
    if not halves or any(set(pair) != {"A", "B"} for pair in halves.values()):
        raise CheckpointError(f"{folder / WEIGHTS} lacks halves of adapters: save it again")
    return {
        name: LowRank(pair["A"], pair["B"], _scale(config, name, len(pair["A"])))
        for name, pair in halves.items()
    }


@torch.no_grad()
def merge_adapter(model: Transformer, folder: Path) -> None:
    """Add the adapters of a folder to the weights of a model, each in the dtype that it has.

    Raises `CheckpointError` where they are those of another model.
    """
    layers = read_adapter(folder)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    for name, own in layers.items():
        wanted = tuple(linears[name].weight.shape) if name in linears else None
        if wanted != (len(own.b), own.a.shape[1]) or own.b.shape[1] != len(own.a):
            raise CheckpointError(
                f"{folder} is an adapter of another model: {name} is {len(own.b)} x "
                f"{own.a.shape[1]} there and {wanted or 'no linear layer'} here"
            )
        if name == "lm_head" and model.config.tie_word_embeddings:
            raise CheckpointError(
                f"{folder} adapts a head that is the embedding too: merge it first"
            )
    for name, own in layers.items():
        weight = linears[name].weight
        change = own.scale * (own.b.float() @ own.a.float()).to(weight.device)
        linears[name].weight = nn.Parameter((weight.float() + change).to(weight.dtype))


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError):
        raise CheckpointError(f"{path} is missing or damaged: save the adapter again") from None


def _check(folder: Path, config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    more = [name for name in _MORE if config.get(name)]
    if kind != "LORA" or more or config.get("bias", "none") != "none":
        what = f"of type {kind}" if kind != "LORA" else f"with {', '.join(more) or 'biases'}"
        raise CheckpointError(
            f"{folder} is an adapter {what}, and only plain LoRA is read: merge it with PEFT and "
            "load the merged model"
        )


def _scale(config: Mapping[str, Any], name: str, rank: int) -> float:
    patterns = config.get("alpha_pattern") or {}
    own = [v for key, v in patterns.items() if re.fullmatch(rf"(.*\.)?({key})", name)]
    try:
        alpha = float(own[0] if own else config["lora_alpha"])
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"the adapter's {CONFIG} has no lora_alpha: save it again") from None
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
