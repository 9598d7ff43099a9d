"""The scheduler alone, against a cache that is a list of lists: all orders of events may come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    rule,
    run_state_machine_as_test,
)

from earlyfusion.engine.scheduler import Branch, Plan, Scheduler, Slots
from earlyfusion.errors import SettingError

# Few kinds of tokens, so that many requests begin alike.
TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=24)
SLOTS, CHUNK = 4, 7


@dataclass(eq=False)
class Entry:
    """A request as the scheduler sees it."""

    branches: list[Branch]
    priority: int = 0
    drafts: Sequence[int] = ()
    number: int = field(default_factory=count().__next__)


class SchedulerMachine(RuleBasedStateMachine):
    """Requests join, draw, open and close branches, end and are cancelled in any order."""

    entries = Bundle("entries")

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = Scheduler(SLOTS, CHUNK)
        self.cache: list[list[int]] = [[] for _ in range(SLOTS)]
        self.alive: set[Entry] = set()

    @rule(target=entries, tokens=TOKENS, priority=st.integers(0, 2), more=st.integers(0, 2))
    def add(self, tokens: list[int], priority: int, more: int) -> Entry:
        branches = [Branch(list(tokens)), *(Branch([0, 1]) for _ in range(more))]
        entry = Entry(branches, priority)
        self.scheduler.add(entry)
        self.alive.add(entry)
        return entry

    @rule(entry=consumes(entries))
    def cancel_or_finish(self, entry: Entry) -> None:
        self._end(entry)

    def _end(self, entry: Entry) -> None:
        self.scheduler.remove(entry)
        self.alive.discard(entry)

    @rule(entry=entries, prompt=TOKENS)
    def open_branch(self, entry: Entry, prompt: list[int]) -> None:
        if entry in self.alive and len(entry.branches) < 3:
            entry.branches = [*entry.branches, Branch(list(prompt))]

    @rule(entry=entries)
    def close_branches(self, entry: Entry) -> None:
        self.scheduler.release(entry.branches[1:])
        entry.branches = entry.branches[:1]

    @rule(token=st.integers(0, 1))
    def step(self, token: int) -> None:
        self._step(token)

    def _step(self, token: int) -> Plan:
        waiting = min(self.alive, key=lambda e: (e.priority, e.number), default=None)
        plan = self.scheduler.schedule()
        if waiting is not None:
            assert all(branch.slot is not None for branch in waiting.branches)
            assert any(piece.branch in waiting.branches for piece in plan.pieces)
        self._run(plan)
        for entry in plan.ready:
            assert entry in self.alive
            assert all(branch.pending == 0 for branch in entry.branches)
            for branch in entry.branches:
                branch.tokens.append(token)
        return plan

    def _run(self, plan: Plan) -> None:
        for source, target, tokens in plan.copies:
            self.cache[target] = self.cache[source][:tokens]
        prompts = sum(piece.size for piece in plan.pieces if piece.size > 1)
        assert prompts <= CHUNK
        for piece in plan.pieces:
            slot = piece.branch.slot
            assert slot is not None and piece.size > 0
            assert self.cache[slot][: piece.start] == piece.branch.tokens[: piece.start]
            self.cache[slot] = piece.branch.tokens[: piece.end]
        for entry in self.alive - set(plan.ready):
            assert all(branch.pending for branch in entry.branches)

    @invariant()
    def no_slot_is_used_twice(self) -> None:
        held = [b for entry in self.alive for b in entry.branches if b.slot is not None]
        assert len({branch.slot for branch in held}) == len(held) <= SLOTS
        owners = [owner for owner in self.scheduler.slots.owners if owner is not None]
        assert {id(owner) for owner in owners} == {id(branch) for branch in held}

    @invariant()
    def every_request_is_in_one_queue(self) -> None:
        queued = [*self.scheduler.waiting, *self.scheduler.running]
        assert len(queued) == len(self.alive) and set(queued) == self.alive
        assert all(
            b.slot is None and not b.read for e in self.scheduler.waiting for b in e.branches
        )

    @invariant()
    def slots_hold_what_they_are_said_to_hold(self) -> None:
        for slot in range(SLOTS):
            held = self.scheduler.slots.held(slot)
            assert self.cache[slot][: len(held)] == held

    def teardown(self) -> None:
        """Left alone, every request gets its turn and ends."""
        for _ in range(400):
            if not self.alive:
                return
            for entry in self._step(token=0).ready:
                self._end(entry)
        raise AssertionError(f"{len(self.alive)} requests starve")


def check(examples: int) -> None:
    chosen = settings(
        max_examples=examples,
        stateful_step_count=30,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(SchedulerMachine, settings=chosen)


def test_any_order_of_events() -> None:
    check(40)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_any_order_of_events_5000_times() -> None:
    check(5000)


def drawn(scheduler: Scheduler, steps: int) -> list[list[int]]:
    """The numbers of the requests that draw, step by step."""
    rows = []
    for _ in range(steps):
        plan = scheduler.schedule()
        rows.append([entry.number for entry in plan.ready])
        for entry in plan.ready:
            for branch in entry.branches:
                branch.tokens.append(1)
    return rows


def test_a_long_prompt_does_not_hold_up_the_others() -> None:
    scheduler = Scheduler(4, 8)
    short, long = Entry([Branch([0, 1])]), Entry([Branch([1] * 30)])
    scheduler.add(short)
    scheduler.add(long)
    rows = drawn(scheduler, 6)
    assert [short.number in row for row in rows] == [True] * 6
    assert [long.number in row for row in rows] == [False] * 3 + [True] * 3


def test_a_higher_priority_takes_the_place_of_a_lower_one() -> None:
    scheduler = Scheduler(2, 8)
    low, high = Entry([Branch([0]), Branch([1])], 5), Entry([Branch([0])], -1)
    scheduler.add(low)
    assert drawn(scheduler, 1) == [[low.number]]
    scheduler.add(high)
    assert drawn(scheduler, 1) == [[high.number]]
    assert scheduler.preemptions == 1 and low.branches[0].slot is None
    scheduler.remove(high)
    assert drawn(scheduler, 1) == [[low.number]]
    assert low.branches[0].tokens == [0, 1, 1]


def test_equal_priorities_never_push_each_other_out_of_line() -> None:
    scheduler = Scheduler(1, 8)
    first, second = Entry([Branch([0])]), Entry([Branch([1])])
    scheduler.add(first)
    scheduler.schedule()
    scheduler.add(second)
    assert drawn(scheduler, 2) == [[first.number], [first.number]]
    assert scheduler.preemptions == 0


def test_drafts_are_read_behind_the_last_token_only() -> None:
    scheduler = Scheduler(2, chunk=4)
    scheduler.add(Entry([Branch([1, 2, 3, 4, 5, 6])], drafts=[8, 9]))
    pieces = [scheduler.schedule().pieces for _ in range(2)]
    assert [[piece.tokens for piece in step] for step in pieces] == [
        [[1, 2, 3, 4]],
        [[5, 6, 8, 9]],
    ]
    assert scheduler.slots.held(0) == [1, 2, 3, 4, 5, 6]


def test_a_prompt_that_begins_like_another_is_read_from_there() -> None:
    slots = Slots(3)
    first = Branch(list(range(50)))
    assert slots.take(first, first=True) is None
    first.read = 40
    other = Branch([*range(30), 99])
    copied = slots.take(other, first=True)
    assert copied == (first.slot, other.slot, 30) and other.read == 30
    # The same prompt again: its last token is read anew, for the logits.
    slots.release(first)
    again = Branch(list(range(40)))
    assert slots.take(again, first=True) is None and again.read == 39


@pytest.mark.parametrize("first", [True, False])
def test_an_empty_slot_is_taken_before_one_that_keeps_something(first: bool) -> None:
    slots = Slots(4)
    running = [Branch([number] * 5) for number in range(3)]
    for branch in running:
        slots.take(branch, first)
        branch.read = 5
    for branch in running:
        slots.release(branch)
    kept = [list(tokens) for tokens in slots.cached]
    assert sorted(kept) == [[], [0] * 5, [1] * 5, [2] * 5]
    new = Branch([9, 9])
    slots.take(new, first)
    assert new.slot == kept.index([]) and slots.cached == kept


def test_a_slot_that_dropped_what_it_held_gives_nothing_back() -> None:
    slots = Slots(1)
    branch = Branch([1, 2, 3])
    slots.take(branch, first=True)
    branch.read = 3
    slots.release(branch)
    slots.drop(0)
    again = Branch([1, 2, 3])
    slots.take(again, first=True)
    assert again.read == 0


def test_without_sharing_every_prompt_is_read_whole() -> None:
    slots = Slots(2)
    slots.shares = False
    running = Branch([1, 2, 3])
    slots.take(running, first=True)
    running.read = 3
    other = Branch([1, 2, 3, 4])
    assert slots.take(other, first=True) is None and other.read == 0
    slots.release(running)
    assert slots.take(Branch([1, 2, 3]), first=True) is None


def test_forgotten_slots_give_nothing_back() -> None:
    slots = Slots(1)
    branch = Branch([1, 2, 3], read=0)
    slots.take(branch, first=True)
    branch.read = 3
    slots.release(branch)
    slots.forget()
    assert slots.take(Branch([1, 2, 3]), first=True) is None and slots.owners[0].read == 0  # type: ignore[union-attr]


def test_impossible_sizes() -> None:
    for slots, chunk in ((0, 8), (1, 1)):
        with pytest.raises(SettingError, match="at least"):
            Scheduler(slots, chunk)
