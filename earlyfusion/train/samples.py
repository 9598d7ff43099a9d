"""Sample images of a run: from the same prompts, again and again as the model learns.

`PromptedImages` is a `trainer.GenerateSamples`. It generates with the modules that are trained, in
the reference loop (`generation/reference.py`), so adapters and other replaced modules take part.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from earlyfusion.content import as_messages
from earlyfusion.errors import SettingError
from earlyfusion.files import replacing
from earlyfusion.generation.reference import generate
from earlyfusion.generation.request import ImageDone, Request
from earlyfusion.generation.settings import SamplingParams
from earlyfusion.image_tokenizer import ImageTokenizer
from earlyfusion.model.transformer import Transformer
from earlyfusion.processor import ANSWER_IMAGE, Processor, TokenSequence

_GAP = 4  # pixels between the images of a grid
_MIN_SIDE = 128  # smaller images are enlarged by a whole factor
_SEARCHED_DOCUMENTS = 200  # for prompts


class PromptedImages:
    """Generates one image for each prompt and writes them as a grid, with the prompts in a JSON
    file.

    A prompt is its text, for the file, and its tokens. `defaults` are the model's own sampling
    settings. Prompt number i always has the seed `seed + i`, so only the model changes. Raises
    `SettingError` for a prompt that leaves no room for an image.
    """

    def __init__(
        self,
        transformer: Transformer,
        processor: Processor,
        image_tokenizer: ImageTokenizer,
        prompts: Sequence[tuple[str, Sequence[int]]],
        defaults: Mapping[str, Any],
        seed: int = 0,
    ) -> None:
        self._transformer, self._processor = transformer, processor
        self._image_tokenizer = image_tokenizer
        self._texts = [text for text, _ in prompts]
        max_tokens, limit = processor.layout.num_tokens, transformer.config.max_position_embeddings
        for text, ids in prompts:
            if len(ids) + max_tokens > limit:
                raise SettingError(
                    f"the sample prompt {text[:40]!r} has {len(ids)} tokens, which leave no room "
                    f"for an image of {max_tokens} in {limit}: shorten it"
                )
        settings = [SamplingParams(seed=seed + i).resolved(defaults) for i in range(len(prompts))]
        self._requests = [
            Request(ids, "image", sampling, max_images=1, max_tokens=max_tokens)
            for (_, ids), sampling in zip(prompts, settings, strict=True)
        ]

    def __call__(self, step: int, folder: Path) -> dict[str, float]:
        if not self._requests:
            return {}
        codes = np.stack([self._generate(request) for request in self._requests])
        with torch.autocast(self._image_tokenizer.device.type, enabled=False):
            images = self._image_tokenizer.decode(torch.from_numpy(codes))
        save_grid(folder / f"step-{step:08d}.png", [[image] for image in images])
        caption = {"step": step, "prompts": self._texts, "layout": "from left to right"}
        text = json.dumps(caption, ensure_ascii=False, indent=1) + "\n"
        with replacing(folder / f"step-{step:08d}.json") as path:
            path.write_text(text, encoding="utf-8")
        return {}

    def _generate(self, request: Request) -> np.ndarray[Any, np.dtype[np.int64]]:
        """The codes of the image that answers a request, [h, w]."""
        events = generate(self._transformer, self._processor, request)
        # The grammar of "image" always completes its image.
        return next(event.codes for event in events if isinstance(event, ImageDone))


def encoded_prompts(
    processor: Processor, prompts: Sequence[str]
) -> list[tuple[str, Sequence[int]]]:
    """Prompts for `PromptedImages`, from texts as a user types them."""
    return [(prompt, processor.encode(as_messages(prompt)).ids) for prompt in prompts]


def image_prompts(
    processor: Processor, stream: Callable[[int], TokenSequence], count: int
) -> list[tuple[str, Sequence[int]]]:
    """Prompts for `PromptedImages` from the first training documents: at most `count` different
    ones whose answer is an image."""
    prompts: dict[str, Sequence[int]] = {}
    for number in range(_SEARCHED_DOCUMENTS):
        if len(prompts) == count:
            break
        document = stream(number)
        if ANSWER_IMAGE in document.role:
            ids = document.ids[: document.role.index(ANSWER_IMAGE)]
            text = processor.decode_text(ids).strip()
            prompts |= {text: ids} if text else {}
    return list(prompts.items())


def to_image(pixels_CYX: Tensor) -> PIL.Image.Image:
    """Pixels [3, Y, X] in [-1, 1] as an image, rounded to 8 bits."""
    scaled = ((pixels_CYX.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return PIL.Image.fromarray(np.ascontiguousarray(scaled.permute(1, 2, 0).cpu().numpy()))


def save_grid(path: Path, columns: Sequence[Sequence[PIL.Image.Image]]) -> None:
    """Write images of equal size as one PNG; `columns` are from left to right, and the images of a
    column from top to bottom."""
    scale = max(1, -(-_MIN_SIDE // columns[0][0].width))
    width, height = (side * scale for side in columns[0][0].size)
    rows = max(len(column) for column in columns)
    size = (len(columns) * (width + _GAP) + _GAP, rows * (height + _GAP) + _GAP)
    grid = PIL.Image.new("RGB", size, "white")
    for x, column in enumerate(columns):
        for y, image in enumerate(column):
            enlarged = image.resize((width, height), PIL.Image.Resampling.NEAREST)
            grid.paste(enlarged, (_GAP + x * (width + _GAP), _GAP + y * (height + _GAP)))
    with replacing(path) as partial:
        grid.save(partial, "PNG")
