"""The element-wise operations between the products of a layer, a kernel for each: residual sum with
RMSNorm; SwiGLU."""

# Shapes: R rows, D model width, F inner width of the feed-forward.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ENTRIES = 1024
"""Outputs of SwiGLU that one program computes."""


def add_norm(x_RD: Tensor, y_RD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As `kernels/decode.py` defines it."""
    x_RD, y_RD = x_RD.contiguous(), y_RD.contiguous()
    total_RD, normed_RD = torch.empty_like(x_RD), torch.empty_like(x_RD)
    rows, width = x_RD.shape
    _add_norm[rows,](
        x_RD,
        y_RD,
        weight_D,
        total_RD,
        normed_RD,
        eps,
        WIDTH=width,
        PADDED=triton.next_power_of_2(width),
        num_warps=8,
    )
    return total_RD, normed_RD


def gated(gate_up_RF: Tensor) -> Tensor:
    """As `kernels/decode.py` defines it."""
    gate_up_RF = gate_up_RF.contiguous()
    rows, width = gate_up_RF.shape[0], gate_up_RF.shape[1] // 2
    out = torch.empty(rows, width, dtype=gate_up_RF.dtype, device=gate_up_RF.device)
    grid = (rows, triton.cdiv(width, ENTRIES))
    _gated[grid](gate_up_RF, out, width, BLOCK=ENTRIES, num_warps=4)
    return out


@triton.jit
def _add_norm(x, y, weight, total, normed, eps, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    d = tl.arange(0, PADDED)
    inside = d < WIDTH
    at = tl.program_id(0).to(tl.int64) * WIDTH + d
    z = tl.load(x + at, mask=inside, other=0).to(tl.float32)
    z += tl.load(y + at, mask=inside, other=0).to(tl.float32)
    # The sum is rounded before it is normed, as if the two were computed one after the other.
    rounded = z.to(total.dtype.element_ty)
    tl.store(total + at, rounded, mask=inside)
    z = rounded.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(z * z, 0) / WIDTH + eps)
    w = tl.load(weight + d, mask=inside, other=0).to(tl.float32)
    tl.store(normed + at, (z * inverse * w).to(normed.dtype.element_ty), mask=inside)


@triton.jit
def _gated(gate_up, out, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    gate = tl.load(gate_up + row * 2 * width + at, mask=inside, other=0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + at, mask=inside, other=0).to(tl.float32)
    y = gate * tl.sigmoid(gate) * up
    tl.store(out + row * width + at, y.to(out.dtype.element_ty), mask=inside)
