"""Pictures to pixels: Meta's steps to the bit, or transformers' on request.

transformers rounds the longer side down where Meta rounds it to the nearest pixel, and rescales by
0.0078 where Meta has 2 / 255: on about half of all pictures a quarter or more of the codes differ.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import PILImageResampling
from transformers.processing_utils import ImagesKwargs

from earlyfusion.content import Image
from earlyfusion.errors import SettingError
from earlyfusion.image_tokenizer import cropped

TRANSFORMERS_RESCALE = 0.0078


class ChameleonImagesKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    """transformers' image arguments, and `exact`: Meta's steps (the default) or transformers'."""

    exact: bool


class ChameleonImageProcessor(PilBackend):
    """Pictures to `pixel_values` [n, 3, Y, X] in -1 to 1, on the CPU and without torchvision.

    `exact=True` runs Meta's steps to the bit: Lanczos to the nearest whole size, centre crop,
    u8 / 255 * 2 - 1 in float64; a file's `rescale_factor` of 0.0078 is then read as 2 / 255.
    `exact=False` gives the pixels of transformers' own class, with 0.0078 unless set. Arrays of
    whole numbers are 0 to 255; floats are 0 to 1 in the exact steps.
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
    valid_kwargs = ChameleonImagesKwargs

    def __init__(self, **kwargs: Any) -> None:
        if kwargs.get("exact") is False:
            kwargs.setdefault("rescale_factor", TRANSFORMERS_RESCALE)
        super().__init__(**kwargs)

    def _preprocess_image_like_inputs(
        self, images: Any, *args: Any, exact: bool = True, **kwargs: Any
    ) -> BatchFeature:
        if not exact:
            if self.exact and kwargs["rescale_factor"] == 2 / 255:
                kwargs["rescale_factor"] = TRANSFORMERS_RESCALE
            return super()._preprocess_image_like_inputs(images, *args, **kwargs)
        pictures = self._prepare_images_structure(images)
        pixels = [_exact(picture, kwargs) for picture in pictures]
        return BatchFeature({"pixel_values": pixels}, tensor_type=kwargs.get("return_tensors"))


def _exact(picture: Any, settings: dict[str, Any]) -> npt.NDArray[np.float32]:
    """Meta's steps, each as the settings have it on or off: float32 [3, Y, X]."""
    image = Image.of(picture).pil
    if image is None:
        raise SettingError("the image has codes but no pixels: give its picture")
    if settings["do_resize"] and settings["do_center_crop"]:
        image = cropped(image, _side(settings))
    elif settings["do_resize"] or settings["do_center_crop"]:
        raise SettingError(
            f"do_resize={settings['do_resize']} with do_center_crop={settings['do_center_crop']} "
            "is not among Meta's steps: set both alike, or exact=False"
        )
    pixels_CYX = np.asarray(image).transpose(2, 0, 1)
    if not settings["do_rescale"]:
        return pixels_CYX.astype(np.float32)
    factor = settings["rescale_factor"]
    if factor in (2 / 255, TRANSFORMERS_RESCALE):
        scaled = pixels_CYX / 255.0 * 2.0
    else:
        scaled = pixels_CYX * np.float64(factor)
    if settings["do_normalize"]:
        mean, std = (_channels(settings[name]) for name in ("image_mean", "image_std"))
        scaled = (scaled - mean) / std
    return scaled.astype(np.float32)


def _side(settings: dict[str, Any]) -> int:
    size, crop = dict(settings["size"]), dict(settings["crop_size"])
    side = size.get("shortest_edge") or size.get("height")
    if {side, crop.get("height"), crop.get("width")} != {side}:
        raise SettingError(
            f"size={size} with crop_size={crop} is not among Meta's steps: give both one side, "
            "or exact=False"
        )
    return int(side or 0)


def _channels(values: Any) -> npt.NDArray[np.float64]:
    array = np.atleast_1d(np.asarray(values, dtype=np.float64))
    return array[:, None, None]
