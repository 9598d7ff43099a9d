"""Attention of one token per row over the paged cache, in two Triton kernels (flash-decoding).

The first has one program per row, key head and split of KEYS_PER_SPLIT keys; the second combines
the splits of a row. A row's splits depend only on its own length, so its sums have the same order
whatever the other rows are. Grids do not depend on values, so the kernels can be captured.
"""

# Shapes: R rows, N query heads, K key and value heads, G = N / K, H head width, B blocks, T tokens
# of a block, W blocks of a table, S splits.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from earlyfusion.kernels.decode import LayerBlocks
from earlyfusion.kernels.triton.dot import dot

KEYS_PER_SPLIT = 256
TILE = 32
"""Keys that a program loads at once."""


def attend(q_RNH: Tensor, blocks: LayerBlocks, table_RW: Tensor, lengths_R: Tensor) -> Tensor:
    """As `kernels/decode.py` defines it."""
    kv, scales = blocks
    rows, heads, width = q_RNH.shape
    keys, size = kv.shape[2], kv.shape[3]
    splits = triton.cdiv(table_RW.shape[1] * size, KEYS_PER_SPLIT)
    partials = torch.empty(rows, heads, splits, width, dtype=torch.float32, device=q_RNH.device)
    maxima = torch.empty(rows, heads, splits, dtype=torch.float32, device=q_RNH.device)
    sums = torch.empty_like(maxima)
    q_RNH = q_RNH.contiguous()
    # One query multiplies and adds; several share a matrix product, whose sides are at least 16.
    group, padded = heads // keys, max(16, triton.next_power_of_2(width))
    kernel = _single if group == 1 else _grouped
    shape = {} if group == 1 else {"QUERIES": max(16, triton.next_power_of_2(group))}
    kernel[rows, keys, splits](
        q_RNH,
        kv,
        maxima if scales is None else scales,
        table_RW,
        lengths_R,
        partials,
        maxima,
        sums,
        width**-0.5,
        table_RW.stride(0),
        *kv.stride()[:4],
        *((0, 0, 0) if scales is None else scales.stride()[:3]),
        GROUP=group,
        WIDTH=width,
        PADDED=padded,
        BLOCK=size,
        SPLIT=KEYS_PER_SPLIT,
        TILE_KEYS=TILE,
        SCALED=scales is not None,
        **shape,
        num_warps=4,
    )
    out_RNH = torch.empty_like(q_RNH)
    _combine[rows, heads](
        partials,
        maxima,
        sums,
        lengths_R,
        out_RNH,
        splits,
        WIDTH=width,
        PADDED=padded,
        SPLIT=KEYS_PER_SPLIT,
        SPLITS=triton.next_power_of_2(splits),
        num_warps=4,
    )
    return out_RNH


@triton.jit
def _offsets(table, row, table_stride, at, valid, block_stride, token_stride, BLOCK: tl.constexpr):
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
    partials,
    maxima,
    sums,
    factor,
    table_stride,
    block_stride,
    kv_stride,
    head_stride,
    token_stride,
    scale_block_stride,
    scale_kv_stride,
    scale_head_stride,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLIT: tl.constexpr,
    TILE_KEYS: tl.constexpr,
    SCALED: tl.constexpr,
):
    """One query per key head. Each position of the tile keeps a separate softmax until the end, so
    that threads only communicate to sum over a head's width."""
    row, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + row)
    first = split * SPLIT
    if first >= length:
        return
    last = tl.minimum(first + SPLIT, length)
    h = tl.arange(0, PADDED)
    inside = h < WIDTH
    query = row * tl.num_programs(1) + head
    x = tl.load(q + query * WIDTH + h, mask=inside, other=0).to(tl.float32) * factor
    keys = kv + head.to(tl.int64) * head_stride
    running_max = tl.full((TILE_KEYS,), float("-inf"), tl.float32)
    running_sum = tl.zeros((TILE_KEYS,), tl.float32)
    out = tl.zeros((TILE_KEYS, PADDED), tl.float32)
    for tile in range(0, SPLIT, TILE_KEYS):
        if first + tile < last:
            at = first + tile + tl.arange(0, TILE_KEYS)
            valid = at < last
            offsets = _offsets(
                table, row, table_stride, at, valid, block_stride, token_stride, BLOCK
            )
            mask = valid[:, None] & inside[None, :]
            pointers = keys + offsets[:, None] + h[None, :]
            k = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
            v = tl.load(pointers + kv_stride, mask=mask, other=0.0).to(tl.float32)
            score = tl.sum(k * x[None, :], 1)
            v_scale = tl.full((TILE_KEYS,), 1.0, tl.float32)
            if SCALED:
                scale_offsets = _offsets(
                    table, row, table_stride, at, valid, scale_block_stride, 1, BLOCK
                )
                scale_offsets += head.to(tl.int64) * scale_head_stride
                score *= tl.load(scales + scale_offsets, mask=valid, other=0)
                v_scale = tl.load(scales + scale_offsets + scale_kv_stride, mask=valid, other=0)
            score = tl.where(valid, score, float("-inf"))
            new_max = tl.maximum(running_max, score)
            # A position that has seen no key yet has the maximum -inf, and -inf minus -inf is NaN.
            safe = tl.where(new_max == float("-inf"), 0.0, new_max)
            rescale = tl.exp(running_max - safe)
            probs = tl.exp(score - safe)
            running_sum = running_sum * rescale + probs
            out = out * rescale[:, None] + (probs * v_scale)[:, None] * v
            running_max = new_max
    top = tl.max(running_max, 0)
    rescale = tl.exp(running_max - top)
    part = query * tl.num_programs(2) + split
    tl.store(maxima + part, top)
    tl.store(sums + part, tl.sum(running_sum * rescale, 0))
    # Not divided by the sum yet: `_combine` does so once, for all splits.
    out_h = tl.sum(out * rescale[:, None], 0)
    tl.store(partials + part.to(tl.int64) * WIDTH + h, out_h, mask=inside)


