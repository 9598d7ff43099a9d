"""One step's tokens in one row: which they are, where each stands, and which rows are drawn from.

It follows from the scheduler's plan alone and is the same for all back ends. How a back end looks
back in the cache is its own affair (`backends/attention.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from earlyfusion.engine.scheduler import Branch, Piece


class Step:
    """The tokens of some pieces: single tokens first, by slot, then longer pieces.

    `drawing` are the rows that may be drawn from: the last token of each piece, and its drafts.
    `row_of` is the first of a branch's rows among these.
    """

    def __init__(self, pieces: Sequence[Piece], device: torch.device) -> None:
        self.singles = [p for p in pieces if p.size == 1 and not p.drafts]
        self.singles.sort(key=_slot)
        self.longer = [p for p in pieces if p.size > 1 or p.drafts]
        self.pieces = [*self.singles, *self.longer]
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        self.row_of: dict[Branch, int] = {}
        self.drawing: list[int] = []
        for piece in self.pieces:
            size = piece.size + len(piece.drafts)
            last = len(tokens) + piece.size - 1
            tokens += piece.tokens
            positions += range(piece.start, piece.start + size)
            slots += [piece.slot] * size
            self.row_of[piece.branch] = len(self.drawing)
            self.drawing += range(last, len(tokens))
        self.draws_all = len(self.drawing) == len(tokens)
        # One copy to the device instead of three.
        self.tokens_T, self.positions_T, self.slots_T = torch.tensor([tokens, positions, slots]).to(
            device
        )


def _slot(piece: Piece) -> int:
    return piece.slot
