"""Several engines behind one server, each in its own process and with its own driver.

A request, with all its choices, goes to the engine with the least work, to a stuck one only if all
are. Files and responses are stored in the server's process, so any engine can answer the next
request of a conversation. An engine that ends is restarted while the others continue.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TypeAlias

from earlyfusion.api import Chameleon
from earlyfusion.serve.driver import (
    STALE_SECONDS,
    Batch,
    Driver,
    NotReadyError,
    OnEvent,
    QueueFullError,
)
from earlyfusion.serve.process import RemoteEngine

Drivers: TypeAlias = "Driver | Replicas"
Remotes: TypeAlias = RemoteEngine | Sequence[RemoteEngine] | None
"""The engines in other processes: one, several, or None if the model's own engine is used."""


def drivers_of(model: Chameleon, max_queue: int, remotes: Remotes) -> Drivers:
    """The driver of one engine, or drivers of several, which share `max_queue`."""
    if not isinstance(remotes, Sequence):
        return Driver(model, max_queue, remotes)
    share = -(-max_queue // len(remotes))  # rounded up
    return Replicas([Driver(remote.info.model, share, remote) for remote in remotes])


class Replicas:
    """Several drivers, with the methods of one that the routes use."""

    def __init__(self, drivers: Sequence[Driver]) -> None:
        self.drivers = drivers

    # --- requests ---

    @property
    def limit(self) -> int:
        """The maximum number of requests of one HTTP request, which all run on one engine."""
        return max(driver.limit for driver in self.drivers)

    def admit(self, count: int) -> Batch:
        """Reserve room at the best engine. Raises `QueueFullError` or `NotReadyError`."""
        ready = self._ready
        if not ready:
            raise NotReadyError(self.start_error)
        try:
            return min(ready, key=_rank).admit(count)
        except QueueFullError as full:
            raise QueueFullError(sum(driver.limit for driver in ready), full.seconds) from None

    def check_room(self, count: int = 1) -> None:
        """Raise what `admit` would raise now."""
        ready = self._ready
        if not ready:
            raise NotReadyError(self.start_error)
        best = min(ready, key=_rank)
        if _work(best) + count > best.limit:
            self.admit(count).close()  # raises `QueueFullError` with the time to wait

    @property
    def _ready(self) -> list[Driver]:
        return [d for d in self.drivers if d.ready and d.healthy and not d.draining]

    # --- lifecycle ---

    def start(self) -> None:
        for driver in self.drivers:
            driver.start()

    async def warm_up(self) -> None:
        await asyncio.gather(*(driver.warm_up() for driver in self.drivers))

    async def drain(self, seconds: float) -> None:
        await asyncio.gather(*(driver.drain(seconds) for driver in self.drivers))

    def abort(self) -> None:
        for driver in self.drivers:
            driver.abort()

    def stop(self) -> None:
        self.draining = True
        for driver in self.drivers:
            driver.stop()

    @property
    def ready(self) -> bool:
        return bool(self._ready)

    @property
    def cache_usage(self) -> float:
        """The mean over the engines of the share of cache blocks that requests hold."""
        return sum(driver.cache_usage for driver in self.drivers) / len(self.drivers)

    @property
    def draining(self) -> bool:
        return all(driver.draining for driver in self.drivers)

    @draining.setter
    def draining(self, value: bool) -> None:
        for driver in self.drivers:
            driver.draining = value

    @property
    def healthy(self) -> bool:
        return any(driver.healthy for driver in self.drivers)

    @property
    def start_error(self) -> str:
        """If no engine accepts requests: why one of them did not start again."""
        return "" if self._ready else next(filter(None, (d.start_error for d in self.drivers)), "")

    # --- metrics ---

    @property
    def silent_seconds(self) -> float:
        """Seconds since the last heartbeat of any engine: for /health, as the server can answer
        while one engine can."""
        return min(driver.silent_seconds for driver in self.drivers)

    @property
    def engines_ready(self) -> int:
        return len(self._ready)

    @property
    def running(self) -> int:
        return sum(driver.running for driver in self.drivers)

    @property
    def waiting(self) -> int:
        return sum(driver.waiting for driver in self.drivers)

    @property
    def preemptions(self) -> int:
        return sum(driver.preemptions for driver in self.drivers)

    @property
    def restarts(self) -> int:
        return sum(driver.restarts for driver in self.drivers)

    def set_callbacks(self, on_event: OnEvent, on_cancel: Callable[[Batch], None]) -> None:
        for driver in self.drivers:
            driver.set_callbacks(on_event, on_cancel)


def _rank(driver: Driver) -> tuple[bool, int]:
    """The engine with the lowest rank gets the next request."""
    return driver.silent_seconds > STALE_SECONDS, _work(driver)


def _work(driver: Driver) -> int:
    """Requests that run or wait."""
    return driver.running + driver.waiting
