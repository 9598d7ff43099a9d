"""Training on a CPU: RMSNorm and packed attention with gradients written by hand.

They give what `RMSNorm` and `CausalAttend` of `model/` give, with fewer passes over memory:
`fused_rms_norm` in fp32, `attend_documents` in bf16 with scores rounded to bf16, as in
transformers' eager attention. The twins at the end use them when gradients of plain tensors on a
CPU are needed. Otherwise (GPUs, split layers, no gradients, traced code, torch.func's transforms,
forward-mode AD) they call the original. A backward pass that is to be differentiated again takes
the gradient of the plain formula.
"""

# Shapes: B batch, T tokens, N query heads, K key and value heads, S tokens of all rows, H head
# width; Q queries and J keys of a tile.

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from earlyfusion.model import attention, transformer
from earlyfusion.model.attention import attend_per_document
from earlyfusion.model.transformer import autocast_dtype

_QUERIES = 128  # of a tile
_LONG_DOCUMENT = 112  # from this mean number of tokens per document, tiles are faster (measured)


class Tile(NamedTuple):
    """Queries `first` to `last` attend to keys `start` to `last`. `bias_QJ` is -inf for the keys of
    other documents and of later tokens, else 0."""

    first: int
    last: int
    start: int
    bias_QJ: Tensor


def is_cpu_training(*inputs: Tensor) -> bool:
    """Whether gradients written by hand may be used: plain tensors on a CPU need gradients."""
    return (
        torch.is_grad_enabled()
        and any(x.requires_grad for x in inputs)
        and all(type(x) in (Tensor, Parameter) and x.device.type == "cpu" for x in inputs)
        and not torch.compiler.is_compiling()
        and not is_transformed(*inputs)
    )


def is_transformed(*inputs: Tensor) -> bool:
    """Whether torch.func or forward-mode AD is active: a hand-written gradient is not enough."""
    return bool(torch._C._are_functorch_transforms_active()) or any(
        forward_ad.unpack_dual(x).tangent is not None for x in inputs
    )


def through_the_formula(
    formula: Callable[..., Tensor], inputs: tuple[Tensor, ...], grad: Tensor
) -> tuple[Tensor | None, ...]:
    """Gradients of `formula(*inputs)` along `grad` that can be differentiated again."""
    wanted = [x for x in inputs if x.requires_grad]
    found = iter(torch.autograd.grad(formula(*inputs), wanted, grad, create_graph=True))
    return tuple(next(found) if x.requires_grad else None for x in inputs)


def document_tiles(lengths: list[int]) -> list[Tile]:
    """Tiles over documents of these lengths in order: causal within each document."""
    counts = torch.tensor(lengths)
    start_S = (counts.cumsum(0) - counts).repeat_interleave(counts)
    tiles = []
    for first in range(0, len(start_S), _QUERIES):
        queries_Q = torch.arange(first, min(first + _QUERIES, len(start_S)))
        # From the beginning of the first query's document: earlier keys are all hidden.
        start, last = int(start_S[first]), int(queries_Q[-1]) + 1
        keys_J = torch.arange(start, last)
        hidden_QJ = (keys_J < start_S[queries_Q, None]) | (keys_J > queries_Q[:, None])
        bias_QJ = torch.zeros(hidden_QJ.shape).masked_fill_(hidden_QJ, -math.inf)
        tiles.append(Tile(first, last, start, bias_QJ.bfloat16()))
    return tiles


def attend_documents(q_NSH: Tensor, k_NSH: Tensor, v_NSH: Tensor, tiles: list[Tile]) -> Tensor:
    """Attention in bf16, scaled by 1 / sqrt(H), a tile at a time in both directions."""
    out: Tensor = _DocumentAttention.apply(q_NSH, k_NSH, v_NSH, tiles)  # type: ignore[no-untyped-call]
    return out


class _DocumentAttention(torch.autograd.Function):
    """Matrix products and torch's own softmax in both directions; no scores are kept."""

    @staticmethod
    def forward(ctx: Any, q_NSH: Tensor, k_NSH: Tensor, v_NSH: Tensor, tiles: list[Tile]) -> Tensor:
        out_NSH = torch.empty_like(q_NSH)
        for tile in tiles:
            first, last, start, _ = tile
            shares_NQJ = _shares(q_NSH, k_NSH, tile)
            out_NSH[:, first:last] = torch.bmm(shares_NQJ, v_NSH[:, start:last])
        # The backward pass computes the shares again: kept, they would be the peak of memory.
        ctx.save_for_backward(q_NSH, k_NSH, v_NSH)
        ctx.tiles = tiles
        return out_NSH

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q_NSH, k_NSH, v_NSH = ctx.saved_tensors
        if torch.is_grad_enabled():
            heads = (q_NSH, k_NSH, v_NSH)
            return *through_the_formula(partial(_attended, ctx.tiles), heads, grads[0]), None
        grad_NSH, scale = grads[0], 1 / math.sqrt(q_NSH.shape[-1])
        grad_q = torch.empty_like(q_NSH)
        # Keys and values get sums over several tiles, which bf16 would round each time.
        grad_k, grad_v = (torch.zeros_like(x, dtype=torch.float32) for x in (k_NSH, v_NSH))
        for tile in ctx.tiles:
            queries, keys = slice(tile.first, tile.last), slice(tile.start, tile.last)
            shares_NQJ, grad_NQH = _shares(q_NSH, k_NSH, tile), grad_NSH[:, queries]
            grad_v[:, keys] += torch.bmm(shares_NQJ.transpose(1, 2), grad_NQH)
            grad_NQJ = torch.bmm(grad_NQH, v_NSH[:, keys].transpose(1, 2))
            grad_NQJ = torch._softmax_backward_data(grad_NQJ, shares_NQJ, -1, grad_NQJ.dtype)
            grad_q[:, queries] = torch.bmm(grad_NQJ, k_NSH[:, keys]).mul_(scale)
            grad_k[:, keys] += torch.bmm(grad_NQJ.transpose(1, 2), q_NSH[:, queries])
        return grad_q, grad_k.mul_(scale).to(k_NSH.dtype), grad_v.to(v_NSH.dtype), None


