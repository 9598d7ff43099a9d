"""Content before it is tokens: `Text`, `Image`, `Message`, and the ways to write a prompt.

Images are read safely here: format and size are checked in the header before any pixel is decoded.
The result is RGB, upright and blended on white, as in Meta's code
(github.com/facebookresearch/chameleon, chameleon/inference/image_tokenizer.py), with two exceptions
where Meta's code would lose the image: values of more than 8 bits are scaled instead of clipped at
255 (`deep="clip"` clips them), and images over 25 megapixels are scaled down while being read.
Reading the largest image takes about 1 GB of memory, 2 GB as AVIF or WEBP.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar, cast, get_args
from urllib.parse import unquote

import numpy as np
import numpy.typing as npt
import PIL.Image
from PIL import ImageOps
from PIL.AvifImagePlugin import SUPPORTED as AVIF_IS_BUILT_IN
from PIL.AvifImagePlugin import AvifImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from earlyfusion.errors import ImageError, PromptError

MAX_FILE_BYTES = 200_000_000
MAX_SIDE = 16_384
MAX_FILE_PIXELS = 200_000_000
MAX_PIXELS = 25_000_000  # of an image in memory; larger ones are scaled down while being read
PLACEHOLDER = "<image>"
_MAX_NAME = 200  # characters of a name that an error repeats

# Readers by first bytes. PIL.Image.open would try every format, and warn about large files.
_READERS: dict[bytes, type[ImageFile]] = {
    b"\x89PNG\r\n\x1a\n": PngImageFile,
    b"\xff\xd8\xff": JpegImageFile,
    b"RIFF": WebPImageFile,
    b"GIF8": GifImageFile,
    b"BM": BmpImageFile,
    b"II*\x00": TiffImageFile,
    b"MM\x00*": TiffImageFile,
}
_AVIF_BRANDS = {b"avif", b"avis"}
_HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
_FORMATS = "PNG, JPEG, WEBP, GIF, BMP, TIFF or AVIF"
_BAND_ROWS = 128  # rows of a large image scaled down at a time

# Pillow's modes with more than 8 bits.
_16_BITS = {"I;16", "I;16L", "I;16B", "I;16N"}
_DEEP_MODES = _16_BITS | {"I", "F"}
_ORIENTATION = 0x0112  # the EXIF tag

# _OVER_WHITE[alpha, value]: a value blended on white; truncated, not rounded, as in Meta's code.
_ALPHA = np.arange(256)[:, None] / 255.0
_OVER_WHITE = ((1 - _ALPHA) * 255 + _ALPHA * np.arange(256)).astype(np.uint8)

Role: TypeAlias = Literal["user", "assistant", "system"]
Deep: TypeAlias = Literal["scale", "clip"]


@dataclass(frozen=True)
class Text:
    """A stretch of text. Raises `PromptError` for another type."""

    text: str

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise PromptError(f"a Text holds an object of {_type_of(self.text)}: give a str")


@dataclass(eq=False)
class Image:
    """An image: its pixels, its codes, or both. Raises `ImageError`. `pil` is upright RGB of at
    most 25 megapixels, or None for a generated image that is not decoded yet. `codes` is int64 [h,
    w], or None for an image that is not encoded yet. Grey images are scaled to 8 bits from 16
    bits, from 32 bits up to 65,535, and from floats of 0 to 1."""

    pil: PIL.Image.Image | None = None
    codes: npt.NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        if self.pil is None and self.codes is None:
            raise ImageError("an image needs pixels or codes: use Image.open, Image.of or codes=")
        if self.pil is not None:
            if not isinstance(self.pil, PIL.Image.Image):
                raise ImageError(
                    f"an object of {_type_of(self.pil)} is not a PIL image: use Image.of, which "
                    "also takes paths, bytes, arrays and tensors"
                )
            self.pil = _to_upright_rgb(self.pil, "the image")
        if self.codes is not None:
            self.codes = _checked_codes(self.codes)

    @classmethod
    def open(cls, path: str | Path, *, deep: Deep = "scale") -> Image:
        """Read an image file: PNG, JPEG, WEBP, GIF, BMP, TIFF, AVIF, and HEIC with the extra
        "heic". Of several frames the first is read. `deep="clip"` clips values at 255, as Meta's
        code does, instead of scaling them."""
        if not isinstance(path, str | os.PathLike):
            raise ImageError(
                f"an object of {_type_of(path)} is not a path: give a str or a Path, or use "
                "Image.of for an image, bytes or an array"
            )
        name = _shown_name(str(path))
        return cls(_decode(_read_file(path, name), name, deep))

    @classmethod
    def from_bytes(
        cls,
        data: bytes | bytearray | memoryview,
        name: str = "the image",
        *,
        deep: Deep = "scale",
    ) -> Image:
        """Read an image from the bytes of a file, which errors call `name`."""
        if not isinstance(data, bytes | bytearray | memoryview):
            raise ImageError(
                f"an object of {_type_of(data)} is not the bytes of a file: give bytes, or use "
                "Image.open for a path"
            )
        return cls(_decode(bytes(data), name, deep))

    @classmethod
    def from_array(cls, array: npt.NDArray[Any]) -> Image:
        """An image from [Y, X], [Y, X, C] or [C, Y, X] with C = 1, 3 or 4 (grey, RGB, RGBA). The
        last axis is the channel if its length is 1, 3 or 4, else the first is. Whole numbers are 0
        to 255, floats 0 to 1."""
        if not isinstance(array, np.ndarray):
            raise ImageError(
                f"an object of {_type_of(array)} is not a numpy array: give one, or use Image.of "
                "for a tensor, image or path"
            )
        pixels = _as_uint8(_channels_last(array))
        return cls(PIL.Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels))

    @classmethod
    def of(cls, source: Any, *, deep: Deep = "scale") -> Image:
        """An image from an Image, PIL image, path, bytes, numpy array or torch tensor."""
        if isinstance(source, Image):
            return source
        if isinstance(source, PIL.Image.Image):
            return cls(_to_upright_rgb(source, "the image", deep))
        if isinstance(source, str | Path):
            return cls.open(source, deep=deep)
        if isinstance(source, bytes | bytearray | memoryview):
            return cls.from_bytes(source, deep=deep)
        if isinstance(source, np.ndarray):
            return cls.from_array(source)
        if _is_tensor(source):
            return cls.from_array(_tensor_to_array(source))
        raise ImageError(
            f"an object of type {type(source).__name__} is not an image: "
            "give a PIL image, a path, bytes, a numpy array or a tensor"
        )


Segment: TypeAlias = Text | Image
ImageT = TypeVar("ImageT")
Part: TypeAlias = str | Text | Image | PIL.Image.Image | Path | npt.NDArray[Any]


@dataclass(init=False)
class Message:
    """One turn: the speaker and the parts, which may also be str, PIL images, paths or arrays.
    Raises `PromptError` for another role or part, `ImageError` for an image that cannot be read."""

    role: Role
    parts: list[Segment]

    def __init__(self, role: Role, parts: Part | Sequence[Part]) -> None:
        if role not in get_args(Role):
            raise PromptError(
                f"role {role!r} is unknown: a message is by 'user', 'assistant' or 'system'"
            )
        self.role = role
        self.parts = _to_segments(parts)

    @property
    def images(self) -> list[Image]:
        """The images among the parts, in order."""
        return [part for part in self.parts if isinstance(part, Image)]


Turn: TypeAlias = Message | Mapping[str, Any]
Prompt: TypeAlias = Part | Turn | Sequence[Part] | Sequence[Turn]


def as_messages(prompt: Prompt) -> list[Message]:
    """The turns of a prompt: a text, a list of parts, or messages.

    A message may be a dict of "role" and "content", as in chat templates. The last one is the
    user's, or the assistant's, which the reply then continues. A system message becomes part of the
    adjacent user's turn, separated by a newline, as in training data. Raises `PromptError` if the
    prompt is empty, holds another type, or its turns do not alternate.
    """
    if isinstance(prompt, Message | Mapping):
        prompt = [prompt]
    if isinstance(prompt, list | tuple) and any(isinstance(i, Message | Mapping) for i in prompt):
        messages = _join_system_turns(_to_messages(prompt))
    else:
        messages = [Message("user", cast("Sequence[Part]", prompt))]
    _check_turns(messages)
    return messages


def fill_placeholders(text: str, images: Sequence[Any]) -> list[Segment]:
    """The parts of a text with the images in place of its `<image>` placeholders. Without any
    placeholder the images come first. Raises `PromptError` if their numbers differ."""
    return _to_segments(insert_images(text, [Image.of(image) for image in images]))


def insert_images(text: str, images: Sequence[ImageT]) -> list[str | ImageT]:
    """As `fill_placeholders`, but for images of any type, which are inserted as they are."""
    pieces = text.split(PLACEHOLDER)
    if len(pieces) == 1:
        pieces = [""] * len(images) + [text]
    if len(pieces) != len(images) + 1:
        marks, given = len(pieces) - 1, len(images)
        raise PromptError(
            f"the prompt marks {counted(marks, 'place')} with {PLACEHOLDER} but "
            f"{counted(given, 'image')} {'is' if given == 1 else 'are'} given: "
            "give each image a mark, or no mark at all"
        )
    parts: list[str | ImageT] = []
    for number, piece in enumerate(pieces):
        parts += [piece] if piece else []
        parts += images[number : number + 1]
    return parts


def read_turns(data: Any, folder: Path) -> list[tuple[str, list[Part]]]:
    """Roles and parts of turns in JSON: [{"role": …, "content": …}, …]. Images are not opened.
    Raises `PromptError` for any other form."""
    if not isinstance(data, list) or not data:
        raise PromptError("messages are a list of objects with role and content")
    return [_read_turn(turn, number, folder) for number, turn in enumerate(data, 1)]


def read_parts(content: Any, folder: Path) -> list[Part]:
    """Parts of a prompt in JSON: a text, or a list of texts and typed objects. These are {"type":
    "text", "text": …} and {"type": "image", "image": file}, with the file relative to `folder`, and
    optional "codes". Raises `PromptError` for any other form."""
    items = content if isinstance(content, list) else [content]
    return [_read_part(item, folder) for item in items]


def _read_turn(turn: Any, number: int, folder: Path) -> tuple[str, list[Part]]:
    if not isinstance(turn, dict) or set(turn) != {"role", "content"}:
        raise PromptError(f"message {number} is not an object of role and content: give both")
    if turn["role"] not in get_args(Role):
        raise PromptError(f"message {number} is by {turn['role']!r}: use 'user' or 'assistant'")
    return turn["role"], read_parts(turn["content"], folder)


def _read_part(item: Any, folder: Path) -> Part:
    if isinstance(item, str):
        return item
    part_type = item.get("type") if isinstance(item, dict) else None
    if part_type == "text" and isinstance(item.get("text"), str):
        return cast(str, item["text"])
    if part_type == "image" and isinstance(item.get("image"), str):
        path = folder / Path(item["image"])
        return Image(Image.open(path).pil, item["codes"]) if "codes" in item else path
    raise PromptError(
        'a part of a prompt is a text, {"type": "text", "text": …} or '
        '{"type": "image", "image": "file.png"}: write it as one of these'
    )


def counted(number: int, noun: str, plural: str = "") -> str:
    """A number and its noun: "1 image", "2,000 images"."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def _to_segments(parts: Any) -> list[Segment]:
    if not isinstance(parts, list | tuple):
        parts = [parts]
    segments = [_to_segment(part) for part in parts]
    return [part for part in segments if not (isinstance(part, Text) and not part.text)]


