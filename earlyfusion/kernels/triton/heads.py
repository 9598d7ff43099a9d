"""Norm and rotation of queries and keys, and the store of new keys and values, in one kernel: one
program per head and row."""

# Shapes: R rows, M heads of queries, keys and values together, N query heads, K key and value
# heads, H head width, W blocks of a table.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from earlyfusion.kernels.decode import FP8, FP8_LARGEST, Angles, HeadNorms, LayerBlocks
from earlyfusion.model.transformer import HEAD_NORM_EPS


def norm_rotate_store(
    qkv_RMH: Tensor,
    norms: HeadNorms,
    angles: Angles,
    positions_R: Tensor,
    blocks: LayerBlocks,
    table_RW: Tensor,
) -> Tensor:
    """As `kernels/decode.py` defines it."""
    kv, scales = blocks
    rows, heads, width = qkv_RMH.shape
    keys = kv.shape[2]
    qkv_RMH = qkv_RMH.contiguous()
    out_RNH = torch.empty_like(
        qkv_RMH[:, : heads - 2 * keys], memory_format=torch.contiguous_format
    )
    _norm_rotate_store[rows, heads](
        qkv_RMH,
        norms.weight,
        norms.bias,
        angles.cos_PH,
        angles.sin_PH,
        positions_R,
        table_RW,
        out_RNH,
        kv,
        norms.weight if scales is None else scales,
        table_RW.stride(0),
        *kv.stride()[:4],
        *((0, 0, 0) if scales is None else scales.stride()[:3]),
        HEADS=heads,
        KEY_HEADS=keys,
        WIDTH=width,
        PADDED=triton.next_power_of_2(width),
        BLOCK=kv.shape[3],
        NORM_EPS=HEAD_NORM_EPS,
        SCALED=scales is not None,
        LARGEST=FP8_LARGEST if kv.dtype == FP8 else 0.0,
        num_warps=1,
    )
    return out_RNH


@triton.jit
def _nearest(x):
    """To the nearest integer, halves to even; exact below 2^22."""
    # Near 1.5 * 2^23 fp32 has no fractional bits, so the addition itself rounds.
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _norm_rotate_store(
    qkv,
    weight,
    bias,
    cos,
    sin,
    positions,
    table,
    out,
    kv,
    scales,
    table_stride,
    block_stride,
    kv_stride,
    head_stride,
    token_stride,
    scale_block_stride,
    scale_kv_stride,
    scale_head_stride,
    HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    NORM_EPS: tl.constexpr,
    SCALED: tl.constexpr,
    LARGEST: tl.constexpr,
):
    row, head = tl.program_id(0), tl.program_id(1)
    h = tl.arange(0, PADDED)
    inside = h < WIDTH
    x_pointer = qkv + (row.to(tl.int64) * HEADS + head) * WIDTH
    x = tl.load(x_pointer + h, mask=inside, other=0).to(tl.float32)
    at = tl.load(positions + row)
    if head < HEADS - KEY_HEADS:
        mean = tl.sum(x, 0) / WIDTH
        centred = tl.where(inside, x - mean, 0.0)
        inverse = tl.rsqrt(tl.sum(centred * centred, 0) / WIDTH + NORM_EPS)
        # Rotation needs the other entry of each pair: load and norm it again.
        partner = tl.where(h < WIDTH // 2, h + WIDTH // 2, h - WIDTH // 2)
        x_partner = tl.load(x_pointer + partner, mask=inside, other=0).to(tl.float32)
        w, b = weight + head * WIDTH, bias + head * WIDTH
        x = centred * inverse * tl.load(w + h, mask=inside, other=0)
        x += tl.load(b + h, mask=inside, other=0)
        x_partner = (x_partner - mean) * inverse * tl.load(w + partner, mask=inside, other=0)
        x_partner += tl.load(b + partner, mask=inside, other=0)
        angle = at.to(tl.int64) * WIDTH + h
        x *= tl.load(cos + angle, mask=inside, other=0)
        x += x_partner * tl.load(sin + angle, mask=inside, other=0)
    # Rounded before it is quantised, as the definition does.
    rounded = x.to(out.dtype.element_ty)
    if head < HEADS - 2 * KEY_HEADS:
        offset = (row.to(tl.int64) * (HEADS - 2 * KEY_HEADS) + head) * WIDTH
        tl.store(out + offset + h, rounded, mask=inside)
    else:
        kv_head = head - (HEADS - 2 * KEY_HEADS)
        # 0 for a key, 1 for a value.
        is_value, key_head = (kv_head // KEY_HEADS).to(tl.int64), (kv_head % KEY_HEADS).to(tl.int64)
        number = tl.load(table + row.to(tl.int64) * table_stride + at // BLOCK).to(tl.int64)
        offset = number * block_stride + is_value * kv_stride + key_head * head_stride
        offset += (at % BLOCK).to(tl.int64) * token_stride
        if SCALED:
            y = tl.where(inside, rounded.to(tl.float32), 0.0)
            scale = tl.div_rn(tl.max(tl.abs(y), 0), 127.0)
            level = _nearest(tl.div_rn(y, tl.maximum(scale, 1e-30)))
            tl.store(kv + offset + h, level.to(tl.int8), mask=inside)
            scale_offset = number * scale_block_stride + is_value * scale_kv_stride
            scale_offset += key_head * scale_head_stride + at % BLOCK
            tl.store(scales + scale_offset, scale)
        else:
            y = rounded.to(tl.float32)
            if LARGEST > 0:
                # Comparisons, as `tl.clamp` may lose NaN.
                y = tl.where(y > LARGEST, LARGEST, tl.where(y < -LARGEST, -LARGEST, y))
            tl.store(kv + offset + h, y.to(kv.dtype.element_ty), mask=inside)
