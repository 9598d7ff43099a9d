"""The engine's keys and values: slots of one length in one piece, a layer after the other.

Shapes: S slots, P places of a slot, K key and value heads, H head width.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from earlyfusion.config import ModelConfig
from earlyfusion.engine.scheduler import Copy


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
        self.length, self.heads, self.device = length, config.kv_heads, device
        self.layers = [_zeros(shape, dtype, device) for _ in range(config.num_hidden_layers)]

    def copy(self, copied: Copy) -> None:
        for kv_2SKPH in self.layers:
            source = kv_2SKPH[:, copied.source, :, : copied.tokens]
            kv_2SKPH[:, copied.target, :, : copied.tokens] = source

    @staticmethod
    def token_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
        """Bytes that one token takes, all layers."""
        return 2 * config.num_hidden_layers * config.kv_heads * config.head_dim * dtype.itemsize


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # Zeros that the system gives page by page when they are first written to.
    empty = np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(empty).view(dtype).view(shape)
