"""Chameleon: the object that a user holds. Text and images go in, in any order, and come out
likewise."""

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
from typing import Any, TypeAlias, Unpack, get_args

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from earlyfusion.checkpoints import detect, lumina
from earlyfusion.checkpoints.adapter import merge_adapter, merged_weights, with_weights
from earlyfusion.checkpoints.assemble import LoadedModel, assemble, check_not_packed
from earlyfusion.checkpoints.hf import save_hf
from earlyfusion.checkpoints.source import read_card
from earlyfusion.config import ModelConfig
from earlyfusion.content import Image, Message, Part, Prompt, Segment, Text, as_messages
from earlyfusion.devices import (
    FLOAT_DTYPES,
    PACKED_BITS,
    WEIGHT_DTYPES,
    auto_dtype,
    dtype_name,
    free_bytes,
    resolve_device,
    torch_dtype,
)
from earlyfusion.engine.engine import Engine, fingerprint
from earlyfusion.engine.handle import Handle
from earlyfusion.engine.peers import peers_of
from earlyfusion.engine.tensor_parallel import open_shard, share
from earlyfusion.errors import CheckpointError, ContextError, PromptError, SettingError
from earlyfusion.files import expanded, unwritable
from earlyfusion.generation import constraint, guidance
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
    TokenLogprob,
    Usage,
)
from earlyfusion.generation.settings import (
    Output,
    SamplingFields,
    SamplingParams,
    check_names,
    explicit_values,
    guidance_weights,
    resolve,
)
from earlyfusion.image_tokenizer import ImageTokenizer
from earlyfusion.kernels.twins import accelerate
from earlyfusion.model.quantise import PackedLinear, packed_bits, quantise
from earlyfusion.model.transformer import Transformer
from earlyfusion.processor import Processor, TokenSequence
from earlyfusion.vocabulary import ImageLayout

Size: TypeAlias = tuple[int, int]
"""Width and height of an image in pixels."""
Answer: TypeAlias = Part | Sequence[Part]
OnEvent = Callable[[Event, Image | None], None]
Codes = np.ndarray[Any, np.dtype[np.int64]]

# Arguments of `generate` besides the sampling fields.
_KEYWORDS = ("output", "sampling", "seed", "size", "adapter")
_MAX_CACHED_IMAGES = 1024  # whose codes are kept
_GREY = (128, 128, 128)


@dataclass(frozen=True, eq=False)
class Reply:
    """The model's answer: `segments` in order, its images with both pixels and codes.

    `finish_reason` is "stop" (the model, a stop string or the number of images ended the reply) or
    "length" (no more tokens fit). `usage` has numbers of tokens. The same request with this `seed`
    gives the same reply. `logprobs` has an entry per sampled token, if the request asked for them.
    If the prompt ends with an assistant's turn, the reply is only the continuation of that turn.
    """

    segments: list[Segment]
    finish_reason: Reason
    usage: Usage
    seed: int | None = None
    logprobs: list[TokenLogprob] | None = None

    @property
    def text(self) -> str:
        """The text segments, one per line."""
        return "\n".join(s.text for s in self.segments if isinstance(s, Text))

    @property
    def images(self) -> list[PIL.Image.Image]:
        """The generated images, in RGB."""
        return [s.pil for s in self.segments if isinstance(s, Image) and s.pil is not None]

    @property
    def message(self) -> Message:
        """The reply as a turn of a chat; its images keep their codes."""
        return Message("assistant", self.segments)


@dataclass(frozen=True)
class Score:
    """How likely an answer is: natural logarithms of the model's probabilities. `tokens` and
    `token_logprobs` have one entry per token; the end of the reply has one if it counts."""

    tokens: list[int]
    token_logprobs: list[float]

    @property
    def logprob(self) -> float:
        """The log-probability of the whole answer."""
        return sum(self.token_logprobs)

    @property
    def per_token(self) -> float:
        """The mean over tokens, to compare answers of different lengths."""
        return self.logprob / len(self.tokens)


