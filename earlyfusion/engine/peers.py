"""Tensor-parallel generation: the group of processes that share one model, their messages and
collectives, and the two modules that contain a collective."""

from __future__ import annotations

import atexit
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from earlyfusion import processes
from earlyfusion.errors import SettingError
from earlyfusion.model.transformer import Transformer

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh as DeviceMesh

_NO_TIMEOUT = timedelta(days=365)

_STEP_TIMEOUT = timedelta(minutes=10)

_PEER_GONE = "a process that shares the model has ended: start the program again"


class Peers:
    """The processes that share a model's layers: the first leads, the others follow its messages.

    Messages are sent over the CPU (gloo), without a timeout; if a process ends, its connection
    closes, which the others notice. Each message says how many collectives (`broadcast` or
    `all_reduce`) belong to it. `collectives_left` counts down; at 0 a further collective raises
    `SettingError`, as the other processes would not take part in it.
    """

    def __init__(self, device: torch.device) -> None:
        processes.join(device)
        self.rank, self.count, self.collectives_left = dist.get_rank(), dist.get_world_size(), 0
        self.engines = 0  # made on the shared model so far
        self._messages: Any = dist.new_group(backend="gloo", timeout=_NO_TIMEOUT)
        self._collectives: Any = dist.new_group(timeout=_STEP_TIMEOUT)
        self._open, self._on_gpu = True, device.type == "cuda"
        atexit.register(self.close)

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def send(self, numbers: Sequence[int], collectives: int) -> None:
        """Send the next message, and expect its collectives. An empty message ends the others."""
        if not self._open:
            raise ConnectionError(_PEER_GONE)
        # If sending fails, the count stays above 0: the others may be waiting within a step.
        self.collectives_left = collectives + 1
        self._send(numbers)
        self.collectives_left -= 1

    def receive(self) -> list[int]:
        """The next message of the leader; empty at the end."""
        return from_tensors(lambda tensor: self._from_leader(tensor, self._messages))

    def begin(self, collectives: int) -> None:
        """Expect this many collectives: those of the message that was just received."""
        self.collectives_left = collectives

    def replay(self, collectives: int) -> None:
        """Count the collectives of a captured graph, which run without a call of this class."""
        self._count_down(collectives)

    def wait(
        self, is_done: Callable[[], bool], seconds: float = _STEP_TIMEOUT.total_seconds()
    ) -> None:
        """Return once `is_done`, when the device has finished the replayed graphs; ConnectionError
        after `seconds`.

        NCCL does not watch the collectives of a captured graph: if another process has ended, they
        stay pending forever, and the host would wait with them.
        """
        end = time.monotonic() + seconds
        while not is_done():
            if time.monotonic() > end:
                self.collectives_left = 1  # so that `close` aborts them
                raise ConnectionError(_PEER_GONE)
            time.sleep(1e-4)

    def broadcast(self, x: Tensor) -> Tensor:
        """Overwrite `x` with the leader's values, on all processes."""
        self._count_down()
        return self._from_leader(x, self._collectives)

    def all_reduce(self, x: Tensor) -> Tensor:
        """Overwrite `x` with the sum over all processes."""
        self._count_down()
        try:
            dist.all_reduce(x, group=self._collectives)
        except RuntimeError as error:
            raise ConnectionError(_PEER_GONE) from error
        return x

    def close(self) -> None:
        """End the other processes, if need be in the middle of a step."""
        if not self._open:
            return
        if self.leads and self.collectives_left == 0:
            with suppress(ConnectionError):
                self._send([])
        self._open = False
        atexit.unregister(self.close)
        dist.destroy_process_group(self._messages)
        if self.collectives_left and self._on_gpu:
            # Destroying the group would wait for pending collectives.
            self._collectives.abort()
        else:
            dist.destroy_process_group(self._collectives)
        del self._messages, self._collectives

    def _send(self, numbers: Sequence[int]) -> None:
        for tensor in to_tensors(numbers):
            self._from_leader(tensor, self._messages)

    def _from_leader(self, x: Tensor, group: Any) -> Tensor:
        try:
            dist.broadcast(x, 0, group=group)
        except RuntimeError as error:
            raise ConnectionError(_PEER_GONE) from error
        return x

    def _count_down(self, collectives: int = 1) -> None:
        if self.collectives_left < collectives:
            raise SettingError(
                f"this model is shared by {self.count} processes and cannot be called by itself: "
                "ask it through generate, stream or its engine"
            )
        self.collectives_left -= collectives


class BroadcastEmbedding(nn.Embedding):
    """The first process embeds the tokens and broadcasts the result; the others receive it."""

    pointwise = True

    def __init__(self, weight_VD: nn.Parameter, peers: Peers) -> None:
        size, width = weight_VD.shape
        super().__init__(size, width, _weight=weight_VD)
        self.weight, self.peers = weight_VD, peers

    def forward(self, tokens: Tensor) -> Tensor:
        if self.peers.leads:
            return self.peers.broadcast(F.embedding(tokens, self.weight))
        return self.peers.broadcast(self.weight.new_empty(*tokens.shape, self.embedding_dim))


class RowParallelLinear(nn.Module):
    """A linear module whose input features are split over the processes: sums their outputs."""

    pointwise = True

    def __init__(self, linear: nn.Module, peers: Peers) -> None:
        super().__init__()
        self.linear, self.peers = linear, peers

    def forward(self, x: Tensor) -> Tensor:
        return self.peers.all_reduce(self.linear(x))


def peers_of(transformer: Transformer) -> Peers | None:
    """The processes that a model is shared with; None for a model of one process."""
    embedding = transformer.model.embed_tokens
    return embedding.peers if isinstance(embedding, BroadcastEmbedding) else None


def to_tensors(numbers: Sequence[int]) -> Iterator[Tensor]:
    """The tensors of a message: its length and first numbers, padded; then the rest, if any."""
    padded = [len(numbers), *numbers, *[0] * (_FIRST_LENGTH - 1 - len(numbers))]
    message = torch.tensor(padded, dtype=torch.int64, device="cpu")
    yield message[:_FIRST_LENGTH]
    if len(padded) > _FIRST_LENGTH:
        yield message[_FIRST_LENGTH:]


def from_tensors(receive: Callable[[Tensor], Tensor]) -> list[int]:
    """The numbers of a message; `receive` fills an empty tensor with the next of its tensors."""
    first = receive(torch.empty(_FIRST_LENGTH, dtype=torch.int64, device="cpu")).tolist()
    size = first[0]
    if size < _FIRST_LENGTH:
        return first[1 : size + 1]
    rest = torch.empty(size + 1 - _FIRST_LENGTH, dtype=torch.int64, device="cpu")
    return [*first[1:], *receive(rest).tolist()]


# Numbers of the first tensor: enough for a step of some 160 rows.
_FIRST_LENGTH = 512
