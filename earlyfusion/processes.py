"""The processes that `torchrun` started: their number, the rank of this one, how they meet.

`torchrun` keeps one key-value store through its restarts, where a new process could read the
address of a dead one of the same rank. So all keys of a start get a new prefix: the first process
draws it, and sends it to each of the others in reply to a token that only the living process of
that rank can have drawn.
"""

from __future__ import annotations

import atexit
import os
import time
from collections.abc import Callable
from typing import Any
from uuid import uuid4

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

_POLL_SECONDS = 0.02


def count() -> int:
    """The number of processes that `torchrun` started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """The number of this process, from 0."""
    return int(os.environ.get("RANK", "0"))


def join(device: torch.device) -> None:
    """Join the process group that `torchrun` describes, once."""
    if dist.is_initialized():
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    store, rank, world_size = next(rendezvous("env://"))
    prefix = _hand_out_prefix(store, world_size) if rank == 0 else _receive_prefix(store, rank)
    prefixed_store = PrefixStore(prefix, store)
    dist.init_process_group(backend, store=prefixed_store, rank=rank, world_size=world_size)
    atexit.register(_leave)


def _hand_out_prefix(store: Store, world_size: int) -> str:
    """A new prefix, once all other processes have confirmed that they have it."""
    prefix = uuid4().hex
    unconfirmed = set(range(1, world_size))
    while unconfirmed:
        for rank in sorted(unconfirmed):
            # This may be a dead process's token: then the answer is overwritten in the next round.
            token = store.get(f"token-{rank}").decode()
            store.set(f"prefix-{rank}", f"{token} {prefix}")
        unconfirmed -= {n for n in unconfirmed if _value(store, f"confirmed-{n}") == prefix}
        time.sleep(_POLL_SECONDS)
    return prefix


def _receive_prefix(store: Store, rank: int) -> str:
    """The prefix of the first process, once it replies to a token drawn here."""
    token = uuid4().hex
    store.set(f"token-{rank}", token)
    while True:
        replied_token, _, prefix = store.get(f"prefix-{rank}").decode().partition(" ")
        if replied_token == token:
            store.set(f"confirmed-{rank}", prefix)
            return prefix
        time.sleep(_POLL_SECONDS)


def _value(store: Store, key: str) -> str:
    """The value of a key; "" if it does not exist."""
    # `get` would wait for a key that does not exist.
    return store.get(key).decode() if store.check([key]) else ""


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def agree(value: Callable[[], Any]) -> Any:
    """What `value()` returns in the first process, in all of them. For what is read from a disk,
    which may show the processes different states."""
    if count() == 1:
        return value()
    values = [value() if rank() == 0 else None]
    dist.broadcast_object_list(values)
    return values[0]
