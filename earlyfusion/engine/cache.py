"""The engine's paged KV cache: a block holds the keys and values of BLOCK_SIZE tokens in all
layers. Their dtype is the model's unless another is chosen: fp32; bf16; int8 with one fp32 scale
per token and head, separately for keys and values; or fp8 (e4m3), without scales, on GPUs that
compute with it."""

# Shapes: B blocks, L layers, K key and value heads, S tokens of a block, H head width, T new
# tokens, R rows, N blocks of a row's table, P positions.

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Integral
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from earlyfusion.config import ModelConfig
from earlyfusion.devices import dtype_name, free_bytes, is_out_of_memory, use_huge_pages
from earlyfusion.engine.blocks import BLOCK_SIZE, Copy
from earlyfusion.errors import SettingError
from earlyfusion.kernels.decode import FP8, to_cache_dtype

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8, "fp8": FP8}
"""dtypes of keys and values, besides the model's own."""

MEMORY_SHARE = {"cpu": 0.25, "cuda": 0.8}
"""The share of the free memory that a cache of the default size takes, by type of device."""

MAX_CONTEXTS = 64
"""The maximum number of sequences of full context length in a cache of the default size."""

TOUCHED_AHEAD = 256 << 20
"""Bytes of a CPU's cache whose memory an idle server takes before they are used, at most."""

LONG_CONTEXT = 4096
"""Up to this context length, a default cache has its minimum size even if memory is short."""


