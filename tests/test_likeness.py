"""Measures of likeness, each against another way to have the same number."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from earlyfusion.errors import CheckpointError
from earlyfusion.train.likeness import Perceptual, psnr, ssim

# torchvision's VGG-16: widths of its convolutions, "M" a pooling; every convolution has a ReLU.
PLAN = [64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"]
TAPS = (3, 8, 15, 22, 29)
SLICES = (range(0, 4), range(4, 9), range(9, 16), range(16, 23), range(23, 30))


def make_images(seed: int, side: int = 24) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    smooth = torch.rand(2, 3, 6, 6, generator=generator) * 2 - 1
    return nn.functional.interpolate(smooth, (side, side), mode="bicubic").clamp(-1, 1)


def test_psnr_of_a_known_error() -> None:
    a = torch.zeros(2, 3, 4, 4)
    b = a.clone()
    b[1] += 0.2  # an error of a tenth of the range
    actual = psnr(a, b)
    assert actual[0] > 100 and actual[1] == pytest.approx(20.0, abs=1e-4)


def plain_ssim(a: np.ndarray, b: np.ndarray, side: int = 11) -> float:
    """The definition of Wang et al. 2004, window by window."""
    offsets = np.arange(side) - side // 2
    line = np.exp(-(offsets**2) / (2 * 1.5**2))
    weights = np.outer(line, line) / np.outer(line, line).sum()
    results = []
    for channel in range(a.shape[0]):
        for y in range(a.shape[1] - side + 1):
            for x in range(a.shape[2] - side + 1):
                p, q = (v[channel, y : y + side, x : x + side].astype(np.float64) for v in (a, b))
                mean_p, mean_q = (weights * p).sum(), (weights * q).sum()
                var_p = (weights * (p - mean_p) ** 2).sum()
                var_q = (weights * (q - mean_q) ** 2).sum()
                both = (weights * (p - mean_p) * (q - mean_q)).sum()
                c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
                results.append(
                    (2 * mean_p * mean_q + c1)
                    * (2 * both + c2)
                    / ((mean_p**2 + mean_q**2 + c1) * (var_p + var_q + c2))
                )
    return float(np.mean(results))


def test_ssim_is_that_of_its_definition() -> None:
    a = make_images(0)
    b = (a + 0.2 * torch.randn(a.shape, generator=torch.Generator().manual_seed(1))).clamp(-1, 1)
    actual = ssim(a, b)
    for number in range(2):
        expected = plain_ssim(a[number].numpy(), b[number].numpy())
        assert 0.1 < expected < 0.95
        assert float(actual[number]) == pytest.approx(expected, abs=1e-4)
    assert torch.allclose(ssim(a, a), torch.ones(2))
    small = (a[..., :8, :8], b[..., :8, :8])  # the window shrinks to the next odd number
    expected = plain_ssim(small[0][0].numpy(), small[1][0].numpy(), 7)
    assert float(ssim(*small)[0]) == pytest.approx(expected, abs=1e-4)


def test_ssim_is_that_of_scikit_image() -> None:
    """Recorded from version 0.26.0, gaussian_weights, sigma 1.5, without sample covariance."""
    rng = np.random.default_rng(3)
    a = rng.random((24, 31, 3))
    b = np.clip(a * 0.7 + 0.3 * rng.random((24, 31, 3)), 0, 1)
    first, second = (torch.from_numpy((v * 2 - 1).transpose(2, 0, 1)[None]).float() for v in (a, b))
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            assert float(ssim(first, second)) == pytest.approx(0.661843910, abs=1e-5)


def vgg() -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    width = 3
    for entry in PLAN:
        if isinstance(entry, int):
            layers += [nn.Conv2d(width, entry, 3, padding=1), nn.ReLU()]
            width = entry
        else:
            layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers).requires_grad_(False)


@pytest.fixture(scope="module")
def network() -> nn.Sequential:
    return vgg()


@pytest.fixture(scope="module")
def linear() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    widths = (64, 128, 256, 512, 512)
    return {
        f"lin{depth}.model.1.weight": torch.rand(1, width, 1, 1, generator=generator)
        for depth, width in enumerate(widths)
    }


def plain_distance(
    network: nn.Sequential, a: Tensor, b: Tensor, linear: dict[str, Tensor] | None
) -> Tensor:
    shift = torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1)
    a, b = (a - shift) / scale, (b - shift) / scale
    total = torch.zeros(len(a))
    depth = 0
    for number, layer in enumerate(network):
        a, b = layer(a), layer(b)
        if number in TAPS:
            unit_a, unit_b = (v / (v.norm(dim=1, keepdim=True) + 1e-10) for v in (a, b))
            apart = (unit_a - unit_b) ** 2
            if linear is not None:
                apart = nn.functional.conv2d(apart, linear[f"lin{depth}.model.1.weight"])
            total += apart.sum(1).mean((1, 2))
            depth += 1
    return total.mean()


@pytest.mark.parametrize("form", ["torchvision", "torchvision and linear", "lpips"])
def test_perceptual_distance_in_all_namings(
    tmp_path: Path, network: nn.Sequential, linear: dict[str, Tensor], form: str
) -> None:
    state = {f"features.{name}": value for name, value in network.state_dict().items()}
    if form == "lpips":
        state = {
            f"net.slice{depth + 1}.{name}": value
            for depth, numbers in enumerate(SLICES)
            for name, value in network.state_dict().items()
            if int(name.split(".")[0]) in numbers
        } | linear
    torch.save(state, tmp_path / "vgg.pth")
    torch.save(linear, tmp_path / "linear.pth")
    extra = tmp_path / "linear.pth" if form == "torchvision and linear" else None
    distance = Perceptual(tmp_path / "vgg.pth", extra, torch.device("cpu"))
    a, b = make_images(0, 32).requires_grad_(), make_images(1, 32)
    expected = plain_distance(network, a, b, None if form == "torchvision" else linear)
    actual = distance(a, b)
    # LPIPS rounds the mean and deviation of ImageNet to three digits.
    torch.testing.assert_close(actual, expected, rtol=2e-2, atol=1e-4)
    assert distance(b, b) == 0
    (gradient,) = torch.autograd.grad(actual, a)
    assert gradient.abs().sum() > 0


def test_files_that_are_none_are_refused(tmp_path: Path, network: nn.Sequential) -> None:
    torch.save({"features.0.weight": torch.ones(1)}, tmp_path / "half.pth")
    with pytest.raises(CheckpointError, match=r"features\.0\.weight"):
        Perceptual(tmp_path / "half.pth", None, torch.device("cpu"))
    state = {f"features.{name}": value for name, value in network.state_dict().items()}
    torch.save(state, tmp_path / "vgg.pth")
    with pytest.raises(CheckpointError, match="lin0"):
        Perceptual(tmp_path / "vgg.pth", tmp_path / "half.pth", torch.device("cpu"))
    (tmp_path / "none.pth").write_text("no")
    with pytest.raises(CheckpointError, match="download it again"):
        Perceptual(tmp_path / "none.pth", None, torch.device("cpu"))
