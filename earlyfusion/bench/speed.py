"""How fast a model is on this machine: what `earlyfusion bench` measures.

Text is random tokens and images are random pixels, new in each round, so that no prompt is in the
cache unless that is measured; figures are medians of the rounds. Some are compared with a limit of
the machine. Decoding a token must read the weights of the layers, the rows of the head for tokens
that may come next, and the keys and values of its context. The limit is these bytes divided by the
measured bandwidth of a sum over a large tensor. (Small weights fit into the processor's cache and
exceed this limit.) The limit of the prefill is its operations divided by the speed of a product of
square matrices.
"""

from __future__ import annotations

import gc
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any, ClassVar

import numpy as np
import PIL.Image
import torch
from torch import nn

from earlyfusion.api import Chameleon
from earlyfusion.bench.harness import medians, seconds, short, take_turns
from earlyfusion.bench.shapes import write_random
from earlyfusion.content import Image
from earlyfusion.errors import SettingError
from earlyfusion.generation.grammar import Grammar
from earlyfusion.generation.request import Request
from earlyfusion.generation.settings import Output, SamplingParams
from earlyfusion.kernels.cpu_step import weight_bits
from earlyfusion.model.quantise import PackedLinear
from earlyfusion.train.monitor import matmul_peak

SHORT, LONG = 32, 1000
"""Tokens of a short and of a long context."""
TOKENS = 24
"""Tokens that are decoded to measure the time of one."""
MAX_CODES = 64
"""Image tokens that are generated; the time of a larger image is extrapolated."""

GREEDY = {"temperature": 0.0, "image_temperature": 0.0}
PLAIN = {"guidance_text": 1.0, "guidance_image": 1.0}
GUIDED = {"guidance_text": 3.0, "guidance_image": 1.2}


@dataclass(frozen=True)
class Figure:
    """One line of the table; `of_limit` is the value as a share of the machine's limit."""

    name: str
    what: str
    value: float
    unit: str
    of_limit: float | None = None


@dataclass(frozen=True)
class Report:
    """The figures of a model, and the machine and settings that they hold for."""

    model: str
    dtype: str
    device: str
    threads: int
    rounds: int
    torch: str
    figures: list[Figure]

    def to_dict(self) -> dict[str, Any]:
        figures = {figure.name: asdict(figure) for figure in self.figures}
        return asdict(self) | {"figures": figures}

    @property
    def table(self) -> str:
        """Aligned lines for a terminal."""
        head = f"{self.model}, {self.dtype}, {self.device}, {self.threads} threads, "
        head += f"torch {self.torch}, medians of {self.rounds} rounds"
        return "\n".join([head, "", *(_line(figure) for figure in self.figures)])


def bench(
    name: str | None = None,
    shape: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    threads: int | None = None,
    rounds: int = 3,
    imports: float = 0.0,
    announce: Callable[[str], None] = lambda _: None,
) -> Report:
    """Measure a model by name or folder (default: "mini"), or random weights of a `shape`.
    `imports` are the seconds that importing this module took, a part of the cold start. `announce`
    is called with a sentence before each part. Raises `SettingError` and `CheckpointError`."""
    if name is not None and shape is not None:
        raise SettingError(f"model {name!r} and shape {shape!r} are both given: choose one of them")
    if rounds < 1:
        raise SettingError(f"rounds={rounds} measures nothing: use 1 or more")
    _use_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        if shape is not None:
            announce(f"initialising random weights of shape {shape}")
            write_random(shape, Path(folder) / "model")
        source = str(Path(folder) / "model") if shape else "mini" if name is None else name
        announce("loading and starting")
        model, figures = _cold_start(source, device, dtype, imports)
    meter = Meter(model, rounds)
    for measure in (meter.texts, meter.images, meter.tokenizer, meter.mixed):
        announce(f"measuring {measure.__name__}")
        figures += measure()
    figures += meter.limits()
    return Report(
        model=name or (f"random weights, shape {shape}" if shape else "mini"),
        dtype=dtype if dtype in ("int8", "int4") else _dtype_name(model.transformer.lm_head.weight),
        device=str(model.transformer.lm_head.weight.device),
        threads=torch.get_num_threads(),
        rounds=rounds,
        torch=torch.__version__,
        figures=figures,
    )


