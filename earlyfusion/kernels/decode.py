"""The operations of a decode step over the paged cache, defined in torch.

`kernels/triton/` has a kernel for each; `kernels/operations.py` chooses between the two. Sums are
in fp32, rounded once to the dtype of the input. Nothing here waits for the device or branches on a
tensor's values.
"""

# Shapes: R rows of one token each, N query heads, K key and value heads, G = N / K, M = N + 2 K, H
# head width, B blocks of the cache, T tokens of a block, W blocks of a row's table, P positions, D
# model width, O x I a weight, F inner width of the feed-forward.

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from earlyfusion.model.quantise import PackedMatrix, unpack
from earlyfusion.model.transformer import HEAD_NORM_EPS

FP8 = torch.float8_e4m3fn
FP8_LARGEST = 448.0


class LayerBlocks(NamedTuple):
    """Keys (0) and values (1) of one layer; in int8 with fp32 scales per token and head, in fp8
    without."""

    kv_B2KTH: Tensor
    scales_B2KT: Tensor | None = None


class HeadNorms(NamedTuple):
    """Weight and bias [N + K, H] in fp32 of the norms of queries and keys, queries first."""

    weight: Tensor
    bias: Tensor


class Angles(NamedTuple):
    """Cosines and sines [P, H] in fp32; the sine's first half is negated (model/rotary.py)."""

    cos_PH: Tensor
    sin_PH: Tensor


def attend(q_RNH: Tensor, blocks: LayerBlocks, table_RW: Tensor, lengths_R: Tensor) -> Tensor:
    """Attention of one token per row over the first `lengths` tokens of its blocks: [R, N, H].
    Lengths are at least 1 and count the new token, whose key and value are already stored."""
    kv_RW2KTH = blocks.kv_B2KTH[table_RW].float()
    if blocks.scales_B2KT is not None:
        kv_RW2KTH = kv_RW2KTH * blocks.scales_B2KT[table_RW][..., None]
    k_RKPH, v_RKPH = kv_RW2KTH.permute(2, 0, 3, 1, 4, 5).flatten(3, 4)
    q_RKGH = q_RNH.float().unflatten(1, (k_RKPH.shape[1], -1)) * q_RNH.shape[-1] ** -0.5
    scores_RKGP = q_RKGH @ k_RKPH.transpose(-1, -2)
    positions_P = torch.arange(k_RKPH.shape[2], device=q_RNH.device)
    beyond_RP = positions_P >= lengths_R[:, None]
    probs_RKGP = scores_RKGP.masked_fill(beyond_RP[:, None, None], -torch.inf).softmax(-1)
    # Beyond a row's end the cache may hold NaN, and 0 * NaN is NaN.
    v_RKPH = v_RKPH.masked_fill(beyond_RP[:, None, :, None], 0)
    return (probs_RKGP @ v_RKPH).flatten(1, 2).to(q_RNH.dtype)


def norm_rotate_store(
    qkv_RMH: Tensor,
    norms: HeadNorms,
    angles: Angles,
    positions_R: Tensor,
    blocks: LayerBlocks,
    table_RW: Tensor,
) -> Tensor:
    """Norm and rotate queries and keys, store keys and values at `positions`: queries [R, N, H]."""
    heads, keys = len(norms.weight), blocks.kv_B2KTH.shape[2]
    width, at_R = qkv_RMH.shape[-1], positions_R.long()
    normed = F.layer_norm(qkv_RMH[:, :heads].float(), (width,), eps=HEAD_NORM_EPS)
    normed = torch.addcmul(norms.bias, normed, norms.weight)
    cos_R1H, sin_R1H = angles.cos_PH[at_R][:, None], angles.sin_PH[at_R][:, None]
    # The pair of entry h is h + H/2; the table's negated half of the sine makes `roll` enough.
    rotated = torch.addcmul(normed * cos_R1H, normed.roll(width // 2, -1), sin_R1H)
    rotated = rotated.to(qkv_RMH.dtype)
    new_R2KH = torch.stack((rotated[:, heads - keys :], qkv_RMH[:, heads:]), 1)
    _store(new_R2KH, at_R, blocks, table_RW)
    return rotated[:, : heads - keys]


def _store(new_R2KH: Tensor, at_R: Tensor, blocks: LayerBlocks, table_RW: Tensor) -> None:
    size = blocks.kv_B2KTH.shape[3]
    numbers_R = table_RW.gather(1, (at_R // size)[:, None])[:, 0].long()
    if blocks.scales_B2KT is not None:
        new_R2KH = new_R2KH.float()
        # As `_int8` of engine/cache.py: the largest entry becomes 127 or -127.
        scales_R2K = new_R2KH.abs().amax(-1) / 127
        new_R2KH = (new_R2KH / scales_R2K.clamp_min(1e-30)[..., None]).round()
        blocks.scales_B2KT[numbers_R, :, :, at_R % size] = scales_R2K
    blocks.kv_B2KTH[numbers_R, :, :, at_R % size] = to_cache_dtype(new_R2KH, blocks.kv_B2KTH.dtype)


def to_cache_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Keys or values in a cache's dtype; for fp8, larger numbers become the largest one."""
    if dtype == FP8:
        # Up to version 2.11 torch turns numbers beyond the range of fp8 into NaN.
        x = x.clamp(-FP8_LARGEST, FP8_LARGEST)
    return x.to(dtype)


def product(x_RI: Tensor, matrix: PackedMatrix) -> Tensor:
    """x W^T [R, O] with packed weights (model/quantise.py). At 8 bits the scale multiplies the sum;
    at 4 bits each weight is first rounded to the dtype of `x`."""
    weight_OI = unpack(matrix)
    if matrix.bits == 4:
        weight_OI = weight_OI.to(x_RI.dtype).float()
    return (x_RI.float() @ weight_OI.T).to(x_RI.dtype)


def add_norm(x_RD: Tensor, y_RD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + y, and the RMSNorm of this sum."""
    x_RD = x_RD + y_RD
    normed = F.rms_norm(x_RD.float(), weight_D.shape, weight_D.float(), eps)
    return x_RD, normed.to(x_RD.dtype)


def gated(gate_up_RF: Tensor) -> Tensor:
    """SiLU of the first half of the columns times the second half."""
    gate, up = gate_up_RF.float().chunk(2, -1)
    return (F.silu(gate) * up).to(gate_up_RF.dtype)
