"""Which layout a folder has, and where a named model lies: the one door to all of them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import torch

from earlyfusion.checkpoints import anole, lumina
from earlyfusion.checkpoints.hf import (
    INDEX,
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
_HUB_FILES = ["*.json", "*.safetensors"]

_OPENERS: dict[str, Callable[[Path, Path | None], Source]] = {
    "hf": open_hf,
    "anole": open_hf,
    "lumina": open_hf,
    "meta": open_meta,
}


def load(
    name: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> Loaded:
    """Load an embedded model by name, a folder in any supported layout, or a hub id."""
    return assemble(open_source(locate(name)), device, dtype)


def open_source(folder: Path, tokenizer: Path | None = None) -> Source:
    """Open a folder in any supported layout without reading its tensors.

    `tokenizer` is the folder of the tokenizer file, and for Meta's layout of the VQ-GAN too, where
    they are not found beside the model.
    """
    return _OPENERS[detect(folder)](folder, tokenizer)


def detect(folder: Path) -> str:
    """The layout of a folder: "hf", "meta", "anole" (names of an early transformers) or "lumina".

    Raises `CheckpointError` where it is none of them.
    """
    if not folder.is_dir():
        raise CheckpointError(f"there is no model folder {folder}: {_ACCEPTED}")
    if (folder / "config.json").is_file() and _has(folder, WEIGHTS, INDEX, PICKLE, PICKLE_INDEX):
        if lumina.is_lumina(read_json(folder / "config.json")):
            return "lumina"
        return "anole" if anole.is_early(open_tensors(folder)) else "hf"
    if (folder / "params.json").is_file() or _has(folder, "consolidated*.pth"):
        return "meta"
    raise CheckpointError(f"the folder {folder} holds no model: {_ACCEPTED}")


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
