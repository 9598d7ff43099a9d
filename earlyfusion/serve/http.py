"""HTTP/1.1 by httptools, which parses in C; uvicorn's other parser takes as long as the rest of a
small request. Unlike that one, httptools takes headers of any length, so this file limits them, and
it drops the body of a request that offers another protocol, so such offers are not shown to it."""

from __future__ import annotations

import asyncio
import re
from typing import cast

from uvicorn._types import ASGISendEvent
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from earlyfusion.serve.errors import ApiError
from earlyfusion.serve.options import MAX_HEAD_BYTES
from earlyfusion.serve.replies import to_json

HEAD_SECONDS = 30.0  # that the request line and headers may take, and the first of them
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
    """Raised in a callback of the parser, which gives up on the connection."""


class LimitedHttp(HttpToolsProtocol):
    """uvicorn's protocol, with at most `MAX_HEAD_BYTES` of request line and headers, which may
    take `HEAD_SECONDS`: else clients that never ask could hold all files that a process may open.
    """

    _in_head = True  # whether the next bytes belong to a request line or headers
    _head = 0  # bytes of the request line and headers so far, those behind the body included
    _unread = 0  # bytes since the parser has last told of a head or a part of a body
    _before = b""  # the end of what the parser has got of a head
    _alarm: asyncio.TimerHandle | None = None  # while a head is awaited

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(cast(asyncio.Transport, transport))
        self._set_alarm()

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_alarm()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._unread += len(data)
        if self._in_head:
            before, self._before = self._before, (self._before + data)[1 - _UPGRADE_SIZE :]
            data = _without_upgrade(before, data)
        super().data_received(data)
        # A name or a value is only told when it is whole.
        if self._unread > MAX_HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response(_TOO_LARGE)

    def send_400_response(self, msg: str) -> None:
        """An error of the parser, in the form of all other errors."""
        too_large = max(self._head, self._unread) > MAX_HEAD_BYTES
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
        self._head = 0
        # After a reply uvicorn itself closes the connection, if nothing comes.
        self._set_alarm()
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value) + len(b": \r\n"))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._unread, self._in_head = 0, False
        self._cancel_alarm()
        super().on_headers_complete()
        if self.scope["http_version"] == "1.0":
            _end_with_connection(self.cycle)

    def on_body(self, body: bytes) -> None:
        self._unread = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._unread, self._in_head, self._before = 0, True, b""
        super().on_message_complete()

    def _set_alarm(self) -> None:
        if self._alarm is None:
            self._alarm = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _cancel_alarm(self) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None

    def _count(self, size: int) -> None:
        self._head += size
        if self._head > MAX_HEAD_BYTES:
            raise _TooLargeError(_TOO_LARGE)


def _without_upgrade(before: bytes, data: bytes) -> bytes:
    """Bytes of a head under another name for the header Upgrade, if it has one. `before` are the
    last bytes that the parser has already got: a name may be cut in two."""
    text = before + data
    end = text.find(_HEAD_ENDS)
    begun, pieces = len(before), list[bytes]()
    for found in _UPGRADE.finditer(text, 0, len(text) if end < 0 else end):
        # Into the name, as it cannot go before what the parser has got.
        at = max(found.start() + len(_LINE_ENDS), len(before))
        pieces += [text[begun:at], b"x-"]
        begun = at
    return b"".join([*pieces, text[begun:]])


def _end_with_connection(cycle: RequestResponseCycle) -> None:
    """Send a reply without a length as it is: HTTP/1.0 has no chunks, and such a reply ends with
    its connection (RFC 9112, section 6.3), which uvicorn closes."""
    send, unmeasured = cycle.send, False

    async def send_plain(message: ASGISendEvent) -> None:
        nonlocal unmeasured
        if message["type"] == "http.response.start":
            names = {name.lower() for name, _ in message.get("headers", [])}
            unmeasured = b"content-length" not in names
            if unmeasured:
                cycle.chunked_encoding = False
        elif message["type"] == "http.response.body" and unmeasured:
            # uvicorn compares each part with what is left of the announced length.
            cycle.expected_content_length = len(message.get("body", b""))
        await send(message)

    cycle.send = send_plain  # type: ignore[method-assign]
