"""Text that must fit a JSON schema, a regular expression or a grammar (llguidance).

All text of a reply together fits, from beginning to end. It may not be interrupted: one image may
come before it, and any number after it is complete. Only a grammar that names `<image>` has images
within its text, at these places and nowhere else.

llguidance works on bytes: it gets the bytes of each text token, and one special token for the
beginning of an image. It does not see the codes.
"""

# Shapes: V vocabulary.

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Sequence
from threading import Lock
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from earlyfusion.errors import SettingError
from earlyfusion.generation.request import Request
from earlyfusion.generation.settings import SamplingParams
from earlyfusion.processor import Processor

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

IMAGE = "<image>"
"""The token that marks the place of an image in a grammar."""
_MAX_COMPILED = 64  # compiled schemas, expressions and grammars of one model
# llguidance follows rules and references by recursion: a chain of some thousands overflows the
# stack, which ends the process. For each field: the text that is counted, its name in the error
# message, and the limit.
_CHAIN_LIMITS = {"grammar": (":", "colons", 1000), "json_schema": ('"$ref"', "references", 500)}
# Only the spaces of Python's json.dumps: if any whitespace were allowed, a model might generate it
# forever.
_JSON_OPTIONS = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class _Source(NamedTuple):
    """A schema, expression or grammar: the name of its field in `SamplingParams`, and its text."""

    name: str
    text: str


def check(processor: Processor, sampling: SamplingParams) -> None:
    """Raise `SettingError` for an invalid schema, expression or grammar."""
    if (source := _source(sampling)) is not None:
        _compilers.matcher(processor, source)


def constraint(processor: Processor, request: Request) -> Constraint | None:
    source = _source(request.sampling)
    return None if source is None else Constraint(processor, request, source)


def _source(sampling: SamplingParams) -> _Source | None:
    values = {name: getattr(sampling, name) for name in ("json_schema", "regex", "grammar")}
    return next((_Source(name, value) for name, value in values.items() if value), None)