@triton.jit
def _grouped(
    q,
    kv,
    scales,
    table,
    lengths,
    partials,
    maxima,
    sums,
    factor,
    table_stride,
    block_stride,
    kv_stride,
    head_stride,
    token_stride,
    scale_block_stride,
    scale_kv_stride,
    scale_head_stride,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLIT: tl.constexpr,
    TILE_KEYS: tl.constexpr,
    SCALED: tl.constexpr,
    QUERIES: tl.constexpr,
):
    """Several queries per key head, as rows of a matrix product in the queries' dtype."""
    row, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + row)
    first = split * SPLIT
    if first >= length:
        return
    last = tl.minimum(first + SPLIT, length)
    h = tl.arange(0, PADDED)
    g = tl.arange(0, QUERIES)
    inside = h < WIDTH
    query = (row * tl.num_programs(1) + head) * GROUP + g
    mask_q = (g < GROUP)[:, None] & inside[None, :]
    x = tl.load(q + query[:, None] * WIDTH + h[None, :], mask=mask_q, other=0)
    keys = kv + head.to(tl.int64) * head_stride
    running_max = tl.full((QUERIES,), float("-inf"), tl.float32)
    running_sum = tl.zeros((QUERIES,), tl.float32)
    out = tl.zeros((QUERIES, PADDED), tl.float32)
    for tile in range(0, SPLIT, TILE_KEYS):
        if first + tile < last:
            at = first + tile + tl.arange(0, TILE_KEYS)
            valid = at < last
            offsets = _offsets(
                table, row, table_stride, at, valid, block_stride, token_stride, BLOCK
            )
            mask = valid[:, None] & inside[None, :]
            pointers = keys + offsets[:, None] + h[None, :]
            # Levels of int8 and numbers of fp8 are exact in every dtype of a query.
            k = tl.load(pointers, mask=mask, other=0.0).to(tl.float32).to(x.dtype)
            v = tl.load(pointers + kv_stride, mask=mask, other=0.0).to(tl.float32).to(x.dtype)
            score = dot(x, tl.trans(k), tl.zeros((QUERIES, TILE_KEYS), tl.float32)) * factor
            if SCALED:
                scale_offsets = _offsets(
                    table, row, table_stride, at, valid, scale_block_stride, 1, BLOCK
                )
                scale_offsets += head.to(tl.int64) * scale_head_stride
                score *= tl.load(scales + scale_offsets, mask=valid, other=0)[None, :]
            score = tl.where(valid[None, :], score, float("-inf"))
            new_max = tl.maximum(running_max, tl.max(score, 1))
            rescale = tl.exp(running_max - new_max)
            probs = tl.exp(score - new_max[:, None])
            running_sum = running_sum * rescale + tl.sum(probs, 1)
            if SCALED:
                # The values' scales come after the sum, which must not contain them.
                probs *= tl.load(scales + scale_offsets + scale_kv_stride, mask=valid, other=0)[
                    None, :
                ]
            out = dot(probs.to(x.dtype), v, out * rescale[:, None])
            running_max = new_max
    part = query * tl.num_programs(2) + split
    tl.store(maxima + part, running_max, mask=g < GROUP)
    tl.store(sums + part, running_sum, mask=g < GROUP)
    tl.store(partials + part.to(tl.int64)[:, None] * WIDTH + h[None, :], out, mask=mask_q)


@triton.jit
def _combine(
    partials,
    maxima,
    sums,
    lengths,
    out,
    splits,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    SPLIT: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Combines those splits of one query that hold keys into one output."""
    row = tl.program_id(0)
    query = row * tl.num_programs(1) + tl.program_id(1)
    h, s = tl.arange(0, PADDED), tl.arange(0, SPLITS)
    inside, held = h < WIDTH, s * SPLIT < tl.load(lengths + row)
    part = query.to(tl.int64) * splits + s
    split_max = tl.load(maxima + part, mask=held, other=float("-inf"))
    rescale = tl.exp(split_max - tl.max(split_max, 0))
    total = tl.sum(rescale * tl.load(sums + part, mask=held, other=0), 0)
    mask = held[:, None] & inside[None, :]
    y = tl.load(partials + part[:, None] * WIDTH + h[None, :], mask=mask, other=0)
    y = tl.sum(y * rescale[:, None], 0) / total
    tl.store(out + query.to(tl.int64) * WIDTH + h, y.to(out.dtype.element_ty), mask=inside)
