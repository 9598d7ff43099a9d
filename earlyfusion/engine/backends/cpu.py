"""The compiled step of a CPU (`kernels/cpu_step.py`) as a back end of the engine."""

from __future__ import annotations

import torch
from torch import Tensor

from earlyfusion.engine.backends.interface import Product, head_product, vocab_logits
from earlyfusion.engine.cache import PagedCache
from earlyfusion.engine.scheduler import Step
from earlyfusion.kernels.cpu_step import CpuStep, available, fits, weight_bits
from earlyfusion.model.transformer import Transformer


class CompiledTransformer:
    """All layers, and the sampling, in compiled code, which reads and writes the cache in place."""

    needs_whole_prompts = False
    chunk_factor: int
    """4 for bf16 weights on AMX: there 256 tokens take as long as 64 of them without it."""

    def __init__(self, transformer: Transformer, cache: PagedCache, bits: int) -> None:
        self._head = transformer.lm_head
        self._step = CpuStep(transformer, cache.kv_BL2KSH, cache.length, bits, cache.scales_BL2KS)
        self.sample = self._step.sample
        self.chunk_factor = 4 if self._step.runs_on_amx and bits == 16 else 1

    def hidden_states(self, step: Step) -> Tensor:
        tables: list[int] = []
        for piece in step.pieces:
            # Compiled code gets the addresses of the block tables: no copy of a table per step.
            tables += [piece.branch.blocks.buffer_info()[0]] * piece.rows
        tokens_T, positions_T = torch.tensor([step.tokens, step.positions])
        x_TD = self._step.states(tokens_T, positions_T, tables, bool(step.longer))
        return x_TD if step.needs_all_logits else x_TD[step.logits_indices]

    def product(self, ids_V: Tensor) -> Product:
        return head_product(self._head, ids_V, self._step.product)

    def vocab_logits(self, x_RD: Tensor) -> Tensor:
        return vocab_logits(self._head, x_RD)


def compiled_transformer(transformer: Transformer, cache: PagedCache) -> CompiledTransformer | None:
    """This back end; None without a compiler, or if it cannot run the model."""
    bits = weight_bits(transformer)
    if bits is None or not fits(transformer, cache.kv_BL2KSH) or not available():
        return None
    return CompiledTransformer(transformer, cache, bits)
