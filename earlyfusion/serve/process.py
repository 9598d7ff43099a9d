"""The engine in another process, the child, so that the server survives its end.

The child loads the weights and steps the engine; its interpreter lock belongs to the engine alone.
First it sends a `Front`, the model without its transformer: prompts, tokens and images are the
server's work. Then it sends the events of its steps. A message costs both processes as much as a
step of a small model with few requests, so the events of short steps are sent together. Messages
are pickles over a socket pair that no other process can open.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import count
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from time import monotonic
from typing import NamedTuple, TypeAlias, cast

import torch

from earlyfusion.api import Chameleon
from earlyfusion.engine.cache import CacheSize
from earlyfusion.engine.engine import Engine
from earlyfusion.engine.handle import Handle
from earlyfusion.errors import CheckpointError, EarlyFusionError
from earlyfusion.generation.request import Event, Request, TextDelta
from earlyfusion.model.transformer import Transformer
from earlyfusion.serve.logs import log_as_json
from earlyfusion.serve.niceness import yield_to_others

log = logging.getLogger("earlyfusion.serve")
BEAT_SECONDS = 0.5  # the longest time between two messages of a busy child
# Seconds that events may wait for those of the next steps: of one request, more for each further
# one, and at most. Each piece that is sent costs the server as much as several tokens the engine.
GATHER_SECONDS, GATHER_MORE, GATHER_MOST = 0.015, 0.0008, 0.04
MAX_FAILURES = 3  # failed steps in a row, after which the engine is made again
_END_SECONDS = 10.0


class GoneError(Exception):
    """The engine's process has ended, or its step took too long."""


@dataclass(frozen=True)
class Front:
    """The model and the sizes of its engine for the server's process; the transformer has no
    data."""

    model: Chameleon
    context_tokens: int
    cache_size: CacheSize
    most_running: int


class News(NamedTuple):
    """The events of one or several steps for one request. A tuple, as it is pickled often."""

    number: int
    events: Sequence[Event] = ()
    sampled: bool = False
    finished: bool = False
    error: BaseException | None = None


Child: TypeAlias = tuple[BaseProcess, Connection]

# To the child: a request with its number, or the number of a request to end. From the child: first
# the front or an error of loading, then news, the number of preemptions, and the blocks in use.
Command: TypeAlias = tuple[int, Request | None]
Message: TypeAlias = tuple[list[News], int, int]


class RemoteHandle:
    """A request in the child, with the members of a `Handle` that the driver uses."""

    def __init__(self, number: int, leave: Callable[[int], None], owner: object) -> None:
        self.owner = owner
        self.number, self.events = number, deque[Event]()
        self.tokens = self.finished = False  # whether it has a token; whether it has ended
        self.error: BaseException | None = None
        self._leave = leave

    def cancel(self) -> None:
        self._leave(self.number)


