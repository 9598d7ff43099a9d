"""The transformer of a decode step over tensors of fixed shape: the host reads nothing.

Every shape follows from the bucket alone, and no code depends on a value. If several processes
share the model, each runs the step over its shard of heads and columns. The first process
broadcasts positions and embedded tokens within the step; the others need to know nothing else.

Shapes: R rows, D model width, M = N + 2 K heads of queries, keys and values, H head width, W blocks
of a table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from earlyfusion.engine.backends.interface import Product
from earlyfusion.engine.backends.torch import FusedTransformer
from earlyfusion.engine.backends.torch import Layer as FusedLayer
from earlyfusion.engine.cache import PagedCache
from earlyfusion.engine.peers import RowParallelLinear, peers_of
from earlyfusion.kernels.decode import Angles, HeadNorms, LayerBlocks
from earlyfusion.kernels.operations import Operations
from earlyfusion.model.quantise import PackedLinear
from earlyfusion.model.transformer import Block, RMSNorm, Transformer


class Layer(NamedTuple):
    """The products, norms, keys and values of one block."""

    qkv: Product
    head_norms: HeadNorms
    out: Product
    gate_up: Product
    down: Product
    activate: Callable[[Tensor], Tensor]
    attention_norm: RMSNorm
    feed_forward_norm: RMSNorm
    blocks: LayerBlocks


class _Positions(NamedTuple):
    """The position of each row's new token, the number of tokens that it attends to, and their
    block table."""

    position_R: Tensor
    length_R: Tensor
    table_RW: Tensor


class StaticLayers:
    """Embedding, layers and last norm of one model over one cache."""

    def __init__(
        self,
        transformer: Transformer,
        fused: FusedTransformer,
        cache: PagedCache,
        operations: Operations,
    ) -> None:
        config = transformer.config
        self._operations, self.peers = operations, peers_of(transformer)
        self._embedding, self._norm = transformer.model.embed_tokens, transformer.model.norm
        self._norm_after = config.swin_norm
        self._shape = (-1, config.num_attention_heads + 2 * config.kv_heads, config.head_dim)
        self._angles = Angles(*(_with_spare_position(table) for table in fused.angles))
        blocks = cast("Iterable[Block]", transformer.model.layers)
        layers = zip(blocks, fused.layers, cache.layers, strict=True)
        self._layers = [
            self._layer(block, layer, LayerBlocks(*layer_blocks))
            for block, layer, layer_blocks in layers
        ]

    @property
    def collectives(self) -> int:
        """The number of collectives of a step: positions, embedded tokens, two sums per layer."""
        return 0 if self.peers is None else 2 + 2 * len(self._layers)

    def hidden_states(self, token_R: Tensor, position_R: Tensor, table_RW: Tensor) -> Tensor:
        """The input of the head [R, D]. With several processes, all use the tokens and positions of
        the first."""
        # The kernels need contiguous integers.
        position_R = position_R.contiguous()
        if self.peers is not None:
            position_R = self.peers.broadcast(position_R)
        return self._hidden_states(token_R, _Positions(position_R, position_R + 1, table_RW))

    def _hidden_states(self, token_R: Tensor, at: _Positions) -> Tensor:
        x_RD = self._embedding(token_R)
        if self._norm_after:
            for layer in self._layers:
                x_RD = x_RD + layer.attention_norm(self._attention(layer, x_RD, at))
                x_RD = x_RD + layer.feed_forward_norm(self._feed_forward(layer, x_RD))
            normed_RD: Tensor = self._norm(x_RD)
            return normed_RD
        add_norm = self._operations.add_norm
        normed_RD = self._layers[0].attention_norm(x_RD)
        # The norm after each sum is that of the following attention or feed-forward.
        nexts = [*(layer.attention_norm for layer in self._layers[1:]), self._norm]
        for layer, norm in zip(self._layers, nexts, strict=True):
            y_RD, norm_y = self._attention(layer, normed_RD, at), layer.feed_forward_norm
            x_RD, normed_RD = add_norm(x_RD, y_RD, norm_y.weight, norm_y.eps)
            y_RD = self._feed_forward(layer, normed_RD)
            x_RD, normed_RD = add_norm(x_RD, y_RD, norm.weight, norm.eps)
        return normed_RD

    def _attention(self, layer: Layer, x_RD: Tensor, at: _Positions) -> Tensor:
        qkv_RMH = layer.qkv(x_RD).view(self._shape)
        q_RNH = self._operations.norm_rotate_store(
            qkv_RMH, layer.head_norms, self._angles, at.position_R, layer.blocks, at.table_RW
        )
        out_RNH = self._operations.attend(q_RNH, layer.blocks, at.table_RW, at.length_R)
        return layer.out(out_RNH.flatten(1))

    def _feed_forward(self, layer: Layer, x_RD: Tensor) -> Tensor:
        return layer.down(layer.activate(layer.gate_up(x_RD)))

    # ---- weights

    def _layer(self, block: Block, fused: FusedLayer, layer_blocks: LayerBlocks) -> Layer:
        attention, mlp = block.self_attn, block.mlp
        is_silu = isinstance(mlp.act_fn, nn.SiLU)
        return Layer(
            self._product(fused.qkv, attention.q_proj, attention.k_proj, attention.v_proj),
            HeadNorms(fused.head_weight, fused.head_bias),
            self._product(fused.out, attention.o_proj),
            self._product(fused.gate_up, mlp.gate_proj, mlp.up_proj),
            self._product(fused.down, mlp.down_proj),
            self._operations.gated if is_silu else _activated(mlp.act_fn),
            block.input_layernorm,
            block.post_attention_layernorm,
            layer_blocks,
        )

    def _product(self, fused: Product, *linears: nn.Module) -> Product:
        """The product of these linear modules; packed weights stay packed."""
        if isinstance(linears[0], RowParallelLinear):
            return self._summed(linears[0])
        if not all(type(linear) is PackedLinear for linear in linears):
            return fused
        packed = cast("list[PackedLinear]", list(linears))
        product = self._operations.product

        def products(x: Tensor) -> Tensor:
            outputs = []
            for linear in packed:
                y = product(x, linear.matrix)
                outputs.append(y if linear.bias is None else y + linear.bias.to(y.dtype))
            return torch.cat(outputs, -1)

        return products

    def _summed(self, summed: RowParallelLinear) -> Product:
        """The sum of the products of all processes."""
        local, all_reduce = self._product(summed.linear, summed.linear), summed.peers.all_reduce
        return lambda x: all_reduce(local(x))


def _activated(activation: nn.Module) -> Callable[[Tensor], Tensor]:
    def activate(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return cast("Tensor", activation(gate) * up)

    return activate


def _with_spare_position(table_P1H: Tensor) -> Tensor:
    """The angles [P + 1, H]: the position of a frozen row may be one beyond the longest
    sequence."""
    return F.pad(table_P1H[:, 0], (0, 0, 0, 1))
