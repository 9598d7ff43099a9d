"""Chameleon: what a user holds. Prompts of text and pictures in, text and pictures out."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import PIL.Image
import torch

from earlyfusion.checkpoints import formats
from earlyfusion.config import ModelConfig
from earlyfusion.content import Image, Message, Prompt, Segment, Text, as_messages
from earlyfusion.errors import CheckpointError, ContextError, PromptError, SettingError
from earlyfusion.generation.reference import (
    Event,
    Finished,
    ImageDone,
    ImageStarted,
    Reason,
    Request,
    TextDelta,
    Usage,
    generate,
)
from earlyfusion.generation.settings import SamplingParams
from earlyfusion.image_tokenizer import ImageTokenizer
from earlyfusion.model.transformer import Transformer
from earlyfusion.processor import Processor

Output = Literal["text", "image", "interleaved", "auto"]
Watch = Callable[[Event, Image | None], None]

# A CPU computes fp32 faster than bf16 as long as the weights stay in its cache.
_LARGE = 500_000_000
_DTYPES = {
    "auto": None,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True, eq=False)
class Reply:
    """What the model answered: `segments` in order, pictures decoded and with their codes."""

    segments: list[Segment]
    finish_reason: Reason
    usage: Usage

    @property
    def text(self) -> str:
        """The text segments, one a line."""
        return "\n".join(s.text for s in self.segments if isinstance(s, Text))

    @property
    def images(self) -> list[PIL.Image.Image]:
        return [s.pil for s in self.segments if isinstance(s, Image) and s.pil is not None]

    @property
    def message(self) -> Message:
        """The reply as a turn of a chat; its pictures keep their codes."""
        return Message("assistant", self.segments)


class Chameleon:
    """A model in memory: transformer, image tokenizer and processor.

    `defaults` holds the model's own sampling settings, as in its `generation_config.json`.
    """

    def __init__(
        self,
        transformer: Transformer,
        image_tokenizer: ImageTokenizer,
        processor: Processor,
        defaults: Mapping[str, Any] | None = None,
    ) -> None:
        self.transformer = transformer.eval()
        self.image_tokenizer = image_tokenizer
        self.processor = processor
        self.defaults = dict(defaults or {})

    @classmethod
    def load(
        cls, name: str | Path = "mini", device: str = "auto", dtype: str = "auto"
    ) -> Chameleon:
        """Load the embedded model "mini", a folder in any supported format, or a hub id.

        `device` "auto" takes a GPU if there is one; `dtype` "auto" bfloat16 there, and on a CPU for
        models over 500 million parameters, else float32. Raises `CheckpointError`, `SettingError`.
        """
        place, kind = _device(device), _dtype(dtype)
        loaded = formats.load(name, place, kind)
        transformer = loaded.transformer
        if kind is None:
            transformer = transformer.to(_own_dtype(transformer, place))
        tokenizer = ImageTokenizer(loaded.vqgan, loaded.config.vq_config.resolution)
        return cls(transformer, tokenizer, loaded.processor, loaded.generation_defaults)

    @property
    def config(self) -> ModelConfig:
        return self.transformer.config

    @property
    def can_draw(self) -> bool:
        """Whether codes can become pictures; transformers' own files hold no decoder."""
        return self.image_tokenizer.vqgan.decoder is not None

    def generate(
        self,
        prompt: Prompt,
        output: Output = "auto",
        sampling: SamplingParams | None = None,
        seed: int | None = None,
    ) -> Reply:
        """Answer a prompt: a text, a list of parts, or messages that end with the user's turn.

        `output` says what may come: text only; `max_images` pictures (1 if not set) and nothing
        else; or both in the order of the model's choice ("interleaved", "auto"). `seed` goes before
        `sampling.seed`; the same seed gives the same reply. Raises an `EarlyFusionError`.
        """
        return self.collect(self.stream(prompt, output, sampling, seed))

    def stream(
        self,
        prompt: Prompt,
        output: Output = "auto",
        sampling: SamplingParams | None = None,
        seed: int | None = None,
    ) -> Iterator[Event]:
        """The events of `generate` as they come; `Finished` is the last. Mistakes raise at once."""
        request = self.request(prompt, output, sampling, seed)
        return generate(self.transformer, self.processor, request)

    def generate_batch(
        self,
        prompts: Sequence[Prompt],
        output: Output | Sequence[Output] = "auto",
        sampling: SamplingParams | Sequence[SamplingParams | None] | None = None,
        seed: int | None = None,
    ) -> list[Reply]:
        """Answer each prompt as `generate` would; `output` and `sampling` may be lists too.

        With `seed`, prompt number i has the seed `seed + i`.
        """
        if isinstance(prompts, str) or not isinstance(prompts, Sequence):
            raise PromptError(
                f"prompts is a {type(prompts).__name__}: give a list of prompts, or use generate"
            )
        count, seed = len(prompts), SamplingParams(seed=seed).seed
        outputs: list[Output] = _each("output", output, count)
        samplings: list[SamplingParams | None] = _each("sampling", sampling, count)
        seeds = [None if seed is None else seed + i for i in range(count)]
        # Every request is checked before the first is answered.
        rows = zip(prompts, outputs, samplings, seeds, strict=True)
        requests = [self.request(*row) for row in rows]
        return [self.collect(generate(self.transformer, self.processor, r)) for r in requests]

    def request(
        self,
        prompt: Prompt,
        output: Output = "auto",
        sampling: SamplingParams | None = None,
        seed: int | None = None,
    ) -> Request:
        """The checked request that `generate` answers, its pictures encoded, its seed chosen."""
        _check_choice("output", output, get_args(Output))
        if output in ("image", "interleaved") and not self.can_draw:
            raise CheckpointError(
                f"this checkpoint has no VQ decoder, so output={output!r} is not possible: "
                "ask for text, or add one with earlyfusion convert --image-tokenizer"
            )
        asked = _with_seed(sampling, seed)
        messages = as_messages(prompt)
        length = self._checked_length(messages, draws=output == "image")
        settings = asked.resolved(self.defaults)
        room, images = self._bounds(output, asked, settings, length)
        ids = self.processor.encode(messages, self._codes(messages)).ids
        kind = "interleaved" if output == "auto" else output
        return Request(ids, kind, settings, images, room)

    def _checked_length(self, messages: Sequence[Message], draws: bool) -> int:
        """Tokens of the prompt, counted before any picture is encoded."""
        layout, limit = self.processor.layout, self.config.max_position_embeddings
        images = [image for message in messages for image in message.images]
        blank = np.zeros((layout.height, layout.width), dtype=np.int64)
        length = len(self.processor.encode(messages, [blank] * len(images)).ids)
        wanted = layout.num_tokens if draws else 1
        if length + wanted > limit:
            raise ContextError(_too_long(length, limit, len(images), layout.num_tokens, draws))
        return length

    def _bounds(
        self, output: Output, asked: SamplingParams, settings: SamplingParams, length: int
    ) -> tuple[int, int]:
        """How many tokens and how many images may come."""
        image_tokens = self.processor.layout.num_tokens
        free = self.config.max_position_embeddings - length
        if output != "image":
            room = min(free, settings.max_tokens or free)
            fit = room // image_tokens if self.can_draw else 0
            return room, min(fit, fit if settings.max_images is None else settings.max_images)
        # The model's own limits are meant for replies with text.
        room = min(free, asked.max_tokens or free)
        if asked.max_images == 0:
            raise SettingError("max_images=0 allows no image: leave it out or ask for text")
        if room < image_tokens:
            raise SettingError(
                f"max_tokens={room:,} cannot hold an image of {image_tokens:,} tokens: "
                "raise it or leave it out"
            )
        return room, asked.max_images or 1

    def _codes(self, messages: Sequence[Message]) -> list[np.ndarray[Any, np.dtype[np.int64]]]:
        """Codes of the pictures in order; those that have codes are not encoded again."""
        images = [image for message in messages for image in message.images]
        new = [image for image in images if image.codes is None]
        encoded = iter(self.image_tokenizer.encode(new).cpu().numpy() if new else ())
        return [next(encoded) if image.codes is None else image.codes for image in images]

    def collect(self, events: Iterable[Event], watch: Watch | None = None) -> Reply:
        """The reply that the events of `stream` make, its pictures decoded.

        `watch` is called with each event as it comes, and with the picture of an `ImageDone`.
        """
        segments: list[Segment] = []
        text = ""
        for event in events:
            image = None
            if isinstance(event, TextDelta):
                text += event.text
            if isinstance(event, ImageStarted | Finished):
                segments += [Text(text.strip())] if text.strip() else []
                text = ""
            if isinstance(event, ImageDone):
                codes = torch.from_numpy(event.codes)[None]
                image = Image(self.image_tokenizer.decode(codes)[0], event.codes)
                segments.append(image)
            if watch is not None:
                watch(event, image)
            if isinstance(event, Finished):
                return Reply(segments, event.reason, event.usage)
        raise RuntimeError("the events of a reply ended without Finished")


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        shown = repr(value[:40]) if isinstance(value, str) else f"<{type(value).__name__}>"
        raise SettingError(f"{name}={shown} is unknown: use one of {', '.join(choices)}")


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        _check_choice("device", name, ("auto", "cpu", "cuda"))
        raise
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise SettingError(f"device={name!r} is not on this machine: use auto or cpu")
    return device


