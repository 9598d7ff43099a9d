"""Lumina-mGPT (arXiv 2408.02657): Chameleon in transformers' layout with its own image layout.

The tokens of an image are: begin, one for the height, one for the width, then each row of codes
with a newline token, and end: 1,060 tokens for 512 x 512. Size tokens count blocks of two codes,
which are 32 pixels. Facts from github.com/Alpha-VLLM/Lumina-mGPT; more in docs/checkpoints.md."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from earlyfusion.errors import CheckpointError, ImageError
from earlyfusion.vocabulary import BEGIN_IMAGE, END_IMAGE, ImageLayout, Vocabulary

FAMILY = "lumina"
CONFIG_KEY = "image_layout"  # in the config.json of a folder that this package wrote
# The authors' settings. Their guidance has one scale: two equal weights here.
SAMPLING: dict[str, Any] = {
    "text": {"temperature": 1.0, "top_p": 1.0, "top_k": 10, "repetition_penalty": 1.0},
    "image": {"temperature": 1.0, "top_p": 1.0, "top_k": 2000},
    "guidance": {"text": 3.0, "image": 3.0},
}
_LINE_END = "<reserved08799>"
_SIZE_ZERO = 8800  # the token <reserved08804> means four blocks
_SIZE_NAME = re.compile(r"<reserved0(\d{4})>")
_BLOCK = 2  # codes along one side
_MAX_RATIO = 4


def is_lumina(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is Lumina-mGPT's own, or that of a folder converted from it."""
    classes = str(config.get("architectures"))
    return config.get(CONFIG_KEY) == FAMILY or "ChameleonXLLMX" in classes


def is_layout_token(name: str) -> bool:
    """Whether a token is the newline token or a size token."""
    match = _SIZE_NAME.fullmatch(name)
    return name == _LINE_END or bool(match and int(match[1]) > _SIZE_ZERO)


def layout(height: int, width: int | None = None) -> ImageLayout:
    """How an image of `height` x `width` codes is spelled; `width` None means a square."""
    width = width or height
    if height % _BLOCK or width % _BLOCK:
        raise CheckpointError(
            f"an image of {height} x {width} codes has no size token: "
            "choose vq_config.resolution so that the number is even"
        )
    # The unconditional branch of guidance begins with the begin token. The authors also sample the
    # size tokens, unguided; here they are fixed, so guidance begins with the first code.
    head = (BEGIN_IMAGE, *(f"<reserved{_SIZE_ZERO + n // _BLOCK:05}>" for n in (height, width)))
    return ImageLayout(height, width, head, (_LINE_END,), (END_IMAGE,), before=(), other=layout)


def is_layout(spelled: ImageLayout) -> bool:
    """Whether a layout is of this family, whose models generate several sizes."""
    return spelled.line_end == (_LINE_END,)


def layouts(grid: int) -> list[ImageLayout]:
    """The layouts of all `sizes`."""
    return [layout(*size) for size in sizes(grid)]


def sizes(grid: int) -> list[tuple[int, int]]:
    """(height, width) in codes of the images that a model of `grid` x `grid` was trained on, from
    the widest to the tallest. None has a larger area than the square, or sides with a ratio over
    4."""
    blocks = [pair for pair in _sizes_in_blocks((grid // _BLOCK) ** 2) if _has_allowed_ratio(*pair)]
    return [(height * _BLOCK, width * _BLOCK) for height, width in blocks]


def instruction(text: str, height: int, width: int) -> str:
    """The prompt that the model was trained to generate images from; the size is in pixels."""
    return f"Generate an image of {width}x{height} according to the following prompt:\n{text}"


def read_layout(tokens: Sequence[int], vocabulary: Vocabulary) -> ImageLayout:
    """The layout of an image from its first tokens; `ImageError` if they have no size tokens."""
    names = {token: name for name, token in vocabulary.names.items()}
    matches = [_SIZE_NAME.fullmatch(names.get(int(token), "")) for token in tokens[1:3]]
    counts = [int(match[1]) - _SIZE_ZERO for match in matches if match]
    if len(counts) < 2 or min(counts) < 1:
        raise ImageError(
            "an image of Lumina-mGPT has its height and width after the begin mark: "
            "these tokens have none, so give the whole image"
        )
    return layout(counts[0] * _BLOCK, counts[1] * _BLOCK)


def _sizes_in_blocks(area: int) -> Iterator[tuple[int, int]]:
    """(height, width) in blocks: add a row if that keeps to the area, else drop a column."""
    height, width = 1, area
    while width > 0:
        yield height, width
        if (height + 1) * width <= area:
            height += 1
        else:
            width -= 1


def _has_allowed_ratio(height: int, width: int) -> bool:
    return max(height, width) <= _MAX_RATIO * min(height, width)
