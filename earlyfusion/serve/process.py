"""The engine in its own process, the child, so that the server survives a crash of the engine.

The child loads the weights and steps the engine, without sharing Python's interpreter lock with the
server. First it sends an `EngineInfo`, which has the model without the transformer's weights: the
server needs it to encode prompts and to decode images. Then it sends the events of its steps. A
message costs both processes as much time as a step of a small model with few requests, so the
events of short steps are sent together. Messages are pickles over a socket pair that no other
process can open.
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
HEARTBEAT_SECONDS = 0.5  # maximum time between two messages of a busy child
# How long events wait for those of the next steps, to be sent together: each message to a client
# takes the server as long as several tokens take the engine.
GATHER_SECONDS = 0.015
GATHER_SECONDS_PER_REQUEST = 0.0008  # added for each request after the first
MAX_GATHER_SECONDS = 0.04
MAX_FAILURES = 3  # after this many failed steps in a row, the engine is replaced
_END_SECONDS = 10.0  # how long a killed child may take to end


class EngineDeadError(Exception):
    """The engine's process has ended, or one of its steps took too long."""


@dataclass(frozen=True)
class EngineInfo:
    """What the server needs to know about the child: the model, with its transformer on the meta
    device, and the limits of the engine."""

    model: Chameleon
    context_tokens: int
    cache_size: CacheSize
    most_running: int


class RequestUpdate(NamedTuple):
    """The events of one or several steps for request `number`. `sampled` says whether the request
    has tokens; it has ended if `finished` or with an `error`. A tuple, as it is pickled often."""

    number: int
    events: Sequence[Event] = ()
    sampled: bool = False
    finished: bool = False
    error: BaseException | None = None


Child: TypeAlias = tuple[BaseProcess, Connection]

# To the child: the number of a request, and the request or None to cancel it. From the child: first
# an `EngineInfo` or the error of loading; then updates, the number of preemptions and the number of
# blocks in use.
Command: TypeAlias = tuple[int, Request | None]
Message: TypeAlias = tuple[list[RequestUpdate], int, int]


class RemoteHandle:
    """A request in the child. It has the members of a `Handle` that the driver uses."""

    def __init__(self, number: int, cancel: Callable[[int], None], owner: object) -> None:
        self.owner = owner
        self.number, self.events = number, deque[Event]()
        self.tokens = False  # whether it has tokens
        self.finished = False
        self.error: BaseException | None = None
        self._cancel = cancel

    def cancel(self) -> None:
        self._cancel(self.number)


class RemoteEngine:
    """The child. It has the methods of an `Engine` that the driver uses.

    The event loop calls `receive`, the driver's thread all other methods; `check` and the
    properties are called by both. A child that has work but sends nothing for `step_timeout`
    seconds counts as stuck. `spawn` starts a child (spawn.py); `child` is the first one if it has
    been started already.
    """

    def __init__(
        self, spawn: Callable[[], Child], step_timeout: float, child: Child | None = None
    ) -> None:
        self._spawn, self.step_timeout = spawn, step_timeout
        self._numbers = count()
        self._handles: dict[int, RemoteHandle] = {}
        self.preemptions, self.used_blocks, self._last_message = 0, 0, 0.0
        self.info = self.start(child)

    def start(self, child: Child | None = None) -> EngineInfo:
        """Start a child and wait until it has loaded the model. Raises an `EarlyFusionError` if it
        cannot."""
        self._process, self._connection = child or self._spawn()
        try:
            first = self._connection.recv()
        except (EOFError, OSError):
            self._kill()
            raise CheckpointError(
                f"the engine's process ended while it loaded the model ({self.exit_reason}): give "
                "this machine more memory, or choose a smaller --dtype"
            ) from None
        if isinstance(first, EngineInfo):
            return first
        self._kill()
        raise first

    @property
    def pid(self) -> int:
        return self._process.pid or 0

    @property
    def alive(self) -> bool:
        return self._process.is_alive()

    @property
    def context_tokens(self) -> int:
        return self.info.context_tokens

    @property
    def cache_size(self) -> CacheSize:
        return self.info.cache_size

    @property
    def most_running(self) -> int:
        return self.info.most_running

    @property
    def busy(self) -> bool:
        return bool(self._handles)

    def check(self, request: Request) -> None:
        """As `Engine.check`, which uses only `context_tokens` and `cache_size`."""
        Engine.check(cast(Engine, self), request)

    def add(self, request: Request, owner: object = None) -> RemoteHandle:
        """Send a request to the child. The handle stores `owner`. It may get events before this
        method returns."""
        if not self._handles:
            self._last_message = monotonic()
        handle = RemoteHandle(next(self._numbers), self._cancel, owner)
        self._handles[handle.number] = handle
        self._send((handle.number, request))
        return handle

    @property
    def silent_seconds(self) -> float:
        """Seconds since the last message if the child has work, else 0."""
        return monotonic() - self._last_message if self._handles else 0.0

    def fileno(self) -> int:
        """The connection's file descriptor. It is readable when `receive` would not wait."""
        return self._connection.fileno()

    def receive(self) -> list[RemoteHandle]:
        """Read one message. Returns the handles that it updated; raises `EngineDeadError` if the
        child has ended."""
        try:
            message = cast(Message, self._connection.recv())
        except (EOFError, OSError):
            raise EngineDeadError("the engine's process ended") from None
        updates, self.preemptions, self.used_blocks = message
        self._last_message = monotonic()
        handles: list[RemoteHandle] = []
        for update in updates:
            # A request that was cancelled meanwhile has no handle.
            if (handle := self._handles.get(update.number)) is not None:
                handle.events += update.events
                handle.tokens, handle.error = update.sampled, update.error
                handle.finished = update.finished
                handles.append(handle)
                if update.finished or update.error is not None:
                    self._handles.pop(update.number, None)
        return handles

    def close(self) -> None:
        """End the child and all requests in it. May be called twice. `start` starts another
        child."""
        self._kill()
        self._handles.clear()
        self.used_blocks = 0

    def _kill(self) -> None:
        self._process.kill()
        self._process.join(_END_SECONDS)
        self._connection.close()

    @property
    def exit_reason(self) -> str:
        """The signal or exit code with which the child has ended."""
        self._process.join(_END_SECONDS)
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
            log.debug("the engine's process has ended")


