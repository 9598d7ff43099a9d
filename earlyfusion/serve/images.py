"""/v1/images/…: generations, edits and variations, whole or with partial images."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from time import time
from typing import Any

from earlyfusion.content import Image, Message, Part, Prompt, Text
from earlyfusion.generation.request import Event, Finished, ImageDone, ImagePreview, Usage
from earlyfusion.serve.image_io import to_base64
from earlyfusion.serve.protocol import ImageOptions
from earlyfusion.serve.replies import KEEPALIVE, image_usage, sse
from earlyfusion.serve.service import GenerationSpec, Prepared, Service


def spec_of(body: ImageOptions) -> GenerationSpec:
    """The settings of a body, without its prompt."""
    return GenerationSpec(
        "image",
        body.sampling(),
        body.seed,
        body.n,
        body.size,
        body.partial_images,
        body.model,
    )


def prompt_of(images: Sequence[Image], text: str) -> Prompt:
    """One turn of the user: images, then the text about them."""
    parts: list[Part] = [*images, Text(text)]
    return [Message("user", parts)]


class ImagesReply:
    """The reply to one body, in full or as a stream. `base_url` is the URL of the server,
    `event_prefix` the first part of the names of a stream's events."""

    def __init__(
        self,
        service: Service,
        body: ImageOptions,
        prepared: Prepared,
        base_url: str,
        event_prefix: str,
    ) -> None:
        self._service, self._body, self._prepared = service, body, prepared
        self._base_url, self._event_prefix, self._created = base_url, event_prefix, int(time())

    async def full(self) -> dict[str, Any]:
        """All images as one object."""
        replies = await self._prepared.batch.collect(self._service.options.timeout)
        data = await asyncio.gather(*(self._entry(events) for events in replies))
        usages = [e.usage for events in replies for e in events if isinstance(e, Finished)]
        return {
            "created": self._created,
            "background": "opaque",
            "data": data,
            "output_format": self._body.output_format,
            "size": self._service.image_size(self._body.size),
            "usage": self._usage(usages),
        }

    async def stream(self) -> AsyncIterator[bytes]:
        """`partial_image` events, and a `completed` event for each image, as server-sent events.
        `image_index`, an addition to OpenAI's fields, numbers the images."""
        options, body = self._service.options, self._body
        num_partials, files = [0] * body.n, dict[int, bytes]()
        async for numbered in self._prepared.batch.events(options.keepalive, options.timeout):
            if numbered is None:
                yield KEEPALIVE
                continue
            index, event = numbered
            if isinstance(event, ImagePreview):
                data = await self._service.preview(
                    event, body.output_format, body.output_compression
                )
                extra: dict[str, Any] = {"partial_image_index": num_partials[index]}
                num_partials[index] += 1
                yield self._event("partial_image", index, data, extra)
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
            return {"url": self._service.files.url(file.id, self._base_url), "seed": seed}
        return {"b64_json": to_base64(file.data), "seed": seed}

    def _event(self, name: str, index: int, data: bytes, extra: dict[str, Any]) -> bytes:
        event_type = f"{self._event_prefix}.{name}"
        event = {
            "type": event_type,
            "b64_json": to_base64(data),
            "background": "opaque",
            "created_at": self._created,
            "output_format": self._body.output_format,
            "quality": "auto",
            "size": self._service.image_size(self._body.size),
            "image_index": index,
        }
        return sse(event | extra, event_type)

    def _usage(self, usages: Sequence[Usage]) -> dict[str, Any]:
        return image_usage(self._prepared.prompt_tokens, self._prepared.prompt_image_tokens, usages)
