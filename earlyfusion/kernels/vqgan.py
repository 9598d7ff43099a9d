"""Twins of the VQ-GAN's modules for inference in fp32 on a CPU; `twins.py` puts them in.

They keep everything channels-last, and run the 3 x 3 convolutions in the compiled code of
`conv.py`, fused with the adjacent norm, swish, enlargement or sum. For anything else (training,
GPUs, other dtypes, autocast, traced code, `left_out`) a twin calls the module that it derives from;
it decides in each call, as a model may be moved or trained in between. A convolution replaced by a
module of another class is called as it is. Twins carry the names of their originals, which
libraries look for.
"""

# Shapes: B batch, Y X height and width, C K channels in and out, N pixels.

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from earlyfusion.kernels.conv import (
    available,
    conv3x3,
    empty,
    is_left_out,
    reusing,
    swish_after,
)
from earlyfusion.model import vqgan

_FEWEST_TILES = 64  # with fewer 4 x 4 tiles a direct convolution is as fast


class ResBlock(vqgan.ResBlock):
    def forward(self, x_BCYX: Tensor) -> Tensor:
        if not _infers(x_BCYX):
            return super().forward(x_BCYX)
        h = _swish_conv(x_BCYX, self.norm1, self.conv1)
        short = _conv1x1(x_BCYX, self.nin_shortcut) if hasattr(self, "nin_shortcut") else x_BCYX
        if (
            self.training and self.dropout.p
        ):  # training mode without gradients: dropout is still active
            return self.conv2(self.dropout(F.silu(self.norm2(h)))) + short
        # Nobody else uses `h`, so the second convolution may overwrite it.
        return _swish_conv(h, self.norm2, self.conv2, short, in_place=True)


class Downsample(vqgan.Downsample):
    def forward(self, x_BCYX: Tensor) -> Tensor:
        conv, even = self.conv, not (x_BCYX.shape[2] % 2 or x_BCYX.shape[3] % 2)
        plain = type(conv) is nn.Conv2d and conv.weight.device == x_BCYX.device
        if not (_infers(x_BCYX) and even and plain):
            return super().forward(x_BCYX)
        # Two pixels on each side instead of one on the right and at the bottom, without the first
        # row and column of the result: the same values, but no padded copy is made.
        return F.conv2d(x_BCYX, conv.weight, conv.bias, 2, padding=2)[:, :, 1:, 1:]


class Upsample(vqgan.Upsample):
    def forward(self, x_BCYX: Tensor) -> Tensor:
        if not _is_compiled(x_BCYX, self.conv, scale=2):
            return super().forward(x_BCYX)
        bias_K = cast("Tensor", self.conv.bias)
        return _first(conv3x3(_last(x_BCYX), self.conv.weight, bias_K, upsample=True))


class Encoder(vqgan.Encoder):
    def forward(self, pixels_BCYX: Tensor) -> Tensor:
        if not _infers(pixels_BCYX):
            return super().forward(pixels_BCYX)
        h = _pixel_conv(pixels_BCYX, self.conv_in)
        for module in _steps(self.down):
            h = module(h)
        return _swish_conv(self.mid(h), self.norm_out, self.conv_out)


class Decoder(vqgan.Decoder):
    def forward(self, latents_BCyx: Tensor) -> Tensor:
        if not _infers(latents_BCyx):
            return super().forward(latents_BCyx)
        # Set the layout once: the operators after it keep it.
        h = self.mid(self.conv_in(latents_BCyx.to(memory_format=torch.channels_last)))
        for module in _steps(reversed(self.up)):
            h = module(h)
        return _swish_conv(h, self.norm_out, self.conv_out)


class VQGAN(vqgan.VQGAN):
    def latents(self, pixels_BCYX: Tensor) -> Tensor:
        if not _infers(pixels_BCYX):
            return super().latents(pixels_BCYX)
        with reusing():
            return super().latents(pixels_BCYX)

    def pixels(self, codewords_BCyx: Tensor) -> Tensor:
        if not _infers(codewords_BCyx):
            return super().pixels(codewords_BCyx)
        with reusing():
            # A copy, so that the result does not keep the much larger reused memory alive.
            return super().pixels(codewords_BCyx).clone()


