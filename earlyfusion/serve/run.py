"""Run the server: socket, signals, logs."""

from __future__ import annotations

import gc
import socket
import sys
from types import FrameType

import uvicorn

from earlyfusion.api import Chameleon
from earlyfusion.errors import SettingError
from earlyfusion.serve.app import make_app
from earlyfusion.serve.logs import log_as_json
from earlyfusion.serve.options import ServeOptions
from earlyfusion.serve.replicas import Remotes
from earlyfusion.serve.service import Service

_MAX_HEADER_BYTES = 32_768
_BACKLOG = 1024
# Seconds that a thread keeps the interpreter while others wait: Python's 5 ms, once for each worker
# thread, would be most of what a client waits for a refusal.
_SWITCH_INTERVAL = 0.0005


def serve(
    model: Chameleon,
    options: ServeOptions,
    quiet: bool = False,
    remote: Remotes = None,
) -> None:
    """Answer requests until SIGTERM or Ctrl-C, then let those that run end.

    The engine runs in a thread of this process, or it is `remote`, which may be several, and
    `model` its front. Raises `SettingError` where the port is taken.
    """
    listener = listener_of(options)
    log_as_json()
    sys.setswitchinterval(_SWITCH_INTERVAL)
    app = make_app(model, options, remote)
    # Bound before the model warms up: who connects early waits instead of being refused.
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        ws="none",
        http="h11",  # httptools, which uvicorn would prefer, knows no limit of the headers
        lifespan="on",
        h11_max_incomplete_event_size=_MAX_HEADER_BYTES,
        timeout_graceful_shutdown=max(int(options.drain_seconds), 1),
    )
    server = Server(config, app.state.service, quiet)
    # A full collection looks at all objects of the imported modules, for 0.2 s and more. What is
    # there by now stays, so none needs to look at it again.
    gc.freeze()
    try:
        server.run(sockets=[listener])
    finally:
        listener.close()


class Server(uvicorn.Server):
    """uvicorn's server; a signal closes the door at once, and ends the process with 0."""

    def __init__(self, config: uvicorn.Config, service: Service, quiet: bool) -> None:
        super().__init__(config)
        self._service, self._quiet = service, quiet

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if not self._quiet and sockets and self.started:
            host, port = sockets[0].getsockname()[:2]
            host = f"[{host}]" if ":" in host else host
            name = self._service.name
            print(f"{name} is served at http://{host}:{port}/v1 (Ctrl-C ends)", flush=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # uvicorn's own would raise the signal again behind the shutdown, and so lose the exit code.
        self._service.driver.draining = True
        self.force_exit = self.should_exit
        self.should_exit = True


def listener_of(options: ServeOptions) -> socket.socket:
    """The socket on which the server listens. Raises `SettingError` where the port is taken."""
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    try:
        listener = socket.create_server(
            (options.host.strip("[]"), options.port), family=family, backlog=_BACKLOG
        )
    except OSError as error:
        raise SettingError(
            f"cannot listen on {options.host} port {options.port} ({error.strerror}): "
            "choose another with --port"
        ) from None
    # asyncio sets it only where the socket names TCP as its protocol, which this one does not. The
    # second write of a reply would wait 40 ms for the client's delayed acknowledgement.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener
