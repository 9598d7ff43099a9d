"""Which machine this is, what it can do at most, and how long a fresh process takes to answer."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import metadata

import torch

from earlyfusion.bench.harness import OURS, Row
from earlyfusion.checkpoints.summary import summarize
from gpu_parts.settings import Settings

PACKAGES = ("torch", "triton", "transformers", "tokenizers", "safetensors", "pytest", "hypothesis")

FIRST_TOKEN = """
import json, sys, time
began = float(sys.argv[2])
import torch
from earlyfusion import Chameleon
imported = time.time()
name, device, dtype, cache = sys.argv[1], *sys.argv[3:]
model = Chameleon.load(name, device=device, dtype=dtype, cache_bytes=int(cache))
loaded = time.time()
handle = model.engine.add(model.request("Hello", "text", seed=0))
while not handle.tokens:
    model.engine.step()
first = time.time()
found = {"import": imported - began, "load": loaded - imported, "first": first - loaded}
if torch.cuda.is_available() and device != "cpu":
    found["peak"] = torch.cuda.max_memory_allocated()
    found["cache"] = model.engine.cache_size.bytes
print(json.dumps(found))
"""
CACHE_BYTES = 4_000_000_000


def limits(settings: Settings) -> Iterator[Row]:
    """The environment, and rates of copies, sums and bf16 products."""
    device = settings.device
    versions = {name: _version(name) for name in PACKAGES}
    card = "no GPU"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        card = f"{properties.name}, {properties.total_memory / 1e9:.0f} GB, "
        card += f"{properties.multi_processor_count} multiprocessors, CUDA {torch.version.cuda}"
    found = ", ".join(f"{name} {version}" for name, version in versions.items())
    note = f"{card}; Python {platform.python_version()}, {os.cpu_count()} cores; {found}"
    yield Row(
        "limit: copy, bytes read and written", "GB/s", {OURS: settings.limits().copy / 1e9}, note
    )
    yield Row("limit: sum, bytes read", "GB/s", {OURS: settings.limits().read / 1e9})
    yield Row("limit: bf16 products", "TFLOP/s", {OURS: settings.limits().products / 1e12})


def cold_start(settings: Settings) -> Iterator[Row]:
    """From starting a process to its first token: the shipped model, then the large one.

    The files were just written, so they come from the memory that the system keeps of files.
    """
    device = settings.device
    dtype = settings.plain
    if not settings.rehearses:
        yield _first_token("mini", "mini", settings.device_name, dtype)
    model, folder = settings.model(dtype), settings.work / "cold"
    model.save(folder)
    del model
    if device.type == "cuda":
        torch.cuda.empty_cache()
    yield _first_token(settings.shape, str(folder), settings.device_name, dtype)


def _first_token(name: str, folder: str, device: str, dtype: str) -> Row:
    command = [sys.executable, "-c", FIRST_TOKEN, folder, str(time.time()), device, dtype]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    cache = CACHE_BYTES if device == "cuda" else 2**24
    done = subprocess.run([*command, str(cache)], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    found = json.loads(done.stdout.splitlines()[-1])
    steps = ("import", "load", "first")
    note = ", ".join(f"{step} {found[step]:.2f}" for step in steps)
    if "peak" in found:
        promised = summarize(folder, verify=False).memory[dtype] / 1e9
        peak, kept = found["peak"] / 1e9, found["cache"] / 1e9
        note += f"; peak {peak:.2f} GB, of it {kept:.2f} for the cache; info says {promised:.2f}"
    return Row(
        f"{name}: cold start to the first token", "s", {OURS: sum(found[s] for s in steps)}, note
    )


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "none"
