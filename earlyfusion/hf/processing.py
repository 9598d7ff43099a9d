"""Texts and images to the inputs of the model classes, and generated ids back to both.

`<image>` in a text is replaced by a spelled image: begin, one placeholder per code, end. Every
text is closed by the end-of-turn token unless `return_for_text_completion` is set, or it begins
with bos or ends with eos, as chat templates make it. As in transformers, a text here may spell
control tokens; the package's own `Processor` never allows that.
"""

import math
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from transformers import AutoTokenizer
from transformers.configuration_utils import PreTrainedConfig
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_utils import ImageInput, make_flat_list_of_images
from transformers.processing_utils import (
    MultiModalData,
    ProcessingKwargs,
    ProcessorMixin,
    Unpack,
)
from transformers.tokenization_utils_base import TextInput
from transformers.utils import is_torchvision_available

from earlyfusion.checkpoints import lumina
from earlyfusion.checkpoints.hf import CHAT_TEMPLATE
from earlyfusion.content import Image, Segment, Text
from earlyfusion.errors import ImageError, PromptError, SettingError
from earlyfusion.hf.image_processing import IMAGE_PROCESSORS, ChameleonImageProcessorKwargs
from earlyfusion.vocabulary import (
    BEGIN_IMAGE,
    END_IMAGE,
    END_OF_TURN,
    IMAGE_PLACEHOLDERS,
    ImageLayout,
    Vocabulary,
)

_PLACEHOLDER = IMAGE_PLACEHOLDERS[1]
_SECTIONS = ("text_kwargs", "images_kwargs")
# Arguments of the processor itself; their defaults are class attributes.
_FLAGS = (
    "return_for_text_completion",
    "return_mm_token_type_ids",
    "return_text_replacement_offsets",
)
_OFFSETS = "text_replacement_offsets"
# transformers' `sanitize_control_tokens` puts this character before control tokens in users' text.
_NOT_SANITIZED = "(?<!\U000f0000)"


class _SectionKwargs(ProcessingKwargs, total=False):  # type: ignore[call-arg]
    """Arguments of the tokenizer and of the image processor."""

    images_kwargs: ChameleonImageProcessorKwargs  # type: ignore[misc]
    _defaults = {}  # type: ignore  # noqa: RUF012  # older releases ask for it


class ChameleonProcessorKwargs(_SectionKwargs, total=False):  # type: ignore[call-arg]
    """Arguments of a call, of the tokenizer, and of the image processor.
    `return_for_text_completion`: no end-of-turn token closes the text. `return_mm_token_type_ids`:
    1 for each token of an image, 0 for others. `return_text_replacement_offsets`: where `<image>`
    was in each text, and where its image is."""

    return_for_text_completion: bool
    return_mm_token_type_ids: bool  # type: ignore[misc]
    return_text_replacement_offsets: bool  # type: ignore[misc]


