"""One reply on the host, token by token: `Walk` follows the grammar, `Narrator` makes events."""

from __future__ import annotations

import numpy as np

from earlyfusion.generation.grammar import Grammar
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
    TokenLogprob,
    Usage,
)
from earlyfusion.generation.settings import Output
from earlyfusion.processor import Processor, TextStream
from earlyfusion.vocabulary import CODE


class Walk:
    """One row of the grammar's automaton in plain integers, for loops that see every token on the
    host. Same rules as `Grammar`. `slot` is the slot of the next token: 0 outside of an image.
    `codes_left` is the number of image codes that must come next."""

    def __init__(self, grammar: Grammar, output: Output, images: int, room: int) -> None:
        self.grammar = grammar
        slot, self._images, self._room, self._text = grammar.start_row(output, images, room)
        self._stand_at(slot)

    @property
    def state(self) -> list[int]:
        """This row as `Grammar.mask` takes it."""
        return [self.slot, self._images, self._room, self._text]

    @property
    def may_begin(self) -> bool:
        return self.slot == 0 and self._images > 0 and self._room >= self.grammar.image_tokens

    @property
    def tokens_left(self) -> int:
        """The number of tokens that may still come: within an image those of the image."""
        if self.done:
            return 0
        return min(self._room, self.grammar.image_tokens - self.slot) if self.slot else self._room

    @property
    def text_left(self) -> int:
        """The number of text tokens that may come before the mask can change: until the end, or
        until an image that may begin now no longer fits."""
        if self.in_image or self.done:
            return 0
        return self._room - (self.grammar.image_tokens - 1 if self.may_begin else 0)

    @property
    def forced(self) -> int | None:
        """The only token that may come; None if there are several."""
        if self.done:
            return None
        if self.in_image:
            return self.grammar.fixed[self.slot]
        return None if self._text else self.grammar.begin

    def advance(self, token: int) -> None:
        """As `Grammar.advance`."""
        grammar, slot = self.grammar, self.slot
        begins = slot == 0 and token == grammar.begin
        stops = slot == 0 and token in grammar.ends
        if slot or begins:
            slot = (slot + 1) % grammar.image_tokens
        self._images -= begins
        self._room -= 1
        fits = self._images > 0 and self._room >= grammar.image_tokens
        stuck = slot == 0 and not self._text and not fits
        ends = stops or stuck or self._room == 0
        self._stand_at(grammar.image_tokens if ends else slot)

    def _stand_at(self, slot: int) -> None:
        self.slot = slot
        self.done = slot == self.grammar.image_tokens
        self.in_image = slot > 0 and not self.done
        self.codes_left = self.grammar.codes_from[slot]


class Narrator:
    """The events of one reply. `walk` is the state of the grammar before the token of `push`."""

    def __init__(self, processor: Processor, request: Request, walk: Walk) -> None:
        self.ended = False
        self._vocabulary, self._layout = processor.vocabulary, request.layout or processor.layout
        self._request, self._walk = request, walk
        self._text = _Text(processor, request.sampling.stop_strings)
        self._picture: list[int] = []  # tokens of the picture being drawn
        self._drawn = self._images = 0

    def push(self, token: int, logprob: TokenLogprob | None = None) -> list[Event]:
        """The events of one token. Sets `ended` when no further token is wanted."""
        events: list[Event] = [] if logprob is None else [TokenDrawn(logprob)]
        self._drawn += 1
        if self._walk.in_image:
            events += self._continue_image(token)
        elif token in self._walk.grammar.ends:
            self.ended = True
        elif token == self._vocabulary.begin_image:
            events += self._begin_image(token)
        else:
            events += self._deltas(self._text.push(token))
        return events

    def finish(self) -> list[Event]:
        """The rest of the text, then `Finished`."""
        complete = self._request.output == "image" and self._images == self._request.images
        rest = self._deltas(self._text.flush())
        reason: Reason = "stop" if self.ended or complete else "length"
        image_tokens = self._images * self._walk.grammar.image_tokens + len(self._picture)
        usage = Usage(len(self._request.ids), self._drawn, image_tokens)
        seed, last = self._request.sampling.seed, self._request.ids[-1]
        # A prompt without an end of turn holds the beginning of the reply.
        return [*rest, Finished(reason, usage, seed, last != self._vocabulary.end_of_turn)]

    def _deltas(self, text: str) -> list[Event]:
        self.ended = self.ended or self._text.stopped
        return [TextDelta(text)] if text else []

    def _begin_image(self, token: int) -> list[Event]:
        rest = self._deltas(self._text.flush())
        # The text that was held back may end in a stop string.
        if self.ended:
            return rest
        self._picture = [token]
        return [*rest, ImageStarted(self._images)]

    def _continue_image(self, token: int) -> list[Event]:
        grammar, slot = self._walk.grammar, self._walk.slot
        self._picture.append(token)
        if slot + 1 == grammar.image_tokens:
            codes = self._layout.parse(self._picture, self._vocabulary)
            self._picture, self._images = [], self._images + 1
            return [ImageDone(self._images - 1, codes)]
        if grammar.template[slot] != CODE:
            return []
        done, every = grammar.codes_before[slot + 1], self._request.preview_every
        events: list[Event] = []
        if done % self._layout.width == 0:
            events.append(ImageProgress(self._images, done, self._layout.num_codes))
        if every and done % every == 0 and done < self._layout.num_codes:
            events.append(self._preview(done))
        return events

    def _preview(self, done: int) -> ImagePreview:
        # An unfinished picture is shorter than its template.
        pairs = zip(self._picture, self._walk.grammar.template, strict=False)
        drawn = [token for token, slot in pairs if slot == CODE]
        tokens = np.array(drawn + drawn[-1:] * (self._layout.num_codes - done))
        codes = self._vocabulary.token_to_code(tokens)
        return ImagePreview(self._images, done, codes.reshape(self._layout.height, -1))


class _Text:
    """Text of one segment, held back while it may still become a stop string."""

    def __init__(self, processor: Processor, stops: tuple[str, ...]) -> None:
        self.stopped = False
        self._processor, self._stops = processor, stops
        self._stream: TextStream | None = None
        self._held = ""

    def push(self, token: int) -> str:
        if self._stream is None:
            self._stream = self._processor.text_stream()
        return self._release(self._stream.push(token))

    def flush(self) -> str:
        """The text still held back at the end of a segment; the next segment starts afresh."""
        rest = "" if self._stream is None else self._stream.flush()
        text = self._release(rest) + ("" if self.stopped else self._held)
        self._stream, self._held = None, ""
        return text

    def _release(self, delta: str) -> str:
        if self.stopped:
            return ""
        self._held += delta
        # The earliest stop string ends the text; an end that may become one is held back.
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        self.stopped = bool(found)
        end = min(found) if found else len(self._held) - _overlap(self._held, self._stops)
        released, self._held = self._held[:end], self._held[end:]
        return released


def _overlap(text: str, stops: tuple[str, ...]) -> int:
    """The length of the longest end of `text` with which a stop string begins."""
    lengths = (n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
    return max(lengths, default=0)
