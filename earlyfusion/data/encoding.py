"""Rows -> tokens: images are read, encoded to codes in batches, and spelled as image tokens.

Images of prompts are made square as at inference, by "crop" or "fit"; those of answers are
cropped, so that the model never learns to generate a border (the paper fits those of prompts in:
arXiv 2405.09818, section 3.1). Half of the pairs have the image first (section 2.2).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, cast

import numpy as np

from earlyfusion.content import Image, Message, Role, Text
from earlyfusion.data.forms import TEXT, Example, ImageRef, Turn, example_of, form_of
from earlyfusion.data.rows import Quarantine, Rows
from earlyfusion.errors import DataError, ImageError, PromptError, SettingError
from earlyfusion.image_tokenizer import ImageTokenizer, Mode
from earlyfusion.processor import (
    CONTROL,
    END,
    LEARNED,
    PROMPT_IMAGE,
    PROMPT_TEXT,
    Processor,
    TokenSequence,
)
from earlyfusion.vocabulary import Vocabulary


@dataclass(frozen=True)
class EncodingSettings:
    """How rows become documents."""

    prompt_images: str = ""
    """The older name of `resize_mode`."""
    answer_images: str = "crop"
    """How an answer's image is made square."""
    pairs: str = "turns"
    """A pair is a prompt and its answer ("turns"), or a plain document ("document")."""
    image_first: float = 0.5
    """Share of the pairs whose image comes first."""
    pair_seed: int = 0
    """Chooses the pairs whose image comes first."""
    resize_mode: str = ""
    """How a prompt's image is made square: "fit" with a border, or "crop" the centre; "": as the
    model does it. The trained model keeps the mode."""

    def __post_init__(self) -> None:
        # Only the modes of prompts may be left to the model.
        may_be_empty = ("prompt_images", "resize_mode")
        for name in (*may_be_empty, "answer_images"):
            mode = getattr(self, name)
            if mode not in ("fit", "crop") and not (mode == "" and name in may_be_empty):
                raise SettingError(f"{name}={mode!r} is unknown: choose fit or crop")
        if self.prompt_images and self.resize_mode not in ("", self.prompt_images):
            raise SettingError(
                f"resize_mode={self.resize_mode} and prompt_images={self.prompt_images} differ: "
                "give one"
            )
        if self.pairs not in ("turns", "document"):
            raise SettingError(f"pairs={self.pairs!r} is unknown: choose turns or document")
        if not 0 <= self.image_first <= 1:
            raise SettingError(f"image_first={self.image_first} is not a share: give 0 to 1")

    def for_model(self, mode: Mode) -> EncodingSettings:
        """The same settings with the resize mode filled in, for a model that has `mode`."""
        mode = cast("Mode", self.resize_mode or self.prompt_images or mode)
        return replace(self, resize_mode=mode, prompt_images=mode)

    @property
    def mode(self) -> Mode:
        """The resize mode of images in prompts, once `for_model` has filled it in."""
        return cast("Mode", self.resize_mode or self.prompt_images)


@dataclass(frozen=True)
class ReadRow:
    """A row with its images in memory; `turns` is None if it went to the quarantine."""

    form: str
    answer_kind: int
    """What its answers hold: TEXT, IMAGE or BOTH."""
    turns: list[tuple[Role, list[Text | Image]]] | None

    @property
    def images(self) -> list[tuple[Role, Image]]:
        """Its images in order, each with the role that shows it."""
        turns = self.turns or []
        return [(role, p) for role, parts in turns for p in parts if isinstance(p, Image)]


