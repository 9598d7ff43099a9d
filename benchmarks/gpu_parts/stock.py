"""transformers' Chameleon and our class of that name: eager, and with a compiled static cache."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

import torch

from earlyfusion.bench.harness import Row
from earlyfusion.bench.shapes import SHAPES
from gpu_parts.settings import Settings, free, need

THEIRS, FACE = "transformers", "earlyfusion.hf"
"""transformers' own class, and ours of the same name."""


def eager(settings: Settings) -> Iterator[Row]:
    need("transformers")
    yield from _eager(settings, THEIRS, settings.batches)


def compiled(settings: Settings) -> Iterator[Row]:
    need("transformers")
    yield from _compiled(settings, THEIRS)


def classes(settings: Settings) -> Iterator[Row]:
    """Our classes of the same names, both ways."""
    need("transformers")
    yield from _eager(settings, FACE, settings.batches[:1])
    free()
    yield from _compiled(settings, FACE)


def _eager(settings: Settings, whose: str, batches: Sequence[int]) -> Iterator[Row]:
    model, name = _model(settings, whose), f"{settings.shape} {settings.plain}"
    by = f"{whose}, eager"
    for context in settings.contexts:
        first, token = _measured(model, 1, context, settings)
        yield Row(f"{name}: a token, context {context:,}", "ms", {by: 1e3 * token})
    yield Row(f"{name}: a prompt of {context:,} tokens", "ms", {by: 1e3 * first})
    for number in batches:
        _, token = _measured(model, number, settings.batch_context, settings)
        yield Row(f"{name}: {number} texts at once", "tokens/s", {by: number / token})


def _compiled(settings: Settings, whose: str) -> Iterator[Row]:
    """The long context first: each length of a static cache is compiled by itself."""
    model, name = _model(settings, whose), f"{settings.shape} {settings.plain}"
    for context in reversed(settings.contexts):
        since = time.perf_counter()
        _measured(model, 1, context, settings, cache_implementation="static")
        warm = time.perf_counter() - since
        _, token = _measured(model, 1, context, settings, cache_implementation="static")
        what, by = f"{name}: a token, context {context:,}", f"{whose}, compiled"
        yield Row(what, "ms", {by: 1e3 * token}, f"{by}: ready after {warm:.0f} s")


def _model(settings: Settings, whose: str) -> Any:
    """Random weights, made on the device."""
    import transformers
    from contenders import ready, stock_config

    from earlyfusion import hf

    config = stock_config(SHAPES[settings.shape])
    room: Any = transformers
    if whose == FACE:
        room, config = hf, hf.ChameleonConfig(**config.to_dict())
    with settings.device:
        model = room.ChameleonForConditionalGeneration._from_config(
            config, dtype=getattr(torch, settings.plain)
        )
    return ready(model.to(settings.device))


class _Clock:
    """A stopping criterion that never stops: it notes when each token was there."""

    def __init__(self, device: torch.device) -> None:
        self._device, self.times = device, list[float]()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=self._device)


def _measured(
    model: Any, rows: int, context: int, settings: Settings, **how: Any
) -> tuple[float, float]:
    """Seconds to the first tokens of new prompts, and of each step after them."""
    words = model.config.vocab_size
    ids = torch.randint(words // 2, words, (rows, context), device=settings.device)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    tokens = settings.tokens + 1
    limits = {"do_sample": False, "max_new_tokens": tokens, "min_new_tokens": tokens}
    for _ in range(2):  # the first warms up
        clock = _Clock(settings.device)
        since = time.perf_counter()
        model.generate(**given, **limits, **how, stopping_criteria=[clock])
    steps = [b - a for a, b in zip(clock.times, clock.times[1:], strict=False)]
    return clock.times[0] - since, median(steps)
