"""The engine's keys and values: slots of one length in one piece, a layer after the other.

Kept in the model's dtype, or smaller: in bf16, or in int8 with one fp32 scale for each head of a
token, apart for keys and values.

Shapes: S slots, P places of a slot, K key and value heads, H head width, T new tokens, B slots that
are read.
"""

from __future__ import annotations

import math
from itertools import zip_longest
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from earlyfusion.config import ModelConfig
from earlyfusion.devices import dtype_name
from earlyfusion.engine.scheduler import Copy

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
"""What keys and values can be kept in, besides the model's own dtype."""


class Kept(NamedTuple):
    """What one layer keeps; `scales` only in int8."""

    kv_2SKPH: Tensor
    scales_2SKP: Tensor | None

    def store(self, rows_TK: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> None:
        """Put new keys and values at `rows`, counted over slots, heads and places."""
        width = self.kv_2SKPH.shape[-1]
        new_2RH = torch.stack((k_TKH, v_TKH)).reshape(2, -1, width)
        if self.scales_2SKP is not None:
            new_2RH, scales_2R = _int8(new_2RH)
            self.scales_2SKP.view(2, -1)[:, rows_TK] = scales_2R
        self.kv_2SKPH.view(2, -1, width)[:, rows_TK] = new_2RH.to(self.kv_2SKPH.dtype)

    def read(
        self, slots: int | slice | Tensor, end: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """The first `end` keys and values [B, K, P, H] of some slots, [K, P, H] of one; views where
        they are kept in this dtype."""
        kv_2BKPH = self.kv_2SKPH[:, slots, :, :end].to(dtype)
        if self.scales_2SKP is not None:
            kv_2BKPH = kv_2BKPH * self.scales_2SKP[:, slots, :, :end, None].to(dtype)
        k_BKPH, v_BKPH = kv_2BKPH
        return k_BKPH, v_BKPH

    def copy(self, copied: Copy) -> None:
        for kept in self:
            if kept is not None:
                part = kept[:, :, :, : copied.tokens]
                part[:, copied.target] = part[:, copied.source]


class Cache:
    """Keys and values of all slots, a pair [S, K, P, H] a layer; on a CPU memory is taken as used.

    Unlike `model/kv_cache.py` it keeps the heads apart, so that one token's look back reads rows of
    memory that follow each other.
    """

    def __init__(
        self,
        config: ModelConfig,
        slots: int,
        length: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (2, slots, config.kv_heads, length, config.head_dim)
        numbers = range(config.num_hidden_layers)
        self.length, self.heads, self.device = length, config.kv_heads, device
        self.layers = [_zeros(shape, dtype, device) for _ in numbers]
        self.scales: list[Tensor] = []
        if dtype == torch.int8:
            self.scales = [_zeros(shape[:-1], torch.float32, device) for _ in numbers]
        self.kept = [Kept(*layer) for layer in zip_longest(self.layers, self.scales)]

    def copy(self, copied: Copy) -> None:
        for kept in self.kept:
            kept.copy(copied)

    def clear(self, slot: int) -> None:
        for kept in self.kept:
            for part in kept:
                if part is not None:
                    part[:, slot] = 0

    @staticmethod
    def token_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
        """Bytes that one token takes, all layers."""
        scale = torch.float32.itemsize if dtype == torch.int8 else 0
        vector = config.head_dim * dtype.itemsize + scale
        return 2 * config.num_hidden_layers * config.kv_heads * vector


def cache_dtype(name: str | None, own: torch.dtype) -> torch.dtype:
    """The dtype of this name, `own` for None; `SettingError` for another name."""
    if name is None:
        return own
    return DTYPES[dtype_name("cache_dtype", name, tuple(DTYPES))]


def _int8(x_2RH: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric, rounded to nearest: the entry of largest size becomes 127 or -127."""
    x_2RH = x_2RH.float()
    scales_2R = x_2RH.abs().amax(-1) / 127
    levels_2RH = x_2RH / scales_2R.clamp_min(1e-30)[..., None]
    return levels_2RH.round_().to(torch.int8), scales_2R


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # Zeros that the system gives page by page when they are first written to.
    empty = np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(empty).view(dtype).view(shape)
