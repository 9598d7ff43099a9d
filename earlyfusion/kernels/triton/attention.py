"""Attention of one token per row over the paged cache, in two Triton kernels.

The first has one program per row, key head and stretch of `KEYS` keys; the second joins the
stretches of a row. A row's stretches depend only on its own length, so its sums have the same order
whatever the other rows are. Grids do not depend on values, so the kernels can be captured.
"""

# Shapes: R rows, N query heads, K key and value heads, G = N / K, H head width, B blocks, T tokens
# of a block, W blocks of a table, S stretches.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from earlyfusion.kernels.decode import LayerBlocks
from earlyfusion.kernels.triton.dot import dot

KEYS = 256
"""Keys of a stretch."""
TILE = 32
"""Keys that a program loads at once."""


def attend(q_RNH: Tensor, blocks: LayerBlocks, table_RW: Tensor, lengths_R: Tensor) -> Tensor:
    """As `kernels/decode.py` defines it."""
    kv, scales = blocks
    rows, heads, width = q_RNH.shape
    keys, size = kv.shape[2], kv.shape[3]
    stretches = triton.cdiv(table_RW.shape[1] * size, KEYS)
    parts = torch.empty(rows, heads, stretches, width, dtype=torch.float32, device=q_RNH.device)
    peaks = torch.empty(rows, heads, stretches, dtype=torch.float32, device=q_RNH.device)
    totals = torch.empty_like(peaks)
    q_RNH = q_RNH.contiguous()
    # One query multiplies and adds; several share a matrix product, whose sides are at least 16.
    group, padded = heads // keys, max(16, triton.next_power_of_2(width))
    kernel = _single if group == 1 else _grouped
    shape = {} if group == 1 else {"QUERIES": max(16, triton.next_power_of_2(group))}
    kernel[rows, keys, stretches](
        q_RNH,
        kv,
        peaks if scales is None else scales,
        table_RW,
        lengths_R,
        parts,
        peaks,
        totals,
        width**-0.5,
        table_RW.stride(0),
        *kv.stride()[:4],
        *((0, 0, 0) if scales is None else scales.stride()[:3]),
        GROUP=group,
        WIDTH=width,
        PADDED=padded,
        BLOCK=size,
        STRETCH=KEYS,
        TILE_KEYS=TILE,
        SCALED=scales is not None,
        **shape,
        num_warps=4,
    )
    out_RNH = torch.empty_like(q_RNH)
    _join[rows, heads](
        parts,
        peaks,
        totals,
        lengths_R,
        out_RNH,
        stretches,
        WIDTH=width,
        PADDED=padded,
        STRETCH=KEYS,
        STRETCHES=triton.next_power_of_2(stretches),
        num_warps=4,
    )
    return out_RNH


@triton.jit
def _places(table, row, table_stride, at, valid, block_stride, token_stride, BLOCK: tl.constexpr):
    """The offsets in the cache, for head 0, of the tokens at these positions; in 64 bits."""
    number = tl.load(table + row.to(tl.int64) * table_stride + at // BLOCK, mask=valid, other=0)
    return number.to(tl.int64) * block_stride + (at % BLOCK).to(tl.int64) * token_stride


@triton.jit
def _single(
    q,
    kv,
    scales,
    table,
    lengths,
    parts,
    peaks,
    totals,
    factor,
    table_stride,
    block_stride,
    kind_stride,
    head_stride,
    token_stride,
    scale_block_stride,
    scale_kind_stride,
    scale_head_stride,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    STRETCH: tl.constexpr,
    TILE_KEYS: tl.constexpr,
    SCALED: tl.constexpr,
):
    """One query per key head. Each position of the tile keeps a separate softmax until the end, so
    that threads only communicate to sum over a head's width."""
    row, head, stretch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + row)
    first = stretch * STRETCH
    if first >= length:
        return
    last = tl.minimum(first + STRETCH, length)
    h = tl.arange(0, PADDED)
    inside = h < WIDTH
    query = row * tl.num_programs(1) + head
    x = tl.load(q + query * WIDTH + h, mask=inside, other=0).to(tl.float32) * factor
    keys = kv + head.to(tl.int64) * head_stride
    peak = tl.full((TILE_KEYS,), float("-inf"), tl.float32)
    total = tl.zeros((TILE_KEYS,), tl.float32)
    out = tl.zeros((TILE_KEYS, PADDED), tl.float32)
    for tile in range(0, STRETCH, TILE_KEYS):
        if first + tile < last:
            at = first + tile + tl.arange(0, TILE_KEYS)
            valid = at < last
            place = _places(table, row, table_stride, at, valid, block_stride, token_stride, BLOCK)
            mask = valid[:, None] & inside[None, :]
            pointers = keys + place[:, None] + h[None, :]
            k = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
            v = tl.load(pointers + kind_stride, mask=mask, other=0.0).to(tl.float32)
            score = tl.sum(k * x[None, :], 1)
            weight = tl.full((TILE_KEYS,), 1.0, tl.float32)
            if SCALED:
                where = _places(table, row, table_stride, at, valid, scale_block_stride, 1, BLOCK)
                where += head.to(tl.int64) * scale_head_stride
                score *= tl.load(scales + where, mask=valid, other=0)
                weight = tl.load(scales + where + scale_kind_stride, mask=valid, other=0)
            score = tl.where(valid, score, float("-inf"))
            higher = tl.maximum(peak, score)
            # A position that has seen no key yet has the peak -inf, and -inf minus -inf is NaN.
            safe = tl.where(higher == float("-inf"), 0.0, higher)
            shrink = tl.exp(peak - safe)
            share = tl.exp(score - safe)
            total = total * shrink + share
            out = out * shrink[:, None] + (share * weight)[:, None] * v
            peak = higher
    top = tl.max(peak, 0)
    shrink = tl.exp(peak - top)
    part = query * tl.num_programs(2) + stretch
    tl.store(peaks + part, top)
    tl.store(totals + part, tl.sum(total * shrink, 0))
    # Not divided by the total yet: `_join` does so once, for all stretches.
    out_h = tl.sum(out * shrink[:, None], 0)
    tl.store(parts + part.to(tl.int64) * WIDTH + h, out_h, mask=inside)


