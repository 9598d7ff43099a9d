"""One step on the device: the plan's tokens through the network, then a token for each asker.

The cache is slots of one length in one piece, a layer after the other. Three
ways to read: compiled code on a CPU (`CpuStep`); fused products in torch (`Network`), where rows
that read one token look back together, neighbours at a time, as far as the longest of them, and a
piece of a prompt or a window of drafts alone; and, where somebody has put hooks or other modules
into the transformer, the transformer itself, one sequence after the other. Nothing is gathered out
of the cache on a CPU, and next to nothing is read that is not live. The host waits for the device
once a step, for the tokens.

Shapes: L layers, S slots, P places of a slot, T tokens of the step, B rows of one token each, N
query heads, K key and value heads, G = N / K, H head width, D model width, R rows of a head's
input, V columns of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain, islice
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from earlyfusion.engine.backends.torch import LookBack, Network, Product, check_blocks, is_plain
from earlyfusion.engine.cache import Cache, Kept, cache_dtype
from earlyfusion.engine.scheduler import Branch, Piece, Plan
from earlyfusion.errors import EarlyFusionError
from earlyfusion.generation import guidance, jacobi
from earlyfusion.generation.grammar import Grammar
from earlyfusion.generation.jacobi import Window
from earlyfusion.generation.sampler import (
    Sampler,
    Warp,
    image_settings,
    penalise,
    pick,
    sound,
    text_settings,
    warp,
)
from earlyfusion.generation.settings import SamplingParams
from earlyfusion.generation.steering import Steering, TokenLogprob
from earlyfusion.kernels.cpu_step import Choice, CpuStep, available, fits, own_bits
from earlyfusion.model.kv_cache import kept_in
from earlyfusion.model.rotary import changes_at
from earlyfusion.model.transformer import Transformer

Kind: TypeAlias = tuple[bool, bool, bool]
"""What is drawn together: codes or text, greedy or not, in windows or not."""

NOTHING = -1

# Keys and values read in vain, in bytes a layer, that cost as much as one more call of attention.
_PADDING = 200_000


@dataclass(eq=False)
class Ask:
    """What one request needs to draw its next token.

    `branches` are full, image-only and unconditional; one that cancels out is named by the one that
    takes its place. `state` is the grammar's; `seen_V` marks the history in the text head's
    columns where there is a penalty. Where there is `steering`, `_draw_steered` leaves `logprob`
    here, or the `error` that ends the request.
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
    window: Window | None = None
    steering: Steering | None = None
    logprob: TokenLogprob | None = None
    error: EarlyFusionError | None = None

    @property
    def places(self) -> int:
        """How many tokens are drawn: one, or one at each place of a window of codes."""
        return 1 if self.window is None else self.window.places

    @property
    def settings(self) -> tuple[float, ...]:
        """Temperature, top-k, top-p, min-p and repetition penalty of what is drawn."""
        return (image_settings if self.in_image else text_settings)(self.sampling)

    @property
    def greedy(self) -> bool:
        s = self.sampling
        return (s.image_temperature if self.in_image else s.temperature) == 0

    @property
    def kind(self) -> Kind:
        return self.in_image, self.greedy, self.window is not None

    @property
    def shaped(self) -> bool:
        """Whether the tail of the distribution is cut."""
        s = self.sampling
        if self.in_image:
            return s.image_top_p != 1 or s.image_top_k != 0
        return s.top_p != 1 or s.top_k != 0 or s.min_p != 0


class Head:
    """The part of the head that one kind of token takes; columns stand in order of ids."""

    def __init__(
        self, product: Callable[[Tensor], Product], ids: Iterable[int], device: torch.device
    ) -> None:
        self.ids = sorted(ids)
        self.ids_V = torch.tensor(self.ids, device=device)
        self.logits = product(self.ids_V)
        self.column_of = {token: column for column, token in enumerate(self.ids)}