def _to_segment(part: Any) -> Segment:
    if isinstance(part, Text | Image):
        return part
    if isinstance(part, str):
        return Text(part)
    if isinstance(part, PIL.Image.Image | Path | np.ndarray) or _is_tensor(part):
        return Image.of(part)
    raise PromptError(
        f"a prompt cannot hold an object of type {type(part).__name__}: "
        "its parts are str, Text, Image, PIL images, pathlib.Path, arrays and tensors"
    )


def _to_messages(items: Sequence[Any]) -> list[Message]:
    return [_to_message(item) for item in items]


def _to_message(item: Any) -> Message:
    if isinstance(item, Message):
        return item
    if not isinstance(item, Mapping):
        raise PromptError(
            f"a list of messages cannot hold an object of type {type(item).__name__}: "
            "wrap it in a Message"
        )
    if not {"role", "content"} <= item.keys():
        raise PromptError(
            f"a message has the keys {', '.join(map(str, item))}: it needs role and content"
        )
    content = item["content"]
    listed = content if isinstance(content, list | tuple) else [content]
    return Message(
        item["role"], [_part_from_dict(p) if isinstance(p, Mapping) else p for p in listed]
    )


def _part_from_dict(part: Mapping[str, Any]) -> Part:
    """A part {"type": "text", "text": …} or {"type": "image", "image": …}."""
    part_type = part.get("type")
    if part_type == "text" and isinstance(part.get("text"), str):
        return Text(part["text"])
    if part_type in ("image", "image_url"):
        return _image_from_dict(part)
    raise PromptError(
        f"a part of type {str(part_type)[:40]!r} is not known: "
        'write {"type": "text", "text": …} or {"type": "image", "image": …}'
    )


