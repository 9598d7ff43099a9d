"""Bursts of static steps (multi-step decoding): several tokens for each row before the host reads
any.

The host writes the rows, starts the steps one after the other, and reads all their tokens at once.
So host and device wait for each other once per burst. A step is captured for each number of rows
(BUCKETS) and kind (`graphs.py`). If several processes share the model, this file is the first
process's side; it sends the others one message per burst (`follower.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import product

import torch

from earlyfusion.devices import free_bytes
from earlyfusion.engine.backends.torch import FusedTransformer
from earlyfusion.engine.cache import PagedCache
from earlyfusion.engine.handle import Handle
from earlyfusion.engine.sampling import INVALID_TOKEN
from earlyfusion.engine.scheduler import Plan
from earlyfusion.engine.static.follower import Burst
from earlyfusion.engine.static.grammars import Grammars
from earlyfusion.engine.static.graphs import Graphs, Kind, Shape
from earlyfusion.engine.static.layers import StaticLayers
from earlyfusion.engine.static.rows import FROZEN, MAX_STEPS, Rows, branch_rows, table_blocks
from earlyfusion.engine.static.step import StaticStep
from earlyfusion.generation.grammar import Grammar
from earlyfusion.kernels.operations import operations
from earlyfusion.model.transformer import Transformer

BUCKETS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192)
"""Numbers of rows; 3, 6 and 192 are those of one, two and 64 guided images."""

TEXT_STEPS, SHARED_STEPS = 8, 16
"""Steps of a burst with text, and of one in which several requests generate images. A new request
waits for the end of a burst."""


class Bursts:
    """The static steps of one model over one cache, whose last block is the spare one.

    `models` has a model per adapter, and the one without under "". `announce` is called before each
    burst and each capture with the number of its collectives; with tensor parallelism it sends the
    burst to the other processes.
    """

    def __init__(
        self,
        models: Mapping[str, tuple[Transformer, FusedTransformer]],
        cache: PagedCache,
        grammar: Grammar,
    ) -> None:
        transformer, fused = models[""]
        config, device = transformer.config, cache.device
        self._device, self._spare = device, len(cache.kv_BL2KSH) - 1
        self._vocabulary = config.vocab_size
        self._table_blocks = table_blocks(cache)
        slots = max(grammar.image_tokens, cache.length)
        self._grammars = Grammars(config.vocab_size, slots, grammar.begin_image, device)
        codes_V = torch.tensor(sorted(grammar.code_ids), device=device)
        kernels = operations(device)
        layers = {name: StaticLayers(*model, cache, kernels) for name, model in models.items()}
        self._adapters = list(layers)
        self._step = StaticStep(transformer, fused, layers, self._grammars, codes_V)
        self._rows: dict[int, Rows] = {}
        self._graphs = Graphs(device, layers[""])
        self.announce: Callable[[Burst, int], None] = lambda burst, collectives: None

    def burst_length(self, plan: Plan, handles: Sequence[Handle]) -> int:
        """The number of steps for the handles of a plan; 0 if it cannot run as a burst.

        A static step computes one token per branch, and only for requests that sample.
        """
        rows = sum(len(handle.branches) for handle in handles)
        if not rows or rows != len(plan.pieces) or rows > BUCKETS[-1]:
            return 0
        if not all(piece.size == 1 for piece in plan.pieces):
            return 0
        if not all(handle.needs_only_logits for handle in handles):
            return 0
        if self._grammars.numbers_of(handle.grammar_state.grammar for handle in handles) is None:
            return 0
        if not _only_codes(handles):
            limit = TEXT_STEPS
        else:
            limit = MAX_STEPS if len(handles) == 1 else SHARED_STEPS
        return min(limit, max(handle.grammar_state.tokens_until_end for handle in handles))

    def sample(self, handles: Sequence[Handle], steps: int) -> list[list[int]]:
        """The next tokens of each handle, at most `steps`; `INVALID_TOKEN` if none could be
        sampled.

        Requests of different adapters are sampled one group after the other.
        """
        groups: dict[str, list[Handle]] = {}
        for handle in handles:
            groups.setdefault(handle.request.adapter, []).append(handle)
        sampled: dict[int, list[int]] = {}
        for name, group in groups.items():
            tokens = self._sample_group(name, group, steps)
            numbers = (handle.number for handle in group)
            sampled |= dict(zip(numbers, tokens, strict=True))
        return [sampled[handle.number] for handle in handles]

    def _sample_group(self, adapter: str, handles: Sequence[Handle], steps: int) -> list[list[int]]:
        numbers = self._grammars.numbers_of(handle.grammar_state.grammar for handle in handles)
        assert numbers is not None
        kind = Kind(_only_codes(handles), all(_is_greedy(handle) for handle in handles))
        rows = branch_rows(handles, numbers, kind.only_codes)
        bucket = next(size for size in BUCKETS if size >= len(rows))
        tensors, shape = self._bucket_rows(bucket), Shape(bucket, kind, adapter)
        step = self._announced_step(Burst(shape, steps, [row.branch.blocks for row in rows]))
        tensors.write(rows, self._spare, steps)
        self._mark_seen(tensors, handles)
        for _ in range(steps):
            step()
        self._graphs.wait()
        # The host waits for the device here.
        tokens_of_row = tensors.tokens_NR[:steps].T.tolist()
        full_rows = [row.conditions[0] for row in rows if row.branch is row.handle.branches[0]]
        return [_before_freezing(tokens_of_row[row]) for row in full_rows]

    @torch.inference_mode()
    def warm_up(self, progress: Callable[[int, int], None] | None = None) -> int:
        """As `Engine.warm_up`."""
        if not self._graphs.captures:
            return 0
        before = free_bytes(self._device)
        kinds = [Kind(*flags) for flags in product((True, False), repeat=2)]
        # The largest first, so that the others can use its memory in the pool.
        shapes = [Shape(*fields) for fields in product(reversed(BUCKETS), kinds, self._adapters)]
        for number, shape in enumerate(shapes, 1):
            self._announced_step(Burst(shape, 0))
            if progress is not None:
                progress(number, len(shapes))
        return before - free_bytes(self._device)

    def _bucket_rows(self, bucket: int) -> Rows:
        if bucket not in self._rows:
            rows = Rows.of(bucket, self._table_blocks, self._vocabulary, self._device)
            rows.write([], self._spare, 1)
            self._rows[bucket] = rows
        return self._rows[bucket]

    def _announced_step(self, burst: Burst) -> Callable[[], None]:
        """The step of a burst, after all processes have been sent the burst."""
        shape, rows = burst.shape, self._bucket_rows(burst.shape.rows)
        self.announce(burst, self._graphs.collectives(shape, burst.steps))
        return self._graphs.captured_step(
            shape,
            lambda: self._step.run(rows, shape.kind, shape.adapter),
            lambda: rows.write([], self._spare, 1),
        )

    def _mark_seen(self, rows: Rows, handles: Sequence[Handle]) -> None:
        """Mark the history of each request with a repetition penalty, in all of its rows."""
        number = 0
        for handle in handles:
            if handle.both_settings[0].penalty != 1:
                history = torch.tensor(handle.branches[0].tokens).to(self._device)
                for row in range(number, number + len(handle.branches)):
                    rows.seen_RV[row] = False
                    rows.seen_RV[row].index_fill_(0, history, True)
            number += len(handle.branches)


def uses_bursts(device: torch.device) -> bool:
    """Whether models on this device sample in bursts."""
    return device.type == "cuda"


def _only_codes(handles: Sequence[Handle]) -> bool:
    return all(handle.grammar_state.in_image for handle in handles)


def _is_greedy(handle: Handle) -> bool:
    return all(settings.temperature == 0 for settings in handle.both_settings)


def _before_freezing(tokens: list[int]) -> list[int]:
    """The tokens sampled before the row froze. An `INVALID_TOKEN` after others is left out: the
    next burst samples it first."""
    end = tokens.index(FROZEN) if FROZEN in tokens else len(tokens)
    sampled = tokens[:end]
    return sampled[:-1] if INVALID_TOKEN in sampled[1:] else sampled
