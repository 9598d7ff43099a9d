"""Chameleon: what a user holds. Prompts of text and pictures in, text and pictures out."""

from __future__ import annotations

import os
import secrets
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from numbers import Integral
from pathlib import Path
from threading import Lock
from typing import Any, Literal, TypeAlias, Unpack, get_args

import numpy as np
import PIL.Image
import torch

from earlyfusion.checkpoints import detect, lumina
from earlyfusion.checkpoints.adapter import merge_adapter
from earlyfusion.checkpoints.hf import Loaded, assemble, check_dense, papers, save_hf
from earlyfusion.config import ModelConfig
from earlyfusion.content import Image, Message, Part, Prompt, Segment, Text, as_messages
from earlyfusion.devices import (
    FLOAT_DTYPES,
    PACKED_BITS,
    WEIGHT_DTYPES,
    auto_dtype,
    dtype_name,
    resolve_device,
    torch_dtype,
)
from earlyfusion.engine.backends.torch import fingerprint
from earlyfusion.engine.engine import Engine
from earlyfusion.engine.tensor_parallel import open_part, peers_of, share
from earlyfusion.errors import CheckpointError, ContextError, PromptError, SettingError
from earlyfusion.generation.reference import Reader
from earlyfusion.generation.request import (
    Event,
    Finished,
    ImageDone,
    ImagePreview,
    ImageStarted,
    Reason,
    Request,
    TextDelta,
    TokenDrawn,
    Usage,
)
from earlyfusion.generation.settings import SamplingFields, SamplingParams, with_fields
from earlyfusion.generation.steering import TokenLogprob
from earlyfusion.image_tokenizer import ImageTokenizer
from earlyfusion.kernels.twins import accelerate
from earlyfusion.model.quantise import PackedLinear, packed_bits, quantise
from earlyfusion.model.transformer import Transformer
from earlyfusion.processor import Processor
from earlyfusion.vocabulary import ImageLayout

Output = Literal["text", "image", "interleaved", "auto"]
Size: TypeAlias = tuple[int, int]
"""Width and height of a picture in pixels."""
Answer: TypeAlias = Part | Sequence[Part]
Watch = Callable[[Event, Image | None], None]
Codes = np.ndarray[Any, np.dtype[np.int64]]

_PICTURES_KNOWN = 1024  # whose codes are kept
_GREY = (128, 128, 128)


@dataclass(frozen=True, eq=False)
class Reply:
    """What the model answered: `segments` in order, pictures decoded and with their codes.

    The same request with `seed` gives the same reply. `logprobs` has an entry for each drawn token,
    where they were asked for. Where the prompt ends with the assistant's turn, this is only what
    follows it.
    """

    segments: list[Segment]
    finish_reason: Reason
    usage: Usage
    seed: int | None = None
    logprobs: list[TokenLogprob] | None = None

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


@dataclass(frozen=True)
class Score:
    """How likely an answer is: natural logarithms of the model's own probabilities.

    `tokens` and `token_logprobs` have one entry a token, the end of the reply too where it counts.
    """

    tokens: list[int]
    token_logprobs: list[float]

    @property
    def logprob(self) -> float:
        """Of the whole answer."""
        return sum(self.token_logprobs)

    @property
    def per_token(self) -> float:
        """Their mean, to compare answers of different lengths."""
        return self.logprob / len(self.tokens)


