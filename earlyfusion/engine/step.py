"""One step's tokens in one row: which they are, where each stands, and which rows are drawn from.

It follows from the scheduler's plan alone and is the same for all back ends. How a back end looks
back in the cache is its own affair (`backends/attention.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from earlyfusion.engine.blocks import Branch
from earlyfusion.engine.scheduler import Piece


class Step:
    """The tokens of some pieces: single tokens first, by length, then longer pieces.

    `drawing` are the rows that may be drawn from: the last token of each piece, and its drafts.
    `row_of` is the first of a branch's rows among these.
    """

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
        # One copy to the device instead of two.
        self.tokens_T, self.positions_T = torch.tensor([tokens, positions]).to(device)


def _end(piece: Piece) -> int:
    return piece.end
