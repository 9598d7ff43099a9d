"""Packed rows of fixed shape, assembled on the device from documents that are kept there.

Documents are templates: text as tokens, and for each image only its number. The CPU sends two
integers per position. The device looks up the codes of a random variant of each image (an augmented
version of it), and replaces some of the input codes; the targets stay unchanged.
`DeviceRows` is a `data.packing.Rows`, like `Packer`. A batch depends only on the seed and the
number of its first document.
"""

# Shapes: B rows, T tokens of a row, M positions of all templates, P images, V variants of each, C
# codes of one, K codebook.

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from earlyfusion.data.packing import PackedBatch, RoleWeights, Share
from earlyfusion.errors import DataError, SettingError
from earlyfusion.files import replacing
from earlyfusion.processor import ANSWER_IMAGE, PROMPT_IMAGE, TokenSequence

NONE = -1
_CHUNK = 1000  # documents per computation of columns


class Columns(NamedTuple):
    """One entry per position of all documents in order; arrays, or device tensors. If the position
    holds a code, `picture_M` is the number of its image (elsewhere `NONE`), `offset_M` the index
    of the code in the image, and `slot_M` the index of the image in its document. `plain_M`:
    only variants in the image's own colours may be used. `answer_M`: it is in an answer. The names
    are also those of the arrays in a file of templates."""

    ids_M: Any
    picture_M: Any
    offset_M: Any
    slot_M: Any
    plain_M: Any
    answer_M: Any
    image_M: Any
    weight_M: Any


class Templates(NamedTuple):
    """Document d has the entries `starts[d]` to `starts[d + 1]` of the columns."""

    columns: Columns
    starts: np.ndarray


def templates(
    documents: Iterable[tuple[TokenSequence, Sequence[int], bool]],
    codes: int,
    is_code: np.ndarray,
    weights: RoleWeights,
) -> Templates:
    """Templates of documents: tokens, the numbers of their images in order, and whether plain.
    `codes` is the number of codes of an image; `is_code` says for each token id whether it is a
    code. Raises `DataError` if a document's codes do not match its images."""
    blocks: list[Columns] = []
    lengths = [0]
    stream = iter(documents)
    while chunk := list(islice(stream, _CHUNK)):
        blocks.append(_columns(chunk, codes, is_code, weights))
        lengths += [len(sequence) for sequence, _, _ in chunk]
    if not blocks:
        raise DataError("0 documents cannot be trained on: give at least one")
    return Templates(Columns(*map(np.concatenate, zip(*blocks, strict=True))), np.cumsum(lengths))


