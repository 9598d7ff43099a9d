"""Augmentation of images on their device: moved, scaled, turned, in other colours, grey. All
images of a batch are changed at once, each with its own random numbers from one generator.
Whatever comes in from outside an image is white. Pixels are float32 in [-1, 1]."""

# Shapes: B batch, C channels, Y X pixels.

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from earlyfusion.errors import SettingError
from earlyfusion.fields import check_shares


@dataclass(frozen=True)
class ChangeConfig:
    """How far images are changed; all zero leaves them as they are."""

    shift: float = 0.0
    """The largest shift, as a share of the side."""
    scale: float = 0.0
    """Larger or smaller by at most this share."""
    turn: float = 0.0
    """The largest turn to either side, in degrees."""
    contrast: float = 0.0
    """Colours farther from or nearer to grey, and lighter or darker, by at most this share."""
    tint: float = 0.0
    """Each channel stronger or weaker by at most this share."""
    grey: float = 0.0
    """Share of the images that lose their colours."""
    unchanged: float = 0.0
    """Share of the images that stay as they are."""

    def __post_init__(self) -> None:
        check_shares(self, "grey", "unchanged")
        check_shares(self, "shift", "scale", "contrast", "tint", below_one=True)
        if not 0 <= self.turn <= 180:
            raise SettingError(f"turn={self.turn} must be 0 to 180 degrees")


def resized(images_BYXC: Tensor, side: int) -> Tensor:
    """Bytes of square images as pixels of another side: float32 [B, C, side, side]."""
    pixels = images_BYXC.permute(0, 3, 1, 2).float() / 127.5 - 1
    if pixels.shape[-1] == side:
        return pixels
    small = F.interpolate(pixels, (side, side), mode="bilinear", antialias=True)
    return small.clamp(-1, 1)


def changed(pixels_BCYX: Tensor, config: ChangeConfig, generator: torch.Generator) -> Tensor:
    """The images, changed by numbers of `generator`, which is on their device."""
    # Uniform in [0, 1): 4 for the geometry, 6 for the colours, 1 for leaving the image as it is.
    u_BN = torch.rand(len(pixels_BCYX), 11, generator=generator, device=pixels_BCYX.device)
    out = _recolour(_move(pixels_BCYX, config, u_BN[:, :4]), config, u_BN[:, 4:10])
    is_unchanged_B = u_BN[:, 10] < config.unchanged
    return torch.where(is_unchanged_B[:, None, None, None], pixels_BCYX, out)


def _move(pixels_BCYX: Tensor, config: ChangeConfig, u_B4: Tensor) -> Tensor:
    """The images turned, scaled and shifted, in one interpolation."""
    if not (config.shift or config.scale or config.turn):
        return pixels_BCYX
    spread_B4 = u_B4 * 2 - 1
    angle = spread_B4[:, 0] * math.radians(config.turn)
    extent = 1 + spread_B4[:, 1] * config.scale
    shift_B2 = spread_B4[:, 2:] * 2 * config.shift  # the sides of the grid are 2 long
    cos, sin = angle.cos() * extent, angle.sin() * extent
    theta = torch.stack((cos, -sin, shift_B2[:, 0], sin, cos, shift_B2[:, 1]), 1).view(-1, 2, 3)
    grid = F.affine_grid(theta, list(pixels_BCYX.shape), align_corners=False)
    # After the subtraction white is 0, which is what comes in from outside.
    return F.grid_sample(pixels_BCYX - 1, grid, align_corners=False) + 1


def _recolour(pixels_BCYX: Tensor, config: ChangeConfig, u_B6: Tensor) -> Tensor:
    """The images in other colours; some of them in grey."""
    if not (config.contrast or config.tint or config.grey):
        return pixels_BCYX
    spread_B6 = u_B6 * 2 - 1
    luma = pixels_BCYX.new_tensor((0.299, 0.587, 0.114))[None, :, None, None]
    grey = (pixels_BCYX * luma).sum(1, keepdim=True)
    is_grey = (u_B6[:, 0] < config.grey).float()
    saturation = (1 - is_grey) * (1 + spread_B6[:, 1] * config.contrast)
    coloured = grey + (pixels_BCYX - grey) * saturation[:, None, None, None]
    # White stays white: strengths scale the distance from it, like ink on paper.
    strength = 1 + spread_B6[:, 2:3] * config.contrast + spread_B6[:, 3:] * config.tint
    strength = torch.where(is_grey[:, None] > 0, strength.mean(1, keepdim=True), strength)
    return (1 - (1 - coloured) * strength[:, :, None, None]).clamp(-1, 1)