class ModelRunner:
    """Owns weights, cache and heads; `run` is the whole of a step.

    `fused` is False where the transformer itself is called: then prompts are read whole.
    """

    def __init__(
        self,
        transformer: Transformer,
        grammar: Grammar,
        slots: int,
        length: int,
        kept: str | None = None,
    ) -> None:
        own, self.device = kept_in(transformer)
        self._transformer = transformer
        self._cache = Cache(transformer.config, slots, length, cache_dtype(kept, own), self.device)
        self._text_ids = grammar.text_ids
        self._warps: dict[Kind, tuple[Sequence[SamplingParams], Warp]] = {}
        # Beyond this length each token turns all angles, so the layers cannot share a table.
        limit = changes_at(transformer.config)
        self.fused = is_plain(transformer) and (limit is None or length <= limit)
        self._compiled: CpuStep | None = None
        self._network: Network | None = None
        # No inference mode here: parameters may become parts of tensors that are made now.
        with torch.inference_mode(False), torch.no_grad():
            check_blocks(transformer)
            if self.fused:
                self._compiled = _compiled(transformer, self._cache)
            if self.fused and self._compiled is None:
                self._network = Network(transformer, length)
            self._image_head = Head(self._product, grammar.code_ids, self.device)
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
    def run(self, plan: Plan, asks: Sequence[Ask]) -> list[list[int]]:
        """Read what the plan names; the tokens of each ask, one for each of its places.

        `NOTHING` stands for a token whose logits are not finite.
        """
        for copied in plan.copies:
            self._cache.copy(copied)
        if not plan.pieces:
            return []
        step = Step(plan.pieces, self._cache)
        x_TD = self._read(step)
        return self._draw(x_TD, step, asks) if asks else []

    def clear(self, slots: Iterable[int]) -> None:
        """Zero what these slots hold: a value that is not finite would spoil sums that skip it."""
        for slot in slots:
            self._cache.clear(slot)

    def _read(self, step: Step) -> Tensor:
        """What the heads read, for the rows of `step.drawing`."""
        if self._compiled is not None:
            x_TD = self._compiled.states(step.tokens_T, step.slots_T, step.positions_T)
            return x_TD if step.single else x_TD[step.drawing]
        if self._network is None:
            return torch.cat([self._called(piece) for piece in step.pieces])
        x_TD = self._network.forward(step.tokens_T, step.positions_T, step.attentions())
        return self._network.final(x_TD if step.single else x_TD[step.drawing])

    def _called(self, piece: Piece) -> Tensor:
        """Logits of the whole head, of a piece's last token and its drafts."""
        step = Step([piece], self._cache)
        attends = [partial(_one_row, attend) for attend in step.attentions()]
        tokens_BT, positions_BT = step.tokens_T[None], step.positions_T[None]
        logits_BTV: Tensor = self._transformer(
            tokens_BT, positions_BT, attends, last_only=not piece.drafts
        )
        return logits_BTV[0, -1 - len(piece.drafts) :]

    def _product(self, ids_V: Tensor) -> Product:
        """From what `_read` gives to logits of these ids, in order."""
        if not self.fused:
            return lambda logits_RV: logits_RV[:, ids_V]
        head, first, last = self._transformer.lm_head, int(ids_V[0]), int(ids_V[-1])
        adjacent = last - first + 1 == len(ids_V)
        columns = slice(first, last + 1) if adjacent else ids_V
        if type(head) is not torch.nn.Linear:  # an adapter's
            dtype = head.weight.dtype
            return lambda x_RD: head(x_RD.to(dtype))[:, columns]
        weight_VD = head.weight[columns].detach()
        if self._compiled is not None:
            return self._compiled.product(weight_VD)
        assert self._network is not None
        return self._network.weighted(weight_VD)

    def _draw(self, x_TD: Tensor, step: Step, asks: Sequence[Ask]) -> list[list[int]]:
        alike = [ask for ask in asks if ask.steering is None]
        drawn = iter(self._draw_together(x_TD, step, alike) if alike else ())
        return [
            next(drawn) if ask.steering is None else self._draw_steered(x_TD, step, ask)
            for ask in asks
        ]

    def _draw_steered(self, x_TD: Tensor, step: Step, ask: Ask) -> list[int]:
        """One token as in the plain loop, from the whole vocabulary; none where that fails."""
        assert ask.steering is not None
        ids, branches = ask.branches[0].tokens, list(dict.fromkeys(ask.branches))
        rows_RV = self._whole_logits(x_TD[[step.row_of[branch] for branch in branches]])
        full_V, image_only_V, alone_V = (rows_RV[branches.index(b)] for b in ask.branches)
        logits_V = full_V
        if len(branches) > 1:
            logits_V = guidance.combine(full_V, image_only_V, alone_V, *ask.weights)
        state_1F = torch.tensor([ask.state], device=self.device)
        allowed_1V = ask.grammar.mask(state_1F)
        if not sound(logits_V.masked_fill(~allowed_1V, -torch.inf)).all():
            return [NOTHING]
        try:
            changed_V = ask.steering.change(ids, logits_V, allowed_1V[0])
        except EarlyFusionError as error:
            ask.error = error
            return []
        seen_1V = torch.zeros_like(allowed_1V)
        seen_1V[0, ids] = True
        uniform_1 = torch.tensor([ask.uniform], dtype=torch.float64).to(self.device)
        in_image_1 = ask.grammar.in_image(state_1F)
        sampler = Sampler([ask.sampling], self.device)
        [token] = sampler.draw(changed_V[None], allowed_1V, seen_1V, in_image_1, uniform_1).tolist()
        ask.logprob = ask.steering.told(full_V, token)
        return [token]

    def _whole_logits(self, x_RD: Tensor) -> Tensor:
        """Logits [R, V] in fp32 of the whole vocabulary, from what `_read` gives."""
        if not self.fused:
            return x_RD.float()
        head = self._transformer.lm_head
        return head(x_RD.to(head.weight.dtype)).float()

    def _draw_together(self, x_TD: Tensor, step: Step, asks: Sequence[Ask]) -> list[list[int]]:
        if self._compiled is None:
            return self._draw_grouped(x_TD, step, asks)
        alone = [ask for ask in asks if ask.window is None]
        windows = [ask for ask in asks if ask.window is not None]
        one_each = iter(self._draw_compiled(self._compiled, x_TD, step, alone) if alone else ())
        several = iter(self._draw_grouped(x_TD, step, windows) if windows else ())
        return [next(one_each if ask.window is None else several) for ask in asks]

    def _draw_compiled(
        self, compiled: CpuStep, x_TD: Tensor, step: Step, asks: Sequence[Ask]
    ) -> list[list[int]]:
        """One token of each ask, codes and text in one call; without windows."""
        logits = {
            in_image: _Logits(self._head(in_image), x_TD, step, alike)
            for in_image in (False, True)
            if (alike := [ask for ask in asks if ask.in_image is in_image])
        }
        columns = compiled.draw([self._choice(ask, logits[ask.in_image]) for ask in asks])
        heads = [self._head(ask.in_image) for ask in asks]
        drawn = zip(heads, columns, strict=True)
        return [[head.ids[column] if column >= 0 else NOTHING] for head, column in drawn]

    def _choice(self, ask: Ask, logits: _Logits) -> Choice:
        temperature, top_k, top_p, min_p, penalty = ask.settings
        return Choice(
            *logits.addresses(ask),
            blocked=None if ask.in_image else self._blocked(ask).data_ptr(),
            seen=None if ask.in_image or ask.seen_V is None else ask.seen_V.data_ptr(),
            columns=logits.columns,
            top_k=int(top_k),
            text=ask.weights[0],
            image=ask.weights[1],
            temperature=temperature,
            top_p=top_p,
            min_p=min_p,
            penalty=penalty,
            uniform=ask.uniform,
        )

    def _head(self, in_image: bool) -> Head:
        return self._image_head if in_image else self.text_head

    def _draw_grouped(self, x_TD: Tensor, step: Step, asks: Sequence[Ask]) -> list[list[int]]:
        groups: dict[Kind, list[int]] = {}
        for number, ask in enumerate(asks):
            groups.setdefault(ask.kind, []).append(number)
        order = [number for numbers in groups.values() for number in numbers]
        drawn = [
            self._draw_alike(x_TD, step, [asks[number] for number in numbers])
            for numbers in groups.values()
        ]
        tokens = iter((drawn[0] if len(drawn) == 1 else torch.cat(drawn)).tolist())
        by_number = {number: list(islice(tokens, asks[number].places)) for number in order}
        return [by_number[number] for number in range(len(asks))]

    def _draw_alike(self, x_TD: Tensor, step: Step, asks: list[Ask]) -> Tensor:
        """Tokens of asks of one kind, those of an ask next to each other."""
        head = self._head(asks[0].in_image)
        logits_BV = self._mixed(x_TD, step, asks, head)
        if not asks[0].in_image:
            logits_BV = self._masked(logits_BV, asks)
        sound_B = sound(logits_BV)
        drawn_B = self._pick(torch.where(sound_B[:, None], logits_BV, 0), asks, head)
        return torch.where(sound_B, drawn_B, NOTHING)

    def _pick(self, logits_BV: Tensor, asks: list[Ask], head: Head) -> Tensor:
        if all(ask.greedy for ask in asks):
            return head.ids_V[logits_BV.argmax(-1)]
        windows = [ask.window for ask in asks if ask.window is not None]
        settings = self._warp(asks)
        if windows:
            settings = settings.of_rows(self._rows(asks))
        uniform_B = torch.tensor([ask.uniform for ask in asks], dtype=torch.float64)
        if any(ask.shaped for ask in asks):
            logits_BV = warp(logits_BV, settings)
        else:
            logits_BV = logits_BV / settings.temperature_B.to(logits_BV.dtype)[:, None]
        if windows:
            columns = [[head.column_of[token] for token in window.drafts] for window in windows]
            return head.ids_V[jacobi.draw(windows, columns, logits_BV)]
        return head.ids_V[pick(logits_BV, uniform_B.to(self.device))]

    def _mixed(self, x_TD: Tensor, step: Step, asks: list[Ask], head: Head) -> Tensor:
        """Guided logits in fp32, for each ask as many rows as it has places."""
        mixes = [
            tuple(step.row_of[branch] + place for branch in ask.branches)
            for ask in asks
            for place in range(ask.places)
        ]
        rows = list(dict.fromkeys(chain.from_iterable(mixes)))
        x_RD = x_TD if rows == list(range(len(x_TD))) else x_TD[rows]
        logits_RV = head.logits(x_RD).float()
        if len(rows) == len(mixes):
            return logits_RV
        row_of = {row: number for number, row in enumerate(rows)}
        parts = ([row_of[mix[i]] for mix in mixes] for i in range(3))
        full, image_only, unconditional = (logits_RV[part] for part in parts)
        weights = [ask.weights for ask in asks for _ in range(ask.places)]
        weights_2B1 = torch.tensor([*zip(*weights, strict=True)])
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
        kind, rows = asks[0].kind, [ask.sampling for ask in asks]
        known, settings = self._warps.get(kind, ((), None))
        if settings is None or known != rows:
            settings = (Warp.image if asks[0].in_image else Warp.text)(rows, self.device)
            self._warps[kind] = (rows, settings)
        return settings

    def _rows(self, asks: list[Ask]) -> Tensor:
        """The number of the ask that each place belongs to."""
        rows = [number for number, ask in enumerate(asks) for _ in range(ask.places)]
        return torch.tensor(rows).to(self.device)

    def _load_text_head(self) -> None:
        self.text_head = Head(self._product, self._text_ids, self.device)
        self._blocks: dict[tuple[Grammar, bool], Tensor] = {}
        self._unseen_V = self.seen(())


