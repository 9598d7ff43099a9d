"""Renders one source at 128 x 128 on white, names its colours and encodes it as WebP. resvg renders
SVG; Pillow, with Raqm shaping and at four times the size, renders glyphs."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from earlyfusion.errors import DataError
from earlyfusion.mini.emoji.sources import Source

Pixels: TypeAlias = npt.NDArray[np.uint8]
Thumbnail: TypeAlias = npt.NDArray[np.float32]

SIZE = 128
KOREAN_COLOURS = {
    "black": "검은색",
    "white": "흰색",
    "gray": "회색",
    "red": "빨간색",
    "orange": "주황색",
    "yellow": "노란색",
    "green": "초록색",
    "teal": "청록색",
    "blue": "파란색",
    "purple": "보라색",
    "pink": "분홍색",
    "brown": "갈색",
    "beige": "베이지색",
}
COLOURS = list(KOREAN_COLOURS)
_FONT_SIZE = 400
_VIEW_BOX = re.compile(r'viewBox="\s*([-\d.e]+)[ ,]+([-\d.e]+)[ ,]+([-\d.e]+)[ ,]+([-\d.e]+)')


@dataclass(frozen=True)
class Rendered:
    """An image ready to be written: a WebP file, its colours and a 32 x 32 thumbnail, 0 to 1."""

    source: Source
    webp: bytes
    colours: list[tuple[str, float]]
    thumbnail: Thumbnail


def render(source: Source) -> Rendered:
    """Render one source. Raises DataError if it cannot be rendered."""
    try:
        image = _RENDERERS[source.format](source)
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"{source.id} cannot be rendered: {error}") from error
    flat, alpha = on_white(image)
    pixels = np.asarray(flat)
    return Rendered(
        source,
        _encode(flat, lossless=source.format != "image-file"),
        colour_words(pixels, np.asarray(alpha)),
        _thumbnail(flat),
    )


def on_white(image: Image.Image) -> tuple[Image.Image, Image.Image]:
    """RGB on white, and the alpha channel, both made square and scaled to 128 x 128."""
    image = image.convert("RGBA")
    width, height = image.size
    if width != height:
        side = max(width, height)
        square = Image.new("RGBA", (side, side), (255, 255, 255, 0))
        square.paste(image, ((side - width) // 2, (side - height) // 2))
        # Padding is transparent, so that it does not count among the image's colours.
        image = square
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    flat = Image.alpha_composite(white, image).convert("RGB")
    alpha = image.getchannel("A")
    if image.size != (SIZE, SIZE):
        flat = flat.resize((SIZE, SIZE), Image.Resampling.LANCZOS)
        alpha = alpha.resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    return flat, alpha


def colour_words(pixels: Pixels, alpha: Pixels) -> list[tuple[str, float]]:
    """At most three colours of the opaque pixels with their shares, 12% or more, largest first."""
    opaque = alpha >= 128
    if opaque.sum() < 32:
        return []
    counts = np.bincount(_colour_classes(pixels[opaque]), minlength=len(COLOURS))
    shares = counts / opaque.sum()
    order = [i for i in np.argsort(-shares, kind="stable") if shares[i] >= 0.12]
    return [(COLOURS[i], round(float(shares[i]), 3)) for i in order[:3]]


def _colour_classes(pixels: Pixels) -> npt.NDArray[np.int64]:
    """Index into COLOURS of each pixel [N, 3], by hue, saturation, value; first rule wins."""
    h, s, v = _hue_saturation_value(pixels.astype(np.float32) / np.float32(255))
    rules = [
        ("black", (v < 0.22) | ((v < 0.36) & (s < 0.40))),
        ("white", (s < 0.10) & (v > 0.86)),
        ("gray", (s < 0.14) | ((s < 0.26) & (h >= 170) & (h < 270))),
        ("brown", (h >= 10) & (h < 48) & (v < 0.74) & (s > 0.25)),
        ("brown", (h >= 10) & (h < 40) & (v < 0.86) & (s > 0.25) & (s < 0.78)),
        ("brown", ((h < 10) | (h >= 350)) & (v < 0.50) & (s < 0.70)),
        ("beige", (h >= 16) & (h < 60) & (s < 0.42) & (v >= 0.74)),
        (
            "pink",
            ((h < 18) | (h >= 322)) & (((s < 0.60) & (v > 0.82)) | ((s < 0.45) & (v > 0.72))),
        ),
        ("red", (h < 15) | (h >= 345) | ((h >= 335) & (s > 0.75))),
        ("orange", h < 36),
        ("yellow", (h < 68) & (v >= 0.55)),
        ("green", h < 163),
        ("teal", h < 190),
        ("blue", h < 252),
        ("purple", h < 292),
        ("pink", v >= 0.55),
    ]
    masks = [mask for _, mask in rules]
    values = [COLOURS.index(name) for name, _ in rules]
    return np.select(masks, values, default=COLOURS.index("purple")).astype(np.int64)


def _hue_saturation_value(
    rgb: npt.NDArray[np.float32],
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Hue in degrees, saturation and value from 0 to 1, of RGB [N, 3] from 0 to 1."""
    high, low = rgb.max(-1), rgb.min(-1)
    spread = high - low
    saturation = np.where(high > 0, spread / np.maximum(high, 1e-6), 0)
    r, g, b = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    safe = np.maximum(spread, 1e-6)
    others = np.where(high == g, (b - r) / safe + 2, (r - g) / safe + 4)
    hue = np.where(high == r, ((g - b) / safe) % 6, others) * 60
    return hue, saturation, high


