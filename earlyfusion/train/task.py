"""The interface between the training loop (`train/trainer.py`) and a network. A new kind of
training is a subclass of `Task` with a `model` and a `loss`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from earlyfusion import processes
from earlyfusion.errors import SettingError
from earlyfusion.parallel import ParallelConfig

if TYPE_CHECKING:
    from earlyfusion.parallel import DeviceMesh


class Task:
    """A network, its data and its loss, and the state of them that a checkpoint must hold."""

    model: nn.Module
    progress: float = 0.0
    """The share of the run that is done, set by the loop before each step."""

    def loss(self, step: int) -> tuple[Tensor, dict[str, Tensor], float]:
        """The loss of a micro batch, metrics to log, and its number of units (tokens or images).
        The losses of all micro batches and all data ranks add up to the loss of the step."""
        raise NotImplementedError

    @property
    def micro_batches(self) -> int:
        """How many calls of `loss` make a step."""
        return 1

    @property
    def flops_per_unit(self) -> float:
        """Floating-point operations that training takes per unit; 0 if unknown."""
        return 0.0

    @property
    def frozen_fingerprint(self) -> str:
        """The `checkpoint.fingerprint` of frozen weights, which checkpoints then omit; "" to save
        all weights."""
        return ""

    def parameters(self) -> Iterator[nn.Parameter]:
        """All parameters that the optimizer may change."""
        return self.model.parameters()

    def distribute(
        self, mesh: DeviceMesh | None, config: ParallelConfig, compiled: bool, dtype: torch.dtype
    ) -> None:
        """Shard the model over the mesh, or keep a copy in each process; the loop averages the
        gradients of copies. `compiled` compiles it, `dtype` is that of the computation. This
        default raises `SettingError` if there is a mesh, i.e. several processes."""
        if mesh is not None:
            raise SettingError(
                f"{processes.count()} processes cannot train a {type(self).__name__}: start one"
            )

    def materialize(self, device: torch.device) -> None:
        """Give a model on the meta device memory and first weights; other models do not change."""

    def after(self, step: int) -> dict[str, float]:
        """Called after each optimizer step, except for bad ones; returns more metrics to log."""
        return {}

    def state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Tensors, and JSON values, that a checkpoint holds besides model and optimizer."""
        return {}, {}

    def load_state(self, tensors: dict[str, Any], state: dict[str, Any]) -> None:
        """Restore what `state` returned."""

    def skip_to(self, state: dict[str, Any]) -> None:
        """Skip the data that was used up to `state`, the JSON values that `state()` returned."""
