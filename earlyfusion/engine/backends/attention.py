"""Attention over the cache in torch: the layout of one step, which is the same for all layers.

Keys and values are gathered from their blocks. Rows of one new token each attend together, on a CPU
in groups of about the same length, padded to the longest of the group. A piece of a prompt, or a
token with drafts, attends alone.
"""

# Shapes: T tokens of the step, R rows that attend together, N query heads, K key and value heads, G
# = N / K, P positions, H head width.

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from earlyfusion.engine.blocks import Branch
from earlyfusion.engine.cache import LayerCache, PagedCache
from earlyfusion.engine.scheduler import Piece, Step

StepAttend: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(q_TNH, k_TKH, v_TKH) -> out_TNH of one layer: stores the new keys and values, then attends."""

# Reading this much padding (bytes per layer) still costs less than one more call of attention.
PADDING_BYTES = 200_000


class _Group(NamedTuple):
    """Rows of one token each that attend together."""

    rows: slice
    blocks_RN: Tensor
    end: int
    mask: Tensor | None


class _Segment(NamedTuple):
    """A piece of a prompt, or a token with its drafts, which attends alone."""

    rows: slice
    blocks_1N: Tensor
    end: int
    causal: bool
    mask: Tensor | None


class StepAttention:
    """Where a step's keys and values are stored, and which positions each row sees."""

    def __init__(self, step: Step, cache: PagedCache) -> None:
        self._cache = cache
        size = cache.block_size
        blocks = [
            piece.branch.blocks[position // size]
            for piece in step.pieces
            for position in range(piece.start, piece.start + piece.rows)
        ]
        offsets = [position % size for position in step.positions]
        self._blocks_T, self._offsets_T = self._tensor([blocks, offsets])
        self._groups = list(self._make_groups(step.singles))
        self._segments = list(self._make_segments(step.longer, len(step.singles)))

    def per_layer(self) -> list[StepAttend]:
        return [partial(self._attend, layer) for layer in self._cache.layers]

    def _attend(self, layer: LayerCache, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:
        layer.store(self._blocks_T, self._offsets_T, k_TKH, v_TKH)
        out = [_attend_group(layer, q_TNH[group.rows], group) for group in self._groups]
        out += [_attend_segment(layer, q_TNH[seg.rows], seg) for seg in self._segments]
        return out[0] if len(out) == 1 else torch.cat(out)

    def _make_groups(self, singles: Sequence[Piece]) -> Iterator[_Group]:
        if not singles:
            return
        ends = [piece.end for piece in singles]
        # On a GPU a launch costs more than reading padding, so all rows are one group.
        cuts = self._group_bounds(ends) if self._cache.device.type == "cpu" else [(0, len(ends))]
        for first, last in cuts:
            rows, end = slice(first, last), max(ends[first:last])
            blocks_RN = self._table([piece.branch for piece in singles[rows]], end)
            yield _Group(rows, blocks_RN, end, self._padding(ends[rows]))

    def _group_bounds(self, ends: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Cut rows in ascending length into groups where padding would cost more than a call."""
        kv = self._cache.kv_BL2KSH
        token_bytes = 2 * kv.shape[3] * kv.shape[5] * kv.element_size()
        first = 0
        for row in range(1, len(ends)):
            # With this row, all rows before it in the group are padded to its length.
            padding = (ends[row] - ends[row - 1]) * (row - first)
            if padding * token_bytes > PADDING_BYTES:
                yield first, row
                first = row
        yield first, len(ends)

    def _make_segments(self, longer: Sequence[Piece], row: int) -> Iterator[_Segment]:
        for piece in longer:
            mask, end = None, piece.start + piece.rows
            # `is_causal` aligns queries with the first keys, so it only fits a piece at position 0.
            if piece.start:
                mask = _causal_mask(piece.rows, end, self._cache.device)
            rows = slice(row, row + piece.rows)
            yield _Segment(rows, self._table([piece.branch], end), end, not piece.start, mask)
            row += piece.rows

    def _table(self, branches: Sequence[Branch], end: int) -> Tensor:
        """Block tables covering the first `end` tokens; shorter ones are padded."""
        number = -(-end // self._cache.block_size)
        rows = [branch.blocks[:number].tolist() for branch in branches]
        return self._tensor([row + row[-1:] * (number - len(row)) for row in rows])

    def _padding(self, ends: Sequence[int]) -> Tensor | None:
        """Added to the scores [R, K, G, P]: -inf beyond a row's end; None if all ends are equal."""
        end = max(ends)
        if min(ends) == end:
            return None
        beyond = torch.arange(end, device=self._cache.device) >= self._tensor(ends)[:, None]
        scores = torch.zeros_like(beyond, dtype=torch.float32).masked_fill_(beyond, -torch.inf)
        return scores[:, None, None]

    def _tensor(self, values: Sequence[int] | Sequence[list[int]]) -> Tensor:
        return torch.tensor(values).to(self._cache.device)


def _causal_mask(rows: int, end: int, device: torch.device) -> Tensor:
    """Of the last `rows` of `end` positions."""
    if device.type == "cpu":
        positions_T = torch.arange(end)
        return positions_T <= positions_T[end - rows :, None]
    # Kernels for GPUs need no mask in memory for this. Not imported above: it imports the compiler.
    from torch.nn.attention.bias import causal_lower_right

    return causal_lower_right(rows, end)


def _attend_group(layer: LayerCache, q_RNH: Tensor, group: _Group) -> Tensor:
    k_RKPH, v_RKPH = layer.read(group.blocks_RN, group.end, q_RNH.dtype)
    mask = None if group.mask is None else group.mask.to(q_RNH.dtype)
    # Each row decodes one token, so no causal mask is needed: the G query heads that share a key
    # head are passed as G query positions.
    q_RKGH = q_RNH.unflatten(1, (k_RKPH.shape[1], -1))
    out_RKGH = F.scaled_dot_product_attention(q_RKGH, k_RKPH, v_RKPH, attn_mask=mask)
    return out_RKGH.reshape(q_RNH.shape)


def _attend_segment(layer: LayerCache, q_TNH: Tensor, segment: _Segment) -> Tensor:
    k_1KPH, v_1KPH = layer.read(segment.blocks_1N, segment.end, q_TNH.dtype)
    out_1NTH = F.scaled_dot_product_attention(
        q_TNH.transpose(0, 1)[None],
        k_1KPH,
        v_1KPH,
        attn_mask=segment.mask,
        is_causal=segment.causal,
        enable_gqa=q_TNH.shape[1] != k_1KPH.shape[1],
    )
    return out_1NTH[0].transpose(0, 1)
