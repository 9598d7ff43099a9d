"""Which requests run next, and which of their tokens a step computes (chunked prefill). No tensors
here.

A request has one branch for text, two or three while it generates a guided image. A branch has a
list of tokens and the number of those that are computed, whose keys and values are in its blocks.
So prefill in chunks, decoding, and computing again after a preemption are one case: a branch has
pending tokens. Requests are served by priority, then by arrival. A `Plan` is what one step does; a
`Step` concatenates its tokens, in the same way for all back ends.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import NamedTuple, Protocol

from earlyfusion.engine.blocks import BlockPool, Branch, Copy
from earlyfusion.errors import SettingError

PREFILL_ONLY_FACTOR = 4
"""A step in which no request samples computes this many times `chunk` tokens of prompts."""
_REST = 8
"""A step computes the last tokens of a prompt too if they exceed its budget by at most one in so
many: a step of their own would read all weights for a few tokens."""
_CHEAP_ROWS = 8
"""Up to this many rows, a step takes about as long as with one row: most of the time goes into
reading the weights."""


class Entry(Protocol):
    """The scheduler's view of a request (`engine/handle.py`). Requests run in ascending order of
    `priority`, then of `number`. `drafts` are computed after the last token of each branch, but do
    not count as computed. `reserve` is the number of tokens that are sure to come: within an image,
    the rest of its codes."""

    @property
    def branches(self) -> list[Branch]: ...
    @property
    def drafts(self) -> Sequence[int]: ...
    @property
    def reserve(self) -> int: ...
    @property
    def priority(self) -> int: ...
    @property
    def number(self) -> int: ...


class Piece(NamedTuple):
    """Tokens of a branch for one step: `size` tokens from `start` on, then its drafts."""

    branch: Branch
    start: int
    size: int
    drafts: Sequence[int] = ()

    @property
    def end(self) -> int:
        return self.start + self.size

    @property
    def rows(self) -> int:
        return self.size + len(self.drafts)

    @property
    def tokens(self) -> list[int]:
        return [*self.branch.tokens[self.start : self.start + self.size], *self.drafts]


@dataclass
class Plan:
    """One step: make the copies, in order; compute all pieces; sample for each of `ready`."""

    copies: list[Copy] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)
    ready: list[Entry] = field(default_factory=list)


class Step:
    """The tokens of a plan's pieces, concatenated: first `singles` (pieces of one token, shortest
    context first), then `longer` pieces. Logits are needed for the last token of each piece and for
    its drafts: `logits_indices` are the indices of these tokens, and `row_of[branch]` is the index
    within `logits_indices` of a branch's first one."""

    def __init__(self, pieces: Iterable[Piece]) -> None:
        self.singles: list[Piece] = []
        self.longer: list[Piece] = []
        for piece in pieces:
            (self.longer if piece.size > 1 or piece.drafts else self.singles).append(piece)
        self.singles.sort(key=attrgetter("start"))
        self.pieces = [*self.singles, *self.longer]
        self.tokens: list[int] = []
        self.positions: list[int] = []
        self.row_of: dict[Branch, int] = {}
        self.logits_indices: list[int] = []
        for piece in self.pieces:
            last = len(self.tokens) + piece.size - 1
            self.tokens += piece.tokens
            self.positions += range(piece.start, piece.start + piece.rows)
            self.row_of[piece.branch] = len(self.logits_indices)
            self.logits_indices += range(last, len(self.tokens))
        self.needs_all_logits = len(self.logits_indices) == len(self.tokens)


