"""The meaning of ids: text, image and control tokens, code <-> token, and how images are spelled.

A *code* is an index into the codebook of the VQ-GAN, a *token* is an id of the vocabulary. Ids
differ between checkpoints, so all are read by name from the tokenizer file. The names are those of
Meta's release (github.com/facebookresearch/chameleon).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from earlyfusion.errors import CheckpointError, ImageError
from earlyfusion.files import read_json_object

Ids = npt.NDArray[np.int64]

BOS, PAD, EOS, UNK = "<s>", "<pad>", "</s>", "<unk>"
BEGIN_IMAGE, END_IMAGE = "<racm3:break>", "<eoss>"
END_OF_TURN = "<reserved08706>"
# Meta's file has the first name; transformers' converter changes it to the second.
IMAGE_PLACEHOLDERS = ("<reserved08707>", "<image>")
IMAGE_PREFIX = "IMGIMG"
CODE = -1  # stands for any image code; no token has this id
_DIGITS = dict(zip("ABCDEFGHIJ", "0123456789", strict=True))


def code_name(code: int) -> str:
    """The token name of a code: its decimal digits as letters from A, so that 53 is IMGIMGFDZ."""
    return IMAGE_PREFIX + "".join("ABCDEFGHIJ"[int(digit)] for digit in str(code)) + "Z"


def control_and_image_names(num_codes: int) -> list[str]:
    """Control and image tokens of a new vocabulary, in the order of Meta's ids, from id 0."""
    codes = [code_name(code) for code in range(num_codes)]
    end, begin, turn = END_IMAGE, BEGIN_IMAGE, END_OF_TURN
    return [BOS, PAD, EOS, UNK, *codes, end, begin, turn, IMAGE_PLACEHOLDERS[0]]


class Vocabulary:
    """The text, image and control tokens of one tokenizer file. Raises `CheckpointError` if a
    control token is missing, two names share an id, or the image codes are not 0..n-1."""

    def __init__(self, names: Mapping[str, int]) -> None:
        self.names = dict(names)
        _check_unique(self.names)
        self.bos, self.pad, self.eos = (self.id_of(name) for name in (BOS, PAD, EOS))
        self.begin_image, self.end_image = self.id_of(BEGIN_IMAGE), self.id_of(END_IMAGE)
        self.end_of_turn = self.id_of(END_OF_TURN)
        placeholders = [self.names[n] for n in IMAGE_PLACEHOLDERS if n in self.names]
        self.image_placeholder: int | None = placeholders[0] if placeholders else None
        self.size = max(self.names.values()) + 1
        self.code_to_token = _code_to_token(self.names)

    @classmethod
    def from_file(cls, path: str | Path) -> Vocabulary:
        """Read a tokenizer file (`tokenizers` JSON)."""
        return cls.from_dict(read_tokenizer_json(Path(path)))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Vocabulary:
        """Read the JSON of a tokenizer file: `model.vocab` together with `added_tokens`."""
        try:
            names = dict(data["model"]["vocab"])
            names |= {entry["content"]: entry["id"] for entry in data.get("added_tokens") or ()}
        except (KeyError, TypeError, ValueError):
            raise CheckpointError(
                "the tokenizer file has no model.vocab: give the JSON file of a BPE tokenizer"
            ) from None
        return cls(names)

    @property
    def num_codes(self) -> int:
        return len(self.code_to_token)

    @cached_property
    def image_tokens(self) -> Ids:
        """Sorted ids of the image codes."""
        return np.sort(self.code_to_token)

    @cached_property
    def control_tokens(self) -> Ids:
        """Sorted ids of all names that begin with an angle bracket, reserved ones included."""
        # "<" alone is text: punctuation is split off, so no longer text token begins with "<".
        return _sorted_ids(i for n, i in self.names.items() if n.startswith("<") and n != "<")

    @cached_property
    def text_tokens(self) -> Ids:
        """Sorted ids of everything else."""
        other = {*self.image_tokens.tolist(), *self.control_tokens.tolist()}
        return _sorted_ids(i for i in self.names.values() if i not in other)

    def id_of(self, name: str) -> int:
        if name not in self.names:
            raise CheckpointError(
                f"the tokenizer has no token {name}: give one of a Chameleon model, which needs it"
            )
        return self.names[name]

    def tokens_to_codes(self, tokens: npt.ArrayLike) -> Ids:
        """Codes of image tokens, in the same shape; `ImageError` for any other token."""
        ids = np.asarray(tokens, dtype=np.int64)
        # Ids outside of the vocabulary must not index the table: negative ones would wrap around.
        inside = (ids >= 0) & (ids < self.size)
        codes = np.where(inside, self._codes_by_token[np.where(inside, ids, 0)], CODE)
        if (codes == CODE).any():
            raise ImageError(
                f"token {int(ids[codes == CODE][0])} is not an image token: "
                f"only the {self.num_codes} image tokens have codes"
            )
        return codes

    def codes_to_tokens(self, codes: npt.ArrayLike) -> Ids:
        """Tokens of codes, in the same shape; `ImageError` for a code outside the codebook."""
        values = np.asarray(codes, dtype=np.int64)
        bad = values[(values < 0) | (values >= self.num_codes)]
        if bad.size:
            raise ImageError(
                f"image code {int(bad.flat[0])} is outside this model's codebook of "
                f"{self.num_codes} codes: encode the image with the model's own image tokenizer"
            )
        return self.code_to_token[values]

    @cached_property
    def _codes_by_token(self) -> Ids:
        table = np.full(self.size, CODE, dtype=np.int64)
        table[self.code_to_token] = np.arange(self.num_codes)
        return table


