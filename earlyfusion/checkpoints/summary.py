"""What a model folder holds and what running it takes, without placing it on a device."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from earlyfusion.checkpoints.formats import detect, load, locate
from earlyfusion.config import ModelConfig

_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Summary:
    """Sizes of a model. Dicts by dtype count bytes; the image tokenizer always runs in float32."""

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


def summarize(name: str | Path) -> Summary:
    """Read a model by name, folder or hub id; `CheckpointError` where it is not whole."""
    folder = locate(name)
    loaded = load(name, device="meta")
    config, vocabulary = loaded.config, loaded.processor.vocabulary
    counts = {
        "transformer": _parameters(loaded.transformer),
        "image_tokenizer": _parameters(loaded.vqgan),
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
        tokens_per_image=loaded.processor.layout.num_tokens,
        vocabulary={
            "size": vocabulary.size,
            "text": len(vocabulary.text_tokens),
            "image": len(vocabulary.image_tokens),
            "control": len(vocabulary.control_tokens),
        },
    )


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _kv_values(config: ModelConfig) -> int:
    return 2 * config.num_hidden_layers * config.kv_heads * config.head_dim
