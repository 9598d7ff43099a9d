"""Many sources -> one stream of documents, a pure function of the number of the document.

    number -> source, by weight -> position in an epoch of that source -> row, shuffled

The number is the only state, so a run resumes at the exact document, and any process or thread can
make any document. Each epoch of a source takes every row once, in a new order.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np

from earlyfusion.data.encoding import DocumentSplitter
from earlyfusion.data.joined import Joined
from earlyfusion.data.tables import DECODED_GROUPS
from earlyfusion.errors import DataError, SettingError
from earlyfusion.processor import TokenSequence

_CYCLE = 4096  # documents in which each source has exactly its share
_TRIES = 1000  # consecutive unusable rows after which a source counts as unusable
_MASK = (1 << 64) - 1


class Numbered(Protocol):
    """Anything with numbered entries."""

    groups: list[int]
    """Sizes of the groups of entries that are cheap to read together, in order."""
    is_random: bool
    """Whether any entry is as cheap to read as the next one."""

    def __len__(self) -> int: ...


class Documents(Numbered, Protocol):
    """The documents of one source by number, from 0."""

    name: str
    fingerprint: str
    """A digest that changes with the documents."""
    splitter: DocumentSplitter

    @property
    def last_refusal(self) -> str:
        """Why the last broken row is broken; "" if none was read."""
        ...

    def pieces(self, number: int) -> list[TokenSequence]:
        """Document `number` in pieces that fit a row; none if it is broken or too long."""
        ...

    def answer_kinds(self) -> np.ndarray:
        """What each document's answers hold (TEXT, IMAGE or BOTH): uint8 [n]."""
        ...


@dataclass(frozen=True)
class Stage:
    """Weights of sources, as shares of documents, from document number `start` on."""

    start: int
    weights: Mapping[str, float]


def two_stages(
    first: Mapping[str, float], added: Mapping[str, float], start: int
) -> tuple[Stage, ...]:
    """Stages of a mixture: at first the sources of `first` alone; from document `start` on, those
    of `first` and those of `added` have half of the weight each. This is how the paper adds data of
    higher quality (arXiv 2405.09818, section 2.2)."""
    if not added:
        return (Stage(0, first),)
    # A source may be in both: then it gets a share of each half.
    halves = [_shares(weights, 0.5) for weights in (first, added)]
    weights = {name: 0.0 for half in halves for name in half}
    for half in halves:
        for name, share in half.items():
            weights[name] += share
    return (Stage(0, first), Stage(start, weights)) if start else (Stage(0, weights),)


class SourcePosition(NamedTuple):
    """Document number `position` of the shuffled documents of `source`."""

    source: str
    position: int


class Schedule:
    """Which source each document comes from. Every 4,096 documents (a cycle) have exactly the
    weights of the sources. Raises `SettingError` for weights that are not possible."""

    def __init__(self, stages: Sequence[Stage], seed: int) -> None:
        self._stages = sorted(stages, key=lambda stage: stage.start)
        if not stages or self._stages[0].start != 0:
            first = self._stages[0].start if stages else "missing"
            raise SettingError(f"the start of the first stage is {first}: give a stage of start 0")
        # Per stage: source -> number of documents in every cycle.
        self._slots = [_slots(stage.weights) for stage in self._stages]
        self._cycle = lru_cache(8)(self._new_cycle)
        self._seed = seed
        # Per stage: source -> number of its documents in earlier stages, where this one goes on.
        self._taken: list[dict[str, int]] = [{}]
        for number, stage in enumerate(self._stages[1:]):
            self._taken.append(self._taken_until(number, stage.start))

    def locate(self, number: int) -> SourcePosition:
        """The source of document `number` of the mixture, and its position within that source."""
        stage = max(i for i, other in enumerate(self._stages) if other.start <= number)
        slots = self._slots[stage]
        cycle, slot = divmod(number - self._stages[stage].start, _CYCLE)
        order, ranks = self._cycle(stage, cycle)
        name = list(slots)[int(order[slot])]
        position = self._taken[stage].get(name, 0) + cycle * slots[name] + int(ranks[slot])
        return SourcePosition(name, position)

    def _new_cycle(self, stage: int, cycle: int) -> tuple[np.ndarray, np.ndarray]:
        """The source of each slot, and how many earlier slots have that source."""
        slots = list(self._slots[stage].values())
        order = np.repeat(np.arange(len(slots)), slots)
        np.random.default_rng([self._seed, stage, cycle]).shuffle(order)
        ranks = np.zeros(_CYCLE, np.int64)
        for source in range(len(slots)):
            is_source = order == source
            ranks[is_source] = np.arange(is_source.sum())
        return order, ranks

    def _taken_until(self, stage: int, end: int) -> dict[str, int]:
        """How many documents of each source come before document `end` of the mixture, where this
        stage ends."""
        slots = self._slots[stage]
        cycles, remainder = divmod(end - self._stages[stage].start, _CYCLE)
        order, _ = self._cycle(stage, cycles)
        in_last_cycle = np.bincount(order[:remainder], minlength=len(slots))
        taken = dict(self._taken[stage])
        for source, (name, count) in enumerate(slots.items()):
            taken[name] = taken.get(name, 0) + cycles * count + int(in_last_cycle[source])
        return taken


