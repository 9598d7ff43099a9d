"""The reference loop that defines what is correct: one request, one token at a time. The engine
must sample the same tokens.

`generate_tokens` gives the tokens of a reply, `generate` its events. One `Reader` reads the whole
history, text and images. When a guided image begins, readers for the other conditions are opened;
when it ends, they are dropped. With `jacobi`, several codes of an image are sampled at a time
(generation/jacobi.py).
"""

# Shapes: B rows (one here), T tokens, W positions of a window of codes, V vocabulary.

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing

import torch
from torch import Tensor

from earlyfusion.errors import WeightsError
from earlyfusion.generation import guidance, jacobi
from earlyfusion.generation.event_builder import EventBuilder, GrammarState
from earlyfusion.generation.grammar import SLOT, Grammar
from earlyfusion.generation.jacobi import Window
from earlyfusion.generation.request import Event, Request, TokenLogprob
from earlyfusion.generation.sampler import (
    NEG_INF,
    NOT_FINITE,
    Sampler,
    SamplingTensors,
    can_sample,
    generator,
    uniforms,
    warp,
)
from earlyfusion.generation.settings import guidance_weights, seed_of
from earlyfusion.generation.steering import Steering
from earlyfusion.model.kv_cache import KVCache, dtype_and_device
from earlyfusion.model.transformer import Transformer
from earlyfusion.processor import Processor


def generate(transformer: Transformer, processor: Processor, request: Request) -> Iterator[Event]:
    """The events of one reply. Closing the iterator early frees its caches. Raises `WeightsError`
    if the weights give numbers that are not finite."""
    grammar = _grammar(transformer, processor, request)
    grammar_state = GrammarState(grammar, request.output, request.max_images, request.max_tokens)
    event_builder = EventBuilder(processor, request, grammar_state)
    with closing(_generate_with_logprobs(transformer, processor, request)) as tokens:
        for token, logprob in tokens:
            yield from event_builder.push(token, logprob)
            if event_builder.ended:
                break
            grammar_state.advance(token)
    yield from event_builder.finish()


def generate_tokens(
    transformer: Transformer, processor: Processor, request: Request
) -> Generator[int, None, None]:
    """The new tokens of one reply, including image markers and the closing stop token."""
    with closing(_generate_with_logprobs(transformer, processor, request)) as tokens:
        for token, _ in tokens:
            yield token


@torch.inference_mode()
def _generate_with_logprobs(
    transformer: Transformer, processor: Processor, request: Request
) -> Generator[tuple[int, TokenLogprob | None], None, None]:
    run = Run(transformer, processor, request)
    while not run.done:
        tokens = run.sample()
        for token in tokens:
            yield token, run.logprob
        run.read(tokens)


def _grammar(transformer: Transformer, processor: Processor, request: Request) -> Grammar:
    device, size = dtype_and_device(transformer)[1], transformer.config.vocab_size
    layout = request.layout or processor.layout
    return Grammar(processor.vocabulary, layout, request.stops, size, device)


class Reader:
    """One sequence and its cache."""

    def __init__(self, transformer: Transformer, length: int) -> None:
        dtype, self._device = dtype_and_device(transformer)
        self._transformer = transformer
        self._cache = KVCache(transformer.config, 1, length, dtype, self._device)
        self._read = 0

    def read(self, tokens: Sequence[int], drafts: Sequence[int] = ()) -> Tensor:
        """Append tokens to the sequence; returns logits [1, V] in fp32 of the next token. Each
        draft adds a row of logits after it, but is not appended: the next tokens overwrite
        drafts."""
        # This reader's cache has one slot.
        tokens_BT = torch.tensor([[*tokens, *drafts]], device=self._device)
        slot_B = torch.zeros(1, dtype=torch.int64, device=self._device)
        length_B = torch.full_like(slot_B, self._read)
        positions_BT = length_B[:, None] + torch.arange(tokens_BT.shape[1], device=self._device)
        attends = self._cache.attends(slot_B, length_B)
        logits_BTV: Tensor = self._transformer(
            tokens_BT, positions_BT, attends, last_only=not drafts
        )
        self._read += len(tokens)
        return logits_BTV[0, -1 - len(drafts) :].float()


