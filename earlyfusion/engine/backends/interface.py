"""The interface of a back end, which runs the transformer on the tokens of a step and may also
sample; and two functions for the head that most back ends share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from earlyfusion.engine.scheduler import Step
from earlyfusion.kernels.cpu_step import Choice

Product: TypeAlias = Callable[[Tensor], Tensor]
"""x [R, I] -> [R, O]."""


class Backend(Protocol):
    """If `needs_whole_prompts`, a prompt must be computed in one piece, from its first token. The
    engine multiplies its default `chunk` by `chunk_factor`, which is above 1 where steps of many
    tokens are that much faster than elsewhere."""

    @property
    def needs_whole_prompts(self) -> bool: ...

    @property
    def chunk_factor(self) -> int: ...

    def hidden_states(self, step: Step) -> Tensor:
        """The head's input [R, D] for the rows of `step.logits_indices`. Writes the cache."""

    def product(self, ids_V: Tensor) -> Product:
        """A function from `hidden_states` to logits [R, V] of these ids, which must ascend."""

    def vocab_logits(self, x_RD: Tensor) -> Tensor:
        """From `hidden_states` to fp32 logits of the whole vocabulary."""

    @property
    def sample(self) -> Callable[[Sequence[Choice]], list[int]] | None:
        """Samples a column per choice, -1 if its logits are not finite. None: sampling is in
        torch."""


def head_product(head: nn.Module, ids_V: Tensor, product: Callable[[Tensor], Product]) -> Product:
    """States [R, D] -> logits [R, V] of these ids; `product` makes a product of a weight [V, D]."""
    first, last = int(ids_V[0]), int(ids_V[-1])
    adjacent = last - first + 1 == len(ids_V)
    # A slice is a view of the weight, an index a copy.
    rows = slice(first, last + 1) if adjacent else ids_V
    if type(head) is nn.Linear:
        return product(head.weight[rows].detach())
    # Packed, or with an adapter: only calling the head gives its logits.
    dtype = _dtype(head)
    return lambda x_RD: head(x_RD.to(dtype))[:, rows]


def vocab_logits(head: nn.Module, x_RD: Tensor) -> Tensor:
    """Logits [R, V] in fp32 of the whole vocabulary."""
    logits_RV: Tensor = head(x_RD.to(_dtype(head)))
    return logits_RV.float()


def _dtype(head: nn.Module) -> torch.dtype:
    weight: Any = head.weight
    dtype: torch.dtype = weight.dtype
    return dtype
