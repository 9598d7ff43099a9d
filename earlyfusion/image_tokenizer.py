"""Images <-> codes around the VQ-GAN (arXiv 2405.09818, section 2.1).

Pixels equal those of Meta's released code to the bit: Lanczos resampling to a shorter side of
`resolution`, a centre crop, and uint8 / 255 * 2 - 1 in float64, rounded to float32.
"""

# Shapes: n images, C channels, Y X height and width in pixels, h w in codes.

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import PIL.Image
import torch
from torch import Tensor, nn

from earlyfusion.config import VQConfig
from earlyfusion.content import MAX_PIXELS, Image
from earlyfusion.devices import dtype_name
from earlyfusion.errors import CheckpointError, ImageError, SettingError
from earlyfusion.model.vqgan import VQGAN

Mode: TypeAlias = Literal["crop", "fit"]
Precision: TypeAlias = Literal["fp32", "bf16"]
MAX_SQUARE = math.isqrt(MAX_PIXELS)
# Pixels through the network at once: one or eight images of 512 x 512, or more smaller ones.
_BATCH_PIXELS = 512 * 512
_BATCH_PIXELS_GPU = 8 * 512 * 512
# The largest image that is decoded: mini's network takes 500 bytes per pixel, larger ones more.
MAX_DECODED_PIXELS = 2048 * 2048


class MissingVQGAN(nn.Module):
    """Stands in for a VQ-GAN that a checkpoint lacks: text works, images raise."""

    codewords: Tensor
    decoder = None

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.config = config
        # No codewords, but a device and a dtype; its state dict stays empty.
        self.register_buffer("codewords", torch.empty(0, config.embed_dim), persistent=False)

    def encode(self, pixels_BCYX: Tensor) -> Tensor:
        raise CheckpointError(_NO_VQGAN)

    def decode(self, codes_Byx: Tensor) -> Tensor:
        raise CheckpointError(_NO_VQGAN)


_NO_VQGAN = (
    "this checkpoint has no image tokenizer, so images can be neither read nor generated: "
    "add one with earlyfusion convert --image-tokenizer"
)


