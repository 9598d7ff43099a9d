"""Images to pixels: Meta's steps to the bit, or transformers' on request.

transformers rounds the longer side down, Meta to the nearest pixel; transformers rescales by
0.0078, Meta by 2 / 255. For about half of all images a quarter or more of the codes differ.

As in transformers there are two back ends: `ChameleonImageProcessorPil` returns arrays,
`ChameleonImageProcessor` tensors on any device. In Meta's steps they are equal to the bit, since a
pixel stays one of 256 levels until a table gives its value.
"""

# Shapes: n images, C channels, Y X height and width in pixels.

import os
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import ChannelDimension, PILImageResampling
from transformers.processing_utils import ImagesKwargs

from earlyfusion.content import MAX_PIXELS, Image
from earlyfusion.errors import ImageError, SettingError
from earlyfusion.hf.resampling import resized
from earlyfusion.image_tokenizer import MAX_SQUARE, Mode, fitted

TRANSFORMERS_RESCALE = 0.0078
Deep: TypeAlias = Literal["scale", "clip"]
_CHANNELS = (1, 3, 4)


class ChameleonImageProcessorKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    """transformers' image arguments, and three of this package. `exact`: Meta's steps (the default)
    or transformers'. `resize_mode`: "crop" keeps the centre of an image, "fit" all of it on white.
    `deep`: Pillow's images with more than 8 bits are scaled to 8 bits ("scale"), or cut at 255 as
    in Meta's code ("clip")."""

    exact: bool
    resize_mode: Mode
    deep: Deep


class _MetaSteps(BaseImageProcessor):
    """The settings and Meta's steps, which both back ends share.

    `exact=True` runs Meta's steps to the bit: Lanczos to the nearest whole size, centre crop, u8 /
    255 * 2 - 1 in float64; a file's `rescale_factor` of 0.0078 is then read as 2 / 255. Whole
    numbers are 0 to 255, 16-bit ones 0 to 65535, floats 0 to 1. `exact=False` gives the pixels of
    transformers' own PIL class, with 0.0078 unless set.
    """

    resample = PILImageResampling.LANCZOS
    image_mean = (1.0, 1.0, 1.0)
    image_std = (1.0, 1.0, 1.0)
    size = {"shortest_edge": 512}  # noqa: RUF012
    default_to_square = False
    crop_size = {"height": 512, "width": 512}  # noqa: RUF012
    do_resize = True
    do_center_crop = True
    do_rescale = True
    rescale_factor = 2 / 255
    do_normalize = True
    do_convert_rgb = True
    exact = True
    resize_mode: Mode = "crop"
    deep: Deep = "scale"
    valid_kwargs = ChameleonImageProcessorKwargs

    def __init__(self, **kwargs: Any) -> None:
        if kwargs.get("exact") is False:
            kwargs.setdefault("rescale_factor", TRANSFORMERS_RESCALE)
        _check_settings(
            kwargs.get("resize_mode", "crop"),
            kwargs.get("deep", "scale"),
            kwargs.get("exact", True),
        )
        super().__init__(**kwargs)

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """The images of files and URLs, alone or in lists; images are returned unchanged."""
        if isinstance(image_url_or_urls, str) and os.path.isfile(image_url_or_urls):
            return Image.open(image_url_or_urls).pil
        return super().fetch_images(image_url_or_urls)

    def _preprocess_image_like_inputs(
        self,
        images: Any,
        *args: Any,
        exact: bool = True,
        resize_mode: Mode = "crop",
        deep: Deep = "scale",
        **settings: Any,
    ) -> BatchFeature:
        _check_settings(resize_mode, deep, exact)
        if not exact:
            if self.exact and settings["rescale_factor"] == 2 / 255:
                settings["rescale_factor"] = TRANSFORMERS_RESCALE
            return self._as_transformers(images, **settings)
        planes = [
            _to_planes(image, settings, deep).to(self._device_of(image, settings["device"]))
            for image in self._prepare_images_structure(images)
        ]
        pixels = self._process_in_groups(planes, settings, resize_mode)
        if settings["do_pad"]:
            pixels = _pad(pixels, settings["pad_size"])
        return self._as_batch(pixels, settings["return_tensors"])

    def _process_in_groups(
        self, planes: list[Tensor], settings: dict[str, Any], mode: Mode
    ) -> list[Tensor]:
        """Pixels [C, Y, X] of each image; images of one shape are processed as a batch."""
        groups: dict[Any, list[int]] = {}
        for number, plane in enumerate(planes):
            alone = number if settings["disable_grouping"] else None
            groups.setdefault((plane.shape, plane.device, alone), []).append(number)
        pixels: dict[int, Tensor] = {}
        for numbers in groups.values():
            batch_nCYX = torch.stack([planes[number] for number in numbers])
            values_nCYX = _to_values(self._resize_and_crop(batch_nCYX, settings, mode), settings)
            pixels |= dict(zip(numbers, values_nCYX, strict=True))
        return [pixels[number] for number in range(len(planes))]

    def _resize_and_crop(self, batch_nCYX: Tensor, settings: dict[str, Any], mode: Mode) -> Tensor:
        """uint8 images resized and cropped as the settings say."""
        resample = settings["resample"]
        resample = PILImageResampling.BILINEAR if resample is None else resample
        if settings["do_resize"] and mode == "fit":
            return self._fit_on_white(batch_nCYX, _fit_side(settings), resample)
        height, width = batch_nCYX.shape[-2:]
        size = (height, width)
        if settings["do_resize"]:
            size = _new_size(height, width, dict(settings["size"]))
        if not settings["do_center_crop"]:
            return _resize_window(batch_nCYX, size, resample, (range(size[0]), range(size[1])))
        rows, above, below = _centre_window(size[0], _crop_length(settings, "height"))
        columns, left, right = _centre_window(size[1], _crop_length(settings, "width"))
        # Compute only the rows and columns that the crop keeps.
        crop_nCYX = _resize_window(batch_nCYX, size, resample, (rows, columns))
        return F.pad(crop_nCYX, (left, right, above, below))

    def _fit_on_white(self, batch_nCYX: Tensor, side: int, resample: int) -> Tensor:
        """The whole images in the middle of white squares, resized."""
        height, width = batch_nCYX.shape[-2:]
        edge = max(height, width)
        if edge > MAX_SQUARE and batch_nCYX.shape[1] == len("RGB"):
            # The white square would be too large: shrink first, as `ImageTokenizer` does.
            squares = [_to_tensor(fitted(_to_pil(planes), side)) for planes in batch_nCYX]
            return torch.stack(squares).to(batch_nCYX.device)
        above, left = (edge - height) // 2, (edge - width) // 2
        border = (left, edge - width - left, above, edge - height - above)
        canvas_nCYX = F.pad(batch_nCYX, border, value=255)
        return _resize_window(canvas_nCYX, (side, side), resample, (range(side), range(side)))

    def _device_of(self, image: Any, given: Any) -> Any:
        return "cpu"

    def _as_transformers(self, images: Any, **settings: Any) -> BatchFeature:
        raise NotImplementedError

    def _as_batch(self, pixels: list[Tensor], tensor_type: Any) -> BatchFeature:
        raise NotImplementedError