def _cold_start(
    source: str, device: str, dtype: str, imports: float
) -> tuple[Chameleon, list[Figure]]:
    """Load the model and generate one token: time and memory of a cold start."""
    memory_before, start = resident_bytes(), time.perf_counter()
    model = Chameleon.load(source, device=device, dtype=dtype)
    load_seconds = time.perf_counter() - start
    start = time.perf_counter()
    handle = model.engine.add(model.request("Hello", "text", seed=0))
    while not handle.tokens:
        model.engine.step()
    first = time.perf_counter() - start
    handle.cancel()
    figures = [
        Figure("imports", "importing torch and the package", imports, "s"),
        Figure("load", "loading the model", load_seconds, "s"),
        Figure("engine_first_token", "first token of a fresh engine", first, "s"),
        Figure("cold_start", "cold start to the first token", imports + load_seconds + first, "s"),
    ]
    figures += _memory_figures(memory_before, model.transformer.lm_head.weight.device)
    return model, figures + _cache_figures(model)


def _cache_figures(model: Chameleon) -> list[Figure]:
    """The size of the engine's cache."""
    size, context = model.engine.cache_size, model.engine.context_tokens
    full_requests = size.requests(context)
    return [
        Figure("cache", "cache of keys and values", size.bytes / 1e6, "MB"),
        Figure("cache_tokens", "tokens that it holds", size.tokens, ""),
        Figure("cache_requests_300", "requests of 300 tokens at once", size.requests(300), ""),
        Figure("cache_requests", f"requests of {context:,} tokens at once", full_requests, ""),
    ]


def _memory_figures(bytes_before: int | None, device: torch.device) -> list[Figure]:
    """The memory of the process, and how much of it came since there were `bytes_before`."""
    gc.collect()
    bytes_now, figures = resident_bytes(), []
    if bytes_before is not None and bytes_now is not None:
        growth = (bytes_now - bytes_before) / 1e6
        figures.append(Figure("idle_memory", "memory of the idle process", bytes_now / 1e6, "MB"))
        figures.append(Figure("model_memory", "of it, model and engine", growth, "MB"))
    if device.type == "cuda":
        gpu_memory = torch.cuda.memory_allocated(device) / 1e6
        figures.append(Figure("gpu_memory", "memory of the GPU, idle", gpu_memory, "MB"))
    return figures


