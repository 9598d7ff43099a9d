"""The plain loop that defines correct: one request, one token at a time, no tricks.

`draw_tokens` gives tokens, `Narrator` turns them into events, `generate` joins the two. The full
branch keeps its cache through every change of modality; a guided image opens the other branches
where it begins and drops them where it ends.
Shapes: B rows (one here), T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from earlyfusion.generation import guidance
from earlyfusion.generation.grammar import Grammar, Output
from earlyfusion.generation.sampler import Sampler, generator, uniforms
from earlyfusion.generation.settings import SamplingParams
from earlyfusion.model.kv_cache import KVCache
from earlyfusion.model.transformer import Transformer
from earlyfusion.processor import Processor
from earlyfusion.vocabulary import CODE

Reason = Literal["stop", "length"]


@dataclass(frozen=True)
class Request:
    """A prompt's tokens and what to make of them.

    `sampling` is resolved and has a seed; at most `images` images and `room` tokens come. `stops`
    are ids besides eos that end the reply.
    """

    ids: Sequence[int]
    output: Output
    sampling: SamplingParams
    images: int
    room: int
    stops: tuple[int, ...] = ()


@dataclass(frozen=True)
class Usage:
    """Token counts; `image_tokens` is the part of the completion that spells images."""

    prompt_tokens: int
    completion_tokens: int
    image_tokens: int

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True)
class TextDelta:
    """More text of the current segment; never half a character, never part of a stop string."""

    text: str


@dataclass(frozen=True)
class ImageStarted:
    index: int


@dataclass(frozen=True)
class ImageProgress:
    """Sent after each row of codes."""

    index: int
    codes_done: int
    codes_total: int


@dataclass(frozen=True, eq=False)
class ImageDone:
    """A whole image: codes int64 [h, w]."""

    index: int
    codes: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Finished:
    """The last event. "stop": the model, a stop string or the number of images ended the reply;
    "length": no more tokens fit."""

    reason: Reason
    usage: Usage


Event: TypeAlias = TextDelta | ImageStarted | ImageProgress | ImageDone | Finished


def generate(transformer: Transformer, processor: Processor, request: Request) -> Iterator[Event]:
    """The events of one reply. Closing the iterator early frees its caches."""
    narrator = Narrator(processor, request)
    with closing(draw_tokens(transformer, processor, request)) as tokens:
        for token in tokens:
            yield from narrator.push(token)
            if narrator.ended:
                break
    yield from narrator.finish()


@torch.inference_mode()
def draw_tokens(
    transformer: Transformer, processor: Processor, request: Request
) -> Generator[int, None, None]:
    """The new tokens of one reply, marks and the closing stop token included."""
    run = _Run(transformer, processor, request)
    while not run.done:
        token = run.draw()
        yield token
        run.read(token)


class Reader:
    """One branch: a cache, and the logits that follow the tokens it has read."""

    def __init__(self, transformer: Transformer, length: int) -> None:
        weight = transformer.lm_head.weight
        self._transformer = transformer
        self._device = weight.device
        self._cache = KVCache(transformer.config, 1, length, weight.dtype, weight.device)
        self._read = 0

    def read(self, tokens: Sequence[int]) -> Tensor:
        """Append tokens to the branch; logits [1, V] in fp32 of the one to come."""
        tokens_BT = torch.tensor([list(tokens)], device=self._device)
        slot_B = torch.zeros(1, dtype=torch.int64, device=self._device)
        length_B = torch.full_like(slot_B, self._read)
        positions_BT = length_B[:, None] + torch.arange(len(tokens), device=self._device)
        attends = self._cache.attends(slot_B, length_B)
        logits_BTV: Tensor = self._transformer(tokens_BT, positions_BT, attends, last_only=True)
        self._read += len(tokens)
        return logits_BTV[:, -1].float()


class _Run:
    """The state of one request between two tokens."""

    def __init__(self, transformer: Transformer, processor: Processor, request: Request) -> None:
        device, size = transformer.lm_head.weight.device, transformer.config.vocab_size
        vocabulary = processor.vocabulary
        self._transformer, self._vocabulary = transformer, vocabulary
        self._layout = processor.layout
        self._sampling = request.sampling
        self._grammar = Grammar(vocabulary, processor.layout, request.stops, size, device)
        self._state = self._grammar.start([request.output], [request.images], [request.room])
        self._sampler = Sampler([request.sampling], device)
        self._generator = generator(_seed(request.sampling))
        self._history = list(request.ids)
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

    def draw(self) -> int:
        text, image = _weights(self._sampling)
        token_B = self._sampler.draw(
            guidance.mix(self._logits, text, image),
            self._grammar.mask(self._state),
            self._seen_BV,
            self._grammar.in_image(self._state),
            uniforms([self._generator]).to(self._seen_BV.device),
        )
        self._state = self._grammar.advance(self._state, token_B)
        return int(token_B)

    def read(self, token: int) -> None:
        if self.done:
            return
        self._history.append(token)
        self._seen_BV[:, token] = True
        opens = token == self._vocabulary.begin_image
        if opens or not self._grammar.in_image(self._state):
            self._readers = {"full": self._readers["full"]}
        self._logits = {name: r.read([token]) for name, r in self._readers.items()}
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


class Narrator:
    """Tokens of one reply in, events out; an engine may hold one for each request."""

    def __init__(self, processor: Processor, request: Request) -> None:
        vocabulary, layout = processor.vocabulary, processor.layout
        self.ended = False
        self._processor, self._vocabulary, self._layout = processor, vocabulary, layout
        self._slots = layout.template(vocabulary).tolist()
        self._codes_before = [0, *accumulate(slot == CODE for slot in self._slots)]
        self._request = request
        self._stops = {vocabulary.eos, *request.stops}
        self._text = _Text(processor, request.sampling.stop_strings)
        self._spelled: list[int] = []
        self._drawn = self._images = 0

    def push(self, token: int) -> list[Event]:
        """What this token makes visible. `ended` turns true when no further token is wanted."""
        self._drawn += 1
        if self._spelled:
            return self._continue_image(token)
        if token in self._stops:
            self.ended = True
            return []
        if token == self._vocabulary.begin_image:
            rest = self._flush()
            self._spelled = [] if self.ended else [token]
            return rest if self.ended else [*rest, ImageStarted(self._images)]
        return self._deltas(self._text.push(token))

    def finish(self) -> list[Event]:
        """The rest of the text, then `Finished`."""
        complete = self._request.output == "image" and self._images == self._request.images
        rest = self._flush()
        reason: Reason = "stop" if self.ended or complete else "length"
        spelled = self._images * len(self._slots) + len(self._spelled)
        return [*rest, Finished(reason, Usage(len(self._request.ids), self._drawn, spelled))]

    def _flush(self) -> list[Event]:
        return self._deltas(self._text.flush())

    def _deltas(self, text: str) -> list[Event]:
        self.ended = self.ended or self._text.stopped
        return [TextDelta(text)] if text else []

    def _continue_image(self, token: int) -> list[Event]:
        is_code = self._slots[len(self._spelled)] == CODE
        self._spelled.append(token)
        if len(self._spelled) == len(self._slots):
            codes = self._layout.parse(self._spelled, self._vocabulary)
            self._spelled, self._images = [], self._images + 1
            return [ImageDone(self._images - 1, codes)]
        done = self._codes_before[len(self._spelled)]
        if not is_code or done % self._layout.width:
            return []
        return [ImageProgress(self._images, done, self._layout.num_codes)]


class _Text:
    """Text of one segment, held back as long as it might turn out to be a stop string."""

    def __init__(self, processor: Processor, stops: tuple[str, ...]) -> None:
        self.stopped = False
        self._processor, self._stops = processor, stops
        self._stream, self._held = processor.text_stream(), ""

    def push(self, token: int) -> str:
        return self._release(self._stream.push(token))

    def flush(self) -> str:
        """What is still held, as the segment ends here; the next one starts afresh."""
        text = self._release(self._stream.flush()) + ("" if self.stopped else self._held)
        self._stream, self._held = self._processor.text_stream(), ""
        return text

    def _release(self, delta: str) -> str:
        if self.stopped:
            return ""
        self._held += delta
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        self.stopped = bool(found)
        end = min(found) if found else len(self._held) - _overlap(self._held, self._stops)
        released, self._held = self._held[:end], self._held[end:]
        return released


def _overlap(text: str, stops: tuple[str, ...]) -> int:
    """Length of the longest end of `text` with which a stop string begins."""
    lengths = (n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
    return max(lengths, default=0)


def _weights(sampling: SamplingParams) -> tuple[float, float]:
    text, image = sampling.guidance_text, sampling.guidance_image
    if text is None or image is None:
        raise TypeError("a request takes resolved SamplingParams: call .resolved(defaults) first")
    return text, image


def _seed(sampling: SamplingParams) -> int:
    if sampling.seed is None:
        raise TypeError("a request needs a seed: the caller draws one where the user gave none")
    return sampling.seed
