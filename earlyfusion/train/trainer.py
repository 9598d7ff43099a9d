"""The training loop of both networks, on one device or on many.

A `Task` has the network, its data and its loss; the loop does the rest. Every random number of step
k (order of the data, augmentation, dropout) depends only on the seed and k, so a resumed run
continues as if it had never stopped: on a CPU its losses are equal to the bit.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, is_dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from earlyfusion import parallel, processes
from earlyfusion.devices import dtype_name, freed_memory_kept, resolve_device, torch_dtype
from earlyfusion.errors import CheckpointError, SettingError
from earlyfusion.fields import check_at_least
from earlyfusion.parallel import ParallelConfig
from earlyfusion.train import checkpoint
from earlyfusion.train.curves import draw_curves
from earlyfusion.train.folder import locked, say
from earlyfusion.train.monitor import Monitor, matmul_peak
from earlyfusion.train.optim import (
    OptimConfig,
    WeightAverage,
    allocate_moments,
    build_optimizer,
    check_warmup,
    learning_rate,
    learning_rate_at,
    load_optimizer,
    set_rate,
)
from earlyfusion.train.pace import Pace
from earlyfusion.train.task import Task
from earlyfusion.train.validation import LOSS, Validation, best_folder
from earlyfusion.train.watch import Watch, WatchConfig

if TYPE_CHECKING:
    from earlyfusion.parallel import DeviceMesh


@dataclass
class RunConfig:
    """How long a run trains, where, and in which precision. With `precision` bf16 the weights stay
    fp32 and the computation is in bf16."""

    out: Path = Path("runs/run")
    """Folder of the run."""
    steps: int = 1000
    """Optimizer steps of the whole run."""
    minutes: float = 0.0
    """Ends the run after this many minutes unless its steps end it first; the rate follows the
    clock (0: no limit). Such a run cannot be repeated to the bit."""
    seed: int = 0
    """All random numbers of the run follow from it."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:1."""
    precision: str = "fp32"
    """fp32, or bf16: computes in bf16, with fp32 weights."""
    compile: bool = False
    """Compile each block with torch.compile."""
    save_every: int = 200
    """Steps between checkpoints."""
    save_beside: bool = False
    """Write checkpoints in the background, while the training continues."""
    keep: int = 2
    """Number of newest checkpoints that are kept."""
    log_every: int = 10
    """Steps between rows of `metrics.jsonl`."""
    stop_after: int = 0
    """Stop at this step, with the schedule of a run to `steps` (0: never)."""
    sample_every: int = 0
    """Steps between sample images and checks on held-out data (0: only at the end)."""
    wandb: bool = False
    """Log to Weights & Biases too, which must be installed."""
    peak_tflops: float = 0.0
    """Peak of one device, of which `mfu` is the share (0: a product of matrices is timed)."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)

    def __post_init__(self) -> None:
        self.out = Path(self.out)
        self.precision = dtype_name("precision", self.precision, ("fp32", "bf16"))
        check_at_least(self, steps=1, save_every=1, keep=1, log_every=1)
        if not 0 <= self.seed < 2**63:
            raise SettingError(f"seed={self.seed} must be a whole number from 0 to 2^63 - 1")
        if self.minutes < 0:
            raise SettingError(f"minutes={self.minutes} must be 0 (no limit) or more")
        if self.sample_every < 0:
            raise SettingError(
                f"sample_every={self.sample_every} must be 0 (only at the end) or more"
            )
        if self.wandb and find_spec("wandb") is None:
            raise SettingError("wandb=true needs wandb, which is not installed: pip install wandb")


GenerateSamples = Callable[[int, Path], dict[str, float]]
"""Called with the number of steps done and a folder: writes sample images into the folder, and
returns metrics to log. The model is in eval mode meanwhile, and random numbers that it uses do not
change those of the training."""


def train(
    task: Task,
    run: RunConfig,
    optim: OptimConfig,
    generate_samples: GenerateSamples | None = None,
    validation: Validation | None = None,
) -> None:
    """Train to `run.steps`, from the newest checkpoint under `run.out` if there is one.

    `generate_samples` is called every `run.sample_every` steps and at the end, with the folder
    `samples/`. The weights with the lowest loss in `validation` are kept in `best/`; `validation`
    may also end the run early. Raises `CheckpointError` if the run cannot be continued with these
    settings, and `SettingError` if settings do not go together or the loss diverges.
    """
    with locked(run.out), freed_memory_kept():
        training = _Training(task, run, optim, generate_samples, validation)
        try:
            training.loop()
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
        generate_samples: GenerateSamples | None,
        validation: Validation | None,
    ) -> None:
        self.task, self.run, self.optim = task, run, optim
        self.mesh = _distribute(task, run)
        self.data_ranks = parallel.data_rank(self.mesh)[1]
        # Several processes hold either copies of the model or a shard of it each.
        self.is_sharded = self.mesh is not None and _is_sharded(task.model)
        self.is_replicated = self.mesh is not None and not self.is_sharded
        if self.mesh is not None and (optim.average or run.minutes):
            raise SettingError(
                "average= and minutes= are for a single process: leave them out, or start one"
            )
        self.optimizer = build_optimizer(task.model, task.parameters(), optim)
        self.average = WeightAverage(task.model, optim.average) if optim.average else None
        self.watch = Watch(run.watch)
        self.saver = checkpoint.Saver(run.out, run.keep, run.save_beside)
        self.validation = validation
        self.best_saver = (
            checkpoint.Saver(best_folder(run.out), 1, in_background=False) if validation else None
        )
        self.frozen_fingerprint = task.frozen_fingerprint
        self._out_of_time = False
        state = self._restore()
        self.step = int(state.get("step", 0))
        self.watch.load_state(state.get("watch", {}))
        self.pace = Pace(run.steps, run.minutes, float(state.get("seconds", 0.0)))
        self.monitor = self._start_monitor()
        self.generate_samples = generate_samples if processes.rank() == 0 else None
        self._note_ineffective_settings()

    def loop(self) -> None:
        """Train to the last step, or until `minutes` or the validation end the run."""
        run = self.run
        last = min(run.steps, run.stop_after or run.steps)
        # A new run takes one step even if no time is left, so that it leaves a checkpoint.
        self._out_of_time = bool(self.step) and self.pace.is_over(self.step)
        while self.step < last and not self._has_ended:
            metrics = self._train_step(self.step)
            if self.watch.must_roll_back:
                self._roll_back()
                continue
            self._out_of_time = self.pace.is_over(self.step + 1)
            evaluation = self._validate(self.step + 1 if self._out_of_time else last)
            is_last = self.step + 1 == last or self._has_ended
            evaluation |= self._sample(is_last)
            if self.step % run.log_every == 0 or is_last or evaluation:
                self._log(metrics | evaluation)
            if is_last and self.watch.in_row:
                self.monitor.note(self.step, self.watch.skipped_at_end())
            self.step += 1
            if self.step % run.save_every == 0 or is_last:
                self._save()
            self.saver.poll()
        self.saver.finish()
        if self.average is not None:
            self.average.apply()

    def close(self) -> None:
        self.monitor.close()

    @property
    def _has_ended(self) -> bool:
        """Whether `minutes` or the validation have ended the run before its last step."""
        return self._out_of_time or (self.validation is not None and self.validation.ends_run)

    def _start_monitor(self) -> Monitor:
        run, flops = self.run, self.task.flops_per_unit
        device = next(self.task.model.parameters()).device
        return Monitor(
            run.out,
            self.step,
            run.steps,
            wandb=run.wandb,
            quiet=processes.rank() > 0,
            flops=flops,
            peak=partial(_peak_flops, run, device) if flops else None,
            seconds_left=self.pace.seconds_left,
        )

    def _note_ineffective_settings(self) -> None:
        """Print a note about settings that have no effect in this run."""
        if not self.step and (sentence := check_warmup(self.optim, self.run.steps)):
            self.monitor.note(0, sentence)
        if self.generate_samples is not None and self.is_sharded:
            self.monitor.note(self.step, "no samples: the model is split over several processes")
            self.generate_samples = None

    # ---- one step

    def _train_step(self, step: int) -> dict[str, Any]:
        """Change the weights by one step, unless it is bad (`watch`). Returns the metrics of the
        step."""
        # The first process has the seed of a single process; others get other dropout masks.
        torch.manual_seed(self.run.seed * 1_000_003 + step + processes.rank() * 7_919_000_003)
        self.task.progress = self.pace.share(step)
        rate = self._rate(step)
        set_rate(self.optimizer, rate, self.optim)
        self.optimizer.zero_grad(set_to_none=True)
        loss, metrics, units = self._backward(step)
        loss = parallel.data_sum(loss, self.mesh)
        parameters = list(self.task.parameters())
        if self.is_replicated:
            parallel.average_gradients(parameters, self.mesh)
        norm = parallel.clip_gradients(parameters, self.optim.clip or math.inf)
        task_metrics: dict[str, float] = {}
        if self.watch.accepts(step, float(loss), float(norm)):
            self.optimizer.step()
            if self.average is not None:
                self.average.update()
            task_metrics = self.task.after(step)
        self.monitor.advance(step, units * self.data_ranks)
        skipped = {"skipped": self.watch.skipped} if self.watch.skipped else {}
        return {"loss": loss} | metrics | task_metrics | {"grad_norm": norm, "lr": rate} | skipped

    def _rate(self, step: int) -> float:
        """The learning rate of a step."""
        if self.run.minutes:
            return learning_rate_at(self.optim, step, self.task.progress)
        return learning_rate(self.optim, step, self.run.steps)

    def _backward(self, step: int) -> tuple[Tensor, dict[str, Tensor], float]:
        """Compute the gradients of all micro batches. Returns the sum of their losses, the mean of
        their metrics, and the number of their units (tokens or images)."""
        losses, metrics, units = [], [], 0.0
        for _ in range(self.task.micro_batches):
            with self._autocast():
                loss, micro_metrics, micro_units = self.task.loss(step)
            # FSDP averages gradients over the data ranks, but their losses must be added up.
            (loss * self.data_ranks if self.data_ranks > 1 else loss).backward()
            losses.append(loss.detach())
            metrics.append(micro_metrics)
            units += micro_units
        if len(losses) == 1:
            return losses[0], metrics[0], units
        # A micro batch without images has NaN as the loss of images.
        means = {k: torch.stack([m[k].float() for m in metrics]).nanmean() for k in metrics[0]}
        return torch.stack(losses).sum(), means, units

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.is_sharded:  # FSDP gathers the weights in the dtype of the computation
            return contextlib.nullcontext()
        return autocast(self.task.model, self.run.precision)

    # ---- after some of the steps

    def _validate(self, last: int) -> dict[str, float]:
        """Measure the loss of held-out documents, if a check is due, and keep the weights if it is
        the lowest so far. Returns the metrics. `last` is the last step of the run."""
        validation, done = self.validation, self.step + 1
        if validation is None or self.best_saver is None or not validation.is_due(done, last):
            return {}
        with self.monitor.paused(), _evaluating(self.task.model), self._autocast():
            metrics = validation.measure()
        if validation.record(done, metrics[LOSS]):
            state = {LOSS: metrics[LOSS]} | self._frozen_state()
            self.best_saver.save(done, {"model": self._tensors()["model"]}, state)
        if validation.ends_run:
            self.monitor.note(
                self.step,
                f"the run ends, as {LOSS} has not fallen since step {validation.best_step}, where "
                f"it was {validation.best_loss:.4g}",
            )
        return metrics

    def _sample(self, is_last: bool) -> dict[str, float]:
        """Generate samples with the present weights, if they are due. Returns their metrics."""
        done, every = self.step + 1, self.run.sample_every
        if self.generate_samples is None or not (is_last or (every and done % every == 0)):
            return {}
        folder = self.run.out / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        averaged = self.average.applied() if self.average else contextlib.nullcontext()
        with self.monitor.paused(), averaged, _evaluating(self.task.model), self._autocast():
            return self.generate_samples(done, folder)

    def _log(self, metrics: dict[str, Any]) -> None:
        values = {k: float(v) for k, v in metrics.items()}
        self.monitor.log(self.step, values)
        if self.step >= self.optim.warmup_steps:
            for sentence in self.watch.growth_notes(values):
                self.monitor.note(self.step, sentence)

    # ---- checkpoints

    def _save(self) -> None:
        """Write the checkpoint of the steps so far."""
        tensors, state = self.task.state()
        state |= {"run": _as_json(self.run), "optim": _as_json(self.optim)}
        state |= {"watch": self.watch.state(), "seconds": self.pace.seconds}
        state |= self._frozen_state()
        state |= {"averaged": self.average.count} if self.average else {}
        state |= {"ended": True} if self._has_ended else {}
        if self.validation is not None:
            state |= {"validation": self.validation.state()}
        self.saver.save(self.step, self._tensors() | tensors, state)

    def _frozen_state(self) -> dict[str, Any]:
        return {"began_with": self.frozen_fingerprint} if self.frozen_fingerprint else {}

    def _tensors(self) -> dict[str, Any]:
        """Tensors of model and optimizer for a checkpoint, without frozen weights that it omits."""
        model = self.task.model.state_dict()
        for name in checkpoint.frozen_names(self.task.model) if self.frozen_fingerprint else ():
            del model[name]
        averaged = {checkpoint.AVERAGE: self.average.state()} if self.average else {}
        return {"model": model, "optimizer": self.optimizer.state_dict()} | averaged

    def _restore(self) -> dict[str, Any]:
        """Set model, optimizer and task to the newest checkpoint. Returns its state; {} if there is
        no checkpoint."""
        step, sentences = processes.agree(lambda: checkpoint.newest_undamaged(self.run.out))
        for sentence in sentences:
            say(sentence)
        if self.validation is not None and not processes.rank():
            checkpoint.drop_after(best_folder(self.run.out), step)
        if not step:
            return {}
        state = checkpoint.load_state(self.run.out, step)
        self._check_same_run(state)
        if self.mesh is None:
            tensors, _ = checkpoint.load(self.run.out, step)
        else:
            allocate_moments(self.optimizer)
            tensors = self._tensors() | self.task.state()[0]
            checkpoint.load_into(tensors, self.run.out, step)
        self.task.load_state(tensors, state)
        if self.mesh is None:
            checkpoint.load_model(self.task.model, tensors["model"], self.run.out)
            load_optimizer(self.optimizer, tensors["optimizer"])
        if self.average is not None:
            self.average.load_state(tensors[checkpoint.AVERAGE], int(state["averaged"]))
        if self.validation is not None:
            self.validation.load_state(state.get("validation", {}))
        return state

    def _check_same_run(self, state: dict[str, Any]) -> None:
        """Raise `CheckpointError` if a checkpoint's run had other settings or frozen weights."""
        # A run of an older version lacks newer fields: it had their defaults.
        saved = _fixed_settings(
            _as_json(RunConfig()) | state["run"], _as_json(OptimConfig()) | state["optim"]
        )
        current = _fixed_settings(_as_json(self.run), _as_json(self.optim))
        changed = [f"{k}={saved.get(k)} (not {v})" for k, v in current.items() if saved.get(k) != v]
        if changed:
            raise CheckpointError(
                f"{self.run.out} holds a run with other settings: give {', '.join(changed)}, or "
                "another out folder"
            )
        saved_fingerprint = state.get("began_with", "")
        if saved_fingerprint and saved_fingerprint != self.frozen_fingerprint:
            raise CheckpointError(
                f"{self.run.out} trains a part of a model whose other weights are not those given "
                "now: give the model and the part that it began with, or another out folder"
            )
        # A run that began with whole checkpoints goes on writing whole checkpoints.
        self.frozen_fingerprint = saved_fingerprint

    def _roll_back(self) -> None:
        """Return to the newest checkpoint. Data seen since then is skipped. Raises `SettingError`
        if there is no checkpoint, or if the run has been rolled back too often."""
        self.saver.finish()
        first, value = self.watch.first_bad
        saved_steps = processes.agree(lambda: checkpoint.steps(self.run.out))
        if not saved_steps or self.watch.roll_backs >= self.run.watch.max_roll_backs:
            raise SettingError(
                f"the loss of step {first} is {value:g}: lower lr={self.optim.lr} and start "
                f"again from the checkpoints in {self.run.out}"
            )
        data_state, bad_step = self.task.state()[1], self.step
        self.step = int(self._restore()["step"])
        self.task.skip_to(data_state)
        # `watch` is not restored, as it counts the roll-backs.
        self.watch.count_roll_back()
        self.monitor.rewind(self.step)
        self.monitor.note(
            bad_step, f"the loss of step {first} is {value:g}: rolled back to step {self.step}"
        )