def serve_engine(connection: Connection, load: Callable[[], Chameleon]) -> None:
    """The main function of the child: load the model and run its engine until the server ends."""
    # Signals to the process group are for the server, which finishes its requests and then ends
    # this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    log_as_json()
    yield_to_others()  # first, as later threads inherit it
    try:
        model = load()
        engine = model.engine
        _capture(engine)
        first: EngineInfo | EarlyFusionError = _engine_info(model, engine)
    except EarlyFusionError as error:
        first = error
    try:
        connection.send(first)
    except OSError:
        return  # the server has ended
    if isinstance(first, EarlyFusionError):
        return
    # Otherwise a full garbage collection would visit all objects of torch, which takes as long as
    # many steps.
    gc.freeze()
    try:
        _Child(connection, engine).run()
    except Exception:
        log.exception("the engine's process ends")
        raise SystemExit(1) from None


def _capture(engine: Engine) -> None:
    """Capture the CUDA graphs of all steps, so that no request waits for one; logs the progress."""

    def progress(captured: int, total: int) -> None:
        if captured % 12 == 0:
            log.info("capturing the steps of the GPU", extra={"done": captured, "of": total})

    if memory := engine.warm_up(progress):
        log.info("the steps of the GPU are captured", extra={"bytes": memory})


def _engine_info(model: Chameleon, engine: Engine) -> EngineInfo:
    with torch.device("meta"):
        transformer = Transformer(model.config)
    without_weights = Chameleon(
        transformer,
        model.image_tokenizer,
        model.processor,
        model.defaults,
        model.name,
        model.folder,
    )
    without_weights.adapters = dict.fromkeys(model.adapters, transformer)
    return EngineInfo(
        without_weights, engine.context_tokens, engine.cache_size, engine.most_running
    )


def models_differ(served: Chameleon, loaded: Chameleon) -> bool:
    """Whether two models differ in config, token names or codebook."""
    return (
        served.config != loaded.config
        or served.processor.vocabulary.names != loaded.processor.vocabulary.names
        or not torch.equal(
            served.image_tokenizer.vqgan.codewords, loaded.image_tokenizer.vqgan.codewords
        )
    )


