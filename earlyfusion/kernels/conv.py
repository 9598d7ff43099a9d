"""3 x 3 convolutions in a quarter of the multiplications (Winograd 1980; Lavin and Gray 2015).

F(4 x 4, 3 x 3): a tile of 6 x 6 values gives 4 x 4 results through 36 products instead of 144. For
inference on a CPU in fp32, in compiled code (`conv.cpp`). Choices:

- the points are 0, +-sqrt(1/2), +-sqrt(2) and infinity: with them fp32 errs as little as a direct
  convolution does (1.1 to 1.3e-6 of the norm; with 0, +-1, +-2 it is 2.4 to 2.8e-6);
- a block of tiles goes through all steps while it is in the processor's cache, so that norm, swish,
  upsampling and the sum with the shortcut need no extra pass over memory, and the result may
  overwrite the input;
- the kernel is transformed in each call: weights may be trained or loaded in place;
- within `reusing`, new results take the memory of freed ones: in fresh memory each page costs a
  fault.

`native.py` builds it; `vqgan.py` uses it.
"""

# Shapes: B batch, Y X height and width, N pixels of a chunk, C K channels in and out, G groups of
# channels.

from __future__ import annotations

import ctypes
import math
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from earlyfusion.kernels import native

_POINTS, _LANES = 36, 16  # points of a tile, floats of a vector
_CHUNK = 1 << 18  # elements summed at once: 1 MB fits into the processor's cache


class Swish(NamedTuple):
    """Applied before the convolution: silu(x * scale + shift), per picture and channel."""

    scale_BC: Tensor
    shift_BC: Tensor


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
            block = torch.empty(size)
        # Tensors that share storage all hold the same numpy array, so the memory is free when the
        # array dies. A finalizer on the tensor itself would run while a view still reads it.
        lent = block.numpy()[:size].reshape(shape)
        weakref.finalize(lent, self.give, block).atexit = False
        return torch.from_numpy(lent)

    def give(self, block: Tensor) -> None:
        self.free.append(block)


class _Thread(threading.local):
    left_out = False
    pool: _Pool | None = None


_thread = _Thread()


def available() -> bool:
    return _library() is not None


def is_left_out() -> bool:
    return _thread.left_out


@contextmanager
def left_out() -> Iterator[None]:
    """Within it, this thread uses torch's own operators and layout: for callers whose results must
    be rounded exactly as other code rounds them."""
    before, _thread.left_out = _thread.left_out, True
    try:
        yield
    finally:
        _thread.left_out = before


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
    return torch.empty(shape) if pool is None else pool.take(shape)


def conv3x3(
    x_BYXC: Tensor,
    weight_KC33: Tensor,
    bias_K: Tensor,
    before: Swish | None = None,
    plus_BYXK: Tensor | None = None,
    upsample: bool = False,
    in_place: bool = False,
) -> Tensor:
    """A convolution with a border of one pixel of zeros, [B, Y, X, K], in fp32. C must be a
    multiple of 16, height and width of the result of 4. `upsample` first doubles each pixel, so the
    result is [B, 2Y, 2X, K]; it excludes `before`. `plus` is added to the result. `in_place` writes
    the result over `x`, which needs C = K and no `upsample`."""
    library = _library()
    assert library is not None, "available() says whether this can be called"
    b, y, x, c = x_BYXC.shape
    y, x = (2 * y, 2 * x) if upsample else (y, x)
    k = len(weight_KC33)
    out_BYXK = x_BYXC if in_place else empty(b, y, x, k)
    inputs = (x_BYXC, weight_KC33, bias_K, plus_BYXK, *(before or (None, None)))
    kernel = empty(_POINTS * c * -(-k // _LANES) * _LANES)
    # Keeps copies alive until the call returns, as it only gets addresses.
    contiguous = [None if t is None else t.contiguous() for t in inputs]
    pointers = [None if t is None else t.data_ptr() for t in contiguous]
    sizes = (b, y, x, c, k, int(upsample), torch.get_num_threads())
    library.earlyfusion_conv3x3(*pointers, out_BYXK.data_ptr(), kernel.data_ptr(), *sizes)
    return out_BYXK


def swish_after(norm: nn.GroupNorm, x_BYXC: Tensor) -> Swish:
    """A group norm and swish as one factor and one term per picture and channel."""
    b, c, g = len(x_BYXC), x_BYXC.shape[3], norm.num_groups
    sums_2BC = x_BYXC.new_zeros(2, b, c, dtype=torch.float64)
    for chunk_BNC in x_BYXC.view(b, -1, c).split(max(1, _CHUNK // (b * c)), 1):
        sums_2BC[0] += chunk_BNC.sum(1)
        sums_2BC[1] += chunk_BNC.square().sum(1)
    mean_BG, square_BG = sums_2BC.view(2, b, g, -1).sum(3) / (x_BYXC[0].numel() // g)
    # Mean square minus squared mean: cancellation does no harm in fp64.
    scale_BG = (square_BG - mean_BG.square()).clamp_min(0).add(norm.eps).rsqrt()
    scale_BC, mean_BC = (t.repeat_interleave(c // g, 1) for t in (scale_BG, mean_BG))
    scale_BC = scale_BC * norm.weight
    return Swish(scale_BC.to(x_BYXC.dtype), (norm.bias - mean_BC * scale_BC).to(x_BYXC.dtype))


@cache
def _library() -> ctypes.CDLL | None:
    library = native.load(Path(__file__).with_name("conv.cpp"))
    if library is not None:
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        library.earlyfusion_conv3x3.argtypes = [pointer] * 8 + [number] * 7
        library.earlyfusion_conv3x3.restype = None
    return library
