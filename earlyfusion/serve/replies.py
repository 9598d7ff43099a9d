"""Parts of replies that all routes share: streamed text, event streams, usage, logprobs."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence
from json.encoder import encode_basestring
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from earlyfusion.api import Chameleon
from earlyfusion.generation.request import TokenLogprob, Usage
from earlyfusion.serve.driver import Batch
from earlyfusion.serve.errors import report

Result = TypeVar("Result")
# How many seconds longer than its reply a stream may take: when a reply takes too long, an error is
# still sent as its last event.
UNREAD_SECONDS = 30.0
KEEPALIVE = b": keepalive\n\n"
DONE = b"data: [DONE]\n\n"


class Trimmer:
    """Strips the whitespace around a streamed text segment, as `Reply` does. With `keep_leading`
    the whitespace at its start stays: the reply continues an assistant's turn."""

    def __init__(self, keep_leading: bool = False) -> None:
        self._has_text, self._held_back = keep_leading, ""

    def push(self, delta: str) -> str:
        """The text to send now. Whitespace at its end is held back until more text follows."""
        text = self._held_back + delta
        text = text if self._has_text else text.lstrip()
        stripped = text.rstrip()
        self._held_back = text[len(stripped) :]
        self._has_text = self._has_text or bool(stripped)
        return stripped


class JsonReply(Response):
    """JSON as UTF-8; lone surrogates, which UTF-8 does not have, are escaped."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return to_json(content)


class EventStream(Response):
    """Server-sent events of a batch. The batch is closed when the stream ends, when the client
    leaves, and after `seconds`, because a client that reads nothing could keep it open forever.

    Unlike starlette's StreamingResponse, this joins chunks that are ready at the same time: a send
    takes longer than making a chunk.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        chunks: AsyncIterator[bytes],
        batch: Batch,
        headers: Mapping[str, str] | None = None,
        seconds: float | None = None,
    ) -> None:
        self._chunks, self._batch, self._seconds = chunks, batch, seconds
        self.status_code, self.background = 200, None
        defaults = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        self.init_headers(defaults | dict(headers or {}))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.timeout(self._seconds):
                await unless_disconnected(receive, self._stream(send))
        except (DisconnectedError, TimeoutError):
            pass
        finally:
            self._batch.close()

    async def _stream(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": self.status_code}
        await send(start | {"headers": self.raw_headers})
        pieces: list[bytes] = []
        try:
            async for chunk in self._chunks:
                pieces.append(chunk)
                if not self._batch.can_continue:
                    await send(_body(pieces, more=True))
                    pieces = []
        except Exception as error:  # the status has been sent: the error is the last event
            pieces.append(sse(report(error).body))
        await send(_body(pieces, more=False))


class DisconnectedError(Exception):
    """The client has closed the connection."""


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`. If the client closes the connection before that, cancels `work` and
    raises `DisconnectedError`."""
    task, is_done, has_left = asyncio.current_task(), False, False
    assert task is not None
    disconnect = asyncio.ensure_future(_wait_for_disconnect(receive))

    def cancel_work(_: object) -> None:
        nonlocal has_left
        if not is_done:
            has_left = True
            task.cancel()

    disconnect.add_done_callback(cancel_work)
    try:
        return await work
    except asyncio.CancelledError:
        if has_left and not task.uncancel():
            raise DisconnectedError from None
        raise
    finally:
        is_done = True
        disconnect.cancel()


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _body(pieces: list[bytes], more: bool) -> Message:
    return {"type": "http.response.body", "body": b"".join(pieces), "more_body": more}


# With these options json.dumps would make a new encoder at each call.
_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False)


# Written as escapes: some clients read streams with httpx's `iter_lines`, which ends lines at these
# characters too, as Python's `splitlines` does.
_LINE_ENDS = {character: f"\\u{ord(character):04x}" for character in "\x85\u2028\u2029"}


def to_json(content: Any) -> bytes:
    """Compact JSON in UTF-8; lone surrogates are escaped."""
    return _utf8(_ENCODER.encode(content))


def json_text(text: str) -> bytes:
    """A string as `to_json` writes it, but several times as fast."""
    return _utf8(encode_basestring(text))


def _utf8(text: str) -> bytes:
    if not text.isascii():
        for character, escape in _LINE_ENDS.items():
            text = text.replace(character, escape)
    return text.encode("utf-8", "backslashreplace")


def sse(data: Any, event: str | None = None) -> bytes:
    """A server-sent event with JSON data, and with the name `event` if there is one."""
    name = b"" if event is None else b"event: " + event.encode() + b"\n"
    return name + b"data: " + to_json(data) + b"\n\n"


def count_image_tokens(model: Chameleon, ids: Iterable[int]) -> int:
    """The number of tokens that spell images in a prompt, including begin and end tokens."""
    begin, end = model.processor.vocabulary.begin_image, model.processor.vocabulary.end_image
    count, inside = 0, False
    for token in ids:
        inside = inside or token == begin
        count += inside
        inside = inside and token != end
    return count


def chat_usage(
    prompt_tokens: int, prompt_image_tokens: int, usages: Sequence[Usage], prompts: int = 1
) -> dict[str, Any]:
    """OpenAI's `usage` object, with numbers by modality. `usages` has an entry per choice; those of
    one prompt are adjacent. `prompts` is the number of prompts, each of which is counted once."""
    completion_tokens = sum(usage.completion_tokens for usage in usages)
    image_tokens = sum(usage.image_tokens for usage in usages)
    cached = {"cached_tokens": _cached_tokens(usages, prompts)}
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": _by_modality(prompt_tokens, prompt_image_tokens) | cached,
        "completion_tokens_details": _by_modality(completion_tokens, image_tokens),
    }


def _cached_tokens(usages: Sequence[Usage], prompts: int) -> int:
    """The number of prompt tokens that the prefix cache held before this HTTP request. For each
    prompt it is the minimum over its choices, as later choices also use what the first has
    added."""
    choices = max(len(usages) // prompts, 1)
    starts = range(0, len(usages), choices)
    return sum(min(u.cached_tokens for u in usages[start : start + choices]) for start in starts)


def image_usage(
    prompt_tokens: int, prompt_image_tokens: int, usages: Sequence[Usage]
) -> dict[str, Any]:
    """As `chat_usage`, under the names of the Images and Responses APIs and without cached
    tokens."""
    chat = chat_usage(prompt_tokens, prompt_image_tokens, usages)
    return {
        "input_tokens": chat["prompt_tokens"],
        "input_tokens_details": _by_modality(prompt_tokens, prompt_image_tokens),
        "output_tokens": chat["completion_tokens"],
        "output_tokens_details": chat["completion_tokens_details"],
        "total_tokens": chat["total_tokens"],
    }


def _by_modality(tokens: int, image_tokens: int) -> dict[str, int]:
    return {"text_tokens": tokens - image_tokens, "image_tokens": image_tokens}


def logprob_entry(model: Chameleon, token: TokenLogprob) -> dict[str, Any] | None:
    """The entry of a text token in OpenAI's `logprobs`; None for image and control tokens."""
    data = model.processor.token_bytes(token.id)
    if not data:
        return None
    top = [_entry(model.processor.token_bytes, other) for other in token.top]
    return _entry(model.processor.token_bytes, token) | {"top_logprobs": top}


def _entry(bytes_of: Callable[[int], bytes], token: TokenLogprob) -> dict[str, Any]:
    # JSON has no minus infinity; OpenAI writes -9999 for a token of probability 0.
    logprob = max(token.logprob, -9999.0)
    return {"token": token.text, "logprob": logprob, "bytes": list(bytes_of(token.id))}
