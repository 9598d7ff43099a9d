"""An open checkpoint: names, shapes and dtypes are known, and no tensor has been read yet. Every
layout is opened as a `Source`. A conversion reads its `Stored` tensors one after the other, so its
memory does not grow with the model."""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from earlyfusion.config import ModelConfig
from earlyfusion.errors import CheckpointError
from earlyfusion.files import read_json_object
from earlyfusion.image_tokenizer import Mode
from earlyfusion.vocabulary import ImageLayout

OnBytes = Callable[[int], None]
"""Called with the size in bytes of each tensor that has been written."""

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TOKENIZER, META_TOKENIZER = "tokenizer.json", "text_tokenizer.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"  # read by transformers' tokenizers and processors
# What copies keep: the model card, the notices that licences require, and a chat template.
CARD_FILES = (
    "README.md",
    "NOTICE*",
    "LICEN[CS]E*",
    "COPYING*",
    "USE_POLICY*",
    CHAT_TEMPLATE_FILE,
)

_TOKENIZERS = (TOKENIZER, META_TOKENIZER)
_SHOWN_KEYS = 10
_SHOWN_TENSORS = 3
# After reading this many bytes a file is mapped again, so that the system frees its pages.
_MAPPED_BYTES = 2**26


@dataclass(frozen=True)
class Stored:
    """One tensor of a file: its dtype, its shape, and the function that reads it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> Stored:
        """A tensor that is already in memory."""
        return cls(tensor.dtype, tuple(tensor.shape), tensor.detach)

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()

    def to(self, dtype: torch.dtype | None) -> Stored:
        """The tensor in another dtype, converted when it is read; None keeps its own."""
        if dtype in (None, self.dtype):
            return self
        return self.then(lambda tensor: tensor.to(dtype))

    def then(self, change: Callable[[Tensor], Tensor]) -> Stored:
        """The tensor that `change` makes of this one, once it is read."""
        # Run on a meta tensor, to learn the new shape and dtype.
        result = change(torch.empty(self.shape, dtype=self.dtype, device="meta"))
        return Stored(result.dtype, tuple(result.shape), lambda: change(self.read()))


@dataclass
class Source:
    """An open checkpoint, under the parameter names of this package. `vq` holds the tensors of the
    VQ-GAN, if there is one. `family` is "chameleon" or "lumina", `bits` 8 or 4 for packed weights.
    `is_shard`: the tensors are those of one of several processes that share the model."""

    folder: Path
    config: ModelConfig
    tensors: dict[str, Stored]
    vq: dict[str, Stored]
    tokenizer: Path
    layout: ImageLayout
    generation_defaults: dict[str, Any] = field(default_factory=dict)
    family: str = "chameleon"
    resize_mode: Mode = "crop"
    bits: int | None = None
    is_shard: bool = False


class FiniteCheck:
    """Counts the NaN and infinite values of tensors when these are read."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}

    def watch(self, tensors: Mapping[str, Stored], prefix: str = "") -> dict[str, Stored]:
        """The same tensors, checked when they are read. `report` puts `prefix` before their
        names."""
        return {name: self._watch(prefix + name, stored) for name, stored in tensors.items()}

    def _watch(self, name: str, stored: Stored) -> Stored:
        def read() -> Tensor:
            tensor = stored.read()
            if not bool(torch.isfinite(tensor).all()):
                self._counts[name] = int((~torch.isfinite(tensor)).sum())
            return tensor

        return Stored(stored.dtype, stored.shape, read)

    @property
    def report(self) -> str:
        """A phrase with the number of such values and the first tensors that have them; "" if no
        tensor that was read has any."""
        if not self._counts:
            return ""
        shown = [f"{n:,} in {name}" for name, n in [*self._counts.items()][:_SHOWN_TENSORS]]
        if more := len(self._counts) - len(shown):
            shown.append(f"the others in {more} more tensor{'s' * (more > 1)}")
        total = sum(self._counts.values())
        values = "1 value is" if total == 1 else f"{total:,} values are"
        return f"{values} NaN or infinite ({', '.join(shown)})"