class ChameleonProcessor(ProcessorMixin):
    """One tokenizer and one image processor, with transformers' arguments and files."""

    valid_processor_kwargs = ChameleonProcessorKwargs
    text_kwargs = {"return_tensors": "pt"}  # noqa: RUF012
    images_kwargs = {"return_tensors": "pt"}  # noqa: RUF012
    return_for_text_completion = False
    return_mm_token_type_ids = False
    return_text_replacement_offsets = False

    def __init__(
        self,
        image_processor: Any,
        tokenizer: Any,
        image_seq_length: int = 1024,
        image_token: str = _PLACEHOLDER,
        chat_template: str | None = None,
        image_layout: str = "chameleon",
        **kwargs: Any,
    ) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE)
        self.image_seq_length = image_seq_length
        self.image_layout = image_layout
        if image_layout not in ("chameleon", lumina.FAMILY):
            raise SettingError(
                f"image_layout={image_layout!r} is unknown: write 'chameleon' or {lumina.FAMILY!r}"
            )
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
        """Ids of an image in a prompt: placeholder, begin, end, and Lumina's layout tokens."""
        ids = [self.image_token_id, self.image_start_token_id, self.image_end_token_id]
        if not self._is_lumina:
            return ids
        names = self.tokenizer.get_vocab()
        return ids + sorted(names[name] for name in names if lumina.is_layout_token(name))

    @property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary(self.tokenizer.get_vocab())

    def __call__(
        self,
        images: ImageInput | None = None,
        text: TextInput | list[TextInput] | None = None,
        **kwargs: Unpack[ChameleonProcessorKwargs],
    ) -> BatchFeature:
        """`input_ids` and `attention_mask` of the texts, `pixel_values` of all their images.

        Further arguments are those of `ChameleonProcessorKwargs`, the tokenizer and the image
        processor, flat or in `text_kwargs`, `images_kwargs` and `common_kwargs`; by default the
        tokenizer's settings. Raises `PromptError` if the numbers of placeholders and images differ
        or an image is truncated, `SettingError` for an argument given twice.
        """
        flags, for_text, for_images = self._split_kwargs(dict(kwargs))
        tensor_type = for_text.pop("return_tensors")
        texts = _texts(text, images)
        flat_images = [] if images is None else self._fetch_images(images)
        placeholders = [list(self._find_placeholders(text)) for text in texts or ()]
        if texts is not None:
            _check_image_count([len(found) for found in placeholders], images, len(flat_images))
        data = self._pixels(flat_images, for_images) if flat_images else {}
        if texts is not None:
            spelled = [self.replace_image_token(data, number) for number in range(len(flat_images))]
            data = self._tokens(texts, placeholders, spelled, flags, for_text) | data
        return BatchFeature(data, tensor_type=tensor_type, skip_tensor_conversion=[_OFFSETS])

    @property
    def model_input_names(self) -> list[str]:
        """The keys that `__call__` returns."""
        names = [*self.tokenizer.model_input_names, *self.image_processor.model_input_names]
        return list(dict.fromkeys(names))

    def post_process_image_text_to_text(
        self, generated_outputs: Any, skip_special_tokens: bool = True, **kwargs: Any
    ) -> list[str]:
        """The texts of generated ids, without image tokens."""
        ids = [self._drop_image_tokens(row) for row in _rows(generated_outputs)]
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
        """The output of `generate` or `decode_image_tokens` as texts and images. "text" (or
        None): a str for each row of ids. "image": a PIL image for each row of pixels.
        "interleaved": for each row of ids, its `Text`s and `Image`s in order; images hold codes."""
        if generation_mode in (None, "text"):
            return self.post_process_image_text_to_text(
                generated_outputs, skip_special_tokens=skip_special_tokens, **kwargs
            )
        if generation_mode == "image":
            return to_images(generated_outputs)
        if generation_mode == "interleaved":
            vocabulary = self.vocabulary
            return [list(self._segments(row, vocabulary)) for row in _rows(generated_outputs)]
        raise SettingError(
            f"generation_mode={generation_mode!r} is unknown: use 'text', 'image' or 'interleaved'"
        )

    @classmethod
    def get_processor_dict(cls, path: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """The settings in a folder's files; the image layout is in its config.json."""
        settings, rest = super().get_processor_dict(path, **kwargs)
        if "image_layout" not in settings:
            try:
                config, _ = PreTrainedConfig.get_config_dict(path, **kwargs)
            except OSError:  # a folder with only a processor
                config = {}
            settings["image_layout"] = lumina.FAMILY if lumina.is_lumina(config) else "chameleon"
        return settings, rest

    def to_dict(self) -> dict[str, Any]:
        """The saved settings; the image layout only if it is Lumina's."""
        settings: dict[str, Any] = super().to_dict()
        if not self._is_lumina:
            settings.pop("image_layout", None)
        return settings

    @classmethod
    def _get_arguments_from_pretrained(
        cls, pretrained_model_name_or_path: Any, processor_dict: Any = None, **kwargs: Any
    ) -> list[Any]:
        # Until `register()` is called, transformers would look up its own image processor.
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
        tokens = [self._layout().num_tokens] * count
        return MultiModalData(num_image_tokens=tokens, num_image_patches=[1] * count)

    def _split_kwargs(
        self, kwargs: dict[str, Any]
    ) -> tuple[dict[str, bool], dict[str, Any], dict[str, Any]]:
        """The arguments of the processor itself, of the tokenizer, and of the image processor."""
        sections = {name: dict(kwargs.pop(name, None) or {}) for name in _SECTIONS}
        common = dict(kwargs.pop("common_kwargs", None) or {})
        flags = {name: self._flag(name, kwargs, sections["text_kwargs"], common) for name in _FLAGS}
        known = {name: self._names(name) for name in _SECTIONS}
        for section, arguments in sections.items():
            for name in known[section] & kwargs.keys():
                if name in arguments:
                    raise SettingError(
                        f"the argument {name} is given twice, in {section} and beside it: "
                        "give it once"
                    )
                arguments[name] = kwargs[name]
        # The base class warns about unknown arguments.
        rest = {k: v for k, v in kwargs.items() if not any(k in names for names in known.values())}
        merged = self._merge_kwargs(
            _SectionKwargs,
            tokenizer_init_kwargs=self.tokenizer.init_kwargs,
            **sections,
            common_kwargs=common,
            **rest,
        )
        for_text, for_images = ({"return_tensors": "pt"} | merged[name] for name in _SECTIONS)
        return flags, for_text, for_images

    def _flag(self, name: str, *sections: dict[str, Any]) -> bool:
        values = [section.pop(name) for section in sections if name in section]
        values = [value for value in values if value is not None]
        if len(set(values)) > 1:
            raise SettingError(f"the argument {name} is given twice, as {values}: give it once")
        return bool(values[0] if values else getattr(self, name))

    def _names(self, section: str) -> set[str]:
        """The names that `text_kwargs` or `images_kwargs` may have."""
        names = set(self.valid_processor_kwargs.__annotations__[section].__annotations__)
        if section == "text_kwargs":
            return names
        of_processor = getattr(self.image_processor, "valid_kwargs", None)
        return names | set(of_processor.__annotations__ if of_processor else ())

    def _fetch_images(self, images: Any) -> list[Any]:
        """All images in order; transformers fetches those given as URLs."""
        return make_flat_list_of_images(self.image_processor.fetch_images(images))

    def _pixels(self, images: list[Any], settings: dict[str, Any]) -> dict[str, Any]:
        size = settings.get("size")
        if not self._is_lumina or not isinstance(size, dict) or set(size) != {"height", "width"}:
            return dict(self.image_processor(images, **settings))
        self._check_size(size["height"], size["width"])
        pixels = [
            self.image_processor(
                image, **(settings | {"size": _covering_size(image, size), "crop_size": size})
            )["pixel_values"]
            for image in images
        ]
        join = torch.cat if isinstance(pixels[0], Tensor) else np.concatenate
        return {"pixel_values": join(pixels)}

    def _tokens(
        self,
        texts: list[str],
        placeholders: list[list[re.Match[str]]],
        spelled: list[str],
        flags: dict[str, bool],
        settings: dict[str, Any],
    ) -> dict[str, Any]:
        add_bos = bool(settings.get("add_special_tokens", True)) and not self._adds_bos
        completion = flags["return_for_text_completion"]
        rest = iter(spelled)
        spelled_texts = [
            self._spell_text(
                text, [(placeholder, next(rest)) for placeholder in found], completion, add_bos
            )
            for text, found in zip(texts, placeholders, strict=True)
        ]
        data = dict(self.tokenizer([text for text, _ in spelled_texts], **settings))
        # `max_length` may have truncated an image, and half an image is useless.
        expected_tokens = sum(image.count(self.image_token) for image in spelled)
        found_tokens = sum(list(row).count(self.image_token_id) for row in data["input_ids"])
        if found_tokens != expected_tokens:
            raise PromptError(
                f"truncation kept {found_tokens} of {expected_tokens} image tokens: raise "
                "max_length or leave truncation out"
            )
        if flags["return_mm_token_type_ids"]:
            data["mm_token_type_ids"] = [
                np.isin(row, self.image_token_ids).astype(int).tolist() for row in data["input_ids"]
            ]
        if flags["return_text_replacement_offsets"]:
            data[_OFFSETS] = [offsets for _, offsets in spelled_texts]
        return data

    def _find_placeholders(self, text: str) -> Iterator[re.Match[str]]:
        """The placeholders in a text, except those in users' text that a chat template has marked
        as plain text."""
        names = "|".join(map(re.escape, dict.fromkeys((_PLACEHOLDER, self.image_token))))
        return re.finditer(f"{_NOT_SANITIZED}(?:{names})", text)

    def _spell_text(
        self,
        text: str,
        replacements: list[tuple[re.Match[str], str]],
        completion: bool,
        add_bos: bool,
    ) -> tuple[str, list[dict[str, Any]]]:
        """A text with its images as tokens, bos if `add_bos`, and the end of the turn.
        `replacements` are its placeholders, each with the image's tokens. Also returns what was
        replaced: each with its `span` in the text and its `new_span` in the result."""
        bos, eos = self.tokenizer.bos_token, self.tokenizer.eos_token
        templated = bool(bos and text.startswith(bos)) or bool(eos and text.endswith(eos))
        changes = [("image", found.span(), found.group(), new) for found, new in replacements]
        if add_bos and bos and not templated:
            # Also reported, because it shifts the positions of the text behind it.
            changes.insert(0, ("text", (0, 0), "", bos))
        result, offsets = _apply_replacements(text, changes)
        end = "" if completion or templated else self.tokenizer.sep_token or END_OF_TURN
        return result + end, offsets

    @property
    def _adds_bos(self) -> bool:
        return self.tokenizer.bos_token_id in self.tokenizer("")["input_ids"]

    def replace_image_token(self, image_inputs: Any = None, image_idx: int = 0, **_: Any) -> str:
        """The tokens of an image as text: begin, placeholders, end; for Lumina-mGPT also size and
        newline tokens."""
        if not self._is_lumina:
            inner = self.image_token * self.image_seq_length
            return f"{self.image_start_token}{inner}{self.image_end_token}"
        pixels = (image_inputs or {}).get("pixel_values")
        size = None if pixels is None else pixels[image_idx].shape[-2:]
        layout = self._layout(*(int(length) // self._stride for length in size or ()))
        row = self.image_token * layout.width + "".join(layout.line_end)
        return "".join(layout.head) + row * layout.height + "".join(layout.tail)

    @property
    def _is_lumina(self) -> bool:
        return self.image_layout == lumina.FAMILY

    @property
    def _stride(self) -> int:
        """Pixels along one side of a code."""
        return int(dict(self.image_processor.crop_size)["height"]) // self._side

    @property
    def _side(self) -> int:
        """Codes along one side of the model's own square."""
        return math.isqrt(self.image_seq_length)

    def _layout(self, height: int | None = None, width: int | None = None) -> ImageLayout:
        """How an image of `height` x `width` codes is spelled; by default the model's square."""
        if self._is_lumina:
            return lumina.layout(height or self._side, width)
        return ImageLayout(self._side, self.image_seq_length // self._side)

    def _check_size(self, height: int, width: int) -> None:
        step = 2 * self._stride  # size tokens count blocks of two codes
        if height % step or width % step or min(height, width) < step:
            sizes = ((w * self._stride, h * self._stride) for h, w in lumina.sizes(self._side))
            raise SettingError(
                f"size={height}x{width} (height x width) has no size tokens: give multiples of "
                f"{step}; it was trained on {', '.join(f'{h}x{w}' for w, h in sizes)}"
            )

    def _layout_at(self, row: list[int], vocabulary: Vocabulary) -> ImageLayout | None:
        """The layout of the image at the start of `row`; None if its size tokens are missing."""
        if not self._is_lumina:
            return self._layout()
        try:
            return lumina.read_layout(row, vocabulary)
        except ImageError:
            return None

    def _drop_image_tokens(self, row: list[int]) -> list[int]:
        if not hasattr(self, "_image_ids"):  # made once: a vocabulary has 65,536 names
            self._image_ids = frozenset(self.vocabulary.image_tokens.tolist())
        return [token for token in row if token not in self._image_ids]

    def _segments(self, row: list[int], vocabulary: Vocabulary) -> Iterator[Segment]:
        start = 0
        while start < len(row):
            if row[start] == vocabulary.begin_image:
                layout = self._layout_at(row[start:], vocabulary)
                end = start + (layout.num_tokens if layout else 1)
                if layout and self._is_whole(row[start:end], layout):
                    yield Image(codes=layout.parse(row[start:end], vocabulary))
            else:
                later = (i for i in range(start, len(row)) if row[i] == vocabulary.begin_image)
                end = next(later, len(row))
                text = self.tokenizer.decode(row[start:end], skip_special_tokens=True).strip()
                if text:
                    yield Text(text)
            start = end

    def _is_whole(self, tokens: list[int], layout: ImageLayout) -> bool:
        """Whether an image is complete, and has codes instead of a prompt's placeholders."""
        return len(tokens) == layout.num_tokens and self.image_token_id not in tokens


def _apply_replacements(
    text: str, changes: list[tuple[str, tuple[int, int], str, str]]
) -> tuple[str, list[dict[str, Any]]]:
    """A text after (type, span, old, new) changes in order, and the resulting spans."""
    result, last = "", 0
    offsets: list[dict[str, Any]] = []
    for change, span, old, new in changes:
        result += text[last : span[0]]
        new_span = (len(result), len(result) + len(new))
        offsets.append(
            {"type": change, "span": span, "new_span": new_span, "text": old, "replacement": new}
        )
        result, last = result + new, span[1]
    return result + text[last:], offsets


def to_images(pixels: Any) -> list[PIL.Image.Image]:
    """PIL images of pixels [n, 3, Y, X] in about [-1, 1], truncated to 8 bits as by Meta."""
    pixels_nCYX = torch.as_tensor(pixels).detach().float().cpu().clamp(-1, 1)
    if pixels_nCYX.ndim != 4 or pixels_nCYX.shape[1] != len("RGB"):
        raise SettingError(
            f"images have shape [n, 3, height, width], not {tuple(pixels_nCYX.shape)}: pass the "
            "output of model.decode_image_tokens"
        )
    pixels_nYXC = ((pixels_nCYX + 1) / 2 * 255).to(torch.uint8).permute(0, 2, 3, 1)
    return [PIL.Image.fromarray(image.contiguous().numpy()) for image in pixels_nYXC]


def _texts(text: Any, images: Any) -> list[str] | None:
    if text is None and images is None:
        raise PromptError("nothing is given: pass a text, images, or both")
    if text is None:
        return None
    texts = list(text) if isinstance(text, list | tuple) else [text]
    if not texts or not all(isinstance(item, str) for item in texts):
        raise PromptError("a text must be a string or a list of strings")
    return texts


def _check_image_count(placeholders: list[int], images: Any, num_images: int) -> None:
    """Raise `PromptError` unless there is an image for each placeholder; `placeholders` has their
    number per text. Images may be given in a list for each text, and must then match that text."""
    if sum(placeholders) != num_images:
        raise PromptError(
            f"the number of {_PLACEHOLDER} tokens in the prompts should be the same as the number "
            f"of images, but there are {sum(placeholders)} and {num_images}: give each image one "
            f"{_PLACEHOLDER}"
        )
    nested = isinstance(images, list | tuple) and all(isinstance(i, list | tuple) for i in images)
    if not nested or len(images) != len(placeholders):
        return
    for number, (count, of_text) in enumerate(zip(placeholders, images, strict=True), 1):
        if count != len(of_text):
            raise PromptError(
                f"text {number} has {count} {_PLACEHOLDER} tokens and its list has {len(of_text)} "
                f"images: give each image one {_PLACEHOLDER}"
            )


def _covering_size(image: Any, size: dict[str, int]) -> dict[str, int]:
    """The smallest size, given by its shorter side, at which the image covers `size`."""
    width, height = Image.of(image).pil.size  # type: ignore[union-attr]
    scale = max(size["height"] / height, size["width"] / width)
    return {"shortest_edge": math.ceil(min(width, height) * scale)}


def _rows(ids: Any) -> list[list[int]]:
    if isinstance(ids, Tensor | np.ndarray):
        ids = ids.tolist()
    return [list(row) for row in (ids if ids and not isinstance(ids[0], int) else [ids])]


__all__ = ["CHAT_TEMPLATE", "ChameleonProcessor", "to_images"]
