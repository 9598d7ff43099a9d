"""The training loop of both networks, on one device or, for a `ParallelTask`, on many.

A `Task` says what a step learns from; the loop does the rest. Every random number of step k (data
order, augmentation, dropout) follows from the seed and k alone, so that a resumed run continues
as if it had never stopped: equal losses to the bit on a CPU.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, is_dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from earlyfusion import parallel, processes
from earlyfusion.devices import dtype_name, resolve_device, torch_dtype
from earlyfusion.errors import CheckpointError, SettingError
from earlyfusion.model.transformer import Transformer
from earlyfusion.parallel import ParallelConfig
from earlyfusion.train import checkpoint
from earlyfusion.train.curves import draw_curves
from earlyfusion.train.folder import locked, say
from earlyfusion.train.monitor import Monitor, matmul_peak
from earlyfusion.train.optim import (
    Average,
    OptimConfig,
    check_warmup,
    learning_rate,
    learning_rate_at,
    optimizer_of,
    set_rate,
)
from earlyfusion.train.pace import Pace
from earlyfusion.train.validation import LOSS, Validation, best_of
from earlyfusion.train.watch import Watch, WatchConfig

if TYPE_CHECKING:
    from earlyfusion.parallel import DeviceMesh


@dataclass
class RunConfig:
    """How long, where and how exactly. `precision` bf16 keeps fp32 masters and computes in bf16."""

    out: Path = Path("runs/run")
    steps: int = 1000
    minutes: float = 0.0
    """Ends the run after so many minutes if its steps do not, and the rate follows the clock (0: no
    limit). Such a run cannot be repeated to the bit."""
    seed: int = 0
    device: str = "auto"
    precision: str = "fp32"
    compile: bool = False
    save_every: int = 200
    save_beside: bool = False
    """Write checkpoints while the training goes on."""
    keep: int = 2
    log_every: int = 10
    stop_after: int = 0
    """Stop at this step although the schedule goes on to `steps` (0: never)."""
    sample_every: int = 0
    """Steps between sample pictures and checks on held-out data (0: only at the end)."""
    wandb: bool = False
    """Log to Weights & Biases too, which must be installed."""
    peak_tflops: float = 0.0
    """What one device can do, for the share that is used (0: a product of matrices is timed)."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)

    def __post_init__(self) -> None:
        self.out = Path(self.out)
        self.precision = dtype_name("precision", self.precision, ("fp32", "bf16"))
        for name in ("steps", "save_every", "keep", "log_every"):
            if getattr(self, name) < 1:
                raise SettingError(f"{name}={getattr(self, name)} must be at least 1")
        if self.minutes < 0:
            raise SettingError(f"minutes={self.minutes} must be 0 (no limit) up")
        if self.sample_every < 0:
            raise SettingError(f"sample_every={self.sample_every} must be 0 (at the end only) up")
        if self.wandb and find_spec("wandb") is None:
            raise SettingError("wandb=true needs wandb, which is not installed: pip install wandb")


Shows = Callable[[int, Path], dict[str, float]]
"""Shows what the weights can do after so many steps: pictures into a folder, figures to log.

It may draw random numbers and finds the model in eval mode; the training does not notice.
"""


class Task(Protocol):
    """What is trained: `loss` returns the loss, named figures, and how many units it covered."""

    @property
    def model(self) -> nn.Module: ...
    def parameters(self) -> Iterator[nn.Parameter]: ...
    def loss(self, step: int) -> tuple[Tensor, dict[str, Tensor], float]: ...
    def after(self, step: int) -> dict[str, float]: ...
    def state(self) -> tuple[dict[str, Any], dict[str, Any]]: ...
    def load_state(self, tensors: dict[str, Any], state: dict[str, Any]) -> None: ...


