"""The engine beside transformers' own Chameleon: a table in Markdown, and JSON for plots.py.

    python benchmarks/engine.py --threads 2 --rounds 5
    python benchmarks/engine.py --shape 1b --threads 2 --batch 8 --json 1b.json
    python benchmarks/engine.py --shape 1b --dtype int4 --threads 2 --only decode
    python benchmarks/engine.py --shape 7b --device cuda --batch 64 --json 7b.json

Both have the same random weights, and take turns in every round; figures are medians. transformers
runs `generate`, greedy, with its dynamic and its static cache, and with `--compile` its forward
under torch.compile too; for int8 and int4 it stays in bf16. `--only` takes some of the parts:

- decode: a token at two contexts. read: the first token of a long prompt, and its share of what
  products of square matrices reach. image: the first token of a question about a new image,
  pixels to codes included, and about the same image again.
- batch: many texts at once beside transformers' continuous batching (`generate_batch`), which
  is given the size of its cache and keeps it between the rounds.
- alone: the lines of `earlyfusion bench`, guidance and eight mixed requests among them.

The line for CUDA has not been run. Needs `pip install "earlyfusion[transformers]"`.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from contenders import THEIRS, stock_from
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.utils import logging

from earlyfusion import Chameleon, Image, SamplingParams
from earlyfusion.bench.harness import OURS, Row, medians, save, seconds, table, take_turns
from earlyfusion.bench.shapes import SHAPES, write_random
from earlyfusion.bench.speed import Meter
from earlyfusion.generation.request import Request

CONTEXTS = (32, 1057)
PARTS = ("decode", "read", "image", "batch", "alone")
QUESTIONS = ("What is this?", "What colour is it?")


class Bench:
    """Both models with the same weights."""

    def __init__(self, shape: str, folder: Path, device: str, dtype: str, tokens: int) -> None:
        plain = {"int8": "bfloat16", "int4": "bfloat16"}.get(dtype, dtype)
        self.model = Chameleon.load(folder, device=device, dtype=dtype)
        self.stock = stock_from(folder, getattr(torch, plain), device)
        self.engine, self.processor = self.model.engine, self.model.processor
        self.config, self.device, self.tokens = SHAPES[shape], device, tokens
        self._forwards = {"plain": self.stock.forward}
        self._random = random.Random(0)

    def prompt(self, context: int) -> list[int]:
        """New random text of this many tokens, or as many as fit into the context."""
        context = min(context, self.config.max_position_embeddings - self.tokens - 2)
        words = self.processor.vocabulary.text_tokens.tolist()
        return [self.processor.vocabulary.bos, *self._random.choices(words, k=context - 1)]

    def random_image(self) -> PIL.Image.Image:
        side = self.model.image_tokenizer.resolution
        pixels = np.frombuffer(self._random.randbytes(3 * side * side), dtype=np.uint8)
        return PIL.Image.fromarray(pixels.reshape(side, side, 3))

    def ours(self, ids: Sequence[int]) -> tuple[float, float]:
        """Seconds to the first token, and of each after it."""
        sampling = SamplingParams(temperature=0, seed=0).resolved({})
        handle = self.engine.add(Request(ids, "text", sampling, 0, self.tokens + 1))
        first = seconds(lambda: self.step_until(lambda: handle.tokens))
        rest = seconds(lambda: self.step_until(lambda: handle.finished))
        return first, rest / max(len(handle.tokens) - 1, 1)

    def step_until(self, done: Callable[[], object]) -> None:
        while not done():
            self.engine.step()

    def theirs(self, ids: Sequence[int], tokens: int, cache: str, **pixels: Any) -> float:
        """Seconds of `generate` for this many tokens."""
        given = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids)).long()}
        given = {name: value.to(self.device) for name, value in (given | pixels).items()}
        static = {} if cache == "dynamic" else {"cache_implementation": "static"}
        self.stock.forward = self._forward("compiled" if cache == "compiled" else "plain")
        limits = {"do_sample": False, "max_new_tokens": tokens, "min_new_tokens": tokens}
        return seconds(lambda: self.stock.generate(**given, **limits, **static).tolist())

    def theirs_at_once(self, prompts: list[list[int]]) -> int:
        """Tokens that `generate_batch` gives."""
        self.stock.forward = self._forward("plain")
        endless = GenerationConfig(
            max_new_tokens=self.tokens, do_sample=False, eos_token_id=-1, pad_token_id=1
        )
        # By default its cache takes most of the memory, and seconds to be cleared.
        limits = ContinuousBatchingConfig(num_blocks=2 * len(prompts) + 8, max_batch_tokens=1024)
        made = self.stock.generate_batch(
            prompts,
            generation_config=endless,
            continuous_batching_config=limits,
            progress_bar=False,
            persistent_manager=True,
        )
        return sum(len(reply.generated_tokens) for reply in made.values())

    def _forward(self, name: str) -> Callable[..., Any]:
        if name not in self._forwards:
            self._forwards[name] = torch.compile(self._forwards["plain"])
        return self._forwards[name]


def decode(bench: Bench, rounds: int, caches: Sequence[str]) -> list[Row]:
    """A token at each context; transformers' is that of many tokens less that of one."""
    rows = []
    for context in CONTEXTS:
        prompt = bench.prompt(context)

        def theirs(cache: str, ids: list[int]) -> float:
            one, many = (bench.theirs(ids, n, cache) for n in (1, bench.tokens + 1))
            return (many - one) / bench.tokens

        # A prompt that the engine has read before would not be read again.
        ours = {OURS: lambda c=context: bench.ours(bench.prompt(c))[1]}
        others = {f"{THEIRS}, {cache}": partial(theirs, cache, prompt) for cache in caches}
        values = medians(take_turns(ours | others, rounds), 1e3)
        rows.append(Row(f"a token, context {len(prompt):,}", "ms", values))
    return rows


