"""Training a part of a finished model: low-rank adapters, or the image rows of its head.

LoRA (arXiv 2106.09685): W x + (alpha / rank) B A x, with W frozen. The products with A and B are
computed apart from W, so neither W + B A nor a gradient of its size is ever in memory. B starts at
zero, so the outputs of the model do not change at first.

The image head (Anole, arXiv 2407.06135): only the rows of `lm_head` that score image tokens are
trained. They are a separate parameter, so no optimizer can change the other rows.
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


class AdaptedLinear(nn.Linear):
    """A linear layer with a low-rank adapter: `lora_a` is [rank, in], `lora_b` [out, rank]. The
    names of its weight and bias do not change."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float) -> None:
        with torch.device("meta"):  # its weight and bias are those of `linear`
            super().__init__(linear.in_features, linear.out_features, linear.bias is not None)
        self.weight, self.bias = linear.weight, linear.bias
        dtype = torch.promote_types(torch.float32, linear.weight.dtype)  # fp32 beside bf16
        zeros = partial(linear.weight.new_zeros, dtype=dtype)
        self.lora_a = nn.Parameter(zeros((rank, linear.in_features)))
        self.lora_b = nn.Parameter(zeros((linear.out_features, rank)))
        self.scale = alpha / rank
        # As in `nn.Linear` and PEFT.
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))

    def forward(self, input: Tensor) -> Tensor:
        low_rank = F.linear(F.linear(input, self.lora_a), self.lora_b)
        return super().forward(input) + self.scale * low_rank

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        """A plain layer with the same outputs, and with the dtype of this layer's weight."""
        with torch.device("meta"):
            linear = nn.Linear(self.in_features, self.out_features, self.bias is not None)
        update = self.scale * (self.lora_b.float() @ self.lora_a.float())
        weight = (self.weight.float() + update).to(self.weight.dtype)
        linear.weight, linear.bias = nn.Parameter(weight), self.bias
        return linear


def adapt(model: Transformer, rank: int, alpha: float | None = None) -> None:
    """Freeze a model and give every linear layer of its blocks an adapter of `rank`. `alpha`
    defaults to twice the rank. Raises `SettingError` if the rank is below 1 or above the smallest
    side of their weights."""
    max_rank = min(min(linear.weight.shape) for _, _, linear in _linears(model))
    if not 1 <= rank <= max_rank:
        raise SettingError(
            f"lora={rank} is not a rank that this model allows: choose 1 to {max_rank}"
        )
    model.requires_grad_(False)
    for parent, name, linear in _linears(model):
        setattr(parent, name, AdaptedLinear(linear, rank, 2.0 * rank if alpha is None else alpha))


def adapters(model: Transformer) -> dict[str, LowRank]:
    """The adapters of a model, by the names of their layers."""
    return {
        name: LowRank(layer.lora_a, layer.lora_b, layer.scale)
        for name, layer in model.named_modules()
        if isinstance(layer, AdaptedLinear)
    }


def merge(model: Transformer) -> None:
    """Merge adapters and image rows into the weights. The model is then a plain one again, with no
    weight frozen."""
    for parent, name, linear in _linears(model):
        if isinstance(linear, AdaptedLinear):
            setattr(parent, name, linear.to_linear())
    if parametrize.is_parametrized(model.lm_head):
        parametrize.remove_parametrizations(model.lm_head, "weight", leave_parametrized=True)
    model.requires_grad_(True)


class TrainedRows(nn.Module):
    """A parametrization of a matrix, of which the `rows` are a separate parameter."""

    def __init__(self, weight: Tensor, rows: Ids) -> None:
        super().__init__()
        self.rows: Tensor
        indices = torch.from_numpy(rows).to(weight.device)
        self.register_buffer("rows", indices, persistent=False)
        self.values = nn.Parameter(weight.detach()[indices].clone())

    def forward(self, weight: Tensor) -> Tensor:
        return weight.index_copy(0, self.rows, self.values.to(weight.dtype))


def train_image_head(model: Transformer, image_tokens: Ids) -> None:
    """Freeze a model except for the rows of its head that score `image_tokens`. Raises
    `SettingError` if the head is tied to the embedding."""
    if model.config.tie_word_embeddings:
        raise SettingError(
            "trainable=image_head needs a separate head, and the head of this model is tied to its "
            "embedding: train all, or lora=8"
        )
    model.requires_grad_(False)
    rows = TrainedRows(model.lm_head.weight, image_tokens)
    parametrize.register_parametrization(model.lm_head, "weight", rows)


def trainable_part(model: Transformer) -> str:
    """Which weights of a model are trained: a key of `plan.TRAINABLE`."""
    frozen = [not parameter.requires_grad for parameter in model.model.parameters()]
    return "image_head" if all(frozen) else "adapters" if any(frozen) else "all"


def block_linears(model: Transformer) -> list[nn.Linear]:
    """The linear layers of the blocks, which are those that `adapt` gives adapters."""
    return [linear for _, _, linear in _linears(model)]


def _linears(model: Transformer) -> list[tuple[nn.Module, str, nn.Linear]]:
    """The linear layers of the blocks, each with its parent module and its name there."""
    return [
        (parent, name, child)
        for parent in model.model.layers.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.Linear)
    ]
