"""Rows -> tokens: pictures are read, cut into codes in batches, and spelled.

Pictures of prompts are made square as at inference, by "crop" or "fit"; those of answers are
cropped, so that the model never learns to draw a border (arXiv 2405.09818, section 3.1, fits those
of prompts in). Half of the pairs have the picture first (section 2.2).
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
from earlyfusion.data.forms import TEXT, Example, Picture, Turn, example_of, form_of
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
    """How an answer's picture is made square."""
    pairs: str = "turns"
    """A pair is a prompt and its answer ("turns"), or a plain document ("document")."""
    image_first: float = 0.5
    """Share of the pairs whose picture comes first."""
    pair_seed: int = 0
    """Chooses the pairs whose picture comes first."""
    resize_mode: str = ""
    """How a prompt's picture is made square: "fit" with a border, or "crop" the centre; "": as the
    model does it. The trained model keeps the mode."""

    def __post_init__(self) -> None:
        for name, more in (("prompt_images", ("",)), ("answer_images", ()), ("resize_mode", ("",))):
            if getattr(self, name) not in ("fit", "crop", *more):
                raise SettingError(f"{name}={getattr(self, name)!r} is unknown: choose fit or crop")
        if self.prompt_images and self.resize_mode not in ("", self.prompt_images):
            raise SettingError(
                f"resize_mode={self.resize_mode} and prompt_images={self.prompt_images} differ: "
                "give one"
            )
        if self.pairs not in ("turns", "document"):
            raise SettingError(f"pairs={self.pairs!r} is unknown: choose turns or document")
        if not 0 <= self.image_first <= 1:
            raise SettingError(f"image_first={self.image_first} is not a share: give 0 to 1")

    def of_model(self, mode: Mode) -> EncodingSettings:
        """The same settings with the resize mode filled in, for a model that has `mode`."""
        known = cast("Mode", self.resize_mode or self.prompt_images or mode)
        return replace(self, resize_mode=known, prompt_images=known)

    @property
    def mode(self) -> Mode:
        """The resize mode of pictures in prompts, once `of_model` has filled it in."""
        return cast("Mode", self.resize_mode or self.prompt_images)


@dataclass(frozen=True)
class Read:
    """A row with its pictures in memory; `turns` is None if it went to the quarantine."""

    form: str
    answers: int
    """What its answers hold: TEXT, PICTURE or BOTH."""
    turns: list[tuple[Role, list[Text | Image]]] | None

    @property
    def images(self) -> list[tuple[Role, Image]]:
        """Its pictures in order, each with the role that shows it."""
        turns = self.turns or []
        return [(role, p) for role, parts in turns for p in parts if isinstance(p, Image)]


class Encoder:
    """Rows to documents, for one tokenizer and image tokenizer."""

    def __init__(
        self, processor: Processor, image_tokenizer: ImageTokenizer, settings: EncodingSettings
    ) -> None:
        self.processor, self.settings = processor, settings.of_model(image_tokenizer.mode)
        self._image_tokenizer = image_tokenizer

    def answers(self, rows: Rows) -> np.ndarray:
        """What each row's answers hold (TEXT, PICTURE or BOTH), without reading pictures: uint8
        [rows]. A row that cannot be parsed counts as TEXT."""
        found = np.full(len(rows), TEXT, np.uint8)
        for number, row in enumerate(rows.outlines()):
            try:
                found[number] = TEXT if row is None else self._example(row, number).answers
            except DataError:
                continue
        return found

    def read(self, rows: Rows, number: int, quarantine: Quarantine) -> Read:
        """Row `number` with its pictures, or without turns if it went to the quarantine."""
        table, at = rows.find(number)
        form, answers = "", TEXT
        try:
            row = table.row(at)
            example = self._example(row, number)
            form, answers = example.form, example.answers
            turns = [_read_turn(turn, lambda name: table.read(row, name)) for turn in example.turns]
        except (DataError, ImageError, PromptError) as error:
            quarantine.refuse(table.path, at + 1, str(error))
            return Read(form, answers, None)
        quarantine.accept()
        return Read(form, answers, turns)

    def encode(self, batch: Sequence[Read]) -> list[TokenSequence | None]:
        """Documents of rows, None for the quarantine; the pictures of all rows are one batch."""
        codes = iter(self._codes([image for read in batch for image in read.images]))
        return [None if read.turns is None else self._document(read, codes) for read in batch]

    def _example(self, row: dict[str, Any], number: int) -> Example:
        picture_first = form_of(row) == "pair" and self._picture_first(number)
        return example_of(row, picture_first, plain_pairs=self.settings.pairs == "document")

    def _picture_first(self, number: int) -> bool:
        # Depends on the row's number alone, so shards and raw rows turn the same pairs around.
        draw = np.random.default_rng([self.settings.pair_seed, number]).random()
        return bool(draw < self.settings.image_first)

    def _codes(self, images: Sequence[tuple[Role, Image]]) -> list[np.ndarray]:
        """Codes of pictures in order; a batch per role, as roles have different resize modes."""
        found: list[np.ndarray] = [np.empty(0)] * len(images)
        modes = {"user": self.settings.mode, "assistant": cast("Mode", self.settings.answer_images)}
        for speaker, mode in modes.items():
            mine = [number for number, (role, _) in enumerate(images) if role == speaker]
            codes = self._image_tokenizer.encode([images[number][1] for number in mine], mode)
            for number, codes_hw in zip(mine, codes.cpu().numpy(), strict=True):
                found[number] = codes_hw
        return found

    def _document(self, read: Read, codes: Iterator[np.ndarray]) -> TokenSequence:
        assert read.turns is not None
        mine = list(islice(codes, len(read.images)))
        if len(read.turns) == 1:
            return plain_document(self.processor, read.turns[0][1], mine)
        messages = [Message(role, parts) for role, parts in read.turns]
        return self.processor.encode_document(messages, mine)