def _image_from_dict(part: Mapping[str, Any]) -> Image:
    source = next((part[k] for k in _IMAGE_KEYS if part.get(k) is not None), None)
    if isinstance(source, Mapping):
        source = source.get("url")
    if source is None:
        raise PromptError(f"a part of type image has no source: give it as {_IMAGE_KEYS[0]!r}")
    if not isinstance(source, str):
        return Image.of(source)
    if source.startswith(("http://", "https://")):
        raise PromptError(f"{source[:60]} is not fetched: download the image and give its path")
    if "base64" in part or source.startswith("data:"):
        return Image.from_bytes(_decode_base64(source))
    if source.startswith("file://"):
        # In a URL spaces and non-ASCII characters are percent-encoded, as by `Path.as_uri`.
        source = unquote(source.removeprefix("file://").removeprefix("localhost"))
    return Image.open(source)


_IMAGE_KEYS = ("image", "image_url", "url", "path", "base64")


def _decode_base64(text: str) -> bytes:
    """The bytes of a data URL, or of plain base64."""
    head, comma, body = text.partition(",")
    if comma and not head.endswith(";base64"):
        raise ImageError("a data URL of an image must be in base64: data:image/png;base64,…")
    try:
        return base64_bytes(body if comma else text)
    except ValueError:
        raise ImageError("the base64 of an image is damaged: encode its bytes again") from None


