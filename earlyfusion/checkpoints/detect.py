"""Which layout a folder has, and where a named model lies: the one door to all of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from earlyfusion.checkpoints import anole, lumina
from earlyfusion.checkpoints.checklist import verify_checklist
from earlyfusion.checkpoints.hf import (
    INDEX,
    PACKED,
    PICKLE,
    PICKLE_INDEX,
    WEIGHTS,
    Loaded,
    assemble,
    open_hf,
    open_tensors,
    read_json,
)
from earlyfusion.checkpoints.meta import open_meta
from earlyfusion.checkpoints.source import Source
from earlyfusion.errors import CheckpointError

EMBEDDED = ("mini",)
_PRETRAINED = Path(__file__).parent.parent / "pretrained"
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_HUB_FILES = ["*.json", "*.safetensors", "README.md", "NOTICE*", "LICENSE*"]

_OPENERS: dict[str, Callable[[Path, Path | None], Source]] = {
    "hf": open_hf,
    "anole": open_hf,
    "lumina": open_hf,
    "meta": open_meta,
}


def load(
    name: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    verify: bool = True,
) -> Loaded:
    """Load an embedded model by name, a folder in any supported layout, or a hub id."""
    return assemble(open_source(locate(name), verify=verify), device, dtype, packed=True)


def open_source(folder: Path, tokenizer: Path | None = None, verify: bool = True) -> Source:
    """Open a folder in any supported layout without reading its tensors.

    `tokenizer` is the folder of the tokenizer file, and for Meta's layout of the VQ-GAN too, where
    they are not found beside the model. `verify` compares the files with the checklist beside them.
    """
    source = _OPENERS[detect(folder)](folder, tokenizer)
    for place in {folder, source.tokenizer.parent} if verify else ():
        verify_checklist(place)
    return source


def detect(folder: Path) -> str:
    """The layout of a folder: "hf", "meta", "anole" (names of an early transformers) or "lumina".

    Raises `CheckpointError` where it is none of them.
    """
    if not folder.is_dir():
        raise CheckpointError(f"there is no model folder {folder}: {_ACCEPTED}")
    if (folder / "config.json").is_file() and _has(folder, WEIGHTS, INDEX, PICKLE, PICKLE_INDEX):
        config = read_json(folder / "config.json")
        _check_dense(folder, config)
        if lumina.is_lumina(config):
            return "lumina"
        return "anole" if anole.is_early(open_tensors(folder)) else "hf"
    if (folder / "params.json").is_file() or _has(folder, "consolidated*.pth"):
        return "meta"
    raise CheckpointError(_other_kind(folder) or f"the folder {folder} holds no model: {_ACCEPTED}")


def _check_dense(folder: Path, config: Mapping[str, Any]) -> None:
    """`CheckpointError` for weights that another library packed."""
    packed = config.get("quantization_config")
    method = packed.get("quant_method") if isinstance(packed, dict) else None
    if method is not None and method != PACKED:
        raise CheckpointError(
            f"{folder} holds weights that {method} has quantised: load it with "
            "earlyfusion.hf.ChameleonForConditionalGeneration.from_pretrained, or give the model "
            "it was made from with dtype='int4' or 'int8'"
        )


def _other_kind(folder: Path) -> str:
    """What a folder is that is no model, and what to give instead; "" where nobody knows."""
    if (folder / "adapter_config.json").is_file():
        base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
        of = f"its base model {base}" if base else "its base model"
        return (
            f"{folder} holds an adapter and no whole model: load {of} with adapter={str(folder)!r},"
            " or merge the two with PEFT's merge_and_unload and save them"
        )
    if (folder / "model" / "config.json").is_file():
        return f"{folder} is the folder of a training run: give its model, {folder / 'model'}"
    if _has(folder, "step-*/state.json"):
        return (
            f"{folder} is the folder of a training run that has not ended: run it again to go on, "
            f"its model will be {folder / 'model'}"
        )
    numbers = [p.name.rpartition("-")[2] for p in folder.glob("checkpoint-*") if p.is_dir()]
    steps = sorted(int(number) for number in numbers if number.isdigit())
    if steps:
        newest = folder / f"checkpoint-{steps[-1]}"
        return f"{folder} is the folder of a Trainer's run: give a checkpoint of it, as {newest}"
    return ""


def locate(name: str | Path) -> Path:
    """The folder of a model: embedded, on this machine, or downloaded from the hub."""
    if str(name) in EMBEDDED:
        return _PRETRAINED / str(name)
    folder = Path(name).expanduser()
    if folder.is_dir() or not _HUB_ID.fullmatch(str(name)):
        return folder
    return _download(str(name))


_ACCEPTED = (
    f"give {EMBEDDED[0]!r}, a folder with config.json and {WEIGHTS}, "
    "a folder with params.json and consolidated.pth, or a hub id such as org/name"
)


def _has(folder: Path, *patterns: str) -> bool:
    return any(next(folder.glob(pattern), None) is not None for pattern in patterns)


def _download(hub_id: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise CheckpointError(
            f"{hub_id} is no folder here, and downloading it needs huggingface_hub: "
            "pip install huggingface_hub"
        ) from None
    try:
        return Path(snapshot_download(hub_id, allow_patterns=_HUB_FILES))
    except (OSError, ValueError, RuntimeError):
        raise CheckpointError(
            f"{hub_id} is no folder here and could not be had from the hub: "
            "check the name, the network and access to it"
        ) from None
