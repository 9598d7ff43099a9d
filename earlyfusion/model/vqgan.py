"""The VQ-GAN: pictures <-> codes (arXiv 2405.09818, section 2.1; Esser et al. 2021).

Choices, so that released weights load without translation:
- parameter names are those of the original checkpoints (`encoder.down.0.block.0.conv1.weight`);
- group norm with 32 groups and eps 1e-6, swish, nearest-neighbour upsampling, and a downsampling
  convolution that pads one pixel on the right and at the bottom only;
- one attention block in the middle always, others where a level's side is in `attn_resolutions`;
- no activation at the end of the decoder: pixels are meant for [-1, 1] and clamped by the caller.

For inference in fp32 on a CPU everything is channels-last, and the 3 x 3 convolutions run, with the
norm, swish, enlargement or sum beside them, in the compiled code of `conv.py` where it can be
built. Training, GPUs and other dtypes take torch's own operators.

Any height and width that the stride divides will do. Shapes: B batch, C channels, Y X height and
width in pixels, y x in codes, K codebook size, N vectors.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from earlyfusion.config import VQConfig
from earlyfusion.errors import CheckpointError, ImageError
from earlyfusion.kernels import conv as winograd

_SEARCH_ELEMENTS = 1 << 20  # scores held at once by the codebook search: 4 MB in fp32
_FEWEST_TILES = 64  # under so many tiles of 4 x 4 pixels a direct convolution is as fast


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


def _conv3(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


def _inferring(x: Tensor) -> bool:
    """Whether a CPU computes in fp32, without a graph."""
    on_cpu = x.device.type == "cpu" and x.dtype == torch.float32
    traced = torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu")
    return on_cpu and not torch.is_grad_enabled() and not traced and winograd.wanted()


def _compiled(x_BCYX: Tensor, conv: nn.Module, scale: int = 1, missing: int = 0) -> bool:
    """Whether `winograd.conv3x3` takes this convolution, of `x` enlarged `scale` times.

    `missing` channels are to be added to `x`.
    """
    if type(conv) is not nn.Conv2d or not _inferring(x_BCYX):
        return False
    b, c, y, x = x_BCYX.shape
    whole = not ((c + missing) % 16 or y * scale % 4 or x * scale % 4)
    enough = b * y * x * scale**2 >= 16 * _FEWEST_TILES
    plain = conv.weight.device.type == "cpu" and conv.weight.dtype == torch.float32
    return whole and enough and plain and winograd.available()


def _last(x_BCYX: Tensor) -> Tensor:
    """Channels last: [B, Y, X, C], contiguous."""
    return x_BCYX.permute(0, 2, 3, 1).contiguous()


def _first(x_BYXC: Tensor) -> Tensor:
    return x_BYXC.permute(0, 3, 1, 2)


def _laid_out(x_BCYX: Tensor) -> Tensor:
    """Channels last in memory where that is faster; the operators after it keep it so."""
    layout = torch.channels_last if _inferring(x_BCYX) else torch.preserve_format
    return x_BCYX.to(memory_format=layout)


def _swished(
    x_BCYX: Tensor,
    norm: nn.GroupNorm,
    conv: nn.Conv2d,
    plus_BCYX: Tensor | None = None,
    in_place: bool = False,
) -> Tensor:
    """`conv(silu(norm(x)))`, plus the shortcut; `in_place` may overwrite `x`."""
    if _compiled(x_BCYX, conv) and norm.weight.device.type == "cpu":
        x_BYXC = _last(x_BCYX)
        plus = None if plus_BCYX is None else _last(plus_BCYX)
        before = winograd.swish_after(norm, x_BYXC)
        bias = cast("Tensor", conv.bias)
        return _first(winograd.conv3x3(x_BYXC, conv.weight, bias, before, plus, in_place=in_place))
    out = conv(F.silu(norm(x_BCYX)))
    return out if plus_BCYX is None else out.add_(plus_BCYX) if in_place else out + plus_BCYX


def _mixed(x_BCYX: Tensor, conv: nn.Conv2d) -> Tensor:
    """A 1 x 1 convolution: one matrix product where channels come last."""
    if not _compiled(x_BCYX, conv):
        return conv(x_BCYX)
    x_BYXC = _last(x_BCYX)
    out_BYXK = winograd.empty(*x_BYXC.shape[:3], conv.out_channels)
    x_NC, out_NK = x_BYXC.flatten(0, 2), out_BYXK.flatten(0, 2)
    torch.addmm(cast("Tensor", conv.bias), x_NC, conv.weight.flatten(1).T, out=out_NK)
    return _first(out_BYXK)


def _from_pixels(pixels_BCYX: Tensor, conv: nn.Conv2d) -> Tensor:
    """The first convolution, whose few channels are filled up with zeros where it is compiled."""
    missing = -pixels_BCYX.shape[1] % 16
    if not _compiled(pixels_BCYX, conv, missing=missing):
        return conv(_laid_out(pixels_BCYX))
    x_BYXC = F.pad(pixels_BCYX.permute(0, 2, 3, 1), (0, missing))
    weight_KC33 = F.pad(conv.weight, (0, 0, 0, 0, 0, missing))
    return _first(winograd.conv3x3(x_BYXC, weight_KC33, cast("Tensor", conv.bias)))


def _memory(x: Tensor) -> AbstractContextManager[None]:
    return winograd.reusing() if _inferring(x) else nullcontext()


class ResBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.conv1 = _norm(inputs), _conv3(inputs, outputs)
        self.norm2, self.conv2 = _norm(outputs), _conv3(outputs, outputs)
        self.dropout = nn.Dropout(dropout)
        if inputs != outputs:
            self.nin_shortcut = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x_BCYX: Tensor) -> Tensor:
        h = _swished(x_BCYX, self.norm1, self.conv1)
        short = _mixed(x_BCYX, self.nin_shortcut) if hasattr(self, "nin_shortcut") else x_BCYX
        if self.training and self.dropout.p:
            return self.conv2(self.dropout(F.silu(self.norm2(h)))) + short
        return _swished(h, self.norm2, self.conv2, short, in_place=_inferring(x_BCYX))


class SpatialAttention(nn.Module):
    """Single-head attention over all positions of a feature map."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x_BCYX: Tensor) -> Tensor:
        h = self.norm(x_BCYX)
        q, k, v = (f(h).flatten(2).transpose(1, 2).unsqueeze(1) for f in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q, k, v).squeeze(1).transpose(1, 2)
        return x_BCYX + self.proj_out(out.reshape(x_BCYX.shape))


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x_BCYX: Tensor) -> Tensor:
        conv, even = self.conv, not (x_BCYX.shape[2] % 2 or x_BCYX.shape[3] % 2)
        plain = type(conv) is nn.Conv2d and conv.weight.device == x_BCYX.device
        if _inferring(x_BCYX) and even and plain:
            # A pixel more on each side, and the first row and column of results left out: no copy.
            return F.conv2d(x_BCYX, conv.weight, conv.bias, 2, padding=2)[:, :, 1:, 1:]
        return conv(F.pad(x_BCYX, (0, 1, 0, 1)))


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = _conv3(channels, channels)

    def forward(self, x_BCYX: Tensor) -> Tensor:
        if _compiled(x_BCYX, self.conv, scale=2):
            bias = cast("Tensor", self.conv.bias)
            return _first(winograd.conv3x3(_last(x_BCYX), self.conv.weight, bias, upsample=True))
        return self.conv(F.interpolate(x_BCYX, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The blocks of one resolution, with attention after each where the config asks for it.

    The encoder gives a `downsample` to all levels but the last, the decoder an `upsample`.
    """

    downsample: Downsample
    upsample: Upsample

    def __init__(self, channels: Sequence[int], attend: bool, dropout: float) -> None:
        super().__init__()
        pairs = list(pairwise(channels))
        self.block = nn.ModuleList(ResBlock(i, o, dropout) for i, o in pairs)
        self.attn = nn.ModuleList(SpatialAttention(o) for _, o in pairs if attend)

    def parts(self) -> Iterator[nn.Module]:
        for at, block in enumerate(self.block):
            yield block
            yield from self.attn[at : at + 1]

    def forward(self, x_BCYX: Tensor) -> Tensor:
        for part in self.parts():
            x_BCYX = part(x_BCYX)
        return x_BCYX


def _steps(levels: Iterable[nn.Module], apart: bool) -> Iterator[nn.Module]:
    """Levels, and what changes the size after each.

    `apart` gives the parts of a level, so that the input of one is free before the next runs.
    """
    for level in cast("Iterable[Level]", levels):
        yield from level.parts() if apart else (level,)
        yield from (part for name, part in level.named_children() if name.endswith("sample"))


class Middle(nn.Module):
    def __init__(self, channels: int, config: VQConfig) -> None:
        super().__init__()
        self.block_1 = ResBlock(channels, channels, config.dropout)
        vanilla = config.attn_type == "vanilla"
        self.attn_1 = SpatialAttention(channels) if vanilla else nn.Identity()
        self.block_2 = ResBlock(channels, channels, config.dropout)

    def forward(self, x_BCYX: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x_BCYX)))


class Encoder(nn.Module):
    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        widths = [config.base_channels * m for m in config.channel_multiplier]
        self.conv_in = _conv3(config.in_channels, config.base_channels)
        self.down = nn.ModuleList()
        side, inputs = config.resolution, config.base_channels
        for depth, width in enumerate(widths):
            channels = [inputs] + [width] * config.num_res_blocks
            level = Level(channels, side in config.attn_resolutions, config.dropout)
            inputs = channels[-1]  # without blocks a level keeps its width
            if depth < len(widths) - 1:
                level.downsample = Downsample(inputs)
                side //= 2
            self.down.append(level)
        self.mid = Middle(inputs, config)
        self.norm_out = _norm(inputs)
        out = config.latent_channels * (2 if config.double_latent else 1)
        self.conv_out = _conv3(inputs, out)

    def forward(self, pixels_BCYX: Tensor) -> Tensor:
        h = _from_pixels(pixels_BCYX, self.conv_in)
        for step in _steps(self.down, apart=_inferring(h)):
            h = step(h)
        return _swished(self.mid(h), self.norm_out, self.conv_out)


class Decoder(nn.Module):
    """Levels are stored from high to low resolution and run from the last one down."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        widths = [config.base_channels * m for m in config.channel_multiplier]
        self.conv_in = _conv3(config.latent_channels, widths[-1])
        self.mid = Middle(widths[-1], config)
        side, inputs = config.resolution // config.stride, widths[-1]
        levels: list[Level] = []
        for depth in reversed(range(len(widths))):
            channels = [inputs] + [widths[depth]] * (config.num_res_blocks + 1)
            level = Level(channels, side in config.attn_resolutions, config.dropout)
            if depth > 0:
                level.upsample = Upsample(widths[depth])
                side *= 2
            levels.insert(0, level)
            inputs = widths[depth]
        self.up = nn.ModuleList(levels)
        self.norm_out = _norm(inputs)
        self.conv_out = _conv3(inputs, config.in_channels)

    def forward(self, latents_BCyx: Tensor) -> Tensor:
        h = self.mid(self.conv_in(_laid_out(latents_BCyx)))
        for step in _steps(reversed(self.up), apart=_inferring(h)):
            h = step(h)
        return _swished(h, self.norm_out, self.conv_out)


class Quantizer(nn.Module):
    """The codebook. Called with latents, it gives what training the tokenizer needs of them."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.beta = 0.25  # the codebook's share of the loss
        codewords = torch.empty(config.num_embeddings, config.embed_dim)
        # Random numbers without memory for them: torch would load its compiler for that.
        codewords = codewords if codewords.is_meta else codewords.normal_()
        self.embedding = nn.Embedding.from_pretrained(codewords, freeze=False)

    def search(self, vectors_NC: Tensor) -> Tensor:
        """Nearest codeword of each vector, int64 [N]; the first one on ties."""
        weight_KC = self.embedding.weight
        half_norm_K = weight_KC.square().sum(1) / 2
        rows = max(1, _SEARCH_ELEMENTS // len(weight_KC))
        pieces = vectors_NC.to(weight_KC.dtype).split(rows)
        scores = (torch.addmm(half_norm_K, piece, weight_KC.T, alpha=-1) for piece in pieces)
        return torch.cat([score.argmin(1) for score in scores])

    def codes(self, latents_BCyx: Tensor) -> Tensor:
        """Nearest codeword of each latent, int64 [B, y, x]."""
        b, c, y, x = latents_BCyx.shape
        return self.search(latents_BCyx.permute(0, 2, 3, 1).reshape(-1, c)).view(b, y, x)

    def embed(self, codes_Byx: Tensor) -> Tensor:
        """Codewords of codes: [B, embed_dim, y, x]."""
        return self.embedding(codes_Byx).permute(0, 3, 1, 2)

    def forward(self, latents_BCyx: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codewords, through which gradients pass as if not there; loss; codes, flat [B * y * x].

        The loss is van den Oord et al.'s (2017), with `beta` on the codebook.
        """
        codes_Byx = self.codes(latents_BCyx.detach())
        nearest = self.embed(codes_Byx)
        commitment = (nearest.detach() - latents_BCyx).square().mean()
        codebook = (nearest - latents_BCyx.detach()).square().mean()
        through = latents_BCyx + (nearest - latents_BCyx).detach()
        return through, commitment + self.beta * codebook, codes_Byx.flatten()


class Quantized(NamedTuple):
    """What training needs of one pass: `latents` before and `nearest` after the codebook."""

    pixels: Tensor
    latents: Tensor
    nearest: Tensor
    codes: Tensor


class VQGAN(nn.Module):
    """Encoder, codebook and decoder. `decoder` is None where a checkpoint comes without one."""

    def __init__(self, config: VQConfig, with_decoder: bool = True) -> None:
        super().__init__()
        config.check()
        self.config = config
        self.encoder = Encoder(config)
        self.quantize = Quantizer(config)
        latent = config.latent_channels
        self.quant_conv = nn.Conv2d(latent, config.embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.embed_dim, latent, 1)
        self.decoder = Decoder(config) if with_decoder else None

    def latents(self, pixels_BCYX: Tensor) -> Tensor:
        """Encoder output after `quant_conv`, [B, embed_dim, y, x]; pixels are in [-1, 1].

        Raises `ImageError` where the stride does not divide height and width.
        """
        stride, (height, width) = self.config.stride, pixels_BCYX.shape[-2:]
        if height % stride or width % stride or not height or not width:
            raise ImageError(
                f"a picture of {width} x {height} pixels cannot be cut into codes: "
                f"both sides must be multiples of {stride}"
            )
        with _memory(pixels_BCYX):
            return self.quant_conv(self.encoder(pixels_BCYX))

    def encode(self, pixels_BCYX: Tensor) -> Tensor:
        """Codes of pictures in [-1, 1]: int64 [B, y, x]."""
        return self.nearest_codes(self.latents(pixels_BCYX))

    def embed(self, codes_Byx: Tensor) -> Tensor:
        """Codewords of codes: [B, embed_dim, y, x]."""
        return self.quantize.embed(codes_Byx)

    def decode(self, codes_Byx: Tensor) -> Tensor:
        """Pictures of codes, about [-1, 1] and not clamped: [B, 3, Y, X].

        Raises `ImageError` for a code outside the codebook, `CheckpointError` without a decoder.
        """
        count = self.config.num_embeddings
        if codes_Byx.numel() and not 0 <= int(codes_Byx.min()) <= int(codes_Byx.max()) < count:
            raise ImageError(f"image codes must lie in 0..{count - 1}, the codebook of this model")
        return self._pixels(self.embed(codes_Byx))

    def forward(self, pixels_BCYX: Tensor, blend: Tensor | float = 1.0) -> Quantized:
        """Reconstruct with a straight-through gradient from the codewords to the encoder.

        The decoder sees latents moved by `blend` of the way to their codewords: 0 leaves the
        codebook out, 1 is the real thing.
        """
        latents = self.latents(pixels_BCYX)
        with torch.autocast(latents.device.type, enabled=False):  # bf16 would miss the nearest
            codes = self.nearest_codes(latents.detach().float())
        nearest = self.embed(codes)
        through = latents + blend * (nearest - latents).detach()
        return Quantized(self._pixels(through), latents, nearest, codes)

    def nearest_codes(self, latents_BCyx: Tensor) -> Tensor:
        return self.quantize.codes(latents_BCyx)

    def _pixels(self, codewords_BCyx: Tensor) -> Tensor:
        if self.decoder is None:
            raise CheckpointError(
                "this checkpoint has no VQ decoder, so codes cannot become pictures: "
                "add one with earlyfusion convert --image-tokenizer"
            )
        with _memory(codewords_BCyx):
            drawn = self.decoder(self.post_quant_conv(codewords_BCyx))
        return drawn.clone() if _inferring(drawn) else drawn
