"""Bursts of a tensor-parallel model: the message of the first process, and the steps of the others.

Only the first process samples. The message of a burst holds the block tables of its rows. Each step
then broadcasts embedded tokens and positions (`layers.py`), so the host sends nothing during a
burst.

Shapes: R rows, W blocks of a table.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from earlyfusion.engine.backends.torch import FusedTransformer
from earlyfusion.engine.cache import PagedCache
from earlyfusion.engine.static.graphs import Graphs, Kind, Shape
from earlyfusion.engine.static.layers import StaticLayers
from earlyfusion.engine.static.rows import pinned, table_blocks
from earlyfusion.kernels.operations import operations
from earlyfusion.model.transformer import Transformer


class Burst(NamedTuple):
    """`steps` steps of one shape over these block tables; 0 steps only capture the shape."""

    shape: Shape
    steps: int
    tables: Sequence[Sequence[int]] = ()

    @property
    def numbers(self) -> list[int]:
        # A model that processes share has no adapters by name.
        rows, kind, _ = self.shape
        numbers = [rows, *kind, self.steps]
        for table in self.tables:
            numbers += [len(table), *table]
        return numbers

    @classmethod
    def of(cls, numbers: Sequence[int]) -> Burst:
        rest = iter(numbers)
        rows, only_codes, greedy, steps = islice(rest, 4)
        tables = [list(islice(rest, blocks)) for blocks in rest]
        return cls(Shape(rows, Kind(bool(only_codes), bool(greedy))), steps, tables)


class FollowerBursts:
    """The static steps of a process that follows the first. The last block of its cache is the
    spare one."""

    def __init__(
        self, transformer: Transformer, fused: FusedTransformer, cache: PagedCache
    ) -> None:
        self._device, self._spare = cache.device, len(cache.kv_BL2KSH) - 1
        self._blocks = table_blocks(cache)
        self._layers = StaticLayers(transformer, fused, cache, operations(cache.device))
        self._graphs = Graphs(cache.device, self._layers)
        self._tables: dict[int, Tensor] = {}

    def collectives(self, burst: Burst) -> int:
        return self._graphs.collectives(burst.shape, burst.steps)

    def run(self, burst: Burst) -> None:
        rows = burst.shape.rows
        if rows not in self._tables:
            self._tables[rows] = torch.empty(
                rows, self._blocks, dtype=torch.int64, device=self._device
            )
        table_RW = self._tables[rows]
        step = self._graphs.captured_step(
            burst.shape,
            lambda: self._step(table_RW),
            lambda: self._write(table_RW, ()),
        )
        self._write(table_RW, burst.tables)
        for _ in range(burst.steps):
            step()

    def _step(self, table_RW: Tensor) -> None:
        # In place of tokens and positions, which come from the first process.
        zeros_R = torch.zeros(len(table_RW), dtype=torch.int64, device=self._device)
        self._layers.hidden_states(zeros_R, zeros_R, table_RW)

    def _write(self, table_RW: Tensor, tables: Sequence[Sequence[int]]) -> None:
        rows, blocks = table_RW.shape
        filled = [[*table, *[self._spare] * (blocks - len(table))] for table in tables]
        filled += [[self._spare] * blocks] * (rows - len(filled))
        table_RW.copy_(pinned(torch.tensor(filled), self._device), non_blocking=True)
