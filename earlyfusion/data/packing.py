"""Documents -> packed batches.

    document k -> pack into rows of `length` tokens -> PackedBatch

A stream of documents is a function from a number to a document, so that its whole state is one
integer, the number of the next document. Documents are never cut, and attend to themselves only.
Shapes: B rows of a batch, T tokens of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from earlyfusion.errors import DataError
from earlyfusion.processor import TokenSequence


class PackedBatch(NamedTuple):
    """`targets_BT` follow `tokens_BT`; `weight_BT` is the loss weight of each target.

    `document_BT` numbers the documents of a row; `positions_BT` count within a document.
    `image_BT` tells which targets belong to a picture. The rest of a row is a document of padding
    with weight 0.
    """

    tokens_BT: Tensor
    targets_BT: Tensor
    document_BT: Tensor
    positions_BT: Tensor
    weight_BT: Tensor
    image_BT: Tensor

    def to(self, device: torch.device) -> PackedBatch:
        return PackedBatch(*(t.to(device, non_blocking=True) for t in self))


@dataclass
class RoleWeights:
    """Loss weight of a target by what it is; control tokens that no answer needs stay at 0."""

    prompt_text: float = 0.0
    prompt_image: float = 0.0
    answer_text: float = 1.0
    answer_image: float = 1.0
    end: float = 1.0
    """The eos that closes the last answer."""

    def of(self, document: TokenSequence) -> np.ndarray:
        """Weights of the tokens of one document, float32 [n]."""
        by_role = (0.0, self.prompt_text, self.prompt_image, self.answer_text, self.answer_image)
        weights = np.asarray(by_role, np.float32)[np.asarray(document.role)]
        closing = (np.asarray(document.role) == 0) & (np.asarray(document.weights) > 0)
        return np.where(closing, np.float32(self.end), weights)


Stream = Callable[[int], TokenSequence]


class Rows(Protocol):
    """Where a training takes its batches from: a `Packer`, or rows made on the device."""

    cursor: int
    rows: int
    length: int
    share: tuple[int, int]

    def next(self) -> PackedBatch: ...


class Packer:
    """Fills batches from a stream, in order; `cursor` is the number of the next document.

    `share` (which, of how many) says whose rows these are: all processes walk the same documents
    and each keeps its own block of rows, so that the batch does not depend on their number.
    """

    def __init__(
        self, stream: Stream, weights: RoleWeights, rows: int, length: int, pad: int
    ) -> None:
        self.cursor = 0
        self.rows, self.length = rows, length
        self.share = (0, 1)
        self._stream, self._weights, self._pad = stream, weights, pad

    def next(self) -> PackedBatch:
        which, count = self.share
        own = self.rows // count
        rows = []
        for number in range(self.rows):
            documents = self._documents()
            if number // own == which:
                rows.append(pack_row(documents, self._weights, self.length, self._pad))
        return PackedBatch(*(torch.stack(t) for t in zip(*rows, strict=True)))

    def batches(self, documents: Sequence[TokenSequence], rows: int) -> Iterator[PackedBatch]:
        """These documents, each once, `rows` rows at a time: this process's share of them.

        Every process gets as many batches as the others: rows of padding fill up.
        """
        which, count = self.share
        packed, free = list[list[TokenSequence]](), 0
        for document in documents:
            needed = len(document) - 1
            if needed > free:
                packed.append([])
                free = self.length
            packed[-1].append(document)
            free -= needed
        packed += [[] for _ in range(-len(packed) % (count * rows))]
        for at in range(which * rows, len(packed), count * rows):
            made = [
                pack_row(row, self._weights, self.length, self._pad)
                for row in packed[at : at + rows]
            ]
            yield PackedBatch(*(torch.stack(t) for t in zip(*made, strict=True)))

    def _documents(self) -> list[TokenSequence]:
        """The documents of the next row."""
        documents: list[TokenSequence] = []
        free = self.length
        while True:
            document = self._stream(self.cursor)
            needed = len(document) - 1
            if needed > self.length:
                raise DataError(
                    f"document {self.cursor} has {needed + 1} tokens, limit {self.length + 1}: "
                    f"raise the row length or leave it out"
                )
            if needed > free:
                return documents
            documents.append(document)
            free -= needed
            self.cursor += 1


def pack_row(
    documents: list[TokenSequence], weights: RoleWeights, length: int, pad: int
) -> list[Tensor]:
    """One row of a `PackedBatch`: documents one after another, then padding."""
    columns: list[np.ndarray] = [np.zeros((6, 0), np.float64)]
    for number, document in enumerate(documents):
        ids, role = np.asarray(document.ids), np.asarray(document.role)
        n = len(ids) - 1
        image = (role[1:] == 2) | (role[1:] == 4)
        places = (ids[:-1], ids[1:], np.full(n, number), np.arange(n), weights.of(document)[1:])
        columns.append(np.stack([*places, image]).astype(np.float64))
    row = np.concatenate(columns, 1)
    rest = length - row.shape[1]
    filler = np.stack([np.full(rest, v) for v in (pad, pad, len(documents), 0, 0, 0)])
    filler[3] = np.arange(rest)
    table = torch.from_numpy(np.concatenate([row, filler], 1))
    kinds = (torch.long, torch.long, torch.long, torch.long, torch.float32, torch.bool)
    return [column.to(kind) for column, kind in zip(table, kinds, strict=True)]
