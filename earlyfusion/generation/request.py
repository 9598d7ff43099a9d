"""What is asked of the model, and the events that tell the reply."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import PIL.Image

from earlyfusion.content import Image
from earlyfusion.generation.settings import Output, SamplingParams
from earlyfusion.generation.steering import TokenLogprob
from earlyfusion.vocabulary import ImageLayout

Reason = Literal["stop", "length"]


@dataclass(frozen=True)
class Request:
    """A prompt's tokens and what to make of them.

    `sampling` is resolved and has a seed; at most `images` images and `room` tokens come. `stops`
    are ids besides eos that end the reply. `preview_every` adds an `ImagePreview` after so many
    codes, 0 none. `layout` spells the pictures that are drawn, where it is not the model's own.
    """

    ids: Sequence[int]
    output: Output
    sampling: SamplingParams
    images: int
    room: int
    stops: tuple[int, ...] = ()
    preview_every: int = 0
    layout: ImageLayout | None = None


@dataclass(frozen=True)
class Usage:
    """Token counts; `image_tokens` is the part of the completion that spells images."""

    prompt_tokens: int
    completion_tokens: int
    image_tokens: int

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True)
class TextDelta:
    """More text of the current segment; never half a character, never part of a stop string."""

    text: str


@dataclass(frozen=True)
class ImageStarted:
    index: int


@dataclass(frozen=True)
class ImageProgress:
    """Sent after each row of codes."""

    index: int
    codes_done: int
    codes_total: int


@dataclass(frozen=True, eq=False)
class ImagePreview:
    """An image in the making, where the request asks for it: codes int64 [h, w] in raster order, of
    which the first `codes_done` are drawn and the others repeat the last one. `pil` is what they
    look like, the rest in grey, where a `Chameleon` tells the events."""

    index: int
    codes_done: int
    codes: npt.NDArray[np.int64]
    pil: PIL.Image.Image | None = None


@dataclass(frozen=True, eq=False)
class ImageDone:
    """A whole image: codes int64 [h, w]. `pil` is its pixels, where a `Chameleon` tells the
    events."""

    index: int
    codes: npt.NDArray[np.int64]
    pil: PIL.Image.Image | None = None

    @property
    def image(self) -> Image:
        """Pixels and codes, as a part of a further prompt."""
        return Image(self.pil, self.codes)


@dataclass(frozen=True)
class TokenDrawn:
    """A token that was drawn, where the request asks for `logprobs`; before what it makes visible.
    Tokens that the grammar forces are not drawn."""

    logprob: TokenLogprob


@dataclass(frozen=True)
class Finished:
    """The last event. "stop": the model, a stop string or the number of images ended the reply;
    "length": no more tokens fit. The same request with `seed` gives the same reply. `continues`
    says that the reply goes on with the assistant's turn at the end of the prompt."""

    reason: Reason
    usage: Usage
    seed: int | None = None
    continues: bool = False


Event: TypeAlias = (
    TextDelta | ImageStarted | ImageProgress | ImagePreview | ImageDone | TokenDrawn | Finished
)
