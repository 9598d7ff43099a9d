"""Optimizer and learning rate (arXiv 2405.09818, section 2.3: AdamW, warm-up, decay, clip). Also
Muon for the matrices of the blocks (Jordan et al. 2024: a step is the momentum made nearly
orthogonal), and a moving average of the weights."""

# Shapes: N matrices of one shape, R rows, C columns.

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from earlyfusion import parallel
from earlyfusion.errors import SettingError
from earlyfusion.fields import check_at_least, check_shares

OPTIMIZERS = ("adamw", "muon")


@dataclass
class OptimConfig:
    """Optimizer and learning rate; the defaults are the paper's. Raises `SettingError`."""

    lr: float = 1e-4
    """Peak learning rate."""
    beta1: float = 0.9
    """AdamW: decay per step of the running mean of gradients."""
    beta2: float = 0.95
    """AdamW: decay per step of the running mean of squared gradients."""
    eps: float = 1e-5
    """AdamW: added to the root of the mean squared gradient."""
    weight_decay: float = 0.1
    """Decoupled, as in AdamW."""
    warmup_steps: int = 4000
    """Steps in which the learning rate rises linearly to `lr`."""
    decay: str = "exponential"
    """How the rate falls after the warm-up: exponential, cosine, linear, constant (not at all), or
    hold (constant, and linear in the last 30%)."""
    final_ratio: float = 0.01
    """The learning rate at the end, as a share of `lr`."""
    clip: float = 1.0
    """The gradient norm above which gradients are scaled down; 0: none."""
    kind: str = "adamw"
    """"adamw", or "muon": the matrices of the blocks by Muon, all else by AdamW."""
    muon_lr: float = 0.02
    """The highest rate of Muon; it rises and falls as `lr` does."""
    average: float = 0.0
    """Decay of the moving average of the weights per step; 0: no average."""

    def __post_init__(self) -> None:
        if self.kind not in OPTIMIZERS:
            raise SettingError(f"kind={self.kind!r} is unknown: choose {' or '.join(OPTIMIZERS)}")
        if self.decay not in _DECAYS:
            raise SettingError(f"decay={self.decay!r} is unknown: choose one of {sorted(_DECAYS)}")
        # An eps of 0 would make 0 / 0 of a weight whose gradient is 0.
        for name in ("lr", "muon_lr", "eps"):
            if getattr(self, name) <= 0:
                raise SettingError(f"{name}={getattr(self, name)} must be positive")
        if not 0 < self.final_ratio <= 1:
            raise SettingError(
                f"final_ratio={self.final_ratio} must be a share above 0 and at most 1"
            )
        check_at_least(self, warmup_steps=0, weight_decay=0, clip=0)
        check_shares(self, "beta1", "beta2", "average", below_one=True)


def check_warmup(config: OptimConfig, steps: int) -> str:
    """A sentence to print if the warm-up takes the whole run, so that the rate does not decay; else
    ""."""
    if config.warmup_steps < steps:
        return ""
    final_rate = learning_rate(config, steps - 1, steps)
    return (
        f"warmup_steps={config.warmup_steps} takes all of steps={steps}: the rate ends at "
        f"{final_rate:.2g} and does not decay, so give warmup_steps={steps // 10}, or raise steps"
    )


