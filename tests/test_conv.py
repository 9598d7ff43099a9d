from __future__ import annotations

import gc
import weakref
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from earlyfusion.config import PRESETS, VQConfig
from earlyfusion.kernels import conv
from earlyfusion.kernels import vqgan as fast
from earlyfusion.kernels.conv import available, conv1x1, conv3x3, norm_factors
from earlyfusion.kernels.twins import accelerate
from earlyfusion.model.vqgan import VQGAN, Downsample, ResBlock

needs_compiler = pytest.mark.skipif(not available(), reason="no C++ compiler")
MINI = PRESETS["mini"].vq_config


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> None:
    before = torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(before))


def close(ours_BYXK: Tensor, direct_BKYX: Tensor) -> bool:
    """To 1e-5 of the largest value: fp32 in another order."""
    away = (ours_BYXK.permute(0, 3, 1, 2).double() - direct_BKYX).abs().max()
    return bool(away < 1e-5 * direct_BKYX.abs().max())


def alike(one: Tensor, two: Tensor) -> bool:
    """Two ways through a whole network in fp32: 5e-5 of the norm."""
    return bool((one - two).norm() < 5e-5 * two.norm())


@needs_compiler
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(
    "size",
    [(1, 64, 64, 32, 64), (3, 8, 12, 64, 32), (2, 16, 128, 32, 32), (1, 4, 4, 32, 3),
     (1, 4, 300, 16, 20), (2, 32, 32, 96, 96)],
)  # fmt: skip
@torch.no_grad()
def test_equals_a_direct_convolution(size: tuple[int, ...], count: int, threads: None) -> None:
    torch.set_num_threads(count)
    b, y, x, c, k = size
    conv, norm = nn.Conv2d(c, k, 3, padding=1), nn.GroupNorm(8 if c < 32 else 32, c, eps=1e-6)
    norm.weight.normal_()
    norm.bias.normal_()
    x_BYXC, plus = torch.randn(b, y, x, c) * 3 + 1, torch.randn(b, y, x, k)
    first, weights = x_BYXC.permute(0, 3, 1, 2).double(), (conv.weight, conv.bias)
    double = nn.Conv2d(c, k, 3, padding=1).double()
    double.load_state_dict(conv.state_dict())
    assert close(conv3x3(x_BYXC, *weights), double(first))
    enlarged = F.interpolate(first, scale_factor=2.0, mode="nearest")
    assert close(conv3x3(x_BYXC, *weights, upsample=True), double(enlarged))
    swished = F.silu(
        F.group_norm(first, norm.num_groups, norm.weight.double(), norm.bias.double(), 1e-6)
    )
    expected = double(swished) + plus.permute(0, 3, 1, 2)
    assert close(conv3x3(x_BYXC, *weights, norm, plus), expected)
    if c == k:
        result = conv3x3(x_BYXC, *weights, norm, plus, in_place=True)
        assert result is x_BYXC and close(result, expected)


@needs_compiler
@torch.no_grad()
def test_the_default_dtype_changes_nothing() -> None:
    torch.manual_seed(0)
    vqgan, codes = accelerate(VQGAN(MINI).eval()), torch.zeros(1, 2, 2, dtype=torch.long)
    expected = vqgan.decode(codes)
    torch.set_default_dtype(torch.bfloat16)
    try:
        pixels = vqgan.decode(codes)
    finally:
        torch.set_default_dtype(torch.float32)
    assert pixels.dtype is torch.float32 and torch.equal(pixels, expected)