def base64_bytes(text: str) -> bytes:
    """The bytes of base64, whose lines may be broken, as many tools do. Raises `ValueError`."""
    return base64.b64decode("".join(text.split()), validate=True)


def _join_system_turns(messages: Sequence[Message]) -> list[Message]:
    """Join system messages to the adjacent user's turn with a newline."""
    turns: list[Message] = []
    last = ""
    for message in messages:
        role: Role = "user" if message.role == "system" else message.role
        if turns and turns[-1].role == role and "system" in (last, message.role):
            turns[-1] = Message(role, [*turns[-1].parts, Text("\n"), *message.parts])
        else:
            turns.append(message if message.role == role else Message(role, message.parts))
        last = message.role
    return turns


def _check_turns(messages: list[Message]) -> None:
    check_alternation(messages)
    question = [message for message in messages if message.role == "user"][-1]
    if not any(isinstance(p, Image) or p.text.strip() for p in question.parts):
        raise PromptError("the prompt is empty: give a text or an image")


def check_alternation(messages: Sequence[Message]) -> None:
    """Raise `PromptError` unless user and assistant take turns, the user first."""
    for number, message in enumerate(messages):
        if message.role != ("user", "assistant")[number % 2]:
            raise PromptError(
                f"message {number + 1} of {len(messages)} is the {message.role}'s out of turn: "
                "user and assistant alternate, the user first; join neighbours of one role"
            )


def _type_of(value: object) -> str:
    return f"type {type(value).__name__}"


def _shown_name(name: str) -> str:
    return name if len(name) <= _MAX_NAME else name[:_MAX_NAME] + "…"


def _read_file(source: str | Path, name: str) -> bytes:
    if "://" in name:
        raise ImageError(f"{name} is an address: download the image and give its file")
    path = Path(source)
    try:
        if not name:
            raise ImageError("the name of an image is empty: give an image file")
        if path.is_dir():
            raise ImageError(f"{name} is a folder: give an image file")
        if not path.exists():
            raise ImageError(f"there is no file {name}: check the path of the image")
        _check_bytes(path.stat().st_size, name)
        # The size of a pipe cannot be checked, so read no more than the limit.
        with path.open("rb") as file:
            return file.read(MAX_FILE_BYTES + 1)
    except ImageError:
        raise
    except (OSError, ValueError):
        raise ImageError(f"{name} cannot be read: check the path and its permissions") from None


def _check_bytes(size: int, name: str) -> None:
    if size > MAX_FILE_BYTES:
        raise ImageError(
            f"{name} has {size:,} bytes, the limit is {MAX_FILE_BYTES:,}: "
            "save it smaller or more compressed"
        )


def _decode(data: bytes, name: str, deep: Deep) -> PIL.Image.Image:
    _check_bytes(len(data), name)
    reader = _reader(data, name)
    try:
        image = reader(BytesIO(data))
    except PIL.Image.DecompressionBombError:
        raise _too_large_error(name) from None
    # A parser of untrusted bytes may raise anything, with messages that a user cannot act on.
    except Exception:
        raise _damaged_error(name) from None
    if isinstance(image, JpegImageFile):
        _check_size(*image.size, name)
        _decode_smaller(image)
    return _to_upright_rgb(image, name, deep)


