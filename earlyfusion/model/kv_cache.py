"""Keys and values of past tokens, preallocated: one slot a sequence, each of its own length.

Keys are kept after norm and rotation. The caller knows how many tokens each slot holds; the cache
only stores and looks back.

Shapes: L layers, S slots, B rows of one call, T their new tokens, P places of a slot, N query
heads, K key and value heads, H head width.
"""

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
        """One `Attend` a layer: stores the new tokens behind the `lengths_B` known, and looks back.

        Rows shorter than the others are padded on the right and marked in `valid_BT`; padding is
        not stored. Raises `ContextError` where a row outgrows its slot.
        """
        window = _Window(slots_B, lengths_B, valid_BT, self.length)
        return [
            _CachedAttend(k_SPKH, v_SPKH, window)
            for k_SPKH, v_SPKH in zip(self.k_LSPKH, self.v_LSPKH, strict=True)
        ]

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Repeat the first `tokens` tokens of one slot in another."""
        for kept in (self.k_LSPKH, self.v_LSPKH):
            kept[:, target, :tokens] = kept[:, source, :tokens]


def kept_in(transformer: nn.Module) -> tuple[torch.dtype, torch.device]:
    """Dtype and device of a model's keys and values: those of its head.

    A head of another class may have no weight of its own; then the first parameter tells.
    """
    weight = getattr(transformer.lm_head, "weight", None)
    if not isinstance(weight, Tensor):
        weight = next(p for p in transformer.parameters() if p.is_floating_point())
    return weight.dtype, weight.device


class _Plan(NamedTuple):
    """Where one call's tokens go and what they see: made once, used by all layers."""

    kept: tuple[Tensor, ...] | EllipsisType
    targets: tuple[Tensor, Tensor]
    rows: Tensor | slice
    end: int
    mask: Tensor | None
    causal: bool


class _Window:
    def __init__(
        self, slots_B: Tensor, lengths_B: Tensor, valid_BT: Tensor | None, limit: int
    ) -> None:
        self.slots_B, self.lengths_B, self.valid_BT, self.limit = (
            slots_B,
            lengths_B,
            valid_BT,
            limit,
        )
        self._plans: dict[int, _Plan] = {}

    def plan(self, new: int) -> _Plan:
        """The plan for `new` tokens a row."""
        if new not in self._plans:
            self._plans[new] = self._make(new)
        return self._plans[new]

    def _make(self, new: int) -> _Plan:
        known, added = self.lengths_B.tolist(), [new] * len(self.lengths_B)
        places_BT = self.lengths_B[:, None] + torch.arange(new, device=self.lengths_B.device)
        kept: tuple[Tensor, ...] | EllipsisType = ...
        targets = (self.slots_B[:, None], places_BT)
        if self.valid_BT is not None:
            added = self.valid_BT.sum(1).tolist()
            kept = self.valid_BT.nonzero(as_tuple=True)
            targets = (self.slots_B[kept[0]], places_BT[kept])
        end = max(k + a for k, a in zip(known, added, strict=True))
        if end > self.limit:
            raise ContextError(
                f"{end} tokens do not fit into the context of {self.limit}: shorten the prompt"
            )
        from_start = not any(known) and end == new
        latest = new == 1 and set(known) == {end - 1}
        mask = None
        if not from_start and not latest:
            mask = (torch.arange(end, device=places_BT.device) <= places_BT[..., None])[:, None]
        return _Plan(kept, targets, _as_slice(self.slots_B), end, mask, from_start)


def _as_slice(slots_B: Tensor) -> Tensor | slice:
    # Neighbouring slots are read in place; others have to be gathered into a copy.
    first, count = int(slots_B[0]), len(slots_B)
    neighbours = slots_B.tolist() == list(range(first, first + count))
    return slice(first, first + count) if neighbours else slots_B


class _CachedAttend:
    def __init__(self, k_SPKH: Tensor, v_SPKH: Tensor, window: _Window) -> None:
        self.k_SPKH, self.v_SPKH, self.window = k_SPKH, v_SPKH, window

    def __call__(self, q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor) -> Tensor:
        plan = self.window.plan(q_BTNH.shape[1])
        self.k_SPKH[plan.targets] = k_BTKH[plan.kept].to(self.k_SPKH.dtype)
        self.v_SPKH[plan.targets] = v_BTKH[plan.kept].to(self.v_SPKH.dtype)
        k_BPKH = self.k_SPKH[plan.rows, : plan.end].to(q_BTNH.dtype)
        v_BPKH = self.v_SPKH[plan.rows, : plan.end].to(q_BTNH.dtype)
        return dot_product_attention(q_BTNH, k_BPKH, v_BPKH, plan.mask, plan.causal)
