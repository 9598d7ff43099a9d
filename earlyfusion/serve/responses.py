"""/v1/responses: ordered message and image_generation_call items, and all events of a stream.

The full reply is the `response` of a stream's last event, so the two cannot differ.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Sequence
from time import time
from typing import Any

from earlyfusion.content import Message, Segment, Text
from earlyfusion.generation.request import (
    Event,
    Finished,
    ImageDone,
    ImagePreview,
    ImageStarted,
    TextDelta,
    TokenDrawn,
)
from earlyfusion.generation.settings import Output
from earlyfusion.serve.errors import ApiError, report
from earlyfusion.serve.image_io import to_base64
from earlyfusion.serve.protocol import ImageTool, ItemReference, ResponseRequest
from earlyfusion.serve.replies import KEEPALIVE, Trimmer, image_usage, logprob_entry, sse
from earlyfusion.serve.service import GenerationSpec, Prepared, Service
from earlyfusion.serve.store import Conversation, random_id

Json = dict[str, Any]
_LOGPROBS = "message.output_text.logprobs"


def spec_of(body: ResponseRequest) -> GenerationSpec:
    """The settings of a body, without its prompt."""
    sampling, tool = body.sampling(), _tool(body)
    if body.max_output_tokens is not None:
        sampling["max_tokens"] = body.max_output_tokens
    if body.top_logprobs is not None or _LOGPROBS in (body.include or ()):
        sampling["logprobs"] = body.top_logprobs or 0
    output = _output(body)
    image_tool = None if output == "text" else tool
    return GenerationSpec(
        output,
        sampling,
        body.seed,
        size=image_tool.size if image_tool else None,
        # Without a stream, partial images would not be sent.
        partial_images=image_tool.partial_images if image_tool and body.stream else 0,
        model=body.model,
        limit_field="max_output_tokens",
    )


def check_models(service: Service, body: ResponseRequest) -> None:
    """Raise `ApiError` for a model that is not served, and for a tool with another model."""
    service.check_model(body.model)
    tool = _tool(body)
    if tool is not None and tool.model is not None:
        service.check_model(tool.model)
        if tool.model != (body.model or service.name):
            raise ApiError(
                400,
                f"tools[0].model={tool.model[:60]!r} is not the model of the request, which "
                "generates its images itself: leave it out",
                param="tools[0].model",
                code="invalid_value",
            )


def referenced(service: Service, body: ResponseRequest) -> dict[str, Segment]:
    """The segments of the items that a body refers to, by their ids. Raises `ApiError`."""
    if isinstance(body.input, str):
        return {}
    ids = [item.id for item in body.input if isinstance(item, ItemReference)]
    return {item_id: service.conversations.item(item_id) for item_id in ids}


def _tool(body: ResponseRequest) -> ImageTool | None:
    return body.tools[0] if body.tools else None


def _output(body: ResponseRequest) -> Output:
    if not body.tools or body.tool_choice == "none":
        return "text"
    return "interleaved" if body.tool_choice == "auto" else "image"


def _format(body: ResponseRequest) -> Json:
    text_format = None if body.text is None else body.text.format
    if text_format is None:
        return {"type": "text"}
    return text_format.model_dump(by_alias=True, exclude_none=True)


def with_instructions(body: ResponseRequest, turns: Sequence[Message]) -> list[Message]:
    """The whole prompt. As in OpenAI's API, `instructions` are for this response only."""
    return [Message("system", body.instructions), *turns] if body.instructions else list(turns)


