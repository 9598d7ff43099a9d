"""Sample images of a run: from the same prompts, again and again as the model learns.
`PromptedImages` is a `trainer.GenerateSamples`. It generates with the modules in training, in the
plain loop of `generation/reference.py`, so adapters and other replaced modules take part."""

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

_GAP = 4
_LEAST_SIDE = 128  # smaller images are enlarged by a whole factor


class PromptedImages:
    """Generates one image for each prompt and saves them as a grid, with the prompts in a JSON
    file. `prompts` are pairs of a text to show and tokens. `defaults` are the model's own sampling
    settings. Prompt number i always has the seed `seed + i`, so only the model changes. Raises
    `SettingError` for a prompt that leaves no room for an image."""

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
        self._names = [name for name, _ in prompts]
        max_tokens, limit = processor.layout.num_tokens, transformer.config.max_position_embeddings
        for name, ids in prompts:
            if len(ids) + max_tokens > limit:
                raise SettingError(
                    f"the sample prompt {name[:40]!r} has {len(ids)} tokens, which leave no room "
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
        codes = np.stack([self._draw(request) for request in self._requests])
        with torch.autocast(self._image_tokenizer.device.type, enabled=False):
            images = self._image_tokenizer.decode(torch.from_numpy(codes))
        save_grid(folder / f"step-{step:08d}.png", [[image] for image in images])
        caption = {"step": step, "prompts": self._names, "layout": "from left to right"}
        text = json.dumps(caption, ensure_ascii=False, indent=1) + "\n"
        with replacing(folder / f"step-{step:08d}.json") as path:
            path.write_text(text, encoding="utf-8")
        return {}

    def _draw(self, request: Request) -> np.ndarray[Any, np.dtype[np.int64]]:
        events = generate(self._transformer, self._processor, request)
        # The grammar of "image" always completes its image.
        return next(event.codes for event in events if isinstance(event, ImageDone))


def encoded_prompts(
    processor: Processor, prompts: Sequence[str]
) -> list[tuple[str, Sequence[int]]]:
    """Texts as a user types them, each with its tokens."""
    return [(prompt, processor.encode(as_messages(prompt)).ids) for prompt in prompts]


def image_prompts(
    processor: Processor, stream: Callable[[int], TokenSequence], count: int, among: int = 200
) -> list[tuple[str, Sequence[int]]]:
    """`count` prompts of the first `among` training documents whose answer is an image."""
    found: dict[str, Sequence[int]] = {}
    for number in range(among):
        if len(found) == count:
            break
        document = stream(number)
        if ANSWER_IMAGE in document.role:
            prompt = document.ids[: document.role.index(ANSWER_IMAGE)]
            name = processor.decode_text(prompt).strip()
            found |= {name: prompt} if name else {}
    return list(found.items())


def to_image(pixels_CYX: Tensor) -> PIL.Image.Image:
    """Pixels in [-1, 1], rounded to 8 bits."""
    scaled = ((pixels_CYX.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return PIL.Image.fromarray(np.ascontiguousarray(scaled.permute(1, 2, 0).cpu().numpy()))


def save_grid(path: Path, columns: Sequence[Sequence[PIL.Image.Image]]) -> None:
    """Write columns of images of equal size as one PNG."""
    side = columns[0][0].width
    scale = max(1, -(-_LEAST_SIDE // side))
    wide, high = (side * scale for side in columns[0][0].size)
    rows = max(len(column) for column in columns)
    size = (len(columns) * (wide + _GAP) + _GAP, rows * (high + _GAP) + _GAP)
    sheet = PIL.Image.new("RGB", size, "white")
    for along, column in enumerate(columns):
        for down, image in enumerate(column):
            shown = image.resize((wide, high), PIL.Image.Resampling.NEAREST)
            sheet.paste(shown, (_GAP + along * (wide + _GAP), _GAP + down * (high + _GAP)))
    with replacing(path) as partial:
        sheet.save(partial, "PNG")
