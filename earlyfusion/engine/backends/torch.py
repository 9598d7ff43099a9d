"""The transformer's forward pass in torch, with the same arithmetic as `model/transformer.py`.

All tokens of a step are concatenated, so each layer does one matmul for all requests. Queries, keys
and values come from one fused matrix, gate and up from another. On a CPU the weights are packed
once for oneDNN, whose products of few rows are up to three times as fast as `F.linear`; they stay
unpacked if memory is short. Packed linear modules and PEFT's adapters are called as they are.
"""

# Shapes: T tokens of a step, R of them sampled from, D model width, N query heads, K key and value
# heads, M = N + K, H head width, I inner width of the feed-forward, O x I a weight, P positions.

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from earlyfusion.devices import free_bytes
from earlyfusion.engine.backends.attention import StepAttention
from earlyfusion.engine.backends.interface import Product, head_product, vocab_logits
from earlyfusion.engine.cache import PagedCache
from earlyfusion.engine.scheduler import Step
from earlyfusion.model.rotary import rotary_tables
from earlyfusion.model.transformer import HEAD_NORM_EPS, Block, RMSNorm, Transformer


class Layer(NamedTuple):
    """The fused products and the norms of one block. `head_weight` and `head_bias` [M, H] are those
    of the QK-norms, queries before keys."""

    qkv: Product
    head_weight: Tensor
    head_bias: Tensor
    out: Product
    gate_up: Product
    down: Product
    activation: nn.Module
    attention_norm: RMSNorm
    feed_forward_norm: RMSNorm


class FusedTransformer:
    """Fused products in torch, on any device."""

    needs_whole_prompts = False
    chunk_factor = 1
    sample = None

    def __init__(self, transformer: Transformer, cache: PagedCache) -> None:
        config, weight = transformer.config, transformer.lm_head.weight
        self._cache, self._head = cache, transformer.lm_head
        self._prepacks = weight.device.type == "cpu" and fits_second_copy(transformer)
        self._embedding = transformer.model.embed_tokens
        self._norm = transformer.model.norm
        self._norm_after = config.swin_norm
        self._shape = (-1, config.num_attention_heads + 2 * config.kv_heads, config.head_dim)
        self._keys_from = config.num_attention_heads
        self._values_from = config.num_attention_heads + config.kv_heads
        rotary = rotary_tables(config, torch.arange(cache.length, device=weight.device)[None])
        self._cos_P1H, self._sin_P1H = rotary.cos[0], rotary.sin[0]
        blocks = cast("Iterable[Block]", transformer.model.layers)
        self.layers = [self._layer(block) for block in blocks]

    @property
    def angles(self) -> tuple[Tensor, Tensor]:
        """Cosines and sines of all positions [P, 1, H]."""
        return self._cos_P1H, self._sin_P1H

    def hidden_states(self, step: Step) -> Tensor:
        x_TD = self.run_layers(step)
        normed_RD: Tensor = self._norm(x_TD if step.needs_all_logits else x_TD[step.logits_indices])
        return normed_RD

    def run_layers(self, step: Step) -> Tensor:
        """States [T, D] of all tokens, before the final norm."""
        # One tensor for both, so that there is one copy to the device.
        tokens_T, positions_T = torch.tensor([step.tokens, step.positions]).to(self._cache.device)
        x_TD = self._embedding(tokens_T)
        cos_T1H, sin_T1H = self._cos_P1H[positions_T], self._sin_P1H[positions_T]
        attends = StepAttention(step, self._cache).per_layer()
        for layer, attend in zip(self.layers, attends, strict=True):
            # Norms before attention and feed-forward (7B), or after them (34B, swin_norm).
            y_TD = x_TD if self._norm_after else layer.attention_norm(x_TD)
            qkv_TMH = layer.qkv(y_TD).view(self._shape)
            values_TKH = qkv_TMH[:, self._values_from :]
            rotated_TMH = _norm_and_rotate(qkv_TMH[:, : self._values_from], layer, cos_T1H, sin_T1H)
            rotated_TMH = rotated_TMH.to(values_TKH.dtype)
            queries_TNH = rotated_TMH[:, : self._keys_from]
            keys_TKH = rotated_TMH[:, self._keys_from :]
            y_TD = layer.out(attend(queries_TNH, keys_TKH, values_TKH).flatten(1))
            x_TD = x_TD + (layer.attention_norm(y_TD) if self._norm_after else y_TD)
            y_TD = x_TD if self._norm_after else layer.feed_forward_norm(x_TD)
            gate_TI, up_TI = layer.gate_up(y_TD).chunk(2, -1)
            y_TD = layer.down(layer.activation(gate_TI).mul_(up_TI))
            x_TD = x_TD + (layer.feed_forward_norm(y_TD) if self._norm_after else y_TD)
        return x_TD

    def product(self, ids_V: Tensor) -> Product:
        return head_product(self._head, ids_V, self._product)

    def vocab_logits(self, x_RD: Tensor) -> Tensor:
        return vocab_logits(self._head, x_RD)

    def _product(self, weight_OI: Tensor, bias_O: Tensor | None = None) -> Product:
        """x -> x W^T + b, with packed weights if possible."""

        def plain(x: Tensor) -> Tensor:
            return F.linear(x, weight_OI, bias_O)

        if not self._prepacks or not can_prepack(weight_OI.dtype):
            return plain
        operator = torch.ops.mkldnn._linear_pointwise
        packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI)

        def product(x: Tensor) -> Tensor:
            return operator(x, packed, bias_O, "none", [], "")

        return product

    def _fused_product(self, *linears: nn.Module) -> Product:
        """One product for several linear modules with the same input; outputs side by side."""
        if any(type(linear) is not nn.Linear for linear in linears):
            return lambda x: torch.cat([linear(x) for linear in linears], -1)
        plain = cast("Sequence[nn.Linear]", linears)
        weight_OI = torch.cat([linear.weight.detach() for linear in plain])
        biased = any(linear.bias is not None for linear in plain)
        bias_O = torch.cat([_bias(linear) for linear in plain]) if biased else None
        if not self._prepacks:
            _share_memory(plain, weight_OI, bias_O)
        return self._product(weight_OI, bias_O)

    def _layer(self, block: Block) -> Layer:
        attention, mlp = block.self_attn, block.mlp
        norms = (attention.q_norm, attention.k_norm)
        return Layer(
            self._fused_product(attention.q_proj, attention.k_proj, attention.v_proj),
            torch.cat([norm.weight.detach() for norm in norms]).float(),
            torch.cat([norm.bias.detach() for norm in norms]).float(),
            self._fused_product(attention.o_proj),
            self._fused_product(mlp.gate_proj, mlp.up_proj),
            self._fused_product(mlp.down_proj),
            mlp.act_fn,
            block.input_layernorm,
            block.post_attention_layernorm,
        )