class Mixture:
    """The stream of all sources: `mixture(number)` is a document. A row that is broken or does not
    fit is replaced by the next one of its epoch, and if none of its part of a source can be used,
    by one of that source's other parts. Raises `SettingError` for a stage that names a source that
    is missing, and when called `DataError` if a source has no usable document."""

    def __init__(
        self, sources: Mapping[str, ShuffledDocuments], stages: Sequence[Stage], seed: int
    ) -> None:
        self._sources, self._schedule = sources, Schedule(stages, seed)
        missing = {n for stage in stages for n in stage.weights} - sources.keys()
        if missing:
            raise SettingError(
                f"the mixture names {sorted(missing)[0]!r}, which is not a source: name one of "
                f"{', '.join(sources)}"
            )

    def __call__(self, number: int) -> TokenSequence:
        name, position = self._schedule.locate(number)
        first_part = self._sources[name]
        parts = [p for p in self._sources.values() if p.documents is first_part.documents]
        for part in sorted(parts, key=lambda p: p is not first_part):
            # Twice as many tries as the part has rows, which cover a whole epoch of it.
            for attempt in range(min(_TRIES, 2 * len(part))):
                # The replacing row also comes at its regular position, because leaving it out
                # there would need a state.
                epoch, pieces = part.pieces(position + attempt)
                if pieces:
                    # Of a long document, each epoch takes another piece.
                    return pieces[epoch % len(pieces)]
        reason = first_part.documents.last_refusal
        raise DataError(
            f"{first_part.documents.name} gives no usable document: "
            + (f"mend its rows (the last one: {reason})" if reason else "raise the row length")
        )


class Epochs:
    """The numbers of a source, epoch after epoch, each epoch in a different order.

    Groups of rows are shuffled, and then the rows within each pool of a few groups, so that a
    Parquet file is read group by group. If any row is as cheap to read as the next, all rows are
    one pool. `key` sets the order, together with the seed. `subset` are the numbers to use,
    ascending (None: all).
    """

    def __init__(
        self, source: Numbered, seed: int, key: str, subset: np.ndarray | None = None
    ) -> None:
        self._size, self._subset = len(source) if subset is None else len(subset), subset
        # Groups count only the rows of the subset.
        self._groups = [self._size] if source.is_random else _sizes(source.groups, subset)
        self._key = _hash(seed, key)
        self._pools = lru_cache(2)(self._new_pools)

    def __len__(self) -> int:
        return self._size

    def number(self, epoch: int, position: int) -> int:
        """The source's number of the document at `position` of an epoch."""
        index = self._index(epoch, position)
        return index if self._subset is None else int(self._subset[index])

    def _index(self, epoch: int, position: int) -> int:
        """The index within the subset of the document at `position` of an epoch."""
        pools, sizes, groups, starts = self._pools(epoch)
        pool, pool_position = pools.find(position)
        offset = permuted_index(
            pool_position, int(sizes[pool]), _hash(self._key, f"{epoch} {pool}")
        )
        for group in groups[pool * DECODED_GROUPS : (pool + 1) * DECODED_GROUPS]:
            if offset < self._groups[group]:
                return int(starts[group]) + offset
            offset -= self._groups[group]
        raise AssertionError("a pool is the sum of its groups")

    def _new_pools(self, epoch: int) -> tuple[Joined, np.ndarray, np.ndarray, np.ndarray]:
        """The pools of an epoch, joined, and their sizes; all groups in the order of the epoch, and
        the first index of each group. A pool has as many groups as a Parquet file keeps decoded."""
        groups = np.asarray(self._groups)
        order = np.random.default_rng([self._key, epoch]).permutation(len(groups))
        sizes = np.add.reduceat(groups[order], np.arange(0, len(groups), DECODED_GROUPS))
        return Joined(sizes.tolist()), sizes, order, np.cumsum([0, *groups[:-1]])


class ShuffledDocuments(Epochs):
    """The documents of a source, epoch after epoch, each in a different order."""

    def __init__(
        self, documents: Documents, seed: int, key: str, subset: np.ndarray | None = None
    ) -> None:
        super().__init__(documents, seed, key, subset)
        self.documents = documents

    def pieces(self, index: int) -> tuple[int, list[TokenSequence]]:
        """The epoch of document number `index`, and the pieces of that document."""
        epoch, position = divmod(index, len(self))
        return epoch, self.documents.pieces(self.number(epoch, position))


