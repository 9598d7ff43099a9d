"""One reply on the host, token by token: `GrammarState` follows the grammar, and `EventBuilder`
turns tokens into events."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import AnyStr

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


class GrammarState:
    """The state of one row of a `Grammar` in Python integers, for loops that see every token on the
    host; the rules are the same. `slot` is the slot of the next token, 0 outside of an image.
    `codes_left` is the number of image codes that must come next."""

    def __init__(self, grammar: Grammar, output: Output, max_images: int, max_tokens: int) -> None:
        self.grammar = grammar
        row = grammar.start_row(output, max_images, max_tokens)
        slot, self._images_left, self._tokens_left, self._text_allowed = row
        self._set_slot(slot)

    @property
    def row(self) -> list[int]:
        """The state as a row of the tensor that `Grammar.mask` takes."""
        return [self.slot, self._images_left, self._tokens_left, self._text_allowed]

    @property
    def _image_fits(self) -> bool:
        return self._images_left > 0 and self._tokens_left >= self.grammar.image_tokens

    @property
    def may_begin_image(self) -> bool:
        return self.slot == 0 and self._image_fits

    @property
    def tokens_until_end(self) -> int:
        """The maximum number of tokens until the image ends or, outside of an image, the reply."""
        if self.done:
            return 0
        if self.slot == 0:
            return self._tokens_left
        return min(self._tokens_left, self.grammar.image_tokens - self.slot)

    @property
    def text_left(self) -> int:
        """The number of text tokens that may come before the mask changes, because the reply ends
        or an image no longer fits."""
        if self.in_image or self.done:
            return 0
        return self._tokens_left - (self.grammar.image_tokens - 1 if self.may_begin_image else 0)

    @property
    def forced(self) -> int | None:
        """The only token that may come; None if there are several."""
        if self.done:
            return None
        if self.in_image:
            return self.grammar.fixed[self.slot]
        return None if self._text_allowed else self.grammar.begin_image

    def advance(self, token: int) -> None:
        """As `Grammar.advance`."""
        grammar, slot = self.grammar, self.slot
        begins = slot == 0 and token == grammar.begin_image
        stops = slot == 0 and token in grammar.end_ids
        if slot or begins:
            slot = (slot + 1) % grammar.image_tokens
        self._images_left -= begins
        self._tokens_left -= 1
        exhausted = slot == 0 and not self._text_allowed and not self._image_fits
        ends = stops or exhausted or self._tokens_left == 0
        self._set_slot(grammar.image_tokens if ends else slot)

    def _set_slot(self, slot: int) -> None:
        self.slot = slot
        self.done = slot == self.grammar.image_tokens
        self.in_image = slot > 0 and not self.done
        self.codes_left = self.grammar.codes_ahead[slot]


class EventBuilder:
    """The events of one reply. The caller advances `grammar_state` after each `push`, so that
    `push` sees the state before its token."""

    def __init__(self, processor: Processor, request: Request, grammar_state: GrammarState) -> None:
        self.ended = False
        self._vocabulary, self._layout = processor.vocabulary, request.layout or processor.layout
        self._request, self._grammar_state = request, grammar_state
        self._text = _SegmentText(processor, request.sampling.stop_strings)
        self._image_tokens: list[int] = []  # tokens of the image being generated
        self._num_tokens = self._images = 0

    def push(self, token: int, logprob: TokenLogprob | None = None) -> list[Event]:
        """The events of one token. Sets `ended` if the reply ends with it."""
        events: list[Event] = [] if logprob is None else [TokenDrawn(logprob)]
        self._num_tokens += 1
        if self._grammar_state.in_image:
            events += self._continue_image(token)
        elif token in self._grammar_state.grammar.end_ids:
            self.ended = True
        elif token == self._vocabulary.begin_image:
            events += self._begin_image(token)
        else:
            events += self._deltas(self._text.push(token))
        return events

    def finish(self, cached_tokens: int = 0) -> list[Event]:
        """The rest of the text, then `Finished`. `cached_tokens` is the number of prompt tokens
        that the cache already held."""
        complete = self._request.output == "image" and self._images == self._request.max_images
        rest = self._deltas(self._text.flush())
        reason: Reason = "stop" if self.ended or complete else "length"
        tokens_per_image = self._grammar_state.grammar.image_tokens
        image_tokens = self._images * tokens_per_image + len(self._image_tokens)
        usage = Usage(len(self._request.ids), self._num_tokens, image_tokens, cached_tokens)
        seed, last = self._request.sampling.seed, self._request.ids[-1]
        # A prompt that does not end a turn ends with the beginning of the reply.
        continues = last != self._vocabulary.end_of_turn
        return [*rest, Finished(reason, usage, seed, continues)]

    def _deltas(self, text: str) -> list[Event]:
        self.ended = self.ended or self._text.stopped
        return [TextDelta(text)] if text else []

    def _begin_image(self, token: int) -> list[Event]:
        rest = self._deltas(self._text.flush())
        # The text that `flush` releases may end in a stop string.
        if self.ended:
            return rest
        self._image_tokens = [token]
        return [*rest, ImageStarted(self._images)]

    def _continue_image(self, token: int) -> list[Event]:
        grammar, slot = self._grammar_state.grammar, self._grammar_state.slot
        self._image_tokens.append(token)
        if slot + 1 == grammar.image_tokens:
            codes = self._layout.parse(self._image_tokens, self._vocabulary)
            self._image_tokens, self._images = [], self._images + 1
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
        # An unfinished image is shorter than its template.
        pairs = zip(self._image_tokens, self._grammar_state.grammar.template, strict=False)
        code_tokens = [token for token, expected in pairs if expected == CODE]
        tokens = np.array(code_tokens + code_tokens[-1:] * (self._layout.num_codes - done))
        codes = self._vocabulary.tokens_to_codes(tokens)
        return ImagePreview(self._images, done, codes.reshape(self._layout.height, -1))


class _SegmentText:
    """The text of one segment. Text that may still become a stop string is held back."""

    def __init__(self, processor: Processor, stops: tuple[str, ...]) -> None:
        self.stopped = False
        self._processor, self._stops = processor, sorted(stops)
        self._stream: TextStream | None = None
        self._pending = ""

    def push(self, token: int) -> str:
        if self._stream is None:
            self._stream = self._processor.text_stream()
        return self._release(self._stream.push(token))

    def flush(self) -> str:
        """The text still held back at the end of a segment; resets the state for the next one."""
        rest = "" if self._stream is None else self._stream.flush()
        text = self._release(rest) + ("" if self.stopped else self._pending)
        self._stream, self._pending = None, ""
        return text

    def _release(self, delta: str) -> str:
        if self.stopped:
            return ""
        self._pending += delta
        # The earliest stop string ends the text; an end that may become one is held back.
        stop_positions = [at for stop in self._stops if (at := self._pending.find(stop)) >= 0]
        self.stopped = bool(stop_positions)
        end = (
            min(stop_positions)
            if stop_positions
            else len(self._pending) - len(unfinished_word(self._pending, self._stops))
        )
        released, self._pending = self._pending[:end], self._pending[end:]
        return released


def unfinished_word(text: AnyStr, words: Sequence[AnyStr]) -> AnyStr:
    """The longest suffix of a text that is a proper prefix of one of the sorted `words`; empty if
    there is none."""
    longest = max(map(len, words), default=1) - 1
    for start in range(max(len(text) - longest, 0), len(text)):
        end = text[start:]
        # In sorted order, the longer words that begin with `end` come right after it.
        at = bisect_right(words, end)
        if at < len(words) and words[at].startswith(end):
            return end
    return text[:0]