def _reader(data: bytes, name: str) -> type[ImageFile]:
    brands = _brands(data)
    if brands & _AVIF_BRANDS and AVIF_IS_BUILT_IN:
        return AvifImageFile
    if brands & _HEIC_BRANDS and not brands & _AVIF_BRANDS:
        return _heic_reader(name)
    reader = next((cls for magic, cls in _READERS.items() if data.startswith(magic)), None)
    if not data:
        raise ImageError(f"{name} is an empty file: save or download it again as {_FORMATS}")
    if reader is None:
        raise ImageError(f"{name} is not an image in a known format: save it as {_FORMATS}")
    return reader


def _brands(data: bytes) -> set[bytes]:
    """The brands of an ISO media file: its own at byte 8, compatible ones from byte 16 on."""
    if data[4:8] != b"ftyp":
        return set()
    end = min(int.from_bytes(data[:4], "big"), 256)
    return {data[8:12], *(data[at : at + 4] for at in range(16, end, 4))}


def _heic_reader(name: str) -> type[ImageFile]:
    try:
        from pillow_heif import HeifImageFile
    except ImportError:
        raise ImageError(
            f"{name} is a HEIC image, for which a library is missing: "
            f"pip install 'earlyfusion[heic]', or save it as {_FORMATS}"
        ) from None
    return cast("type[ImageFile]", HeifImageFile)


