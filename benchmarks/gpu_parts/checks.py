"""Whether the device computes right: kernels, blocks of the 7B, replies of mini, and the tests.

A comparison that misses its limit fails the part, after all of them have been told.
"""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from earlyfusion.api import Chameleon
from earlyfusion.bench.harness import OURS, Row
from earlyfusion.bench.shapes import SHAPES, random_transformer
from earlyfusion.content import Image
from earlyfusion.engine.cache import has_fp8
from earlyfusion.generation.reference import generate_tokens
from earlyfusion.generation.settings import SamplingParams
from earlyfusion.kernels import decode
from earlyfusion.kernels.decode import Angles, HeadNorms, LayerBlocks
from earlyfusion.kernels.operations import operations
from earlyfusion.model.quantise import pack, quantise
from earlyfusion.model.transformer import Transformer
from gpu_parts.settings import Settings, free, need

ROOT = Path(__file__).parent.parent.parent
LIMITS = {"float32": 1e-4, "bfloat16": 2e-2, "int8": 3e-2, "int4": 3e-2}
"""Of |difference| / |wanted|: fp32 products in another order, and roundings to bf16."""
KERNEL_LIMIT = 1e-2
EQUALITY = (
    "test_transformer", "test_vqgan", "test_reference", "test_cache", "test_static", "test_engine",
)  # fmt: skip
"""Files of tests that compare with a second implementation, the most telling first."""


class _Missed(list[str]):
    """The comparisons that missed their limits."""

    def row(self, what: str, error: float, limit: float) -> Row:
        if not error <= limit:  # NaN misses too
            self.append(f"{what}: {error:.3g}, limit {limit:g}")
        return Row(what, "relative error", {OURS: error}, f"limit {limit:g}")

    def tell(self) -> None:
        assert not self, "; ".join(self)


def correct(settings: Settings) -> Iterator[Row]:
    """Against fp32 on the CPU: blocks; against the definitions: kernels; mini, token by token."""
    missed = _Missed()
    yield from _kernels(settings, missed)
    yield from _blocks(settings, missed)
    yield from _replies(settings)
    missed.tell()


def _blocks(settings: Settings, missed: _Missed) -> Iterator[Row]:
    """Logits of two blocks over 64 tokens, on weights that bf16 can hold."""
    config = replace(SHAPES[settings.shape], num_hidden_layers=2, vocab_size=1024)
    cpu, device = torch.device("cpu"), settings.device
    tokens = torch.randint(1024, (2, 64), generator=torch.Generator().manual_seed(0))
    for dtype, limit in LIMITS.items():
        model = random_transformer(config, device, torch.bfloat16)
        if dtype.startswith("int"):
            model = quantise(model, int(dtype[3:]))
        wanted = _logits(model, tokens, torch.float32, cpu)
        target = torch.float32 if dtype == "float32" else torch.bfloat16
        found = _logits(model, tokens, target, device)
        what = f"two blocks of the {settings.shape}, {dtype}, beside fp32 on the CPU"
        yield missed.row(what, _error(found, wanted), limit)
        free()