class RemoteEngine:
    """The child, with the methods of an `Engine` that the driver uses.

    The event loop calls `receive`; all else but `check` and the properties belongs to the driver's
    thread. A child that has work and sends nothing for `step_timeout` seconds counts as stuck.
    `spawn` starts a child (spawn.py); `child` is the first one, if it has been started already.
    """

    def __init__(
        self, spawn: Callable[[], Child], step_timeout: float, child: Child | None = None
    ) -> None:
        self._spawn, self.step_timeout = spawn, step_timeout
        self._numbers = count()
        self._handles: dict[int, RemoteHandle] = {}
        self.preemptions, self.used_blocks, self._heard = 0, 0, 0.0
        self.front = self.start(child)

    def start(self, child: Child | None = None) -> Front:
        """Start a child and wait until it has loaded. Raises an `EarlyFusionError`."""
        self._process, self._connection = child or self._spawn()
        try:
            first = self._connection.recv()
        except (EOFError, OSError):
            self.kill()
            raise CheckpointError(
                f"the engine's process ended while it loaded the model ({self._ending()}): give "
                "this machine more memory, or choose a smaller --dtype"
            ) from None
        if isinstance(first, Front):
            return first
        self.kill()
        raise first

    @property
    def pid(self) -> int:
        return self._process.pid or 0

    @property
    def alive(self) -> bool:
        return self._process.is_alive()

    @property
    def context_tokens(self) -> int:
        return self.front.context_tokens

    @property
    def cache_size(self) -> CacheSize:
        return self.front.cache_size

    @property
    def most_running(self) -> int:
        return self.front.most_running

    @property
    def busy(self) -> bool:
        return bool(self._handles)

    def check(self, request: Request) -> None:
        """As `Engine.check`, which needs nothing but these two sizes."""
        Engine.check(cast(Engine, self), request)

    def add(self, request: Request, owner: object = None) -> RemoteHandle:
        """Hand a request to the child. The `owner` stands in its handle, which may have news before
        this returns."""
        if not self._handles:
            self._heard = monotonic()
        handle = RemoteHandle(next(self._numbers), self._cancel, owner)
        self._handles[handle.number] = handle
        self._send((handle.number, request))
        return handle

    @property
    def silent_seconds(self) -> float:
        """Seconds without a message while there is work."""
        return monotonic() - self._heard if self._handles else 0.0

    def fileno(self) -> int:
        """Can be read when `receive` would not wait."""
        return self._connection.fileno()

    def receive(self) -> list[RemoteHandle]:
        """Read one message. Returns the requests that have news; raises `GoneError` if the child
        has ended."""
        try:
            message = cast(Message, self._connection.recv())
        except (EOFError, OSError):
            raise GoneError("the engine's process ended") from None
        news, self.preemptions, self.used_blocks = message
        self._heard = monotonic()
        told: list[RemoteHandle] = []
        for one in news:
            # Without a handle it was cancelled meanwhile.
            if (handle := self._handles.get(one.number)) is not None:
                handle.events += one.events
                handle.tokens, handle.error = one.sampled, one.error
                handle.finished = one.finished
                told.append(handle)
                if one.finished or one.error is not None:
                    self._handles.pop(one.number, None)
        return told

    def end(self) -> None:
        """End the child and all requests in it; `start` can follow."""
        self.kill()
        self._handles.clear()
        self.used_blocks = 0

    def close(self) -> None:
        """End the child for good. May be called twice."""
        self.end()

    def kill(self) -> None:
        self._process.kill()
        self._process.join(_END_SECONDS)
        self._connection.close()

    @property
    def ending(self) -> str:
        """How a child that has ended did so."""
        self._process.join(_END_SECONDS)
        return self._ending()

    def _ending(self) -> str:
        code = self._process.exitcode
        if code is None:
            return "it closed its connection and still runs"
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"

    def _cancel(self, number: int) -> None:
        if self._handles.pop(number, None) is not None:
            self._send((number, None))

    def _send(self, command: Command) -> None:
        # If the child has ended, `receive` notices.
        try:
            self._connection.send(command)
        except OSError:
            log.debug("the engine's process does not listen")


def serve_engine(connection: Connection, load: Callable[[], Chameleon]) -> None:
    """Load the model and serve its engine until the server ends: the main function of the child."""
    # A signal to the process group is meant for the server, which drains and then ends this
    # process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    log_as_json()
    yield_to_others()  # first, as later threads inherit it
    try:
        model = load()
        engine = model.engine
        _capture(engine)
        first: Front | EarlyFusionError = _front(model, engine)
    except EarlyFusionError as error:
        first = error
    try:
        connection.send(first)
    except OSError:
        return  # the server has ended
    if isinstance(first, EarlyFusionError):
        return
    # A full collection would visit all objects of torch, which takes as long as many steps.
    gc.freeze()
    try:
        _Child(connection, engine).run()
    except Exception:
        log.exception("the engine's process ends")
        raise SystemExit(1) from None


def _capture(engine: Engine) -> None:
    """Capture the steps of a GPU, so that no request waits for one; the log says how far it is."""

    def progress(done: int, number: int) -> None:
        if done % 12 == 0:
            log.info("capturing the steps of the GPU", extra={"done": done, "of": number})

    if taken := engine.warm_up(progress):
        log.info("the steps of the GPU are captured", extra={"bytes": taken})


def _front(model: Chameleon, engine: Engine) -> Front:
    with torch.device("meta"):
        transformer = Transformer(model.config)
    shown = Chameleon(
        transformer, model.image_tokenizer, model.processor, model.defaults, model.name
    )
    shown.folder = model.folder
    shown.adapters = dict.fromkeys(model.adapters, transformer)
    return Front(shown, engine.context_tokens, engine.cache_size, engine.most_running)


