"""Replaces modules of `model/` by faster ones, their twins: `accelerate` swaps the modules'
classes.

A twin is a subclass of the class that it replaces, with the same name, parameters and results. In
each call it decides whether its fast code applies, and otherwise calls the original. So a model
keeps its state dict, can be copied, pickled, moved, trained, hooked, compiled and exported as
before, and `isinstance` still holds.

`CausalAttend` is not a module: training takes its twin from `fused.py`.
"""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from earlyfusion.kernels import fused, unpack
from earlyfusion.kernels import vqgan as fast_vqgan
from earlyfusion.model import quantise, transformer, vqgan

Model = TypeVar("Model", bound=nn.Module)

TWINS: dict[type[nn.Module], type[nn.Module]] = {
    vqgan.VQGAN: fast_vqgan.VQGAN,
    vqgan.Encoder: fast_vqgan.Encoder,
    vqgan.Decoder: fast_vqgan.Decoder,
    vqgan.ResBlock: fast_vqgan.ResBlock,
    vqgan.SpatialAttention: fast_vqgan.SpatialAttention,
    vqgan.Downsample: fast_vqgan.Downsample,
    vqgan.Upsample: fast_vqgan.Upsample,
    transformer.RMSNorm: fused.RMSNorm,
    transformer.Attention: fused.Attention,
    transformer.FeedForward: fused.FeedForward,
    quantise.PackedLinear: unpack.PackedLinear,
}
_ORIGINALS = {twin: original for original, twin in TWINS.items()}


def accelerate(model: Model) -> Model:
    """The same model, with twins in place of the modules that have one. Modules of other classes,
    even derived ones, do not change. Call it again for modules that are put in later."""
    for module in model.modules():
        # No new module: hooks, buffers and references to this one stay valid.
        module.__class__ = TWINS.get(type(module), type(module))
    return model


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class of `model/` that a twin replaces; for other modules, their own class."""
    return _ORIGINALS.get(type(module), type(module))