class Chameleon:
    """A model in memory: transformer, image tokenizer and processor.

    `defaults` holds the model's own sampling settings, as in its `generation_config.json`; `folder`
    is where it was read. One `engine` answers everything that is asked of this object, from any
    thread. Copies and pickles of it hold the model without the engine.
    """

    def __init__(
        self,
        transformer: Transformer,
        image_tokenizer: ImageTokenizer,
        processor: Processor,
        defaults: Mapping[str, Any] | None = None,
        name: str = "",
        folder: Path | None = None,
    ) -> None:
        self.transformer = transformer.eval()
        self.image_tokenizer = image_tokenizer
        self.processor = processor
        self.defaults = dict(defaults or {})
        self.name, self.folder = name, folder
        self._engine: Engine | None = None
        self._known_codes: OrderedDict[bytes, Codes] = OrderedDict()
        self._lock = Lock()

    @classmethod
    def load(
        cls,
        name: str | Path = "mini",
        device: str = "auto",
        dtype: str = "auto",
        tensor_parallel: int = 1,
        verify: bool = True,
        adapter: str | Path | None = None,
    ) -> Chameleon:
        """Load the embedded model "mini", a folder in any supported format, or a hub id.

        `device` "auto" takes a GPU if there is one; `dtype` "auto" bfloat16 there, and on a CPU for
        models over 500 million parameters, else float32. "int8" and "int4" round the layers' and
        the head's matrices (model/quantise.py) and compute as "auto" does. `tensor_parallel` is the
        number of processes, those that `torchrun` started, that share each layer: the first goes
        on, the others serve it and end with it (docs/engine.md). `verify` compares the files with
        the checklist beside them, if there is one; of large files only once. `adapter` is a folder
        in PEFT's format, which is added to the weights. Raises `CheckpointError`, `SettingError`.
        """
        _check_adapter(adapter, tensor_parallel)
        alone = tensor_parallel == 1
        if not alone:
            _check_own_gpu(device)
        where, dtype = resolve_device(device), dtype_name("dtype", dtype, WEIGHT_DTYPES)
        wanted = torch_dtype(dtype) if dtype in FLOAT_DTYPES else None
        loaded = (
            detect.load(name, where, wanted, verify)
            if alone
            else _load_part(name, where, wanted, tensor_parallel, verify)
        )
        transformer = loaded.transformer
        if adapter is not None:
            _refuse_packed(transformer, adapter)
            merge_adapter(transformer, Path(adapter).expanduser())
        if alone and wanted is None and packed_bits(transformer) is None:
            size = sum(parameter.numel() for parameter in transformer.parameters())
            transformer = transformer.to(auto_dtype(size, where))
        if dtype in PACKED_BITS:
            transformer = accelerate(quantise(transformer, PACKED_BITS[dtype]))
        if not alone:
            share(transformer)
        side, mode = loaded.config.vq_config.resolution, loaded.resize_mode
        tokenizer = ImageTokenizer(loaded.vqgan, side, mode)
        defaults, folder = loaded.generation_defaults, loaded.folder
        return cls(transformer, tokenizer, loaded.processor, defaults, str(name), folder)

    @property
    def config(self) -> ModelConfig:
        return self.transformer.config

    @property
    def engine(self) -> Engine:
        """Made when first needed; assign one of your own for another size of the cache."""
        with self._lock:
            if self._engine is None or self._engine.transformer is not self.transformer:
                self._engine = Engine(self.transformer, self.processor)
            return self._engine

    @engine.setter
    def engine(self, engine: Engine) -> None:
        self._engine = engine

    def __repr__(self) -> str:
        size, weight = _weights(self.transformer), self.transformer.lm_head.weight
        bits = packed_bits(self.transformer)
        kept = f"int{bits}" if bits else str(weight.dtype).removeprefix("torch.")
        return (
            f"<Chameleon {self.name or 'without a name'}: {size / 1e6:,.1f} M parameters, {kept}, "
            f"{weight.device}, context {self.config.max_position_embeddings:,} tokens>"
        )

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_engine": None, "_lock": None, "_known_codes": OrderedDict()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._lock = Lock()

    def to(self, device: str | torch.device) -> Chameleon:
        """Move the model to another device, in place, in the dtype it has; returns itself.

        Raises `SettingError` for a device that is not there, and while requests are under way.
        """
        where = resolve_device(str(device))
        if peers_of(self.transformer) is not None:
            raise SettingError("a model on several processes stays where it is: load it again")
        if self._engine is not None and self._engine.busy:
            raise SettingError("the model is answering: wait for its replies before it moves")
        self.transformer.to(where)
        self.image_tokenizer.vqgan.to(where)
        return self

    def close(self) -> None:
        """End the requests that are under way, and give back what the engine holds: its cache and
        its own form of the weights. A later request makes a new engine."""
        with self._lock:
            engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()

    def save(self, folder: str | Path, overwrite: bool = False) -> Path:
        """Write the model to a folder that `Chameleon.load` reads, and gives the same replies when
        it is loaded in the same dtype; the folder appears whole or not at all. Returns its path.

        It holds weights, VQ-GAN, tokenizer, settings, and the model card and notices of the folder
        that the model came from. transformers reads it too, but for int8 and int4. A folder that is
        not empty is refused; with `overwrite`, a model there is replaced. Raises `CheckpointError`.
        """
        if peers_of(self.transformer) is not None:
            raise CheckpointError("a model on several processes cannot be saved: each has a part")
        target, tokenizer = Path(folder).expanduser(), self.processor.tokenizer_file
        if not tokenizer.is_file():
            raise CheckpointError(f"{tokenizer} is gone: a saved model needs its tokenizer file")
        try:
            if not overwrite and target.exists() and (target.is_file() or any(target.iterdir())):
                raise CheckpointError(
                    f"{target} is not empty: choose another folder, or set overwrite=True"
                )
            save_hf(
                target,
                self.transformer,
                self.image_tokenizer.vqgan,
                tokenizer.read_text(encoding="utf-8"),
                self.defaults,
                extra_files=papers(self.folder),
                resize_mode=self.image_tokenizer.mode,
                kind=lumina.KIND if lumina.is_layout(self.processor.layout) else "chameleon",
            )
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno else "the disk refuses"
            raise CheckpointError(
                f"{target} cannot be written ({reason}): free the disk or choose another folder"
            ) from None
        return target

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
        size: Size | None = None,
        **fields: Unpack[SamplingFields],
    ) -> Reply:
        """Answer a prompt: a text, a list of parts, or messages.

        Messages end with the user's turn, or with the assistant's, which the reply then continues.
        `output` says what may come: text only; `max_images` pictures (1 if not set) and nothing
        else; or both in the order of the model's choice ("interleaved", "auto"). `size` is the
        width and height of pictures in pixels, for models that draw several sizes. Fields of
        `SamplingParams` may be given by name (`temperature=0`) and go before those of `sampling`,
        as `seed` does; the same seed gives the same reply. Raises an `EarlyFusionError`.
        """
        request = self.request(prompt, output, sampling, seed, size, **fields)
        self.engine.check(request)
        return self.collect(self._events(request, decode=False))

    def stream(
        self,
        prompt: Prompt,
        output: Output = "auto",
        sampling: SamplingParams | None = None,
        seed: int | None = None,
        preview_every: int = 0,
        size: Size | None = None,
        **fields: Unpack[SamplingFields],
    ) -> Iterator[Event]:
        """The events of `generate` as they come; `Finished` is the last. Mistakes raise at once.

        The request begins with the first event taken, and ends when the iterator is closed. An
        `ImageDone` is decoded when it is taken. With `preview_every` there is an `ImagePreview`
        after so many codes of a picture, decoded when it is taken; one that was overtaken by then
        is left out.
        """
        every = _checked_every(preview_every)
        _check_names(fields, "preview_every")
        request = self.request(prompt, output, sampling, seed, size, **fields)
        request = replace(request, preview_every=every)
        self.engine.check(request)
        return self._events(request)

    def _events(self, request: Request, decode: bool = True) -> Iterator[Event]:
        handle = self.engine.add(request)
        try:
            for event in handle:
                if isinstance(event, ImageDone) and decode:
                    [image] = self._drawn([event])
                    yield replace(event, pil=image.pil)
                elif not isinstance(event, ImagePreview):
                    yield event
                elif not any(isinstance(e, ImagePreview | ImageDone) for e in [*handle.events]):
                    yield replace(event, pil=self._sketch(event))
        finally:
            handle.cancel()

    def _sketch(self, event: ImagePreview) -> PIL.Image.Image:
        """What is drawn so far; the places of codes to come are grey."""
        [pil] = self.image_tokenizer.decode(torch.from_numpy(event.codes)[None])
        drawn = np.arange(event.codes.size).reshape(event.codes.shape) < event.codes_done
        mask = PIL.Image.fromarray(drawn.astype(np.uint8) * 255)
        mask = mask.resize(pil.size, PIL.Image.Resampling.NEAREST)
        return PIL.Image.composite(pil, PIL.Image.new("RGB", pil.size, _GREY), mask)

    def generate_batch(
        self,
        prompts: Sequence[Prompt],
        output: Output | Sequence[Output] = "auto",
        sampling: SamplingParams | Sequence[SamplingParams | None] | None = None,
        seed: int | Sequence[int | None] | None = None,
        size: Size | None = None,
        **fields: Unpack[SamplingFields],
    ) -> list[Reply]:
        """Answer all prompts at once, each as `generate` would; `output`, `sampling` and `seed` may
        be lists too.

        With one `seed`, prompt number i has the seed `seed + i`.
        """
        _check_names(fields, "prompts")
        if isinstance(prompts, str) or not isinstance(prompts, Sequence):
            raise PromptError(
                f"prompts is a {type(prompts).__name__}: give a list of prompts, or use generate"
            )
        count = len(prompts)
        outputs: list[Output] = _each("output", output, count)
        samplings: list[SamplingParams | None] = _each("sampling", sampling, count)
        # Every request is checked before the first is answered.
        rows = zip(prompts, outputs, samplings, _seeds(seed, count), strict=True)
        requests = [self.request(*row, size, **fields) for row in rows]
        for request in requests:
            self.engine.check(request)
        handles = [self.engine.add(request) for request in requests]
        try:
            return self._replies([list(handle) for handle in handles])
        finally:
            for handle in handles:
                handle.cancel()

    def request(
        self,
        prompt: Prompt,
        output: Output = "auto",
        sampling: SamplingParams | None = None,
        seed: int | None = None,
        size: Size | None = None,
        **fields: Unpack[SamplingFields],
    ) -> Request:
        """The checked request that `generate` answers, its pictures encoded, its seed chosen."""
        _check_names(fields)
        if output not in get_args(Output):
            raise SettingError.unknown("output", output, get_args(Output))
        if output in ("image", "interleaved") and not self.can_draw:
            raise CheckpointError(
                f"this checkpoint has no VQ decoder, so output={output!r} is not possible: "
                "ask for text, or add one with earlyfusion convert --image-tokenizer"
            )
        asked = _with_seed(with_fields(sampling, fields), seed)
        layout = self.processor.layout if size is None else self._layout_of(size, output)
        messages = as_messages(prompt)
        length = self._checked_length(messages, layout, draws=output == "image")
        settings = asked.resolved(self.defaults)
        room, images = self._bounds(output, asked, settings, length, layout)
        ids = self.processor.encode(messages, self._codes(messages)).ids
        kind = "interleaved" if output == "auto" else output
        return Request(ids, kind, settings, images, room, layout=layout)

    def score(self, prompt: Prompt, answers: Sequence[Answer], end: bool = True) -> list[Score]:
        """How likely each answer to a prompt is; the prompt is read once for all of them.

        An answer is a text, a picture or a list of both. The log-probabilities are the model's own,
        of its whole vocabulary: without guidance, temperature or what the grammar forbids. With
        `end` the end of the reply counts as a token too, so an answer is not likelier for being the
        beginning of another. A prompt that ends with the assistant's turn is continued. Raises an
        `EarlyFusionError`.
        """
        if isinstance(answers, str) or not isinstance(answers, Sequence):
            raise PromptError(f"answers is a {type(answers).__name__}: give a list of answers")
        if peers_of(self.transformer) is not None:
            raise SettingError(
                "score is not offered for a model on several processes: "
                "load it with tensor_parallel=1"
            )
        messages = as_messages(prompt)
        ids = self.processor.encode(messages, self._codes(messages)).ids
        rows = [self._answered(messages, len(ids), answer, end) for answer in answers]
        longest, limit = max(map(len, rows), default=0), self.config.max_position_embeddings
        if len(ids) + longest > limit:
            raise ContextError(
                f"prompt and longest answer are {len(ids) + longest:,} tokens, limit {limit:,}: "
                "shorten one of them"
            )
        return [Score(row, logprobs) for row, logprobs in self._scored(ids, rows)]

    def _answered(
        self, messages: Sequence[Message], start: int, answer: Answer, end: bool
    ) -> list[int]:
        """The tokens of an answer; `start` are those of the prompt."""
        said = Message("assistant", answer)
        if not said.parts:
            raise PromptError("an answer to be scored is empty: give a text or an image")
        before = messages
        if messages[-1].role == "assistant":
            before, said = messages[:-1], Message("assistant", [*messages[-1].parts, *said.parts])
        whole = [*before, said]
        tokens = self.processor.encode(whole, self._codes(whole)).ids[start:]
        return [*tokens, self.processor.vocabulary.eos] if end else tokens

    @torch.inference_mode()
    def _scored(
        self, ids: list[int], rows: Sequence[list[int]]
    ) -> Iterator[tuple[list[int], list[float]]]:
        if not rows:
            return
        reader = Reader(self.transformer, len(ids) + max(map(len, rows)))
        first_1V = reader.read(ids)
        for row in rows:
            rest = [reader.read((), row[:-1])] if len(row) > 1 else []
            logprobs_TV = torch.cat([first_1V, *rest]).log_softmax(-1)
            token_T1 = torch.tensor(row, device=logprobs_TV.device)[:, None]
            yield row, logprobs_TV.gather(1, token_T1)[:, 0].tolist()

    def _layout_of(self, size: Size, output: Output) -> ImageLayout:
        """How a picture of this width and height in pixels is spelled."""
        if output == "text":
            raise SettingError("size is that of pictures, and output='text' has none: leave it out")
        own, stride = self.processor.layout, self.config.vq_config.stride
        layouts = lumina.layouts(own.height) if lumina.is_layout(own) else [own]
        possible = {(o.width * stride, o.height * stride): o for o in layouts}
        wanted = tuple(size) if isinstance(size, list | tuple) else size
        if wanted not in possible:
            shown = "x".join(map(str, wanted)) if isinstance(wanted, tuple) else repr(wanted)
            sizes = ", ".join(f"{width}x{height}" for width, height in possible)
            raise SettingError(
                f"size={shown[:40]} is not drawn by this model: use (width, height) of {sizes}"
            )
        return possible[wanted]

    def _checked_length(self, messages: Sequence[Message], drawn: ImageLayout, draws: bool) -> int:
        """Tokens of the prompt, counted before any picture is encoded."""
        layout, limit = self.processor.layout, self.config.max_position_embeddings
        images = [image for message in messages for image in message.images]
        blank = np.zeros((layout.height, layout.width), dtype=np.int64)
        codes = [blank if image.codes is None else image.codes for image in images]
        length = len(self.processor.encode(messages, codes).ids)
        wanted = drawn.num_tokens if draws else 1
        if length + wanted > limit:
            spelled = (len(layout.spell(c, self.processor.vocabulary)) for c in codes)
            taken = len(images), sum(spelled)
            raise ContextError(_too_long(length, limit, *taken, drawn.num_tokens if draws else 0))
        return length

    def _bounds(
        self,
        output: Output,
        asked: SamplingParams,
        settings: SamplingParams,
        length: int,
        layout: ImageLayout,
    ) -> tuple[int, int]:
        """How many tokens and how many images may come."""
        image_tokens = layout.num_tokens
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

    def _codes(self, messages: Sequence[Message]) -> list[Codes]:
        """Codes of the pictures in order; what has codes, or was seen before, is not encoded."""
        images = [image for message in messages for image in message.images]
        keys = [b"" if image.codes is not None else self._key(image) for image in images]
        new = {key: i for key, i in zip(keys, images, strict=True) if key not in self._known_codes}
        new.pop(b"", None)
        encoded = self.image_tokenizer.encode(list(new.values())).cpu().numpy() if new else ()
        fresh = dict(zip(new, encoded, strict=True))
        codes = [
            image.codes if image.codes is not None else fresh.get(key, self._known_codes.get(key))
            for key, image in zip(keys, images, strict=True)
        ]
        self._remember(fresh)
        return [code for code in codes if code is not None]

    def _key(self, image: Image) -> bytes:
        """What the codes of a picture depend on: its pixels, and the network and how it is cut."""
        if image.pil is None:
            return b""
        tokenizer = self.image_tokenizer
        how = (image.pil.size, tokenizer.mode, tokenizer.resolution, fingerprint([tokenizer.vqgan]))
        return blake2b(image.pil.tobytes() + repr(how).encode()).digest()

    def _remember(self, fresh: Mapping[bytes, Codes]) -> None:
        with self._lock:
            self._known_codes.update(fresh)
            while len(self._known_codes) > _PICTURES_KNOWN:
                self._known_codes.popitem(last=False)

    def collect(self, events: Iterable[Event], watch: Watch | None = None) -> Reply:
        """The reply that the events of `stream` make, its pictures decoded.

        `watch` is called with each event as it comes, and with the picture of an `ImageDone`.
        """
        if watch is None:
            return self._replies([list(events)])[0]
        told, images = list[Event](), list[Image]()
        for event in events:
            if isinstance(event, ImageDone):
                images += self._drawn([event])
            watch(event, images[-1] if isinstance(event, ImageDone) else None)
            told.append(event)
        return _reply(told, images)

    def _replies(self, told: Sequence[Sequence[Event]]) -> list[Reply]:
        """The replies of several requests; all their pictures are decoded together."""
        done = [event for events in told for event in events if isinstance(event, ImageDone)]
        images = iter(self._drawn(done))
        return [_reply(events, images) for events in told]

    def _drawn(self, done: Sequence[ImageDone]) -> list[Image]:
        """Their pictures; those of one size that are not decoded yet are decoded together."""
        pictures = {number: event.pil for number, event in enumerate(done)}
        shapes = {event.codes.shape for event in done if event.pil is None}
        for shape in shapes:
            alike = [n for n, e in enumerate(done) if e.pil is None and e.codes.shape == shape]
            codes = torch.from_numpy(np.stack([done[number].codes for number in alike]))
            pictures |= zip(alike, self.image_tokenizer.decode(codes), strict=True)
        return [Image(pictures[number], event.codes) for number, event in enumerate(done)]