class _Child:
    """The loop of the child: read commands, run one step, send updates."""

    def __init__(self, connection: Connection, engine: Engine) -> None:
        self._connection, self._engine = connection, engine
        self._handles: dict[int, Handle] = {}
        self._without_update: set[int] = set()  # requests for which no update was sent yet
        self._all_sent_at = monotonic()  # when the updates of all requests were last sent
        self._commands: deque[Command] = deque()
        self._condition = threading.Condition()
        self._sent_at, self._sent_state, self._failures = monotonic(), self._state, 0

    def run(self) -> None:
        threading.Thread(target=self._listen, name="listen", daemon=True).start()
        while True:
            self._await_work()
            updates = self._take_commands()
            if self._engine.busy:
                updates += self._step()
            due = map(self._take_update, self._due())
            updates += [update for update in due if update is not None]
            state = self._state
            # A child that becomes idle sends its state once more.
            became_idle = not self._handles and state != self._sent_state
            if updates or became_idle or monotonic() - self._sent_at > HEARTBEAT_SECONDS:
                self._connection.send((updates, *state))
                self._sent_at, self._sent_state = monotonic(), state
            if self._failures == MAX_FAILURES:
                return  # something in the engine itself may be broken

    def _await_work(self) -> None:
        """Wait for a command unless requests run. Meanwhile the cache takes memory in advance."""
        while not (self._commands or self._handles):
            if not self._engine.touch_memory():
                with self._condition:
                    if not self._commands:
                        self._condition.wait()

    @property
    def _state(self) -> tuple[int, int]:
        """The number of preemptions, and of cache blocks in use."""
        return self._engine.preemptions, self._engine.used_blocks

    def _listen(self) -> None:
        # In a thread, as both processes could wait for each other with full buffers if the socket
        # were only read between steps.
        while True:
            try:
                command = self._connection.recv()
            except (EOFError, OSError):
                os._exit(0)  # the server has ended
            with self._condition:
                self._commands.append(command)
                self._condition.notify()

    def _take_commands(self) -> list[RequestUpdate]:
        """Add and cancel requests as commanded. Returns updates for those that cannot run."""
        refused: list[RequestUpdate] = []
        while self._commands:
            number, request = self._commands.popleft()
            if request is None:
                self._without_update.discard(number)
                if (handle := self._handles.pop(number, None)) is not None:
                    handle.cancel()
                continue
            try:
                self._handles[number] = self._engine.add(request)
                self._without_update.add(number)
            except Exception as error:
                refused.append(RequestUpdate(number, error=_picklable(error)))
        return refused

    def _step(self) -> list[RequestUpdate]:
        """Run a step. If it fails, ends all requests and returns their last updates."""
        try:
            self._engine.step()
        except Exception as error:
            self._failures += 1
            log.exception("a step of the engine failed", extra={"failures": self._failures})
            failed = [
                RequestUpdate(number, [*handle.events], error=_picklable(error))
                for number, handle in self._handles.items()
            ]
            for handle in self._handles.values():
                handle.cancel()
            self._handles.clear()
            self._without_update.clear()
            return failed
        self._failures = 0
        return []

    def _due(self) -> list[int]:
        """The requests whose events are sent now: all if events have waited long enough, otherwise
        those that have ended and those for which no update was sent yet."""
        now = monotonic()
        wait = GATHER_SECONDS + GATHER_SECONDS_PER_REQUEST * (len(self._handles) - 1)
        if now - self._all_sent_at >= min(wait, MAX_GATHER_SECONDS):
            self._all_sent_at = now
            return [*self._handles]
        return [
            number
            for number, handle in self._handles.items()
            if handle.finished or handle.error is not None or number in self._without_update
        ]

    def _take_update(self, number: int) -> RequestUpdate | None:
        """The update of a request since the last call; None if it has no events and still runs."""
        handle = self._handles[number]
        events = _merge_text(handle.events)
        handle.events.clear()
        error = None if handle.error is None else _picklable(handle.error)
        if handle.finished or error is not None:
            del self._handles[number]
        elif not events:
            return None
        self._without_update.discard(number)
        return RequestUpdate(number, events, bool(handle.tokens), handle.finished, error)


def _merge_text(events: Iterable[Event]) -> list[Event]:
    """The events, with adjacent `TextDelta`s merged."""
    merged: list[Event] = []
    for event in events:
        last = merged[-1] if merged else None
        if isinstance(event, TextDelta) and isinstance(last, TextDelta):
            merged[-1] = TextDelta(last.text + event.text)
        else:
            merged.append(event)
    return merged


def _picklable(error: BaseException) -> BaseException:
    """An error that can be pickled. Only errors of a user keep their class and text."""
    if isinstance(error, EarlyFusionError):
        return type(error)(str(error))
    return RuntimeError(f"{type(error).__name__} in the engine's process")
