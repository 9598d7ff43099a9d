"""The server under load, beside the same requests through the engine without it.

    python benchmarks/serve.py --clients 1 8 32 --requests 64
    python benchmarks/serve.py --shape 1b --dtype bf16 --clients 1 8
    python benchmarks/serve.py --overload --seconds 60
    python benchmarks/serve.py --mixed --seconds 3600

Half of the requests are for a text, half for an image; all are streamed, with seeds of their own.
Each client asks again as soon as it has its answer. The engine alone answers the same requests, as
many at once, in a process of its own; server and engine take turns in `--rounds`. Wall clocks hold
the clients' share of the processor too, so the processor time a token takes is told by process: the
engine's, the server's, the clients'.

`--overload` asks with four times as many clients as the server admits; who is refused asks again
when the server said. One more client, in a process of its own, asks twenty times a second and tells
how soon it is refused. `--mixed` asks for everything at once, with mistakes and clients that leave,
and tells how the memory of both processes grew after the first fifth of the time; its server keeps
few images and prefixes, so that these are as many as they can be by then.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from statistics import median, quantiles
from time import perf_counter, process_time, sleep
from typing import Any

from earlyfusion.bench.clients import Client, Response, mixed_load, resident

CHAT = "/v1/chat/completions"
_PROBE_SECONDS = 10.0  # after which a client leaves that was let in
_DECODER_SECONDS = 8.0  # in which the decoder's process starts, which begins with the first image


@dataclass
class Tally:
    """What the clients of one row saw; times in seconds."""

    tokens: int = 0
    first: list[float] = field(default_factory=list)
    images: list[float] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)
    lost: int = 0
    seconds: float = 0.0

    def add(self, answer: Response, body: dict[str, Any]) -> None:
        if answer.status in (429, 503):
            self.refused.append(answer.seconds)
        elif answer.status != 200 or b"[DONE]" not in answer.tail or b'{"error"' in answer.tail:
            self.lost += 1
        else:
            self.tokens += answer.tokens
            self.first.append(answer.first_output or answer.seconds)
            if body["modalities"] == ["image"]:
                self.images.append(answer.seconds)


def body_of(number: int, tokens: int) -> dict[str, Any]:
    """Request number i: a text for even ones, an image for odd ones."""
    words = f"Draw a red apple {number}." if number % 2 else f"Name fruit {number}."
    body = {"messages": [{"role": "user", "content": words}], "seed": number}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    if number % 2:
        return body | {"modalities": ["image"]}
    return body | {"modalities": ["text"], "max_tokens": tokens}


async def load(port: int, clients: int, bodies: list[dict[str, Any]]) -> Tally:
    """Ask all of them, `clients` at a time."""
    tally, waiting = Tally(), iter(bodies)

    async def one() -> None:
        client = Client(port)
        for body in waiting:
            tally.add(await client.post(CHAT, body), body)
        client.close()

    began = perf_counter()
    await asyncio.gather(*(one() for _ in range(clients)))
    tally.seconds = perf_counter() - began
    return tally


async def overload(port: int, clients: int, tokens: int, seconds: float) -> Tally:
    """So many clients for so long; who is refused asks again when the server said."""
    tally, end, numbers = Tally(), perf_counter() + seconds, iter(range(10**9))

    async def one() -> None:
        while (left := end - perf_counter()) > 0:
            client, body = Client(port), body_of(next(numbers), tokens)
            answer = await client.post(CHAT, body)
            client.close()
            tally.add(answer, body)
            if answer.status == 429:
                await asyncio.sleep(min(answer.retry_after, left))

    await asyncio.gather(*(one() for _ in range(clients)))
    tally.seconds = seconds
    return tally


def probe(port: int, seconds: float, told: Any) -> None:
    """One client in a process of its own: how soon it is refused."""

    async def run() -> list[float]:
        times, client, chance = list[float](), Client(port), Random(0)
        end = perf_counter() + seconds
        while perf_counter() < end:
            answer = await client.post(CHAT, body_of(10**6, 8), disconnect_after=_PROBE_SECONDS)
            if answer.status == 429:
                times.append(answer.seconds)
            await asyncio.sleep(chance.uniform(0.02, 0.08))
        return times

    told.put(asyncio.run(run()))


class Alone:
    """The engine of a model in a process of its own."""

    def __init__(self, model: str, dtype: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_alone, args=(theirs, model, dtype), daemon=True)
        self._process.start()

    def answer(self, bodies: list[dict[str, Any]], at_once: int) -> tuple[int, float, float]:
        """Tokens, seconds, and seconds of the processor."""
        self._pipe.send((bodies, at_once))
        tokens, took, worked = self._pipe.recv()
        return tokens, took, worked

    def end(self) -> None:
        self._pipe.send(None)
        self._process.join()


def _alone(pipe: Any, model: str, dtype: str) -> None:
    from earlyfusion import Chameleon

    loaded = Chameleon.load(model, dtype=dtype)
    in_engine(loaded, [body_of(n, 8) for n in range(4)], 4)
    while (work := pipe.recv()) is not None:
        pipe.send(in_engine(loaded, *work))


def in_engine(model: Any, bodies: list[dict[str, Any]], at_once: int) -> tuple[int, float, float]:
    """Tokens, seconds and seconds of the processor of the same requests through the engine, always
    `at_once` together; prompts are read and images decoded by others, as the server does."""
    requests = [
        model.request(
            body["messages"][0]["content"],
            body["modalities"][0],
            seed=body["seed"],
            **({"max_tokens": body["max_tokens"]} if "max_tokens" in body else {}),
        )
        for body in bodies
    ]
    waiting, live, tokens = iter(requests), list[Any](), 0
    began, worked = perf_counter(), process_time()
    while True:
        while len(live) < at_once and (request := next(waiting, None)) is not None:
            live.append(model.engine.add(request))
        if not live:
            return tokens, perf_counter() - began, process_time() - worked
        model.engine.step()
        tokens += sum(len(handle.tokens) for handle in live if handle.finished)
        live = [handle for handle in live if not handle.finished]


def worked(process: int) -> float:
    """Seconds that a process has had of the processor (Linux)."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def spread(values: list[float], high: int = 95) -> str:
    """p50 and another percentile in milliseconds."""
    if len(values) < 2:
        return " / ".join(f"{1e3 * value:.1f}" for value in values) or "-"
    cuts = quantiles(values, n=100, method="inclusive")
    return f"{1e3 * cuts[49]:.1f} / {1e3 * cuts[high - 1]:.1f}"


