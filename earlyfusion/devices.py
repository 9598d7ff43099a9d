"""Names of devices and dtypes, understood in the same way by every option that takes one. torch is
imported inside the functions, so that the command line can list the names without it."""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING

from earlyfusion.errors import SettingError

if TYPE_CHECKING:
    import torch
    from torch import nn

DEVICES = ("auto", "cpu", "cuda")
FLOAT_DTYPES = ("float32", "bfloat16", "float16")
PACKED_BITS = {"int8": 8, "int4": 4}
WEIGHT_DTYPES = ("auto", *FLOAT_DTYPES, *PACKED_BITS)
_UNKNOWN_FREE_BYTES = 4_000_000_000  # assumed to be free if the system does not say
_LONG_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}

# A CPU is faster in float32 than in bfloat16 as long as the weights fit into its cache.
_MAX_SMALL_PARAMETERS = 500_000_000


def dtype_name(option: str, name: object, choices: Sequence[str]) -> str:
    """The one of `choices` that `name` means, in its short or long form: "bf16" is "bfloat16".
    Raises `SettingError`, which calls the setting `option`."""
    for choice in choices:
        if isinstance(name, str) and _long(name) == _long(choice):
            return choice
    raise SettingError.unknown(option, name, choices)


def torch_dtype(name: str) -> torch.dtype:
    """torch's dtype for a name that `dtype_name` has checked."""
    import torch

    dtype: torch.dtype = getattr(torch, _long(name))
    return dtype


def auto_dtype(num_parameters: int, device: torch.device) -> torch.dtype:
    """The meaning of "auto" for weights: bfloat16, except for small models on a CPU."""
    import torch

    small_on_cpu = device.type == "cpu" and num_parameters <= _MAX_SMALL_PARAMETERS
    return torch.float32 if small_on_cpu else torch.bfloat16


def resolve_device(name: str) -> torch.device:
    """The device that this process uses; "auto" is a GPU if there is one. Raises `SettingError` for
    an unknown name or a missing device."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    local_rank = os.environ.get("LOCAL_RANK")
    if name == "cuda" and local_rank:
        name = f"cuda:{local_rank}"  # torchrun starts one process per GPU of a machine
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        raise SettingError.unknown("device", name, DEVICES) from None
    if not _is_on_this_machine(device):
        raise SettingError(f"device={name!r} is not on this machine: use auto or cpu")
    return device


def free_bytes(device: torch.device) -> int:
    """Free memory of a GPU, or of this machine within the limit of a container."""
    import torch

    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min(_available_bytes(), _container_bytes())


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error means that memory ran out, on a device or on this machine."""
    import torch

    # For a CPU, torch only says so in the message.
    words = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    return words or isinstance(error, MemoryError | torch.OutOfMemoryError)


def _available_bytes() -> int:
    # Linux counts the file cache as available memory; sysconf does not.
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not all systems have these
        return _UNKNOWN_FREE_BYTES