@runtime_checkable
class ParallelTask(Protocol):
    """A `Task` for several processes: `parts` calls of `loss` make a step, and their sum its loss.

    The losses of all parts and all data ranks add up to that of the global batch. `distribute` cuts
    the model over the mesh, or leaves a copy to each process, whose gradients are averaged.
    """

    @property
    def parts(self) -> int: ...
    @property
    def flops_per_unit(self) -> float: ...
    def distribute(
        self, mesh: DeviceMesh | None, config: ParallelConfig, compiled: bool, dtype: torch.dtype
    ) -> None: ...


@runtime_checkable
class PartTask(Protocol):
    """A `Task` that may train a part of a finished model, which will be there again on a resume.

    Its checkpoints leave out frozen weights. `began_with` tells these from others
    (`checkpoint.fingerprint`); "" keeps all in the checkpoints.
    """

    @property
    def began_with(self) -> str: ...


@runtime_checkable
class PacedTask(Protocol):
    """A `Task` that changes over a run: before each step it is told the share that is done."""

    progress: float


def train(
    task: Task,
    run: RunConfig,
    optim: OptimConfig,
    shows: Shows | None = None,
    validation: Validation | None = None,
) -> None:
    """Train to `run.steps`, from the newest checkpoint under `run.out` where there is one.

    `shows` is called every `run.sample_every` steps and at the end, with the folder `samples/`.
    The weights of the best `validation` are kept in `best/`; it may end the run early.
    """
    with locked(run.out):
        training = _Training(task, run, optim, shows, validation)
        try:
            training.go_on()
        finally:
            training.close()
        if processes.rank() == 0:
            draw_curves(run.out)


