"""Every HTTP request passes here: request ids, API keys, the limit of bodies, log and metrics.

Plain ASGI, so that streams and disconnections pass through untouched.
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

from earlyfusion.serve.errors import ApiError, reported
from earlyfusion.serve.options import is_loopback
from earlyfusion.serve.page import PAGE_PATHS
from earlyfusion.serve.replies import JsonReply
from earlyfusion.serve.service import Service

log = logging.getLogger("earlyfusion.serve")
BODY_SECONDS = 30.0  # between two pieces of a body
# Routes that need room in the queue: if it is full, their bodies are not even read.
_GENERATES = {
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/images/generations",
    "/v1/images/edits",
    "/v1/images/variations",
}
_OPEN = {"/health", "/ready"} | PAGE_PATHS
_CONTENT = re.compile(r"/v1/files/([^/]+)/content")
_CLIENTS_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


Answer: TypeAlias = Callable[[Request], Awaitable[Response]]


class Gate:
    """ASGI middleware around the whole application.

    POST requests whose path is in `direct` are answered by that function. FastAPI, which has the
    same routes for its description of them, would solve dependencies that they do not have.
    """

    def __init__(self, app: ASGIApp, service: Service, direct: Mapping[str, Answer]) -> None:
        self._app, self._service, self._options = app, service, service.options
        self._direct = direct
        self._names = {self._options.host, urlsplit(self._options.public_url).hostname}
        self._keys = [sha256(key.encode()).digest() for key in self._options.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if self._has_slash_too_many(scope["path"]):
            # Not by a redirect: behind a TLS proxy the server does not know its own address.
            scope = {**scope, "path": scope["path"][:-1]}
        visit = _Visit(scope, receive, send, self._options.max_body_bytes)
        try:
            refusal = self._refusal(scope)
            if refusal is not None:
                await self._answer(refusal, visit)
                return
            if scope["method"] == "POST" and scope["path"] in _GENERATES:
                self._service.driver.check_room()
            await self._pass_on(visit)
        except Exception as error:
            wire = reported(error)
            if not visit.status:
                await self._answer(wire, visit)
        finally:
            self._note(visit)

    def _has_slash_too_many(self, path: str) -> bool:
        ends = path.endswith("/") and path != "/"
        return ends and not self._service.serves(path.removeprefix("/v1/models/"))

    async def _pass_on(self, visit: _Visit) -> None:
        scope, receive, send = visit.scope, visit.receive, visit.send
        answer = self._direct.get(scope["path"]) if scope["method"] == "POST" else None
        if answer is None:
            if scope["method"] == "HEAD":
                # uvicorn, which has the scope itself, leaves out the body of the reply.
                scope = {**scope, "method": "GET"}
            await self._app(scope, receive, send)
        else:
            reply = await answer(Request(scope, receive, send))
            await reply(scope, receive, send)

    async def _answer(self, error: ApiError, visit: _Visit) -> None:
        reply = JsonReply(error.body, error.status, error.headers)
        await reply(visit.scope, visit.receive, visit.send)

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers = Headers(scope=scope)
        if not self._keys:
            return self._foreign_host(headers.get("host", "")) or self._foreign_form(headers)
        if self._is_open(scope) or self._has_key(headers.get("authorization", "")):
            return None
        return ApiError(
            401,
            "the request has no valid API key: send Authorization: Bearer and the server's key",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )

    def _foreign_host(self, host: str) -> ApiError | None:
        """The error for a Host that is not this machine, on a server without keys. A web page whose
        name was pointed here (DNS rebinding) sends the name of its site."""
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            name = ""
        if is_loopback(name) or name in self._names:
            return None
        return ApiError(
            403,
            "the Host of the request is not this machine: use 127.0.0.1, or start the server with "
            "--api-key or --public-url",
            code="host_refused",
        )

    def _foreign_form(self, headers: Headers) -> ApiError | None:
        """The error for a form that a web page of another server sends, to a server without keys.
        Browsers send forms, unlike JSON, without asking the server first."""
        origin = headers.get("origin")
        form = headers.get("content-type", "").lower().startswith("multipart/form-data")
        if origin is None or not form or {origin, "*"} & {*self._options.cors_origins}:
            return None
        if origin.partition("://")[2] in (headers.get("host"), *self._names):
            return None
        return ApiError(
            403,
            "the form comes from a web page of another server: start this one with --api-key, or "
            "with --cors-origin and the page's origin",
            code="origin_refused",
        )

    def _is_open(self, scope: Scope) -> bool:
        """Whether a path needs no key: health, and images at signed addresses."""
        if scope["path"] in _OPEN:
            return True
        found = _CONTENT.fullmatch(scope["path"])
        signature = parse_qs(scope["query_string"].decode("latin-1")).get("sig", [""])[0]
        return found is not None and self._service.files.is_signed(found[1], signature)

    def _has_key(self, header: str) -> bool:
        scheme, _, key = header.partition(" ")
        digest = sha256(key.strip().encode("utf-8", "surrogateescape")).digest()
        # Compare all of them, so that the time does not show which one fits.
        fits = [hmac.compare_digest(digest, known) for known in self._keys]
        return scheme.lower() == "bearer" and any(fits)

    def _note(self, visit: _Visit) -> None:
        if visit.status >= 400:
            self._service.metrics.refuse(visit.status)
        if visit.scope["path"] not in _OPEN:
            log.info(
                "request",
                extra={
                    "request_id": visit.id,
                    "method": visit.scope["method"],
                    "path": visit.scope["path"][:200],
                    "status": visit.status or 499,  # the client went before the reply
                    "ms": round((monotonic() - visit.began) * 1000, 1),
                },
            )


class _Visit:
    """One HTTP request: its id, its status, and the bytes that its body may still have."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, max_bytes: int) -> None:
        self.scope, self._receive, self._send = scope, receive, send
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        fits = _CLIENTS_ID.fullmatch(given) is not None
        self.id = given if fits else f"req_{getrandbits(96):024x}"
        self.status, self.began = 0, monotonic()
        self._left, self._whole = max_bytes, False
        self._max_bytes = max_bytes
        length = headers.get("content-length", "")
        self._announced = int(length) if length.isdecimal() and len(length) < 19 else 0

    async def receive(self) -> Message:
        """The body, up to the limit. Raises `ApiError` with status 413."""
        if self._announced > self._max_bytes:
            raise self._too_large()
        # Behind the body this waits for the client to leave, which may take long: no time limit.
        try:
            async with asyncio.timeout(None if self._whole else BODY_SECONDS):
                message = await self._receive()
        except TimeoutError:
            raise ApiError(
                408, "the body did not come in time: send the request again", code="slow_body"
            ) from None
        self._whole = self._whole or not message.get("more_body", False)
        self._left -= len(message.get("body", b""))
        if self._left < 0:
            raise self._too_large()
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            MutableHeaders(scope=message)["x-request-id"] = self.id
        await self._send(message)

    def _too_large(self) -> ApiError:
        self._announced = 0
        self._left = 2**62  # the rest of the body is thrown away
        return ApiError(
            413,
            f"the body has over {self._max_bytes:,} bytes, the limit: send smaller images, or "
            "upload them one by one to /v1/files",
            code="body_too_large",
            headers={"Connection": "close"},
        )