def differ(served: Chameleon, loaded: Chameleon) -> bool:
    """Whether prompts, tokens or images of the one are not those of the other."""
    return (
        served.config != loaded.config
        or served.processor.vocabulary.names != loaded.processor.vocabulary.names
        or not torch.equal(
            served.image_tokenizer.vqgan.codewords, loaded.image_tokenizer.vqgan.codewords
        )
    )


class _Child:
    """The loop of the child: commands in, one step, news out."""

    def __init__(self, connection: Connection, engine: Engine) -> None:
        self._connection, self._engine = connection, engine
        self._handles: dict[int, Handle] = {}
        self._silent: set[int] = set()  # of these: the requests without any news so far
        self._gathered = monotonic()  # when the news of all requests were last sent
        self._commands: deque[Command] = deque()
        self._changed = threading.Condition()
        self._sent, self._told, self._failures = monotonic(), self._state, 0

    def run(self) -> None:
        threading.Thread(target=self._listen, name="listen", daemon=True).start()
        while True:
            with self._changed:
                while not (self._commands or self._handles):
                    self._changed.wait()
            news = self._take_commands()
            if self._engine.busy:
                news += self._step()
            news += [one for one in map(self._news, self._due()) if one is not None]
            state = self._state
            # A child that becomes idle sends its figures once more.
            last = not self._handles and state != self._told
            if news or last or monotonic() - self._sent > BEAT_SECONDS:
                self._connection.send((news, *state))
                self._sent, self._told = monotonic(), state
            if self._failures == MAX_FAILURES:
                return  # something in the engine itself may be broken

    @property
    def _state(self) -> tuple[int, int]:
        return self._engine.preemptions, self._engine.used_blocks

    def _listen(self) -> None:
        # Reads all the time, so that neither process ever waits for the other to read.
        while True:
            try:
                command = self._connection.recv()
            except (EOFError, OSError):
                os._exit(0)  # the server has ended
            with self._changed:
                self._commands.append(command)
                self._changed.notify()

    def _take_commands(self) -> list[News]:
        """Add and cancel requests; news of those that cannot run."""
        refused: list[News] = []
        while self._commands:
            number, request = self._commands.popleft()
            if request is None:
                self._silent.discard(number)
                if (handle := self._handles.pop(number, None)) is not None:
                    handle.cancel()
                continue
            try:
                self._handles[number] = self._engine.add(request)
                self._silent.add(number)
            except Exception as error:
                refused.append(News(number, error=_sendable(error)))
        return refused

    def _step(self) -> list[News]:
        try:
            self._engine.step()
        except Exception as error:
            self._failures += 1
            log.exception("a step of the engine failed", extra={"failures": self._failures})
            failed = [
                News(number, [*handle.events], error=_sendable(error))
                for number, handle in self._handles.items()
            ]
            for handle in self._handles.values():
                handle.cancel()
            self._handles.clear()
            self._silent.clear()
            return failed
        self._failures = 0
        return []

    def _due(self) -> list[int]:
        """The requests whose news are sent now: all of them after the time that events may wait,
        before that those that are over, and those with their first."""
        now = monotonic()
        wait = min(GATHER_SECONDS + GATHER_MORE * (len(self._handles) - 1), GATHER_MOST)
        if now - self._gathered >= wait:
            self._gathered = now
            return [*self._handles]
        return [
            number
            for number, handle in self._handles.items()
            if handle.finished or handle.error is not None or number in self._silent
        ]

    def _news(self, number: int) -> News | None:
        handle = self._handles[number]
        events = _joined(handle.events)
        handle.events.clear()
        error = None if handle.error is None else _sendable(handle.error)
        if handle.finished or error is not None:
            del self._handles[number]
        elif not events:
            return None
        self._silent.discard(number)
        return News(number, events, bool(handle.tokens), handle.finished, error)


def _joined(events: Iterable[Event]) -> list[Event]:
    """The events; pieces of text that follow each other are one."""
    joined: list[Event] = []
    for event in events:
        last = joined[-1] if joined else None
        if isinstance(event, TextDelta) and isinstance(last, TextDelta):
            joined[-1] = TextDelta(last.text + event.text)
        else:
            joined.append(event)
    return joined


def _sendable(error: BaseException) -> BaseException:
    """The error without what cannot be pickled; only a user's mistake keeps its class."""
    if isinstance(error, EarlyFusionError):
        return type(error)(str(error))
    return RuntimeError(f"{type(error).__name__} in the engine's process")