def _decode_smaller(image: JpegImageFile) -> None:
    """Have the decoder scale a large JPEG down by 2, 4 or 8, which saves memory and time."""
    width, height = image.size
    step = next(s for s in (1, 2, 4, 8) if width * height <= MAX_PIXELS * s**2)
    if step > 1:
        image.draft(None, (width // step, height // step))


def _damaged_error(name: str) -> ImageError:
    return ImageError(f"{name} is damaged or cut short: save or download it again as {_FORMATS}")


def _too_large_error(name: str) -> ImageError:
    return ImageError(
        f"{name} is larger than Pillow reads in its format: scale it down or save it as JPEG"
    )


def _to_upright_rgb(image: PIL.Image.Image, name: str, deep: Deep = "scale") -> PIL.Image.Image:
    if deep not in get_args(Deep):
        raise ImageError(f"deep={deep!r} is unknown: choose 'scale' or 'clip'")
    _check_size(*image.size, name)
    try:
        image.load()
        white = _white_value(image, name) if deep == "scale" and image.mode in _DEEP_MODES else None
        if image.width * image.height > MAX_PIXELS:
            return _apply_orientation(_downscale(image, white))
        return _to_rgb(_apply_orientation(image), white)
    except ImageError:
        raise
    except PIL.Image.DecompressionBombError:
        raise _too_large_error(name) from None
    except Exception:
        raise _damaged_error(name) from None


def _downscale(image: PIL.Image.Image, white: int | None) -> PIL.Image.Image:
    """RGB of at most MAX_PIXELS: means of step x step pixels, a band of rows at a time."""
    width, height = image.size
    step = next(s for s in range(2, MAX_SIDE) if -(-width // s) * -(-height // s) <= MAX_PIXELS)
    small = PIL.Image.new("RGB", (-(-width // step), -(-height // step)))
    for top in range(0, small.height, _BAND_ROWS):
        area = (0, top * step, width, min((top + _BAND_ROWS) * step, height))
        small.paste(_to_rgb(image.crop(area), white).reduce(step), (0, top))
    small.getexif()[_ORIENTATION] = _orientation(image)
    return small


def _orientation(image: PIL.Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # the pixels may be fine even if the metadata is damaged
        return 1


def _white_value(image: PIL.Image.Image, name: str) -> int:
    """The value that means white in an image with more than 8 bits."""
    if image.mode in _16_BITS:
        return 65_535
    low, high = cast("tuple[float, float]", image.getextrema())
    if image.mode == "F":
        white, numbers = 1, "floats"
    else:
        white, numbers = 255 if high <= 255 else 65_535, "32-bit numbers"
    if not (low >= 0 and high <= white):
        raise ImageError(
            f"{name} has {numbers} from {low:g} to {high:g}, whose scale is unknown: "
            f"rescale them to 0 to {white:,}"
        )
    return white


def _to_rgb(image: PIL.Image.Image, white: int | None) -> PIL.Image.Image:
    if white is None:
        return _blend_on_white(image)
    values = np.asarray(image, dtype=np.float64)
    if np.isnan(values).any():
        raise ImageError("the image holds NaN: replace it by numbers from 0 to 1")
    return PIL.Image.fromarray(np.rint(values * (255 / white)).astype(np.uint8)).convert("RGB")


def _check_size(width: int, height: int, name: str) -> None:
    if min(width, height) < 1:
        raise ImageError(f"{name} is {width}x{height} pixels: it needs at least 1x1")
    if max(width, height) > MAX_SIDE:
        raise ImageError(
            f"{name} is {width}x{height} pixels, the limit is {MAX_SIDE:,} per side: scale it down"
        )
    if width * height > MAX_FILE_PIXELS:
        raise ImageError(
            f"{name} is {width}x{height} pixels, "
            f"the limit is {MAX_FILE_PIXELS // 10**6} megapixels: scale it down"
        )


def _apply_orientation(image: PIL.Image.Image) -> PIL.Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged metadata, as in `_orientation`
        return image


def _blend_on_white(image: PIL.Image.Image) -> PIL.Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode == "La":  # Pillow converts this mode to no other
        image = image.convert("LA")
    rgba = np.asarray(image.convert("RGBA"))
    if rgba[..., 3].min() == 255:
        return _without_transparency(image).convert("RGB")
    # Row by row: the index arrays of a whole image would take eight times its memory.
    rows = [_OVER_WHITE[row[:, 3:], row[:, :3]] for row in rgba]
    return PIL.Image.fromarray(np.stack(rows))


def _without_transparency(image: PIL.Image.Image) -> PIL.Image.Image:
    if "transparency" not in image.info:
        return image
    image = image.copy()
    del image.info["transparency"]
    return image


def _channels_last(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    shape = "x".join(map(str, array.shape))
    if array.ndim == 2:
        array = array[..., None]
    elif array.ndim == 3 and array.shape[2] not in (1, 3, 4) and array.shape[0] in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4):
        raise ImageError(
            f"an array of shape {shape or 'scalar'} is not one image: give [Y, X], [Y, X, C] or "
            "[C, Y, X] with 1, 3 or 4 channels"
        )
    _check_size(array.shape[1], array.shape[0], "the array")
    return array


def _as_uint8(array: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    if array.dtype.kind == "b":
        return array.astype(np.uint8) * np.uint8(255)
    if array.dtype.kind not in "uif":
        raise ImageError(
            f"an array of {array.dtype} is not an image: "
            "give whole numbers 0 to 255 or floats 0 to 1"
        )
    limit = 1 if array.dtype.kind == "f" else 255
    low, high = array.min(), array.max()
    if not (low >= 0 and high <= limit):  # NaN fails this as well
        raise ImageError(
            f"the array has values from {low} to {high}, "
            f"an image of {array.dtype} has 0 to {limit}: rescale it"
        )
    if limit == 1:
        array = np.rint(array.astype(np.float64) * 255)
    return array.astype(np.uint8)


def _is_tensor(source: Any) -> bool:
    return all(hasattr(source, name) for name in ("detach", "cpu", "numpy", "is_floating_point"))


def _tensor_to_array(tensor: Any) -> npt.NDArray[Any]:
    try:
        tensor = tensor.detach().cpu()
        tensor = tensor.float() if tensor.is_floating_point() else tensor  # numpy has no bfloat16
        return np.asarray(tensor.numpy())
    except (NotImplementedError, RuntimeError, TypeError):  # on the meta device, or sparse
        raise ImageError(
            "a tensor without plain values is not an image: give a dense one of a real device"
        ) from None


def _checked_codes(codes: Any) -> npt.NDArray[np.int64]:
    array = _tensor_to_array(codes) if _is_tensor(codes) else _as_array(codes)
    if array.ndim != 2 or array.size == 0 or array.dtype.kind not in "ui" or array.min() < 0:
        raise ImageError(
            f"image codes of shape {array.shape} and type {array.dtype} are not "
            "[h, w] whole numbers from 0: give one image's codes from the image tokenizer"
        )
    return array.astype(np.int64)


def _as_array(codes: Any) -> npt.NDArray[Any]:
    try:
        return np.asarray(codes)
    except ValueError:
        raise ImageError(
            "image codes have rows of different lengths: give one image's codes from the image "
            "tokenizer"
        ) from None
