"""Prompt lookup: the next tokens of text are guessed from earlier text of the same sequence.

If the last tokens have occurred before, the tokens that followed them there are drafts: one step
computes them together with the newest token. Each position is sampled with the same random number
as without drafts. So the tokens up to and including the one that replaces the first wrong draft
equal those sampled one at a time; the rest is discarded. The reply is the same with and without
lookup.

The idea is prompt lookup decoding, an n-gram form of speculative decoding (Leviathan et al., "Fast
Inference from Transformers via Speculative Decoding", arXiv 2211.17192).
"""

from __future__ import annotations

from collections.abc import Sequence

_MAX_NGRAM, _MIN_NGRAM = 4, 2
"""The n-gram at the end of the sequence is looked up with these lengths, longest first."""


class Lookup:
    """Finds the last earlier occurrence of the n-gram at the end of one sequence."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._end_of_ngram: dict[tuple[int, ...], int] = {}  # index after its last occurrence
        self._indexed = 0

    def guess(self, history: Sequence[int]) -> list[int]:
        """The tokens, at most `size`, that followed the n-gram; none if it has not occurred."""
        self._index(history)
        for length in range(_MAX_NGRAM, _MIN_NGRAM - 1, -1):
            end = self._end_of_ngram.get(tuple(history[-length:]))
            if end is not None:
                return list(history[end : end + self._size])
        return []

    def _index(self, history: Sequence[int]) -> None:
        # Without the n-grams at the end of the sequence, as nothing follows them yet.
        for end in range(self._indexed + 1, len(history)):
            for length in range(_MIN_NGRAM, min(_MAX_NGRAM, end) + 1):
                self._end_of_ngram[tuple(history[end - length : end])] = end
        self._indexed = max(self._indexed, len(history) - 1)
