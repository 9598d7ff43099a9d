"""The processes that `torchrun` started: how many, which this is, and how they find each other."""

from __future__ import annotations

import atexit
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh as DeviceMesh


def count() -> int:
    """How many processes `torchrun` started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def join(device: torch.device) -> None:
    """Join the group that `torchrun` names, once."""
    if dist.is_initialized():
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    store, own, count = next(rendezvous("env://"))
    start = _name_start(store, count) if own == 0 else _take_name(store, own)
    fresh = PrefixStore(start, store)
    dist.init_process_group(backend, store=fresh, rank=own, world_size=count)
    atexit.register(_leave)


def _name_start(store: Store, count: int) -> str:
    """The name of this start, once all others have it."""
    start = uuid4().hex
    missing = set(range(1, count))
    while missing:
        for other in sorted(missing):
            name = store.get(f"here-{other}").decode()
            store.set(f"start-{other}", f"{name} {start}")
        missing -= {n for n in missing if _value(store, f"heard-{n}") == start}
        time.sleep(0.02)
    return start


def _take_name(store: Store, own: int) -> str:
    name = uuid4().hex
    store.set(f"here-{own}", name)
    while True:
        asked, _, start = store.get(f"start-{own}").decode().partition(" ")
        if asked == name:
            store.set(f"heard-{own}", start)
            return start
        time.sleep(0.02)


def _value(store: Store, key: str) -> str:
    return store.get(key).decode() if store.check([key]) else ""


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def agree(value: Callable[[], Any]) -> Any:
    """What the first process finds, on all of them: disks may show others a later state."""
    if count() == 1:
        return value()
    found = [value() if rank() == 0 else None]
    dist.broadcast_object_list(found)
    return found[0]
