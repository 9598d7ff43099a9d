"""Messages <-> tokens: the prompt format, the training weights, and streaming text back.

Format (arXiv 2405.09818, section 3, and Meta's released code): bos once; the parts of a turn in
order, nothing between them; `end_of_turn` after every turn, except that an answer at the end of a
training document is closed by eos. A picture is spelled by its `ImageLayout`.

Text is encoded without the control and image tokens in sight, so that a prompt that spells
`<racm3:break>` is plain text; only an `Image` makes an image.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from earlyfusion.content import Image, Message, Segment, Text, check_alternation
from earlyfusion.errors import CheckpointError, DataError, PromptError, SettingError
from earlyfusion.vocabulary import (
    CODE,
    ImageLayout,
    Vocabulary,
    family_names,
    read_tokenizer_json,
)

# What a token of a document is; END is the eos that closes the last answer.
CONTROL, PROMPT_TEXT, PROMPT_IMAGE, ANSWER_TEXT, ANSWER_IMAGE, END = range(6)
LEARNED = (ANSWER_TEXT, ANSWER_IMAGE, END)  # the roles that count in the loss
Kind: TypeAlias = Literal["text", "image"]
_ROLE_OF = {
    ("user", "text"): PROMPT_TEXT,
    ("user", "image"): PROMPT_IMAGE,
    ("assistant", "text"): ANSWER_TEXT,
    ("assistant", "image"): ANSWER_IMAGE,
}


@dataclass
class TokenSequence:
    """One document: an id and a role per token, a span (start, end, modality) per segment.

    The markers of a picture have the role of the picture.
    """

    ids: list[int] = field(default_factory=list)
    role: list[int] = field(default_factory=list)
    spans: list[tuple[int, int, Kind]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def loss_mask(self) -> list[bool]:
        """Which tokens count in the loss: those of answers and the closing eos."""
        return [role in LEARNED for role in self.role]

    def control(self, token: int, role: int = CONTROL) -> None:
        """Append one control token; with the role END, the eos that closes an answer."""
        self._extend([token], role)

    def segment(self, tokens: list[int], speaker: str, kind: Kind) -> None:
        """Append the tokens of one segment of a turn."""
        start = len(self.ids)
        self._extend(tokens, _ROLE_OF[speaker, kind])
        self.spans.append((start, len(self.ids), kind))

    def _extend(self, tokens: list[int], role: int) -> None:
        self.ids += tokens
        self.role += [role] * len(tokens)


class Processor:
    """Messages to tokens and back, for one tokenizer file and one way to spell pictures."""

    def __init__(self, tokenizer_file: str | Path, layout: ImageLayout) -> None:
        self.tokenizer_file = Path(tokenizer_file)
        self.layout = layout
        data = read_tokenizer_json(self.tokenizer_file)
        self.vocabulary = Vocabulary.from_dict(data)
        self._tokenizer = _load(data)
        self._text_tokenizer = _load(_text_only(data, self.vocabulary))
        self._bytes = _token_bytes(self.vocabulary)

    def encode_text(self, text: str, parse_special: bool = False) -> list[int]:
        """Tokens of a text, without bos or eos.

        With `parse_special` the names of control and image tokens in it become those tokens: only
        for text that no user can write.
        """
        if not text.isascii():
            _check_utf8(text)
        tokenizer = self._tokenizer if parse_special else self._text_tokenizer
        return list(tokenizer.encode(text, add_special_tokens=False).ids)

    def encode(
        self, messages: Sequence[Message], codes: Sequence[npt.ArrayLike] | None = None
    ) -> TokenSequence:
        """The prompt for an answer: every turn, each closed by `end_of_turn`. A last turn of the
        assistant is left open: it is the beginning of the answer.

        `codes` holds [h, w] for each picture of the messages in order; None takes those that the
        pictures carry. Raises `PromptError`, and `ImageError` for codes of another model.
        """
        if not messages:
            raise PromptError("a prompt needs the user's turn: add the user's message")
        check_alternation(messages)
        return self._prompt(messages, _codes_in_order(messages, codes))

    def draft(self, messages: Sequence[Message]) -> TokenSequence:
        """`encode` for turns that `as_messages` has checked, of any length: a picture without codes
        takes its place, to be spelled by `fill`."""
        return self._prompt(messages, [i.codes for message in messages for i in message.images])

    def draft_turn(self, message: Message) -> TokenSequence:
        """Only the tokens of the parts of one turn, as `draft` has them behind a prompt."""
        sequence = TokenSequence()
        self._add_turn(sequence, message, (image.codes for image in message.images))
        return sequence

    def fill(self, draft: TokenSequence, codes: Sequence[npt.ArrayLike]) -> list[int]:
        """The ids of a draft, its places for pictures filled with these codes, in order."""
        ids, codes_of = list(draft.ids), iter(codes)
        for start, end, _ in draft.spans:
            if ids[start] == CODE:
                ids[start:end] = self.layout.spell(next(codes_of), self.vocabulary)
        return ids

    def encode_document(
        self, messages: Sequence[Message], codes: Sequence[npt.ArrayLike] | None = None
    ) -> TokenSequence:
        """A training document: as `encode`, but it ends with the assistant's turn and eos."""
        if not messages or messages[-1].role != "assistant":
            raise PromptError(
                "a training document must end with the assistant's turn: add its answer"
            )
        check_alternation(messages)
        sequence = self._turns(messages, _codes_in_order(messages, codes))
        sequence.control(self.vocabulary.eos, END)
        return sequence

    def decode_text(self, ids: Iterable[int]) -> str:
        """The text of `ids` up to the first eos; control and image tokens have none.

        Bytes that are no UTF-8 become U+FFFD; a last character that is cut short is left out.
        """
        pieces = [self._bytes.get(token, b"") for token in self._until_eos(ids)]
        return _utf8_decoder().decode(b"".join(pieces))

    def token_bytes(self, token: int) -> bytes:
        """The UTF-8 bytes of a text token, which may be a part of a character; b"" of others."""
        return self._bytes.get(token, b"")

    def token_text(self, token: int) -> str:
        """A token for a person to read: its text, or the name of a control or image token."""
        data = self._bytes.get(token)
        return self._names.get(token, "") if data is None else data.decode("utf-8", "replace")

    def text_stream(self) -> TextStream:
        """A decoder that takes one token at a time."""
        return TextStream(self._bytes)

    def segments(self, ids: Iterable[int]) -> list[Segment]:
        """The texts and pictures of generated tokens, up to the first eos.

        Text is stripped and left out when empty; so is a last picture that was cut short.
        """
        tokens, segments = list(self._until_eos(ids)), []
        start = 0
        while start < len(tokens):
            is_image = tokens[start] == self.vocabulary.begin_image
            end = start + self.layout.num_tokens if is_image else self._end_of_text(tokens, start)
            segments += self._segment(tokens[start:end], is_image)
            start = end
        return segments

    @cached_property
    def _names(self) -> dict[int, str]:
        return {token: name for name, token in self.vocabulary.names.items()}

    def _prompt(
        self, messages: Sequence[Message], codes: Iterable[npt.ArrayLike | None]
    ) -> TokenSequence:
        sequence = self._turns(messages, codes)
        if messages[-1].role == "user":
            sequence.control(self.vocabulary.end_of_turn)
        return sequence

    def _turns(
        self, messages: Sequence[Message], codes: Iterable[npt.ArrayLike | None]
    ) -> TokenSequence:
        """Bos and all turns with `end_of_turn` between them; the last is left open."""
        sequence, codes_of = TokenSequence(), iter(codes)
        sequence.control(self.vocabulary.bos)
        for number, message in enumerate(messages):
            if number:
                sequence.control(self.vocabulary.end_of_turn)
            self._add_turn(sequence, message, codes_of)
        return sequence

    def _add_turn(
        self, sequence: TokenSequence, message: Message, codes_of: Iterator[npt.ArrayLike | None]
    ) -> None:
        for part in message.parts:
            if isinstance(part, Text):
                sequence.segment(self.encode_text(part.text), message.role, "text")
            else:
                sequence.segment(self._spelled(next(codes_of)), message.role, "image")

    def _spelled(self, codes: npt.ArrayLike | None) -> list[int]:
        if codes is None:
            return [CODE] * self.layout.num_tokens  # the image tokenizer gives the model's own size
        return self.layout.spell(codes, self.vocabulary)

    def _segment(self, tokens: list[int], is_image: bool) -> list[Segment]:
        if not is_image:
            text = self.decode_text(tokens).strip()
            return [Text(text)] if text else []
        if len(tokens) < self.layout.num_tokens:
            return []
        return [Image(codes=self.layout.parse(tokens, self.vocabulary))]

    def _end_of_text(self, tokens: list[int], start: int) -> int:
        begin = self.vocabulary.begin_image
        return next((at for at in range(start, len(tokens)) if tokens[at] == begin), len(tokens))

    def _until_eos(self, ids: Iterable[int]) -> Iterable[int]:
        for token in ids:
            if token == self.vocabulary.eos:
                return
            yield int(token)