class ImageTokenizer:
    """Encodes images to codes and decodes codes to images, on the device of its VQ-GAN.
    `resolution` is the side of encoded images in pixels, a multiple of the VQ-GAN's stride.

    `mode` says how an image becomes a square: "crop" keeps the centre, as Meta's code does; "fit"
    keeps the whole image on a white square. The `processor_config.json` of a model trained on
    fitted images says so; set `mode` to override it. `precision` is that of the convolutions of
    `decode`, `encode_precision` of those of `encode`, where bf16 changes some codes (docs/gpu.md).
    `compiled` has torch compile the network, which takes tens of seconds at the first image, for
    fewer and faster kernels on a GPU.
    """

    def __init__(
        self,
        vqgan: VQGAN | MissingVQGAN,
        resolution: int,
        mode: Mode = "crop",
        precision: Precision = "fp32",
        encode_precision: Precision = "fp32",
        compiled: bool = False,
    ) -> None:
        self.vqgan, self.resolution, self.mode = vqgan, resolution, _check_mode(mode)
        precisions = get_args(Precision)
        self.precision = dtype_name("precision", precision, precisions)
        self.encode_precision = dtype_name("encode_precision", encode_precision, precisions)
        self.compiled = compiled
        self._compiled_network: _CompiledNetwork | None = None
        stride = vqgan.config.stride
        if resolution < stride or resolution % stride:
            raise SettingError(
                f"resolution={resolution} must be a positive multiple of the stride {stride}"
            )

    @property
    def device(self) -> torch.device:
        """The device of the VQ-GAN, and so of the codes that `encode` returns."""
        return self.vqgan.codewords.device

    def __getstate__(self) -> dict[str, Any]:
        # Compiled code cannot be pickled, and a copy must compile its network itself.
        return self.__dict__ | {"_compiled_network": None}

    @property
    def grid(self) -> int:
        """Codes along one side of an image."""
        return self.resolution // self.vqgan.config.stride

    def encode(self, images: Any, mode: Mode | None = None) -> Tensor:
        """Codes int64 [n, h, w] of images, or [1, h, w] of one: anything that `Image.of` takes.
        Raises `ImageError` if one cannot be read, or has codes but no pixels."""
        images = [images] if _is_single(images) else images
        if len(images) == 0:
            return torch.empty(0, self.grid, self.grid, dtype=torch.int64, device=self.device)
        step = self._batch_size
        batches = (images[start : start + step] for start in range(0, len(images), step))
        return torch.cat([self._encode_batch(batch, mode) for batch in batches])

    def decode(self, codes_nhw: Tensor) -> list[PIL.Image.Image]:
        """RGB images of codes int64 [n, h, w], each w * stride pixels wide and h * stride high.
        Values are truncated to 8 bits, as in Meta's code. Raises `ImageError` for codes of another
        shape or type, beyond the codebook, or of too large an image."""
        codes, step = _check_codes(codes_nhw), self._batch_size
        self._check_size(*codes.shape[1:])
        return [
            PIL.Image.fromarray(pixels)
            for start in range(0, len(codes), step)
            for pixels in self._decode_batch(codes[start : start + step])
        ]

    def preprocess(self, image: Any, mode: Mode | None = None) -> Tensor:
        """Pixels float32 [3, resolution, resolution] in -1 to 1, on the CPU."""
        square = self.square(image, mode)
        pixels_CYX = np.asarray(square).transpose(2, 0, 1)
        return torch.from_numpy((pixels_CYX / 255.0 * 2.0 - 1.0).astype(np.float32))

    def square(self, image: Any, mode: Mode | None = None) -> PIL.Image.Image:
        """The part of an image that the model sees, `resolution` pixels on each side."""
        pil = Image.of(image).pil
        if pil is None:
            raise ImageError("the image has codes but no pixels: decode it, or use its codes")
        make_square = cropped if _check_mode(mode or self.mode) == "crop" else fitted
        return make_square(pil, self.resolution)

    def _check_size(self, height: int, width: int) -> None:
        stride = self.vqgan.config.stride
        if height * width * stride**2 > MAX_DECODED_PIXELS:
            raise ImageError(
                f"{height:,} x {width:,} codes make an image of {height * stride:,} x "
                f"{width * stride:,} pixels, the limit is {MAX_DECODED_PIXELS:,} in all: decode it "
                "in pieces"
            )

    @property
    def _batch_size(self) -> int:
        pixels = _BATCH_PIXELS if self.device.type == "cpu" else _BATCH_PIXELS_GPU
        return max(1, pixels // self.resolution**2)

    @torch.no_grad()
    def _encode_batch(self, images: Sequence[Any], mode: Mode | None) -> Tensor:
        """The codes [n, h, w] of images that go through the network together."""
        pixels_nCYX = torch.stack([self.preprocess(image, mode) for image in images])
        vqgan, dtype = self.vqgan, self.vqgan.codewords.dtype
        pixels_nCYX = pixels_nCYX.to(self.device, dtype)
        is_exact = self.encode_precision == "fp32" and not self.compiled
        if is_exact or isinstance(vqgan, MissingVQGAN):
            return vqgan.encode(pixels_nCYX)
        with self._autocast(self.encode_precision):
            latents_nCyx = self._network(vqgan).latents(pixels_nCYX)
        # Latents rounded to bf16 are compared with the codewords in the codebook's dtype.
        return vqgan.nearest_codes(latents_nCyx.to(dtype))

    @torch.no_grad()
    def _decode_batch(self, codes_nhw: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """The pixels [n, Y, X, 3] of codes that go through the network together."""
        with self._autocast(self.precision):
            pixels = self._decode(codes_nhw.to(self.device))
        pixels = pixels.float().clamp(-1, 1)
        pixels_nYXC = ((pixels + 1) / 2 * 255).to(torch.uint8).permute(0, 2, 3, 1)
        return np.ascontiguousarray(pixels_nYXC.cpu().numpy())

    def _decode(self, codes_nhw: Tensor) -> Tensor:
        vqgan = self.vqgan
        if not self.compiled or isinstance(vqgan, MissingVQGAN):
            return vqgan.decode(codes_nhw)
        vqgan.check_codes(codes_nhw)
        return self._network(vqgan).pixels(vqgan.embed(codes_nhw))

    def _autocast(self, precision: str) -> AbstractContextManager[object]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bf16")

    def _network(self, vqgan: VQGAN) -> VQGAN | _CompiledNetwork:
        """The VQ-GAN, or its compiled form."""
        if not self.compiled:
            return vqgan
        if self._compiled_network is None or self._compiled_network.vqgan is not vqgan:
            self._compiled_network = _CompiledNetwork(vqgan)
        return self._compiled_network


class _CompiledNetwork:
    """Both directions of a network, each compiled by torch as one graph."""

    def __init__(self, vqgan: VQGAN) -> None:
        self.vqgan = vqgan
        compile_graph: Any = partial(torch.compile, fullgraph=True)
        self.latents: Callable[[Tensor], Tensor] = compile_graph(vqgan.latents)
        self.pixels: Callable[[Tensor], Tensor] = compile_graph(vqgan.pixels)


def _check_mode(mode: Any) -> Mode:
    if mode not in get_args(Mode):
        raise SettingError(f"image mode {mode!r} is unknown: choose 'crop' or 'fit'")
    return mode


def _is_single(images: Any) -> bool:
    """Whether this is one image: an array or tensor of four axes is several."""
    if isinstance(images, np.ndarray | Tensor):
        return images.ndim < 4
    return not isinstance(images, Sequence) or isinstance(images, str | bytes | bytearray)


def _check_codes(codes: Any) -> Tensor:
    """The codes as int64. Raises `ImageError` unless they are whole numbers [n, h, w]."""
    try:
        tensor: Tensor = torch.as_tensor(codes)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise ImageError(
            f"an object of type {type(codes).__name__} holds no codes: give whole numbers [n, h, w]"
        ) from None
    is_whole = not (tensor.is_floating_point() or tensor.is_complex())
    if tensor.ndim != 3 or not is_whole or 0 in tensor.shape[1:]:
        raise ImageError(
            f"codes of shape {tuple(tensor.shape)} and type {tensor.dtype} cannot be decoded: "
            "give whole numbers [n, h, w]"
        )
    return tensor.long()


def cropped(image: PIL.Image.Image, side: int) -> PIL.Image.Image:
    """The square in the centre of an image, `side` pixels wide after resizing."""
    scale = side / min(image.size)
    width, height = (round(scale * length) for length in image.size)
    left, top = (width - side) // 2, (height - side) // 2
    area = (left, top, left + side, top + side)
    if width * height > MAX_PIXELS:
        return _crop_long_strip(image, side, area, (width, height))
    return image.resize((width, height), PIL.Image.Resampling.LANCZOS).crop(area)


def _crop_long_strip(
    image: PIL.Image.Image, side: int, area: tuple[int, ...], size: tuple[int, int]
) -> PIL.Image.Image:
    """`area` of the strip resized to `size`, without resizing all of it; values may differ in the
    last bit."""
    # The same area in pixels of the image as it is: left, top, right, bottom.
    box = [
        min(edge * length / resized_length, length)
        for edge, length, resized_length in zip(area, image.size * 2, size * 2, strict=True)
    ]
    resample = PIL.Image.Resampling.LANCZOS
    return image.resize((side, side), resample, box=(box[0], box[1], box[2], box[3]))


def fitted(image: PIL.Image.Image, side: int) -> PIL.Image.Image:
    """The whole image in the middle of a white square, resized to `side` pixels."""
    if max(image.size) > MAX_SQUARE:
        image = image.copy()
        image.thumbnail((MAX_SQUARE, MAX_SQUARE), PIL.Image.Resampling.LANCZOS)
    edge = max(image.size)
    canvas = PIL.Image.new("RGB", (edge, edge), "white")
    canvas.paste(image, ((edge - image.width) // 2, (edge - image.height) // 2))
    return canvas.resize((side, side), PIL.Image.Resampling.LANCZOS)
