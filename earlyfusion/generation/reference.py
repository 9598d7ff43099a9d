"""The plain loop that defines correct: one request, one token at a time, no tricks.

`draw_tokens` gives tokens, `Narrator` turns them into events, `generate` joins the two. The full
branch keeps its cache through every change of modality; a guided image opens the other branches
where it begins and drops them where it ends. With `jacobi` the codes of an image are drawn several
at a time (generation/jacobi.py).
Shapes: B rows (one here), T tokens, W places of a window of codes, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing

import torch
from torch import Tensor

from earlyfusion.errors import WeightsError
from earlyfusion.generation import guidance, jacobi
from earlyfusion.generation.grammar import SLOT, Grammar
from earlyfusion.generation.jacobi import Window
from earlyfusion.generation.narrator import Narrator
from earlyfusion.generation.request import Event, Request
from earlyfusion.generation.sampler import (
    NEVER,
    NOT_FINITE,
    Sampler,
    Warp,
    generator,
    sound,
    uniforms,
    warp,
)
from earlyfusion.generation.settings import SamplingParams
from earlyfusion.generation.steering import TokenLogprob, steering
from earlyfusion.model.kv_cache import KVCache, kept_in
from earlyfusion.model.transformer import Transformer
from earlyfusion.processor import Processor


def generate(transformer: Transformer, processor: Processor, request: Request) -> Iterator[Event]:
    """The events of one reply. Closing the iterator early frees its caches.

    Raises `WeightsError` where the weights give numbers that are not finite.
    """
    narrator = Narrator(processor, request)
    with closing(_drawn(transformer, processor, request)) as drawn:
        for token, logprob in drawn:
            yield from narrator.push(token, logprob)
            if narrator.ended:
                break
    yield from narrator.finish()


def draw_tokens(
    transformer: Transformer, processor: Processor, request: Request
) -> Generator[int, None, None]:
    """The new tokens of one reply, marks and the closing stop token included."""
    with closing(_drawn(transformer, processor, request)) as drawn:
        for token, _ in drawn:
            yield token


@torch.inference_mode()
def _drawn(
    transformer: Transformer, processor: Processor, request: Request
) -> Generator[tuple[int, TokenLogprob | None], None, None]:
    run = _Run(transformer, processor, request)
    while not run.done:
        tokens = run.draw()
        for token in tokens:
            yield token, run.logprob
        run.read(tokens)


class Reader:
    """One branch: a cache, and the logits that follow the tokens it has read."""

    def __init__(self, transformer: Transformer, length: int) -> None:
        dtype, self._device = kept_in(transformer)
        self._transformer = transformer
        self._cache = KVCache(transformer.config, 1, length, dtype, self._device)
        self._read = 0

    def read(self, tokens: Sequence[int], drafts: Sequence[int] = ()) -> Tensor:
        """Append tokens to the branch; logits [1, V] in fp32 of the one to come.

        Drafts are read behind them, and each adds a row of logits, but they are not appended: what
        is read next takes their places.
        """
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


class _Run:
    """The state of one request between two tokens."""

    def __init__(self, transformer: Transformer, processor: Processor, request: Request) -> None:
        device, size = kept_in(transformer)[1], transformer.config.vocab_size
        vocabulary = processor.vocabulary
        self._transformer, self._vocabulary = transformer, vocabulary
        self._layout = request.layout or processor.layout
        self._sampling = request.sampling
        self._steering = steering(processor, request)
        self.logprob: TokenLogprob | None = None
        self._grammar = Grammar(vocabulary, self._layout, request.stops, size, device)
        self._state = self._grammar.start([request.output], [request.images], [request.room])
        self._sampler = Sampler([request.sampling], device)
        self._generator = generator(_seed(request.sampling))
        self._window: Window | None = None
        self._history = list(request.ids)
        self._drawn_from = len(self._history)
        self._seen_BV = torch.zeros(1, size, dtype=torch.bool, device=device)
        self._seen_BV[:, self._history] = True
        self._readers: dict[guidance.Branch, Reader] = {
            "full": Reader(transformer, len(request.ids) + request.room)
        }
        self._logits: dict[guidance.Branch, Tensor] = {
            "full": self._readers["full"].read(self._history)
        }

    @property
    def done(self) -> bool:
        return bool(self._grammar.done(self._state))

    def draw(self) -> list[int]:
        """The next tokens: one, or those that a window of codes settles."""
        logits_WV = guidance.mix(self._logits, *_weights(self._sampling))
        allowed_BV = self._grammar.mask(self._state)
        if not sound(logits_WV.masked_fill(~allowed_BV, NEVER)).all():
            raise WeightsError(NOT_FINITE)
        # One number a token, however it is drawn: what follows an image finds the same ones.
        uniform_B = uniforms([self._generator]).to(self._seen_BV.device)
        if self._sampling.jacobi and self._codes_left:
            tokens = self._draw_codes(logits_WV.masked_fill(~allowed_BV, NEVER))
            for _ in tokens[1:]:
                uniforms([self._generator])
        else:
            in_image_B = self._grammar.in_image(self._state)
            free = self._steering is not None and int(allowed_BV.sum()) > 1
            if self._steering is not None and free:
                changed_V = self._steering.change(self._history, logits_WV[0], allowed_BV[0])
                logits_WV = changed_V[None]
            tokens = self._sampler.draw(
                logits_WV, allowed_BV, self._seen_BV, in_image_B, uniform_B
            ).tolist()
            if self._steering is not None:
                full_V = self._logits["full"][0]
                self.logprob = self._steering.told(full_V, tokens[0]) if free else None
        for token in tokens:
            self._state = self._grammar.advance(self._state, self._state.new_tensor([token]))
        return tokens

    @property
    def _codes_left(self) -> int:
        return self._grammar.codes_from[int(self._state[0, SLOT])]

    def _draw_codes(self, logits_WV: Tensor) -> list[int]:
        if self._window is None:
            place = len(self._history) - self._drawn_from
            self._window = Window(self._sampling.jacobi or 0, _seed(self._sampling), place)
        window, left = self._window, self._codes_left
        if self._sampling.image_temperature == 0:
            return window.settle(logits_WV.argmax(-1).tolist(), left)
        settings = Warp.image([self._sampling] * window.places, logits_WV.device)
        tokens_W = jacobi.draw([window], [window.drafts], warp(logits_WV, settings))
        return window.settle(tokens_W.tolist(), left)

    def read(self, tokens: Sequence[int]) -> None:
        if self.done:
            return
        self._history += tokens
        self._seen_BV[:, tokens] = True
        opens = tokens[-1] == self._vocabulary.begin_image
        if opens or not self._grammar.in_image(self._state):
            self._readers, self._window = {"full": self._readers["full"]}, None
        drafts = self._window.drafts if self._window else ()
        self._logits = {name: r.read(tokens, drafts) for name, r in self._readers.items()}
        if opens:
            self._open_branches()

    def _open_branches(self) -> None:
        text, image = _weights(self._sampling)
        has_images = guidance.has_images(self._history, self._vocabulary)
        for name in guidance.needed(text, image, has_images)[1:]:
            prompt = guidance.prompt(name, self._history, self._vocabulary, self._layout)
            length = len(prompt) + self._grammar.image_tokens
            self._readers[name] = Reader(self._transformer, length)
            self._logits[name] = self._readers[name].read(prompt)


def _weights(sampling: SamplingParams) -> tuple[float, float]:
    text, image = sampling.guidance_text, sampling.guidance_image
    if text is None or image is None:
        raise TypeError("a request takes resolved SamplingParams: call .resolved(defaults) first")
    return text, image


def _seed(sampling: SamplingParams) -> int:
    if sampling.seed is None:
        raise TypeError("a request needs a seed: the caller draws one where the user gave none")
    return sampling.seed