class TextStream:
    """Text of tokens that come one at a time: never half a UTF-8 character."""

    def __init__(self, token_bytes: dict[int, bytes]) -> None:
        self._bytes = token_bytes
        self._decoder = _utf8_decoder()

    def push(self, token: int) -> str:
        """The text that this token completes; "" for control and image tokens."""
        return self._decoder.decode(self._bytes.get(int(token), b""))

    def flush(self) -> str:
        """The end of the text: a character that was cut short is left out."""
        self._decoder.reset()
        return ""


def _utf8_decoder() -> codecs.IncrementalDecoder:
    return codecs.getincrementaldecoder("utf-8")(errors="replace")


def train_tokenizer(texts: Iterable[str], num_codes: int, vocab_size: int) -> str:
    """Train a byte-level BPE on `texts`; the result is the JSON text of a tokenizer file.

    Ids: bos, pad, eos, unk, the image codes, the image markers, end of turn, the placeholder, then
    text: all 256 bytes first. It has at most `vocab_size` ids, fewer where the texts yield no more
    merges. The same texts in the same order give the same file.
    """
    control, alphabet = family_names(num_codes), pre_tokenizers.ByteLevel.alphabet()
    smallest = len(control) + len(alphabet)
    if vocab_size < smallest:
        raise SettingError(
            f"vocab_size={vocab_size} is too small: {num_codes} image codes, the control tokens "
            f"and 256 bytes take {smallest}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = _pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=control,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(_clean(texts), trainer)
    return str(tokenizer.to_str(pretty=False))


def _pre_tokenizer() -> Any:
    """Digits and punctuation one by one, runs of blanks apart, words as in GPT-2."""
    blanks = Regex(r"[\t\n]|    |  ")
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(blanks, "isolated"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Punctuation("isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )


def _clean(texts: Iterable[str]) -> Iterable[str]:
    for text in texts:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise DataError(
                "a training text holds half a character (a lone surrogate): read it again as UTF-8"
            ) from None
        yield text


def _check_utf8(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise PromptError(
            f"the text holds half a character (a lone surrogate) at place {error.start}: "
            "read it again as UTF-8"
        ) from None


def _load(data: dict[str, Any]) -> Tokenizer:
    try:
        return Tokenizer.from_str(json.dumps(data | {"truncation": None, "padding": None}))
    except Exception:  # the library raises bare Exception
        raise CheckpointError(
            "the tokenizer file cannot be read: give the JSON file of a byte-level BPE tokenizer"
        ) from None


def _text_only(data: dict[str, Any], vocabulary: Vocabulary) -> dict[str, Any]:
    """The tokenizer without the names of control and image tokens: it cannot make their ids."""
    text = set(vocabulary.text_tokens.tolist())
    # Added words too: the library numbers anew those that the model does not know.
    vocab = {name: token for name, token in vocabulary.names.items() if token in text}
    model = data["model"] | {"vocab": vocab, "unk_token": None}
    added = [entry for entry in data.get("added_tokens") or () if entry["id"] in text]
    return data | {"model": model, "added_tokens": added, "post_processor": None}


def _token_bytes(vocabulary: Vocabulary) -> dict[int, bytes]:
    """The UTF-8 bytes of each text token; a name outside the byte alphabet stands for itself."""
    byte_of = _byte_alphabet()
    text = set(vocabulary.text_tokens.tolist())
    table = {}
    for name, token in vocabulary.names.items():
        if token in text:
            known = all(letter in byte_of for letter in name)
            table[token] = bytes(byte_of[letter] for letter in name) if known else name.encode()
    return table


def _byte_alphabet() -> dict[str, int]:
    """Letter -> byte of byte-level BPE (GPT-2): a printable byte is itself, others follow 255."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable}
    return letters | {chr(256 + place): byte for place, byte in enumerate(others)}


def _codes_in_order(
    messages: Sequence[Message], codes: Sequence[npt.ArrayLike] | None
) -> list[npt.ArrayLike]:
    images = [image for message in messages for image in message.images]
    given = [image.codes for image in images] if codes is None else list(codes)
    if len(given) != len(images):
        raise PromptError(
            f"the messages hold {len(images)} images but codes of {len(given)} are given: "
            "give codes for each image, in order"
        )
    for number, value in enumerate(given):
        if value is None:
            raise PromptError(
                f"image {number + 1} of {len(given)} has no codes: encode it before it is spelled"
            )
    return [np.asarray(value) for value in given]
