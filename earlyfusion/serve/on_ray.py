"""Engines on the machines of a Ray cluster: an actor starts each, and Ray carries the messages of
process.py. The only owner of Ray in the server.

Every machine must have this package, and see the model and the adapters under the same paths.
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
    """A function like `spawn.start` that starts an engine on the cluster at `RAY_ADDRESS`; without
    an address, on this machine. Raises `SettingError` without Ray, or if the cluster is too small.
    """
    try:
        import ray
    except ImportError:
        raise SettingError(
            "--ray needs Ray, which is not installed: pip install 'earlyfusion[ray]'"
        ) from None
    if not ray.is_initialized():
        ray.init(log_to_driver=False, logging_level="ERROR")
    found = ray.cluster_resources()
    resource = "GPU" if found.get("GPU", 0) else "CPU"
    if replicas > found.get(resource, 0):
        raise SettingError(
            f"replicas={replicas} need a {resource} each, and the Ray cluster has "
            f"{int(found.get(resource, 0))}: use fewer, or add machines"
        )
    largest = max(int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"])
    share = 1 if resource == "GPU" else max(min(int(found["CPU"]) // replicas, largest), 1)
    actor = ray.remote(
        num_cpus=share,
        num_gpus=int(resource == "GPU"),
        # One thread per direction, so that messages stay in order.
        concurrency_groups={"there": 1, "back": 1},
    )(_Actor)

    def start_there(plan: LoadPlan) -> tuple[BaseProcess, Connection]:
        ours, theirs = Pipe()
        engine = _RemoteProcess(ray, actor.remote(_for_any_folder(plan)), theirs)
        # It has the methods of a process that `RemoteEngine` uses.
        return cast(BaseProcess, engine), ours

    return start_there


def _for_any_folder(plan: LoadPlan) -> LoadPlan:
    """The plan with absolute paths, as actors run in other folders, and without other replicas on
    the machine."""
    adapters = {name: str(expanded(folder).absolute()) for name, folder in plan.adapters.items()}
    model = expanded(plan.name)
    name = str(model.absolute()) if model.is_dir() else plan.name
    return replace(plan, name=name, adapters=adapters, replica=0, replicas=1)


class _Actor:
    """Starts an engine's process on its machine."""

    def __init__(self, plan: LoadPlan) -> None:
        self._process, self._connection = start(plan)

    def listen(self) -> Iterator[bytes]:
        try:
            # The model's front: between processes of one machine its tensors are shared memory.
            yield pickle.dumps(self._connection.recv())
            while True:
                yield self._connection.recv_bytes()
        except (EOFError, OSError):
            return

    def tell(self, data: bytes) -> None:
        self._connection.send_bytes(data)


class _RemoteProcess:
    """An engine's process on an actor's machine; two threads carry its messages."""

    pid, exitcode = 0, 1

    def __init__(self, ray: Any, actor: Any, connection: Connection) -> None:
        self._ray, self._actor, self._connection = ray, actor, connection
        self._over = Event()
        Thread(target=self._carry_back, name="ray-back", daemon=True).start()
        Thread(target=self._carry_there, name="ray-there", daemon=True).start()

    def is_alive(self) -> bool:
        return not self._over.is_set()

    def kill(self) -> None:
        self._ray.kill(self._actor)

    def join(self, timeout: float | None = None) -> None:
        self._over.wait(timeout)

    def _carry_back(self) -> None:
        listen = self._actor.listen.options(num_returns="streaming", concurrency_group="back")
        try:
            for message in listen.remote():
                self._connection.send_bytes(self._ray.get(message))
        except (OSError, self._ray.exceptions.RayError):
            pass  # the actor has ended, or the server has closed its end
        finally:
            self._over.set()
            # Wakes the readers at both ends; `close` would not.
            with socket.socket(fileno=socket.dup(self._connection.fileno())) as end:
                end.shutdown(socket.SHUT_RDWR)

    def _carry_there(self) -> None:
        tell = self._actor.tell.options(concurrency_group="there")
        try:
            while True:
                tell.remote(self._connection.recv_bytes())
        except (EOFError, OSError, self._ray.exceptions.RayError):
            pass
        self._over.wait()
        self._connection.close()
