"""Images of requests and replies: files -> `Image`, within limits; pixels -> files, data URLs."""

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

# First bytes -> media type, and the class that reads the header; `Image.from_bytes` reads the rest.
# Only formats that every client has.
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
_BEGIN_SCAN, _END_OF_FILE = b"\xda", b"\xd9"


@dataclass
class ImageLimits:
    """The limits of all images of one request together; `read` counts."""

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
        """The image of a file, whose size is checked before a pixel is decoded. Raises
        `ApiError`."""
        self.count()
        kind, (width, height) = _header(data)
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
        if kind == "image/jpeg" and _scans(data) > MAX_SCANS:
            raise ApiError(
                400,
                f"an image is a JPEG of over {MAX_SCANS} scans, the limit: save it again",
                code="invalid_image",
            )
        try:
            return Image.from_bytes(data)
        except ImageError:  # names formats that are not read here
            raise _damaged() from None


def media_type(data: bytes) -> str:
    """The media type of an image's file, by its first bytes. Raises `ApiError`."""
    return _header(data)[0]


def _header(data: bytes) -> tuple[str, tuple[int, int]]:
    if not data:
        raise ApiError(400, "an image has no bytes: send the whole file", code="invalid_image")
    known = (entry for start, entry in _FORMATS.items() if data.startswith(start))
    name, reader = next(known, (None, None))
    if name is None or reader is None:
        raise ApiError(
            400,
            "an image is in no format that is read here: send PNG, JPEG, WEBP, GIF or BMP",
            code="invalid_image",
        )
    try:
        return name, reader(BytesIO(data)).size
    except Exception:  # a parser of foreign bytes may raise anything, and its text may leak
        raise _damaged() from None


def _scans(data: bytes) -> int:
    """The number of scans of a JPEG file, as far as the limit."""
    count = at = 0
    while count <= MAX_SCANS and (found := _JPEG_MARKER.search(data, at)) is not None:
        if found[1] == _END_OF_FILE:  # behind it some cameras put a film
            break
        count += found[1] == _BEGIN_SCAN
        # A segment begins with its length, which includes these two bytes.
        at = found.end() + int.from_bytes(data[found.end() : found.end() + 2], "big")
    return count


def _damaged() -> ApiError:
    return ApiError(
        400, "an image is damaged or cut short: send the whole file", code="invalid_image"
    )


def _too_large(message: str) -> ApiError:
    return ApiError(400, f"{message}: send it smaller", code="image_too_large")


def unpacked(address: str) -> bytes:
    """The bytes of a data URL. Raises `ApiError`."""
    head, comma, body = address.partition(",")
    kind = head.lower()
    if not (comma and kind.startswith("data:image/") and kind.endswith(";base64")):
        raise ApiError(
            400,
            "a data URL of an image begins with data:image/png;base64, or another image type",
            code="invalid_image",
        )
    return decoded(body)


def decoded(text: str) -> bytes:
    """The bytes of base64. Raises `ApiError`."""
    try:
        return base64_bytes(text)
    except ValueError:
        raise ApiError(
            400, "the base64 of an image is damaged: encode its bytes again", code="invalid_image"
        ) from None


def encoded(image: PIL.Image.Image, output_format: Format, compression: int = 100) -> bytes:
    """The file of an image; `compression` is the quality of webp and jpeg, 0 to 100."""
    file = BytesIO()
    if output_format == "png":
        image.save(file, "PNG")
    else:
        image.save(file, output_format.upper(), quality=compression)
    return file.getvalue()


def packed(data: bytes) -> str:
    """Base64 of a file."""
    return base64.b64encode(data).decode("ascii")


def data_url(data: bytes, output_format: Format) -> str:
    return f"data:{MEDIA_TYPES[output_format]};base64,{packed(data)}"
