"""Images in requests and replies: files to `Image`, within limits; PIL images to files and
base64."""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass
from io import BytesIO

import PIL.Image
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from earlyfusion.content import Image, base64_bytes
from earlyfusion.errors import ImageError
from earlyfusion.serve.errors import ApiError
from earlyfusion.serve.options import ServeOptions
from earlyfusion.serve.protocol import Format
from earlyfusion.serve.store import MEDIA_TYPES

# The first bytes of a file: its media type, and Pillow's class that reads the header. Fewer formats
# than `Image.from_bytes` reads: those that every client has.
_FORMATS: dict[bytes, tuple[str, type[ImageFile]]] = {
    b"\x89PNG\r\n\x1a\n": ("image/png", PngImageFile),
    b"\xff\xd8\xff": ("image/jpeg", JpegImageFile),
    b"RIFF": ("image/webp", WebPImageFile),
    b"GIF8": ("image/gif", GifImageFile),
    b"BM": ("image/bmp", BmpImageFile),
}
# Each scan of a progressive JPEG visits the whole image, and may take only forty bytes. Usual
# files have about ten.
MAX_SCANS = 100
_JPEG_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd8\xff])", re.DOTALL)
_START_OF_SCAN, _END_OF_IMAGE = b"\xda", b"\xd9"


@dataclass
class ImageLimits:
    """Checks the images of one request against the limits of `options`. `images` and `pixels` count
    those so far."""

    options: ServeOptions
    images: int = 0
    pixels: int = 0

    def count(self) -> None:
        """Count one more image. Raises `ApiError`."""
        self.images += 1
        if self.images > self.options.max_images:
            raise ApiError(
                400,
                f"the request has over {self.options.max_images} images, the limit: drop some",
                code="too_many_images",
            )

    def read(self, data: bytes) -> Image:
        """The image of a file. Its size is checked before any pixel is decoded. Raises
        `ApiError`."""
        self.count()
        file_type, (width, height) = _read_header(data)
        limits = self.options
        self.pixels += width * height
        if max(width, height) > limits.max_image_side or width * height > limits.max_image_pixels:
            raise _too_large(
                f"an image has {width:,} x {height:,} pixels, the limit is "
                f"{limits.max_image_side:,} a side and {limits.max_image_pixels:,} in all"
            )
        if self.pixels > limits.max_total_pixels:
            raise _too_large(
                f"the images have over {limits.max_total_pixels:,} pixels together, the limit"
            )
        if file_type == "image/jpeg" and _num_scans(data) > MAX_SCANS:
            raise ApiError(
                400,
                f"an image is a JPEG of over {MAX_SCANS} scans, the limit: save it again",
                code="invalid_image",
            )
        try:
            return Image.from_bytes(data)
        except ImageError:  # its text names formats that the server does not read
            raise _damaged() from None


def media_type(data: bytes) -> str:
    """The media type of an image's file, by its first bytes. Raises `ApiError`."""
    return _read_header(data)[0]


def _read_header(data: bytes) -> tuple[str, tuple[int, int]]:
    """The media type of an image's file, and (width, height). Raises `ApiError`."""
    if not data:
        raise ApiError(400, "an image has no bytes: send the whole file", code="invalid_image")
    matching = (entry for start, entry in _FORMATS.items() if data.startswith(start))
    file_type, reader = next(matching, (None, None))
    if file_type is None or reader is None:
        raise ApiError(
            400,
            "an image is in no format that is read here: send PNG, JPEG, WEBP, GIF or BMP",
            code="invalid_image",
        )
    try:
        return file_type, reader(BytesIO(data)).size
    except Exception:  # a parser of untrusted bytes may raise anything; its text may leak internals
        raise _damaged() from None


def _num_scans(data: bytes) -> int:
    """The number of scans of a JPEG file; counts no further than `MAX_SCANS` + 1."""
    count = at = 0
    while count <= MAX_SCANS and (marker := _JPEG_MARKER.search(data, at)) is not None:
        if marker[1] == _END_OF_IMAGE:  # some cameras append a video
            break
        count += marker[1] == _START_OF_SCAN
        # A segment begins with its length, which includes these two bytes.
        at = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2], "big")
    return count


def _damaged() -> ApiError:
    return ApiError(
        400, "an image is damaged or cut short: send the whole file", code="invalid_image"
    )


def _too_large(message: str) -> ApiError:
    return ApiError(400, f"{message}: send it smaller", code="image_too_large")


def decode_data_url(url: str) -> bytes:
    """The bytes of an image in a data URL. Raises `ApiError`."""
    head, comma, body = url.partition(",")
    head = head.lower()
    if not (comma and head.startswith("data:image/") and head.endswith(";base64")):
        raise ApiError(
            400,
            "a data URL of an image begins with data:image/png;base64, or another image type",
            code="invalid_image",
        )
    return decode_base64(body)


def decode_base64(text: str) -> bytes:
    """The bytes of an image in base64. Raises `ApiError`."""
    try:
        return base64_bytes(text)
    except ValueError:
        raise ApiError(
            400, "the base64 of an image is damaged: encode its bytes again", code="invalid_image"
        ) from None


def encode_image(image: PIL.Image.Image, output_format: Format, compression: int = 100) -> bytes:
    """The bytes of an image file; `compression` is the quality of webp and jpeg, 0 to 100."""
    file = BytesIO()
    if output_format == "png":
        image.save(file, "PNG")
    else:
        image.save(file, output_format.upper(), quality=compression)
    return file.getvalue()


def to_base64(data: bytes) -> str:
    """The bytes of a file in base64."""
    return base64.b64encode(data).decode("ascii")


def data_url(data: bytes, output_format: Format) -> str:
    return f"data:{MEDIA_TYPES[output_format]};base64,{to_base64(data)}"
