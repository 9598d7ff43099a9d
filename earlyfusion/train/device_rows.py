"""Packed rows of fixed shape, assembled on the device from documents that are kept there.

Documents are kept as templates: text as tokens, and for each image only its number. For a batch the
CPU sends two integers per position. The device looks up the codes of a random variant of each image
(an augmented version of it), and replaces some of the input codes; the targets do not change.
`DeviceRows` is a `data.packing.BatchSource`, like `Packer`. A batch depends only on the seed and
the number of its first document."""

# Shapes: B rows, T tokens of a row, D documents of a row, S images of a document, M tokens of all
# templates, P images, V variants of each, C codes of one, K codebook, N nearest codes. Names with
# `_u_` are random numbers, uniform in [0, 1).

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from earlyfusion.data.packing import PackedBatch, RoleWeights, Share
from earlyfusion.errors import DataError, SettingError
from earlyfusion.fields import check_shares
from earlyfusion.files import replacing
from earlyfusion.processor import ANSWER_IMAGE, PROMPT_IMAGE, TokenSequence

NONE = -1
_CHUNK = 1000  # documents whose columns are computed together


class Columns(NamedTuple):
    """One entry per token of all documents in order: NumPy arrays, or tensors on the device. The
    names are also those of the arrays in a file of templates."""

    ids_M: Any
    """Token id; for a code any token, as the code is looked up."""
    picture_M: Any
    """For a code, the number of its image; elsewhere `NONE`."""
    offset_M: Any
    """For a code, its index in the image; elsewhere `NONE`."""
    slot_M: Any
    """For a code, the index of its image in the document; elsewhere 0."""
    plain_M: Any
    """Whether images of the document must keep their colours (bool)."""
    answer_M: Any
    """Whether it is part of an image in an answer (bool)."""
    image_M: Any
    """Whether it is part of an image (bool)."""
    weight_M: Any
    """Its weight in the loss."""


class Templates(NamedTuple):
    """Document d has the entries `starts[d]` to `starts[d + 1] - 1` of the columns."""

    columns: Columns
    starts: np.ndarray


def templates(
    documents: Iterable[tuple[TokenSequence, Sequence[int], bool]],
    codes_per_image: int,
    is_code: np.ndarray,
    weights: RoleWeights,
) -> Templates:
    """Templates of documents. Each is given as its tokens, the numbers of its images in order, and
    whether these must keep their colours. `is_code` says for each token id whether it is a code.
    Raises `DataError` if there are no documents, or if their codes do not match their images."""
    chunks: list[Columns] = []
    lengths = [0]
    stream = iter(documents)
    while chunk := list(islice(stream, _CHUNK)):
        chunks.append(_columns(chunk, codes_per_image, is_code, weights))
        lengths += [len(sequence) for sequence, _, _ in chunk]
    if not chunks:
        raise DataError("0 documents cannot be trained on: give at least one")
    return Templates(Columns(*map(np.concatenate, zip(*chunks, strict=True))), np.cumsum(lengths))


def save_templates(path: Path, templates: Templates) -> None:
    """Write templates to a file, from which another process reads them with `load_templates`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial, partial.open("wb") as file:
        np.savez(file, starts=templates.starts, **templates.columns._asdict())


def load_templates(path: Path) -> Templates:
    """The templates that `save_templates` wrote."""
    with np.load(path) as arrays:
        return Templates(Columns(*(arrays[name] for name in Columns._fields)), arrays["starts"])


def _columns(
    documents: list[tuple[TokenSequence, Sequence[int], bool]],
    codes_per_image: int,
    is_code: np.ndarray,
    weights: RoleWeights,
) -> Columns:
    """The columns of several documents together, because a corpus converted one document at a time
    takes minutes."""
    joined = TokenSequence()
    for sequence, _, _ in documents:
        joined.ids += sequence.ids
        joined.role += sequence.role
    ids, role = np.asarray(joined.ids, np.int32), np.asarray(joined.role, np.uint8)
    code_M = is_code[ids]
    image_numbers = np.asarray([n for _, numbers, _ in documents for n in numbers], np.int32)
    if code_M.sum() != codes_per_image * len(image_numbers):
        raise DataError(
            f"documents have {code_M.sum()} codes and {len(image_numbers)} images of "
            f"{codes_per_image}: give the number of each image, in order"
        )
    slots = [slot for _, numbers, _ in documents for slot in range(len(numbers))]
    number, offset = np.full(len(ids), NONE, np.int32), np.full(len(ids), NONE, np.int16)
    slot = np.zeros(len(ids), np.int16)
    number[code_M] = np.repeat(image_numbers, codes_per_image)
    offset[code_M] = np.tile(np.arange(codes_per_image, dtype=np.int16), len(image_numbers))
    slot[code_M] = np.repeat(np.asarray(slots, np.int16), codes_per_image)
    lengths = [len(sequence) for sequence, _, _ in documents]
    return Columns(
        ids_M=ids,
        picture_M=number,
        offset_M=offset,
        slot_M=slot,
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
    position; the targets stay. For these the model must follow the request, not the codes so far.
    """

    def __post_init__(self) -> None:
        check_shares(self, "replace", "near", "changed_answers", "swapped_answers")
        if self.replace_prompts is not None:
            check_shares(self, "replace_prompts")

    @property
    def in_prompts(self) -> float:
        """The share of input codes that are replaced in images of prompts."""
        return self.replace if self.replace_prompts is None else self.replace_prompts


