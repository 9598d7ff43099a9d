"""Everything that the routes share: the model behind its driver, the stores, and the way from a
body to requests. A few worker threads read prompts and their images."""

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
from earlyfusion.serve.prompts import PromptReader, foreign_addresses
from earlyfusion.serve.protocol import ChatMessage, Format, Wire
from earlyfusion.serve.replicas import Remotes, drivers_of
from earlyfusion.serve.replies import image_tokens
from earlyfusion.serve.store import MEDIA_TYPES, Conversations, Files, StoredFile

Result = TypeVar("Result")
_WORKERS = 2
_FETCHERS = 32  # threads that read prompts with foreign addresses, as they wait for other servers
# Texts up to this length are read at once: two switches of threads take longer.
QUICK_CHARACTERS = 500
_SEED_BITS = 52  # JavaScript reads whole numbers exactly up to 53 bits, and choices add to the seed
_PYTHON_SIZE = re.compile(r"\((\d+), (\d+)\)")
_SIZE = re.compile(r"([1-9]\d{0,4})x([1-9]\d{0,4})")


@dataclass(frozen=True)
class GenerationSpec:
    """The settings of a request, without its prompt. `limit_field` is what the route calls
    `max_tokens`."""

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
    """The requests of one HTTP request, and the tokens of their prompts for `usage`."""

    batch: Batch
    prompt_tokens: int
    prompt_images: int
    continues: bool = False


