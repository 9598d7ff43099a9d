"""Prompt lookup: the next tokens of text are guessed from text that stands earlier in the sequence.

Where the last tokens have come before, those that followed then are read behind the newest token,
all in one step. Each position is drawn with the uniform number that it has anyway, so as long as
the guesses turn out right, the tokens are those of one at a time; the first that differs is right
too, and the rest is thrown away. So the reply is the same with and without lookup.

The idea is prompt lookup decoding, an n-gram form of speculative decoding (Leviathan et al., "Fast
Inference from Transformers via Speculative Decoding", arXiv 2211.17192).
"""

from __future__ import annotations

from collections.abc import Sequence

_LONGEST, _SHORTEST = 4, 2
"""How many of the last tokens must have come before, at most and at least."""


class Lookup:
    """What followed each run of tokens of one sequence, the latest time that it came."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._end_of: dict[tuple[int, ...], int] = {}  # runs, and the place behind each
        self._indexed = 0

    def guess(self, history: Sequence[int]) -> list[int]:
        """Up to `size` tokens that may follow; none where the last ones are new."""
        self._index(history)
        for length in range(_LONGEST, _SHORTEST - 1, -1):
            end = self._end_of.get(tuple(history[-length:]))
            if end is not None:
                return list(history[end : end + self._size])
        return []

    def _index(self, history: Sequence[int]) -> None:
        # All runs but those that end the sequence: nothing follows these.
        for end in range(self._indexed + 1, len(history)):
            for length in range(_SHORTEST, min(_LONGEST, end) + 1):
                self._end_of[tuple(history[end - length : end])] = end
        self._indexed = max(self._indexed, len(history) - 1)
