"""Keys and values in fp32, bf16 and int8: two tables in Markdown.

    python benchmarks/cache.py --data emoji/data --images 40 --rounds 5 --threads 2

The first table takes the embedded model: questions about images are answered greedily with each
cache, and the answer of the fp32 cache is then read through each. KL is that of the next token's
distribution from the fp32 cache's, in nats, a mean over the answers' tokens; the agreement is the
share of greedy tokens that stand where they stand with fp32, and of whole answers. Without --data
images are random codes. The second is a step of one row and of three of the compiled step, mini's
shape, random weights; the caches take turns in each round, and the table gives medians.
"""

from __future__ import annotations

import argparse
import random
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from statistics import mean, median

import torch
from torch import Tensor

from earlyfusion import Chameleon, Image, SamplingParams
from earlyfusion.bench.harness import heading, line, medians, seconds, take_turns
from earlyfusion.config import PRESETS
from earlyfusion.engine.blocks import BLOCK_SIZE, Branch
from earlyfusion.engine.cache import DTYPES, PagedCache
from earlyfusion.engine.engine import Engine
from earlyfusion.engine.runner import ModelRunner
from earlyfusion.engine.scheduler import Piece, Plan, Step
from earlyfusion.generation.request import Request
from earlyfusion.kernels.cpu_step import CpuStep
from earlyfusion.mini.emoji.dataset import EmojiData
from earlyfusion.model.transformer import Transformer

CACHES = {name: DTYPES[name] for name in ("fp32", "bf16", "int8")}  # fp8 needs a GPU
QUESTIONS = ("What is this?", "Describe the picture.", "이것은 무엇인가요?", "What colour is it?")
CONTEXTS, BLOCKS = (32, 1057), 38  # of 1,200 tokens
Answers = list[list[int]]


def requests(model: Chameleon, folder: str | None, number: int) -> list[Request]:
    rng, data = random.Random(0), EmojiData(folder) if folder else None
    ids = rng.sample(data.split("val"), number) if data else []
    asked = []
    for count in range(number):
        if data:
            image = Image(data.image(ids[count]))
        else:
            codes = torch.tensor(rng.choices(range(1024), k=64)).view(1, 8, 8)
            image = Image(model.image_tokenizer.decode(codes)[0])
        question, greedy = QUESTIONS[count % len(QUESTIONS)], SamplingParams(temperature=0)
        asked.append(model.request([image, question], "text", greedy, seed=0))
    return asked


def answers(model: Chameleon, asked: Sequence[Request], kept: str) -> Answers:
    engine = Engine(model.transformer, model.processor, cache_dtype=kept)
    handles = [engine.add(request) for request in asked]
    while engine.busy:
        engine.step()
    return [handle.tokens for handle in handles]


@torch.inference_mode()
def distributions(runner: ModelRunner, ids: Sequence[int], answer: Sequence[int]) -> Tensor:
    """Log probabilities of each token of an answer, which is read token by token."""
    blocks = range(-(-(len(ids) + len(answer)) // BLOCK_SIZE))
    branch = Branch([*ids, *answer], array("q", blocks))
    runner.run(Plan([], [Piece(branch, 0, len(ids) - 1)], []), [])
    logits = []
    for place in range(len(ids) - 1, len(ids) + len(answer) - 1):
        step = Step([Piece(branch, place, 1)])
        x_TD = runner.backend.hidden_states(step)
        logits.append(runner.sampler.text_head.logits(x_TD)[0].float())
    return torch.stack(logits).log_softmax(-1)


def quality(folder: str | None, images: int) -> None:
    model = Chameleon.load("mini", device="cpu")
    config, own = model.transformer.config, model.transformer.lm_head.weight.dtype
    length = config.max_position_embeddings
    asked = requests(model, folder, images)
    wanted = answers(model, asked, "fp32")
    grammar = model.engine.grammar(())
    runners = {
        kept: ModelRunner(model.transformer, grammar, -(-length // BLOCK_SIZE), length, kept)
        for kept in CACHES
    }
    true = [
        distributions(runners["fp32"], request.ids, answer)
        for request, answer in zip(asked, wanted, strict=True)
    ]
    print(f"mini in {own}, {images} images, {sum(map(len, wanted))} tokens of answers\n")
    columns = ("KL", "mean difference of p", "tokens equal", "answers equal")
    print(heading("cache", "bytes per token", *columns))
    for kept, dtype in CACHES.items():
        divergences, differences = list[float](), list[float]()
        for request, answer, p in zip(asked, wanted, true, strict=True):
            q = distributions(runners[kept], request.ids, answer)
            divergences += (p.exp() * (p - q)).sum(-1).tolist()
            differences += (p.exp() - q.exp()).abs().sum(-1).div(2).tolist()
        given = answers(model, asked, kept)
        pairs = zip(wanted, given, strict=True)
        equal = [i < len(y) and y[i] == token for x, y in pairs for i, token in enumerate(x)]
        whole = mean(x == y for x, y in zip(wanted, given, strict=True))
        cells = f"{mean(divergences):.2e}", f"{mean(differences):.2e}", f"{mean(equal):.4f}"
        print(line(kept, f"{PagedCache.token_bytes(config, dtype):,}", *cells, f"{whole:.3f}"))


def median_seconds(call: Callable[[], object], repeats: int) -> float:
    # Of one thread the processor's time, so that other work on the machine is not counted.
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    return median(seconds(call, clock=clock) for _ in range(repeats))


@torch.inference_mode()
def speed(rounds: int) -> None:
    config = replace(PRESETS["mini"], max_position_embeddings=2048)
    model = Transformer(config).eval().requires_grad_(False)
    model.init_weights(torch.Generator().manual_seed(0))
    steps: dict[str, CpuStep] = {}
    for kept, dtype in CACHES.items():
        cache = PagedCache(config, 3 * BLOCKS, 1200, dtype, torch.device("cpu"))
        for layer in cache.layers:
            tokens = torch.arange(3 * BLOCKS * BLOCK_SIZE)
            new = torch.randn(2, len(tokens), config.kv_heads, config.head_dim)
            layer.store(tokens // BLOCK_SIZE, tokens % BLOCK_SIZE, *new)
        steps[kept] = CpuStep(model, cache.kv_BL2KSH, 1200, 32, cache.scales_BL2KS)
    tables = torch.arange(3 * BLOCKS).view(3, BLOCKS)
    cases = [(rows, context) for context in CONTEXTS for rows in (1, 3)]
    contenders = {}
    for rows, context in cases:
        addresses = [table.data_ptr() for table in tables[:rows]]
        given = torch.full((rows,), 7), torch.full((rows,), context), addresses, False
        for name, step in steps.items():
            read = partial(step.states, *given)
            contenders[name, rows, context] = partial(median_seconds, read, 8)
    times = medians(take_turns(contenders, rounds, warmup=0), 1e3)
    print()
    print(heading("cache", *(f"{r} rows, context {c:,}, ms" for r, c in cases)))
    for name in steps:
        print(line(name, *(f"{times[name, rows, context]:.3f}" for rows, context in cases)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="the folder of the emoji data")
    parser.add_argument("--images", "--pictures", type=int, default=40, help="0: only the times")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.images:
        quality(options.data, options.images)
    speed(options.rounds)


if __name__ == "__main__":
    main()
