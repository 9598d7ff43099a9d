"""/v1/responses: ordered message and image_generation_call items, and all events of a stream.

The reply in one piece is the last event's `response`, so both are the same by construction.
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
from earlyfusion.serve.errors import ApiError, reported
from earlyfusion.serve.pictures import packed
from earlyfusion.serve.protocol import DrawingTool, ResponseRequest
from earlyfusion.serve.replies import KEEPALIVE, Trimmer, image_usage, logprob_entry, sse
from earlyfusion.serve.service import Asked, Prepared, Service
from earlyfusion.serve.store import Conversation, new_key

Told = dict[str, Any]
_LOGPROBS = "message.output_text.logprobs"


def asked_of(body: ResponseRequest) -> Asked:
    """What a body asks of the model."""
    sampling, tool = body.sampling(), _tool(body)
    if body.max_output_tokens is not None:
        sampling["max_tokens"] = body.max_output_tokens
    if body.top_logprobs is not None or _LOGPROBS in (body.include or ()):
        sampling["logprobs"] = body.top_logprobs or 0
    output = _output(body)
    drawing = None if output == "text" else tool
    return Asked(
        output,
        sampling,
        body.seed,
        size=drawing.size if drawing else None,
        # Without a stream nobody sees them.
        partial_images=drawing.partial_images if drawing and body.stream else 0,
    )


def _tool(body: ResponseRequest) -> DrawingTool | None:
    return body.tools[0] if body.tools else None


def _output(body: ResponseRequest) -> Output:
    if not body.tools or body.tool_choice == "none":
        return "text"
    return "interleaved" if body.tool_choice == "auto" else "image"


def with_instructions(body: ResponseRequest, turns: Sequence[Message]) -> list[Message]:
    """The whole prompt. As in OpenAI's API, `instructions` are not kept for the next response."""
    return [Message("system", body.instructions), *turns] if body.instructions else list(turns)


