"""Steps and milliseconds of mini's images, one code at a time and in windows: tables in Markdown.

    python benchmarks/jacobi.py                           # temperature 1, without guidance and with
    python benchmarks/jacobi.py --temperature 0.5 --top-p 0.9 --images 32 --threads 2

All windows generate each image (one prompt, one seed) before the next one, so that a busy machine
slows all alike. Steps are means, milliseconds medians of whole images, prompt included.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from itertools import chain, count
from statistics import mean, median
from typing import Any

import torch

from earlyfusion import Chameleon, SamplingParams
from earlyfusion.bench.harness import heading, line, seconds, take_turns
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


def measured(model: Chameleon, request: Request) -> tuple[int, float]:
    """Steps and milliseconds of one image."""
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="mini")
    parser.add_argument("--images", "--pictures", type=int, default=24)
    parser.add_argument("--windows", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
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
