"""Light clients of a running server: many at once, in plain asyncio, so that they take little
processor time from the measured server."""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from random import Random
from statistics import median
from time import perf_counter
from typing import Any

_FIRST_OUTPUT = re.compile(rb'"(?:content|text)":"[^"]|"images?[_"]')
_USAGE = re.compile(rb'data: (\{.*"usage":\{.*\})')
_TAIL_BYTES = 4096  # of a reply's end, which are kept


@dataclass
class Response:
    """A response to a POST. `received` counts bytes of its body, `tail` are the last of them.
    `first_output` (of text or image) and `seconds` (the end) are times since the request was
    sent."""

    status: int = 0
    length: int | None = None
    retry_after: float = 1.0
    received: int = 0
    tail: bytes = b""
    first_output: float | None = None
    seconds: float = 0.0

    @property
    def complete(self) -> bool:
        """Whether the whole body has arrived."""
        if self.length is not None:
            return self.received >= self.length
        return self.tail.endswith(b"\r\n0\r\n\r\n")

    @property
    def tokens(self) -> int:
        """The number of completion tokens, from the usage at the end of the body."""
        usages = _USAGE.findall(self.tail)
        return int(json.loads(usages[-1])["usage"]["completion_tokens"]) if usages else 0


class Client(asyncio.Protocol):
    """One connection to a server on this machine, opened when it is needed."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._transport: asyncio.Transport | None = None
        self._response, self._start, self._head = Response(), 0.0, b""
        self._done: asyncio.Future[None] | None = None

    async def post(
        self, path: str, body: Mapping[str, Any] | bytes, disconnect_after: float | None = None
    ) -> Response:
        """POST a body. `disconnect_after` closes the connection after this many seconds, whatever
        has arrived. Raises ConnectionError if the server closes it first; but if the connection was
        left open by an earlier request and no byte has arrived, it is opened again."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        message = f"{head}Content-Length: {len(raw)}\r\n\r\n".encode() + raw
        reused = self._transport is not None
        try:
            return await self._exchange(message, disconnect_after)
        except ConnectionError:
            if not reused or self._head:
                raise
            return await self._exchange(message, disconnect_after)

    async def _exchange(self, message: bytes, disconnect_after: float | None) -> Response:
        loop = asyncio.get_running_loop()
        if self._transport is None:
            await loop.create_connection(lambda: self, "127.0.0.1", self._port)
        assert self._transport is not None
        self._response, self._head, self._start = Response(), b"", perf_counter()
        self._done = loop.create_future()
        self._transport.write(message)
        try:
            async with asyncio.timeout(disconnect_after):
                await self._done
        except TimeoutError:
            self.close()
        self._response.seconds = perf_counter() - self._start
        return self._response

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()
            self._transport = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        if self._done is not None and not self._done.done():
            self._done.set_exception(ConnectionError("the server closed the connection"))

    def data_received(self, data: bytes) -> None:
        """Called by asyncio for each piece of the response."""
        response = self._response
        if not response.status:
            self._head += data
            head, end, data = self._head.partition(b"\r\n\r\n")
            if not end:
                return
            self._read_head(head.lower())
        response.received += len(data)
        response.tail = (response.tail + data)[-_TAIL_BYTES:]
        if response.first_output is None and _FIRST_OUTPUT.search(data):
            response.first_output = perf_counter() - self._start
        if response.complete and self._done is not None and not self._done.done():
            self._done.set_result(None)

    def _read_head(self, head: bytes) -> None:
        self._response.status = int(head[9:12])
        fields = dict(re.findall(rb"([a-z-]+): (\d+)", head))
        if b"content-length" in fields:
            self._response.length = int(fields[b"content-length"])
        self._response.retry_after = int(fields.get(b"retry-after-ms", 1000)) / 1000


# ---- mixed load


@dataclass(frozen=True)
class RequestKind:
    """One kind of request: its route, its body, the expected status, and whether the client
    disconnects early."""

    path: str
    body: dict[str, Any] | bytes
    status: int = 200
    disconnects: bool = False


