"""Engines on the machines of a Ray cluster: an actor starts each, and Ray carries the messages of
process.py. The server uses Ray in this file only.

Every machine needs this package, and the model and the adapters under the same paths.
"""

from __future__ import annotations

import pickle
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from threading import Event, Thread
from typing import Any, cast

from earlyfusion.errors import SettingError
from earlyfusion.files import expanded
from earlyfusion.serve.spawn import LoadPlan, start


def starter(replicas: int) -> Callable[[LoadPlan], tuple[BaseProcess, Connection]]:
    """A function like `spawn.start` that starts an engine on the Ray cluster at `RAY_ADDRESS`, or
    without an address on this machine. Raises `SettingError` without Ray, or if the cluster is too
    small for `replicas` engines."""
    try:
        import ray
    except ImportError:
        raise SettingError(
            "--ray needs Ray, which is not installed: pip install 'earlyfusion[ray]'"
        ) from None
    if not ray.is_initialized():
        ray.init(log_to_driver=False, logging_level="ERROR")
    resources = ray.cluster_resources()
    resource = "GPU" if resources.get("GPU", 0) else "CPU"
    if replicas > resources.get(resource, 0):
        raise SettingError(
            f"replicas={replicas} need a {resource} each, and the Ray cluster has "
            f"{int(resources.get(resource, 0))}: use fewer, or add machines"
        )
    largest = max(int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"])
    num_cpus = 1 if resource == "GPU" else max(min(int(resources["CPU"]) // replicas, largest), 1)
    actor = ray.remote(
        num_cpus=num_cpus,
        num_gpus=int(resource == "GPU"),
        # One thread per direction, so that messages stay in order.
        concurrency_groups={"to_engine": 1, "to_server": 1},
    )(_Actor)

    def start_on_cluster(plan: LoadPlan) -> tuple[BaseProcess, Connection]:
        ours, theirs = Pipe()
        engine = _RemoteProcess(ray, actor.remote(_with_absolute_paths(plan)), theirs)
        # It has those methods of a process that `RemoteEngine` calls.
        return cast(BaseProcess, engine), ours

    return start_on_cluster


def _with_absolute_paths(plan: LoadPlan) -> LoadPlan:
    """The plan for an actor: with absolute paths, as actors run in other folders, and as the only
    replica of its machine."""
    adapters = {name: str(expanded(folder).absolute()) for name, folder in plan.adapters.items()}
    model = expanded(plan.name)
    name = str(model.absolute()) if model.is_dir() else plan.name
    return replace(plan, name=name, adapters=adapters, replica=0, replicas=1)


class _Actor:
    """Starts an engine's process on its machine."""

    def __init__(self, plan: LoadPlan) -> None:
        self._process, self._connection = start(plan)

    def receive(self) -> Iterator[bytes]:
        try:
            # The `EngineInfo`. It is pickled again, as its tensors are handles of shared memory in
            # a message between processes of one machine.
            yield pickle.dumps(self._connection.recv())
            while True:
                yield self._connection.recv_bytes()
        except (EOFError, OSError):
            return

    def send(self, data: bytes) -> None:
        self._connection.send_bytes(data)


class _RemoteProcess:
    """An engine's process on an actor's machine, with the methods of a local one; two threads carry
    its messages."""

    pid, exitcode = 0, 1  # unknown here

    def __init__(self, ray: Any, actor: Any, connection: Connection) -> None:
        self._ray, self._actor, self._connection = ray, actor, connection
        self._ended = Event()
        Thread(target=self._forward_to_server, name="ray-to-server", daemon=True).start()
        Thread(target=self._forward_to_engine, name="ray-to-engine", daemon=True).start()

    def is_alive(self) -> bool:
        return not self._ended.is_set()

    def kill(self) -> None:
        self._ray.kill(self._actor)

    def join(self, timeout: float | None = None) -> None:
        self._ended.wait(timeout)

    def _forward_to_server(self) -> None:
        receive = self._actor.receive.options(
            num_returns="streaming", concurrency_group="to_server"
        )
        try:
            for message in receive.remote():
                self._connection.send_bytes(self._ray.get(message))
        except (OSError, self._ray.exceptions.RayError):
            pass  # the actor has ended, or the server has closed its end
        finally:
            self._ended.set()
            # Wakes the readers at both ends, which `close` would not.
            with socket.socket(fileno=socket.dup(self._connection.fileno())) as end:
                end.shutdown(socket.SHUT_RDWR)

    def _forward_to_engine(self) -> None:
        send = self._actor.send.options(concurrency_group="to_engine")
        try:
            while True:
                send.remote(self._connection.recv_bytes())
        except (EOFError, OSError, self._ray.exceptions.RayError):
            pass
        self._ended.wait()
        self._connection.close()
