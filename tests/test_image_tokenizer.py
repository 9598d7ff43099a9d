from __future__ import annotations

import copy
import hashlib
import io
import json
import pickle
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL.Image
import pytest
import torch
from torch import Tensor

from earlyfusion import Chameleon, image_tokenizer
from earlyfusion.checkpoints.assemble import build_vqgan
from earlyfusion.checkpoints.meta import open_vqgan
from earlyfusion.config import VQConfig
from earlyfusion.content import Image
from earlyfusion.errors import CheckpointError, ImageError, SettingError
from earlyfusion.image_tokenizer import ImageTokenizer
from earlyfusion.model import vqgan as vqgan_module
from earlyfusion.model.vqgan import VQGAN

TESTS = Path(__file__).parent
GOLDEN = TESTS / "golden"
VQ_IMAGES = sorted((GOLDEN / "images").glob("vq*.png"))
PREPROCESS: dict[str, Any] = json.loads((GOLDEN / "expected/preprocess.json").read_text())
SMALL = VQConfig(
    embed_dim=4,
    num_embeddings=32,
    latent_channels=8,
    resolution=32,
    base_channels=32,
    channel_multiplier=(1, 1, 1),
    num_res_blocks=1,
)


@pytest.fixture(scope="module")
def metas(device: torch.device) -> ImageTokenizer:
    vqgan = build_vqgan(*open_vqgan(GOLDEN / "tokenizer"), GOLDEN, device)
    return ImageTokenizer(vqgan, vqgan.config.resolution)


@pytest.fixture(scope="module")
def expected() -> dict[str, npt.NDArray[Any]]:
    with np.load(GOLDEN / "expected/vq.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def small(device: torch.device) -> ImageTokenizer:
    torch.manual_seed(0)
    return ImageTokenizer(VQGAN(SMALL).eval().to(device), SMALL.resolution)


def make_image(width: int, height: int) -> PIL.Image.Image:
    rng = np.random.default_rng(width * 1000 + height)
    return PIL.Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("name", sorted(PREPROCESS))
def test_preprocessing_equals_metas_to_the_bit(metas: ImageTokenizer, name: str) -> None:
    make_image = Image.open(GOLDEN / "images" / name, deep="clip")
    pixels = metas.preprocess(make_image)
    assert pixels.shape == (3, 512, 512) and pixels.dtype == torch.float32
    with PIL.Image.open(GOLDEN / "expected/preprocess" / name) as file:
        np.testing.assert_array_equal(np.asarray(metas.square(make_image)), file)
    digest = hashlib.sha256(pixels.numpy().tobytes()).hexdigest()
    assert digest == PREPROCESS[name]["input_f32_sha256"]


@pytest.fixture(scope="module")
def encoded(metas: ImageTokenizer) -> tuple[Tensor, Tensor]:
    """Codes of the four images, and the latents on the way."""
    latents: list[Tensor] = []
    search = metas.vqgan.nearest_codes

    def kept(latents_BCyx: Tensor) -> Tensor:
        latents.append(latents_BCyx)
        return search(latents_BCyx)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metas.vqgan, "nearest_codes", kept)
        codes = metas.encode(VQ_IMAGES)
    return codes, torch.cat(latents)


@pytest.fixture(scope="module")
def drawn(
    metas: ImageTokenizer, expected: dict[str, npt.NDArray[Any]]
) -> tuple[list[PIL.Image.Image], Tensor]:
    """Images of Meta's four code grids, and the pixels before they are clamped."""
    pixels: list[Tensor] = []
    assert metas.vqgan.decoder is not None
    hook = metas.vqgan.decoder.register_forward_hook(lambda *call: pixels.append(call[2]))
    images = metas.decode(
        torch.from_numpy(np.stack([expected[f"tokens_{i}"].reshape(32, 32) for i in range(4)]))
    )
    hook.remove()
    return images, torch.cat(pixels)


def test_tokens_equal_metas(
    encoded: tuple[Tensor, Tensor], expected: dict[str, npt.NDArray[Any]]
) -> None:
    codes, latents = encoded
    assert codes.shape == (4, 32, 32) and codes.dtype == torch.int64
    for i in range(4):
        np.testing.assert_array_equal(codes[i].cpu().numpy().ravel(), expected[f"tokens_{i}"])
        np.testing.assert_allclose(
            latents[i].cpu().numpy(), expected[f"latent_{i}"], atol=2e-4, rtol=0
        )


