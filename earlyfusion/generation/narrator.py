"""Tokens of one reply in, events out."""

from __future__ import annotations

from itertools import accumulate

import numpy as np

from earlyfusion.generation.request import (
    Event,
    Finished,
    ImageDone,
    ImagePreview,
    ImageProgress,
    ImageStarted,
    Reason,
    Request,
    TextDelta,
    TokenDrawn,
    Usage,
)
from earlyfusion.generation.steering import TokenLogprob
from earlyfusion.processor import Processor
from earlyfusion.vocabulary import CODE


class Narrator:
    """Tokens of one reply in, events out; an engine may hold one for each request."""

    def __init__(self, processor: Processor, request: Request) -> None:
        vocabulary, layout = processor.vocabulary, request.layout or processor.layout
        self.ended = False
        self._processor, self._vocabulary, self._layout = processor, vocabulary, layout
        self._slots = layout.template(vocabulary).tolist()
        self._codes_before = [0, *accumulate(slot == CODE for slot in self._slots)]
        self._request = request
        self._stops = {vocabulary.eos, *request.stops}
        self._text = _Text(processor, request.sampling.stop_strings)
        self._spelled: list[int] = []
        self._drawn = self._images = 0

    def push(self, token: int, logprob: TokenLogprob | None = None) -> list[Event]:
        """What this token makes visible. `ended` turns true when no further token is wanted."""
        drawn: list[Event] = [] if logprob is None else [TokenDrawn(logprob)]
        return drawn + self._push(token)

    def _push(self, token: int) -> list[Event]:
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
        usage = Usage(len(self._request.ids), self._drawn, spelled)
        seed, last = self._request.sampling.seed, self._request.ids[-1]
        return [*rest, Finished(reason, usage, seed, last != self._vocabulary.end_of_turn)]

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
        done, every = self._codes_before[len(self._spelled)], self._request.preview_every
        if not is_code:
            return []
        events: list[Event] = []
        if done % self._layout.width == 0:
            events.append(ImageProgress(self._images, done, self._layout.num_codes))
        if every and done % every == 0 and done < self._layout.num_codes:
            events.append(self._preview(done))
        return events

    def _preview(self, done: int) -> ImagePreview:
        pairs = zip(self._spelled, self._slots, strict=False)
        drawn = [token for token, slot in pairs if slot == CODE]
        tokens = np.array(drawn + drawn[-1:] * (self._layout.num_codes - done))
        codes = self._vocabulary.token_to_code(tokens)
        return ImagePreview(self._images, done, codes.reshape(self._layout.height, -1))


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