class ChameleonImageProcessorPil(_MetaSteps, PilBackend):
    """Images to `pixel_values` [n, 3, Y, X] in -1 to 1, as arrays and on the CPU."""

    def _as_transformers(self, images: Any, **settings: Any) -> BatchFeature:
        return PilBackend._preprocess_image_like_inputs(self, images, **settings)

    def _as_batch(self, pixels: list[Tensor], tensor_type: Any) -> BatchFeature:
        arrays = [image.numpy(force=True) for image in pixels]
        return BatchFeature({"pixel_values": arrays}, tensor_type=tensor_type)


class ChameleonImageProcessor(_MetaSteps):
    """Images to `pixel_values` [n, 3, Y, X] in -1 to 1, as tensors on any device. A tensor stays
    on its device unless `device` is given; images of one size are a batch. On a CPU Pillow
    resizes them, elsewhere torch, with the same bits. torchvision is not needed. `exact=False` is
    computed on the CPU."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._set_attributes(**kwargs)

    @property
    def backend(self) -> str:
        """transformers' name for the back end that works on tensors."""
        return "torchvision"

    def _device_of(self, image: Any, given: Any) -> Any:
        return given or (image.device if isinstance(image, Tensor) else "cpu")

    def _as_transformers(self, images: Any, **settings: Any) -> BatchFeature:
        images = self._prepare_images_structure(images)
        devices = [self._device_of(image, settings["device"]) for image in images]
        tensor_type = settings.pop("return_tensors")
        on_cpu = [p.cpu() if isinstance(p, Tensor) else p for p in images]
        done = ChameleonImageProcessorPil()._as_transformers(
            on_cpu, return_tensors=None, **settings
        )
        arrays = zip(done["pixel_values"], devices, strict=True)
        pixels = [torch.as_tensor(array).to(device) for array, device in arrays]
        return self._as_batch(pixels, tensor_type)

    def _as_batch(self, pixels: list[Tensor], tensor_type: Any) -> BatchFeature:
        if tensor_type is not None and str(getattr(tensor_type, "value", tensor_type)) != "pt":
            arrays = [image.numpy(force=True) for image in pixels]
            return BatchFeature({"pixel_values": arrays}, tensor_type=tensor_type)
        return BatchFeature({"pixel_values": pixels}, tensor_type=tensor_type)