class Service:
    """One model and its routes' state; with `remote`, its engines run in other processes."""

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
        apart = remote is not None and model.image_tokenizer.device.type == "cpu"
        self.decoder = Decoder(model, self._workers, apart)

    async def start(self) -> None:
        self.driver.start()
        await self.driver.warm_up()
        # After the warm-up, which is not counted.
        self.driver.set_callbacks(self.metrics.observe, self.metrics.cancel)

    async def stop(self) -> None:
        await self.driver.drain(self.options.drain_seconds)
        await asyncio.to_thread(self.driver.stop)
        await self.decoder.close()
        for pool in (self._workers, self._fetchers):
            pool.shutdown(wait=False, cancel_futures=True)

    async def work(
        self, task: Callable[..., Result], *arguments: Any, waits: bool = False
    ) -> Result:
        """Run a slow task in a worker thread; with `waits` in one that may wait for others."""
        pool = self._fetchers if waits else self._workers
        return await asyncio.get_running_loop().run_in_executor(pool, task, *arguments)

    def waits(self, body: Wire | list[ChatMessage] | None) -> bool:
        """Whether reading a body may wait for other servers, which have its images."""
        return self.options.allow_image_urls and any(foreign_addresses(body))

    def reader(self) -> PromptReader:
        """A reader for the prompt of one request."""
        limits = ImageLimits(self.options)
        return PromptReader(self.files, limits, self.options.allow_image_urls)

    def serves(self, name: str) -> bool:
        """Whether this is the name of the model or of an adapter."""
        return name == self.name or name in self.model.adapters

    def check_model(self, name: str | None) -> None:
        """Raise `ApiError` with status 404 for a model that is not served."""
        if name is not None and not self.serves(name):
            served = [self.name, *self.model.adapters]
            known = ", ".join(map(repr, served[:5])) + (", …" if len(served) > 5 else "")
            raise ApiError(
                404,
                f"the model {name[:60]!r} is not served here: use {known}",
                param="model",
                code="model_not_found",
            )

    async def begin(
        self,
        prompts: Callable[[], list[Prompt]],
        spec: GenerationSpec,
        count: int | None = None,
        quick: bool = False,
        waits: bool = False,
        after: Callable[[], None] = lambda: None,
    ) -> Prepared:
        """Admit, read the prompts, and hand all requests to the engine.

        Each prompt is answered `spec.n` times; with several prompts, `count` is the number of
        requests in all. A worker thread reads the prompts, unless they are `quick`: short, and
        without images and constraints. For `waits` see `work`; the same thread calls `after`
        when the requests are outputs.
        """
        count = count or spec.n
        if count > self.driver.limit:
            raise ApiError(
                400,
                f"the request asks for {count} replies, the server has room for "
                f"{self.driver.limit}: ask for fewer",
                param="n",
            )
        # Admission comes first: a full server does not even read the images.
        batch = self.driver.admit(count)
        try:
            if quick:
                requests = self._requests(prompts, spec, after)
            else:
                requests = await self.work(self._requests, prompts, spec, after, waits=waits)
            batch.submit([request for several in requests for request in several])
        except BaseException:
            batch.close()
            raise
        firsts = [several[0] for several in requests]
        end = self.model.processor.vocabulary.end_of_turn
        return Prepared(
            batch,
            sum(len(request.ids) for request in firsts),
            sum(image_tokens(self.model, request.ids) for request in firsts),
            firsts[0].ids[-1] != end,
        )

    def _requests(
        self,
        prompts: Callable[[], list[Prompt]],
        spec: GenerationSpec,
        after: Callable[[], None],
    ) -> list[list[Request]]:
        requests = [self._choices(prompt, spec) for prompt in prompts()]
        after()
        return requests

    def _choices(self, prompt: Prompt, spec: GenerationSpec) -> list[Request]:
        """The requests of one prompt; choice number i has the seed of the first plus i."""
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
        """Tokens of a text, or of the whole prompt that messages make."""
        return await self.work(self._tokens, text, messages, waits=self.waits(messages))

    def _tokens(self, text: str | None, messages: Sequence[ChatMessage] | None) -> list[int]:
        if messages is None:
            return self.model.processor.encode_text(text or "")
        turns = self.reader().chat(messages)
        return list(self.model.request(turns, "text", seed=0, max_tokens=1).ids)

    async def store_image(
        self, event: ImageDone, output_format: Format, compression: int, file_id: str | None = None
    ) -> StoredFile:
        """Decode a generated image, and store its file with its codes."""
        data, pixels = await self.decoder.file(event, output_format, compression)
        media_type, name = MEDIA_TYPES[output_format], f"image.{output_format}"
        image = Image(codes=event.codes)
        return self.files.add(data, media_type, image, name, "assistants_output", file_id, pixels)

    async def preview(self, event: ImagePreview, output_format: Format, compression: int) -> bytes:
        """The file of an unfinished image."""
        return (await self.decoder.file(event, output_format, compression)).data

    def shape(self, size: str | None) -> str:
        """The size of generated images, as "64x64"."""
        if size not in (None, "auto"):
            return str(size)
        layout, stride = self.model.processor.layout, self.model.config.vq_config.stride
        return f"{layout.width * stride}x{layout.height * stride}"

    @property
    def described(self) -> list[dict[str, Any]]:
        """Model objects: the model, and its adapters."""
        return [self.describe(name) for name in (self.name, *self.model.adapters)]

    def describe(self, name: str) -> dict[str, Any]:
        """A model object, with modalities under the names of OpenRouter and of this server.
        `parent` is the base model of an adapter, as in vLLM."""
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
            "image_size": self.shape(None),
        }

    def base(self, request: HttpRequest) -> str:
        """The address of this server, as the beginning of files' addresses."""
        return (self.options.public_url or str(request.base_url)).rstrip("/")


def _for_clients(message: str, spec: GenerationSpec) -> str:
    """An error of the Python API with a route's names and ways of writing."""
    message = message.replace("max_tokens", spec.limit_field)
    message = message.replace("give (width, height) as", "use auto or")
    return _PYTHON_SIZE.sub(r"\1x\2", message)


def _size(size: str | None) -> tuple[int, int] | None:
    if size is None or size == "auto":
        return None
    found = _SIZE.fullmatch(size)
    if found is None:
        raise ApiError(
            400,
            f"size={size[:40]!r} is not possible: use auto, or width x height as 512x512",
            param="size",
            code="invalid_value",
        )
    return int(found[1]), int(found[2])