_DECAYS: dict[str, Callable[[float, float], float]] = {
    "exponential": lambda share, floor: floor**share,
    "cosine": lambda share, floor: floor + (1 - floor) * (1 + math.cos(math.pi * share)) / 2,
    "linear": lambda share, floor: 1 + (floor - 1) * share,
    "constant": lambda share, floor: 1.0,
    # Constant for seven tenths, then linear to the end: a run may be prolonged before the decay.
    "hold": lambda share, floor: 1.0 if share < 0.7 else floor + (1 - floor) * (1 - share) / 0.3,
}


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """The rate of step `step` (from 0) of a run of `steps` steps."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    share = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    return config.lr * _DECAYS[config.decay](min(1.0, share), config.final_ratio)


def learning_rate_at(config: OptimConfig, step: int, share: float) -> float:
    """The rate of step `step` (from 0) at `share` of a run whose number of steps is unknown. The
    warm-up follows the steps, the decay follows the share; the lower of the two rates is taken."""
    warmup = min(1.0, (step + 1) / max(1, config.warmup_steps))
    return config.lr * min(warmup, _DECAYS[config.decay](min(1.0, share), config.final_ratio))


def build_optimizer(
    model: nn.Module, parameters: Iterable[nn.Parameter], config: OptimConfig
) -> Any:
    """The optimizer of a run: AdamW, or Muon for the matrices in the blocks of `model` and AdamW
    for all else. Raises `SettingError` if Muon would get no matrix."""
    trained = [p for p in parameters if p.requires_grad]
    if config.kind == "adamw":
        return adamw(trained, config)
    blocks = {p for name, p in model.named_parameters() if _is_matrix_of_block(name, p)}
    matrices = [p for p in trained if p in blocks]
    if not matrices:
        raise SettingError("kind=muon finds no matrix of a block to train: give kind=adamw")
    return MuonAndAdamW(matrices, [p for p in trained if p not in blocks], config)


def _is_matrix_of_block(name: str, parameter: Tensor) -> bool:
    # Norms of queries and keys, and adapters (`lora_a`), have two dimensions too.
    is_weight = name.endswith(".weight") and "norm" not in name
    return parameter.dim() == 2 and ".layers." in name and is_weight


def adamw(parameters: Iterable[nn.Parameter], config: OptimConfig) -> torch.optim.AdamW:
    """AdamW without weight decay on vectors: biases, and norms over the model's width. The norms of
    queries and keys have a row per head and decay as matrices do. (The paper gives the decay, but
    not what it applies to.)"""
    trained = [p for p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, fused=True)


class Muon(torch.optim.Optimizer):
    """Nesterov momentum made nearly orthogonal, with decoupled weight decay; matrices only.

    A step equals that of `torch.optim.Muon` (a test compares them), which computes one matrix after
    another, always in bf16. Here matrices of one shape are computed together, in bf16 where that is
    fast (GPUs, CPUs with AVX512-BF16) and else in fp32. For a sharded matrix each process keeps its
    shard of the momentum; all gather the whole and compute the same.
    """

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        lr: float,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
    ) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum}
        super().__init__(list(matrices), defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape].append(parameter)
            for same_shape in by_shape.values():
                self._update(same_shape, group)

    def _update(self, same_shape: list[Tensor], group: dict[str, Any]) -> None:
        """Update parameters of one shape together."""
        gradients = [parallel.local_shard(p.grad) for p in same_shape if p.grad is not None]
        moments = [parallel.local_shard(self.moment(p)) for p in same_shape]
        torch._foreach_lerp_(moments, gradients, 1 - group["momentum"])
        nesterov = torch._foreach_lerp(gradients, moments, group["momentum"])
        momentum_NRC = torch.stack(
            [parallel.full_tensor(p, shard) for p, shard in zip(same_shape, nesterov, strict=True)]
        )
        orthogonal_NRC = orthogonal(momentum_NRC).to(same_shape[0].dtype)
        updates = [
            parallel.shard_of(p, update)
            for p, update in zip(same_shape, orthogonal_NRC, strict=True)
        ]
        rows, columns = same_shape[0].shape
        # Matrices with more rows than columns take longer steps, as in torch.optim.Muon.
        rate = group["lr"] * math.sqrt(max(1.0, rows / columns))
        weights = [parallel.local_shard(p) for p in same_shape]
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(weights, updates, alpha=-rate)

    def moment(self, parameter: Tensor) -> Tensor:
        """The momentum of a parameter; zeros at first."""
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        moment: Tensor = state["momentum_buffer"]
        return moment


def orthogonal(matrices_NRC: Tensor) -> Tensor:
    """Matrices with the same singular vectors and singular values near 1 (0.7 to 1.2), by five
    Newton-Schulz iterations of fifth degree with Jordan's coefficients."""
    a, b, c = 3.4445, -4.7750, 2.0315
    is_tall = matrices_NRC.shape[1] > matrices_NRC.shape[2]
    x = matrices_NRC.to(torch.bfloat16 if has_fast_bf16(matrices_NRC.device) else torch.float32)
    # The Gram matrix below then has the size of the shorter side.
    x = x.transpose(1, 2) if is_tall else x
    x = x / x.flatten(1).norm(dim=1).clamp_min(1e-7)[:, None, None]
    for _ in range(5):
        gram = x @ x.transpose(1, 2)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.transpose(1, 2) if is_tall else x


