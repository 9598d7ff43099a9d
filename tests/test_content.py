from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import re
import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from earlyfusion import content
from earlyfusion.content import Image, Message, Text, as_messages, fill_placeholders
from earlyfusion.errors import ImageError, PromptError

RGB = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)


def pixels(image: Image) -> np.ndarray[Any, Any]:
    assert image.pil is not None and image.pil.mode == "RGB"
    return np.asarray(image.pil)


def saved(image: PIL.Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A small PNG file that claims a size: a decompression bomb where the size is large."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(100_000), 9)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", data), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_import_does_not_load_torch() -> None:
    code = (
        "import sys, earlyfusion.content, earlyfusion.vocabulary; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_pixels_equal_metas(golden: Path) -> None:
    expected = json.loads((golden / "expected/preprocess.json").read_text())
    assert len(expected) == 17
    for name, case in expected.items():
        array = pixels(Image.open(golden / "images" / name, deep="clip"))
        assert hashlib.sha256(array.tobytes()).hexdigest() == case["whitened_sha256"], name


def test_sources_agree(tmp_path: Path) -> None:
    photo = PIL.Image.fromarray(RGB)
    data = saved(photo, "PNG")
    path = tmp_path / "그림.png"
    path.write_bytes(data)
    chw = RGB.transpose(2, 0, 1)
    floats = torch.from_numpy(chw.copy()).float() / 255
    sources = [photo, path, str(path), data, bytearray(data), RGB, chw, RGB.astype(np.int64)]
    sources += [RGB / 255, torch.from_numpy(RGB), floats, floats.double().requires_grad_()]
    for source in sources:
        np.testing.assert_array_equal(pixels(Image.of(source)), RGB)
    image = Image.of(photo)
    assert Image.of(image) is image
    assert abs(pixels(Image.of(floats.bfloat16())).astype(int) - RGB).max() <= 1


@pytest.mark.parametrize("format", ["PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG", "AVIF"])
def test_formats(format: str) -> None:
    grey = PIL.Image.new("L", (9, 5), 100)
    assert pixels(Image.from_bytes(saved(grey, format))).shape == (5, 9, 3)


def test_modes_and_transparency() -> None:
    assert pixels(Image.from_array(np.array([[True, False]]))).tolist() == [[[255] * 3, [0] * 3]]
    grey = PIL.Image.new("LA", (1, 1), (10, 51))
    assert pixels(Image.of(grey)).tolist() == [[[int(0.8 * 255 + 0.2 * 10)] * 3]]
    assert pixels(Image.of(grey.convert("La"))).tolist() == pixels(Image.of(grey)).tolist()
    assert pixels(Image.of(PIL.Image.new("RGBA", (1, 1), (1, 2, 3, 0)))).tolist() == [[[255] * 3]]
    palette = PIL.Image.new("P", (2, 1))
    palette.putpalette([1, 2, 3, 4, 5, 6])
    palette.info["transparency"] = bytes([255, 255])
    assert pixels(Image.of(palette)).tolist() == [[[1, 2, 3], [1, 2, 3]]]
    for mode in ("CMYK", "YCbCr", "HSV", "LAB", "F", "I", "PA", "1", "L"):
        assert pixels(Image.of(PIL.Image.new(mode, (3, 2)))).shape == (2, 3, 3)


GREYS = np.array([[0, 1, 128, 255], [64, 100, 200, 77]], dtype=np.uint8)


def grey_of(source: Any, **how: Any) -> list[list[int]]:
    array = pixels(Image.of(source, **how))
    assert (array == array[..., :1]).all()
    return array[..., 0].tolist()


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_grey_of_16_bits_in_a_file_is_scaled(format: str) -> None:
    deep = GREYS.astype(np.uint16) * 257
    data = saved(PIL.Image.fromarray(deep), format)
    assert grey_of(data) == GREYS.tolist()
    assert grey_of(data, deep="clip") == np.minimum(deep, 255).tolist()
    between = PIL.Image.fromarray(np.array([[128, 129, 257 * 9 + 129]], dtype=np.uint16))
    assert grey_of(saved(between, format)) == [[0, 1, 10]]  # to the nearest of 257


def test_deep_images_are_scaled() -> None:
    deep = GREYS.astype(np.uint16) * 257
    for dtype, mode in (("<u2", "I;16"), (">u2", "I;16B")):
        image = PIL.Image.frombytes(mode, (4, 2), deep.astype(dtype).tobytes())
        assert grey_of(image) == grey_of(Image(image).pil) == GREYS.tolist()
    assert grey_of(PIL.Image.fromarray(deep.astype(np.int32))) == GREYS.tolist()
    # 32-bit numbers that 8 bits hold are those of 8 bits, as convert("I") makes them.
    assert grey_of(PIL.Image.fromarray(GREYS.astype(np.int32))) == GREYS.tolist()
    assert grey_of(PIL.Image.fromarray(GREYS.astype(np.float32) / 255)) == GREYS.tolist()
    dark = PIL.Image.fromarray(np.full((1, 2), 200, np.uint16))
    assert grey_of(dark) == [[1, 1]]  # 200 of 65,535, whatever else is in the image


@pytest.mark.parametrize(
    ("array", "sentence"),
    [
        (np.array([[0, 65_536]], np.int32), "32-bit numbers from 0 to 65536"),
        (np.array([[-1, 9]], np.int32), "32-bit numbers from -1 to 9"),
        (np.array([[0.0, 1.5]], np.float32), "floats from 0 to 1.5"),
        (np.array([[-0.5, 0.5]], np.float32), "floats from -0.5 to 0.5"),
        (np.array([[np.nan, 0.5]], np.float32), "nan"),
        (np.array([[0.5, np.nan]], np.float32), "holds NaN"),
    ],
)
def test_deep_images_of_an_unknown_scale(array: np.ndarray[Any, Any], sentence: str) -> None:
    image = PIL.Image.fromarray(array)
    for source in (image, saved(image, "TIFF")):
        with pytest.raises(ImageError, match=sentence) as error:
            Image.of(source)
        check_sentence(error.value)


def halves(width: int, height: int) -> PIL.Image.Image:
    """Red on the left, blue on the right."""
    image = PIL.Image.new("RGB", (width, height), "red")
    image.paste("blue", (width // 2, 0, width, height))
    return image


def corners(image: Image) -> list[tuple[int, ...]]:
    array = pixels(image)
    return [tuple((array[0, at].astype(int) + 40) // 255) for at in (0, -1)]


@pytest.mark.parametrize(
    ("size", "small"), [((60, 41), (30, 21)), ((100, 49), (50, 25)), ((71, 71), (24, 24))]
)
@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF", "AVIF", None])
def test_large_images_are_scaled_down(
    size: tuple[int, int], small: tuple[int, int], format: str | None, monkeypatch: Any
) -> None:
    """By the smallest whole number that brings them below the limit, in bands of rows."""
    monkeypatch.setattr(content, "MAX_PIXELS", 1_250)
    monkeypatch.setattr(content, "_BAND_ROWS", 7)
    photo = halves(*size)
    image = Image.of(saved(photo, format) if format else photo)
    assert image.pil is not None and image.pil.size == small
    assert corners(image) == [(1, 0, 0), (0, 0, 1)]


def test_large_images_of_every_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bands give what the whole image would: modes, transparency, 16 bits, orientation."""
    rng = np.random.default_rng(0)
    rgba = rng.integers(0, 256, (40, 30, 4), dtype=np.uint8)
    deep = PIL.Image.fromarray(rng.integers(0, 65_536, (40, 30), dtype=np.uint16))
    colours = PIL.Image.fromarray(rgba)
    palette = colours.convert("RGB").quantize(50)
    palette.info["transparency"] = 3
    kinds = [colours, deep, palette, colours.convert("L"), colours.convert("CMYK")]
    complete = [Image.of(image).pil for image in kinds]
    monkeypatch.setattr(content, "MAX_PIXELS", 300)
    monkeypatch.setattr(content, "_BAND_ROWS", 3)
    for image, full in zip(kinds, complete, strict=True):
        assert full is not None
        np.testing.assert_array_equal(pixels(Image.of(image)), np.asarray(full.reduce(2)))
    exif = colours.getexif()
    exif[0x0112] = 6
    for turned in (saved(colours, "PNG", exif=exif), saved(halves(40, 30), "JPEG", exif=exif)):
        assert pixels(Image.of(turned)).shape[:2] == (15, 20)[:: -1 if turned[0] == 255 else 1]


def test_large_jpeg_is_scaled_down_by_its_decoder() -> None:
    """50 megapixels are never decoded whole: what the decoder hands out is a quarter of them."""
    data = saved(halves(8_000, 6_250), "JPEG")
    shapes = []
    load = content.JpegImageFile.load

    def spy(image: Any) -> Any:
        shapes.append(image.size)
        return load(image)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(content.JpegImageFile, "load", spy)
        image = Image.from_bytes(data)
    assert set(shapes) == {(4_000, 3_125)}
    assert image.pil is not None and image.pil.size == (4_000, 3_125)
    assert corners(image) == [(1, 0, 0), (0, 0, 1)]


def test_an_image_that_its_decoder_refuses_for_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    data = saved(halves(40, 30), "WEBP")
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 500)
    with pytest.raises(ImageError, match="larger than Pillow reads in its format"):
        Image.from_bytes(data)


def test_a_large_image_of_the_caller_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content, "MAX_PIXELS", 300)
    for format in ("JPEG", "PNG"):
        image = PIL.Image.open(io.BytesIO(saved(halves(40, 30), format)))
        small = Image.of(image).pil
        assert small is not None and small.size == (20, 15)
        assert image.size == (40, 30) and np.asarray(image).shape == (30, 40, 3)


HEIC_HEAD = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"


def test_heic_without_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    for brands in (b"heicmif1", b"mif1heic"):
        head = HEIC_HEAD[:8] + brands[:4] + bytes(4) + brands[4:] * 2
        with pytest.raises(ImageError, match=r"pip install 'earlyfusion\[heic\]'") as error:
            Image.from_bytes(head)
        check_sentence(error.value)


def test_heic() -> None:
    heif = pytest.importorskip("pillow_heif")
    file = io.BytesIO()
    exif = halves(64, 48).getexif()
    exif[0x0112] = 6
    heif.from_pillow(halves(64, 48)).save(file, exif=exif.tobytes(), quality=-1)
    upright = pixels(Image.from_bytes(file.getvalue())).astype(int)
    assert upright.shape == (64, 48, 3)
    assert abs(upright - np.rot90(np.asarray(halves(64, 48)), -1)).mean() < 2
    with pytest.raises(ImageError, match="damaged"):
        Image.from_bytes(HEIC_HEAD + bytes(50))


def test_names_in_errors_are_as_typed(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"^https://example\.org/a\.png is an address: download"):
        Image.open("https://example.org/a.png")


def test_a_pipe_can_be_read(tmp_path: Path) -> None:
    pipe, data = tmp_path / "pipe", saved(PIL.Image.fromarray(RGB), "PNG")
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(data,), daemon=True)
    writer.start()
    np.testing.assert_array_equal(pixels(Image.open(pipe)), RGB)
    writer.join()


def test_exif_rotation(tmp_path: Path) -> None:
    image = PIL.Image.fromarray(RGB)
    exif = image.getexif()
    exif[0x0112] = 6  # shown a quarter turn clockwise
    upright = np.rot90(RGB, -1)
    data = saved(image, "PNG", exif=exif)
    (tmp_path / "a.png").write_bytes(data)
    np.testing.assert_array_equal(pixels(Image.from_bytes(data)), upright)
    np.testing.assert_array_equal(pixels(Image.open(tmp_path / "a.png")), upright)
    np.testing.assert_array_equal(pixels(Image.of(PIL.Image.open(io.BytesIO(data)))), upright)


def test_a_later_change_of_the_image_does_not_reach_the_image() -> None:
    photo = PIL.Image.fromarray(RGB)
    image = Image.of(photo)
    photo.paste((255, 255, 255), (0, 0, 7, 5))
    np.testing.assert_array_equal(pixels(image), RGB)


def test_bad_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = saved(PIL.Image.fromarray(np.tile(RGB, (20, 20, 1))), "PNG")
    files = {"text.png": b"hello, I am text", "one.png": b"\x89", "empty.png": b"", "zero.png": b""}
    files |= {"cut.png": data[: len(data) // 2], "head.png": data[:20], "sig.png": data[:8]}
    files |= {"noise.jpg": b"\xff\xd8\xff" + bytes(range(256)), "riff.webp": b"RIFFxxxxWAVEfmt "}
    files |= {"a.gif": b"GIF89a", "b.bmp": b"BMxx", "c.tif": b"II*\0", "d.ppm": b"P6 1 1 255 abc"}
    jpeg = saved(PIL.Image.fromarray(np.tile(RGB, (20, 20, 1))), "JPEG")
    files |= {"cut.jpg": jpeg[: len(jpeg) // 2]}
    for name, content_bytes in files.items():
        (tmp_path / name).write_bytes(content_bytes)
        for source in (tmp_path / name, content_bytes):
            with pytest.raises(ImageError) as error:
                Image.of(source)
            check_sentence(error.value)
            assert ("is an empty file" in str(error.value)) is (content_bytes == b"")
    for path in (tmp_path, tmp_path / "missing.png", "a\0b.png", "x" * 5000):
        with pytest.raises(ImageError) as error:
            Image.open(path)
        check_sentence(error.value)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Image("cat.png"), "str is not a PIL image.*Image.of"),
        (lambda: Image(RGB), "ndarray is not a PIL image.*Image.of"),
        (lambda: Image.open(io.BytesIO(b"")), "BytesIO is not a path.*Image.of"),
        (lambda: Image.open(b"cat.png"), "bytes is not a path"),
        (lambda: Image.from_bytes("cat.png"), "str is not the bytes of a file"),
        (lambda: Image.from_bytes(io.BytesIO(b"")), "BytesIO is not the bytes of a file"),
        (lambda: Image.from_array(RGB.tolist()), "list is not a numpy array"),
    ],
)
def test_what_is_no_image_is_named(make: Callable[[], Image], sentence: str) -> None:
    with pytest.raises(ImageError, match=sentence) as error:
        make()
    check_sentence(error.value)


def test_the_bytes_of_a_file_may_be_a_view() -> None:
    data = saved(PIL.Image.fromarray(RGB), "PNG")
    for view in (bytearray(data), memoryview(data)):
        np.testing.assert_array_equal(pixels(Image.from_bytes(view)), RGB)  # type: ignore[arg-type]


def test_errors_do_not_repeat_a_long_name() -> None:
    """Such as base64 in place of a path."""
    for name in ("iVBORw0KGgo" * 10_000, "ab/" * 10_000, "data:image/png;base64," + "A" * 10_000):
        with pytest.raises(ImageError, match=re.escape(name[:40])) as error:
            Image.open(name)
        check_sentence(error.value)
        assert len(str(error.value)) < 300


def test_text_is_a_str() -> None:
    with pytest.raises(PromptError, match="Text holds an object of type int: give a str"):
        Text(5)  # type: ignore[arg-type]


def check_sentence(error: Exception) -> None:
    text = str(error)
    assert "\n" not in text and " 0x" not in text and "<" not in text
    assert not text.endswith(".") and error.__cause__ is None


@pytest.mark.parametrize(
    ("size", "sentence"),
    [
        ((20_000, 20_000), "20000x20000 pixels, the limit is 16,384 per side"),
        ((14_000, 14_500), "14000x14500 pixels, the limit is 200 megapixels"),
        ((16_384, 16_384), "the limit is 200 megapixels"),
        ((2**31 - 1, 1), "the limit is 16,384 per side"),
        ((0, 5), "it needs at least 1x1|damaged"),
    ],
)
def test_size_is_checked_before_decoding(size: tuple[int, int], sentence: str) -> None:
    data = png_header(*size)
    assert len(data) < 1000
    with pytest.raises(ImageError, match=sentence):
        Image.from_bytes(data)


def test_byte_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "large.png"
    path.write_bytes(saved(PIL.Image.fromarray(RGB), "PNG"))
    size = path.stat().st_size
    monkeypatch.setattr(content, "MAX_FILE_BYTES", size)
    Image.open(path)
    monkeypatch.setattr(content, "MAX_FILE_BYTES", size - 1)
    for source in (path, path.read_bytes()):
        with pytest.raises(ImageError, match=f"has {size} bytes, the limit is {size - 1}"):
            Image.of(source)


def test_extremes_that_are_allowed() -> None:
    assert pixels(Image.from_array(np.zeros((1, 1), np.uint8))).shape == (1, 1, 3)
    assert pixels(Image.of(PIL.Image.new("RGB", (16_384, 2)))).shape == (2, 16_384, 3)
    with pytest.raises(ImageError, match="the limit is 16,384 per side"):
        Image.of(PIL.Image.new("L", (16_385, 1)))


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        (np.zeros((5, 6, 2)), "array of shape 5x6x2 is not one image"),
        (np.zeros((1, 3, 8, 8)), "array of shape 1x3x8x8"),
        (np.zeros(3), "array of shape 3 is not"),
        (np.array(1.0), "array of shape scalar is not"),
        (np.zeros((0, 5, 3)), "at least 1x1"),
        (np.full((2, 2), np.nan), "values from nan to nan"),
        (np.array([[0.0, np.inf]]), "to inf"),
        (np.full((2, 2), 1.5), "an image of float64 has 0 to 1"),
        (np.full((2, 2), -0.1), "0 to 1: rescale it"),
        (np.full((2, 2), 300), "an image of int64 has 0 to 255"),
        (np.full((2, 2), 1j), "array of complex128"),
        (np.array([["a"]]), "is not an image"),
        (torch.zeros(2, 3, 4, 4), "array of shape 2x3x4x4"),
        (None, "type NoneType is not an image"),
        (7, "type int is not an image"),
    ],
)
def test_bad_sources(source: Any, sentence: str) -> None:
    with pytest.raises(ImageError, match=sentence):
        Image.of(source)


def test_channel_rule() -> None:
    """The last axis wins where both could be channels."""
    both = np.zeros((3, 20, 3), np.uint8)
    assert pixels(Image.from_array(both)).shape == (3, 20, 3)
    assert pixels(Image.from_array(np.zeros((1, 4, 6), np.uint8))).shape == (4, 6, 3)
    assert pixels(Image.from_array(np.full((4, 5, 7), 255, np.uint8))).shape == (5, 7, 3)


def test_codes() -> None:
    image = Image(codes=torch.tensor([[1, 2], [3, 4]], dtype=torch.int32))
    assert image.pil is None and image.codes is not None
    assert image.codes.dtype == np.int64 and image.codes.tolist() == [[1, 2], [3, 4]]
    for bad in (np.zeros(4, int), np.zeros((2, 2)), -np.ones((1, 1), int), np.zeros((0, 2), int)):
        with pytest.raises(ImageError, match="image codes of shape"):
            Image(codes=bad)
    with pytest.raises(ImageError, match="rows of different lengths"):
        Image(codes=[[0, 1], [2]])  # type: ignore[arg-type]
    with pytest.raises(ImageError, match="needs pixels or codes"):
        Image()


def test_prompts(tmp_path: Path) -> None:
    image = PIL.Image.fromarray(RGB)
    image.save(tmp_path / "a.png")
    [message] = as_messages("Hi")
    assert (message.role, message.parts) == ("user", [Text("Hi")])
    [message] = as_messages(["What? ", Text("This: "), image, "", Path(tmp_path / "a.png")])
    kinds = [type(part).__name__ for part in message.parts]
    assert kinds == ["Text", "Text", "Image", "Image"]
    assert len(message.images) == 2
    turns = [Message("user", "a"), Message("assistant", ["b"]), Message("user", image)]
    assert as_messages(turns) == turns
    assert as_messages(turns[0]) == turns[:1]
    assert len(as_messages(image)[0].images) == 1


@pytest.mark.parametrize(
    ("prompt", "sentence"),
    [
        ("", "the prompt is empty"),
        (" \n", "the prompt is empty"),
        ([], "the prompt is empty"),
        (["", Text("")], "the prompt is empty"),
        ([Message("user", [])], "the prompt is empty"),
        (None, "cannot hold an object of type NoneType"),
        (["a", 7], "cannot hold an object of type int"),
        ([["a"]], "cannot hold an object of type list"),
        ([b"a"], "cannot hold an object of type bytes"),
        ([Message("user", "a"), "b"], "a list of messages cannot hold an object of type str"),
        ([{"role": "user"}], "it needs role and content"),
        ([{"role": "user", "content": [{"type": "audio"}]}], "a part of type 'audio' is not known"),
        ([{"role": "user", "content": [{"type": "image"}]}], "has no source"),
        ({"role": "user", "content": [{"type": "image", "url": "https://a/b"}]}, "not fetched"),
        ([{"role": "tool", "content": "a"}], "role 'tool' is unknown"),
        ([Message("user", ""), Message("assistant", "b")], "the prompt is empty"),
        ([Message("user", "a"), Message("user", "b")], "message 2 of 2 is the user's out of turn"),
        ([Message("assistant", "a"), Message("user", "b")], "message 1 of 2 is the assistant's"),
    ],
)
def test_bad_prompts(prompt: Any, sentence: str) -> None:
    with pytest.raises(PromptError, match=sentence):
        as_messages(prompt)


def test_unknown_role() -> None:
    with pytest.raises(PromptError, match="role 'tool' is unknown"):
        Message("tool", "a")  # type: ignore[arg-type]


def test_a_system_text_is_part_of_the_turn_beside_it() -> None:
    """As `data/forms.py` has it: the user's, joined by a newline."""
    system, user, answer = (
        Message("system", "Be kind."),
        Message("user", "Hi"),
        Message("assistant", "Hey"),
    )
    joined = Message("user", ["Be kind.", "\n", "Hi"])
    assert as_messages([system, user]) == [joined]
    assert as_messages([user, answer, system, user]) == [user, answer, joined]
    assert as_messages([user, system]) == [Message("user", ["Hi", "\n", "Be kind."])]
    assert as_messages([system, answer, user])[0] == Message("user", "Be kind.")
    assert system.role == "system" and len(system.parts) == 1
    with pytest.raises(PromptError, match="message 2 of 2 is the user's out of turn"):
        as_messages([user, user])


def test_dicts_are_messages(tmp_path: Path) -> None:
    image = PIL.Image.fromarray(RGB)
    image.save(tmp_path / "a.png")
    image.save(tmp_path / "사과 1.png")
    data_bytes = (tmp_path / "a.png").read_bytes()
    data = base64.b64encode(data_bytes).decode()
    url = f"data:image/png;base64,{data}"
    sources: list[dict[str, Any]] = [
        {"type": "image", "image": image},
        {"type": "image", "image": RGB},
        {"type": "image", "path": str(tmp_path / "a.png")},
        {"type": "image", "url": f"file://{tmp_path / 'a.png'}"},
        {"type": "image", "url": (tmp_path / "사과 1.png").as_uri()},
        {"type": "image", "base64": data},
        {"type": "image", "base64": base64.encodebytes(data_bytes).decode()},
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "image_url", "image_url": url},
    ]
    content = [{"type": "text", "text": "What? <image>"}, *sources]
    for prompt in ({"role": "user", "content": content}, [{"role": "user", "content": content}]):
        [message] = as_messages(prompt)  # type: ignore[arg-type]
        assert message.role == "user" and message.parts[0] == Text("What? <image>")
        assert [np.asarray(i.pil).tolist() for i in message.images] == [RGB.tolist()] * len(sources)
    turns = [{"role": "user", "content": "Hi"}, Message("assistant", "Hey")]
    assert as_messages(turns) == [Message("user", "Hi"), turns[1]]
    for damaged in ("data:image/png,abc", "data:image/png;base64,@@"):
        with pytest.raises(ImageError, match="base64"):
            as_messages({"role": "user", "content": [{"type": "image", "url": damaged}]})


def test_arrays_and_tensors_are_parts() -> None:
    [message] = as_messages(["What? ", RGB, RGB / 255.0, torch.from_numpy(RGB)])
    assert [np.asarray(i.pil).tolist() for i in message.images] == [RGB.tolist()] * 3
    assert len(as_messages(RGB)[0].images) == 1
    with pytest.raises(ImageError, match="has 0 to 1"):
        as_messages([RGB.astype(np.float32)])
    for tensor in (torch.zeros(3, 4, 4, device="meta"), torch.zeros(4, 4).to_sparse()):
        with pytest.raises(ImageError, match="a tensor without plain values is not an image"):
            as_messages([tensor])  # type: ignore[list-item]


def test_placeholders() -> None:
    one, two = (Image.from_array(RGB + shade) for shade in (0, 1))
    assert fill_placeholders("a", []) == [Text("a")]
    assert fill_placeholders("What?", [one, two]) == [one, two, Text("What?")]
    parts = fill_placeholders("<image>x <image> y", [one, two])
    assert parts == [one, Text("x "), two, Text(" y")]
    assert fill_placeholders("", [one]) == [one]
    for text, images in (("<image><image>", [one]), ("<image>", []), ("<image>", [one, two])):
        with pytest.raises(PromptError, match="the prompt marks"):
            fill_placeholders(text, images)
    with pytest.raises(PromptError, match="marks 2 places with <image> but 1 image is given"):
        fill_placeholders("<image><image>", [one])
    with pytest.raises(PromptError, match="marks 1 place with <image> but 2 images are given"):
        fill_placeholders("<image>", [one, two])
