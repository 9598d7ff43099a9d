"""Calls the transformer's own modules, as the reference loop does: slow, but right with any module.
Used if some modules have hooks or are of other classes: these see one sequence at a time as (1, T),
and every prompt whole."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from earlyfusion.engine.backends.attention import StepAttend, StepAttention
from earlyfusion.engine.backends.interface import Product
from earlyfusion.engine.cache import PagedCache
from earlyfusion.engine.scheduler import Piece, Step
from earlyfusion.model.transformer import Transformer


class ModuleTransformer:
    """Its hidden states are already logits of the whole vocabulary, as the head may be any
    module."""

    needs_whole_prompts = True
    chunk_factor = 1
    sample = None

    def __init__(self, transformer: Transformer, cache: PagedCache) -> None:
        self._transformer, self._cache = transformer, cache

    def hidden_states(self, step: Step) -> Tensor:
        return torch.cat([self._logits(piece) for piece in step.pieces])

    def product(self, ids_V: Tensor) -> Product:
        return lambda logits_RV: logits_RV[:, ids_V]

    def vocab_logits(self, logits_RV: Tensor) -> Tensor:
        return logits_RV.float()

    def _logits(self, piece: Piece) -> Tensor:
        """Logits after a piece's last token and after each of its drafts."""
        step = Step([piece])
        tokens_1T, positions_1T = torch.tensor([[step.tokens], [step.positions]]).to(
            self._cache.device
        )
        step_attends = StepAttention(step, self._cache).per_layer()
        attends = [partial(_with_batch, attend) for attend in step_attends]
        logits_BTV: Tensor = self._transformer(
            tokens_1T, positions_1T, attends, last_only=not piece.drafts
        )
        return logits_BTV[0, -1 - len(piece.drafts) :]


def _with_batch(attend: StepAttend, q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor) -> Tensor:
    return attend(q_BTNH[0], k_BTKH[0], v_BTKH[0])[None]
