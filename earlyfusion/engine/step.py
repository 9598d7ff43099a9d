"""The tokens of one step in one row: which they are, their positions, and the rows drawn from.
Follows from the scheduler's plan alone and is the same for all back ends; how each looks back in
the cache is its own concern (`backends/attention.py`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from earlyfusion.engine.blocks import Branch
from earlyfusion.engine.scheduler import Piece


class Step:
    """The tokens of a plan's pieces: single tokens first, by length, then longer pieces. `drawing`
    are the rows that may be drawn from: the last token of each piece, and its drafts. `row_of` is
    the index, among these, of a branch's first row."""

    def __init__(self, pieces: Sequence[Piece], device: torch.device) -> None:
        self.singles = [p for p in pieces if p.size == 1 and not p.drafts]
        self.singles.sort(key=_end)
        self.longer = [p for p in pieces if p.size > 1 or p.drafts]
        self.pieces = [*self.singles, *self.longer]
        tokens: list[int] = []
        positions: list[int] = []
        self.row_of: dict[Branch, int] = {}
        self.drawing: list[int] = []
        for piece in self.pieces:
            last = len(tokens) + piece.size - 1
            tokens += piece.tokens
            positions += range(piece.start, piece.start + piece.rows)
            self.row_of[piece.branch] = len(self.drawing)
            self.drawing += range(last, len(tokens))
        self.draws_all = len(self.drawing) == len(tokens)
        # Both in one tensor: one copy to the device.
        self.tokens_T, self.positions_T = torch.tensor([tokens, positions]).to(device)


def _end(piece: Piece) -> int:
    return piece.end
