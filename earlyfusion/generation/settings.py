"""SamplingParams: how to choose each next token, text and image side by side. Without torch."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from functools import cache
from numbers import Integral, Real
from typing import Any, Literal, NamedTuple, TypeAlias, TypedDict

from earlyfusion.errors import SettingError

Output: TypeAlias = Literal["text", "image", "interleaved", "auto"]
"""What a reply may contain: text, images, or both in an order that the model chooses. "auto" is
"interleaved", or "text" for a model that cannot generate images."""
LogitsProcessor: TypeAlias = Callable[[list[int], Any], Any]
"""(ids, logits) -> logits. `ids` are the tokens of prompt and reply; `logits` are those of the next
token, fp32 [V] on the model's device."""

JsonSchema: TypeAlias = str | dict[str, Any]
"""A JSON schema, as text or as an object."""


@dataclass(frozen=True)
class _Limit:
    """The possible values of a setting: numbers of one type from `low` to `high`, and with `zero`
    also 0, which turns the setting off. `remedy` says so in an error message."""

    number_type: type
    low: float
    high: float
    remedy: str
    zero: bool = False

    def allows(self, value: object) -> bool:
        # Most values are plain numbers, which the abstract types check slowly.
        plain = type(value) is int or (type(value) is float and self.number_type is Real)
        # In Python True is an int.
        if not plain and (isinstance(value, bool) or not isinstance(value, self.number_type)):
            return False
        number: Any = value
        return bool((self.zero and number == 0) or self.low <= number <= self.high)


_TEMPERATURE = _Limit(Real, 0.01, 100, "0 (greedy) or a number from 0.01 to 100", zero=True)
_TOP_P = _Limit(Real, math.nextafter(0, 1), 1, "a number above 0 and at most 1 (1 is off)")
_TOP_K = _Limit(Integral, 0, 2**31 - 1, "a whole number from 0 (off) up")
_GUIDANCE = _Limit(Real, 0, 100, "a number from 0 to 100 (1 is off)")

_LIMITS = {
    "temperature": _TEMPERATURE,
    "top_p": _TOP_P,
    "top_k": _TOP_K,
    "min_p": _Limit(Real, 0, 1, "a number from 0 (off) to 1"),
    "repetition_penalty": _Limit(Real, 0.01, 100, "a number from 0.01 to 100 (1 is off)"),
    "image_temperature": _TEMPERATURE,
    "image_top_p": _TOP_P,
    "image_top_k": _TOP_K,
    "guidance_text": _GUIDANCE,
    "guidance_image": _GUIDANCE,
    "max_tokens": _Limit(Integral, 1, 2**31 - 1, "a whole number from 1 up"),
    "max_images": _Limit(Integral, 0, 2**31 - 1, "a whole number from 0 up"),
    "jacobi": _Limit(Integral, 2, 1024, "0 (off) or a whole number from 2 to 1,024", zero=True),
    "prompt_lookup": _Limit(Integral, 1, 64, "0 (off) or a whole number from 1 to 64", zero=True),
    "seed": _Limit(Integral, 0, 2**63 - 1, "a whole number from 0 to 2^63 - 1"),
    "logprobs": _Limit(Integral, 0, 100, "a whole number from 0 (only the sampled token's) to 100"),
}
# Settings that are lists of strings, and the maximum number of strings.
_MAX_STRINGS = {"stop": 16, "bad_words": 256, "allowed_words": 256}
_MAX_STRING_LENGTH = 1000  # characters; each step compares the text with all strings
# Fields that constrain all text of a reply; a request may set only one of them.
_TEXT_CONSTRAINTS = ("json_schema", "regex", "grammar", "allowed_words")
_MAX_CONSTRAINT_LENGTH = 100_000  # characters
# The groups in the "chameleon" part of generation_config.json, and the prefix of their fields here.
_GROUPS = {"text": "", "image": "image_", "guidance": "guidance_"}


