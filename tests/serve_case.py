"""A running server for tests: mini, on a free port of this machine, in a thread."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from threading import Thread
from time import monotonic, sleep
from typing import Any

import httpx
import PIL.Image
import uvicorn

import earlyfusion
from earlyfusion import Chameleon, Reply
from earlyfusion.api import Output
from earlyfusion.serve.app import make_app
from earlyfusion.serve.options import MAX_HEAD_BYTES, ServeOptions
from earlyfusion.serve.process import RemoteEngine
from earlyfusion.serve.run import Server, http_parser
from earlyfusion.serve.service import Service

STRAWBERRY = (
    Path(earlyfusion.__file__).parent / "pretrained" / "mini" / "examples" / "strawberry.png"
)


@cache
def mini() -> Chameleon:
    return Chameleon.load("mini")


@cache
def answer(prompt: str, output: Output, seed: int) -> Reply:
    """What `Chameleon.generate` answers."""
    return mini().generate(prompt, output, seed=seed)


@dataclass
class Running:
    url: str
    service: Service

    def post(self, path: str, body: Any, **headers: str) -> httpx.Response:
        with httpx.Client(timeout=60) as client:
            return client.post(self.url + path, json=body, headers=headers)

    def get(self, path: str, **headers: str) -> httpx.Response:
        with httpx.Client(timeout=60) as client:
            return client.get(self.url + path, headers=headers)

    def chat(self, words: Any, **fields: Any) -> httpx.Response:
        messages = words if isinstance(words, list) else [{"role": "user", "content": words}]
        return self.post("/v1/chat/completions", {"messages": messages, **fields})

    def wait_until_idle(self) -> None:
        end = monotonic() + 60
        driver = self.service.driver
        while driver.running or driver.waiting or driver.engine.busy:
            assert monotonic() < end
            sleep(0.005)


@contextmanager
def running(
    remote: RemoteEngine | Sequence[RemoteEngine] | None = None,
    model: Chameleon | None = None,
    **options: Any,
) -> Iterator[Running]:
    """A server with these `ServeOptions`, until the block ends; its engine is in this process, or
    in that of `remote`, or in those. `model` is mini if there is none."""
    first = remote[0] if isinstance(remote, Sequence) else remote
    model = model or (mini() if first is None else first.info.model)
    app = make_app(model, ServeOptions(port=0, **options), remote)
    config = uvicorn.Config(
        app,
        host="127.0.0.1",
        port=0,
        log_config=None,
        access_log=False,
        ws="none",
        lifespan="on",
        http=http_parser(),
        h11_max_incomplete_event_size=MAX_HEAD_BYTES,
    )
    server = Server(config, app.state.service, quiet=True)
    thread = Thread(target=server.run)
    thread.start()
    try:
        end = monotonic() + 60
        while not server.started:
            assert thread.is_alive() and monotonic() < end
            sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield Running(f"http://127.0.0.1:{port}", app.state.service)
    finally:
        server.should_exit = True
        thread.join(timeout=60)


def data_url(path: Path = STRAWBERRY) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def pixels(data: str | bytes) -> PIL.Image.Image:
    """The image of a file, of base64, or of a data URL."""
    if isinstance(data, str):
        data = base64.b64decode(data.partition(",")[2] or data)
    with PIL.Image.open(io.BytesIO(data)) as image:
        return image.convert("RGB")


def image_file(width: int = 32, height: int = 32, form: str = "PNG") -> bytes:
    file = io.BytesIO()
    PIL.Image.new("RGB", (width, height), (200, 30, 30)).save(file, form)
    return file.getvalue()


def events(text: str) -> list[tuple[str | None, Any]]:
    """(event, data) of a stream of server-sent events."""
    parsed = []
    for block in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if line[:1] != ":")
        if "data" in fields:
            data = fields["data"]
            parsed.append((fields.get("event"), data if data == "[DONE]" else json.loads(data)))
    return parsed
