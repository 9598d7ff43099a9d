"""The engine on random weights: texts, images, many at once, prompts, and its back ends.

A floor is what the measured limits allow: the bytes that a step must read over the rate of copies,
or the operations of a prompt over those of bf16 products.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import count
from statistics import median
from typing import Any
from unittest.mock import patch

import torch

from earlyfusion.bench.harness import OURS, Row, seconds
from earlyfusion.bench.limits import Limits
from earlyfusion.bench.parts import Skipped
from earlyfusion.bench.speed import GREEDY, GUIDED, PLAIN, Compilations, Meter
from earlyfusion.engine import runner
from earlyfusion.engine.engine import Engine
from gpu_parts.settings import Settings, free, peak_gigabytes

# ---- engine back ends ----------------------------------------------------------------------------
# Each is measured by name. A value says what in `earlyfusion.engine.runner` is replaced while the
# engine is made, so that it takes that back end. One that the runner does not know is skipped.
BACKENDS: dict[str, dict[str, Callable[..., Any]]] = {
    "chosen by the engine": {},
    "static": {"compiled_transformer": lambda *_: None, "serves": lambda *_: True},
    "torch": {"compiled_transformer": lambda *_: None, "serves": lambda *_: False},
    "modules": {"is_plain": lambda _: False, "serves": lambda *_: False},
}
REQUIRED = {"static": "serves"}
"""What the runner must have for a back end to be there."""
# --------------------------------------------------------------------------------------------------

MOST_MILLISECONDS = 15_000
"""An image that would take longer is not generated to its end."""


def weights(settings: Settings, dtype: str) -> Iterator[Row]:
    """One text, an image with one and three branches, many texts, a prompt; memory."""
    dtype = settings.plain if dtype == "plain" else dtype
    meter = Meter(settings.model(dtype), settings.rounds)
    limits, name = settings.limits(), f"{settings.shape} {dtype}"
    yield from _texts(meter, limits, name, settings)
    yield from _counted(meter, name)
    guided = 0.0
    for branches, row in _images(meter, limits, name):
        guided = row.values[OURS] if branches == 2 else guided
        yield row
    for number in settings.batches:
        yield _crowd(meter, limits, name, number, settings.batch_context)
    if meter.device.type == "cuda":
        size = meter.engine.cache_size.bytes / 1e9
        note = f"of it {size:.1f} GB for the cache"
        yield Row(f"{name}: peak memory", "GB", {OURS: peak_gigabytes(meter.device)}, note)
    if guided < MOST_MILLISECONDS:
        yield _whole_image(meter, name)


def backends(settings: Settings) -> Iterator[Row]:
    """One text and a few at once in each back end; a row has all of them."""
    model = settings.model(settings.plain)
    limits, found = settings.limits(), dict[str, list[Row]]()
    for name, replaced in BACKENDS.items():
        if REQUIRED.get(name) and not hasattr(runner, REQUIRED[name]):
            continue
        model.close()
        free()
        with ExitStack() as stack:
            for attribute, value in replaced.items():
                if hasattr(runner, attribute):
                    stack.enter_context(patch.object(runner, attribute, value))
            model.engine = Engine(model.transformer, model.processor, _cache_bytes(settings))
        kind = type(model.engine.runner.backend).__name__
        kind += " in bursts" if getattr(model.engine.runner, "bursts", None) is not None else ""
        for row in _of_backend(Meter(model, settings.rounds), limits, settings):
            row.what, row.note = f"back ends: {row.what}", f"{name} is {kind}"
            row.values = {name: row.values[OURS]}
            yield row
            found.setdefault(row.what, []).append(row)
    if not found:
        raise Skipped("the engine offers no back end by name")


def _of_backend(meter: Meter, limits: Limits, settings: Settings) -> Iterator[Row]:
    yield from _texts(meter, limits, settings.shape, settings)
    yield _crowd(meter, limits, settings.shape, settings.batches[0], settings.batch_context)


def _cache_bytes(settings: Settings) -> int | None:
    """Room for the few requests of a back end: two engines' default caches would not fit."""
    return 2**26 if settings.rehearses else 16_000_000_000


