"""Optimizer and learning rate (arXiv 2405.09818, section 2.3: AdamW, warm-up, decay, clip)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn

from earlyfusion.errors import SettingError


@dataclass
class OptimConfig:
    """The paper's settings; `decay` runs from the end of the warm-up to `final_ratio` of `lr`."""

    lr: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-5
    weight_decay: float = 0.1
    warmup_steps: int = 4000
    decay: str = "exponential"
    final_ratio: float = 0.01
    clip: float = 1.0

    def __post_init__(self) -> None:
        if self.decay not in _DECAYS:
            raise SettingError(f"decay={self.decay!r} is unknown: choose one of {sorted(_DECAYS)}")
        if self.lr <= 0 or not 0 < self.final_ratio <= 1:
            raise SettingError(
                f"lr={self.lr} and final_ratio={self.final_ratio}: lr must be positive and "
                f"final_ratio within (0, 1]"
            )
        for name in ("warmup_steps", "weight_decay", "clip", "eps"):
            if getattr(self, name) < 0:
                raise SettingError(f"{name}={getattr(self, name)} must be 0 up")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise SettingError(f"{name}={getattr(self, name)} must be 0 up and below 1")


def check_warmup(config: OptimConfig, steps: int) -> str:
    """A sentence where the warm-up takes the whole run, so that the rate never comes to `lr`."""
    if config.warmup_steps < steps:
        return ""
    highest = learning_rate(config, steps - 1, steps)
    return (
        f"warmup_steps={config.warmup_steps} takes all of steps={steps}: the rate ends at "
        f"{highest:.2g} and does not decay, so give warmup_steps={steps // 10} or more steps"
    )


_DECAYS: dict[str, Callable[[float, float], float]] = {
    "exponential": lambda share, floor: floor**share,
    "cosine": lambda share, floor: floor + (1 - floor) * (1 + math.cos(math.pi * share)) / 2,
    "linear": lambda share, floor: 1 + (floor - 1) * share,
    "constant": lambda share, floor: 1.0,
    # Seven tenths at the full rate, then a straight fall: a run may be prolonged before the fall.
    "hold": lambda share, floor: 1.0 if share < 0.7 else floor + (1 - floor) * (1 - share) / 0.3,
}


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """Rate of step `step` (from 0) of `steps`."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    share = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    return config.lr * _DECAYS[config.decay](min(1.0, share), config.final_ratio)


def adamw(parameters: Iterable[nn.Parameter], config: OptimConfig) -> torch.optim.AdamW:
    """AdamW whose weight decay leaves out vectors: the norms of the model's width, and biases.

    The norms of queries and keys have a row a head and decay as matrices do. The paper gives the
    decay and does not say what it leaves out.
    """
    trained = [p for p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, fused=True)
