"""One step on the device: the tokens of a plan through the transformer, then sampling for each
request.

A back end runs the transformer: on a CPU compiled code (`backends/cpu.py`); elsewhere, or without a
compiler, fused products in torch (`backends/torch.py`). A transformer with hooks or modules of
other classes is run by calling its modules (`backends/modules.py`). On a CUDA device, steps without
prefill run in bursts (`static/bursts.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

from earlyfusion.engine.backends.adapters import MultiAdapter
from earlyfusion.engine.backends.cpu import compiled_transformer
from earlyfusion.engine.backends.interface import Backend
from earlyfusion.engine.backends.modules import ModuleTransformer
from earlyfusion.engine.backends.torch import FusedTransformer
from earlyfusion.engine.cache import PagedCache, cache_dtype
from earlyfusion.engine.handle import Handle
from earlyfusion.engine.module_tree import check_blocks, is_plain
from earlyfusion.engine.sampling import TokenSampler
from earlyfusion.engine.scheduler import Plan, Step
from earlyfusion.engine.static.bursts import Bursts, uses_bursts
from earlyfusion.generation.grammar import Grammar
from earlyfusion.model.kv_cache import dtype_and_device
from earlyfusion.model.rotary import rotary_change_length
from earlyfusion.model.transformer import Transformer


class ModelRunner:
    """Owns the cache, the back end and the sampler; `run` is a whole step. The cache has `blocks`
    blocks for sequences of at most `length` tokens, in the dtype `dtype_name` (None: the model's).
    With `static`, steps may run in bursts (None: on a CUDA device). `adapters` are models with
    other weights in their layers, by name."""

    def __init__(
        self,
        transformer: Transformer,
        grammar: Grammar,
        blocks: int,
        length: int,
        dtype_name: str | None = None,
        static: bool | None = None,
        adapters: Mapping[str, Transformer] | None = None,
    ) -> None:
        model_dtype, self.device = dtype_and_device(transformer)
        dtype = cache_dtype(dtype_name, model_dtype)
        # One spare block, into which the idle rows of a static step write.
        self._cache = PagedCache(transformer.config, blocks + 1, length, dtype, self.device)
        # Parameters may become views of tensors made here, so these must not be tensors of
        # inference mode, or the model could never be trained again.
        with torch.inference_mode(False), torch.no_grad():
            check_blocks(transformer)
            static = uses_bursts(self.device) if static is None else static
            models = {"": transformer, **(adapters or {})}
            # All adapters share the model's head, so their back ends must return the same kind of
            # states.
            make = _backend if all(map(is_plain, models.values())) else _module_backend
            backends = {n: make(m, self._cache, not static) for n, m in models.items()}
            self.backend: Backend = MultiAdapter(backends) if adapters else backends[""]
            self.sampler = TokenSampler(self.backend, grammar, self.device)
            self.bursts: Bursts | None = None
            fused = {
                name: (models[name], backend)
                for name, backend in backends.items()
                if isinstance(backend, FusedTransformer)
            }
            if static and len(fused) == len(models):
                self.bursts = Bursts(fused, self._cache, grammar)

    def burst_length(self, plan: Plan, handles: Sequence[Handle]) -> int:
        """The number of static steps for this plan; 0 if it cannot run as a burst."""
        return 0 if self.bursts is None else self.bursts.burst_length(plan, handles)

    @torch.inference_mode()
    def run(self, plan: Plan, handles: Sequence[Handle], burst_length: int = 0) -> list[list[int]]:
        """Compute the pieces of a plan, and sample for `handles`. Returns the tokens of each
        handle: one per position, or in a burst up to `burst_length`. `INVALID_TOKEN` stands for a
        token whose logits are not finite."""
        for copied in plan.copies:
            self._cache.copy(copied)
        if not plan.pieces:
            return []
        if self.bursts is not None and burst_length:
            return self.bursts.sample(handles, burst_length)
        step = Step(plan.pieces)
        x_RD = self.backend.hidden_states(step)
        return self.sampler.sample(x_RD, step, handles) if handles else []

    def warm_up(self, progress: Callable[[int, int], None] | None = None) -> int:
        """As `Engine.warm_up`."""
        return 0 if self.bursts is None else self.bursts.warm_up(progress)

    def clear(self, blocks: Iterable[int]) -> None:
        """Fill these blocks with zeros. Masking alone would not hide a NaN in them: 0 * NaN is
        NaN."""
        self._cache.clear(blocks)


def _module_backend(transformer: Transformer, cache: PagedCache, compiled: bool) -> Backend:
    return ModuleTransformer(transformer, cache)


def _backend(transformer: Transformer, cache: PagedCache, compiled: bool) -> Backend:
    # Beyond `limit` the rotary angles depend on the length of the sequence, so sequences cannot
    # share one table.
    limit = rotary_change_length(transformer.config)
    if not is_plain(transformer) or (limit is not None and cache.length > limit):
        return ModuleTransformer(transformer, cache)
    backend = compiled_transformer(transformer, cache) if compiled else None
    return backend or FusedTransformer(transformer, cache)
