"""One thread drives the engine; coroutines on the event loop receive its events. In the server's
process, only this file uses the engine.

A `Batch` holds the requests of one HTTP request (`n` choices are `n` requests) and one queue of
their events. The thread adds requests to the engine and steps it while there is work. It posts the
events of each step to the event loop in one call, so the loop never waits for the engine. If the
engine runs in another process, that process steps: the loop reads its messages, and the thread only
sends requests and restarts the process. The loop passes the events on to a few replies at a time,
so that a step with many replies does not make other clients wait.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from random import uniform
from threading import Condition, Thread, get_ident
from threading import Event as ThreadEvent
from time import monotonic
from typing import TypeAlias, cast

from earlyfusion.api import Chameleon
from earlyfusion.engine.engine import Engine
from earlyfusion.engine.handle import Handle
from earlyfusion.errors import CheckpointError, EarlyFusionError
from earlyfusion.generation.request import Event, Finished, Request
from earlyfusion.serve.process import (
    MAX_FAILURES,
    EngineDeadError,
    RemoteEngine,
    RemoteHandle,
    models_differ,
)

log = logging.getLogger("earlyfusion.serve")

STALE_SECONDS = 10.0  # an engine without a heartbeat for longer counts as stuck
IDLE_SECONDS = 1.0  # between two heartbeats of an idle driver
REPLIES_AT_ONCE = 8  # replies that get their events before the event loop reads its sockets again
MAX_PAUSE = 30.0  # seconds between two attempts to start the engine's process, at most
_NOT_STARTED = (
    "the engine's process has ended and does not start again, which is tried every half minute: "
    "the server's log says why"
)
_CHANGED = (
    "the model's files are not those of the model that is served: put them back, or restart the "
    "server to serve what is there now"
)


class QueueFullError(Exception):
    """The queue is full; ask again in `seconds`."""

    def __init__(self, limit: int, seconds: float) -> None:
        super().__init__(f"{limit} requests are under way or waiting, the limit")
        self.limit, self.seconds = limit, seconds


class NotReadyError(Exception):
    """The server is starting or shutting down. If its engine does not start again, the message says
    so."""


class EngineFailedError(Exception):
    """A step of the engine failed, which ended every request in it."""


class RequestTimeoutError(Exception):
    """A request took longer than the server allows."""


@dataclass(eq=False)
class _Job:
    """Request number `index` of a batch, and its handle once it is in the engine."""

    request: Request
    index: int
    batch: Batch
    handle: Handle | RemoteHandle | None = None
    has_tokens: bool = False
    ended: bool = False


@dataclass
class _JobUpdate:
    """New events of a job, and the error that ended it, if any."""

    job: _Job
    events: list[Event] = field(default_factory=list)
    error: BaseException | None = None


class Batch:
    """The requests of one HTTP request. They take room in the queue from admission to `close`. All
    methods run on the event loop."""

    def __init__(self, driver: Driver, num_requests: int) -> None:
        self.num_requests, self.admitted_at = num_requests, monotonic()
        self.requests: list[Request] = []
        self.cancelled = False
        # For metrics.py: whether there was any output, and when each request's newest image began.
        self.has_output, self.image_started_at = False, dict[int, float]()
        self._driver, self._num_unfinished = driver, 0
        self._pending: list[tuple[int, Event]] = []
        self._error: BaseException | None = None
        self._waiter: asyncio.Future[bool] | None = None
        self._timer: asyncio.Handle | None = None
        self._deadline = self._timer_at = 0.0  # of the current wait, and of the timer

    @property
    def can_continue(self) -> bool:
        """Whether `groups` can continue without waiting for further events."""
        return bool(self._pending) or self._num_unfinished == 0

    def submit(self, requests: Sequence[Request]) -> None:
        """Pass the requests to the engine. Raises an `EarlyFusionError` if one can never run."""
        for request in requests:
            self._driver.engine.check(request)
        self.requests, self._num_unfinished = list(requests), len(requests)
        self._driver.enqueue([_Job(request, i, self) for i, request in enumerate(requests)])

    async def events(
        self, idle_seconds: float | None = None, timeout: float | None = None
    ) -> AsyncIterator[tuple[int, Event] | None]:
        """The events of `groups`, one by one."""
        async for group in self.groups(idle_seconds, timeout):
            if group is None:
                yield None
            for numbered_event in group or ():
                yield numbered_event

    async def groups(
        self, idle_seconds: float | None = None, timeout: float | None = None
    ) -> AsyncIterator[Sequence[tuple[int, Event]] | None]:
        """Groups of events, each with the index of its request; None after `idle_seconds` without
        events. A group holds all events since the last one.

        Raises the error that ended a request, or `RequestTimeoutError` after `timeout` seconds,
        counted from admission.
        """
        end = None if timeout is None else self.admitted_at + timeout
        while self._num_unfinished:
            if self._pending:
                group, self._pending = self._pending, []
                self._num_unfinished -= sum(isinstance(event, Finished) for _, event in group)
                yield group
                continue
            if self._error is None and end is not None and monotonic() >= end:
                self._error = RequestTimeoutError()
            if self._error is not None:
                raise self._error
            seconds_left = None if end is None else end - monotonic()
            if not await self._wait_for_events(_minimum(idle_seconds, seconds_left)):
                yield None

    async def collect(self, timeout: float | None = None) -> list[list[Event]]:
        """All events of each request."""
        replies: list[list[Event]] = [[] for _ in self.requests]
        async for group in self.groups(timeout=timeout):
            for index, event in group or ():
                replies[index].append(event)
        return replies

    def close(self) -> None:
        """Give the room in the queue back, and cancel the requests that still run. May be called
        twice."""
        if not self.cancelled:
            self.cancelled = True
            if self._timer is not None:
                self._timer.cancel()
            unfinished = self._num_unfinished > 0
            self._driver.release(self, unfinished)
            if unfinished and self._error is None:
                self._driver.on_cancel(self)

    def receive(self, update: _JobUpdate) -> None:
        """Add new events of a request, or the error that ended it."""
        self._pending += [(update.job.index, event) for event in update.events]
        self._error = self._error or update.error
        self._wake(True)

    def fail(self, error: BaseException) -> None:
        """End the replies with an error."""
        self._error = self._error or error
        self._wake(True)

    async def _wait_for_events(self, seconds: float | None) -> bool:
        """Wait for events or an error; returns whether any came within `seconds` (None: no
        limit)."""
        if self._pending or self._error is not None:
            return True
        loop = asyncio.get_running_loop()
        self._waiter = loop.create_future()
        if seconds is not None:
            self._deadline = loop.time() + seconds
            if self._timer is None or self._timer_at > self._deadline:
                self._set_timer(loop)
        try:
            return await self._waiter
        finally:
            self._waiter = None

    def _set_timer(self, loop: asyncio.AbstractEventLoop) -> None:
        # One timer for many waits, most of which end long before it. A timer per wait would take as
        # long as handling the event.
        if self._timer is not None:
            self._timer.cancel()
        # For under a millisecond uvloop gives a handle without its time.
        self._timer = loop.call_at(self._deadline, self._on_timer, loop)
        self._timer_at = self._deadline

    def _on_timer(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        if self._waiter is None:
            return
        if loop.time() >= self._deadline:
            self._wake(False)
        else:
            self._set_timer(loop)

    def _wake(self, has_events: bool) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(has_events)


OnEvent: TypeAlias = Callable[[Batch, int, Event], None]


class Driver:
    """The thread that drives the engine of a model, and the queue of requests before it.

    At most `max_queue` requests wait, in addition to those that run. With `remote` the engine runs
    in another process, which is restarted whenever it ends. Without, it is `model.engine`.
    """

    def __init__(
        self, model: Chameleon, max_queue: int, remote: RemoteEngine | None = None
    ) -> None:
        self.model, self.max_queue, self.remote = model, max_queue, remote
        self.restarts = 0
        self.draining = self.ready = False
        self.failures = 0
        self.start_error = ""  # for clients: why the engine's process did not start again
        self.on_event: OnEvent = lambda batch, index, event: None
        self.on_cancel: Callable[[Batch], None] = lambda batch: None
        self._num_admitted = 0
        self._batches: dict[
            Batch, None
        ] = {}  # admitted and not closed; an ordered set, oldest first
        self._mean_seconds = 1.0  # moving mean of the time from admission to `close`
        self._undelivered: dict[_Job, _JobUpdate] = {}  # updates that their batch does not have yet
        self._inbox: list[_Job] = []
        self._jobs: list[_Job] = []
        self._wake = Condition()
        self._stopping = False
        self._heartbeat = monotonic()
        self._notified = False  # whether `_notify` was called since the thread last checked
        self._failure = ""  # why the engine's process must be restarted
        self._socket: int | None = None  # file descriptor that the event loop watches
        self._loop: asyncio.AbstractEventLoop | None = None
        self._loops_thread = 0
        self._thread: Thread | None = None

    @property
    def engine(self) -> Engine | RemoteEngine:
        return self.remote or self.model.engine

    @property
    def limit(self) -> int:
        """The maximum number of requests that run or wait."""
        return self.engine.most_running + self.max_queue

    @property
    def running(self) -> int:
        """The number of requests that generate tokens."""
        return sum(job.has_tokens and not job.ended for job in list(self._jobs))

    @property
    def waiting(self) -> int:
        """The number of admitted requests that have no token yet."""
        return max(self._num_admitted - self.running, 0)

    @property
    def preemptions(self) -> int:
        return self.engine.preemptions

    @property
    def cache_usage(self) -> float:
        """The share of the cache's blocks that requests hold."""
        return self.engine.used_blocks / self.engine.cache_size.blocks

    @property
    def silent_seconds(self) -> float:
        """Seconds since the engine last finished a step or had nothing to do."""
        return monotonic() - self._heartbeat

    @property
    def healthy(self) -> bool:
        alive = self._thread is not None and self._thread.is_alive()
        return alive and self.failures < MAX_FAILURES

    @property
    def engines_ready(self) -> int:
        """The number of engines that accept requests: 1 or 0."""
        return int(self.ready and not self.draining)

    def set_callbacks(self, on_event: OnEvent, on_cancel: Callable[[Batch], None]) -> None:
        """Set what is called on the event loop: `on_event(batch, index, event)` for each event of
        request number `index`, and `on_cancel(batch)` when a client leaves early."""
        self.on_event, self.on_cancel = on_event, on_cancel

    def start(self) -> None:
        """Start the thread; events go to the running loop."""
        self._loop, self._loops_thread = asyncio.get_running_loop(), get_ident()
        if self.remote is not None:
            self._listen()
        self._thread = Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    async def warm_up(self) -> None:
        """Answer one request, so that the first client does not wait for caches to be built."""
        batch = self.admit(1, warming=True)
        try:
            request = await asyncio.to_thread(
                self.model.request, "Hi", "text", seed=0, temperature=0, max_tokens=2
            )
            batch.submit([request])
            await batch.collect()
        finally:
            batch.close()
        self.ready = True

    def admit(self, count: int, warming: bool = False) -> Batch:
        """Reserve room for `count` requests, before the work of reading their prompt. With
        `warming`, also while the driver is not ready. Raises `QueueFullError` or
        `NotReadyError`."""
        self.check_room(count, warming)
        self._num_admitted += count
        batch = Batch(self, count)
        self._batches[batch] = None
        return batch

    def check_room(self, count: int = 1, warming: bool = False) -> None:
        """Raise what `admit` would raise now."""
        if self.draining or not (self.ready or warming):
            raise NotReadyError(self.start_error)
        if self._num_admitted + count > self.limit:
            raise QueueFullError(self.limit, self._retry_seconds())

    def _retry_seconds(self) -> float:
        ahead = max(self._num_admitted, 1) / self.engine.most_running
        oldest = next(iter(self._batches), None)
        # A batch that has run longer than the mean shows that the mean is too small.
        age = 0.0 if oldest is None else monotonic() - oldest.admitted_at
        seconds = min(max(max(self._mean_seconds, age) * ahead, 1), 40)
        # So that clients refused together do not come back together.
        return seconds * uniform(0.5, 1.5)

    def enqueue(self, jobs: list[_Job]) -> None:
        """Let the thread add these requests to the engine."""
        with self._wake:
            self._inbox += jobs
            self._notify()

    def release(self, batch: Batch, unfinished: bool) -> None:
        """Give the room of a batch back. If it is `unfinished`, the thread cancels its requests."""
        self._num_admitted -= batch.num_requests
        del self._batches[batch]
        self._mean_seconds += 0.2 * (monotonic() - batch.admitted_at - self._mean_seconds)
        if unfinished:
            with self._wake:  # the thread sees batch.cancelled
                self._notify()

    def abort(self) -> None:
        """End all requests with `NotReadyError`. Called on the event loop."""
        self.draining = True
        for batch in self._batches:
            batch.fail(NotReadyError())

    async def drain(self, seconds: float) -> None:
        """Admit nothing more, and wait up to `seconds` until all requests are answered."""
        self.draining = True
        end = monotonic() + seconds
        while self._num_admitted and monotonic() < end:
            await asyncio.sleep(0.02)

    def stop(self) -> None:
        """End the thread after its current step, and all running requests."""
        self.draining = True
        with self._wake:
            self._stopping = True
            self._notify()
        if self._thread is not None:
            self._thread.join(timeout=30)
        for job in self._jobs:
            if job.handle is not None:
                job.handle.cancel()
        if self.remote is None:
            _ = self.model.engine.busy  # ends cancelled requests
        else:
            self._run_on_loop(self._stop_listening)
            self.remote.close()

    def _notify(self) -> None:
        """Wake the thread."""
        self._notified = True
        self._wake.notify()

    # --- the socket to the engine's process, on the event loop ---

    def _listen(self) -> None:
        assert self._loop is not None and self.remote is not None
        self._socket = self.remote.fileno()
        self._loop.add_reader(self._socket, self._read_message)
        # uvloop has made it non-blocking: half a message, or a full buffer, would be an error.
        os.set_blocking(self._socket, True)

    def _stop_listening(self) -> None:
        if self._socket is not None and self._loop is not None:
            self._loop.remove_reader(self._socket)
            self._socket = None

    def _read_message(self) -> None:
        assert self.remote is not None
        try:
            handles = self.remote.receive()
        except EngineDeadError as error:
            self._stop_listening()
            with self._wake:
                self._failure = str(error)
                self._notify()
            return
        self._heartbeat, updates = monotonic(), list[_JobUpdate]()
        for handle in handles:
            job = cast(_Job, handle.owner)
            job.handle = handle
            if (update := self._take_update(job)) is not None:
                updates.append(update)
            if job.ended:
                with suppress(ValueError):  # the thread may not have added it to the list yet
                    self._jobs.remove(job)
        if updates:
            self._receive_updates(updates)

    def _run_on_loop(self, call: Callable[[], None]) -> None:
        """Call a function on the event loop, and wait until it returns."""
        if self._loop is None or get_ident() == self._loops_thread:
            call()
            return
        done = ThreadEvent()

        def run() -> None:
            call()
            done.set()

        with suppress(RuntimeError):  # the loop has closed, and watches nothing
            self._loop.call_soon_threadsafe(run)
            done.wait(10)

    # --- the thread ---

    def _run(self) -> None:
        try:
            self._drive()
        except Exception as error:
            # Nothing above should raise. If it does, end all requests, as nothing will answer them.
            log.exception("the engine's thread ended")
            self.draining = True
            waiting = [*self._jobs, *self._inbox]
            self._post_updates([_JobUpdate(job, error=_public_error(error)) for job in waiting])
            raise

    def _drive(self) -> None:
        while self._await_work():
            engine = self.engine
            self._admit_inbox(engine)
            self._drop_cancelled()
            if isinstance(engine, Engine):
                # `busy` ends cancelled requests, so that their blocks are free before the step.
                if engine.busy:
                    self._step(engine)
                updates = (self._take_update(job) for job in self._jobs)
                self._post_updates([update for update in updates if update is not None])
                self._heartbeat = monotonic()
            self._jobs = [job for job in self._jobs if not job.ended]

    def _await_work(self) -> bool:
        """Wait for work; returns False if the thread must end."""
        if self.remote is None:
            self._await_jobs()
        else:
            self._await_commands(self.remote)
        return not self._stopping

    def _await_jobs(self) -> None:
        with self._wake:
            while not (self._inbox or self._jobs or self._stopping):
                self._heartbeat = monotonic()
                self._wake.wait(IDLE_SECONDS)

    def _await_commands(self, remote: RemoteEngine) -> None:
        """Wait up to `IDLE_SECONDS` until there is something to send. Restarts the engine's process
        if it has ended or is stuck."""
        with self._wake:
            if not (self._inbox or self._notified or self._stopping or self._failure):
                self._wake.wait(IDLE_SECONDS)
            self._notified = False
        if not remote.busy:
            self._heartbeat = monotonic()
        if self._stopping:
            return
        if self._failure or not remote.alive:
            self._failure = f"the engine's process ended ({remote.exit_reason})"
        elif remote.silent_seconds > remote.step_timeout:
            self._failure = f"a step of the engine took over {remote.step_timeout:g} s"
        if self._failure:
            log.error("the engine is lost", extra={"reason": self._failure})
            self._restart()

    def _restart(self) -> None:
        """Restart the engine's process; if it does not start, try again after growing pauses.
        Nothing is admitted meanwhile."""
        assert self.remote is not None
        self.ready, pause = False, 1.0
        self._run_on_loop(self._stop_listening)
        self._fail_all(EngineDeadError("the engine's process ended"))
        while not self._stopping:
            self.restarts += 1
            self.remote.close()
            log.error("the engine's process is started again")
            start_error = _NOT_STARTED
            try:
                info = self.remote.start()
                if models_differ(self.model, info.model):
                    start_error = _CHANGED
                    raise CheckpointError(start_error)
                # Keep this process's model: its image tokenizer is loaded, with an open file per
                # tensor.
                self.remote.info = replace(info, model=self.model)
            except Exception:
                self.start_error = start_error
                log.exception("the engine's process did not start")
                self._sleep(pause)
                pause = min(2 * pause, MAX_PAUSE)
            else:
                self._failure = ""
                self._run_on_loop(self._listen)
                self._heartbeat = monotonic()
                self.ready, self.failures, self.start_error = True, 0, ""
                return

    def _sleep(self, seconds: float) -> None:
        """Wait `seconds`, or less if the thread must end."""
        with self._wake:
            self._wake.wait_for(lambda: self._stopping, seconds)

    def _admit_inbox(self, engine: Engine | RemoteEngine) -> None:
        with self._wake:
            inbox, self._inbox = self._inbox, []
        for job in inbox:
            if job.batch.cancelled:
                continue
            try:
                if isinstance(engine, Engine):
                    job.handle = engine.add(job.request)
                else:
                    job.handle = engine.add(job.request, job)
            except Exception as error:
                self._post_updates([_JobUpdate(job, error=_public_error(error))])
            else:
                self._jobs.append(job)

    def _drop_cancelled(self) -> None:
        remaining: list[_Job] = []
        for job in self._jobs:
            # Read once: the event loop may cancel a batch at any time.
            if not job.batch.cancelled:
                remaining.append(job)
            elif job.handle is not None:
                job.handle.cancel()
        self._jobs = remaining

    def _step(self, engine: Engine) -> None:
        try:
            engine.step()
        except Exception as error:
            self.failures += 1
            log.exception("a step of the engine failed", extra={"failures": self.failures})
            self._fail_all(error)
            if self.failures % MAX_FAILURES == 0:
                # Something in the engine itself may be broken: the next request makes a new one.
                self.model.close()
        else:
            self.failures = 0

    def _fail_all(self, error: Exception) -> None:
        """End all requests with an error. The engine may have ended some of them already."""
        for job in self._jobs:
            if job.handle is not None:
                job.handle.cancel()
        running = [job for job in self._jobs if not job.ended]
        self._post_updates([_JobUpdate(job, error=_public_error(error)) for job in running])
        self._jobs = []

    def _take_update(self, job: _Job) -> _JobUpdate | None:
        """The events of a job since the last call, and its error; None if there are neither."""
        handle = job.handle
        assert handle is not None
        # Read `ended` before the events, as another thread may step the engine too.
        job.ended = handle.finished or handle.error is not None
        job.has_tokens = job.has_tokens or bool(handle.tokens)
        if not handle.events and handle.error is None:
            return None
        events = [handle.events.popleft() for _ in range(len(handle.events))]
        error = None if handle.error is None else _public_error(handle.error)
        return _JobUpdate(job, events, error)

    def _post_updates(self, updates: Sequence[_JobUpdate]) -> None:
        """Send updates from the thread to the event loop."""
        if updates and self._loop is not None:
            try:
                self._loop.call_soon_threadsafe(self._receive_updates, updates)
            except RuntimeError:  # the loop has closed: nobody waits any more
                self._stopping = True

    def _receive_updates(self, updates: Sequence[_JobUpdate]) -> None:
        idle = not self._undelivered
        for update in updates:
            earlier = self._undelivered.get(update.job)
            if earlier is None:
                self._undelivered[update.job] = update
            else:  # deliver both together
                earlier.events += update.events
                earlier.error = earlier.error or update.error
        if idle:
            self._deliver()

    def _deliver(self) -> None:
        """Pass on the updates of a few replies now, the others after the loop has read its
        sockets."""
        for job in [*islice(self._undelivered, REPLIES_AT_ONCE)]:
            update = self._undelivered.pop(job)
            if not job.batch.cancelled:
                try:
                    for event in update.events:
                        self.on_event(job.batch, job.index, event)
                except Exception:  # a failed metric must not end any reply
                    log.exception("an event was not counted")
                job.batch.receive(update)
        if self._undelivered and self._loop is not None:
            self._loop.call_soon(self._deliver)


def _public_error(error: BaseException) -> BaseException:
    """The error that a client may see: a user's mistake unchanged, others without details."""
    if isinstance(error, EarlyFusionError):
        return error
    failed = EngineFailedError("a step of the engine failed")
    failed.__cause__ = error
    return failed


def _minimum(first: float | None, second: float | None) -> float | None:
    times = [time for time in (first, second) if time is not None]
    return min(times) if times else None
