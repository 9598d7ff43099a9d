"""Training on a CPU: norms, packed attention and SwiGLU with gradients written by hand.

They compute the same as the modules of `model/` with fewer passes over memory, in compiled code
(`training.cpp`, built by `native.py`) with fp32 arithmetic. Without a compiler, RMSNorm and the
attention of long documents have hand-written gradients in torch (`attend_documents` rounds scores
to bf16, as transformers' eager attention does), and the rest is torch's own.

The twins at the end of this file (see `twins.py`) use them when plain tensors on a CPU need
gradients. In all other cases (GPUs, split layers, no gradients, traced code, torch.func's
transforms, forward-mode AD) they call the original. A backward pass that is to be differentiated
again, or that is itself transformed, is computed by autograd from the plain formula.
"""

# Shapes: B rows, T tokens of a row, S = B * T tokens, N query heads, K key and value heads, H head
# width; Q queries and J keys of a tile.

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.nn.modules.module import _has_any_global_hook

from earlyfusion.kernels import native
from earlyfusion.model import attention, transformer
from earlyfusion.model.activations import Elementwise
from earlyfusion.model.attention import attend_per_document
from earlyfusion.model.rotary import Rotary, rotate
from earlyfusion.model.transformer import autocast_dtype

_TILE_QUERIES = 128
_LONG_DOCUMENT = 112  # mean tokens per document from which tiles beat torch's attention (measured)
_TILED_DOCUMENT = 2048  # mean from which tiles are as fast as compiled code (measured)
_COMPILED_DTYPES = (torch.float32, torch.bfloat16)
_COMPILED_WIDTH = 16  # compiled code needs vectors whose width is a multiple of this


class Tile(NamedTuple):
    """Queries [first, last) with the keys [start, last). `bias_QJ` is -inf for keys of other
    documents and of later tokens, else 0."""

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
        and not cast("Any", torch.jit).is_tracing()
        and not is_transformed(*inputs)
    )


def is_transformed(*inputs: Tensor) -> bool:
    """Whether hand-written gradients cannot be used, because torch.func or forward-mode AD is
    active, or gradients come in a batch."""
    return bool(torch._C._are_functorch_transforms_active()) or any(
        torch._C._functorch.is_legacy_batchedtensor(x)
        or forward_ad.unpack_dual(x).tangent is not None
        for x in inputs
    )


def needs_autograd(grad: Tensor) -> bool:
    """Whether autograd must compute this backward pass, because it is to be differentiated again or
    is itself transformed."""
    return torch.is_grad_enabled() or is_transformed(grad)