class MappedFile:
    """A file of named tensors that is memory-mapped, and mapped again whenever enough has been
    read, which frees the memory of its pages. `open_file` maps it, and returns a function from a
    name to its tensor."""

    def __init__(self, open_file: Callable[[], Callable[[str], Tensor]]) -> None:
        self._open, self._get, self._bytes_read = open_file, open_file(), 0

    def stored(self, name: str) -> Stored:
        """The tensor of this name, not read yet. Floats of 8 bits become bf16, which represents
        them exactly and has all operations."""
        tensor = self._get(name)
        stored = Stored(tensor.dtype, tuple(tensor.shape), lambda: self.read(name))
        is_narrow = tensor.is_floating_point() and tensor.dtype.itemsize == 1
        return stored.to(torch.bfloat16) if is_narrow else stored

    def read(self, name: str) -> Tensor:
        """The tensor of this name."""
        if self._bytes_read > _MAPPED_BYTES:
            self._get, self._bytes_read = self._open(), 0
        tensor = self._get(name)
        self._bytes_read += tensor.nbytes
        return tensor


def check_names(
    expected: Mapping[str, tuple[int, ...]], actual: Mapping[str, tuple[int, ...]], source: Path
) -> None:
    """Compare the shapes of tensors by name. Raises `CheckpointError` with the keys that are
    missing, unknown or of another shape."""
    in_both = expected.keys() & actual.keys()
    # (verb, adjective) -> keys, as in "it has the unknown key x"
    problems = {
        ("lacks", ""): expected.keys() - actual.keys(),
        ("has", "unknown "): actual.keys() - expected.keys(),
        ("has wrong shapes for", ""): {n for n in in_both if expected[n] != actual[n]},
    }
    phrases = [
        f"{verb} {_key_list(keys, adjective)}"
        for (verb, adjective), keys in problems.items()
        if keys
    ]
    if phrases:
        raise CheckpointError(f"{source} does not fit its config: it {'; it '.join(phrases)}")


def torch_load(path: Path) -> dict[str, Any]:
    """The dict in a file that torch wrote, or the `state_dict` in it; only tensors and plain values
    are unpickled."""
    try:
        # Files from before torch 1.6 are not zip archives and cannot be mapped.
        is_zip = zipfile.is_zipfile(path)
        with warnings.catch_warnings(action="ignore"):
            content = dict(torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip))
        content = dict(content.get("state_dict", content))
        if not all(isinstance(name, str) for name in content):
            raise TypeError("names must be strings")
        if any(isinstance(v, Tensor) and v.layout != torch.strided for v in content.values()):
            raise TypeError("sparse tensors are not read")
        return content
    # Reading untrusted bytes may raise anything.
    except Exception:
        raise CheckpointError(
            f"{path} is missing, damaged, or holds more than tensors: download it again"
        ) from None


def open_torch_file(path: Path) -> dict[str, Stored]:
    """The tensors of a file that torch wrote, or of the `state_dict` in it."""

    def open_file() -> dict[str, Tensor]:
        return {k: v for k, v in torch_load(path).items() if isinstance(v, Tensor)}

    file = MappedFile(lambda: open_file().__getitem__)
    return {name: file.stored(name) for name in open_file()}


def read_json(path: Path, needed: bool = True) -> dict[str, Any]:
    """The object in a JSON file; {} if the file is missing and not `needed`."""
    if not needed and not path.exists():
        return {}
    return read_json_object(path, "get the file again")


def find_tokenizer_file(path: Path) -> Path:
    """`path` if it is a file, else the tokenizer file in it or in its tokenizer/, under
    transformers' or Meta's name."""
    names = (path / part / name for part in ("", "tokenizer") for name in _TOKENIZERS)
    file = next((candidate for candidate in (path, *names) if candidate.is_file()), None)
    if file is None:
        raise CheckpointError(
            f"{path / TOKENIZER} is missing: copy it there from the model that this one was made "
            "from, or write a whole copy with earlyfusion convert and --tokenizer"
        )
    return file


def card_files(folder: Path) -> list[Path]:
    """A folder's model card, the notices that copies must keep, and its chat template."""
    paths = (path for pattern in CARD_FILES for path in sorted(folder.glob(pattern)))
    return [path for path in paths if path.is_file()]


def read_card(folder: Path | None) -> dict[str, str]:
    """The texts of `card_files`, by file name; {} without a folder."""
    paths = [] if folder is None else card_files(folder)
    return {path.name: path.read_text(encoding="utf-8", errors="replace") for path in paths}


def _key_list(keys: Collection[str], adjective: str) -> str:
    names = ", ".join(sorted(keys)[:_SHOWN_KEYS])
    more = f" and {len(keys) - _SHOWN_KEYS} more" if len(keys) > _SHOWN_KEYS else ""
    if len(keys) == 1:
        return f"the {adjective}key {names}"
    return f"{len(keys)} {adjective}keys: {names}{more}"
