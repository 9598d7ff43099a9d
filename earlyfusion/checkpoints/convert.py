"""One layout into another, a tensor at a time: any supported folder to transformers' or Meta's.

Reading maps files into memory a part at a time. Writing holds one tensor for transformers' layout
and one shard for Meta's, however large the model is.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

import torch

from earlyfusion.checkpoints.checklist import verify_checklist
from earlyfusion.checkpoints.detect import detect, locate, open_source
from earlyfusion.checkpoints.hf import PAPERS, VQ_PREFIX, check, check_dense, open_hf, write_hf
from earlyfusion.checkpoints.meta import (
    VQ_CONFIG,
    check_meta,
    find_tokenizer,
    open_vqgan,
    write_meta,
)
from earlyfusion.checkpoints.source import FiniteCheck, Source, Stored, new_folder
from earlyfusion.config import VQConfig
from earlyfusion.errors import CheckpointError, SettingError

Layout = Literal["hf", "meta"]
Progress = Callable[[int, int], None]

_WRITERS = {"hf": write_hf, "meta": write_meta}
_CODEBOOK = "quantize.embedding.weight"
# bf16 keeps 8 bits of a number: two copies of one codebook differ by no more.
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

    `tokenizer` is a folder with the tokenizer file where the model has none of its own;
    `image_tokenizer` one with a VQ-GAN to add: Meta's tokenizer folder, its vqgan.ckpt, or another
    model. `shards` is the number of files with weights, None for as they came or as few as can be.
    `dtype` is that of the transformer, None for as it is; the VQ-GAN is never narrowed. `verify`
    compares files with their checklist and refuses weights that are NaN or infinite. `progress` is
    told the bytes done, of how many. Raises `CheckpointError` before anything is written where a
    key, a size, the tokenizer or the room is wrong, and before `target` appears where a value is.
    """
    if to not in _WRITERS:
        raise SettingError(f"to={to!r} is unknown: use one of {', '.join(get_args(Layout))}")
    if shards is not None and shards < 1:
        raise SettingError(f"shards={shards} is not possible: use a whole number from 1 up")
    folder = locate(name)
    _check_target(target)
    source = open_source(folder, tokenizer, verify)
    if image_tokenizer is not None:
        if verify:
            verify_checklist(_folder_of(image_tokenizer))
        source = with_image_tokenizer(source, image_tokenizer)
    check_dense(check(source))
    if to == "meta":
        check_meta(source)
    values = _Values(source, dtype)
    _write(values.source, target, to, shards, progress, values.check if verify else lambda: None)


class _Values:
    """A checkpoint in another dtype; `check` tells what was wrong in the tensors read by then."""

    def __init__(self, source: Source, dtype: torch.dtype | None) -> None:
        self._dtype, self._before, self._after = dtype, FiniteCheck(), FiniteCheck()
        own = self._before.watch(source.tensors)
        narrow = self._after.watch({k: stored.to(dtype) for k, stored in own.items()})
        vq = self._before.watch(source.vq, VQ_PREFIX)
        self.source = replace(source, tensors=own if dtype is None else narrow, vq=vq)

    def check(self) -> None:
        if self._before.found:
            raise CheckpointError(
                f"{self.source.folder} cannot be right: {self._before.found}: get it again, or "
                "convert it as it is with --no-verify"
            )
        if self._after.found:
            raise CheckpointError(
                f"{self._dtype} is too narrow for {self.source.folder}: {self._after.found}: "
                "choose bfloat16 or float32"
            )


def with_image_tokenizer(source: Source, place: Path) -> Source:
    """The checkpoint with the VQ-GAN at `place`; `CheckpointError` where its codes would differ."""
    config, vq = _open_image_tokenizer(place)
    own = source.config.vq_config
    known = source.vq.get(_CODEBOOK)
    if known is not None and not _same(known, vq[_CODEBOOK]):
        raise CheckpointError(
            f"{place} is not the image tokenizer that {source.folder} was trained with: "
            "their codebooks differ"
        )
    config = replace(config, resolution=own.resolution)
    if config.grid != own.grid or config.num_embeddings != own.num_embeddings:
        raise CheckpointError(
            f"{place} makes {config.grid} x {config.grid} codes of {config.num_embeddings}, "
            f"{source.folder} expects {own.grid} x {own.grid} of {own.num_embeddings}: "
            "give the image tokenizer it was trained with"
        )
    return replace(source, config=replace(source.config, vq_config=config), vq=vq)


def _open_image_tokenizer(place: Path) -> tuple[VQConfig, dict[str, Stored]]:
    if place.is_file() or (place / VQ_CONFIG).is_file():
        return open_vqgan(place)
    if detect(place) == "meta":
        return open_vqgan(find_tokenizer(place))
    model = open_hf(place, place)
    if _CODEBOOK not in model.vq:
        raise CheckpointError(f"{place} holds no image tokenizer: give a folder with vqgan.ckpt")
    return model.config.vq_config, model.vq


def _same(one: Stored, other: Stored) -> bool:
    if one.shape != other.shape:
        return False
    return torch.allclose(one.read().float(), other.read().float(), rtol=_ROUNDING, atol=1e-6)


def _check_target(target: Path) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target} is there already: choose another folder or remove it")


def _folder_of(place: Path) -> Path:
    return place if place.is_dir() else place.parent


def _write(
    source: Source,
    target: Path,
    to: Layout,
    shards: int | None,
    progress: Progress,
    check_values: Callable[[], None],
) -> None:
    total = sum(s.nbytes for s in (*source.tensors.values(), *source.vq.values()))
    done = 0

    def step(count: int) -> None:
        nonlocal done
        done += count
        progress(min(done, total), total)

    try:
        _check_room(target, total)
        with new_folder(target) as partial:
            _WRITERS[to](source, partial, shards, step)
            check_values()
            _copy_papers(source.folder, partial)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else "the disk refuses"
        raise CheckpointError(
            f"{target} cannot be written ({reason}): free the disk or choose another folder"
        ) from None


def _copy_papers(folder: Path, target: Path) -> None:
    for path in (path for pattern in PAPERS for path in folder.glob(pattern)):
        if path.is_file():
            shutil.copyfile(path, target / path.name)


def _check_room(target: Path, total: int) -> None:
    nearest = next(p for p in target.absolute().parents if p.exists())
    tempfile.TemporaryDirectory(dir=nearest).cleanup()  # `OSError` where nothing can be written
    free = shutil.disk_usage(nearest).free
    if total > free:
        raise CheckpointError(
            f"{target} needs {_size(total)} and the disk has {_size(free)} left: "
            "free the disk or choose another folder"
        )


def _size(count: int) -> str:
    """Bytes in words: 12.3 GB."""
    units = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))
    unit, size = next((pair for pair in units if count >= pair[1]), ("bytes", 1))
    return f"{count / size:.1f} {unit}" if size > 1 else f"{count} {unit}"
