"""The transformer's forward, lean: the same arithmetic as `model/transformer.py` on fused weights.

Tokens of all requests stand in one row: what is read by many requests in one step costs one product
a layer. Queries, keys and values come from one product, gate and up from another; the head has only
the rows that may be drawn. On a CPU the weights are packed once for oneDNN, whose products of few
rows are up to three times as fast as those of plain `F.linear`; the packed copy is left out where
memory is short. Packed linear modules and PEFT's adapters are called as they are.

Shapes: T tokens of a step, D model width, N query heads, K key and value heads, H head width, I
inner width of the feed-forward, O I rows and columns of a weight, P positions, V columns of a head.

`is_plain` tells whether a transformer may be run so, `fingerprint` when to ask again. What stands
in the module tree counts: with hooks or modules of other classes the transformer itself is called.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from earlyfusion.errors import SettingError
from earlyfusion.kernels.twins import TWINS, original_class
from earlyfusion.model.quantise import PackedLinear
from earlyfusion.model.rotary import rotary_tables
from earlyfusion.model.transformer import (
    Attention,
    Block,
    Decoder,
    FeedForward,
    HeadNorm,
    RMSNorm,
    Transformer,
)

Product = Callable[[Tensor], Tensor]
LookBack = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(q_TNH, k_TKH, v_TKH) -> out_TNH of one layer; stores what is new, and looks back."""


class Layer(NamedTuple):
    qkv: Product
    head_weight: Tensor
    head_bias: Tensor
    out: Product
    gate_up: Product
    down: Product
    activation: nn.Module
    attention_norm: RMSNorm
    feed_forward_norm: RMSNorm


class Network:
    """Tokens to final hidden states. `positions` bounds what can be read."""

    def __init__(self, transformer: Transformer, positions: int) -> None:
        config, weight = transformer.config, transformer.lm_head.weight
        self.packs = weight.device.type == "cpu" and _has_room(transformer)
        self._embedding = transformer.model.embed_tokens
        self._norm = transformer.model.norm
        self._norm_after = config.swin_norm
        self._shape = (-1, config.num_attention_heads + 2 * config.kv_heads, config.head_dim)
        self._keys_from = config.num_attention_heads
        self._values_from = config.num_attention_heads + config.kv_heads
        rotary = rotary_tables(config, torch.arange(positions, device=weight.device)[None])
        self._cos_P1H, self._sin_P1H = rotary.cos[0], rotary.sin[0]
        blocks = cast("Iterable[Block]", transformer.model.layers)
        self._layers = [self._layer(block) for block in blocks]

    def product(self, *linears: nn.Module) -> Product:
        """One product for several linear modules of one input, outputs side by side."""
        if any(type(linear) is not nn.Linear for linear in linears):
            return lambda x: torch.cat([linear(x) for linear in linears], -1)
        plain = cast("Sequence[nn.Linear]", linears)
        weight_OI = torch.cat([linear.weight.detach() for linear in plain])
        biased = any(linear.bias is not None for linear in plain)
        bias_O = torch.cat([_bias(linear) for linear in plain]) if biased else None
        if not self.packs:
            _share(plain, weight_OI, bias_O)
        return self.weighted(weight_OI, bias_O)

    def weighted(self, weight_OI: Tensor, bias_O: Tensor | None = None) -> Product:
        """x -> x W^T + b, by the fastest way that there is for so many rows."""

        def plain(x: Tensor) -> Tensor:
            return F.linear(x, weight_OI, bias_O)

        if not self.packs or not can_pack(weight_OI.dtype):
            return plain
        operator = torch.ops.mkldnn._linear_pointwise
        packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI)

        def product(x: Tensor) -> Tensor:
            return operator(x, packed, bias_O, "none", [], "")

        return product

    def forward(
        self, tokens_T: Tensor, positions_T: Tensor, attentions: Sequence[LookBack]
    ) -> Tensor:
        """Hidden states [T, D] before the final norm."""
        x_TD = self._embedding(tokens_T)
        cos_T1H, sin_T1H = self._cos_P1H[positions_T], self._sin_P1H[positions_T]
        for layer, attend in zip(self._layers, attentions, strict=True):
            y_TD = x_TD if self._norm_after else layer.attention_norm(x_TD)
            qkv_THH = layer.qkv(y_TD).view(self._shape)
            values_TKH = qkv_THH[:, self._values_from :]
            rotated = _turn(qkv_THH[:, : self._values_from], layer, cos_T1H, sin_T1H)
            rotated = rotated.to(values_TKH.dtype)
            queries_TNH, keys_TKH = rotated[:, : self._keys_from], rotated[:, self._keys_from :]
            y_TD = layer.out(attend(queries_TNH, keys_TKH, values_TKH).flatten(1))
            x_TD = x_TD + (layer.attention_norm(y_TD) if self._norm_after else y_TD)
            y_TD = x_TD if self._norm_after else layer.feed_forward_norm(x_TD)
            gate_TI, up_TI = layer.gate_up(y_TD).chunk(2, -1)
            y_TD = layer.down(layer.activation(gate_TI).mul_(up_TI))
            x_TD = x_TD + (layer.feed_forward_norm(y_TD) if self._norm_after else y_TD)
        return x_TD

    def final(self, x_RD: Tensor) -> Tensor:
        normed: Tensor = self._norm(x_RD)
        return normed

    def _layer(self, block: Block) -> Layer:
        attention, mlp = block.self_attn, block.mlp
        norms = (attention.q_norm, attention.k_norm)
        return Layer(
            self.product(attention.q_proj, attention.k_proj, attention.v_proj),
            torch.cat([norm.weight.detach() for norm in norms]).float(),
            torch.cat([norm.bias.detach() for norm in norms]).float(),
            self.product(attention.o_proj),
            self.product(mlp.gate_proj, mlp.up_proj),
            self.product(mlp.down_proj),
            mlp.act_fn,
            block.input_layernorm,
            block.post_attention_layernorm,
        )


