"""Which code computes the operations of a decode step: Triton's kernels or their definitions."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from earlyfusion.kernels import decode
from earlyfusion.kernels.decode import Angles, HeadNorms, LayerBlocks
from earlyfusion.model.quantise import PackedMatrix


class Operations(NamedTuple):
    """One way to compute each operation of `kernels/decode.py`."""

    attend: Callable[[Tensor, LayerBlocks, Tensor, Tensor], Tensor]
    norm_rotate_store: Callable[[Tensor, HeadNorms, Angles, Tensor, LayerBlocks, Tensor], Tensor]
    product: Callable[[Tensor, PackedMatrix], Tensor]
    add_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    gated: Callable[[Tensor], Tensor]


def operations(device: torch.device) -> Operations:
    """Triton's kernels on a CUDA device with Triton installed, else the definitions."""
    if device.type == "cuda" and find_spec("triton") is not None:
        return triton_operations()
    return Operations(
        decode.attend,
        decode.norm_rotate_store,
        decode.product,
        decode.add_norm,
        decode.gated,
    )


def triton_operations() -> Operations:
    """The kernels on any device: Triton's interpreter runs them on CPU tensors."""
    from earlyfusion.kernels.triton import attention, heads, norms, products

    return Operations(
        attention.attend,
        heads.norm_rotate_store,
        products.product,
        norms.add_norm,
        norms.gated,
    )
