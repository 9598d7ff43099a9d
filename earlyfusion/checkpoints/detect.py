"""Finds a model by name, detects the layout of its folder, and opens or loads it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from earlyfusion.checkpoints import anole, lumina
from earlyfusion.checkpoints.assemble import LoadedModel, assemble
from earlyfusion.checkpoints.checklist import verify_checklist
from earlyfusion.checkpoints.hf import (
    INDEX,
    PACKED,
    PICKLE,
    PICKLE_INDEX,
    WEIGHTS,
    open_hf,
    open_tensors,
)
from earlyfusion.checkpoints.hub import download_model, is_hub_id
from earlyfusion.checkpoints.meta import open_meta
from earlyfusion.checkpoints.source import Source, read_json
from earlyfusion.errors import CheckpointError
from earlyfusion.files import expanded, reason_of

EMBEDDED = ("mini",)
_PRETRAINED = Path(__file__).parent.parent / "pretrained"

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
) -> LoadedModel:
    """Load an embedded model by name, a folder in any supported layout, or a hub id."""
    return assemble(open_source(locate(name), verify=verify), device, dtype, packed=True)


def open_source(folder: Path, tokenizer: Path | None = None, verify: bool = True) -> Source:
    """Open a folder in any supported layout without reading its tensors. `tokenizer` is the folder
    with the tokenizer file (in Meta's layout also with the VQ-GAN) if the model's own lacks it.
    `verify` compares files with the folder's checklist."""
    source = _OPENERS[detect(folder)](folder, tokenizer)
    for checklist_folder in {folder, source.tokenizer.parent} if verify else ():
        verify_checklist(checklist_folder)
    return source


def detect(folder: Path) -> str:
    """The layout of a folder: "hf", "meta", "anole" (an early form of hf) or "lumina". Raises
    `CheckpointError` for any other folder."""
    if not folder.is_dir():
        raise CheckpointError(f"there is no model folder {folder}: {_ACCEPTED}")
    if (folder / "config.json").is_file() and _has_file(
        folder, WEIGHTS, INDEX, PICKLE, PICKLE_INDEX
    ):
        config = read_json(folder / "config.json")
        _check_quantiser(folder, config)
        if lumina.is_lumina(config):  # first, as its norms may have any shape
            return "lumina"
        return "anole" if anole.is_early(open_tensors(folder)) else "hf"
    if (folder / "params.json").is_file() or _has_file(folder, "consolidated*.pth"):
        return "meta"
    raise CheckpointError(_not_a_model(folder))


def _check_quantiser(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` for weights that another library has quantised."""
    settings = config.get("quantization_config")
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    if method is not None and method != PACKED:
        raise CheckpointError(
            f"{folder} holds weights that {method} has quantised: load it with "
            "earlyfusion.hf.ChameleonForConditionalGeneration.from_pretrained, or give the model "
            "it was made from with dtype='int4' or 'int8'"
        )


def _not_a_model(folder: Path) -> str:
    """What a folder is instead of a model, and which folder to give."""
    # A training run with merge=false leaves an adapter in adapter/ and no model.
    for adapter in (folder, folder / "adapter"):
        if not (adapter / "adapter_config.json").is_file() or (folder / "model").is_dir():
            continue
        name = read_json(adapter / "adapter_config.json").get("base_model_name_or_path")
        base = f"its base model {name}" if name else "its base model"
        return (
            f"{folder} holds an adapter and not a whole model: load {base} with "
            f"adapter={str(adapter)!r}, or merge the two with PEFT's merge_and_unload and save them"
        )
    snapshots = sorted(folder.glob("snapshots/*/"), key=lambda path: path.stat().st_mtime)
    if snapshots:
        return (
            f"{folder} is where the hub's files of a model are cached: give its hub id, or one of "
            f"its versions, as {snapshots[-1]}"
        )
    if (folder / "model" / "config.json").is_file():
        return f"{folder} is the folder of a training run: give its model, {folder / 'model'}"
    if _has_file(folder, "step-*/state.json"):
        return (
            f"{folder} is the folder of a training run that has not ended: run it again to finish "
            f"it, its model will be {folder / 'model'}"
        )
    numbers = [p.name.rpartition("-")[2] for p in folder.glob("checkpoint-*") if p.is_dir()]
    steps = sorted(int(number) for number in numbers if number.isdigit())
    if steps:
        newest = folder / f"checkpoint-{steps[-1]}"
        return (
            f"{folder} is the folder of a Trainer's run: give one of its checkpoints, as {newest}"
        )
    # Releases in Meta's layout, as Anole's, have the model in models/7b beside tokenizer/.
    files = (p for n in _MODEL_FILES for depth in ("*", "*/*") for p in folder.glob(f"{depth}/{n}"))
    model_folders = sorted({path.parent for path in files})
    if model_folders:
        return (
            f"the folder {folder} holds no model itself: give a folder in it, as {model_folders[0]}"
        )
    return f"the folder {folder} holds no model: {_ACCEPTED}"


def locate(name: str | Path) -> Path:
    """The folder of a model: embedded, on this machine, or downloaded from the hub."""
    if not str(name):
        raise CheckpointError(f"the name of the model is empty: {_ACCEPTED}")
    if str(name) in EMBEDDED:
        return _PRETRAINED / str(name)
    folder = expanded(name)
    try:
        is_here = folder.is_dir()
    except OSError as error:  # a name that is too long, or a folder that may not be read
        raise CheckpointError(f"{name} cannot be read ({reason_of(error)}): {_ACCEPTED}") from None
    # org/name may also be a folder here, which takes precedence.
    if is_here or not is_hub_id(str(name)):
        return folder
    return download_model(str(name))


_ACCEPTED = (
    f"give {EMBEDDED[0]!r}, a folder with config.json and {WEIGHTS}, "
    "a folder with params.json and consolidated.pth, or a hub id such as org/name"
)


_MODEL_FILES = (WEIGHTS, INDEX, "params.json")


def _has_file(folder: Path, *patterns: str) -> bool:
    return any(next(folder.glob(pattern), None) is not None for pattern in patterns)
