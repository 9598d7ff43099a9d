"""Texts and pictures to the inputs of the model classes, and generated ids back to both.

`<image>` in a text marks where a picture goes: begin mark, one placeholder a code, end mark. The
end-of-turn token closes every text unless `return_for_text_completion`; a text that begins with the
bos token or ends with eos, as chat templates make it, is taken as it is. As in transformers, a text
may spell control tokens here; the package's own `Processor` never lets it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from transformers import AutoTokenizer
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_utils import make_flat_list_of_images
from transformers.processing_utils import MultiModalData, ProcessorMixin
from transformers.utils import is_torchvision_available

from earlyfusion.content import Image, Segment, Text
from earlyfusion.errors import PromptError, SettingError
from earlyfusion.hf.image_processing import IMAGE_PROCESSORS, ChameleonImagesKwargs
from earlyfusion.vocabulary import (
    BEGIN_IMAGE,
    BOS,
    END_IMAGE,
    END_OF_TURN,
    EOS,
    IMAGE_PLACEHOLDERS,
    ImageLayout,
    Vocabulary,
)

_IMAGE_ARGUMENTS = frozenset(ChameleonImagesKwargs.__annotations__) | {
    "do_resize",
    "size",
    "resample",
    "do_center_crop",
    "crop_size",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "image_mean",
    "image_std",
    "do_convert_rgb",
    "input_data_format",
}
_MARK = IMAGE_PLACEHOLDERS[1]
# What transformers asks for to follow a template's `generation` past pictures.
_MOVES = "return_text_replacement_offsets"
_PARTS = ("text_kwargs", "images_kwargs", "common_kwargs")

# Turns as the model is trained on them: their parts with nothing between, then the end of the turn;
# an answer at the end is closed by eos. What an answer is trained on stands in `generation`.
CHAT_TEMPLATE = (
    "{% macro said(message) %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% elif part['type'] in ['image', 'image_url'] %}" + _MARK + "{% endif %}"
    "{% endfor %}{% endif %}{% endmacro %}" + BOS + "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ said(message) }}{% if loop.last %}" + EOS + "{% endif %}{% endgeneration %}"
    "{% else %}{{ said(message) }}{% endif %}"
    "{% if not loop.last or message['role'] == 'user' %}" + END_OF_TURN + "{% endif %}"
    "{% endfor %}"
)


class ChameleonProcessor(ProcessorMixin):
    """One tokenizer and one image processor, with the arguments and files of transformers' own."""

    def __init__(
        self,
        image_processor: Any,
        tokenizer: Any,
        image_seq_length: int = 1024,
        image_token: str = _MARK,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE)
        self.image_seq_length = image_seq_length
        self.image_token = getattr(tokenizer, "image_token", None) or image_token
        self.image_start_token = getattr(tokenizer, "boi_token", None) or BEGIN_IMAGE
        self.image_end_token = getattr(tokenizer, "eoi_token", None) or END_IMAGE
        ids = tokenizer.convert_tokens_to_ids
        self.image_token_id = ids(self.image_token)
        self.image_start_token_id = ids(self.image_start_token)
        self.image_end_token_id = ids(self.image_end_token)
        self.image_ids = self.image_token_ids  # its name before transformers 5.23

    @property
    def image_token_ids(self) -> list[int]:
        """Ids that belong to a picture in a prompt: placeholder, begin and end."""
        return [self.image_token_id, self.image_start_token_id, self.image_end_token_id]

    @property
    def vocabulary(self) -> Vocabulary:
        """All ids of the tokenizer by kind."""
        return Vocabulary(self.tokenizer.get_vocab())

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        *,
        return_for_text_completion: bool | None = None,
        return_mm_token_type_ids: bool | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """`input_ids` and `attention_mask` of the texts, `pixel_values` of all their pictures.

        Further arguments are the tokenizer's and the image processor's, flat or in `text_kwargs`,
        `images_kwargs` and `common_kwargs`. Raises `PromptError` where marks and pictures differ in
        number, or a truncation cuts a picture.
        """
        for_text, for_images = _shared_out(kwargs)
        completion = for_text.pop("return_for_text_completion", False)
        types = for_text.pop("return_mm_token_type_ids", False)
        moves = for_text.pop(_MOVES, False)
        completion = (
            completion if return_for_text_completion is None else return_for_text_completion
        )
        types = types if return_mm_token_type_ids is None else return_mm_token_type_ids
        kind = for_text.pop("return_tensors", "pt")
        texts = _texts(text, images)
        pictures = None if images is None else self._pictures(images)
        data: dict[str, Any] = {}
        if texts is not None:
            data |= self._tokens(texts, pictures, bool(completion), bool(types), for_text)
            data |= {_MOVES.removeprefix("return_"): list(map(self._moves, texts))} if moves else {}
        if pictures is not None:
            data |= self.image_processor(pictures, **({"return_tensors": "pt"} | for_images))
        skipped = [_MOVES.removeprefix("return_")]
        return BatchFeature(data, tensor_type=kind, skip_tensor_conversion=skipped)

    @property
    def model_input_names(self) -> list[str]:
        """Names of what `__call__` gives."""
        names = [*self.tokenizer.model_input_names, *self.image_processor.model_input_names]
        return list(dict.fromkeys(names))

    def post_process_image_text_to_text(
        self, generated_outputs: Any, skip_special_tokens: bool = True, **kwargs: Any
    ) -> list[str]:
        """The texts of generated ids; image tokens have none."""
        ids = [self._spoken(row) for row in _rows(generated_outputs)]
        texts: list[str] = self.tokenizer.batch_decode(
            ids, skip_special_tokens=skip_special_tokens, **kwargs
        )
        return texts

    def post_process_multimodal_output(
        self,
        generated_outputs: Any,
        skip_special_tokens: bool = True,
        generation_mode: str | None = None,
        **kwargs: Any,
    ) -> list[Any]:
        """What `generate` or `decode_image_tokens` gave, for a person.

        "text" (or None): a str for each row of ids. "image": a PIL picture for each row of pixels.
        "interleaved": for each row of ids the texts and pictures in order, the pictures as codes.
        """
        if generation_mode in (None, "text"):
            return self.post_process_image_text_to_text(
                generated_outputs, skip_special_tokens=skip_special_tokens, **kwargs
            )
        if generation_mode == "image":
            return to_pictures(generated_outputs)
        if generation_mode == "interleaved":
            vocabulary = self.vocabulary
            return [list(self._segments(row, vocabulary)) for row in _rows(generated_outputs)]
        raise SettingError(
            f"generation_mode={generation_mode!r} is unknown: use 'text', 'image' or 'interleaved'"
        )

    @classmethod
    def _get_arguments_from_pretrained(
        cls, pretrained_model_name_or_path: Any, processor_dict: Any = None, **kwargs: Any
    ) -> list[Any]:
        # transformers would look its own image processor up, as long as ours is not registered.
        backend = kwargs.pop("backend", None)
        backend = backend or ("torchvision" if is_torchvision_available() else "pil")
        if backend not in IMAGE_PROCESSORS:
            raise SettingError(f"backend={backend!r} is unknown: choose 'torchvision' or 'pil'")
        return [
            IMAGE_PROCESSORS[backend].from_pretrained(pretrained_model_name_or_path, **kwargs),
            AutoTokenizer.from_pretrained(pretrained_model_name_or_path, **kwargs),
        ]

    def _get_num_multimodal_tokens(self, image_sizes: Any = None, **kwargs: Any) -> MultiModalData:
        if image_sizes is None:
            return MultiModalData()
        count = len(image_sizes)
        tokens = [self.image_seq_length + len((BEGIN_IMAGE, END_IMAGE))] * count
        return MultiModalData(num_image_tokens=tokens, num_image_patches=[1] * count)

    def _pictures(self, images: Any) -> list[Any]:
        """All pictures in order; a string is a file, or an address that transformers fetches."""
        if isinstance(images, str):
            is_file = os.path.isfile(images)
            return [
                Image.open(images).pil if is_file else self.image_processor.fetch_images(images)
            ]
        if isinstance(images, list | tuple) and any(
            isinstance(i, str | list | tuple) for i in images
        ):
            return [picture for item in images for picture in self._pictures(item)]
        return make_flat_list_of_images(images)

    def _tokens(
        self,
        texts: list[str],
        pictures: list[Any] | None,
        completion: bool,
        types: bool,
        settings: dict[str, Any],
    ) -> dict[str, Any]:
        texts = [text.replace(_MARK, self.image_token) for text in texts]
        marks, count = sum(t.count(self.image_token) for t in texts), len(pictures or ())
        if marks != count:
            raise PromptError(
                f"the texts mark {marks} places with {_MARK} but {count} images are "
                "given: give one image a mark"
            )
        begins = settings.get("add_special_tokens", True) and not self._adds_bos
        whole = [self._closed(text, completion, begins) for text in texts]
        encoded = self.tokenizer(whole, **settings)
        kept = sum(row.count(self.image_token_id) for row in encoded["input_ids"])
        if kept != marks * self.image_seq_length:
            raise PromptError(
                f"truncation kept {kept} of {marks * self.image_seq_length} picture tokens: raise "
                "max_length or leave truncation out"
            )
        data = dict(encoded)
        if types:
            data["mm_token_type_ids"] = [
                np.isin(row, self.image_token_ids).astype(int).tolist()
                for row in encoded["input_ids"]
            ]
        return data

    def _closed(self, text: str, completion: bool, begins: bool) -> str:
        """A text with its pictures spelled, its start where the tokenizer adds none, its end."""
        bos = self.tokenizer.bos_token
        eos = self.tokenizer.eos_token
        templated = bool(bos and text.startswith(bos)) or bool(eos and text.endswith(eos))
        start = bos if begins and bos and not templated else ""
        end = "" if completion or templated else self.tokenizer.sep_token or END_OF_TURN
        return start + text.replace(self.image_token, self._spelled()) + end

    def _moves(self, text: str) -> list[dict[str, tuple[int, int]]]:
        """Where each mark of a text is, in letters, and where its spelled picture then is."""
        moves: list[dict[str, tuple[int, int]]] = []
        gain, length = 0, len(self._spelled())
        for mark in re.finditer("|".join(map(re.escape, (_MARK, self.image_token))), text):
            start, end = mark.span()
            moves.append({"span": (start, end), "new_span": (start + gain, start + gain + length)})
            gain += length - (end - start)
        return moves

    @property
    def _adds_bos(self) -> bool:
        return self.tokenizer.bos_token_id in self.tokenizer("")["input_ids"]

    def _spelled(self) -> str:
        inner = self.image_token * self.image_seq_length
        return f"{self.image_start_token}{inner}{self.image_end_token}"

    def _spoken(self, row: list[int]) -> list[int]:
        images = self._image_ids_set()
        return [token for token in row if token not in images]

    def _image_ids_set(self) -> frozenset[int]:
        if not hasattr(self, "_image_set"):
            self._image_set = frozenset(self.vocabulary.image_tokens.tolist())
        return self._image_set

    def _segments(self, row: list[int], vocabulary: Vocabulary) -> Iterator[Segment]:
        side = round(self.image_seq_length**0.5)
        layout = ImageLayout(side, self.image_seq_length // side)
        start = 0
        while start < len(row):
            if row[start] == vocabulary.begin_image:
                end = start + layout.num_tokens
                tokens = row[start:end]
                if len(tokens) == layout.num_tokens and self.image_token_id not in tokens:
                    yield Image(codes=layout.parse(tokens, vocabulary))
            else:
                later = (i for i in range(start, len(row)) if row[i] == vocabulary.begin_image)
                end = next(later, len(row))
                text = self.tokenizer.decode(row[start:end], skip_special_tokens=True).strip()
                if text:
                    yield Text(text)
            start = end


def to_pictures(pixels: Any) -> list[PIL.Image.Image]:
    """PIL pictures of pixels [n, 3, Y, X] in about [-1, 1], cut to 8 bits as in Meta's code."""
    pixels_nCYX = torch.as_tensor(pixels).detach().float().cpu().clamp(-1, 1)
    if pixels_nCYX.ndim != 4:
        raise SettingError(
            f"pictures have shape [n, 3, height, width], not {tuple(pixels_nCYX.shape)}: pass "
            "what model.decode_image_tokens gives"
        )
    pixels_nYXC = ((pixels_nCYX + 1) / 2 * 255).to(torch.uint8).permute(0, 2, 3, 1)
    return [PIL.Image.fromarray(picture.contiguous().numpy()) for picture in pixels_nYXC]


def _shared_out(kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tokenizer's and the image processor's arguments."""
    parts = {name: dict(kwargs.pop(name, None) or {}) for name in _PARTS}
    flat_images = {k: v for k, v in kwargs.items() if k in _IMAGE_ARGUMENTS}
    flat_text = {k: v for k, v in kwargs.items() if k not in _IMAGE_ARGUMENTS}
    tensors = {k: v for k, v in kwargs.items() if k == "return_tensors"}
    common = parts["common_kwargs"]
    for_text = common | flat_text | tensors | parts["text_kwargs"]
    return for_text, common | flat_images | tensors | parts["images_kwargs"]


def _texts(text: Any, images: Any) -> list[str] | None:
    if text is None and images is None:
        raise PromptError("nothing is given: pass a text, images, or both")
    if text is None:
        return None
    texts = [text] if isinstance(text, str) else list(text)
    if not all(isinstance(item, str) for item in texts):
        raise PromptError("a text must be a string or a list of strings")
    return texts


def _rows(ids: Any) -> list[list[int]]:
    if isinstance(ids, Tensor | np.ndarray):
        ids = ids.tolist()
    return [list(row) for row in (ids if ids and not isinstance(ids[0], int) else [ids])]


__all__ = ["CHAT_TEMPLATE", "ChameleonProcessor", "to_pictures"]
