"""Who runs next: requests take slots of the cache, read in pieces, step back, and end.

A request reads through branches: one for text, two or three while it draws a guided image. Each
branch lists the tokens that it must have read, and how many of them its slot holds. So a prompt
read in pieces, a single new token and a return after preemption are one case. Requests are served
by priority, then by arrival. Nothing here knows a tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import NamedTuple, Protocol

from earlyfusion.errors import SettingError


@dataclass(eq=False)
class Branch:
    """One condition of a request: `tokens` to read, the first `read` of which are in `slot`."""

    tokens: list[int]
    slot: int | None = None
    read: int = 0

    @property
    def pending(self) -> int:
        return len(self.tokens) - self.read


class Entry(Protocol):
    """What the scheduler needs to know of a request (`engine/handle.py`).

    The smaller `priority` runs first, then the smaller `number`. `drafts` are read behind the last
    token of each branch, but never count as read.
    """

    @property
    def branches(self) -> list[Branch]: ...
    @property
    def drafts(self) -> Sequence[int]: ...
    @property
    def priority(self) -> int: ...
    @property
    def number(self) -> int: ...


class Copy(NamedTuple):
    """The first `tokens` tokens of slot `source` are copied to slot `target`."""

    source: int
    target: int
    tokens: int


class Piece(NamedTuple):
    """`size` tokens of a branch from `start` on, and drafts behind them, to be read in a step."""

    branch: Branch
    start: int
    size: int
    drafts: Sequence[int] = ()

    @property
    def slot(self) -> int:
        if self.branch.slot is None:
            raise RuntimeError("a piece was planned for a branch without a slot")
        return self.branch.slot

    @property
    def end(self) -> int:
        return self.start + self.size

    @property
    def tokens(self) -> list[int]:
        return [*self.branch.tokens[self.start : self.start + self.size], *self.drafts]


@dataclass
class Plan:
    """One step: first the copies, in order, then all pieces at once; `ready` will then draw."""

    copies: list[Copy] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)
    ready: list[Entry] = field(default_factory=list)


class Scheduler:
    """Shares `slots` slots of the cache, and reads at most `chunk` tokens of prompts per step."""

    def __init__(self, slots: int, chunk: int) -> None:
        if slots < 1 or chunk < 2:
            raise SettingError(f"slots={slots}, chunk={chunk}: at least 1 and 2 are needed")
        self.slots = Slots(slots)
        self.chunk = chunk
        self.waiting: list[Entry] = []
        self.running: list[Entry] = []  # always in order
        self.preemptions = 0

    def add(self, entry: Entry) -> None:
        self.waiting.append(entry)

    def remove(self, entry: Entry) -> None:
        """Take a request out. Its slots keep what they hold until they are needed."""
        self.release(entry.branches)
        for queue in (self.waiting, self.running):
            if entry in queue:
                queue.remove(entry)

    def release(self, branches: Iterable[Branch]) -> None:
        for branch in branches:
            self.slots.release(branch)

    def restart(self) -> None:
        """Have all requests read their tokens again, as the weights have changed."""
        for entry in list(self.running):
            self._step_back(entry)
        self.slots.forget()

    def schedule(self) -> Plan:
        """The next step. It counts as done: the tokens of its pieces are read from here on."""
        plan = Plan()
        for entry in list(self.running):
            if _without_slot(entry):
                self._serve(entry, plan)
        if self.waiting:
            self._admit(plan)
        left = self.chunk
        for entry in self.running:
            left -= self._feed(entry, plan, left)
        return plan

    def _serve(self, entry: Entry, plan: Plan) -> None:
        """Slots for new branches of a running request; requests behind it in order make room."""
        # An earlier one may have preempted it meanwhile.
        while entry in self.running and len(_without_slot(entry)) > self.slots.free:
            last = self.running[-1]
            if last is entry:
                return
            self._preempt(last)
        if entry in self.running:
            self._assign(entry, plan)

    def _admit(self, plan: Plan) -> None:
        """Let waiting requests in, in order. Only requests of a lower priority make room."""
        self.waiting.sort(key=_order)
        while self.waiting:
            first = self.waiting[0]
            # Free slots belong to a running request that still lacks some and is before it.
            stalled = any(_order(e) < _order(first) and _without_slot(e) for e in self.running)
            if stalled or len(first.branches) > self._within_reach(first):
                return
            while len(first.branches) > self.slots.free:
                self._preempt(self.running[-1])
            self.waiting.remove(first)
            self.running.append(first)
            self.running.sort(key=_order)
            self._assign(first, plan)

    def _within_reach(self, entry: Entry) -> int:
        """The number of slots that are free, or held by requests of a lower priority."""
        lower = (e for e in self.running if e.priority > entry.priority)
        held = sum(len(e.branches) - len(_without_slot(e)) for e in lower)
        return self.slots.free + held

    def _assign(self, entry: Entry, plan: Plan) -> None:
        for branch in _without_slot(entry):
            copied = self.slots.take(branch, first=branch is entry.branches[0])
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

    def _feed(self, entry: Entry, plan: Plan, left: int) -> int:
        """Plan the pieces of one request; the number of tokens they take of the step's `chunk`."""
        if _without_slot(entry):
            return 0
        branches, drafts = entry.branches, entry.drafts
        pending = sum(len(branch.tokens) - branch.read for branch in branches)
        single = pending == len(branches)
        if single or pending <= left:
            plan.pieces += [_read(b, len(b.tokens) - b.read, drafts) for b in branches]
            plan.ready.append(entry)
            return 0 if single else pending
        # Guidance mixes the logits of all branches, so the last token of each waits for the step
        # in which all of them are read.
        taken = 0
        for branch in branches:
            number = min(branch.pending - 1, left - taken)
            if number > 0:
                plan.pieces.append(_read(branch, number))
                taken += number
        return taken


