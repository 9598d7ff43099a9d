"""Logits from the rows of the head that belong to some ids."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from earlyfusion.engine.backends.interface import Product


def head_product(head: nn.Module, ids_V: Tensor, product: Callable[[Tensor], Product]) -> Product:
    """States [R, D] -> logits [R, V] of these ids; `product` makes a product of a weight [V, D]."""
    first, last = int(ids_V[0]), int(ids_V[-1])
    adjacent = last - first + 1 == len(ids_V)
    # A slice is a view of the weight, an index a copy.
    rows = slice(first, last + 1) if adjacent else ids_V
    if type(head) is nn.Linear:
        return product(head.weight[rows].detach())
    # Packed, or with an adapter: only calling the head gives its logits.
    dtype = _dtype(head)
    return lambda x_RD: head(x_RD.to(dtype))[:, rows]


def whole_logits(head: nn.Module, x_RD: Tensor) -> Tensor:
    """Logits [R, V] in fp32 of the whole vocabulary."""
    logits_RV: Tensor = head(x_RD.to(_dtype(head)))
    return logits_RV.float()


def _dtype(head: nn.Module) -> torch.dtype:
    weight: Any = head.weight
    dtype: torch.dtype = weight.dtype
    return dtype
