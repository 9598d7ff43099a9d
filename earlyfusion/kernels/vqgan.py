"""Twins of the VQ-GAN's modules for inference in fp32 on a CPU; `twins.py` puts them in.

They keep everything channels-last, and run the convolutions in the compiled code of `conv.py`,
fused with the adjacent norm, swish, upsampling or sum. Operations left to torch run one image at a
time, as torch's results depend on the batch size in the last bit. For anything else (training,
GPUs, other dtypes, autocast, traced code, `torch_convolutions`) a twin calls the module that it
derives from; it decides in each call, as a model may be moved or trained in between. A convolution
replaced by a module of another class is called as it is. Twins carry the names of their originals,
which libraries look for.
"""

# Shapes: B batch, Y X height and width, C K channels in and out, N pixels.

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from earlyfusion.kernels.conv import (
    available,
    conv1x1,
    conv3x3,
    norm_factors,
    reusing,
    uses_torch,
)
from earlyfusion.model import vqgan


class ResBlock(vqgan.ResBlock):
    def forward(self, x_BCYX: Tensor) -> Tensor:
        if not _is_cpu_inference(x_BCYX):
            return super().forward(x_BCYX)
        h = _swish_conv(x_BCYX, self.norm1, self.conv1)
        short = _conv1x1(x_BCYX, self.nin_shortcut) if hasattr(self, "nin_shortcut") else x_BCYX
        # In training mode dropout is active even without gradients.
        if self.training and self.dropout.p:
            return self.conv2(self.dropout(F.silu(self.norm2(h)))) + short
        # Nobody else uses `h`, so the second convolution may overwrite it.
        return _swish_conv(h, self.norm2, self.conv2, short, in_place=True)


class SpatialAttention(vqgan.SpatialAttention):
    def forward(self, x_BCYX: Tensor) -> Tensor:
        if not _is_cpu_inference(x_BCYX):
            return super().forward(x_BCYX)
        convs = (self.q, self.k, self.v, self.proj_out)
        if not (_is_plain(self.norm) and all(_fits(x_BCYX, conv) for conv in convs)):
            return _per_image(super().forward, x_BCYX)
        x_BYXC = _channels_last(x_BCYX)
        scale_B11C, shift_B11C = (t[:, None, None] for t in norm_factors(self.norm, x_BYXC))
        h_BYXC = x_BYXC * scale_B11C + shift_B11C
        q, k, v = (_compiled_conv1x1(h_BYXC, conv).flatten(1, 2).unsqueeze(1) for conv in convs[:3])
        images = zip(q.split(1), k.split(1), v.split(1), strict=True)
        out = torch.cat([F.scaled_dot_product_attention(*qkv) for qkv in images])
        return _channels_first(_compiled_conv1x1(out.view(x_BYXC.shape), self.proj_out, x_BYXC))


class Downsample(vqgan.Downsample):
    def forward(self, x_BCYX: Tensor) -> Tensor:
        if not _is_cpu_inference(x_BCYX):
            return super().forward(x_BCYX)
        conv, even = self.conv, not (x_BCYX.shape[2] % 2 or x_BCYX.shape[3] % 2)
        plain = type(conv) is nn.Conv2d and conv.weight.device == x_BCYX.device
        if not (even and plain):
            return _per_image(super().forward, x_BCYX)
        # Padding of two on each side, then dropping the first row and column of the result, gives
        # the same values as padding on the right and at the bottom, but without a padded copy.
        return _per_image(lambda x: F.conv2d(x, conv.weight, conv.bias, 2, 2)[:, :, 1:, 1:], x_BCYX)


class Upsample(vqgan.Upsample):
    def forward(self, x_BCYX: Tensor) -> Tensor:
        if not _is_cpu_inference(x_BCYX):
            return super().forward(x_BCYX)
        if not _is_compiled(x_BCYX, self.conv, scale=2):
            return _per_image(super().forward, x_BCYX)
        x_BYXC, conv, bias_K = _channels_last(x_BCYX), self.conv, cast("Tensor", self.conv.bias)
        return _channels_first(conv3x3(x_BYXC, conv.weight, bias_K, upsample=True, owner=conv))


class Encoder(vqgan.Encoder):
    def forward(self, pixels_BCYX: Tensor) -> Tensor:
        if not _is_cpu_inference(pixels_BCYX):
            return super().forward(pixels_BCYX)
        h = _conv3x3(pixels_BCYX, self.conv_in)
        for module in _modules_in_order(self.down):
            h = module(h)
        return _swish_conv(self.mid(h), self.norm_out, self.conv_out)


class Decoder(vqgan.Decoder):
    def forward(self, latents_BCyx: Tensor) -> Tensor:
        if not _is_cpu_inference(latents_BCyx):
            return super().forward(latents_BCyx)
        h = self.mid(_conv3x3(latents_BCyx, self.conv_in))
        for module in _modules_in_order(reversed(self.up)):
            h = module(h)
        return _swish_conv(h, self.norm_out, self.conv_out)


