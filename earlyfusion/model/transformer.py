"""The early-fusion transformer: one decoder over one vocabulary of text and image tokens.

Choices, with the section of the paper (arXiv 2405.09818):

- text and image tokens share embedding, layers and head; nothing here knows which is which (2);
- Llama-2's block: RMSNorm, rotary positions, SwiGLU, no biases; grouped keys in the 34B (2.3);
- QK-norm: a LayerNorm with weight and bias over each head's queries and keys, before rotation, so
  that competing modalities cannot make norms grow beyond the range of bf16 (2.3);
- with `swin_norm` the norms come after attention and feed-forward instead of before them, as in the
  34B (2.3);
- the feed-forward's gate is SiLU; a config may name another of transformers' activations;
- dropout after attention and after feed-forward, 0.1 in the 7B, none in the 34B (2.3);
- norms and rotation are computed in fp32 and rounded once, as Meta's kernels do.

Parameter names are transformers'. Attention is passed in, one `Attend` per layer, so a layer does
not know its index, nor a cache or a mask. The forward pass returns plain logits: which tokens may
come next is the grammar's business.
"""

# Shapes: B batch, T tokens, D model width, N query heads, K key and value heads, H head width, V
# vocabulary.

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from earlyfusion.config import ModelConfig
from earlyfusion.errors import SettingError
from earlyfusion.model.activations import activation
from earlyfusion.model.attention import Attend, CausalAttend
from earlyfusion.model.rotary import Rotary, check_rope, rotary_tables, rotate


class RMSNorm(nn.Module):
    """RMSNorm in fp32, returned in the input's dtype. `kernels/fused.py` has a twin for training on
    a CPU."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == self.weight.dtype:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        normed = F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps)
        return normed.to(x.dtype)


HEAD_NORM_EPS = 1e-5  # configs do not set it


class HeadNorm(nn.Module):
    """LayerNorm over the width H of each head, in fp32, with a weight and bias per head."""

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(heads, width))
        self.bias = nn.Parameter(torch.zeros(heads, width))

    def forward(self, x_BTNH: Tensor) -> Tensor:
        normed = F.layer_norm(x_BTNH.float(), x_BTNH.shape[-1:], eps=HEAD_NORM_EPS)
        return torch.addcmul(self.bias.float(), normed, self.weight.float())


class Attention(nn.Module):
    """Projections, QK-norm and rotation; `attend` computes the attention itself.

    `kernels/fused.py` has a twin for training on a CPU.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        D, H, bias = config.hidden_size, config.head_dim, config.attention_bias
        N, K = config.num_attention_heads, config.kv_heads
        self.head_dim = H
        self.q_proj = nn.Linear(D, N * H, bias=bias)
        self.k_proj = nn.Linear(D, K * H, bias=bias)
        self.v_proj = nn.Linear(D, K * H, bias=bias)
        self.o_proj = nn.Linear(N * H, D, bias=bias)
        self.q_norm = HeadNorm(N, H)
        self.k_norm = HeadNorm(K, H)

    def forward(self, x_BTD: Tensor, rotary: Rotary, attend: Attend) -> Tensor:
        x_BTD = _to_autocast(x_BTD)
        heads = (*x_BTD.shape[:2], -1, self.head_dim)
        q_BTNH = self.q_proj(x_BTD).view(heads)
        k_BTKH = self.k_proj(x_BTD).view(heads)
        v_BTKH = self.v_proj(x_BTD).view(heads)
        q_BTNH = self._norm_and_rotate(q_BTNH, self.q_norm, rotary)
        k_BTKH = self._norm_and_rotate(k_BTKH, self.k_norm, rotary)
        out: Tensor = self.o_proj(attend(q_BTNH, k_BTKH, v_BTKH).flatten(2))
        return out

    def _norm_and_rotate(self, x_BTNH: Tensor, norm: nn.Module, rotary: Rotary) -> Tensor:
        return rotate(norm(x_BTNH), rotary).to(x_BTNH.dtype)


