"""Who runs next: requests take slots of the cache, read in pieces, step back, and end.

A request reads through branches: one for text, two or three while it draws a guided image. Each
branch lists the tokens that it must have read, and how many of them its slot holds; so a prompt in
pieces, a single new token and a return after preemption are one case. Order is priority, then
arrival. Nothing here knows a tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import NamedTuple

from earlyfusion.errors import SettingError


@dataclass(eq=False)
class Branch:
    """`tokens` to read, of which the first `read` are in `slot`; without a slot none are."""

    tokens: list[int]
    slot: int | None = None
    read: int = 0

    @property
    def pending(self) -> int:
        return len(self.tokens) - self.read


@dataclass(eq=False)
class Entry:
    """A request as the scheduler sees it; the smaller `priority` goes first.

    `drafts` are read behind the last token of each branch, but never count as read.
    """

    branches: list[Branch]
    priority: int = 0
    drafts: Sequence[int] = ()
    number: int = field(default_factory=count().__next__)

    @property
    def order(self) -> tuple[int, int]:
        return self.priority, self.number

    @property
    def without_slot(self) -> list[Branch]:
        return [branch for branch in self.branches if branch.slot is None]


class Copy(NamedTuple):
    """The first `tokens` tokens of a slot are repeated in another."""

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
    def end(self) -> int:
        return self.start + self.size

    @property
    def tokens(self) -> list[int]:
        return [*self.branch.tokens[self.start : self.end], *self.drafts]


@dataclass
class Plan:
    """One step: first the copies, in order, then all pieces at once; `ready` will then draw."""

    copies: list[Copy] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)
    ready: list[Entry] = field(default_factory=list)


class Scheduler:
    """Shares `slots` places of the cache, and reads at most `chunk` tokens of prompts a step."""

    def __init__(self, slots: int, chunk: int) -> None:
        if slots < 1 or chunk < 2:
            raise SettingError(f"slots={slots}, chunk={chunk}: at least 1 and 2 are needed")
        self.slots = Slots(slots)
        self.chunk = chunk
        self.waiting: list[Entry] = []
        self.running: list[Entry] = []
        self.preemptions = 0

    def add(self, entry: Entry) -> None:
        self.waiting.append(entry)

    def remove(self, entry: Entry) -> None:
        """The request has ended or was cancelled; what it read stays until its slots are needed."""
        self.release(entry.branches)
        for queue in (self.waiting, self.running):
            if entry in queue:
                queue.remove(entry)

    def release(self, branches: Iterable[Branch]) -> None:
        for branch in branches:
            self.slots.release(branch)

    def restart(self) -> None:
        """The weights have changed: nothing that was read counts, and all is read again."""
        for entry in list(self.running):
            self._step_back(entry)
        self.slots.forget()

    def schedule(self) -> Plan:
        """The next step. It counts as done: what its pieces name is read from here on."""
        plan = Plan()
        self.running.sort(key=_order)
        for entry in list(self.running):
            self._serve(entry, plan)
        self._admit(plan)
        left = self.chunk
        for entry in self.running:
            left -= self._feed(entry, plan, left)
        return plan

    def _serve(self, entry: Entry, plan: Plan) -> None:
        """Slots for the branches of one that runs; those behind it in order make room."""
        if not entry.without_slot:
            return
        while entry in self.running and len(entry.without_slot) > self.slots.free:
            last = self.running[-1]
            if last is entry:
                return
            self._preempt(last)
        if entry in self.running:
            self._place(entry, plan)

    def _admit(self, plan: Plan) -> None:
        """In order, and none before its turn; only a lower priority makes room."""
        self.waiting.sort(key=_order)
        while self.waiting:
            first = self.waiting[0]
            stalled = any(e.without_slot and e.order < first.order for e in self.running)
            if stalled or len(first.branches) > self._within_reach(first):
                return
            while len(first.branches) > self.slots.free:
                self._preempt(self.running[-1])
            self.waiting.remove(first)
            self.running.append(first)
            self.running.sort(key=_order)
            self._place(first, plan)

    def _within_reach(self, entry: Entry) -> int:
        """Slots that are free, or held by requests of a lower priority."""
        lower = (e for e in self.running if e.priority > entry.priority)
        held = sum(len(e.branches) - len(e.without_slot) for e in lower)
        return self.slots.free + held

    def _place(self, entry: Entry, plan: Plan) -> None:
        for branch in entry.without_slot:
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
        """Plan what one request reads; how much of the step's allowance for prompts that takes.

        All branches read their last token in the same step, as their logits are mixed.
        """
        if entry.without_slot:
            return 0
        pending = sum(branch.pending for branch in entry.branches)
        single = pending == len(entry.branches)
        if single or pending <= left:
            plan.pieces += [_read(b, b.pending, entry.drafts) for b in entry.branches]
            plan.ready.append(entry)
            return 0 if single else pending
        taken = 0
        for branch in entry.branches:
            number = min(branch.pending - 1, left - taken)
            if number > 0:
                plan.pieces.append(_read(branch, number))
                taken += number
        return taken


class Slots:
    """Places of the cache. A free one keeps what it holds, for a request that begins alike.

    With `shares` off every request reads its whole prompt.
    """

    def __init__(self, number: int) -> None:
        self.shares = True
        self.owners: list[Branch | None] = [None] * number
        self.kept: list[list[int]] = [[] for _ in range(number)]
        self._left: list[int] = [-1] * number
        self._clock = count()

    def __len__(self) -> int:
        return len(self.owners)

    @property
    def free(self) -> int:
        return sum(owner is None for owner in self.owners)

    def take(self, branch: Branch, first: bool) -> Copy | None:
        """Give a slot to a branch, with as much of its tokens as any slot holds already."""
        source, shared = max(
            ((slot, _shared(self.held(slot), branch.tokens)) for slot in range(len(self))),
            key=lambda found: found[1],
        )
        shared = min(shared, len(branch.tokens) - 1) if self.shares else 0
        whole = self.owners[source] is None and 0 < len(self.kept[source]) <= shared + 1
        target = source if whole else self._choose(first)
        self.owners[target], self.kept[target] = branch, []
        branch.slot, branch.read = target, shared
        return Copy(source, target, shared) if shared and source != target else None

    def release(self, branch: Branch) -> None:
        if branch.slot is None:
            return
        slot, branch.slot = branch.slot, None
        self.owners[slot], self.kept[slot] = None, branch.tokens[: branch.read]
        self._left[slot], branch.read = next(self._clock), 0

    def held(self, slot: int) -> list[int]:
        """The tokens whose keys and values a slot holds."""
        owner = self.owners[slot]
        return self.kept[slot] if owner is None else owner.tokens[: owner.read]

    def forget(self) -> None:
        """Free slots hold nothing any more: the weights have changed."""
        self.kept = [[] for _ in self.kept]

    def drop(self, slot: int) -> None:
        """A free slot keeps nothing."""
        self.kept[slot] = []

    def _choose(self, first: bool) -> int:
        # Attention reads neighbouring slots in one piece, and the branches of an image are as long
        # as each other: first branches gather at the low end, further ones at the high end. The
        # more recent half of what is kept stays.
        free = [slot for slot, owner in enumerate(self.owners) if owner is None]
        empty = [slot for slot in free if not self.kept[slot]]
        oldest = sorted(free, key=lambda slot: self._left[slot])[: (len(free) + 1) // 2]
        return (min if first else max)(empty or oldest)


def _read(branch: Branch, number: int, drafts: Sequence[int] = ()) -> Piece:
    piece = Piece(branch, branch.read, number, drafts)
    branch.read += number
    return piece


def _shared(held: list[int], tokens: list[int]) -> int:
    """How many tokens two lists begin with alike."""
    low, high = 0, min(len(held), len(tokens))
    if held[:high] == tokens[:high]:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if held[:middle] == tokens[:middle] else (low, middle)
    return low


def _order(entry: Entry) -> tuple[int, int]:
    return entry.order
