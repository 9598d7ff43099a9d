"""Many sources -> one stream of documents, a pure function of the number of the document.

    number -> which source, by weight -> which place in that source's epoch -> which row, shuffled

No state but the number, so a run resumes at the exact document, and a rank or a worker takes its
share of the numbers. Each source is gone through without repetition, then again in another order.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Generic, NamedTuple, Protocol, TypeVar

import numpy as np

from earlyfusion.data.encoding import Fit
from earlyfusion.data.tables import KEPT_GROUPS
from earlyfusion.errors import DataError, SettingError
from earlyfusion.processor import TokenSequence

_CYCLE = 4096
_TRIES = 1000
_MASK = (1 << 64) - 1


class Numbered(Protocol):
    """A source by number. `groups` and `is_random` say how it likes to be read."""

    groups: list[int]
    is_random: bool

    def __len__(self) -> int: ...


class Documents(Numbered, Protocol):
    """A source of documents.

    `pieces` are what number `number` gives, empty for a row that is broken or does not fit;
    `fit` knows which were cut or dropped; `answers` tells each number's kind (TEXT, PICTURE, BOTH)
    as uint8 [n].
    """

    name: str
    fingerprint: str
    fit: Fit

    def pieces(self, number: int) -> list[TokenSequence]: ...
    def answers(self) -> np.ndarray: ...


@dataclass(frozen=True)
class Stage:
    """Weights of sources from document number `start` on: shares of the documents."""

    start: int
    weights: Mapping[str, float]


def two_stages(
    first: Mapping[str, float], added: Mapping[str, float], start: int
) -> tuple[Stage, ...]:
    """The paper's plan: from `start` on, all sources of before have half of the weight together.

    The other half goes to `added`, the better ones (arXiv 2405.09818, section 2.2).
    """
    if not added:
        return (Stage(0, first),)
    halves = [_shares(weights, 0.5) for weights in (first, added)]
    weights = {name: 0.0 for half in halves for name in half}
    for half in halves:
        for name, share in half.items():
            weights[name] += share
    return (Stage(0, first), Stage(start, weights)) if start else (Stage(0, weights),)


class Draw(NamedTuple):
    """The document number `turn` that is taken from source `source`."""

    source: str
    turn: int


class Schedule:
    """Which source each document number takes: in every 4,096 numbers, exactly by weight."""

    def __init__(self, stages: Sequence[Stage], seed: int) -> None:
        self._stages = sorted(stages, key=lambda stage: stage.start)
        if not stages or self._stages[0].start != 0:
            raise SettingError("the first stage must start at document 0")
        self._slots = [_slots(stage.weights) for stage in self._stages]
        self._cycle = lru_cache(8)(self._new_cycle)
        self._seed = seed
        self._taken: list[dict[str, int]] = [{}]
        for place, stage in enumerate(self._stages[1:]):
            self._taken.append(self._taken_by(place, stage.start))

    def draw(self, number: int) -> Draw:
        place = max(i for i, stage in enumerate(self._stages) if stage.start <= number)
        names, within = self._slots[place], number - self._stages[place].start
        cycle, at = divmod(within, _CYCLE)
        order, ranks = self._cycle(place, cycle)
        which = int(order[at])
        name = list(names)[which]
        turn = self._taken[place].get(name, 0) + cycle * names[name] + int(ranks[at])
        return Draw(name, turn)

    def _new_cycle(self, place: int, cycle: int) -> tuple[np.ndarray, np.ndarray]:
        """Source of each slot, and how many slots of that source come before it."""
        slots = list(self._slots[place].values())
        order = np.repeat(np.arange(len(slots)), slots)
        np.random.default_rng([self._seed, place, cycle]).shuffle(order)
        ranks = np.zeros(_CYCLE, np.int64)
        for source in range(len(slots)):
            mine = order == source
            ranks[mine] = np.arange(mine.sum())
        return order, ranks

    def _taken_by(self, place: int, end: int) -> dict[str, int]:
        """How many documents of each source go before `end`, the end of stage `place`."""
        names = self._slots[place]
        cycles, rest = divmod(end - self._stages[place].start, _CYCLE)
        order, _ = self._cycle(place, cycles)
        extra = np.bincount(order[:rest], minlength=len(names))
        taken = dict(self._taken[place])
        for which, (name, slots) in enumerate(names.items()):
            taken[name] = taken.get(name, 0) + cycles * slots + int(extra[which])
        return taken


class Mixture:
    """The stream of all sources: `mixture(number)` is a document.

    A row that is broken or does not fit gives way to the next of its epoch.
    """

    def __init__(self, sources: Mapping[str, Order], stages: Sequence[Stage], seed: int) -> None:
        self._sources, self._schedule = sources, Schedule(stages, seed)
        missing = {n for stage in stages for n in stage.weights} - sources.keys()
        if missing:
            raise SettingError(f"the mixture names {sorted(missing)[0]!r}, which is no source")

    def __call__(self, number: int) -> TokenSequence:
        draw = self._schedule.draw(number)
        order = self._sources[draw.source]
        for attempt in range(_TRIES):
            epoch, pieces = order.pieces(draw.turn + attempt)
            if pieces:
                return pieces[epoch % len(pieces)]
        raise DataError(
            f"{draw.source} gives no usable document in {_TRIES} rows: see the quarantine file, "
            "or raise the row length"
        )


class Epochs:
    """The numbers of a source, epoch after epoch, each epoch in an order of its own.

    Groups of rows are shuffled, and the rows within pools of groups, so that a Parquet file is read
    group by group; where rows can be had one by one, the pool is everything. `chosen` are the
    numbers that count, in order; all of them if None.
    """

    def __init__(
        self, source: Numbered, seed: int, key: str, chosen: np.ndarray | None = None
    ) -> None:
        self._size, self._chosen = len(source) if chosen is None else len(chosen), chosen
        self._groups = [self._size] if source.is_random else _sizes(source.groups, chosen)
        self._key = _hash(seed, key)
        self._pools = lru_cache(2)(self._new_pools)

    def __len__(self) -> int:
        return self._size

    def number(self, epoch: int, place: int) -> int:
        """The source's own number of the document at `place` of an epoch."""
        number = self._in_pool(epoch, place)
        return number if self._chosen is None else int(self._chosen[number])

    def _in_pool(self, epoch: int, place: int) -> int:
        pool_ends, groups, starts = self._pools(epoch)
        pool = int(np.searchsorted(pool_ends, place, "right"))
        begin = int(pool_ends[pool - 1]) if pool else 0
        size = int(pool_ends[pool]) - begin
        within = shuffled(place - begin, size, _hash(self._key, f"{epoch} {pool}"))
        for group in groups[pool * KEPT_GROUPS : (pool + 1) * KEPT_GROUPS]:
            if within < self._groups[group]:
                return int(starts[group]) + within
            within -= self._groups[group]
        raise AssertionError("a pool is the sum of its groups")

    def _new_pools(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        sizes = np.asarray(self._groups)
        order = np.random.default_rng([self._key, epoch]).permutation(len(sizes))
        pools = np.add.reduceat(sizes[order], np.arange(0, len(sizes), KEPT_GROUPS))
        return np.cumsum(pools), order, np.cumsum([0, *sizes[:-1]])


class Order(Epochs):
    """The documents of a source in the order of its epochs."""

    def __init__(
        self, documents: Documents, seed: int, key: str, chosen: np.ndarray | None = None
    ) -> None:
        super().__init__(documents, seed, key, chosen)
        self._documents = documents

    def pieces(self, turn: int) -> tuple[int, list[TokenSequence]]:
        """Epoch and document of draw number `turn`."""
        epoch, place = divmod(turn, len(self))
        return epoch, self._documents.pieces(self.number(epoch, place))


def balanced(
    documents: Documents, seed: int, key: str, chosen: np.ndarray | None = None
) -> dict[str, tuple[float, Order]]:
    """A source as one for each kind of answer that it has (text, pictures, both), with weights.

    Training on far more answers of one modality than of another teaches a habit of giving or
    withholding it, whatever is asked (arXiv 2405.09818, section 3.1). So all kinds have the same
    weight, but none comes over 4 times as often as its rows would: a few rows are not worn out.
    `chosen` are the numbers that count, in order; all of them if None.
    """
    every = documents.answers()
    numbers = np.arange(len(every)) if chosen is None else chosen
    answers = every[numbers]
    kinds, counts = np.unique(answers, return_counts=True)
    weights = np.minimum(1 / len(kinds), _MOST_REPEATS * counts / counts.sum())
    return {
        f"{key} ({_KIND_NAMES[kind]})": (
            float(weight / weights.sum()),
            Order(documents, seed, f"{key} {kind}", numbers[answers == kind]),
        )
        for kind, weight in zip(kinds.tolist(), weights, strict=True)
    }


_KIND_NAMES = ("text", "pictures", "text and pictures")
_MOST_REPEATS = 4


def _sizes(groups: Sequence[int], chosen: np.ndarray | None) -> list[int]:
    """How many of the chosen numbers, which ascend, each group has."""
    if chosen is None:
        return list(groups)
    edges = np.cumsum([0, *groups])
    return [int(size) for size in np.diff(np.searchsorted(chosen, edges))]


Made = TypeVar("Made")


class Ahead(Generic[Made]):
    """A stream whose next items (documents, batches) are made by threads while the network learns.

    The items and their order are those of the stream, whatever the number of workers.
    """

    def __init__(self, stream: Callable[[int], Made], workers: int, depth: int = 64) -> None:
        self._stream, self._depth = stream, depth
        self._pool = ThreadPoolExecutor(workers, "ahead")
        self._waiting: dict[int, Future[Made]] = {}
        self._lock = threading.Lock()

    def __call__(self, number: int) -> Made:
        with self._lock:
            for past in [n for n in self._waiting if not number <= n < number + self._depth]:
                self._waiting.pop(past).cancel()
            for coming in range(number, number + self._depth):
                if coming not in self._waiting:
                    self._waiting[coming] = self._pool.submit(self._stream, coming)
            asked = self._waiting[number]
        return asked.result()

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


def shuffled(place: int, size: int, key: int) -> int:
    """Where a permutation of 0..size-1 puts `place`: a Feistel network, walked until inside."""
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = place >> half, place & mask
        for turn in range(4):
            left, right = right, left ^ (_mixed(right + key + turn * 0x9E3779B97F4A7C15) & mask)
        place = left << half | right
        if place < size:
            return place


def _mixed(x: int) -> int:
    """The finaliser of splitmix64 (Steele et al. 2014)."""
    x &= _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def _hash(seed: int, name: str) -> int:
    mixed = _mixed(seed + 1)
    for byte in name.encode("utf-8", "surrogatepass"):
        mixed = _mixed(mixed ^ byte)
    return mixed


def _shares(weights: Mapping[str, float], total: float = 1.0) -> dict[str, float]:
    for name, weight in weights.items():
        if not 0 < weight < float("inf"):
            raise SettingError(f"weight {weight} of {name} must be over 0: leave the source out")
    together = sum(weights.values())
    return {name: total * weight / together for name, weight in weights.items()}


def _slots(weights: Mapping[str, float]) -> dict[str, int]:
    """Slots of a cycle for each source: rounded down, what is left to the largest remainders."""
    exact = {name: share * _CYCLE for name, share in _shares(weights).items()}
    slots = {name: int(amount) for name, amount in exact.items()}
    left = _CYCLE - sum(slots.values())
    for name in sorted(exact, key=lambda n: slots[n] - exact[n])[:left]:
        slots[name] += 1
    for name, count in slots.items():
        if not count:
            raise SettingError(
                f"the weight of {name} is under 1 in {_CYCLE} of all: raise it or leave it out"
            )
    return slots
