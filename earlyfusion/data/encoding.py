"""Examples -> tokens: pictures are read, cut into codes in batches, and spelled.

Pictures of prompts become squares as the model's do when it is asked, "crop" or "fit"; those of
answers are cropped, so that none is drawn with a border (arXiv 2405.09818, section 3.1, which fits
those of prompts in). Half of the pairs have the picture first (section 2.2).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np

from earlyfusion.content import Image, Message, Text
from earlyfusion.data.forms import TEXT, Example, Picture, Turn, example_of
from earlyfusion.data.rows import Quarantine, Rows
from earlyfusion.errors import DataError, ImageError, PromptError, SettingError
from earlyfusion.image_tokenizer import ImageTokenizer, Mode
from earlyfusion.processor import CONTROL, PROMPT_IMAGE, PROMPT_TEXT, Processor, TokenSequence
from earlyfusion.vocabulary import Vocabulary


@dataclass(frozen=True)
class EncodingSettings:
    """How rows become documents."""

    prompt_images: str = ""
    """An older name of `resize_mode`."""
    answer_images: str = "crop"
    pairs: str = "turns"
    """A pair is a prompt and its answer ("turns"), or a plain document ("document")."""
    image_first: float = 0.5
    """Share of the pairs whose picture comes first."""
    pair_seed: int = 0
    resize_mode: str = ""
    """How a prompt's picture becomes a square: "fit" in with a border, or "crop" the centre; "": as
    the model has it. The model that is trained has it so from then on."""

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
            raise SettingError(f"image_first={self.image_first} is no share: give 0 to 1")

    def of_model(self, mode: Mode) -> EncodingSettings:
        """The same with the mode that counts, where a model has `mode`."""
        known = cast("Mode", self.resize_mode or self.prompt_images or mode)
        return replace(self, resize_mode=known, prompt_images=known)

    @property
    def mode(self) -> Mode:
        """How a prompt's picture becomes a square, once `of_model` has told."""
        return cast("Mode", self.resize_mode or self.prompt_images)


@dataclass
class Read:
    """A row whose pictures are in memory."""

    form: str
    turns: list[tuple[str, list[Text | Image]]]

    @property
    def is_plain(self) -> bool:
        return len(self.turns) == 1


class Encoder:
    """Rows of one kind of model."""

    def __init__(
        self, processor: Processor, image_tokenizer: ImageTokenizer, settings: EncodingSettings
    ) -> None:
        self.processor, self.settings = processor, settings.of_model(image_tokenizer.mode)
        self._image_tokenizer = image_tokenizer

    def answer(self, rows: Rows, number: int) -> int:
        """What the answers of row `number` hold: TEXT, PICTURE or BOTH; TEXT of a broken row."""
        table, place = rows.place(number)
        try:
            return self._example(table.row(place), number).answers
        except DataError:
            return TEXT

    def read(self, rows: Rows, number: int, quarantine: Quarantine) -> Read | None:
        """Row `number` with its pictures; None where it went to the quarantine."""
        table, place = rows.place(number)
        try:
            row = table.row(place)
            example = self._example(row, number)
            turns = [_read_turn(turn, lambda name: table.read(row, name)) for turn in example.turns]
        except (DataError, ImageError, PromptError) as error:
            quarantine.refuse(table.path, place + 1, str(error))
            return None
        quarantine.accept()
        return Read(example.form, turns)

    def encode(self, batch: Sequence[Read]) -> list[TokenSequence]:
        """Documents of rows; the pictures of all go through the network together."""
        codes = self._codes(batch)
        return [self._document(read, codes) for read in batch]

    def _example(self, row: dict[str, Any], number: int) -> Example:
        draw = np.random.default_rng([self.settings.pair_seed, number]).random()
        plain_pairs = self.settings.pairs == "document"
        return example_of(row, bool(draw < self.settings.image_first), plain_pairs)

    def _codes(self, batch: Sequence[Read]) -> dict[int, np.ndarray]:
        """Codes of every picture by its identity."""
        codes: dict[int, np.ndarray] = {}
        modes = {"user": self.settings.mode, "assistant": self.settings.answer_images}
        for role, mode in modes.items():
            images = [
                part
                for read in batch
                for speaker, parts in read.turns
                for part in parts
                if speaker == role and isinstance(part, Image)
            ]
            found = self._image_tokenizer.encode(images, cast("Mode", mode)).cpu().numpy()
            codes |= {id(image): own for image, own in zip(images, found, strict=True)}
        return codes

    def _document(self, read: Read, codes: dict[int, np.ndarray]) -> TokenSequence:
        if read.is_plain:
            return self._plain(read, codes)
        messages = [Message(role, parts) for role, parts in read.turns]  # type: ignore[arg-type]
        images = [image for message in messages for image in message.images]
        return self.processor.encode_document(messages, [codes[id(image)] for image in images])

    def _plain(self, read: Read, codes: dict[int, np.ndarray]) -> TokenSequence:
        vocabulary, sequence = self.processor.vocabulary, TokenSequence()
        sequence.control(vocabulary.bos)
        for part in read.turns[0][1]:
            if isinstance(part, Text):
                sequence.segment(self.processor.encode_text(part.text), "assistant", "text")
            else:
                tokens = self.processor.layout.spell(codes[id(part)], vocabulary)
                sequence.segment(tokens, "assistant", "image")
        sequence.control(vocabulary.eos, weight=1.0)
        return sequence


