"""What all routes share: the engine's driver, the stores, and the way from a body to requests.
Worker threads read prompts and their images."""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from time import time
from typing import Any, TypeVar

from starlette.requests import Request as HttpRequest

from earlyfusion.api import Chameleon
from earlyfusion.content import Image, Prompt
from earlyfusion.errors import EarlyFusionError, SettingError
from earlyfusion.generation.request import ImageDone, ImagePreview, Request
from earlyfusion.generation.settings import Output
from earlyfusion.serve.decoder import Decoder
from earlyfusion.serve.driver import Batch
from earlyfusion.serve.errors import ApiError
from earlyfusion.serve.image_io import ImageLimits
from earlyfusion.serve.metrics import Metrics
from earlyfusion.serve.niceness import yield_to_others
from earlyfusion.serve.options import ServeOptions
from earlyfusion.serve.prompts import PromptReader, http_urls
from earlyfusion.serve.protocol import ChatMessage, Format, StrictModel
from earlyfusion.serve.replicas import Remotes, drivers_of
from earlyfusion.serve.replies import count_image_tokens
from earlyfusion.serve.store import MEDIA_TYPES, Conversations, Files, StoredFile

Result = TypeVar("Result")
_WORKERS = 2
_FETCHERS = 32  # threads that read prompts with images at URLs: they wait for other servers
# Texts of at most this length are encoded on the event loop: two thread switches take longer.
QUICK_CHARACTERS = 500
# JavaScript represents whole numbers of up to 53 bits exactly, and choices add to the seed.
_SEED_BITS = 52
_PYTHON_SIZE = re.compile(r"\((\d+), (\d+)\)")
_SIZE = re.compile(r"([1-9]\d{0,4})x([1-9]\d{0,4})")


@dataclass(frozen=True)
class GenerationSpec:
    """The settings of an HTTP request, without its prompt. `sampling` has fields of
    `SamplingParams`. Each prompt is answered `n` times. `model` is the name of the model or of an
    adapter, `limit_field` the route's name of `max_tokens`."""

    output: Output
    sampling: dict[str, Any]
    seed: int | None = None
    n: int = 1
    size: str | None = None
    partial_images: int = 0
    model: str | None = None
    limit_field: str = "max_tokens"


@dataclass
class Prepared:
    """The requests of one HTTP request, and the number of tokens of its prompts, for `usage`. Each
    prompt is counted once. `prompt_image_tokens` counts those of images. `continues` says whether
    the prompt ends with an assistant's turn, which the reply continues."""

    batch: Batch
    prompt_tokens: int
    prompt_image_tokens: int
    continues: bool = False