def _turn(x_TMH: Tensor, layer: Layer, cos_T1H: Tensor, sin_T1H: Tensor) -> Tensor:
    """Head norm, then rotation, in fp32: queries and keys at once."""
    width = x_TMH.shape[-1]
    normed = F.layer_norm(x_TMH.float(), (width,), eps=1e-5)
    normed = torch.addcmul(layer.head_bias, normed, layer.head_weight)
    return torch.addcmul(normed * cos_T1H, normed.roll(width // 2, -1), sin_T1H)


_LINEARS = (nn.Linear, PackedLinear)
_NORMS = ("input_layernorm", "post_attention_layernorm")
_CLASSES: tuple[Any, ...] = (
    Transformer, Decoder, Block, Attention, FeedForward, RMSNorm, HeadNorm, nn.Embedding,
    *_LINEARS, *TWINS.values(),
)  # fmt: skip
_FORWARDS = [kind.forward for kind in _CLASSES]


def fingerprint(modules: Iterable[nn.Module]) -> int:
    """Changes whenever a parameter or buffer is replaced or written to, and when a module of the
    tree is replaced, wrapped, hooked or given another `forward`.

    Modules are told apart by their ids: the caller keeps those that it has seen alive.
    """
    told: list[object] = [bool(_has_any_global_hook()), *(kind.forward for kind in _CLASSES)]
    left = list(modules)
    while left:  # half the time of `modules()`, which makes names and looks for what comes twice
        module = left.pop()
        told += (id(module), type(module), _is_touched(module))
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                told += (tensor.data_ptr(), _version(tensor))
        left += [part for part in module._modules.values() if part is not None]
    return hash(tuple(told))


def _version(tensor: Tensor) -> int:
    try:
        return tensor._version
    except RuntimeError:  # an inference tensor counts nothing
        return 0


def is_plain(transformer: Transformer) -> bool:
    """Whether fused products give what calling the modules would: classes of `model/`, no hooks."""
    untouched = not _has_any_global_hook() and not any(map(_is_touched, transformer.modules()))
    own = [kind.forward for kind in _CLASSES] == _FORWARDS
    return untouched and own and type(transformer) is Transformer and _has_plain_parts(transformer)


def check_blocks(transformer: Transformer) -> None:
    """Raise `SettingError` where the layers cannot be called one after the other."""
    layers, number = list(transformer.model.layers), transformer.config.num_hidden_layers
    if len(layers) != number:
        raise SettingError(
            f"the model has {len(layers)} layers and its config says {number}: "
            "set num_hidden_layers in a config of its own"
        )
    for place, block in enumerate(layers):
        try:
            inspect.signature(block.forward).bind(None, None, None)
        except TypeError:
            raise SettingError(
                f"layers[{place}] is a {type(block).__name__} that cannot stand there: its forward "
                "must take (x, rotary, attend), as the block of model/transformer.py does"
            ) from None


def _is_touched(module: nn.Module) -> bool:
    hooked = module._forward_hooks or module._forward_pre_hooks
    return bool(hooked) or "forward" in module.__dict__


def _has_plain_parts(transformer: Transformer) -> bool:
    decoder, head = transformer.model, transformer.lm_head
    embedding: Any = decoder.embed_tokens
    return (
        type(decoder) is Decoder
        and original_class(decoder.norm) is RMSNorm
        and type(decoder.layers) is nn.ModuleList
        and all(_is_plain_block(block) for block in decoder.layers)
        and _is_linear(head)
        and getattr(head, "bias", None) is None
        and (type(embedding) is nn.Embedding or _is_pointwise(embedding))
        and embedding.max_norm is None
    )


def _is_plain_block(block: nn.Module) -> bool:
    if type(block) is not Block:
        return False
    attention, mlp = block.self_attn, block.mlp
    return (
        type(attention) is Attention
        and type(mlp) is FeedForward
        and all(original_class(getattr(block, name)) is RMSNorm for name in _NORMS)
        and all(type(norm) is HeadNorm for norm in (attention.q_norm, attention.k_norm))
        and all(_is_linear(getattr(attention, f"{name}_proj")) for name in "qkvo")
        and all(_is_linear(getattr(mlp, f"{name}_proj")) for name in ("gate", "up", "down"))
    )


def _is_linear(module: nn.Module) -> bool:
    """Whether a module turns each token alone: then tokens of several requests may stand in it."""
    if type(module) is nn.Linear:
        return type(module.weight) in (nn.Parameter, Tensor)
    adapter = type(module).__module__.startswith("peft.tuners.")
    return original_class(module) is PackedLinear or adapter or _is_pointwise(module)


def _is_pointwise(module: nn.Module) -> bool:
    return "pointwise" in vars(type(module))  # not of a class that inherits from it


@cache
def can_pack(dtype: torch.dtype) -> bool:
    """Whether this build and machine have oneDNN's packed products for such weights."""
    if dtype not in (torch.float32, torch.bfloat16):
        return False
    try:
        operators: Any = torch.ops.mkldnn
        packed = operators._reorder_linear_weight(torch.ones(16, 16, dtype=dtype))
        operators._linear_pointwise(torch.ones(2, 16, dtype=dtype), packed, None, "none", [], "")
    except (AttributeError, RuntimeError):
        return False
    return True


def _has_room(transformer: Transformer) -> bool:
    size = sum(p.numel() * p.element_size() for p in transformer.parameters())
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not every system tells
        return True
    return size < free // 2


def _share(linears: Sequence[nn.Linear], weight_OI: Tensor, bias_O: Tensor | None) -> None:
    """Make the modules' parameters parts of the fused ones, so that no weight is held twice."""
    sizes = [linear.out_features for linear in linears]
    for linear, part in zip(linears, weight_OI.split(sizes), strict=True):
        linear.weight.data = part
    if bias_O is not None:
        for linear, part in zip(linears, bias_O.split(sizes), strict=True):
            if linear.bias is not None:
                linear.bias.data = part


def _bias(linear: nn.Linear) -> Tensor:
    weight = linear.weight
    return weight.new_zeros(len(weight)) if linear.bias is None else linear.bias.detach()