def _dtype(name: str) -> torch.dtype | None:
    _check_choice("dtype", name, tuple(_DTYPES))
    return _DTYPES[name]


def _own_dtype(transformer: Transformer, device: torch.device) -> torch.dtype:
    size = sum(parameter.numel() for parameter in transformer.parameters())
    small_on_cpu = device.type == "cpu" and size <= _LARGE
    return torch.float32 if small_on_cpu else torch.bfloat16


def _with_seed(sampling: SamplingParams | None, seed: int | None) -> SamplingParams:
    if not isinstance(sampling, SamplingParams | None):
        raise SettingError(
            f"sampling is a {type(sampling).__name__}: give SamplingParams or leave it out"
        )
    asked = sampling or SamplingParams()
    if seed is not None:
        return replace(asked, seed=seed)
    return asked if asked.seed is not None else replace(asked, seed=secrets.randbits(63))


def _each(name: str, value: Any, count: int) -> list[Any]:
    if not isinstance(value, list | tuple):
        return [value] * count
    if len(value) != count:
        raise SettingError(
            f"{name} has {len(value)} entries for {count} prompts: give one for all or one for each"
        )
    return list(value)


def _too_long(length: int, limit: int, images: int, image_tokens: int, draws: bool) -> str:
    sentence = f"prompt is {length:,} tokens, limit {limit:,}"
    causes = []
    if images:
        count = "1 image takes" if images == 1 else f"{images} images take"
        causes.append(f"{count} {images * image_tokens:,}")
    if draws:
        causes.append(f"the image to draw takes {image_tokens:,}")
    remedy = "drop an image or shorten the text" if images else "shorten it"
    return f"{sentence}: {'; '.join([*causes, remedy])}"