class Constraint:
    """Follows one reply token by token, and says which text tokens may come next."""

    def __init__(self, processor: Processor, request: Request, source: _Source) -> None:
        vocabulary = processor.vocabulary
        self.name, self._matcher = source.name, _compilers.matcher(processor, source)
        self._grammar_places_images = source.name == "grammar" and IMAGE in source.text
        self._begin, self._end = vocabulary.begin_image, vocabulary.end_image
        self._eos = vocabulary.eos
        self._ends = sorted({vocabulary.eos, *request.stops})
        self._num_followed = len(request.ids)
        self._in_image = self._image_begun = self._text_begun = self._text_closed = False

    def __call__(self, ids: Sequence[int], logits_V: Tensor) -> Tensor:
        """The logits [V], with -inf for tokens that may not come. `ids` are those of prompt and
        reply."""
        allowed_V = self.allowed(ids, len(logits_V))
        if allowed_V is None:
            return logits_V
        return logits_V.masked_fill(~allowed_V.to(logits_V.device), -torch.inf)

    def allowed(self, ids: Sequence[int], size: int) -> Tensor | None:
        """The tokens that may come next, bool [V]; None in an image. Raises `SettingError` if
        llguidance gives up."""
        for token in ids[self._num_followed :]:
            self._follow(token)
        self._num_followed = len(ids)
        return None if self._in_image else torch.from_numpy(self._allowed(size))

    def _follow(self, token: int) -> None:
        if self._in_image:
            self._in_image = token != self._end
            return
        if token == self._begin:
            self._in_image = self._image_begun = True
            # After an image that follows the text, no more text may come.
            self._text_closed = self._text_begun and not self._grammar_places_images
            if not self._grammar_places_images:
                return
        self._text_begun = True
        self._matcher.consume_token(token)

    def _allowed(self, size: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        if self._matcher.is_error():
            raise SettingError(
                f"{self.name} takes too long to follow after {self._num_followed:,} tokens: "
                "simplify it"
            )
        allowed = np.zeros(size, dtype=np.bool_)
        unpacked = np.unpackbits(bits, bitorder="little")[:size]
        allowed[: len(unpacked)] = unpacked
        complete = bool(allowed[self._eos])
        if self._text_closed:
            allowed[:] = False
        allowed[self._ends] = complete
        if not self._grammar_places_images:
            # Only one before the text, or a model that wants to end might generate images forever.
            allowed[self._begin] = complete or not (self._text_begun or self._image_begun)
        return allowed


class _Compilers:
    """A `_Compiler` per processor. Thread-safe."""

    def __init__(self) -> None:
        self._by_processor: WeakKeyDictionary[Processor, _Compiler] = WeakKeyDictionary()
        self._lock = Lock()

    def matcher(self, processor: Processor, source: _Source) -> LLMatcher:
        """A fresh matcher at the beginning of a text. Raises `SettingError`."""
        with self._lock:
            if processor not in self._by_processor:
                self._by_processor[processor] = _Compiler(processor)
            return self._by_processor[processor].matcher(source)


_compilers = _Compilers()


class _Compiler:
    """Compiles sources for the vocabulary of one processor, and caches the results."""

    def __init__(self, processor: Processor) -> None:
        try:
            import llguidance
        except ImportError:
            raise SettingError(
                "json_schema, regex and grammar need the package llguidance, which is not "
                "installed: pip install 'earlyfusion[structured]'"
            ) from None
        self._library = llguidance
        self._tokenizer = self._make_tokenizer(processor)
        self._matchers: OrderedDict[_Source, LLMatcher] = OrderedDict()

    def _make_tokenizer(self, processor: Processor) -> LLTokenizer:
        wrapper = self._library.TokenizerWrapper(_LLGuidanceVocabulary(processor))
        return self._library.LLTokenizer(wrapper, eos_token=processor.vocabulary.eos)

    def matcher(self, source: _Source) -> LLMatcher:
        if source not in self._matchers:
            self._matchers[source] = self._compile(source)
            if len(self._matchers) > _MAX_COMPILED:
                self._matchers.popitem(last=False)
        self._matchers.move_to_end(source)
        return self._matchers[source].deep_copy()

    def _compile(self, source: _Source) -> LLMatcher:
        _check_chains(source)
        limits = self._library.LLParserLimits(verbose_errors=False)
        try:
            grammar = self._grammar(source)
        except ValueError as error:  # for example, for numbers beyond 64 bits
            raise _invalid(source, str(error)) from None
        matcher = self._library.LLMatcher(self._tokenizer, grammar, log_level=0, limits=limits)
        if matcher.is_error():
            raise _invalid(source, matcher.get_error())
        return matcher

    def _grammar(self, source: _Source) -> str:
        matcher_class = self._library.LLMatcher
        if source.name == "json_schema":
            schema = {"x-guidance": _JSON_OPTIONS} | json.loads(source.text)
            return str(matcher_class.grammar_from_json_schema(schema))
        if source.name == "regex":
            return str(matcher_class.grammar_from_regex(source.text))
        return str(matcher_class.grammar_from_lark(source.text))


class _LLGuidanceVocabulary:
    """The vocabulary in llguidance's form. Only text, eos and begin_image have bytes, so a grammar
    cannot name any other token."""

    def __init__(self, processor: Processor) -> None:
        vocabulary = processor.vocabulary
        self._processor = processor
        self.bos_token_id, self.eos_token_id = vocabulary.bos, vocabulary.eos
        self.tokens = [processor.token_bytes(token) for token in range(vocabulary.size)]
        self.tokens[vocabulary.eos] = b"<end>"
        self.tokens[vocabulary.begin_image] = IMAGE.encode()
        self.special_token_ids = [vocabulary.eos, vocabulary.begin_image]

    def __call__(self, text: str | bytes) -> list[int]:
        return self._processor.encode_text(
            text.decode(errors="replace") if isinstance(text, bytes) else text
        )


def _check_chains(source: _Source) -> None:
    if source.name in _CHAIN_LIMITS:
        part, name, limit = _CHAIN_LIMITS[source.name]
        if (count := source.text.count(part)) > limit:
            raise SettingError(
                f"{source.name} has {count:,} {name}, limit {limit:,}: make it smaller"
            )


def _invalid(source: _Source, error: str) -> SettingError:
    return SettingError(f"{source.name} is not possible: {_first_error_line(error)}; correct it")


def _first_error_line(error: str) -> str:
    """The first line of the library's message; the others point into the source."""
    lines = [line.strip() for line in error.splitlines() if line.strip()]
    message = lines[0] if lines else "it is not valid"
    for line in lines:  # for a regular expression, only this line says what is wrong
        if line.startswith("error: "):
            message = line.removeprefix("error: ")
    return message.split("; following special tokens")[0][:200].rstrip(".")
