"""What `accelerate` leaves alone: all but the speed of inference and training on a CPU."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn

from earlyfusion.config import PRESETS
from earlyfusion.engine.module_tree import is_plain
from earlyfusion.kernels.conv import torch_convolutions
from earlyfusion.kernels.twins import TWINS, accelerate, original_class
from earlyfusion.model.quantise import quantise
from earlyfusion.model.transformer import RMSNorm, Transformer
from earlyfusion.model.vqgan import VQGAN, ResBlock

SHAPE = PRESETS["tiny"]


def both(kind: str = "vqgan") -> tuple[nn.Module, nn.Module]:
    """A model, and an accelerated one of the same weights."""
    torch.manual_seed(0)
    if kind == "vqgan":
        plain: nn.Module = VQGAN(SHAPE.vq_config).eval()
    else:
        plain = Transformer(SHAPE)
        plain.init_weights()
    return plain, accelerate(copy.deepcopy(plain))


def results(vqgan: nn.Module, pixels: Tensor) -> list[Tensor]:
    assert isinstance(vqgan, VQGAN)
    return [*vqgan(pixels), vqgan.decode(vqgan.encode(pixels))]


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("kind", ["vqgan", "transformer"])
def test_names_weights_and_looks_stay(kind: str) -> None:
    plain, fast = both(kind)
    assert repr(plain) == repr(fast)
    assert [*plain.state_dict()] == [*fast.state_dict()]
    assert all(type(m) not in TWINS for m in fast.modules())
    pairs = zip(plain.modules(), fast.modules(), strict=True)
    assert all(isinstance(f, type(p)) and original_class(f) is type(p) for p, f in pairs)


@pytest.mark.parametrize("kind", ["vqgan", "transformer"])
def test_copies_and_pickles_are_accelerated_too(kind: str) -> None:
    fast, file = both(kind)[1], io.BytesIO()
    torch.save(fast, file)
    file.seek(0)
    for other in (copy.deepcopy(fast), torch.load(file, weights_only=False), accelerate(fast)):
        pairs = zip(other.modules(), fast.modules(), strict=True)
        assert all(type(a) is type(b) for a, b in pairs)


@pytest.mark.parametrize("way", ["gradients", "float64", "autocast", "left out"])
def test_elsewhere_the_results_are_the_original_s(way: str) -> None:
    plain, fast = both()
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    if way == "gradients":
        one, other = results(plain, pixels), results(fast, pixels)
        assert one[0].requires_grad and other[0].requires_grad
        assert equal(one, other)
        return
    if way == "float64":
        plain, fast, pixels = plain.double(), fast.double(), pixels.double()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
        if way == "left out":
            with torch_convolutions():
                assert equal(results(plain, pixels), results(fast, pixels))
        else:
            assert equal(results(plain, pixels), results(fast, pixels))


@torch.no_grad()
def test_strangers_and_hooks_stay_and_are_called() -> None:
    class Doubled(ResBlock):
        def forward(self, x_BCYX: Tensor) -> Tensor:
            return 2 * super().forward(x_BCYX)

    plain, pixels = both()[0], torch.rand(1, 3, 16, 16)
    assert isinstance(plain, VQGAN)
    plain.encoder.mid.block_1.__class__ = Doubled
    plain.encoder.norm_out = nn.Identity()  # type: ignore[assignment]
    recorded: list[str] = []
    plain.encoder.mid.register_forward_hook(lambda *_: recorded.append("mid"))
    expected = plain.latents(pixels)
    fast = accelerate(plain)
    assert type(fast.encoder.mid.block_1) is Doubled
    torch.testing.assert_close(fast.latents(pixels), expected, rtol=1e-4, atol=1e-5)
    assert recorded == ["mid", "mid"]


def test_traced_and_exported_it_is_the_original() -> None:
    plain, fast = (m.get_submodule("encoder") for m in both())
    pixels = torch.rand(1, 3, 16, 16)
    with torch.no_grad(), torch_convolutions():
        expected = plain(pixels)
    with torch.no_grad():
        exported = torch.export.export(fast, (pixels,)).module()
        assert torch.equal(exported(pixels), expected)


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_the_engine_takes_an_accelerated_transformer_as_plain(bits: int | None) -> None:
    transformer = both("transformer")[0]
    assert isinstance(transformer, Transformer)
    fast = accelerate(quantise(transformer, bits) if bits else transformer)
    assert is_plain(fast)

    class Other(RMSNorm):
        pass

    fast.model.norm = Other(SHAPE.hidden_size, 1e-5)
    assert not is_plain(accelerate(fast))
