"""One layout into another, a tensor at a time: any supported folder to transformers' or Meta's.

Reading maps files into memory a part at a time. Writing holds one tensor for transformers' layout
and one shard for Meta's, however large the model is.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

import torch

from earlyfusion.checkpoints.formats import detect, locate, open_source
from earlyfusion.checkpoints.hf import check, open_hf, write_hf
from earlyfusion.checkpoints.meta import (
    VQ_CONFIG,
    check_meta,
    find_tokenizer,
    open_vqgan,
    verify_checklist,
    write_meta,
)
from earlyfusion.checkpoints.source import Source, Stored, new_folder
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
    progress: Progress = lambda done, total: None,
) -> None:
    """Write the model `name` into the new folder `target`, which appears whole or not at all.

    `tokenizer` is a folder with the tokenizer file where the model has none of its own;
    `image_tokenizer` one with a VQ-GAN to add: Meta's tokenizer folder, its vqgan.ckpt, or another
    model. `shards` is the number of files with weights. `dtype` is that of the transformer, None
    for as it is; the VQ-GAN is never narrowed. `progress` is told the bytes done, of how many.
    Raises `CheckpointError` before anything is written where a key, a size or the room is wrong.
    """
    if to not in _WRITERS:
        raise SettingError(f"to={to!r} is unknown: use one of {', '.join(get_args(Layout))}")
    if shards is not None and shards < 1:
        raise SettingError(f"shards={shards} is not possible: use a whole number from 1 up")
    folder = locate(name)
    _check_target(target)
    source = open_source(folder, tokenizer)
    for place in {folder, source.tokenizer.parent}:
        verify_checklist(place)
    if image_tokenizer is not None:
        source = with_image_tokenizer(source, image_tokenizer)
    check(source)
    if to == "meta":
        check_meta(source)
    source.tensors = {name: stored.to(dtype) for name, stored in source.tensors.items()}
    _write(source, target, to, shards, progress)


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


def _write(
    source: Source, target: Path, to: Layout, shards: int | None, progress: Progress
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
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else "the disk refuses"
        raise CheckpointError(
            f"{target} cannot be written ({reason}): free the disk or choose another folder"
        ) from None


def _check_room(target: Path, total: int) -> None:
    nearest = next(p for p in target.absolute().parents if p.exists())
    free = shutil.disk_usage(nearest).free
    if total > free:
        raise CheckpointError(
            f"{target} needs {total / 1e9:.1f} GB and the disk has {free / 1e9:.1f} GB left: "
            "free the disk or choose another folder"
        )
