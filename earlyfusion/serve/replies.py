"""Parts of all routes' replies: text as `Reply` shows it, streams of events, usage, logprobs."""

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
from earlyfusion.serve.errors import reported

Result = TypeVar("Result")
# A stream may take these seconds more than its reply, whose last event may say that it was late.
UNREAD_SECONDS = 30.0
KEEPALIVE = b": keepalive\n\n"
DONE = b"data: [DONE]\n\n"


class Trimmer:
    """Deltas of one text segment, without the blanks at its ends that `Reply` leaves out.

    With `keep_lead` those at its beginning stay, as it continues an assistant's turn.
    """

    def __init__(self, keep_lead: bool = False) -> None:
        self._begun, self._held = keep_lead, ""

    def push(self, delta: str) -> str:
        """The text to show now; blanks wait for the text that follows."""
        text = self._held + delta
        text = text if self._begun else text.lstrip()
        shown = text.rstrip()
        self._held, self._begun = text[len(shown) :], self._begun or bool(shown)
        return shown


class JsonReply(Response):
    """JSON as UTF-8; lone surrogates, which UTF-8 cannot hold, are written as escapes."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return to_json(content)


class EventStream(Response):
    """Server-sent events of a batch, which is closed however the stream ends: by itself, as the
    client leaves, or after `seconds`, as a client that reads nothing would hold it forever.

    Not starlette's StreamingResponse, as chunks that are ready together are sent together: each
    message costs more than the text in it.
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
        except Exception as error:  # in the middle of the stream: it is its last event
            pieces.append(sse(reported(error).body))
        await send(_body(pieces, more=False))


class DisconnectedError(Exception):
    """The client has closed the connection."""


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`. If the client closes the connection first, `work` is cancelled, and
    `DisconnectedError` raised."""
    task, over, left = asyncio.current_task(), False, False
    assert task is not None
    gone = asyncio.ensure_future(_disconnected(receive))

    def leave(_: object) -> None:
        nonlocal left
        if not over:
            left = True
            task.cancel()

    gone.add_done_callback(leave)
    try:
        return await work
    except asyncio.CancelledError:
        if left and not task.uncancel():
            raise DisconnectedError from None
        raise
    finally:
        over = True
        gone.cancel()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _body(pieces: list[bytes], more: bool) -> Message:
    return {"type": "http.response.body", "body": b"".join(pieces), "more_body": more}


# Made once: json.dumps would make a new encoder at each call with these options.
_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False)


# Python's `splitlines` ends a line at these letters too, and with it httpx's `iter_lines`, by which
# some clients read streams: as escapes they are safe.
_LINE_ENDS = {letter: f"\\u{ord(letter):04x}" for letter in "\x85\u2028\u2029"}


def to_json(content: Any) -> bytes:
    return _utf8(_ENCODER.encode(content))


def json_text(text: str) -> bytes:
    """A string as `to_json` writes it, several times as fast."""
    return _utf8(encode_basestring(text))


def _utf8(text: str) -> bytes:
    if not text.isascii():
        for letter, escape in _LINE_ENDS.items():
            text = text.replace(letter, escape)
    return text.encode("utf-8", "backslashreplace")


def sse(data: Any, event: str | None = None) -> bytes:
    """One server-sent event."""
    name = b"" if event is None else b"event: " + event.encode() + b"\n"
    return name + b"data: " + to_json(data) + b"\n\n"


def image_tokens(model: Chameleon, ids: Iterable[int]) -> int:
    """How many of a prompt's tokens spell images, their marks included."""
    begin, end = model.processor.vocabulary.begin_image, model.processor.vocabulary.end_image
    count, inside = 0, False
    for token in ids:
        inside = inside or token == begin
        count += inside
        inside = inside and token != end
    return count


def chat_usage(
    prompt_tokens: int, prompt_images: int, usages: Sequence[Usage], prompts: int = 1
) -> dict[str, Any]:
    """Usage by modality; several choices of one prompt read it once. The choices of each of the
    `prompts` follow one another in `usages`."""
    done = sum(usage.completion_tokens for usage in usages)
    image_tokens = sum(usage.image_tokens for usage in usages)
    cached = {"cached_tokens": _cached_tokens(usages, prompts)}
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": done,
        "total_tokens": prompt_tokens + done,
        "prompt_tokens_details": _by_modality(prompt_tokens, prompt_images) | cached,
        "completion_tokens_details": _by_modality(done, image_tokens),
    }


def _cached_tokens(usages: Sequence[Usage], prompts: int) -> int:
    """Tokens of prompts that the cache held before. The first choice of a prompt to run reads what
    it did not hold; the others find that, too."""
    choices = max(len(usages) // prompts, 1)
    first = range(0, len(usages), choices)
    return sum(min(u.cached_tokens for u in usages[start : start + choices]) for start in first)


def image_usage(prompt_tokens: int, prompt_images: int, usages: Sequence[Usage]) -> dict[str, Any]:
    """The same under the names of the Images and Responses APIs, without cached tokens."""
    chat = chat_usage(prompt_tokens, prompt_images, usages)
    return {
        "input_tokens": chat["prompt_tokens"],
        "input_tokens_details": _by_modality(prompt_tokens, prompt_images),
        "output_tokens": chat["completion_tokens"],
        "output_tokens_details": chat["completion_tokens_details"],
        "total_tokens": chat["total_tokens"],
    }


def _by_modality(tokens: int, images: int) -> dict[str, int]:
    return {"text_tokens": tokens - images, "image_tokens": images}


def logprob_entry(model: Chameleon, token: TokenLogprob) -> dict[str, Any] | None:
    """A text token's entry of `logprobs`; None for the others (codes, marks, the end)."""
    data = model.processor.token_bytes(token.id)
    if not data:
        return None
    top = [_entry(model.processor.token_bytes, other) for other in token.top]
    return _entry(model.processor.token_bytes, token) | {"top_logprobs": top}


def _entry(bytes_of: Callable[[int], bytes], token: TokenLogprob) -> dict[str, Any]:
    # JSON has no minus infinity; OpenAI writes -9999 for an impossible token.
    logprob = max(token.logprob, -9999.0)
    return {"token": token.text, "logprob": logprob, "bytes": list(bytes_of(token.id))}