def _texts(meter: Meter, limits: Limits, name: str, settings: Settings) -> Iterator[Row]:
    for context in settings.contexts:
        meter.reply(context)  # compiles, captures, warms up
        firsts, steps = zip(*(meter.reply(context) for _ in range(settings.rounds)), strict=True)
        floor = limits.milliseconds(meter.token_bytes(context))
        token = {OURS: 1e3 * median(steps)}
        yield Row(f"{name}: a token, context {context:,}", "ms", token, floor=floor)
    floor = limits.milliseconds(meter.token_bytes(0), meter.operations(context))
    first = {OURS: 1e3 * median(firsts)}
    yield Row(f"{name}: a prompt of {context:,} tokens", "ms", first, floor=floor)


def _images(meter: Meter, limits: Limits, name: str) -> Iterator[tuple[int, Row]]:
    """By number of branches: the tokens of a whole image, from the steps of a part of it."""
    again: list[Any] = [meter.random_image(), "Draw it again."]
    whole, half = meter.layout.num_tokens, meter.layout.num_tokens / 2
    cases: list[tuple[int, Any, dict[str, float], float]] = [
        (1, "Draw a red apple.", PLAIN, half),
        (2, "Draw a red apple.", GUIDED, 2 * half),
        (3, again, GUIDED, 3 * half + 2 * whole),
    ]
    one = whole * limits.milliseconds(meter.token_bytes(int(half), image=True))
    for branches, prompt, guidance, context in cases:
        seeds = count()
        meter.image_times(prompt, guidance | GREEDY, seeds)
        steps = [meter.image_times(prompt, guidance, seeds)[1] for _ in range(meter.rounds)]
        floor = whole * limits.milliseconds(meter.token_bytes(int(context), image=True))
        took = 1e3 * whole * median(steps)
        what = f"{name}: {whole:,} tokens of an image, {branches} branches"
        note = f"{took / one:.2f} times the floor of one branch"
        yield branches, Row(what, "ms", {OURS: took}, note, floor)


def _whole_image(meter: Meter, name: str) -> Row:
    """From the prompt to pixels, with the image tokenizer."""
    model = meter.model
    took = seconds(lambda: model.generate("Draw a red pear.", output="image", seed=1), meter.device)
    return Row(f"{name}: an image from prompt to pixels, guided", "ms", {OURS: 1e3 * took})


def _crowd(meter: Meter, limits: Limits, name: str, number: int, context: int) -> Row:
    meter.batch_throughput(number, context)
    found = [meter.batch_throughput(number, context) for _ in range(max(1, meter.rounds - 1))]
    rate, stood = median(r for r, _ in found), median(c for _, c in found)
    step = limits.milliseconds(meter.token_bytes(int(number * stood)), number * meter.operations(1))
    return Row(
        f"{name}: {number} texts at once",
        "tokens/s",
        {OURS: rate},
        f"context about {stood:.0f}",
        1e3 * number / step,
    )


def _counted(meter: Meter, name: str) -> Iterator[Row]:
    """Whether a step after the warm-up still compiles, or takes memory from the driver."""
    meter.reply(32)
    compiled = _count_kernels()
    with Compilations() as counted:
        before = _segments(meter.device)
        since = time.perf_counter()
        meter.reply(32)
        took = time.perf_counter() - since
        segments = _segments(meter.device) - before
    note = f"in one reply of {took:.2f} s"
    total = counted.number + compiled[0]
    yield Row(f"{name}: compilations after warm-up", "", {OURS: float(total)}, note)
    if meter.device.type == "cuda":
        what = f"{name}: allocations from the driver after warm-up"
        yield Row(what, "", {OURS: float(segments)}, note)


def _count_kernels() -> list[int]:
    """A number that grows whenever Triton compiles a kernel or loads one that it had compiled."""
    counts = [0]
    try:
        from triton import knobs
    except ImportError:
        return counts

    def notice(**_: object) -> None:
        counts[0] += 1

    knobs.compilation.listener = notice
    return counts


def _segments(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    return int(torch.cuda.memory_stats(device)["segment.all.allocated"])
