"""The engine: many requests at once on one cache. `step` is schedule, run, deliver.

Requests join and leave between steps. A reply depends only on its own prompt, settings and seed:
token for token it equals that of `generation/reference.py`. Several threads may drive one engine: a
thread that waits for an event runs the next step, for all requests. When a request is added, the
engine notices whether the transformer's weights, hooks or modules have changed, and rebuilds its
runner if so.
"""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import TracebackType

from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from earlyfusion.devices import dtype_name, is_out_of_memory
from earlyfusion.engine.blocks import BLOCK_SIZE, BlockPool
from earlyfusion.engine.cache import DTYPES, TOUCHED_AHEAD, PagedCache, cache_size, check_fp8
from earlyfusion.engine.cache import cache_dtype as dtype_of_cache
from earlyfusion.engine.handle import Handle, max_branches
from earlyfusion.engine.module_tree import CLASSES
from earlyfusion.engine.peers import peers_of
from earlyfusion.engine.runner import ModelRunner
from earlyfusion.engine.sampling import INVALID_TOKEN
from earlyfusion.engine.scheduler import Scheduler
from earlyfusion.engine.tensor_parallel import LeadingRunner
from earlyfusion.errors import (
    ContextError,
    EarlyFusionError,
    OutOfMemoryError,
    SettingError,
    WeightsError,
)
from earlyfusion.generation.grammar import Grammar
from earlyfusion.generation.request import Event, Request
from earlyfusion.generation.sampler import NOT_FINITE
from earlyfusion.model.kv_cache import dtype_and_device
from earlyfusion.model.transformer import Transformer
from earlyfusion.processor import Processor
from earlyfusion.vocabulary import ImageLayout

CPU_CHUNK, GPU_CHUNK = 64, 512
MOST_RUNNING = 256