class Encoder:
    """Rows to documents, for one tokenizer and image tokenizer."""

    def __init__(
        self, processor: Processor, image_tokenizer: ImageTokenizer, settings: EncodingSettings
    ) -> None:
        self.processor, self.settings = processor, settings.for_model(image_tokenizer.mode)
        self._image_tokenizer = image_tokenizer

    def answer_kinds(self, rows: Rows) -> np.ndarray:
        """What each row's answers hold (TEXT, IMAGE or BOTH), without reading images: uint8
        [rows]. A row that cannot be parsed counts as TEXT."""
        kinds = np.full(len(rows), TEXT, np.uint8)
        for number, row in enumerate(rows.outlines()):
            try:
                kinds[number] = TEXT if row is None else self._example(row, number).answer_kind
            except DataError:
                continue
        return kinds

    def read(self, rows: Rows, number: int, quarantine: Quarantine) -> ReadRow:
        """Row `number` with its images, or without turns if it went to the quarantine."""
        table, table_row = rows.find(number)
        form, answer_kind = "", TEXT
        try:
            row = table.row(table_row)
            example = self._example(row, number)
            form, answer_kind = example.form, example.answer_kind
            turns = [_read_turn(turn, lambda name: table.read(row, name)) for turn in example.turns]
        except (DataError, ImageError, PromptError) as error:
            quarantine.refuse(table.path, table_row + 1, str(error))
            return ReadRow(form, answer_kind, None)
        quarantine.accept()
        return ReadRow(form, answer_kind, turns)

    def encode(self, batch: Sequence[ReadRow]) -> list[TokenSequence | None]:
        """The document of each row, None if it went to the quarantine. The images of all rows are
        encoded in one batch."""
        codes = iter(self._encode_images([image for row in batch for image in row.images]))
        return [None if row.turns is None else self._document(row, codes) for row in batch]

    def _example(self, row: dict[str, Any], number: int) -> Example:
        image_first = form_of(row) == "pair" and self._image_first(number)
        return example_of(row, image_first, plain_pairs=self.settings.pairs == "document")

    def _image_first(self, number: int) -> bool:
        # From the row's number alone, so that token shards and raw rows have the same order.
        uniform = np.random.default_rng([self.settings.pair_seed, number]).random()
        return bool(uniform < self.settings.image_first)

    def _encode_images(self, images: Sequence[tuple[Role, Image]]) -> list[np.ndarray]:
        """The codes [h, w] of each image; one batch per role, as roles have different modes."""
        codes_of: list[np.ndarray] = [np.empty(0)] * len(images)
        modes = {"user": self.settings.mode, "assistant": cast("Mode", self.settings.answer_images)}
        for role, mode in modes.items():
            numbers = [number for number, (r, _) in enumerate(images) if r == role]
            codes = self._image_tokenizer.encode([images[n][1] for n in numbers], mode)
            for number, codes_hw in zip(numbers, codes.cpu().numpy(), strict=True):
                codes_of[number] = codes_hw
        return codes_of

    def _document(self, row: ReadRow, codes: Iterator[np.ndarray]) -> TokenSequence:
        """The document of a row; takes the codes of its images from `codes`."""
        assert row.turns is not None
        row_codes = list(islice(codes, len(row.images)))
        if len(row.turns) == 1:
            return plain_document(self.processor, row.turns[0][1], row_codes)
        messages = [Message(role, parts) for role, parts in row.turns]
        return self.processor.encode_document(messages, row_codes)


def plain_document(
    processor: Processor, parts: Sequence[Text | Image], codes: Sequence[np.ndarray]
) -> TokenSequence:
    """A document without a prompt, all of which is learned; `codes` are those of its images."""
    vocabulary, sequence, next_codes = processor.vocabulary, TokenSequence(), iter(codes)
    sequence.add_control(vocabulary.bos)
    for part in parts:
        if isinstance(part, Text):
            sequence.add_segment(processor.encode_text(part.text), "assistant", "text")
        else:
            tokens = processor.layout.spell(next(next_codes), vocabulary)
            sequence.add_segment(tokens, "assistant", "image")
    sequence.add_control(vocabulary.eos, END)
    return sequence


def _read_turn(turn: Turn, read: Callable[[str], bytes]) -> tuple[Role, list[Text | Image]]:
    role, parts = turn
    # Decode images now, so that a damaged one sends its row to the quarantine.
    return role, [
        _open_image(part, read) if isinstance(part, ImageRef) else _checked_text(part)
        for part in parts
    ]


def _checked_text(text: Text) -> Text:
    # JSON can spell half of a surrogate pair, which no tokenizer accepts.
    try:
        text.text.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError("a text holds half a character: write it again as UTF-8") from None
    return text


def _open_image(ref: ImageRef, read: Callable[[str], bytes]) -> Image:
    source = ref.source
    return Image.from_bytes(read(source) if isinstance(source, str) else source)