def _shares(q_NSH: Tensor, k_NSH: Tensor, tile: Tile) -> Tensor:
    """The softmax of each query of a tile over its keys: bf16 (N, Q, J)."""
    first, last, start, bias_QJ = tile
    k_NHJ = k_NSH[:, start:last].transpose(1, 2)
    scale = 1 / math.sqrt(q_NSH.shape[-1])
    scores_NQJ = torch.baddbmm(bias_QJ, q_NSH[:, first:last], k_NHJ, alpha=scale)
    return scores_NQJ.softmax(-1)


def _attended(tiles: list[Tile], q_NSH: Tensor, k_NSH: Tensor, v_NSH: Tensor) -> Tensor:
    shares = ((_shares(q_NSH, k_NSH, tile), v_NSH[:, tile.start : tile.last]) for tile in tiles)
    return torch.cat([torch.bmm(shares_NQJ, v_NJH) for shares_NQJ, v_NJH in shares], 1)


def fused_rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """RMSNorm over the last dimension in fp32, rounded once to `dtype`."""
    out: Tensor = _RMSNorm.apply(x, weight, eps, dtype)  # type: ignore[no-untyped-call]
    return out


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        inverse = length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        ctx.eps = eps
        return (x * inverse).mul_(weight).to(dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        if torch.is_grad_enabled():
            formula = partial(_normed, eps=ctx.eps, dtype=grads[0].dtype)
            return *through_the_formula(formula, (x, weight), grads[0]), None, None
        normed, grad = x * inverse, grads[0].float()
        grad_weight = (grad * normed).flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        grad = grad * weight
        along = torch.linalg.vecdot(grad, normed).div_(x.shape[-1])[..., None]
        return grad.sub_(normed.mul_(along)).mul_(inverse), grad_weight, None, None


def _normed(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    inverse = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (x * inverse * weight).to(dtype)


# ---- the twins of `RMSNorm` and `CausalAttend`


class RMSNorm(transformer.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        fp32 = x.dtype is self.weight.dtype is torch.float32
        if fp32 and is_cpu_training(x, self.weight):
            return fused_rms_norm(x, self.weight, self.eps, autocast_dtype(x))
        return super().forward(x)


class CausalAttend(attention.CausalAttend):
    def __init__(self, document_BT: Tensor | None = None) -> None:
        super().__init__(document_BT)
        self._tiles: list[Tile] = []

    def __call__(self, q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor) -> Tensor:
        heads, lengths = (q_BTNH, k_BTKH, v_BTKH), self.lengths
        if lengths is None or v_BTKH.dtype is not torch.bfloat16 or not is_cpu_training(*heads):
            return super().__call__(*heads)
        if sum(lengths) < _LONG_DOCUMENT * len(lengths):
            # Short documents: torch's attention, whose backward pass is faster in fp32.
            q_BTNH, k_BTKH, v_BTKH = (x.float() for x in heads)
            return attend_per_document(q_BTNH, k_BTKH, v_BTKH, lengths).bfloat16()
        self._tiles = self._tiles or document_tiles(lengths)
        return self._attend_tiles(q_BTNH, k_BTKH, v_BTKH)

    def _attend_tiles(self, q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor) -> Tensor:
        group = q_BTNH.shape[2] // k_BTKH.shape[2]
        if group > 1:
            k_BTKH, v_BTKH = (x.repeat_interleave(group, 2) for x in (k_BTKH, v_BTKH))
        heads = (q_BTNH, k_BTKH, v_BTKH)
        # The dtypes below are chosen by hand: autocast must not change them.
        with torch.autocast("cpu", enabled=False):
            q_NSH, k_NSH, v_NSH = (x.flatten(0, 1).transpose(0, 1) for x in heads)
            out_NSH = attend_documents(q_NSH, k_NSH, v_NSH, self._tiles)
        return out_NSH.transpose(0, 1).view(q_BTNH.shape)
