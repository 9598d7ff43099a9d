from __future__ import annotations

import copy
import gc
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from earlyfusion import Chameleon, devices
from earlyfusion.devices import (
    FLOAT_DTYPES,
    WEIGHT_DTYPES,
    auto_dtype,
    dtype_name,
    freed_memory_kept,
    resolve_device,
    torch_dtype,
)
from earlyfusion.engine.cache import cache_dtype
from earlyfusion.engine.engine import Engine
from earlyfusion.errors import SettingError
from earlyfusion.image_tokenizer import ImageTokenizer
from earlyfusion.train.trainer import RunConfig

SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def test_short_and_long_names_are_one() -> None:
    for long, short in SHORT.items():
        assert dtype_name("dtype", short, WEIGHT_DTYPES) == long
        assert dtype_name("precision", long, tuple(SHORT.values())) == short
        assert torch_dtype(short) == torch_dtype(long) == getattr(torch, long)
    assert dtype_name("dtype", "int4", WEIGHT_DTYPES) == "int4"
    assert set(FLOAT_DTYPES) == set(SHORT)


@pytest.mark.parametrize("name", ["fp8", "", "Float32", None, 3, []])
def test_an_unknown_dtype_is_refused_with_the_known_ones(name: Any) -> None:
    with pytest.raises(SettingError, match=r"precision=.* is unknown: use one of fp32, bf16"):
        dtype_name("precision", name, ("fp32", "bf16"))


def test_the_tests_take_a_device_that_is_there() -> None:
    """`scripts/test --device NAME`; meta tensors have no values to compare."""
    script = Path(__file__).parents[1] / "scripts" / "test"
    options = ["--collect-only", "-q", "-n0", "-p", "no:cacheprovider", __file__]
    ends = {}
    for name in ("cpu", "meta", "tpu"):
        command = ["bash", str(script), "--device", name, *options]
        ends[name] = subprocess.run(command, capture_output=True, text=True)
    assert ends["cpu"].returncode == 0
    assert ends["meta"].returncode == ends["tpu"].returncode == pytest.ExitCode.USAGE_ERROR
    assert "--device: device='meta' is not on this machine: use auto or cpu" in ends["meta"].stderr
    assert "device='tpu' is unknown" in ends["tpu"].stderr


def test_every_option_understands_both_names() -> None:
    mini = Chameleon.load("mini", device="cpu", dtype="bf16")
    assert mini.transformer.lm_head.weight.dtype == torch.bfloat16
    assert RunConfig(precision="bfloat16").precision == "bf16"
    tokenizer = mini.image_tokenizer
    named: Any = "bfloat16"
    assert ImageTokenizer(tokenizer.vqgan, tokenizer.resolution, precision=named).precision == (
        "bf16"
    )
    for name in ("bf16", "bfloat16"):
        assert cache_dtype(name, torch.float32) == torch.bfloat16
    sizes = [
        Engine(mini.transformer, mini.processor, cache_dtype=name).cache_size.block_bytes
        for name in ("fp32", "float32", "bf16", "bfloat16")
    ]
    assert sizes[0] == sizes[1] == 2 * sizes[2] == 2 * sizes[3]


def test_auto_is_float32_only_for_small_models_on_a_cpu() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert auto_dtype(7_000_000, cpu) == torch.float32
    assert auto_dtype(7_000_000_000, cpu) == auto_dtype(7, gpu) == torch.bfloat16


@pytest.mark.parametrize("name", ["gpu", "", "cuda:x", None, []])
def test_an_unknown_device_is_refused(name: Any) -> None:
    with pytest.raises(SettingError, match=r"device=.* is unknown: use one of auto, cpu, cuda"):
        resolve_device(name)


@pytest.mark.parametrize("name", ["cuda:99", "meta"])
def test_a_device_that_this_machine_lacks_is_refused(name: str) -> None:
    with pytest.raises(SettingError, match=f"device='{name}' is not on this machine: use auto"):
        resolve_device(name)


def test_each_process_of_torchrun_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert resolve_device("auto") == torch.device("cuda")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert resolve_device("auto") == resolve_device("cuda") == torch.device("cuda:3")
    assert resolve_device("cuda:1") == torch.device("cuda:1")
    assert resolve_device("cpu") == torch.device("cpu")
    monkeypatch.setenv("LOCAL_RANK", "4")
    with pytest.raises(SettingError, match="device='cuda:4' is not on this machine"):
        resolve_device("cuda")