def _reply(events: Iterable[Event], images: Iterable[Image]) -> Reply:
    """Text and pictures in their order; `images` gives one for each `ImageDone`."""
    events = list(events)
    keep_lead = any(isinstance(event, Finished) and event.continues for event in events)
    segments, logprobs = list[Segment](), list[TokenLogprob]()
    text, drawn = "", iter(images)
    for event in events:
        if isinstance(event, TextDelta):
            text += event.text
        if isinstance(event, ImageStarted | Finished):
            if text.strip():
                # What continues a turn keeps the blank that parts the two.
                lead = keep_lead and not segments
                segments.append(Text(text.rstrip() if lead else text.strip()))
            text = ""
        if isinstance(event, ImageDone):
            segments.append(next(drawn))
        if isinstance(event, TokenDrawn):
            logprobs.append(event.logprob)
        if isinstance(event, Finished):
            return Reply(segments, event.reason, event.usage, event.seed, logprobs or None)
    raise RuntimeError("the events of a reply ended without Finished")


def _checked_every(codes: object) -> int:
    if not isinstance(codes, bool) and isinstance(codes, Integral) and int(codes) >= 0:
        return int(codes)
    shown = repr(codes)[:40]
    raise SettingError(f"preview_every={shown} is not possible: use 0 (off) or a number of codes")


