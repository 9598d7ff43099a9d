"""Lumina-mGPT (arXiv 2408.02657): Chameleon in transformers' layout that spells pictures its way.

begin, a token for the height, one for the width, rows of codes each closed by a line end, end:
1,060 tokens for 512 x 512. Sizes count blocks of two codes. Pictures here are squares of
`vq_config.resolution` in config.json, 512 unless the file says else: for the 768 and 1024
checkpoints, set it there. Its files have no VQ-GAN and no tokenizer: both are Meta's.
(Facts from github.com/Alpha-VLLM/Lumina-mGPT.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from earlyfusion.errors import CheckpointError
from earlyfusion.vocabulary import BEGIN_IMAGE, END_IMAGE, ImageLayout

KIND = "lumina"
MARK = "image_layout"
# Its authors' settings for drawing and for text.
SAMPLING: dict[str, Any] = {
    "text": {"temperature": 1.0, "top_p": 1.0, "top_k": 10, "repetition_penalty": 1.0},
    "image": {"temperature": 1.0, "top_p": 1.0, "top_k": 2000},
    "guidance": {"text": 3.0, "image": 1.0},
}
_LINE_END = "<reserved08799>"
_SIZES = 8800
_BLOCK = 2


def is_lumina(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is Lumina's own, or that of a folder converted from it."""
    classes = config.get("architectures") or ()
    return config.get(MARK) == KIND or any("ChameleonXLLMX" in str(name) for name in classes)


def layout(grid: int) -> ImageLayout:
    """The spelling of a square picture of `grid` x `grid` codes."""
    if grid % _BLOCK:
        raise CheckpointError(
            f"a picture of {grid} x {grid} codes has no size token: "
            "choose vq_config.resolution so that the number is even"
        )
    size = f"<reserved{_SIZES + grid // _BLOCK:05}>"
    return ImageLayout(grid, grid, (BEGIN_IMAGE, size, size), (_LINE_END,), (END_IMAGE,))
