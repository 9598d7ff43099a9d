"""Training a part of a finished model: low-rank adapters, or the image rows of its head.

LoRA (arXiv 2106.09685): W x + (alpha / rank) B A x, with W frozen. The two small products are taken
apart from W, so that neither W + B A nor a gradient of its size is ever in memory. B begins at
zero: the model is at first what it was.

The image head (Anole, arXiv 2407.06135): of all weights, only the rows of `lm_head` that score
image tokens are trained; they are a parameter of their own, so that no optimizer can move the rest.
"""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from earlyfusion.checkpoints.adapter import LowRank
from earlyfusion.errors import SettingError
from earlyfusion.model.transformer import Transformer
from earlyfusion.vocabulary import Ids


class Adapted(nn.Linear):
    """A linear layer with an adapter; its own weight keeps its name."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float) -> None:
        with torch.device("meta"):
            super().__init__(linear.in_features, linear.out_features, linear.bias is not None)
        self.weight, self.bias = linear.weight, linear.bias
        kind = torch.promote_types(torch.float32, linear.weight.dtype)
        make = partial(linear.weight.new_zeros, dtype=kind)
        self.lora_a = nn.Parameter(make((rank, linear.in_features)))
        self.lora_b = nn.Parameter(make((linear.out_features, rank)))
        self.scale = alpha / rank
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))

    def forward(self, input: Tensor) -> Tensor:
        narrow = F.linear(input, self.lora_a)
        return super().forward(input) + self.scale * F.linear(narrow, self.lora_b)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """A plain layer that gives the same."""
        with torch.device("meta"):
            linear = nn.Linear(self.in_features, self.out_features, self.bias is not None)
        change = self.scale * (self.lora_b.float() @ self.lora_a.float())
        weight = (self.weight.float() + change).to(self.weight.dtype)
        linear.weight, linear.bias = nn.Parameter(weight), self.bias
        return linear


def adapt(model: Transformer, rank: int, alpha: float | None = None) -> None:
    """Freeze a model and give every linear layer of its blocks an adapter of `rank`.

    `alpha` is twice the rank unless given. Raises `SettingError` for a rank that is none.
    """
    narrowest = min(min(linear.weight.shape) for _, _, linear in _linears(model))
    if not 1 <= rank <= narrowest:
        raise SettingError(f"lora={rank} is no rank for this model: choose 1 to {narrowest}")
    model.requires_grad_(False)
    for parent, name, linear in _linears(model):
        setattr(parent, name, Adapted(linear, rank, 2.0 * rank if alpha is None else alpha))


def adapters(model: Transformer) -> dict[str, LowRank]:
    """The adapters of a model by the names of their layers."""
    return {
        name: LowRank(layer.lora_a, layer.lora_b, layer.scale)
        for name, layer in model.named_modules()
        if isinstance(layer, Adapted)
    }


def merge(model: Transformer) -> None:
    """Put what was trained apart into the model's own weights; it is a plain model again."""
    for parent, name, linear in _linears(model):
        if isinstance(linear, Adapted):
            setattr(parent, name, linear.merged())
    if parametrize.is_parametrized(model.lm_head):
        parametrize.remove_parametrizations(model.lm_head, "weight", leave_parametrized=True)
    model.requires_grad_(True)


class Rows(nn.Module):
    """A matrix of which some rows are a parameter of their own."""

    def __init__(self, weight: Tensor, rows: Ids) -> None:
        super().__init__()
        self.places: Tensor
        places = torch.from_numpy(rows).to(weight.device)
        self.register_buffer("places", places, persistent=False)
        self.values = nn.Parameter(weight.detach()[places].clone())

    def forward(self, weight: Tensor) -> Tensor:
        return weight.index_copy(0, self.places, self.values.to(weight.dtype))


def train_image_head(model: Transformer, image_tokens: Ids) -> None:
    """Freeze a model but for the rows of its head that score `image_tokens`.

    Raises `SettingError` where the head is the embedding too.
    """
    if model.config.tie_word_embeddings:
        raise SettingError(
            "trainable=image_head needs a head of its own, and this model's is its embedding: "
            "train all, or lora=8"
        )
    model.requires_grad_(False)
    rows = Rows(model.lm_head.weight, image_tokens)
    parametrize.register_parametrization(model.lm_head, "weight", rows)


def trainable(model: Transformer) -> str:
    """Which weights of a model are trained: a key of `plan.TRAINABLE`."""
    frozen = [not parameter.requires_grad for parameter in model.model.parameters()]
    return "image_head" if all(frozen) else "adapters" if any(frozen) else "all"


def products(model: Transformer) -> list[nn.Linear]:
    """The linear layers of the blocks: what adapters go beside."""
    return [linear for _, _, linear in _linears(model)]


def _linears(model: Transformer) -> list[tuple[nn.Module, str, nn.Linear]]:
    return [
        (parent, name, child)
        for parent in model.model.layers.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.Linear)
    ]