@contextmanager
def started(
    model: str, dtype: str, max_queue: int, *options: str
) -> Iterator[tuple[int, int, int]]:
    """A server on a free port: the port, its process and the engine's."""
    command = [sys.executable, "-m", "earlyfusion", "serve", "--port", "0", "--model", model]
    command += ["--dtype", dtype, "--max-queue", str(max_queue), *options]
    server = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=os.environ
    )
    try:
        assert server.stdout is not None
        words = server.stdout.readline().split()
        if len(words) < 5:
            raise SystemExit("the server did not start: run earlyfusion serve to see why")
        port = int(words[4].removesuffix("/v1").rpartition(":")[2])
        yield port, server.pid, engine_of(server.pid)
    finally:
        server.terminate()
        server.wait()


def engine_of(server: int) -> int:
    """The child of a server that has worked most."""
    children = Path(f"/proc/{server}/task/{server}/children").read_text().split()
    return max(map(int, children), key=worked)


def measure(model: str, arguments: argparse.Namespace) -> None:
    from earlyfusion.bench.harness import heading, line

    alone = Alone(model, arguments.dtype)
    names = ("how", "tokens/s", "first token, ms p50 / p95", "image, ms p50 / p95")
    print(heading(*names, "processor, µs a token"))
    with started(model, arguments.dtype, 256) as (port, server, engine):
        asyncio.run(load(port, 4, [body_of(n, 8) for n in range(4)]))
        sleep(_DECODER_SECONDS)
        for i, clients in enumerate(arguments.clients):
            rows: list[tuple[float, ...]] = []
            tally = Tally()
            for turn in range(arguments.rounds):
                start = 100_000 * i + 10_000 * turn
                bodies = [body_of(start + n, arguments.tokens) for n in range(arguments.requests)]
                before = worked(server), worked(engine), process_time()
                tally = asyncio.run(load(port, clients, bodies))
                after = worked(server), worked(engine), process_time()
                tokens, took, busy = alone.answer(bodies, clients)
                spent = [(b - a) / tally.tokens for a, b in zip(before, after, strict=True)]
                rate = tally.tokens / tally.seconds
                rows.append((rate, tokens / took, *spent, busy / tokens))
            rate, plain, ours, child, asking, busy = map(median, zip(*rows, strict=True))
            name = f"server, {clients} clients" + (f", {tally.lost} lost" if tally.lost else "")
            times = spread(tally.first), spread(tally.images)
            shares = (
                f"engine {1e6 * child:.0f}, server {1e6 * ours:.0f}, clients {1e6 * asking:.0f}"
            )
            print(line(name, f"{rate:.0f}", *times, shares))
            print(line(f"engine, {clients} at once", f"{plain:.0f}", "-", "-", f"{1e6 * busy:.0f}"))
    alone.end()


