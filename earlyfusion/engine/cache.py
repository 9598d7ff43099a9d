"""The engine's keys and values: one tensor per layer, cut into slots of one length.

They have the model's dtype or a smaller one: bf16, or int8 with an fp32 scale per head of a token,
separate for keys and values.

Shapes: S slots, P positions of a slot, K key and value heads, H head width, T new tokens, R new
vectors (T x K), B slots that are read.
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
"""dtypes of keys and values, besides the model's own."""


class LayerCache(NamedTuple):
    """Keys and values of one layer; `scales` in int8 only."""

    kv_2SKPH: Tensor
    scales_2SKP: Tensor | None

    def store(self, rows_TK: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> None:
        """Put new keys and values at `rows`, counted over slots, heads and positions."""
        width = self.kv_2SKPH.shape[-1]
        new_2RH = torch.stack((k_TKH, v_TKH)).reshape(2, -1, width)
        if self.scales_2SKP is not None:
            new_2RH, scales_2R = _int8(new_2RH)
            self.scales_2SKP.view(2, -1)[:, rows_TK] = scales_2R
        self.kv_2SKPH.view(2, -1, width)[:, rows_TK] = new_2RH.to(self.kv_2SKPH.dtype)

    def read(
        self, slots: int | slice | Tensor, end: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """The first `end` keys and values [B, K, P, H] of some slots, [K, P, H] of one."""
        # Views of the cache where it has this dtype.
        kv_2BKPH = self.kv_2SKPH[:, slots, :, :end].to(dtype)
        if self.scales_2SKP is not None:
            kv_2BKPH = kv_2BKPH * self.scales_2SKP[:, slots, :, :end, None].to(dtype)
        k_BKPH, v_BKPH = kv_2BKPH
        return k_BKPH, v_BKPH

    def copy(self, copied: Copy) -> None:
        for tensor in self:
            if tensor is not None:
                first = tensor[:, :, :, : copied.tokens]
                first[:, copied.target] = first[:, copied.source]


class Cache:
    """Keys and values of all slots: `layers` [2, S, K, P, H] and, in int8, `scales` [2, S, K, P].

    Unlike in `model/kv_cache.py` the positions of one head are next to each other, so that the
    attention of one token reads memory in order.
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
        self.slots, self.length, self.heads, self.device = slots, length, config.kv_heads, device
        self.layers = [_zeros(shape, dtype, device) for _ in numbers]
        self.scales: list[Tensor] = []
        if dtype == torch.int8:
            self.scales = [_zeros(shape[:-1], torch.float32, device) for _ in numbers]
        self.layer_caches = [LayerCache(*pair) for pair in zip_longest(self.layers, self.scales)]

    def copy(self, copied: Copy) -> None:
        for layer in self.layer_caches:
            layer.copy(copied)

    def clear(self, slot: int) -> None:
        for tensor in (*self.layers, *self.scales):
            tensor[:, slot] = 0

    @staticmethod
    def token_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
        """Bytes per token, in all layers."""
        scale = torch.float32.itemsize if dtype == torch.int8 else 0
        vector = config.head_dim * dtype.itemsize + scale
        return 2 * config.num_hidden_layers * config.kv_heads * vector


def cache_dtype(name: str | None, model_dtype: torch.dtype) -> torch.dtype:
    """The dtype of this name, the model's for None; `SettingError` for an unknown name."""
    if name is None:
        return model_dtype
    return DTYPES[dtype_name("cache_dtype", name, tuple(DTYPES))]


def _int8(x_2RH: Tensor) -> tuple[Tensor, Tensor]:
    """Levels and scales: symmetric, rounded to nearest, the largest entry becomes 127 or -127."""
    x_2RH = x_2RH.float()
    scales_2R = x_2RH.abs().amax(-1) / 127
    # A vector of zeros has scale 0, and levels 0.
    levels_2RH = x_2RH / scales_2R.clamp_min(1e-30)[..., None]
    return levels_2RH.round_().to(torch.int8), scales_2R


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # numpy's zeros take memory page by page, when they are first written to; torch's at once.
    empty = np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(empty).view(dtype).view(shape)