@needs_compiler
@pytest.mark.parametrize("size", [(1, 5, 3, 32, 40), (3, 8, 12, 64, 32), (2, 40, 41, 96, 3)])
@torch.no_grad()
def test_a_1_x_1_convolution_and_the_factors_of_a_norm(size: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    b, y, x, c, k = size
    conv, norm = nn.Conv2d(c, k, 1), nn.GroupNorm(32, c, eps=1e-6)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x_BYXC, plus = torch.randn(b, y, x, c) * 3 + 10, torch.randn(b, y, x, k)
    first = x_BYXC.permute(0, 3, 1, 2).double()
    expected = F.conv2d(first, conv.weight.double(), conv.bias.double()) + plus.permute(0, 3, 1, 2)
    assert close(conv1x1(x_BYXC, conv.weight, conv.bias, plus), expected)
    scale, shift = (t[:, None, None] for t in norm_factors(norm, x_BYXC))
    expected = F.group_norm(first, 32, norm.weight.double(), norm.bias.double(), 1e-6)
    assert (x_BYXC * scale + shift - expected.permute(0, 2, 3, 1)).abs().max() < 1e-4


WIDE = VQConfig(
    embed_dim=256, num_embeddings=512, latent_channels=256, resolution=128, base_channels=64,
    channel_multiplier=(1, 4), num_res_blocks=1,
)  # fmt: skip


@pytest.mark.parametrize("config", [MINI, WIDE], ids=["mini", "wide"])
@pytest.mark.parametrize("native", [pytest.param(True, marks=needs_compiler), False])
@torch.no_grad()
def test_an_image_depends_neither_on_threads_nor_on_other_images(
    config: VQConfig, native: bool, threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(1)
    vqgan, side = accelerate(VQGAN(config).eval()), config.resolution // config.stride
    for norm in (m for m in vqgan.modules() if isinstance(m, nn.GroupNorm)):
        norm.bias.normal_()
    if not native:
        monkeypatch.setattr(fast, "available", lambda: False)
    codes = torch.randint(0, config.num_embeddings, (3, side, side))
    pixels = torch.rand(3, 3, config.resolution, config.resolution) * 2 - 1
    torch.set_num_threads(1)
    decoded = torch.cat([vqgan.decode(one) for one in codes.split(1)])
    latents = torch.cat([vqgan.latents(one) for one in pixels.split(1)])
    for count, batch in [(1, 3), (1, 2), (2, 1), (3, 3)] if native else [(1, 3), (1, 2)]:
        torch.set_num_threads(count)
        assert torch.equal(torch.cat([vqgan.decode(some) for some in codes.split(batch)]), decoded)
        second = torch.cat([vqgan.latents(some) for some in pixels.split(batch)])
        assert torch.equal(second, latents)


@needs_compiler
@torch.no_grad()
def test_swish_holds_at_both_ends() -> None:
    x = torch.tensor([-1e4, -100.0, -88, -20, -1, -1e-8, 0, 1e-8, 1, 20, 88, 100, 1e4])
    image = x.view(1, 1, -1, 1).repeat(1, 4, 1, 16)[:, :, :12].contiguous()
    norm = nn.GroupNorm(1, 16)  # that changes nothing
    norm.weight.fill_(image.std(correction=0))
    norm.bias.fill_(image.mean())
    weight = torch.zeros(16, 16, 3, 3)
    weight[torch.arange(16), torch.arange(16), 1, 1] = 1
    result = conv3x3(image, weight, torch.zeros(16), norm)
    # A tile's largest value sets the rounding of its others.
    torch.testing.assert_close(result[..., 4:8, :], F.silu(image)[..., 4:8, :], rtol=0, atol=2e-4)
    assert result.isfinite().all()


@needs_compiler
@pytest.mark.parametrize("side", [64, 32, 48])
def test_images_come_out_alike_with_and_without_it(
    side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(side)
    vqgan, pixels = accelerate(VQGAN(MINI).eval()), torch.rand(3, 3, side, side) * 2 - 1
    calls: list[int] = []
    compiled = fast.conv3x3

    def counted(*args: object, **more: object) -> Tensor:
        calls.append(1)
        return compiled(*args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(fast, "conv3x3", counted)
    with torch.no_grad():
        latents, decoded = vqgan.latents(pixels), vqgan.decode(torch.arange(48).view(3, 4, 4))
        assert calls
        calls.clear()
        monkeypatch.setattr(fast, "available", lambda: False)
        assert alike(vqgan.latents(pixels), latents)
        assert alike(vqgan.decode(torch.arange(48).view(3, 4, 4)), decoded)
    plain = vqgan.latents(pixels)
    assert not calls and plain.requires_grad
    assert alike(plain.detach(), latents)


@torch.no_grad()
@pytest.mark.parametrize("size", [(8, 8), (2, 6), (7, 5)])
def test_the_shorter_way_to_downsample(size: tuple[int, int]) -> None:
    down, x = accelerate(Downsample(32)), torch.randn(2, 32, *size)
    torch.testing.assert_close(down(x), down.conv(F.pad(x, (0, 1, 0, 1))), rtol=0, atol=5e-6)


@needs_compiler
@torch.no_grad()
def test_weights_changed_in_place_count_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    vqgan, pixels = accelerate(VQGAN(MINI).eval()), torch.rand(4, 3, 64, 64)
    before = vqgan.latents(pixels)
    vqgan.encoder.conv_in.weight.mul_(2)
    cast("ResBlock", vqgan.encoder.get_submodule("down.0.block.0")).conv1.weight.neg_()
    after = vqgan.latents(pixels)
    assert not alike(before, after)
    monkeypatch.setattr(fast, "available", lambda: False)
    assert alike(vqgan.latents(pixels), after)


@needs_compiler
@torch.no_grad()
@pytest.mark.parametrize("count", [1, 3])
def test_kept_filters_are_those_of_the_weights(count: int, threads: None) -> None:
    torch.set_num_threads(count)
    conv, x = nn.Conv2d(32, 48, 3), torch.randn(1, 8, 8, 32)
    bias_K = cast("Tensor", conv.bias)

    def kept() -> Tensor:
        return conv3x3(x, conv.weight, bias_K, owner=conv)

    for change in range(4):
        assert torch.equal(kept(), conv3x3(x, conv.weight, bias_K))
        assert torch.equal(kept(), conv3x3(x, conv.weight, bias_K))  # now from kept filters
        # `data` does not count as a change of the parameter, the last element is another thread's.
        conv.weight.data.flatten()[[0, -1][change % 2]] += 0.5
        if change == 2:
            conv.weight = nn.Parameter(torch.randn(16, 32, 3, 3))
            bias_K = torch.zeros(16)


@needs_compiler
@torch.no_grad()
def test_filters_are_kept_for_small_images_as_long_as_their_module_lives() -> None:
    small, wide = nn.Conv2d(32, 32, 3), nn.Conv2d(256, 256, 3)
    for module, side in ((small, 64), (wide, 8), (small, 32)):
        x = torch.randn(1, side, side, module.in_channels)
        conv3x3(x, module.weight, cast("Tensor", module.bias), owner=module)
        assert (module in conv._kept_filters) == (side == 32)
    filters = weakref.ref(conv._kept_filters[small].transformed)
    del small, module
    gc.collect()
    assert filters() is None


@needs_compiler
@torch.no_grad()
@pytest.mark.parametrize("change", ["double", "plain"])
def test_other_norms_take_torchs_own(change: str) -> None:
    block = accelerate(VQGAN(MINI).eval()).encoder.mid.block_1
    x = torch.randn(2, 128, 8, 8)
    expected = block(x)
    if change == "double":  # torch refuses these dtypes together
        block.norm1.double()
        with pytest.raises(RuntimeError):
            block(x)
    else:
        block.norm1 = nn.GroupNorm(32, 128, eps=1e-6, affine=False)
        assert alike(block(x), expected)


@needs_compiler
@torch.no_grad()
def test_blocks_leave_their_input_alone() -> None:
    block = accelerate(VQGAN(MINI).eval()).encoder.mid.block_1
    x = torch.randn(2, 128, 32, 32).to(memory_format=torch.channels_last)
    kept = x.clone()
    block(x)
    assert torch.equal(x, kept)


def test_results_take_the_memory_of_those_gone() -> None:
    with conv.reusing():
        first, second = conv.empty(8, 100), conv.empty(900)
        places = first.data_ptr(), second.data_ptr()
        view = first[1:, :50]
        del first
        other = conv.empty(800)  # a view still holds the first one
        assert other.data_ptr() not in places
        del view, second
        with conv.reusing():
            assert conv.empty(4, 200).data_ptr() == places[0]  # the smallest that will do
            larger = conv.empty(2000)  # what is too small goes
        other.fill_(1)
        larger.fill_(2)
    assert other.eq(1).all() and conv._thread.pool is None


def test_threads_may_end_each_others_results() -> None:
    def work() -> None:
        with conv.reusing(), torch.no_grad():
            for value in range(200):
                inbox.append((conv.empty(64).fill_(value), value))
                tensor, expected = inbox.popleft()
                assert tensor.eq(expected).all()

    inbox: deque[tuple[Tensor, int]] = deque()
    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(work) for _ in range(4)]:
            done.result()


@needs_compiler
@torch.no_grad()
def test_an_image_does_not_hold_the_memory_of_its_making() -> None:
    decoded = accelerate(VQGAN(MINI).eval()).decode(torch.arange(64).view(1, 8, 8))
    assert decoded.untyped_storage().nbytes() == 4 * decoded.numel()


def test_off_by_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EARLYFUSION_NATIVE", "0")
    assert conv._library.__wrapped__() is None


def test_off_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    assert conv._library.__wrapped__() is None


def test_odd_shapes_take_torchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast, "conv3x3", lambda *a, **k: pytest.fail("compiled"))
    vqgan = accelerate(VQGAN(VQConfig(**vars(PRESETS["tiny"].vq_config))).eval())
    with torch.no_grad():
        assert vqgan.encode(torch.zeros(1, 3, 6, 10)).shape == (1, 3, 5)
