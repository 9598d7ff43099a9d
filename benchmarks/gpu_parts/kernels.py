"""Attention of one token per row, and products of few rows: our kernels beside what torch has.

All are timed as CUDA graphs, over inputs that take turns, so that neither launches nor the device's
cache count. Shapes: R rows, N query heads, K key and value heads, H head width, B blocks, T tokens
of a block, W blocks of a table, P positions, O x I a weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from earlyfusion.bench.harness import OURS, Row, seconds
from earlyfusion.bench.shapes import SHAPES
from earlyfusion.engine.blocks import BLOCK_SIZE
from earlyfusion.kernels.decode import LayerBlocks
from earlyfusion.kernels.operations import Operations, operations
from earlyfusion.model.quantise import pack
from gpu_parts.settings import Settings, free

CACHE_BYTES = 200_000_000
"""Inputs that take turns are together larger than a device's cache."""
ROWS = (1, 3, 8, 64)


def attention(settings: Settings) -> Iterator[Row]:
    """The kernel, gathered blocks with SDPA, and SDPA and flex attention without blocks."""
    yield from _beside_each_other(settings, _ways(settings.device))
    if not settings.rehearses:  # importing its compiler would take longer than the rehearsal
        # Compiles for seconds, so all else has been measured before.
        yield from _beside_each_other(settings, {"flex without blocks": _flex()})


def _beside_each_other(
    settings: Settings, ways: dict[str, Callable[[_Inputs], Any]]
) -> Iterator[Row]:
    device, config = settings.device, SHAPES[settings.shape]
    contexts = settings.contexts if settings.rehearses else (*settings.contexts, 4096)
    limits = settings.limits()
    for context in contexts:
        for rows in ROWS[:2] if settings.rehearses else ROWS:
            vectors = 2 * rows * context * config.kv_heads * config.head_dim
            sets = max(1, min(16, CACHE_BYTES // (2 * vectors)))
            inputs = [_Inputs(rows, context, config, device) for _ in range(sets)]
            values, failed = dict[str, float](), list[str]()
            for name, call in ways.items():
                try:
                    seconds_each = device_seconds([partial(call, one) for one in inputs], device)
                    values[name] = 1e6 * seconds_each
                except Exception as error:  # that of another contender does not end ours
                    if name == OURS:
                        raise
                    failed.append(f"{name}: {type(error).__name__}: {error}"[:200])
            what = f"attention of {rows} rows over {context:,} tokens"
            floor = 1e3 * limits.milliseconds(2 * vectors) if OURS in ways else None
            yield Row(what, "µs", values, "; ".join(failed), floor)
            del inputs
            free()


class _Inputs:
    """Queries, and keys and values in blocks in any order, and again without blocks."""

    def __init__(self, rows: int, context: int, config: Any, device: torch.device) -> None:
        each, heads, width = -(-context // BLOCK_SIZE), config.kv_heads, config.head_dim
        shape = (rows * each, 2, heads, BLOCK_SIZE, width)
        random = partial(torch.randn, device=device, dtype=torch.bfloat16)
        self.blocks = LayerBlocks(random(*shape))
        order = torch.randperm(rows * each, device=device)
        self.table_RW = order.view(rows, each).int()
        self.lengths_R = torch.full((rows,), context, dtype=torch.int32, device=device)
        self.q_RNH = random(rows, config.num_attention_heads, width)
        self.k_RKPH, self.v_RKPH = random(2, rows, heads, context, width)

    @property
    def q_RN1H(self) -> Tensor:
        return self.q_RNH[:, :, None]

    def gathered(self) -> tuple[Tensor, Tensor]:
        """Keys and values [R, K, P, H], read out of their blocks."""
        kv_RW2KTH = self.blocks.kv_B2KTH[self.table_RW]
        k_RKPH, v_RKPH = kv_RW2KTH.permute(2, 0, 3, 1, 4, 5).flatten(3, 4)
        end = self.k_RKPH.shape[2]
        return k_RKPH[:, :, :end], v_RKPH[:, :, :end]


def _ways(device: torch.device) -> dict[str, Callable[[_Inputs], Any]]:
    ways: Operations = operations(device)

    def gather(one: _Inputs) -> Tensor:
        return F.scaled_dot_product_attention(one.q_RN1H, *one.gathered(), enable_gqa=True)

    return {
        OURS: lambda one: ways.attend(one.q_RNH, one.blocks, one.table_RW, one.lengths_R),
        "gathered, SDPA": gather,
        "SDPA without blocks": lambda one: F.scaled_dot_product_attention(
            one.q_RN1H, one.k_RKPH, one.v_RKPH, enable_gqa=True
        ),
    }


def _flex() -> Callable[[_Inputs], Any]:
    from torch.nn.attention.flex_attention import flex_attention

    compiled: Any = torch.compile(flex_attention)
    return lambda one: compiled(one.q_RN1H, one.k_RKPH, one.v_RKPH, enable_gqa=True)


def products(settings: Settings) -> Iterator[Row]:
    """Products of 1, 3 and 8 rows with the matrices of a layer, in 16, 8 and 4 bits."""
    device, config, limits = settings.device, SHAPES[settings.shape], settings.limits()
    ways, width, inner = operations(device), config.hidden_size, config.intermediate_size
    for out, columns in ((3 * width, width), (2 * inner, width), (width, inner)):
        sets = 1 if settings.rehearses else 4
        weights = [
            torch.randn(out, columns, device=device, dtype=torch.bfloat16) for _ in range(sets)
        ]
        packed = {bits: [pack(weight, bits) for weight in weights] for bits in (8, 4)}
        for rows in (1, 3, 8):
            x_RI = torch.randn(rows, columns, device=device, dtype=torch.bfloat16)
            dense = [partial(F.linear, x_RI, weight) for weight in weights]
            theirs = 1e6 * device_seconds(dense, device)
            for bits, matrices in packed.items():
                ours = [partial(ways.product, x_RI, matrix) for matrix in matrices]
                yield Row(
                    f"product of {rows} rows, {columns:,} to {out:,}, int{bits}",
                    "µs",
                    {OURS: 1e6 * device_seconds(ours, device), "bf16, torch": theirs},
                    floor=1e3 * limits.milliseconds(matrices[0].nbytes),
                )
        del weights, packed
        free()


def device_seconds(calls: Sequence[Callable[[], Any]], device: torch.device) -> float:
    """Seconds of one call, of several that take turns; on CUDA all are one graph."""

    def run() -> None:
        for call in calls:
            call()

    if device.type != "cuda":
        run()
        return min(seconds(run, device) for _ in range(3)) / len(calls)
    replay = captured(run)
    return min(seconds(replay, device) for _ in range(10)) / len(calls)


def captured(run: Callable[[], Any]) -> Callable[[], None]:
    """A CUDA graph of what `run` starts, after it has warmed up beside the default stream."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay
