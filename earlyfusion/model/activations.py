"""The feed-forward's activations, by the names of a transformers `config.json`. Two have
parameters, under transformers' names: `prelu` one slope, `xielu` (arXiv 2411.13010) two."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from earlyfusion.errors import SettingError

_SQRT_2_OVER_PI = math.sqrt(2.0 / math.pi)


class Elementwise(nn.Module):
    """An activation without parameters."""

    def __init__(self, name: str, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.name, self.function = name, function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)

    def extra_repr(self) -> str:
        return self.name


class XIELU(nn.Module):
    """A parabola for positive x and an integrated ELU for negative x, each with a learned
    factor."""

    def __init__(
        self, alpha_p_init: float = 0.8, alpha_n_init: float = 0.8, beta: float = 0.5
    ) -> None:
        super().__init__()
        # The factors are softplus(alpha_p) and beta + softplus(alpha_n), so they stay positive.
        self.alpha_p = nn.Parameter(_inverse_softplus(alpha_p_init))
        self.alpha_n = nn.Parameter(_inverse_softplus(alpha_n_init - beta))
        self.register_buffer("beta", torch.tensor(beta, dtype=torch.bfloat16))
        self.register_buffer("eps", torch.tensor(-1e-6, dtype=torch.bfloat16))

    beta: Tensor
    eps: Tensor

    def forward(self, x: Tensor) -> Tensor:
        alpha_p, alpha_n = F.softplus(self.alpha_p), self.beta + F.softplus(self.alpha_n)
        negative = (torch.expm1(torch.minimum(x, self.eps)) - x) * alpha_n
        return torch.where(x > 0, alpha_p * x * x, negative) + self.beta * x


def _inverse_softplus(value: float) -> Tensor:
    # bf16 as in transformers, so that its checkpoints load without rounding.
    return torch.tensor([value], dtype=torch.bfloat16).expm1().log()


def _gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(_SQRT_2_OVER_PI * (x + 0.044715 * x**3)))


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _clipped_gelu(x: Tensor) -> Tensor:
    return F.gelu(x).clamp(-10.0, 10.0)


def _laplace(x: Tensor) -> Tensor:
    """The cumulative distribution of N(0.707107, 0.282095^2), close to the square of relu."""
    return 0.5 * (1.0 + torch.erf((x - 0.707107) / (0.282095 * math.sqrt(2.0))))


def _relu_squared(x: Tensor) -> Tensor:
    return F.relu(x).square()


def _sqrt_softplus(x: Tensor) -> Tensor:
    return F.softplus(x).sqrt()


def _identity(x: Tensor) -> Tensor:
    return x


_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_10": _clipped_gelu,
    "gelu_accurate": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "gelu_new": _gelu_tanh,
    "gelu_python": F.gelu,
    "gelu_python_tanh": _gelu_tanh,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "hardswish": F.hardswish,
    "laplace": _laplace,
    "leaky_relu": F.leaky_relu,
    "linear": _identity,
    "mish": F.mish,
    "quick_gelu": _quick_gelu,
    "relu": F.relu,
    "relu2": _relu_squared,
    "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": _sqrt_softplus,
    "tanh": torch.tanh,
}
_LEARNED: dict[str, type[nn.Module]] = {"prelu": nn.PReLU, "xielu": XIELU}


def activation(name: str) -> nn.Module:
    """The activation with this name; `SettingError` for an unknown one."""
    if name in _FUNCTIONS:
        return Elementwise(name, _FUNCTIONS[name])
    if name in _LEARNED:
        return _LEARNED[name]()
    known = ", ".join(sorted({*_FUNCTIONS, *_LEARNED}))
    raise SettingError(f"hidden_act={name!r} is unknown: use one of {known}")
