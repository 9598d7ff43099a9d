"""The VQ-GAN: images <-> codes (arXiv 2405.09818, section 2.1; Esser et al. 2021).

Choices that let released weights load without translation:
- parameter names are those of the original checkpoints (`encoder.down.0.block.0.conv1.weight`);
- group norm with 32 groups and eps 1e-6, swish, nearest-neighbour upsampling, and a downsampling
  convolution that pads one pixel on the right and at the bottom only;
- with `attn_type` "vanilla" there is attention in the middle, and after each block of the levels
  whose side is in `attn_resolutions`; with any other type there is none;
- the decoder ends without an activation: pixels are in about [-1, 1], and the caller clamps them.

Height and width may be any multiples of the stride. `kernels/vqgan.py` has twins of these modules
for inference on a CPU.
"""

# Shapes: B batch, C channels, Y X height and width in pixels, y x in codes, K codebook size, N
# vectors.

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from earlyfusion.config import VQConfig
from earlyfusion.errors import CheckpointError, ImageError

# Number of scores that the codebook search computes at a time: 4 MB in fp32 on a CPU; 256 MB on a
# GPU, where fewer and larger launches are faster.
_SEARCH_ELEMENTS, _SEARCH_ELEMENTS_GPU = 1 << 20, 1 << 26


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


def _conv3(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


class ResBlock(nn.Module):
    """Two 3 x 3 convolutions after norm and swish, and a residual connection."""

    def __init__(self, inputs: int, outputs: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.conv1 = _norm(inputs), _conv3(inputs, outputs)
        self.norm2, self.conv2 = _norm(outputs), _conv3(outputs, outputs)
        self.dropout = nn.Dropout(dropout)
        if inputs != outputs:
            self.nin_shortcut = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x_BCYX: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x_BCYX)))
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        shortcut = self.nin_shortcut(x_BCYX) if hasattr(self, "nin_shortcut") else x_BCYX
        return h + shortcut


class SpatialAttention(nn.Module):
    """Single-head attention between all positions of a feature map."""

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
    """Halves height and width by a convolution of stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x_BCYX: Tensor) -> Tensor:
        # One pixel on the right and one at the bottom, as the original does.
        return self.conv(F.pad(x_BCYX, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles height and width: nearest neighbour, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = _conv3(channels, channels)

    def forward(self, x_BCYX: Tensor) -> Tensor:
        return self.conv(F.interpolate(x_BCYX, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The blocks of one resolution, each followed by attention if the config asks for it. All
    levels of the encoder but the last have a `downsample`; in the decoder, an `upsample`."""

    downsample: Downsample
    upsample: Upsample

    def __init__(self, channels: Sequence[int], attend: bool, dropout: float) -> None:
        super().__init__()
        pairs = list(pairwise(channels))
        self.block = nn.ModuleList(ResBlock(i, o, dropout) for i, o in pairs)
        self.attn = nn.ModuleList(SpatialAttention(o) for _, o in pairs if attend)

    def parts(self) -> Iterator[nn.Module]:
        """The blocks in the order they run, each followed by its attention if it has one."""
        for i, block in enumerate(self.block):
            yield block
            yield from self.attn[i : i + 1]

    def forward(self, x_BCYX: Tensor) -> Tensor:
        for part in self.parts():
            x_BCYX = part(x_BCYX)
        return x_BCYX


class Middle(nn.Module):
    """The blocks at the lowest resolution, with attention between them if the config has it."""

    def __init__(self, channels: int, config: VQConfig) -> None:
        super().__init__()
        self.block_1 = ResBlock(channels, channels, config.dropout)
        self.attn_1 = SpatialAttention(channels) if _has_attention(config) else nn.Identity()
        self.block_2 = ResBlock(channels, channels, config.dropout)

    def forward(self, x_BCYX: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x_BCYX)))


def _has_attention(config: VQConfig) -> bool:
    return config.attn_type == "vanilla"


def _attends(config: VQConfig, side: int) -> bool:
    """Whether the blocks of a level whose feature maps have this side are followed by attention."""
    return _has_attention(config) and side in config.attn_resolutions


