"""One step on the device: the plan's tokens through the network, then a token for each asker.

The cache is slots of one length in one piece, a layer after the other. Rows that read one token
look back together, neighbours at a time, as far as the longest of them; a piece of a prompt looks
back alone. On a CPU nothing is gathered out of the cache, and next to nothing is read that is not
live. The host waits for the device once a step, for the tokens.

Shapes: L layers, S slots, P places of a slot, T tokens of the step, B rows of one token each, N
query heads, K key and value heads, G = N / K, H head width, D model width, R rows of a head's
input, V columns of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from earlyfusion.engine.cache import Cache
from earlyfusion.engine.cpu_step import MOST_ROWS, CpuStep, available, fits, own_bits
from earlyfusion.engine.network import Network, Product
from earlyfusion.engine.scheduler import Branch, Piece, Plan
from earlyfusion.generation import guidance
from earlyfusion.generation.grammar import Grammar
from earlyfusion.generation.sampler import Warp, penalise, pick, warp
from earlyfusion.generation.settings import SamplingParams
from earlyfusion.model.transformer import Transformer

# Keys and values read in vain, in bytes a layer, that cost as much as one more call of attention.
_PADDING = 200_000


@dataclass(eq=False)
class Ask:
    """What one request needs to draw its next token.

    `branches` are full, image-only and unconditional; one that cancels out is named by the one that
    takes its place. `state` is the grammar's; `seen_V` marks the history in the text head's
    columns where there is a penalty.
    """

    branches: tuple[Branch, Branch, Branch]
    weights: tuple[float, float]
    grammar: Grammar
    state: list[int]
    in_image: bool
    may_begin: bool
    sampling: SamplingParams
    uniform: float
    seen_V: Tensor | None

    @property
    def greedy(self) -> bool:
        s = self.sampling
        return (s.image_temperature if self.in_image else s.temperature) == 0

    @property
    def shaped(self) -> bool:
        """Whether the tail of the distribution is cut."""
        s = self.sampling
        if self.in_image:
            return s.image_top_p != 1 or s.image_top_k != 0
        return s.top_p != 1 or s.top_k != 0 or s.min_p != 0


class Head:
    """The rows of the output matrix that one kind of token takes; columns stand in order of ids."""

    def __init__(
        self, product: Callable[[Tensor], Product], weight_VD: Tensor, ids: Iterable[int]
    ) -> None:
        self.ids = sorted(ids)
        self.ids_V = torch.tensor(self.ids, device=weight_VD.device)
        first, last = self.ids[0], self.ids[-1]
        adjacent = last - first + 1 == len(self.ids)
        rows = weight_VD[first : last + 1] if adjacent else weight_VD[self.ids_V]
        self.logits = product(rows.detach())
        self.column_of = {token: column for column, token in enumerate(self.ids)}


class ModelRunner:
    """Owns weights, cache and heads; `run` is the whole of a step."""

    def __init__(self, transformer: Transformer, grammar: Grammar, slots: int, length: int) -> None:
        weight = transformer.lm_head.weight
        self.device = weight.device
        self._transformer = transformer
        self._cache = Cache(transformer.config, slots, length, weight.dtype, weight.device)
        self._text_ids = grammar.text_ids
        self._warps: dict[tuple[bool, bool], tuple[Sequence[SamplingParams], Warp]] = {}
        # No inference mode here: parameters may become parts of tensors that are made now.
        with torch.inference_mode(False), torch.no_grad():
            self._network = Network(transformer, length)
            self._compiled = _compiled(transformer, self._cache)
            self._image_head = Head(self._product, weight, grammar.code_ids)
            self._load_text_head()

    @torch.no_grad()
    def allow(self, grammar: Grammar) -> bool:
        """Let the text head hold what this grammar's requests may say; whether it had to change."""
        changes = not grammar.text_ids <= self._text_ids
        if changes:
            self._text_ids |= grammar.text_ids
            self._load_text_head()
        return changes

    def seen(self, ids: Iterable[int]) -> Tensor:
        """A mark for each column of the text head whose token is among `ids`."""
        column_of = self.text_head.column_of
        columns = [column_of[token] for token in set(ids) if token in column_of]
        seen_V = torch.zeros(len(self.text_head.ids), dtype=torch.bool, device=self.device)
        seen_V[columns] = True
        return seen_V

    @torch.inference_mode()
    def run(self, plan: Plan, asks: Sequence[Ask]) -> list[int]:
        """Read what the plan names; the next token of each ask."""
        for copied in plan.copies:
            self._cache.copy(copied)
        if not plan.pieces:
            return []
        step = _Step(plan.pieces, self._cache)
        if self._compiled is not None and step.single and len(step.tokens_T) <= MOST_ROWS:
            x_TD = self._compiled.states(step.tokens_T, step.slots_T, step.positions_T)
        else:
            x_TD = self._network.forward(step.tokens_T, step.positions_T, step.attentions())
            x_TD = x_TD if step.single else x_TD[list(step.last_of.values())]
            x_TD = self._network.final(x_TD)
        return self._draw(x_TD, step, asks) if asks else []

    def _product(self, weight_VD: Tensor) -> Product:
        """A product of few rows by the compiled step, of many by the network."""
        many = self._network.weighted(weight_VD)
        if self._compiled is None:
            return many
        few = self._compiled.product(weight_VD)
        return lambda x: few(x) if len(x) <= MOST_ROWS else many(x.to(weight_VD.dtype))

    def _draw(self, x_TD: Tensor, step: _Step, asks: Sequence[Ask]) -> list[int]:
        groups: dict[tuple[bool, bool], list[int]] = {}
        for number, ask in enumerate(asks):
            groups.setdefault((ask.in_image, ask.greedy), []).append(number)
        order = [number for numbers in groups.values() for number in numbers]
        drawn = [
            self._draw_alike(x_TD, step, [asks[number] for number in numbers])
            for numbers in groups.values()
        ]
        tokens = (drawn[0] if len(drawn) == 1 else torch.cat(drawn)).tolist()
        by_number = dict(zip(order, tokens, strict=True))
        return [by_number[number] for number in range(len(asks))]

    def _draw_alike(self, x_TD: Tensor, step: _Step, asks: list[Ask]) -> Tensor:
        """Tokens of asks for one kind of token, all greedy or all drawn."""
        head = self._image_head if asks[0].in_image else self.text_head
        logits_BV = self._mixed(x_TD, step, asks, head)
        if not asks[0].in_image:
            logits_BV = self._masked(logits_BV, asks)
        if asks[0].greedy:
            return head.ids_V[logits_BV.argmax(-1)]
        settings = self._warp(asks)
        if any(ask.shaped for ask in asks):
            logits_BV = warp(logits_BV, settings)
        else:
            logits_BV = logits_BV / settings.temperature_B.to(logits_BV.dtype)[:, None]
        uniform_B = torch.tensor([ask.uniform for ask in asks], dtype=torch.float64)
        return head.ids_V[pick(logits_BV, uniform_B.to(self.device))]

    def _mixed(self, x_TD: Tensor, step: _Step, asks: list[Ask], head: Head) -> Tensor:
        """Guided logits in fp32."""
        row_of: dict[Branch, int] = {}
        for ask in asks:
            for branch in ask.branches:
                row_of.setdefault(branch, len(row_of))
        rows = [step.row_of[branch] for branch in row_of]
        x_RD = x_TD if rows == list(range(len(x_TD))) else x_TD[rows]
        logits_RV = head.logits(x_RD).float()
        if len(row_of) == len(asks):
            return logits_RV
        parts = ([row_of[ask.branches[i]] for ask in asks] for i in range(3))
        full, image_only, unconditional = (logits_RV[part] for part in parts)
        weights_2B1 = torch.tensor([*zip(*(ask.weights for ask in asks), strict=True)])
        text, image = weights_2B1.to(self.device)[..., None]
        return guidance.combine(full, image_only, unconditional, text, image)

    def _masked(self, logits_BV: Tensor, asks: list[Ask]) -> Tensor:
        kinds = list({(ask.grammar, ask.may_begin): ask for ask in asks}.values())
        logits_BV = logits_BV.masked_fill(
            self._blocked(asks[0])
            if len(kinds) == 1
            else torch.stack([self._blocked(ask) for ask in asks]),
            -torch.inf,
        )
        if all(ask.seen_V is None for ask in asks):
            return logits_BV
        seen = [self._unseen_V if ask.seen_V is None else ask.seen_V for ask in asks]
        seen_BV = torch.stack(seen)
        return penalise(logits_BV, seen_BV, self._warp(asks).penalty_B)

    def _blocked(self, ask: Ask) -> Tensor:
        """Columns of the text head that may not come, as the grammar has it."""
        key = (ask.grammar, ask.may_begin)
        if key not in self._blocks:
            state_BF = torch.tensor([ask.state], device=self.device)
            self._blocks[key] = ~ask.grammar.mask(state_BF)[0, self.text_head.ids_V]
        return self._blocks[key]

    def _warp(self, asks: list[Ask]) -> Warp:
        """The settings of these rows, made anew only when the rows are others."""
        kind, rows = (asks[0].in_image, asks[0].greedy), [ask.sampling for ask in asks]
        known, settings = self._warps.get(kind, ((), None))
        if settings is None or known != rows:
            settings = (Warp.image if asks[0].in_image else Warp.text)(rows, self.device)
            self._warps[kind] = (rows, settings)
        return settings

    def _load_text_head(self) -> None:
        weight_VD = self._transformer.lm_head.weight
        self.text_head = Head(self._product, weight_VD, self._text_ids)
        self._blocks: dict[tuple[Grammar, bool], Tensor] = {}
        self._unseen_V = self.seen(())


