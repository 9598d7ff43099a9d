"""A request to the model, and the events of its reply."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import PIL.Image

from earlyfusion.content import Image
from earlyfusion.generation.settings import Output, SamplingParams
from earlyfusion.vocabulary import ImageLayout

Reason = Literal["stop", "length"]


@dataclass(frozen=True)
class Request:
    """The tokens of a prompt, and how to continue them.

    `sampling` is resolved and has a seed. The limits of the reply are `max_images` and `max_tokens`
    here, not those of `sampling`. `stops` are ids besides eos that end the reply. An `ImagePreview`
    is sent after every `preview_every` codes of an image (0: never). `layout` spells the generated
    images (None: the model's layout). `adapter` is the name of an adapter, "" for none.
    """

    ids: Sequence[int]
    output: Output
    sampling: SamplingParams
    max_images: int
    max_tokens: int
    stops: tuple[int, ...] = ()
    preview_every: int = 0
    layout: ImageLayout | None = None
    adapter: str = ""


@dataclass(frozen=True)
class Usage:
    """Numbers of tokens. `image_tokens` counts the completion's tokens that spell images;
    `cached_tokens` those of the prompt that the engine's cache already held. `cached_tokens`
    depends on earlier requests, so `==` ignores it."""

    prompt_tokens: int
    completion_tokens: int
    image_tokens: int
    cached_tokens: int = field(default=0, compare=False)

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True)
class TextDelta:
    """Further text of the current segment; never part of a character or of a stop string."""

    text: str


@dataclass(frozen=True)
class ImageStarted:
    """An image begins; `index` counts the images of the reply from 0."""

    index: int


@dataclass(frozen=True)
class ImageProgress:
    """Sent after each row of codes of image number `index`: `codes_done` of `codes_total` codes are
    generated."""

    index: int
    codes_done: int
    codes_total: int


# Arrays compare element by element, so events with codes are compared by identity.


@dataclass(frozen=True, eq=False)
class ImagePreview:
    """An unfinished image, sent if the request asks for it. Of its codes, int64 [h, w], the
    first `codes_done` in raster order are final; the others repeat the last one. In events of a
    `Chameleon`, `pil` has its pixels, grey where there is nothing yet."""

    index: int
    codes_done: int
    codes: npt.NDArray[np.int64]
    pil: PIL.Image.Image | None = None


@dataclass(frozen=True, eq=False)
class ImageDone:
    """A whole image: codes int64 [h, w]. In events of a `Chameleon`, `pil` has its pixels."""

    index: int
    codes: npt.NDArray[np.int64]
    pil: PIL.Image.Image | None = None

    @property
    def image(self) -> Image:
        """Pixels and codes, to be used in a later prompt."""
        return Image(self.pil, self.codes)


@dataclass(frozen=True)
class TokenLogprob:
    """A generated token and the natural logarithm of its probability. `text` is its text, with
    U+FFFD for parts of a character, or the name of a control or image token. `top` holds the
    likeliest tokens, in descending order."""

    id: int
    text: str
    logprob: float
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class TokenDrawn:
    """A token was sampled, not forced. Sent if the request asks for `logprobs`, before the token's
    other events."""

    logprob: TokenLogprob


@dataclass(frozen=True)
class Finished:
    """The last event. `reason` is "stop" if the model, a stop string or the number of images ended
    the reply, "length" if no more tokens fit. The same request with `seed` gives the same reply.
    `continues` says whether the reply continues an assistant's turn at the end of the prompt."""

    reason: Reason
    usage: Usage
    seed: int | None = None
    continues: bool = False


Event: TypeAlias = (
    TextDelta | ImageStarted | ImageProgress | ImagePreview | ImageDone | TokenDrawn | Finished
)
