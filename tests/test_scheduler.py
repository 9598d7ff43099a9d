"""The scheduler alone, against a cache that is a list of lists: all orders of events may come."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count, pairwise

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

from earlyfusion.engine.blocks import BlockPool, Branch, Copy
from earlyfusion.engine.scheduler import PREFILL_ONLY_FACTOR, Plan, Scheduler
from earlyfusion.errors import SettingError

# Few kinds of tokens, so that many requests begin alike.
TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=20)
BLOCKS, SIZE, CHUNK, MOST = 16, 4, 7, 5


@dataclass(eq=False)
class Entry:
    """A request as the scheduler sees it."""

    branches: list[Branch]
    priority: int = 0
    drafts: Sequence[int] = ()
    reserve: int = 0
    number: int = field(default_factory=count().__next__)

    @property
    def most_blocks(self) -> int:
        extra = max(self.reserve, len(self.drafts))
        return sum(-(-(len(branch.tokens) + extra) // SIZE) for branch in self.branches)


class SchedulerMachine(RuleBasedStateMachine):
    """Requests join, draw, open and close branches, end and are cancelled in any order."""

    entries = Bundle("entries")

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(BLOCKS, SIZE)
        self.scheduler = Scheduler(self.pool, CHUNK, MOST)
        # Of each token its whole history, as keys and values follow from it.
        self.cache: list[list[tuple[int, ...]]] = [[()] * SIZE for _ in range(BLOCKS)]
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

    @rule(entry=entries, prompt=TOKENS, reserve=st.integers(0, 6))
    def open_branch(self, entry: Entry, prompt: list[int], reserve: int) -> None:
        if entry in self.alive and len(entry.branches) < 3:
            entry.branches = [*entry.branches, Branch(list(prompt))]
            entry.reserve = reserve
            self._end_if_too_long(entry)

    @rule(entry=entries)
    def close_branches(self, entry: Entry) -> None:
        self.scheduler.release(entry.branches[1:])
        entry.branches, entry.reserve = entry.branches[:1], 0

    @rule(entry=entries, drafts=st.lists(st.integers(0, 1), max_size=3))
    def guess(self, entry: Entry, drafts: list[int]) -> None:
        if entry in self.alive:
            entry.drafts = drafts
            self._end_if_too_long(entry)

    @rule(entry=entries)
    def meet_non_finite_logits(self, entry: Entry) -> None:
        if entry in self.alive:
            dropped = [block for branch in entry.branches for block in self.pool.drop(branch)]
            assert not any(self.pool.content(block) for block in dropped)
            for block in dropped:
                self.cache[block] = [()] * SIZE
            self._end(entry)

    @rule()
    def load_new_weights(self) -> None:
        self.scheduler.restart()
        self.cache = [[()] * SIZE for _ in range(BLOCKS)]

    @rule(token=st.integers(0, 1))
    def step(self, token: int) -> None:
        self._step(token)

    def _step(self, token: int) -> Plan:
        waiting = min(self.alive, key=lambda e: (e.priority, e.number), default=None)
        plan = self.scheduler.schedule()
        if waiting is not None:
            assert all(branch.blocks for branch in waiting.branches)
            assert any(piece.branch in waiting.branches for piece in plan.pieces)
        self._run(plan)
        for entry in plan.ready:
            assert isinstance(entry, Entry) and entry in self.alive
            assert all(branch.pending == 0 for branch in entry.branches)
            # All drafts but the last turn out to be right, and another token follows.
            right = list(entry.drafts[:-1])
            for branch in entry.branches:
                branch.tokens += [*right, token]
                branch.num_computed += len(right)
            entry.reserve = max(0, entry.reserve - len(right) - 1)
            self._end_if_too_long(entry)
        return plan

    def _end_if_too_long(self, entry: Entry) -> None:
        if entry.most_blocks > BLOCKS:
            self._end(entry)

    def _run(self, plan: Plan) -> None:
        for source, target, tokens in plan.copies:
            assert self.pool.references[target] <= 1  # 0: its request has stepped back meanwhile
            self.cache[target][:tokens] = self.cache[source][:tokens]
        prompts = sum(piece.size for piece in plan.pieces if piece.size > 1)
        assert prompts <= CHUNK * PREFILL_ONLY_FACTOR * 9 // 8
        written: set[tuple[int, int]] = set()
        for piece in plan.pieces:
            branch = piece.branch
            assert piece.size > 0
            assert self._held(branch, piece.start) == histories(branch.tokens[: piece.start])
            tokens = [*branch.tokens[: piece.end], *piece.drafts]
            for position in range(piece.start, len(tokens)):
                block, offset = branch.blocks[position // SIZE], position % SIZE
                assert self.pool.references[block] == 1 and (block, offset) not in written
                written.add((block, offset))
                self.cache[block][offset] = tuple(tokens[: position + 1])
        for entry in self.alive - set(plan.ready):  # type: ignore[operator]
            assert all(branch.pending for branch in entry.branches)

    def _held(self, branch: Branch, number: int) -> list[tuple[int, ...]]:
        return [self.cache[branch.blocks[p // SIZE]][p % SIZE] for p in range(number)]

    @invariant()
    def every_block_is_counted(self) -> None:
        readers = Counter(b for e in self.alive for branch in e.branches for b in branch.blocks)
        assert [readers[block] for block in range(BLOCKS)] == self.pool.references
        free = [*self.pool._empty, *self.pool._cached]
        assert sorted(free) == [block for block in range(BLOCKS) if not readers[block]]
        assert self.pool.free == len(free)
        assert not any(self.pool.content(block) for block in self.pool._empty)

    @invariant()
    def only_full_blocks_are_shared(self) -> None:
        for branch in (branch for entry in self.alive for branch in entry.branches):
            for number, block in enumerate(branch.blocks):
                full = branch.num_computed >= (number + 1) * SIZE
                assert self.pool.references[block] == 1 or full
            read = branch.tokens[: branch.num_computed]
            assert self._held(branch, branch.num_computed) == histories(read)

    @invariant()
    def blocks_hold_what_they_are_said_to_hold(self) -> None:
        for block in range(BLOCKS):
            content = self.pool.content(block)
            stored = self.cache[block][: len(content)]
            assert [history[-1] for history in stored] == content
            # All behind one prefix.
            assert all(a == b[:-1] for a, b in pairwise(stored))
            content = self.pool._content[block]
            if content is not None:
                assert block in self.pool._children[content.parent]
                assert content.key is None or self.pool._by_key[content.key] == block
        assert all(self.pool._children.values())
        assert sum(map(len, self.pool._children.values())) == sum(
            content is not None for content in self.pool._content
        )

    @invariant()
    def every_request_is_in_one_queue(self) -> None:
        queued = [*self.scheduler.waiting, *self.scheduler.running]
        assert len(queued) == len(self.alive) and set(queued) == self.alive
        assert len(self.scheduler.running) <= MOST
        waiting = [branch for entry in self.scheduler.waiting for branch in entry.branches]
        assert all(not branch.blocks and not branch.num_computed for branch in waiting)

    def teardown(self) -> None:
        """Left alone, every request gets its turn and ends; then nothing is held."""
        for _ in range(400):
            if not self.alive:
                assert self.pool.free == BLOCKS
                return
            for entry in self._step(token=0).ready:
                if entry in self.alive:
                    self._end(entry)  # type: ignore[arg-type]
        raise AssertionError(f"{len(self.alive)} requests starve")


def histories(tokens: list[int]) -> list[tuple[int, ...]]:
    return [tuple(tokens[: end + 1]) for end in range(len(tokens))]


def check(examples: int) -> None:
    chosen = settings(
        max_examples=examples,
        stateful_step_count=40,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(SchedulerMachine, settings=chosen)


def test_any_order_of_events() -> None:
    check(60)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_any_order_of_events_5000_times() -> None:
    check(5000)


def scheduler_of(blocks: int, chunk: int, size: int = 4) -> Scheduler:
    return Scheduler(BlockPool(blocks, size), chunk)


def sampling_order(scheduler: Scheduler, steps: int) -> list[list[int]]:
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
    scheduler = scheduler_of(20, 8)
    short, long = Entry([Branch([0, 1])]), Entry([Branch([1] * 30)])
    scheduler.add(short)
    sampling_order(scheduler, 1)
    scheduler.add(long)
    rows = sampling_order(scheduler, 6)
    assert [short.number in row for row in rows] == [True] * 6
    assert [long.number in row for row in rows] == [False] * 3 + [True] * 3


@pytest.mark.parametrize(
    ("sampling", "waiting", "read"),
    [
        (0, 1, 32),
        (1, 1, 8),
        (2, 2, 9),
        (1, 2, 16),
        (1, 5, 32),
        (9, 1, 16),
        (33, 1, 32),
        (9, 12, 21),
    ],
)
def test_pieces_grow_with_sampling_and_waiting_requests(
    sampling: int, waiting: int, read: int
) -> None:
    scheduler = scheduler_of(1000, 8)
    for _ in range(sampling):
        scheduler.add(Entry([Branch([0])]))
    sampling_order(scheduler, 1)
    for number in range(waiting):
        scheduler.add(Entry([Branch([number + 1] * 100)]))
    plan = scheduler.schedule()
    assert sum(piece.size for piece in plan.pieces if piece.size > 1) == read
    assert len(plan.ready) == sampling


def test_a_prompt_is_read_in_larger_pieces_if_no_request_samples() -> None:
    scheduler = scheduler_of(20, 8)
    scheduler.add(Entry([Branch([1] * 70)]))
    assert [len(piece.tokens) for piece in scheduler.schedule().pieces] == [8 * PREFILL_ONLY_FACTOR]
    scheduler.add(Entry([Branch([0])]))
    assert [len(piece.tokens) for piece in scheduler.schedule().pieces] == [8, 1]


@pytest.mark.parametrize("length", [36, 37])
def test_the_last_few_tokens_of_a_prompt_need_no_step_of_their_own(length: int) -> None:
    scheduler = scheduler_of(20, 8)
    scheduler.add(Entry([Branch([1] * length)]))
    scheduler.add(Entry([Branch([2] * 10)]))
    plan = scheduler.schedule()
    assert [piece.size for piece in plan.pieces] == [length if length <= 32 * 9 // 8 else 32]
    assert len(plan.ready) == (length <= 32 * 9 // 8)


def test_equal_prompts_that_come_together_are_read_once() -> None:
    scheduler = scheduler_of(30, 8)
    entries = [Entry([Branch([*range(70), 100 + n])]) for n in range(4)]
    other = Entry([Branch([5] * 20)])
    for entry in [*entries, other]:
        scheduler.add(entry)
    read = [sum(piece.size for piece in scheduler.schedule().pieces) for _ in range(3)]
    assert read == [32, 32, 7] and scheduler.running == entries[:1]
    entries[0].branches[0].tokens.append(1)
    # Of the others only the last token, behind whole blocks and a copied one.
    plan = scheduler.schedule()
    assert [piece.size for piece in plan.pieces] == [1, 1, 1, 1, 11]
    assert plan.ready == entries and len(plan.copies) == 3


def test_a_higher_priority_takes_the_place_of_a_lower_one() -> None:
    scheduler = scheduler_of(2, 8)
    low, high = Entry([Branch([0]), Branch([1])], 5), Entry([Branch([0])], -1)
    scheduler.add(low)
    assert sampling_order(scheduler, 1) == [[low.number]]
    scheduler.add(high)
    assert sampling_order(scheduler, 1) == [[high.number]]
    assert scheduler.preemptions == 1 and not low.branches[0].blocks
    scheduler.remove(high)
    assert sampling_order(scheduler, 1) == [[low.number]]
    assert low.branches[0].tokens == [0, 1, 1]


def test_requests_of_equal_priority_keep_their_order() -> None:
    scheduler = scheduler_of(1, 8)
    first, second = Entry([Branch([0])]), Entry([Branch([1])])
    scheduler.add(first)
    scheduler.schedule()
    scheduler.add(second)
    assert sampling_order(scheduler, 2) == [[first.number], [first.number]]
    assert scheduler.preemptions == 0


def test_at_most_most_running_requests_run() -> None:
    scheduler = Scheduler(BlockPool(50, 4), 8, most_running=2)
    entries = [Entry([Branch([0, 1])]) for _ in range(3)]
    for entry in entries:
        scheduler.add(entry)
    assert sampling_order(scheduler, 1) == [[entry.number for entry in entries[:2]]]
    urgent = Entry([Branch([1])], -1)
    scheduler.add(urgent)
    assert sampling_order(scheduler, 1) == [[urgent.number, entries[0].number]]
    assert scheduler.preemptions == 1


def test_the_blocks_of_an_image_are_reserved_from_its_beginning() -> None:
    """12 tokens are to come, 3 blocks in each branch; so the other request waits at once."""
    scheduler = scheduler_of(7, 8)
    image, text = Entry([Branch([0]), Branch([1])], reserve=11), Entry([Branch([2] * 5)])
    scheduler.add(image)
    assert sampling_order(scheduler, 1) == [[image.number]]
    assert [len(branch.blocks) for branch in image.branches] == [3, 3]
    scheduler.add(text)
    for left in range(10, 0, -1):
        image.reserve = left
        assert sampling_order(scheduler, 1) == [[image.number]]
    assert [len(branch.blocks) for branch in image.branches] == [3, 3]
    assert scheduler.preemptions == 0


def test_a_request_takes_blocks_as_it_grows() -> None:
    scheduler = scheduler_of(9, 8)
    entry = Entry([Branch([0, 1, 0])])
    scheduler.add(entry)
    sizes = []
    for _ in range(9):
        sampling_order(scheduler, 1)
        sizes.append(len(entry.branches[0].blocks))
    assert sizes == [1, 1, 2, 2, 2, 2, 3, 3, 3]


def test_a_block_is_shared_as_soon_as_it_is_full() -> None:
    scheduler = scheduler_of(9, 8)
    branch = Branch([0, 1, 0])
    scheduler.add(Entry([branch]))
    num_shared = []
    for _ in range(7):
        sampling_order(scheduler, 1)
        num_shared.append(len(scheduler.pool.find_prefix([*branch.tokens, 9]).blocks))
    assert num_shared == [0, 1, 1, 1, 1, 2, 2]
    scheduler.restart()
    sampling_order(scheduler, 1)
    assert len(scheduler.pool.find_prefix([*branch.tokens, 9]).blocks) == 2


def test_the_last_request_in_order_waits_for_a_block() -> None:
    scheduler = scheduler_of(2, 8)
    first, last = Entry([Branch([0])], reserve=3), Entry([Branch([1] * 4)])
    scheduler.add(first)
    scheduler.add(last)
    rows = []
    for first.reserve in (3, 2, 1, 0):
        rows += sampling_order(scheduler, 1)
    assert rows == [[first.number, last.number], *[[first.number]] * 3]
    assert last in scheduler.running and scheduler.preemptions == 0


def test_drafts_are_read_behind_the_last_token_only() -> None:
    scheduler = scheduler_of(3, 2)
    scheduler.add(Entry([Branch(list(range(10)))], drafts=[18, 19]))
    pieces = [scheduler.schedule().pieces for _ in range(2)]
    assert [[piece.tokens for piece in step] for step in pieces] == [
        [[0, 1, 2, 3, 4, 5, 6, 7]],
        [[8, 9, 18, 19]],
    ]
    contents = [scheduler.pool.content(block) for block in range(3)]
    assert contents == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def started(pool: BlockPool, tokens: list[int], read: int) -> tuple[Branch, Copy | None]:
    """A branch in the cache, which reads its first tokens."""
    branch = Branch(tokens)
    pool.attach(branch, pool.find_prefix(tokens))
    copied = pool.extend(branch, len(tokens))
    pool.mark_computed(branch, max(0, read - branch.num_computed))
    return branch, copied


def test_a_prompt_that_begins_like_another_shares_its_blocks() -> None:
    pool = BlockPool(9, 4)
    first, copied = started(pool, list(range(11)), 11)
    assert copied is None and list(first.blocks) == [0, 1, 2]
    # Two whole blocks are shared; of the third, one token is copied.
    other, copied = started(pool, [*range(9), 99, 98, 97, 96], 0)
    assert (
        list(other.blocks) == [0, 1, 3, 4] and copied == Copy(2, 3, 1) and other.num_computed == 9
    )
    # The same prompt again: its last token is read anew, for the logits.
    second, copied = started(pool, list(range(8)), 0)
    assert list(second.blocks) == [0, 5] and copied == Copy(1, 5, 3) and second.num_computed == 7
    for branch in (first, other, second):
        pool.release(branch)
    assert pool.free == 9
    last, copied = started(pool, list(range(11)), 0)
    assert list(last.blocks[:2]) == [0, 1] and copied is not None and last.num_computed == 10


@pytest.mark.parametrize(("equal", "copies"), [(1, False), (3, False), (4, True)])
def test_a_few_equal_tokens_are_not_worth_a_copy(equal: int, copies: bool) -> None:
    pool = BlockPool(8, 32)
    started(pool, [0] * 40, 40)
    other, copied = started(pool, [*[0] * equal, *[1] * 20], 0)
    assert copied == (Copy(0, 2, equal) if copies else None)
    assert other.num_computed == (equal if copies else 0)


def test_equal_tokens_behind_other_ones_are_not_shared() -> None:
    pool = BlockPool(8, 2)
    started(pool, [1, 2, 5, 6, 7], 5)
    other, copied = started(pool, [3, 4, 5, 6, 7], 0)
    assert other.num_computed == 0 and copied is None


def test_the_least_recently_read_blocks_go_first_and_ends_before_beginnings() -> None:
    pool = BlockPool(5, 2)
    old, _ = started(pool, [1, 2, 3, 4], 4)
    new, _ = started(pool, [5, 6, 7, 8], 4)
    pool.release(old)
    pool.release(new)
    started(pool, [9, 9, 9], 3)  # the empty block, and the end of the old branch
    assert len(pool.find_prefix([1, 2, 3, 4, 0]).blocks) == 1
    assert len(pool.find_prefix([5, 6, 7, 8, 0]).blocks) == 2


def test_a_block_to_copy_is_reused_in_place_if_it_is_the_next_free_one() -> None:
    pool = BlockPool(1, 4)
    first, _ = started(pool, [1, 2], 2)
    pool.release(first)
    second, copied = started(pool, [1, 2, 3], 0)
    assert copied is None and second.num_computed == 2 and list(second.blocks) == [0]
    assert pool.content(0) == [1, 2]


def test_blocks_read_only_by_a_failed_request_are_not_shared() -> None:
    pool = BlockPool(6, 2)
    neighbour, _ = started(pool, [1, 2, 3], 3)
    failed, _ = started(pool, [1, 2, 7, 8, 9], 5)
    alone = list(failed.blocks[1:])
    assert pool.drop(failed) == alone and pool.free == 4
    assert len(pool.find_prefix([1, 2, 7, 8, 9]).blocks) == 1
    assert neighbour.num_computed == 3 and pool.content(0) == [1, 2]


def test_without_sharing_every_prompt_is_read_whole() -> None:
    pool = BlockPool(6, 2)
    pool.prefix_caching = False
    running, _ = started(pool, [1, 2, 3], 3)
    other, copied = started(pool, [1, 2, 3, 4], 0)
    assert other.num_computed == 0 and copied is None
    pool.release(running)
    assert pool.find_prefix([1, 2, 3]).blocks == []


def test_forgotten_blocks_give_nothing_back() -> None:
    pool = BlockPool(4, 2)
    branch, _ = started(pool, [1, 2, 3], 3)
    pool.release(branch)
    pool.forget_all()
    second, copied = started(pool, [1, 2, 3], 0)
    assert second.num_computed == 0 and copied is None and pool.free == 2


def test_impossible_sizes() -> None:
    for blocks, chunk, most in ((0, 8, 1), (1, 1, 1), (1, 8, 0)):
        with pytest.raises(SettingError, match="at least"):
            Scheduler(BlockPool(blocks), chunk, most)
