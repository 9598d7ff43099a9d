"""Who runs next: requests take blocks of the cache, read their prompts in pieces, are preempted,
end.

A request reads through branches: one for text, two or three while it draws a guided image. A branch
lists the tokens to be read, and how many of them its blocks hold. So a prompt read in pieces, a
single new token and a return after preemption are the same case. Requests are served by priority,
then by arrival. A `Plan` is what one step reads, and a `Step` puts its tokens in one row, the same
for all back ends. No tensor appears here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import NamedTuple, Protocol

from earlyfusion.engine.blocks import BlockPool, Branch, Copy
from earlyfusion.errors import SettingError

ALONE = 4
"""Times `chunk` that a step reads of prompts if no request draws in it."""
_STEP_ROWS = 8
"""Rows whose products take about as long as reading the weights, which every step does."""


class Entry(Protocol):
    """The scheduler's view of a request (`engine/handle.py`). The smaller `priority` runs first,
    then the smaller `number`. `drafts` are read behind the last token of each branch, but never
    count as read. `reserve` is the number of tokens that are sure to come: within an image, the
    rest of its codes."""

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
    """`size` tokens of a branch from `start` on, then its drafts, to be read in one step."""

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
    """One step: the copies, in order; then all pieces at once; then a draw for each of `ready`."""

    copies: list[Copy] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)
    ready: list[Entry] = field(default_factory=list)


class Step:
    """The tokens of a plan's pieces in one row: single tokens first, by length, then longer pieces.
    `drawing` are the rows that may be drawn from: the last token of each piece, and its drafts.
    `row_of` is the index, among these, of a branch's first row."""

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
        self.drawing: list[int] = []
        for piece in self.pieces:
            last = len(self.tokens) + piece.size - 1
            self.tokens += piece.tokens
            self.positions += range(piece.start, piece.start + piece.rows)
            self.row_of[piece.branch] = len(self.drawing)
            self.drawing += range(last, len(self.tokens))
        self.draws_all = len(self.drawing) == len(self.tokens)


