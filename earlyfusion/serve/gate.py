"""Middleware of every HTTP request: request ids, API keys, the limit of bodies, log and metrics.

Plain ASGI, so that streams and disconnections pass through unchanged.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import re
from collections.abc import Awaitable, Callable, Mapping
from hashlib import sha256
from random import getrandbits
from time import monotonic
from typing import TypeAlias
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from earlyfusion.serve.errors import ApiError, report
from earlyfusion.serve.options import is_loopback
from earlyfusion.serve.page import PAGE_PATHS
from earlyfusion.serve.replies import JsonReply
from earlyfusion.serve.service import Service

log = logging.getLogger("earlyfusion.serve")
BODY_SECONDS = 30.0  # the longest time between two pieces of a body
# Routes that need room in the queue: while it is full, their bodies are not read.
_GENERATION_PATHS = {
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/images/generations",
    "/v1/images/edits",
    "/v1/images/variations",
}
_PUBLIC_PATHS = {"/health", "/ready"} | PAGE_PATHS  # they need no key, and are not logged
_CONTENT_PATH = re.compile(r"/v1/files/([^/]+)/content")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


RouteHandler: TypeAlias = Callable[[Request], Awaitable[Response]]


class Gate:
    """ASGI middleware around the whole application.

    A POST request whose path is in `handlers` is passed to that function. FastAPI has the same
    routes, but only describes them: it would spend time on dependencies that they do not have.
    """

    def __init__(
        self, app: ASGIApp, service: Service, handlers: Mapping[str, RouteHandler]
    ) -> None:
        self._app, self._service, self._options = app, service, service.options
        self._handlers = handlers
        self._hosts = {self._options.host, urlsplit(self._options.public_url).hostname}
        self._keys = [sha256(key.encode()).digest() for key in self._options.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if self._has_trailing_slash(scope["path"]):
            # Not with a redirect: behind a TLS proxy the server does not know its own URL.
            scope = {**scope, "path": scope["path"][:-1]}
        exchange = _Exchange(scope, receive, send, self._options.max_body_bytes)
        try:
            refusal = self._refusal(scope)
            if refusal is not None:
                await self._send_error(refusal, exchange)
                return
            if scope["method"] == "POST" and scope["path"] in _GENERATION_PATHS:
                self._service.driver.check_room()
            await self._forward(exchange)
        except Exception as error:
            api_error = report(error)
            if not exchange.status:
                await self._send_error(api_error, exchange)
        finally:
            self._log_request(exchange)

    def _has_trailing_slash(self, path: str) -> bool:
        ends = path.endswith("/") and path != "/"
        return ends and not self._service.serves(path.removeprefix("/v1/models/"))

    async def _forward(self, exchange: _Exchange) -> None:
        scope, receive, send = exchange.scope, exchange.receive, exchange.send
        handler = self._handlers.get(scope["path"]) if scope["method"] == "POST" else None
        if handler is None:
            if scope["method"] == "HEAD":
                # uvicorn still knows that it is HEAD, and leaves out the body of the reply.
                scope = {**scope, "method": "GET"}
            await self._app(scope, receive, send)
        else:
            reply = await handler(Request(scope, receive, send))
            await reply(scope, receive, send)

    async def _send_error(self, error: ApiError, exchange: _Exchange) -> None:
        reply = JsonReply(error.body, error.status, error.headers)
        await reply(exchange.scope, exchange.receive, exchange.send)

    def _refusal(self, scope: Scope) -> ApiError | None:
        """The error for a request without a valid key, or to a server without keys from
        elsewhere."""
        headers = Headers(scope=scope)
        if not self._keys:
            return self._host_error(headers.get("host", "")) or self._form_error(headers)
        if self._is_public(scope) or self._has_key(headers.get("authorization", "")):
            return None
        return ApiError(
            401,
            "the request has no valid API key: send Authorization: Bearer and the server's key",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )

    def _host_error(self, host: str) -> ApiError | None:
        """The error for a Host that is not this machine. A web page whose host name has been made
        to resolve to this machine (DNS rebinding) sends that name."""
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            name = ""
        if is_loopback(name) or name in self._hosts:
            return None
        return ApiError(
            403,
            "the Host of the request is not this machine: use 127.0.0.1, or start the server with "
            "--api-key or --public-url",
            code="host_refused",
        )

    def _form_error(self, headers: Headers) -> ApiError | None:
        """The error for a form from a web page of another server. Browsers send forms, unlike JSON,
        without a CORS preflight request."""
        origin = headers.get("origin")
        form = headers.get("content-type", "").lower().startswith("multipart/form-data")
        if origin is None or not form or {origin, "*"} & {*self._options.cors_origins}:
            return None
        if origin.partition("://")[2] in (headers.get("host"), *self._hosts):
            return None
        return ApiError(
            403,
            "the form comes from a web page of another server: start this one with --api-key, or "
            "with --cors-origin and the page's origin",
            code="origin_refused",
        )

    def _is_public(self, scope: Scope) -> bool:
        """Whether a request needs no key: for health, the page, or an image at a signed URL."""
        if scope["path"] in _PUBLIC_PATHS:
            return True
        match = _CONTENT_PATH.fullmatch(scope["path"])
        signature = parse_qs(scope["query_string"].decode("latin-1")).get("sig", [""])[0]
        return match is not None and self._service.files.is_signed(match[1], signature)

    def _has_key(self, header: str) -> bool:
        scheme, _, key = header.partition(" ")
        digest = sha256(key.strip().encode("utf-8", "surrogateescape")).digest()
        # Compare with all keys, so that the time does not show which one matches.
        matches = [hmac.compare_digest(digest, known) for known in self._keys]
        return scheme.lower() == "bearer" and any(matches)

    def _log_request(self, exchange: _Exchange) -> None:
        if exchange.status >= 400:
            self._service.metrics.count_error(exchange.status)
        if exchange.scope["path"] not in _PUBLIC_PATHS:
            log.info(
                "request",
                extra={
                    "request_id": exchange.id,
                    "method": exchange.scope["method"],
                    "path": exchange.scope["path"][:200],
                    "status": exchange.status or 499,  # the client left before the reply
                    "ms": round((monotonic() - exchange.started_at) * 1000, 1),
                },
            )


class _Exchange:
    """One HTTP request and its reply: the request's id, the status of the reply, and the number of
    bytes that the body may still have."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, max_bytes: int) -> None:
        self.scope, self._receive, self._send = scope, receive, send
        headers = Headers(scope=scope)
        requested_id = headers.get("x-request-id", "")
        is_valid = _REQUEST_ID.fullmatch(requested_id) is not None
        self.id = requested_id if is_valid else f"req_{getrandbits(96):024x}"
        self.status, self.started_at = 0, monotonic()
        self._bytes_left, self._is_complete = max_bytes, False
        self._max_bytes = max_bytes
        length = headers.get("content-length", "")
        self._content_length = int(length) if length.isdecimal() and len(length) < 19 else 0

    async def receive(self) -> Message:
        """The next ASGI message. Raises `ApiError` with status 413 for a body above the limit, 408
        for a slow one."""
        if self._content_length > self._max_bytes:
            raise self._too_large()
        # After the body this waits until the client leaves: no time limit.
        try:
            async with asyncio.timeout(None if self._is_complete else BODY_SECONDS):
                message = await self._receive()
        except TimeoutError:
            raise ApiError(
                408, "the body did not come in time: send the request again", code="slow_body"
            ) from None
        self._is_complete = self._is_complete or not message.get("more_body", False)
        self._bytes_left -= len(message.get("body", b""))
        if self._bytes_left < 0:
            raise self._too_large()
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            MutableHeaders(scope=message)["x-request-id"] = self.id
        await self._send(message)

    def _too_large(self) -> ApiError:
        self._content_length = 0
        self._bytes_left = 2**62  # the rest of the body is read and ignored
        return ApiError(
            413,
            f"the body has over {self._max_bytes:,} bytes, the limit: send smaller images, or "
            "upload them one by one to /v1/files",
            code="body_too_large",
            headers={"Connection": "close"},
        )
