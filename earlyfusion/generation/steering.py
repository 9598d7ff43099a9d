"""Words, constraints, logits processors and log-probabilities of one request.

A `Steering` belongs to one request, in the reference loop and in the engine. It changes the guided
fp32 logits of the whole vocabulary before the grammar's mask, the repetition penalty and the
temperature, so it cannot break the grammar. It does not see tokens that the grammar forces (the
markers of an image, or its beginning if nothing else may come), as these are not sampled.

Words are matched in the bytes of the text, so it does not matter how the tokenizer splits them.
After each image a new stretch of text begins.
"""

# Shapes: V vocabulary.

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import cast

import torch
from torch import Tensor

from earlyfusion.errors import SettingError
from earlyfusion.generation.constraint import constraint
from earlyfusion.generation.event_builder import unfinished_word
from earlyfusion.generation.request import Request, TokenLogprob
from earlyfusion.generation.settings import LogitsProcessor
from earlyfusion.processor import Processor

_SEPARATORS = (b" ", b"\n")


class Steering:
    """Changes the logits of one request, and computes its log-probabilities."""

    def __init__(self, processor: Processor, request: Request) -> None:
        sampling = request.sampling
        self._processors = cast("tuple[LogitsProcessor, ...]", sampling.logits_processors or ())
        has_words = sampling.bad_words or sampling.allowed_words
        self._words = Words(processor, request) if has_words else None
        self._constraint = constraint(processor, request)
        self._processor, self._num_logprobs = processor, sampling.logprobs

    @property
    def only_forbids(self) -> bool:
        """Whether all it does is to forbid text tokens (`allowed`): images can then be sampled
        without it."""
        return not self._processors and self._num_logprobs is None

    def change(self, ids: Sequence[int], logits_V: Tensor, allowed_V: Tensor) -> Tensor:
        """The logits [V] to sample from instead of `logits_V`. `ids` are the tokens of prompt and
        reply; `allowed_V` is the grammar's mask. Raises `SettingError` if a logits processor fails
        or no token is left."""
        for processor in self._processors:
            logits_V = _apply_processor(processor, list(ids), logits_V)
        if self._words is not None:
            logits_V = self._words(ids, logits_V)
        if self._constraint is not None:
            logits_V = self._constraint(ids, logits_V)
        # Only logits of tokens that the grammar allows need to be valid.
        left_V = logits_V[allowed_V]
        if bool(left_V.isnan().any()) or not bool(left_V.isfinite().any()):
            raise SettingError(self._no_token_message(len(ids)))
        return logits_V

    def allowed(self, ids: Sequence[int], allowed_V: Tensor) -> Tensor:
        """The grammar's mask `allowed_V` without the tokens that words and constraints forbid.
        Raises `SettingError` if none is left."""
        if self._words is not None and (blocked := self._words.blocked(ids)) is not None:
            allowed_V = allowed_V.index_fill(0, blocked.to(allowed_V.device), False)
        if self._constraint is not None:
            fits_V = self._constraint.allowed(ids, len(allowed_V))
            if fits_V is not None:
                allowed_V = allowed_V & fits_V.to(allowed_V.device)
        if not bool(allowed_V.any()):
            raise SettingError(self._no_token_message(len(ids)))
        return allowed_V

    def _no_token_message(self, length: int) -> str:
        if self._constraint is not None:
            return (
                f"{self._constraint.name} left no possible token after {length:,} tokens: see that "
                "what it asks for is possible here, its images and the words included"
            )
        name, remedy = "bad_words and allowed_words", "allow other words, or forbid fewer"
        if self._processors:
            name, remedy = "logits_processors", "leave at least one finite, and none NaN"
        return f"{name} left no possible token after {length:,} tokens: {remedy}"

    def logprob(self, logits_V: Tensor, token: int) -> TokenLogprob | None:
        """The log-probability of a token under the model's logits [V] of the condition "full",
        without guidance or other changes. None unless the request asks for `logprobs`."""
        if self._num_logprobs is None:
            return None
        logprobs_V = logits_V.float().log_softmax(-1)
        top = logprobs_V.topk(min(self._num_logprobs, len(logprobs_V)))
        likeliest = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        return TokenLogprob(
            token,
            self._processor.token_text(token),
            float(logprobs_V[token]),
            tuple(TokenLogprob(i, self._processor.token_text(i), value) for i, value in likeliest),
        )


def _apply_processor(processor: LogitsProcessor, ids: list[int], logits_V: Tensor) -> Tensor:
    name = getattr(processor, "__name__", type(processor).__name__)
    try:
        # A copy: a processor may write to its logits, or keep them.
        after_V = processor(ids, logits_V.clone())
    except Exception as error:
        raise SettingError(
            f"the logits processor {name} failed with {type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}"
        ) from error
    if not isinstance(after_V, Tensor) or after_V.shape != logits_V.shape:
        shown = tuple(after_V.shape) if isinstance(after_V, Tensor) else type(after_V).__name__
        raise SettingError(
            f"the logits processor {name} returned {shown}: "
            f"return logits of the shape that it received, {tuple(logits_V.shape)}"
        )
    return after_V.to(logits_V)