def read(bench: Bench, meter: Meter, rounds: int) -> list[Row]:
    """The first token of a long prompt."""
    length = len(bench.prompt(CONTEXTS[1]))
    contenders = {
        OURS: lambda: bench.ours(bench.prompt(CONTEXTS[1]))[0],
        f"{THEIRS}, dynamic": lambda: bench.theirs(bench.prompt(CONTEXTS[1]), 1, "dynamic"),
    }
    values = medians(take_turns(contenders, rounds), 1e3)
    limit = 1e3 * meter.operations(length) / meter.peak
    shares = " and ".join(f"{limit / value:.0%}" for value in values.values())
    return [Row(f"first token, context {length:,}", "ms", values, f"{shares} of the matmul peak")]


def image(bench: Bench, rounds: int) -> list[Row]:
    """The first token about an image that is new, and about the same again."""
    vocabulary, layout = bench.processor.vocabulary, bench.processor.layout
    assert vocabulary.image_placeholder is not None
    shown = [vocabulary.image_placeholder] * layout.num_codes
    marks = [vocabulary.begin_image, *shown, vocabulary.end_image]
    words = bench.processor.encode_text(QUESTIONS[0])
    ids = [vocabulary.bos, *marks, *words, vocabulary.end_of_turn]
    images: list[PIL.Image.Image] = []

    def ask(question: str) -> None:
        request = bench.model.request([Image(images[-1]), question], "text", seed=len(images))
        handle = bench.engine.add(request)
        bench.step_until(lambda: handle.tokens)
        handle.cancel()

    def new() -> float:
        images.append(bench.random_image())
        return seconds(lambda: ask(QUESTIONS[0]))

    def stock() -> float:
        pixels = bench.model.image_tokenizer.preprocess(images[-1])[None].to(bench.stock.dtype)
        return bench.theirs(ids, 1, "dynamic", pixel_values=pixels)

    theirs = f"{THEIRS}, dynamic"
    contenders = {"new": new, "known": lambda: seconds(lambda: ask(QUESTIONS[1])), theirs: stock}
    found = medians(take_turns(contenders, rounds), 1e3)
    return [
        Row(
            f"first token, {name} image of {layout.num_codes:,} codes",
            "ms",
            {OURS: found[name], theirs: found[theirs]},
        )
        for name in ("new", "known")
    ]


def batch(bench: Bench, rounds: int, number: int) -> list[Row]:
    """Many texts at once."""
    sampling = SamplingParams(temperature=0, seed=0).resolved({})

    def prompts() -> list[list[int]]:
        return [bench.prompt(CONTEXTS[0] + i % 8) for i in range(number)]

    def ours() -> float:
        requests = [Request(ids, "text", sampling, 0, bench.tokens) for ids in prompts()]
        handles: list[Any] = []

        def run() -> None:
            handles.extend(bench.engine.add(request) for request in requests)
            bench.step_until(lambda: not bench.engine.busy)

        took = seconds(run)
        return sum(len(handle.tokens) for handle in handles) / took

    def theirs() -> float:
        given, counts = prompts(), list[int]()
        took = seconds(lambda: counts.append(bench.theirs_at_once(given)))
        return counts[0] / took

    contenders = {OURS: ours, f"{THEIRS}, generate_batch": theirs}
    values = medians(take_turns(contenders, rounds))
    bench.stock.destroy_cached_continuous_batching_manager()
    return [Row(f"{number} texts at once", "tokens/s", values)]


def alone(meter: Meter) -> list[Row]:
    figures = meter.texts() + meter.images() + meter.tokenizer() + meter.mixed() + meter.limits()
    return [
        Row(f.what, f.unit, {OURS: f.value}, "" if f.of_limit is None else f"{f.of_limit:.0%}")
        for f in figures
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="mini")
    parser.add_argument("--dtype", help="mini: float32, others: bfloat16; int8, int4")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=24, help="tokens to decode in a round")
    parser.add_argument("--batch", type=int, default=8, help="texts at once")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", action="store_true", help="transformers compiled, too")
    # RESULTS.md has commands with the older name "picture".
    part = {"picture": "image"}
    parser.add_argument(
        "--only", nargs="+", choices=PARTS, default=PARTS, type=lambda name: part.get(name, name)
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.set_verbosity_error()
    small = options.shape in ("tiny", "mini")
    dtype = options.dtype or ("float32" if small else "bfloat16")
    caches = ["dynamic", "static", *(["compiled"] if options.compile else [])]
    with tempfile.TemporaryDirectory() as folder:
        write_random(options.shape, Path(folder) / "model")
        bench = Bench(options.shape, Path(folder) / "model", options.device, dtype, options.tokens)
    meter, rows = Meter(bench.model, options.rounds), []
    parts: dict[str, Callable[[], list[Row]]] = {
        "decode": lambda: decode(bench, options.rounds, caches),
        "read": lambda: read(bench, meter, options.rounds),
        "image": lambda: image(bench, options.rounds),
        "batch": lambda: batch(bench, options.rounds, options.batch),
        "alone": lambda: alone(meter),
    }
    print(f"{options.shape}, {dtype}, {options.device}, {options.threads} threads\n")
    for part in PARTS:
        if part in options.only:
            rows += parts[part]()
            print(f"{part} done", flush=True)
    print(f"\n{table(rows)}")
    settings = {k: v for k, v in vars(options).items() if k != "json"} | {"dtype": dtype}
    save(rows, options.json, **settings)


if __name__ == "__main__":
    main()
