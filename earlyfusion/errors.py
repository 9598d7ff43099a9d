"""Errors. Every mistake that a caller can make is an `EarlyFusionError`. Its text is one sentence
that names the value, the limit and the remedy. The command line turns it into exit code 2, a server
into a 4xx reply."""

from __future__ import annotations

import re
from collections.abc import Iterable

_LONGEST, _HEAD, _TAIL = 4000, 2500, 1000
_VALUE_HEAD, _VALUE_TAIL = 120, 40
# A value in quotes, which do not begin or end within a word, or else a word.
_LONG_VALUE = re.compile(r"""(?<![^\s=(:,])(['"])(?:(?!\1).){300,}\1(?!\w)|\S{301,}""", re.DOTALL)


class EarlyFusionError(ValueError):
    """A caller's mistake; `str(error)` is one sentence for a person, of bounded length."""

    def __init__(self, message: str = "", *more: object) -> None:
        super().__init__(shortened(str(message)), *more)


def shortened(sentence: str) -> str:
    """A sentence of at most 4,000 characters, in words and quoted values of at most 300: a value
    that it repeats may be of any length. Its beginning and its end stay."""
    sentence = _LONG_VALUE.sub(lambda found: _cut(found[0], _VALUE_HEAD, _VALUE_TAIL), sentence)
    return sentence if len(sentence) <= _LONGEST else _cut(sentence, _HEAD, _TAIL)


def _cut(text: str, head: int, tail: int) -> str:
    return f"{text[:head]}…{text[-tail:]}"


class PromptError(EarlyFusionError):
    """The prompt is empty, malformed, or its images and placeholders do not match."""


class ContextError(PromptError):
    """Prompt and reply do not fit into the model's context."""


class ImageError(EarlyFusionError):
    """An image cannot be read, is too large, or has codes that the model does not know."""


class SettingError(EarlyFusionError):
    """An option has an unknown name or an impossible value."""

    @classmethod
    def unknown(cls, name: str, value: object, choices: Iterable[str]) -> SettingError:
        """The error for a value that is not one of `choices`."""
        shown = repr(value[:40]) if isinstance(value, str) else f"<{type(value).__name__}>"
        return cls(f"{name}={shown} is unknown: use one of {', '.join(choices)}")


class CheckpointError(EarlyFusionError):
    """A checkpoint, tokenizer or config file is missing, incomplete or inconsistent."""


class WeightsError(EarlyFusionError):
    """The weights give NaN or infinite numbers, from which no token can be sampled."""


class OutOfMemoryError(EarlyFusionError):
    """There was not enough memory for a step with this request."""


class DataError(EarlyFusionError):
    """Training data is missing or malformed."""