def measure_overload(model: str, arguments: argparse.Namespace) -> None:
    from earlyfusion.engine.engine import MOST_RUNNING

    context = multiprocessing.get_context("spawn")
    with started(model, arguments.dtype, 0) as (port, server, engine):
        told = context.SimpleQueue()
        asking = context.Process(target=probe, args=(port, arguments.seconds, told), daemon=True)
        asking.start()
        before = worked(server), worked(engine), process_time()
        tally = asyncio.run(overload(port, 4 * MOST_RUNNING, arguments.tokens, arguments.seconds))
        after = worked(server), worked(engine), process_time()
        alone = told.get()
        shares = [100 * (b - a) / arguments.seconds for a, b in zip(before, after, strict=True)]
        sizes = [resident(process) / 1e6 for process in (server, engine)]
    print(
        f"{len(tally.first)} answered, {len(tally.refused)} refused, {tally.lost} lost; refused "
        f"within {spread(tally.refused, 99)} ms (p50 / p99); a client by itself is refused within "
        f"{spread(alone, 99)} ms ({len(alone)} times); share of a core: server {shares[0]:.0f}%, "
        f"engine {shares[1]:.0f}%, clients {shares[2]:.0f}%; memory: server {sizes[0]:.0f} MB, "
        f"engine {sizes[1]:.0f} MB"
    )


def measure_mixed(model: str, arguments: argparse.Namespace) -> None:
    import earlyfusion

    shown = Path(earlyfusion.__file__).parent / "pretrained/mini/examples/strawberry.png"
    image = "data:image/png;base64," + b64encode(shown.read_bytes()).decode()
    # Small stores, so that they are full when the server is warm; they take no more memory then.
    small = ["--cache-bytes", "32MB", "--file-bytes", "1MB"]
    with started(model, arguments.dtype, 256, *small) as (port, server, engine):
        processes = [server, engine]
        told = asyncio.run(mixed_load(port, arguments.seconds, 8, image, processes))
    warm = len(told.bytes[server]) // 5
    growths = [f"{100 * told.growth(process, warm):.2f}%" for process in processes]
    print(
        f"{told.sent.total()} requests in {arguments.seconds:.0f} s, {len(told.errors)} answered "
        f"wrongly; growth of the server {growths[0]}, of the engine {growths[1]}"
    )
    print(json.dumps(told.sent), *told.errors[:10], sep="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="mini", help="mini is trained, others are random")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--requests", type=int, default=64, help="of each row")
    parser.add_argument("--tokens", type=int, default=64, help="the most of a text")
    parser.add_argument("--rounds", type=int, default=3, help="medians of so many")
    parser.add_argument("--overload", action="store_true")
    parser.add_argument("--mixed", action="store_true")
    parser.add_argument("--seconds", type=float, default=60, help="of --overload and --mixed")
    arguments = parser.parse_args()
    run = measure_overload if arguments.overload else measure
    run = measure_mixed if arguments.mixed else run
    if arguments.shape == "mini":
        run("mini", arguments)
        return
    from earlyfusion.bench.shapes import write_random

    with tempfile.TemporaryDirectory() as folder:
        write_random(arguments.shape, Path(folder))
        run(folder, arguments)


if __name__ == "__main__":
    main()
