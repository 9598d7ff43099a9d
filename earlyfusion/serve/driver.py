"""One thread drives the engine; coroutines take the events. Only this file knows the engine.

A `Batch` holds the requests of one HTTP request (`n` choices are `n` requests) and one queue of
their events. The thread takes batches in, steps while there is work, and hands the events of each
step over to the event loop in one call, so the loop never waits for the engine. If the engine runs
in another process, that process steps: the loop reads its messages, and the thread only sends
requests and starts the process again. The loop gives the events to the replies a few at a time, so
that a step of many replies keeps no other client waiting.
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
from earlyfusion.serve.process import MAX_FAILURES, GoneError, RemoteEngine, RemoteHandle, differ

log = logging.getLogger("earlyfusion.serve")

IDLE_SECONDS = 1.0  # between two heartbeats of an idle driver
REPLIES_AT_ONCE = 8  # woken before the event loop looks at its sockets again
MAX_PAUSE = 30.0  # seconds between two attempts to start the engine's process
_NO_START = (
    "the engine's process has ended and does not start again, which is tried every half minute: "
    "the server's log says why"
)
_CHANGED = (
    "the model's files are not those of the model that is served: put them back, or restart the "
    "server to serve what is there now"
)


class FullError(Exception):
    """The queue is full; ask again in `seconds`."""

    def __init__(self, limit: int, seconds: float) -> None:
        super().__init__(f"{limit} requests are under way or waiting, the limit")
        self.limit, self.seconds = limit, seconds


class ClosedError(Exception):
    """The server is shutting down, or has not started, or its engine does not start again: then
    the message says so."""


class BrokenError(Exception):
    """A step of the engine failed; every request in it ended."""


class LateError(Exception):
    """A request took longer than the server allows."""


@dataclass(eq=False)
class _Job:
    request: Request
    index: int
    batch: Batch
    handle: Handle | RemoteHandle | None = None
    started: bool = False
    over: bool = False


@dataclass
class _News:
    """The events of one step for one job, or the error that ended it."""

    job: _Job
    events: list[Event] = field(default_factory=list)
    error: BaseException | None = None


class Batch:
    """The requests of one HTTP request, which take room in the queue from admission to `close`.

    All methods belong to the event loop's thread.
    """

    def __init__(self, driver: Driver, count: int) -> None:
        self.count, self.admitted = count, monotonic()
        self.requests: list[Request] = []
        self.cancelled = False
        # For metrics.py: whether any output came, and when each request's last image began.
        self.spoken, self.image_since = False, dict[int, float]()
        self._driver, self._left = driver, 0
        self._news: list[tuple[int, Event]] = []
        self._error: BaseException | None = None
        self._waiter: asyncio.Future[bool] | None = None
        self._alarm: asyncio.TimerHandle | None = None
        self._due = 0.0

    @property
    def goes_on(self) -> bool:
        """Whether `events` can go on without waiting for the engine."""
        return bool(self._news) or self._left == 0

    def submit(self, requests: Sequence[Request]) -> None:
        """Hand the requests to the engine. Raises an `EarlyFusionError` if one can never run."""
        for request in requests:
            self._driver.engine.check(request)
        self.requests, self._left = list(requests), len(requests)
        self._driver.take_in([_Job(request, i, self) for i, request in enumerate(requests)])

    async def events(
        self, tick: float | None = None, timeout: float | None = None
    ) -> AsyncIterator[tuple[int, Event] | None]:
        """The same as `groups`, one by one."""
        async for group in self.groups(tick, timeout):
            if group is None:
                yield None
            for news in group or ():
                yield news

    async def groups(
        self, tick: float | None = None, timeout: float | None = None
    ) -> AsyncIterator[Sequence[tuple[int, Event]] | None]:
        """(number of the request, event) of all that has come; None after `tick` seconds without
        any.

        Raises the error that ended a request, or `LateError` after `timeout` seconds.
        """
        end = None if timeout is None else self.admitted + timeout
        while self._left:
            if self._news:
                group, self._news = self._news, []
                self._left -= sum(isinstance(event, Finished) for _, event in group)
                yield group
                continue
            if self._error is None and end is not None and monotonic() >= end:
                self._error = LateError()
            if self._error is not None:
                raise self._error
            if not await self._more(_smaller(tick, None if end is None else end - monotonic())):
                yield None

    async def collect(self, timeout: float | None = None) -> list[list[Event]]:
        """All events of each request."""
        replies: list[list[Event]] = [[] for _ in self.requests]
        async for news in self.events(timeout=timeout):
            if news is not None:
                replies[news[0]].append(news[1])
        return replies

    def close(self) -> None:
        """Give the room in the queue back, and end the requests that still run. May be called
        twice."""
        if not self.cancelled:
            self.cancelled = True
            if self._alarm is not None:
                self._alarm.cancel()
            unfinished = self._left > 0
            self._driver.release(self, unfinished)
            if unfinished and self._error is None:
                self._driver.observe_cancel(self)

    def receive(self, news: _News) -> None:
        """Take the news of a step; called on the event loop."""
        self._news += [(news.job.index, event) for event in news.events]
        self._error = self._error or news.error
        self._wake(True)

    def fail(self, error: BaseException) -> None:
        """End the replies with an error; called on the event loop."""
        self._error = self._error or error
        self._wake(True)

    async def _more(self, seconds: float | None) -> bool:
        """Whether anything came within `seconds`; None waits without limit."""
        if self._news or self._error is not None:
            return True
        loop = asyncio.get_running_loop()
        self._waiter = loop.create_future()
        if seconds is not None:
            self._due = loop.time() + seconds
            if self._alarm is None or self._alarm.when() > self._due:
                self._set_alarm(loop)
        try:
            return await self._waiter
        finally:
            self._waiter = None

    def _set_alarm(self, loop: asyncio.AbstractEventLoop) -> None:
        # One timer serves many waits, since most end long before it: a timer per wait would cost as
        # much as the event.
        if self._alarm is not None:
            self._alarm.cancel()
        self._alarm = loop.call_at(self._due, self._ring, loop)

    def _ring(self, loop: asyncio.AbstractEventLoop) -> None:
        self._alarm = None
        if self._waiter is None:
            return
        if loop.time() >= self._due:
            self._wake(False)
        else:
            self._set_alarm(loop)

    def _wake(self, came: bool) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(came)


Observer: TypeAlias = Callable[[Batch, int, Event], None]


class Driver:
    """The thread that steps the engine of a model, and the queue before it.

    At most `max_queue` requests wait beside those that run. With `remote` the engine runs in
    another process, which is started again whenever it ends; without, it is the model's engine.
    """

    def __init__(
        self, model: Chameleon, max_queue: int, remote: RemoteEngine | None = None
    ) -> None:
        self.model, self.max_queue, self.remote = model, max_queue, remote
        self.restarts = 0
        self.draining = self.ready = False
        self.failures = 0
        self.trouble = ""  # why the engine's process did not start again, for clients
        self.observe: Observer = lambda batch, index, event: None
        self.observe_cancel: Callable[[Batch], None] = lambda batch: None
        self._admitted = 0
        self._batches: dict[Batch, None] = {}  # that have room in the queue, the oldest first
        self._seconds = 1.0  # moving mean of the time from admission to `close`
        self._arrived: dict[_Job, _News] = {}  # news that the replies have not been given yet
        self._inbox: list[_Job] = []
        self._jobs: list[_Job] = []
        self._wake = Condition()
        self._stopping = False
        self._beat = monotonic()
        self._notified = False  # whether `_notify` was called since the thread last looked
        self._lost = ""  # why the engine's process is of no use any more
        self._socket: int | None = None  # that the event loop watches
        self._loop: asyncio.AbstractEventLoop | None = None
        self._loops_thread = 0
        self._thread: Thread | None = None

    @property
    def engine(self) -> Engine | RemoteEngine:
        return self.remote or self.model.engine

    @property
    def limit(self) -> int:
        """How many requests may be under way or waiting."""
        return self.engine.most_running + self.max_queue

    @property
    def running(self) -> int:
        """Requests that generate tokens."""
        return sum(job.started and not job.over for job in list(self._jobs))

    @property
    def waiting(self) -> int:
        """Admitted requests that have no token yet."""
        return max(self._admitted - self.running, 0)

    @property
    def preemptions(self) -> int:
        return self.engine.preemptions

    @property
    def cache_usage(self) -> float:
        """The share of the cache's blocks that requests hold."""
        return self.engine.used_blocks / self.engine.cache_size.blocks

    @property
    def silent_seconds(self) -> float:
        """Seconds since the thread last made a step, or found nothing to do."""
        return monotonic() - self._beat

    @property
    def healthy(self) -> bool:
        alive = self._thread is not None and self._thread.is_alive()
        return alive and self.failures < MAX_FAILURES

    @property
    def engines_ready(self) -> int:
        """How many engines take requests: this one, or none."""
        return int(self.ready and not self.draining)

    def watch(self, event: Observer, cancel: Callable[[Batch], None]) -> None:
        """On the event loop, call `event` with each event that arrives and the index of its request
        in the batch, and `cancel` when a client leaves early."""
        self.observe, self.observe_cancel = event, cancel

    def start(self) -> None:
        """Start the thread; events go to the running loop."""
        self._loop, self._loops_thread = asyncio.get_running_loop(), get_ident()
        if self.remote is not None:
            self._listen()
        self._thread = Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    async def warm_up(self) -> None:
        """Answer one request, so that everything that is built once is ready for the first
        client."""
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
        """Reserve room for requests, before the work of reading their prompt.

        Raises `FullError` or `ClosedError`.
        """
        self.check_room(count, warming)
        self._admitted += count
        batch = Batch(self, count)
        self._batches[batch] = None
        return batch

    def check_room(self, count: int = 1, warming: bool = False) -> None:
        """Raise what `admit` would raise now."""
        if self.draining or not (self.ready or warming):
            raise ClosedError(self.trouble)
        if self._admitted + count > self.limit:
            raise FullError(self.limit, self._retry_seconds())

    def _retry_seconds(self) -> float:
        ahead = max(self._admitted, 1) / self.engine.most_running
        oldest = next(iter(self._batches), None)
        # A batch that has run longer than the mean shows that the mean is too small.
        age = 0.0 if oldest is None else monotonic() - oldest.admitted
        seconds = min(max(max(self._seconds, age) * ahead, 1), 40)
        # So that clients refused together do not come back together.
        return seconds * uniform(0.5, 1.5)

    def take_in(self, jobs: list[_Job]) -> None:
        with self._wake:
            self._inbox += jobs
            self._notify()

    def release(self, batch: Batch, unfinished: bool) -> None:
        self._admitted -= batch.count
        del self._batches[batch]
        self._seconds += 0.2 * (monotonic() - batch.admitted - self._seconds)
        if unfinished:
            with self._wake:  # the thread sees batch.cancelled
                self._notify()

    def give_up(self) -> None:
        """End all requests, as `ClosedError`; called on the event loop."""
        self.draining = True
        for batch in self._batches:
            batch.fail(ClosedError())

    async def drain(self, seconds: float) -> None:
        """Admit nothing more, and wait until everything is answered."""
        self.draining = True
        end = monotonic() + seconds
        while self._admitted and monotonic() < end:
            await asyncio.sleep(0.02)

    def stop(self) -> None:
        """End the thread after its present step, and all requests under way."""
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
            self._on_loop(self._stop_listening)
            self.remote.close()

    def _notify(self) -> None:
        """Wake the thread."""
        self._notified = True
        self._wake.notify()

    # ---- the socket to the engine's process, on the event loop

    def _listen(self) -> None:
        assert self._loop is not None and self.remote is not None
        self._socket = self.remote.fileno()
        self._loop.add_reader(self._socket, self._read)
        # uvloop has made it non-blocking: half a message, or a full buffer, would be an error.
        os.set_blocking(self._socket, True)

    def _stop_listening(self) -> None:
        if self._socket is not None and self._loop is not None:
            self._loop.remove_reader(self._socket)
            self._socket = None

    def _read(self) -> None:
        assert self.remote is not None
        try:
            told = self.remote.receive()
        except GoneError as error:
            self._stop_listening()
            with self._wake:
                self._lost = str(error)
                self._notify()
            return
        self._beat, news = monotonic(), list[_News]()
        for handle in told:
            job = cast(_Job, handle.owner)
            job.handle = handle
            if (one := self._news_of(job)) is not None:
                news.append(one)
            if job.over:
                with suppress(ValueError):  # the thread may not have noted it yet
                    self._jobs.remove(job)
        if news:
            self._receive(news)

    def _on_loop(self, call: Callable[[], None]) -> None:
        """Have the event loop do this, and wait for it."""
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

    # ---- the thread

    def _run(self) -> None:
        try:
            self._drive()
        except Exception as error:
            # Nothing above should raise; if it does, nobody may wait for a thread that has ended.
            log.exception("the engine's thread ended")
            self.draining = True
            waiting = [*self._jobs, *self._inbox]
            self._hand_over([_News(job, error=_public(error)) for job in waiting])
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
                self._hand_over([news for job in self._jobs if (news := self._news_of(job))])
                self._beat = monotonic()
            self._jobs = [job for job in self._jobs if not job.over]

    def _await_work(self) -> bool:
        """Wait until there is something to do; False if the thread must end."""
        if self.remote is None:
            while not self._wait_for_work():
                pass
        else:
            self._await_commands(self.remote)
        return not self._stopping

    def _wait_for_work(self) -> bool:
        """Whether there is something to do, now or after a while."""
        with self._wake:
            if not (self._inbox or self._jobs or self._stopping):
                self._beat = monotonic()
                self._wake.wait(IDLE_SECONDS)
            return bool(self._inbox or self._jobs or self._stopping)

    def _await_commands(self, remote: RemoteEngine) -> None:
        """Wait until there is something to send, or for a while. Starts an engine's process again
        that has ended or is stuck."""
        with self._wake:
            if not (self._inbox or self._notified or self._stopping or self._lost):
                self._wake.wait(IDLE_SECONDS)
            self._notified = False
        if not remote.busy:
            self._beat = monotonic()
        if self._stopping:
            return
        if self._lost or not remote.alive:
            self._lost = f"the engine's process ended ({remote.ending})"
        elif remote.silent_seconds > remote.step_timeout:
            self._lost = f"a step of the engine took over {remote.step_timeout:g} s"
        if self._lost:
            log.error("the engine is lost", extra={"reason": self._lost})
            self._restart()

    def _restart(self) -> None:
        """Start the engine's process again, as often as needed, less and less often; nothing is
        admitted meanwhile."""
        assert self.remote is not None
        self.ready, pause = False, 1.0
        self._on_loop(self._stop_listening)
        self._fail_all(GoneError("the engine's process ended"))
        while not self._stopping:
            self.restarts += 1
            self.remote.end()
            log.error("the engine's process is started again")
            trouble = _NO_START
            try:
                front = self.remote.start()
                if differ(self.model, front.model):
                    trouble = _CHANGED
                    raise CheckpointError(trouble)
                # Keep the model: the image tokenizer is here already, with an open file per tensor.
                self.remote.front = replace(front, model=self.model)
            except Exception:
                self.trouble = trouble
                log.exception("the engine's process did not start")
                self._rest(pause)
                pause = min(2 * pause, MAX_PAUSE)
            else:
                self._lost = ""
                self._on_loop(self._listen)
                self._beat = monotonic()
                self.ready, self.failures, self.trouble = True, 0, ""
                return

    def _rest(self, seconds: float) -> None:
        """Wait, unless the thread shall end."""
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
                self._hand_over([_News(job, error=_public(error))])
            else:
                self._jobs.append(job)

    def _drop_cancelled(self) -> None:
        left: list[_Job] = []
        for job in self._jobs:
            # Read once: the event loop may cancel a batch at any time.
            if not job.batch.cancelled:
                left.append(job)
            elif job.handle is not None:
                job.handle.cancel()
        self._jobs = left

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
        """End all requests. Which ones the engine has ended itself is unknown."""
        for job in self._jobs:
            if job.handle is not None:
                job.handle.cancel()
        ended = [_News(job, error=_public(error)) for job in self._jobs if not job.over]
        self._hand_over(ended)
        self._jobs = []

    def _news_of(self, job: _Job) -> _News | None:
        handle = job.handle
        assert handle is not None
        # Read `over` before the events, as another thread may step the engine too.
        job.over = handle.finished or handle.error is not None
        job.started = job.started or bool(handle.tokens)
        if not handle.events and handle.error is None:
            return None
        events = [handle.events.popleft() for _ in range(len(handle.events))]
        return _News(job, events, None if handle.error is None else _public(handle.error))

    def _hand_over(self, news: Sequence[_News]) -> None:
        if news and self._loop is not None:
            try:
                self._loop.call_soon_threadsafe(self._receive, news)
            except RuntimeError:  # the loop has closed: nobody waits any more
                self._stopping = True

    def _receive(self, news: Sequence[_News]) -> None:
        idle = not self._arrived
        for one in news:
            known = self._arrived.get(one.job)
            if known is None:
                self._arrived[one.job] = one
            else:  # the loop has not read the last news: one call delivers both
                known.events += one.events
                known.error = known.error or one.error
        if idle:
            self._deliver()

    def _deliver(self) -> None:
        """Wake a few of the replies that have news; the rest after a look at the sockets."""
        for job in [*islice(self._arrived, REPLIES_AT_ONCE)]:
            news = self._arrived.pop(job)
            if not job.batch.cancelled:
                try:
                    for event in news.events:
                        self.observe(job.batch, job.index, event)
                except Exception:  # costs no reply, and none of those that are still to be woken
                    log.exception("an event was not counted")
                job.batch.receive(news)
        if self._arrived and self._loop is not None:
            self._loop.call_soon(self._deliver)


def _public(error: BaseException) -> BaseException:
    """The error that a client may see: a mistake of its own unchanged, others without details."""
    if isinstance(error, EarlyFusionError):
        return error
    broken = BrokenError("a step of the engine failed")
    broken.__cause__ = error
    return broken


def _smaller(first: float | None, second: float | None) -> float | None:
    times = [time for time in (first, second) if time is not None]
    return min(times) if times else None