class LayerCache(NamedTuple):
    """Keys and values of one layer, with their scales if they are int8."""

    kv_B2KSH: Tensor
    scales_B2KS: Tensor | None

    def store(self, blocks_T: Tensor, offsets_T: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> None:
        """Store the keys and values of new tokens at their offsets in their blocks."""
        for number, new_TKH in enumerate((k_TKH, v_TKH)):
            if self.scales_B2KS is not None:
                new_TKH, scales_TK = _int8(new_TKH)
                self.scales_B2KS[blocks_T, number, :, offsets_T] = scales_TK
            self.kv_B2KSH[blocks_T, number, :, offsets_T] = to_cache_dtype(
                new_TKH, self.kv_B2KSH.dtype
            )

    def read(self, blocks_RN: Tensor, end: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values [R, K, P, H] of the first P = `end` positions of block tables [R, N]."""
        kv_2KRNSH = self.kv_B2KSH.permute(1, 2, 0, 3, 4)[:, :, blocks_RN].to(dtype)
        if self.scales_B2KS is not None:
            scales_2KRNS = self.scales_B2KS.permute(1, 2, 0, 3)[:, :, blocks_RN]
            kv_2KRNSH = kv_2KRNSH * scales_2KRNS[..., None].to(dtype)
        k_RKPH, v_RKPH = kv_2KRNSH.flatten(3, 4)[:, :, :, :end].transpose(1, 2)
        return k_RKPH, v_RKPH


class PagedCache:
    """Keys and values of all blocks, `kv_BL2KSH`, and for int8 their scales, `scales_BL2KS`. A
    sequence has at most `length` tokens. On a CPU a block only takes memory once it is written to.
    The positions of a head in a block are adjacent, so that attention reads memory in order."""

    def __init__(
        self,
        config: ModelConfig,
        blocks: int,
        length: int,
        dtype: torch.dtype,
        device: torch.device,
        block_size: int = BLOCK_SIZE,
    ) -> None:
        layers = config.num_hidden_layers
        shape = (blocks, layers, 2, config.kv_heads, block_size, config.head_dim)
        self.length, self.block_size, self.device = length, block_size, device
        self.kv_BL2KSH = _zeros(shape, dtype, device)
        self.scales_BL2KS: Tensor | None = None
        if dtype == torch.int8:
            self.scales_BL2KS = _zeros(shape[:-1], torch.float32, device)
        self.layers = [self._layer(number) for number in range(layers)]

    def copy(self, copied: Copy) -> None:
        """Copy the first tokens of one block to another, in all layers."""
        tokens = slice(copied.tokens)
        for tensor in self._tensors():
            tensor[copied.target, :, :, :, tokens] = tensor[copied.source, :, :, :, tokens]

    def clear(self, blocks: Iterable[int]) -> None:
        """Fill these blocks with zeros."""
        for tensor in self._tensors():
            for block in blocks:
                tensor[block] = 0

    def _layer(self, number: int) -> LayerCache:
        scales = self.scales_BL2KS
        return LayerCache(self.kv_BL2KSH[:, number], None if scales is None else scales[:, number])

    def _tensors(self) -> list[Tensor]:
        return [t for t in (self.kv_BL2KSH, self.scales_BL2KS) if t is not None]

    @staticmethod
    def token_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
        """The bytes that one token takes in all layers."""
        scale = torch.float32.itemsize if dtype == torch.int8 else 0
        vector = config.head_dim * dtype.itemsize + scale
        return 2 * config.num_hidden_layers * config.kv_heads * vector


def cache_dtype(name: str | None, model_dtype: torch.dtype) -> torch.dtype:
    """The dtype of this name, or the model's for None; `SettingError` for an unknown name."""
    if name is None:
        return model_dtype
    return DTYPES[dtype_name("cache_dtype", name, tuple(DTYPES))]


def check_fp8(dtype: torch.dtype, device: torch.device) -> None:
    """Raise `SettingError` for fp8 on a device that does not compute with it."""
    if dtype == FP8 and not has_fp8(device):
        raise SettingError(
            "cache_dtype='fp8' needs a GPU of compute capability 8.9 or later (RTX 40, L4, H100), "
            f"not {device}: use int8, which takes about as little memory"
        )


def has_fp8(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


@dataclass(frozen=True)
class CacheSize:
    """The size of a cache: `blocks` blocks of BLOCK_SIZE tokens."""

    blocks: int
    block_bytes: int

    @property
    def tokens(self) -> int:
        return self.blocks * BLOCK_SIZE

    @property
    def bytes(self) -> int:
        """The memory taken when all blocks are in use."""
        return self.blocks * self.block_bytes

    def requests(self, tokens: int) -> int:
        """How many requests of `tokens` tokens, prompt and reply, run at once without guidance."""
        return self.blocks // -(-tokens // BLOCK_SIZE)


def cache_size(
    token_bytes: int,
    context_tokens: int,
    device: torch.device,
    budget: int | None = None,
    reserved: int = 0,
) -> CacheSize:
    """The size of the cache.

    With a `budget`: the blocks that fit into this many bytes; `SettingError` if none does.

    Without: the blocks that fit into a share (MEMORY_SHARE) of the free memory less `reserved`
    bytes, but at most MAX_CONTEXTS contexts and at least three, one per branch of a guided image.
    If the context is longer than LONG_CONTEXT tokens and three do not fit, the minimum is as many
    blocks as fit, but not less than three contexts of LONG_CONTEXT tokens.
    """
    block_bytes = BLOCK_SIZE * token_bytes
    context_blocks = -(-context_tokens // BLOCK_SIZE)
    if budget is None:
        left = max(free_bytes(device) - reserved, 0)
        share = int(MEMORY_SHARE.get(device.type, 0.25) * left) // block_bytes
        # A CPU's memory is only taken as blocks are used.
        fitting = left // block_bytes if device.type == "cpu" else share
        minimum = min(3 * context_blocks, max(fitting, 3 * LONG_CONTEXT // BLOCK_SIZE))
        return CacheSize(max(minimum, min(share, MAX_CONTEXTS * context_blocks)), block_bytes)
    _check_type(budget)
    if budget < block_bytes:
        raise SettingError(
            f"cache_bytes={budget:,} holds no block of {BLOCK_SIZE} tokens: "
            f"give at least {block_bytes:,} bytes"
        )
    return CacheSize(budget // block_bytes, block_bytes)


def _check_type(budget: object) -> None:
    if isinstance(budget, bool) or not isinstance(budget, Integral):
        raise SettingError(f"cache_bytes is a {type(budget).__name__}: give a whole number")


def _int8(x_TKH: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric quantisation: integers, and a scale per vector whose largest entry becomes
    +-127."""
    x_TKH = x_TKH.float()
    scales_TK = x_TKH.abs().amax(-1) / 127
    # A vector of zeros has scale 0: do not divide by it.
    levels_TKH = x_TKH / scales_TK.clamp_min(1e-30)[..., None]
    return levels_TKH.round_().to(torch.int8), scales_TK


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    size = math.prod(shape) * dtype.itemsize
    try:
        return _allocated(shape, dtype, device)
    except (RuntimeError, MemoryError, ValueError) as error:
        # numpy raises ValueError for more bytes than an address can name.
        if not is_out_of_memory(error) and size <= np.iinfo(np.intp).max:
            raise
        raise SettingError(
            f"the cache of keys and values takes {size:,} bytes, but {device} has "
            f"{free_bytes(device):,} bytes free: give a smaller cache_bytes, or a smaller "
            "max_position_embeddings in config.json"
        ) from error


def _allocated(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # numpy's zeros take memory page by page on first write; torch's take all at once.
    empty = np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)
    zeros = torch.from_numpy(empty).view(dtype).view(shape)
    use_huge_pages(zeros)
    return zeros
