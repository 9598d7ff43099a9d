"""Which token ids are images, from a config's `vocabulary_map` or the model's tokenizer file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from transformers.utils import cached_file

from earlyfusion.errors import CheckpointError, ImageError
from earlyfusion.vocabulary import (
    CODE,
    IMAGE_PLACEHOLDERS,
    IMAGE_PREFIX,
    Vocabulary,
    code_of,
    read_tokenizer_json,
)

_TOKENIZER = "tokenizer.json"


class ImageVocabulary:
    """Codes <-> token ids, from token names, with the attributes of transformers' own mapping. A
    code without a name becomes id 0, as in transformers."""

    def __init__(self, names: Mapping[str, int]) -> None:
        self.vocab_map = dict(names)
        found = [names[name] for name in reversed(IMAGE_PLACEHOLDERS) if name in names]
        self.image_token_id: int | None = found[0] if found else None
        self._device_tables: dict[str, Tensor] = {}

    @cached_property
    def bpe2img(self) -> dict[int, int]:
        """Token id to code."""
        images = {n: i for n, i in self.vocab_map.items() if n.startswith(IMAGE_PREFIX)}
        return {token: code_of(name) for name, token in images.items()}

    @cached_property
    def img2bpe(self) -> dict[int, int]:
        """Code to token id."""
        return {code: token for token, code in self.bpe2img.items()}

    @cached_property
    def image_tokens(self) -> list[int]:
        """Sorted ids of the image codes."""
        return sorted(self.bpe2img)

    @property
    def vocabulary(self) -> Vocabulary:
        """All token ids, for generation; `CheckpointError` if only images are known."""
        try:
            return self._vocabulary
        except CheckpointError:
            raise CheckpointError(
                "the model does not know which ids are text and control: load it from a folder "
                "with its tokenizer.json, or call model.use_vocabulary(processor)"
            ) from None

    @cached_property
    def val2name(self) -> dict[int, str]:
        """Token id to name."""
        return {token: name for name, token in self.vocab_map.items()}

    @cached_property
    def bpe2img_search_tensors(self) -> tuple[Tensor, Tensor]:
        """Sorted ids of the image codes, and sorted codes."""
        return _int64(self.image_tokens), _int64(sorted(self.img2bpe))

    @cached_property
    def img2bpe_mapping_tensor(self) -> Tensor:
        """Token ids by code, int32."""
        return _table(self.img2bpe, 0).int()

    @cached_property
    def bpe2img_mapping_tensor(self) -> Tensor:
        """Codes by token id, int64; `CODE` for ids that are not images."""
        return _table(self.bpe2img, CODE)

    def convert_img2bpe(self, img_batch: Tensor) -> Tensor:
        """Token ids of codes, int32 in any shape, on their device; does not wait for the device."""
        if not self.img2bpe:
            raise CheckpointError(
                "the config has no vocabulary_map and the model's folder no tokenizer.json, so "
                "images have no tokens: call model.use_vocabulary(processor)"
            )
        return self._on_device("img2bpe", self.img2bpe_mapping_tensor, img_batch.device)[img_batch]

    def convert_bpe2img(self, tokens: Tensor) -> Tensor:
        """Codes of token ids, any shape; `ImageError` if an id is not an image token."""
        table = self._on_device("bpe2img", self.bpe2img_mapping_tensor, tokens.device)
        inside = (tokens >= 0) & (tokens < len(table))
        codes = torch.where(inside, table[tokens.clamp(0, len(table) - 1)], CODE)
        if bool((codes == CODE).any()):
            raise ImageError(
                f"token {int(tokens[codes == CODE][0])} is not an image token: "
                "only image tokens can be decoded"
            )
        return codes

    def is_image(self, tokens: Tensor) -> Tensor:
        """Whether each token id is an image code, bool in the shape of `tokens`."""
        return torch.isin(tokens, self._ids(tokens.device))

    def image_columns(self, device: torch.device) -> Tensor:
        """Sorted ids of the image codes; the tensor is made once per device."""
        return self._ids(device)

    @cached_property
    def _vocabulary(self) -> Vocabulary:
        return Vocabulary(self.vocab_map)

    def _ids(self, device: torch.device) -> Tensor:
        return self._on_device("ids", self.bpe2img_search_tensors[0], device)

    def _on_device(self, name: str, values: Tensor, device: torch.device) -> Tensor:
        """A table on a device; copied once, and then found by its name."""
        if device.type == "cpu":
            return values
        key = f"{name} {device}"
        if key in self._device_tables:
            return self._device_tables[key]
        if torch.compiler.is_compiling():  # a tensor made while tracing must not be cached
            return values.to(device)
        # A tensor of inference mode could not be used in training later.
        with torch.inference_mode(False):
            self._device_tables[key] = values.to(device)
        return self._device_tables[key]

    def prepare(self, device: torch.device | None = None) -> None:
        """Make the tables now, on a device: tables made while tracing could not be cached, and a
        graph that reads CPU tensors cannot become a CUDA graph."""
        tables = self.bpe2img_search_tensors[0], self.img2bpe_mapping_tensor
        if device is not None:
            for name, table in zip(("ids", "img2bpe"), tables, strict=True):
                self._on_device(name, table, device)


def _int64(values: Sequence[int]) -> Tensor:
    # On the CPU, even while a model is being built on the meta device.
    return torch.tensor(values, dtype=torch.int64, device="cpu")


def _table(values: Mapping[int, int], empty: int) -> Tensor:
    """The values by their keys as a tensor, with `empty` for missing keys."""
    last = max(values, default=0)
    return _int64([values.get(key, empty) for key in range(last + 1)])


def find_names(given: Mapping[str, int] | None, folder: str | None) -> dict[str, int]:
    """Token names of a config, completed by the tokenizer file of the model's folder or hub id."""
    names = dict(given or {})
    path = _tokenizer_file(folder) if folder else None
    if path is None:
        return names
    in_file = Vocabulary.from_dict(read_tokenizer_json(path)).names
    known = set(in_file.values())
    return in_file | {name: token for name, token in names.items() if token not in known}


def _tokenizer_file(folder: str) -> Path | None:
    if Path(folder).is_dir():
        path = Path(folder) / _TOKENIZER
        return path if path.is_file() else None
    try:
        path_in_cache = cached_file(folder, _TOKENIZER, local_files_only=True)
    except OSError:
        return None
    return Path(path_in_cache) if path_in_cache else None
