"""The engine: many requests at once on one cache. `step` is schedule, run, deliver.

Requests join and leave between steps. A reply depends on its prompt, settings and seed, not on what
runs beside it: token for token it is that of `generation/reference.py`. Several threads may drive
one engine: whoever waits for an event makes the next step, for all. What stands in the module tree
when a request is added counts: new weights, other modules and hooks are noticed there.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterator, Sequence
from threading import Condition
from types import TracebackType

from earlyfusion.devices import dtype_name
from earlyfusion.engine.backends.torch import fingerprint
from earlyfusion.engine.cache import DTYPES, Cache
from earlyfusion.engine.cache import cache_dtype as dtype_of
from earlyfusion.engine.handle import Handle, most_branches
from earlyfusion.engine.runner import NOTHING, ModelRunner
from earlyfusion.engine.scheduler import Entry, Scheduler
from earlyfusion.engine.tensor_parallel import LeadingRunner, peers_of
from earlyfusion.errors import ContextError, EarlyFusionError, SettingError, WeightsError
from earlyfusion.generation.grammar import Grammar
from earlyfusion.generation.request import Event, Request
from earlyfusion.generation.sampler import NOT_FINITE
from earlyfusion.model.kv_cache import kept_in
from earlyfusion.model.transformer import Transformer
from earlyfusion.processor import Processor
from earlyfusion.vocabulary import ImageLayout

CACHE_BYTES = 512_000_000
SLOTS = 64
CHUNK = 256


class Engine:
    """Runs requests on one transformer.

    The cache takes `cache_bytes`, cut into slots of `slot_tokens` tokens (the model's context if
    not set). Without a figure it is 512 MB, but at least the 3 slots of one guided image and at
    most 64 slots. A step reads at most `chunk` tokens of prompts beside the rows that draw.
    `cache_dtype` keeps keys and values in "fp32", "bf16" or "int8", instead of the model's dtype.
    Raises `SettingError`.
    """

    def __init__(
        self,
        transformer: Transformer,
        processor: Processor,
        cache_bytes: int | None = None,
        slot_tokens: int | None = None,
        chunk: int = CHUNK,
        cache_dtype: str | None = None,
    ) -> None:
        self.slot_tokens = slot_tokens or transformer.config.max_position_embeddings
        known = tuple(DTYPES)
        self._kept = cache_dtype and dtype_name("cache_dtype", cache_dtype, known)
        self.slot_bytes = self.slot_tokens * Cache.token_bytes(
            transformer.config, dtype_of(cache_dtype, kept_in(transformer)[0])
        )
        self.slots = _slots(cache_bytes, self.slot_bytes, self.slot_tokens)
        self.transformer, self.processor = transformer, processor
        self._chunk, self._scheduler = chunk, Scheduler(self.slots, chunk)
        self._handles: dict[Entry, Handle] = {}
        self._leaving: deque[Handle] = deque()
        self._turn = _Turns()
        self._load()

    def add(self, request: Request, priority: int = 0) -> Handle:
        """Take a request in; the smaller `priority` goes first. Raises as `check` does.

        Where the transformer has changed, requests under way read their tokens again.
        """
        self.check(request)
        with self._turn:
            self._let_go()
            if fingerprint([self.transformer]) != self._weights:
                self._load()
            grammar = self._grammar(request.stops, request.layout)
            leave = self._leaving.append
            handle = Handle(request, self.processor, grammar, priority, self._wait, leave)
            for held in self._handles.values() if self._runner.allow(grammar) else ():
                self._mark_seen(held)
            self._mark_seen(handle)
            if not handle.finished:
                self._handles[handle.entry] = handle
                self._scheduler.add(handle.entry)
            return handle

    def check(self, request: Request) -> None:
        """Raise `ContextError` or `SettingError` for a request that can never run."""
        length, branches = len(request.ids) + request.room, most_branches(request)
        if length > self.slot_tokens:
            raise ContextError(
                f"prompt and reply are {length:,} tokens, limit {self.slot_tokens:,}: "
                "shorten the prompt or set max_tokens"
            )
        if branches > self.slots:
            raise SettingError(
                f"a guided image takes {branches} slots, the cache has {self.slots}: "
                f"give it {branches * self.slot_bytes:,} bytes, or set both guidances to 1"
            )

    def generate(self, request: Request) -> Iterator[Event]:
        """The events of one reply; closing the iterator early cancels the request."""
        return iter(self.add(request))

    def close(self) -> None:
        """End the requests that are under way; whoever waits for one is told."""
        with self._turn:
            self._fail(SettingError("the model was closed while this request ran: ask it again"))

    @property
    def busy(self) -> bool:
        """Whether any request is under way."""
        with self._turn:
            self._let_go()
            return bool(self._handles)

    @property
    def preemptions(self) -> int:
        """How often a request had to step back for another, since the start."""
        return self._scheduler.preemptions

    def step(self) -> None:
        """Schedule, run, deliver: a token or more for every request that has read its prompt."""
        with self._turn:
            self._step()

    def _step(self) -> None:
        self._let_go()
        plan = self._scheduler.schedule()
        handles = [self._handles[entry] for entry in plan.ready]
        try:
            drawn = self._runner.run(plan, [handle.ask() for handle in handles])
        except BaseException as error:
            self._fail(error)
            raise
        for handle, tokens in zip(handles, drawn, strict=True):
            if NOTHING in tokens:
                self._give_up(handle, WeightsError(NOT_FINITE))
            else:
                self._deliver(handle, tokens)

    def _give_up(self, handle: Handle, error: BaseException) -> None:
        """End one request with an error, and nothing stays of what it has read."""
        handle.error = error
        slots = [b.slot for b in handle.entry.branches if b.slot is not None]
        self._end(handle)
        self._runner.clear(slots)
        for slot in slots:
            self._scheduler.slots.drop(slot)

    def _deliver(self, handle: Handle, tokens: Sequence[int]) -> None:
        self._scheduler.release(handle.take(tokens))
        if handle.finished:
            self._end(handle)
        elif handle.seen_V is not None and tokens[0] in self._runner.text_head.column_of:
            handle.seen_V[self._runner.text_head.column_of[tokens[0]]] = True

    def _mark_seen(self, handle: Handle) -> None:
        if handle.request.sampling.repetition_penalty != 1:
            handle.seen_V = self._runner.seen(handle.entry.branches[0].tokens)

    def _wait(self, handle: Handle) -> None:
        """Return when a handle has an event; who waits makes the steps that it takes, in turn."""
        while not handle.events:
            with self._turn:
                if handle.events:
                    return
                if isinstance(handle.error, EarlyFusionError):
                    raise handle.error
                if handle.error is not None:
                    raise RuntimeError("the engine failed while this request ran") from handle.error
                if handle.entry not in self._handles:
                    raise RuntimeError("this request was cancelled")
                self._step()

    def _let_go(self) -> None:
        """Take out what was cancelled. It only waits in a queue until here: an iterator may be
        closed by the garbage collector, in the middle of anything."""
        while self._leaving:
            self._end(self._leaving.popleft())

    def _end(self, handle: Handle) -> None:
        if self._handles.pop(handle.entry, None) is not None:
            self._scheduler.remove(handle.entry)

    def _fail(self, error: BaseException) -> None:
        """A step broke in the middle: what slots hold is unknown, so nothing is kept."""
        for handle in list(self._handles.values()):
            handle.error = error
            self._end(handle)
        self._scheduler.slots.forget()

    def _load(self) -> None:
        """Read the transformer, at first and when somebody has trained, moved or changed it."""
        self._grammars: dict[tuple[tuple[int, ...], ImageLayout], Grammar] = {}
        self._scheduler.restart()
        runner = ModelRunner if peers_of(self.transformer) is None else LeadingRunner
        shape = self.slots, self.slot_tokens, self._kept
        self._runner = runner(self.transformer, self._grammar(()), *shape)
        # Hooks and foreign modules see what the plain loop shows them: each prompt, and whole.
        self._scheduler.slots.shares = self._runner.fused
        self._scheduler.chunk = self._chunk if self._runner.fused else sys.maxsize
        for handle in self._handles.values():
            handle.grammar = self._grammar(handle.request.stops, handle.request.layout)
            self._runner.allow(handle.grammar)
        for handle in self._handles.values():
            self._mark_seen(handle)
        self._weights = fingerprint([self.transformer])
        self._seen = list(self.transformer.modules())  # their ids stay theirs

    def _grammar(self, stops: tuple[int, ...], layout: ImageLayout | None = None) -> Grammar:
        layout = layout or self.processor.layout
        if (stops, layout) not in self._grammars:
            vocabulary, size = self.processor.vocabulary, self.transformer.config.vocab_size
            device = kept_in(self.transformer)[1]
            self._grammars[stops, layout] = Grammar(vocabulary, layout, stops, size, device)
        return self._grammars[stops, layout]


class _Turns:
    """A lock that is had in the order of asking: whoever steps in a loop lets others in between."""

    def __init__(self) -> None:
        self._changed = Condition()
        self._given = self._ended = 0
        self._given_up: set[int] = set()

    def __enter__(self) -> None:
        with self._changed:
            mine, self._given = self._given, self._given + 1
            try:
                self._changed.wait_for(lambda: self._ended == mine)
            except BaseException:
                self._given_up.add(mine)
                self._skip()
                raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._changed:
            self._ended += 1
            self._skip()

    def _skip(self) -> None:
        while self._ended in self._given_up:
            self._given_up.remove(self._ended)
            self._ended += 1
        self._changed.notify_all()


def _slots(budget: int | None, slot_bytes: int, slot_tokens: int) -> int:
    if budget is None:
        return min(max(CACHE_BYTES // slot_bytes, 3), SLOTS)
    if budget < slot_bytes:
        raise SettingError(
            f"cache_bytes={budget:,} holds no slot of {slot_tokens:,} tokens: "
            f"give at least {slot_bytes:,} bytes, or fewer slot_tokens"
        )
    return budget // slot_bytes
