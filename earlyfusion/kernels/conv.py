"""3 x 3 convolutions in a quarter of the multiplications (Winograd 1980; Lavin and Gray 2015).

F(4 x 4, 3 x 3): a tile of 6 x 6 values gives 4 x 4 results through 36 products instead of 144. For
inference on a CPU in fp32, in compiled code (`conv.cpp`). Choices:

- the interpolation points are 0, +-sqrt(1/2), +-sqrt(2) and infinity: with them fp32 errs as
  little as a direct convolution does (1.1 to 1.3e-6 of the norm; with 0, +-1, +-2 it is 2.4 to
  2.8e-6);
- a block of tiles goes through all steps while it is in the processor's cache, so that norm, swish,
  upsampling and the sum with the shortcut need no extra pass over memory, and the result may
  overwrite the input;
- where the transform of the filters takes long beside the products, because an image is small, its
  result is kept and used again as long as the weights have not changed, which each call compares:
  weights may be trained or loaded in place;
- a value depends neither on the number of threads nor on the other images, so that the same codes
  always give the same pixels; therefore 1 x 1 convolutions and the sums of norms are here too:
  torch's differ in the last bit;
- within `reusing`, new results take the memory of freed ones: fresh memory costs a page fault per
  page.

`native.py` builds it; `vqgan.py` uses it.
"""

# Shapes: B batch, Y X height and width, C K channels in and out.

from __future__ import annotations

import ctypes
import math
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from earlyfusion.kernels import native

_POINTS, _VECTOR = 36, 16  # elements of a transformed tile, floats of a vector
# Transformed filters are kept for convolutions of at most 64 tiles, if they take at most 4 MB.
_KEPT_TILES, _KEPT_ELEMENTS = 64, 1 << 20


class Factors(NamedTuple):
    """A norm as x * scale + shift, per image and channel."""

    scale_BC: Tensor
    shift_BC: Tensor


class _Filters(NamedTuple):
    """The transformed filters of a convolution, and a copy of the weights they come from. Until
    the first call they are NaN, as weights that equal NaN give NaN."""

    transformed: Tensor
    weight_KC33: Tensor


class _Pool:
    """Memory for one thread's results. A tensor's memory comes back when it dies, in any thread."""

    def __init__(self) -> None:
        self.free: list[Tensor] = []

    def take(self, shape: tuple[int, ...]) -> Tensor:
        """Uninitialised fp32. If no free block is large enough, all free ones are dropped first."""
        size = math.prod(shape)
        fitting = [block for block in self.free.copy() if len(block) >= size]
        if fitting:
            block = min(fitting, key=len)
            self.free = [other for other in self.free if other is not block]
        else:
            self.free = []
            block = _new(size)
        # Tensors that share storage all hold the same numpy array, so the memory is free when the
        # array dies. A finalizer on the tensor itself would run while a view still reads it.
        lent = block.numpy()[:size].reshape(shape)
        weakref.finalize(lent, self.give, block).atexit = False
        return torch.from_numpy(lent)

    def give(self, block: Tensor) -> None:
        self.free.append(block)


class _Thread(threading.local):
    uses_torch = False
    pool: _Pool | None = None


_thread = _Thread()
_kept_filters: weakref.WeakKeyDictionary[nn.Module, _Filters] = weakref.WeakKeyDictionary()


def available() -> bool:
    return _library() is not None


def uses_torch() -> bool:
    """Whether this thread is within `torch_convolutions`."""
    return _thread.uses_torch


@contextmanager
def torch_convolutions() -> Iterator[None]:
    """Within it, this thread uses torch's own operators and layout: for callers whose results must
    be rounded exactly as other code rounds them."""
    before, _thread.uses_torch = _thread.uses_torch, True
    try:
        yield
    finally:
        _thread.uses_torch = before


@contextmanager
def reusing() -> Iterator[None]:
    """Within it, this thread's results reuse the memory of earlier, freed ones. Copy a result that
    lives longer: a small one may keep the memory of a large one."""
    before, _thread.pool = _thread.pool, _thread.pool or _Pool()
    try:
        yield
    finally:
        _thread.pool = before


def empty(*shape: int) -> Tensor:
    """Uninitialised fp32 on the CPU; within `reusing`, from the memory of freed results."""
    pool = _thread.pool
    return _new(*shape) if pool is None else pool.take(shape)


