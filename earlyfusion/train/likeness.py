"""Image similarity: PSNR, SSIM, and the perceptual distance in features of VGG-16.

Images are float32 [B, 3, Y, X] in [-1, 1]. The perceptual distance is that of Zhang et al. 2018
(LPIPS): squared differences of normalised features at five depths, weighted by channel if the file
has such weights, else summed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from earlyfusion.checkpoints.source import torch_load
from earlyfusion.errors import CheckpointError

_RANGE = 2.0  # of pixels in [-1, 1]
_WINDOW, _SIGMA = 11, 1.5  # the Gaussian window of Wang et al. 2004


def psnr(a_BCYX: Tensor, b_BCYX: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each pair in dB, [B]."""
    error_B = (a_BCYX - b_BCYX).square().flatten(1).mean(1)
    return 10 * torch.log10(_RANGE**2 / error_B.clamp_min(1e-12))


def ssim(a_BCYX: Tensor, b_BCYX: Tensor) -> Tensor:
    """Structural similarity of each pair (Wang et al. 2004), [B]; 1 for equal images. The mean over
    channels and all positions of an 11 x 11 window within the image; smaller images have a smaller
    window."""
    side = min(_WINDOW, *a_BCYX.shape[-2:])
    side -= 1 - side % 2  # odd, so that the window has a middle
    offset = torch.arange(side, device=a_BCYX.device) - side // 2
    window = torch.exp(-offset.square() / (2 * _SIGMA**2))
    window = window / window.sum()

    def local(x_BCYX: Tensor) -> Tensor:
        x = x_BCYX.flatten(0, 1).unsqueeze(1)
        return F.conv2d(F.conv2d(x, window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1))

    a, b = a_BCYX.float(), b_BCYX.float()
    # bf16 is too coarse for small differences of large numbers.
    with torch.autocast(a.device.type, enabled=False):
        mean_a, mean_b = local(a), local(b)
        var_a, var_b = local(a * a) - mean_a**2, local(b * b) - mean_b**2
        covariance = local(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * _RANGE) ** 2, (0.03 * _RANGE) ** 2
    similarity = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    similarity = similarity / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return similarity.flatten(1).mean(1).view(len(a), -1).mean(1)


# Indices of the convolutions of VGG-16 at each depth, the same in torchvision's and LPIPS's names.
_CONVS = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
_WIDTHS = (64, 128, 256, 512, 512)
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Perceptual:
    """The perceptual distance of pairs of images, the mean over the batch.

    `weights` is the file of a state dict: of torchvision's VGG-16 (`features.0.weight`), or of a
    whole LPIPS (`net.slice1.0.weight`, `lin0.model.1.weight`). `linear` is a file with LPIPS's
    weights per channel, if `weights` has none. Raises `CheckpointError` if weights are missing.
    """

    def __init__(self, weights: Path, linear: Path | None, device: torch.device) -> None:
        state = torch_load(weights)
        linear_state = torch_load(linear) if linear is not None else state
        self._convs = [
            [_conv(state, depth, i, weights, device) for i in stage]
            for depth, stage in enumerate(_CONVS)
        ]
        self._channel_weights = _channel_weights(
            linear_state, linear or weights, device, needed=linear is not None
        )
        self._mean = torch.tensor(_MEAN, device=device).view(1, 3, 1, 1)
        self._std = torch.tensor(_STD, device=device).view(1, 3, 1, 1)

    def __call__(self, a_BCYX: Tensor, b_BCYX: Tensor) -> Tensor:
        features = (self._features(a_BCYX), self._features(b_BCYX))
        depths = zip(*features, self._channel_weights, strict=True)
        distances = [((a - b).square() * weight).sum(1).mean() for a, b, weight in depths]
        return torch.stack(distances).sum()

    def _features(self, x_BCYX: Tensor) -> list[Tensor]:
        """Normalised features at each depth, fp32."""
        h, features = ((x_BCYX + 1) / 2 - self._mean) / self._std, []
        for depth, stage in enumerate(self._convs):
            h = F.max_pool2d(h, 2) if depth else h
            for weight, bias in stage:
                h = F.relu(F.conv2d(h, weight, bias, padding=1))
            features.append(F.normalize(h.float(), dim=1, eps=1e-10))
        return features


def _conv(
    state: Mapping[str, Tensor], depth: int, number: int, path: Path, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Weight and bias of convolution `number` of VGG-16, under either of its names."""
    for name in (f"features.{number}", f"net.slice{depth + 1}.{number}"):
        if f"{name}.weight" in state and f"{name}.bias" in state:
            weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
            return weight.to(device).float(), bias.to(device).float()
    raise CheckpointError(
        f"{path} lacks features.{number}.weight: give the state dict of a VGG-16 of torchvision "
        "(features.…) or of LPIPS (net.slice1.…)"
    )


def _channel_weights(
    state: Mapping[str, Tensor], path: Path, device: torch.device, needed: bool
) -> list[Tensor]:
    """Weights per channel at each depth, [1, C, 1, 1]; ones if the file has none and they are not
    `needed`."""
    names = [f"lin{depth}.model.1.weight" for depth in range(len(_CONVS))]
    if all(name in state for name in names):
        return [state[name].to(device).float().view(1, -1, 1, 1) for name in names]
    if needed:
        raise CheckpointError(
            f"{path} lacks {names[0]}: give the file with the linear weights of LPIPS for VGG"
        )
    return [torch.ones(1, width, 1, 1, device=device) for width in _WIDTHS]
