"""Documents -> packed batches.

    document number -> rows of `length` tokens, each of several whole documents -> PackedBatch

A stream of documents is a function from a number to a document, so its whole state is the number of
the next document. Documents are never split, and attend to themselves only.
"""

# Shapes: B rows of a batch, T tokens of a row.

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from earlyfusion.errors import DataError, SettingError
from earlyfusion.processor import (
    ANSWER_IMAGE,
    ANSWER_TEXT,
    END,
    PROMPT_IMAGE,
    PROMPT_TEXT,
    TokenSequence,
)


class PackedBatch(NamedTuple):
    """Rows of packed documents; the rest of a row is a document of padding with weight 0."""

    tokens_BT: Tensor
    targets_BT: Tensor
    """The token after each of `tokens_BT`."""
    document_BT: Tensor
    """Number of the document within its row."""
    positions_BT: Tensor
    """Position within the document."""
    weight_BT: Tensor
    """Loss weight of each target, float32."""
    image_BT: Tensor
    """Whether the target belongs to an image, bool."""

    def to(self, device: torch.device) -> PackedBatch:
        return PackedBatch(*(t.to(device, non_blocking=True) for t in self))


@dataclass
class RoleWeights:
    """Loss weight of a target by its role; control tokens other than the closing eos stay at 0."""

    prompt_text: float = 0.0
    """Loss weight of the text of prompts."""
    prompt_image: float = 0.0
    """Loss weight of the images of prompts."""
    answer_text: float = 1.0
    """Loss weight of the text of answers and plain documents."""
    answer_image: float = 1.0
    """Loss weight of the images of answers and plain documents."""
    end: float = 1.0
    """Loss weight of the eos that closes the last answer."""

    def __post_init__(self) -> None:
        for name, weight in asdict(self).items():
            if not 0 <= weight < math.inf:
                raise SettingError(f"{name}={weight} is not a weight of the loss: give 0 or more")

    def of(self, role: Sequence[int] | np.ndarray) -> np.ndarray:
        """Weights of tokens by their roles: float32 [n]."""
        by_role = np.zeros(END + 1, np.float32)
        by_role[PROMPT_TEXT], by_role[PROMPT_IMAGE] = self.prompt_text, self.prompt_image
        by_role[ANSWER_TEXT], by_role[ANSWER_IMAGE] = self.answer_text, self.answer_image
        by_role[END] = self.end
        return by_role[np.asarray(role, np.intp)]


Stream = Callable[[int], TokenSequence]
Share = tuple[int, int]  # the rank of a process, and the number of processes


class BatchSource(Protocol):
    """Where a training takes its batches from: a `Packer`, or rows made on the device."""

    cursor: int
    """The number of the next document."""
    rows: int
    """Rows of a step, over all processes."""
    length: int
    """Tokens of a row."""

    @property
    def share(self) -> Share: ...
    def next(self) -> PackedBatch: ...
    def for_share(self, share: Share) -> BatchSource: ...


class Packer:
    """Packs the documents of a stream into batches, in order. `cursor` is the number of the next
    document. All processes go through the same documents, and each keeps its own block of rows, its
    `share`, so the contents of a step do not depend on the number of processes."""

    def __init__(
        self,
        stream: Stream,
        weights: RoleWeights,
        rows: int,
        length: int,
        pad: int,
        share: Share = (0, 1),
    ) -> None:
        self.cursor = 0
        self.rows, self.length, self.share = rows, length, share
        self._stream, self._weights, self._pad = stream, weights, pad
        # The document that did not fit into the last row, and its number.
        self._fetched: tuple[int, TokenSequence] | None = None

    def for_share(self, share: Share) -> Packer:
        """A packer of the same stream, at the same document, that keeps another share."""
        packer = Packer(self._stream, self._weights, self.rows, self.length, self._pad, share)
        packer.cursor = self.cursor
        return packer

    def next(self) -> PackedBatch:
        """This process's rows of the next step. Raises `DataError` for a document longer than a
        row."""
        # Documents of other processes' rows are read, to know where a row ends, but not packed.
        rank, world_size = self.share
        size = self.rows // world_size
        rows = [self._row() for _ in range(self.rows)]
        return self._pack(rows[rank * size : (rank + 1) * size])

    def batches(self, documents: Sequence[TokenSequence], rows: int) -> Iterator[PackedBatch]:
        """This process's share of these documents, each packed once, in batches of `rows` rows.
        Every process gets equally many batches: the last ones are filled with rows of padding."""
        rank, world_size = self.share
        # Rows are filled in the order of the documents, so that a measurement does not depend on
        # `rows`.
        packed, free = list[list[TokenSequence]](), 0
        for document in documents:
            needed = len(document) - 1
            if needed > free:
                packed.append([])
                free = self.length
            packed[-1].append(document)
            free -= needed
        packed += [[] for _ in range(-len(packed) % (world_size * rows))]
        for first in range(rank * rows, len(packed), world_size * rows):
            yield self._pack(packed[first : first + rows])

    def _row(self) -> list[TokenSequence]:
        """The documents of the next row: as many as fit."""
        documents: list[TokenSequence] = []
        free = self.length
        while True:
            document = self._next_document()
            # The last token of a document is only a target, so it needs no position.
            needed = len(document) - 1
            if needed > self.length:
                raise DataError(
                    f"document {self.cursor} has {needed + 1} tokens, limit {self.length + 1}: "
                    f"raise the row length or leave it out"
                )
            if needed > free:
                self._fetched = self.cursor, document
                return documents
            documents.append(document)
            free -= needed
            self.cursor += 1

    def _next_document(self) -> TokenSequence:
        # A run that resumes or rolls back sets `cursor`: the held document may be another one.
        if self._fetched is not None and self._fetched[0] == self.cursor:
            return self._fetched[1]
        return self._stream(self.cursor)

    def _pack(self, rows: Sequence[Sequence[TokenSequence]]) -> PackedBatch:
        return pack_rows(rows, self._weights, self.length, self._pad)


def pack_rows(
    rows: Sequence[Sequence[TokenSequence]], weights: RoleWeights, length: int, pad: int
) -> PackedBatch:
    """A batch of rows, each of several documents one after another, and then padding. Each document
    has `len(document) - 1` positions, as its last token is only a target."""
    shape = len(rows), length
    tokens_BT, targets_BT = np.full(shape, pad, np.int64), np.full(shape, pad, np.int64)
    document_BT, positions_BT = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    weight_BT, image_BT = np.zeros(shape, np.float32), np.zeros(shape, np.bool_)
    for row, documents in enumerate(rows):
        start = 0
        for number, document in enumerate(documents):
            span = slice(start, start + len(document) - 1)
            ids, role = np.asarray(document.ids), np.asarray(document.role)
            tokens_BT[row, span], targets_BT[row, span] = ids[:-1], ids[1:]
            document_BT[row, span], positions_BT[row, span] = number, np.arange(len(ids) - 1)
            weight_BT[row, span] = weights.of(role[1:])
            image_BT[row, span] = (role[1:] == PROMPT_IMAGE) | (role[1:] == ANSWER_IMAGE)
            start = span.stop
        # Padding is one more document, so that no real one attends to it.
        document_BT[row, start:] = len(documents)
        positions_BT[row, start:] = np.arange(length - start)
    columns = (tokens_BT, targets_BT, document_BT, positions_BT, weight_BT, image_BT)
    return PackedBatch(*map(torch.from_numpy, columns))