@dataclass
class MixedLoad:
    """The results of a mixed load: the number of requests sent of each kind, the unexpected
    responses, and samples of each process's memory in bytes, in order."""

    sent: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)
    bytes: dict[int, list[int]] = field(default_factory=dict)

    def growth(self, process: int, warm: int) -> float:
        """The growth of a process's memory as a share: the median of the last fifth of its samples
        over that of the first, without the first `warm` ones."""
        samples = self.bytes[process][warm:]
        fifth = max(len(samples) // 5, 1)
        return median(samples[-fifth:]) / median(samples[:fifth]) - 1


_SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "ripe": {"type": "boolean"}},
    "required": ["name", "ripe"],
    "additionalProperties": False,
}


def request_kinds(image_url: str) -> dict[str, RequestKind]:
    """The kinds of requests of a mixed load by name; `image_url` is a data URL."""
    chat, image = "/v1/chat/completions", {"type": "image_url", "image_url": {"url": image_url}}
    question = [image, {"type": "text", "text": "What is this?"}]
    form = {"type": "json_schema", "json_schema": {"name": "fruit", "schema": _SCHEMA}}
    as_image = {"modalities": ["image"], "stream": True}
    return {
        "text": RequestKind(chat, _chat_body("Name a fruit.", modalities=["text"], stream=True)),
        "whole text": RequestKind(chat, _chat_body("Name a fruit.", modalities=["text"], n=2)),
        "image": RequestKind(chat, _chat_body("Draw a red apple.", **as_image)),
        "image route": RequestKind("/v1/images/generations", {"prompt": "Draw a cat."}),
        "response": RequestKind("/v1/responses", {"input": "Name a fruit.", "store": False}),
        "question": RequestKind(chat, _chat_body(question, modalities=["text"])),
        "structured": RequestKind(
            chat, _chat_body("Name a fruit.", response_format=form, modalities=["text"])
        ),
        "leaves": RequestKind(chat, _chat_body("Draw a cat.", **as_image), disconnects=True),
        "unknown field": RequestKind(chat, _chat_body("Hi", temprature=1), 400),
        "long prompt": RequestKind(chat, _chat_body("a " * 3000), 400),
        "no JSON": RequestKind(chat, b"{", 400),
        "no image": RequestKind("/v1/images/generations", {"prompt": "a", "size": "7x7"}, 400),
    }


def _chat_body(content: Any, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}], "max_tokens": 200, **fields}


async def mixed_load(
    port: int,
    seconds: float,
    clients: int,
    image_url: str,
    processes: list[int],
    pause: float = 1.0,
) -> MixedLoad:
    """Send all kinds of requests at once for `seconds`; sample memory every `pause`
    seconds."""
    result, end = MixedLoad(bytes={process: [] for process in processes}), perf_counter() + seconds
    kinds = request_kinds(image_url)

    async def sample_memory() -> None:
        while perf_counter() < end:
            for process, samples in result.bytes.items():
                samples.append(resident(process))
            await asyncio.sleep(pause)

    async def client_loop(number: int) -> None:
        client, rng = Client(port), Random(number)
        while perf_counter() < end:
            name = rng.choice([*kinds])
            await _send(client, name, kinds[name], rng, result)
        client.close()

    await asyncio.gather(sample_memory(), *(client_loop(number) for number in range(clients)))
    return result


async def _send(
    client: Client, name: str, kind: RequestKind, rng: Random, result: MixedLoad
) -> None:
    """Send a request of a kind, and note an unexpected response in `result`."""
    body = kind.body
    if isinstance(body, dict) and kind.status == 200:
        body = body | {"seed": rng.randrange(2**31)}
    result.sent[name] += 1
    try:
        response = await client.post(
            kind.path, body, rng.random() / 3 if kind.disconnects else None
        )
    except ConnectionError as error:
        result.errors.append(f"{name}: {error}")
        return
    if kind.disconnects and not response.complete:
        return
    if response.status != kind.status or b'data: {"error"' in response.tail:
        result.errors.append(f"{name}: status {response.status}, {response.tail[-300:]!r}")


def resident(process: int) -> int:
    """Bytes of memory that a process of this machine holds (Linux)."""
    with open(f"/proc/{process}/status") as file:
        [line] = [line for line in file if line.startswith("VmRSS:")]
    return int(line.split()[1]) * 1024
