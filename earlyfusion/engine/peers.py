"""The processes that share one model for generation: the first leads, the others follow."""

from __future__ import annotations

import atexit
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from earlyfusion import processes
from earlyfusion.errors import SettingError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh as DeviceMesh


class Peers:
    """The processes that share a model's layers: the first leads, the others do as they are told.

    What is told goes over the CPU and may be waited for as long as the leader likes; a process that
    has gone is noticed, as its connection ends. `begin` says how many collectives are part of what
    was told: outside of it they are refused, as nobody would answer.
    """

    def __init__(self, device: torch.device) -> None:
        processes.join(device)
        self.rank, self.count, self.left = dist.get_rank(), dist.get_world_size(), 0
        self.engines = 0
        self._told: Any = dist.new_group(backend="gloo", timeout=_ANY_TIME)
        self._step: Any = dist.new_group(timeout=_STEP_TIME)
        self._open, self._on_gpu = True, device.type == "cuda"
        atexit.register(self.close)

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def tell(self, numbers: Sequence[int], collectives: int) -> None:
        """Say what comes next; so many collectives belong to it. An empty message is the end."""
        if not self._open:
            raise ConnectionError(_GONE)
        self.left = collectives + 1
        self._send([len(numbers), *numbers])
        self.left -= 1

    def hear(self) -> list[int]:
        """What the leader tells; empty at the end."""
        first_M = self._pass_on(torch.empty(_MESSAGE, dtype=torch.int64, device="cpu"), self._told)
        size = int(first_M[0])
        if size < _MESSAGE:
            return first_M[1 : size + 1].tolist()
        rest = torch.empty(size + 1 - _MESSAGE, dtype=torch.int64, device="cpu")
        return [*first_M[1:].tolist(), *self._pass_on(rest, self._told).tolist()]

    def begin(self, collectives: int) -> None:
        self.left = collectives

    def share(self, x: Tensor) -> Tensor:
        """The leader's values, in place, on all."""
        self._count()
        return self._pass_on(x, self._step)

    def add_up(self, x: Tensor) -> Tensor:
        """The sum of all, in place."""
        self._count()
        try:
            dist.all_reduce(x, group=self._step)
        except RuntimeError as error:
            raise ConnectionError(_GONE) from error
        return x

    def close(self) -> None:
        """Let the others go: they end at once, or are cut off in the middle of a step."""
        if not self._open:
            return
        if self.leads and self.left == 0:
            with suppress(ConnectionError):
                self._send([0])
        self._open = False
        atexit.unregister(self.close)
        dist.destroy_process_group(self._told)
        if self.left and self._on_gpu:
            self._step.abort()  # destroying it would wait for what is under way
        else:
            dist.destroy_process_group(self._step)
        del self._told, self._step

    def _send(self, numbers: list[int]) -> None:
        padded = numbers + [0] * (_MESSAGE - len(numbers))
        message = torch.tensor(padded, dtype=torch.int64, device="cpu")
        for part in message.tensor_split([_MESSAGE]):
            if len(part):
                self._pass_on(part, self._told)

    def _pass_on(self, x: Tensor, group: Any) -> Tensor:
        try:
            dist.broadcast(x, 0, group=group)
        except RuntimeError as error:
            raise ConnectionError(_GONE) from error
        return x

    def _count(self) -> None:
        if self.left == 0:
            raise SettingError(
                f"this model is shared by {self.count} processes and cannot be called by itself: "
                "ask it through generate, stream or its engine"
            )
        self.left -= 1


_MESSAGE = 512  # numbers that are sent at once: enough for a step of some 160 rows

_ANY_TIME = timedelta(days=365)

_STEP_TIME = timedelta(minutes=10)

_GONE = "a process that shares the model has gone: start the program again"
