"""What people say, before any token: `Text`, `Image`, `Message`, and the ways to write a prompt.

A picture is read here once, safely: its format and size are checked from the header before a pixel
is decoded, and what comes out is RGB, upright, blended on white as Meta's code does it
(github.com/facebookresearch/chameleon, chameleon/inference/image_tokenizer.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast, get_args

import numpy as np
import numpy.typing as npt
import PIL.Image
from PIL import ImageOps
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from earlyfusion.errors import ImageError, PromptError

MAX_FILE_BYTES = 20_000_000
MAX_SIDE = 16_384
MAX_PIXELS = 25_000_000
PLACEHOLDER = "<image>"

# Readers by first bytes. PIL.Image.open would try every format it knows and warn about large ones.
_READERS: dict[bytes, type[ImageFile]] = {
    b"\x89PNG\r\n\x1a\n": PngImageFile,
    b"\xff\xd8\xff": JpegImageFile,
    b"RIFF": WebPImageFile,
    b"GIF8": GifImageFile,
    b"BM": BmpImageFile,
    b"II*\x00": TiffImageFile,
    b"MM\x00*": TiffImageFile,
}
_FORMATS = "PNG, JPEG, WEBP, GIF, BMP or TIFF"

# _OVER_WHITE[alpha, value]: truncated, not rounded, as in Meta's code.
_ALPHA = np.arange(256)[:, None] / 255.0
_OVER_WHITE = ((1 - _ALPHA) * 255 + _ALPHA * np.arange(256)).astype(np.uint8)

Role: TypeAlias = Literal["user", "assistant"]


@dataclass(frozen=True)
class Text:
    """A stretch of text."""

    text: str


@dataclass(eq=False)
class Image:
    """A picture: its pixels, its codes, or both.

    `pil` is upright RGB of any size, None for a drawn picture that is not decoded yet; `codes` is
    int64 [h, w], None for a picture that is not encoded yet. Raises `ImageError`.
    """

    pil: PIL.Image.Image | None = None
    codes: npt.NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        if self.pil is None and self.codes is None:
            raise ImageError("an image needs pixels or codes: use Image.open, Image.of or codes=")
        if self.pil is not None:
            self.pil = _upright_rgb(self.pil, "the picture")
        if self.codes is not None:
            self.codes = _checked_codes(self.codes)

    @classmethod
    def open(cls, path: str | Path) -> Image:
        """Read a picture file: PNG, JPEG, WEBP, GIF, BMP or TIFF (of several frames the first)."""
        return cls(_decode(_read_file(Path(path)), str(path)))

    @classmethod
    def from_bytes(cls, data: bytes) -> Image:
        """Read a picture from the bytes of a file."""
        return cls(_decode(data, "the picture"))

    @classmethod
    def from_array(cls, array: npt.NDArray[Any]) -> Image:
        """A picture from [Y, X], [Y, X, C] or [C, Y, X] with C = 1, 3 or 4 (grey, RGB, RGBA).

        The last axis is the channel where it has length 1, 3 or 4; else the first is. Whole numbers
        are 0 to 255, floats 0 to 1.
        """
        pixels = _as_uint8(_channels_last(array))
        return cls(PIL.Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels))

    @classmethod
    def of(cls, source: Any) -> Image:
        """A picture from an Image, PIL image, path, bytes, numpy array or torch tensor."""
        if isinstance(source, Image):
            return source
        if isinstance(source, PIL.Image.Image):
            return cls(source)
        if isinstance(source, str | Path):
            return cls.open(source)
        if isinstance(source, bytes | bytearray | memoryview):
            return cls.from_bytes(bytes(source))
        if isinstance(source, np.ndarray):
            return cls.from_array(source)
        if _is_tensor(source):
            return cls.from_array(_tensor_to_array(source))
        raise ImageError(
            f"an object of type {type(source).__name__} is not a picture: "
            "give a PIL image, a path, bytes, a numpy array or a tensor"
        )


Segment: TypeAlias = Text | Image
Part: TypeAlias = str | Text | Image | PIL.Image.Image | Path


@dataclass(init=False)
class Message:
    """One turn: who speaks and what, in order. Parts may be given as str, PIL image or path too."""

    role: Role
    parts: list[Segment]

    def __init__(self, role: Role, parts: Part | Sequence[Part]) -> None:
        if role not in get_args(Role):
            raise PromptError(f"role {role!r} is unknown: a message is by 'user' or 'assistant'")
        self.role = role
        self.parts = _segments(parts)

    @property
    def images(self) -> list[Image]:
        return [part for part in self.parts if isinstance(part, Image)]


Prompt: TypeAlias = Part | Message | Sequence[Part] | Sequence[Message]


def as_messages(prompt: Prompt) -> list[Message]:
    """The turns of a prompt: a text, a list of parts, or messages that end with the user's turn.

    Raises `PromptError` when it is empty, holds something else, or its turns do not alternate.
    """
    if isinstance(prompt, Message):
        prompt = [prompt]
    if isinstance(prompt, list | tuple) and any(isinstance(item, Message) for item in prompt):
        messages = _only_messages(prompt)
    else:
        messages = [Message("user", cast("Sequence[Part]", prompt))]
    _check_turns(messages)
    return messages


def fill_placeholders(text: str, images: Sequence[Any]) -> list[Segment]:
    """Parts of a text in which `<image>` marks the place of each picture.

    Without any mark the pictures go first. Raises `PromptError` when marks and pictures differ
    in number.
    """
    pictures = [Image.of(image) for image in images]
    pieces = text.split(PLACEHOLDER)
    if len(pieces) == 1:
        pieces = [""] * len(pictures) + [text]
    if len(pieces) != len(pictures) + 1:
        raise PromptError(
            f"the prompt marks {len(pieces) - 1} places with {PLACEHOLDER} but {len(pictures)} "
            "images are given: give one image a mark, or no mark at all"
        )
    parts: list[Segment] = []
    for number, piece in enumerate(pieces):
        parts += [Text(piece)] if piece else []
        parts += pictures[number : number + 1]
    return parts


def _segments(parts: Any) -> list[Segment]:
    if not isinstance(parts, list | tuple):
        parts = [parts]
    segments = [_segment(part) for part in parts]
    return [part for part in segments if not (isinstance(part, Text) and not part.text)]


def _segment(part: Any) -> Segment:
    if isinstance(part, Text | Image):
        return part
    if isinstance(part, str):
        return Text(part)
    if isinstance(part, PIL.Image.Image | Path):
        return Image.of(part)
    raise PromptError(
        f"a prompt cannot hold an object of type {type(part).__name__}: "
        "its parts are str, Text, Image, PIL images and pathlib.Path"
    )


def _only_messages(items: Sequence[Any]) -> list[Message]:
    for item in items:
        if not isinstance(item, Message):
            raise PromptError(
                f"a list of messages cannot hold an object of type {type(item).__name__}: "
                "wrap it in a Message"
            )
    return list(items)


def _check_turns(messages: list[Message]) -> None:
    if messages[-1].role != "user":
        raise PromptError(
            f"the last of {len(messages)} messages is the assistant's: end with the user's turn"
        )
    check_alternation(messages)
    if not any(isinstance(p, Image) or p.text.strip() for p in messages[-1].parts):
        raise PromptError("the prompt is empty: give a text or an image")


def check_alternation(messages: Sequence[Message]) -> None:
    """Raise `PromptError` unless user and assistant take turns, the user first."""
    for number, message in enumerate(messages):
        if message.role != ("user", "assistant")[number % 2]:
            raise PromptError(
                f"message {number + 1} of {len(messages)} is the {message.role}'s out of turn: "
                "user and assistant alternate, the user first; join neighbours of one role"
            )


def _read_file(path: Path) -> bytes:
    try:
        if path.is_dir():
            raise ImageError(f"{path} is a folder: give a picture file")
        if not path.is_file():
            raise ImageError(f"there is no file {path}: check the path of the picture")
        _check_bytes(path.stat().st_size, str(path))
        return path.read_bytes()
    except ImageError:
        raise
    except (OSError, ValueError):
        raise ImageError(f"{path} cannot be read: check the path and its permissions") from None


def _check_bytes(size: int, name: str) -> None:
    if size > MAX_FILE_BYTES:
        raise ImageError(
            f"{name} has {size:,} bytes, the limit is {MAX_FILE_BYTES:,}: "
            "save it smaller or more compressed"
        )


def _decode(data: bytes, name: str) -> PIL.Image.Image:
    _check_bytes(len(data), name)
    reader = next((cls for magic, cls in _READERS.items() if data.startswith(magic)), None)
    if reader is None:
        raise ImageError(f"{name} is not a picture in a known format: save it as {_FORMATS}")
    try:
        picture = reader(BytesIO(data))
    # A parser of foreign bytes may raise anything; the reason would not help a person.
    except Exception:
        raise _broken(name) from None
    return _upright_rgb(picture, name)


def _broken(name: str) -> ImageError:
    return ImageError(f"{name} is damaged or cut short: save or download it again as {_FORMATS}")


def _upright_rgb(picture: PIL.Image.Image, name: str) -> PIL.Image.Image:
    _check_size(*picture.size, name)
    try:
        picture.load()
        return _on_white(_upright(picture))
    except Exception:
        raise _broken(name) from None


def _check_size(width: int, height: int, name: str) -> None:
    if min(width, height) < 1:
        raise ImageError(f"{name} is {width}x{height} pixels: it needs at least 1x1")
    if max(width, height) > MAX_SIDE:
        raise ImageError(
            f"{name} is {width}x{height} pixels, the limit is {MAX_SIDE:,} a side: scale it down"
        )
    if width * height > MAX_PIXELS:
        raise ImageError(
            f"{name} is {width}x{height} pixels, the limit is {MAX_PIXELS // 10**6} megapixels: "
            "scale it down"
        )


def _upright(picture: PIL.Image.Image) -> PIL.Image.Image:
    try:
        return ImageOps.exif_transpose(picture)
    except Exception:  # damaged metadata says nothing about the pixels
        return picture


def _on_white(picture: PIL.Image.Image) -> PIL.Image.Image:
    if picture.mode == "RGB":
        return picture
    rgba = np.asarray(picture.convert("RGBA"))
    if rgba[..., 3].min() == 255:
        return _without_transparency(picture).convert("RGB")
    rows = [_OVER_WHITE[row[:, 3:], row[:, :3]] for row in rgba]
    return PIL.Image.fromarray(np.stack(rows))


def _without_transparency(picture: PIL.Image.Image) -> PIL.Image.Image:
    if "transparency" not in picture.info:
        return picture
    picture = picture.copy()
    del picture.info["transparency"]
    return picture


def _channels_last(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    shape = "x".join(map(str, array.shape))
    if array.ndim == 2:
        array = array[..., None]
    elif array.ndim == 3 and array.shape[2] not in (1, 3, 4) and array.shape[0] in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4):
        raise ImageError(
            f"an array of shape {shape or 'scalar'} is not one picture: give [Y, X], [Y, X, C] or "
            "[C, Y, X] with 1, 3 or 4 channels"
        )
    _check_size(array.shape[1], array.shape[0], "the array")
    return array


def _as_uint8(array: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    if array.dtype.kind == "b":
        return array.astype(np.uint8) * np.uint8(255)
    if array.dtype.kind not in "uif":
        raise ImageError(
            f"an array of {array.dtype} is not a picture: "
            "give whole numbers 0 to 255 or floats 0 to 1"
        )
    limit = 1 if array.dtype.kind == "f" else 255
    low, high = array.min(), array.max()
    if not (low >= 0 and high <= limit):  # also false for NaN
        raise ImageError(
            f"the array has values from {low} to {high}, "
            f"a picture of {array.dtype} has 0 to {limit}: rescale it"
        )
    if limit == 1:
        array = np.rint(array.astype(np.float64) * 255)
    return array.astype(np.uint8)


def _is_tensor(source: Any) -> bool:
    return all(hasattr(source, name) for name in ("detach", "cpu", "numpy", "is_floating_point"))


def _tensor_to_array(tensor: Any) -> npt.NDArray[Any]:
    tensor = tensor.detach().cpu()
    tensor = tensor.float() if tensor.is_floating_point() else tensor  # numpy has no bfloat16
    return np.asarray(tensor.numpy())


def _checked_codes(codes: Any) -> npt.NDArray[np.int64]:
    array = _tensor_to_array(codes) if _is_tensor(codes) else np.asarray(codes)
    if array.ndim != 2 or array.size == 0 or array.dtype.kind not in "ui" or array.min() < 0:
        raise ImageError(
            f"image codes of shape {array.shape} and type {array.dtype} are not "
            "[h, w] whole numbers from 0: give one picture's codes from the image tokenizer"
        )
    return array.astype(np.int64)