def _distribute(task: Task, run: RunConfig) -> DeviceMesh | None:
    """Put the task on all processes, and the model into memory if it is not there yet."""
    device = resolve_device(run.device)
    if device.index is not None:
        torch.cuda.set_device(device)
    mesh = parallel.launch(run.parallel, device)
    task.distribute(mesh, run.parallel, run.compile, torch_dtype(run.precision))
    torch.manual_seed(run.seed)
    task.materialize(device)
    return mesh


def _is_sharded(model: nn.Module) -> bool:
    return any(hasattr(p, "to_local") for p in model.parameters())


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Within the block the model is uncompiled and in eval mode. Afterwards its modes and torch's
    random number generators are as before."""
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


def _peak_flops(run: RunConfig, device: torch.device) -> float:
    """Floating-point operations per second that all devices of a run can do together."""
    dtype = torch_dtype(run.precision)
    return processes.count() * (run.peak_tflops * 1e12 or matmul_peak(device, dtype))


def autocast(model: nn.Module, precision: str) -> contextlib.AbstractContextManager[Any]:
    """Within the block, products are computed in bf16 if `precision` is "bf16"."""
    device = next(model.parameters()).device.type
    return torch.autocast(device, torch.bfloat16, enabled=precision == "bf16")


def _fixed_settings(run: dict[str, Any], optim: dict[str, Any]) -> dict[str, Any]:
    """The settings that must not change when a run continues."""
    return {f"run.{k}": run[k] for k in ("seed", "steps", "minutes")} | {
        f"optim.{k}": value for k, value in optim.items()
    }


def _as_json(config: Any) -> dict[str, Any]:
    assert is_dataclass(config) and not isinstance(config, type)
    return {k: str(v) if isinstance(v, Path) else v for k, v in asdict(config).items()}
