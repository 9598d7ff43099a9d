"""Asks a model many questions, for all evaluations: in batches, with greedy text and one seed per
image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias

from earlyfusion import SamplingParams

Numbers: TypeAlias = dict[str, Any]
"""Results of an evaluation, ready for JSON."""

BATCH = 16  # prompts that are answered, or images that are encoded, together
ANSWER_TOKENS = 64  # the longest answer to a question about an image


class Model(Protocol):
    """The model that is measured: `earlyfusion.Chameleon`, or anything with the same methods."""

    @property
    def image_tokenizer(self) -> Any: ...

    def generate_batch(
        self, prompts: Sequence[Any], *, output: Any, sampling: Any = None
    ) -> list[Any]: ...


def generate_replies(
    model: Model, prompts: Sequence[Any], output: str, sampling: Sequence[SamplingParams]
) -> list[Any]:
    """The replies to the prompts, in batches of `BATCH`; one set of settings for each prompt."""
    replies: list[Any] = []
    for start in range(0, len(prompts), BATCH):
        rows = slice(start, start + BATCH)
        replies += model.generate_batch(
            list(prompts[rows]), output=output, sampling=list(sampling[rows])
        )
    return replies


def greedy_sampling(prompts: Sequence[Any]) -> list[SamplingParams]:
    """Greedy text of at most `ANSWER_TOKENS` tokens for each prompt."""
    return [SamplingParams(temperature=0, max_tokens=ANSWER_TOKENS)] * len(prompts)


def seeded_sampling(count: int, seed: int, max_images: int | None = None) -> list[SamplingParams]:
    """The model's default settings for images, one seed per reply; text is greedy."""
    seeds = range(seed, seed + count)
    return [SamplingParams(temperature=0, max_images=max_images, seed=s) for s in seeds]


def share(values: Sequence[bool]) -> float | None:
    """The share of true values, from 0 to 1 in four digits; None if there are no values."""
    return round(sum(values) / len(values), 4) if values else None