def _weights(transformer: Transformer) -> int:
    """How many weights a model has, packed ones too."""
    packed = [m for m in transformer.modules() if isinstance(m, PackedLinear)]
    own = sum(parameter.numel() for parameter in transformer.parameters())
    return own + sum(m.in_features * m.out_features for m in packed)


def _check_own_gpu(device: str) -> None:
    """Refuse one GPU by its number, where several processes share a model."""
    if device.startswith("cuda:"):
        raise SettingError(
            f"device={device!r} is one GPU, and each process of a shared model takes its own: "
            "use auto or cuda"
        )


def _check_adapter(adapter: str | Path | None, parts: int) -> None:
    if adapter is not None and parts > 1:
        raise SettingError(
            f"adapter={str(adapter)!r} cannot go to parts of a model: use tensor_parallel=1, or "
            "merge it first"
        )


def _refuse_packed(transformer: Transformer, adapter: str | Path) -> None:
    if bits := packed_bits(transformer):
        raise SettingError(
            f"adapter={str(adapter)!r} cannot be added to weights in {bits} bits: load the model "
            'that they were made from, and round it after that with dtype="int8" or "int4"'
        )


def _load_part(
    name: str | Path, device: torch.device, dtype: torch.dtype | None, parts: int, verify: bool
) -> Loaded:
    """This process's part of a model that several share, in the dtype of the whole."""
    source = detect.open_source(detect.locate(name), verify=verify)
    check_dense(source)
    size = sum(torch.Size(stored.shape).numel() for stored in source.tensors.values())
    return assemble(open_part(source, parts), device, dtype or auto_dtype(size, device))