def _resize_window(
    batch_nCYX: Tensor, size: tuple[int, int], resample: int, window: tuple[range, range]
) -> Tensor:
    """A window of the resized images: by Pillow on a CPU, where that is faster."""
    # Pillow resizes the whole image, which is too much for a long strip.
    too_large = size[0] * size[1] > MAX_PIXELS
    if batch_nCYX.device.type != "cpu" or too_large:
        return resized(batch_nCYX, size, resample, window)
    rows, columns = (slice(wanted.start, wanted.stop) for wanted in window)
    windows = [
        np.asarray(PIL.Image.fromarray(plane).resize(size[::-1], resample))[rows, columns]
        for plane in batch_nCYX.flatten(0, 1).numpy()
    ]
    return torch.from_numpy(np.stack(windows)).unflatten(0, batch_nCYX.shape[:2])


def _check_settings(mode: Any, deep: Any, exact: Any) -> None:
    if mode not in get_args(Mode):
        raise SettingError(f"resize_mode={mode!r} is unknown: choose 'crop' or 'fit'")
    if deep not in get_args(Deep):
        raise SettingError(f"deep={deep!r} is unknown: choose 'scale' or 'clip'")
    if mode == "fit" and not exact:
        raise SettingError(
            "resize_mode='fit' is not among transformers' steps: leave exact=False out, or crop"
        )


def _to_planes(image: Any, settings: dict[str, Any], deep: Deep) -> Tensor:
    """uint8 [C, Y, X] of an image in any form; RGB on white if `do_convert_rgb` is set."""
    if isinstance(image, PIL.Image.Image) and image.mode.startswith(("I", "F")):
        image = Image.of(image, deep=deep).pil
        assert image is not None
        image = image if settings["do_convert_rgb"] else image.convert("L")
    rgb = settings["do_convert_rgb"]
    if isinstance(image, np.ndarray | Tensor):
        planes = _as_bytes(_channels_first(_as_tensor(image), settings["input_data_format"]))
        # If the mean has four values, the fourth channel is not opacity.
        if not rgb or len(planes) in (len("RGB"), np.size(settings["image_mean"])):
            return planes
        if len(planes) == 1:
            return planes.expand(len("RGB"), -1, -1)
        image = _to_pil(planes)
    elif not rgb and isinstance(image, PIL.Image.Image):
        return _to_tensor(image)
    pil = Image.of(image).pil
    if pil is None:
        raise SettingError("the image has codes but no pixels: give its image")
    return _to_tensor(pil)


def _as_tensor(array: Any) -> Tensor:
    if isinstance(array, Tensor):
        return array.detach()
    # torch refuses foreign byte orders and negative strides, and warns about read-only arrays.
    native = array.astype(array.dtype.newbyteorder("="), copy=not array.flags.writeable)
    return torch.from_numpy(np.ascontiguousarray(native))


def _to_tensor(image: PIL.Image.Image) -> Tensor:
    """uint8 [C, Y, X]."""
    array = np.array(image)
    array = array[..., None] if array.ndim == 2 else array
    return _as_bytes(torch.from_numpy(array).permute(2, 0, 1))


def _to_pil(planes_CYX: Tensor) -> PIL.Image.Image:
    return PIL.Image.fromarray(planes_CYX.permute(1, 2, 0).contiguous().numpy(force=True))


def _channels_first(array: Tensor, order: Any) -> Tensor:
    """[C, Y, X] from [C, Y, X] or [Y, X, C]; if both are possible, the channels come first."""
    if array.ndim == 3 and order is None:
        axes = [axis for axis in (0, 2) if array.shape[axis] in _CHANNELS]
        order = "channels_last" if axes == [2] else "channels_first" if axes else None
    if array.ndim != 3 or 0 in array.shape or order is None:
        raise ImageError(
            f"an array of shape {'x'.join(map(str, array.shape))} is not one image: give "
            "[C, Y, X] or [Y, X, C] with 1, 3 or 4 channels"
        )
    return array.permute(2, 0, 1) if ChannelDimension(order) is ChannelDimension.LAST else array


