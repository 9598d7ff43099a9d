"""The rows of a burst of static steps: the host writes them before the burst and reads them after.

Each branch of a request is a row. All rows of a request sample the same token, from the guided
logits of its conditions, so each row holds the indices of the rows of all three conditions. A row
freezes if the host must act before its next token: at the end of the reply, when branches open or
close, and when its blocks are full. A frozen row is still computed, and its results are ignored.

Shapes: R rows of a bucket, I integers and F floats of a row, W blocks of a table, N steps of a
burst, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from earlyfusion.engine.blocks import BLOCK_SIZE, Branch
from earlyfusion.engine.cache import PagedCache
from earlyfusion.engine.handle import Handle
from earlyfusion.generation.grammar import SLOT, Grammar
from earlyfusion.generation.sampler import SamplingTensors
from earlyfusion.generation.settings import ModalitySettings

MAX_STEPS = 32
FROZEN = -2
"""Stands for the token of a frozen row."""

# Columns of `Rows.ints_RI`, in the order of `Row.ints`, then those of `Rows.floats_RF`.
_TOKEN, _POSITION, _ALIVE = 0, 1, 2
_STATE = slice(3, 7)
_GRAMMAR, _CAPACITY, _STOPS_AT_BEGIN, _STOPS_AT_END = range(7, 11)
_CONDITIONS = slice(11, 14)
_TOP_K = slice(14, 16)
_TABLE = 16
_GUIDANCE, _SETTINGS = slice(0, 2), 2
_FLOATS = 2 + 2 * 4  # guidance, then four settings of text and four of images


class Conditions(NamedTuple):
    """For each row, the index of the row of each condition of guidance."""

    full_R: Tensor
    image_only_R: Tensor
    unconditional_R: Tensor


@dataclass
class Rows:
    """The tensors of a bucket of R rows; their addresses never change.

    The host writes `ints_RI` and `floats_RF`. Steps change token, position, state and `alive_R` on
    the device. `step_1` counts the steps of the burst.
    """

    ints_RI: Tensor
    floats_RF: Tensor
    uniforms_NR: Tensor
    seen_RV: Tensor
    tokens_NR: Tensor
    step_1: Tensor

    @classmethod
    def of(cls, rows: int, blocks: int, vocabulary: int, device: torch.device) -> Rows:
        """A table has `blocks` blocks, the last of which is the spare one."""
        return cls(
            torch.zeros(rows, _TABLE + blocks, dtype=torch.int64, device=device),
            torch.zeros(rows, _FLOATS, dtype=torch.float64, device=device),
            torch.zeros(MAX_STEPS, rows, dtype=torch.float64, device=device),
            torch.zeros(rows, vocabulary, dtype=torch.bool, device=device),
            torch.full((MAX_STEPS, rows), FROZEN, dtype=torch.int64, device=device),
            torch.zeros(1, dtype=torch.int64, device=device),
        )

    @property
    def token_R(self) -> Tensor:
        return self.ints_RI[:, _TOKEN]

    @property
    def position_R(self) -> Tensor:
        return self.ints_RI[:, _POSITION]

    @property
    def alive_R(self) -> Tensor:
        """0 for a frozen or idle row, else 1."""
        return self.ints_RI[:, _ALIVE]

    @property
    def state_RF(self) -> Tensor:
        """The state of the grammar (`generation/grammar.py`)."""
        return self.ints_RI[:, _STATE]

    @property
    def grammar_R(self) -> Tensor:
        return self.ints_RI[:, _GRAMMAR]

    @property
    def capacity_R(self) -> Tensor:
        """The number of tokens for which a row has blocks."""
        return self.ints_RI[:, _CAPACITY]

    @property
    def stops_at_begin_R(self) -> Tensor:
        """Whether a row freezes when an image begins, 0 or 1."""
        return self.ints_RI[:, _STOPS_AT_BEGIN]

    @property
    def stops_at_end_R(self) -> Tensor:
        """Whether a row freezes when an image ends, 0 or 1."""
        return self.ints_RI[:, _STOPS_AT_END]

    @property
    def conditions(self) -> Conditions:
        return Conditions(*self.ints_RI[:, _CONDITIONS].unbind(-1))

    @property
    def table_RW(self) -> Tensor:
        return self.ints_RI[:, _TABLE:]

    @property
    def guidance_2R1(self) -> Tensor:
        """The weights of the text and of the image, fp32."""
        return self.floats_RF[:, _GUIDANCE].float().T[..., None]

    @property
    def warps(self) -> tuple[SamplingTensors, SamplingTensors]:
        """The settings of text and of codes."""
        text, image = self.floats_RF[:, _SETTINGS:].unflatten(1, (2, 4)).unbind(1)
        top_k_R2 = self.ints_RI[:, _TOP_K]
        return _warp(text, top_k_R2[:, 0]), _warp(image, top_k_R2[:, 1])

    def write(self, rows: Sequence[Row], spare: int, steps: int) -> None:
        """Fill the rows for a burst of `steps` steps; the remaining rows are idle.

        Tables are filled up with the block `spare`, into which idle and frozen rows may write.
        """
        blocks = self.table_RW.shape[1]
        ints = [row.ints(blocks, spare) for row in rows]
        floats = [row.floats() for row in rows]
        uniforms = [row.handle.next_uniforms(steps) for row in rows]
        for number in range(len(rows), len(self.ints_RI)):
            idle = [0] * _TABLE + [spare] * blocks
            idle[_CONDITIONS] = [number] * 3
            # A slot within an image, where the next token is fixed or a code.
            idle[_STATE.start + SLOT] = 1
            ints.append(idle)
            floats.append([0.0] * _FLOATS)
            uniforms.append([0.0] * steps)
        ints_RI = torch.tensor(ints)
        floats_RF = torch.tensor(floats, dtype=torch.float64)
        uniforms_NR = torch.tensor(uniforms, dtype=torch.float64).T.contiguous()
        device = self.ints_RI.device
        self.ints_RI.copy_(pinned(ints_RI, device), non_blocking=True)
        self.floats_RF.copy_(pinned(floats_RF, device), non_blocking=True)
        self.uniforms_NR[:steps].copy_(pinned(uniforms_NR, device), non_blocking=True)
        self.step_1.zero_()


@dataclass(frozen=True)
class Row:
    """A branch of a request, the indices of the rows of the request's three conditions, and the
    number of its grammar."""

    handle: Handle
    branch: Branch
    conditions: tuple[int, int, int]
    grammar: int
    ends_with_image: bool

    def ints(self, blocks: int, spare: int) -> list[int]:
        handle, tokens, table = self.handle, self.branch.tokens, self.branch.blocks.tolist()
        at_begin, at_end = handle.changes_at_image
        return [
            tokens[-1],
            len(tokens) - 1,
            1,
            *handle.grammar_state.row,
            self.grammar,
            len(table) * BLOCK_SIZE,
            int(at_begin),
            int(at_end or self.ends_with_image),
            *self.conditions,
            *(int(settings.top_k) for settings in handle.both_settings),
            *table,
            *[spare] * (blocks - len(table)),
        ]

    def floats(self) -> list[float]:
        numbers = [*self.handle.guidance]
        for settings in self.handle.both_settings:
            numbers += _floats_of(settings)
        return numbers


def branch_rows(
    handles: Sequence[Handle], numbers: dict[Grammar, int], ends_with_image: bool
) -> list[Row]:
    """A row per branch; those of a request are adjacent, the full one first."""
    rows: list[Row] = []
    for handle in handles:
        row_of = {id(branch): len(rows) + n for n, branch in enumerate(handle.branches)}
        full, image_only, unconditional = (row_of[id(branch)] for branch in handle.conditions)
        for branch in handle.branches:
            conditions = (full, image_only, unconditional)
            number = numbers[handle.grammar_state.grammar]
            rows.append(Row(handle, branch, conditions, number, ends_with_image))
    return rows


def _floats_of(settings: ModalitySettings) -> tuple[float, float, float, float]:
    return settings.temperature, settings.top_p, settings.min_p, settings.penalty


def _warp(floats_R4: Tensor, top_k_R: Tensor) -> SamplingTensors:
    temperature_R, top_p_R, min_p_R, penalty_R = floats_R4.unbind(1)
    return SamplingTensors(temperature_R, top_k_R, top_p_R, min_p_R, penalty_R)


def table_blocks(cache: PagedCache) -> int:
    """The length of a row's block table: that of the longest sequence, and the spare block."""
    return -(-cache.length // cache.block_size) + 1


def pinned(values: Tensor, device: torch.device) -> Tensor:
    """The values in memory from which a GPU can copy while the host goes on."""
    return values.pin_memory() if device.type == "cuda" else values
