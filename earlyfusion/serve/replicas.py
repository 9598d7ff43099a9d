"""Several engines behind one server, each in its own process and with its own driver.

A request, with all its choices, goes to the engine with the least work. The stores of files and
responses are not in the engines, so any engine can answer the next request of a conversation. If an
engine ends, it alone is started again, while the others go on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TypeAlias

from earlyfusion.api import Chameleon
from earlyfusion.serve.driver import Batch, ClosedError, Driver, FullError, Observer
from earlyfusion.serve.process import RemoteEngine

Drivers: TypeAlias = "Driver | Replicas"
Remotes: TypeAlias = RemoteEngine | Sequence[RemoteEngine] | None
"""The engines of a server: none, as it is the model's own, one or several."""


def drivers_of(model: Chameleon, max_queue: int, remotes: Remotes) -> Drivers:
    """The driver of one engine, or drivers of several, which share `max_queue`."""
    if not isinstance(remotes, Sequence):
        return Driver(model, max_queue, remotes)
    share = -(-max_queue // len(remotes))  # rounded up
    return Replicas([Driver(remote.front.model, share, remote) for remote in remotes])


class Replicas:
    """Several drivers, with the methods of one that the routes use."""

    def __init__(self, drivers: Sequence[Driver]) -> None:
        self.drivers = drivers

    # --- requests ---

    @property
    def limit(self) -> int:
        """The most requests of one HTTP request, as they all run on one engine."""
        return max(driver.limit for driver in self.drivers)

    def admit(self, count: int) -> Batch:
        """Reserve room at the engine with the least work. Raises `FullError` or `ClosedError`."""
        ready = self._ready
        if not ready:
            raise ClosedError(self.trouble)
        try:
            return min(ready, key=_work).admit(count)
        except FullError as full:
            raise FullError(sum(driver.limit for driver in ready), full.seconds) from None

    def check_room(self, count: int = 1) -> None:
        """Raise what `admit` would raise now."""
        ready = self._ready
        if not ready:
            raise ClosedError(self.trouble)
        least = min(ready, key=_work)
        if _work(least) + count > least.limit:
            self.admit(count).close()  # raises `FullError` with the time to wait

    @property
    def _ready(self) -> list[Driver]:
        return [d for d in self.drivers if d.ready and d.healthy and not d.draining]

    # --- life ---

    def start(self) -> None:
        for driver in self.drivers:
            driver.start()

    async def warm_up(self) -> None:
        await asyncio.gather(*(driver.warm_up() for driver in self.drivers))

    async def drain(self, seconds: float) -> None:
        await asyncio.gather(*(driver.drain(seconds) for driver in self.drivers))

    def give_up(self) -> None:
        for driver in self.drivers:
            driver.give_up()

    def stop(self) -> None:
        self.draining = True
        for driver in self.drivers:
            driver.stop()

    @property
    def ready(self) -> bool:
        return bool(self._ready)

    @property
    def cache_usage(self) -> float:
        """The share of the blocks of all caches that requests hold."""
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
    def trouble(self) -> str:
        """Why no engine takes requests, where one does not start again."""
        return "" if self._ready else next(filter(None, (d.trouble for d in self.drivers)), "")

    # --- figures ---

    @property
    def silent_seconds(self) -> float:
        """Since the last heartbeat of any of the engines."""
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

    def watch(self, event: Observer, cancel: Callable[[Batch], None]) -> None:
        for driver in self.drivers:
            driver.watch(event, cancel)


def _work(driver: Driver) -> int:
    return driver.running + driver.waiting