def _container_bytes() -> int:
    """The memory left within a control group's limit (version 2)."""
    limit, used = (_lines(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    if not limit or not used or limit[0] == "max":
        return sys.maxsize
    return max(int(limit[0]) - int(used[0]), 0)


def _lines(path: str) -> list[str]:
    try:
        with open(path, encoding="ascii") as file:
            return file.read().splitlines()
    except OSError:
        return []


def _is_on_this_machine(device: torch.device) -> bool:
    import torch

    if device.type == "cuda":
        # Only asks the driver: a tensor would start a context, which takes memory on the GPU.
        return (device.index or 0) < torch.cuda.device_count()
    try:
        torch.empty(1, device=device)
    except (RuntimeError, NotImplementedError, AssertionError):
        return False
    return device.type != "meta"  # meta tensors have no values


def _long(name: str) -> str:
    return _LONG_NAMES.get(name, name)


# Parameters of mallopt(3) in glibc: value for training, value afterwards. The latter are those that
# glibc takes by itself once it has freed a block of 32 MiB, the largest threshold that it accepts.
_MALLOC_OPTIONS = {
    "M_MMAP_THRESHOLD": (-3, 32 << 20, 32 << 20),
    "M_TRIM_THRESHOLD": (-1, 2**31 - 1, 64 << 20),
    "M_TOP_PAD": (-2, 64 << 20, 128 << 10),
}


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """While it is open, memory that the process frees stays with it and is used again (glibc).

    By default glibc gives large blocks back at once, and a training step that allocates them anew
    waits for the system to clear their pages.
    """
    mallopt = _c_function("mallopt")
    if mallopt is None:
        yield
        return
    try:
        for option, value, _ in _MALLOC_OPTIONS.values():
            mallopt(option, value)
        yield
    finally:
        for option, _, later in _MALLOC_OPTIONS.values():
            mallopt(option, later)
        if (trim := _c_function("malloc_trim")) is not None:
            trim(ctypes.c_size_t(0))


_HUGE_PAGE = 2 << 20
_MADV_HUGEPAGE = 14  # Linux's number


def use_huge_pages(tensor: torch.Tensor) -> None:
    """Ask Linux for pages of 2 MiB for a tensor that is not filled yet. torch's own large tensors
    have them already, but numpy's zeros do not."""
    begin = -(-tensor.data_ptr() // _HUGE_PAGE) * _HUGE_PAGE
    size = (tensor.data_ptr() + tensor.nbytes - begin) // _HUGE_PAGE * _HUGE_PAGE
    madvise = _c_function("madvise")
    if _wants_huge_pages() and size > 0 and madvise is not None:
        madvise(ctypes.c_void_p(begin), ctypes.c_size_t(size), _MADV_HUGEPAGE)


def move_to_huge_pages(module: nn.Module) -> None:
    """Move a module's tensors, which are on a CPU, to one block of memory that consists of pages of
    2 MiB, if Linux has them and at least half of the free memory stays free. Tensors of mapped
    files, and the ends of torch's own tensors, lie on pages of 4 KiB, which made prompts up to a
    fifth slower (benchmarks/RESULTS.md). EARLYFUSION_COPY_WEIGHTS=0 leaves them where they are:
    several processes share the memory of a mapped file."""
    import torch

    tensors = [t for t in (*module.parameters(), *module.buffers()) if t.is_contiguous()]
    tensors = [t for t in dict.fromkeys(tensors) if t.numel()]  # a tied tensor once
    ends = list(itertools.accumulate(-(-t.nbytes // 64) * 64 for t in tensors))
    total = ends[-1] if ends else 0
    is_wanted = _wants_huge_pages() and os.environ.get("EARLYFUSION_COPY_WEIGHTS") != "0"
    if not is_wanted or not _HUGE_PAGE <= total <= free_bytes(torch.device("cpu")) // 2:
        return
    try:
        memory = mmap.mmap(-1, total + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(_MADV_HUGEPAGE)
    except OSError:  # a limit of the process, or a kernel without such pages
        return
    # The block begins at a huge page. Each tensor has a storage of its own, so that it can be saved
    # alone.
    begin = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % _HUGE_PAGE
    for tensor, offset in zip(tensors, (0, *ends), strict=False):
        copy = torch.frombuffer(
            memory, dtype=tensor.dtype, count=tensor.numel(), offset=begin + offset
        )
        tensor.data = copy.view(tensor.shape).copy_(tensor.detach())


def _wants_huge_pages() -> bool:
    # `earlyfusion/__init__.py` sets this variable, which torch reads too, to 1 unless it is given.
    return sys.platform == "linux" and os.environ.get("THP_MEM_ALLOC_ENABLE") != "0"


@cache
def _c_function(name: str) -> ctypes._NamedFuncPointer | None:
    try:
        return getattr(ctypes.CDLL(None), name)
    except (OSError, TypeError, AttributeError):  # no glibc
        return None
