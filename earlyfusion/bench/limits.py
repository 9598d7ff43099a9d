"""The most that a device can do: bytes and operations per second, measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from earlyfusion.bench.harness import seconds

_SETS = 3
"""Inputs used in turn, so that none is still in the device's cache."""


@dataclass(frozen=True)
class Limits:
    """Per second: `copy` counts bytes read and written, `read` bytes read; `products` are
    operations of bf16 matrix products."""

    copy: float
    read: float
    products: float

    def milliseconds(self, num_bytes: float, operations: float = 0.0) -> float:
        """The shortest time to copy `num_bytes` and to multiply, whichever takes longer."""
        return 1e3 * max(num_bytes / self.copy, operations / self.products)


def measure_limits(device: torch.device, small: bool = False) -> Limits:
    """Measure the limits, each as the best of several trials. A GPU needs 5 GB for them. `small`
    inputs need little memory, but stay in a cache, so that the limits are not the machine's."""
    size, side = (2**30, 8192) if device.type == "cuda" else (2**28, 512)
    if small:
        size, side = 2**20, 64
    source = [torch.ones(size // 4, device=device) for _ in range(_SETS)]
    target = torch.empty_like(source[0])
    # Products of zeros or ones take less power, and so run faster than those of a model.
    factors = [torch.randn(side, side, device=device).bfloat16() for _ in range(2 * _SETS)]
    out = torch.empty_like(factors[0])

    def multiply(index: int) -> Tensor:
        return torch.mm(factors[2 * index], factors[2 * index + 1], out=out)

    return Limits(
        copy=2 * size / _fastest(lambda index: target.copy_(source[index]), device),
        read=size / _fastest(lambda index: source[index].sum(), device),
        products=2 * side**3 / _fastest(multiply, device),
    )


def _fastest(call: Callable[[int], Tensor], device: torch.device, calls: int = 4) -> float:
    """Seconds of one call: the best of several runs of `calls` of them."""

    def run() -> None:
        for number in range(calls):
            call(number % _SETS)

    run()
    return min(seconds(run, device) for _ in range(5)) / calls