class _Training:
    """A run in progress."""

    def __init__(
        self,
        task: Task,
        run: RunConfig,
        optim: OptimConfig,
        shows: Shows | None,
        validation: Validation | None,
    ) -> None:
        self.task, self.run, self.optim = task, run, optim
        self.began_with = task.began_with if isinstance(task, PartTask) else ""
        self.mesh = _spread(task, run)
        self.ranks = parallel.data_rank(self.mesh)[1]
        # Where several processes hold copies of the model, not parts of it.
        self.copies = self.mesh is not None and not _is_cut(task.model)
        self.shows = shows if processes.rank() == 0 else None
        if self.mesh is not None and (optim.kind != "adamw" or optim.average or run.minutes):
            raise SettingError(
                "kind=muon, average= and minutes= are for a single process: leave them out, or "
                "start one"
            )
        self.optimizer = optimizer_of(task.model, task.parameters(), optim)
        self.average = Average(task.model, optim.average) if optim.average else None
        self.watch = Watch(run.watch)
        self.saver = checkpoint.Saver(run.out, run.keep, run.save_beside)
        self.validation = validation
        self.best = checkpoint.Saver(best_of(run.out), 1, beside=False) if validation else None
        self._spent, self._out_of_time = 0.0, False
        self.step = self._resume()
        self.pace = Pace(run.steps, run.minutes, self._spent)
        flops = task.flops_per_unit if isinstance(task, ParallelTask) else 0.0
        device = next(task.model.parameters()).device
        peak = partial(_peak, run, device) if flops else None
        quiet = processes.rank() > 0
        self.monitor = Monitor(
            run.out,
            self.step,
            run.steps,
            wandb=run.wandb,
            quiet=quiet,
            flops=flops,
            peak=peak,
            left=self.pace.seconds_left,
        )
        if not self.step and (sentence := check_warmup(optim, run.steps)):
            self.monitor.note(0, sentence)
        if self.shows is not None and self.mesh is not None and not self.copies:
            self.monitor.note(self.step, "no samples: the model is cut over several processes")
            self.shows = None

    def go_on(self) -> None:
        run = self.run
        last = min(run.steps, run.stop_after or run.steps)
        # A run without time left takes one step all the same, so that it leaves a checkpoint.
        self._out_of_time = bool(self.step) and self.pace.is_over(self.step)
        while self.step < last and not self._has_ended:
            figures = self._step(self.step)
            if self.watch.must_roll_back:
                self._roll_back()
                continue
            self._out_of_time = self.pace.is_over(self.step + 1)
            checked = self._validate(self.step + 1 if self._out_of_time else last)
            ends = self.step + 1 == last or self._has_ended
            shown = checked | self._show(ends)
            if self.step % run.log_every == 0 or ends or shown:
                self._log(figures | shown)
            self.step += 1
            if self.step % run.save_every == 0 or ends:
                self._save()
            self.saver.poll()
        self.saver.finish()
        if self.average is not None:
            self.average.use()

    def close(self) -> None:
        self.monitor.close()

    @property
    def _has_ended(self) -> bool:
        return self._out_of_time or (self.validation is not None and self.validation.ends)

    def _validate(self, last: int) -> dict[str, float]:
        """The loss of held-out documents after this step, if it is time; the best is kept."""
        validation, done = self.validation, self.step + 1
        if validation is None or self.best is None or not validation.is_due(done, last):
            return {}
        with self.monitor.paused(), _aside(self.task.model), self._autocast():
            figures = validation.measure()
        if validation.is_best(done, figures[LOSS]):
            state = {LOSS: figures[LOSS]} | self._began()
            self.best.save(done, {"model": self._tensors()["model"]}, state)
        if validation.ends:
            self.monitor.note(
                self.step,
                f"the run ends, as {LOSS} has not fallen since step {validation.best_step}, where "
                f"it was {validation.best_loss:.4g}",
            )
        return figures

    def _show(self, ends: bool) -> dict[str, float]:
        """Samples of the weights after this step, if it is time for them."""
        done, every = self.step + 1, self.run.sample_every
        if self.shows is None or not (ends or (every and done % every == 0)):
            return {}
        folder = self.run.out / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        averaged = self.average.used() if self.average else contextlib.nullcontext()
        with self.monitor.paused(), averaged, _aside(self.task.model), self._autocast():
            return self.shows(done, folder)

    def _step(self, step: int) -> dict[str, Any]:
        # The first process draws as a single one does; the others draw masks of their own.
        torch.manual_seed(self.run.seed * 1_000_003 + step + processes.rank() * 7_919_000_003)
        rate = self._rate(step)
        set_rate(self.optimizer, rate, self.optim)
        self.optimizer.zero_grad(set_to_none=True)
        loss, figures, units = self._backward(step)
        loss = parallel.data_sum(loss, self.mesh)
        parameters = list(self.task.parameters())
        if self.copies:
            average_gradients(parameters, self.mesh)
        norm = parallel.clip_gradients(parameters, self.optim.clip or math.inf)
        more: dict[str, float] = {}
        if self.watch.judge(step, float(loss), float(norm)):
            self.optimizer.step()
            if self.average is not None:
                self.average.update()
            more = self.task.after(step)
        self.monitor.advance(step, units * self.ranks)
        told = {"skipped": self.watch.skipped} if self.watch.skipped else {}
        return {"loss": loss} | figures | more | {"grad_norm": norm, "lr": rate} | told

    def _rate(self, step: int) -> float:
        """The rate of a step; the task hears how far the run is."""
        share = self.pace.share(step)
        if isinstance(self.task, PacedTask):
            self.task.progress = share
        if self.run.minutes:
            return learning_rate_at(self.optim, step, share)
        return learning_rate(self.optim, step, self.run.steps)

    def _backward(self, step: int) -> tuple[Tensor, dict[str, Tensor], float]:
        """Gradients of all parts of a step; the sum of their losses, the mean of their figures."""
        losses, figures, units = [], [], 0.0
        count = self.task.parts if isinstance(self.task, ParallelTask) else 1
        for _ in range(count):
            with self._autocast():
                loss, found, covered = self.task.loss(step)
            # Gradients are averaged over the data ranks; the losses of these are to be added.
            (loss * self.ranks if self.ranks > 1 else loss).backward()
            losses.append(loss.detach())
            figures.append(found)
            units += covered
        if count == 1:
            return losses[0], figures[0], units
        means = {k: torch.stack([f[k].float() for f in figures]).nanmean() for k in figures[0]}
        return torch.stack(losses).sum(), means, units

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.mesh is not None and not self.copies:
            # Gathered weights are of the right kind already.
            return contextlib.nullcontext()
        return autocast(self.task.model, self.run.precision)

    def _log(self, figures: dict[str, Any]) -> None:
        known = {k: float(v) for k, v in figures.items()}
        self.monitor.log(self.step, known)
        if self.step >= self.optim.warmup_steps:
            for sentence in self.watch.signs(known):
                self.monitor.note(self.step, sentence)

    def _save(self) -> None:
        tensors, state = self.task.state()
        state |= {"run": _plain(self.run), "optim": _plain(self.optim)}
        state |= {"watch": self.watch.state(), "seconds": self.pace.seconds} | self._began()
        state |= {"averaged": self.average.count} if self.average else {}
        state |= {"ended": True} if self._has_ended else {}
        if self.validation is not None:
            state |= {"validation": self.validation.state()}
        self.saver.save(self.step, self._tensors() | tensors, state)

    def _began(self) -> dict[str, Any]:
        return {"began_with": self.began_with} if self.began_with else {}

    def _tensors(self) -> dict[str, Any]:
        model = self.task.model.state_dict()
        for name in checkpoint.frozen(self.task.model) if self.began_with else ():
            del model[name]
        averaged = {checkpoint.AVERAGE: self.average.state()} if self.average else {}
        return {"model": model, "optimizer": self.optimizer.state_dict()} | averaged

    def _resume(self) -> int:
        step, told = processes.agree(lambda: checkpoint.newest_whole(self.run.out))
        for sentence in told:
            say(sentence)
        if self.validation is not None and not processes.rank():
            checkpoint.drop_after(best_of(self.run.out), step)
        if not step:
            return 0
        state = checkpoint.load_state(self.run.out, step)
        self._check(state)
        if self.mesh is None:
            tensors, _ = checkpoint.load(self.run.out, step)
        else:
            allocate(self.optimizer)
            tensors = self._tensors() | self.task.state()[0]
            checkpoint.load_into(tensors, self.run.out, step)
        self.task.load_state(tensors, state)
        if self.mesh is None:
            _fill(self.task.model, self.optimizer, tensors, self.run.out)
        if self.average is not None:
            self.average.load_state(tensors[checkpoint.AVERAGE], int(state["averaged"]))
        self.watch.load_state(state.get("watch", {}))
        if self.validation is not None:
            self.validation.load_state(state.get("validation", {}))
        self._spent = float(state.get("seconds", 0.0))
        return int(state["step"])

    def _check(self, state: dict[str, Any]) -> None:
        names, known = ("seed", "steps", "minutes"), _plain(RunConfig()) | state["run"]
        changed = [k for k in names if known[k] != getattr(self.run, k)]
        if changed or _plain(OptimConfig()) | state["optim"] != _plain(self.optim):
            raise CheckpointError(
                f"{self.run.out} holds a run with another "
                f"{' and '.join(changed) or 'optimizer setting'}: "
                f"give the same values or another out folder"
            )
        before = state.get("began_with", "")
        if before and before != self.began_with:
            raise CheckpointError(
                f"{self.run.out} trains a part of a model whose other weights are not those given "
                "now: give the model and the part that it began with, or another out folder"
            )
        self.began_with = before  # a run whose checkpoints are whole goes on with whole ones

    def _roll_back(self) -> None:
        """To the newest checkpoint; documents that were seen since then are not seen again."""
        self.saver.finish()
        first, value = self.watch.first_bad
        there = processes.agree(lambda: checkpoint.steps(self.run.out))
        if not there or self.watch.roll_backs >= self.run.watch.max_roll_backs:
            raise SettingError(
                f"the loss of step {first} is {value:g}: lower lr={self.optim.lr} and start "
                f"again from the checkpoints in {self.run.out}"
            )
        seen = {k: v for k, v in self.task.state()[1].items() if k == "next_document"}
        watch, at = self.watch, self.step
        self.watch = Watch(self.run.watch)  # what is read from the checkpoint gives way to `watch`
        self.step = self._resume()
        self.watch = watch
        if seen:
            self.task.load_state({}, seen)
        watch.rolled_back()
        self.monitor.rewind(self.step)
        self.monitor.note(
            at, f"the loss of step {first} is {value:g}: rolled back to step {self.step}"
        )


