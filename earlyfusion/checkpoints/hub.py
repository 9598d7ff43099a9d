"""The Hugging Face hub: which names are hub ids, and downloads of models and data sets."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from earlyfusion.errors import CheckpointError, DataError

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_MODEL_FILES = ["*.json", "*.safetensors", "README.md", "NOTICE*", "LICENSE*"]


def is_hub_id(name: str) -> bool:
    """Whether a name has the form org/name; it may also be a relative path."""
    return _HUB_ID.fullmatch(name) is not None


def download_model(hub_id: str) -> Path:
    """The folder of a model's files, downloaded if needed; `CheckpointError` if that fails."""
    try:
        folder = _download(hub_id, "model", _MODEL_FILES)
    except ImportError:
        raise CheckpointError(
            f"{hub_id} is not a folder here, and downloading it needs huggingface_hub: "
            "pip install huggingface_hub"
        ) from None
    except (OSError, ValueError, RuntimeError):
        raise CheckpointError(
            f"{hub_id} is not a folder here and could not be downloaded from the hub: "
            "check the name, the network and access to it"
        ) from None
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{hub_id} has no config.json, so it is not in transformers' layout: download all of "
            f"it (hf download {hub_id} --local-dir FOLDER) and give the folder with its model"
        )
    return folder


def download_dataset(hub_id: str, patterns: Sequence[str], revision: str | None = None) -> Path:
    """The folder of a data set's files that match `patterns`; `DataError` if a download fails."""
    try:
        return _download(hub_id, "dataset", patterns, revision)
    except ImportError:
        raise DataError(
            f"{hub_id} is not a file or folder here, and downloading it needs huggingface_hub: "
            "pip install huggingface_hub"
        ) from None
    except (OSError, ValueError, RuntimeError):
        raise DataError(
            f"{hub_id} is not a file or folder here and could not be downloaded from the hub: "
            "check the name, the network and access to it"
        ) from None


def _download(
    hub_id: str,
    repo_type: Literal["model", "dataset"],
    patterns: Sequence[str],
    revision: str | None = None,
) -> Path:
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(
            hub_id, repo_type=repo_type, revision=revision, allow_patterns=list(patterns)
        )
    )