def has_fast_bf16(device: torch.device) -> bool:
    """Whether matrix products in bf16 are faster than in fp32 (six times on a Zen 5 CPU)."""
    if device.type == "cpu":
        return bool(torch.cpu.get_capabilities().get("avx512_bf16", False))
    return device.type == "cuda"


class MuonAndAdamW:
    """Muon for `matrices` and AdamW for `others`, used as one optimizer. Muon's parameter groups
    have their highest learning rate as `peak`, so that one schedule serves both (`set_rate`)."""

    def __init__(
        self, matrices: list[nn.Parameter], others: list[nn.Parameter], config: OptimConfig
    ) -> None:
        self.muon = Muon(matrices, config.muon_lr, config.weight_decay)
        self.adamw = adamw(others, config)
        for group in self.muon.param_groups:
            group["peak"] = config.muon_lr

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [*self.muon.param_groups, *self.adamw.param_groups]

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.muon.zero_grad(set_to_none)
        self.adamw.zero_grad(set_to_none)

    def step(self) -> None:
        self.muon.step()
        self.adamw.step()

    def state_dict(self) -> dict[str, Any]:
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}


def set_rate(optimizer: Any, rate: float, config: OptimConfig) -> None:
    """Give all parameter groups the learning rate of a step. It is scaled by `peak` / `config.lr`
    in groups that have a `peak`."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["peak"] / config.lr if "peak" in group else rate


def allocate_moments(optimizer: torch.optim.Optimizer | MuonAndAdamW) -> None:
    """Create moments as the optimizer's first step would, to be filled from a checkpoint."""
    if isinstance(optimizer, MuonAndAdamW):
        for group in optimizer.muon.param_groups:
            for parameter in group["params"]:
                optimizer.muon.moment(parameter)
        return allocate_moments(optimizer.adamw)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if not optimizer.state[parameter]:
                optimizer.state[parameter] = {
                    "step": torch.zeros((), device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }


def load_optimizer(optimizer: Any, state: dict[str, Any]) -> None:
    """Fill an optimizer from a checkpoint. A checkpoint in shards has only tensors: then the
    settings of the parameter groups stay."""
    if isinstance(optimizer, MuonAndAdamW):
        load_optimizer(optimizer.muon, state["muon"])
        return load_optimizer(optimizer.adamw, state["adamw"])
    groups = {k: v for k, v in optimizer.state_dict().items() if k == "param_groups"}
    optimizer.load_state_dict(groups | state)
    for parameter, moments in optimizer.state.items():
        for name, value in moments.items():
            # The fused kernel ignores strides: moments must have those of their parameter.
            if value.shape == parameter.shape and value.stride() != parameter.stride():
                moments[name] = torch.empty_like(parameter).copy_(value)


class WeightAverage:
    """An exponential moving average of the trained weights of a model. The decay per step is lower
    at first, so that the first weights are soon forgotten."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._weights = [p for p in model.parameters() if p.requires_grad]
        self._names = [n for n, p in model.named_parameters() if p.requires_grad]
        self._decay, self.count = decay, 0
        self._means = [p.detach().clone() for p in self._weights]

    @torch.no_grad()
    def update(self) -> None:
        """Add the weights of one more step."""
        self.count += 1
        decay = min(self._decay, (1 + self.count) / (10 + self.count))
        torch._foreach_lerp_(self._means, [p.detach() for p in self._weights], 1 - decay)

    @torch.no_grad()
    def apply(self) -> None:
        """Set the model to the averaged weights."""
        for weight, mean in zip(self._weights, self._means, strict=True):
            weight.copy_(mean)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the block, the model has the averaged weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for weight, mean in zip(self._weights, self._means, strict=True):
            current = weight.detach().clone()
            weight.copy_(mean)
            mean.copy_(current)

    def state(self) -> dict[str, Tensor]:
        """The averaged weights by their names in the model."""
        return dict(zip(self._names, self._means, strict=True))

    def load_state(self, tensors: dict[str, Tensor], count: int) -> None:
        """Restore what `state` returned, after `count` updates."""
        self.count = count
        for name, mean in zip(self._names, self._means, strict=True):
            mean.copy_(tensors[name])