def _read_turn(turn: Turn, read: Callable[[str], bytes]) -> tuple[str, list[Text | Image]]:
    role, parts = turn
    return role, [
        _image(part, read) if isinstance(part, Picture) else _whole(part) for part in parts
    ]


def _whole(text: Text) -> Text:
    try:
        text.text.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError("a text holds half a character: write it again as UTF-8") from None
    return text


def _image(picture: Picture, read: Callable[[str], bytes]) -> Image:
    where = picture.where
    return Image.from_bytes(read(where) if isinstance(where, str) else where)


class Fit:
    """Makes documents fit rows of `limit` tokens, and keeps the numbers of those that did not.

    A dialogue keeps its first exchanges that fit, as one piece. A plain document is cut between
    its segments, and within a text that is longer than a piece; a picture is never cut. Where no
    piece would do, the document is dropped.
    """

    def __init__(self, limit: int, vocabulary: Vocabulary) -> None:
        self._limit, self._vocabulary = limit, vocabulary
        self.cut: set[int] = set()
        self.dropped: set[int] = set()

    def pieces(self, number: int, document: TokenSequence) -> list[TokenSequence]:
        """The document in pieces, itself if it fits; none of an empty one."""
        if len(document) <= self._limit:
            return [document] if len(document) else []
        dialogue = {PROMPT_TEXT, PROMPT_IMAGE}.intersection(document.role)
        cut = _first_exchanges if dialogue else _cut_between_segments
        made = cut(document, self._limit, self._vocabulary)
        (self.cut if made else self.dropped).add(number)
        return made


def _first_exchanges(
    document: TokenSequence, limit: int, vocabulary: Vocabulary
) -> list[TokenSequence]:
    role = document.role
    ends = [
        at
        for at, token in enumerate(document.ids[:limit])
        if token == vocabulary.end_of_turn and role[at] == CONTROL and document.weights[at - 1] > 0
    ]
    if not ends:
        return []
    at = ends[-1]
    spans = [span for span in document.spans if span[1] <= at]
    kept = TokenSequence(document.ids[:at], role[:at], spans, document.weights[:at])
    kept.control(vocabulary.eos, weight=1.0)
    return [kept]


def _cut_between_segments(
    document: TokenSequence, limit: int, vocabulary: Vocabulary
) -> list[TokenSequence]:
    room = limit - 2  # bos, and eos after the last
    blocks = [
        (document.ids[start:end], kind)
        for first, last, kind in document.spans
        for start, end in _blocks(first, last, room if kind == "text" else last - first)
    ]
    if any(len(tokens) > room for tokens, _ in blocks):
        return []
    cut: list[TokenSequence] = []
    for tokens, kind in blocks:
        if not cut or len(cut[-1]) - 1 + len(tokens) > room:
            cut.append(TokenSequence())
            cut[-1].control(vocabulary.bos)
        cut[-1].segment(tokens, "assistant", kind)
    if cut:
        cut[-1].control(vocabulary.eos, weight=1.0)
    return cut


def _blocks(first: int, last: int, size: int) -> list[tuple[int, int]]:
    return [(at, min(last, at + size)) for at in range(first, last, max(1, size))]


def fingerprints(processor: Processor, image_tokenizer: ImageTokenizer) -> dict[str, str]:
    """What the tokens of a corpus depend on: digests of the tokenizer and the image tokenizer."""
    return {
        "tokenizer": _tokenizer_digest(processor),
        "image_tokenizer": _image_tokenizer_digest(processor, image_tokenizer),
    }


def _tokenizer_digest(processor: Processor) -> str:
    data = json.loads(processor.tokenizer_file.read_text(encoding="utf-8"))
    meaning = {k: data.get(k) for k in ("model", "normalizer", "pre_tokenizer", "added_tokens")}
    return hashlib.sha256(json.dumps(meaning, sort_keys=True).encode()).hexdigest()


def _image_tokenizer_digest(processor: Processor, image_tokenizer: ImageTokenizer) -> str:
    digest = hashlib.sha256(str(image_tokenizer.resolution).encode())
    digest.update(processor.layout.template(processor.vocabulary).tobytes())
    for name, tensor in sorted(image_tokenizer.vqgan.state_dict().items()):
        if not name.startswith(("decoder.", "post_quant_conv.")):
            digest.update(name.encode())
            digest.update(tensor.float().cpu().numpy(force=True).tobytes())
    return digest.hexdigest()