def _compiled(transformer: Transformer, cache: Cache) -> CpuStep | None:
    bits = own_bits(transformer)
    if bits is None or not fits(transformer, cache.layers) or not available():
        return None
    return CpuStep(transformer, cache.layers, bits, cache.scales)


class _Logits:
    """Logits in fp32 of one head, of the rows that some asks without windows draw from."""

    def __init__(self, head: Head, x_TD: Tensor, step: Step, asks: Sequence[Ask]) -> None:
        branches = dict.fromkeys(chain.from_iterable(ask.branches for ask in asks))
        self._branches = {branch: row for row, branch in enumerate(branches)}
        rows = [step.row_of[branch] for branch in branches]
        x_RD = x_TD if rows == list(range(len(x_TD))) else x_TD.index_select(0, torch.tensor(rows))
        self._logits_RV = head.logits(x_RD).float()
        self.columns = self._logits_RV.shape[1]

    def addresses(self, ask: Ask) -> tuple[int, int, int]:
        """Where the rows of an ask's branches begin in memory."""
        first, row_bytes = self._logits_RV.data_ptr(), 4 * self._logits_RV.stride(0)
        full, image_only, unconditional = (self._branches[branch] for branch in ask.branches)
        return (
            first + row_bytes * full,
            first + row_bytes * image_only,
            first + row_bytes * unconditional,
        )


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


