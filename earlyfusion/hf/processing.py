"""Texts and pictures to the inputs of the model classes, and generated ids back to both.

`<image>` in a text marks where a picture goes: begin mark, one placeholder a code, end mark. The
end-of-turn token closes every text unless `return_for_text_completion`; a text that begins with the
bos token or ends with eos, as chat templates make it, is taken as it is. As in transformers, a text
may spell control tokens here; the package's own `Processor` never lets it.
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
from earlyfusion.content import Image, Segment, Text
from earlyfusion.errors import ImageError, PromptError, SettingError
from earlyfusion.hf.image_processing import IMAGE_PROCESSORS, ChameleonImageProcessorKwargs
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

_MARK = IMAGE_PLACEHOLDERS[1]
_PARTS = ("text_kwargs", "images_kwargs")
# What a call may ask of the processor itself, with the default of each.
_FLAGS = (
    "return_for_text_completion",
    "return_mm_token_type_ids",
    "return_text_replacement_offsets",
)
_OFFSETS = "text_replacement_offsets"
# Not behind the sign that transformers' `sanitize_control_tokens` sets before a user's own tokens.
_UNMARKED = "(?<!\U000f0000)"

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


class _PartKwargs(ProcessingKwargs, total=False):  # type: ignore[call-arg]
    """Arguments of the tokenizer and of the image processor."""

    images_kwargs: ChameleonImageProcessorKwargs  # type: ignore[misc]
    _defaults = {}  # type: ignore  # noqa: RUF012  # older releases ask for it


class ChameleonProcessorKwargs(_PartKwargs, total=False):  # type: ignore[call-arg]
    """Arguments of a call, of the tokenizer, and of the image processor.

    `return_for_text_completion`: the text is to go on, so no end of turn closes it.
    `return_mm_token_type_ids`: 1 for each token of a picture, 0 for others.
    `return_text_replacement_offsets`: where in each text a mark was, and its spelled picture is.
    """

    return_for_text_completion: bool
    return_mm_token_type_ids: bool  # type: ignore[misc]
    return_text_replacement_offsets: bool  # type: ignore[misc]


class ChameleonProcessor(ProcessorMixin):
    """One tokenizer and one image processor, with the arguments and files of transformers' own."""

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
        image_token: str = _MARK,
        chat_template: str | None = None,
        image_layout: str = "chameleon",
        **kwargs: Any,
    ) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE)
        self.image_seq_length = image_seq_length
        self.image_layout = image_layout
        if image_layout not in ("chameleon", lumina.KIND):
            raise SettingError(
                f"image_layout={image_layout!r} is unknown: write 'chameleon' or {lumina.KIND!r}"
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
        """Ids that belong to a picture in a prompt: placeholder, begin and end, and its marks."""
        ids = [self.image_token_id, self.image_start_token_id, self.image_end_token_id]
        if not self._is_lumina:
            return ids
        names = self.tokenizer.get_vocab()
        return ids + sorted(names[name] for name in names if lumina.is_mark(name))

    @property
    def vocabulary(self) -> Vocabulary:
        """All ids of the tokenizer by kind."""
        return Vocabulary(self.tokenizer.get_vocab())

    def __call__(
        self,
        images: ImageInput | None = None,
        text: TextInput | list[TextInput] | None = None,
        **kwargs: Unpack[ChameleonProcessorKwargs],
    ) -> BatchFeature:
        """`input_ids` and `attention_mask` of the texts, `pixel_values` of all their pictures.

        Further arguments are the tokenizer's and the image processor's, flat or in `text_kwargs`,
        `images_kwargs` and `common_kwargs`, and those of `ChameleonProcessorKwargs`. What is not
        given takes the tokenizer's own setting. Raises `PromptError` where marks and pictures
        differ in number, or a truncation cuts a picture, `SettingError` for one given twice.
        """
        flags, for_text, for_images = self._shared_out(dict(kwargs))
        kind = for_text.pop("return_tensors")
        texts = _texts(text, images)
        pictures = None if images is None else self._pictures(images)
        found = [list(self._marks(text)) for text in texts or ()]
        if texts is not None:
            _check_number(sum(map(len, found)), len(pictures or ()))
        data = self._pixels(pictures, for_images) if pictures else {}
        if texts is not None:
            spelled = [self.replace_image_token(data, n) for n in range(len(pictures or ()))]
            data = self._tokens(texts, found, spelled, flags, for_text) | data
        return BatchFeature(data, tensor_type=kind, skip_tensor_conversion=[_OFFSETS])

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
    def get_processor_dict(cls, path: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """The settings in a folder's files; how pictures are spelled stands in its config.json."""
        settings, rest = super().get_processor_dict(path, **kwargs)
        if "image_layout" not in settings:
            try:
                config, _ = PreTrainedConfig.get_config_dict(path, **kwargs)
            except OSError:  # a folder of a processor alone
                config = {}
            settings["image_layout"] = lumina.KIND if lumina.is_lumina(config) else "chameleon"
        return settings, rest

    def to_dict(self) -> dict[str, Any]:
        """What is saved; the layout only where it is not the family's own."""
        settings: dict[str, Any] = super().to_dict()
        if not self._is_lumina:
            settings.pop("image_layout", None)
        return settings

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
        tokens = [self._layout().num_tokens] * count
        return MultiModalData(num_image_tokens=tokens, num_image_patches=[1] * count)

    def _shared_out(
        self, kwargs: dict[str, Any]
    ) -> tuple[dict[str, bool], dict[str, Any], dict[str, Any]]:
        """The processor's own arguments, the tokenizer's, and the image processor's."""
        parts = {name: dict(kwargs.pop(name, None) or {}) for name in _PARTS}
        common = dict(kwargs.pop("common_kwargs", None) or {})
        flags = {name: self._flag(name, kwargs, parts["text_kwargs"], common) for name in _FLAGS}
        known = {name: self._names(name) for name in _PARTS}
        for part, given in parts.items():
            for name in known[part] & kwargs.keys():
                if name in given:
                    raise SettingError(
                        f"the argument {name} is given twice, in {part} and beside it: give it once"
                    )
                given[name] = kwargs[name]
        # The base class warns of what is left.
        rest = {k: v for k, v in kwargs.items() if not any(k in names for names in known.values())}
        merged = self._merge_kwargs(
            _PartKwargs,
            tokenizer_init_kwargs=self.tokenizer.init_kwargs,
            **parts,
            common_kwargs=common,
            **rest,
        )
        return flags, *({"return_tensors": "pt"} | merged[part] for part in _PARTS)

    def _flag(self, name: str, *places: dict[str, Any]) -> bool:
        given = [place.pop(name) for place in places if name in place]
        given = [value for value in given if value is not None]
        if len(set(given)) > 1:
            raise SettingError(f"the argument {name} is given twice, as {given}: give it once")
        return bool(given[0] if given else getattr(self, name))

    def _names(self, part: str) -> set[str]:
        """Names that may stand in `text_kwargs` or `images_kwargs`."""
        names = set(self.valid_processor_kwargs.__annotations__[part].__annotations__)
        own = getattr(self.image_processor, "valid_kwargs", None) if "images" in part else None
        return names | set(own.__annotations__ if own else ())

    def _pictures(self, images: Any) -> list[Any]:
        """All pictures in order; a string is a file, or an address that transformers fetches."""
        return make_flat_list_of_images(self.image_processor.fetch_images(images))

    def _pixels(self, pictures: list[Any], settings: dict[str, Any]) -> dict[str, Any]:
        size = settings.get("size")
        if not self._is_lumina or not isinstance(size, dict) or set(size) != {"height", "width"}:
            return dict(self.image_processor(pictures, **settings))
        self._check_size(size["height"], size["width"])
        made = [
            self.image_processor(
                picture, **(settings | {"size": _covering(picture, size), "crop_size": size})
            )["pixel_values"]
            for picture in pictures
        ]
        joined = torch.cat if isinstance(made[0], Tensor) else np.concatenate
        return {"pixel_values": joined(made)}

    def _tokens(
        self,
        texts: list[str],
        found: list[list[re.Match[str]]],
        spelled: list[str],
        flags: dict[str, bool],
        settings: dict[str, Any],
    ) -> dict[str, Any]:
        begins = bool(settings.get("add_special_tokens", True)) and not self._adds_bos
        completion = flags["return_for_text_completion"]
        in_order = iter(spelled)
        whole = [
            self._closed(text, [(mark, next(in_order)) for mark in marks], completion, begins)
            for text, marks in zip(texts, found, strict=True)
        ]
        encoded = self.tokenizer([text for text, _ in whole], **settings)
        wanted = sum(picture.count(self.image_token) for picture in spelled)
        kept = sum(list(row).count(self.image_token_id) for row in encoded["input_ids"])
        if kept != wanted:
            raise PromptError(
                f"truncation kept {kept} of {wanted} picture tokens: raise "
                "max_length or leave truncation out"
            )
        data = dict(encoded)
        if flags["return_mm_token_type_ids"]:
            data["mm_token_type_ids"] = [
                np.isin(row, self.image_token_ids).astype(int).tolist()
                for row in encoded["input_ids"]
            ]
        if flags["return_text_replacement_offsets"]:
            data[_OFFSETS] = [offsets for _, offsets in whole]
        return data

    def _marks(self, text: str) -> Iterator[re.Match[str]]:
        """The places of pictures in a text; not where a template marked a user's text as plain."""
        names = "|".join(map(re.escape, dict.fromkeys((_MARK, self.image_token))))
        return re.finditer(f"{_UNMARKED}(?:{names})", text)

    def _closed(
        self, text: str, marks: list[tuple[re.Match[str], str]], completion: bool, begins: bool
    ) -> tuple[str, list[dict[str, Any]]]:
        """A text with its pictures spelled, its start where the tokenizer adds none, its end.

        With it the places of each picture: `span` in the text, `new_span` in the result.
        """
        bos = self.tokenizer.bos_token
        eos = self.tokenizer.eos_token
        templated = bool(bos and text.startswith(bos)) or bool(eos and text.endswith(eos))
        result, last = "", 0
        offsets: list[dict[str, Any]] = []
        # A start that is written is told too: what maps places of the text must move past it.
        start = bos if begins and bos and not templated else ""
        changes = [("text", (0, 0), "", start)] if start else []
        changes += [("image", mark.span(), mark.group(), spelled) for mark, spelled in marks]
        for kind, span, old, new in changes:
            result += text[last : span[0]]
            new_span = (len(result), len(result) + len(new))
            offsets.append(
                {"type": kind, "span": span, "new_span": new_span, "text": old, "replacement": new}
            )
            result, last = result + new, span[1]
        end = "" if completion or templated else self.tokenizer.sep_token or END_OF_TURN
        return result + text[last:] + end, offsets

    @property
    def _adds_bos(self) -> bool:
        return self.tokenizer.bos_token_id in self.tokenizer("")["input_ids"]

    def replace_image_token(self, image_inputs: Any = None, image_idx: int = 0, **_: Any) -> str:
        """What takes the place of a mark: begin, a placeholder for each code, end.

        For Lumina-mGPT also the size tokens of the picture and its line ends.
        """
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
        return self.image_layout == lumina.KIND

    @property
    def _stride(self) -> int:
        """Pixels of a picture along one side of a code."""
        return int(dict(self.image_processor.crop_size)["height"]) // self._side

    @property
    def _side(self) -> int:
        return math.isqrt(self.image_seq_length)

    def _layout(self, height: int | None = None, width: int | None = None) -> ImageLayout:
        """How a picture of so many codes is spelled; by default the model's own square."""
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
        """The layout of the picture that a row begins with, if it has one."""
        if not self._is_lumina:
            return self._layout()
        try:
            return lumina.read_layout(row, vocabulary)
        except ImageError:
            return None

    def _spoken(self, row: list[int]) -> list[int]:
        images = self._image_ids_set()
        return [token for token in row if token not in images]

    def _image_ids_set(self) -> frozenset[int]:
        if not hasattr(self, "_image_set"):
            self._image_set = frozenset(self.vocabulary.image_tokens.tolist())
        return self._image_set

    def _segments(self, row: list[int], vocabulary: Vocabulary) -> Iterator[Segment]:
        start = 0
        while start < len(row):
            if row[start] == vocabulary.begin_image:
                layout = self._layout_at(row[start:], vocabulary)
                end = start + (layout.num_tokens if layout else 1)
                tokens = row[start:end]
                if (
                    layout
                    and len(tokens) == layout.num_tokens
                    and self.image_token_id not in tokens
                ):
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


def _texts(text: Any, images: Any) -> list[str] | None:
    if text is None and images is None:
        raise PromptError("nothing is given: pass a text, images, or both")
    if text is None:
        return None
    texts = [text] if isinstance(text, str) else list(text)
    if not all(isinstance(item, str) for item in texts):
        raise PromptError("a text must be a string or a list of strings")
    return texts


def _check_number(marks: int, pictures: int) -> None:
    if marks != pictures:
        raise PromptError(
            f"the number of {_MARK} tokens in the prompts should be the same as the number of "
            f"images, but there are {marks} and {pictures}: give each image one {_MARK}"
        )


def _covering(picture: Any, size: dict[str, int]) -> dict[str, int]:
    """The shorter side of a picture that just covers `size`."""
    width, height = Image.of(picture).pil.size  # type: ignore[union-attr]
    scale = max(size["height"] / height, size["width"] / width)
    return {"shortest_edge": math.ceil(min(width, height) * scale)}


def _rows(ids: Any) -> list[list[int]]:
    if isinstance(ids, Tensor | np.ndarray):
        ids = ids.tolist()
    return [list(row) for row in (ids if ids and not isinstance(ids[0], int) else [ids])]


__all__ = ["CHAT_TEMPLATE", "ChameleonProcessor", "to_pictures"]
