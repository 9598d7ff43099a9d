"""Runs the server: socket, signals, logs."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import socket
import sys
from importlib.util import find_spec
from types import FrameType
from typing import Literal

import uvicorn

from earlyfusion.api import Chameleon
from earlyfusion.errors import SettingError
from earlyfusion.serve.app import make_app
from earlyfusion.serve.logs import log_as_json
from earlyfusion.serve.options import MAX_HEAD_BYTES, ServeOptions
from earlyfusion.serve.replicas import Remotes
from earlyfusion.serve.service import Service

_BACKLOG = 1024
# Seconds that a thread keeps the interpreter lock while others wait for it. With Python's 5 ms, a
# client that is refused would mostly wait for the worker threads.
_SWITCH_INTERVAL = 0.0005


def serve(
    model: Chameleon,
    options: ServeOptions,
    quiet: bool = False,
    remote: Remotes = None,
) -> None:
    """Answer requests until SIGTERM or Ctrl-C, then finish those that run.

    The engine runs in a thread of this process, unless `remote` is one engine or several in other
    processes; `model` is then that of one's `EngineInfo`. `quiet` prints no line at the start.
    Raises `SettingError` if the port is taken.
    """
    listener = listener_of(options)
    log_as_json()
    sys.setswitchinterval(_SWITCH_INTERVAL)
    app = make_app(model, options, remote)
    # Bound before the model warms up, so that early clients wait instead of being refused.
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        ws="none",
        http=http_parser(),
        h11_max_incomplete_event_size=MAX_HEAD_BYTES,
        lifespan="on",
        timeout_graceful_shutdown=max(int(options.drain_seconds), 1),
    )
    server = Server(config, app.state.service, quiet)
    # A full garbage collection visits all objects of the imported modules, which takes 0.2 s or
    # more. They live as long as the process, so exclude them from now on.
    gc.freeze()
    try:
        server.run(sockets=[listener])
    finally:
        listener.close()


def http_parser() -> type[asyncio.Protocol] | Literal["h11"]:
    """uvicorn's HTTP parser: httptools, or h11, which is in Python, if that is not installed."""
    if find_spec("httptools") is None:
        return "h11"
    from earlyfusion.serve.http import LimitedHttp

    return LimitedHttp


class Server(uvicorn.Server):
    """uvicorn's server. A signal stops admission at once; when all requests are answered, the
    process exits with 0. A second signal ends the running requests with an error, and a third one
    does not wait until their clients have it."""

    def __init__(self, config: uvicorn.Config, service: Service, quiet: bool) -> None:
        super().__init__(config)
        self._service, self._quiet, self._is_aborting = service, quiet, False
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        if not self._quiet and sockets and self.started:
            host, port = sockets[0].getsockname()[:2]
            host = f"[{host}]" if ":" in host else host
            name = self._service.name
            print(f"{name} is served at http://{host}:{port}/v1 (Ctrl-C ends)", flush=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # uvicorn's own method raises the signal again after the shutdown, which changes the exit
        # code.
        driver = self._service.driver
        if self._is_aborting:
            logging.getLogger("uvicorn.error").disabled = True  # it logs each cancelled request
            self.force_exit = True
        elif self.should_exit and self._loop is not None:
            self._is_aborting = True
            self._loop.call_soon_threadsafe(driver.abort)
        driver.draining = self.should_exit = True


def listener_of(options: ServeOptions) -> socket.socket:
    """The socket on which the server listens. Raises `SettingError` if the port is taken."""
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    try:
        listener = socket.create_server(
            (options.host.strip("[]"), options.port), family=family, backlog=_BACKLOG
        )
    except OSError as error:
        raise SettingError(
            f"cannot listen on {options.host} port {options.port} ({_reason(error)}): "
            "choose another with --port"
        ) from None
    # Without it, the second write of a reply waits 40 ms for the client's delayed acknowledgement.
    # asyncio sets it only for sockets made with TCP as their protocol, which this one is not.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def _reason(error: OSError) -> str:
    """The text of an error, without the address that Python appends to some."""
    if isinstance(error, socket.gaierror) or error.errno is None:
        return str(error.strerror)
    return os.strerror(error.errno)
