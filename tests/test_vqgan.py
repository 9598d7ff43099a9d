from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tolerances import assert_close

from earlyfusion.config import PRESETS, VQConfig
from earlyfusion.errors import CheckpointError, ImageError, SettingError
from earlyfusion.model.vqgan import VQGAN, Quantizer

TINY = PRESETS["tiny"].vq_config


@pytest.fixture(scope="module")
def vqgan(device: torch.device) -> VQGAN:
    torch.manual_seed(0)
    return VQGAN(TINY).eval().to(device)


@pytest.mark.parametrize("size", [(16, 16), (16, 32), (2, 2), (6, 10)])
def test_any_size_that_the_stride_divides(
    vqgan: VQGAN, size: tuple[int, int], device: torch.device
) -> None:
    with torch.inference_mode():
        codes = vqgan.encode(torch.rand(2, 3, *size, device=device) * 2 - 1)
        pixels = vqgan.decode(codes)
    assert codes.shape == (2, size[0] // 2, size[1] // 2) and codes.dtype == torch.int64
    assert pixels.shape == (2, 3, *size)


@pytest.mark.parametrize("size", [(15, 16), (16, 3), (0, 2)])
def test_other_sizes_are_refused_with_the_stride(
    vqgan: VQGAN, size: tuple[int, int], device: torch.device
) -> None:
    with pytest.raises(ImageError, match="multiples of 2"):
        vqgan.encode(torch.zeros(1, 3, *size, device=device))


def test_codes_outside_the_codebook_are_refused(vqgan: VQGAN, device: torch.device) -> None:
    with pytest.raises(ImageError, match=r"0\.\.63"):
        vqgan.decode(torch.full((1, 2, 2), 64, device=device))


def test_no_decoder_says_so() -> None:
    with pytest.raises(CheckpointError, match="decoder"):
        VQGAN(TINY, with_decoder=False).decode(torch.zeros(1, 2, 2, dtype=torch.long))


def test_search_finds_the_nearest_codeword_in_pieces(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    monkeypatch.setattr("earlyfusion.model.vqgan._SEARCH_ELEMENTS", 640)  # ten rows at a time
    torch.manual_seed(1)
    quantizer = Quantizer(TINY).to(device)
    vectors = torch.randn(57, TINY.embed_dim).to(device)
    expected = torch.cdist(vectors.double(), quantizer.embedding.weight.double()).argmin(1)
    assert torch.equal(quantizer.search(vectors), expected)


@pytest.mark.parametrize("seed", [3, 4])
def test_search_follows_a_codebook_that_is_changed_in_place(
    seed: int, device: torch.device
) -> None:
    torch.manual_seed(seed)
    quantizer = Quantizer(TINY).to(device)
    vectors = torch.randn(200, TINY.embed_dim).to(device)
    weight = quantizer.embedding.weight
    for change in (lambda: weight.mul_(1.7), lambda: weight[3:9].add_(2), lambda: weight.normal_()):
        with torch.no_grad():
            change()
        expected = torch.cdist(vectors.double(), weight.double()).argmin(1)
        assert torch.equal(quantizer.search(vectors), expected)


def test_first_of_equal_codewords_wins(device: torch.device) -> None:
    quantizer = Quantizer(TINY).to(device)
    with torch.no_grad():
        quantizer.embedding.weight[7:] = quantizer.embedding.weight[7]
    assert quantizer.search(quantizer.embedding.weight[40:41]).tolist() == [7]


def test_straight_through_gradient_reaches_the_encoder_and_blend_leaves_the_codebook_out(
    device: torch.device,
) -> None:
    torch.manual_seed(2)
    vqgan, x = VQGAN(TINY).to(device), torch.rand(1, 3, 16, 16).to(device)
    vqgan(x).pixels.sum().backward()
    gradient = vqgan.encoder.conv_in.weight.grad
    assert gradient is not None and gradient.abs().sum() > 0
    with torch.no_grad():
        out = vqgan(x, blend=0.0)
        direct = vqgan.pixels(out.latents)
    assert_close(out.pixels, direct)
    assert not torch.allclose(vqgan(x).pixels, direct)


def test_attention_stands_where_the_config_asks() -> None:
    names = VQGAN(replace(TINY, attn_resolutions=(8,))).state_dict().keys()
    assert {n.split(".")[2] for n in names if n.startswith("encoder") and ".attn.0." in n} == {"1"}
    assert any(n.startswith("decoder.up.1.attn.0.q") for n in names)
    assert not any(n.startswith("decoder.up.0.attn") for n in names)
    without = VQGAN(replace(TINY, attn_resolutions=(8,), attn_type="none")).state_dict()
    assert not any("attn" in name for name in without)  # as in transformers


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"base_channels": 48}, "multiple of the 32"),
        ({"num_embeddings": 0}, "must be 1 to"),
        ({"channel_multiplier": ()}, "needs 1 to 15 levels"),
    ],
)
def test_impossible_shapes_name_the_field(change: dict[str, object], words: str) -> None:
    config = VQConfig(**change)  # type: ignore[arg-type]
    with pytest.raises(SettingError, match=words) as error:
        VQGAN(config)
    assert next(iter(change)) in str(error.value)


def test_levels_without_blocks_keep_their_width(device: torch.device) -> None:
    vqgan = VQGAN(replace(TINY, num_res_blocks=0, channel_multiplier=(1, 2, 2))).eval()
    vqgan.to(device)
    codes = vqgan.encode(torch.rand(1, 3, 16, 16).to(device) * 2 - 1)
    assert codes.shape == (1, 4, 4)
    assert vqgan.decode(codes).shape == (1, 3, 16, 16)


def test_the_codebook_can_be_called(device: torch.device) -> None:
    vqgan = VQGAN(TINY).to(device)
    latents = vqgan.latents(torch.rand(1, 3, 16, 16).to(device)).detach().requires_grad_()
    through, loss, codes = vqgan.quantize(latents)
    assert torch.equal(codes.view(1, *latents.shape[2:]), vqgan.nearest_codes(latents))
    assert_close(through, vqgan.embed(vqgan.nearest_codes(latents)))
    through.sum().backward()
    assert latents.grad is not None and latents.grad.eq(1).all()
    gap = (vqgan.embed(vqgan.nearest_codes(latents)) - latents).square().mean()
    assert_close(loss, gap * (1 + vqgan.quantize.beta))