class Chameleon:
    """A model in memory: transformer, image tokenizer and processor. `defaults` are the model's
    sampling settings, as in its `generation_config.json`; `folder` is where it was loaded from. One
    `engine` answers all requests, from any thread. Copies and pickles hold the model without the
    engine."""

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
        # For each adapter's name, the transformer with that adapter merged.
        self.adapters: dict[str, Transformer] = {}
        self._engine: Engine | None = None
        self.cache_bytes: int | None = None  # for the next engine that is made
        self._cached_codes: OrderedDict[bytes, Codes] = OrderedDict()
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
        cache_bytes: int | None = None,
        adapters: Mapping[str, str | Path] | None = None,
    ) -> Chameleon:
        """Load the embedded model "mini", a folder in any supported format, or a hub id.

        `device` "auto" is a GPU if there is one. `dtype` "auto" is bfloat16 on a GPU and for models
        over 500 million parameters, else float32; "int8" and "int4" quantise the matrices of the
        layers and the head (model/quantise.py) and compute as "auto" does. `tensor_parallel` is the
        number of processes that share each layer, all started by `torchrun`: only the first returns
        from this call, the others serve it and end with it (docs/engine.md). `verify` compares the
        files with the folder's checklist, if there is one; large files only once. `adapter` is a
        folder in PEFT's format that is added to the weights. `cache_bytes` is the size of the
        engine's cache (default: a share of the free memory, docs/engine.md). `adapters` maps names
        of your choice to folders of adapters: `generate(…, adapter=name)` answers as the model
        loaded with `adapter` does. Each takes the memory of the layers once more. Raises
        `CheckpointError` and `SettingError`.
        """
        _check_path("name", name)
        _check_adapters(adapter, adapters, tensor_parallel)
        single_process = tensor_parallel == 1
        if not single_process:
            _check_no_gpu_number(device)
        target, dtype = resolve_device(device), dtype_name("dtype", dtype, WEIGHT_DTYPES)
        explicit_dtype = torch_dtype(dtype) if dtype in FLOAT_DTYPES else None
        loaded = (
            detect.load(name, target, explicit_dtype, verify)
            if single_process
            else _load_shard(name, target, explicit_dtype, tensor_parallel, verify)
        )
        transformer = loaded.transformer
        # Before adapters are added, so that "auto" gives what its dtype gives by name.
        if single_process and explicit_dtype is None and packed_bits(transformer) is None:
            size = sum(parameter.numel() for parameter in transformer.parameters())
            transformer = transformer.to(auto_dtype(size, target))
        # Before anything below changes or rounds the model's own weights.
        weights_of_adapters = {
            adapter_name: _adapter_weights(transformer, adapter_name, adapter_folder)
            for adapter_name, adapter_folder in (adapters or {}).items()
        }
        if adapter is not None:
            _refuse_packed(transformer, adapter)
            merge_adapter(transformer, expanded(adapter))
        if dtype in PACKED_BITS:
            transformer = accelerate(quantise(transformer, PACKED_BITS[dtype]))
        if not single_process:
            share(transformer)  # returns in the first process only
        resolution, mode = loaded.config.vq_config.resolution, loaded.resize_mode
        image_tokenizer = ImageTokenizer(loaded.vqgan, resolution, mode)
        defaults, folder = loaded.generation_defaults, loaded.folder
        model = cls(transformer, image_tokenizer, loaded.processor, defaults, str(name), folder)
        model.cache_bytes = cache_bytes
        for adapter_name, weights in weights_of_adapters.items():
            model.adapters[adapter_name] = with_weights(transformer, weights)
        return model

    @property
    def config(self) -> ModelConfig:
        """The shapes of the transformer and, under `vq_config`, of the VQ-GAN."""
        return self.transformer.config

    @property
    def engine(self) -> Engine:
        """The engine that answers requests, made when it is first needed. Assign another one for a
        cache of another size."""
        with self._lock:
            # The caller may have assigned another transformer.
            if self._engine is None or self._engine.transformer is not self.transformer:
                self._engine = Engine(
                    self.transformer, self.processor, self.cache_bytes, adapters=self.adapters
                )
            return self._engine

    @engine.setter
    def engine(self, engine: Engine) -> None:
        self._engine = engine

    def __repr__(self) -> str:
        size, weight = _num_weights(self.transformer), self.transformer.lm_head.weight
        bits = packed_bits(self.transformer)
        dtype = f"int{bits}" if bits else str(weight.dtype).removeprefix("torch.")
        return (
            f"<Chameleon {self.name or 'without a name'}: {size / 1e6:,.1f} M parameters, {dtype}, "
            f"{weight.device}, context {self.config.max_position_embeddings:,} tokens>"
        )

    def __getstate__(self) -> dict[str, Any]:
        # Locks, threads and compiled steps cannot be pickled.
        return self.__dict__ | {"_engine": None, "_lock": None, "_cached_codes": OrderedDict()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._lock = Lock()

    def to(self, device: str | torch.device) -> Chameleon:
        """Move the model to another device, in place; it keeps its dtype. Returns itself. Raises
        `SettingError` for a device that this machine lacks, and while requests are running."""
        target = resolve_device(str(device))
        if peers_of(self.transformer) is not None:
            raise SettingError("a model on several processes cannot be moved: load it again")
        if self.adapters:
            raise SettingError("a model with adapters by name cannot be moved: load it there")
        if self._engine is not None and self._engine.busy:
            raise SettingError("the model is answering requests: wait for them, then move it")
        self.transformer.to(target)
        self.image_tokenizer.vqgan.to(target)
        return self

    def close(self) -> None:
        """End all running requests and free the engine's memory: its cache and its copy of the
        weights. A later request makes a new engine."""
        with self._lock:
            engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()

    def save(self, folder: str | Path, overwrite: bool = False) -> Path:
        """Write the model to a folder that `Chameleon.load` reads; returns its path.

        Loaded in the same dtype, it gives the same replies. The folder appears whole or not at all.
        It holds weights, VQ-GAN, tokenizer, settings, and the model card and notices of the folder
        that the model came from; transformers can read it, except for int8 and int4. `overwrite`
        replaces a model; any other non-empty folder is refused. Raises `CheckpointError`.
        """
        if peers_of(self.transformer) is not None:
            raise CheckpointError(
                "a model on several processes cannot be saved, as each holds only a share: "
                "load it with tensor_parallel=1"
            )
        _check_path("folder", folder)
        target, tokenizer = expanded(folder), self.processor.tokenizer_file
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
                tokenizer.read_text(encoding="utf-8-sig"),
                self.defaults,
                extra_files=read_card(self.folder),
                resize_mode=self.image_tokenizer.mode,
                family=lumina.FAMILY if lumina.is_layout(self.processor.layout) else "chameleon",
            )
        except OSError as error:
            raise unwritable(target, error) from None
        return target

    @property
    def can_draw(self) -> bool:
        """Whether images can be decoded; checkpoints that transformers wrote lack the decoder."""
        return self.image_tokenizer.vqgan.decoder is not None

    def generate(
        self,
        prompt: Prompt,
        output: Output = "auto",
        sampling: SamplingParams | None = None,
        seed: int | None = None,
        size: Size | None = None,
        adapter: str | None = None,
        **fields: Unpack[SamplingFields],
    ) -> Reply:
        """Answer a prompt: a text, a list of parts, or messages.

        Messages end with the user's turn, or with an assistant's turn, which the reply continues.
        `output` says what may come: "text" only; "image", which is `max_images` images (default: 1)
        and nothing else; or both in the order that the model chooses ("interleaved", "auto").
        `size` is the width and height of images in pixels, for models that generate several sizes.
        `adapter` is the name of one that the model was loaded with. Fields of `SamplingParams` may
        be given by name (`temperature=0`); they and `seed` override `sampling`. The same seed gives
        the same reply. Raises an `EarlyFusionError`.
        """
        request = self.request(prompt, output, sampling, seed, size, adapter, **fields)
        # Without pixels here: `collect` decodes all images of a reply together, which is faster.
        return self.collect(self._events(request, decode=False))

    def stream(
        self,
        prompt: Prompt,
        output: Output = "auto",
        sampling: SamplingParams | None = None,
        seed: int | None = None,
        preview_every: int = 0,
        size: Size | None = None,
        adapter: str | None = None,
        **fields: Unpack[SamplingFields],
    ) -> Iterator[Event]:
        """The events of `generate` as they come; `Finished` is the last. Mistakes raise an
        `EarlyFusionError` at once, before the first event is taken.

        The request starts when the first event is taken, and ends when the iterator is closed. An
        `ImageDone` is decoded when it is taken. After every `preview_every` codes of an image there
        is an `ImagePreview`, also decoded when it is taken, and dropped if a newer one exists by
        then.
        """
        every = _check_preview_every(preview_every)
        check_names(fields, [*_KEYWORDS, "preview_every"])
        request = self._request(prompt, output, sampling, seed, size, adapter, fields)
        request = replace(request, preview_every=every)
        self.engine.check(request)  # `add` checks as well, but not before the first event is taken
        return self._events(request)

    def _events(self, request: Request, decode: bool = True) -> Iterator[Event]:
        """The events of a request, with pixels if `decode`. Closing the iterator cancels the
        request."""
        handle = self.engine.add(request)
        try:
            for event in handle:
                if isinstance(event, ImageDone) and decode:
                    yield self.with_pixels(event)
                elif not isinstance(event, ImagePreview):
                    yield event
                # Do not decode a preview that is outdated already.
                elif not any(isinstance(e, ImagePreview | ImageDone) for e in [*handle.events]):
                    yield self.with_pixels(event)
        finally:
            handle.cancel()

    def with_pixels(self, event: Event) -> Event:
        """An `ImageDone` or `ImagePreview` with its codes decoded; any other event unchanged."""
        if isinstance(event, ImagePreview):
            return replace(event, pil=self._preview_pixels(event))
        if isinstance(event, ImageDone):
            return replace(event, pil=self._decode_images([event])[0].pil)
        return event

    def _preview_pixels(self, event: ImagePreview) -> PIL.Image.Image:
        """The pixels of an unfinished image, grey where codes are still to come."""
        [pil] = self.image_tokenizer.decode(torch.from_numpy(event.codes)[None])
        done = np.arange(event.codes.size).reshape(event.codes.shape) < event.codes_done
        mask = PIL.Image.fromarray(done.astype(np.uint8) * 255)
        mask = mask.resize(pil.size, PIL.Image.Resampling.NEAREST)
        return PIL.Image.composite(pil, PIL.Image.new("RGB", pil.size, _GREY), mask)

    def generate_batch(
        self,
        prompts: Sequence[Prompt],
        output: Output | Sequence[Output] = "auto",
        sampling: SamplingParams | Sequence[SamplingParams | None] | None = None,
        seed: int | Sequence[int | None] | None = None,
        size: Size | None = None,
        adapter: str | None = None,
        **fields: Unpack[SamplingFields],
    ) -> list[Reply]:
        """Answer all prompts in common batches, each as `generate` would. `output`, `sampling` and
        `seed` may be lists with an entry per prompt. With one `seed`, prompt number i (from 0) has
        the seed `seed + i`. A mistake in any prompt raises an `EarlyFusionError` before the first
        is answered."""
        check_names(fields, [*_KEYWORDS, "prompts"])
        if isinstance(prompts, str) or not isinstance(prompts, Sequence):
            raise PromptError(
                f"prompts is a {type(prompts).__name__}: give a list of prompts, or use generate"
            )
        count = len(prompts)
        outputs: list[Output] = _one_per_prompt("output", output, count)
        samplings: list[SamplingParams | None] = _one_per_prompt("sampling", sampling, count)
        rows = zip(prompts, outputs, samplings, _seeds(seed, count), strict=True)
        requests = [self._request(*row, size, adapter, fields) for row in rows]
        handles: list[Handle] = []
        try:
            # `add` checks but runs nothing, so a bad request stops the batch before any work.
            for request in requests:
                handles.append(self.engine.add(request))
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
        adapter: str | None = None,
        **fields: Unpack[SamplingFields],
    ) -> Request:
        """The request that `generate` answers: checked, with images encoded. Raises as it does."""
        check_names(fields, _KEYWORDS)
        return self._request(prompt, output, sampling, seed, size, adapter, fields)

    def _request(
        self,
        prompt: Prompt,
        output: Output,
        sampling: SamplingParams | None,
        seed: int | None,
        size: Size | None,
        adapter: str | None,
        fields: Mapping[str, Any],
    ) -> Request:
        """`request`, for fields whose names are checked already."""
        if not isinstance(output, str) or output not in get_args(Output):
            raise SettingError.unknown("output", output, get_args(Output))
        if output in ("image", "interleaved") and not self.can_draw:
            raise CheckpointError(
                f"this checkpoint has no VQ decoder, so output={output!r} is not possible: "
                "ask for text, or add one with earlyfusion convert --image-tokenizer"
            )
        self._check_adapter_name(adapter)
        layout = self.processor.layout if size is None else self._layout_of(size, output)
        values = explicit_values(sampling, {**fields, "seed": seed})
        resolved = resolve({"seed": secrets.randbits(63)} | values, self.defaults)
        self._check_constraint(output, resolved)
        messages = as_messages(prompt)
        self._check_texts(messages)
        draft = self.processor.draft(messages)
        # The draft has the prompt's length: check it before the slow encoding of images.
        self._check_length(draft, layout.num_tokens if output == "image" else 0)
        max_tokens, max_images = self._reply_limits(
            output, values, resolved, len(draft), layout.num_tokens
        )
        ids = self._fill_images(draft, messages)
        request = Request(
            ids, output, resolved, max_images, max_tokens, layout=layout, adapter=adapter or ""
        )
        self._check_negative_prompt(request, layout)
        return request

    def _check_adapter_name(self, adapter: str | None) -> None:
        if adapter is None or (isinstance(adapter, str) and adapter in self.adapters):
            return
        if self.adapters:
            raise SettingError.unknown("adapter", adapter, self.adapters)
        raise SettingError(
            f"adapter={str(adapter)[:40]!r} is unknown, as the model was loaded without adapters: "
            "give Chameleon.load adapters={name: folder}"
        )

    def _check_constraint(self, output: Output, sampling: SamplingParams) -> None:
        """Raise `SettingError` for a constraint of text that has no effect or is not possible."""
        constraint_name = sampling.constrained
        if not constraint_name:
            return
        if output == "image":
            raise SettingError(
                f"{constraint_name} is for text, and this reply can have none: leave it out, or "
                "let the reply have text"
            )
        constraint.check(self.processor, sampling)

    def _check_negative_prompt(self, request: Request, layout: ImageLayout) -> None:
        """Raise `SettingError` for a negative prompt that has no effect or does not fit."""
        if request.sampling.negative_prompt is None:
            return
        self._check_texts([Message("user", request.sampling.negative_prompt)], "negative_prompt")
        negative = guidance.negative_prompt_ids(self.processor, request.sampling)
        if request.output == "text" or request.max_images == 0:
            raise SettingError(
                "negative_prompt is for images, and this reply can have none: leave it out, or let "
                "the reply have images"
            )
        vocabulary = self.processor.vocabulary
        has_images = guidance.has_images([*request.ids, vocabulary.begin_image], vocabulary)
        if "unconditional" not in guidance.needed_conditions(
            *guidance_weights(request.sampling), has_images
        ):
            name = "guidance_image" if has_images else "guidance_text"
            raise SettingError(
                f"negative_prompt has no effect with {name}=1: set {name} to another number, such "
                "as 3, or leave it out"
            )
        # A branch must not need more of the engine's cache than prompt and reply together.
        needed, limit = len(negative) + layout.num_tokens, len(request.ids) + request.max_tokens
        if needed > limit:
            raise ContextError(
                f"negative_prompt and an image are {needed:,} tokens, limit {limit:,}, those of "
                "prompt and reply: shorten it, or raise max_tokens"
            )

    def score(self, prompt: Prompt, answers: Sequence[Answer], end: bool = True) -> list[Score]:
        """How likely each answer to a prompt is; the prompt is read once for all of them.

        An answer is a text, an image or a list of both. The log-probabilities are the model's, over
        its whole vocabulary, without guidance, temperature or grammar. With `end` the end of the
        reply counts as a token, so that an answer does not gain from being the beginning of
        another. A prompt that ends with an assistant's turn is continued. Raises an
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
        self._check_texts(messages)
        ids = self._fill_images(self.processor.draft(messages), messages)
        answer_ids = [self._answer_ids(answer, end) for answer in answers]
        longest, limit = max(map(len, answer_ids), default=0), self.config.max_position_embeddings
        if len(ids) + longest > limit:
            raise ContextError(
                f"prompt and longest answer are {len(ids) + longest:,} tokens, limit {limit:,}: "
                "shorten one of them"
            )
        scored = self._score_answers(ids, answer_ids)
        return [Score(tokens, logprobs) for tokens, logprobs in scored]

    def _answer_ids(self, answer: Answer, end: bool) -> list[int]:
        message = Message("assistant", answer)
        if not message.parts:
            raise PromptError("an answer to be scored is empty: give a text or an image")
        self._check_texts([message], "an answer")
        ids = self._fill_images(self.processor.draft_turn(message), [message])
        return [*ids, self.processor.vocabulary.eos] if end else ids

    @torch.inference_mode()
    def _score_answers(
        self, prompt_ids: list[int], answers: Sequence[list[int]]
    ) -> Iterator[tuple[list[int], list[float]]]:
        """The tokens of each answer, and their log-probabilities."""
        if not answers:
            return
        reader = Reader(self.transformer, len(prompt_ids) + max(map(len, answers)))
        first_1V = reader.read(prompt_ids)
        for answer in answers:
            # The last token is not read, as the logits after it are not needed.
            later = [reader.read((), answer[:-1])] if len(answer) > 1 else []
            logprobs_TV = torch.cat([first_1V, *later]).log_softmax(-1)
            token_T1 = torch.tensor(answer, device=logprobs_TV.device)[:, None]
            yield answer, logprobs_TV.gather(1, token_T1)[:, 0].tolist()

    def _layout_of(self, size: Size, output: Output) -> ImageLayout:
        """The layout of images of this width and height in pixels."""
        if output == "text":
            raise SettingError("size is that of images, and output='text' has none: leave it out")
        default, stride = self.processor.layout, self.config.vq_config.stride
        layouts = lumina.layouts(default.height) if lumina.is_layout(default) else [default]
        by_size = {(item.width * stride, item.height * stride): item for item in layouts}
        value: Any = size.tolist() if isinstance(size, np.ndarray) else size
        requested = tuple(value) if isinstance(value, list | tuple) else None
        # Compared one by one, as the size may hold anything, even what cannot be a key.
        layout = next((layout for pair, layout in by_size.items() if pair == requested), None)
        if layout is None:
            shown = repr(value) if requested is None else "x".join(map(str, requested))
            sizes = ", ".join(map(str, by_size))
            raise SettingError(
                f"size={shown[:40]} is not a size of this model: give (width, height) as {sizes}"
            )
        return layout

    def _check_texts(self, messages: Sequence[Message], name: str = "prompt") -> None:
        """Raise `ContextError` for texts that are too long whatever their tokens are: encoding some
        megabytes takes minutes, in which no other thread runs."""
        texts = [part.text for m in messages for part in m.parts if isinstance(part, Text)]
        min_tokens = sum(map(self.processor.min_tokens, texts))
        limit = self.config.max_position_embeddings
        if min_tokens > limit:
            raise ContextError(
                f"{name} has at least {min_tokens:,} tokens, limit {limit:,}: shorten its text"
            )

    def _check_length(self, draft: TokenSequence, tokens_to_generate: int) -> None:
        """Raise `ContextError` if a prompt leaves no room for a token, or for a requested image."""
        length, limit = len(draft), self.config.max_position_embeddings
        if length + max(tokens_to_generate, 1) > limit:
            images = [end - start for start, end, modality in draft.spans if modality == "image"]
            raise ContextError(
                _too_long_message(length, limit, len(images), sum(images), tokens_to_generate)
            )

    def _reply_limits(
        self,
        output: Output,
        values: Mapping[str, Any],
        resolved: SamplingParams,
        length: int,
        image_tokens: int,
    ) -> tuple[int, int]:
        """The most tokens and images of a reply to a prompt of `length` tokens. `values` are the
        caller's settings, `resolved` also has the model's defaults."""
        room = self.config.max_position_embeddings - length
        if output != "image":
            max_tokens = min(room, resolved.max_tokens or room)
            images_that_fit = max_tokens // image_tokens if self.can_draw else 0
            if resolved.max_images is None:
                return max_tokens, images_that_fit
            return max_tokens, min(images_that_fit, resolved.max_images)
        # Only the caller's limits, as the model's defaults are meant for replies with text.
        max_tokens = min(room, int(values.get("max_tokens", room)))
        max_images = int(values.get("max_images", 1))
        if max_images == 0:
            raise SettingError("max_images=0 allows no image: leave it out or ask for text")
        if max_tokens < image_tokens:
            raise SettingError(
                f"max_tokens={max_tokens:,} cannot hold an image of {image_tokens:,} tokens: "
                "raise it or leave it out"
            )
        return max_tokens, max_images

    def with_codes(self, messages: Sequence[Message]) -> list[Message]:
        """The messages with codes in place of pixels. They make the same prompt, and take a
        thousandth of the memory."""
        images = [i for message in messages for i in message.images if i.codes is None]
        codes = iter(self._encode_images(images) if images else ())

        def without_pixels(part: Segment) -> Segment:
            if not isinstance(part, Image):
                return part
            return Image(codes=next(codes) if part.codes is None else part.codes)

        return [Message(m.role, [without_pixels(part) for part in m.parts]) for m in messages]

    def _fill_images(self, draft: TokenSequence, messages: Sequence[Message]) -> list[int]:
        """The ids of a draft of these messages, with their images encoded and spelled."""
        images = [i for message in messages for i in message.images if i.codes is None]
        return self.processor.fill(draft, self._encode_images(images)) if images else draft.ids

    def _encode_images(self, images: Sequence[Image]) -> list[Codes]:
        """Codes of images that carry none. The same pixels are encoded once for many requests."""
        keys = self._image_keys(images)
        codes_of = {
            key: codes for key in keys if (codes := self._cached_codes.get(key)) is not None
        }
        new_images = {k: image for k, image in zip(keys, images, strict=True) if k not in codes_of}
        if new_images:
            encoded = self.image_tokenizer.encode(list(new_images.values())).cpu().numpy()
            new_codes = dict(zip(new_images, encoded, strict=True))
            self._cache_codes(new_codes)
            codes_of |= new_codes
        return [codes_of[key] for key in keys]

    def _image_keys(self, images: Sequence[Image]) -> list[bytes]:
        """Hashes of what the codes depend on: pixels, weights, and how an image is made square."""
        tokenizer = self.image_tokenizer
        settings = tokenizer.mode, tokenizer.resolution, fingerprint([tokenizer.vqgan])
        pils = [image.pil for image in images if image.pil is not None]
        return [
            blake2b(pil.tobytes() + repr((pil.size, settings)).encode()).digest() for pil in pils
        ]

    def _cache_codes(self, new_codes: Mapping[bytes, Codes]) -> None:
        with self._lock:
            self._cached_codes.update(new_codes)
            while len(self._cached_codes) > _MAX_CACHED_IMAGES:
                self._cached_codes.popitem(last=False)

    def collect(self, events: Iterable[Event], watch: OnEvent | None = None) -> Reply:
        """The reply made of the events of `stream`, its images decoded. `watch` is called with each
        event as it comes, and with the image of an `ImageDone`."""
        if watch is None:
            return self._replies([list(events)])[0]
        collected, images = list[Event](), list[Image]()
        for event in events:
            if isinstance(event, ImageDone):
                images += self._decode_images([event])
            watch(event, images[-1] if isinstance(event, ImageDone) else None)
            collected.append(event)
        return _reply(collected, images)

    def _replies(self, event_lists: Sequence[Sequence[Event]]) -> list[Reply]:
        """The reply of each list of events; all images are decoded together."""
        image_events = [e for events in event_lists for e in events if isinstance(e, ImageDone)]
        images = iter(self._decode_images(image_events))
        return [_reply(events, images) for events in event_lists]

    def _decode_images(self, events: Sequence[ImageDone]) -> list[Image]:
        """The images of these events; those without pixels are decoded, one batch per size."""
        pils = {number: event.pil for number, event in enumerate(events)}
        for shape in {event.codes.shape for event in events if event.pil is None}:
            batch = [n for n, e in enumerate(events) if e.pil is None and e.codes.shape == shape]
            codes = torch.from_numpy(np.stack([events[number].codes for number in batch]))
            pils |= zip(batch, self.image_tokenizer.decode(codes), strict=True)
        return [Image(pils[number], event.codes) for number, event in enumerate(events)]


def _reply(events: Sequence[Event], images: Iterable[Image]) -> Reply:
    """The reply made of its events; `images` gives the image of each `ImageDone`, in order."""
    continues = any(isinstance(event, Finished) and event.continues for event in events)
    segments, logprobs = list[Segment](), list[TokenLogprob]()
    text, images = "", iter(images)
    for event in events:
        if isinstance(event, TextDelta):
            text += event.text
        if isinstance(event, ImageStarted | Finished):
            if text.strip():
                # A continuation keeps the whitespace between it and the turn that it continues.
                is_continuation = continues and not segments
                segments.append(Text(text.rstrip() if is_continuation else text.strip()))
            text = ""
        if isinstance(event, ImageDone):
            segments.append(next(images))
        if isinstance(event, TokenDrawn):
            logprobs.append(event.logprob)
        if isinstance(event, Finished):
            return Reply(segments, event.reason, event.usage, event.seed, logprobs or None)
    raise RuntimeError("the events of a reply ended without Finished")


def _check_preview_every(codes: object) -> int:
    if not isinstance(codes, bool) and isinstance(codes, Integral) and int(codes) >= 0:
        return int(codes)
    shown = repr(codes)[:40]
    raise SettingError(
        f"preview_every={shown} is not possible: use 0 (off) or a whole number of codes"
    )


def _num_weights(transformer: Transformer) -> int:
    """The number of weights, including those of packed matrices, which are not parameters."""
    packed_layers = [m for m in transformer.modules() if isinstance(m, PackedLinear)]
    num_parameters = sum(parameter.numel() for parameter in transformer.parameters())
    return num_parameters + sum(m.in_features * m.out_features for m in packed_layers)


def _check_path(name: str, value: object) -> None:
    if not isinstance(value, str | os.PathLike):
        raise SettingError(
            f"{name} is an object of type {type(value).__name__}: give a str or a Path"
        )


def _check_adapters(adapter: object, adapters: object, tensor_parallel: int) -> None:
    """Raise `SettingError` unless these are paths of folders, for a model in one process."""
    if not isinstance(adapters, Mapping | None):
        raise SettingError(
            f"adapters is a {type(adapters).__name__}: give a dict of names and folders"
        )
    folders = [] if adapter is None else [("adapter", adapter)]
    folders += [("adapters", folder) for folder in (adapters or {}).values()]
    for option, folder in folders:
        _check_path(option, folder)
        if tensor_parallel > 1:
            raise SettingError(
                f"adapter={str(folder)!r} cannot be added to a model on several processes: "
                "use tensor_parallel=1, or merge it first"
            )


def _check_no_gpu_number(device: str) -> None:
    """Raise `SettingError` for the number of a GPU, if several processes share a model."""
    if device.startswith("cuda:"):
        raise SettingError(
            f"device={device!r} is one GPU, and each process of a shared model takes its own: "
            "use auto or cuda"
        )


def _adapter_weights(
    transformer: Transformer, name: str, folder: str | Path
) -> list[tuple[str, Tensor]]:
    """The layers that an adapter changes, and their weights with the adapter merged. Raises
    `SettingError` for an empty name, packed weights or too little memory, and `CheckpointError`."""
    if not name:
        raise SettingError(f"the adapter {str(folder)!r} has no name: give one, as short=FOLDER")
    _refuse_packed(transformer, folder)
    device = transformer.lm_head.weight.device
    needed = sum(p.numel() * p.element_size() for p in transformer.model.layers.parameters())
    if needed > (free := free_bytes(device)):
        raise SettingError(
            f"adapter={name!r} needs the layers once more, {needed / 1e9:,.1f} GB, and "
            f"{free / 1e9:,.1f} GB are free: load fewer adapters, or another dtype"
        )
    weights = list(merged_weights(transformer, expanded(folder)))
    if any(layer == "lm_head" for layer, _ in weights):
        raise CheckpointError(
            f"{folder} adapts the head, which adapters by name share: load it with adapter= into "
            "a model of its own"
        )
    return weights


def _refuse_packed(transformer: Transformer, adapter: str | Path) -> None:
    """Raise `SettingError` if an adapter would be added to int8 or int4 weights."""
    if bits := packed_bits(transformer):
        raise SettingError(
            f"adapter={str(adapter)!r} cannot be added to weights in {bits} bits: load the model "
            'that they were rounded from; with dtype="int8" or "int4" the sum is rounded'
        )


def _load_shard(
    name: str | Path, device: torch.device, dtype: torch.dtype | None, processes: int, verify: bool
) -> LoadedModel:
    """This process's shard of a model, in the dtype that the whole model would have."""
    source = detect.open_source(detect.locate(name), verify=verify)
    check_not_packed(source)
    size = sum(torch.Size(stored.shape).numel() for stored in source.tensors.values())
    return assemble(open_shard(source, processes), device, dtype or auto_dtype(size, device))


