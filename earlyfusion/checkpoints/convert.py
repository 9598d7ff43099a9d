"""Converts a model of any supported layout to transformers' or Meta's, one tensor at a time. Input
files are memory-mapped. Writing holds one tensor in transformers' layout and one shard in Meta's,
whatever the size of the model."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

import torch

from earlyfusion.checkpoints.assemble import check_not_packed, checked
from earlyfusion.checkpoints.checklist import verify_checklist
from earlyfusion.checkpoints.detect import detect, locate, open_source
from earlyfusion.checkpoints.hf import VQ_PREFIX, copy_to_hf, open_hf
from earlyfusion.checkpoints.meta import (
    VQ_CONFIG,
    check_meta,
    copy_to_meta,
    find_tokenizer,
    open_vqgan,
)
from earlyfusion.checkpoints.source import FiniteCheck, Source, Stored, card_files
from earlyfusion.config import VQConfig
from earlyfusion.errors import CheckpointError, SettingError
from earlyfusion.files import new_folder, unwritable

Layout = Literal["hf", "meta"]
Progress = Callable[[int, int], None]

_WRITERS = {"hf": copy_to_hf, "meta": copy_to_meta}
_CODEBOOK = "quantize.embedding.weight"
# bf16 has 8 significant bits: two copies of one codebook differ at most by this rounding.
_ROUNDING = 2**-7


def convert(
    name: str | Path,
    target: Path,
    to: Layout,
    *,
    tokenizer: Path | None = None,
    image_tokenizer: Path | None = None,
    shards: int | None = None,
    dtype: torch.dtype | None = None,
    verify: bool = True,
    progress: Progress = lambda done, total: None,
) -> None:
    """Write the model `name` into the new folder `target`, which appears whole or not at all.

    `tokenizer` is a folder with a tokenizer file for a model that lacks one. `image_tokenizer` is a
    VQ-GAN to add: Meta's tokenizer folder, its vqgan.ckpt, or another model. `shards` is the number
    of weight files (None: Meta's number, or the fewest possible). `dtype` is the transformer's new
    one (None: the old); the VQ-GAN is never narrowed. `verify` compares files with their checklist
    and refuses NaN and infinite weights. `progress` is called with the bytes done and their total.
    Raises `CheckpointError`: for a wrong key, size or tokenizer or too little room before anything
    is written, for a wrong value before `target` appears.
    """
    if to not in _WRITERS:
        raise SettingError(f"to={to!r} is unknown: use one of {', '.join(get_args(Layout))}")
    if shards is not None and shards < 1:
        raise SettingError(f"shards={shards} is not possible: use a whole number from 1 up")
    folder = locate(name)
    _check_target(target)
    source = open_source(folder, tokenizer, verify)
    if image_tokenizer is not None:
        image_tokenizer = _image_tokenizer_at(image_tokenizer)
        if verify:
            verify_checklist(_folder_of(image_tokenizer))
        source = with_image_tokenizer(source, image_tokenizer)
    check_not_packed(checked(source))
    if to == "meta":
        check_meta(source)
    cast = _Cast(source, dtype)
    _write(cast.source, target, to, shards, progress, cast.check if verify else lambda: None)


class _Cast:
    """A checkpoint in another dtype, whose values are checked before and after the conversion."""

    def __init__(self, source: Source, dtype: torch.dtype | None) -> None:
        self._dtype, self._input_check, self._output_check = dtype, FiniteCheck(), FiniteCheck()
        tensors = self._input_check.watch(source.tensors)
        if dtype is not None:
            converted = {name: stored.to(dtype) for name, stored in tensors.items()}
            tensors = self._output_check.watch(converted)
        vq = self._input_check.watch(source.vq, VQ_PREFIX)
        self.source = replace(source, tensors=tensors, vq=vq)

    def check(self) -> None:
        """Raise `CheckpointError` if a tensor read so far has NaN or infinite values."""
        if self._input_check.report:
            raise CheckpointError(
                f"{self.source.folder} is damaged: {self._input_check.report}: get it again, or "
                "convert it as it is with --no-verify"
            )
        if self._output_check.report:
            raise CheckpointError(
                f"{self._dtype} is too narrow for {self.source.folder}: "
                f"{self._output_check.report}: "
                "choose bfloat16 or float32"
            )


def with_image_tokenizer(source: Source, path: Path) -> Source:
    """The checkpoint with the VQ-GAN at `path`; `CheckpointError` if its codes would differ."""
    config, vq = _open_image_tokenizer(path)
    expected = source.config.vq_config
    codebook = source.vq.get(_CODEBOOK)
    if codebook is not None and not _are_equal(codebook, vq[_CODEBOOK]):
        raise CheckpointError(
            f"{path} is not the image tokenizer that {source.folder} was trained with: "
            "their codebooks differ"
        )
    # The network accepts images of any size: the model's config decides it.
    config = replace(config, resolution=expected.resolution)
    if config.grid != expected.grid or config.num_embeddings != expected.num_embeddings:
        raise CheckpointError(
            f"{path} makes {config.grid} x {config.grid} codes of {config.num_embeddings}, and "
            f"{source.folder} expects {expected.grid} x {expected.grid} of "
            f"{expected.num_embeddings}: give the image tokenizer it was trained with"
        )
    return replace(source, config=replace(source.config, vq_config=config), vq=vq)


def _image_tokenizer_at(path: Path) -> Path:
    """`path`, or its tokenizer/ if that holds Meta's VQ-GAN and `path` is no model of its own."""
    tokenizer = path / "tokenizer"
    is_meta = (tokenizer / VQ_CONFIG).is_file() and not (path / "config.json").is_file()
    return tokenizer if is_meta else path


def _open_image_tokenizer(path: Path) -> tuple[VQConfig, dict[str, Stored]]:
    if path.is_file() or (path / VQ_CONFIG).is_file():
        return open_vqgan(path)
    if detect(path) == "meta":
        return open_vqgan(find_tokenizer(path))
    model = open_hf(path, path)
    if _CODEBOOK not in model.vq:
        raise CheckpointError(f"{path} holds no image tokenizer: give a folder with vqgan.ckpt")
    return model.config.vq_config, model.vq


def _are_equal(first: Stored, second: Stored) -> bool:
    """Whether two codebooks are equal except for rounding to bf16."""
    if first.shape != second.shape:
        return False
    return torch.allclose(first.read().float(), second.read().float(), rtol=_ROUNDING, atol=1e-6)


def _check_target(target: Path) -> None:
    try:
        is_unused = not target.exists() or (target.is_dir() and not any(target.iterdir()))
    except OSError as error:
        raise unwritable(target, error) from None
    if not is_unused:
        raise CheckpointError(f"{target} is there already: choose another folder or remove it")


def _folder_of(path: Path) -> Path:
    return path if path.is_dir() else path.parent


def _write(
    source: Source,
    target: Path,
    to: Layout,
    shards: int | None,
    progress: Progress,
    check_values: Callable[[], None],
) -> None:
    """Write a checkpoint and its card; `check_values` is called once all tensors are written."""
    total = sum(s.nbytes for s in (*source.tensors.values(), *source.vq.values()))
    done = 0

    def count_bytes(size: int) -> None:
        nonlocal done
        done += size
        progress(min(done, total), total)

    try:
        _check_room(target, total)
        with new_folder(target) as unfinished:
            _WRITERS[to](source, unfinished, shards, count_bytes)
            check_values()
            for path in card_files(source.folder):
                shutil.copyfile(path, unfinished / path.name)
    except OSError as error:
        raise unwritable(target, error) from None


def _check_room(target: Path, total: int) -> None:
    """Raise `CheckpointError` if the disk has less than `total` bytes left."""
    parent = next(p for p in target.absolute().parents if p.exists())
    # Raises `OSError` if that folder is read-only.
    tempfile.TemporaryDirectory(dir=parent).cleanup()
    free_bytes = shutil.disk_usage(parent).free
    if total > free_bytes:
        raise CheckpointError(
            f"{target} needs {_size_text(total)} and the disk has {_size_text(free_bytes)} left: "
            "free the disk or choose another folder"
        )


def _size_text(num_bytes: int) -> str:
    """A number of bytes as text: 12.3 GB."""
    units = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))
    unit, size = next((pair for pair in units if num_bytes >= pair[1]), ("bytes", 1))
    return f"{num_bytes / size:.1f} {unit}" if size > 1 else f"{num_bytes} {unit}"
