"""Guidance: an image is generated under up to three conditions of one request (Meta's formula).

Under `full` the model reads the whole history, under `image_only` its images without the words, and
under `unconditional` no history, or a negative prompt from which the image moves away.

Guided logits = unconditional + image * (image_only - unconditional) + text * (full - image_only),
where `image` and `text` are the weights of guidance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from torch import Tensor

from earlyfusion.content import Message
from earlyfusion.generation.settings import SamplingParams
from earlyfusion.processor import Processor
from earlyfusion.vocabulary import ImageLayout, Vocabulary

Condition = Literal["full", "image_only", "unconditional"]


def combine(
    full: Tensor,
    image_only: Tensor,
    unconditional: Tensor,
    text: float | Tensor,
    image: float | Tensor,
) -> Tensor:
    """Guided logits from raw ones of equal shape, before any mask or temperature."""
    return unconditional + image * (image_only - unconditional) + text * (full - image_only)


def needed_conditions(text: float, image: float, has_images: bool) -> tuple[Condition, ...]:
    """The conditions that the formula depends on, in the order full, image_only, unconditional;
    full is always one of them. Without images in the history, image_only equals unconditional."""
    # The same formula: text * full + (image - text) * image_only + (1 - image) * unconditional. A
    # condition with factor 0 is not needed.
    if not has_images:
        return ("full",) if text == 1 else ("full", "unconditional")
    if text == image:
        return ("full",) if text == 1 else ("full", "unconditional")
    return ("full", "image_only") if image == 1 else ("full", "image_only", "unconditional")


def combine_needed(logits: Mapping[Condition, Tensor], text: float, image: float) -> Tensor:
    """`combine` with the logits of the `needed_conditions` only."""
    full = logits["full"]
    if len(logits) == 1:
        return full
    # A missing condition equals the other one or has factor 0, so the other one's logits can
    # replace its own.
    image_only = logits["image_only"] if "image_only" in logits else logits["unconditional"]
    return combine(full, image_only, logits.get("unconditional", image_only), text, image)


def condition_prompt(
    condition: Condition,
    history: Sequence[int],
    vocabulary: Vocabulary,
    layout: ImageLayout | None = None,
    negative: Sequence[int] = (),
) -> list[int]:
    """The tokens that the model reads under a condition to generate an image; `history` ends with
    begin_image. `layout` (None: Chameleon's) gives the tokens that precede an unconditional image,
    and the markers of an image. `negative` are the tokens of a negative prompt, if any."""
    if condition == "full":
        return list(history)
    if condition == "unconditional" and negative:
        return [*negative, vocabulary.begin_image]
    if condition == "unconditional":
        before = [vocabulary.bos] if layout is None else map(vocabulary.id_of, layout.before)
        return [*before, vocabulary.begin_image]
    markers = {vocabulary.bos, vocabulary.begin_image, vocabulary.end_image}
    if layout is not None:
        markers |= {vocabulary.id_of(n) for n in (*layout.head, *layout.line_end, *layout.tail)}
    image_ids = markers | set(vocabulary.image_tokens.tolist())
    # Size tokens follow begin_image. Images in the history may have another size than this
    # layout's, so they are found by position, not by id.
    num_size_tokens, begin = 0 if layout is None else len(layout.head) - 1, vocabulary.begin_image
    return [
        token
        for at, token in enumerate(history)
        if token in image_ids or begin in history[max(at - num_size_tokens, 0) : at]
    ]


def negative_prompt_ids(processor: Processor, sampling: SamplingParams) -> list[int]:
    """The tokens of a negative prompt: bos, its words, end of turn. Empty without one."""
    if sampling.negative_prompt is None:
        return []
    return processor.encode([Message("user", sampling.negative_prompt)]).ids


def has_images(history: Sequence[int], vocabulary: Vocabulary) -> bool:
    """Whether image_only has more to read than unconditional; `history` ends with begin_image."""
    unconditional = condition_prompt("unconditional", history, vocabulary)
    return condition_prompt("image_only", history, vocabulary) != unconditional
