"""Starts the engine's process. Imports little: it loads while the server imports the rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from earlyfusion.api import Chameleon


@dataclass(frozen=True)
class LoadPlan:
    """How the child loads its model: arguments of `Chameleon.load`, and `--fit`."""

    name: str = "mini"
    device: str = "auto"
    dtype: str = "auto"
    verify: bool = True
    cache_bytes: int | None = None
    fit: bool | None = None
    adapters: Mapping[str, str] = field(default_factory=dict)

    def load(self) -> Chameleon:
        """The model. Raises an `EarlyFusionError`."""
        from earlyfusion.api import Chameleon

        model = Chameleon.load(
            self.name,
            self.device,
            self.dtype,
            verify=self.verify,
            cache_bytes=self.cache_bytes,
            adapters=self.adapters,
        )
        if self.fit is not None:
            model.image_tokenizer.mode = "fit" if self.fit else "crop"
        return model


def start(plan: LoadPlan) -> tuple[BaseProcess, Connection]:
    """A process that loads the model and then serves its engine (process.py), and the socket to
    it."""
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_run, args=(theirs, plan), name="engine", daemon=True)
    process.start()
    theirs.close()
    return process, ours


def _run(connection: Connection, plan: LoadPlan) -> None:
    from earlyfusion.serve.process import serve_engine

    serve_engine(connection, plan.load)