def _seeds(seed: Any, count: int) -> list[int | None]:
    """The seed of each prompt; None means a random one."""
    value: Any = seed.tolist() if isinstance(seed, np.ndarray) else seed
    if isinstance(value, list | tuple):
        return _one_per_prompt("seed", value, count)
    first = SamplingParams(seed=value).seed  # checks it, and accepts numpy's numbers
    return [None if first is None else first + i for i in range(count)]


def _one_per_prompt(name: str, value: Any, count: int) -> list[Any]:
    """The entries of a list of `count`, or a single value for each prompt."""
    if not isinstance(value, list | tuple):
        return [value] * count
    if len(value) != count:
        raise SettingError(
            f"{name} has {len(value)} entries for {count} prompts: give one for all or one for each"
        )
    return list(value)


def _too_long_message(
    length: int, limit: int, images: int, image_tokens: int, tokens_to_generate: int
) -> str:
    """The sentence for a prompt of `length` tokens, of which `images` images take
    `image_tokens`."""
    causes = []
    if images:
        count = "1 image takes" if images == 1 else f"{images} images take"
        causes.append(f"{count} {image_tokens:,}")
    if tokens_to_generate:
        causes.append(f"the image to generate takes {tokens_to_generate:,}")
    remedy = "drop an image or shorten the text" if images else "shorten it"
    return f"prompt is {length:,} tokens, limit {limit:,}: {'; '.join([*causes, remedy])}"
