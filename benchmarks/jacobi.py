"""Steps and milliseconds of mini's images, one code at a time and in windows: tables in Markdown.

    python benchmarks/jacobi.py                           # temperature 1, without guidance and with
    python benchmarks/jacobi.py --temperature 0.5 --top-p 0.9 --images 32 --threads 2
    python benchmarks/jacobi.py --lookup 4 8 16 --shape 1b --dtype bfloat16 --threads 2

All windows generate each image (one prompt, one seed) before the next one, so that a busy machine
slows all alike. Steps are means, milliseconds medians of whole images, prompt included.

`--lookup` measures `prompt_lookup` for texts instead, in its best and its worst case: a model of
this shape whose reply repeats the same 16 tokens, and one whose reply never repeats a token. Their
layers compute as usual, but add nothing, and the head maps each token to the one that is to follow.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from functools import partial
from itertools import chain, count
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch

from earlyfusion import Chameleon, SamplingParams
from earlyfusion.bench.harness import heading, line, seconds, take_turns
from earlyfusion.bench.shapes import random_model
from earlyfusion.generation.request import Request

PROMPTS = (
    "Draw a red apple.",
    "Draw a cat.",
    "Draw a green car.",
    "Draw a flag.",
    "Draw a smiling face.",
    "Draw a house.",
    "Draw a blue heart.",
    "Draw a tree.",
)
GUIDANCE = {"none": (1.0, 1.0), "text 1.5, image 1.2": (1.5, 1.2), "text 3, image 1.2": (3.0, 1.2)}
_PERIOD = 16  # tokens that a reply repeats
_TOKENS = 128  # of a reply


def measured(model: Chameleon, request: Request) -> tuple[int, float]:
    """Steps and milliseconds of one request."""
    steps = 0

    def run() -> None:
        nonlocal steps
        handle = model.engine.add(request)
        while not handle.finished:
            model.engine.step()
            steps += 1

    took = seconds(run)
    return steps, 1e3 * took


def compare(
    model: Chameleon, windows: list[int], images: int, settings: dict[str, Any]
) -> dict[int, list[tuple[int, float]]]:
    """Steps and milliseconds of each image, by window."""

    def generate(window: int, numbers: Iterator[int]) -> tuple[int, float]:
        number = next(numbers)
        sampling = SamplingParams(**settings, jacobi=window)
        prompt = PROMPTS[number % len(PROMPTS)]
        return measured(model, model.request(prompt, "image", sampling, seed=number))

    contenders = {}
    for window in windows:
        contenders[window] = partial(generate, window, chain([0], count()))  # the first warms up
    return take_turns(contenders, images)


def periodic(model: Chameleon, period: int) -> list[int]:
    """Change the weights so that the model generates text tokens in cycles of `period`, greedily.
    Returns the text tokens, of which each whole group of `period` is a cycle."""
    tokens = model.processor.vocabulary.text_tokens.tolist()
    following = list(tokens)
    for first in range(0, len(tokens) - period + 1, period):
        cycle = tokens[first : first + period]
        following[first : first + period] = [*cycle[1:], cycle[0]]
    with torch.no_grad():
        for block in model.transformer.model.layers:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
        embedding = model.transformer.model.embed_tokens.weight
        model.transformer.lm_head.weight[following] = embedding[tokens]
    return tokens


def compare_lookup(options: argparse.Namespace, period: int) -> dict[int, tuple[int, float]]:
    """Steps and milliseconds per token, by `prompt_lookup`, of replies with this period; 0: that
    never repeat."""
    with tempfile.TemporaryDirectory() as folder:
        model = random_model(options.shape, torch.device("cpu"), options.dtype, Path(folder))
    model.cache_bytes = 300_000_000
    tokens = periodic(model, period or len(model.processor.vocabulary.text_tokens))

    def reply(lookup: int, starts: Iterator[int]) -> tuple[int, float]:
        sampling = SamplingParams(temperature=0, repetition_penalty=1, prompt_lookup=lookup, seed=0)
        request = Request(
            [tokens[next(starts) % len(tokens)]], "text", sampling.resolved({}), 0, _TOKENS
        )
        steps, took = measured(model, request)
        return steps, took / _TOKENS

    contenders = {}
    for lookup in [0, *options.lookup]:
        # Each reply starts in another cycle, so that the cache holds none of it.
        contenders[lookup] = partial(reply, lookup, count(lookup * _PERIOD, 101 * _PERIOD))
    found = take_turns(contenders, options.rounds + 1)
    return {
        lookup: (replies[-1][0], median(ms for _, ms in replies[1:]))
        for lookup, replies in found.items()
    }


def show_lookup(options: argparse.Namespace) -> None:
    columns = ("reply", "prompt_lookup", f"steps of {_TOKENS} tokens", "ms per token")
    print(f"{options.shape}, {options.dtype}, {options.threads} threads\n")
    print(heading(*columns, "times as fast"))
    for name, period in ((f"repeats {_PERIOD} tokens", _PERIOD), ("never repeats", 0)):
        rows = compare_lookup(options, period)
        for lookup, (steps, ms) in rows.items():
            print(line(name, lookup or "off", steps, f"{ms:.2f}", f"{rows[0][1] / ms:.2f}"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="mini")
    parser.add_argument("--images", "--pictures", type=int, default=24)
    parser.add_argument("--windows", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--lookup", type=int, nargs="+", help="of prompt_lookup, for texts")
    parser.add_argument("--shape", default="mini", help="for --lookup: tiny, mini, 110m, 1b")
    parser.add_argument(
        "--dtype", default="float32", help="for --lookup: also bfloat16, int8, int4"
    )
    parser.add_argument("--rounds", type=int, default=3, help="for --lookup")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.lookup:
        return show_lookup(options)
    model = Chameleon.load(options.model, device="cpu")
    shape = {"image_temperature": options.temperature, "image_top_p": options.top_p}
    print(f"{options.model}, {options.images} images, {shape}, {options.threads} threads\n")
    columns = ("guidance", "window", "steps", "times fewer", "ms per image", "times as fast")
    print(heading(*columns))
    for name, (text, image) in GUIDANCE.items():
        settings = shape | {"guidance_text": text, "guidance_image": image}
        rows = compare(model, [0, *options.windows], options.images, settings)
        steps = {window: mean(n for n, _ in found) for window, found in rows.items()}
        times = {window: median(ms for _, ms in found) for window, found in rows.items()}
        for window in rows:
            fewer, faster = steps[0] / steps[window], times[0] / times[window]
            cells = f"{steps[window]:.1f}", f"{fewer:.2f}", f"{times[window]:.1f}", f"{faster:.2f}"
            print(line(name, window or "off", *cells), flush=True)


if __name__ == "__main__":
    main()
