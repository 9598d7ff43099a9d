"""x W^T for few rows of x, with packed weights (int8, int4) or dense ones, which are read once."""

# Shapes: R rows, O x I a weight.

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from earlyfusion.kernels.triton.dot import dot
from earlyfusion.model.quantise import PackedMatrix


class Tile(NamedTuple):
    """What a program multiplies: `outs` rows of the weight, `columns` (at 4 bits: bytes) at a time,
    with `stages` loads in flight."""

    outs: int
    columns: int
    stages: int


TILES = {
    32: Tile(32, 64, 3),  # for tests only
    16: Tile(32, 128, 4),
    8: Tile(32, 256, 4),
    4: Tile(32, 256, 4),
}
"""By bits of a weight."""


def product(x_RI: Tensor, matrix: PackedMatrix) -> Tensor:
    """As `kernels/decode.py` defines it; at 16 and 32 bits the dense product."""
    x_RI = x_RI.contiguous()
    rows, tile = x_RI.shape[0], TILES[matrix.bits]
    block_rows = min(64, max(16, triton.next_power_of_2(rows)))
    # Many rows need space for their inputs, and registers for their sums.
    columns, warps = (tile.columns, 4) if block_rows == 16 else (tile.columns // 2, 8)
    out_RO = torch.empty(rows, matrix.rows, dtype=x_RI.dtype, device=x_RI.device)
    # Compile-time constants: a model has few different shapes.
    shape = {
        "WIDTH": matrix.columns,
        "STRIDE": matrix.data.shape[1],
        "ROWS": block_rows,
        "OUTS": tile.outs,
        "COLUMNS": columns,
    }
    grid = (triton.cdiv(matrix.rows, tile.outs), triton.cdiv(rows, block_rows))
    scales = matrix.data if matrix.scales is None else matrix.scales
    tensors = (x_RI, matrix.data, scales, out_RO)
    launch = {"num_warps": warps, "num_stages": tile.stages}
    if matrix.bits == 4:
        _int4[grid](*tensors, rows, matrix.rows, **shape, **launch)
    else:
        _by_row[grid](*tensors, rows, matrix.rows, SCALED=matrix.bits == 8, **shape, **launch)
    return out_RO


@triton.jit
def _by_row(
    x,
    data,
    scales,
    out,
    rows,
    outs,
    WIDTH: tl.constexpr,
    STRIDE: tl.constexpr,
    SCALED: tl.constexpr,
    ROWS: tl.constexpr,
    OUTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Dense weights, or int8 with a scale per row."""
    o = tl.program_id(0) * OUTS + tl.arange(0, OUTS)
    r = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    in_o, in_r = o < outs, r < rows
    weights = data + o.to(tl.int64)[:, None] * STRIDE
    inputs = x + r.to(tl.int64)[:, None] * WIDTH
    total = tl.zeros((ROWS, OUTS), tl.float32)
    for start in range(0, WIDTH, COLUMNS):
        i = start + tl.arange(0, COLUMNS)
        in_i = i < WIDTH
        w = tl.load(weights + i[None, :], mask=in_o[:, None] & in_i[None, :], other=0)
        a = tl.load(inputs + i[None, :], mask=in_r[:, None] & in_i[None, :], other=0)
        total = dot(a, tl.trans(w.to(tl.float32).to(a.dtype)), total)
    if SCALED:
        total *= tl.load(scales + o, mask=in_o, other=0)[None, :]
    pointers = out + r.to(tl.int64)[:, None] * outs + o[None, :]
    tl.store(pointers, total.to(out.dtype.element_ty), mask=in_r[:, None] & in_o[None, :])


@triton.jit
def _int4(
    x,
    data,
    scales,
    out,
    rows,
    outs,
    WIDTH: tl.constexpr,
    STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    OUTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """32 bytes hold 64 columns, the first 32 in the low nibbles; each 32 columns have a scale."""
    o = tl.program_id(0) * OUTS + tl.arange(0, OUTS)
    r = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    in_o, in_r = o < outs, r < rows
    g, j = tl.arange(0, COLUMNS // 32), tl.arange(0, 32)
    weights = data + o.to(tl.int64)[:, None] * STRIDE
    row_scales = scales + o.to(tl.int64)[:, None] * (STRIDE // 16)
    inputs = x + r.to(tl.int64)[:, None] * WIDTH
    total = tl.zeros((ROWS, OUTS), tl.float32)
    for start in range(0, STRIDE, COLUMNS):
        byte = start + tl.arange(0, COLUMNS)
        both = tl.load(weights + byte, mask=in_o[:, None] & (byte < STRIDE)[None, :], other=0)
        # Each 32 bytes have two scales: that of the low nibbles, then that of the high ones.
        half = start // 16 + tl.arange(0, COLUMNS // 16)
        scale = tl.load(
            row_scales + half, mask=in_o[:, None] & (half < STRIDE // 16)[None, :], other=0
        )
        scale_low, scale_high = tl.split(tl.reshape(scale, (OUTS, COLUMNS // 32, 2)))
        both = tl.reshape(both, (OUTS, COLUMNS // 32, 32))
        group = start // 32 + g
        low = tl.reshape((group * 64)[:, None] + j[None, :], (COLUMNS,))
        high = low + 32
        x_low = tl.load(inputs + low[None, :], mask=in_r[:, None] & (low < WIDTH)[None, :], other=0)
        x_high = tl.load(
            inputs + high[None, :], mask=in_r[:, None] & (high < WIDTH)[None, :], other=0
        )
        w_low = tl.reshape(_rounded(both & 15, scale_low, x_low.dtype), (OUTS, COLUMNS))
        w_high = tl.reshape(_rounded(both >> 4, scale_high, x_low.dtype), (OUTS, COLUMNS))
        total = dot(x_low, tl.trans(w_low), total)
        total = dot(x_high, tl.trans(w_high), total)
    pointers = out + r.to(tl.int64)[:, None] * outs + o[None, :]
    tl.store(pointers, total.to(out.dtype.element_ty), mask=in_r[:, None] & in_o[None, :])


@triton.jit
def _rounded(nibbles, scale, dtype: tl.constexpr):
    """int4 weights in a dtype, rounded once; one scale per run of the last dimension."""
    level = nibbles.to(tl.float32) - 8
    return (level * scale.to(tl.float32)[:, :, None]).to(dtype)