def _render_svg(source: Source) -> Image.Image:
    return _rasterise(source.content)


def _render_svg_file(source: Source) -> Image.Image:
    return _rasterise(Path(source.content).read_text(encoding="utf-8"))


def _render_image_file(source: Source) -> Image.Image:
    return Image.open(source.content)


def _render_glyph(source: Source) -> Image.Image:
    """Black on transparent. ValueError if the font does not join the sequence into one glyph."""
    font = _font(source.font)
    left, top, right, bottom = font.getbbox(source.content)
    # A sequence without a glyph is rendered as several emoji, and so is wider than one.
    is_split = font.getlength(source.content) > 1.45 * font.getlength("\U0001f600")
    if right - left > 2 * _FONT_SIZE or right <= left or bottom <= top or is_split:
        raise ValueError("the font has no glyph for it")
    mask = Image.new("L", (4 * SIZE, 4 * SIZE), 0)
    corner = (2 * SIZE - (left + right) / 2, 2 * SIZE - (top + bottom) / 2)
    ImageDraw.Draw(mask).text(corner, source.content, font=font, fill=255)
    # At four times the size and averaged: smoother than the font's own anti-aliasing.
    mask = mask.reduce(4)
    black = Image.new("L", mask.size, 0)
    return Image.merge("RGBA", (black, black, black, mask))


_RENDERERS = {
    "svg": _render_svg,
    "svg-file": _render_svg_file,
    "image-file": _render_image_file,
    "glyph": _render_glyph,
}


def _rasterise(svg: str) -> Image.Image:
    try:
        import resvg_py
    except ImportError:
        raise DataError(
            "resvg_py is not installed: run `pip install 'earlyfusion[data]'`"
        ) from None
    box = _VIEW_BOX.search(svg)
    width, height = (float(box[3]), float(box[4])) if box else (1.0, 1.0)
    # Only the longer side is given, so that the image keeps its shape.
    side: dict[str, Any] = {"width": SIZE} if width >= height else {"height": SIZE}
    png = resvg_py.svg_to_bytes(svg_string=svg, skip_system_fonts=True, **side)
    return Image.open(io.BytesIO(bytes(png)))


@cache
def _font(path: str) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, _FONT_SIZE, layout_engine=ImageFont.Layout.RAQM)


def _encode(image: Image.Image, lossless: bool) -> bytes:
    """WebP: lossless, except for images that came lossy (above 40 dB, at a third of the size)."""
    buffer = io.BytesIO()
    if lossless:
        image.save(buffer, "WEBP", lossless=True, quality=75, method=4)
    else:
        image.save(buffer, "WEBP", quality=95, method=4)
    return buffer.getvalue()


def _thumbnail(image: Image.Image) -> Thumbnail:
    small = image.resize((32, 32), Image.Resampling.BOX)
    return np.asarray(small, np.float32) / np.float32(255)
