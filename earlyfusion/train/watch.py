"""What a run does when a step goes wrong, and the early signs that it will.

A step whose loss or gradient is NaN or infinite, or whose loss jumps, changes no weight and is
counted. Several in a row send the run back to its newest checkpoint, from where it continues with
documents that it has not seen. The last layer's output norm and the largest logit grow long before
a model of this family diverges (arXiv 2405.09818, section 2.3): a note reports their growth.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from earlyfusion.errors import SettingError

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
        if self.roll_back_after < 1 or self.max_roll_backs < 0:
            raise SettingError(
                f"roll_back_after={self.roll_back_after} must be at least 1 and "
                f"max_roll_backs={self.max_roll_backs} at least 0"
            )
        if self.growth <= 1 or (self.spike and self.spike <= 1):
            raise SettingError(
                f"spike={self.spike} and growth={self.growth} are factors: give more than 1, "
                f"or spike=0 to skip no spikes"
            )


@dataclass
class Watch:
    """The memory of a run; saved with its checkpoints, so that a resumed run judges alike."""

    config: WatchConfig
    mean: float = 0.0
    """Running mean of the loss of good steps."""
    good: int = 0
    skipped: int = 0
    in_row: int = 0
    roll_backs: int = 0
    first_bad: tuple[int, float] = (0, 0.0)
    """Step and loss where the present row of bad steps began."""
    lowest: dict[str, float] = field(default_factory=dict)
    smooth: dict[str, float] = field(default_factory=dict)

    def judge(self, step: int, loss: float, norm: float) -> bool:
        """Whether the step may change the weights."""
        # Early losses fall too fast for their mean to tell what a spike is.
        limit = self.config.spike * self.mean if self.config.spike and self.good >= 50 else math.inf
        if math.isfinite(loss) and math.isfinite(norm) and loss <= limit:
            self.good, self.in_row = self.good + 1, 0
            rate = max(0.02, 1 / self.good)  # the mean of all at first, of about 50 later
            self.mean += rate * (loss - self.mean)
            return True
        if not self.in_row:
            self.first_bad = (step, loss if math.isfinite(norm) else norm)
        self.skipped, self.in_row = self.skipped + 1, self.in_row + 1
        return False

    @property
    def must_roll_back(self) -> bool:
        return self.in_row >= self.config.roll_back_after

    def ended_badly(self) -> str:
        """A sentence for a run whose last steps changed no weight."""
        step, value = self.first_bad
        return (
            f"the run ends with the weights of step {step}: since then the loss or its gradient "
            f"was {value:g}, and no weight was changed; lower lr, or look at the data"
        )

    def rolled_back(self) -> None:
        self.in_row, self.roll_backs = 0, self.roll_backs + 1

    def signs(self, metrics: dict[str, float]) -> list[str]:
        """A sentence for each sign that has grown much since it was lowest, or last noted."""
        found = []
        for name in SIGNS:
            value = abs(metrics.get(name, math.nan))
            if not math.isfinite(value):
                continue
            smooth = self.smooth.get(name, value) * 0.8 + 0.2 * value
            lowest = min(self.lowest.get(name, smooth), smooth)
            if smooth > self.config.growth * lowest > 0:
                found.append(f"{name} grew from {lowest:.3g} to {smooth:.3g}: a sign of divergence")
                lowest = smooth
            self.smooth[name], self.lowest[name] = smooth, lowest
        return found

    def state(self) -> dict[str, Any]:
        return {k: v for k, v in asdict(self).items() if k != "config"}

    def load_state(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, tuple(value) if isinstance(value, list) else value)
