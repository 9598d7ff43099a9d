"""How torch looks back in the cache: the layout of one step's attention, the same for all layers.

Rows that read one token look back together, neighbouring slots at a time, as far as the longest of
them. A piece of a prompt, or a window of drafts, looks back alone. On a CPU nothing is gathered out
of the cache, and little is read beyond what a row may see.

Shapes: T tokens of the step, B rows of one token each, N query heads, K key and value heads, G =
N / K, S slots, P positions of a slot, H head width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from earlyfusion.engine.cache import Cache, LayerCache
from earlyfusion.engine.scheduler import Piece
from earlyfusion.engine.step import Step

LookBack: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(q_TNH, k_TKH, v_TKH) -> out_TNH of one layer: stores the new keys and values, then attends."""

# Padding (bytes per layer) that is still cheaper to read than one more call of attention.
PADDING_BYTES = 200_000


class _Group(NamedTuple):
    """Rows of one token each that look back together."""

    rows: slice
    slots: slice | Tensor
    end: int
    mask: Tensor | None


class _Segment(NamedTuple):
    """A piece of a prompt, which looks back alone."""

    rows: slice
    slot: int
    end: int
    causal: bool
    mask: Tensor | None


class StepAttention:
    """Where the keys of a step are stored, and what each row sees."""

    def __init__(self, step: Step, cache: Cache) -> None:
        self._cache = cache
        heads_K = torch.arange(cache.heads, device=cache.device)
        rows_TK = step.slots_T[:, None] * cache.heads + heads_K
        self._store_TK = (rows_TK * cache.length + step.positions_T[:, None]).flatten()
        self._groups = list(self._grouped(step.singles))
        self._segments = list(self._segmented(step.longer, len(step.singles)))

    def of_layers(self) -> list[LookBack]:
        return [partial(self._attend, layer) for layer in self._cache.layer_caches]

    def _attend(self, layer: LayerCache, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:
        layer.store(self._store_TK, k_TKH, v_TKH)
        out = [_attend_group(layer, q_TNH[group.rows], group) for group in self._groups]
        out += [_attend_segment(layer, q_TNH[one.rows], one) for one in self._segments]
        return out[0] if len(out) == 1 else torch.cat(out)

    def _grouped(self, singles: Sequence[Piece]) -> Iterator[_Group]:
        if not singles:
            return
        slots, ends = [piece.slot for piece in singles], [piece.end for piece in singles]
        neighbours = slots[-1] - slots[0] + 1 == len(slots)
        if self._cache.device.type != "cpu":
            # On a GPU a launch costs more than reading padding, so all rows are one group.
            index = slice(slots[0], slots[-1] + 1) if neighbours else self._tensor(slots)
            yield _Group(slice(0, len(slots)), index, max(ends), self._padding(ends))
            return
        for first, last in self._cuts(slots, ends):
            rows, run = slice(first, last), slice(slots[first], slots[first] + last - first)
            yield _Group(rows, run, max(ends[rows]), self._padding(ends[rows]))

    def _cuts(self, slots: Sequence[int], ends: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Runs of neighbouring slots, cut where padding would cost more than another call."""
        kv_2SKPH = self._cache.layers[0]
        token_bytes = 2 * kv_2SKPH.shape[2] * kv_2SKPH.shape[4] * kv_2SKPH.element_size()
        first, longest = 0, ends[0]
        for row in range(1, len(slots)):
            top = max(longest, ends[row])
            # Either this row is padded to the longest, or all rows of the run are padded to it.
            padding = (top - longest) * (row - first) + top - ends[row]
            if slots[row] != slots[row - 1] + 1 or padding * token_bytes > PADDING_BYTES:
                yield first, row
                first, top = row, ends[row]
            longest = top
        yield first, len(slots)

    def _segmented(self, longer: Sequence[Piece], row: int) -> Iterator[_Segment]:
        for piece in longer:
            mask, end = None, piece.end + len(piece.drafts)
            # is_causal aligns queries with the first keys, so it serves only from position 0 on.
            if piece.start:
                positions_T = torch.arange(end, device=self._cache.device)
                mask = positions_T <= positions_T[piece.start :, None]
            rows = slice(row, row + end - piece.start)
            yield _Segment(rows, piece.slot, end, not piece.start, mask)
            row += end - piece.start

    def _padding(self, ends: Sequence[int]) -> Tensor | None:
        """Added to the scores [B, K, G, P]: -inf beyond the end of a row; None if all are equal."""
        end = max(ends)
        if min(ends) == end:
            return None
        beyond = torch.arange(end, device=self._cache.device) >= self._tensor(ends)[:, None]
        scores = torch.zeros_like(beyond, dtype=torch.float32).masked_fill_(beyond, -torch.inf)
        return scores[:, None, None]

    def _tensor(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values).to(self._cache.device)


def _attend_group(layer: LayerCache, q_BNH: Tensor, group: _Group) -> Tensor:
    k_BKPH, v_BKPH = layer.read(group.slots, group.end, q_BNH.dtype)
    mask = None if group.mask is None else group.mask.to(q_BNH.dtype)
    # Each row decodes one token, so no causal mask is needed: the G query heads that share a key
    # head are passed as G query positions.
    q_BKGH = q_BNH.unflatten(1, (k_BKPH.shape[1], -1))
    out_BKGH = F.scaled_dot_product_attention(q_BKGH, k_BKPH, v_BKPH, attn_mask=mask)
    return out_BKGH.reshape(q_BNH.shape)


def _attend_segment(layer: LayerCache, q_TNH: Tensor, segment: _Segment) -> Tensor:
    k_KPH, v_KPH = layer.read(segment.slot, segment.end, q_TNH.dtype)
    out_1NTH = F.scaled_dot_product_attention(
        q_TNH.transpose(0, 1)[None],
        k_KPH[None],
        v_KPH[None],
        attn_mask=segment.mask,
        is_causal=segment.causal,
        enable_gqa=q_TNH.shape[1] != k_KPH.shape[0],
    )
    return out_1NTH[0].transpose(0, 1)