def save_templates(path: Path, templates: Templates) -> None:
    """Write templates to a file, from which another process takes them with `load_templates`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial, partial.open("wb") as file:
        np.savez(file, starts=templates.starts, **templates.columns._asdict())


def load_templates(path: Path) -> Templates:
    """The templates that `save_templates` wrote."""
    with np.load(path) as arrays:
        return Templates(Columns(*(arrays[name] for name in Columns._fields)), arrays["starts"])


def _columns(
    documents: list[tuple[TokenSequence, Sequence[int], bool]],
    codes: int,
    is_code: np.ndarray,
    weights: RoleWeights,
) -> Columns:
    """The columns of some documents at once: one document at a time takes minutes."""
    joined = TokenSequence()
    for sequence, _, _ in documents:
        joined.ids += sequence.ids
        joined.role += sequence.role
    ids, role = np.asarray(joined.ids, np.int32), np.asarray(joined.role, np.uint8)
    holds_code = is_code[ids]
    image_numbers = np.asarray([n for _, numbers, _ in documents for n in numbers], np.int32)
    if holds_code.sum() != codes * len(image_numbers):
        raise DataError(
            f"documents have {holds_code.sum()} codes and {len(image_numbers)} images of {codes}: "
            "give the number of each image, in order"
        )
    slots = [slot for _, numbers, _ in documents for slot in range(len(numbers))]
    number = np.full(len(ids), NONE, np.int32)
    offset, slot = np.full((2, len(ids)), NONE, np.int16)
    number[holds_code] = np.repeat(image_numbers, codes)
    offset[holds_code] = np.tile(np.arange(codes, dtype=np.int16), len(image_numbers))
    slot[holds_code] = np.repeat(np.asarray(slots, np.int16), codes)
    lengths = [len(sequence) for sequence, _, _ in documents]
    return Columns(
        ids_M=ids,
        picture_M=number,
        offset_M=offset,
        slot_M=slot.clip(0),
        plain_M=np.repeat(np.asarray([plain for _, _, plain in documents], bool), lengths),
        answer_M=role == ANSWER_IMAGE,
        image_M=(role == PROMPT_IMAGE) | (role == ANSWER_IMAGE),
        weight_M=weights.of(role),
    )


@dataclass
class CodeNoiseConfig:
    """Noise in the image codes of rows, and variants of the images in answers."""

    replace: float = 0.0
    """Share of the input codes that are replaced by other codes; the targets stay."""
    replace_prompts: float | None = None
    """The share for images in prompts, if it differs from that in answers."""
    near: float = 0.5
    """Share of the replaced codes that become one of the nearest codewords; the rest become any."""
    changed_answers: float = 0.0
    """Share of the images in answers that are augmented in the same colours, instead of exact."""
    swapped_answers: float = 0.0
    """Share of the images in answers whose input codes are those of another image up to a random
    position; the targets stay. There the model has to follow the request, not the codes so far."""

    def __post_init__(self) -> None:
        for name in ("replace", "replace_prompts", "near", "changed_answers", "swapped_answers"):
            if not 0 <= (getattr(self, name) or 0) <= 1:
                raise SettingError(f"{name}={getattr(self, name)} must be a share from 0 to 1")

    @property
    def in_prompts(self) -> float:
        return self.replace if self.replace_prompts is None else self.replace_prompts


class DeviceRows:
    """Fills batches from templates, in a new random order each epoch. `codes_PVC` are the codes of
    all variants of the images, on the device: variant 0 is exact, the first `plain` ones keep the
    colours. `tokens_K` are the tokens of the codes, `near_KN` the codes nearest to each."""

    def __init__(
        self,
        templates: Templates,
        codes_PVC: Tensor,
        plain: int,
        tokens_K: Tensor,
        near_KN: Tensor,
        rows: int,
        length: int,
        pad: int,
        config: CodeNoiseConfig,
        seed: int = 0,
    ) -> None:
        self.cursor, self.share = 0, (0, 1)
        self.rows, self.length = rows, length
        self._config, self._seed, self._plain, self._pad = config, seed, plain, pad
        self._device = device = codes_PVC.device
        self._codes_PVC = codes_PVC
        self._tokens_K, self._near_KN = tokens_K.to(device), near_KN.to(device)
        self._starts = templates.starts
        self._lengths = np.diff(templates.starts) - 1  # targets of each document
        longest = int(self._lengths.max())
        if longest > length:
            raise DataError(
                f"a document has {longest + 1} tokens, limit {length + 1}: raise length or leave "
                "it out"
            )
        self._columns = Columns(*(torch.from_numpy(c).to(device) for c in templates.columns))
        # Of the array: of the tensor, every batch would wait for the device.
        self._slots = int(templates.columns.slot_M.max()) + 1
        self._order: tuple[int, np.ndarray] = (NONE, np.zeros(0, np.int64))

    def for_share(self, share: Share) -> DeviceRows:
        """These rows; `SettingError` unless one process takes them all."""
        if share != (0, 1):
            raise SettingError(
                f"rows made on the device are those of one process, not of {share[1]}: start one"
            )
        return self

    def next(self) -> PackedBatch:
        first = self.cursor
        where, documents = zip(*(self._row() for _ in range(self.rows)), strict=True)
        where_BT = torch.from_numpy(np.stack(where)).to(self._device, non_blocking=True)
        document_BT = torch.from_numpy(np.stack(documents)).to(self._device, non_blocking=True)
        return self._fill(where_BT, document_BT, first)

    def _row(self) -> tuple[np.ndarray, np.ndarray]:
        """The template entry of each position of a row (`NONE`: padding), and its document."""
        chosen: list[int] = []
        free = self.length  # a document that does not fit starts the next row
        while (needed := self._lengths[number := self._document(self.cursor)]) <= free:
            chosen.append(number)
            free -= needed
            self.cursor += 1
        where = np.full(self.length, NONE, np.int64)
        documents = np.full(self.length, len(chosen), np.int64)
        lengths = self._lengths[chosen]
        ends = lengths.cumsum()
        used = int(ends[-1])
        documents[:used] = np.repeat(np.arange(len(chosen)), lengths)
        where[:used] = np.arange(used) + np.repeat(self._starts[chosen] - (ends - lengths), lengths)
        return where, documents

    def _document(self, number: int) -> int:
        """The template that is document `number` of the endless stream."""
        epoch, rank = divmod(number, len(self._lengths))
        if self._order[0] != epoch:
            rng = np.random.default_rng([self._seed, 11, epoch])
            self._order = epoch, rng.permutation(len(self._lengths))
        return int(self._order[1][rank])

    def _fill(self, where_BT: Tensor, document_BT: Tensor, first: int) -> PackedBatch:
        generator = torch.Generator(self._device)
        generator.manual_seed(self._seed * 1_000_003 + first)
        shape = (self.rows, self.length + 1, self._slots, 2)
        uniform_BDS2 = torch.rand(shape, generator=generator, device=self._device)
        filled_BT = where_BT >= 0
        # Targets are the next entries: a document has one token more than positions in a row.
        inputs_BT, targets_BT = (
            self._tokens(where_BT.clamp_min(0) + ahead, document_BT, uniform_BDS2)
            for ahead in (0, 1)
        )
        inputs_BT = self._swap_answers(inputs_BT, where_BT.clamp_min(0), document_BT, generator)
        inputs_BT = self._replace_codes(inputs_BT, where_BT.clamp_min(0), generator)
        weight_BT = self._columns.weight_M[where_BT.clamp_min(0) + 1]
        image_BT = self._columns.image_M[where_BT.clamp_min(0) + 1]
        return PackedBatch(
            torch.where(filled_BT, inputs_BT, self._pad),
            torch.where(filled_BT, targets_BT, self._pad),
            document_BT,
            _positions(document_BT),
            weight_BT * filled_BT,
            image_BT & filled_BT,
        )

    def _tokens(self, where_BT: Tensor, document_BT: Tensor, uniform_BDS2: Tensor) -> Tensor:
        """Tokens of template entries, each image in a random variant."""
        t = self._columns
        number_BT = t.picture_M[where_BT]
        first_BT, second_BT = self._by_image(uniform_BDS2, where_BT, document_BT).unbind(-1)
        variants_BT = torch.where(t.plain_M[where_BT], self._plain, self._codes_PVC.shape[1])
        any_BT = (first_BT * variants_BT).long()
        others = max(1, self._plain - 1)
        plain_BT = (1 + (first_BT * others).long()).clamp_max(self._plain - 1)
        exact_BT = second_BT >= self._config.changed_answers
        in_answer_BT = torch.where(exact_BT, 0, plain_BT)
        variant_BT = torch.where(t.answer_M[where_BT], in_answer_BT, any_BT)
        offset_BT = t.offset_M[where_BT].clamp_min(0).long()
        code_BT = self._codes_PVC[number_BT.clamp_min(0).long(), variant_BT, offset_BT].long()
        return torch.where(number_BT >= 0, self._tokens_K[code_BT], t.ids_M[where_BT].long())

    def _by_image(self, values_BDSN: Tensor, where_BT: Tensor, document_BT: Tensor) -> Tensor:
        """The N values of the image of each entry: all codes of one image share them."""
        row_BT = torch.arange(len(where_BT), device=self._device)[:, None].expand_as(where_BT)
        return values_BDSN[row_BT, document_BT, self._columns.slot_M[where_BT].long()]

    def _swap_answers(
        self, tokens_BT: Tensor, where_BT: Tensor, document_BT: Tensor, generator: torch.Generator
    ) -> Tensor:
        """The tokens, with the first codes of some images in answers taken from other images."""
        share = self._config.swapped_answers
        if not share:
            return tokens_BT
        t, (images, _, codes) = self._columns, self._codes_PVC.shape
        shape = (self.rows, self.length + 1, self._slots, 3)
        uniform_BDS3 = torch.rand(shape, generator=generator, device=self._device)
        uniform_BT3 = self._by_image(uniform_BDS3, where_BT, document_BT)
        chosen_BT, other_BT, end_BT = uniform_BT3.unbind(-1)
        offset_BT = t.offset_M[where_BT].long()
        swapped_BT = (chosen_BT < share) & t.answer_M[where_BT] & (offset_BT >= 0)
        swapped_BT &= offset_BT <= end_BT * codes
        other_BT = (other_BT * images).long()
        codes_BT = self._codes_PVC[other_BT, 0, offset_BT.clamp_min(0)].long()
        return torch.where(swapped_BT, self._tokens_K[codes_BT], tokens_BT)

    def _replace_codes(
        self, tokens_BT: Tensor, where_BT: Tensor, generator: torch.Generator
    ) -> Tensor:
        """The tokens, with some codes replaced by near or arbitrary codes."""
        if not self._config.replace and not self._config.in_prompts:
            return tokens_BT
        uniform = torch.rand(4, *tokens_BT.shape, generator=generator, device=self._device)
        codes = len(self._tokens_K)
        code_BT = self._code_of_token[tokens_BT]
        near_BT = self._near_KN[
            code_BT.clamp_min(0), (uniform[0] * self._near_KN.shape[1]).long()
        ].long()
        other_BT = torch.where(uniform[1] < self._config.near, near_BT, (uniform[2] * codes).long())
        share_BT = torch.where(
            self._columns.answer_M[where_BT], self._config.replace, self._config.in_prompts
        )
        replaced = (uniform[3] < share_BT) & (self._columns.picture_M[where_BT] >= 0)
        return torch.where(replaced, self._tokens_K[other_BT], tokens_BT)

    @property
    def _code_of_token(self) -> Tensor:
        # Built at the first use, and only if codes are replaced.
        if not hasattr(self, "_codes_T"):
            size = int(max(self._tokens_K.max(), self._columns.ids_M.max())) + 1
            table = torch.full((size,), NONE, dtype=torch.long, device=self._device)
            table[self._tokens_K] = torch.arange(len(self._tokens_K), device=self._device)
            self._codes_T = table
        return self._codes_T


def _positions(document_BT: Tensor) -> Tensor:
    at_BT = torch.arange(document_BT.shape[1], device=document_BT.device).expand_as(document_BT)
    begins_BT = torch.ones_like(document_BT, dtype=torch.bool)
    begins_BT[:, 1:] = document_BT[:, 1:] != document_BT[:, :-1]
    return at_BT - torch.where(begins_BT, at_BT, 0).cummax(1).values