class DocumentSplitter:
    """Splits documents into pieces of at most `limit` tokens, and remembers the numbers of those
    that were too long. A dialogue is truncated to its first exchanges that fit, as one piece. A
    plain document is split between its segments, and within a text that is longer than a piece; an
    image is never split. A document of which no piece fits is dropped."""

    def __init__(self, limit: int, vocabulary: Vocabulary) -> None:
        self._limit, self._vocabulary = limit, vocabulary
        self.shortened: set[int] = set()
        self.dropped: set[int] = set()

    def split(self, number: int, document: TokenSequence) -> list[TokenSequence]:
        """Document `number` in pieces: itself if it fits; none if it is empty."""
        if len(document) <= self._limit:
            return [document] if len(document) else []
        # A dialogue must begin with its prompt; a plain document may be split anywhere.
        dialogue = {PROMPT_TEXT, PROMPT_IMAGE}.intersection(document.role)
        split = _first_exchanges if dialogue else _split_at_segments
        pieces = split(document, self._limit, self._vocabulary)
        (self.shortened if pieces else self.dropped).add(number)
        return pieces


def _first_exchanges(
    document: TokenSequence, limit: int, vocabulary: Vocabulary
) -> list[TokenSequence]:
    """The first exchanges of a dialogue that fit, as one piece; none if the first does not."""
    role = document.role
    # Where answers end. In the piece, eos takes the place of the last one's end of turn.
    ends = [
        i
        for i, token in enumerate(document.ids[:limit])
        if token == vocabulary.end_of_turn and role[i] == CONTROL and role[i - 1] in LEARNED
    ]
    if not ends:
        return []
    end = ends[-1]
    spans = [span for span in document.spans if span[1] <= end]
    shorter = TokenSequence(document.ids[:end], role[:end], spans)
    shorter.add_control(vocabulary.eos, END)
    return [shorter]


def _split_at_segments(
    document: TokenSequence, limit: int, vocabulary: Vocabulary
) -> list[TokenSequence]:
    """The segments of a plain document, as many in a piece as fit; none if an image does not."""
    room = limit - 2  # for bos and eos
    blocks = [
        (document.ids[start:end], modality)
        for span_start, span_end, modality in document.spans
        for start, end in _blocks(
            span_start, span_end, room if modality == "text" else span_end - span_start
        )
    ]
    if any(len(tokens) > room for tokens, _ in blocks):
        return []
    pieces: list[TokenSequence] = []
    for tokens, modality in blocks:
        if not pieces or len(pieces[-1]) - 1 + len(tokens) > room:
            pieces.append(TokenSequence())
            pieces[-1].add_control(vocabulary.bos)
        pieces[-1].add_segment(tokens, "assistant", modality)
    # Only the last piece ends with eos: after the others the document goes on.
    if pieces:
        pieces[-1].add_control(vocabulary.eos, END)
    return pieces


def _blocks(start: int, end: int, size: int) -> list[tuple[int, int]]:
    """The span from `start` to `end` in spans of at most `size`."""
    return [(first, min(end, first + size)) for first in range(start, end, max(1, size))]


def fingerprints(processor: Processor, image_tokenizer: ImageTokenizer) -> dict[str, str]:
    """Digests of the tokenizer and the image tokenizer, on which the tokens of a corpus depend."""
    return {
        "tokenizer": _tokenizer_digest(processor),
        "image_tokenizer": _image_tokenizer_digest(processor, image_tokenizer),
    }


def _tokenizer_digest(processor: Processor) -> str:
    data = json.loads(processor.tokenizer_file.read_text(encoding="utf-8-sig"))
    # The file's other keys (truncation, padding …) do not change the tokens of a text.
    relevant = {k: data.get(k) for k in ("model", "normalizer", "pre_tokenizer", "added_tokens")}
    return hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()


def _image_tokenizer_digest(processor: Processor, image_tokenizer: ImageTokenizer) -> str:
    digest = hashlib.sha256(str(image_tokenizer.resolution).encode())
    digest.update(processor.layout.template(processor.vocabulary).tobytes())
    for name, tensor in sorted(image_tokenizer.vqgan.state_dict().items()):
        # Codes do not depend on the decoder, which may be trained further after tokenizing.
        if not name.startswith(("decoder.", "post_quant_conv.")):
            digest.update(name.encode())
            digest.update(tensor.float().cpu().numpy(force=True).tobytes())
    return digest.hexdigest()