def autograd_gradients(
    formula: Callable[..., Tensor], inputs: tuple[Tensor, ...], grad: Tensor
) -> tuple[Tensor | None, ...]:
    """The gradients of `formula(*inputs)` for the output gradient `grad`, by autograd."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Aliases, because one input may depend on another or be the same tensor.
        inputs = tuple(x.view_as(x) for x in inputs)
        out = formula(*inputs)
    differentiable = [x for x in inputs if x.requires_grad]
    grads = iter(torch.autograd.grad(out, differentiable, grad, create_graph=create_graph))
    return tuple(next(grads) if x.requires_grad else None for x in inputs)


def _apply(function: type[torch.autograd.Function], *args: Any) -> Tensor:
    # Copied here and not in `forward`, so that second derivatives pass through the copies too.
    contiguous_args = (x.contiguous() if isinstance(x, Tensor) else x for x in args)
    out: Tensor = function.apply(*contiguous_args)
    return out


def document_tiles(lengths: list[int]) -> list[Tile]:
    """Tiles for causal attention within consecutive documents of these lengths."""
    counts = torch.tensor(lengths)
    start_S = (counts.cumsum(0) - counts).repeat_interleave(counts)
    tiles = []
    for first in range(0, len(start_S), _TILE_QUERIES):
        queries_Q = torch.arange(first, min(first + _TILE_QUERIES, len(start_S)))
        # From the beginning of the first query's document: earlier keys are all hidden.
        start, last = int(start_S[first]), int(queries_Q[-1]) + 1
        keys_J = torch.arange(start, last)
        hidden_QJ = (keys_J < start_S[queries_Q, None]) | (keys_J > queries_Q[:, None])
        bias_QJ = torch.zeros(hidden_QJ.shape).masked_fill_(hidden_QJ, -math.inf)
        tiles.append(Tile(first, last, start, bias_QJ.bfloat16()))
    return tiles


def attend_documents(q_NSH: Tensor, k_NSH: Tensor, v_NSH: Tensor, tiles: list[Tile]) -> Tensor:
    """Attention in bf16, scaled by 1 / sqrt(H), computed tile by tile, forward and backward."""
    out: Tensor = _DocumentAttention.apply(q_NSH, k_NSH, v_NSH, tiles)  # type: ignore[no-untyped-call]
    return out


class _DocumentAttention(torch.autograd.Function):
    """Matrix products and torch's softmax. The backward pass computes the scores again: keeping
    them would take more memory than all else."""

    @staticmethod
    def forward(ctx: Any, q_NSH: Tensor, k_NSH: Tensor, v_NSH: Tensor, tiles: list[Tile]) -> Tensor:
        out_NSH = torch.empty_like(q_NSH)
        for tile in tiles:
            first, last, start, _ = tile
            probs_NQJ = _attention_probs(q_NSH, k_NSH, tile)
            out_NSH[:, first:last] = torch.bmm(probs_NQJ, v_NSH[:, start:last])
        ctx.save_for_backward(q_NSH, k_NSH, v_NSH)
        ctx.tiles = tiles
        return out_NSH

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q_NSH, k_NSH, v_NSH = ctx.saved_tensors
        if needs_autograd(grads[0]):
            heads = (q_NSH, k_NSH, v_NSH)
            return *autograd_gradients(partial(_attended, ctx.tiles), heads, grads[0]), None
        grad_NSH, scale = grads[0], 1 / math.sqrt(q_NSH.shape[-1])
        grad_q = torch.empty_like(q_NSH)
        # In fp32: gradients of keys and values are sums over tiles, and bf16 would round each sum.
        grad_k, grad_v = (torch.zeros_like(x, dtype=torch.float32) for x in (k_NSH, v_NSH))
        for tile in ctx.tiles:
            queries, keys = slice(tile.first, tile.last), slice(tile.start, tile.last)
            probs_NQJ, grad_NQH = _attention_probs(q_NSH, k_NSH, tile), grad_NSH[:, queries]
            grad_v[:, keys] += torch.bmm(probs_NQJ.transpose(1, 2), grad_NQH)
            grad_NQJ = torch.bmm(grad_NQH, v_NSH[:, keys].transpose(1, 2))
            grad_NQJ = torch._softmax_backward_data(grad_NQJ, probs_NQJ, -1, grad_NQJ.dtype)
            grad_q[:, queries] = torch.bmm(grad_NQJ, k_NSH[:, keys]).mul_(scale)
            grad_k[:, keys] += torch.bmm(grad_NQJ.transpose(1, 2), q_NSH[:, queries])
        return grad_q, grad_k.mul_(scale).to(k_NSH.dtype), grad_v.to(v_NSH.dtype), None


def _attention_probs(q_NSH: Tensor, k_NSH: Tensor, tile: Tile) -> Tensor:
    """The softmax of each query of a tile over its keys: bf16 (N, Q, J)."""
    first, last, start, bias_QJ = tile
    k_NHJ = k_NSH[:, start:last].transpose(1, 2)
    scale = 1 / math.sqrt(q_NSH.shape[-1])
    scores_NQJ = torch.baddbmm(bias_QJ, q_NSH[:, first:last], k_NHJ, alpha=scale)
    return scores_NQJ.softmax(-1)


def _attended(tiles: list[Tile], q_NSH: Tensor, k_NSH: Tensor, v_NSH: Tensor) -> Tensor:
    return torch.cat(
        [
            torch.bmm(_attention_probs(q_NSH, k_NSH, tile), v_NSH[:, tile.start : tile.last])
            for tile in tiles
        ],
        1,
    )


def fused_rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """RMSNorm over the last dimension in fp32, rounded once to `dtype`."""
    return _apply(_RMSNorm, x, weight, float(eps), dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        ctx.eps, ctx.compiled = eps, is_compiled(x.shape[-1]) and dtype in _COMPILED_DTYPES
        if ctx.compiled:
            out, inverse = torch.empty_like(x, dtype=dtype), x.new_empty(x.shape[:-1])
            sizes = (eps, inverse.numel(), x.shape[-1])
            _run("earlyfusion_rms_norm", x, weight, *sizes, out, int(dtype != x.dtype), inverse)
            ctx.save_for_backward(x, weight, inverse)
            return out
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        inverse = length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).mul_(weight).to(dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        if needs_autograd(grads[0]):
            formula = partial(_normed, eps=ctx.eps, dtype=grads[0].dtype)
            return *autograd_gradients(formula, (x, weight), grads[0]), None, None
        if ctx.compiled:
            grad, results = grads[0].contiguous(), (torch.empty_like(x), torch.empty_like(weight))
            sizes = (int(grad.dtype != x.dtype), inverse.numel(), x.shape[-1])
            _run("earlyfusion_rms_norm_backward", x, weight, inverse, grad, *sizes, *results)
            return *results, None, None
        normed, grad = x * inverse, grads[0].float()
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad * normed).reshape(-1, x.shape[-1]).sum(0)
        grad = grad * weight
        along = torch.linalg.vecdot(grad, normed).div_(x.shape[-1])[..., None]
        return grad.sub_(normed.mul_(along)).mul_(inverse), grad_weight, None, None


def _normed(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    inverse = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (x * inverse * weight).to(dtype)


# ---- compiled passes


@cache
def library() -> ctypes.CDLL | None:
    """`training.cpp`, built if needed; None without a compiler."""
    return native.load(Path(__file__).with_name("training.cpp"))


def _run(name: str, *args: Tensor | int | float) -> None:
    """Call a function of `training.cpp`. Tensors are passed by their address."""
    c_args = (
        ctypes.c_void_p(x.data_ptr())
        if isinstance(x, Tensor)
        else ctypes.c_float(x)
        if isinstance(x, float)
        else ctypes.c_int64(x)
        for x in args
    )
    function = getattr(library(), name)
    function.restype = None
    function(*c_args, ctypes.c_int64(torch.get_num_threads()))


def is_compiled(width: int) -> bool:
    """Whether compiled code can be used for vectors of this width."""
    return width % _COMPILED_WIDTH == 0 and library() is not None


class _CompiledAttention(torch.autograd.Function):
    """Causal attention within each document, one document and head at a time."""

    @staticmethod
    def forward(
        ctx: Any, q_SNH: Tensor, k_SKH: Tensor, v_SKH: Tensor, lengths: list[int]
    ) -> Tensor:
        heads, counts = (q_SNH, k_SKH, v_SKH), torch.tensor(lengths, device="cpu")
        ctx.sizes = (counts, len(lengths), *q_SNH.shape[1:2], *k_SKH.shape[1:])
        out_SNH = torch.empty_like(q_SNH)
        log_sums_SN = q_SNH.new_empty(q_SNH.shape[:2], dtype=torch.float32)
        _run("earlyfusion_attend", *heads, *ctx.sizes, out_SNH, log_sums_SN)
        ctx.save_for_backward(*heads, log_sums_SN)
        ctx.lengths = lengths
        return out_SNH

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *heads, log_sums_SN = ctx.saved_tensors
        if needs_autograd(grads[0]):
            formula = partial(_attended_per_document, ctx.lengths)
            return *autograd_gradients(formula, tuple(heads), grads[0]), None
        results = [torch.empty_like(x) for x in heads]
        grad_SNH = grads[0].contiguous()
        _run("earlyfusion_attend_backward", *heads, log_sums_SN, grad_SNH, *ctx.sizes, *results)
        return *results, None


def _attended_per_document(
    lengths: list[int], q_SNH: Tensor, k_SKH: Tensor, v_SKH: Tensor
) -> Tensor:
    q, k, v = (x[None].float() for x in (q_SNH, k_SKH, v_SKH))
    return attend_per_document(q, k, v, lengths)[0].to(q_SNH.dtype)


def compiled_attention(q_SNH: Tensor, k_SKH: Tensor, v_SKH: Tensor, lengths: list[int]) -> Tensor:
    """Causal attention within documents of these lengths, in bf16, scaled by 1 / sqrt(H)."""
    return _apply(_CompiledAttention, q_SNH, k_SKH, v_SKH, lengths)


class _HeadNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, cos: Tensor, sin: Tensor, eps: float
    ) -> Tensor:
        heads, width = x.shape[-2:]
        ctx.sizes = (x.numel() // (heads * width), heads, width, cos.numel() // width, eps)
        ctx.save_for_backward(x, weight, bias, cos, sin)
        out = torch.empty_like(x)
        _run("earlyfusion_head_norm", x, weight, bias, cos, sin, *ctx.sizes, out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, cos, sin = ctx.saved_tensors
        if needs_autograd(grads[0]):
            formula = partial(_normed_heads, cos=cos, sin=sin, eps=ctx.sizes[-1])
            return *autograd_gradients(formula, (x, weight, bias), grads[0]), None, None, None
        grad, grad_x = grads[0].contiguous(), torch.empty_like(x)
        grad_weights = weight.new_empty(2, *weight.shape)
        name = "earlyfusion_head_norm_backward"
        _run(name, x, weight, cos, sin, grad, *ctx.sizes, grad_x, grad_weights)
        return grad_x, *grad_weights, None, None, None


def _normed_heads(
    x: Tensor, weight: Tensor, bias: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> Tensor:
    normed = torch.addcmul(bias, F.layer_norm(x.float(), x.shape[-1:], eps=eps), weight)
    return rotate(normed, Rotary(cos, sin)).to(x.dtype)


def rotated_head_norm(x_BTNH: Tensor, norm: transformer.HeadNorm, rotary: Rotary) -> Tensor:
    """LayerNorm of each head with its weight and bias, then rotation; bf16 (B, T, N, H)."""
    return _apply(_HeadNorm, x_BTNH, norm.weight, norm.bias, *rotary, transformer.HEAD_NORM_EPS)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        out = torch.empty_like(gate)
        _run("earlyfusion_swiglu", gate, up, gate.numel(), out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        if needs_autograd(grads[0]):
            return autograd_gradients(_gated, (gate, up), grads[0])
        grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
        name, grad = "earlyfusion_swiglu_backward", grads[0].contiguous()
        _run(name, gate, up, grad, gate.numel(), grad_gate, grad_up)
        return grad_gate, grad_up


def _gated(gate: Tensor, up: Tensor) -> Tensor:
    return (F.silu(gate.float()) * up.float()).to(gate.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up in bf16, rounded once."""
    return _apply(_SwiGLU, gate, up)


