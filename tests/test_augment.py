"""Augmentation of images on the device."""

from __future__ import annotations

import pytest
import torch

from earlyfusion.errors import SettingError
from earlyfusion.train.augment import ChangeConfig, changed, resized

ALL = ChangeConfig(shift=0.1, scale=0.15, turn=12, contrast=0.3, tint=0.2, grey=0.3)


def squares(count: int = 8, side: int = 32) -> torch.Tensor:
    """White images with a red square in the middle."""
    pixels = torch.ones(count, 3, side, side)
    third = slice(side // 3, 2 * side // 3)
    pixels[:, 1:, third, third] = -1
    return pixels


def ink(pixels: torch.Tensor) -> torch.Tensor:
    """How much is not white, image by image and pixel by pixel."""
    return (1 - pixels).sum(1)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_nothing_asked_changes_nothing_and_a_seed_gives_the_same_again() -> None:
    pixels = squares()
    assert torch.equal(changed(pixels, ChangeConfig(), generator()), pixels)
    first, repeated, other = (changed(pixels, ALL, generator(s)) for s in (0, 0, 1))
    assert torch.equal(first, repeated) and not torch.equal(first, other)
    assert first.shape == pixels.shape and first.abs().max() <= 1 + 1e-5
    assert len({tuple(p.flatten()[::37].tolist()) for p in first}) == len(pixels)


def test_shifts_reach_as_far_as_they_say_and_white_comes_in() -> None:
    pixels, side = squares(256), 32
    moved = changed(pixels, ChangeConfig(shift=0.125), generator())
    at = torch.arange(side) + 0.5
    weight = ink(moved)
    middle = (weight.sum(1) * at).sum(1) / weight.sum((1, 2))
    before = (ink(pixels).sum(1) * at).sum(1) / ink(pixels).sum((1, 2))
    far = (middle - before).abs()
    assert 3.5 < far.max() <= 4.01 and (far > 1).float().mean() > 0.5
    assert torch.allclose(moved[:, :, 0], torch.ones(256, 3, side), atol=1e-5)


def test_scales_change_the_area_and_turns_do_not() -> None:
    pixels = squares(256)
    area = ink(pixels).sum((1, 2))
    scaled = ink(changed(pixels, ChangeConfig(scale=0.2), generator())).sum((1, 2)) / area
    assert 0.6 < scaled.min() < 0.75 and 1.4 < scaled.max() < 1.65
    turned = changed(pixels, ChangeConfig(turn=30), generator())
    assert torch.allclose(ink(turned).sum((1, 2)), area, rtol=0.06)
    assert (turned - pixels).abs().amax((1, 2, 3)).min() > 0.01


def test_colours_change_but_white_stays_white_and_shapes_stay() -> None:
    pixels = squares(64)
    tinted = changed(pixels, ChangeConfig(contrast=0.3, tint=0.2), generator())
    white = pixels.amin(1) == 1
    assert torch.allclose(tinted.permute(0, 2, 3, 1)[white], torch.ones(3), atol=1e-5)
    red = tinted[:, :, 16, 16]
    assert red[:, 1].std() > 0.05 and torch.equal(tinted[:, :, 16, 16], tinted[:, :, 15, 17])


def test_the_share_asked_for_becomes_grey_and_the_share_asked_for_stays() -> None:
    pixels = squares(400)
    grey = changed(pixels, ChangeConfig(grey=0.25, tint=0.2), generator())
    flat = (grey.amax(1) - grey.amin(1)).amax((1, 2)) < 1e-5
    assert 0.18 < flat.float().mean() < 0.32
    some = changed(pixels, ChangeConfig(shift=0.1, tint=0.2, unchanged=0.25), generator())
    same = (some == pixels).all(1).all(1).all(1)
    assert 0.18 < same.float().mean() < 0.32


def test_contrast_goes_as_far_up_as_down() -> None:
    pixels = torch.zeros(400, 3, 4, 4)  # a grey half way between black and white
    changes = changed(pixels, ChangeConfig(contrast=0.3), generator())
    assert changes.abs().max() <= 0.3 + 1e-6 and abs(changes.mean()) < 0.03
    assert changes.min() < -0.27 and changes.max() > 0.27


def test_bytes_become_pixels_at_another_side() -> None:
    table = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8)
    full, half = resized(table, 16), resized(table, 8)
    assert torch.allclose((full + 1) * 127.5, table.permute(0, 3, 1, 2).float(), atol=1e-3)
    assert half.shape == (2, 3, 8, 8) and (half.mean() - full.mean()).abs() < 0.02


@pytest.mark.parametrize("wrong", [{"grey": 1.5}, {"shift": -0.1}, {"turn": 200}, {"tint": 1.0}])
def test_what_cannot_be_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(SettingError, match=next(iter(wrong))):
        ChangeConfig(**wrong)