@dataclass(frozen=True)
class SamplingParams:
    """How to sample tokens; None takes the model's default. Raises `SettingError` for impossible
    values.

    `temperature` 0 is greedy: the likeliest token after the repetition penalty, which counts the
    whole history, prompt included. `top_p`, `top_k`, `min_p` and `repetition_penalty` apply to
    text, the `image_` fields to codes. `guidance_text` and `guidance_image` are the two weights of
    Meta's guidance under three conditions; both 1 is off. `max_tokens` counts every new token, of
    text and of images. `stop` ends the reply before the first of these strings. `jacobi` is the
    number of codes of an image that are sampled at once (generation/jacobi.py), `prompt_lookup` the
    number of text tokens that are guessed and read at once without changing the result
    (generation/lookup.py). `negative_prompt` replaces the unconditional branch of guidance, so
    images move away from what it describes; it is refused without guidance, where it would have
    no effect.

    `bad_words` never appear in the reply's text, however they are split into tokens. With
    `allowed_words` all text consists of these words, separated by a space or a newline. With one
    of `json_schema`, `regex` and `grammar` (Lark, in llguidance's form) the reply has one text that
    fits it (generation/constraint.py); a schema is kept as JSON. `logits_processors` change the
    logits of every sampled token after guidance and before the grammar's mask, the penalty and the
    temperature. `logprobs` adds the log-probability of each sampled token, and those of the
    `logprobs` likeliest (generation/steering.py). A request with any of these fields is sampled
    without `jacobi` and `prompt_lookup`. With `logits_processors` or `logprobs` it is also sampled
    apart from other requests, from the whole vocabulary.
    """

    temperature: float | None = None
    """Randomness of text; 0 takes the likeliest token."""
    top_p: float | None = None
    """Keep the likeliest tokens of text up to this share of probability; 1 is off."""
    top_k: int | None = None
    """Keep this many of the likeliest tokens of text; 0 is off."""
    min_p: float | None = None
    """Drop tokens of text below this share of the likeliest one; 0 is off."""
    repetition_penalty: float | None = None
    """Above 1, tokens that were seen before become less likely; 1 is off."""
    image_temperature: float | None = None
    """As temperature, for images."""
    image_top_p: float | None = None
    """As top-p, for images."""
    image_top_k: int | None = None
    """As top-k, for images."""
    guidance_text: float | None = None
    """How closely images follow the text of the prompt; 1 is off."""
    guidance_image: float | None = None
    """How closely images follow the images of the prompt; 1 is off."""
    max_tokens: int | None = None
    """Most new tokens, of text and images together."""
    max_images: int | None = None
    """Most images in the reply."""
    stop: str | tuple[str, ...] | list[str] | None = None
    """Ends the reply before this text."""
    seed: int | None = None
    """The same seed gives the same bytes."""
    jacobi: int | None = None
    """Image codes that are sampled at once; 0 is off."""
    prompt_lookup: int | None = None
    """Tokens of text that are guessed from earlier text and read at once; 0 is off."""
    negative_prompt: str | None = None
    """What images should not show; needs guidance."""
    bad_words: str | tuple[str, ...] | list[str] | None = None
    """Text that never comes in the reply."""
    allowed_words: str | tuple[str, ...] | list[str] | None = None
    """Makes the text of such words alone."""
    json_schema: JsonSchema | None = None
    """Makes the text JSON that fits this schema."""
    regex: str | None = None
    """Makes the text fit this regular expression."""
    grammar: str | None = None
    """Makes the text fit this Lark grammar."""
    logits_processors: (
        LogitsProcessor | tuple[LogitsProcessor, ...] | list[LogitsProcessor] | None
    ) = None
    logprobs: int | None = None

    def __post_init__(self) -> None:
        for name, limit in _LIMITS.items():
            value = getattr(self, name)
            if value is not None and not limit.allows(value):
                raise SettingError(
                    f"{name}={_short_repr(value)} is not possible: use {limit.remedy}"
                )
            # numpy's numbers become Python's, which JSON and compiled code can take.
            if value is not None and type(value) not in (int, float):
                plain = int(value) if limit.number_type is Integral else float(value)
                object.__setattr__(self, name, plain)
        if self.negative_prompt is not None:
            _check_negative_prompt(self.negative_prompt)
        for name in _MAX_STRINGS:
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _strings(name, getattr(self, name)))
        self._check_constraints()
        if self.logits_processors is not None:
            processors = _processors(self.logits_processors)
            object.__setattr__(self, "logits_processors", processors)
        for name, what in (("jacobi", "codes"), ("prompt_lookup", "tokens")):
            if getattr(self, name) and self.steered:
                raise SettingError(
                    f"{name}={getattr(self, name)} samples several {what} at once, which "
                    f"{self.steered} cannot follow: set {name} to 0 or leave the other out"
                )

    def _check_constraints(self) -> None:
        if self.json_schema is not None:
            object.__setattr__(self, "json_schema", _schema_text(self.json_schema))
        for name in ("json_schema", "regex", "grammar"):
            if getattr(self, name) is not None:
                _check_constraint(name, getattr(self, name))
        named = [name for name in _TEXT_CONSTRAINTS if getattr(self, name)]
        if len(named) > 1:
            raise SettingError(f"{named[0]} and {named[1]} both say what text may be: give one")

    @property
    def constrained(self) -> str:
        """The name of the set field among `json_schema`, `regex` and `grammar`, or ""."""
        return next((name for name in _TEXT_CONSTRAINTS[:3] if getattr(self, name)), "")

    @property
    def steered(self) -> str:
        """The name of a set field for which a request needs a `Steering`, or ""."""
        for name in ("bad_words", *_TEXT_CONSTRAINTS, "logits_processors"):
            if getattr(self, name):
                return name
        return "" if self.logprobs is None else "logprobs"

    @classmethod
    @cache
    def meta(cls) -> SamplingParams:
        """The settings of Meta's own inference code."""
        return cls(
            temperature=0.7,
            top_p=0.9,
            top_k=0,
            min_p=0.0,
            repetition_penalty=1.2,
            image_temperature=0.7,
            image_top_p=0.9,
            image_top_k=0,
            guidance_text=3.0,
            guidance_image=1.2,
        )

    def resolved(self, defaults: Mapping[str, Any]) -> SamplingParams:
        """Fill None fields from a model's `generation_config.json`, then from `meta()`. `defaults`
        is that file's dict, or only its "chameleon" part. Fields that neither sets, such as
        `max_tokens`, `stop` and `seed`, stay None."""
        explicit = {k: v for k, v in _values(self).items() if v is not None}
        return replace(SamplingParams.meta(), **(_flatten_groups(defaults) | explicit))

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return tuple(self.stop or ())