class Meter:
    """Measures one model and its engine. `texts`, `images`, `tokenizer`, `mixed` and `limits`
    return lines of the table."""

    def __init__(self, model: Chameleon, rounds: int) -> None:
        self.model, self.rounds = model, rounds
        self.engine, self.config = model.engine, model.config
        self.layout = model.processor.layout
        self.device = model.transformer.lm_head.weight.device
        self._rng = random.Random(0)

    def texts(self) -> list[Figure]:
        """The first token and those after it, at a short and at a long context."""
        long = max(min(LONG, self.config.max_position_embeddings - TOKENS - 2), 2)
        figures = []
        for name, context in (("short", min(SHORT, long)), ("long", long)):
            times = take_turns({name: partial(self.reply, context)}, self.rounds)[name]
            first, step = map(median, zip(*times, strict=True))
            # The share of the machine's peak. Prefill of a short prompt is limited by reading the
            # weights, not by operations.
            prefill = self.operations(context) / first / self.peak if name == "long" else None
            decode = self.token_bytes(context) / self.bandwidth / step
            where = f"context {context:,}"
            figures += [
                Figure(f"first_{name}", f"first token, {where}", 1e3 * first, "ms", prefill),
                Figure(f"token_{name}", f"a token, {where}", 1e3 * step, "ms", decode),
            ]
        return figures

    def images(self) -> list[Figure]:
        """First token of a question about a new and a known image; generating an image."""
        new_seconds, known_seconds = [], []
        for number in range(self.rounds + 1):  # the first round is a warm-up
            image = self.random_image()
            new_seconds.append(self._first_token([image, "What is this?"], number))
            known_seconds.append(self._first_token([image, "What colour is it?"], number))
        new_ms, known_ms = 1e3 * median(new_seconds[1:]), 1e3 * median(known_seconds[1:])
        figures = [
            Figure("picture_new", "first token, new image", new_ms, "ms"),
            Figure("picture_known", "first token, known image", known_ms, "ms"),
        ]
        if not self.model.can_draw:
            return figures
        return figures + self._image_figures()

    def _image_figures(self) -> list[Figure]:
        """One and two guidance branches after a text, one and three after an image."""
        after_image: list[Any] = [self.random_image(), "Draw it again."]
        cases: list[tuple[str, str, Any, dict[str, float]]] = [
            ("plain", "image, unguided", "Draw a red apple.", PLAIN),
            ("guided", "image, guided", "Draw a red apple.", GUIDED),
            ("again", "image after image, unguided", after_image, PLAIN),
            ("again_guided", "image after image, guided", after_image, GUIDED),
        ]
        contenders = {
            name: partial(self.image_times, prompt, settings, count())
            for name, _, prompt, settings in cases
        }
        times = take_turns(contenders, self.rounds)
        image_ms = medians({name: [t for t, _ in pairs] for name, pairs in times.items()}, 1e3)
        step = medians({name: [t for _, t in pairs] for name, pairs in times.items()})
        two_branches = step["guided"] / step["plain"]
        three_branches = step["again_guided"] / step["again"]
        return [
            *(
                Figure(f"draw_{n}", f"codes of an {what}", image_ms[n], "ms")
                for n, what, *_ in cases
            ),
            Figure("step_2_branches", "step of 2 branches over 1", two_branches, "times"),
            Figure("step_3_branches", "step of 3 branches over 1", three_branches, "times"),
        ]

    def tokenizer(self) -> list[Figure]:
        """Pixels to codes and back."""
        tokenizer, shape = self.model.image_tokenizer, (1, self.layout.height, self.layout.width)
        codes = torch.from_numpy(np.zeros(shape, dtype=np.int64))
        encode = self._median_seconds(lambda: tokenizer.encode([self.random_image()]))
        figures = [Figure("encode", "an image to codes", 1e3 * encode, "ms")]
        if self.model.can_draw:
            decode = self._median_seconds(lambda: tokenizer.decode(codes))
            figures.append(Figure("decode", "codes to an image", 1e3 * decode, "ms"))
        return figures

    def mixed(self) -> list[Figure]:
        """The throughput of eight requests, texts and images, one by one and together; and the
        compilations while these run."""
        rates_alone, rates_together = [], []
        self._run_all(self._mixed_requests())  # warm-up
        with Compilations() as compilations:
            for _ in range(self.rounds):
                times, tokens = zip(
                    *(self._run_all([request]) for request in self._mixed_requests()), strict=True
                )
                rates_alone.append(sum(tokens) / sum(times))
                duration, num_tokens = self._run_all(self._mixed_requests())
                rates_together.append(num_tokens / duration)
        alone, together = median(rates_alone), median(rates_together)
        return [
            Figure("alone", "8 mixed requests one by one", alone, "tokens/s"),
            Figure("together", "8 mixed requests together", together, "tokens/s"),
            Figure("together_ratio", "together over one by one", together / alone, "times"),
            Figure("compilations", "compilations after warm-up", compilations.number, ""),
        ]

    def limits(self) -> list[Figure]:
        """The limits of the machine that figures are compared with."""
        weights = self.token_bytes(0) / 1e6
        dtype = _dtype_name(self.model.transformer.lm_head.weight)
        return [
            Figure("bandwidth", "bandwidth of memory (limit)", self.bandwidth / 1e9, "GB/s"),
            Figure("matmul_peak", f"{dtype} products (limit)", self.peak / 1e9, "GFLOP/s"),
            Figure("token_weights", "weights that a token reads", weights, "MB"),
        ]

    @cached_property
    def bandwidth(self) -> float:
        """Bytes per second of a sum over a tensor that no cache holds: the best of several."""
        size = 2**31 if self.device.type == "cuda" else 2**28
        values = torch.ones(size // 4, device=self.device)
        return size / min(seconds(values.sum, self.device) for _ in range(6))

    @cached_property
    def peak(self) -> float:
        """Operations per second of a product of square matrices, in the model's dtype."""
        return matmul_peak(self.device, self.model.transformer.lm_head.weight.dtype)

    def token_bytes(self, context: int, image: bool = False) -> float:
        """Bytes read to decode one token of text, or of an image, after `context` others. For
        several rows of a step, which read the weights once, `context` is the sum of theirs."""
        transformer, config = self.model.transformer, self.config
        head = transformer.lm_head.weight
        grammar = Grammar(self.model.processor.vocabulary, self.layout)
        rows = len(grammar.code_ids if image else grammar.text_ids)
        bits = weight_bits(transformer) or 8 * head.itemsize
        values = 2 * config.num_hidden_layers * config.kv_heads * config.head_dim * head.itemsize
        return sum(_linear_bytes(transformer)) + rows * head.shape[1] * bits / 8 + values * context

    def operations(self, tokens: int) -> float:
        """Operations of reading a prompt of this many tokens, without the head."""
        config = self.config
        width, inner = config.hidden_size, config.intermediate_size
        heads = 2 * width + 2 * config.kv_heads * config.head_dim
        matrices = config.num_hidden_layers * (heads * width + 3 * width * inner)
        attention = config.num_hidden_layers * width * tokens
        return 2.0 * tokens * (matrices + attention)

    def reply(self, context: int) -> tuple[float, float]:
        """Seconds to the first token of a new prompt, and of each token after it."""
        first_seconds, later_seconds, later_tokens = [], 0.0, 0
        for _ in range(8):  # a reply may end before it has `TOKENS` tokens
            handle = self.engine.add(self._request(context, TOKENS, GREEDY))
            first_seconds.append(seconds(partial(self._run_until, handle, 1), self.device))
            later_seconds += seconds(partial(self._run_until, handle, TOKENS), self.device)
            later_tokens += len(handle.tokens) - 1
            handle.cancel()
            if later_tokens >= TOKENS - 1:
                break
        return median(first_seconds), later_seconds / max(later_tokens, 1)

    def batch_throughput(self, number: int, context: int) -> tuple[float, float]:
        """Tokens per second of `number` texts at about this context, and their mean context."""
        # The first texts are decoded already while the last prompts are prefilled.
        max_tokens = min(TOKENS * 2 + 4 * number, self.config.max_position_embeddings // 2)
        context = max(2, min(context, self.config.max_position_embeddings - max_tokens))
        handles = [
            self.engine.add(self._request(context, max_tokens, GREEDY)) for _ in range(number)
        ]
        while not all(handle.tokens or handle.finished for handle in handles):
            self.engine.step()
        running = [handle for handle in handles if not handle.finished]
        tokens_before = sum(len(handle.tokens) for handle in running)
        duration = 1.0
        if running:
            duration = seconds(partial(self._run_until, running[-1], TOKENS), self.device)
        generated = sum(len(handle.tokens) for handle in running) - tokens_before
        for handle in handles:
            handle.cancel()
        mean_context = context + (tokens_before + generated / 2) / max(len(running), 1)
        return generated / duration, mean_context

    def _first_token(self, prompt: Any, seed: int) -> float:
        """Seconds to the first token of a reply, with the encoding of the prompt's images."""

        def reply() -> None:
            handle = self.engine.add(self.model.request(prompt, "text", seed=seed))
            self._run_until(handle, 1)
            handle.cancel()

        return seconds(reply)

    def image_times(
        self, prompt: Any, settings: dict[str, float], seeds: Iterator[int]
    ) -> tuple[float, float]:
        """Seconds from the prompt to the last code of an image, extrapolated from `MAX_CODES`
        codes; and seconds per step."""
        sampling = SamplingParams(**settings)  # type: ignore[arg-type]
        request = self.model.request(prompt, "image", sampling, next(seeds))
        handle, total = self.engine.add(request), self.layout.num_tokens
        # The first tokens, with the prefill, are timed apart from the steps that repeat.
        first_seconds = seconds(partial(self._run_until, handle, 3), self.device)
        num_first = len(handle.tokens)
        run_on = partial(self._run_until, handle, min(total, num_first + MAX_CODES))
        step_seconds = seconds(run_on, self.device) / max(len(handle.tokens) - num_first, 1)
        handle.cancel()
        return first_seconds + step_seconds * (total - num_first), step_seconds

    def _mixed_requests(self) -> Iterator[Request]:
        for number in range(8):
            settings: dict[str, float] = {} if number % 2 else (PLAIN | GREEDY)
            output: Output = "image" if number < 4 and self.model.can_draw else "text"
            yield self._request(SHORT + 24 * (number % 4), MAX_CODES, settings, output)

    def _request(
        self, context: int, tokens: int, settings: dict[str, float], output: Output = "text"
    ) -> Request:
        """A request for up to `tokens` tokens of text, or for one image, after a random prompt of
        `context` tokens (fewer if the model's context is too short)."""
        vocabulary = self.model.processor.vocabulary
        max_tokens = self.layout.num_tokens if output == "image" else tokens
        context = max(min(context, self.config.max_position_embeddings - max_tokens), 2)
        ids = [vocabulary.bos, *self._rng.choices(vocabulary.text_tokens.tolist(), k=context - 1)]
        sampling = SamplingParams(seed=self._rng.randrange(2**31), **settings)  # type: ignore[arg-type]
        resolved = sampling.resolved(self.model.defaults | {"repetition_penalty": 1.0})
        return Request(
            ids, output, replace(resolved, stop=None), int(output == "image"), max_tokens
        )

    def _run_all(self, requests: Sequence[Request] | Iterator[Request]) -> tuple[float, int]:
        """Run requests together until each has ended or has MAX_CODES tokens. Returns the seconds
        and the number of all tokens."""
        handles: list[Any] = []

        def run() -> None:
            handles.extend(self.engine.add(request) for request in requests)
            running = list(handles)
            while running:
                self.engine.step()
                for handle in running:
                    if len(handle.tokens) >= MAX_CODES:
                        handle.cancel()
                running = [h for h in running if not h.finished and len(h.tokens) < MAX_CODES]

        return seconds(run), sum(len(handle.tokens) for handle in handles)

    def _run_until(self, handle: Any, tokens: int) -> None:
        """Step the engine until a request has this many tokens, or has ended."""
        while len(handle.tokens) < tokens and not handle.finished:
            self.engine.step()

    def random_image(self) -> Image:
        """An image of random pixels, so that it is in no cache."""
        side = self.model.image_tokenizer.resolution
        pixels = np.frombuffer(self._rng.randbytes(3 * side * side), dtype=np.uint8)
        return Image(PIL.Image.fromarray(pixels.reshape(side, side, 3)))

    def _median_seconds(self, call: Callable[[], object]) -> float:
        timer = {"": partial(seconds, call, self.device)}
        return median(take_turns(timer, self.rounds)[""])


class Compilations:
    """Counts, within a `with` block, what steps must not do after the warm-up: compile graphs with
    torch, start programs (such as a compiler), load libraries."""

    _EVENTS = ("subprocess.Popen", "ctypes.dlopen")
    _counts: ClassVar[Counter[str]] = Counter()
    _is_hooked: ClassVar[bool] = False

    def __enter__(self) -> Compilations:
        if not Compilations._is_hooked:
            Compilations._is_hooked = True
            sys.addaudithook(self._count_event)  # once, as hooks cannot be removed
        self._total_before, self.number = self._total(), 0
        return self

    def __exit__(self, *_: object) -> None:
        self.number = self._total() - self._total_before

    @classmethod
    def _count_event(cls, event: str, _: object) -> None:
        if event in cls._EVENTS:
            cls._counts[event] += 1

    def _total(self) -> int:
        dynamo = sys.modules.get("torch._dynamo.utils")
        graphs = 0 if dynamo is None else dynamo.counters["stats"]["unique_graphs"]
        return int(graphs) + sum(self._counts[event] for event in self._EVENTS)


def resident_bytes() -> int | None:
    """Resident memory of this process; None where the system does not report it."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return None


def _linear_bytes(transformer: nn.Module) -> Iterator[int]:
    """The sizes of the matrices of the blocks, which each token reads."""
    for name, module in transformer.named_modules():
        if isinstance(module, PackedLinear):
            yield module.matrix.nbytes
        elif isinstance(module, nn.Linear) and name != "lm_head":
            yield module.weight.nbytes


def _use_threads(threads: int | None) -> None:
    if threads is None:
        return
    cores = os.cpu_count() or 1
    if not 1 <= threads <= cores:
        raise SettingError(
            f"threads={threads} is not possible on a machine of {cores} cores: give 1 to {cores}"
        )
    torch.set_num_threads(threads)


def _dtype_name(weight: torch.Tensor) -> str:
    return str(weight.dtype).removeprefix("torch.")


def _line(figure: Figure) -> str:
    number = short(figure.value)
    share = "" if figure.of_limit is None else f"   {figure.of_limit:.0%} of the limit"
    return f"{figure.what:<40}{number:>12} {figure.unit:<9}{share}".rstrip()