# ---- whether a twin serves, and what it does then


def _infers(x: Tensor) -> bool:
    """Whether a CPU computes in fp32, without a graph."""
    fp32_on_cpu = x.device.type == "cpu" and x.dtype == torch.float32
    traced = torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu")
    return fp32_on_cpu and not torch.is_grad_enabled() and not traced and not is_left_out()


def _is_compiled(x_BCYX: Tensor, conv: nn.Module, scale: int = 1, missing: int = 0) -> bool:
    """Whether `conv3x3` can run this, with `x` enlarged and `missing` channels added."""
    if type(conv) is not nn.Conv2d or not _infers(x_BCYX):
        return False
    b, c, y, x = x_BCYX.shape
    # conv.cpp reads channels in vectors of 16 and writes tiles of 4 x 4.
    whole = not ((c + missing) % 16 or y * scale % 4 or x * scale % 4)
    enough = b * y * x * scale**2 >= 16 * _FEWEST_TILES
    plain = conv.weight.device.type == "cpu" and conv.weight.dtype == torch.float32
    return whole and enough and plain and available()


def _steps(levels: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """The parts of each level and its change of size, in the order they run. Parts instead of
    levels, so that the input of each is freed before the next runs."""
    for level in levels:
        yield from level.parts() if isinstance(level, vqgan.Level) else (level,)
        yield from (child for name, child in level.named_children() if name.endswith("sample"))


def _last(x_BCYX: Tensor) -> Tensor:
    """Channels last: [B, Y, X, C], contiguous."""
    return x_BCYX.permute(0, 2, 3, 1).contiguous()


def _first(x_BYXC: Tensor) -> Tensor:
    return x_BYXC.permute(0, 3, 1, 2)


def _swish_conv(
    x_BCYX: Tensor,
    norm: nn.GroupNorm,
    conv: nn.Conv2d,
    plus_BCYX: Tensor | None = None,
    in_place: bool = False,
) -> Tensor:
    """`conv(silu(norm(x)))`, plus the shortcut; `in_place` may overwrite `x`."""
    on_cpu = isinstance(norm, nn.GroupNorm) and norm.weight.device.type == "cpu"
    if on_cpu and _is_compiled(x_BCYX, conv):
        x_BYXC = _last(x_BCYX)
        plus_BYXC = None if plus_BCYX is None else _last(plus_BCYX)
        before, bias_K = swish_after(norm, x_BYXC), cast("Tensor", conv.bias)
        return _first(conv3x3(x_BYXC, conv.weight, bias_K, before, plus_BYXC, in_place=in_place))
    # In place is safe below: the convolution's result is new.
    out = conv(F.silu(norm(x_BCYX)))
    return out if plus_BCYX is None else out.add_(plus_BCYX)


def _conv1x1(x_BCYX: Tensor, conv: nn.Conv2d) -> Tensor:
    """A 1 x 1 convolution: one matrix product if channels come last."""
    if not _is_compiled(x_BCYX, conv):
        return conv(x_BCYX)
    x_BYXC = _last(x_BCYX)
    out_BYXK = empty(*x_BYXC.shape[:3], conv.out_channels)
    x_NC, out_NK = x_BYXC.flatten(0, 2), out_BYXK.flatten(0, 2)
    torch.addmm(cast("Tensor", conv.bias), x_NC, conv.weight.flatten(1).T, out=out_NK)
    return _first(out_BYXK)


def _pixel_conv(pixels_BCYX: Tensor, conv: nn.Conv2d) -> Tensor:
    """The first convolution: 3 channels are padded with zeros to the 16 of a vector."""
    missing = -pixels_BCYX.shape[1] % 16
    if not _is_compiled(pixels_BCYX, conv, missing=missing):
        return conv(pixels_BCYX.to(memory_format=torch.channels_last))
    x_BYXC = F.pad(pixels_BCYX.permute(0, 2, 3, 1), (0, missing))
    weight_KC33 = F.pad(conv.weight, (0, 0, 0, 0, 0, missing))
    return _first(conv3x3(x_BYXC, weight_KC33, cast("Tensor", conv.bias)))