class Engine:
    """Runs requests on one transformer.

    `cache_bytes` is the size of the cache (default: a share of the free memory, see `cache_size`).
    A prompt with its reply has at most `context_tokens` tokens (default: the model's limit). A step
    in which one request samples computes at most `chunk` tokens of prompts, more if several sample,
    and four times as many if none does (default: 64 on a CPU, 256 for bf16 weights on a CPU with
    AMX, 512 on a GPU; see `Scheduler`). At most `most_running` requests run at once.
    `cache_dtype` is the dtype of keys and values: "fp32", "bf16", "int8", or on newer GPUs "fp8"
    (default: the model's). With `static`, steps without prefill sample several tokens at a time
    (default: on a CUDA device, where these steps are captured graphs). `adapters` maps names that
    requests may ask for to transformers with other weights in their layers. Raises `SettingError`.
    """

    def __init__(
        self,
        transformer: Transformer,
        processor: Processor,
        cache_bytes: int | None = None,
        context_tokens: int | None = None,
        chunk: int | None = None,
        cache_dtype: str | None = None,
        most_running: int = MOST_RUNNING,
        static: bool | None = None,
        adapters: Mapping[str, Transformer] | None = None,
    ) -> None:
        self._static = static
        self.adapters = dict(adapters or {})
        if self.adapters and peers_of(transformer) is not None:
            raise SettingError(
                "a model on several processes has no adapters by name: use tensor_parallel=1"
            )
        self.context_tokens = context_tokens or transformer.config.max_position_embeddings
        self._cache_dtype = cache_dtype and dtype_name("cache_dtype", cache_dtype, tuple(DTYPES))
        model_dtype, device = dtype_and_device(transformer)
        dtype = dtype_of_cache(cache_dtype, model_dtype)
        check_fp8(dtype, device)
        token_bytes = PagedCache.token_bytes(transformer.config, dtype)
        self.cache_size = cache_size(token_bytes, self.context_tokens, device, cache_bytes)
        self.transformer, self.processor = transformer, processor
        self._chunk = chunk
        self._default_chunk = CPU_CHUNK if device.type == "cpu" else GPU_CHUNK
        self.most_running = most_running
        self._scheduler = Scheduler(
            BlockPool(self.cache_size.blocks),
            self._default_chunk if chunk is None else chunk,
            most_running,
        )
        self._handles: dict[int, Handle] = {}  # of requests under way, by number
        self._cancelled: deque[Handle] = deque()
        self._lock = _FairLock()
        self._load()

    def add(self, request: Request, priority: int = 0) -> Handle:
        """Queue a request; a smaller `priority` runs first. Raises what `check` raises, and
        `SettingError` for an unknown adapter. If the transformer has changed, the requests under
        way compute their tokens again."""
        self.check(request)
        if request.adapter and request.adapter not in self.adapters:
            raise SettingError.unknown("adapter", request.adapter, tuple(self.adapters))
        with self._lock:
            self._remove_cancelled()
            if fingerprint(self._models) != self._fingerprint:
                self._load()
            grammar = self.grammar(request.stops, request.layout)
            self.runner.sampler.allow(grammar)
            on_cancel = self._cancelled.append
            handle = Handle(request, self.processor, grammar, priority, self._wait, on_cancel)
            if not handle.finished:
                self._handles[handle.number] = handle
                self._scheduler.add(handle)
            return handle

    def check(self, request: Request) -> None:
        """Raise `ContextError` or `SettingError` for a request that can never run."""
        length, branches = len(request.ids) + request.max_tokens, max_branches(request)
        if length > self.context_tokens:
            raise ContextError(
                f"prompt and reply are {length:,} tokens, limit {self.context_tokens:,}: "
                "shorten the prompt or set max_tokens"
            )
        blocks = branches * -(-length // BLOCK_SIZE)
        if blocks > self.cache_size.blocks:
            needed = blocks * self.cache_size.block_bytes
            remedy = "set both guidances to 1" if branches > 1 else "set a smaller max_tokens"
            raise SettingError(
                f"this request may take {branches} x {length:,} tokens, the cache has "
                f"{self.cache_size.tokens:,}: give it {needed:,} bytes, or {remedy}"
            )

    def generate(self, request: Request) -> Iterator[Event]:
        """The events of one reply; closing the iterator early cancels the request."""
        return iter(self.add(request))

    def close(self) -> None:
        """End the requests under way; threads that wait for one get a `SettingError`."""
        with self._lock:
            closed = "the model was closed while this request ran: ask it again"
            self._abort_all(SettingError(closed))

    @property
    def busy(self) -> bool:
        """Whether any request has not ended."""
        with self._lock:
            self._remove_cancelled()
            return bool(self._handles)

    @property
    def preemptions(self) -> int:
        """How often a running request has lost its blocks to another one."""
        return self._scheduler.preemptions

    def warm_up(self, progress: Callable[[int, int], None] | None = None) -> int:
        """Capture the steps of a CUDA device now instead of at their first use. Calls
        `progress(captured, total)` after each. Returns the bytes of device memory that the captures
        take; 0 if this engine captures nothing."""
        with self._lock:
            return self.runner.warm_up(progress)

    @property
    def used_blocks(self) -> int:
        """Blocks of the cache that requests under way hold."""
        return len(self._scheduler.pool) - self._scheduler.pool.free

    def step(self) -> None:
        """Schedule, run, deliver. Requests whose prompt is computed get one or more tokens."""
        with self._lock:
            self._step()

    def _step(self) -> None:
        if self._cancelled:
            self._remove_cancelled()
        try:
            plan = self._scheduler.schedule()
            handles = [self._handles[entry.number] for entry in plan.ready]
            steps = self.runner.burst_length(plan, handles)
            if steps > 1:
                self._scheduler.grow(plan.ready, steps)
            sampled = self.runner.run(plan, handles, steps)
        except BaseException as error:
            if is_out_of_memory(error) and self._scheduler.running:
                return self._abort_newest(error)
            self._abort_all(error)
            raise
        for handle, tokens in zip(handles, sampled, strict=True):
            if INVALID_TOKEN in tokens:
                self._abort(handle, WeightsError(NOT_FINITE))
                continue
            try:
                self._deliver(handle, tokens)
            except Exception as error:
                self._abort(handle, error)

    def _abort(self, handle: Handle, error: BaseException) -> None:
        """End one request with an error, and clear the blocks that only it uses."""
        handle.error = error
        for branch in handle.branches:
            self.runner.clear(self._scheduler.pool.drop(branch))
        self._remove(handle)

    def _abort_newest(self, error: BaseException) -> None:
        """After running out of memory: end the last running request, and have the others compute
        their tokens again."""
        shortage = OutOfMemoryError(
            f"there was no memory for {len(self._scheduler.running)} requests at once, so this one "
            "ended: ask for fewer at once, or give the cache fewer bytes"
        )
        shortage.__cause__ = error
        newest = self._handles[self._scheduler.running[-1].number]
        newest.error = shortage
        self._remove(newest)
        # The failed step may have written only some of its keys and values.
        self._scheduler.restart()

    def _deliver(self, handle: Handle, tokens: Sequence[int]) -> None:
        if ended := handle.accept(tokens):
            self._scheduler.release(ended)
        if handle.finished:
            self._remove(handle)

    def _wait(self, handle: Handle) -> None:
        """Return when a handle has an event. Waiting threads take turns to run the steps. Raises
        the error that ended the request."""
        while not handle.events:
            with self._lock:
                # Another thread may have run the step meanwhile.
                if handle.events:
                    return
                if isinstance(handle.error, EarlyFusionError):
                    raise handle.error
                if handle.error is not None:
                    raise RuntimeError("the engine failed while this request ran") from handle.error
                if handle.number not in self._handles:
                    raise RuntimeError("this request was cancelled")
                self._step()

    def _remove_cancelled(self) -> None:
        """End cancelled requests."""
        # `cancel` only appends to a queue: the garbage collector may close an iterator at any
        # time, also within a step.
        while self._cancelled:
            self._remove(self._cancelled.popleft())

    def _remove(self, handle: Handle) -> None:
        if self._handles.pop(handle.number, None) is not None:
            self._scheduler.remove(handle)

    def _abort_all(self, error: BaseException) -> None:
        """End all requests with an error, and forget the content of all blocks."""
        # The failed step may have written only some of its keys and values.
        for handle in list(self._handles.values()):
            handle.error = error
            self._remove(handle)
        self._scheduler.pool.forget_all()

    def _load(self) -> None:
        """Build the runner from the transformer's modules: at the start, and after they changed."""
        self._grammars: dict[tuple[tuple[int, ...], ImageLayout], Grammar] = {}
        self._scheduler.restart()
        self._num_touched = 0  # blocks with memory, as far as `touch_memory` has taken it
        # The runner makes rotary tables of all positions, and no sequence is longer than the cache.
        longest = min(self.context_tokens, self.cache_size.tokens)
        blocks, dtype = self.cache_size.blocks, self._cache_dtype
        arguments = self.transformer, self.grammar(()), blocks, longest, dtype
        self.runner: ModelRunner = (
            ModelRunner(*arguments, self._static, self.adapters)
            if peers_of(self.transformer) is None
            else LeadingRunner(*arguments, self._static)
        )
        backend = self.runner.backend
        self._scheduler.pool.prefix_caching = not backend.needs_whole_prompts
        if backend.needs_whole_prompts:
            self._scheduler.chunk = sys.maxsize
        elif self._chunk is None:
            self._scheduler.chunk = self._default_chunk * backend.chunk_factor
        else:
            self._scheduler.chunk = self._chunk
        for handle in self._handles.values():
            handle.grammar_state.grammar = self.grammar(handle.request.stops, handle.request.layout)
            self.runner.sampler.allow(handle.grammar_state.grammar)
        # After the runner is built, which may replace parameters by views of fused ones.
        self._fingerprint = fingerprint(self._models)
        # Keep the modules alive: the fingerprint contains their ids, which Python would reuse.
        self._modules = [module for model in self._models for module in model.modules()]

    def touch_memory(self) -> bool:
        """Take the memory of one more block of a CPU's cache now, so that no request waits for it.
        Returns False if nothing is left to do: a context of unused blocks, or `TOUCHED_AHEAD`
        bytes of them, have their memory."""
        with self._lock:
            if self.runner.device.type != "cpu":
                return False
            pool = self._scheduler.pool
            ahead = min(
                pool.blocks_for(self.context_tokens),
                TOUCHED_AHEAD // self.cache_size.block_bytes,
            )
            block = max(self._num_touched, pool.num_ever_taken)
            if block >= min(pool.num_ever_taken + ahead, len(pool)):
                return False
            self.runner.clear([block])
            self._num_touched = block + 1
            return True

    @property
    def _models(self) -> list[Transformer]:
        return [self.transformer, *self.adapters.values()]

    def grammar(self, stops: tuple[int, ...], layout: ImageLayout | None = None) -> Grammar:
        """The grammar of requests with these stop ids and this layout; cached."""
        layout = layout or self.processor.layout
        if (stops, layout) not in self._grammars:
            vocabulary, size = self.processor.vocabulary, self.transformer.config.vocab_size
            device = dtype_and_device(self.transformer)[1]
            self._grammars[stops, layout] = Grammar(vocabulary, layout, stops, size, device)
        return self._grammars[stops, layout]


def fingerprint(modules: Iterable[nn.Module]) -> int:
    """A number that changes whenever a parameter or buffer is replaced or written to, and when a
    module is replaced, wrapped, hooked or given another `forward`. Modules are identified by `id`,
    so the caller must keep them alive."""
    state: list[object] = [bool(_has_any_global_hook()), *(c.forward for c in CLASSES)]
    stack = list(modules)
    # Runs for each request, so it is one loop without function calls: half the time of `modules()`,
    # which builds names and looks for duplicates.
    while stack:
        module = stack.pop()
        hooked = bool(module._forward_hooks or module._forward_pre_hooks)
        state += (id(module), type(module), hooked or "forward" in module.__dict__)
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                # An inference tensor has no version counter.
                version = 0 if tensor.is_inference() else tensor._version
                state += (tensor.data_ptr(), version)
        stack += [child for child in module._modules.values() if child is not None]
    return hash(tuple(state))


class _FairLock:
    """A lock that threads get in the order in which they asked for it: with a plain lock, a thread
    that steps in a loop could keep the others out. If the thread that holds it asks for it again,
    it gets a `SettingError` instead of waiting for itself."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._holder: int | None = None
        self._tickets = self._served = 0  # tickets handed out; tickets served
        self._abandoned: set[int] = set()  # tickets of threads that were interrupted while waiting

    def __enter__(self) -> None:
        if self._holder == threading.get_ident():
            raise SettingError(
                "the model is asked from within its own step, as by a logits processor: ask a copy "
                "of the model, or call its transformer"
            )
        with self._changed:
            ticket, self._tickets = self._tickets, self._tickets + 1
            try:
                self._changed.wait_for(lambda: self._served == ticket)
            except BaseException:
                self._abandoned.add(ticket)
                self._skip()
                raise
            self._holder = threading.get_ident()

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._changed:
            self._holder = None
            self._served += 1
            self._skip()

    def _skip(self) -> None:
        while self._served in self._abandoned:
            self._abandoned.remove(self._served)
            self._served += 1
        self._changed.notify_all()
