"""How near results must be to each other, by the device that they were computed on.

A test states the tolerance of a CPU. A GPU adds in other orders, and takes another kernel for
another number of rows, so that what is equal to the bit on a CPU need not be there.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

TIMES = {"cpu": 1.0, "cuda": 10.0}
"""What tolerances are multiplied by."""
SAME = {"cpu": 0.0, "cuda": 1e-5}
"""How far `assert_same` lets results be apart, as a part of the largest."""


def assert_close(
    actual: Tensor, expected: Tensor, atol: float = 1e-5, rtol: float = 1.3e-6
) -> None:
    """`torch.testing.assert_close` with the tolerance of a CPU, wherever `expected` is."""
    times = TIMES[actual.device.type]
    torch.testing.assert_close(
        actual, expected.to(actual.device), atol=atol * times, rtol=rtol * times
    )


def assert_below(gap: Tensor, limit: float) -> None:
    """No entry of `gap`, computed on its device, reaches the limit of a CPU."""
    assert float(gap.max()) < limit * TIMES[gap.device.type]


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Equal to the bit on a CPU; integers are equal everywhere."""
    share = SAME[actual.device.type]
    if not share or not actual.is_floating_point():
        assert torch.equal(actual, expected)
    else:
        gap = (actual - expected).abs().max()
        assert gap <= share * expected.abs().max().clamp_min(1.0)


def array(tensor: Tensor) -> np.ndarray:
    """Values for numpy, from any device."""
    return tensor.detach().cpu().numpy()
