"""Divergence: bad steps are skipped, several in a row roll the run back, early signs are noted.

A step is bad if its loss or gradient is NaN or infinite, or if its loss jumps (a spike). It changes
no weight and is counted. Several bad steps in a row send the run back to its newest checkpoint,
from where it continues with documents that it has not seen. The norm of the last layer's output and
the largest logit grow long before a model of this family diverges (arXiv 2405.09818, section 2.3):
a note reports their growth.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from earlyfusion.errors import SettingError
from earlyfusion.fields import check_at_least

SIGNS = ("output_norm", "top_logit", "log_z_squared")


@dataclass
class WatchConfig:
    """When a step is skipped, and when the run returns to a checkpoint. Raises `SettingError`."""

    spike: float = 0.0
    """Skip a step whose loss exceeds this many times its running mean (0: skip only NaN and
    infinite losses)."""
    roll_back_after: int = 3
    """Bad steps in a row that send the run back to its newest checkpoint."""
    max_roll_backs: int = 3
    """After this many returns to a checkpoint the run ends instead."""
    growth: float = 2.0
    """Factor of growth at which a sign of divergence is noted."""

    def __post_init__(self) -> None:
        check_at_least(self, roll_back_after=1, max_roll_backs=0)
        if self.growth <= 1 or (self.spike and self.spike <= 1):
            raise SettingError(
                f"spike={self.spike} and growth={self.growth} are factors: give more than 1, "
                f"or spike=0 to skip no spikes"
            )


@dataclass
class Watch:
    """What a run remembers about its steps. It is saved in checkpoints, under the names of these
    fields, so that a resumed run decides as an uninterrupted one."""

    config: WatchConfig
    mean: float = 0.0
    """Running mean of the loss of good steps."""
    good: int = 0
    """Number of good steps."""
    skipped: int = 0
    """Number of bad steps."""
    in_row: int = 0
    """Number of bad steps since the last good one."""
    roll_backs: int = 0
    first_bad: tuple[int, float] = (0, 0.0)
    """Step where the last row of bad steps began, and its loss (its gradient norm if that was not
    finite)."""
    lowest: dict[str, float] = field(default_factory=dict)
    """Lowest value of each of `SIGNS`, or the value at its last note."""
    smooth: dict[str, float] = field(default_factory=dict)
    """Running mean of each of `SIGNS`."""

    def accepts(self, step: int, loss: float, grad_norm: float) -> bool:
        """Count a step as good or bad. Returns whether it is good, so that it may change the
        weights."""
        # Early losses fall too fast for their mean to tell what a spike is.
        limit = self.config.spike * self.mean if self.config.spike and self.good >= 50 else math.inf
        if math.isfinite(loss) and math.isfinite(grad_norm) and loss <= limit:
            self.good, self.in_row = self.good + 1, 0
            rate = max(0.02, 1 / self.good)  # the mean of all losses at first, of about 50 later
            self.mean += rate * (loss - self.mean)
            return True
        if not self.in_row:
            self.first_bad = (step, loss if math.isfinite(grad_norm) else grad_norm)
        self.skipped, self.in_row = self.skipped + 1, self.in_row + 1
        return False

    @property
    def must_roll_back(self) -> bool:
        return self.in_row >= self.config.roll_back_after

    def skipped_at_end(self) -> str:
        """A sentence for a run whose last steps changed no weight."""
        step, value = self.first_bad
        return (
            f"the run ends with the weights of step {step}: since then the loss or its gradient "
            f"was {value:g}, and no weight was changed; lower lr, or look at the data"
        )

    def count_roll_back(self) -> None:
        self.in_row, self.roll_backs = 0, self.roll_backs + 1

    def growth_notes(self, metrics: dict[str, float]) -> list[str]:
        """A sentence for each of `SIGNS` that has grown by the factor `growth` since it was lowest,
        or since its last note."""
        notes = []
        for name in SIGNS:
            value = abs(metrics.get(name, math.nan))
            if not math.isfinite(value):
                continue
            smooth = self.smooth.get(name, value) * 0.8 + 0.2 * value
            lowest = min(self.lowest.get(name, smooth), smooth)
            if smooth > self.config.growth * lowest > 0:
                notes.append(f"{name} grew from {lowest:.3g} to {smooth:.3g}: a sign of divergence")
                lowest = smooth
            self.smooth[name], self.lowest[name] = smooth, lowest
        return notes

    def state(self) -> dict[str, Any]:
        """All fields but the config, for JSON."""
        return {k: v for k, v in asdict(self).items() if k != "config"}

    def load_state(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, tuple(value) if isinstance(value, list) else value)