class ResponseReply:
    """Renders the reply to one body; `turns` is the conversation without `instructions`."""

    def __init__(
        self, service: Service, body: ResponseRequest, prepared: Prepared, turns: Sequence[Message]
    ) -> None:
        self._service, self._body, self._prepared, self._turns = service, body, prepared, turns
        self._id, self._created = f"resp_{secrets.token_hex(16)}", int(time())
        self._tool = _tool(body) or DrawingTool(type="image_generation")
        self._number = 0
        self._output: list[Told] = []
        self._segments: list[Segment] = []
        self._item: _TextItem | None = None
        self._drawing: Told | None = None
        self._partials = 0
        self._lead = prepared.continues

    async def whole(self) -> Told:
        """The reply in one piece. Raises what ended it."""
        response: Told = {}
        async for told in self._events(None):
            response = told.get("response", response) if told is not None else response
        return response

    async def stream(self) -> AsyncIterator[bytes]:
        """Server-sent events; one that ends in an error says so with `response.failed`."""
        try:
            async for told in self._events(self._service.options.keepalive):
                yield KEEPALIVE if told is None else sse(told, told["type"])
        except Exception as error:
            for told in self._failed(reported(error)):
                yield sse(told, told["type"])

    async def _events(self, tick: float | None) -> AsyncIterator[Told | None]:
        for kind in ("created", "in_progress"):
            yield self._told(f"response.{kind}", response=self._response("in_progress"))
        timeout = self._service.options.timeout
        async for news in self._prepared.batch.events(tick, timeout):
            if news is None:
                yield None
                continue
            async for told in self._of(news[1]):
                yield told

    async def _of(self, event: Event) -> AsyncIterator[Told]:
        """What one event of the model is on the wire."""
        if isinstance(event, TextDelta | TokenDrawn):
            for told in self._text(event):
                yield told
        if isinstance(event, ImageStarted):
            for told in [*self._end_text(), *self._begin_drawing()]:
                yield told
        if isinstance(event, ImagePreview):
            yield await self._partial(event)
        if isinstance(event, ImageDone):
            for told in await self._end_drawing(event):
                yield told
        if isinstance(event, Finished):
            for told in [*self._end_text(), self._finish(event)]:
                yield told

    def _text(self, event: TextDelta | TokenDrawn) -> list[Told]:
        if self._item is None:
            self._item = _TextItem(self._lead)
            self._lead = False
        item = self._item
        if isinstance(event, TokenDrawn):
            item.note(logprob_entry(self._service.model, event.logprob))
            return []
        shown = item.trimmer.push(event.text)
        if not shown:
            return []
        told = [] if item.text else self._open_text(item)
        item.text += shown
        place = self._place(item.id) | {"content_index": 0}
        logprobs = item.take_logprobs()
        return [
            *told,
            self._told("response.output_text.delta", **place, delta=shown, logprobs=logprobs),
        ]

    def _open_text(self, item: _TextItem) -> list[Told]:
        place = self._place(item.id)
        return [
            self._told(
                "response.output_item.added",
                output_index=place["output_index"],
                item=item.told("in_progress", empty=True),
            ),
            self._told(
                "response.content_part.added", **place, content_index=0, part=item.part(empty=True)
            ),
        ]

    def _end_text(self) -> list[Told]:
        item, self._item = self._item, None
        self._lead = False
        if item is None or not item.text:
            return []
        place = self._place(item.id)
        inside = place | {"content_index": 0}
        done = item.told("completed")
        events = [
            self._told(
                "response.output_text.done", **inside, text=item.text, logprobs=item.logprobs
            ),
            self._told("response.content_part.done", **inside, part=item.part()),
            self._told("response.output_item.done", output_index=place["output_index"], item=done),
        ]
        self._output.append(done)
        self._segments.append(Text(item.text))
        return events

    def _begin_drawing(self) -> list[Told]:
        number = f"ig_{new_key()}"
        self._drawing = {"type": "image_generation_call", "id": number, "status": "in_progress"}
        self._partials = 0
        place, call = self._place(number), "response.image_generation_call"
        return [
            self._told(
                "response.output_item.added",
                output_index=place["output_index"],
                item=self._drawing | {"result": None},
            ),
            self._told(f"{call}.in_progress", **place),
            self._told(f"{call}.generating", **place),
        ]

    async def _partial(self, event: ImagePreview) -> Told:
        assert self._drawing is not None
        tool = self._tool
        data = await self._service.preview(event, tool.output_format, tool.output_compression)
        number, self._partials = self._partials, self._partials + 1
        return self._told(
            "response.image_generation_call.partial_image",
            **self._place(self._drawing["id"]),
            partial_image_b64=packed(data),
            partial_image_index=number,
            **self._look(),
        )

    async def _end_drawing(self, event: ImageDone) -> list[Told]:
        assert self._drawing is not None
        tool, drawing = self._tool, self._drawing
        # A later request finds the picture's codes by the id of this item.
        number = f"file-{drawing['id'].removeprefix('ig_')}"
        file = await self._service.keep(event, tool.output_format, tool.output_compression, number)
        place = self._place(drawing["id"])
        done = drawing | {"status": "completed", "result": packed(file.data)} | self._look()
        self._output.append(done)
        self._segments.append(file.image)
        self._drawing = None
        return [
            self._told("response.image_generation_call.completed", **place),
            self._told("response.output_item.done", output_index=place["output_index"], item=done),
        ]

    def _finish(self, event: Finished) -> Told:
        status = "completed" if event.reason == "stop" else "incomplete"
        response = self._response(status, event)
        if self._body.store:
            turns = [*self._turns, *([self._turn()] if self._segments else [])]
            self._service.conversations.add(Conversation(response, turns))
        return self._told(f"response.{status}", response=response)

    def _turn(self) -> Message:
        return Message("assistant", list(self._segments))

    def _failed(self, error: ApiError) -> list[Told]:
        code = "server_error" if error.status >= 500 else "invalid_prompt"
        response = self._response("failed") | {"error": {"code": code, "message": error.message}}
        return [
            self._told("error", message=error.message, code=error.code, param=error.param),
            self._told("response.failed", response=response),
        ]

    def _told(self, kind: str, **fields: Any) -> Told:
        number, self._number = self._number, self._number + 1
        return {"type": kind, "sequence_number": number, **fields}

    def _place(self, item: str) -> Told:
        return {"item_id": item, "output_index": len(self._output)}

    def _look(self) -> Told:
        size = self._service.shape(self._tool.size)
        look = {"output_format": self._tool.output_format, "size": size}
        return look | {"background": "opaque", "quality": "auto"}

    def _response(self, status: str, end: Finished | None = None) -> Told:
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
            "model": self._service.name,
            "output": list(self._output),
            "parallel_tool_calls": True,
            "previous_response_id": body.previous_response_id,
            "reasoning": {"effort": None, "summary": None},
            "store": body.store,
            "temperature": body.temperature,
            "text": {"format": {"type": "text"}},
            "tool_choice": choice if isinstance(choice, str) else choice.model_dump(),
            "tools": [tool.model_dump(exclude_none=True) for tool in body.tools],
            "top_p": body.top_p,
            "truncation": "disabled",
            "usage": None if end is None else self._usage(end),
            "user": body.user,
            "seed": self._prepared.batch.requests[0].sampling.seed,
        }

    def _usage(self, end: Finished) -> Told:
        told = image_usage(self._prepared.prompt_tokens, self._prepared.prompt_images, [end.usage])
        # OpenAI's SDK expects these; nothing is billed by them here.
        told["input_tokens_details"] |= {"cached_tokens": 0, "cache_write_tokens": 0}
        told["output_tokens_details"] |= {"reasoning_tokens": 0}
        return told


class _TextItem:
    """A message item in the making: one segment of text."""

    def __init__(self, keep_lead: bool) -> None:
        self.id, self.text = f"msg_{secrets.token_hex(12)}", ""
        self.trimmer = Trimmer(keep_lead)
        self.logprobs: list[Told] = []
        self._new: list[Told] = []

    def note(self, entry: Told | None) -> None:
        if entry is not None:
            self.logprobs.append(entry)
            self._new.append(entry)

    def take_logprobs(self) -> list[Told]:
        taken, self._new = self._new, []
        return taken

    def part(self, empty: bool = False) -> Told:
        text = "" if empty else self.text
        logprobs = [] if empty else self.logprobs
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}

    def told(self, status: str, empty: bool = False) -> Told:
        content = [] if empty else [self.part()]
        head = {"type": "message", "id": self.id, "status": status, "role": "assistant"}
        return head | {"content": content}
