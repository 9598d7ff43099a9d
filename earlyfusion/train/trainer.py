"""The training loop of both networks, on one device.

A `Task` says what a step learns from; the loop does the rest. Every random number of step k (data
order, augmentation, dropout) follows from the seed and k alone, so that a resumed run continues
as if it had never stopped: equal losses to the bit on a CPU.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from earlyfusion.errors import CheckpointError, SettingError
from earlyfusion.train import checkpoint
from earlyfusion.train.monitor import Monitor
from earlyfusion.train.optim import OptimConfig, adamw, learning_rate


@dataclass
class RunConfig:
    """How long, where and how exactly. `precision` bf16 keeps fp32 masters and computes in bf16."""

    out: Path = Path("runs/run")
    steps: int = 1000
    seed: int = 0
    device: str = "auto"
    precision: str = "fp32"
    compile: bool = False
    save_every: int = 200
    keep: int = 2
    log_every: int = 10
    stop_after: int = 0
    """Stop at this step although the schedule goes on to `steps` (0: never)."""

    def __post_init__(self) -> None:
        self.out = Path(self.out)
        if self.precision not in ("fp32", "bf16"):
            raise SettingError(f"precision={self.precision!r} is unknown: choose fp32 or bf16")
        for name in ("steps", "save_every", "keep", "log_every"):
            if getattr(self, name) < 1:
                raise SettingError(f"{name}={getattr(self, name)} must be at least 1")


class Task(Protocol):
    """What is trained: `loss` returns the loss, named figures, and how many units it covered."""

    @property
    def model(self) -> nn.Module: ...
    def parameters(self) -> Iterator[nn.Parameter]: ...
    def loss(self, step: int) -> tuple[Tensor, dict[str, Tensor], float]: ...
    def after(self, step: int) -> dict[str, float]: ...
    def state(self) -> tuple[dict[str, Any], dict[str, Any]]: ...
    def load_state(self, tensors: dict[str, Any], state: dict[str, Any]) -> None: ...


def resolve_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(name)
    except RuntimeError:
        raise SettingError(f"device={name!r} is unknown: choose auto, cpu or cuda") from None


def train(task: Task, run: RunConfig, optim: OptimConfig) -> None:
    """Train to `run.steps`, from the newest checkpoint under `run.out` where there is one."""
    optimizer = adamw(task.parameters(), optim)
    first = _resume(task, optimizer, run, optim)
    monitor = Monitor(run.out, first, run.steps)
    last = min(run.steps, run.stop_after or run.steps)
    try:
        for step in range(first, last):
            figures = _step(task, optimizer, run, optim, step, monitor)
            if step % run.log_every == 0 or step + 1 == last:
                monitor.log(step, {k: float(v) for k, v in figures.items()})
            if (step + 1) % run.save_every == 0 or step + 1 == last:
                _save(task, optimizer, run, optim, step + 1)
    finally:
        monitor.close()


def _step(
    task: Task,
    optimizer: torch.optim.Optimizer,
    run: RunConfig,
    optim: OptimConfig,
    step: int,
    monitor: Monitor,
) -> dict[str, Any]:
    torch.manual_seed(run.seed * 1_000_003 + step)
    rate = learning_rate(optim, step, run.steps)
    for group in optimizer.param_groups:
        group["lr"] = rate
    with autocast(task.model, run.precision):
        loss, figures, units = task.loss(step)
    if not torch.isfinite(loss):
        raise SettingError(
            f"the loss of step {step} is {float(loss.detach())}: lower lr={optim.lr} and start "
            f"again from the checkpoints in {run.out}"
        )
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = nn.utils.clip_grad_norm_(list(task.parameters()), optim.clip or math.inf)
    optimizer.step()
    more = task.after(step)
    monitor.advance(step, units)
    return {"loss": loss.detach()} | figures | more | {"grad_norm": norm, "lr": rate}


def autocast(model: nn.Module, precision: str) -> contextlib.AbstractContextManager[Any]:
    device = next(model.parameters()).device.type
    return torch.autocast(device, torch.bfloat16, enabled=precision == "bf16")


def _save(
    task: Task,
    optimizer: torch.optim.Optimizer,
    run: RunConfig,
    optim: OptimConfig,
    step: int,
) -> None:
    tensors, state = task.state()
    tensors = {"model": task.model.state_dict(), "optimizer": optimizer.state_dict()} | tensors
    state |= {"run": _plain(run), "optim": _plain(optim)}
    checkpoint.save(run.out, step, tensors, state, run.keep)


def _resume(
    task: Task, optimizer: torch.optim.Optimizer, run: RunConfig, optim: OptimConfig
) -> int:
    if not checkpoint.steps(run.out):
        return 0
    tensors, state = checkpoint.load(run.out)
    changed = [k for k in ("seed", "steps") if state["run"][k] != getattr(run, k)]
    if changed or state["optim"] != _plain(optim):
        raise CheckpointError(
            f"{run.out} holds a run with another {' and '.join(changed) or 'optimizer setting'}: "
            f"give the same values or another out folder"
        )
    try:
        task.model.load_state_dict(tensors.pop("model"))
    except RuntimeError:
        raise CheckpointError(
            f"{run.out} holds a model of another shape: give the same shape or another out folder"
        ) from None
    optimizer.load_state_dict(tensors.pop("optimizer"))
    task.load_state(tensors, state)
    return int(state["step"])


def _plain(config: Any) -> dict[str, Any]:
    assert is_dataclass(config) and not isinstance(config, type)
    return {k: str(v) if isinstance(v, Path) else v for k, v in asdict(config).items()}