def _new(*shape: int) -> Tensor:
    # C++ writes fp32 on the CPU, whatever torch's default dtype and device are.
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def conv3x3(
    x_BYXC: Tensor,
    weight_KC33: Tensor,
    bias_K: Tensor,
    norm: nn.GroupNorm | None = None,
    plus_BYXK: Tensor | None = None,
    upsample: bool = False,
    in_place: bool = False,
    owner: nn.Module | None = None,
) -> Tensor:
    """A convolution with zero padding of one pixel: [B, Y, X, K] in fp32.

    C must be a multiple of 16, height and width of the result multiples of 4. With `upsample`, the
    input is first upsampled to twice its size (nearest neighbour), so the result is [B, 2Y, 2X, K].
    With `norm`, this norm and a swish come before the convolution; not possible with `upsample`.
    `plus` is added to the result. `in_place` writes the result over `x`, which needs C = K and no
    `upsample`. `owner` is the module of the weights, for which transformed filters may be kept.
    """
    b, y, x, c = x_BYXC.shape
    y, x = (2 * y, 2 * x) if upsample else (y, x)
    k = len(weight_KC33)
    out_BYXK = x_BYXC if in_place else empty(b, y, x, k)
    norm_weights = (None, None) if norm is None else (norm.weight, norm.bias)
    inputs = (x_BYXC, weight_KC33, bias_K, plus_BYXK, *norm_weights)
    size = _POINTS * c * -(-k // _VECTOR) * _VECTOR
    if owner is None or b * y * x > 16 * _KEPT_TILES or size > _KEPT_ELEMENTS:
        filters: tuple[Tensor, Tensor | None] = empty(size), None
    else:
        filters = _filters_of(owner, weight_KC33, size)
    numbers = (0.0, 1) if norm is None else (norm.eps, norm.num_groups)
    _call("conv3x3", inputs, (out_BYXK, *filters), *numbers, b, y, x, c, k, int(upsample))
    return out_BYXK


def _filters_of(owner: nn.Module, weight_KC33: Tensor, size: int) -> _Filters:
    kept = _kept_filters.get(owner)
    if kept is None or kept.weight_KC33.shape != weight_KC33.shape:
        kept = _Filters(_new(size).fill_(math.nan), _new(*weight_KC33.shape).fill_(math.nan))
        _kept_filters[owner] = kept
    return kept


def conv1x1(
    x_BYXC: Tensor, weight_KC11: Tensor, bias_K: Tensor, plus_BYXK: Tensor | None = None
) -> Tensor:
    """A 1 x 1 convolution, plus `plus`: [B, Y, X, K], in fp32. C must be a multiple of 16."""
    *size, c = x_BYXC.shape
    k = len(weight_KC11)
    out_BYXK, panels = empty(*size, k), empty(c * -(-k // _VECTOR) * _VECTOR)
    _call("conv1x1", (x_BYXC, weight_KC11, bias_K, plus_BYXK), (out_BYXK, panels),
          math.prod(size), c, k)  # fmt: skip
    return out_BYXK


def norm_factors(norm: nn.GroupNorm, x_BYXC: Tensor) -> Factors:
    """A group norm as one factor and one term per image and channel. C must be a multiple of
    16."""
    b, y, x, c = x_BYXC.shape
    factors = Factors(_new(b, c), _new(b, c))
    _call("group_norm", (x_BYXC, norm.weight, norm.bias), factors,
          norm.eps, b, y * x, c, norm.num_groups)  # fmt: skip
    return factors


def _call(
    name: str,
    inputs: Sequence[Tensor | None],
    results: Sequence[Tensor | None],
    *numbers: int | float,
) -> None:
    library = _library()
    assert library is not None, "available() says whether this can be called"
    # Keeps copies alive until the call returns, as it only gets addresses.
    contiguous = [None if t is None else t.contiguous() for t in inputs]
    pointers = [None if t is None else t.data_ptr() for t in (*contiguous, *results)]
    getattr(library, f"earlyfusion_{name}")(*pointers, *numbers, torch.get_num_threads())


@cache
def _library() -> ctypes.CDLL | None:
    library = native.load(Path(__file__).with_name("conv.cpp"))
    if library is not None:
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        library.earlyfusion_conv3x3.argtypes = [pointer] * 9 + [ctypes.c_double] + [number] * 8
        library.earlyfusion_conv1x1.argtypes = [pointer] * 6 + [number] * 4
        library.earlyfusion_group_norm.argtypes = [pointer] * 5 + [ctypes.c_double] + [number] * 5
        for function in ("conv3x3", "conv1x1", "group_norm"):
            getattr(library, f"earlyfusion_{function}").restype = None
    return library