def _spread(task: Task, run: RunConfig) -> DeviceMesh | None:
    """Put the task on all processes, and the model into memory if it has none yet."""
    device = resolve_device(run.device)
    if device.index is not None:
        torch.cuda.set_device(device)
    mesh = parallel.launch(run.parallel, device)
    several = isinstance(task, ParallelTask)
    if mesh is not None and not several:
        raise SettingError(
            f"{processes.count()} processes cannot train a {type(task).__name__}: start one"
        )
    if isinstance(task, ParallelTask):
        task.distribute(mesh, run.parallel, run.compile, torch_dtype(run.precision))
        torch.manual_seed(run.seed)
        parallel.materialize(cast(Transformer, task.model), device)
    return mesh


def _fill(model: nn.Module, optimizer: Any, tensors: dict[str, Any], run: Path) -> None:
    checkpoint.load_model(model, tensors.pop("model"), run)
    groups = {k: v for k, v in optimizer.state_dict().items() if k == "param_groups"}
    optimizer.load_state_dict(groups | tensors.pop("optimizer"))
    for parameter, moments in optimizer.state.items():
        for name, value in moments.items():
            # The fused kernel walks memory: moments must lie as their parameter does.
            if value.shape == parameter.shape and value.stride() != parameter.stride():
                moments[name] = torch.empty_like(parameter).copy_(value)


