"""The progress of a run: by its steps, or by the clock if it has a budget of minutes.

The learning rate, and everything else that changes over a run, depends on the share of the run that
is done. So a run of unknown speed ends within its budget with its learning rate decayed, or earlier
if its steps are done. Time spent before the run was resumed counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable


class Pace:
    """The progress of a run of at most `steps` steps and at most `minutes` (0: any time). `spent`
    are the seconds that it trained before it was resumed; `now` is a clock that returns seconds."""

    def __init__(
        self,
        steps: int,
        minutes: float = 0.0,
        spent: float = 0.0,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._steps, self._budget = steps, minutes * 60
        self._spent, self._now, self._start = spent, now, now()

    @property
    def seconds(self) -> float:
        """The time that the run has trained so far."""
        return self._spent + self._now() - self._start

    def share(self, step: int) -> float:
        """The share of the run that is done before step `step` (from 0): 0 to 1."""
        by_steps = step / max(1, self._steps)
        by_clock = self.seconds / self._budget if self._budget else 0.0
        return min(1.0, max(by_steps, by_clock))

    def is_over(self, step: int) -> bool:
        """Whether the run ends before step `step`."""
        return step >= self._steps or bool(self._budget and self.seconds >= self._budget)

    def seconds_left(self, step_seconds: float, step: int) -> float:
        """Seconds to the end if a step takes `step_seconds` and `step` steps are done."""
        by_steps = step_seconds * (self._steps - step)
        return max(0.0, min(by_steps, self._budget - self.seconds)) if self._budget else by_steps