def plain_document(
    processor: Processor, parts: Sequence[Text | Image], codes: Sequence[np.ndarray]
) -> TokenSequence:
    """A document without a prompt, all of which is learned; `codes` are those of its pictures."""
    vocabulary, sequence, rest = processor.vocabulary, TokenSequence(), iter(codes)
    sequence.add_control(vocabulary.bos)
    for part in parts:
        if isinstance(part, Text):
            sequence.add_segment(processor.encode_text(part.text), "assistant", "text")
        else:
            tokens = processor.layout.spell(next(rest), vocabulary)
            sequence.add_segment(tokens, "assistant", "image")
    sequence.add_control(vocabulary.eos, END)
    return sequence


def _read_turn(turn: Turn, read: Callable[[str], bytes]) -> tuple[Role, list[Text | Image]]:
    role, parts = turn
    # Decode pictures now, so that a damaged one sends its row to the quarantine.
    return role, [
        _image(part, read) if isinstance(part, Picture) else _whole(part) for part in parts
    ]


def _whole(text: Text) -> Text:
    # JSON can spell half of a surrogate pair, which no tokenizer accepts.
    try:
        text.text.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError("a text holds half a character: write it again as UTF-8") from None
    return text


def _image(picture: Picture, read: Callable[[str], bytes]) -> Image:
    where = picture.where
    return Image.from_bytes(read(where) if isinstance(where, str) else where)


class Fit:
    """Makes documents fit rows of `limit` tokens, and remembers the numbers of those that did not
    fit. A dialogue keeps its first exchanges that fit, as one piece. A plain document is cut
    between its segments, and within a text that is longer than a piece; a picture is never cut. A
    document of which no piece fits is dropped."""

    def __init__(self, limit: int, vocabulary: Vocabulary) -> None:
        self._limit, self._vocabulary = limit, vocabulary
        self.cut: set[int] = set()
        self.dropped: set[int] = set()

    def pieces(self, number: int, document: TokenSequence) -> list[TokenSequence]:
        """Document `number` in pieces: itself if it fits; none if it is empty."""
        if len(document) <= self._limit:
            return [document] if len(document) else []
        # A dialogue must begin with its prompt; a plain document may be cut anywhere.
        dialogue = {PROMPT_TEXT, PROMPT_IMAGE}.intersection(document.role)
        cut = _first_exchanges if dialogue else _cut_between_segments
        made = cut(document, self._limit, self._vocabulary)
        (self.cut if made else self.dropped).add(number)
        return made


def _first_exchanges(
    document: TokenSequence, limit: int, vocabulary: Vocabulary
) -> list[TokenSequence]:
    role = document.role
    # The end of turn that closed the answer becomes eos.
    ends = [
        at
        for at, token in enumerate(document.ids[:limit])
        if token == vocabulary.end_of_turn and role[at] == CONTROL and role[at - 1] in LEARNED
    ]
    if not ends:
        return []
    at = ends[-1]
    spans = [span for span in document.spans if span[1] <= at]
    shorter = TokenSequence(document.ids[:at], role[:at], spans)
    shorter.add_control(vocabulary.eos, END)
    return [shorter]


def _cut_between_segments(
    document: TokenSequence, limit: int, vocabulary: Vocabulary
) -> list[TokenSequence]:
    room = limit - 2  # bos, and eos after the last
    blocks = [
        (document.ids[start:end], modality)
        for first, last, modality in document.spans
        for start, end in _blocks(first, last, room if modality == "text" else last - first)
    ]
    if any(len(tokens) > room for tokens, _ in blocks):
        return []
    cut: list[TokenSequence] = []
    for tokens, modality in blocks:
        if not cut or len(cut[-1]) - 1 + len(tokens) > room:
            cut.append(TokenSequence())
            cut[-1].add_control(vocabulary.bos)
        cut[-1].add_segment(tokens, "assistant", modality)
    # Only the last piece ends with eos: after the others the document goes on.
    if cut:
        cut[-1].add_control(vocabulary.eos, END)
    return cut


def _blocks(first: int, last: int, size: int) -> list[tuple[int, int]]:
    return [(at, min(last, at + size)) for at in range(first, last, max(1, size))]


def fingerprints(processor: Processor, image_tokenizer: ImageTokenizer) -> dict[str, str]:
    """Digests of the tokenizer and the image tokenizer, on which a corpus's tokens depend."""
    return {
        "tokenizer": _tokenizer_digest(processor),
        "image_tokenizer": _image_tokenizer_digest(processor, image_tokenizer),
    }


def _tokenizer_digest(processor: Processor) -> str:
    data = json.loads(processor.tokenizer_file.read_text(encoding="utf-8-sig"))
    # The file's other keys (truncation, padding …) do not change the tokens of a text.
    meaning = {k: data.get(k) for k in ("model", "normalizer", "pre_tokenizer", "added_tokens")}
    return hashlib.sha256(json.dumps(meaning, sort_keys=True).encode()).hexdigest()


def _image_tokenizer_digest(processor: Processor, image_tokenizer: ImageTokenizer) -> str:
    digest = hashlib.sha256(str(image_tokenizer.resolution).encode())
    digest.update(processor.layout.template(processor.vocabulary).tobytes())
    for name, tensor in sorted(image_tokenizer.vqgan.state_dict().items()):
        # Codes do not depend on the decoder, which may be trained further after tokenizing.
        if not name.startswith(("decoder.", "post_quant_conv.")):
            digest.update(name.encode())
            digest.update(tensor.float().cpu().numpy(force=True).tobytes())
    return digest.hexdigest()
