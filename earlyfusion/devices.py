"""Names of devices and dtypes, understood in the same way by every option that takes one.

torch is imported inside the functions, so that the command line can list the names without it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from earlyfusion.errors import SettingError

if TYPE_CHECKING:
    import torch

DEVICES = ("auto", "cpu", "cuda")
FLOAT_DTYPES = ("float32", "bfloat16", "float16")
PACKED_BITS = {"int8": 8, "int4": 4}
WEIGHT_DTYPES = ("auto", *FLOAT_DTYPES, *PACKED_BITS)
_LONG_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}

# A CPU computes in float32 faster than in bfloat16 as long as the weights stay in its cache.
_MAX_SMALL_PARAMETERS = 500_000_000


def dtype_name(option: str, name: object, choices: Sequence[str]) -> str:
    """The one of `choices` that `name` means, whichever of the two uses the short form: "bf16" is
    "bfloat16". Raises `SettingError`, which calls the setting `option`."""
    for choice in choices:
        if isinstance(name, str) and _long(name) == _long(choice):
            return choice
    raise SettingError.unknown(option, name, choices)


def torch_dtype(name: str) -> torch.dtype:
    """torch's dtype of a name that `dtype_name` has checked."""
    import torch

    dtype: torch.dtype = getattr(torch, _long(name))
    return dtype


def auto_dtype(num_parameters: int, device: torch.device) -> torch.dtype:
    """What "auto" means for weights: bfloat16, except for small models on a CPU."""
    import torch

    small_on_cpu = device.type == "cpu" and num_parameters <= _MAX_SMALL_PARAMETERS
    return torch.float32 if small_on_cpu else torch.bfloat16


def resolve_device(name: str) -> torch.device:
    """The device that this process uses; "auto" is a GPU where there is one.

    Raises `SettingError` for an unknown name, and for a device that this machine does not have.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    local_rank = os.environ.get("LOCAL_RANK")
    if name == "cuda" and local_rank:
        name = f"cuda:{local_rank}"  # torchrun starts one process for each GPU of a machine
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        raise SettingError.unknown("device", name, DEVICES) from None
    if not _is_on_this_machine(device):
        raise SettingError(f"device={name!r} is not on this machine: use auto or cpu")
    return device


def _is_on_this_machine(device: torch.device) -> bool:
    import torch

    if device.type == "cuda":
        # Asks the driver only: a tensor would start a context, which takes memory on the GPU.
        return (device.index or 0) < torch.cuda.device_count()
    try:
        torch.empty(1, device=device)
    except (RuntimeError, NotImplementedError, AssertionError):
        return False
    return device.type != "meta"  # tensors without values


def _long(name: str) -> str:
    return _LONG_NAMES.get(name, name)
