"""Images to pixels in the transformers classes: two equal back ends, which equal Meta's."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from PIL.Image import Resampling
from tiny import CONFIG

from earlyfusion.errors import ImageError, SettingError
from earlyfusion.hf import (
    ChameleonImageProcessor,
    ChameleonImageProcessorKwargs,
    ChameleonImageProcessorPil,
)
from earlyfusion.hf.resampling import resized
from earlyfusion.image_tokenizer import ImageTokenizer
from earlyfusion.model.vqgan import VQGAN

BOTH = [ChameleonImageProcessor, ChameleonImageProcessorPil]
SMALL: dict[str, Any] = {
    "size": {"shortest_edge": 48},
    "crop_size": {"height": 48, "width": 48},
}
FILTERS = [f for f in Resampling if f.name in ("NEAREST", "BOX", "BILINEAR", "HAMMING", "BICUBIC")]


def noise(seed: int, *shape: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def make_image(seed: int, width: int, height: int) -> PIL.Image.Image:
    return PIL.Image.fromarray(noise(seed, height, width, 3))


def pixels(processor: Any, images: Any, **settings: Any) -> torch.Tensor:
    inputs = processor(images, return_tensors="pt", **settings)["pixel_values"]
    assert isinstance(inputs, torch.Tensor)
    return inputs


class TestResampling:
    @pytest.mark.parametrize("resample", [Resampling.LANCZOS, *FILTERS])
    def test_equal_to_pillow(self, resample: Resampling) -> None:
        """Larger, smaller, one axis only, one pixel; hard edges, where sums pass 0 and 255."""
        rng = np.random.default_rng(int(resample))
        sizes = [(64, 48, 69, 51), (48, 64, 16, 20), (9, 40, 9, 13), (1, 1, 5, 7), (33, 5, 1, 1)]
        sizes += [tuple(row) for row in rng.integers(1, 90, (40, 4)).tolist()]
        for number, (height, width, *size) in enumerate(sizes):
            array = noise(number, height, width, 3)
            array = array if number % 2 else (array > 128).astype(np.uint8) * np.uint8(255)
            expected = np.asarray(PIL.Image.fromarray(array).resize(size[::-1], resample))
            planes = torch.from_numpy(array).permute(2, 0, 1)[None]
            result = resized(planes, (size[0], size[1]), resample)
            assert np.array_equal(result[0].permute(1, 2, 0).numpy(), expected), (
                height,
                width,
                size,
            )

    def test_a_window_is_that_part_of_the_whole(self) -> None:
        planes = torch.from_numpy(noise(0, 2, 3, 40, 50))
        full = resized(planes, (60, 75))
        part = resized(planes, (60, 75), window=(range(7, 33), range(20, 75)))
        assert torch.equal(part, full[..., 7:33, 20:75])

    def test_an_unknown_filter(self) -> None:
        with pytest.raises(SettingError, match="resample=99 is not a known filter"):
            resized(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), (2, 2), 99)


@pytest.fixture
def as_on_a_gpu(monkeypatch: Any) -> None:
    """torch resizes on the CPU too."""
    monkeypatch.setattr("earlyfusion.hf.image_processing._resize_window", resized)


class TestBackEnds:
    @pytest.mark.parametrize(
        "settings",
        [
            {},
            {"resize_mode": "fit"},
            {"exact": False},
            {"exact": False, "do_resize": False},
            {"resample": Resampling.BICUBIC},
            {"size": {"height": 40, "width": 64}},
            {"crop_size": {"height": 31, "width": 60}},
            {"crop_size": {"height": 70, "width": 31}},
            {"do_resize": False},
            {"do_center_crop": False, "do_pad": True},
            {"do_center_crop": False, "do_pad": True, "pad_size": {"height": 99, "width": 98}},
            {"do_normalize": False},
            {"do_rescale": False},
            {"do_rescale": False, "do_normalize": False},
            {"rescale_factor": -1.0},
            {"image_mean": [0.1, 0.2, 0.3], "image_std": 0.5},
        ],
        ids=str,
    )
    def test_equal_to_the_bit(self, settings: dict[str, Any], request: Any) -> None:
        images = [make_image(n, *size) for n, size in enumerate([(64, 50), (51, 90), (64, 50)])]
        by_pillow = ChameleonImageProcessorPil(**SMALL)(images, **settings)["pixel_values"]
        request.getfixturevalue("as_on_a_gpu")
        by_torch = ChameleonImageProcessor(**SMALL)(images, **settings)["pixel_values"]
        assert len(by_pillow) == len(by_torch) == 3
        for one, other in zip(by_pillow, by_torch, strict=True):
            assert isinstance(one, np.ndarray) and isinstance(other, torch.Tensor)
            assert np.array_equal(one, other.numpy())

    @pytest.mark.parametrize("cls", BOTH)
    @pytest.mark.parametrize("mode", ["crop", "fit"])
    def test_equal_to_the_image_tokenizer(self, cls: Any, mode: Any) -> None:
        tokenizer = ImageTokenizer(VQGAN(CONFIG.vq_config), 48)
        processor = cls(**SMALL, resize_mode=mode)
        for seed, size in enumerate([(64, 48), (45, 30), (30, 45), (48, 48), (7, 5), (300, 20)]):
            image = make_image(seed, *size)
            assert torch.equal(pixels(processor, image)[0], tokenizer.preprocess(image, mode))

    @pytest.mark.parametrize("cls", BOTH)
    def test_equal_to_meta_s_recorded_steps(self, cls: Any, golden: Path) -> None:
        expected = json.loads((golden / "expected/preprocess.json").read_text())
        for name, case in expected.items():
            if case["input_shape"] == [1, 3, 512, 512]:
                with PIL.Image.open(golden / "images" / name) as image:
                    values = cls()(image, deep="clip", return_tensors="np")["pixel_values"]
                assert hashlib.sha256(values.tobytes()).hexdigest() == case["input_f32_sha256"], (
                    name
                )

    @pytest.mark.parametrize("cls", BOTH)
    def test_every_form_of_one_image(self, cls: Any) -> None:
        image = make_image(0, 64, 50)
        array, processor = np.asarray(image), cls(**SMALL)
        first = array.transpose(2, 0, 1)
        wanted = pixels(processor, image)
        forms = [array, first, torch.from_numpy(first.copy()), array / 255, array[None]]
        forms += [torch.from_numpy(first / 255).float(), array.astype(np.int64), array[::-1][::-1]]
        for form in forms:
            assert torch.equal(pixels(processor, form), wanted)
        named = pixels(processor, array.transpose(1, 0, 2), input_data_format="channels_last")
        assert torch.equal(named, pixels(processor, image.transpose(PIL.Image.Transpose.TRANSPOSE)))

    @pytest.mark.parametrize("crop", [(9, 8), (4, 3), (9, 3), (5, 6)])
    def test_crops_lie_where_transformers_has_them(self, crop: tuple[int, int]) -> None:
        """An odd number of pixels missing or too many, on either axis."""
        from transformers.models.chameleon.image_processing_pil_chameleon import (
            ChameleonImageProcessorPil as Stock,
        )

        settings = dict.fromkeys(("do_resize", "do_rescale", "do_normalize"), False)
        settings |= {"crop_size": {"height": crop[0], "width": crop[1]}}
        image = make_image(0, 5, 6)
        wanted = Stock(**settings)(image)["pixel_values"][0]
        for cls in BOTH:
            assert np.array_equal(np.asarray(cls(**settings)(image)["pixel_values"][0]), wanted)

    def test_a_narrow_array_has_its_channels_first(self) -> None:
        planes = torch.from_numpy(noise(0, 3, 40, 4))
        image = PIL.Image.fromarray(planes.permute(1, 2, 0).contiguous().numpy())
        processor = ChameleonImageProcessor(**SMALL)
        assert torch.equal(pixels(processor, planes), pixels(processor, image))

    @pytest.mark.parametrize("cls", BOTH)
    def test_grey_and_alpha(self, cls: Any) -> None:
        rgba = PIL.Image.fromarray(noise(0, 50, 64, 4))
        grey = PIL.Image.fromarray(noise(1, 50, 64))
        for image in (rgba, grey):
            array = np.asarray(image) if image is rgba else np.asarray(image)[None]
            assert torch.equal(pixels(cls(**SMALL), array), pixels(cls(**SMALL), image))
        four = pixels(
            cls(**SMALL), rgba, do_convert_rgb=False, image_mean=[0.0] * 4, image_std=[1.0] * 4
        )
        assert four.shape == (1, 4, 48, 48)
        named = pixels(cls(**SMALL), np.asarray(rgba), image_mean=[0.0] * 4, image_std=[1.0] * 4)
        assert torch.equal(named, four)
        assert (
            pixels(cls(**SMALL), grey, do_convert_rgb=False, image_mean=0.0, image_std=1.0).shape[1]
            == 1
        )

    @pytest.mark.parametrize("cls", BOTH)
    def test_a_batch_in_one_tensor_and_its_order(self, cls: Any) -> None:
        batch = torch.from_numpy(noise(0, 4, 3, 50, 64))
        one_by_one = torch.cat([pixels(cls(**SMALL), image) for image in batch])
        assert torch.equal(pixels(cls(**SMALL), batch), one_by_one)
        mixed = [batch[0], batch[1][:, :30], batch[2], batch[3][:, :30]]
        wanted = torch.cat([pixels(cls(**SMALL), image) for image in mixed])
        for settings in ({}, {"disable_grouping": True}):
            assert torch.equal(pixels(cls(**SMALL), mixed, **settings), wanted)

    def test_images_of_one_shape_go_through_together(self, monkeypatch: Any) -> None:
        recorded = []

        def watched(batch: torch.Tensor, *rest: Any) -> torch.Tensor:
            recorded.append(batch.shape[0])
            return resized(batch, *rest)

        monkeypatch.setattr("earlyfusion.hf.image_processing._resize_window", watched)
        pixels(ChameleonImageProcessor(**SMALL), torch.from_numpy(noise(0, 5, 3, 50, 64)))
        assert recorded == [5]

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    def test_on_a_gpu(self) -> None:
        images, processor = torch.from_numpy(noise(0, 2, 3, 500, 640)), ChameleonImageProcessor()
        for settings in ({}, {"resize_mode": "fit"}, {"exact": False}):
            wanted = pixels(processor, images, **settings)
            for result in (
                pixels(processor, images.cuda(), **settings),
                pixels(processor, images, device="cuda", **settings),
            ):
                assert result.is_cuda and torch.equal(result.cpu(), wanted)

    def test_the_device_is_obeyed(self) -> None:
        values = ChameleonImageProcessor(**SMALL)(make_image(0, 64, 50), device="meta")[
            "pixel_values"
        ]
        assert values[0].device.type == "meta" and values[0].shape == (3, 48, 48)

    def test_a_long_strip(self) -> None:
        strip = make_image(0, 16_000, 1)
        values = [pixels(cls(**SMALL), strip) for cls in BOTH]
        full = strip.resize((48 * 16_000, 48), Resampling.LANCZOS)
        left = (full.width - 48) // 2
        shown = pixels(BOTH[0](**SMALL, do_resize=False), full.crop((left, 0, left + 48, 48)))
        assert torch.equal(values[0], values[1]) and torch.equal(values[0], shown)

    @pytest.mark.parametrize("cls", BOTH)
    def test_saved_under_one_name(self, cls: Any, tmp_path: Path) -> None:
        cls(**SMALL, resize_mode="fit", deep="clip").save_pretrained(tmp_path)
        written = json.loads((tmp_path / "preprocessor_config.json").read_text())
        assert written["image_processor_type"] == "ChameleonImageProcessor"
        assert written["resize_mode"] == "fit"
        for other in BOTH:
            reloaded = other.from_pretrained(tmp_path)
            assert (reloaded.resize_mode, reloaded.deep) == ("fit", "clip")
        assert cls.valid_kwargs is ChameleonImageProcessorKwargs

    @pytest.mark.parametrize("cls", BOTH)
    def test_a_file_is_read_as_the_package_reads_it(self, cls: Any, tmp_path: Path) -> None:
        image = PIL.Image.fromarray(noise(0, 50, 64, 4))  # transformers' loader drops the alpha
        image.save(tmp_path / "a.png")
        values = pixels(cls(**SMALL), str(tmp_path / "a.png"))
        assert torch.equal(values, pixels(cls(**SMALL), image))

    @pytest.mark.parametrize(
        ("settings", "sentence"),
        [
            ({"resize_mode": "stretch"}, "resize_mode='stretch' is unknown"),
            ({"deep": "cut"}, "deep='cut' is unknown"),
            (
                {"resize_mode": "fit", "exact": False},
                "resize_mode='fit' is not among",
            ),
        ],
    )
    def test_refused(self, settings: dict[str, Any], sentence: str) -> None:
        for cls in BOTH:
            with pytest.raises(SettingError, match=sentence):
                cls(**settings)

    @pytest.mark.parametrize(
        ("settings", "sentence"),
        [
            ({"size": {"shortest_edge": 48, "longest_edge": 90}}, "is not among Meta's steps"),
            ({"image_mean": [1.0, 1.0]}, "image_mean has 2 values but the image 3 channels"),
            ({"resize_mode": "fit", "crop_size": {"height": 4, "width": 5}}, "makes squares"),
            (
                {"do_center_crop": False, "do_pad": True, "pad_size": {"height": 9, "width": 9}},
                "is smaller than an image",
            ),
        ],
    )
    def test_refused_in_a_call(self, settings: dict[str, Any], sentence: str) -> None:
        for cls in BOTH:
            with pytest.raises(SettingError, match=sentence):
                cls(**SMALL)(make_image(0, 64, 50), **settings)


def test_stock_s_names() -> None:
    """What transformers' Chameleon modules define, by the same names from one place."""
    import earlyfusion.hf as own

    names = ["ImageProcessor", "ImageProcessorPil", "ImageProcessorFast", "ProcessorKwargs"]
    names += ["VQVAEModelOutput", "PreTrainedModel"]
    for name in (f"Chameleon{name}" for name in names):
        assert name in own.__all__
        assert getattr(own, name).__name__.startswith("Chameleon")


