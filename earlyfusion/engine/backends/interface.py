"""What a back end is: one way to run the transformer on the tokens of a step, and to draw."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias

from torch import Tensor

from earlyfusion.engine.step import Step
from earlyfusion.kernels.cpu_step import Choice

Product: TypeAlias = Callable[[Tensor], Tensor]
"""x [R, I] -> [R, O]."""


class Backend(Protocol):
    """With `whole_prompts` every prompt must be read at once, and from its first token."""

    @property
    def whole_prompts(self) -> bool: ...

    def states(self, step: Step) -> Tensor:
        """The input of the head [R, D] for the rows of `step.drawing`. Fills the cache."""

    def product(self, ids_V: Tensor) -> Product:
        """From `states` to logits [R, V] of these ids, which are in order."""

    def whole_logits(self, x_RD: Tensor) -> Tensor:
        """From `states` to logits of the whole vocabulary, in fp32."""

    @property
    def draw(self) -> Callable[[Sequence[Choice]], list[int]] | None:
        """The column drawn for each choice, -1 if its logits are not finite. None: torch draws."""
