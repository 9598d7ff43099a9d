"""One decode step, token to next token, over tensors of fixed shape: the host reads nothing.

Embedding, layers (`layers.py`), head, guidance, grammar, truncation, sampling, and the next state,
for rows of text and of images together. Every shape follows from the bucket alone, and no code
depends on a value, so the step can be captured as a CUDA graph; it also runs without, on any
device. The tokens equal those of `generation/reference.py`.

Shapes: R rows, D model width, V vocabulary or codes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from earlyfusion.engine.backends.interface import vocab_logits
from earlyfusion.engine.backends.torch import FusedTransformer
from earlyfusion.engine.sampling import INVALID_TOKEN
from earlyfusion.engine.static.grammars import Grammars
from earlyfusion.engine.static.graphs import Kind
from earlyfusion.engine.static.layers import StaticLayers
from earlyfusion.engine.static.rows import FROZEN, Rows
from earlyfusion.generation import guidance
from earlyfusion.generation.grammar import SLOT
from earlyfusion.generation.sampler import NEG_INF, can_sample, penalise, pick, warp
from earlyfusion.model.transformer import Transformer


class StaticStep:
    """The step of one model. `layers` has the layers of each adapter, and the model's own under "";
    all share one head. `codes_V` are the ids of the codes, ascending."""

    def __init__(
        self,
        transformer: Transformer,
        fused: FusedTransformer,
        layers: Mapping[str, StaticLayers],
        grammars: Grammars,
        codes_V: Tensor,
    ) -> None:
        self._layers, self._grammars, self._head = layers, grammars, transformer.lm_head
        self._codes_V, self._code_logits = codes_V, fused.product(codes_V)

    def run(self, rows: Rows, kind: Kind, adapter: str = "") -> None:
        """Read each row's token, sample the next, and write it to `rows.tokens_NR`."""
        layers = self._layers[adapter]
        x_RD = layers.hidden_states(rows.token_R, rows.position_R, rows.table_RW)
        token_R, sampled_R = self._sample(rows, x_RD, kind)
        self._advance(rows, token_R, sampled_R)

    # ---- sampling

    def _sample(self, rows: Rows, x_RD: Tensor, kind: Kind) -> tuple[Tensor, Tensor]:
        """The next token of each row, and whether it could be sampled."""
        if kind.only_codes:
            logits_RV = self._guided_logits(rows, self._code_logits(x_RD).float())
        else:
            logits_RV = self._guided_logits(rows, vocab_logits(self._head, x_RD))
            allowed_RV = self._grammars.mask(rows.state_RF, rows.grammar_R)
            logits_RV = logits_RV.masked_fill(~allowed_RV, NEG_INF)
        can_sample_R = can_sample(logits_RV)
        logits_RV = torch.where(can_sample_R[:, None], logits_RV, 0)
        column_R = self._columns(rows, logits_RV, kind)
        token_R = self._codes_V[column_R] if kind.only_codes else column_R
        forced_R = self._grammars.forced(rows.state_RF, rows.grammar_R)
        token_R = torch.where(forced_R >= 0, forced_R, token_R)
        full_R = rows.conditions.full_R
        return token_R[full_R], (can_sample_R | (forced_R >= 0))[full_R]

    def _guided_logits(self, rows: Rows, logits_RV: Tensor) -> Tensor:
        full_R, image_only_R, unconditional_R = rows.conditions
        text_R1, image_R1 = rows.guidance_2R1
        full_RV = logits_RV[full_R]
        guided_RV = guidance.combine(
            full_RV, logits_RV[image_only_R], logits_RV[unconditional_R], text_R1, image_R1
        )
        # A request of one branch has nothing to combine.
        return torch.where((full_R == unconditional_R)[:, None], full_RV, guided_RV)

    def _columns(self, rows: Rows, logits_RV: Tensor, kind: Kind) -> Tensor:
        text, image = rows.warps
        settings = image
        if not kind.only_codes:
            # No penalty for codes.
            settings = image.where(rows.state_RF[:, SLOT] > 0, text)
            logits_RV = penalise(logits_RV, rows.seen_RV, settings.penalty_B)
        best_R = logits_RV.argmax(-1)
        if kind.greedy:
            return best_R
        uniform_R = rows.uniforms_NR.index_select(0, rows.step_1)[0]
        sampled_R = pick(warp(logits_RV, settings), uniform_R)
        return torch.where(settings.temperature_B == 0, best_R, sampled_R)

    # ---- the next state

    def _advance(self, rows: Rows, token_R: Tensor, sampled_R: Tensor) -> None:
        before_RF, alive_R = rows.state_RF, rows.alive_R > 0
        reported_R = torch.where(sampled_R, token_R, INVALID_TOKEN)
        reported_R = torch.where(alive_R, reported_R, FROZEN)
        rows.tokens_NR.index_copy_(0, rows.step_1, reported_R[None])
        rows.step_1.add_(1)
        advances_R = alive_R & sampled_R
        after_RF = self._grammars.advance(before_RF, token_R, rows.grammar_R)
        slot_R, slot_before_R = after_RF[:, SLOT], before_RF[:, SLOT]
        ends_R = self._grammars.done(after_RF, rows.grammar_R)
        ends_R |= (slot_before_R == 0) & (slot_R > 0) & (rows.stops_at_begin_R > 0)
        ends_R |= (slot_before_R > 0) & (slot_R == 0) & (rows.stops_at_end_R > 0)
        ends_R |= rows.position_R + 2 > rows.capacity_R  # no room for another token
        rows.state_RF.copy_(torch.where(advances_R[:, None], after_RF, before_RF))
        rows.token_R.copy_(torch.where(advances_R, token_R, rows.token_R))
        rows.position_R.add_(advances_R)
        rows.seen_RV.scatter_(1, rows.token_R[:, None], True)
        rows.alive_R.copy_(advances_R & ~ends_R)
