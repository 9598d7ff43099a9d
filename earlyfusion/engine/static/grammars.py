"""Several grammars as tensors of fixed shape, with one row of state per request.

`generation/grammar.py` defines the rules for one grammar. Here each row has the number of its
grammar, so that requests with different stop tokens or image sizes share a step. No method waits
for the device.

Shapes: R rows, F fields of the state, G grammars, C classes of slots, S slots, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Container, Iterable

import torch
from torch import Tensor

from earlyfusion.generation.grammar import SLOT, TEXT_ALLOWED, Grammar

MAX_GRAMMARS, MAX_CLASSES = 8, 64


class Grammars:
    """The tables of at most MAX_GRAMMARS grammars whose images have at most `slots` tokens."""

    def __init__(self, vocabulary: int, slots: int, begin: int, device: torch.device) -> None:
        shape_GS = (MAX_GRAMMARS, slots + 1)
        self._number_of: dict[Grammar, int] = {}  # the least recently used first
        self._begin, self._slots = begin, slots
        self._allowed_GCV = torch.zeros(
            MAX_GRAMMARS, MAX_CLASSES, vocabulary, dtype=torch.bool, device=device
        )
        self._class_GS = torch.zeros(shape_GS, dtype=torch.int64, device=device)
        self._forced_GS = torch.full(shape_GS, -1, dtype=torch.int64, device=device)
        self._ends_GV = torch.zeros(MAX_GRAMMARS, vocabulary, dtype=torch.bool, device=device)
        self._done_G = torch.ones(MAX_GRAMMARS, dtype=torch.int64, device=device)

    def numbers_of(self, grammars: Iterable[Grammar]) -> dict[Grammar, int] | None:
        """The number of each grammar's tables; None if there is no room for all of them.

        Replaces the tables of other grammars if needed, the least recently used first.
        """
        needed = dict.fromkeys(grammars)
        if len(needed) > MAX_GRAMMARS or not all(map(self._fits, needed)):
            return None
        for grammar in needed:
            number = self._number_of.pop(grammar, None)
            if number is None:
                number = self._free_number(needed)
                self._fill(number, grammar)
            self._number_of[grammar] = number
        return {grammar: self._number_of[grammar] for grammar in needed}

    def _fits(self, grammar: Grammar) -> bool:
        return grammar.image_tokens <= self._slots and len(grammar.tables[0]) <= MAX_CLASSES

    def _free_number(self, needed: Container[Grammar]) -> int:
        if len(self._number_of) < MAX_GRAMMARS:
            return len(self._number_of)
        oldest = next(grammar for grammar in self._number_of if grammar not in needed)
        return self._number_of.pop(oldest)

    def _fill(self, number: int, grammar: Grammar) -> None:
        classes_CV, class_of_slot = grammar.tables
        slots = grammar.image_tokens
        self._allowed_GCV[number, : len(classes_CV)] = classes_CV
        self._class_GS[number, : slots + 1] = class_of_slot
        # Slot 0 is text; the template says there that an image begins.
        fixed = [-1, *(-1 if token is None else token for token in grammar.fixed[1:]), -1]
        self._forced_GS[number, : slots + 1] = torch.tensor(fixed)
        self._ends_GV[number] = False
        self._ends_GV[number, sorted(grammar.end_ids)] = True
        self._done_G[number] = slots

    def mask(self, state_RF: Tensor, grammar_R: Tensor) -> Tensor:
        """As `Grammar.mask`: True where a token may come next [R, V]."""
        slot_R, images_left_R, tokens_left_R, text_allowed_R = state_RF.unbind(-1)
        outside_R = slot_R == 0
        begins_R = outside_R & (images_left_R > 0) & (tokens_left_R >= self._done_G[grammar_R])
        allowed_RV = self._allowed_GCV[grammar_R, self._class_GS[grammar_R, slot_R]]
        allowed_RV &= ~(outside_R & (text_allowed_R == 0))[:, None]
        begin_R = torch.where(outside_R, begins_R, allowed_RV[:, self._begin])
        allowed_RV[:, self._begin] = begin_R
        return allowed_RV

    def forced(self, state_RF: Tensor, grammar_R: Tensor) -> Tensor:
        """As `GrammarState.forced`: the only token that may come, -1 if there is not just one."""
        slot_R = state_RF[:, SLOT]
        only_image_R = (slot_R == 0) & (state_RF[:, TEXT_ALLOWED] == 0)
        return torch.where(only_image_R, self._begin, self._forced_GS[grammar_R, slot_R])

    def advance(self, state_RF: Tensor, token_R: Tensor, grammar_R: Tensor) -> Tensor:
        """As `Grammar.advance`, for rows that have not ended."""
        slot_R, images_left_R, tokens_left_R, text_allowed_R = state_RF.unbind(-1)
        done_R = self._done_G[grammar_R]
        begins_R = (slot_R == 0) & (token_R == self._begin)
        stops_R = (slot_R == 0) & self._ends_GV[grammar_R, token_R]
        slot_R = torch.where((slot_R > 0) | begins_R, (slot_R + 1) % done_R, slot_R)
        images_left_R = images_left_R - begins_R.long()
        tokens_left_R = tokens_left_R - 1
        # Without text, a reply ends once no further image may begin or fit.
        fits_R = (images_left_R > 0) & (tokens_left_R >= done_R)
        exhausted_R = (text_allowed_R == 0) & ~fits_R & (slot_R == 0)
        slot_R = torch.where(stops_R | exhausted_R | (tokens_left_R == 0), done_R, slot_R)
        return torch.stack([slot_R, images_left_R, tokens_left_R, text_allowed_R], -1)

    def done(self, state_RF: Tensor, grammar_R: Tensor) -> Tensor:
        """True for rows whose reply has ended."""
        return state_RF[:, SLOT] == self._done_G[grammar_R]