class FeedForward(nn.Module):
    """The gated feed-forward: down(act(gate(x)) * up(x)); with SiLU it is SwiGLU.

    `kernels/fused.py` has a twin for training on a CPU.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(width, inner, bias=bias)
        self.up_proj = nn.Linear(width, inner, bias=bias)
        self.down_proj = nn.Linear(inner, width, bias=bias)
        self.act_fn = activation(config.hidden_act)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_BTD = _to_autocast(x_BTD)
        out: Tensor = self.down_proj(self._activated(self.gate_proj(x_BTD), self.up_proj(x_BTD)))
        return out

    def _activated(self, gate: Tensor, up: Tensor) -> Tensor:
        return self.act_fn(gate) * up


class Block(nn.Module):
    """Attention and feed-forward, each with a norm before it (after it with `swin_norm`), dropout
    and a residual connection."""

    def __init__(
        self, config: ModelConfig, dropout: float, attention: Attention | None = None
    ) -> None:
        super().__init__()
        self.self_attn = attention or Attention(config)
        self.mlp = FeedForward(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.norm_after = config.swin_norm
        self.dropout = dropout

    def forward(self, x_BTD: Tensor, rotary: Rotary, attend: Attend) -> Tensor:
        def attention(y_BTD: Tensor) -> Tensor:
            out: Tensor = self.self_attn(y_BTD, rotary, attend)
            return out

        x_BTD = x_BTD + self._sublayer(attention, self.input_layernorm, x_BTD)
        return x_BTD + self._sublayer(self.mlp, self.post_attention_layernorm, x_BTD)

    def _sublayer(
        self, sublayer: Callable[[Tensor], Tensor], norm: nn.Module, x_BTD: Tensor
    ) -> Tensor:
        y_BTD = norm(sublayer(x_BTD)) if self.norm_after else sublayer(norm(x_BTD))
        return F.dropout(y_BTD, self.dropout, self.training)


class Decoder(nn.Module):
    """Embedding, blocks and final norm. `forward` takes embedded tokens, so callers may pass other
    embeddings."""

    def __init__(self, config: ModelConfig, dropout: float) -> None:
        super().__init__()
        weight_VD = torch.empty(config.vocab_size, config.hidden_size)
        # `normal_` of a meta tensor would make torch load its compiler.
        weight_VD = weight_VD if weight_VD.is_meta else weight_VD.normal_()
        self.embed_tokens = nn.Embedding.from_pretrained(weight_VD, freeze=False)
        self.layers = nn.ModuleList(Block(config, dropout) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x_BTD: Tensor, rotary: Rotary, attends: Sequence[Attend]) -> Tensor:
        for layer, attend in zip(self.layers, attends, strict=True):
            x_BTD = layer(x_BTD, rotary, attend)
        out: Tensor = self.norm(x_BTD)
        return out


class Transformer(nn.Module):
    """Tokens to logits. `dropout` acts in training mode only."""

    def __init__(self, config: ModelConfig, dropout: float = 0.0) -> None:
        super().__init__()
        if not 0.0 <= dropout < 1.0:
            raise SettingError(f"dropout={dropout} must be at least 0 and below 1")
        config.check()
        check_rope(config)
        self.config = config
        self.model = Decoder(config, dropout)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()

    def forward(
        self,
        tokens_BT: Tensor,
        positions_BT: Tensor | None = None,
        attends: Sequence[Attend] | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """Logits (B, T, V), or (B, 1, V) with `last_only`. By default positions count from 0 and
        attention is causal; `attends` has one entry per layer."""
        x_BTD = self.hidden_states(tokens_BT, positions_BT, attends)
        logits_BTV: Tensor = self.lm_head(x_BTD[:, -1:] if last_only else x_BTD)
        return logits_BTV

    def hidden_states(
        self,
        tokens_BT: Tensor,
        positions_BT: Tensor | None = None,
        attends: Sequence[Attend] | None = None,
    ) -> Tensor:
        """The head's input: (B, T, D) after the final norm. Arguments as in `forward`."""
        if positions_BT is None:
            positions_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)[None]
        if attends is None:
            attends = [CausalAttend()] * self.config.num_hidden_layers
        x_BTD = self.model.embed_tokens(tokens_BT)
        states_BTD: Tensor = self.model(x_BTD, rotary_tables(self.config, positions_BT), attends)
        return states_BTD

    def tie_weights(self) -> None:
        """Let the head share the embedding's parameter if the config says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Draw matrices from N(0, initializer_range^2); norms start with weight 1 and bias 0."""
        init_weights(self.named_parameters(), self.config, generator)


@torch.no_grad()
def init_weights(
    parameters: Iterable[tuple[str, Tensor]],
    config: ModelConfig,
    generator: torch.Generator | None = None,
) -> None:
    """`Transformer.init_weights` for named parameters, one after another."""
    for name, parameter in parameters:
        if name.endswith("bias"):
            parameter.zero_()
        elif "norm" in name:
            parameter.fill_(1.0)
        elif "act_fn" in name:
            continue
        else:
            parameter.normal_(0.0, config.initializer_range, generator=generator)


def _to_autocast(x: Tensor) -> Tensor:
    # Cast once here: autocast would cast it again for every projection.
    return x.to(autocast_dtype(x))


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype to which autocast casts `x`; that of `x` without autocast."""
    device_type = x.device.type
    # Meta tensors, which only carry shapes, do not support autocast.
    on = not x.is_meta and torch.is_autocast_enabled(device_type)
    return torch.get_autocast_dtype(device_type) if on else x.dtype