class Scheduler:
    """Shares the blocks of the cache among at most `most_running` requests. A step in which one
    request samples computes at most `chunk` tokens of prompts, so that this request does not wait
    long. A step in which several sample, or none, may compute more (`_prompt_budget`)."""

    def __init__(self, pool: BlockPool, chunk: int, most_running: int = 256) -> None:
        if chunk < 2 or most_running < 1:
            raise SettingError(
                f"chunk={chunk}, most_running={most_running}: at least 2 and 1 are needed"
            )
        self.pool, self.chunk, self.most_running = pool, chunk, most_running
        self.waiting: list[Entry] = []
        self.running: list[Entry] = []  # always in the order of `_sort_key`
        self.preemptions = 0

    def add(self, entry: Entry) -> None:
        self.waiting.append(entry)

    def remove(self, entry: Entry) -> None:
        """Remove a request. Its blocks keep their content until they are needed."""
        self.release(entry.branches)
        for queue in (self.waiting, self.running):
            if entry in queue:
                queue.remove(entry)

    def release(self, branches: Iterable[Branch]) -> None:
        for branch in branches:
            self.pool.release(branch)

    def restart(self) -> None:
        """Have all requests compute their tokens again: the weights have changed, or a step has
        failed."""
        for entry in list(self.running):
            self._requeue(entry)
        self.pool.forget_all()

    def schedule(self) -> Plan:
        """The next step. The tokens of its pieces count as computed from now on."""
        plan = Plan()
        lacking = [entry for entry in self.running if self._missing_blocks(entry)]
        for entry in lacking:
            self._allocate(entry, plan)
        if self.waiting:
            self._admit(plan)
        pending = [
            sum(len(b.tokens) - b.num_computed for b in entry.branches) for entry in self.running
        ]
        budget = self._prompt_budget(pending)
        for entry, number in zip(self.running, pending, strict=True):
            # Only `_allocate` can leave a running request without the blocks that it needs.
            if not (entry in lacking and self._missing_blocks(entry)):
                budget -= self._plan_pieces(entry, number, plan, budget)
        return plan

    def grow(self, entries: Iterable[Entry], tokens: int) -> None:
        """Give requests blocks for `tokens` more tokens, as long as enough blocks stay free for
        each running request to get one more."""
        for entry in entries:
            for branch in entry.branches:
                size = len(branch.tokens) + tokens
                missing = self.pool.blocks_for(size) - len(branch.blocks)
                if missing > 0 and self.pool.free - missing >= len(self.running):
                    # `extend` copies nothing here, as the branch has no pending tokens.
                    self.pool.extend(branch, size)

    def _prompt_budget(self, pending: Sequence[int]) -> int:
        """The maximum number of prompt tokens in the next step. `pending` has the number of pending
        tokens of each running request.

        The budget grows with the number of rows that are sampled, which make the step longer
        anyway, and with the ratio of requests that wait for their first token to requests that
        sample. It depends on counts only, not on time, so that the same requests are always
        computed in the same pieces.
        """
        requests = zip(self.running, pending, strict=True)
        sampling = [entry for entry, number in requests if number == len(entry.branches)]
        if not sampling:
            return PREFILL_ONLY_FACTOR * self.chunk
        rows = sum(len(entry.branches) * (1 + len(entry.drafts)) for entry in sampling)
        waiting = max(len(self.running) - len(sampling), len(sampling))
        # chunk * (1 + (rows - 1) / _CHEAP_ROWS) * (waiting / sampling), in whole numbers.
        budget = self.chunk * (_CHEAP_ROWS + rows - 1) * waiting // (_CHEAP_ROWS * len(sampling))
        return min(budget, PREFILL_ONLY_FACTOR * self.chunk)

    def _size(self, entry: Entry, branch: Branch) -> int:
        """The number of tokens for which a branch needs blocks, with its reserve or its drafts."""
        return len(branch.tokens) + max(entry.reserve, len(entry.drafts))

    def _missing_blocks(self, entry: Entry) -> int:
        """The number of blocks that a request lacks if it shares no prefix."""
        size = self.pool.size
        extra = max(entry.reserve, len(entry.drafts)) + size - 1
        missing = 0
        for branch in entry.branches:
            missing += max(0, (len(branch.tokens) + extra) // size - len(branch.blocks))
        return missing

    def _fits(self, entry: Entry, spare: int = 0) -> bool:
        """Whether there are enough free blocks for a request, and `spare` more."""
        missing = self._missing_blocks(entry)
        if missing + spare <= self.pool.free:
            return True
        new = [branch for branch in entry.branches if not branch.blocks]
        prefixes = [self.pool.find_prefix(branch.tokens, branch.adapter) for branch in new]
        shared = sum(len(prefix.blocks) for prefix in prefixes)
        return missing - shared + spare <= self.pool.free - self.pool.count_free(prefixes)

    def _allocate(self, entry: Entry, plan: Plan) -> None:
        """Give a running request its blocks, preempting requests behind it in order if needed."""
        # A request served earlier in this step may have preempted it.
        while entry in self.running and not self._fits(entry):
            last = self.running[-1]
            if last is entry:
                return
            self._preempt(last)
        if entry in self.running:
            self._assign(entry, plan)

    def _admit(self, plan: Plan) -> None:
        """Admit waiting requests in order, preempting only those of lower priority."""
        self.waiting.sort(key=_sort_key)
        while self.waiting:
            first = self.waiting[0]
            # A running request earlier in order that lacks blocks comes first.
            earlier = [entry for entry in self.running if _sort_key(entry) < _sort_key(first)]
            if any(self._missing_blocks(entry) for entry in earlier):
                return
            if self._waits_for_prefix(first):
                return
            lower = [e for e in self.running if e.priority > first.priority]
            if not self._has_room(first, lower):
                return
            while not self._has_room(first):
                if not lower:
                    return
                self._preempt(lower.pop())
            self.waiting.remove(first)
            self.running.append(first)
            self.running.sort(key=_sort_key)
            self._assign(first, plan)

    def _waits_for_prefix(self, entry: Entry) -> bool:
        """Whether an earlier request is still computing the first block that this one could share.
        Waiting for it lets many requests with the same prompt compute the prompt once."""
        tokens, adapter = entry.branches[0].tokens, entry.branches[0].adapter
        end = (len(self.pool.find_prefix(tokens, adapter).blocks) + 1) * self.pool.size
        if not self.pool.prefix_caching or end >= len(tokens):
            return False
        before = (e for e in self.running if _sort_key(e) < _sort_key(entry))
        return any(
            branch.adapter == adapter
            and branch.num_computed < end < len(branch.tokens)
            and branch.tokens[:end] == tokens[:end]
            for other in before
            for branch in other.branches
        )

    def _has_room(self, entry: Entry, without: Sequence[Entry] = ()) -> bool:
        if len(self.running) - len(without) >= self.most_running:
            return False
        # Each earlier running request may soon need a block, and would take it from this request,
        # which would then have computed its prompt in vain.
        spare = sum(_sort_key(e) < _sort_key(entry) and not e.reserve for e in self.running)
        return self._fits(entry, spare - self._exclusive_blocks(without))

    def _exclusive_blocks(self, entries: Sequence[Entry]) -> int:
        """The number of blocks that only these requests hold."""
        uses = Counter(block for e in entries for b in e.branches for block in b.blocks)
        return sum(self.pool.references[block] == number for block, number in uses.items())

    def _assign(self, entry: Entry, plan: Plan) -> None:
        # Prefixes of all branches first, so that `extend` does not evict one of their blocks.
        for branch in entry.branches:
            if not branch.blocks:
                self.pool.attach(branch, self.pool.find_prefix(branch.tokens, branch.adapter))
        for branch in entry.branches:
            copied = self.pool.extend(branch, self._size(entry, branch))
            if copied is not None:
                plan.copies.append(copied)
            if branch.num_cached is None:
                branch.num_cached = branch.num_computed

    def _preempt(self, entry: Entry) -> None:
        self.preemptions += 1
        self._requeue(entry)

    def _requeue(self, entry: Entry) -> None:
        self.running.remove(entry)
        self.release(entry.branches)
        self.waiting.append(entry)
        self.waiting.sort(key=_sort_key)

    def _plan_pieces(self, entry: Entry, pending: int, plan: Plan, budget: int) -> int:
        """Add the pieces of one request, which has `pending` pending tokens, to the plan. Prompts
        may take `budget` tokens, and a few more to end a prompt. Returns the number that they
        took."""
        branches, drafts = entry.branches, entry.drafts
        decodes = pending == len(branches)  # one new token per branch
        if decodes or pending <= budget + budget // _REST:
            for branch in branches:
                self._add_piece(plan, branch, len(branch.tokens) - branch.num_computed, drafts)
            plan.ready.append(entry)
            return 0 if decodes else pending
        # Guidance combines the logits of all branches, so the last token of each must be computed
        # in the same step.
        taken = 0
        for branch in branches:
            number = min(branch.pending - 1, budget - taken)
            if number > 0:
                self._add_piece(plan, branch, number)
                taken += number
        return taken

    def _add_piece(
        self, plan: Plan, branch: Branch, number: int, drafts: Sequence[int] = ()
    ) -> None:
        plan.pieces.append(Piece(branch, branch.num_computed, number, drafts))
        # Within a registered partial block there is nothing new to register.
        if branch.num_computed + number < branch.partial_end:
            branch.num_computed += number
        else:
            self.pool.mark_computed(branch, number)


def _sort_key(entry: Entry) -> tuple[int, int]:
    return entry.priority, entry.number