def _compiled(transformer: Transformer, cache: Cache) -> CpuStep | None:
    bits = own_bits(transformer)
    if bits is None or not fits(transformer, cache.layers) or not available():
        return None
    return CpuStep(transformer, cache.layers, bits)


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


class _Step:
    """Where each token of a step stands, where its keys go, and what it sees."""

    def __init__(self, pieces: Sequence[Piece], cache: Cache) -> None:
        self._cache, device = cache, cache.device
        singles = sorted((p for p in pieces if p.size == 1), key=_slot)
        longer = [p for p in pieces if p.size > 1]
        tokens: list[int] = []
        places: list[int] = []
        slots: list[int] = []
        self.last_of: dict[Branch, int] = {}
        for piece in (*singles, *longer):
            tokens += piece.tokens
            places += range(piece.start, piece.end)
            slots += [_slot(piece)] * piece.size
            self.last_of[piece.branch] = len(tokens) - 1
        self.row_of = {branch: row for row, branch in enumerate(self.last_of)}
        self.single = not longer
        indices_3T = torch.tensor([tokens, places, slots]).to(device)
        self.tokens_T, self.positions_T, self.slots_T = indices_3T
        heads_K = torch.arange(cache.heads, device=device)
        rows_TK = self.slots_T[:, None] * cache.heads + heads_K
        self._store_TK = (rows_TK * cache.length + self.positions_T[:, None]).flatten()
        self._groups = list(self._grouped(singles))
        self._segments = list(self._segmented(longer, len(singles)))

    def attentions(self) -> list[partial[Tensor]]:
        return [partial(self._attend, kv_2SKPH) for kv_2SKPH in self._cache.layers]

    def _attend(self, kv_2SKPH: Tensor, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:
        width = q_TNH.shape[-1]
        for kept, new in zip(kv_2SKPH.view(2, -1, width), (k_TKH, v_TKH), strict=True):
            kept[self._store_TK] = new.reshape(-1, width)
        out = [_look_back(kv_2SKPH, q_TNH[group.rows], group) for group in self._groups]
        out += [_read_on(kv_2SKPH, q_TNH[segment.rows], segment) for segment in self._segments]
        return out[0] if len(out) == 1 else torch.cat(out)

    def _grouped(self, singles: Sequence[Piece]) -> Iterator[_Group]:
        if not singles:
            return
        slots, ends = [_slot(p) for p in singles], [p.end for p in singles]
        neighbours = slots[-1] - slots[0] + 1 == len(slots)
        if self._cache.device.type != "cpu":
            # A kernel costs more to start than what it reads in vain.
            index = slice(slots[0], slots[-1] + 1) if neighbours else self._tensor(slots)
            yield _Group(slice(0, len(slots)), index, max(ends), self._padding(ends))
            return
        for first, last in self._cuts(slots, ends):
            rows, places = slice(first, last), slice(slots[first], slots[first] + last - first)
            yield _Group(rows, places, max(ends[rows]), self._padding(ends[rows]))

    def _cuts(self, slots: Sequence[int], ends: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Runs of neighbours, cut where one more row would cost more in padding than a call."""
        kv_2SKPH = self._cache.layers[0]
        bytes_a_token = 2 * kv_2SKPH.shape[2] * kv_2SKPH.shape[4] * kv_2SKPH.element_size()
        first, longest = 0, ends[0]
        for row in range(1, len(slots)):
            top = max(longest, ends[row])
            padding = (top - longest) * (row - first) + top - ends[row]
            if slots[row] != slots[row - 1] + 1 or padding * bytes_a_token > _PADDING:
                yield first, row
                first, top = row, ends[row]
            longest = top
        yield first, len(slots)

    def _segmented(self, longer: Sequence[Piece], row: int) -> Iterator[_Segment]:
        for piece in longer:
            mask = None
            if piece.start:
                places_T = torch.arange(piece.end, device=self._cache.device)
                mask = places_T <= places_T[piece.start :, None]
            rows = slice(row, row + piece.size)
            yield _Segment(rows, _slot(piece), piece.end, not piece.start, mask)
            row += piece.size

    def _padding(self, ends: Sequence[int]) -> Tensor | None:
        """What is added to the scores of rows that are shorter than the longest."""
        end = max(ends)
        if min(ends) == end:
            return None
        beyond = torch.arange(end, device=self._cache.device) >= self._tensor(ends)[:, None]
        zeros = torch.zeros(beyond.shape, dtype=self._cache.layers[0].dtype, device=beyond.device)
        return zeros.masked_fill_(beyond, -torch.inf)[:, None, None]

    def _tensor(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values).to(self._cache.device)


def _look_back(kv_2SKPH: Tensor, q_BNH: Tensor, group: _Group) -> Tensor:
    k_BKPH, v_BKPH = kv_2SKPH[:, group.slots, :, : group.end]
    # One token sees all that its mask leaves, so the queries that share a key stand as its rows.
    q_BKGH = q_BNH.unflatten(1, (k_BKPH.shape[1], -1))
    out_BKGH = F.scaled_dot_product_attention(q_BKGH, k_BKPH, v_BKPH, attn_mask=group.mask)
    return out_BKGH.reshape(q_BNH.shape)


def _read_on(kv_2SKPH: Tensor, q_TNH: Tensor, segment: _Segment) -> Tensor:
    k_KPH, v_KPH = kv_2SKPH[:, segment.slot, :, : segment.end]
    out_1NTH = F.scaled_dot_product_attention(
        q_TNH.transpose(0, 1)[None],
        k_KPH[None],
        v_KPH[None],
        attn_mask=segment.mask,
        is_causal=segment.causal,
        enable_gqa=q_TNH.shape[1] != k_KPH.shape[0],
    )
    return out_1NTH[0].transpose(0, 1)


def _slot(piece: Piece) -> int:
    if piece.branch.slot is None:
        raise RuntimeError("a piece was planned for a branch without a slot")
    return piece.branch.slot
