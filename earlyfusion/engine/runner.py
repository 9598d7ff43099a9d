"""One step on the device: the tokens of a plan through the transformer, then a draw per request.

A back end runs the transformer. On a CPU it is compiled code (`backends/cpu.py`); elsewhere, or
without a compiler, fused products in torch (`backends/torch.py`). Where somebody has put hooks or
other modules into the transformer, its own modules are called (`backends/modules.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from earlyfusion.engine.backends.cpu import compiled_transformer
from earlyfusion.engine.backends.interface import Backend
from earlyfusion.engine.backends.modules import CalledTransformer
from earlyfusion.engine.backends.torch import FusedTransformer
from earlyfusion.engine.cache import Cache, cache_dtype
from earlyfusion.engine.draw import Drawer
from earlyfusion.engine.handle import Handle
from earlyfusion.engine.module_tree import check_blocks, is_plain
from earlyfusion.engine.scheduler import Plan
from earlyfusion.engine.step import Step
from earlyfusion.generation.grammar import Grammar
from earlyfusion.model.kv_cache import kept_in
from earlyfusion.model.rotary import changes_at
from earlyfusion.model.transformer import Transformer


class ModelRunner:
    """Owns cache, back end and drawer; `run` is the whole of a step.

    The cache has `blocks` blocks, for sequences of at most `length` tokens, in the dtype that
    `dtype_name` names, the model's own for None.
    """

    def __init__(
        self,
        transformer: Transformer,
        grammar: Grammar,
        blocks: int,
        length: int,
        dtype_name: str | None = None,
    ) -> None:
        model_dtype, self.device = kept_in(transformer)
        dtype = cache_dtype(dtype_name, model_dtype)
        self._cache = Cache(transformer.config, blocks, length, dtype, self.device)
        # Parameters may become views of tensors that are made here: these must not be tensors of
        # inference mode, or the model could never be trained again.
        with torch.inference_mode(False), torch.no_grad():
            check_blocks(transformer)
            self.backend = _backend(transformer, self._cache)
            self.drawer = Drawer(self.backend, grammar, self.device)

    @torch.inference_mode()
    def run(self, plan: Plan, handles: Sequence[Handle]) -> list[list[int]]:
        """Read the pieces of a plan, and draw for the handles that are ready.

        Returns the tokens of each handle, one or one per position of its window; `NOTHING` for a
        token whose logits are not finite.
        """
        for copied in plan.copies:
            self._cache.copy(copied)
        if not plan.pieces:
            return []
        step = Step(plan.pieces, self.device)
        x_RD = self.backend.states(step)
        return self.drawer.draw(x_RD, step, handles) if handles else []

    def clear(self, blocks: Iterable[int]) -> None:
        """Zero these blocks: values that are not finite would spoil sums that should skip them."""
        self._cache.clear(blocks)


def _backend(transformer: Transformer, cache: Cache) -> Backend:
    # Beyond `limit` the rotary angles of all positions depend on the length of a sequence, so its
    # tokens cannot share a table with those of others.
    limit = changes_at(transformer.config)
    if not is_plain(transformer) or (limit is not None and cache.length > limit):
        return CalledTransformer(transformer, cache)
    return compiled_transformer(transformer, cache) or FusedTransformer(transformer, cache)