class Encoder(nn.Module):
    """Pixels [B, 3, Y, X] in -1 to 1 -> latents [B, latent channels, y, x]."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        widths = [config.base_channels * m for m in config.channel_multiplier]
        self.conv_in = _conv3(config.in_channels, config.base_channels)
        self.down = nn.ModuleList()
        side, inputs = config.resolution, config.base_channels
        for depth, width in enumerate(widths):
            channels = [inputs] + [width] * config.num_res_blocks
            level = Level(channels, _attends(config, side), config.dropout)
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
        h = self.conv_in(pixels_BCYX)
        for level in cast("Iterable[Level]", self.down):
            h = level(h)
            if hasattr(level, "downsample"):
                h = level.downsample(h)
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    """Latents [B, latent channels, y, x] -> pixels [B, 3, Y, X], not clamped. Levels are stored
    from high to low resolution and run in reverse."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        widths = [config.base_channels * m for m in config.channel_multiplier]
        self.conv_in = _conv3(config.latent_channels, widths[-1])
        self.mid = Middle(widths[-1], config)
        side, inputs = config.resolution // config.stride, widths[-1]
        levels: list[Level] = []
        for depth in reversed(range(len(widths))):
            channels = [inputs] + [widths[depth]] * (config.num_res_blocks + 1)
            level = Level(channels, _attends(config, side), config.dropout)
            if depth > 0:
                level.upsample = Upsample(widths[depth])
                side *= 2
            levels.insert(0, level)
            inputs = widths[depth]
        self.up = nn.ModuleList(levels)
        self.norm_out = _norm(inputs)
        self.conv_out = _conv3(inputs, config.in_channels)

    def forward(self, latents_BCyx: Tensor) -> Tensor:
        h = self.mid(self.conv_in(latents_BCyx))
        for level in cast("Iterable[Level]", reversed(self.up)):
            h = level(h)
            if hasattr(level, "upsample"):
                h = level.upsample(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class Quantizer(nn.Module):
    """The codebook. Its forward is for training: codewords, loss and codes of latents."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.beta = 0.25  # weight of the codebook loss
        codewords = torch.empty(config.num_embeddings, config.embed_dim)
        # `normal_` of a meta tensor would make torch load its compiler.
        codewords = codewords if codewords.is_meta else codewords.normal_()
        self.embedding = nn.Embedding.from_pretrained(codewords, freeze=False)

    def search(self, vectors_NC: Tensor) -> Tensor:
        """The code of each vector's nearest codeword, int64 [N]; the first one on ties."""
        weight_KC = self.embedding.weight
        # |v - w|^2 / 2 = |v|^2 / 2 - v w + |w|^2 / 2; the first term is the same for all codewords.
        half_norm_K = weight_KC.square().sum(1) / 2
        on_cpu = weight_KC.device.type == "cpu"
        rows = max(1, (_SEARCH_ELEMENTS if on_cpu else _SEARCH_ELEMENTS_GPU) // len(weight_KC))
        pieces = vectors_NC.to(weight_KC.dtype).split(rows)
        scores = (torch.addmm(half_norm_K, piece, weight_KC.T, alpha=-1) for piece in pieces)
        return torch.cat([score.argmin(1) for score in scores])

    def codes(self, latents_BCyx: Tensor) -> Tensor:
        """The code of each latent's nearest codeword, int64 [B, y, x]."""
        b, c, y, x = latents_BCyx.shape
        return self.search(latents_BCyx.permute(0, 2, 3, 1).reshape(-1, c)).view(b, y, x)

    def embed(self, codes_Byx: Tensor) -> Tensor:
        """Codewords of codes: [B, embed_dim, y, x]."""
        return self.embedding(codes_Byx).permute(0, 3, 1, 2)

    def forward(self, latents_BCyx: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codewords with a straight-through gradient; loss; codes, flat [B * y * x]. The loss is
        van den Oord et al.'s (2017), with `beta` on the codebook."""
        codes_Byx = self.codes(latents_BCyx.detach())
        nearest = self.embed(codes_Byx)
        commitment = (nearest.detach() - latents_BCyx).square().mean()
        codebook = (nearest - latents_BCyx.detach()).square().mean()
        straight_through = latents_BCyx + (nearest - latents_BCyx).detach()
        return straight_through, commitment + self.beta * codebook, codes_Byx.flatten()


class Quantized(NamedTuple):
    """A training pass: reconstructed pixels, latents, their nearest codewords, and codes."""

    pixels: Tensor
    latents: Tensor
    nearest: Tensor
    codes: Tensor


class VQGAN(nn.Module):
    """Encoder, codebook and decoder. `decoder` is None if the checkpoint has none."""

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

    @property
    def codewords(self) -> Tensor:
        """The codebook: [num_embeddings, embed_dim]."""
        return self.quantize.embedding.weight

    def latents(self, pixels_BCYX: Tensor) -> Tensor:
        """Encoder output after `quant_conv`, [B, embed_dim, y, x]; pixels are in [-1, 1]. Raises
        `ImageError` unless height and width are multiples of the stride."""
        self.check_size(pixels_BCYX)
        return self.quant_conv(self.encoder(pixels_BCYX))

    def check_size(self, pixels_BCYX: Tensor) -> None:
        """Raise `ImageError` unless height and width are multiples of the stride."""
        stride, (height, width) = self.config.stride, pixels_BCYX.shape[-2:]
        if height % stride or width % stride or not height or not width:
            raise ImageError(
                f"an image of {width} x {height} pixels cannot be encoded to codes: "
                f"both sides must be multiples of {stride}"
            )

    def encode(self, pixels_BCYX: Tensor) -> Tensor:
        """Codes of images in [-1, 1]: int64 [B, y, x]."""
        return self.nearest_codes(self.latents(pixels_BCYX))

    def embed(self, codes_Byx: Tensor) -> Tensor:
        """Codewords of codes: [B, embed_dim, y, x]."""
        return self.quantize.embed(codes_Byx)

    def decode(self, codes_Byx: Tensor) -> Tensor:
        """Images of codes, in about [-1, 1], not clamped: [B, 3, Y, X]. Raises `ImageError` for a
        code outside the codebook, `CheckpointError` without a decoder."""
        self.check_codes(codes_Byx)
        return self.pixels(self.embed(codes_Byx.to(self.codewords.device)))

    def check_codes(self, codes_Byx: Tensor) -> None:
        """Raise `ImageError` for a code outside the codebook."""
        count = self.config.num_embeddings
        if not codes_Byx.numel():
            return
        low, high = torch.stack(torch.aminmax(codes_Byx)).tolist()  # one wait for the device
        if not 0 <= low <= high < count:
            raise ImageError(f"image codes must lie in 0..{count - 1}, the codebook of this model")

    def forward(self, pixels_BCYX: Tensor, blend: Tensor | float = 1.0) -> Quantized:
        """Reconstruct images, with a straight-through gradient from the codewords to the encoder.
        The decoder reads latents moved by the share `blend` towards their codewords: 0 bypasses the
        codebook, 1 uses codewords only."""
        latents = self.latents(pixels_BCYX)
        # In fp32: the nearest codeword in bf16 may be another one.
        with torch.autocast(latents.device.type, enabled=False):
            codes = self.nearest_codes(latents.detach().float())
        nearest = self.embed(codes)
        straight_through = latents + blend * (nearest - latents).detach()
        return Quantized(self.pixels(straight_through), latents, nearest, codes)

    def nearest_codes(self, latents_BCyx: Tensor) -> Tensor:
        return self.quantize.codes(latents_BCyx)

    def pixels(self, codewords_BCyx: Tensor) -> Tensor:
        """Images of codewords, [B, 3, Y, X]. Raises `CheckpointError` without a decoder."""
        if self.decoder is None:
            raise CheckpointError(
                "this checkpoint has no VQ decoder, so codes cannot become images: "
                "add one with earlyfusion convert --image-tokenizer"
            )
        return self.decoder(self.post_quant_conv(codewords_BCyx))