class Words:
    """The tokens that the bad and the allowed words of a request forbid; only text after the prompt
    counts. No token may complete a bad word. With allowed words, each stretch of text consists of
    them, with one space or newline between two words and at most one before the first. Which tokens
    are forbidden depends only on the end of the text, so they are cached by it."""

    def __init__(self, processor: Processor, request: Request) -> None:
        vocabulary, sampling = processor.vocabulary, request.sampling
        self._prompt = len(request.ids)
        self._begin, self._end = vocabulary.begin_image, vocabulary.end_image
        self._ends = {vocabulary.eos, *request.stops}
        self._bad = sorted(word.encode() for word in sampling.bad_words or ())
        self._allowed = [word.encode() for word in sampling.allowed_words or ()]
        # Tokens without bytes cannot complete or begin a word.
        tokens = vocabulary.text_tokens.tolist()
        self._bytes = {token: data for token in tokens if (data := processor.token_bytes(token))}
        self._longest_token = processor.longest_token
        self._next_words = frozenset(sep + word for sep in _SEPARATORS for word in self._allowed)
        self._blocked_by: dict[object, Tensor] = {}

    def __call__(self, ids: Sequence[int], logits_V: Tensor) -> Tensor:
        """The logits, with -inf for tokens that may not come."""
        blocked = self.blocked(ids)
        if blocked is None:
            return logits_V
        return logits_V.index_fill(0, blocked.to(logits_V.device), -torch.inf)

    def blocked(self, ids: Sequence[int]) -> Tensor | None:
        """The ids of the tokens that may not come, int64 on the CPU; None in an image."""
        reply = ids[self._prompt :]
        text = self._text(reply)
        if text is None:
            return None
        unfinished = unfinished_word(text, self._bad)
        allowed_state = self._rest_of_word(text), bool(text), self._begin in reply
        # The blocked tokens depend on nothing else.
        key = unfinished, allowed_state
        if key not in self._blocked_by:
            blocked = {*self._bad_tokens(unfinished), *self._tokens_outside_words(*allowed_state)}
            self._blocked_by[key] = torch.tensor(sorted(blocked)).long()
        return self._blocked_by[key]

    def _text(self, reply: Sequence[int]) -> bytes | None:
        """The current stretch of text; None in an image."""
        pieces = []
        for token in reversed(reply):
            if token == self._end:
                break
            if token == self._begin:
                return None
            pieces.append(self._bytes.get(token, b""))
        return b"".join(reversed(pieces))

    def _bad_tokens(self, end: bytes) -> Iterator[int]:
        """The tokens that contain a bad word, or complete one of which `end`, the end of the text,
        is the beginning; some may come twice."""
        yield from self._tokens_with_bad_words
        ends = (end[at:] for at in range(len(end)))
        rests = tuple(w[len(e) :] for e in ends for w in self._bad if w.startswith(e))
        if rests:
            yield from (t for t, data in self._bytes.items() if data.startswith(rests))

    @cached_property
    def _tokens_with_bad_words(self) -> list[int]:
        # By lookups in a set, as there may be 256 words and 60,000 tokens.
        bad, lengths = {*self._bad}, sorted({*map(len, self._bad)})
        return [
            token
            for token, data in self._bytes.items()
            for size in lengths[: bisect_right(lengths, len(data))]
            if any(data[at : at + size] in bad for at in range(len(data) - size + 1))
        ]

    def _rest_of_word(self, text: bytes) -> frozenset[bytes] | None:
        """The ways to complete the last word of the text, b"" among them if it may be complete
        already; None without allowed words."""
        if not self._allowed:
            return None
        return self._rests_after(self._next_words | {*self._allowed}, text)

    def _rests_after(self, rests: frozenset[bytes], text: bytes) -> frozenset[bytes]:
        """The ways to complete the last word after `text`, which must begin with one of `rests` and
        may go on with further words; empty if it does not."""
        rests_left: set[bytes] = set()
        # A set of the indices where a word may begin, instead of the ways to split the text into
        # words: with "New", "York" and "New York" their number grows exponentially.
        begins = {0}
        for at in range(len(text) or 1):
            if at not in begins:
                continue
            words = self._next_words if at else rests
            if text and b"" in words:
                words |= self._next_words
            end = text[at:]
            rests_left |= {word[len(end) :] for word in words if word.startswith(end)}
            begins |= {at + len(word) for word in words if end.startswith(word)}
        return frozenset(rests_left)

    def _tokens_outside_words(
        self, rests: frozenset[bytes] | None, begun: bool, image_done: bool
    ) -> Iterator[int]:
        """The tokens that allowed words forbid."""
        if rests is None:
            return
        words = rests | self._next_words if b"" in rests else rests
        begins = {
            word[:size]
            for word in words
            for size in range(1, min(len(word), self._longest_token) + 1)
        }
        for token, data in self._bytes.items():
            # Lookups come first, as there may be 256 words and few tokens go beyond the end of one.
            beyond = any(data[:size] in words for size in range(1, len(data)))
            if not (data in begins or (beyond and self._rests_after(rests, data))):
                yield token
        # A stretch that has begun must end in a whole word before an image or the end.
        complete = b"" in rests
        if not (complete or (image_done and not begun)):
            yield from self._ends
        if not complete and begun:
            yield self._begin
