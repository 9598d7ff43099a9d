"""Lumina-mGPT (arXiv 2408.02657): Chameleon in transformers' layout that spells pictures its way.

begin, a token for the height, one for the width, rows of codes each closed by a line end, end:
1,060 tokens for 512 x 512. Sizes count blocks of two codes, 32 pixels. A loaded model draws squares
of `vq_config.resolution` in config.json, 512 unless the file says else: for the 768 and 1024
checkpoints, set it there. `for_size` gives the processor of another size. Its files have no VQ-GAN
and no tokenizer: both are Meta's.

Guidance is by one scale, and its unconditional branch begins at the begin mark, with nothing before
it. It is late: the model's own size tokens are drawn without it. Here they are set, not drawn, so
that it acts on what it acts on there. (Facts from github.com/Alpha-VLLM/Lumina-mGPT.)
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from earlyfusion.errors import CheckpointError, ImageError
from earlyfusion.processor import Processor
from earlyfusion.vocabulary import BEGIN_IMAGE, END_IMAGE, ImageLayout, Vocabulary

KIND = "lumina"
MARK = "image_layout"
# Its authors' settings for drawing and for text. Two equal weights are guidance by one scale.
SAMPLING: dict[str, Any] = {
    "text": {"temperature": 1.0, "top_p": 1.0, "top_k": 10, "repetition_penalty": 1.0},
    "image": {"temperature": 1.0, "top_p": 1.0, "top_k": 2000},
    "guidance": {"text": 3.0, "image": 3.0},
}
_LINE_END = "<reserved08799>"
_SIZES = 8800
_SIZE_NAME = re.compile(r"<reserved0(\d{4})>")
_BLOCK = 2
_MAX_RATIO = 4


def is_lumina(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is Lumina's own, or that of a folder converted from it."""
    classes = config.get("architectures") or ()
    return config.get(MARK) == KIND or any("ChameleonXLLMX" in str(name) for name in classes)


def is_mark(name: str) -> bool:
    """Whether a token's name is a line end or a size."""
    match = _SIZE_NAME.fullmatch(name)
    return name == _LINE_END or bool(match and int(match[1]) > _SIZES)


def layout(height: int, width: int | None = None) -> ImageLayout:
    """The spelling of a picture of `height` x `width` codes; a square without `width`."""
    width = width or height
    if height % _BLOCK or width % _BLOCK:
        raise CheckpointError(
            f"a picture of {height} x {width} codes has no size token: "
            "choose vq_config.resolution so that the number is even"
        )
    head = (BEGIN_IMAGE, *(f"<reserved{_SIZES + n // _BLOCK:05}>" for n in (height, width)))
    return ImageLayout(height, width, head, (_LINE_END,), (END_IMAGE,), before=(), other=layout)


def is_layout(spelled: ImageLayout) -> bool:
    """Whether a layout is of this family, which draws several sizes."""
    return spelled.line_end == (_LINE_END,)


def layouts(grid: int) -> list[ImageLayout]:
    """Those of `sizes`."""
    return [layout(*size) for size in sizes(grid)]


def for_size(processor: Processor, height: int, width: int) -> Processor:
    """The same processor for pictures of `height` x `width` codes."""
    return Processor(processor.tokenizer_file, layout(height, width))


def sizes(grid: int) -> list[tuple[int, int]]:
    """(height, width) in codes that a model of `grid` x `grid` pictures was trained to draw.

    A walk from the widest to the tallest that keeps to the area of the square; no side is over four
    times the other.
    """
    blocks = [pair for pair in _staircase((grid // _BLOCK) ** 2) if _is_shapely(*pair)]
    return [(height * _BLOCK, width * _BLOCK) for height, width in blocks]


def nearest_size(height: float, width: float, grid: int) -> tuple[int, int]:
    """That of `sizes` whose shape is nearest to a picture's, in codes; of several the largest."""

    def likeness(size: tuple[int, int]) -> tuple[float, int]:
        ratio = (size[0] / height) / (size[1] / width)
        return min(ratio, 1 / ratio), size[0] * size[1]

    if height <= 0 or width <= 0:
        raise ImageError(f"a picture of {height} x {width} has no shape: give sides above 0")
    return max(sizes(grid), key=likeness)


def instruction(text: str, height: int, width: int) -> str:
    """What it was trained to hear where it is to draw; the size is in pixels."""
    return f"Generate an image of {width}x{height} according to the following prompt:\n{text}"


def read_layout(tokens: Sequence[int], vocabulary: Vocabulary) -> ImageLayout:
    """The layout of the picture that these tokens begin; `ImageError` without its size tokens."""
    names = {token: name for name, token in vocabulary.names.items()}
    found = [_SIZE_NAME.fullmatch(names.get(int(token), "")) for token in tokens[1:3]]
    counts = [int(match[1]) - _SIZES for match in found if match]
    if len(counts) < 2 or min(counts) < 1:
        raise ImageError(
            "a picture of this family has its height and width after the begin mark: "
            "these tokens have none"
        )
    return layout(counts[0] * _BLOCK, counts[1] * _BLOCK)


def _staircase(area: int) -> Iterator[tuple[int, int]]:
    """(height, width) in blocks: one more row while it fits into the area, else one column less."""
    height, width = 1, area
    while width > 0:
        yield height, width
        if (height + 1) * width <= area:
            height += 1
        else:
            width -= 1


def _is_shapely(height: int, width: int) -> bool:
    return max(height, width) <= _MAX_RATIO * min(height, width)
