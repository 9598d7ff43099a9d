"""A file of image codes: one safetensors tensor `codes`, int64 [n, h, w] from the top row."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from earlyfusion.errors import CheckpointError

_KEY = "codes"


def save_codes(path: Path, codes: npt.NDArray[np.int64]) -> None:
    """Write codes [n, h, w]; the file is whole or, after a failure, as it was."""
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({_KEY: np.ascontiguousarray(codes, dtype=np.int64)}, part)
        os.replace(part, path)
    except (OSError, SafetensorError):
        part.unlink(missing_ok=True)
        raise CheckpointError(f"{path} cannot be written: choose another file") from None


def load_codes(path: Path) -> npt.NDArray[np.int64]:
    """Read codes [n, h, w] of any whole-number type; what they mean is the model's to check."""
    try:
        codes = load_file(path).get(_KEY)
    except (OSError, SafetensorError, TypeError, AttributeError, KeyError):
        raise CheckpointError(
            f"{path} is missing or no safetensors file: give what `earlyfusion encode` wrote"
        ) from None
    if codes is None or codes.ndim != 3 or codes.dtype.kind not in "ui" or codes.size == 0:
        raise CheckpointError(
            f"{path} holds no tensor '{_KEY}' of whole numbers [n, h, w]: "
            "give what `earlyfusion encode` wrote"
        )
    return codes.astype(np.int64)
