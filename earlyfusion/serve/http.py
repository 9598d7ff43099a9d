"""HTTP/1.1 by httptools, a parser in C; uvicorn's other parser, h11, takes as long as the rest of a
small request. httptools accepts headers of any length, so this file limits them. It also drops the
body of a request with the header Upgrade, so this file hides that header from it.

The head of a request is its request line and headers."""

from __future__ import annotations

import asyncio
import re
from typing import cast

from uvicorn._types import ASGISendEvent
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from earlyfusion.serve.errors import ApiError
from earlyfusion.serve.options import MAX_HEAD_BYTES
from earlyfusion.serve.replies import to_json

HEAD_SECONDS = 30.0  # that a head may take, the first also from the connection's start
_MALFORMED = "the request is not valid HTTP/1.1: correct its first line, its headers or its length"
_TOO_LARGE = (
    f"the request line and headers have over {MAX_HEAD_BYTES:,} bytes, the limit: "
    "send fewer or shorter headers"
)
_LINE_ENDS = b"\r\n"
_HEAD_ENDS = _LINE_ENDS + _LINE_ENDS
# "Upgrade: h2c" of Java's HTTP client, for example. A server may ignore it (RFC 9110, section 7.8).
_UPGRADE = re.compile(rb"\r\nupgrade:", re.IGNORECASE)
_UPGRADE_SIZE = len(b"\r\nupgrade:")


class _TooLargeError(Exception):
    """Raised in a callback of the parser, which then stops."""


class LimitedHttp(HttpToolsProtocol):
    """uvicorn's protocol, with at most `MAX_HEAD_BYTES` in a head, which may take `HEAD_SECONDS`:
    otherwise idle clients could occupy all file descriptors of the process."""

    _in_head = True  # whether the next bytes belong to a head
    _head_bytes = 0  # size of the head so far, and of headers behind the body (trailers)
    _unparsed_bytes = 0  # bytes since the parser last reported a head or a part of a body
    _tail = b""  # the last bytes of a head that were passed to the parser
    _timer: asyncio.TimerHandle | None = None  # runs while a head is awaited

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(cast(asyncio.Transport, transport))
        self._set_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._unparsed_bytes += len(data)
        if self._in_head:
            tail, self._tail = self._tail, (self._tail + data)[1 - _UPGRADE_SIZE :]
            data = _without_upgrade(tail, data)
        super().data_received(data)
        # The parser reports a name or a value only when it is complete.
        if self._unparsed_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response(_TOO_LARGE)

    def send_400_response(self, msg: str) -> None:
        """Send an error of the parser, in the format of all other errors."""
        too_large = max(self._head_bytes, self._unparsed_bytes) > MAX_HEAD_BYTES
        error = ApiError(400, _TOO_LARGE if too_large else _MALFORMED, code="invalid_http")
        body = to_json(error.body)
        headers = [
            *self.server_state.default_headers,
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
            (b"connection", b"close"),
        ]
        lines = [b"HTTP/1.1 400 Bad Request", *(b"%b: %b" % header for header in headers)]
        self.transport.write(b"\r\n".join(lines) + _HEAD_ENDS + body)
        self.transport.close()

    def on_message_begin(self) -> None:
        self._head_bytes = 0
        # Between requests there is no timer: uvicorn itself closes idle connections.
        self._set_timer()
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value) + len(b": \r\n"))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._unparsed_bytes, self._in_head = 0, False
        self._cancel_timer()
        super().on_headers_complete()
        if self.scope["http_version"] == "1.0":
            _end_with_connection(self.cycle)

    def on_body(self, body: bytes) -> None:
        self._unparsed_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._unparsed_bytes, self._in_head, self._tail = 0, True, b""
        super().on_message_complete()

    def _set_timer(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _count(self, size: int) -> None:
        self._head_bytes += size
        if self._head_bytes > MAX_HEAD_BYTES:
            raise _TooLargeError(_TOO_LARGE)


def _without_upgrade(tail: bytes, data: bytes) -> bytes:
    """The bytes `data` of a head, in which a header Upgrade gets another name. `tail` are the bytes
    before them, which the parser already has: a name may be split between the two."""
    text = tail + data
    end = text.find(_HEAD_ENDS)
    start, pieces = len(tail), list[bytes]()
    for found in _UPGRADE.finditer(text, 0, len(text) if end < 0 else end):
        # Before the name, or within it if the parser already has its beginning.
        at = max(found.start() + len(_LINE_ENDS), len(tail))
        pieces += [text[start:at], b"x-"]
        start = at
    return b"".join([*pieces, text[start:]])


def _end_with_connection(cycle: RequestResponseCycle) -> None:
    """Send a reply of unknown length without chunks, which HTTP/1.0 does not have: it ends when
    uvicorn closes the connection (RFC 9112, section 6.3)."""
    send, lacks_length = cycle.send, False

    async def send_plain(message: ASGISendEvent) -> None:
        nonlocal lacks_length
        if message["type"] == "http.response.start":
            names = {name.lower() for name, _ in message.get("headers", [])}
            lacks_length = b"content-length" not in names
            if lacks_length:
                cycle.chunked_encoding = False
        elif message["type"] == "http.response.body" and lacks_length:
            # uvicorn compares each part with the rest of the announced length.
            cycle.expected_content_length = len(message.get("body", b""))
        await send(message)

    cycle.send = send_plain  # type: ignore[method-assign]
