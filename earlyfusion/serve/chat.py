"""/v1/chat/completions: the reply as a message, or as its deltas."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from time import time
from typing import Any

from earlyfusion.generation.request import (
    Event,
    Finished,
    ImageDone,
    ImagePreview,
    ImageProgress,
    ImageStarted,
    TextDelta,
    TokenDrawn,
    Usage,
)
from earlyfusion.generation.settings import Output
from earlyfusion.serve.image_io import data_url, to_base64
from earlyfusion.serve.protocol import ChatRequest
from earlyfusion.serve.replies import (
    DONE,
    KEEPALIVE,
    Trimmer,
    chat_usage,
    json_text,
    logprob_entry,
    sse,
    to_json,
)
from earlyfusion.serve.service import QUICK_CHARACTERS, GenerationSpec, Prepared, Service
from earlyfusion.serve.store import StoredFile

_PROGRESS_FIELDS = ("index", "codes_done", "codes_total")
_PROGRESS_JSON = b'"image_progress":{"index":%d,"codes_done":%d,"codes_total":%d}'


def spec_of(body: ChatRequest) -> GenerationSpec:
    """The settings of a body, without its prompt."""
    sampling = body.sampling()
    limit_field = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    limit = getattr(body, limit_field)
    if limit is not None:
        sampling["max_tokens"] = limit
    if body.logprobs:
        sampling["logprobs"] = body.top_logprobs or 0
    return GenerationSpec(
        _output(body),
        sampling,
        body.seed,
        body.n,
        partial_images=body.partial_images,
        model=body.model,
        limit_field=limit_field,
    )


def is_quick(body: ChatRequest) -> bool:
    """Whether the prompt is short text, and nothing constrains the reply (see `Service.submit`)."""
    if body.response_format or body.allowed_words or body.bad_words or body.stop:
        return False
    characters = len(body.negative_prompt or "")
    for message in body.messages:
        content = message.content or ""
        # An assistant's text may hold images as markdown.
        if not isinstance(content, str) or message.role == "assistant":
            return False
        characters += len(content)
    return characters <= QUICK_CHARACTERS and len(body.messages) <= 8


def _output(body: ChatRequest) -> Output:
    modalities = set(body.modalities or ())
    if not modalities:
        return "auto"
    if len(modalities) == 2:
        return "interleaved"
    return "image" if "image" in modalities else "text"


class ChatReply:
    """The reply to one body, in full or as a stream. `base_url` returns the URL of the server."""

    def __init__(
        self, service: Service, body: ChatRequest, prepared: Prepared, base_url: Callable[[], str]
    ) -> None:
        self._service, self._body, self._prepared = service, body, prepared
        self._base_url = base_url
        self._id = f"chatcmpl-{secrets.token_hex(12)}"
        self._created = int(time())
        # What all chunks begin with, made once.
        self._chunk_prefix = sse(self._envelope("chat.completion.chunk", [])).removesuffix(
            b"]}\n\n"
        )

    async def full(self) -> dict[str, Any]:
        """The whole reply as one object."""
        replies = await self._prepared.batch.collect(self._service.options.timeout)
        choices = [await self._choice(i, events) for i, events in enumerate(replies)]
        usages = [_end(events).usage for events in replies]
        return self._envelope("chat.completion", choices) | {"usage": self._usage(usages)}

    async def stream(self) -> AsyncIterator[bytes]:
        """The reply as server-sent events: `chat.completion.chunk` objects, then [DONE]."""
        options = self._service.options
        choices = [_Choice(self, i) for i in range(self._body.n)]
        for choice in choices:
            yield self._chunk(choice.index, {"role": "assistant", "content": ""})
        usages: list[Usage] = []
        async for group in self._prepared.batch.groups(options.keepalive, options.timeout):
            if group is None:
                yield KEEPALIVE
                continue
            for index, event in group:
                if (chunk := await self._chunk_of(choices[index], event)) is not None:
                    yield chunk
                if isinstance(event, Finished):
                    usages.append(event.usage)
        stream_options = self._body.stream_options
        if stream_options is not None and stream_options.include_usage:
            yield sse(self._envelope("chat.completion.chunk", []) | {"usage": self._usage(usages)})
        yield DONE

    async def _choice(self, index: int, events: Sequence[Event]) -> dict[str, Any]:
        """A choice of the whole reply, made of the deltas that a stream would have."""
        choice = _Choice(self, index)
        content, images = "", list[dict[str, Any]]()
        for event in events:
            delta = choice.delta(event)
            if isinstance(event, ImageDone):
                delta = await choice.image_delta(event)
            content += (delta or {}).get("content", "")
            images += (delta or {}).get("images", [])
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if images:
            message |= {"images": images, "parts": choice.parts}
        end = _end(events)
        logprobs = choice.take_logprobs()
        if self._body.logprobs and logprobs is None:
            logprobs = {"content": [], "refusal": None}
        return {
            "index": index,
            "message": message,
            "logprobs": logprobs,
            "finish_reason": end.reason,
            "seed": end.seed,
        }

    async def _chunk_of(self, choice: _Choice, event: Event) -> bytes | None:
        """The chunk of one event, if it has any."""
        if isinstance(event, Finished):
            last = choice.take_logprobs()
            return self._chunk(choice.index, {}, last, event.reason, event.seed)
        delta = choice.delta(event)
        if delta is None and isinstance(event, ImagePreview | ImageDone):
            delta = await choice.image_delta(event)
        if delta is None:
            return None
        return self._chunk(choice.index, delta, choice.take_logprobs())

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        logprobs: dict[str, Any] | None = None,
        reason: str | None = None,
        seed: int | None = None,
    ) -> bytes:
        if logprobs is None and reason is None and len(delta) == 1:
            # For the most frequent chunks: the same bytes as below, but several times as fast.
            if "content" in delta:
                return self._plain_chunk(index, b'"content":%b' % json_text(delta["content"]))
            if "image_progress" in delta and len(delta["image_progress"]) == len(_PROGRESS_FIELDS):
                numbers = tuple(map(delta["image_progress"].__getitem__, _PROGRESS_FIELDS))
                return self._plain_chunk(index, _PROGRESS_JSON % numbers)
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        if seed is not None:
            choice["seed"] = seed
        return self._chunk_prefix + to_json(choice) + b"]}\n\n"

    def _plain_chunk(self, index: int, delta: bytes) -> bytes:
        choice = b'{"index":%d,"delta":{%b},"logprobs":null,"finish_reason":null}'
        return self._chunk_prefix + choice % (index, delta) + b"]}\n\n"

    def _envelope(self, object_type: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": object_type,
            "created": self._created,
            "model": self._body.model or self._service.name,
            "choices": choices,
        }

    def _usage(self, usages: Sequence[Usage]) -> dict[str, Any]:
        return chat_usage(self._prepared.prompt_tokens, self._prepared.prompt_image_tokens, usages)

    @property
    def body(self) -> ChatRequest:
        return self._body

    @property
    def delivery(self) -> str:
        """Where images are sent: in `images`, in the text as markdown, or both."""
        return self._body.image_delivery or self._service.options.image_delivery

    @property
    def service(self) -> Service:
        return self._service

    @property
    def continues(self) -> bool:
        """Whether the reply continues an assistant's turn."""
        return self._prepared.continues

    def url(self, file: StoredFile) -> str:
        """The signed URL of a file."""
        return self._service.files.url(file.id, self._base_url())


