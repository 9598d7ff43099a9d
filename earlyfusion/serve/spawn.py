"""Starts the engine's process. Imports little, so that the process can load the model while the
server imports its modules."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING

from earlyfusion.errors import SettingError

if TYPE_CHECKING:
    from earlyfusion.api import Chameleon


@dataclass(frozen=True)
class LoadPlan:
    """How an engine's process loads the model: the arguments of `Chameleon.load`, and `fit`, which
    fits images into squares (None: the model's own way).

    The process is number `replica` of `replicas`, which share the cores of a CPU or have a GPU
    each."""

    name: str = "mini"
    device: str = "auto"
    dtype: str = "auto"
    verify: bool = True
    cache_bytes: int | None = None
    fit: bool | None = None
    adapters: Mapping[str, str] = field(default_factory=dict)
    replica: int = 0
    replicas: int = 1

    def load(self) -> Chameleon:
        """The model. Raises an `EarlyFusionError`."""
        from earlyfusion.api import Chameleon

        if self.replicas > 1:
            os.environ.setdefault("EARLYFUSION_COPY_WEIGHTS", "0")  # they share a mapped file
        model = Chameleon.load(
            self.name,
            self._device(),
            self.dtype,
            verify=self.verify,
            cache_bytes=self.cache_bytes,
            adapters=self.adapters,
        )
        if self.fit is not None:
            model.image_tokenizer.mode = "fit" if self.fit else "crop"
        on_cpu = model.image_tokenizer.device.type == "cpu"
        if self.replicas > 1 and self.cache_bytes is None and on_cpu:
            model.cache_bytes = cache_share(model, self.replicas)
        return model

    def _device(self) -> str:
        """The device of this replica. Raises `SettingError` for more replicas than GPUs."""
        if self.replicas == 1:
            return self.device
        import torch

        from earlyfusion.devices import resolve_device

        if resolve_device(self.device).type == "cpu":
            torch.set_num_threads(max(torch.get_num_threads() // self.replicas, 1))
            return self.device
        num_gpus = torch.cuda.device_count() if self.device in ("auto", "cuda") else 1
        if self.replicas > num_gpus:
            raise SettingError(
                f"replicas={self.replicas} need a GPU each, and device={self.device!r} has "
                f"{num_gpus}: use fewer"
            )
        return f"cuda:{self.replica}"


def cache_share(model: Chameleon, replicas: int) -> int:
    """The bytes of each engine's cache, where several engines share the free memory of a
    machine."""
    from earlyfusion.devices import free_bytes
    from earlyfusion.engine.cache import PagedCache, cache_dtype, cache_size
    from earlyfusion.model.kv_cache import dtype_and_device

    dtype, device = dtype_and_device(model.transformer)
    token_bytes = PagedCache.token_bytes(model.config, cache_dtype(None, dtype))
    free = free_bytes(device)
    context = model.config.max_position_embeddings
    return cache_size(token_bytes, context, device, reserved=free - free // replicas).bytes


def start(plan: LoadPlan) -> tuple[BaseProcess, Connection]:
    """Start a process that loads the model and runs its engine (process.py). Returns it with the
    socket to it."""
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_run, args=(theirs, plan), name="engine", daemon=True)
    process.start()
    theirs.close()
    return process, ours


def _run(connection: Connection, plan: LoadPlan) -> None:
    from earlyfusion.serve.process import serve_engine

    serve_engine(connection, plan.load)
