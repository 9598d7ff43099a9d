"""Data sets of the hub: their files, downloaded to a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from earlyfusion.errors import DataError


def download_dataset(hub_id: str, patterns: Sequence[str], revision: str | None = None) -> Path:
    """The folder of a data set's files that match `patterns`, downloaded unless it was before.

    Raises `DataError` where it cannot be had.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                hub_id, repo_type="dataset", revision=revision, allow_patterns=list(patterns)
            )
        )
    except (OSError, ValueError, RuntimeError):
        raise DataError(
            f"{hub_id} is no file or folder here and could not be had from the hub: "
            "check the name, the network and access to it"
        ) from None
