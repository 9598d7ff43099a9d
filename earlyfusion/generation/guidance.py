"""Guidance: an image is drawn from up to three branches of one request (Meta's formula).

full: the whole history. image_only: its images without the words. unconditional: no history at all.
Guided logits = unconditional + image * (image_only - unconditional) + text * (full - image_only).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from torch import Tensor

from earlyfusion.vocabulary import ImageLayout, Vocabulary

Branch = Literal["full", "image_only", "unconditional"]


def combine(
    full: Tensor,
    image_only: Tensor,
    unconditional: Tensor,
    text: float | Tensor,
    image: float | Tensor,
) -> Tensor:
    """Raw logits of the three branches, any one shape, before any mask or temperature."""
    return unconditional + image * (image_only - unconditional) + text * (full - image_only)


def needed(text: float, image: float, has_images: bool) -> tuple[Branch, ...]:
    """The fewest branches that give the formula's value; `full` comes first.

    Without images in the history image_only equals unconditional; a weight of 1, or two equal
    weights, cancel one branch or both.
    """
    if not has_images:
        return ("full",) if text == 1 else ("full", "unconditional")
    if text == image:
        return ("full",) if text == 1 else ("full", "unconditional")
    return ("full", "image_only") if image == 1 else ("full", "image_only", "unconditional")


def mix(logits: Mapping[Branch, Tensor], text: float, image: float) -> Tensor:
    """`combine` over the branches that `needed` named: one that is missing cancels out."""
    full = logits["full"]
    if len(logits) == 1:
        return full
    image_only = logits["image_only"] if "image_only" in logits else logits["unconditional"]
    return combine(full, image_only, logits.get("unconditional", image_only), text, image)


def prompt(
    branch: Branch,
    history: Sequence[int],
    vocabulary: Vocabulary,
    layout: ImageLayout | None = None,
) -> list[int]:
    """What a branch has read when an image begins; `history` ends with begin_image.

    `layout` tells what stands before an image without a prompt, and which marks are in an image;
    None is Chameleon's.
    """
    if branch == "full":
        return list(history)
    if branch == "unconditional":
        before = [vocabulary.bos] if layout is None else map(vocabulary.id_of, layout.before)
        return [*before, vocabulary.begin_image]
    marks = {vocabulary.bos, vocabulary.begin_image, vocabulary.end_image}
    if layout is not None:
        marks |= {vocabulary.id_of(n) for n in (*layout.head, *layout.line_end, *layout.tail)}
    kept = marks | set(vocabulary.image_tokens.tolist())
    # Size tokens, which follow the begin mark, may be those of pictures of another size.
    sizes, begin = 0 if layout is None else len(layout.head) - 1, vocabulary.begin_image
    return [
        token
        for at, token in enumerate(history)
        if token in kept or begin in history[max(at - sizes, 0) : at]
    ]


def has_images(history: Sequence[int], vocabulary: Vocabulary) -> bool:
    """Whether the image-only branch has more to read than the unconditional one."""
    unconditional = prompt("unconditional", history, vocabulary)
    return prompt("image_only", history, vocabulary) != unconditional
