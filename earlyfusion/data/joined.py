"""Several numbered lists as one: which of them holds a number, and at which index."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from itertools import accumulate


class Joined:
    """Lists of these sizes, one after another."""

    def __init__(self, sizes: Iterable[int]) -> None:
        self._ends = list(accumulate(sizes))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def find(self, number: int) -> tuple[int, int]:
        """The list that holds `number`, and the number within that list."""
        # To the right of equal ends, as an empty list holds no number.
        which = bisect_right(self._ends, number)
        return which, number - (self._ends[which - 1] if which else 0)