def test_decoded_pixels_equal_metas(
    drawn: tuple[list[PIL.Image.Image], Tensor], expected: dict[str, npt.NDArray[Any]]
) -> None:
    for i, pixels in enumerate(drawn[1].cpu().numpy()):
        stride, patch = (expected[f"decoded_f32_{name}_{i}"] for name in ("stride8", "patch"))
        assert stride.size == 3 * 64 * 64 and patch.size == 3 * 64 * 64
        for actual, metas in ((pixels[:, ::8, ::8], stride), (pixels[:, 200:264, 300:364], patch)):
            np.testing.assert_allclose(actual, metas.reshape(3, 64, 64), atol=2e-3, rtol=0)


@pytest.mark.parametrize("i", [0, 3])
def test_decoded_images_equal_metas(drawn: tuple[list[PIL.Image.Image], Tensor], i: int) -> None:
    make_image = drawn[0][i]
    with PIL.Image.open(GOLDEN / f"expected/vq_decoded_{i}.png") as file:
        away = np.abs(np.asarray(make_image, dtype=int) - np.asarray(file, dtype=int))
    assert make_image.mode == "RGB" and make_image.size == (512, 512)
    assert away.max() <= 1 and (away > 0).mean() < 0.01


@pytest.mark.parametrize("size", [(32, 32), (1, 1), (3, 2), (77, 41), (40, 300), (512, 512)])
@pytest.mark.parametrize("mode", ["crop", "fit"])
def test_other_sizes(small: ImageTokenizer, size: tuple[int, int], mode: Any) -> None:
    assert small.preprocess(make_image(*size), mode).shape == (3, 32, 32)
    assert small.encode([make_image(*size)], mode).shape == (1, 8, 8)


def test_an_image_of_the_right_size_is_untouched(small: ImageTokenizer) -> None:
    source = make_image(32, 32)
    for mode in ("crop", "fit"):
        np.testing.assert_array_equal(small.square(source, mode), source)
    pixels = small.preprocess(source).double().numpy().transpose(1, 2, 0)
    np.testing.assert_allclose(pixels, np.asarray(source) / 127.5 - 1, atol=1e-7)


def test_crop_keeps_the_centre_and_fit_the_whole(small: ImageTokenizer) -> None:
    wide = PIL.Image.new("RGB", (96, 32), "blue")
    wide.paste("red", (32, 0, 64, 32))
    cropped, fitted = (np.asarray(small.square(wide, mode)) for mode in ("crop", "fit"))
    assert (cropped == (255, 0, 0)).all()
    assert (fitted[:8] == 255).all() and (fitted[-8:] == 255).all()
    np.testing.assert_array_equal(fitted[16, [2, 16, 29]], [(0, 0, 255), (255, 0, 0), (0, 0, 255)])