class Step:
    """Where each token of a step stands, where its keys go, and what it sees.

    `drawing` are the rows that something may be drawn from: the last token of each piece and its
    drafts. `row_of` tells where among them those of a branch begin.
    """

    def __init__(self, pieces: Sequence[Piece], cache: Cache) -> None:
        self._cache, device = cache, cache.device
        singles = sorted((p for p in pieces if p.size == 1 and not p.drafts), key=_slot)
        longer = [p for p in pieces if p.size > 1 or p.drafts]
        tokens: list[int] = []
        places: list[int] = []
        slots: list[int] = []
        self.last_of: dict[Branch, int] = {}
        self.row_of: dict[Branch, int] = {}
        self.drawing: list[int] = []
        for piece in (*singles, *longer):
            size = piece.size + len(piece.drafts)
            last = len(tokens) + piece.size - 1
            tokens += piece.tokens
            places += range(piece.start, piece.start + size)
            slots += [_slot(piece)] * size
            self.last_of[piece.branch], self.row_of[piece.branch] = last, len(self.drawing)
            self.drawing += range(last, len(tokens))
        self.pieces = [*singles, *longer]
        self.single = len(self.drawing) == len(tokens)
        indices_3T = torch.tensor([tokens, places, slots]).to(device)
        self.tokens_T, self.positions_T, self.slots_T = indices_3T
        self._singles, self._longer = singles, longer

    # The compiled step needs none of these three.

    @cached_property
    def _store_TK(self) -> Tensor:
        heads_K = torch.arange(self._cache.heads, device=self._cache.device)
        rows_TK = self.slots_T[:, None] * self._cache.heads + heads_K
        return (rows_TK * self._cache.length + self.positions_T[:, None]).flatten()

    @cached_property
    def _groups(self) -> list[_Group]:
        return list(self._grouped(self._singles))

    @cached_property
    def _segments(self) -> list[_Segment]:
        return list(self._segmented(self._longer, len(self._singles)))

    def attentions(self) -> list[partial[Tensor]]:
        return [partial(self._attend, kept) for kept in self._cache.kept]

    def _attend(self, kept: Kept, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:
        kept.store(self._store_TK, k_TKH, v_TKH)
        out = [_look_back(kept, q_TNH[group.rows], group) for group in self._groups]
        out += [_read_on(kept, q_TNH[segment.rows], segment) for segment in self._segments]
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
            mask, end = None, piece.end + len(piece.drafts)
            if piece.start:
                places_T = torch.arange(end, device=self._cache.device)
                mask = places_T <= places_T[piece.start :, None]
            rows = slice(row, row + end - piece.start)
            yield _Segment(rows, _slot(piece), end, not piece.start, mask)
            row += end - piece.start

    def _padding(self, ends: Sequence[int]) -> Tensor | None:
        """What is added to the scores of rows that are shorter than the longest."""
        end = max(ends)
        if min(ends) == end:
            return None
        beyond = torch.arange(end, device=self._cache.device) >= self._tensor(ends)[:, None]
        return torch.zeros_like(beyond, dtype=torch.float32).masked_fill_(beyond, -torch.inf)[
            :, None, None
        ]

    def _tensor(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values).to(self._cache.device)


def _one_row(attend: LookBack, q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor) -> Tensor:
    return attend(q_BTNH[0], k_BTKH[0], v_BTKH[0])[None]


def _look_back(kept: Kept, q_BNH: Tensor, group: _Group) -> Tensor:
    k_BKPH, v_BKPH = kept.read(group.slots, group.end, q_BNH.dtype)
    mask = None if group.mask is None else group.mask.to(q_BNH.dtype)
    # One token sees all that its mask leaves, so the queries that share a key stand as its rows.
    q_BKGH = q_BNH.unflatten(1, (k_BKPH.shape[1], -1))
    out_BKGH = F.scaled_dot_product_attention(q_BKGH, k_BKPH, v_BKPH, attn_mask=mask)
    return out_BKGH.reshape(q_BNH.shape)


def _read_on(kept: Kept, q_TNH: Tensor, segment: _Segment) -> Tensor:
    k_KPH, v_KPH = kept.read(segment.slot, segment.end, q_TNH.dtype)
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
