"""Several numbered lists as one: which of them holds a number, and at which index."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from itertools import accumulate


class Joined:
    """Lists of these sizes, one after another. Its length is the sum of them."""

    def __init__(self, sizes: Iterable[int]) -> None:
        self._ends = list(accumulate(sizes))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def find(self, number: int) -> tuple[int, int]:
        """The list that holds `number`, and the number within that list."""
        # `bisect_right` skips empty lists, which hold no number.
        index = bisect_right(self._ends, number)
        return index, number - (self._ends[index - 1] if index else 0)