class Scheduler:
    """Shares the blocks of the cache among at most `most_running` requests. Beside one request that
    draws, a step reads at most `chunk` tokens of prompts, so that this one does not wait long.
    Beside several it reads more, see `_most_read`, up to ALONE times `chunk`."""

    def __init__(self, pool: BlockPool, chunk: int, most_running: int = 256) -> None:
        if chunk < 2 or most_running < 1:
            raise SettingError(
                f"chunk={chunk}, most_running={most_running}: at least 2 and 1 are needed"
            )
        self.pool, self.chunk, self.most_running = pool, chunk, most_running
        self.waiting: list[Entry] = []
        self.running: list[Entry] = []  # always in the order of `_order`
        self.preemptions = 0

    def add(self, entry: Entry) -> None:
        self.waiting.append(entry)

    def remove(self, entry: Entry) -> None:
        """Take a request out. Its blocks keep their content until they are needed."""
        self.release(entry.branches)
        for queue in (self.waiting, self.running):
            if entry in queue:
                queue.remove(entry)

    def release(self, branches: Iterable[Branch]) -> None:
        for branch in branches:
            self.pool.release(branch)

    def restart(self) -> None:
        """Have all requests read their tokens again, as the weights have changed."""
        for entry in list(self.running):
            self._step_back(entry)
        self.pool.forget()

    def schedule(self) -> Plan:
        """The next step. The tokens of its pieces count as read from now on."""
        plan = Plan()
        lacking = [entry for entry in self.running if self._missing(entry)]
        for entry in lacking:
            self._serve(entry, plan)
        if self.waiting:
            self._admit(plan)
        unread = [sum(len(b.tokens) - b.read for b in entry.branches) for entry in self.running]
        left = self._most_read(unread)
        for entry, number in zip(self.running, unread, strict=True):
            # Only `_serve` can leave a running request without the blocks that it needs.
            if not (entry in lacking and self._missing(entry)):
                left -= self._feed(entry, number, plan, left)
        return plan

    def grow(self, entries: Iterable[Entry], tokens: int) -> None:
        """Give requests blocks for `tokens` more tokens, while each running one could
        get one more."""
        for entry in entries:
            for branch in entry.branches:
                size = len(branch.tokens) + tokens
                missing = self.pool.needed(size) - len(branch.blocks)
                if missing > 0 and self.pool.free - missing >= len(self.running):
                    # `extend` copies nothing here, as the branch has read all its tokens.
                    self.pool.extend(branch, size)

    def _most_read(self, unread: Sequence[int]) -> int:
        """The most tokens of prompts that the next step reads; `unread` are the unread tokens of
        the running requests. The more rows are drawn, the longer
        a step takes anyway, and the more requests wait for their first token for each one that
        draws, the more of them a larger piece helps. Depends on counts only, not on time, so that
        the same requests are always cut alike."""
        requests = zip(self.running, unread, strict=True)
        drawing = [entry for entry, number in requests if number == len(entry.branches)]
        if not drawing:
            return ALONE * self.chunk
        rows = sum(len(entry.branches) * (1 + len(entry.drafts)) for entry in drawing)
        waiting = max(len(self.running) - len(drawing), len(drawing))
        # chunk * (1 + (rows - 1) / _STEP_ROWS) * (waiting / drawing), in whole numbers.
        most = self.chunk * (_STEP_ROWS + rows - 1) * waiting // (_STEP_ROWS * len(drawing))
        return min(most, ALONE * self.chunk)

    def _size(self, entry: Entry, branch: Branch) -> int:
        """The tokens that a branch needs room for: its own, and those sure to come or tried."""
        return len(branch.tokens) + max(entry.reserve, len(entry.drafts))

    def _missing(self, entry: Entry) -> int:
        """The number of blocks that a request lacks, shared prefixes not considered."""
        size = self.pool.size
        extra = max(entry.reserve, len(entry.drafts)) + size - 1
        missing = 0
        for branch in entry.branches:
            missing += max(0, (len(branch.tokens) + extra) // size - len(branch.blocks))
        return missing

    def _fits(self, entry: Entry, spare: int = 0) -> bool:
        """Whether the free blocks are enough for a request and `spare` more."""
        missing = self._missing(entry)
        if missing + spare <= self.pool.free:
            return True
        unread = [branch for branch in entry.branches if not branch.blocks]
        prefixes = [self.pool.find(branch.tokens, branch.adapter) for branch in unread]
        shared = sum(len(prefix.blocks) for prefix in prefixes)
        return missing - shared + spare <= self.pool.free - self.pool.unread(prefixes)

    def _serve(self, entry: Entry, plan: Plan) -> None:
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
        self.waiting.sort(key=_order)
        while self.waiting:
            first = self.waiting[0]
            # A running request earlier in order that lacks blocks comes first.
            if any(_order(e) < _order(first) and self._missing(e) for e in self.running):
                return
            if self._shares_soon(first):
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
            self.running.sort(key=_order)
            self._assign(first, plan)

    def _shares_soon(self, entry: Entry) -> bool:
        """Whether an earlier request is still reading blocks that this one begins with. Waiting for
        it means that many requests with one prompt read it once."""
        tokens, adapter = entry.branches[0].tokens, entry.branches[0].adapter
        end = (len(self.pool.find(tokens, adapter).blocks) + 1) * self.pool.size
        if not self.pool.shares or end >= len(tokens):
            return False
        before = (e for e in self.running if _order(e) < _order(entry))
        return any(
            branch.adapter == adapter
            and branch.read < end < len(branch.tokens)
            and branch.tokens[:end] == tokens[:end]
            for other in before
            for branch in other.branches
        )

    def _has_room(self, entry: Entry, without: Sequence[Entry] = ()) -> bool:
        if len(self.running) - len(without) >= self.most_running:
            return False
        # Earlier running requests may each need a block soon, and would take it from this one,
        # which would then have read its prompt for nothing.
        spare = sum(_order(e) < _order(entry) and not e.reserve for e in self.running)
        return self._fits(entry, spare - self._held_alone(without))

    def _held_alone(self, entries: Sequence[Entry]) -> int:
        """The number of blocks that only these requests hold."""
        reads = Counter(block for e in entries for b in e.branches for block in b.blocks)
        return sum(self.pool.references[block] == number for block, number in reads.items())

    def _assign(self, entry: Entry, plan: Plan) -> None:
        # Prefixes of all branches first, so that `extend` does not evict one of their blocks.
        for branch in entry.branches:
            if not branch.blocks:
                self.pool.give(branch, self.pool.find(branch.tokens, branch.adapter))
        for branch in entry.branches:
            copied = self.pool.extend(branch, self._size(entry, branch))
            if copied is not None:
                plan.copies.append(copied)

    def _preempt(self, entry: Entry) -> None:
        self.preemptions += 1
        self._step_back(entry)

    def _step_back(self, entry: Entry) -> None:
        self.running.remove(entry)
        self.release(entry.branches)
        self.waiting.append(entry)
        self.waiting.sort(key=_order)

    def _feed(self, entry: Entry, unread: int, plan: Plan, left: int) -> int:
        """Plan the pieces of one request with this many unread tokens; the number of tokens that
        they take of the step's `chunk`."""
        branches, drafts = entry.branches, entry.drafts
        single = unread == len(branches)
        if single or unread <= left:
            for branch in branches:
                self._read(plan, branch, len(branch.tokens) - branch.read, drafts)
            plan.ready.append(entry)
            return 0 if single else unread
        # Guidance mixes the logits of all branches, so the last token of each must be read in the
        # same step.
        taken = 0
        for branch in branches:
            number = min(branch.pending - 1, left - taken)
            if number > 0:
                self._read(plan, branch, number)
                taken += number
        return taken

    def _read(self, plan: Plan, branch: Branch, number: int, drafts: Sequence[int] = ()) -> None:
        plan.pieces.append(Piece(branch, branch.read, number, drafts))
        # Within the block that the pool knows it to be filling, there is nothing to note.
        if branch.read + number < branch.filling_to:
            branch.read += number
        else:
            self.pool.read(branch, number)


def _order(entry: Entry) -> tuple[int, int]:
    return entry.priority, entry.number