class DeviceRows:
    """Packs batches of `rows` rows of `length` tokens from templates, in a new random order each
    epoch. `cursor` is the number of the next document.

    `codes_PVC` are the codes of all variants of the images, on the device: variant 0 is the image
    itself, and the first `plain` variants keep its colours. `tokens_K` are the tokens of the codes,
    and `near_KN` the codes nearest to each. Raises `DataError` if a document is longer than a row.
    """

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
        # The most images of a document. Read from the array: the tensor would wait for the device.
        self._max_images = int(templates.columns.slot_M.max()) + 1
        # The epoch of the last document, and the order of that epoch's documents.
        self._order: tuple[int, np.ndarray] = (NONE, np.zeros(0, np.int64))

    def for_share(self, share: Share) -> DeviceRows:
        """These rows. Raises `SettingError` unless `share` is that of a single process."""
        if share != (0, 1):
            raise SettingError(
                f"rows made on the device are those of one process, not of {share[1]}: start one"
            )
        return self

    def next(self) -> PackedBatch:
        """The next batch, on the device."""
        first_document = self.cursor
        entries, documents = zip(*(self._row() for _ in range(self.rows)), strict=True)
        entry_BT = torch.from_numpy(np.stack(entries)).to(self._device, non_blocking=True)
        document_BT = torch.from_numpy(np.stack(documents)).to(self._device, non_blocking=True)
        return self._batch(entry_BT, document_BT, first_document)

    def _row(self) -> tuple[np.ndarray, np.ndarray]:
        """For each position of a row its entry in the columns (`NONE`: padding), and the number of
        its document within the row."""
        chosen: list[int] = []
        free = self.length  # a document that does not fit starts the next row
        while (length := self._lengths[number := self._template(self.cursor)]) <= free:
            chosen.append(number)
            free -= length
            self.cursor += 1
        entries = np.full(self.length, NONE, np.int64)
        documents = np.full(self.length, len(chosen), np.int64)
        lengths = self._lengths[chosen]
        ends = lengths.cumsum()
        used = int(ends[-1])
        documents[:used] = np.repeat(np.arange(len(chosen)), lengths)
        first_entries = self._starts[chosen] - (ends - lengths)
        entries[:used] = np.arange(used) + np.repeat(first_entries, lengths)
        return entries, documents

    def _template(self, number: int) -> int:
        """The index of the template of document `number`; documents are numbered through all
        epochs."""
        epoch, position = divmod(number, len(self._lengths))
        if self._order[0] != epoch:
            rng = np.random.default_rng([self._seed, 11, epoch])
            self._order = epoch, rng.permutation(len(self._lengths))
        return int(self._order[1][position])

    def _batch(self, entry_BT: Tensor, document_BT: Tensor, first_document: int) -> PackedBatch:
        """The batch at these entries. `first_document` is the number of its first document, which
        sets the random numbers."""
        generator = torch.Generator(self._device)
        generator.manual_seed(self._seed * 1_000_003 + first_document)
        shape = (self.rows, self.length + 1, self._max_images, 2)
        uniform_BDS2 = torch.rand(shape, generator=generator, device=self._device)
        filled_BT, entry_BT = entry_BT >= 0, entry_BT.clamp_min(0)
        # A document of n tokens takes n - 1 positions: the last token is only a target.
        inputs_BT = self._tokens(entry_BT, document_BT, uniform_BDS2)
        targets_BT = self._tokens(entry_BT + 1, document_BT, uniform_BDS2)
        inputs_BT = self._swap_answers(inputs_BT, entry_BT, document_BT, generator)
        inputs_BT = self._replace_codes(inputs_BT, entry_BT, generator)
        weight_BT = self._columns.weight_M[entry_BT + 1]
        image_BT = self._columns.image_M[entry_BT + 1]
        return PackedBatch(
            torch.where(filled_BT, inputs_BT, self._pad),
            torch.where(filled_BT, targets_BT, self._pad),
            document_BT,
            _positions(document_BT),
            weight_BT * filled_BT,
            image_BT & filled_BT,
        )

    def _tokens(self, entry_BT: Tensor, document_BT: Tensor, uniform_BDS2: Tensor) -> Tensor:
        """The tokens at these entries, with each image in a variant that its two random numbers
        (uniform in [0, 1)) choose."""
        columns = self._columns
        number_BT = columns.picture_M[entry_BT]
        variant_u_BT, change_u_BT = self._by_image(uniform_BDS2, entry_BT, document_BT).unbind(-1)
        num_variants_BT = torch.where(
            columns.plain_M[entry_BT], self._plain, self._codes_PVC.shape[1]
        )
        prompt_BT = (variant_u_BT * num_variants_BT).long()
        # Variants 1 to plain - 1 are augmented in the same colours.
        num_augmented = max(1, self._plain - 1)
        augmented_BT = (1 + (variant_u_BT * num_augmented).long()).clamp_max(self._plain - 1)
        answer_BT = torch.where(change_u_BT >= self._config.changed_answers, 0, augmented_BT)
        variant_BT = torch.where(columns.answer_M[entry_BT], answer_BT, prompt_BT)
        offset_BT = columns.offset_M[entry_BT].clamp_min(0).long()
        code_BT = self._codes_PVC[number_BT.clamp_min(0).long(), variant_BT, offset_BT].long()
        return torch.where(number_BT >= 0, self._tokens_K[code_BT], columns.ids_M[entry_BT].long())

    def _by_image(self, values_BDSn: Tensor, entry_BT: Tensor, document_BT: Tensor) -> Tensor:
        """The n values of the image at each entry, [B, T, n]: all codes of an image share them."""
        row_BT = torch.arange(len(entry_BT), device=self._device)[:, None].expand_as(entry_BT)
        return values_BDSn[row_BT, document_BT, self._columns.slot_M[entry_BT].long()]

    def _swap_answers(
        self, tokens_BT: Tensor, entry_BT: Tensor, document_BT: Tensor, generator: torch.Generator
    ) -> Tensor:
        """The tokens, with the first codes of some images in answers taken from other images."""
        share = self._config.swapped_answers
        if not share:
            return tokens_BT
        columns, (num_images, _, num_codes) = self._columns, self._codes_PVC.shape
        shape = (self.rows, self.length + 1, self._max_images, 3)
        uniform_BDS3 = torch.rand(shape, generator=generator, device=self._device)
        uniform_BT3 = self._by_image(uniform_BDS3, entry_BT, document_BT)
        swap_u_BT, image_u_BT, end_u_BT = uniform_BT3.unbind(-1)
        offset_BT = columns.offset_M[entry_BT].long()
        swapped_BT = (swap_u_BT < share) & columns.answer_M[entry_BT] & (offset_BT >= 0)
        swapped_BT &= offset_BT <= end_u_BT * num_codes
        other_BT = (image_u_BT * num_images).long()
        code_BT = self._codes_PVC[other_BT, 0, offset_BT.clamp_min(0)].long()
        return torch.where(swapped_BT, self._tokens_K[code_BT], tokens_BT)

    def _replace_codes(
        self, tokens_BT: Tensor, entry_BT: Tensor, generator: torch.Generator
    ) -> Tensor:
        """The tokens, with some codes replaced by near or arbitrary codes."""
        if not self._config.replace and not self._config.in_prompts:
            return tokens_BT
        num_codes, num_near = len(self._tokens_K), self._near_KN.shape[1]
        shape = (4, *tokens_BT.shape)
        uniform_4BT = torch.rand(shape, generator=generator, device=self._device)
        near_u_BT, kind_u_BT, any_u_BT, replace_u_BT = uniform_4BT
        code_BT = self._code_of_token[tokens_BT].clamp_min(0)
        near_BT = self._near_KN[code_BT, (near_u_BT * num_near).long()].long()
        any_BT = (any_u_BT * num_codes).long()
        other_BT = torch.where(kind_u_BT < self._config.near, near_BT, any_BT)
        share_BT = torch.where(
            self._columns.answer_M[entry_BT], self._config.replace, self._config.in_prompts
        )
        replaced_BT = (replace_u_BT < share_BT) & (self._columns.picture_M[entry_BT] >= 0)
        return torch.where(replaced_BT, self._tokens_K[other_BT], tokens_BT)

    @cached_property
    def _code_of_token(self) -> Tensor:
        """The code of each token, `NONE` for others; only computed if codes are replaced."""
        size = int(max(self._tokens_K.max(), self._columns.ids_M.max())) + 1
        table = torch.full((size,), NONE, dtype=torch.long, device=self._device)
        table[self._tokens_K] = torch.arange(len(self._tokens_K), device=self._device)
        return table


def _positions(document_BT: Tensor) -> Tensor:
    """The position of each token within its document."""
    index_BT = torch.arange(document_BT.shape[1], device=document_BT.device).expand_as(document_BT)
    begins_BT = torch.ones_like(document_BT, dtype=torch.bool)
    begins_BT[:, 1:] = document_BT[:, 1:] != document_BT[:, :-1]
    return index_BT - torch.where(begins_BT, index_BT, 0).cummax(1).values