def _norm_and_rotate(x_TMH: Tensor, layer: Layer, cos_T1H: Tensor, sin_T1H: Tensor) -> Tensor:
    """Head norm, then rotation, in fp32, for queries and keys together."""
    width = x_TMH.shape[-1]
    normed = F.layer_norm(x_TMH.float(), (width,), eps=HEAD_NORM_EPS)
    normed = torch.addcmul(layer.head_bias, normed, layer.head_weight)
    return torch.addcmul(normed * cos_T1H, normed.roll(width // 2, -1), sin_T1H)


@cache
def can_prepack(dtype: torch.dtype) -> bool:
    """Whether this machine has oneDNN's packed products for weights of this dtype."""
    if dtype not in (torch.float32, torch.bfloat16):
        return False
    try:
        operators: Any = torch.ops.mkldnn
        packed = operators._reorder_linear_weight(torch.ones(16, 16, dtype=dtype))
        operators._linear_pointwise(torch.ones(2, 16, dtype=dtype), packed, None, "none", [], "")
    except (AttributeError, RuntimeError):
        return False
    return True


def fits_second_copy(transformer: Transformer) -> bool:
    """Whether a second copy of the weights fits into half of the free memory."""
    size = sum(p.numel() * p.element_size() for p in transformer.parameters())
    return size < free_bytes(transformer.lm_head.weight.device) // 2


def _share_memory(linears: Sequence[nn.Linear], weight_OI: Tensor, bias_O: Tensor | None) -> None:
    """Make the modules' parameters views of the fused weight, so that memory holds the weights
    once."""
    sizes = [linear.out_features for linear in linears]
    for linear, weight in zip(linears, weight_OI.split(sizes), strict=True):
        linear.weight.data = weight
    if bias_O is not None:
        for linear, bias in zip(linears, bias_O.split(sizes), strict=True):
            if linear.bias is not None:
                linear.bias.data = bias


def _bias(linear: nn.Linear) -> Tensor:
    weight = linear.weight
    return weight.new_zeros(len(weight)) if linear.bias is None else linear.bias.detach()
