"""One decode step, token to next token, over tensors of fixed shape: the host reads nothing.

Embedding, layers, head, guidance, grammar, cuts, draw, and the next state, for rows of text and of
images together. Every shape follows from the bucket alone and no value is looked at, so the step
can be captured as a CUDA graph; run plainly, it is the same step on any device. Which token a row
gets is defined by `generation/reference.py`.

Shapes: R rows, D model width, M = N + 2 K heads of queries, keys and values, H head width, V
vocabulary or codes, W blocks of a table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from earlyfusion.engine.backends.head import whole_logits
from earlyfusion.engine.backends.interface import Product
from earlyfusion.engine.backends.torch import FusedTransformer
from earlyfusion.engine.backends.torch import Layer as FusedLayer
from earlyfusion.engine.cache import Cache
from earlyfusion.engine.draw import NOTHING
from earlyfusion.engine.static.grammars import Grammars
from earlyfusion.engine.static.rows import SKIPPED, Rows
from earlyfusion.generation import guidance
from earlyfusion.generation.grammar import SLOT
from earlyfusion.generation.sampler import NEVER, penalise, pick, sound, warp
from earlyfusion.kernels.decode import Angles, HeadNorms, LayerBlocks
from earlyfusion.kernels.operations import Operations
from earlyfusion.model.quantise import PackedLinear
from earlyfusion.model.transformer import Block, RMSNorm, Transformer


class Layer(NamedTuple):
    """One block: its products, norms and keys and values."""

    qkv: Product
    head_norms: HeadNorms
    out: Product
    gate_up: Product
    down: Product
    activate: Callable[[Tensor], Tensor]
    attention_norm: RMSNorm
    feed_forward_norm: RMSNorm
    blocks: LayerBlocks


class _Place(NamedTuple):
    """Where each row's new token is stored, and what it sees."""

    position_R: Tensor
    length_R: Tensor
    table_RW: Tensor


class Kind(NamedTuple):
    """What is captured apart: rows that draw codes alone read a small part of the head, and greedy
    rows need no order of the logits."""

    only_codes: bool
    greedy: bool