# ---- the twins of modules of `model/`


def _is_unmodified(module: nn.Module, module_class: type[nn.Module]) -> bool:
    """Whether calling the module would only run `module_class.forward`: no other class or forward,
    no hooks."""
    changes = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
        "forward" in vars(module),
        _has_any_global_hook(),
    )
    return type(module) is module_class and not any(changes)


# Compiled code does not check shapes. The twins do, and call torch where shapes differ: it
# broadcasts or raises an error.


class RMSNorm(transformer.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        fp32 = x.dtype is self.weight.dtype is torch.float32
        if fp32 and is_cpu_training(x, self.weight) and x.shape[-1:] == self.weight.shape:
            return fused_rms_norm(x, self.weight, self.eps, autocast_dtype(x))
        return super().forward(x)


def _weights_fit(norm: nn.Module, x_BTNH: Tensor) -> bool:
    """Whether the norm has an fp32 weight and bias (N, H)."""
    parameters = (norm.weight, norm.bias)
    return all(p.dtype is torch.float32 and p.shape == x_BTNH.shape[2:] for p in parameters)


def _tables_fit(rotary: Rotary, x_BTNH: Tensor) -> bool:
    """Whether the rotary tables are fp32 constants, the same for all rows or one for each row."""
    B, T, _, H = x_BTNH.shape
    shape = (B if len(rotary.cos) == B else 1, T, 1, H)
    return all(
        x.dtype is torch.float32 and x.shape == shape and not x.requires_grad for x in rotary
    )


class Attention(transformer.Attention):
    def _norm_and_rotate(self, x_BTNH: Tensor, norm: nn.Module, rotary: Rotary) -> Tensor:
        fused = (
            x_BTNH.dtype is torch.bfloat16
            and is_cpu_training(x_BTNH, *norm.parameters(), *rotary)
            and _is_unmodified(norm, transformer.HeadNorm)
            and _weights_fit(norm, x_BTNH)
            and _tables_fit(rotary, x_BTNH)
            and is_compiled(self.head_dim)
        )
        if fused:
            return rotated_head_norm(x_BTNH, cast("transformer.HeadNorm", norm), rotary)
        return super()._norm_and_rotate(x_BTNH, norm, rotary)


class FeedForward(transformer.FeedForward):
    def _activated(self, gate: Tensor, up: Tensor) -> Tensor:
        fused = (
            gate.dtype is up.dtype is torch.bfloat16
            and is_cpu_training(gate, up)
            and gate.shape == up.shape
            and _is_unmodified(self.act_fn, Elementwise)
            and self.act_fn.function is F.silu
            and is_compiled(gate.shape[-1])
        )
        return swiglu(gate, up) if fused else super()._activated(gate, up)


class CausalAttend(attention.CausalAttend):
    def __init__(self, document_BT: Tensor | None = None) -> None:
        super().__init__(document_BT)
        self._tiles: list[Tile] = []

    def __call__(self, q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor) -> Tensor:
        heads, lengths = (q_BTNH, k_BTKH, v_BTKH), self.lengths
        bf16 = all(x.dtype is torch.bfloat16 for x in heads)
        if not lengths or not bf16 or not is_cpu_training(*heads):
            return super().__call__(*heads)
        tokens = sum(lengths)
        if any(x.shape[:2].numel() != tokens for x in heads):
            return super().__call__(*heads)
        mean_length = tokens / len(lengths)
        if mean_length < _TILED_DOCUMENT and is_compiled(q_BTNH.shape[-1]):
            q_SNH, k_SKH, v_SKH = (x.flatten(0, 1) for x in heads)
            return compiled_attention(q_SNH, k_SKH, v_SKH, lengths).view(q_BTNH.shape)
        if mean_length < _LONG_DOCUMENT:
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