class _Choice:
    """Turns the events of one choice into deltas; `parts` lists the segments so far in order."""

    def __init__(self, reply: ChatReply, index: int) -> None:
        self.index, self.parts = index, list[dict[str, Any]]()
        self._reply, self._num_images = reply, 0
        self._trimmer = Trimmer(keep_leading=reply.continues)
        self._text_is_open = self._has_content = False
        self._logprobs: list[dict[str, Any]] = []

    def delta(self, event: Event) -> dict[str, Any] | None:
        """The delta of an event that needs no decoding; None without one."""
        if isinstance(event, TextDelta):
            text = self._trimmer.push(event.text)
            return {"content": self._add_text(text)} if text else None
        if isinstance(event, ImageProgress):
            return {"image_progress": _progress(event)}
        if isinstance(event, TokenDrawn):
            entry = logprob_entry(self._reply.service.model, event.logprob)
            self._logprobs += [] if entry is None else [entry]
        if isinstance(event, ImageStarted):  # ends the text segment, without trailing whitespace
            self._trimmer, self._text_is_open = Trimmer(), False
        return None

    async def image_delta(self, event: ImagePreview | ImageDone) -> dict[str, Any]:
        """The delta of a finished or an unfinished image, which is decoded here."""
        if isinstance(event, ImageDone):
            return await self._add_image(event)
        body = self._reply.body
        data = await self._reply.service.preview(event, body.output_format, body.output_compression)
        return {"image_progress": _progress(event) | {"b64_json": to_base64(data)}}

    def take_logprobs(self) -> dict[str, Any] | None:
        """The log-probabilities since the last call, if there are any."""
        entries, self._logprobs = self._logprobs, []
        return {"content": entries, "refusal": None} if entries else None

    def _add_text(self, text: str) -> str:
        """Add text to `parts`. Returns what it adds to `content`."""
        if self._text_is_open:
            self.parts[-1]["text"] += text
            return text
        self._text_is_open = True
        self.parts.append({"type": "text", "text": text})
        return self._separator(before_text=True) + text

    def _separator(self, before_text: bool) -> str:
        """What separates the next segment in `content` from the one before it, if any."""
        is_first, self._has_content = not self._has_content, True
        if is_first:
            return ""
        return "\n" if self._reply.delivery == "images" and before_text else "\n\n"

    async def _add_image(self, event: ImageDone) -> dict[str, Any]:
        body = self._reply.body
        file = await self._reply.service.store_image(
            event, body.output_format, body.output_compression
        )
        delta: dict[str, Any] = {}
        if self._reply.delivery != "images":
            delta["content"] = (
                f"{self._separator(before_text=False)}![image]({self._reply.url(file)})"
            )
        if self._reply.delivery != "markdown":
            url = {"url": data_url(file.data, body.output_format)}
            delta["images"] = [{"type": "image_url", "index": self._num_images, "image_url": url}]
            self.parts.append({"type": "image_ref", "index": self._num_images})
        self._num_images += 1
        return delta


def _progress(event: ImageProgress | ImagePreview) -> dict[str, Any]:
    progress: dict[str, Any] = {"index": event.index, "codes_done": event.codes_done}
    total = event.codes_total if isinstance(event, ImageProgress) else int(event.codes.size)
    return progress | {"codes_total": total}


def _end(events: Sequence[Event]) -> Finished:
    last = events[-1]
    assert isinstance(last, Finished)
    return last
