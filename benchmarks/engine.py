"""The engine beside transformers' own Chameleon, and beside itself: a table in Markdown.

    python benchmarks/engine.py                      # mini's shape, random weights, one thread
    python benchmarks/engine.py --shape 110m --threads 2 --rounds 5

Contenders take turns in every round, and the table gives medians, so that a busy machine slows all
alike. `--clock process` counts processor time instead of time on the wall: for one thread on a
machine that has other work to do. Both models have the same weights; transformers runs `generate`,
greedy, with its dynamic cache. transformers is needed (pip install "earlyfusion[transformers]").
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from transformers import ChameleonForConditionalGeneration

from earlyfusion import Chameleon, Image, SamplingParams
from earlyfusion.checkpoints import formats
from earlyfusion.config import PRESETS
from earlyfusion.engine.engine import Engine
from earlyfusion.generation.reference import Request
from earlyfusion.hf import ChameleonConfig
from earlyfusion.model.transformer import Transformer
from earlyfusion.processor import Processor

CONTEXTS = (32, 1057)
SHAPES = {
    "mini": (replace(PRESETS["mini"], max_position_embeddings=2048), torch.float32),
    "110m": (
        replace(
            PRESETS["mini"],
            vocab_size=16384,
            hidden_size=768,
            intermediate_size=2048,
            num_hidden_layers=12,
            num_attention_heads=12,
            max_position_embeddings=2048,
        ),
        torch.bfloat16,
    ),
}
GREEDY = {"temperature": 0, "image_temperature": 0}
PLAIN = {"guidance_text": 1, "guidance_image": 1}
Clock = Callable[[], float]


class Bench:
    """Both models of one shape, and requests to them."""

    def __init__(self, shape: str, clock: Clock, tokens: int) -> None:
        config, self.dtype = SHAPES[shape]
        self.processor: Processor = formats.load("mini", torch.device("cpu"), None).processor
        self.transformer = Transformer(config).eval()
        self.transformer.init_weights(torch.Generator().manual_seed(0))
        self.transformer.to(self.dtype)
        self.engine = Engine(self.transformer, self.processor)
        self.clock, self.tokens = clock, tokens
        names = self.processor.vocabulary.names
        self.stock_config = ChameleonConfig(**config.to_dict(), vocabulary_map=names)
        self._stock: Any = None

    @property
    def stock(self) -> Any:
        if self._stock is None:
            self._stock = ChameleonForConditionalGeneration(self.stock_config).to(self.dtype).eval()
            self._stock.load_state_dict(self.transformer.state_dict(), strict=False)
            self._stock.generation_config.eos_token_id = None
            self._stock.generation_config.pad_token_id = 1
        return self._stock

    def request(self, context: int, seed: int, output: Any = "text", **settings: Any) -> Request:
        """A prompt of `context` tokens of text, with a picture in it where there is room."""
        vocabulary, rng = self.processor.vocabulary, random.Random(seed)
        ids = [vocabulary.bos, *rng.choices(vocabulary.text_tokens.tolist(), k=context - 1)]
        if context > 2 * self.processor.layout.num_tokens:
            shown = rng.choices(range(vocabulary.num_codes), k=self.processor.layout.num_codes)
            side = self.processor.layout.width
            grid = [shown[at : at + side] for at in range(0, len(shown), side)]
            spelled = self.processor.layout.spell(grid, vocabulary)
            ids[1 : 1 + len(spelled)] = spelled
        sampling = SamplingParams(**({"seed": seed} | settings)).resolved({})
        room = self.processor.layout.num_tokens if output == "image" else self.tokens
        return Request(ids, output, sampling, int(output == "image"), room)

    def steps(self, requests: Iterable[Request]) -> list[float]:
        """Seconds of each step until all are done."""
        self.engine._scheduler.slots.forget()
        for request in requests:
            self.engine.add(request)
        times = []
        while self.engine.busy:
            start = self.clock()
            self.engine.step()
            times.append(self.clock() - start)
        return times

    def stock_seconds(self, ids: list[int], tokens: int) -> float:
        start = self.clock()
        given = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids)).long()}
        self.stock.generate(**given, do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens)
        return self.clock() - start


def against_stock(bench: Bench, context: int, rounds: int) -> list[tuple[str, float, float]]:
    """Decoding a token and reading the prompt: (what, transformers, engine), milliseconds."""
    asked = bench.request(context, 0, **GREEDY)
    ids = list(asked.ids)
    rows: list[tuple[float, float, float, float]] = []
    bench.stock_seconds(ids, 3)
    bench.steps([asked])
    for _ in range(rounds):
        first = bench.stock_seconds(ids, 1)
        rest = bench.stock_seconds(ids, bench.tokens) - first
        times = bench.steps([asked])
        singles = times[-(bench.tokens - 1) :]
        prompt = sum(times) - sum(singles)
        rows.append((rest / (bench.tokens - 1), median(singles), first, prompt))
    decode, own, first, prompt = (1e3 * median(column) for column in zip(*rows, strict=True))
    where = f"context {context:,}"
    return [(f"a token, {where}", decode, own), (f"first token, {where}", first, prompt)]


def guided(bench: Bench, context: int, rounds: int) -> tuple[float, float, int]:
    """A step of a picture without guidance and with it, and the branches of the latter."""
    one = bench.request(context, 1, "image", **PLAIN)
    more = bench.request(context, 1, "image", guidance_text=3, guidance_image=1.2)
    pairs = [(median(bench.steps([one])), median(bench.steps([more]))) for _ in range(rounds)]
    branches = 3 if context > 2 * bench.processor.layout.num_tokens else 2
    return *(1e3 * median(column) for column in zip(*pairs, strict=True)), branches


def eight(bench: Bench, rounds: int) -> tuple[float, float]:
    """Eight requests of about one length one by one, and together: seconds."""
    tokens, bench.tokens = bench.tokens, bench.processor.layout.num_tokens
    asked = [bench.request(32 + 24 * i, i, "image", **(PLAIN if i % 2 else {})) for i in range(4)]
    asked += [bench.request(32 + 40 * i, i, "text", **(GREEDY if i % 2 else {})) for i in range(4)]
    bench.tokens = tokens
    pairs = []
    for _ in range(rounds):
        alone = sum(sum(bench.steps([request])) for request in asked)
        pairs.append((alone, sum(bench.steps(asked))))
    return median(alone for alone, _ in pairs), median(both for _, both in pairs)


def repeated_picture(clock: Clock, rounds: int) -> tuple[float, float]:
    """Seconds to the first token of the embedded model for a new picture, and for a known one."""
    model, rng = Chameleon.load("mini", device="cpu"), random.Random(0)
    for kv_2SKPH in model.engine._runner._cache.layers:
        kv_2SKPH.zero_()  # memory is taken when it is first written to: not what is measured here
    cold: list[float] = []
    warm: list[float] = []
    for number in range(rounds + 1):
        codes = torch.tensor(rng.choices(range(1024), k=64)).view(1, 8, 8)
        picture = Image(model.image_tokenizer.decode(codes)[0])
        for times, question in ((cold, "What is this?"), (warm, "What colour is it?")):
            start = clock()
            handle = model.engine.add(model.request([picture, question], "text", seed=number))
            while not handle.tokens:
                model.engine.step()
            times.append(clock() - start)
            handle.cancel()
    return median(cold[1:]), median(warm[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="mini")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=32, help="tokens to decode in a round")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=("wall", "process"), default="wall")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.perf_counter if options.clock == "wall" else time.process_time
    bench = Bench(options.shape, clock, options.tokens)
    print(f"{options.shape}, {bench.dtype}, {options.threads} threads, {options.clock} time\n")
    print("| what | transformers, ms | engine, ms | times as fast |\n| --- | --- | --- | --- |")
    for context in CONTEXTS:
        for what, theirs, ours in against_stock(bench, context, options.rounds):
            print(f"| {what} | {theirs:.2f} | {ours:.2f} | {theirs / ours:.2f} |", flush=True)
    print("\n| engine alone | before | after | ratio |\n| --- | --- | --- | --- |")
    for context in (32, 512):
        one, more, branches = guided(bench, context, options.rounds)
        what = f"step of a picture, 1 and {branches} branches, context {context}"
        print(f"| {what} | {one:.2f} ms | {more:.2f} ms | {more / one:.2f} |", flush=True)
    alone, together = eight(bench, options.rounds)
    what, ratio = "8 mixed requests, one by one and together", f"{alone / together:.2f}"
    print(f"| {what} | {alone:.2f} s | {together:.2f} s | {ratio} |", flush=True)
    cold, warm = repeated_picture(clock, options.rounds)
    what, ratio = "first token, new picture and known one (mini)", f"{cold / warm:.1f}"
    print(f"| {what} | {1e3 * cold:.1f} ms | {1e3 * warm:.1f} ms | {ratio} |")


if __name__ == "__main__":
    main()
