"""What test_triton.py runs in processes of their own: each Triton kernel against its definition.

In Triton's interpreter (TRITON_INTERPRET=1, which has to be set before Triton is imported) the
kernels run on CPU tensors. Without it they are compiled for cards that need not be there.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import make_request, tiny_processor, tiny_transformer
from torch import Tensor

from earlyfusion.engine import cache
from earlyfusion.engine.cache import has_fp8
from earlyfusion.engine.engine import Engine
from earlyfusion.engine.static import bursts
from earlyfusion.kernels import operations
from earlyfusion.kernels.decode import FP8, Angles, HeadNorms, LayerBlocks
from earlyfusion.kernels.triton import attention, heads, norms, products
from earlyfusion.model.quantise import PackedMatrix, pack
from earlyfusion.vocabulary import ImageLayout

INTERPRETED = triton.knobs.runtime.interpret
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")
RUNS = INTERPRETED or DEVICE.type == "cuda"
TWIN = operations.operations(torch.device("cpu"))
KERNEL = operations.triton_operations()

EXAMPLES = int(os.environ.get("EXAMPLES", "8"))
random_shapes = settings(
    max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck)
)
needs_values = pytest.mark.skipif(not RUNS, reason="needs the interpreter or a CUDA device")
needs_compiler = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FP8_HERE = [FP8] if INTERPRETED or (RUNS and has_fp8(DEVICE)) else []
ERROR = {torch.float32: 3e-6, torch.bfloat16: 2**-6, torch.float16: 2**-10, FP8: 2**-3}
"""Of the largest value: sums in another order; in 16 bits, roundings that fall otherwise. The
interpreter rounds bf16 towards zero."""


if INTERPRETED:
    from triton.runtime import interpreter

    _converted = interpreter._convert_float

    def converted(x: Any, source: Any, target: Any, rounding: Any) -> Any:
        """The interpreter loses carries and NaN of fp8 (Triton 3.6): torch rounds as a GPU does."""
        if triton.language.float8e4nv not in (source, target):
            return _converted(x, source, target, rounding)
        bits = torch.from_numpy(x.copy())
        if source == triton.language.float8e4nv:
            return bits.view(FP8).float().numpy()
        return bits.view(torch.float32).to(FP8).view(torch.uint8).numpy()

    interpreter._convert_float = converted


def close(result: Tensor, expected: Tensor, dtype: torch.dtype | None = None) -> None:
    """Within the error of a dtype, that of the values if not set."""
    limit = ERROR[dtype or expected.dtype]
    result, expected = result.float().cpu(), expected.float().cpu()
    worst, size = (result - expected).abs().max(), expected.abs().max().clamp_min(1e-3)
    assert worst <= limit * size, f"{worst:.3g} of {size:.3g}"


class Case:
    """A random cache of several layers, of which one is used, and tables of blocks in any order."""

    def __init__(self, draw: Callable[..., Any]) -> None:
        self.source = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
        self.dtype = draw(st.sampled_from([*DTYPES, torch.int8, *FP8_HERE]))
        self.model_dtype = self.dtype
        if self.dtype not in DTYPES:
            self.model_dtype = draw(st.sampled_from(DTYPES))
        self.rows, self.keys = draw(st.integers(1, 3)), draw(st.integers(1, 2))
        self.heads = self.keys * draw(st.sampled_from([1, 1, 2, 3, 8]))
        self.width = 2 * draw(st.integers(1, 36))
        self.size, self.blocks_of_row = draw(st.sampled_from([1, 4, 32])), draw(st.integers(1, 12))
        lengths = st.integers(1, self.size * self.blocks_of_row)
        lengths_R = [draw(lengths) for _ in range(self.rows)]
        self.lengths_R = torch.tensor(lengths_R, dtype=torch.int32)
        blocks = self.rows * self.blocks_of_row + 1
        order = torch.randperm(blocks, generator=self.source)[1:]
        self.table_RW = order.view(self.rows, -1).int()
        shape = (blocks, 2, 2, self.keys, self.size)
        kv = self.normal(*shape, self.width)
        self.kv = (40 * kv).clamp(-127, 127).to(self.dtype) if self.packed else kv.to(self.dtype)
        self.scales = self.normal(*shape).abs() / 40 if self.packed else None

    @property
    def packed(self) -> bool:
        return self.dtype == torch.int8

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.source)

    def input(self, *shape: int) -> Tensor:
        return self.normal(*shape).to(self.model_dtype)

    def layer(self) -> LayerBlocks:
        """The second layer of a copy of the cache."""
        kv, scales = self.kv.clone(), None if self.scales is None else self.scales.clone()
        return LayerBlocks(kv[:, 1], None if scales is None else scales[:, 1])


def on(device: torch.device, value: Any) -> Any:
    if isinstance(value, Tensor):
        # A strided view stays one.
        return value.to(device) if value.device != device else value
    if isinstance(value, tuple):
        return type(value)(*(on(device, part) for part in value))
    return value


cases = st.composite(Case)()


@needs_values
@random_shapes
@given(cases)
def test_attention(case: Case) -> None:
    arguments = (
        case.input(case.rows, case.heads, case.width),
        case.layer(),
        case.table_RW,
        case.lengths_R,
    )
    result = KERNEL.attend(*(on(DEVICE, argument) for argument in arguments))
    close(result, TWIN.attend(*arguments))


@needs_values
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", [1, 4])
def test_attention_at_the_ends_of_splits(group: int, dtype: torch.dtype) -> None:
    """What is beyond a row's end is not finite."""
    source = torch.Generator().manual_seed(0)
    lengths = [1, 255, 256, 257, 512, 600]
    table_RW = torch.randperm(6 * 20, generator=source).view(6, 20)
    kv = torch.randn(120, 2, 2, 2, 32, 16, generator=source).to(dtype)
    for row, length in enumerate(lengths):
        for place in range(length, 640):
            kv[table_RW[row, place // 32], :, :, :, place % 32] = torch.nan
    q_RNH = torch.randn(6, 2 * group, 16, generator=source).to(dtype)
    lengths_R = torch.tensor(lengths, dtype=torch.int32)
    arguments = (q_RNH, LayerBlocks(kv[:, 1]), table_RW.int(), lengths_R)
    close(KERNEL.attend(*(on(DEVICE, a) for a in arguments)), TWIN.attend(*arguments))


@needs_values
@random_shapes
@given(cases)
def test_norm_rotation_and_store(case: Case) -> None:
    together = case.heads + case.keys
    norms_ = HeadNorms(case.normal(together, case.width), case.normal(together, case.width))
    longest = case.size * case.blocks_of_row
    angles = Angles(case.normal(longest, case.width), case.normal(longest, case.width))
    qkv = case.input(case.rows, case.heads + 2 * case.keys, case.width)
    actual, expected = case.layer(), case.layer()
    on_device = on(DEVICE, actual)
    rest = (case.lengths_R - 1, on_device, case.table_RW)
    result = KERNEL.norm_rotate_store(
        *(on(DEVICE, argument) for argument in (qkv, norms_, angles, *rest))
    )
    queries = TWIN.norm_rotate_store(
        qkv, norms_, angles, case.lengths_R - 1, expected, case.table_RW
    )
    close(result, queries)
    if not case.packed:
        close(on_device.kv_B2KTH, expected.kv_B2KTH, None if case.dtype in DTYPES else FP8)
        return
    assert on_device.scales_B2KT is not None and expected.scales_B2KT is not None
    # A key that rounds to another number of 16 bits may get the next level.
    assert (on_device.kv_B2KTH.cpu().int() - expected.kv_B2KTH.int()).abs().max() <= 1
    close(on_device.scales_B2KT, expected.scales_B2KT, case.model_dtype)


@needs_values
@pytest.mark.skipif(not FP8_HERE, reason="the card has no fp8")
def test_fp8_keeps_its_largest_number() -> None:
    """Also in bf16, where halves between two numbers of fp8 are common."""
    kv, ones = torch.zeros(1, 1, 2, 1, 4, 8).to(FP8), torch.ones(2, 8)
    qkv = torch.tensor([1e4, -1e4, 448, 460, -1.0625, 1.1875, 1e-3, torch.nan]).expand(1, 3, 8)
    result, expected = LayerBlocks(kv[:, 0].clone()), LayerBlocks(kv[:, 0].clone())
    rest = (HeadNorms(ones, ones), Angles(ones, ones), torch.zeros(1, dtype=torch.int32))
    table = torch.zeros(1, 1, dtype=torch.int32)
    TWIN.norm_rotate_store(qkv.bfloat16(), *rest, expected, table)
    on_device = on(DEVICE, result)
    KERNEL.norm_rotate_store(
        *(on(DEVICE, one) for one in (qkv.bfloat16(), *rest)), on_device, table.to(DEVICE)
    )
    values = on_device.kv_B2KTH[0, 1, 0, 0].float().cpu()
    assert torch.equal(values[:7], expected.kv_B2KTH[0, 1, 0, 0].float()[:7]) and values[7].isnan()
    assert values[:4].tolist() == [448.0, -448.0, 448.0, 448.0]


@needs_values
@random_shapes
@given(
    st.integers(0, 2**31),
    st.integers(1, 64),
    st.integers(1, 70),
    st.integers(1, 300),
    st.sampled_from([4, 8]),
    st.sampled_from(DTYPES),
)
def test_products(
    seed: int, rows: int, out: int, inner: int, bits: int, dtype: torch.dtype
) -> None:
    source = torch.Generator().manual_seed(seed)
    matrix = pack(torch.randn(out, inner, generator=source), bits)
    x = torch.randn(rows, inner, generator=source).to(dtype)
    result = KERNEL.product(on(DEVICE, x), on(DEVICE, matrix))
    close(result, TWIN.product(x, matrix))


@needs_values
@pytest.mark.parametrize(("bits", "dtype"), [(32, torch.float32), (16, torch.bfloat16)])
def test_dense_products(bits: int, dtype: torch.dtype) -> None:
    source = torch.Generator().manual_seed(0)
    matrix = pack(torch.randn(70, 300, generator=source), bits)
    x = torch.randn(5, 300, generator=source).to(dtype)
    close(KERNEL.product(on(DEVICE, x), on(DEVICE, matrix)), TWIN.product(x, matrix))


@needs_values
@random_shapes
@given(st.integers(0, 2**31), st.integers(1, 5), st.integers(1, 700), st.sampled_from(DTYPES))
def test_what_stands_between_products(seed: int, rows: int, width: int, dtype: torch.dtype) -> None:
    source = torch.Generator().manual_seed(seed)
    x, y, gate_up = (
        torch.randn(rows, size, generator=source).to(dtype) for size in (width, width, 4 * width)
    )
    weight = torch.randn(width, generator=source).to(dtype)
    result = KERNEL.add_norm(on(DEVICE, x), on(DEVICE, y), on(DEVICE, weight), 1e-5)
    total, normed = TWIN.add_norm(x, y, weight, 1e-5)
    close(result[0], total)
    close(result[1], normed)
    close(KERNEL.gated(on(DEVICE, gate_up)), TWIN.gated(gate_up))


# ---- compiled for cards that need not be there

SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}
"""The most shared memory of a program on an A100 and an H100, by compute capability."""
NAMES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int8: "i8",
    FP8: "fp8e4nv",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
}


