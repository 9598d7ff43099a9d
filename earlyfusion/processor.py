"""Messages <-> tokens: the prompt format, the roles of tokens in training, and text as it streams.

Format (arXiv 2405.09818, section 3, and Meta's released code): bos once; the parts of a turn in
order, with nothing in between; `end_of_turn` after every turn, except that eos closes an answer at
the end of a training document. An image is spelled by its `ImageLayout`.

Users cannot forge control tokens: a text that contains `<racm3:break>` is encoded as plain text,
and only an `Image` makes an image.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from earlyfusion.content import Message, Text, check_alternation
from earlyfusion.errors import CheckpointError, DataError, PromptError, SettingError
from earlyfusion.vocabulary import (
    CODE,
    ImageLayout,
    Vocabulary,
    control_and_image_names,
    read_tokenizer_json,
)

# The roles of a document's tokens; END is the eos that closes the last answer.
CONTROL, PROMPT_TEXT, PROMPT_IMAGE, ANSWER_TEXT, ANSWER_IMAGE, END = range(6)
LEARNED = (ANSWER_TEXT, ANSWER_IMAGE, END)  # the roles that count in the loss
Modality: TypeAlias = Literal["text", "image"]
_ROLE_OF = {
    ("user", "text"): PROMPT_TEXT,
    ("user", "image"): PROMPT_IMAGE,
    ("assistant", "text"): ANSWER_TEXT,
    ("assistant", "image"): ANSWER_IMAGE,
}


@dataclass
class TokenSequence:
    """One document: an id and a role per token, a span (start, end, modality) per segment. The
    markers of an image have the image's role."""

    ids: list[int] = field(default_factory=list)
    role: list[int] = field(default_factory=list)
    spans: list[tuple[int, int, Modality]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def loss_mask(self) -> list[bool]:
        """Which tokens count in the loss: those of answers and the closing eos."""
        return [role in LEARNED for role in self.role]

    def add_control(self, token: int, role: int = CONTROL) -> None:
        """Append one control token; with the role END, the eos that closes an answer."""
        self._extend([token], role)

    def add_segment(self, tokens: list[int], speaker: str, modality: Modality) -> None:
        """Append a segment; `speaker` is "user" or "assistant"."""
        start = len(self.ids)
        self._extend(tokens, _ROLE_OF[speaker, modality])
        self.spans.append((start, len(self.ids), modality))

    def _extend(self, tokens: list[int], role: int) -> None:
        self.ids += tokens
        self.role += [role] * len(tokens)


class Processor:
    """Messages to tokens and back, for one tokenizer file and one way to spell images."""

    def __init__(self, tokenizer_file: str | Path, layout: ImageLayout) -> None:
        self.tokenizer_file = Path(tokenizer_file)
        self.layout = layout
        data = read_tokenizer_json(self.tokenizer_file)
        self.vocabulary = Vocabulary.from_dict(data)
        # This tokenizer knows no control tokens: only the code below places them, never a text.
        self._text_tokenizer = _load_tokenizer(_text_only(data, self.vocabulary))
        self._bytes = _token_bytes(self.vocabulary)
        self.longest_token = max(map(len, self._bytes.values()))  # in bytes

    def encode_text(self, text: str) -> list[int]:
        """Tokens of a text, without bos or eos; names of control tokens in it are plain text."""
        if not text.isascii():  # ASCII has no lone surrogates to check for
            _check_utf8(text)
        return list(self._text_tokenizer.encode(text, add_special_tokens=False).ids)

    def min_tokens(self, text: str) -> int:
        """A lower bound of the tokens of a text, without the time and memory of encoding it."""
        return -(-len(text) // self.longest_token)

    def encode(
        self, messages: Sequence[Message], codes: Sequence[npt.ArrayLike] | None = None
    ) -> TokenSequence:
        """The prompt: every turn, each closed by `end_of_turn`, except an assistant's at the end,
        which the reply continues. `codes` are [h, w] per image of the messages, in order (None:
        those that the images carry). Raises `PromptError`, and `ImageError` for codes of another
        model."""
        if not messages:
            raise PromptError("a prompt needs the user's turn: add the user's message")
        check_alternation(messages)
        return self._prompt(messages, _codes_in_order(messages, codes))

    def draft(self, messages: Sequence[Message]) -> TokenSequence:
        """`encode` before the images are encoded: an image without codes reserves its tokens,
        which `fill` replaces. So the length is known early, and text is tokenised only once. The
        turns must be those of `as_messages`."""
        return self._prompt(messages, [i.codes for message in messages for i in message.images])

    def draft_turn(self, message: Message) -> TokenSequence:
        """`draft` of the parts of one turn alone, without control tokens around them."""
        sequence = TokenSequence()
        self._add_turn(sequence, message, (image.codes for image in message.images))
        return sequence

    def fill(self, draft: TokenSequence, codes: Sequence[npt.ArrayLike]) -> list[int]:
        """The ids of a draft, with these codes spelled as its images, in order."""
        ids, remaining_codes = list(draft.ids), iter(codes)
        for start, end, _ in draft.spans:
            # `_spell_or_reserve` fills a whole span with CODE, so its first id shows it.
            if ids[start] == CODE:
                ids[start:end] = self.layout.spell(next(remaining_codes), self.vocabulary)
        return ids

    def encode_document(
        self, messages: Sequence[Message], codes: Sequence[npt.ArrayLike] | None = None
    ) -> TokenSequence:
        """A training document: as `encode`, but closed by eos after the assistant's turn."""
        if not messages or messages[-1].role != "assistant":
            raise PromptError(
                "a training document must end with the assistant's turn: add its answer"
            )
        check_alternation(messages)
        sequence = self._turns(messages, _codes_in_order(messages, codes))
        sequence.add_control(self.vocabulary.eos, END)
        return sequence

    def decode_text(self, ids: Iterable[int]) -> str:
        """The text of `ids` up to the first eos, without control and image tokens. Bytes that are
        not UTF-8 become U+FFFD; an incomplete last character is dropped."""
        tokens = takewhile(lambda token: token != self.vocabulary.eos, ids)
        return _utf8_decoder().decode(b"".join(self._bytes.get(int(t), b"") for t in tokens))

    def token_bytes(self, token: int) -> bytes:
        """The UTF-8 bytes of a text token, which may end within a character; b"" for others."""
        return self._bytes.get(token, b"")

    def token_text(self, token: int) -> str:
        """A token in readable form: its text, or the name of a control or image token."""
        data = self._bytes.get(token)
        # "replace", as a token may be only a part of a character.
        return self._names.get(token, "") if data is None else data.decode("utf-8", "replace")

    def text_stream(self) -> TextStream:
        """A decoder that takes one token at a time."""
        return TextStream(self._bytes)

    @cached_property
    def _names(self) -> dict[int, str]:
        return {token: name for name, token in self.vocabulary.names.items()}

    def _prompt(
        self, messages: Sequence[Message], codes: Iterable[npt.ArrayLike | None]
    ) -> TokenSequence:
        sequence = self._turns(messages, codes)
        if messages[-1].role == "user":
            sequence.add_control(self.vocabulary.end_of_turn)
        return sequence

    def _turns(
        self, messages: Sequence[Message], codes: Iterable[npt.ArrayLike | None]
    ) -> TokenSequence:
        """bos and all turns with `end_of_turn` in between; the last turn is left open."""
        sequence, remaining_codes = TokenSequence(), iter(codes)
        sequence.add_control(self.vocabulary.bos)
        for number, message in enumerate(messages):
            if number:
                sequence.add_control(self.vocabulary.end_of_turn)
            self._add_turn(sequence, message, remaining_codes)
        return sequence

    def _add_turn(
        self,
        sequence: TokenSequence,
        message: Message,
        remaining_codes: Iterator[npt.ArrayLike | None],
    ) -> None:
        """Append the parts of a turn; each image takes the next of `remaining_codes`."""
        for part in message.parts:
            if isinstance(part, Text):
                sequence.add_segment(self.encode_text(part.text), message.role, "text")
            else:
                sequence.add_segment(
                    self._spell_or_reserve(next(remaining_codes)), message.role, "image"
                )

    def _spell_or_reserve(self, codes: npt.ArrayLike | None) -> list[int]:
        """The tokens of an image; `CODE` for each of them if its codes are not known yet."""
        if codes is None:
            # The image tokenizer makes every image the size of the model's own layout.
            return [CODE] * self.layout.num_tokens
        return self.layout.spell(codes, self.vocabulary)


class TextStream:
    """The text of tokens that come one at a time, never cut inside a UTF-8 character."""

    def __init__(self, token_bytes: dict[int, bytes]) -> None:
        self._bytes = token_bytes
        self._decoder = _utf8_decoder()

    def push(self, token: int) -> str:
        """The text that this token completes; control and image tokens give ""."""
        return self._decoder.decode(self._bytes.get(int(token), b""))

    def flush(self) -> str:
        """The end of the text; an incomplete character is dropped."""
        self._decoder.reset()  # a final decode would turn its bytes into U+FFFD
        return ""


def _utf8_decoder() -> codecs.IncrementalDecoder:
    return codecs.getincrementaldecoder("utf-8")(errors="replace")


def train_tokenizer(
    texts: Iterable[str], num_codes: int, vocab_size: int, whole_words: Sequence[str] = ()
) -> str:
    """Train a byte-level BPE on `texts`; returns the JSON text of a tokenizer file.

    Ids: bos, pad, eos, unk, the image codes, the image markers, end of turn, the placeholder, then
    text, which begins with the 256 bytes. There are at most `vocab_size` ids, fewer if the texts
    yield no more merges. The same texts in the same order give the same file. The `whole_words`
    become one token each, in their order, for at most half of the text tokens. Their merges come
    after all others, so that the file stays an ordinary tokenizer file.
    """
    first_names, alphabet = control_and_image_names(num_codes), pre_tokenizers.ByteLevel.alphabet()
    min_size = len(first_names) + len(alphabet)
    if vocab_size < min_size:
        raise SettingError(
            f"vocab_size={vocab_size} is too small: {num_codes} image codes, the control tokens "
            f"and 256 bytes take {min_size}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = _pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    words = _split_words(tokenizer, whole_words)
    reserved = min(len(words), (vocab_size - min_size) // 2)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - reserved,
        special_tokens=first_names,  # these get the first ids, in this order
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(_check_texts(texts), trainer)
    text = str(tokenizer.to_str(pretty=False))
    return _add_whole_words(text, words, vocab_size) if words else text


def _split_words(tokenizer: Tokenizer, texts: Iterable[str]) -> list[str]:
    """The words of these texts as the pre-tokenizer splits them, with and without a space before
    them."""
    split = tokenizer.pre_tokenizer.pre_tokenize_str
    spellings = (spelling for text in texts for spelling in (" " + text, text))
    return list(dict.fromkeys(word for text in spellings for word, _ in split(text)))


def _add_whole_words(text: str, words: Sequence[str], vocab_size: int) -> str:
    """A tokenizer file with a token for each of the words, in their order, while there is room.

    The pieces of a word are merged from the left; earlier merges come first and do not change.
    """
    data = json.loads(text)
    vocabulary, merges = data["model"]["vocab"], data["model"]["merges"]
    ranks = {tuple(pair): rank for rank, pair in enumerate(merges)}
    for word in words:
        pieces = _apply_merges(list(word), ranks)
        if len(vocabulary) + len(pieces) - 1 > vocab_size:
            continue
        for number in range(1, len(pieces)):
            pair = "".join(pieces[:number]), pieces[number]
            vocabulary.setdefault("".join(pair), len(vocabulary))
            ranks[pair] = len(merges)
            merges.append(list(pair))
    return json.dumps(data, ensure_ascii=False)


def _apply_merges(pieces: list[str], ranks: Mapping[tuple[str, ...], int]) -> list[str]:
    """The pieces after all merges that apply, the earliest first, as BPE does it."""
    while True:
        candidates = [(ranks[pair], i) for i, pair in enumerate(pairwise(pieces)) if pair in ranks]
        if not candidates:
            return pieces
        _, i = min(candidates)
        pieces = [*pieces[:i], pieces[i] + pieces[i + 1], *pieces[i + 2 :]]


def _pre_tokenizer() -> Any:
    """Splits words as GPT-2 does; each digit, punctuation mark and newline is a separate token."""
    # Runs of spaces are split into fours and twos, so that indentation needs few tokens.
    whitespace = Regex(r"[\t\n]|    |  ")
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(whitespace, "isolated"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Punctuation("isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )


def _check_texts(texts: Iterable[str]) -> Iterable[str]:
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
            f"the text holds half a character (a lone surrogate) at position {error.start}: "
            "read it again as UTF-8"
        ) from None


def _load_tokenizer(data: dict[str, Any]) -> Tokenizer:
    try:
        # A file may carry settings from training, which would truncate or pad prompts.
        return Tokenizer.from_str(json.dumps(data | {"truncation": None, "padding": None}))
    except Exception:  # the library raises bare Exception
        raise CheckpointError(
            "the tokenizer file cannot be read: give the JSON file of a byte-level BPE tokenizer"
        ) from None


def _text_only(data: dict[str, Any], vocabulary: Vocabulary) -> dict[str, Any]:
    """The tokenizer without control and image tokens, so that no text can give their ids."""
    text = set(vocabulary.text_tokens.tolist())
    # Added words stay in the model as well: the library would give unknown ones new ids.
    vocab = {name: token for name, token in vocabulary.names.items() if token in text}
    # The 256 bytes spell any text, so unk is never needed; its name is no longer in `vocab`.
    model = data["model"] | {"vocab": vocab, "unk_token": None}
    added_tokens = [entry for entry in data.get("added_tokens") or () if entry["id"] in text]
    return data | {"model": model, "added_tokens": added_tokens, "post_processor": None}


def _token_bytes(vocabulary: Vocabulary) -> dict[int, bytes]:
    """The bytes of each text token. The names of added words are plain text, not letters of the
    byte alphabet."""
    byte_of = _byte_alphabet()
    text = set(vocabulary.text_tokens.tolist())
    table = {}
    for name, token in vocabulary.names.items():
        if token in text:
            in_alphabet = all(letter in byte_of for letter in name)
            table[token] = (
                bytes(byte_of[letter] for letter in name) if in_alphabet else name.encode()
            )
    return table


def _byte_alphabet() -> dict[str, int]:
    """Letter -> byte of byte-level BPE, as in GPT-2: printable bytes are their own letters, the
    others get the letters from 256 up, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable}
    return letters | {chr(256 + i): byte for i, byte in enumerate(others)}


def _codes_in_order(
    messages: Sequence[Message], codes: Sequence[npt.ArrayLike] | None
) -> list[npt.ArrayLike]:
    """The codes of each image of the messages: `codes`, or if that is None the codes that the
    images carry. Raises `PromptError` if an image has none."""
    images = [image for message in messages for image in message.images]
    all_codes = [image.codes for image in images] if codes is None else list(codes)
    if len(all_codes) != len(images):
        raise PromptError(
            f"the messages hold {len(images)} images, with codes for {len(all_codes)}: "
            "give codes for each image, in order"
        )
    for number, codes_hw in enumerate(all_codes, 1):
        if codes_hw is None:
            raise PromptError(
                f"image {number} of {len(all_codes)} has no codes: encode it before it is spelled"
            )
    return [np.asarray(codes_hw) for codes_hw in all_codes]
