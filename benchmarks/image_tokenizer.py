"""Images to codes and back: the image tokenizer beside transformers' own, time and memory.

    python benchmarks/image_tokenizer.py --threads 2 --rounds 3
    python benchmarks/image_tokenizer.py --shape mini --batch 16 --threads 2 --rounds 5
    python benchmarks/image_tokenizer.py --resolution 128 --threads 1 --rounds 1

Both have the same random weights, and a codebook of what the encoder makes of such images, moved
by noise. Images are smooth colours with fine detail (1/f noise) under hard-edged shapes. All take
turns in each round; figures are medians. transformers has no decoder: "torch" is our modules in
torch's own operators, contiguous, as transformers writes them. "no compiler" is what remains
without g++. Peak memory is what a process of its own takes for one call, beyond what it held before
(Linux). Needs `pip install "earlyfusion[transformers]"`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import ChameleonVQVAE, ChameleonVQVAEConfig

from earlyfusion.bench.harness import heading, line, medians, seconds, take_turns
from earlyfusion.bench.shapes import random_images, random_vqgan
from earlyfusion.config import PRESETS
from earlyfusion.kernels import vqgan as fast
from earlyfusion.kernels.conv import torch_convolutions
from earlyfusion.kernels.twins import accelerate
from earlyfusion.model.vqgan import VQGAN

SHAPES = {"real": PRESETS["chameleon-7b"].vq_config, "mini": PRESETS["mini"].vq_config}
Contender = Callable[[], Tensor]


def stock_of(vqgan: VQGAN) -> ChameleonVQVAE:
    settings = {k: v for k, v in vqgan.config.to_dict().items() if k != "model_type"}
    stock = ChameleonVQVAE(ChameleonVQVAEConfig(**settings)).eval()
    weights = {k: v for k, v in vqgan.state_dict().items() if k in stock.state_dict()}
    stock.load_state_dict(weights)
    return stock


def encoders(vqgan: VQGAN, pixels: Tensor) -> dict[str, Contender]:
    stock = stock_of(vqgan)

    def lean() -> Tensor:
        with patch.object(fast, "available", return_value=False):
            return vqgan.encode(pixels)

    return {
        "transformers": lambda: stock.encode(pixels).image_tokens.view(len(pixels), -1),
        "no compiler": lambda: lean().flatten(1),
        "earlyfusion": lambda: vqgan.encode(pixels).flatten(1),
    }


def decoders(vqgan: VQGAN, codes: Tensor) -> dict[str, Contender]:
    def torchs() -> Tensor:
        with torch_convolutions():
            return vqgan.decode(codes)

    def lean() -> Tensor:
        with patch.object(fast, "available", return_value=False):
            return vqgan.decode(codes)

    def bf16() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return vqgan.decode(codes).float()

    return {
        "torch": torchs,
        "no compiler": lean,
        "earlyfusion": lambda: vqgan.decode(codes),
        "earlyfusion, bf16": bf16,
    }


def changed(codes: Tensor, base: Tensor) -> str:
    return f"{100 * (codes != base).float().mean():.3f} % of codes changed"


def likeness(pixels: Tensor, base: Tensor) -> str:
    error = (pixels.clamp(-1, 1) - base.clamp(-1, 1)).square().mean()
    return f"PSNR {10 * torch.log10(4 / error.clamp_min(1e-20)):.0f} dB"


def peak(what: str, name: str, options: argparse.Namespace) -> int:
    """MB that one call takes in a fresh process."""
    settings = [f"--{key}={getattr(options, key)}" for key in ("shape", "batch", "threads")]
    settings += [f"--resolution={options.resolution}"] if options.resolution else []
    command = [sys.executable, __file__, "--peak", f"{what}/{name}", *settings]
    printed = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    return int(printed.split()[-1])


def own_peak(what: str, name: str, options: argparse.Namespace) -> None:
    config = SHAPES[options.shape]
    side = options.resolution or config.resolution
    vqgan = accelerate(VQGAN(config).eval())
    if what == "encode":
        vqgan.decoder = None
        call = encoders(vqgan, random_images(options.batch, side))[name]
    else:
        codes = torch.randint(100, (options.batch, *[side // config.stride] * 2))
        call = decoders(vqgan, codes)[name]
    before = _resident("VmRSS")
    call()
    print(max(0, _resident("VmHWM") - before) >> 10)


def _resident(name: str) -> int:
    """kB of this process; `getrusage` would begin with the peak of the parent."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="real")
    parser.add_argument("--resolution", type=int, help="pixels a side; left out: the shape's own")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu-time", action="store_true", help="count processor time, not time")
    parser.add_argument("--no-memory", action="store_true", help="leave peak memory out")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    return parser.parse_args()


@torch.no_grad()
def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    if options.peak:
        return own_peak(*options.peak.split("/"), options)
    config = SHAPES[options.shape]
    side = options.resolution or config.resolution
    clock = time.process_time if options.cpu_time else time.perf_counter
    vqgan = random_vqgan(replace(config, resolution=side), torch.device("cpu"))
    pixels = random_images(options.batch, side)
    codes = vqgan.encode(pixels)
    used = len(codes.unique())
    print(
        f"{options.shape}, {options.batch} x {side} px, {options.threads} threads, {used} codes\n"
    )
    print(heading("what", "who", "ms", "times as fast", "peak MB", "beside the first"))
    tasks = {"encode": encoders(vqgan, pixels), "decode": decoders(vqgan, codes)}
    for what, contenders in tasks.items():
        results = {name: call() for name, call in contenders.items()}
        timers = {name: partial(seconds, call, None, clock) for name, call in contenders.items()}
        times = medians(take_turns(timers, options.rounds, warmup=0), 1e3)
        first = next(iter(contenders))
        compare = changed if what == "encode" else likeness
        for name, value in times.items():
            memory = "-" if options.no_memory else f"{peak(what, name, options):,}"
            note = compare(results[name], results[first])
            ratio = f"{times[first] / value:.2f}"
            print(line(what, name, f"{value:,.1f}", ratio, memory, note), flush=True)


if __name__ == "__main__":
    main()