@dataclass(frozen=True)
class ImageLayout:
    """How an image of `height` x `width` codes is spelled: `head`, rows in raster order, `tail`.
    Markers are token names, by default Chameleon's. Lumina-mGPT closes each row with `line_end` and
    has size tokens in `head`, so `other` gives the layout of another height and width. `before`
    precedes an image without a prompt, as in the unconditional branch of guidance."""

    height: int
    width: int
    head: tuple[str, ...] = (BEGIN_IMAGE,)
    line_end: tuple[str, ...] = ()
    tail: tuple[str, ...] = (END_IMAGE,)
    before: tuple[str, ...] = (BOS,)
    other: Callable[[int, int], ImageLayout] | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if self.height < 1 or self.width < 1:
            raise ImageError(
                f"an image of {self.height} x {self.width} codes is empty: "
                "both sides need at least 1 code"
            )

    @cached_property
    def num_codes(self) -> int:
        return self.height * self.width

    @cached_property
    def num_tokens(self) -> int:
        markers = len(self.head) + self.height * len(self.line_end) + len(self.tail)
        return self.num_codes + markers

    def template(self, vocabulary: Vocabulary) -> Ids:
        """The spelling of any image [num_tokens]: ids, with `CODE` in place of image codes."""
        head, line_end, tail = (
            [vocabulary.id_of(name) for name in names]
            for names in (self.head, self.line_end, self.tail)
        )
        rows = ([CODE] * self.width + line_end) * self.height
        return np.array(head + rows + tail, dtype=np.int64)

    def spell(self, codes_hw: npt.ArrayLike, vocabulary: Vocabulary) -> list[int]:
        """Tokens of an image, markers included; `ImageError` for a wrong shape or code."""
        codes = np.asarray(codes_hw, dtype=np.int64)
        # The other layout fits exactly: without `other` it cannot recurse.
        if self.other is not None and codes.ndim == 2 and codes.shape != (self.height, self.width):
            return replace(self.other(*codes.shape), other=None).spell(codes, vocabulary)
        if codes.shape != (self.height, self.width):
            raise ImageError(
                f"image codes have shape {'x'.join(map(str, codes.shape))}, "
                f"this model's images have {self.height}x{self.width}: encode the image again"
            )
        tokens = self.template(vocabulary)
        tokens[tokens == CODE] = vocabulary.codes_to_tokens(codes).ravel()
        spelled: list[int] = tokens.tolist()
        return spelled

    def parse(self, tokens: Sequence[int], vocabulary: Vocabulary) -> Ids:
        """Codes [height, width] of one spelled image; `ImageError` for another spelling."""
        ids = np.asarray(tokens, dtype=np.int64)
        template = self.template(vocabulary)
        if ids.shape != template.shape:
            raise ImageError(
                f"an image of {ids.size} tokens is not whole: "
                f"{self.height}x{self.width} codes take {self.num_tokens} tokens"
            )
        wrong = np.flatnonzero((template != CODE) & (template != ids))
        if wrong.size:
            at = int(wrong[0])
            raise ImageError(
                f"token {int(ids[at])} at position {at} of an image is not the marker "
                f"{int(template[at])}: the image is spelled in another layout"
            )
        return vocabulary.tokens_to_codes(ids[template == CODE]).reshape(self.height, self.width)


def read_tokenizer_json(path: Path) -> dict[str, Any]:
    """The JSON of a tokenizer file; `CheckpointError` if it is missing or not an object."""
    return read_json_object(path, "a model needs its tokenizer file")


def _sorted_ids(ids: Any) -> Ids:
    return np.array(sorted(ids), dtype=np.int64)


def _check_unique(names: Mapping[str, int]) -> None:
    by_id: dict[int, str] = {}
    for name, token in names.items():
        if not isinstance(token, int) or not 0 <= token < 2**31:
            raise CheckpointError(
                f"token {name!r} has the id {token!r}: ids are integers from 0 to 2^31 - 1"
            )
        if token in by_id:
            raise CheckpointError(
                f"tokens {by_id[token]!r} and {name!r} share the id {token}: each needs its own"
            )
        by_id[token] = name


def _code_to_token(names: Mapping[str, int]) -> Ids:
    codes: dict[int, int] = {}
    for name, token in names.items():
        if name.startswith(IMAGE_PREFIX):
            codes[code_of(name)] = token
    # A gap would shift all later codes, and damage every image.
    if sorted(codes) != list(range(len(codes))) or not codes:
        missing = next(code for code in range(len(codes) + 1) if code not in codes)
        raise CheckpointError(
            f"the tokenizer has {len(codes)} image tokens but none for code {missing}: "
            "codes must be 0, 1, 2, … without a gap"
        )
    return np.array([codes[code] for code in range(len(codes))], dtype=np.int64)


def code_of(name: str) -> int:
    """The code of an image token's name, the inverse of `code_name`."""
    digits = "".join(_DIGITS.get(letter, "?") for letter in name[len(IMAGE_PREFIX) : -1])
    # Spell it again, because leading zeros or a missing Z would pass the first test.
    if not digits.isdecimal() or code_name(int(digits)) != name:
        raise CheckpointError(
            f"{name!r} is not the name of an image token: that is {IMAGE_PREFIX}, "
            "the digits of the code as letters A to J, then Z"
        )
    return int(digits)
