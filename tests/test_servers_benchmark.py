"""`benchmarks/servers.py` goes on when a server closes connections."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import pytest

REPLY = b'data: {"usage":{"completion_tokens":3}}\n\n'


@pytest.fixture
def servers(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    import servers

    yield servers
    del sys.modules["servers"]


@pytest.mark.parametrize(("every", "lost", "length"), [(2, 3, "3.0"), (1, 6, "0.0")])
def test_lost_requests_are_counted(servers: Any, every: int, lost: int, length: str) -> None:
    asked = 0

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal asked
        await reader.readuntil(b"}")
        asked += 1
        if asked % every:
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(REPLY), REPLY))
            await writer.drain()
        writer.close()

    async def run() -> Any:
        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            return await servers.load(server.sockets[0].getsockname()[1], [{}] * 6, 1)

    tally = asyncio.run(run())
    tally.seconds = tally.seconds or 1.0
    name, rate, times, tokens = servers.row("peer", [tally])
    assert name == f"peer: {lost} of 6 lost (the server closed the connection)"
    assert float(rate) >= 0 and tokens == length and (times == "-") == (lost == 6)
