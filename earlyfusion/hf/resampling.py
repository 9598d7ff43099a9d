"""Pillow's resampling of 8-bit images in torch, on any device and equal to the bit.

Pillow resizes along one axis, rounds to 8 bits, and resizes along the other. A new pixel is a
weighted sum of old ones. Its weights are a filter stretched to the scale, normalised to 1 and
rounded to multiples of 2 ** -22, so all arithmetic is on 32-bit integers and the same on any
device.
"""

# Shapes: n images, C channels, Y X height and width in pixels.

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import PIL.Image
import torch
from PIL.Image import Resampling
from torch import Tensor

from earlyfusion.errors import SettingError

_BITS = 22


def resized(
    pixels_nCYX: Tensor,
    size: tuple[int, int],
    resample: int = Resampling.LANCZOS,
    window: tuple[range, range] | None = None,
) -> Tensor:
    """uint8 [n, C, Y, X] resized to `size` (height, width), as by `PIL.Image.resize`. `window`: the
    rows and columns of the result to compute (default: all). Raises `SettingError` for an unknown
    filter."""
    rows, columns = window or (range(size[0]), range(size[1]))
    if resample != Resampling.NEAREST and resample not in _FILTERS:
        raise SettingError(
            f"resample={resample} is not a known filter: choose NEAREST, BOX, BILINEAR, HAMMING, "
            "BICUBIC or LANCZOS of PIL.Image.Resampling"
        )
    height, width = pixels_nCYX.shape[-2:]
    steps = [(-1, size[1], columns), (-2, size[0], rows)]
    if _resizes_rows_first() and height > size[0] and height - size[0] > 2 * (width - size[1]):
        steps.reverse()
    for axis, length, window_range in steps:
        pixels_nCYX = _resize_axis(pixels_nCYX, axis, length, window_range, int(resample))
    return pixels_nCYX


@lru_cache(maxsize=1)
def _resizes_rows_first() -> bool:
    """Whether the installed Pillow resizes along y first if that saves work, as new versions do."""
    # The order changes the last bits of a small image.
    probe = np.random.default_rng(0).integers(0, 256, (32, 16), dtype=np.uint8)
    by_pillow = np.asarray(PIL.Image.fromarray(probe).resize((15, 8), Resampling.LANCZOS))
    pixels = torch.from_numpy(probe)
    for axis, length in ((-2, 8), (-1, 15)):
        pixels = _resize_axis(pixels, axis, length, range(length), Resampling.LANCZOS)
    return bool((pixels.numpy() == by_pillow).all())


def _resize_axis(
    pixels: Tensor, axis: int, size: int, window_range: range, resample: int
) -> Tensor:
    """uint8 pixels with `axis` resized to `size`; only positions in `window_range` are computed."""
    # With the axis in front whole rows are copied, which is the fastest way through memory.
    lines = pixels.movedim(axis, 0)
    length = len(lines)
    if size == length:
        return lines[window_range.start : window_range.stop].movedim(0, axis)
    lines, shape = lines.reshape(length, -1), lines.shape[1:]
    if resample == Resampling.NEAREST:
        read = torch.tensor(_nearest(length, size), device=pixels.device)
        result = lines[read[window_range.start : window_range.stop]]
    else:
        result = _weighted_sum(lines.int(), *_weights(length, size, window_range, resample))
    return result.unflatten(-1, shape).movedim(0, axis)


def _weighted_sum(lines: Tensor, starts: Tensor, weights: Tensor) -> Tensor:
    starts, weights = starts.to(lines.device), weights.to(lines.device)
    shape = (len(starts), lines.shape[1])
    # Half of the last bit is added first, so that the shift rounds to nearest.
    sums = torch.full(shape, 1 << (_BITS - 1), dtype=torch.int32, device=lines.device)
    for tap in range(weights.shape[1]):
        # A tap past the edge has weight 0, so it may read any pixel.
        read = (starts + tap).clamp(max=len(lines) - 1)
        sums.addcmul_(lines.index_select(0, read), weights[:, tap, None])
    return (sums >> _BITS).clamp_(0, 255).to(torch.uint8)


def _nearest(length: int, size: int) -> list[int]:
    """The old pixel for each new one."""
    step, at, read = length / size, 0.5 * length / size, []
    for _ in range(size):
        read.append(min(int(at), length - 1))
        at += step  # a running sum, as in Pillow: a product would round differently
    return read


@lru_cache(maxsize=32)
def _weights(length: int, size: int, window_range: range, resample: int) -> tuple[Tensor, Tensor]:
    """First pixel read [x] and integer weights [x, tap] of each wanted position."""
    shape, support = _FILTERS[resample]
    scale = length / size
    stretch = max(scale, 1.0)
    rows = [
        _row(shape, (x + 0.5) * scale, support * stretch, stretch, length) for x in window_range
    ]
    taps = max(len(row) for _, row in rows)
    starts = torch.tensor([start for start, _ in rows])
    padded = [row + [0] * (taps - len(row)) for _, row in rows]
    return starts, torch.tensor(padded, dtype=torch.int32)


def _row(
    shape: Callable[[float], float], centre: float, support: float, stretch: float, length: int
) -> tuple[int, list[int]]:
    start = max(int(centre - support + 0.5), 0)
    stop = min(int(centre + support + 0.5), length)
    # Term by term in Pillow's order: any other would round differently.
    reciprocal = 1.0 / stretch
    values = [shape((x - centre + 0.5) * reciprocal) for x in range(start, stop)]
    total = 0.0
    for value in values:
        total += value
    shares = [value / total if total else value for value in values]
    return start, [int(share * (1 << _BITS) + math.copysign(0.5, share)) for share in shares]


def _sinc(x: float) -> float:
    return math.sin(x * math.pi) / (x * math.pi) if x else 1.0


def _lanczos(x: float) -> float:
    return _sinc(x) * _sinc(x / 3) if -3 <= x < 3 else 0.0


def _bicubic(x: float) -> float:
    a, x = -0.5, abs(x)
    if x < 1:
        return ((a + 2.0) * x - (a + 3.0)) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * a if x < 2 else 0.0


def _hamming(x: float) -> float:
    x = abs(x)
    if x >= 1:
        return 0.0
    return _sinc(x) * (0.54 + 0.46 * math.cos(x * math.pi))


_FILTERS: dict[int, tuple[Callable[[float], float], float]] = {
    Resampling.BOX: (lambda x: 1.0 if -0.5 < x <= 0.5 else 0.0, 0.5),
    Resampling.BILINEAR: (lambda x: max(1.0 - abs(x), 0.0), 1.0),
    Resampling.HAMMING: (_hamming, 1.0),
    Resampling.BICUBIC: (_bicubic, 2.0),
    Resampling.LANCZOS: (_lanczos, 3.0),
}