class ModalitySettings(NamedTuple):
    """How a row is sampled in one modality. `top_k` and `min_p` are off at 0, `top_p` and `penalty`
    at 1; `temperature` 0 is greedy."""

    temperature: float
    top_k: float
    top_p: float
    min_p: float
    penalty: float

    @property
    def truncates(self) -> bool:
        """Whether any setting cuts off the tail of the distribution."""
        return self.top_k != 0 or self.top_p != 1 or self.min_p != 0


def text_settings(p: SamplingParams) -> ModalitySettings:
    return ModalitySettings(
        *_resolved(p.temperature, p.top_k, p.top_p, p.min_p, p.repetition_penalty)
    )


def image_settings(p: SamplingParams) -> ModalitySettings:
    # Meta's settings of images have neither min-p nor a penalty.
    return ModalitySettings(*_resolved(p.image_temperature, p.image_top_k, p.image_top_p, 0.0, 1.0))


def guidance_weights(p: SamplingParams) -> tuple[float, float]:
    """The weights of guidance: text, image."""
    text, image = _resolved(p.guidance_text, p.guidance_image)
    return text, image


def seed_of(p: SamplingParams) -> int:
    if p.seed is None:
        raise TypeError("a request needs a seed: the caller chooses one if the user gave none")
    return p.seed


def _resolved(*values: float | None) -> list[float]:
    # TypeError, as this is a mistake of the calling code, not of the user.
    numbers = [value for value in values if value is not None]
    if len(numbers) < len(values):
        raise TypeError("these SamplingParams are not resolved: call .resolved(defaults) first")
    return numbers


def _values(params: SamplingParams) -> dict[str, Any]:
    return {name: getattr(params, name) for name in _NAMES}


_NAMES = tuple(f.name for f in fields(SamplingParams))


def _flatten_groups(defaults: Mapping[str, Any]) -> dict[str, Any]:
    # A generation_config.json without our part holds transformers' settings, which do not describe
    # Chameleon's sampling.
    source = defaults.get("chameleon", {} if "eos_token_id" in defaults else defaults)
    if not isinstance(source, Mapping):
        raise SettingError(
            f"chameleon={_short_repr(source)} in generation_config.json is not possible: make it "
            "an object of settings"
        )
    settings = dict(source)
    for group, prefix in _GROUPS.items():
        if isinstance(source.get(group), Mapping):
            settings |= {prefix + name: value for name, value in source[group].items()}
    return {k: v for k, v in settings.items() if k in _NAMES and v is not None}


