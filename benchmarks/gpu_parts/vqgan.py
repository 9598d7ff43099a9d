"""The VQ-GAN: images to codes and back, in several precisions and batches, codes compared."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from earlyfusion.api import Chameleon
from earlyfusion.bench.harness import OURS, Row, seconds
from earlyfusion.bench.shapes import SHAPES, random_images, random_vqgan
from earlyfusion.model.vqgan import VQGAN
from gpu_parts.kernels import captured
from gpu_parts.settings import Settings

ENCODER_OPERATIONS, DECODER_OPERATIONS = 0.550e12, 1.005e12
"""Of an image of 512 x 512 pixels in the released VQ-GAN."""


class Way(NamedTuple):
    """How the VQ-GAN runs; `half` are bf16 weights, else fp32, or bf16 by autocast."""

    name: str
    tf32: bool = True
    half: bool = False
    last: bool = False
    cast: bool = False
    graph: bool = False
    compiled: bool = False


WAYS = (
    Way("fp32", tf32=False),
    Way("tf32"),
    Way("autocast", cast=True),
    Way("bf16", half=True),
    Way("bf16, channels last", half=True, last=True),
    Way("bf16, channels last, captured", half=True, last=True, graph=True),
    Way("autocast, compiled", cast=True, compiled=True),
)
"""The last is `ImageTokenizer(precision="bf16", encode_precision="bf16", compiled=True)`."""


@torch.no_grad()
def vqgan(settings: Settings) -> Iterator[Row]:
    """Random weights of the released size, then mini's own, whose codes mean something."""
    config = SHAPES[settings.shape].vq_config
    made = random_vqgan(config, settings.device)
    for batch in (2,) if settings.rehearses else (1, 8):
        yield from _both(settings, settings.shape, made, batch)
    if settings.rehearses:  # bf16 convolutions of its size take a CPU seconds
        return
    mini = Chameleon.load("mini", device=settings.device_name).image_tokenizer.vqgan
    assert isinstance(mini, VQGAN)
    yield from _both(settings, "mini", mini, 64)


def _both(settings: Settings, name: str, fp32: VQGAN, batch: int) -> Iterator[Row]:
    device, side = settings.device, fp32.config.resolution
    pixels = random_images(batch, side).to(device)
    real = side == 512
    peak = settings.limits().products
    times: dict[str, dict[str, float]] = {"encode": {}, "decode": {}}
    notes: dict[str, list[str]] = {"encode": [], "decode": []}
    codes, fp32_pixels = Tensor(), Tensor()
    for way in WAYS:
        if way.compiled and settings.rehearses:  # it takes a CPU longer than all else together
            continue
        with _precision(way.tf32):
            network = _cast(fp32, way)
            encode, decode = _calls(network, pixels.to(next(network.parameters()).dtype), way)
            found = encode()
            codes = found if way is WAYS[0] else codes
            pixels_out = decode(codes).float().clamp(-1, 1)
            fp32_pixels = pixels_out if way is WAYS[0] else fp32_pixels
            times["encode"][way.name] = _milliseconds(encode, way, device)
            times["decode"][way.name] = _milliseconds(partial(decode, codes), way, device)
        notes["encode"].append(f"{(found == codes).float().mean():.2%}")
        error = (pixels_out - fp32_pixels).square().mean().clamp_min(1e-20)
        notes["decode"].append(f"{10 * torch.log10(4 / error):.0f} dB")
    alike = {"encode": "codes equal to fp32's", "decode": "PSNR beside fp32's"}
    for what, operations in (("encode", ENCODER_OPERATIONS), ("decode", DECODER_OPERATIONS)):
        floor = 1e3 * batch * operations / peak if real else None
        best = min(times[what].values())
        note = f"{alike[what]}: {', '.join(notes[what])}; the best {best / batch:.2f} ms per image"
        values = {OURS: times[what][WAYS[0].name]} | times[what]
        yield Row(f"{name}: {what} {batch} images", "ms", values, note, floor)


def _cast(fp32: VQGAN, way: Way) -> VQGAN:
    network = copy.deepcopy(fp32)
    if way.half:
        network = network.bfloat16()
        # The codebook is searched in fp32, or the nearest codeword would often be missed.
        network.quantize.float()
    return network.to(memory_format=torch.channels_last) if way.last else network


def _calls(
    network: VQGAN, pixels: Tensor, way: Way
) -> tuple[Callable[[], Tensor], Callable[[Tensor], Tensor]]:
    pixels = pixels.contiguous(memory_format=torch.channels_last) if way.last else pixels
    dtype, latents, decoded = pixels.dtype, network.latents, network.pixels
    if way.compiled:
        latents, decoded = (torch.compile(call, fullgraph=True) for call in (latents, decoded))
    cast = partial(torch.autocast, pixels.device.type, torch.bfloat16, enabled=way.cast)

    def encode() -> Tensor:
        with cast():
            found = latents(pixels)
        return network.nearest_codes(found.to(network.codewords.dtype))

    def decode(codes: Tensor) -> Tensor:
        with cast():
            return decoded(network.embed(codes).to(dtype))

    return encode, decode


def _milliseconds(call: Callable[[], object], way: Way, device: torch.device) -> float:
    if way.graph and device.type == "cuda":
        call = captured(call)
    call()
    return 1e3 * min(seconds(call, device) for _ in range(5))


def _precision(tf32: bool) -> AbstractContextManager[object]:
    if not torch.cuda.is_available():
        return nullcontext()
    return torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=tf32)
