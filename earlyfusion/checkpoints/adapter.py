"""Low-rank adapters in PEFT's files: `adapter_config.json` and `adapter_model.safetensors`. A layer
becomes W + scale B A; scale is alpha / rank, or alpha / sqrt(rank) with `use_rslora`. The files
name a layer as the model does, behind `base_model.model.`."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from earlyfusion.checkpoints.source import read_json
from earlyfusion.errors import CheckpointError
from earlyfusion.files import new_folder
from earlyfusion.model.quantise import PackedLinear
from earlyfusion.model.transformer import Transformer

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_KEY = re.compile(rf"{re.escape(_PREFIX)}(.+)\.lora_([AB])(?:\.\w+)?\.weight")
# With any of these settings an adapter is more than a product of two matrices for all tokens.
_UNSUPPORTED = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "layer_replication",
    "lora_bias",
    "modules_to_save",
    "trainable_token_indices",
    "target_parameters",
)
# Initialisations of an adapter that leave the model's weights as they are. Others, such as "pissa"
# and "olora", subtract the initial adapter from the weights.
_PLAIN_INITIALISATIONS = (True, False, None, "gaussian", "orthogonal", "eva")


@dataclass(frozen=True)
class LowRank:
    """The change of one linear layer: scale * b @ a, with a [rank, in] and b [out, rank]."""

    a: Tensor
    b: Tensor
    scale: float


def save_adapter(folder: Path, layers: Mapping[str, LowRank], base: str) -> None:
    """Write adapters of one rank and scale, by layer name; the folder appears whole or not at all.
    A folder that holds an adapter is replaced; any other non-empty folder is refused."""
    if folder.exists() and any(folder.iterdir()) and not (folder / CONFIG).is_file():
        raise CheckpointError(
            f"{folder} is not empty and does not hold an adapter: choose another folder"
        )
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
    tensors = {
        f"{_PREFIX}{name}.lora_{letter}.weight": matrix.detach().float().cpu().contiguous()
        for name, layer in layers.items()
        for letter, matrix in (("A", layer.a), ("B", layer.b))
    }
    with new_folder(folder) as unfinished:
        save_file(tensors, unfinished / WEIGHTS, metadata={"format": "pt"})
        (unfinished / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def read_adapter(folder: Path) -> dict[str, LowRank]:
    """The adapters of a folder by layer name. Raises `CheckpointError`."""
    if not (folder / CONFIG).is_file():
        run_adapter = folder / "adapter"  # if the folder is that of a training run
        remedy = run_adapter if (run_adapter / CONFIG).is_file() else "the folder of an adapter"
        raise CheckpointError(f"{CONFIG} is missing in {folder}: give {remedy}")
    config = read_json(folder / CONFIG)
    _check_plain_lora(folder, config)
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, value in _read_tensors(folder / WEIGHTS).items():
        # PEFT also stores the frozen weight of an adapted head.
        if key.endswith(".base_layer.weight"):
            continue
        match = _KEY.fullmatch(key)
        if match is None:
            raise CheckpointError(
                f"{folder / WEIGHTS} holds {key}, which does not adapt a linear layer: merge it "
                "with PEFT and load the merged model"
            )
        if value.ndim != 2 or not value.numel() or not value.is_floating_point():
            raise CheckpointError(
                f"{folder / WEIGHTS} holds {key} as {value.dtype} {list(value.shape)}, which is no "
                "matrix of an adapter: save it again"
            )
        pairs.setdefault(match[1], {})[match[2]] = value
    if not pairs or any(set(pair) != {"A", "B"} for pair in pairs.values()):
        raise CheckpointError(
            f"{folder / WEIGHTS} lacks one of the two matrices of an adapter: save it again"
        )
    return {
        name: LowRank(pair["A"], pair["B"], _scale(config, name, len(pair["A"])))
        for name, pair in pairs.items()
    }


def merge_adapter(model: Transformer, folder: Path) -> None:
    """Add the adapters of a folder to a model's weights, whose dtypes stay. Raises
    `CheckpointError` for adapters of another model."""
    for name, weight in merged_weights(model, folder):
        _linear(model, name).weight = nn.Parameter(weight)


@torch.no_grad()
def merged_weights(model: Transformer, folder: Path) -> Iterator[tuple[str, Tensor]]:
    """The layers that a folder adapts, and their weights with the adapters merged, in the model's
    dtypes. Raises `CheckpointError` for adapters of another model."""
    layers = read_adapter(folder)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    for name, layer in layers.items():
        expected = tuple(linears[name].weight.shape) if name in linears else None
        if expected != (len(layer.b), layer.a.shape[1]) or layer.b.shape[1] != len(layer.a):
            raise CheckpointError(
                f"{folder} is an adapter of another model: {name} is {len(layer.b)} x "
                f"{layer.a.shape[1]} there and {expected or 'no linear layer'} here"
            )
        if name == "lm_head" and model.config.tie_word_embeddings:
            raise CheckpointError(
                f"{folder} adapts the head, which this model shares with its embedding: merge the "
                "adapter with PEFT and load the merged model"
            )
    for name, layer in layers.items():
        weight = linears[name].weight
        update = layer.scale * (layer.b.float() @ layer.a.float()).to(weight.device)
        yield name, (weight.float() + update).to(weight.dtype)


@torch.no_grad()
def with_weights(model: Transformer, weights: Iterable[tuple[str, Tensor]]) -> Transformer:
    """A copy of the model with other weights in some layers, in the dtype or the bits of the
    model's weights. All other tensors are shared with `model`."""
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    copy = deepcopy(model, {id(tensor): _alias_of(tensor) for tensor in tensors})
    for name, weight in weights:
        weight = weight.to(model.lm_head.weight.dtype)
        layer = copy.get_submodule(name)
        if isinstance(layer, PackedLinear):
            with torch.device("meta"):
                dense = nn.Linear(layer.in_features, layer.out_features, bias=False)
            dense.weight = nn.Parameter(weight, requires_grad=False)
            packed = PackedLinear(dense, layer.bits)
            layer.data, layer.scales = packed.data, packed.scales
        else:
            _linear(copy, name).weight = nn.Parameter(weight, requires_grad=False)
    return copy


