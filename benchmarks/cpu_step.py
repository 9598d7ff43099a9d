"""The compiled decode step beside transformers' `generate`, in bf16, int8 and int4: a table.

    python benchmarks/cpu_step.py --shape 1b --threads 2 --rounds 3

Random weights, greedy, one stream, the whole head (every row of the vocabulary) in both. All take
turns in each round; the table gives medians. transformers runs bf16 with its dynamic cache; its
time is that of many tokens less that of one, over their number. "3 rows" is what a step of an
image under three-branch guidance reads. Needs `pip install "earlyfusion[transformers]"` and g++.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from contenders import THEIRS, stock_of

from earlyfusion.bench.harness import OURS, Row, medians, save, seconds, table, take_turns
from earlyfusion.bench.shapes import SHAPES, random_transformer
from earlyfusion.engine.blocks import BLOCK_SIZE
from earlyfusion.engine.cache import PagedCache
from earlyfusion.kernels.cpu_step import CpuStep

CONTEXTS, BITS, PLACES = (32, 1057), (16, 8, 4), 1200


def stock_seconds(stock: Any, context: int, tokens: int) -> float:
    words = stock.config.vocab_size
    source = torch.Generator().manual_seed(0)
    ids = torch.randint(words // 2, words, (1, context), generator=source)

    def run(new: int) -> None:
        limits = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
        stock.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **limits)

    return (seconds(partial(run, tokens + 1)) - seconds(partial(run, 1))) / tokens


def step_seconds(step: CpuStep, head: Any, context: int, rows: int, tokens: int) -> float:
    each = -(-PLACES // BLOCK_SIZE)
    tables = torch.arange(rows * each).view(rows, each)
    addresses, positions = [table.data_ptr() for table in tables], torch.full((rows,), context)
    token_R, times = torch.full((rows,), 7), []

    def next_tokens() -> None:
        nonlocal token_R
        token_R = head(step.states(token_R, positions, addresses, False)).argmax(-1)

    for _ in range(tokens):
        times.append(seconds(next_tokens))
        positions += 1
    return median(times)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="1b")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = random_transformer(SHAPES[options.shape], torch.device("cpu"), torch.bfloat16)
    config, stock = model.config, stock_of(model.config, model)
    blocks = 3 * -(-PLACES // BLOCK_SIZE)
    cache_BL2KSH = PagedCache(config, blocks, PLACES, torch.bfloat16, torch.device("cpu")).kv_BL2KSH
    cache_BL2KSH.normal_()
    steps = {bits: CpuStep(model, cache_BL2KSH, PLACES, bits) for bits in BITS}
    heads = {bits: step.product(model.lm_head.weight) for bits, step in steps.items()}
    rows = []
    for context in CONTEXTS:
        contenders = {
            THEIRS: partial(stock_seconds, stock, context, options.tokens),
            **{
                (bits, number): partial(
                    step_seconds, steps[bits], heads[bits], context, number, options.tokens
                )
                for bits in BITS
                for number in (1, 3)
            },
        }
        times = medians(take_turns(contenders, options.rounds, warmup=0), 1e3)
        for bits in BITS:
            one, three = times[bits, 1], times[bits, 3]
            values = {OURS: one, f"{THEIRS}, bf16": times[THEIRS]}
            note = f"3 rows: {three:.2f} ms, {three / one:.2f} times one"
            rows.append(Row(f"a token in {bits} bits, context {context:,}", "ms", values, note))
    print(f"{options.shape}, {options.threads} threads\n\n{table(rows)}")
    save(rows, options.json, shape=options.shape, threads=options.threads)


if __name__ == "__main__":
    main()