_HUGE = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(
    not _HUGE.exists() or "[madvise]" not in _HUGE.read_text(),
    reason="huge pages are not given to those who ask",
)
@pytest.mark.parametrize("chosen", [None, "0"])
def test_large_tensors_lie_on_huge_pages_unless_switched_off(chosen: str | None) -> None:
    code = (
        "import torch, earlyfusion\n"
        "x = torch.ones(16 << 20)\n"
        "print(open('/proc/self/smaps_rollup').read())"
    )
    known = {k: v for k, v in os.environ.items() if k != "THP_MEM_ALLOC_ENABLE"}
    env = known if chosen is None else known | {"THP_MEM_ALLOC_ENABLE": chosen}
    run = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    )
    (kilobytes,) = re.findall(r"AnonHugePages:\s+(\d+) kB", run.stdout)
    assert (int(kilobytes) > 0) == (chosen is None)


STAY = ("empty", "transposed")


def small_module() -> nn.Module:
    """A tied tensor, a buffer of int8, one that is empty, one that is not contiguous."""
    module = nn.Module()
    module.first = nn.Linear(1024, 700)
    module.second = nn.Linear(1024, 700, bias=False)
    module.second.weight = module.first.weight
    module.frozen = nn.Parameter(torch.randn(64, 33).bfloat16(), requires_grad=False)
    module.register_buffer("levels", torch.randint(-9, 9, (5, 7), dtype=torch.int8))
    module.register_buffer("empty", torch.zeros(0, 3))
    module.register_buffer("transposed", torch.randn(4, 6).T)
    return module


@pytest.mark.skipif(not _HUGE.exists(), reason="this kernel has no such pages")
def test_a_module_moves_to_huge_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "1")
    monkeypatch.delenv("EARLYFUSION_COPY_WEIGHTS", raising=False)
    module = small_module()
    before = {name: t.clone() for name, t in module.state_dict().items()}
    places = {name: t.data_ptr() for name, t in module.state_dict().items()}
    devices.move_to_huge_pages(module)
    after = module.state_dict()
    assert module.second.weight is module.first.weight and not module.frozen.requires_grad
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype and torch.equal(after[name], tensor)
        assert (after[name].data_ptr() == places[name]) == (name in STAY)
        assert name in STAY or after[name].data_ptr() % 64 == 0
    assert min(t.data_ptr() for n, t in after.items() if n not in STAY) % (2 << 20) == 0
    module.first(torch.ones(2, 1024)).sum().backward()
    assert module.second.weight.grad is not None
    torch.save(module.frozen, tmp_path / "one.pt")
    assert (tmp_path / "one.pt").stat().st_size < 10_000
    copied = copy.deepcopy(module)
    del module, after
    gc.collect()
    assert all(torch.equal(t, before[name]) for name, t in copied.state_dict().items())


@pytest.mark.parametrize("reason", ["memory", "switch", "shared", "kernel", "size"])
def test_a_module_stays_where_it_is(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0" if reason == "switch" else "1")
    monkeypatch.setenv("EARLYFUSION_COPY_WEIGHTS", "0" if reason == "shared" else "1")
    module = nn.Linear(8, 8) if reason == "size" else small_module()
    if reason == "memory":
        monkeypatch.setattr(devices, "free_bytes", lambda device: 5_000_000)
    if reason == "kernel":
        monkeypatch.setattr(devices, "_MADV_HUGEPAGE", 999)  # refused, as by kernels without them
    places = [parameter.data_ptr() for parameter in module.parameters()]
    devices.move_to_huge_pages(module)
    assert [parameter.data_ptr() for parameter in module.parameters()] == places


def test_freed_memory_is_kept_only_within_the_context(monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[int, int] = {}
    calls: dict[str, Any] = {"mallopt": options.__setitem__, "malloc_trim": lambda size: None}
    monkeypatch.setattr(devices, "_c_function", calls.get)
    with pytest.raises(KeyError), freed_memory_kept():
        kept = dict(options)
        raise KeyError
    assert kept.keys() == options.keys() and kept[-1] > options[-1] and kept[-2] > options[-2]
    calls.clear()  # a C library without mallopt
    with freed_memory_kept():
        pass


@pytest.mark.skipif(devices._c_function("mallopt") is None, reason="needs glibc")
def test_glibc_takes_the_values() -> None:
    call = devices._c_function("mallopt")
    assert call is not None
    for option, value, later in devices._MALLOC_OPTIONS.values():
        assert call(option, value) == 1 and call(option, later) == 1
