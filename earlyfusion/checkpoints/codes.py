"""Files of image codes: a tensor `codes`, int64 [n, h, w], in safetensors, or .npy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from earlyfusion.errors import CheckpointError
from earlyfusion.files import write_whole

_KEY = "codes"
# Files with these suffixes would not be expected to hold codes in safetensors.
_OTHER_SUFFIXES = {".npz", ".pt", ".pth", ".pkl", ".json", ".csv", ".png", ".jpg", ".jpeg"}


def check_name(path: Path) -> None:
    """Raise `CheckpointError` for the suffix of a format that codes are not written in."""
    if path.suffix.lower() in _OTHER_SUFFIXES:
        raise CheckpointError(
            f"{path} is not a name for image codes: they are written as .safetensors or .npy"
        )


def save_codes(path: Path, codes: npt.NDArray[np.int64], overwrite: bool = False) -> None:
    """Write codes [n, h, w], as .npy or else as safetensors; the file is whole or not there. Raises
    `SettingError` if it cannot be written, or exists and `overwrite` is False."""
    check_name(path)
    array = np.ascontiguousarray(codes, dtype=np.int64)
    if path.suffix.lower() == ".npy":
        write_whole(path, lambda file: np.save(file, array, allow_pickle=False), overwrite)
    else:
        write_whole(path, lambda file: file.write(save({_KEY: array})), overwrite)


def load_codes(path: Path) -> npt.NDArray[np.int64]:
    """Read codes [n, h, w] of any integer type, as int64; their range is not checked. Raises
    `CheckpointError`."""
    try:
        if path.suffix.lower() == ".npy":
            # Memory-mapped, so that a false shape in the header allocates no memory.
            codes = np.load(path, mmap_mode="r", allow_pickle=False)
        else:
            codes = load_file(path).get(_KEY)
    except (OSError, EOFError, ValueError, SafetensorError, TypeError, AttributeError, KeyError):
        raise CheckpointError(
            f"{path} is missing or not a file of image codes: give one that `earlyfusion encode` "
            "wrote"
        ) from None
    if codes is None or codes.ndim != 3 or codes.dtype.kind not in "ui" or codes.size == 0:
        raise CheckpointError(
            f"{path} holds no tensor '{_KEY}' of whole numbers [n, h, w]: "
            "give one that `earlyfusion encode` wrote"
        )
    return codes.astype(np.int64)