def _as_bytes(planes: Tensor) -> Tensor:
    """uint8 pixels from any type: 16 bits and floats are scaled; an unknown range raises."""
    dtype = planes.dtype
    if dtype == torch.uint8:
        return planes
    if dtype == torch.bool:
        return planes.to(torch.uint8) * 255
    wide = planes.double() if planes.is_floating_point() else planes.to(torch.int64)
    low, high = wide.min().item(), wide.max().item()
    limit = 1 if planes.is_floating_point() else 65535 if dtype == torch.uint16 else 255
    if not (low >= 0 and high <= limit):  # NaN fails this as well
        raise ImageError(
            f"the image has values from {low} to {high}, and {str(dtype)[6:]} images have 0 to "
            f"{limit}: rescale it, or give it as uint8 or uint16"
        )
    if planes.is_floating_point():
        return (wide * 255).round().to(torch.uint8)
    # Whole numbers up to 255 count as 8 bits, whatever their type.
    return (wide if high <= 255 else (wide + 128) // 257).to(torch.uint8)


def _new_size(height: int, width: int, size: dict[str, int]) -> tuple[int, int]:
    """(height, width) after resizing. Raises `SettingError`."""
    if set(size) == {"shortest_edge"}:
        scale = size["shortest_edge"] / min(height, width)
        return round(scale * height), round(scale * width)
    if set(size) == {"height", "width"}:
        return size["height"], size["width"]
    raise SettingError(
        f"size={size} is not among Meta's steps: give 'shortest_edge' or 'height' and 'width', "
        "or exact=False"
    )


def _fit_side(settings: dict[str, Any]) -> int:
    """The side of the squares that images are fitted into. Raises `SettingError`."""
    size = settings["crop_size"] if settings["do_center_crop"] else settings["size"]
    sides = set(dict(size).values())
    if len(sides) != 1:
        raise SettingError(f"resize_mode='fit' makes squares, not {dict(size)}: give one side")
    return int(sides.pop())


def _crop_length(settings: dict[str, Any], name: str) -> int:
    crop = dict(settings["crop_size"])
    if name not in crop:
        raise SettingError(f"crop_size={crop} has no {name}: give height and width")
    return int(crop[name])


def _centre_window(length: int, size: int) -> tuple[range, int, int]:
    """The middle `size` of `length`, and how many pixels are missing before and after it."""
    start, missing = max((length - size) // 2, 0), max(size - length, 0)
    before = (missing + 1) // 2
    return range(start, min(start + size, length)), before, missing - before


def _to_values(batch_nCYX: Tensor, settings: dict[str, Any]) -> Tensor:
    """float32 [n, C, Y, X]: the value of each level, from a table that is made in float64."""
    levels = np.arange(256, dtype=np.float64)
    if settings["do_rescale"]:
        factor = settings["rescale_factor"]
        exact = factor in (2 / 255, TRANSFORMERS_RESCALE)
        levels = levels / 255.0 * 2.0 if exact else levels * np.float64(factor)
    channels = batch_nCYX.shape[1]
    table = np.broadcast_to(levels, (channels, 256))
    if settings["do_normalize"]:
        mean, std = (_for_channels(settings, n, channels) for n in ("image_mean", "image_std"))
        table = (table - mean) / std
    values = torch.from_numpy(table.astype(np.float32)).to(batch_nCYX.device)
    return torch.stack([values[c][batch_nCYX[:, c].int()] for c in range(channels)], dim=1)


def _for_channels(settings: dict[str, Any], name: str, channels: int) -> Any:
    """The setting `name` as a column [channels or 1, 1]. Raises `SettingError`."""
    values = np.atleast_1d(np.asarray(settings[name], dtype=np.float64))
    if len(values) not in (1, channels):
        raise SettingError(
            f"{name} has {len(values)} values but the image {channels} channels: give one each"
        )
    return values[:, None]


def _pad(pixels: list[Tensor], size: Any) -> list[Tensor]:
    """Images with zeros below and to the right, up to `size` or the largest of them."""
    pad_size = dict(size) if size else {}
    height = pad_size.get("height") or max(image.shape[1] for image in pixels)
    width = pad_size.get("width") or max(image.shape[2] for image in pixels)
    if any(image.shape[1] > height or image.shape[2] > width for image in pixels):
        raise SettingError(f"pad_size={pad_size} is smaller than an image: raise it")
    return [F.pad(p, (0, width - p.shape[2], 0, height - p.shape[1])) for p in pixels]


# transformers' names of back ends; it calls the one that works on tensors "torchvision".
IMAGE_PROCESSORS: dict[str, type[_MetaSteps]] = {
    "torchvision": ChameleonImageProcessor,
    "pil": ChameleonImageProcessorPil,
}
# Its name in earlier releases of transformers.
ChameleonImageProcessorFast = ChameleonImageProcessor