def test_fit_pads_before_it_resizes(small: ImageTokenizer) -> None:
    source = make_image(50, 20)
    canvas = PIL.Image.new("RGB", (50, 50), (255, 255, 255))
    canvas.paste(source, (0, 15))
    expected = canvas.resize((32, 32), PIL.Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(small.square(source, "fit"), expected)
    tokenizer = ImageTokenizer(small.vqgan, 32, mode="fit")
    np.testing.assert_array_equal(tokenizer.square(source), expected)


def test_long_strips_need_little_memory(
    small: ImageTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for size in ((16_384, 1), (1, 16_384), (3, 16_001)):
        for mode in ("crop", "fit"):
            assert ImageTokenizer(small.vqgan, 512).square(make_image(*size), mode).size == (
                512,
                512,
            )
    for size in ((45, 1001), (1001, 44), (60, 61)):
        source = make_image(*size)
        full = np.asarray(small.square(source), dtype=int)
        with monkeypatch.context() as patch:
            patch.setattr(image_tokenizer, "MAX_PIXELS", 0)
            narrow = np.asarray(small.square(source), dtype=int)
        assert np.abs(full - narrow).max() <= 1


def test_a_batch_equals_its_images_one_by_one(
    small: ImageTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = [make_image(40, 30 + i) for i in range(5)]
    singly = torch.cat([small.encode([source]) for source in sources])
    monkeypatch.setattr(image_tokenizer, "_BATCH_PIXELS", 2 * 32 * 32)
    assert torch.equal(small.encode(sources), singly)
    drawn = small.decode(singly)
    for codes, one in zip(singly, drawn, strict=True):
        away = np.asarray(one, int) - np.asarray(small.decode(codes[None])[0], int)
        assert np.abs(away).max() <= 1


def test_all_kinds_of_sources(small: ImageTokenizer, tmp_path: Path) -> None:
    source = make_image(40, 33)
    source.save(tmp_path / "a.png")
    path = tmp_path / "a.png"
    array = np.asarray(source)
    kinds = [source, path, str(path), path.read_bytes(), array, torch.from_numpy(array.copy())]
    codes = small.encode([*kinds, Image.of(source)])
    assert codes.shape == (7, 8, 8) and (codes == codes[0]).all()
    assert small.encode([]).shape == (0, 8, 8) and small.decode(small.encode([])) == []


@pytest.fixture(scope="module")
def mini(device: torch.device) -> ImageTokenizer:
    vqgan = Chameleon.load("mini", str(device)).image_tokenizer.vqgan
    return ImageTokenizer(vqgan, vqgan.config.resolution)


def test_decoding_in_bf16_changes_little(mini: ImageTokenizer) -> None:
    codes = mini.encode(sorted((GOLDEN / "images").glob("*.png"))[:8])
    images = ImageTokenizer(mini.vqgan, mini.resolution, precision="bf16").decode(codes)
    for one, exact in zip(images, mini.decode(codes), strict=True):
        away = np.asarray(one, float) - np.asarray(exact, float)
        assert 10 * np.log10(255**2 / max(1e-9, np.square(away).mean())) >= 45


def test_bf16_leaves_the_codes_alone(mini: ImageTokenizer) -> None:
    sources = [make_image(90, 64 + i) for i in range(4)]
    quick = ImageTokenizer(mini.vqgan, mini.resolution, precision="bf16")
    assert torch.equal(quick.encode(sources), mini.encode(sources))


def test_codes_do_not_depend_on_the_layout_in_memory(
    mini: ImageTokenizer, device: torch.device
) -> None:
    """No compiler, channels first and a graph: the same codes for 48 images."""
    pixels = torch.stack([mini.preprocess(make_image(64 + i, 70)) for i in range(48)]).to(device)
    plain = mini.vqgan.encode(pixels)  # with a graph, so by torch's own operators
    with torch.no_grad():
        assert torch.equal(mini.vqgan.encode(pixels), plain)


def test_decode_clamps_and_truncates(
    small: ImageTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = torch.tensor([-3.0, -1.0, 0.0, 0.999, 1.0, 7.0]).view(1, 1, 1, 6).expand(1, 3, 1, 6)
    monkeypatch.setattr(small.vqgan, "decode", lambda codes: values)
    [drawn] = small.decode(torch.zeros(1, 8, 8, dtype=torch.int64))
    assert np.asarray(drawn)[0, :, 0].tolist() == [0, 0, 127, 254, 255, 255]


def test_errors(small: ImageTokenizer) -> None:
    with pytest.raises(ImageError, match="codes but no pixels"):
        small.encode([Image(codes=np.zeros((8, 8), int))])
    with pytest.raises(ImageError, match="there is no file"):
        small.encode([make_image(4, 4), "missing.png"])
    with pytest.raises(SettingError, match="mode 'stretch' is unknown"):
        small.encode([make_image(4, 4)], mode="stretch")  # type: ignore[arg-type]
    with pytest.raises(SettingError, match="precision='fp16' is unknown: use one of fp32, bf16"):
        ImageTokenizer(small.vqgan, 32, precision="fp16")  # type: ignore[arg-type]
    with pytest.raises(SettingError, match="resolution=30 must be"):
        ImageTokenizer(small.vqgan, 30)
    wrong: list[Any] = ["codes.npy", None, {}, object(), [["a"]], 2**70, np.zeros((1, 8, 8), "c8")]
    for codes in wrong:
        with pytest.raises(ImageError, match=r"give whole numbers \[n, h, w\]"):
            small.decode(codes)
    for codes in (torch.zeros(8, 8, dtype=torch.int64), torch.zeros(1, 8, 8)):
        with pytest.raises(ImageError, match="cannot be decoded"):
            small.decode(codes)
    with pytest.raises(ImageError, match=r"2,000 x 2,000 codes make .* the limit is 4,194,304"):
        small.decode(torch.zeros(1, 1, 1, dtype=torch.int64).expand(1, 2000, 2000))
    for value in (-1, 32):
        with pytest.raises(ImageError, match="codebook"):
            small.decode(torch.full((1, 8, 8), value))
    with pytest.raises(CheckpointError, match="no VQ decoder"):
        ImageTokenizer(VQGAN(SMALL, with_decoder=False), 32).decode(torch.zeros(1, 8, 8).long())


def share_of_equal(found: Tensor, expected: Tensor) -> float:
    return float((found.cpu() == expected.cpu()).float().mean())


def test_encoding_in_bf16_changes_few_codes(mini: ImageTokenizer, metas: ImageTokenizer) -> None:
    """Of mini on images as it was trained on, and of a checkpoint in the shape of Meta's."""
    emoji = [
        PIL.Image.open(io.BytesIO(archive.read(name)))
        for archive in map(zipfile.ZipFile, sorted((TESTS / "data/images").glob("*.zip")))
        for name in archive.namelist()[:3]
    ]
    photos = [Image.open(file) for file in VQ_IMAGES]
    # A CPU without bf16 takes minutes for images of Meta's size; the network takes any.
    for vqgan, side, images in (
        (mini.vqgan, mini.resolution, emoji),
        (metas.vqgan, 64, photos[:2]),
    ):
        exact, rounded = (
            ImageTokenizer(vqgan, side, encode_precision=precision).encode(images)
            for precision in ("fp32", "bf16")
        )
        share = share_of_equal(rounded, exact)
        print(f"{share:.2%} of {exact.numel()} codes equal")
        assert share > 0.9 and rounded.dtype == torch.int64
        assert share < 1 or vqgan is not mini.vqgan  # else nothing was rounded


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The graphs that torch makes of what is compiled; they run as they are."""
    results: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        results.append(graph)
        return graph.forward

    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    return results


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_compiled_it_is_one_graph_each_way(graphs: list[Any], precision: Any) -> None:
    torch.manual_seed(0)
    vqgan = VQGAN(SMALL).eval()
    settings = {"precision": precision, "encode_precision": precision}
    plain = ImageTokenizer(vqgan, SMALL.resolution, **settings)
    compiled = ImageTokenizer(vqgan, SMALL.resolution, **settings, compiled=True)
    images = [make_image(32, 32), make_image(40, 33)]
    codes = plain.encode(images)
    assert share_of_equal(compiled.encode(images), codes) > 0.97
    assert len(graphs) == 1
    actual, expected = (np.stack(t.decode(codes)).astype(int) for t in (compiled, plain))
    assert np.abs(actual - expected).max() <= 1 + 8 * (precision == "bf16")
    assert len(graphs) == 2
    compiled.encode(images)
    compiled.decode(codes)
    assert len(graphs) == 2


def test_a_compiled_one_follows_its_network_and_can_be_copied(graphs: list[Any]) -> None:
    torch.manual_seed(0)
    tokenizer = ImageTokenizer(VQGAN(SMALL).eval(), SMALL.resolution, compiled=True)
    first = tokenizer.encode(make_image(32, 32))
    reloaded = pickle.loads(pickle.dumps(copy.deepcopy(tokenizer)))
    assert torch.equal(reloaded.encode(make_image(32, 32)), first)
    torch.manual_seed(1)
    tokenizer.vqgan = VQGAN(SMALL).eval()
    expected = ImageTokenizer(tokenizer.vqgan, SMALL.resolution).encode(make_image(32, 32))
    assert share_of_equal(tokenizer.encode(make_image(32, 32)), expected) > 0.97


def test_codes_of_another_device_are_decoded(small: ImageTokenizer) -> None:
    there = copy.deepcopy(small.vqgan).to("meta")
    assert isinstance(there, VQGAN)
    assert there.decode(torch.zeros(1, 2, 2, dtype=torch.int64)).shape == (1, 3, 8, 8)


def test_search_finds_the_same_in_one_piece_and_in_many(
    small: ImageTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(small.vqgan, VQGAN)
    vectors = torch.randn(70, SMALL.embed_dim, generator=torch.Generator().manual_seed(0))
    full = small.vqgan.quantize.search(vectors)
    monkeypatch.setattr(vqgan_module, "_SEARCH_ELEMENTS", 3 * SMALL.num_embeddings)
    assert torch.equal(small.vqgan.quantize.search(vectors), full)
