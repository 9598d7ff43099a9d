"""Keys and values of past tokens, preallocated: a slot per sequence. Keys are stored after norm and
rotation. The caller keeps track of the number of tokens in each slot."""

# Shapes: L layers, S slots, B rows of one call, T their new tokens, P positions of a slot, N query
# heads, K key and value heads, H head width.

from __future__ import annotations

from types import EllipsisType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from earlyfusion.config import ModelConfig
from earlyfusion.errors import ContextError
from earlyfusion.model.attention import Attend, dot_product_attention


class KVCache:
    """`slots` sequences of at most `length` tokens each."""

    def __init__(
        self,
        config: ModelConfig,
        slots: int,
        length: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        layers, shape = config.num_hidden_layers, (slots, length, config.kv_heads, config.head_dim)
        self.slots, self.length = slots, length
        self.k_LSPKH = torch.zeros(layers, *shape, dtype=dtype, device=device)
        self.v_LSPKH = torch.zeros(layers, *shape, dtype=dtype, device=device)

    def attends(
        self, slots_B: Tensor, lengths_B: Tensor, valid_BT: Tensor | None = None
    ) -> list[Attend]:
        """An `Attend` per layer. It stores the new tokens in slots `slots_B`, which hold
        `lengths_B` tokens, and attends to old and new ones. Shorter rows are padded on the right,
        with False in `valid_BT`; padding is not stored. Raises `ContextError` if a row outgrows its
        slot."""
        call = _CacheCall(slots_B, lengths_B, valid_BT, self.length)
        return [
            _CachedAttend(k_SPKH, v_SPKH, call)
            for k_SPKH, v_SPKH in zip(self.k_LSPKH, self.v_LSPKH, strict=True)
        ]


def dtype_and_device(transformer: nn.Module) -> tuple[torch.dtype, torch.device]:
    """The dtype and device of a model's keys and values: those of its head's weight."""
    weight = getattr(transformer.lm_head, "weight", None)
    if not isinstance(weight, Tensor):  # a head of another class: take the first parameter's
        weight = next(p for p in transformer.parameters() if p.is_floating_point())
    return weight.dtype, weight.device


class _CacheCall:
    """The slots that one call of the model reads and writes, and their lengths before the call. Its
    metadata are computed once for all layers."""

    def __init__(
        self, slots_B: Tensor, lengths_B: Tensor, valid_BT: Tensor | None, limit: int
    ) -> None:
        self.slots_B, self.lengths_B, self.valid_BT = slots_B, lengths_B, valid_BT
        self.limit = limit
        self._metadata: dict[int, _AttentionMetadata] = {}

    def metadata(self, new: int) -> _AttentionMetadata:
        """The metadata for `new` tokens per row."""
        if new not in self._metadata:
            self._metadata[new] = self._build(new)
        return self._metadata[new]

    def _build(self, new: int) -> _AttentionMetadata:
        lengths, added = self.lengths_B.tolist(), [new] * len(self.lengths_B)
        positions_BT = self.lengths_B[:, None] + torch.arange(new, device=self.lengths_B.device)
        sources: tuple[Tensor, ...] | EllipsisType = ...
        targets = (self.slots_B[:, None], positions_BT)
        if self.valid_BT is not None:
            added = self.valid_BT.sum(1).tolist()
            sources = self.valid_BT.nonzero(as_tuple=True)
            targets = (self.slots_B[sources[0]], positions_BT[sources])
        end = max(old + more for old, more in zip(lengths, added, strict=True))
        if end > self.limit:
            raise ContextError(
                f"{end} tokens do not fit into the context of {self.limit}: shorten the prompt"
            )
        # Two cases need no mask: all rows begin at 0, or all add one token at the same position.
        from_start = not any(lengths) and end == new
        same_length = new == 1 and set(lengths) == {end - 1}
        mask = None
        if not from_start and not same_length:
            seen_BTP = torch.arange(end, device=positions_BT.device) <= positions_BT[..., None]
            mask = seen_BTP[:, None]
        return _AttentionMetadata(sources, targets, _as_slice(self.slots_B), end, mask, from_start)


class _AttentionMetadata(NamedTuple):
    """Where the tokens of one call are stored and what they see."""

    sources: tuple[Tensor, ...] | EllipsisType  # (row, token) without padding
    targets: tuple[Tensor, Tensor]  # slot and position of each source
    slots: Tensor | slice
    end: int  # attention sees positions [0, end)
    mask: Tensor | None  # [B, 1, T, end], True where a token may attend
    causal: bool


def _as_slice(slots_B: Tensor) -> Tensor | slice:
    # Consecutive slots as a slice, which is a view; indexing with a tensor would copy them.
    first, count = int(slots_B[0]), len(slots_B)
    consecutive = slots_B.tolist() == list(range(first, first + count))
    return slice(first, first + count) if consecutive else slots_B


class _CachedAttend:
    def __init__(self, k_SPKH: Tensor, v_SPKH: Tensor, call: _CacheCall) -> None:
        self.k_SPKH, self.v_SPKH, self.call = k_SPKH, v_SPKH, call

    def __call__(self, q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor) -> Tensor:
        metadata = self.call.metadata(q_BTNH.shape[1])
        self.k_SPKH[metadata.targets] = k_BTKH[metadata.sources].to(self.k_SPKH.dtype)
        self.v_SPKH[metadata.targets] = v_BTKH[metadata.sources].to(self.v_SPKH.dtype)
        k_BPKH = self.k_SPKH[metadata.slots, : metadata.end].to(q_BTNH.dtype)
        v_BPKH = self.v_SPKH[metadata.slots, : metadata.end].to(q_BTNH.dtype)
        return dot_product_attention(q_BTNH, k_BPKH, v_BPKH, metadata.mask, metadata.causal)
