"""Checks of a transformer's modules: their classes, and hooks.

Most back ends take the weights out of the modules and compute the forward pass themselves. That is
valid only while calling the modules would give the same result: `is_plain` checks it, and
`fingerprint` in `engine.py` notices later changes.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from earlyfusion.errors import SettingError
from earlyfusion.kernels.twins import TWINS, original_class
from earlyfusion.model.quantise import PackedLinear
from earlyfusion.model.transformer import (
    Attention,
    Block,
    Decoder,
    FeedForward,
    HeadNorm,
    RMSNorm,
    Transformer,
)

_NORMS = ("input_layernorm", "post_attention_layernorm")
CLASSES: tuple[Any, ...] = (
    Transformer, Decoder, Block, Attention, FeedForward, RMSNorm, HeadNorm,
    nn.Embedding, nn.Linear, PackedLinear, *TWINS.values(),
)  # fmt: skip
"""The classes of a transformer that back ends know."""
# Taken at import, so that a `forward` that is patched in a class later is noticed.
_FORWARDS = [module_class.forward for module_class in CLASSES]


def is_plain(transformer: Transformer) -> bool:
    """Whether a forward pass computed from the weights gives the same as calling the modules: all
    are classes of `model/` or linear modules that process tokens independently, and none has
    hooks."""
    untouched = not _has_any_global_hook() and not any(map(_is_touched, transformer.modules()))
    unpatched = [module_class.forward for module_class in CLASSES] == _FORWARDS
    return (
        untouched
        and unpatched
        and type(transformer) is Transformer
        and _has_plain_decoder(transformer)
    )


def check_blocks(transformer: Transformer) -> None:
    """Raise `SettingError` if the layers cannot be called one after the other."""
    layers, number = list(transformer.model.layers), transformer.config.num_hidden_layers
    if len(layers) != number:
        raise SettingError(
            f"the model has {len(layers)} layers, but its config says {number}: "
            "set num_hidden_layers in a config of its own"
        )
    for index, block in enumerate(layers):
        try:
            inspect.signature(block.forward).bind(None, None, None)
        except TypeError:
            raise SettingError(
                f"layers[{index}] is a {type(block).__name__}, which cannot be a layer: its "
                "forward must take (x, rotary, attend), as the block of model/transformer.py does"
            ) from None


def _is_touched(module: nn.Module) -> bool:
    hooked = module._forward_hooks or module._forward_pre_hooks
    return bool(hooked) or "forward" in module.__dict__


def _has_plain_decoder(transformer: Transformer) -> bool:
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
        original_class(attention) is Attention
        and original_class(mlp) is FeedForward
        and all(original_class(getattr(block, name)) is RMSNorm for name in _NORMS)
        and all(type(norm) is HeadNorm for norm in (attention.q_norm, attention.k_norm))
        and all(_is_linear(getattr(attention, f"{name}_proj")) for name in "qkvo")
        and all(_is_linear(getattr(mlp, f"{name}_proj")) for name in ("gate", "up", "down"))
    )


def _is_linear(module: nn.Module) -> bool:
    """Whether a linear module processes tokens independently, so that one call may hold tokens of
    several requests."""
    if type(module) is nn.Linear:
        # Subclasses of Parameter may compute anything.
        return type(module.weight) in (nn.Parameter, Tensor)
    is_adapter = type(module).__module__.startswith("peft.tuners.")
    return original_class(module) is PackedLinear or is_adapter or _is_pointwise(module)


def _is_pointwise(module: nn.Module) -> bool:
    # `pointwise` marks the modules of `tensor_parallel.py`. A class that inherits from one may do
    # anything else in its forward.
    return "pointwise" in vars(type(module))
