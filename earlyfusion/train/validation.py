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
    """The checks of a run on held-out documents: every `every` steps, unless the config says
    otherwise. `measure` returns `validation_loss` and more metrics, in nats per token."""

    def __init__(
        self, measure: Callable[[], dict[str, float]], config: ValidationConfig, every: int
    ) -> None:
        self.measure, self._patience = measure, config.patience
        self._every = config.validate_every or every
        # The lowest loss, its step, and the number of checks since then.
        self.best_loss, self.best_step, self._checks_since_best = math.inf, 0, 0

    def is_due(self, done: int, last: int) -> bool:
        """Whether there is a check after `done` steps of a run that ends after `last` steps."""
        return done == last or done % self._every == 0

    def record(self, done: int, loss: float) -> bool:
        """Record the loss of a check after `done` steps. Returns whether it is the lowest so
        far."""
        if loss < self.best_loss:
            self.best_loss, self.best_step, self._checks_since_best = loss, done, 0
            return True
        self._checks_since_best += 1
        return False

    @property
    def ends_run(self) -> bool:
        """Whether the run must end, as none of the last `patience` checks has lowered the loss."""
        return 0 < self._patience <= self._checks_since_best

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds, for JSON."""
        best = {"loss": self.best_loss, "step": self.best_step} if self.best_step else {}
        return best | {"in_vain": self._checks_since_best}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        self.best_loss = float(state.get("loss", math.inf))
        self.best_step = int(state.get("step", 0))
        self._checks_since_best = int(state.get("in_vain", 0))


def best_folder(run: Path) -> Path:
    """The folder of the checkpoint with the lowest loss."""
    return run / BEST
