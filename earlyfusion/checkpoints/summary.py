"""What a model folder holds and what running it takes, without placing it on a device."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from earlyfusion.checkpoints.detect import detect, locate, open_source
from earlyfusion.checkpoints.hf import VQ_PREFIX, check
from earlyfusion.checkpoints.source import FiniteCheck, Source, Stored
from earlyfusion.config import ModelConfig
from earlyfusion.vocabulary import Vocabulary

_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Summary:
    """Sizes of a model. Dicts by dtype count bytes; the image tokenizer always runs in float32.

    `finite` is "yes", or what is NaN or infinite in the weights; None where nobody looked.
    """

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
    """Read a model by name, folder or hub id; `CheckpointError` where it is not whole.

    `verify` compares files with their checklist, and looks through all weights once.
    """
    folder = locate(name)
    source = check(open_source(folder, verify=verify))
    config, vocabulary = source.config, Vocabulary.from_file(source.tokenizer)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    counts = {
        "transformer": _parameters({k: v for k, v in source.tensors.items() if k not in tied}),
        "image_tokenizer": _parameters(source.vq),
    }
    return Summary(
        folder=str(folder),
        layout=detect(folder),
        file_bytes={p.name: p.stat().st_size for p in sorted(folder.iterdir()) if p.is_file()},
        parameters=counts,
        memory={
            kind: counts["transformer"] * size + counts["image_tokenizer"] * _BYTES["float32"]
            for kind, size in _BYTES.items()
        },
        kv_bytes_per_token={kind: _kv_values(config) * size for kind, size in _BYTES.items()},
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
    """One pass over the weights, a tensor at a time."""
    check = FiniteCheck()
    own = {name: stored for name, stored in source.tensors.items() if name not in tied}
    watched = check.watch(own) | check.watch(source.vq, VQ_PREFIX)
    for stored in watched.values():
        stored.read()
    return f"no: {check.found}" if check.found else "yes"


def _parameters(tensors: Mapping[str, Stored]) -> int:
    return sum(_weights(name, stored) for name, stored in tensors.items())


def _weights(name: str, stored: Stored) -> int:
    """How many weights a tensor holds: a byte of packed ones has two, and scales are none."""
    if name.endswith(".scales"):
        return 0
    return math.prod(stored.shape) * (2 if stored.dtype == torch.uint8 else 1)


def _kv_values(config: ModelConfig) -> int:
    return 2 * config.num_hidden_layers * config.kv_heads * config.head_dim
