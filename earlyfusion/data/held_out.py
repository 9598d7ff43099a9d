"""Which documents are held out of training, for validation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from earlyfusion.data.mixture import Documents
from earlyfusion.errors import DataError, SettingError
from earlyfusion.fields import check_at_least
from earlyfusion.processor import TokenSequence

MAX_DOCUMENTS = 500
"""The number of held-out rows that are measured; of more rows, this number, evenly spread."""


@dataclass
class ValidationConfig:
    """Which rows are held out, and how often their loss is measured. The run's model is the one
    with the lowest loss."""

    validation: float = 0.0
    """Share of each source's rows that is held out; 0: none."""
    validation_data: tuple[str, ...] = ()
    """Sources that are only measured, as `data` names them."""
    validate_every: int = 0
    """Steps between checks, also after the last step; 0: as often as `run.save_every`."""
    patience: int = 0
    """End the run after this number of checks in a row without a lower loss; 0: never."""

    def __post_init__(self) -> None:
        if not 0 <= self.validation < 1:
            raise SettingError(f"validation={self.validation} is not a share: give 0 up to under 1")
        if self.validation and self.validation_data:
            raise SettingError(
                f"validation={self.validation} and validation_data: give a share or files, not both"
            )
        check_at_least(self, validate_every=0, patience=0)
        if (self.patience or self.validate_every) and not self.is_on:
            raise SettingError(
                f"patience={self.patience} and validate_every={self.validate_every} need documents "
                "to measure: give validation=0.05 or validation_data=PATH"
            )

    @property
    def is_on(self) -> bool:
        """Whether any documents are held out."""
        return self.validation > 0 or bool(self.validation_data)


def held_out_numbers(size: int, share: float, seed: int, source: int) -> np.ndarray:
    """Numbers of the held-out rows, ascending, of source number `source`, which has `size` rows. At
    least one if it has two rows or more, and never all of them."""
    # The 11 keeps these random numbers apart from others of the same seed.
    count = min(size - 1, max(1, round(share * size))) if share else 0
    chosen = np.random.default_rng([seed, 11, source]).permutation(size)[:count]
    return np.sort(chosen)


def held_out_documents(held_out: Sequence[tuple[Documents, np.ndarray]]) -> list[TokenSequence]:
    """The documents of the held-out rows of each source, of at most `MAX_DOCUMENTS` rows (a long
    row has several pieces). Raises `DataError` if no row is usable."""
    rows = [(documents, int(number)) for documents, numbers in held_out for number in numbers]
    indices = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), MAX_DOCUMENTS)).round())
    chosen = [rows[int(index)] for index in indices]
    pieces = [piece for documents, number in chosen for piece in documents.pieces(number)]
    if not pieces:
        raise DataError(
            f"none of {len(chosen)} held-out rows can be used: raise validation, or give "
            "validation_data=PATH instead"
        )
    return pieces