def allocate(optimizer: torch.optim.Optimizer) -> None:
    """Give Adam the moments that its first step would make, so that they can be read into."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if not optimizer.state[parameter]:
                optimizer.state[parameter] = {
                    "step": torch.zeros((), device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }


def average_gradients(parameters: list[nn.Parameter], mesh: DeviceMesh | None) -> None:
    """The mean over the data ranks, which hold copies of the parameters; in one message."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if mesh is None or not gradients:
        return
    flat = torch.cat([g.flatten() for g in gradients])
    mean = parallel.data_sum(flat, mesh) / parallel.data_rank(mesh)[1]
    for gradient, part in zip(gradients, mean.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def _is_cut(model: nn.Module) -> bool:
    return any(hasattr(p, "to_local") for p in model.parameters())


@contextlib.contextmanager
def _aside(model: nn.Module) -> Iterator[None]:
    """The model in eval mode and not compiled; modes and random numbers as before afterwards."""
    modes = {module: module.training for module in model.modules()}
    device = next(model.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        with torch.compiler.set_stance("force_eager"):
            try:
                model.eval()
                yield
            finally:
                for module, training in modes.items():
                    module.training = training


def _peak(run: RunConfig, device: torch.device) -> float:
    """Operations a second that all devices of a run could do."""
    dtype = torch_dtype(run.precision)
    return processes.count() * (run.peak_tflops * 1e12 or matmul_peak(device, dtype))


def autocast(model: nn.Module, precision: str) -> contextlib.AbstractContextManager[Any]:
    device = next(model.parameters()).device.type
    return torch.autocast(device, torch.bfloat16, enabled=precision == "bf16")


def _plain(config: Any) -> dict[str, Any]:
    assert is_dataclass(config) and not isinstance(config, type)
    return {k: str(v) if isinstance(v, Path) else v for k, v in asdict(config).items()}