def _with_seed(asked: SamplingParams, seed: int | None) -> SamplingParams:
    if seed is not None:
        return replace(asked, seed=seed)
    return asked if asked.seed is not None else replace(asked, seed=secrets.randbits(63))


def _seeds(seed: Any, count: int) -> list[int | None]:
    """The seed of each prompt, None where it is to be drawn."""
    listed: Any = seed.tolist() if isinstance(seed, np.ndarray) else seed
    if isinstance(listed, list | tuple):
        return _each("seed", listed, count)
    first = SamplingParams(seed=listed).seed
    return [None if first is None else first + i for i in range(count)]


def _check_names(fields: Mapping[str, Any], *more: str) -> None:
    """`SettingError` where a keyword is none of `generate` or `more`."""
    with_fields(None, dict.fromkeys(fields), ["output", "sampling", "seed", "size", *more])


def _each(name: str, value: Any, count: int) -> list[Any]:
    if not isinstance(value, list | tuple):
        return [value] * count
    if len(value) != count:
        raise SettingError(
            f"{name} has {len(value)} entries for {count} prompts: give one for all or one for each"
        )
    return list(value)


def _too_long(length: int, limit: int, images: int, image_tokens: int, drawn: int) -> str:
    sentence = f"prompt is {length:,} tokens, limit {limit:,}"
    causes = []
    if images:
        count = "1 image takes" if images == 1 else f"{images} images take"
        causes.append(f"{count} {image_tokens:,}")
    if drawn:
        causes.append(f"the image to draw takes {drawn:,}")
    remedy = "drop an image or shorten the text" if images else "shorten it"
    return f"{sentence}: {'; '.join([*causes, remedy])}"
