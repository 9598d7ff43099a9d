"""SamplingParams: how to choose each next token, text and image side by side. No torch here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from typing import Any

from earlyfusion.errors import SettingError


@dataclass(frozen=True)
class _Limit:
    kind: type
    low: float
    high: float
    remedy: str
    zero: bool = False

    def allows(self, value: object) -> bool:
        if isinstance(value, bool) or not isinstance(value, self.kind):
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
    "seed": _Limit(Integral, 0, 2**63 - 1, "a whole number from 0 to 2^63 - 1"),
}
_MAX_STOPS = 16
_GROUPS = {"text": "", "image": "image_", "guidance": "guidance_"}


@dataclass(frozen=True)
class SamplingParams:
    """What the caller asks of the draw; None takes the model's own default.

    `temperature` 0 is greedy: the likeliest token after the repetition penalty, which counts the
    whole history, prompt included. `top_p`, `top_k`, `min_p` and `repetition_penalty` shape text,
    the `image_` fields codes. `guidance_text` and `guidance_image` are the two weights of Meta's
    three-branch guidance, both 1 for none. `max_tokens` counts every new token, of text and of
    images. `stop` ends the reply before the first of these strings. `jacobi` is the number of codes
    of a picture that are read at once (generation/jacobi.py), 0 or None for one by one. Impossible
    values raise `SettingError`.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    image_temperature: float | None = None
    image_top_p: float | None = None
    image_top_k: int | None = None
    guidance_text: float | None = None
    guidance_image: float | None = None
    max_tokens: int | None = None
    max_images: int | None = None
    stop: str | tuple[str, ...] | list[str] | None = None
    seed: int | None = None
    jacobi: int | None = None

    def __post_init__(self) -> None:
        for name, limit in _LIMITS.items():
            value = getattr(self, name)
            if value is not None and not limit.allows(value):
                raise SettingError(f"{name}={_shown(value)} is not possible: use {limit.remedy}")
        if self.stop is not None:
            object.__setattr__(self, "stop", _stops(self.stop))

    @classmethod
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
        """Fill what is None from a model's `generation_config.json`, and the rest from `meta()`.

        `defaults` is that file's dict, or only its "chameleon" part. `max_tokens`, `max_images`,
        `stop`, `seed` and `jacobi` stay None where nobody sets them.
        """
        own = {k: v for k, v in _values(self).items() if v is not None}
        return replace(SamplingParams.meta(), **(_flat(defaults) | own))

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return tuple(self.stop or ())


def _values(params: SamplingParams) -> dict[str, Any]:
    return {f.name: getattr(params, f.name) for f in fields(params)}


def _flat(defaults: Mapping[str, Any]) -> dict[str, Any]:
    known = {f.name for f in fields(SamplingParams)}
    source = defaults.get("chameleon", {} if "eos_token_id" in defaults else defaults)
    found = dict(source)
    for group, prefix in _GROUPS.items():
        if isinstance(source.get(group), Mapping):
            found |= {prefix + name: value for name, value in source[group].items()}
    return {k: v for k, v in found.items() if k in known and v is not None}


def _stops(stop: object) -> tuple[str, ...]:
    strings = (stop,) if isinstance(stop, str) else stop
    if not isinstance(strings, tuple | list) or not all(isinstance(s, str) for s in strings):
        raise SettingError(f"stop={_shown(stop)} is not possible: use a string or a list of them")
    if "" in strings:
        raise SettingError("stop='' would end every reply at once: leave it out")
    if len(strings) > _MAX_STOPS:
        raise SettingError(f"stop has {len(strings)} strings, limit {_MAX_STOPS}: leave some out")
    return tuple(strings)


def _shown(value: Any) -> str:
    if isinstance(value, int) and value.bit_length() > 128:  # too long for str()
        return "<a huge number>"
    if not isinstance(value, str | Real):
        return f"<{type(value).__name__}>"
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 40 else text[:40] + "…"