class VQGAN(vqgan.VQGAN):
    def latents(self, pixels_BCYX: Tensor) -> Tensor:
        if not _is_cpu_inference(pixels_BCYX):
            return super().latents(pixels_BCYX)
        self.check_size(pixels_BCYX)
        with reusing():
            # A copy, so that the result does not keep the much larger reused memory alive.
            return _conv1x1(self.encoder(pixels_BCYX), self.quant_conv).clone()

    def pixels(self, codewords_BCyx: Tensor) -> Tensor:
        if self.decoder is None or not _is_cpu_inference(codewords_BCyx):
            return super().pixels(codewords_BCyx)
        with reusing():
            return self.decoder(_conv1x1(codewords_BCyx, self.post_quant_conv)).clone()


# ---- when the fast code applies, and its operations


def _is_cpu_inference(x: Tensor) -> bool:
    """Whether this is inference in fp32 on a CPU: no gradients, no autocast, no tracing."""
    fp32_on_cpu = x.device.type == "cpu" and x.dtype == torch.float32
    traced = torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu")
    return fp32_on_cpu and not torch.is_grad_enabled() and not traced and not uses_torch()


def _fits(x_BCYX: Tensor, conv: nn.Module, missing: int = 0) -> bool:
    """Whether the compiled code supports this convolution, of `x` with `missing` channels of zeros
    added."""
    if type(conv) is not nn.Conv2d or not _is_cpu_inference(x_BCYX) or conv.bias is None:
        return False
    plain = conv.weight.device.type == "cpu" and conv.weight.dtype == torch.float32
    # conv.cpp reads channels in vectors of 16.
    return (x_BCYX.shape[1] + missing) % 16 == 0 and plain and available()


def _is_compiled(x_BCYX: Tensor, conv: nn.Module, scale: int = 1, missing: int = 0) -> bool:
    """Whether `conv3x3` can run this, with `x` upsampled: it writes tiles of 4 x 4."""
    y, x = x_BCYX.shape[2:]
    return not (y * scale % 4 or x * scale % 4) and _fits(x_BCYX, conv, missing)


def _is_plain(norm: nn.Module) -> bool:
    """Whether the compiled code can compute this norm."""
    if type(norm) is not nn.GroupNorm or not norm.affine:
        return False
    return norm.weight.device.type == "cpu" and norm.weight.dtype == torch.float32


def _per_image(run: Callable[[Tensor], Tensor], x_BCYX: Tensor) -> Tensor:
    """The results of the images, computed one at a time."""
    return run(x_BCYX) if len(x_BCYX) == 1 else torch.cat([run(x) for x in x_BCYX.split(1)])


def _modules_in_order(levels: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """The parts of each level and its change of size, in the order they run. Parts instead of
    levels, so that the input of each is freed before the next runs."""
    for level in levels:
        yield from level.parts() if isinstance(level, vqgan.Level) else (level,)
        yield from (child for name, child in level.named_children() if name.endswith("sample"))


def _channels_last(x_BCYX: Tensor) -> Tensor:
    """Channels last: [B, Y, X, C], contiguous."""
    return x_BCYX.permute(0, 2, 3, 1).contiguous()


def _channels_first(x_BYXC: Tensor) -> Tensor:
    return x_BYXC.permute(0, 3, 1, 2)


def _swish_conv(
    x_BCYX: Tensor,
    norm: nn.GroupNorm,
    conv: nn.Conv2d,
    plus_BCYX: Tensor | None = None,
    in_place: bool = False,
) -> Tensor:
    """`conv(silu(norm(x)))`, plus the shortcut; `in_place` may overwrite `x`."""
    if _is_plain(norm) and _is_compiled(x_BCYX, conv):
        x_BYXC = _channels_last(x_BCYX)
        plus_BYXC = None if plus_BCYX is None else _channels_last(plus_BCYX)
        bias_K = cast("Tensor", conv.bias)
        return _channels_first(
            conv3x3(x_BYXC, conv.weight, bias_K, norm, plus_BYXC, in_place=in_place, owner=conv)
        )
    # In place is safe below: the convolution's result is new.
    out = _per_image(lambda x: conv(F.silu(norm(x))), x_BCYX)
    return out if plus_BCYX is None else out.add_(plus_BCYX)


def _compiled_conv1x1(x_BYXC: Tensor, conv: nn.Conv2d, plus_BYXK: Tensor | None = None) -> Tensor:
    return conv1x1(x_BYXC, conv.weight, cast("Tensor", conv.bias), plus_BYXK)


def _conv1x1(x_BCYX: Tensor, conv: nn.Conv2d) -> Tensor:
    """A 1 x 1 convolution: one matrix product if channels come last."""
    if not _fits(x_BCYX, conv):
        return _per_image(conv, x_BCYX)
    return _channels_first(_compiled_conv1x1(_channels_last(x_BCYX), conv))


def _conv3x3(x_BCYX: Tensor, conv: nn.Conv2d) -> Tensor:
    """The first convolution of a network: its input channels (3 of pixels) are padded with zeros to
    a multiple of 16."""
    missing = -x_BCYX.shape[1] % 16
    if not _is_compiled(x_BCYX, conv, missing=missing):
        # The operators that follow keep this memory format.
        return _per_image(conv, x_BCYX.to(memory_format=torch.channels_last))
    x_BYXC = F.pad(x_BCYX.permute(0, 2, 3, 1), (0, missing))
    weight_KC33 = F.pad(conv.weight, (0, 0, 0, 0, 0, missing))
    return _channels_first(conv3x3(x_BYXC, weight_KC33, cast("Tensor", conv.bias), owner=conv))