def balance_answers(
    documents: Documents, seed: int, key: str, subset: np.ndarray | None = None
) -> dict[str, tuple[float, ShuffledDocuments]]:
    """A source split by what its answers hold (text, images, both), each part with its weight.

    Training on far more answers of one modality teaches a model to give that one, or to withhold
    it, whatever is asked (arXiv 2405.09818, section 3.1). So all parts have the same weight, but
    none repeats its rows more than 4 times as often as without balance. Parts too small for that
    join the largest. `subset` are the numbers to use, ascending (None: all).
    """
    # All rows are read here (without their images) before the first step. A sample would not do:
    # each part's order is a permutation of exactly its rows, so even its first document depends on
    # how many there are. The result is stored in the run's folder, and a resumed run reads it.
    all_kinds = documents.answer_kinds()
    numbers = np.arange(len(all_kinds)) if subset is None else subset
    kind_of = all_kinds[numbers]
    kinds, weights, largest = _balanced(kind_of)
    slots = _round_to_slots(dict(zip(kinds.tolist(), weights.tolist(), strict=True)))
    if rare := [kind for kind, count in slots.items() if not count]:
        kind_of = np.where(np.isin(kind_of, rare), largest, kind_of)
        kinds, weights, _ = _balanced(kind_of)
    # The shuffle depends on its key, which has the number of the kind, not its name.
    return {
        f"{key} ({_ANSWER_NAMES[kind]})": (
            float(weight / weights.sum()),
            ShuffledDocuments(documents, seed, f"{key} {kind}", numbers[kind_of == kind]),
        )
        for kind, weight in zip(kinds.tolist(), weights, strict=True)
    }


def _balanced(kind_of: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """The kinds of answers, ascending, the weight of each, and the most frequent kind."""
    kinds, counts = np.unique(kind_of, return_counts=True)
    weights = np.minimum(1 / len(kinds), _MAX_REPEATS * counts / counts.sum())
    return kinds, weights, int(kinds[counts.argmax()])


_ANSWER_NAMES = ("text", "images", "text and images")  # by TEXT, IMAGE, BOTH
_MAX_REPEATS = 4  # of a row, compared with a source that is not balanced


def _sizes(groups: Sequence[int], subset: np.ndarray | None) -> list[int]:
    """How many numbers of the subset, which is ascending, are in each group."""
    if subset is None:
        return list(groups)
    edges = np.cumsum([0, *groups])
    return [int(size) for size in np.diff(np.searchsorted(subset, edges))]


Item = TypeVar("Item")


class PrefetchedStream(Generic[Item]):
    """A stream whose next `depth` items (documents or batches) are prepared by `workers` threads
    while the model trains. The items and their order are those of `stream`."""

    def __init__(self, stream: Callable[[int], Item], workers: int, depth: int = 64) -> None:
        self._stream, self._depth = stream, depth
        self._pool = ThreadPoolExecutor(workers, "prefetch")
        self._futures: dict[int, Future[Item]] = {}
        self._lock = threading.Lock()

    def __call__(self, number: int) -> Item:
        with self._lock:
            # Drop items that were passed; after a roll-back, also those that are too far ahead.
            for unneeded in [n for n in self._futures if not number <= n < number + self._depth]:
                self._futures.pop(unneeded).cancel()
            for ahead in range(number, number + self._depth):
                if ahead not in self._futures:
                    self._futures[ahead] = self._pool.submit(self._stream, ahead)
            future = self._futures[number]
        return future.result()

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


def permuted_index(number: int, size: int, key: int) -> int:
    """Entry `number` of a pseudo-random permutation of 0 to size - 1, which depends on `key`. A
    Feistel network computes it without a table of the permutation."""
    bits = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << bits) - 1
    while True:
        left, right = number >> bits, number & mask
        for step in range(4):
            left, right = (
                right,
                left ^ (_mix64(right + key + step * 0x9E3779B97F4A7C15) & mask),
            )
        number = left << bits | right
        # The network permutes all numbers of 2 * bits bits; results of `size` or more go through it
        # again.
        if number < size:
            return number


def _mix64(x: int) -> int:
    """The finaliser of splitmix64 (Steele et al. 2014)."""
    x &= _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def _hash(seed: int, name: str) -> int:
    """A hash of 64 bits, the same on every machine."""
    value = _mix64(seed + 1)
    for byte in name.encode("utf-8", "surrogatepass"):
        value = _mix64(value ^ byte)
    return value


def _shares(weights: Mapping[str, float], total: float = 1.0) -> dict[str, float]:
    """The weights, scaled so that their sum is `total`."""
    for name, weight in weights.items():
        if not 0 < weight < float("inf"):
            raise SettingError(f"weight {weight} of {name} must be over 0: leave the source out")
    weight_sum = sum(weights.values())
    return {name: total * weight / weight_sum for name, weight in weights.items()}


def _slots(weights: Mapping[str, float]) -> dict[str, int]:
    """The number of documents in a cycle for each source; `SettingError` if one has none."""
    slots = _round_to_slots(weights)
    for name, count in slots.items():
        if not count:
            raise SettingError(
                f"the weight of {name} is under 1 in {_CYCLE} of all: raise it or leave it out"
            )
    return slots


def _round_to_slots(weights: Mapping[Any, float]) -> dict[Any, int]:
    """The slots of a cycle for each name, in proportion to its weight: rounded down, and one more
    for the names with the largest remainders until all slots are used."""
    exact = {name: share * _CYCLE for name, share in _shares(weights).items()}
    slots = {name: int(count) for name, count in exact.items()}
    unassigned = _CYCLE - sum(slots.values())
    for name in sorted(exact, key=lambda n: slots[n] - exact[n])[:unassigned]:
        slots[name] += 1
    return slots
