"""The compiled decode step beside transformers' `generate`, in bf16, int8 and int4: a table.

    python benchmarks/cpu_step.py --shape 1b --threads 2 --rounds 3

Random weights, greedy, one stream, the whole head (every row of the vocabulary) in both. All take
turns in each round; the table gives medians. transformers runs bf16 with its dynamic cache; its
time is that of many tokens less that of one, over their number. "3 rows" is what a step of a
picture under three-branch guidance reads. Needs `pip install "earlyfusion[transformers]"` and g++.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from transformers import ChameleonConfig, ChameleonForConditionalGeneration

from earlyfusion.config import PRESETS, ModelConfig
from earlyfusion.engine.cpu_step import CpuStep
from earlyfusion.model.transformer import Transformer

CONTEXTS, BITS, PLACES = (32, 1057), (16, 8, 4), 1200
SIZES = {
    "mini": (256, 704, 6, 4, 4096),
    "110m": (768, 2048, 12, 12, 16384),
    "1b": (2048, 5632, 16, 16, 65536),
}


def config_of(shape: str) -> ModelConfig:
    width, inner, layers, heads, words = SIZES[shape]
    return replace(
        PRESETS["mini"],
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=words,
        max_position_embeddings=2048,
    )


def stock_of(config: ModelConfig, ours: Transformer) -> Any:
    names = {"<s>": 0, "<pad>": 1, "</s>": 2, "<image>": 3}
    codes = config.vq_config.num_embeddings
    names |= {f"IMGIMG{chr(65 + i // 26 % 26)}{chr(65 + i % 26)}Z": i + 4 for i in range(codes)}
    settings = {k: v for k, v in config.to_dict().items() if k != "vocabulary_map"}
    stock = ChameleonForConditionalGeneration(ChameleonConfig(**settings, vocabulary_map=names))
    stock = stock.to(torch.bfloat16).eval()
    stock.load_state_dict(ours.state_dict(), strict=False)
    stock.generation_config.eos_token_id = None
    stock.generation_config.pad_token_id = 1
    return stock


def stock_seconds(stock: Any, context: int, tokens: int) -> float:
    ids = torch.randint(2000, 4000, (1, context), generator=torch.Generator().manual_seed(0))

    def run(new: int) -> float:
        start = time.perf_counter()
        mask = torch.ones_like(ids)
        limits = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
        stock.generate(input_ids=ids, attention_mask=mask, **limits)
        return time.perf_counter() - start

    return (run(tokens + 1) - run(1)) / tokens


def step_seconds(step: CpuStep, head: Any, context: int, rows: int, tokens: int) -> float:
    slots, lengths = torch.arange(rows), torch.full((rows,), context)
    drawn, times = torch.full((rows,), 7), []
    for _ in range(tokens):
        start = time.perf_counter()
        drawn = head(step.states(drawn, slots, lengths)).argmax(-1)
        times.append(time.perf_counter() - start)
        lengths = lengths + 1
    return median(times)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=sorted(SIZES), default="1b")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    config = config_of(options.shape)
    model = Transformer(config).eval().requires_grad_(False).to(torch.bfloat16)
    model.init_weights(torch.Generator().manual_seed(0))
    stock = stock_of(config, model)
    size = (2, 3, config.kv_heads, PLACES, config.head_dim)
    cache = [torch.randn(size).bfloat16() for _ in range(config.num_hidden_layers)]
    steps = {bits: CpuStep(model, cache, bits) for bits in BITS}
    heads = {bits: step.product(model.lm_head.weight) for bits, step in steps.items()}
    print(f"{options.shape}, {options.threads} threads; milliseconds a token\n")
    print("| context | transformers bf16 | bits | 1 row | times as fast | 3 rows |")
    print("| --- | --- | --- | --- | --- | --- |")
    for context in CONTEXTS:
        theirs: list[float] = []
        ours: dict[tuple[int, int], list[float]] = {(b, r): [] for b in BITS for r in (1, 3)}
        for _ in range(options.rounds):
            theirs.append(stock_seconds(stock, context, options.tokens))
            for (bits, rows), times in ours.items():
                step, head = steps[bits], heads[bits]
                times.append(step_seconds(step, head, context, rows, options.tokens))
        stock_ms = 1e3 * median(theirs)
        for bits in BITS:
            one, three = (1e3 * median(ours[bits, rows]) for rows in (1, 3))
            cells = f"{stock_ms:.1f} | {bits} | {one:.2f} | {stock_ms / one:.2f} | {three:.2f}"
            print(f"| {context:,} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
