"""What a back end must do: run the transformer on the tokens of a step, and perhaps draw."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias

from torch import Tensor

from earlyfusion.engine.step import Step
from earlyfusion.kernels.cpu_step import Choice

Product: TypeAlias = Callable[[Tensor], Tensor]
"""x [R, I] -> [R, O]."""


class Backend(Protocol):
    """With `whole_prompts`, a prompt must be read in one piece, from its first token."""

    @property
    def whole_prompts(self) -> bool: ...

    def states(self, step: Step) -> Tensor:
        """The head's input [R, D] for the rows of `step.drawing`. Writes the cache."""

    def product(self, ids_V: Tensor) -> Product:
        """A function from `states` to logits [R, V] of these ids, which are in ascending order."""

    def whole_logits(self, x_RD: Tensor) -> Tensor:
        """From `states` to fp32 logits of the whole vocabulary."""

    @property
    def draw(self) -> Callable[[Sequence[Choice]], list[int]] | None:
        """Draws a column per choice, -1 if its logits are not finite. None: torch draws."""