def _linear(model: Transformer, name: str) -> nn.Linear:
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    return layer


def _alias_of(tensor: Tensor) -> Tensor:
    """Another tensor object with the same memory, so that a back end that replaces the data of one
    does not change the other."""
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(tensor.detach(), tensor.requires_grad)
    return tensor.detach()


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError):
        raise CheckpointError(f"{path} is missing or damaged: save the adapter again") from None


def _check_plain_lora(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` for an adapter that is more than LoRA on linear layers."""
    peft_type = config.get("peft_type")
    unsupported = [name for name in _UNSUPPORTED if config.get(name)]
    initialisation = config.get("init_lora_weights")
    if isinstance(initialisation, str):
        initialisation = initialisation.lower()
    if initialisation not in _PLAIN_INITIALISATIONS:
        unsupported.append(f"init_lora_weights={initialisation!r}")
    if peft_type != "LORA" or unsupported or config.get("bias", "none") != "none":
        features = f"with {', '.join(unsupported) or 'biases'}"
        description = features if peft_type == "LORA" else f"of type {peft_type}"
        raise CheckpointError(
            f"{folder} is an adapter {description}, and only plain LoRA is read: merge it with "
            "PEFT and load the merged model"
        )


def _scale(config: Mapping[str, Any], name: str, rank: int) -> float:
    """The factor of B A for the layer `name`, whose alpha may differ from that of the others."""
    try:
        patterns = (config.get("alpha_pattern") or {}).items()
        matching = [alpha for key, alpha in patterns if re.fullmatch(rf"(.*\.)?({key})", name)]
        alpha = float(matching[0] if matching else config["lora_alpha"])
    except (AttributeError, KeyError, TypeError, ValueError, re.error):
        raise CheckpointError(
            f"the adapter's {CONFIG} has no lora_alpha, or an alpha_pattern that is not one of "
            "PEFT's: save it again"
        ) from None
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