@triton.jit
def _grouped(
    q,
    kv,
    scales,
    table,
    lengths,
    parts,
    peaks,
    totals,
    factor,
    table_stride,
    block_stride,
    kind_stride,
    head_stride,
    token_stride,
    scale_block_stride,
    scale_kind_stride,
    scale_head_stride,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    STRETCH: tl.constexpr,
    TILE_KEYS: tl.constexpr,
    SCALED: tl.constexpr,
    QUERIES: tl.constexpr,
):
    """Several queries per key head, as rows of a matrix product in the queries' dtype."""
    row, head, stretch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + row)
    first = stretch * STRETCH
    if first >= length:
        return
    last = tl.minimum(first + STRETCH, length)
    h = tl.arange(0, PADDED)
    g = tl.arange(0, QUERIES)
    inside = h < WIDTH
    query = (row * tl.num_programs(1) + head) * GROUP + g
    mask_q = (g < GROUP)[:, None] & inside[None, :]
    x = tl.load(q + query[:, None] * WIDTH + h[None, :], mask=mask_q, other=0)
    keys = kv + head.to(tl.int64) * head_stride
    peak = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    out = tl.zeros((QUERIES, PADDED), tl.float32)
    for tile in range(0, STRETCH, TILE_KEYS):
        if first + tile < last:
            at = first + tile + tl.arange(0, TILE_KEYS)
            valid = at < last
            place = _places(table, row, table_stride, at, valid, block_stride, token_stride, BLOCK)
            mask = valid[:, None] & inside[None, :]
            pointers = keys + place[:, None] + h[None, :]
            # Levels of int8 and numbers of fp8 are exact in every dtype of a query.
            k = tl.load(pointers, mask=mask, other=0.0).to(tl.float32).to(x.dtype)
            v = tl.load(pointers + kind_stride, mask=mask, other=0.0).to(tl.float32).to(x.dtype)
            score = dot(x, tl.trans(k), tl.zeros((QUERIES, TILE_KEYS), tl.float32)) * factor
            if SCALED:
                where = _places(table, row, table_stride, at, valid, scale_block_stride, 1, BLOCK)
                where += head.to(tl.int64) * scale_head_stride
                score *= tl.load(scales + where, mask=valid, other=0)[None, :]
            score = tl.where(valid[None, :], score, float("-inf"))
            higher = tl.maximum(peak, tl.max(score, 1))
            shrink = tl.exp(peak - higher)
            share = tl.exp(score - higher[:, None])
            total = total * shrink + tl.sum(share, 1)
            if SCALED:
                # The values' scales come after the sum of shares, which must not contain them.
                share *= tl.load(scales + where + scale_kind_stride, mask=valid, other=0)[None, :]
            out = dot(share.to(x.dtype), v, out * shrink[:, None])
            peak = higher
    part = query * tl.num_programs(2) + stretch
    tl.store(peaks + part, peak, mask=g < GROUP)
    tl.store(totals + part, total, mask=g < GROUP)
    tl.store(parts + part.to(tl.int64)[:, None] * WIDTH + h[None, :], out, mask=mask_q)


@triton.jit
def _join(
    parts,
    peaks,
    totals,
    lengths,
    out,
    stretches,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    STRETCH: tl.constexpr,
    STRETCHES: tl.constexpr,
):
    """Joins those stretches of one query that hold keys into one output."""
    row = tl.program_id(0)
    query = row * tl.num_programs(1) + tl.program_id(1)
    h, s = tl.arange(0, PADDED), tl.arange(0, STRETCHES)
    inside, held = h < WIDTH, s * STRETCH < tl.load(lengths + row)
    part = query.to(tl.int64) * stretches + s
    peak = tl.load(peaks + part, mask=held, other=float("-inf"))
    shrink = tl.exp(peak - tl.max(peak, 0))
    total = tl.sum(shrink * tl.load(totals + part, mask=held, other=0), 0)
    mask = held[:, None] & inside[None, :]
    y = tl.load(parts + part[:, None] * WIDTH + h[None, :], mask=mask, other=0)
    y = tl.sum(y * shrink[:, None], 0) / total
    tl.store(out + query.to(tl.int64) * WIDTH + h, y.to(out.dtype.element_ty), mask=inside)