class TestMoreThanEightBits:
    GREY = noise(0, 50, 64)

    def deep_forms(self) -> dict[str, Any]:
        sixteen = self.GREY.astype(np.uint16) * np.uint16(257)
        return {
            "I;16": PIL.Image.fromarray(sixteen),
            "I": PIL.Image.fromarray(sixteen.astype(np.int32)),
            "I, 8 bits": PIL.Image.fromarray(self.GREY.astype(np.int32)),
            "F": PIL.Image.fromarray((self.GREY / 255).astype(np.float32)),
            "uint16": sixteen,
            ">u2": sixteen.astype(">u2"),
            "uint16 tensor": torch.from_numpy(sixteen),
            "float16": torch.from_numpy(self.GREY / 255).half(),
        }

    @pytest.mark.parametrize("cls", BOTH)
    def test_scaled(self, cls: Any) -> None:
        expected = pixels(cls(**SMALL), PIL.Image.fromarray(self.GREY))
        for name, form in self.deep_forms().items():
            image = form[None] if not isinstance(form, PIL.Image.Image) else form
            assert torch.equal(pixels(cls(**SMALL), image), expected), name

    @pytest.mark.parametrize("cls", BOTH)
    def test_meta_s_cut_on_request(self, cls: Any) -> None:
        image = self.deep_forms()["I;16"]
        clipped = PIL.Image.fromarray(np.where(self.GREY > 0, 255, 0).astype(np.uint8))
        values = pixels(cls(**SMALL, deep="clip"), image)
        assert torch.equal(values, pixels(cls(**SMALL), clipped))

    @pytest.mark.parametrize(
        ("image", "sentence"),
        [
            (PIL.Image.fromarray(np.full((4, 4), 70_000, np.int32)), "from 70000 to 70000"),
            (PIL.Image.fromarray(np.full((4, 4), -1, np.int32)), "whose scale is unknown"),
            (PIL.Image.fromarray(np.full((4, 4), 2.5, np.float32)), "0 to 1"),
            (PIL.Image.fromarray(np.full((4, 4), np.nan, np.float32)), "0 to 1"),
            (np.full((3, 4, 4), 300, np.int32), "and int32 images have 0 to 255"),
            (torch.full((3, 4, 4), 1.5), "and float32 images have 0 to 1"),
            (torch.full((3, 4, 4), -1), "and int64 images have 0 to 255"),
            (np.zeros((5, 7, 9), np.uint8), "5x7x9 is not one image"),
        ],
    )
    def test_images_of_an_unclear_layout_are_refused(self, image: Any, sentence: str) -> None:
        for cls in BOTH:
            with pytest.raises(ImageError, match=sentence):
                cls(**SMALL)(image)
