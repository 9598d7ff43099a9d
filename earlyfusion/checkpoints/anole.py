"""Anole (arXiv 2407.06135): files of its early fork of transformers, under today's names and order.

That fork stores one QK-norm for all heads of a layer, a vector as wide as a head, and keeps Meta's
order of the rotary pairs, which it swaps at run time. The norm's shape identifies such a file, as
transformers never released one. Facts from github.com/GAIR-NLP/anole, whose other files are in
Meta's layout.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from earlyfusion.checkpoints.source import Stored
from earlyfusion.config import ModelConfig

_ROTARY = ("q_proj.weight", "k_proj.weight", "q_proj.bias", "k_proj.bias")
_NORMS = ("q_norm.weight", "q_norm.bias", "k_norm.weight", "k_norm.bias")


def is_early(tensors: Mapping[str, Stored]) -> bool:
    """Whether the QK-norms are vectors, as only in files of Anole's fork."""
    return any(len(s.shape) == 1 for n, s in tensors.items() if n.endswith("q_norm.weight"))


def to_current(tensors: Mapping[str, Stored], config: ModelConfig) -> dict[str, Stored]:
    """The same tensors, with rotary pairs half a head apart and a QK-norm for each head."""
    return {name: _to_current(name, stored, config) for name, stored in tensors.items()}


def unrotate(rows: Tensor, head_dim: int) -> Tensor:
    """Reorder the rows of each head from adjacent rotary pairs to halves: 0 2 4 … 1 3 5 …"""
    pairs = rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:])
    return pairs.transpose(1, 2).reshape(rows.shape)


def rotate(rows: Tensor, head_dim: int) -> Tensor:
    """The inverse of `unrotate`."""
    halves = rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape)


def _to_current(name: str, stored: Stored, config: ModelConfig) -> Stored:
    if name.endswith(_ROTARY):
        return stored.then(lambda rows: unrotate(rows, config.head_dim))
    if name.endswith(_NORMS):
        heads = config.num_attention_heads if "q_norm" in name else config.kv_heads
        return stored.then(lambda norm: unrotate(norm, config.head_dim).repeat(heads, 1))
    return stored
