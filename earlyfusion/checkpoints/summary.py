"""The output of `info`: the contents of a model folder and the memory that running it takes. The
networks are built without memory for their weights and the files are checked against them, so a
summary implies that the files are complete."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from earlyfusion.checkpoints.assemble import checked
from earlyfusion.checkpoints.detect import detect, locate, open_source
from earlyfusion.checkpoints.hf import VQ_PREFIX
from earlyfusion.checkpoints.source import HEAD, FiniteCheck, Source, Stored
from earlyfusion.config import ModelConfig
from earlyfusion.vocabulary import Vocabulary

_BYTES_OF_DTYPE = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Summary:
    """Sizes of a model. `memory` and `kv_bytes_per_token` are bytes by dtype of the transformer;
    the image tokenizer always runs in float32. `finite` is "yes", "no: …" with the tensors that
    hold NaN or infinite values, or None if the weights were not read."""

    folder: str
    layout: str
    file_bytes: dict[str, int]
    parameters: dict[str, int]
    memory: dict[str, int]
    kv_bytes_per_token: dict[str, int]
    context: int
    image_side: int
    tokens_per_image: int
    vocabulary: dict[str, int]
    finite: str | None


def summarize(name: str | Path, verify: bool = True) -> Summary:
    """Describe a model by name, folder or hub id; `CheckpointError` if it is incomplete. `verify`
    compares files with their checklist and reads all weights once."""
    folder = locate(name)
    source = checked(open_source(folder, verify=verify))
    config, vocabulary = source.config, Vocabulary.from_file(source.tokenizer)
    tied = {HEAD} if config.tie_word_embeddings else set()
    counts = {
        "transformer": _num_parameters({k: v for k, v in source.tensors.items() if k not in tied}),
        "image_tokenizer": _num_parameters(source.vq),
    }
    return Summary(
        folder=str(folder),
        layout=detect(folder),
        file_bytes={p.name: p.stat().st_size for p in sorted(folder.iterdir()) if p.is_file()},
        parameters=counts,
        memory={
            dtype: counts["transformer"] * size
            + counts["image_tokenizer"] * _BYTES_OF_DTYPE["float32"]
            for dtype, size in _BYTES_OF_DTYPE.items()
        },
        kv_bytes_per_token={
            dtype: _kv_values(config) * size for dtype, size in _BYTES_OF_DTYPE.items()
        },
        context=config.max_position_embeddings,
        image_side=config.vq_config.resolution,
        tokens_per_image=source.layout.num_tokens,
        vocabulary={
            "size": vocabulary.size,
            "text": len(vocabulary.text_tokens),
            "image": len(vocabulary.image_tokens),
            "control": len(vocabulary.control_tokens),
        },
        finite=_finite(source, tied) if verify else None,
    )


def _finite(source: Source, tied: set[str]) -> str:
    """The `finite` of a summary: reads all weights, one tensor at a time."""
    check = FiniteCheck()
    tensors = {name: stored for name, stored in source.tensors.items() if name not in tied}
    all_tensors = check.watch(tensors) | check.watch(source.vq, VQ_PREFIX)
    for stored in all_tensors.values():
        stored.read()
    return f"no: {check.report}" if check.report else "yes"


def _num_parameters(tensors: Mapping[str, Stored]) -> int:
    return sum(_num_weights(name, stored) for name, stored in tensors.items())


def _num_weights(name: str, stored: Stored) -> int:
    if name.endswith(".scales"):  # of packed weights
        return 0
    weights_per_value = 2 if stored.dtype == torch.uint8 else 1  # a byte holds two 4-bit weights
    return math.prod(stored.shape) * weights_per_value


def _kv_values(config: ModelConfig) -> int:
    """The number of values in the keys and values of one token."""
    return 2 * config.num_hidden_layers * config.kv_heads * config.head_dim