class Slots:
    """Slots of the cache. A free one keeps its tokens, for a request that begins with the same.

    With `shares` off every request reads its whole prompt.
    """

    def __init__(self, number: int) -> None:
        self.shares = True
        self.owners: list[Branch | None] = [None] * number
        self.cached: list[list[int]] = [[] for _ in range(number)]  # tokens of each free slot
        self._left: list[int] = [-1] * number  # when its last owner left
        self._clock = count()

    def __len__(self) -> int:
        return len(self.owners)

    @property
    def free(self) -> int:
        return self.owners.count(None)

    def take(self, branch: Branch, first: bool) -> Copy | None:
        """Give a slot to a branch, with as many of its tokens as any slot holds already."""
        source, shared = self._longest_prefix(branch.tokens)
        # The last token is always read, for the logits behind it.
        shared = min(shared, len(branch.tokens) - 1) if self.shares else 0
        # A free slot that holds little else is continued in place.
        whole = self.owners[source] is None and 0 < len(self.cached[source]) <= shared + 1
        target = source if whole else self._choose(first)
        self.owners[target], self.cached[target] = branch, []
        branch.slot, branch.read = target, shared
        return Copy(source, target, shared) if shared and source != target else None

    def release(self, branch: Branch) -> None:
        if branch.slot is None:
            return
        slot, branch.slot = branch.slot, None
        self.owners[slot], self.cached[slot] = None, branch.tokens[: branch.read]
        self._left[slot], branch.read = next(self._clock), 0

    def held(self, slot: int) -> list[int]:
        """The tokens whose keys and values a slot holds."""
        owner = self.owners[slot]
        return self.cached[slot] if owner is None else owner.tokens[: owner.read]

    def forget(self) -> None:
        """Free slots no longer hold anything: the weights have changed."""
        self.cached = [[] for _ in self.cached]

    def drop(self, slot: int) -> None:
        """A free slot no longer holds anything."""
        self.cached[slot] = []

    def _longest_prefix(self, tokens: list[int]) -> tuple[int, int]:
        """The slot that holds the most tokens of the beginning, and how many; else slot 0."""
        best = 0, 0
        for slot, owner in enumerate(self.owners):
            held, size = self.cached[slot], len(self.cached[slot])
            if owner is not None:
                held, size = owner.tokens, owner.read
            # Most slots are empty or begin with another token.
            if size > best[1] and held[0] == tokens[0]:
                shared = _shared(held, tokens, min(size, len(tokens)))
                best = max(best, (slot, shared), key=lambda found: found[1])
        return best

    def _choose(self, first: bool) -> int:
        # Attention reads neighbouring slots together, and the branches of one image have about the
        # same length: first branches gather at the low end, further ones at the high end. The more
        # recent half of the free slots keeps its tokens.
        free = [slot for slot, owner in enumerate(self.owners) if owner is None]
        empty = [slot for slot in free if not self.cached[slot]]
        oldest = sorted(free, key=lambda slot: self._left[slot])[: (len(free) + 1) // 2]
        return (min if first else max)(empty or oldest)


def _read(branch: Branch, number: int, drafts: Sequence[int] = ()) -> Piece:
    piece = Piece(branch, branch.read, number, drafts)
    branch.read += number
    return piece


def _shared(held: list[int], tokens: list[int], limit: int) -> int:
    """The number of tokens, at most `limit`, that two lists have in common at the beginning."""
    low, high = 0, limit
    if held[:high] == tokens[:high]:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if held[:middle] == tokens[:middle] else (low, middle)
    return low


def _without_slot(entry: Entry) -> list[Branch]:
    return [branch for branch in entry.branches if branch.slot is None]


def _order(entry: Entry) -> tuple[int, int]:
    return entry.priority, entry.number
