"""When the loss of held-out documents is measured, where it was lowest, when to stop."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from earlyfusion.data.held_out import ValidationConfig

BEST = "best"
LOSS = "validation_loss"


class Validation:
    """Checks of a run: `measure` returns `validation_loss` and more, in nats per token."""

    def __init__(
        self, measure: Callable[[], dict[str, float]], config: ValidationConfig, every: int
    ) -> None:
        self.measure, self._patience = measure, config.patience
        self._every = config.validate_every or every
        self.best_loss, self.best_step, self._without_gain = math.inf, 0, 0

    def is_due(self, done: int, last: int) -> bool:
        return done == last or done % self._every == 0

    def is_best(self, done: int, loss: float) -> bool:
        """Whether `loss`, after `done` steps, is the lowest so far; remembers it."""
        if loss < self.best_loss:
            self.best_loss, self.best_step, self._without_gain = loss, done, 0
            return True
        self._without_gain += 1
        return False

    @property
    def ends(self) -> bool:
        """Whether the last `patience` checks have not lowered the loss."""
        return 0 < self._patience <= self._without_gain

    def state(self) -> dict[str, Any]:
        best = {"loss": self.best_loss, "step": self.best_step} if self.best_step else {}
        return best | {"in_vain": self._without_gain}

    def load_state(self, state: dict[str, Any]) -> None:
        self.best_loss = float(state.get("loss", math.inf))
        self.best_step, self._without_gain = int(state.get("step", 0)), int(state.get("in_vain", 0))


def best_folder(run: Path) -> Path:
    """The folder of the checkpoint with the lowest loss."""
    return run / BEST
