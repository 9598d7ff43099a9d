"""Prompt lookup: the next tokens of text are guessed from earlier text of the same sequence.

If the last tokens have occurred before, those that followed them then are read behind the newest
token, all in one step. Each position is drawn with the uniform number that it would have anyway. Up
to the first wrong guess, and including the token drawn in its place, the tokens equal those drawn
one at a time; the rest is thrown away. So the reply is the same with and without lookup.

The idea is prompt lookup decoding, an n-gram form of speculative decoding (Leviathan et al., "Fast
Inference from Transformers via Speculative Decoding", arXiv 2211.17192).
"""

from __future__ import annotations

from collections.abc import Sequence

_LONGEST, _SHORTEST = 4, 2
"""How many of the last tokens must have come before, at most and at least."""


class Lookup:
    """What followed each run of tokens of one sequence when the run last occurred."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._end_of: dict[tuple[int, ...], int] = {}  # runs, and the index behind each
        self._indexed = 0

    def guess(self, history: Sequence[int]) -> list[int]:
        """Up to `size` tokens that may follow; none if the last ones are new."""
        self._index(history)
        for length in range(_LONGEST, _SHORTEST - 1, -1):
            end = self._end_of.get(tuple(history[-length:]))
            if end is not None:
                return list(history[end : end + self._size])
        return []

    def _index(self, history: Sequence[int]) -> None:
        # Not the runs that end the sequence, as nothing follows them yet.
        for end in range(self._indexed + 1, len(history)):
            for length in range(_SHORTEST, min(_LONGEST, end) + 1):
                self._end_of[tuple(history[end - length : end])] = end
        self._indexed = max(self._indexed, len(history) - 1)