class Run:
    """The state of one request between two tokens."""

    def __init__(self, transformer: Transformer, processor: Processor, request: Request) -> None:
        self._transformer, self._vocabulary = transformer, processor.vocabulary
        self._request = request
        self._layout = request.layout or processor.layout
        self._sampling = request.sampling
        steered = bool(request.sampling.steered)
        self._steering = Steering(processor, request) if steered else None
        self._negative = guidance.negative_prompt_ids(processor, request.sampling)
        self.logprob: TokenLogprob | None = None
        self._grammar = _grammar(transformer, processor, request)
        device = self._grammar.device
        self._state = self._grammar.start(
            [request.output], [request.max_images], [request.max_tokens]
        )
        self._sampler = Sampler([request.sampling], device)
        self._seed = seed_of(request.sampling)
        self._guidance = guidance_weights(request.sampling)
        self._generator = generator(self._seed)
        self._window: Window | None = None
        self._history = list(request.ids)
        self._prompt_length = len(self._history)
        size = transformer.config.vocab_size
        self._seen_BV = torch.zeros(1, size, dtype=torch.bool, device=device)
        self._seen_BV[:, self._history] = True
        self._readers: dict[guidance.Condition, Reader] = {
            "full": Reader(transformer, len(request.ids) + request.max_tokens)
        }
        self.logits: dict[guidance.Condition, Tensor] = {
            "full": self._readers["full"].read(self._history)
        }

    @property
    def done(self) -> bool:
        return bool(self._grammar.done(self._state))

    def sample(self) -> list[int]:
        """The next tokens: one, or all final ones of a window of codes."""
        logits_WV = guidance.combine_needed(self.logits, *self._guidance)
        allowed_BV = self._grammar.mask(self._state)
        if not can_sample(logits_WV.masked_fill(~allowed_BV, NEG_INF)).all():
            raise WeightsError(NOT_FINITE)
        # Each token uses up one random number, even if it is forced or sampled in a window, so that
        # later text gets the same numbers in all cases.
        uniform_B = uniforms([self._generator]).to(self._seen_BV.device)
        if self._sampling.jacobi and self._codes_left:
            tokens = self._sample_codes(logits_WV.masked_fill(~allowed_BV, NEG_INF))
            for _ in tokens[1:]:
                uniforms([self._generator])
        else:
            tokens = self._sample_one(logits_WV, allowed_BV, uniform_B)
        for token in tokens:
            self._state = self._grammar.advance(self._state, self._state.new_tensor([token]))
        return tokens

    def _sample_one(self, logits_BV: Tensor, allowed_BV: Tensor, uniform_B: Tensor) -> list[int]:
        # Tokens that the grammar forces are not steered and have no log-probability.
        steering = self._steering if int(allowed_BV.sum()) > 1 else None
        if steering is not None:
            logits_BV = steering.change(self._history, logits_BV[0], allowed_BV[0])[None]
        in_image_B = self._grammar.in_image(self._state)
        sampled_B = self._sampler.sample(
            logits_BV, allowed_BV, self._seen_BV, in_image_B, uniform_B
        )
        [token] = sampled_B.tolist()
        full_V = self.logits["full"][0]
        self.logprob = None if steering is None else steering.logprob(full_V, token)
        return [token]

    @property
    def _codes_left(self) -> int:
        return self._grammar.codes_ahead[int(self._state[0, SLOT])]

    def _sample_codes(self, logits_WV: Tensor) -> list[int]:
        if self._window is None:
            start = len(self._history) - self._prompt_length
            self._window = Window(self._sampling.jacobi or 0, self._seed, start)
        window, left = self._window, self._codes_left
        # Greedy: `accept` keeps the drafts that equal the likeliest codes.
        if self._sampling.image_temperature == 0:
            return window.accept(logits_WV.argmax(-1).tolist(), left)
        settings = SamplingTensors.image([self._sampling] * window.positions, logits_WV.device)
        tokens_W = jacobi.sample([window], [window.drafts], warp(logits_WV, settings))
        return window.accept(tokens_W.tolist(), left)

    def read(self, tokens: Sequence[int]) -> None:
        """Read the sampled tokens, which gives the logits of the next one."""
        if self.done:
            return
        self._history += tokens
        self._seen_BV[:, tokens] = True
        # begin_image is never sampled in a window, so it is the only token here.
        opens = tokens[-1] == self._vocabulary.begin_image
        if opens or not self._grammar.in_image(self._state):
            self._readers, self._window = {"full": self._readers["full"]}, None
        drafts = self._window.drafts if self._window else ()
        self.logits = {name: r.read(tokens, drafts) for name, r in self._readers.items()}
        if opens:
            self._open_branches()

    def _open_branches(self) -> None:
        has_images = guidance.has_images(self._history, self._vocabulary)
        for name in guidance.needed_conditions(*self._guidance, has_images)[1:]:
            prompt = guidance.condition_prompt(
                name, self._history, self._vocabulary, self._layout, self._negative
            )
            length = len(prompt) + self._grammar.image_tokens
            self._readers[name] = Reader(self._transformer, length)
            self.logits[name] = self._readers[name].read(prompt)