@torch.no_grad()
def _logits(model: Transformer, tokens: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    # A packed model keeps integers and scales as they are; what is dense takes the dtype.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model.to(device)(tokens.to(device)).float().cpu()


def _error(found: Tensor, wanted: Tensor) -> float:
    found, wanted = found.detach().float().cpu(), wanted.detach().float().cpu()
    return float((found - wanted).norm() / wanted.norm())


def _kernels(settings: Settings, missed: _Missed) -> Iterator[Row]:
    """Each operation of a decode step in the shapes of the 7B and the 34B."""
    shapes = ((2, 2, 16),) if settings.rehearses else ((32, 32, 128), (64, 8, 128))
    for queries, keys, width in shapes:
        yield from _heads(settings, missed, queries, keys, width)
    device, kernel = settings.device, operations(settings.device)
    size, inner = (64, 128) if settings.rehearses else (4096, 11008)
    random = partial(torch.randn, device=device)
    for bits in (8, 4):
        matrix, x_RI = pack(random(inner, size), bits), random(3, size).bfloat16()
        wanted = decode.product(x_RI.float(), matrix)
        error = _error(kernel.product(x_RI, matrix), wanted)
        yield missed.row(f"kernel: int{bits} product", error, KERNEL_LIMIT)
    x_RD, y_RD = random(2, 3, size).bfloat16()
    weight_D = random(size).bfloat16()
    total, normed = decode.add_norm(x_RD, y_RD, weight_D, 1e-5)
    found = kernel.add_norm(x_RD, y_RD, weight_D, 1e-5)
    error = max(_error(found[0], total), _error(found[1], normed))
    yield missed.row("kernel: sum and norm", error, KERNEL_LIMIT)
    both = random(3, 2 * inner).bfloat16()
    error = _error(kernel.gated(both), decode.gated(both.float()))
    yield missed.row("kernel: SwiGLU", error, KERNEL_LIMIT)


def _heads(
    settings: Settings, missed: _Missed, queries: int, keys: int, width: int
) -> Iterator[Row]:
    device, kernel = settings.device, operations(settings.device)
    random = partial(torch.randn, device=device)
    lengths = torch.tensor([1, 33, 300], device=device, dtype=torch.int32)
    table = torch.randperm(30, device=device).view(3, 10).int()
    names = {torch.bfloat16: "bf16", torch.int8: "int8"}
    if has_fp8(device):
        names[decode.FP8] = "fp8"
    for dtype, kept in names.items():
        packed = dtype == torch.int8
        kv = random(30, 2, 2, keys, 32, width)
        kv = (40 * kv).clamp(-127, 127).to(dtype)
        scales = random(30, 2, 2, keys, 32).abs() / 40 if packed else None

        def layer(kv: Tensor = kv, scales: Tensor | None = scales) -> LayerBlocks:
            return LayerBlocks(kv.clone()[:, 1], None if scales is None else scales.clone()[:, 1])

        q_RNH = random(3, queries, width).bfloat16()
        where = (table, lengths)
        error = _error(
            kernel.attend(q_RNH, layer(), *where), decode.attend(q_RNH.float(), layer(), *where)
        )
        name = f"kernel: {{}}, {queries} heads over {keys}, {kept} cache"
        yield missed.row(name.format("attention"), error, KERNEL_LIMIT)
        numbers = random(queries + keys, width)
        norms, angles = HeadNorms(numbers, numbers), Angles(*random(2, 320, width))
        qkv = random(3, queries + 2 * keys, width).bfloat16()
        ours, theirs = layer(), layer()
        found = kernel.norm_rotate_store(qkv, norms, angles, lengths - 1, ours, table)
        wanted = decode.norm_rotate_store(qkv, norms, angles, lengths - 1, theirs, table)
        error = max(_error(found, wanted), _error(ours.kv_B2KTH, theirs.kv_B2KTH))
        # A key that rounds to another number of 16 bits may get the next one of fp8, 1/8 away.
        limit = 2 * KERNEL_LIMIT if dtype == decode.FP8 else KERNEL_LIMIT
        yield missed.row(name.format("norm, rotation, store"), error, limit)


def _replies(settings: Settings) -> Iterator[Row]:
    """mini in fp32: the engine on the device beside the reference loop on the CPU, token by token.

    A tie may fall otherwise in other sums; all after it then differs.
    """
    there = Chameleon.load("mini", device=settings.device_name, dtype="float32")
    here = Chameleon.load("mini", device="cpu", dtype="float32")
    red = Image.of(torch.full((3, 64, 64), 200, dtype=torch.uint8).permute(1, 2, 0).numpy())
    greedy = SamplingParams(temperature=0, image_temperature=0, max_tokens=24)
    asked = [
        ("a text, greedy", "What is a cat?", "text", greedy),
        ("a text, sampled", "What is a cat?", "text", SamplingParams(max_tokens=24)),
        ("about an image, greedy", [red, "What is this?"], "text", greedy),
        ("an image, guided", "Draw a cat.", "image", SamplingParams(max_tokens=80)),
    ]
    for what, prompt, output, sampling in asked[: 2 if settings.rehearses else None]:
        request = here.request(prompt, output, sampling, seed=1)
        wanted = list(generate_tokens(here.transformer, here.processor, request))
        handle = there.engine.add(there.request(prompt, output, sampling, seed=1))
        while not handle.finished:
            there.engine.step()
        found = list(handle.tokens)
        same = next(
            (n for n, (a, b) in enumerate(zip(found, wanted, strict=False)) if a != b), len(wanted)
        )
        note = f"of {len(wanted)} tokens of the reference loop in fp32 on the CPU"
        yield Row(f"mini, {what}: equal tokens", "", {OURS: float(same)}, note)


def tests(settings: Settings) -> Iterator[Row]:
    """The tests marked gpu, then those of equality with `--device cuda`, where they take it."""
    need("pytest", "hypothesis", "pytest_timeout")
    folder = ROOT / "tests"
    if settings.rehearses:
        yield _pytest(settings, "a test of the rehearsal", [str(folder / "test_devices.py")])
        return
    # The test that runs this file takes 100 shapes, each of which is compiled.
    of_kernels = ["-k", "not compile", str(folder / "triton_case.py")]
    yield _pytest(settings, "kernels over random shapes", of_kernels, EXAMPLES="4")
    marked = ["-m", "gpu", "-k", "not definitions_on_a_gpu", *_marked(folder)]
    yield _pytest(settings, "tests marked gpu", marked)
    takes = "--device" in (folder / "conftest.py").read_text(encoding="utf-8")
    for name in EQUALITY:
        options = [f"--device={settings.device_name}"] if takes else []
        where = f"on {settings.device_name}" if takes else "on the CPU: they take no device yet"
        yield _pytest(settings, f"{name}, {where}", [*options, str(folder / f"{name}.py")])


def _marked(folder: Path) -> list[str]:
    """Files with tests that need a GPU; others may need packages that are not here."""
    files = sorted(folder.glob("test_*.py"))
    return [str(f) for f in files if "pytest.mark.gpu" in f.read_text(encoding="utf-8")]


def _pytest(settings: Settings, what: str, options: list[str], **environment: str) -> Row:
    report = settings.work / "tests.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore"]
    command += [f"--junitxml={report}", "--continue-on-collection-errors", "--tb=short"]
    if find_spec("xdist") is not None:
        command += ["-n0"]
    variables = os.environ | environment | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, *options], cwd=ROOT, env=variables, stdout=1, stderr=2)
    cases = list(ElementTree.parse(report).iter("testcase")) if report.is_file() else []
    bad = [c.get("name") for c in cases if {"failure", "error"} & {child.tag for child in c}]
    skipped = sum(c.find("skipped") is not None for c in cases)
    passed = len(cases) - len(bad) - skipped
    note = f"{passed} passed, {skipped} skipped, pytest ended with {done.returncode}"
    note += f"; failed: {', '.join(map(str, bad[:20]))}" if bad else ""
    return Row(what, "failed", {OURS: float(len(bad))}, note)