class SamplingFields(TypedDict, total=False):
    """The fields of `SamplingParams` as keywords of `generate`, which handles the seed itself."""

    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    repetition_penalty: float | None
    image_temperature: float | None
    image_top_p: float | None
    image_top_k: int | None
    guidance_text: float | None
    guidance_image: float | None
    max_tokens: int | None
    max_images: int | None
    stop: str | tuple[str, ...] | list[str] | None
    jacobi: int | None
    prompt_lookup: int | None
    negative_prompt: str | None
    bad_words: str | tuple[str, ...] | list[str] | None
    allowed_words: str | tuple[str, ...] | list[str] | None
    json_schema: JsonSchema | None
    regex: str | None
    grammar: str | None
    logits_processors: LogitsProcessor | tuple[LogitsProcessor, ...] | list[LogitsProcessor] | None
    logprobs: int | None


def check_names(names: Iterable[str], others: Iterable[str]) -> None:
    """Raise `SettingError` for a name that is neither a field nor one of `others`."""
    known = [*others, *SamplingFields.__annotations__]
    for name in names:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            remedy = f"did you mean {near[0]}?" if near else f"use one of {', '.join(known)}"
            raise SettingError(f"there is no setting {_short_repr(name)}: {remedy}")


def explicit_values(sampling: SamplingParams | None, by_name: Mapping[str, Any]) -> dict[str, Any]:
    """The values that a caller has set, without None: those of `sampling`, overridden by those in
    `by_name`, which are checked by `resolve`, not here."""
    if not isinstance(sampling, SamplingParams | None):
        raise SettingError(
            f"sampling is a {type(sampling).__name__}: give SamplingParams or leave it out"
        )
    values = {} if sampling is None else _values(sampling)
    return {name: value for name, value in [*values.items(), *by_name.items()] if value is not None}


def resolve(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> SamplingParams:
    """As `SamplingParams.resolved`, for values by name, which are checked here."""
    return replace(SamplingParams.meta(), **(_flatten_groups(defaults) | dict(values)))


def _check_negative_prompt(value: object) -> None:
    if not isinstance(value, str) or not value.strip():
        raise SettingError(
            f"negative_prompt={_short_repr(value)} is not possible: use words, or leave it out"
        )


def _schema_text(value: Any) -> str:
    try:
        schema = json.loads(value) if isinstance(value, str) else value
        if not isinstance(schema, dict):
            raise TypeError
        return json.dumps(schema, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        raise SettingError(
            f"json_schema={_short_repr(value)} is not possible: use a JSON schema that is an object"
        ) from None


def _check_constraint(name: str, value: object) -> None:
    if not isinstance(value, str) or not value:
        raise SettingError(
            f"{name}={_short_repr(value)} is not possible: use a text, or leave it out"
        )
    if len(value) > _MAX_CONSTRAINT_LENGTH:
        raise SettingError(
            f"{name} has {len(value):,} characters, limit {_MAX_CONSTRAINT_LENGTH:,}: shorten it"
        )


def _strings(name: str, value: object) -> tuple[str, ...]:
    strings = (value,) if isinstance(value, str) else value
    if not isinstance(strings, tuple | list) or not all(isinstance(s, str) for s in strings):
        raise SettingError(
            f"{name}={_short_repr(value)} is not possible: use a string or a list of them"
        )
    if "" in strings:
        ends = "would end every reply at once" if name == "stop" else "is not a word"
        raise SettingError(f"{name}='' {ends}: leave it out")
    for string in strings:
        if not _is_utf8(string):
            raise SettingError(
                f"{name}={_short_repr(string)} holds half a character (a lone surrogate): "
                "read it again as UTF-8"
            )
    if len(strings) > _MAX_STRINGS[name]:
        raise SettingError(
            f"{name} has {len(strings)} strings, limit {_MAX_STRINGS[name]}: leave some out"
        )
    longest = max(map(len, strings), default=0)
    if longest > _MAX_STRING_LENGTH:
        raise SettingError(
            f"{name} has a string of {longest:,} characters, limit {_MAX_STRING_LENGTH:,}: "
            "shorten it"
        )
    return tuple(strings)


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _processors(value: Any) -> tuple[LogitsProcessor, ...]:
    processors = value if isinstance(value, tuple | list) else (value,)
    for processor in processors:
        if not callable(processor):
            raise SettingError(
                f"logits_processors holds a {type(processor).__name__}: "
                "give functions of (ids, logits) that return logits"
            )
    return tuple(processors)


def _short_repr(value: Any) -> str:
    if isinstance(value, int) and value.bit_length() > 128:  # too long for str()
        return "<a huge number>"
    if not isinstance(value, str | Real):
        return f"<{type(value).__name__}>"
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 40 else text[:40] + "…"
