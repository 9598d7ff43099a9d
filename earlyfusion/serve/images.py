"""/v1/images/…: generations, edits and variations, whole or with partial images."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from time import time
from typing import Any

from earlyfusion.content import Image, Message, Part, Prompt, Text
from earlyfusion.generation.request import Event, Finished, ImageDone, ImagePreview, Usage
from earlyfusion.serve.image_io import packed
from earlyfusion.serve.protocol import ImageOptions
from earlyfusion.serve.replies import KEEPALIVE, image_usage, sse
from earlyfusion.serve.service import GenerationSpec, Prepared, Service


def spec_of(body: ImageOptions) -> GenerationSpec:
    """The request that a body makes, without its prompt."""
    return GenerationSpec(
        "image",
        body.sampling(),
        body.seed,
        body.n,
        body.size,
        body.partial_images,
        body.model,
    )


def prompt_of(images: Sequence[Image], words: str) -> Prompt:
    """One turn of the user: images, then the words about them."""
    parts: list[Part] = [*images, Text(words)]
    return [Message("user", parts)]


class ImagesReply:
    """Renders the images that one body asks for. `family` names the events of a stream."""

    def __init__(
        self, service: Service, body: ImageOptions, prepared: Prepared, base: str, family: str
    ) -> None:
        self._service, self._body, self._prepared = service, body, prepared
        self._base, self._family, self._created = base, family, int(time())

    async def whole(self) -> dict[str, Any]:
        """All images at once."""
        replies = await self._prepared.batch.collect(self._service.options.timeout)
        data = await asyncio.gather(*(self._entry(events) for events in replies))
        usages = [e.usage for events in replies for e in events if isinstance(e, Finished)]
        return {
            "created": self._created,
            "background": "opaque",
            "data": data,
            "output_format": self._body.output_format,
            "size": self._service.shape(self._body.size),
            "usage": self._usage(usages),
        }

    async def stream(self) -> AsyncIterator[bytes]:
        """`partial_image` events, and a `completed` one for each image. `image_index`, an
        addition to OpenAI's fields, numbers the images."""
        options, body = self._service.options, self._body
        partials, files = [0] * body.n, dict[int, bytes]()
        async for news in self._prepared.batch.events(options.keepalive, options.timeout):
            if news is None:
                yield KEEPALIVE
                continue
            index, event = news
            if isinstance(event, ImagePreview):
                data = await self._service.preview(
                    event, body.output_format, body.output_compression
                )
                number, partials[index] = partials[index], partials[index] + 1
                yield self._event("partial_image", index, data, {"partial_image_index": number})
            if isinstance(event, ImageDone):
                file = await self._service.store_image(
                    event, body.output_format, body.output_compression
                )
                files[index] = file.data
            if isinstance(event, Finished):
                extra = {"usage": self._usage([event.usage]), "seed": event.seed}
                yield self._event("completed", index, files[index], extra)

    async def _entry(self, events: Sequence[Event]) -> dict[str, Any]:
        [done] = [event for event in events if isinstance(event, ImageDone)]
        body, end = self._body, events[-1]
        file = await self._service.store_image(done, body.output_format, body.output_compression)
        seed = end.seed if isinstance(end, Finished) else None
        if body.response_format == "url":
            return {"url": self._service.files.address(file.id, self._base), "seed": seed}
        return {"b64_json": packed(file.data), "seed": seed}

    def _event(self, name: str, index: int, data: bytes, extra: dict[str, Any]) -> bytes:
        event_type = f"{self._family}.{name}"
        event = {
            "type": event_type,
            "b64_json": packed(data),
            "background": "opaque",
            "created_at": self._created,
            "output_format": self._body.output_format,
            "quality": "auto",
            "size": self._service.shape(self._body.size),
            "image_index": index,
        }
        return sse(event | extra, event_type)

    def _usage(self, usages: Sequence[Usage]) -> dict[str, Any]:
        return image_usage(self._prepared.prompt_tokens, self._prepared.prompt_images, usages)
