"""Several adapters at once: one back end for each, on one cache. A step runs the rows of each
adapter with that adapter's weights, one group after the other, so it costs as much as one step per
group. Scheduler, cache and sampling are shared."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from earlyfusion.engine.backends.interface import Backend, Product
from earlyfusion.engine.scheduler import Piece, Step
from earlyfusion.kernels.cpu_step import Choice


class MultiAdapter:
    """The back ends of the adapters, by name, and that of the model without one under "". All share
    its head."""

    def __init__(self, backends: Mapping[str, Backend]) -> None:
        self._backends, self._base = backends, backends[""]

    @property
    def needs_whole_prompts(self) -> bool:
        return self._base.needs_whole_prompts

    @property
    def chunk_factor(self) -> int:
        return self._base.chunk_factor

    @property
    def sample(self) -> Callable[[Sequence[Choice]], list[int]] | None:
        return self._base.sample

    def hidden_states(self, step: Step) -> Tensor:
        groups: dict[str, list[Piece]] = {}
        for piece in step.pieces:
            groups.setdefault(piece.branch.adapter, []).append(piece)
        if len(groups) == 1:
            [name] = groups
            return self._backends[name].hidden_states(step)
        rows: list[int] = []
        hidden_states: list[Tensor] = []
        for name, pieces in groups.items():
            group = Step(pieces)
            hidden_states.append(self._backends[name].hidden_states(group))
            for piece in group.pieces:
                first = step.row_of[piece.branch]
                rows += range(first, first + 1 + len(piece.drafts))
        joined_RD = torch.cat(hidden_states)
        x_RD = torch.empty_like(joined_RD)
        x_RD[rows] = joined_RD
        return x_RD

    def product(self, ids_V: Tensor) -> Product:
        return self._base.product(ids_V)

    def vocab_logits(self, x_RD: Tensor) -> Tensor:
        return self._base.vocab_logits(x_RD)