class Service:
    """One model, and the state that its routes share; with `remote`, the engines run in other
    processes. Raises `SettingError` if an adapter has the model's name."""

    def __init__(self, model: Chameleon, options: ServeOptions, remote: Remotes = None) -> None:
        self.model, self.options = model, options
        self.name = options.name or Path(model.name or "model").name
        if self.name in model.adapters:
            raise SettingError(
                f"an adapter and the model are both named {self.name!r}: give each a name of its "
                "own"
            )
        self.created = int(time())
        self.driver = drivers_of(model, options.max_queue, remote)
        self.metrics = Metrics(self.driver, self.name)
        self.files = Files(options.file_bytes)
        self.conversations = Conversations()
        self._workers = ThreadPoolExecutor(_WORKERS, "images", initializer=yield_to_others)
        self._fetchers = ThreadPoolExecutor(_FETCHERS, "addresses", initializer=yield_to_others)
        in_process = remote is not None and model.image_tokenizer.device.type == "cpu"
        self.decoder = Decoder(model, self._workers, in_process)

    async def start(self) -> None:
        self.driver.start()
        await self.driver.warm_up()
        # After the warm-up, which is not counted.
        self.driver.set_callbacks(self.metrics.observe, self.metrics.count_cancelled)

    async def stop(self) -> None:
        await self.driver.drain(self.options.drain_seconds)
        await asyncio.to_thread(self.driver.stop)
        await self.decoder.close()
        for pool in (self._workers, self._fetchers):
            pool.shutdown(wait=False, cancel_futures=True)

    async def run_in_worker(
        self, task: Callable[..., Result], *arguments: Any, fetches: bool = False
    ) -> Result:
        """The result of a slow task, which runs in a worker thread. A task that `fetches` images
        from other servers runs in a larger pool."""
        pool = self._fetchers if fetches else self._workers
        return await asyncio.get_running_loop().run_in_executor(pool, task, *arguments)

    def fetches_images(self, body: StrictModel | list[ChatMessage] | None) -> bool:
        """Whether reading a body may fetch images from other servers."""
        return self.options.allow_image_urls and any(http_urls(body))

    def reader(self) -> PromptReader:
        """A reader of the prompts of one HTTP request."""
        limits = ImageLimits(self.options)
        return PromptReader(self.files, limits, self.options.allow_image_urls)

    def serves(self, name: str) -> bool:
        """Whether `name` is that of the model or of an adapter."""
        return name == self.name or name in self.model.adapters

    def check_model(self, name: str | None) -> None:
        """Raise `ApiError` with status 404 for a model that is not served."""
        if name is not None and not self.serves(name):
            served = [self.name, *self.model.adapters]
            names = ", ".join(map(repr, served[:5])) + (", …" if len(served) > 5 else "")
            raise ApiError(
                404,
                f"the model {name[:60]!r} is not served here: use {names}",
                param="model",
                code="model_not_found",
            )

    async def submit(
        self,
        prompts: Callable[[], list[Prompt]],
        spec: GenerationSpec,
        count: int | None = None,
        quick: bool = False,
        fetches: bool = False,
        after: Callable[[], None] = lambda: None,
    ) -> Prepared:
        """Admit an HTTP request, read its prompts, and pass all requests to the engine.

        `count` is the total number of requests (None: `spec.n`, for one prompt). A worker thread
        calls `prompts` and then `after`; if the prompts are `quick`, the event loop does. Quick
        prompts are short and without images, and put no constraints on the reply. `fetches` is
        that of `run_in_worker`. Raises `ApiError`, `QueueFullError`, `NotReadyError` or an
        `EarlyFusionError`.
        """
        count = count or spec.n
        if count > self.driver.limit:
            raise ApiError(
                400,
                f"the request asks for {count} replies, the server has room for "
                f"{self.driver.limit}: ask for fewer",
                param="n",
            )
        # Admission comes first, so that a full server does not waste time on images.
        batch = self.driver.admit(count)
        try:
            if quick:
                requests = self._requests(prompts, spec, after)
            else:
                requests = await self.run_in_worker(
                    self._requests, prompts, spec, after, fetches=fetches
                )
            batch.submit([request for choices in requests for request in choices])
        except BaseException:
            batch.close()
            raise
        prompt_ids = [choices[0].ids for choices in requests]
        return Prepared(
            batch,
            prompt_tokens=sum(map(len, prompt_ids)),
            prompt_image_tokens=sum(count_image_tokens(self.model, ids) for ids in prompt_ids),
            continues=prompt_ids[0][-1] != self.model.processor.vocabulary.end_of_turn,
        )

    def _requests(
        self,
        prompts: Callable[[], list[Prompt]],
        spec: GenerationSpec,
        after: Callable[[], None],
    ) -> list[list[Request]]:
        """The requests of each prompt."""
        requests = [self._choices(prompt, spec) for prompt in prompts()]
        after()
        return requests

    def _choices(self, prompt: Prompt, spec: GenerationSpec) -> list[Request]:
        """The requests of one prompt. Choice number i, counted from 0, has seed + i."""
        try:
            first = self.model.request(
                prompt,
                spec.output,
                seed=secrets.randbits(_SEED_BITS) if spec.seed is None else spec.seed,
                size=_size(spec.size),
                adapter=spec.model if spec.model in self.model.adapters else None,
                **spec.sampling,
            )
        except EarlyFusionError as error:
            raise type(error)(_for_clients(str(error), spec)) from None
        if spec.partial_images:
            layout = first.layout or self.model.processor.layout
            rows = -(-layout.height // (spec.partial_images + 1))  # whole rows, rounded up
            first = replace(first, preview_every=rows * layout.width)
        if spec.n == 1:
            return [first]
        seed = first.sampling.seed or 0
        return [
            replace(first, sampling=replace(first.sampling, seed=(seed + i) % 2**63))
            for i in range(spec.n)
        ]

    async def tokens(self, text: str | None, messages: list[ChatMessage] | None) -> list[int]:
        """The token ids of a text, or of a prompt of these messages."""
        fetches = self.fetches_images(messages)
        return await self.run_in_worker(self._tokens, text, messages, fetches=fetches)

    def _tokens(self, text: str | None, messages: Sequence[ChatMessage] | None) -> list[int]:
        if messages is None:
            return self.model.processor.encode_text(text or "")
        turns = self.reader().chat(messages)
        return list(self.model.request(turns, "text", seed=0, max_tokens=1).ids)

    async def store_image(
        self, event: ImageDone, output_format: Format, compression: int, file_id: str | None = None
    ) -> StoredFile:
        """Decode a generated image, and store its file and its codes."""
        data, digest = await self.decoder.file(event, output_format, compression)
        media_type, name = MEDIA_TYPES[output_format], f"image.{output_format}"
        image = Image(codes=event.codes)
        return self.files.add(data, media_type, image, name, "assistants_output", file_id, digest)

    async def preview(self, event: ImagePreview, output_format: Format, compression: int) -> bytes:
        """The file of an unfinished image."""
        return (await self.decoder.file(event, output_format, compression)).data

    def image_size(self, size: str | None) -> str:
        """The width and height in pixels, as "64x64", of images generated for the requested
        `size`."""
        if size not in (None, "auto"):
            return str(size)
        layout, stride = self.model.processor.layout, self.model.config.vq_config.stride
        return f"{layout.width * stride}x{layout.height * stride}"

    @property
    def model_objects(self) -> list[dict[str, Any]]:
        """OpenAI's model objects of the model and its adapters."""
        return [self.model_object(name) for name in (self.name, *self.model.adapters)]

    def model_object(self, name: str) -> dict[str, Any]:
        """OpenAI's model object, with further fields: `architecture` as in OpenRouter, and
        `parent`, the base model of an adapter, as in vLLM."""
        inputs, outputs = ["text", "image"], ["text", *(["image"] if self.model.can_draw else [])]
        architecture = {"input_modalities": inputs, "output_modalities": outputs}
        return {
            "id": name,
            "object": "model",
            "created": self.created,
            "owned_by": "earlyfusion",
            "parent": None if name == self.name else self.name,
            "max_model_len": self.model.config.max_position_embeddings,
            "input_modalities": inputs,
            "output_modalities": outputs,
            "architecture": architecture,
            "image_size": self.image_size(None),
        }

    def base_url(self, request: HttpRequest) -> str:
        """The URL of this server, without a slash at the end, with which URLs of files begin."""
        return (self.options.public_url or str(request.base_url)).rstrip("/")


def _for_clients(message: str, spec: GenerationSpec) -> str:
    """An error message of the Python API in the words of the HTTP API: the route's name of
    `max_tokens`, and sizes as "64x64"."""
    message = message.replace("max_tokens", spec.limit_field)
    message = message.replace("give (width, height) as", "use auto or")
    return _PYTHON_SIZE.sub(r"\1x\2", message)


def _size(size: str | None) -> tuple[int, int] | None:
    """Width and height in pixels; None for the size of the model's images. Raises `ApiError`."""
    if size is None or size == "auto":
        return None
    match = _SIZE.fullmatch(size)
    if match is None:
        raise ApiError(
            400,
            f"size={size[:40]!r} is not possible: use auto, or width x height as 512x512",
            param="size",
            code="invalid_value",
        )
    return int(match[1]), int(match[2])
