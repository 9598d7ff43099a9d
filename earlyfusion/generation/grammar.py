"""Grammar: which tokens may come next, as an automaton over the vocabulary.

The state is one integer tensor with a row per sequence, so a step costs a few device operations and
never waits for the device. An image is spelled by the layout's template: one slot per token, either
for a code or for a fixed id; the first is begin_image. Outside of an image, text may come, or
begin_image if a whole image still fits.
"""

# Shapes: B rows, V vocabulary, F fields of the state, K classes of slots.

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from earlyfusion.errors import SettingError
from earlyfusion.generation.settings import Output
from earlyfusion.vocabulary import CODE, ImageLayout, Vocabulary

# Fields of the state: the slot of the template that comes next (0 outside of an image, the length
# of the template after the reply), how many images may still begin, how many tokens may still come,
# and whether the output may have text.
SLOT, IMAGES_LEFT, TOKENS_LEFT, TEXT_ALLOWED = range(4)


class Grammar:
    """The rules of one vocabulary and one image layout. Rows of a batch may have different outputs.
    `stops` are ids besides eos that end a reply. `size` is the width of the logits if that is not
    the number of the tokenizer's tokens."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        layout: ImageLayout,
        stops: Sequence[int] = (),
        size: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        template = layout.template(vocabulary).tolist()
        ends = sorted({vocabulary.eos, *stops})
        classes_KV, class_of_slot = _slot_classes(
            vocabulary, template, ends, size or vocabulary.size
        )
        self.device = torch.device(device)
        self.template = template
        self.image_tokens = len(template)
        self.end_ids = frozenset(ends)
        self.text_ids = frozenset([*vocabulary.text_tokens.tolist(), *ends, vocabulary.begin_image])
        self.plain_ids = frozenset(vocabulary.text_tokens.tolist()) - self.end_ids
        self.code_ids = vocabulary.image_tokens.tolist()
        self.begin_image = vocabulary.begin_image
        # Per slot: the number of codes before it, the number of consecutive codes from it on, and
        # its id if it is fixed.
        self.codes_before = [0, *accumulate(token == CODE for token in template)]
        self.codes_ahead = _consecutive_codes(template)
        self.fixed = [None if token == CODE else token for token in template]
        self._done = len(template)
        self._ends = torch.tensor(ends).to(device)
        self._classes_KV, self._class_of_slot = classes_KV.to(device), class_of_slot.to(device)

    @property
    def tables(self) -> tuple[Tensor, Tensor]:
        """The ids that each class of slots allows, bool [K, V], and the class of each slot. A last
        slot stands for "after the reply"."""
        return self._classes_KV, self._class_of_slot

    def start(
        self, outputs: Sequence[Output], max_images: Sequence[int], max_tokens: Sequence[int]
    ) -> Tensor:
        """States of rows with at most `max_images` images and `max_tokens` tokens each."""
        rows = [self.start_row(*row) for row in zip(outputs, max_images, max_tokens, strict=True)]
        return torch.tensor(rows, dtype=torch.int64).to(self.device)

    def mask(self, state_BF: Tensor) -> Tensor:
        """bool [B, V], True where a token may come next; after a reply, only ids that end one."""
        allowed_BV = self._classes_KV[self._class_of_slot[state_BF[:, SLOT]]]
        outside_B = state_BF[:, SLOT] == 0
        fits_B = state_BF[:, TOKENS_LEFT] >= self.image_tokens
        begins_B = outside_B & (state_BF[:, IMAGES_LEFT] > 0) & fits_B
        only_image_B = outside_B & (state_BF[:, TEXT_ALLOWED] == 0)
        allowed_BV = allowed_BV & ~only_image_B[:, None]
        # The class of slot 0 only has text: whether begin_image may come depends on what is left.
        begin_image_B = torch.where(outside_B, begins_B, allowed_BV[:, self.begin_image])
        allowed_BV[:, self.begin_image] = begin_image_B
        return allowed_BV

    def advance(self, state_BF: Tensor, token_B: Tensor) -> Tensor:
        """The states after these tokens, which `mask` allowed. Rows that are done do not change."""
        slot_B, images_left_B, tokens_left_B, text_allowed_B = state_BF.unbind(-1)
        done_B = slot_B == self._done
        begins_B = (slot_B == 0) & (token_B == self.begin_image)
        stops_B = (slot_B == 0) & torch.isin(token_B, self._ends)
        slot_B = torch.where((slot_B > 0) | begins_B, (slot_B + 1) % self._done, slot_B)
        images_left_B = images_left_B - begins_B.long()
        tokens_left_B = tokens_left_B - 1
        # Without text, a reply ends once no further image may begin or fit.
        no_image_B = (images_left_B == 0) | (tokens_left_B < self.image_tokens)
        exhausted_B = (text_allowed_B == 0) & no_image_B & (slot_B == 0)
        ends_B = stops_B | exhausted_B | (tokens_left_B == 0)
        slot_B = slot_B.masked_fill(ends_B, self._done)
        after_BF = torch.stack([slot_B, images_left_B, tokens_left_B, text_allowed_B], dim=-1)
        return torch.where(done_B[:, None], state_BF, after_BF)

    def done(self, state_BF: Tensor) -> Tensor:
        """True for rows whose reply has ended."""
        return state_BF[:, SLOT] == self._done

    def in_image(self, state_BF: Tensor) -> Tensor:
        """True for rows whose next token belongs to an image that has begun."""
        return (state_BF[:, SLOT] > 0) & ~self.done(state_BF)

    def start_row(self, output: Output, max_images: int, max_tokens: int) -> list[int]:
        if output == "text":
            max_images = 0
        elif output == "image" and (max_images < 1 or max_tokens < self.image_tokens):
            raise SettingError(
                f"an image of {self.image_tokens} tokens does not fit: max_images is {max_images} "
                f"and {max_tokens} tokens are left; raise max_tokens or max_images, or shorten the "
                "prompt"
            )
        slot = 0 if max_tokens > 0 else self._done
        return [slot, max_images, max_tokens, int(output != "image")]


def _consecutive_codes(template: Sequence[int]) -> list[int]:
    """The number of consecutive codes from each slot on; the last entry is that of "done"."""
    counts = [0]
    for token in reversed(template):
        counts.append(counts[-1] + 1 if token == CODE else 0)
    return counts[::-1]


def _slot_classes(
    vocabulary: Vocabulary, template: Sequence[int], ends: Sequence[int], size: int
) -> tuple[Tensor, Tensor]:
    """Allowed ids per class of slots, and the class of each slot; the last is "done"."""
    ids: dict[str | int, list[int]] = {
        "text": [*vocabulary.text_tokens.tolist(), *ends],
        "done": list(ends),
        CODE: vocabulary.image_tokens.tolist(),
    }
    for token in template[1:]:
        ids.setdefault(token, [token])
    classes_KV = torch.zeros(len(ids), size, dtype=torch.bool)
    for index, allowed in enumerate(ids.values()):
        classes_KV[index, allowed] = True
    index_of = {name: index for index, name in enumerate(ids)}
    slots: list[str | int] = ["text", *template[1:], "done"]
    return classes_KV, torch.tensor([index_of[name] for name in slots])