@needs_values
@pytest.mark.parametrize("dtype", [None, "int8", *(["fp8"] if FP8_HERE else [])])
def test_the_static_step_of_the_engine(
    dtype: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Text, and an image with three branches, drawn beside each other with the kernels and with
    their definitions: the same tokens."""
    processor = tiny_processor(tmp_path)
    transformer = tiny_transformer(processor).to(DEVICE)
    requests = [
        make_request(processor, 1, "text", max_tokens=3),
        make_request(processor, 2, "image", True),
    ]
    requests[1] = replace(requests[1], layout=ImageLayout(1, 2), max_tokens=5)
    generated = []
    monkeypatch.setattr(cache, "has_fp8", lambda _: True)
    for ways in (TWIN, KERNEL):
        monkeypatch.setattr(bursts, "operations", lambda device, ways=ways: ways)
        engine = Engine(transformer, processor, context_tokens=192, cache_dtype=dtype, static=True)
        handles = [engine.add(one) for one in requests]
        while engine.busy:
            engine.step()
        generated.append([handle.tokens for handle in handles])
    assert generated[0] == generated[1] and list(map(len, generated[0])) == [3, 4]


class Compiled:
    """Stands for a kernel: compiles what would be launched, and notes what it needs."""

    def __init__(self, kernel: Any, lines: list[str]) -> None:
        self.kernel, self.lines = kernel, lines

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return self.launch

    def launch(
        self, *values: Any, num_warps: int = 4, num_stages: int = 3, **constants: Any
    ) -> None:
        source = triton.compiler.ASTSource(
            self.kernel, *self._signature(values, constants), attrs=self._attributes(values)
        )
        for capability, limit in SHARED_BYTES.items():
            if capability < 89 and any(isinstance(v, Tensor) and v.dtype == FP8 for v in values):
                continue
            result = triton.compile(
                source,
                target=triton.backends.compiler.GPUTarget("cuda", capability, 32),
                options={"num_warps": num_warps, "num_stages": num_stages},
            )
            shared = result.metadata.shared
            assert shared <= limit, f"{self.kernel.__name__}: {shared:,} bytes on sm_{capability}"
            name, needs = self.kernel.__name__, registers(result.asm["cubin"])
            types = ", ".join(sorted({NAMES[v.dtype] for v in values if isinstance(v, Tensor)}))
            self.lines.append(f"{name} ({types}) sm_{capability}: {shared:,} bytes, {needs}")

    def _signature(
        self, values: tuple[Any, ...], constants: dict[str, Any]
    ) -> tuple[dict[str, str], dict[str, Any]]:
        names = self.kernel.arg_names
        types = {name: _type(value) for name, value in zip(names, values, strict=False)}
        return types | dict.fromkeys(constants, "constexpr"), constants

    def _attributes(self, values: tuple[Any, ...]) -> dict[tuple[int], list[list[Any]]]:
        """What a launch finds out: which numbers are divisible by 16."""
        divisible = [["tt.divisibility", 16]]
        return {
            (number,): divisible
            for number, value in enumerate(values)
            if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0)
        }


def _type(value: Any) -> str:
    if isinstance(value, Tensor):
        return "*" + NAMES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i64" if abs(value) >= 2**31 else "i32"


def registers(cubin: bytes) -> str:
    """Registers and stack of a thread, as the toolkit that comes with Triton reads them."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    result = dict(re.findall(r"(REG|STACK):(\d+)", told))
    return f"{result['REG']} registers, {result['STACK']} bytes of stack"


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Kernels are compiled instead of launched; what they need, line by line."""
    results: list[str] = []
    for module in (attention, heads, norms, products):
        for name, kernel in list(vars(module).items()):
            # Functions that kernels call are compiled with them.
            if isinstance(kernel, triton.JITFunction) and "program_id" in kernel.src:
                monkeypatch.setattr(module, name, Compiled(kernel, results))
    return results


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int8, FP8], ids=str)
@pytest.mark.parametrize(("queries", "keys"), [(32, 32), (64, 8)], ids=["7b", "34b"])
def test_attention_compiles(lines: list[str], queries: int, keys: int, dtype: torch.dtype) -> None:
    packed = dtype == torch.int8
    model_dtype = torch.bfloat16 if packed or dtype == FP8 else dtype
    kv = torch.empty(3, 2, 2, keys, 32, 128, dtype=dtype)
    scales = torch.empty(3, 2, 2, keys, 32) if packed else None
    blocks = LayerBlocks(kv[:, 1], None if scales is None else scales[:, 1])
    table, lengths = torch.zeros(2, 128, dtype=torch.int32), torch.ones(2, dtype=torch.int32)
    KERNEL.attend(torch.empty(2, queries, 128, dtype=model_dtype), blocks, table, lengths)
    qkv = torch.empty(2, queries + 2 * keys, 128, dtype=model_dtype)
    numbers = torch.empty(queries + keys, 128)
    head_norms, angles = HeadNorms(numbers, numbers), Angles(torch.empty(4096, 128), numbers)
    KERNEL.norm_rotate_store(qkv, head_norms, angles, lengths, blocks, table)
    print("\n".join(lines))
    assert len(lines) == (4 if dtype == FP8 else 6)  # of an A100 only the joining one


@needs_compiler
def test_attention_over_narrow_heads_compiles(lines: list[str]) -> None:
    """Sides of a product of matrices have at least 16 entries."""
    blocks = LayerBlocks(torch.empty(3, 2, 2, 4, 8, dtype=torch.bfloat16))
    table, lengths = torch.zeros(2, 3, dtype=torch.int32), torch.ones(2, dtype=torch.int32)
    KERNEL.attend(torch.empty(2, 6, 8, dtype=torch.bfloat16), blocks, table, lengths)
    assert len(lines) == 2 * 2


@needs_compiler
@pytest.mark.parametrize("rows", [1, 32, 64])
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_products_compile(lines: list[str], bits: int, rows: int) -> None:
    wide = {16: torch.bfloat16, 8: torch.int8, 4: torch.uint8}[bits]
    scales = {16: None, 8: torch.empty(4096), 4: torch.empty(4096, 344, dtype=torch.bfloat16)}[bits]
    data = torch.empty(4096, 11008 // (2 if bits == 4 else 1), dtype=wide)
    x = torch.empty(rows, 11008, dtype=torch.bfloat16)
    KERNEL.product(x, PackedMatrix(data, scales, bits, 4096, 11008))
    print(f"{bits} bits, {rows} rows:", *lines, sep="\n")
    assert len(lines) == 2


@needs_compiler
def test_the_rest_compiles(lines: list[str]) -> None:
    x = torch.empty(2, 4096, dtype=torch.bfloat16)
    KERNEL.add_norm(x, x, x[0], 1e-5)
    KERNEL.gated(torch.empty(2, 22016, dtype=torch.bfloat16))
    print("\n".join(lines))
    assert len(lines) == 2 * 2
