"""The server under load, beside the same requests through the engine without it.

    python benchmarks/serve.py --clients 1 8 32 --requests 64
    python benchmarks/serve.py --shape 1b --dtype bf16 --clients 1 8
    python benchmarks/serve.py --overload

Half of the requests are for a text, half for a picture; all are streamed, with seeds of their own.
Each client asks again as soon as it has its answer. "all at once" and "one by one" are the engine
in a thread of this process. Requests go in a new order in every row, and prompts are new, so
nothing is read from a prefix. `--overload` asks with four times as many clients as the server
admits, and shows how soon the refused ones are told so.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from statistics import quantiles
from time import perf_counter
from typing import Any

import httpx


@dataclass
class Tally:
    """What the clients of one row saw; times in seconds."""

    tokens: int = 0
    first: list[float] = field(default_factory=list)
    pictures: list[float] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)
    lost: int = 0
    seconds: float = 0.0


def body_of(number: int, tokens: int) -> dict[str, Any]:
    """Request number i: a text for even ones, a picture for odd ones."""
    words = f"Draw a red apple {number}." if number % 2 else f"Name fruit {number}."
    body = {"messages": [{"role": "user", "content": words}], "seed": number}
    if number % 2:
        return body | {"modalities": ["image"]}
    return body | {"modalities": ["text"], "max_tokens": tokens}


async def ask(client: httpx.AsyncClient, body: dict[str, Any], tally: Tally) -> None:
    """One streamed request."""
    began, first = perf_counter(), None
    body = body | {"stream": True, "stream_options": {"include_usage": True}}
    async with client.stream("POST", "/v1/chat/completions", json=body) as reply:
        if reply.status_code in (429, 503):
            tally.refused.append(perf_counter() - began)
            return
        usage = None
        async for line in reply.aiter_lines():
            if line.startswith("data: {"):
                event = json.loads(line[6:])
                usage = event.get("usage") or usage
                deltas = [choice["delta"] for choice in event.get("choices", ())]
                if first is None and any(
                    d.keys() - {"role"} and d.get("content") != "" for d in deltas
                ):
                    first = perf_counter() - began
    if usage is None:
        tally.lost += 1
        return
    tally.tokens += usage["completion_tokens"]
    tally.first.append(first or perf_counter() - began)
    if body["modalities"] == ["image"]:
        tally.pictures.append(perf_counter() - began)


async def load(url: str, clients: int, bodies: list[dict[str, Any]]) -> Tally:
    """Ask all of them, `clients` at a time."""
    tally, waiting = Tally(), iter(bodies)
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    async with httpx.AsyncClient(base_url=url, timeout=None, limits=limits) as client:

        async def one() -> None:
            for body in waiting:
                await ask(client, body, tally)

        began = perf_counter()
        await asyncio.gather(*(one() for _ in range(clients)))
        tally.seconds = perf_counter() - began
    return tally


def in_engine(model: Any, bodies: list[dict[str, Any]], at_once: int) -> tuple[int, float]:
    """Tokens and seconds of the same requests through the engine, at most `at_once` together."""
    tokens, began = 0, perf_counter()
    for start in range(0, len(bodies), at_once):
        requests = [
            model.request(
                body["messages"][0]["content"],
                body["modalities"][0],
                seed=body["seed"],
                **({"max_tokens": body["max_tokens"]} if "max_tokens" in body else {}),
            )
            for body in bodies[start : start + at_once]
        ]
        handles = [model.engine.add(request) for request in requests]
        replies = [model.collect(handle) for handle in handles]
        tokens += sum(reply.usage.completion_tokens for reply in replies)
    return tokens, perf_counter() - began


def spread(values: list[float]) -> str:
    """p50 / p95 in milliseconds."""
    if len(values) < 2:
        return " / ".join(f"{1e3 * value:.1f}" for value in values) or "-"
    cuts = quantiles(values, n=20, method="inclusive")
    return f"{1e3 * cuts[9]:.1f} / {1e3 * cuts[18]:.1f}"


def started(model: str, dtype: str, max_queue: int) -> tuple[subprocess.Popen[str], str]:
    """A server on a free port, and its address."""
    command = [sys.executable, "-m", "earlyfusion", "serve", "--port", "0", "--model", model]
    command += ["--dtype", dtype, "--max-queue", str(max_queue)]
    server = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=os.environ
    )
    assert server.stdout is not None
    words = server.stdout.readline().split()
    if len(words) < 5:
        raise SystemExit("the server did not start: run earlyfusion serve to see why")
    return server, words[4].removesuffix("/v1")


def measure(model: str, arguments: argparse.Namespace) -> None:
    from earlyfusion import Chameleon
    from earlyfusion.bench.harness import heading, line

    server, url = started(model, arguments.dtype, 0 if arguments.overload else 256)
    try:
        if arguments.overload:
            clients = 4 * 256
            bodies = [body_of(i, arguments.tokens) for i in range(2 * clients)]
            tally = asyncio.run(load(url, clients, bodies))
            print(
                f"{len(tally.first)} answered, {len(tally.refused)} refused, {tally.lost} lost; "
                f"refused within {spread(tally.refused)} ms (p50 / p95)"
            )
            return
        print(heading("how", "tokens/s", "first token, ms p50 / p95", "picture, ms p50 / p95"))
        for i, clients in enumerate(arguments.clients):
            numbers = range(i * 10_000, i * 10_000 + arguments.requests)
            tally = asyncio.run(load(url, clients, [body_of(n, arguments.tokens) for n in numbers]))
            rate = tally.tokens / tally.seconds
            name = f"server, {clients} clients" + (f", {tally.lost} lost" if tally.lost else "")
            print(line(name, f"{rate:.0f}", spread(tally.first), spread(tally.pictures)))
    finally:
        server.terminate()
        server.wait()
    loaded = Chameleon.load(model, dtype=arguments.dtype)
    loaded.generate("Draw a cat.", "image", seed=0)
    for i, at_once in enumerate([1, *(n for n in arguments.clients if n > 1)]):
        numbers = range(900_000 + i * 10_000, 900_000 + i * 10_000 + arguments.requests)
        tokens, took = in_engine(loaded, [body_of(n, arguments.tokens) for n in numbers], at_once)
        name = "engine, one by one" if at_once == 1 else f"engine, {at_once} at once"
        print(line(name, f"{tokens / took:.0f}", "-", "-"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="mini", help="mini is trained, others are random")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--requests", type=int, default=64, help="of each row")
    parser.add_argument("--tokens", type=int, default=64, help="the most of a text")
    parser.add_argument("--overload", action="store_true")
    arguments = parser.parse_args()
    if arguments.shape == "mini":
        measure("mini", arguments)
        return
    from earlyfusion.bench.shapes import write_random

    with tempfile.TemporaryDirectory() as folder:
        write_random(arguments.shape, Path(folder))
        measure(folder, arguments)


if __name__ == "__main__":
    main()