class StaticStep:
    """The step of one model over one cache. `codes_V` are the ids of the codes, in order."""

    def __init__(
        self,
        transformer: Transformer,
        fused: FusedTransformer,
        cache: Cache,
        operations: Operations,
        grammars: Grammars,
        codes_V: Tensor,
    ) -> None:
        config = transformer.config
        self._operations, self._grammars = operations, grammars
        self._embedding, self._norm = transformer.model.embed_tokens, transformer.model.norm
        self._head, self._norm_after = transformer.lm_head, config.swin_norm
        self._codes_V, self._code_logits = codes_V, fused.product(codes_V)
        self._shape = (-1, config.num_attention_heads + 2 * config.kv_heads, config.head_dim)
        self._angles = Angles(*(_and_one_more(table) for table in fused.angles))
        blocks = cast("Iterable[Block]", transformer.model.layers)
        layers = zip(blocks, fused.layers, cache.layers, strict=True)
        self._layers = [
            self._layer(block, layer, LayerBlocks(*held)) for block, layer, held in layers
        ]

    def run(self, rows: Rows, kind: Kind) -> None:
        """Read each row's token, draw the next, and write it to `rows.tokens_NR`."""
        # The kernels want their integers next to each other.
        at = _Place(rows.position_R.contiguous(), rows.position_R + 1, rows.table_RW)
        x_RD = self._states(rows.token_R, at)
        token_R, drawn_R = self._draw(rows, x_RD, kind)
        self._advance(rows, token_R, drawn_R)

    # ---- transformer

    def _states(self, token_R: Tensor, at: _Place) -> Tensor:
        """The input of the head [R, D]."""
        x_RD = self._embedding(token_R)
        if self._norm_after:
            for layer in self._layers:
                x_RD = x_RD + layer.attention_norm(self._attention(layer, x_RD, at))
                x_RD = x_RD + layer.feed_forward_norm(self._feed_forward(layer, x_RD))
            normed_RD: Tensor = self._norm(x_RD)
            return normed_RD
        add_norm = self._operations.add_norm
        normed_RD = self._layers[0].attention_norm(x_RD)
        # The norm behind each sum is that of the next part.
        nexts = [*(layer.attention_norm for layer in self._layers[1:]), self._norm]
        for layer, norm in zip(self._layers, nexts, strict=True):
            y_RD, norm_y = self._attention(layer, normed_RD, at), layer.feed_forward_norm
            x_RD, normed_RD = add_norm(x_RD, y_RD, norm_y.weight, norm_y.eps)
            y_RD = self._feed_forward(layer, normed_RD)
            x_RD, normed_RD = add_norm(x_RD, y_RD, norm.weight, norm.eps)
        return normed_RD

    def _attention(self, layer: Layer, x_RD: Tensor, at: _Place) -> Tensor:
        qkv_RMH = layer.qkv(x_RD).view(self._shape)
        q_RNH = self._operations.norm_rotate_store(
            qkv_RMH, layer.head_norms, self._angles, at.position_R, layer.blocks, at.table_RW
        )
        out_RNH = self._operations.attend(q_RNH, layer.blocks, at.table_RW, at.length_R)
        return layer.out(out_RNH.flatten(1))

    def _feed_forward(self, layer: Layer, x_RD: Tensor) -> Tensor:
        return layer.down(layer.activate(layer.gate_up(x_RD)))

    # ---- draw

    def _draw(self, rows: Rows, x_RD: Tensor, kind: Kind) -> tuple[Tensor, Tensor]:
        """The next token of each row, and whether it could be drawn."""
        if kind.only_codes:
            logits_RV = self._guided(rows, self._code_logits(x_RD).float())
        else:
            logits_RV = self._guided(rows, whole_logits(self._head, x_RD))
            allowed_RV = self._grammars.mask(rows.state_RF, rows.grammar_R)
            logits_RV = logits_RV.masked_fill(~allowed_RV, NEVER)
        sound_R = sound(logits_RV)
        logits_RV = torch.where(sound_R[:, None], logits_RV, 0)
        column_R = self._columns(rows, logits_RV, kind)
        token_R = self._codes_V[column_R] if kind.only_codes else column_R
        forced_R = self._grammars.forced(rows.state_RF, rows.grammar_R)
        token_R = torch.where(forced_R >= 0, forced_R, token_R)
        full_R = rows.conditions.full_R
        return token_R[full_R], (sound_R | (forced_R >= 0))[full_R]

    def _guided(self, rows: Rows, logits_RV: Tensor) -> Tensor:
        full_R, image_only_R, unconditional_R = rows.conditions
        text_R1, image_R1 = rows.guidance_2R1
        full_RV = logits_RV[full_R]
        guided_RV = guidance.combine(
            full_RV, logits_RV[image_only_R], logits_RV[unconditional_R], text_R1, image_R1
        )
        # A request of one branch has nothing to mix.
        return torch.where((full_R == unconditional_R)[:, None], full_RV, guided_RV)

    def _columns(self, rows: Rows, logits_RV: Tensor, kind: Kind) -> Tensor:
        text, image = rows.warps
        settings = image
        if not kind.only_codes:
            # Codes have no penalty.
            settings = image.where(rows.state_RF[:, SLOT] > 0, text)
            logits_RV = penalise(logits_RV, rows.seen_RV, settings.penalty_B)
        best_R = logits_RV.argmax(-1)
        if kind.greedy:
            return best_R
        uniform_R = rows.uniforms_NR.index_select(0, rows.step_1)[0]
        drawn_R = pick(warp(logits_RV, settings), uniform_R)
        return torch.where(settings.temperature_B == 0, best_R, drawn_R)

    # ---- the next state

    def _advance(self, rows: Rows, token_R: Tensor, drawn_R: Tensor) -> None:
        before_RF, alive_R = rows.state_RF, rows.alive_R > 0
        shown_R = torch.where(drawn_R, token_R, NOTHING)
        shown_R = torch.where(alive_R, shown_R, SKIPPED)
        rows.tokens_NR.index_copy_(0, rows.step_1, shown_R[None])
        rows.step_1.add_(1)
        moves_R = alive_R & drawn_R
        after_RF = self._grammars.advance(before_RF, token_R, rows.grammar_R)
        slot_R, was_R = after_RF[:, SLOT], before_RF[:, SLOT]
        ends_R = self._grammars.done(after_RF, rows.grammar_R)
        ends_R |= (was_R == 0) & (slot_R > 0) & (rows.stops_at_begin_R > 0)
        ends_R |= (was_R > 0) & (slot_R == 0) & (rows.stops_at_end_R > 0)
        ends_R |= rows.position_R + 2 > rows.capacity_R  # no place for the token behind this one
        rows.state_RF.copy_(torch.where(moves_R[:, None], after_RF, before_RF))
        rows.token_R.copy_(torch.where(moves_R, token_R, rows.token_R))
        rows.position_R.add_(moves_R)
        rows.seen_RV.scatter_(1, rows.token_R[:, None], True)
        rows.alive_R.copy_(moves_R & ~ends_R)

    # ---- weights

    def _layer(self, block: Block, fused: FusedLayer, held: LayerBlocks) -> Layer:
        attention, mlp = block.self_attn, block.mlp
        plain = isinstance(mlp.act_fn, nn.SiLU)
        return Layer(
            self._product(fused.qkv, attention.q_proj, attention.k_proj, attention.v_proj),
            HeadNorms(fused.head_weight, fused.head_bias),
            self._product(fused.out, attention.o_proj),
            self._product(fused.gate_up, mlp.gate_proj, mlp.up_proj),
            self._product(fused.down, mlp.down_proj),
            self._operations.gated if plain else _activated(mlp.act_fn),
            block.input_layernorm,
            block.post_attention_layernorm,
            held,
        )

    def _product(self, fused: Product, *linears: nn.Module) -> Product:
        """The product of these layers, which reads packed weights as they are."""
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


def _activated(activation: nn.Module) -> Callable[[Tensor], Tensor]:
    def activate(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return cast("Tensor", activation(gate) * up)

    return activate


def _and_one_more(table_P1H: Tensor) -> Tensor:
    """The angles [P + 1, H]: a frozen row may stand one behind the longest sequence."""
    return F.pad(table_P1H[:, 0], (0, 0, 0, 1))