class ResponseReply:
    """The reply to one body, in full or as a stream; `turns` is the conversation without
    `instructions`."""

    def __init__(
        self, service: Service, body: ResponseRequest, prepared: Prepared, turns: Sequence[Message]
    ) -> None:
        self._service, self._body, self._prepared, self._turns = service, body, prepared, turns
        self._id, self._created = f"resp_{secrets.token_hex(16)}", int(time())
        self._tool = _tool(body) or ImageTool(type="image_generation")
        self._sequence_number = 0
        self._output: list[Json] = []
        self._segments: list[Segment] = []
        self._item: _TextItem | None = None
        self._image_call: Json | None = None
        self._num_partials = 0
        self._keep_leading = prepared.continues

    async def full(self) -> Json:
        """The whole reply as one object. Raises the error that ended it."""
        response: Json = {}
        async for event in self._events(None):
            response = event.get("response", response) if event is not None else response
        return response

    async def stream(self) -> AsyncIterator[bytes]:
        """Server-sent events; after an error the last one is `response.failed`."""
        try:
            async for event in self._events(self._service.options.keepalive):
                yield KEEPALIVE if event is None else sse(event, event["type"])
        except Exception as error:
            for event in self._failed(report(error)):
                yield sse(event, event["type"])

    async def _events(self, idle_seconds: float | None) -> AsyncIterator[Json | None]:
        """The events for the client; None after `idle_seconds` without any."""
        for step in ("created", "in_progress"):
            yield self._event(f"response.{step}", response=self._response("in_progress"))
        timeout = self._service.options.timeout
        async for numbered in self._prepared.batch.events(idle_seconds, timeout):
            if numbered is None:
                yield None
                continue
            async for api_event in self._events_of(numbered[1]):
                yield api_event

    async def _events_of(self, event: Event) -> AsyncIterator[Json]:
        """The events for the client that follow from one event of the model."""
        if isinstance(event, TextDelta | TokenDrawn):
            for api_event in self._text_events(event):
                yield api_event
        if isinstance(event, ImageStarted):
            for api_event in [*self._end_text(), *self._begin_image()]:
                yield api_event
        if isinstance(event, ImagePreview):
            yield await self._partial(event)
        if isinstance(event, ImageDone):
            for api_event in await self._end_image(event):
                yield api_event
        if isinstance(event, Finished):
            status = "completed" if event.reason == "stop" else "incomplete"
            for api_event in [*self._end_text(status), self._finish(event, status)]:
                yield api_event

    def _text_events(self, event: TextDelta | TokenDrawn) -> list[Json]:
        if self._item is None:
            self._item = _TextItem(self._keep_leading)
            self._keep_leading = False
        item = self._item
        if isinstance(event, TokenDrawn):  # comes before the text of the token
            item.add_logprob(logprob_entry(self._service.model, event.logprob))
            return []
        text = item.trimmer.push(event.text)
        if not text:
            return []
        begin = [] if item.text else self._begin_text(item)
        item.text += text
        position = self._position(item.id) | {"content_index": 0}
        logprobs = item.take_logprobs()
        return [
            *begin,
            self._event("response.output_text.delta", **position, delta=text, logprobs=logprobs),
        ]

    def _begin_text(self, item: _TextItem) -> list[Json]:
        position = self._position(item.id)
        return [
            self._event(
                "response.output_item.added",
                output_index=position["output_index"],
                item=item.as_json("in_progress", empty=True),
            ),
            self._event(
                "response.content_part.added",
                **position,
                content_index=0,
                part=item.part(empty=True),
            ),
        ]

    def _end_text(self, status: str = "completed") -> list[Json]:
        item, self._item = self._item, None
        self._keep_leading = False
        if item is None or not item.text:  # whitespace between two images is no item
            return []
        position = self._position(item.id)
        inside = position | {"content_index": 0}
        done = item.as_json(status)
        events = [
            self._event(
                "response.output_text.done", **inside, text=item.text, logprobs=item.logprobs
            ),
            self._event("response.content_part.done", **inside, part=item.part()),
            self._event(
                "response.output_item.done", output_index=position["output_index"], item=done
            ),
        ]
        self._output.append(done)
        self._segments.append(Text(item.text))
        return events

    def _begin_image(self) -> list[Json]:
        item_id = f"ig_{random_id()}"
        self._image_call = {"type": "image_generation_call", "id": item_id, "status": "in_progress"}
        self._num_partials = 0
        position, call = self._position(item_id), "response.image_generation_call"
        return [
            self._event(
                "response.output_item.added",
                output_index=position["output_index"],
                item=self._image_call | {"result": None},
            ),
            self._event(f"{call}.in_progress", **position),
            self._event(f"{call}.generating", **position),
        ]

    async def _partial(self, event: ImagePreview) -> Json:
        assert self._image_call is not None
        tool = self._tool
        data = await self._service.preview(event, tool.output_format, tool.output_compression)
        index, self._num_partials = self._num_partials, self._num_partials + 1
        return self._event(
            "response.image_generation_call.partial_image",
            **self._position(self._image_call["id"]),
            partial_image_b64=to_base64(data),
            partial_image_index=index,
            **self._image_fields(),
        )

    async def _end_image(self, event: ImageDone) -> list[Json]:
        assert self._image_call is not None
        tool, call = self._tool, self._image_call
        # A later request finds the image's codes by the id of this item.
        file_id = f"file-{call['id'].removeprefix('ig_')}"
        file = await self._service.store_image(
            event, tool.output_format, tool.output_compression, file_id
        )
        position = self._position(call["id"])
        done = call | {"status": "completed", "result": to_base64(file.data)}
        done |= self._image_fields()
        self._output.append(done)
        self._segments.append(file.image)
        self._image_call = None
        return [
            self._event("response.image_generation_call.completed", **position),
            self._event(
                "response.output_item.done", output_index=position["output_index"], item=done
            ),
        ]

    def _finish(self, event: Finished, status: str) -> Json:
        response = self._response(status, event)
        if self._body.store:
            self._service.conversations.add(Conversation(response, self._all_turns()))
        return self._event(f"response.{status}", response=response)

    def _all_turns(self) -> list[Message]:
        """The conversation with this reply. If the reply continues an assistant's turn, the two are
        one turn."""
        turns = list(self._turns)
        continued = turns.pop().parts if turns[-1].role == "assistant" else []
        return [*turns, Message("assistant", [*continued, *self._segments])]

    def _failed(self, error: ApiError) -> list[Json]:
        """The last events of a stream that an error ends."""
        code = "server_error" if error.status >= 500 else "invalid_prompt"
        response = self._response("failed") | {"error": {"code": code, "message": error.message}}
        return [
            self._event("error", message=error.message, code=error.code, param=error.param),
            self._event("response.failed", response=response),
        ]

    def _event(self, event_type: str, **fields: Any) -> Json:
        number, self._sequence_number = self._sequence_number, self._sequence_number + 1
        return {"type": event_type, "sequence_number": number, **fields}

    def _position(self, item_id: str) -> Json:
        return {"item_id": item_id, "output_index": len(self._output)}

    def _image_fields(self) -> Json:
        return {
            "output_format": self._tool.output_format,
            "size": self._service.image_size(self._tool.size),
            "background": "opaque",
            "quality": "auto",
        }

    def _response(self, status: str, end: Finished | None = None) -> Json:
        body = self._body
        incomplete = {"reason": "max_output_tokens"} if status == "incomplete" else None
        choice = body.tool_choice
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": incomplete,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": body.model or self._service.name,
            "output": list(self._output),
            "parallel_tool_calls": True,
            "previous_response_id": body.previous_response_id,
            "reasoning": {"effort": None, "summary": None},
            "store": body.store,
            "temperature": body.temperature,
            "text": {"format": _format(body)},
            "tool_choice": choice if isinstance(choice, str) else choice.model_dump(),
            "tools": [tool.model_dump(exclude_none=True) for tool in body.tools],
            "top_p": body.top_p,
            "truncation": "disabled",
            "usage": None if end is None else self._usage(end),
            "user": body.user,
            "seed": self._prepared.batch.requests[0].sampling.seed,
        }

    def _usage(self, end: Finished) -> Json:
        usage = image_usage(
            self._prepared.prompt_tokens, self._prepared.prompt_image_tokens, [end.usage]
        )
        cached = end.usage.cached_tokens
        # OpenAI's SDK expects the other two fields; here they have no meaning.
        usage["input_tokens_details"] |= {"cached_tokens": cached, "cache_write_tokens": 0}
        usage["output_tokens_details"] |= {"reasoning_tokens": 0}
        return usage


class _TextItem:
    """A message item that is being generated: one segment of text."""

    def __init__(self, keep_leading: bool) -> None:
        self.id, self.text = f"msg_{secrets.token_hex(12)}", ""
        self.trimmer = Trimmer(keep_leading)
        self.logprobs: list[Json] = []
        self._new: list[Json] = []

    def add_logprob(self, entry: Json | None) -> None:
        if entry is not None:
            self.logprobs.append(entry)
            self._new.append(entry)

    def take_logprobs(self) -> list[Json]:
        """The log-probabilities since the last call."""
        taken, self._new = self._new, []
        return taken

    def part(self, empty: bool = False) -> Json:
        text = "" if empty else self.text
        logprobs = [] if empty else self.logprobs
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}

    def as_json(self, status: str, empty: bool = False) -> Json:
        return {
            "type": "message",
            "id": self.id,
            "status": status,
            "role": "assistant",
            "content": [] if empty else [self.part()],
        }
