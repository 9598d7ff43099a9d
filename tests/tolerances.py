"""How near results must be to each other, by the device that they were computed on.

A test states the tolerance of a CPU. A GPU adds in other orders, and takes another kernel for
another number of rows, so that what is equal to the bit on a CPU need not be there.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

TIMES_ON_GPU = 10.0
"""What the tolerance of a CPU is multiplied by."""
SAME_ON_GPU = 1e-5
"""How far apart, as a part of the largest, `assert_same` lets what is equal to the bit on a CPU."""


def tolerance(on_cpu: float, device: torch.device) -> float:
    return on_cpu if device.type == "cpu" else on_cpu * TIMES_ON_GPU


def assert_close(
    actual: Tensor, expected: Tensor, atol: float = 1e-5, rtol: float = 1.3e-6
) -> None:
    """`torch.testing.assert_close` with the tolerances of a CPU, wherever `expected` is."""
    atol, rtol = (tolerance(limit, actual.device) for limit in (atol, rtol))
    torch.testing.assert_close(actual, expected.to(actual.device), atol=atol, rtol=rtol)


def assert_below(gap: Tensor, limit: float) -> None:
    """No entry of `gap` reaches the limit of a CPU."""
    assert float(gap.max()) < tolerance(limit, gap.device)


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Equal to the bit on a CPU; integers are equal everywhere."""
    if actual.device.type == "cpu" or not actual.is_floating_point():
        assert torch.equal(actual, expected)
        return
    gap = (actual - expected).abs().max()
    assert gap <= SAME_ON_GPU * expected.abs().max().clamp_min(1.0)


def assert_same_losses(
    found: list[float], expected: list[float], device: torch.device, rel: float = 1e-2
) -> None:
    """Losses of two runs: equal to the bit on a CPU; a GPU adds gradients in no fixed order."""
    assert len(found) == len(expected)
    assert found == (expected if device.type == "cpu" else pytest.approx(expected, rel=rel))


def array(tensor: Tensor) -> np.ndarray[Any, Any]:
    """The values for numpy, from any device."""
    return tensor.detach().cpu().numpy()
