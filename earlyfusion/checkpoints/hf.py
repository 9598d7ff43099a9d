"""The transformers layout: config.json, safetensors, tokenizer.json; the only owner of safetensors.

The transformer's names are its own; the VQ-GAN's stand under `model.vqmodel.`, with the decoder
that transformers leaves out. Its weights stay fp32 in memory: in bf16 some codes would change.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from earlyfusion.config import ModelConfig, VQConfig
from earlyfusion.errors import CheckpointError
from earlyfusion.model.transformer import Transformer
from earlyfusion.model.vqgan import VQGAN
from earlyfusion.processor import Processor
from earlyfusion.vocabulary import (
    BEGIN_IMAGE,
    BOS,
    END_IMAGE,
    END_OF_TURN,
    EOS,
    IMAGE_PLACEHOLDERS,
    IMAGE_PREFIX,
    PAD,
    UNK,
    ImageLayout,
    Vocabulary,
)

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TOKENIZER = "tokenizer.json"
VQ_PREFIX = "model.vqmodel."
_SHOWN_KEYS = 10


@dataclass
class Loaded:
    """A whole model read from a folder, on its device, in eval mode."""

    config: ModelConfig
    transformer: Transformer
    vqgan: VQGAN
    processor: Processor
    generation_defaults: dict[str, Any] = field(default_factory=dict)
    folder: Path = Path()

    @property
    def can_decode(self) -> bool:
        """Whether codes can become pictures; transformers' own files hold no decoder."""
        return self.vqgan.decoder is not None


def load_hf(
    folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> Loaded:
    """Read a folder in transformers' layout; `dtype` None keeps that of the file.

    Raises `CheckpointError` for missing or damaged files and for keys that are not as expected.
    """
    config = ModelConfig.from_file(folder / "config.json")
    tensors = read_safetensors(folder)
    vq = {k.removeprefix(VQ_PREFIX): tensors.pop(k) for k in _under(VQ_PREFIX, tensors)}
    if not vq:
        raise CheckpointError(
            f"{folder} holds no image tokenizer ({VQ_PREFIX}*): convert it together with its VQ-GAN"
        )
    grid = config.vq_config.grid
    return Loaded(
        config=config,
        transformer=build_transformer(config, tensors, folder, device, dtype),
        vqgan=build_vqgan(config.vq_config, vq, folder, device),
        processor=Processor(folder / TOKENIZER, ImageLayout(grid, grid)),
        generation_defaults=_read_json(folder / "generation_config.json", needed=False),
        folder=folder,
    )


def save_hf(
    folder: Path,
    transformer: Transformer,
    vqgan: VQGAN,
    tokenizer_json: str,
    generation_config: Mapping[str, Any],
    *,
    dtype: torch.dtype | None = None,
    vq_dtype: torch.dtype | None = None,
    extra_files: Mapping[str, str] | None = None,
) -> None:
    """Write a folder that `load_hf` and transformers read; all of it appears at once, or nothing.

    A folder that is a model already is replaced; any other that is not empty is refused.
    """
    if folder.exists() and any(folder.iterdir()) and not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} is not empty and no model: choose another folder")
    named = dtype or transformer.lm_head.weight.dtype
    texts = _texts(transformer.config, json.loads(tokenizer_json), generation_config, named)
    texts = {TOKENIZER: tokenizer_json} | texts | dict(extra_files or {})
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        save_file(
            _tensors(transformer, vqgan, dtype, vq_dtype), partial / WEIGHTS, {"format": "pt"}
        )
        for name, text in texts.items():
            (partial / name).write_text(text, encoding="utf-8")
        partial.chmod(0o755)
        _sync(partial)
        _put_in_place(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def read_safetensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, on the CPU, of one file or of the shards its index names."""
    names = [WEIGHTS]
    if (folder / INDEX).is_file():
        names = sorted(set(_read_json(folder / INDEX).get("weight_map", {}).values()))
    tensors: dict[str, Tensor] = {}
    for name in names:
        try:
            tensors |= load_file(folder / name)
        except (OSError, SafetensorError):
            raise CheckpointError(
                f"{folder / name} is missing or damaged: download or convert the model again"
            ) from None
    return tensors


def build_transformer(
    config: ModelConfig,
    tensors: dict[str, Tensor],
    source: Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> Transformer:
    """A transformer in eval mode that owns `tensors`, named as transformers names them."""
    # Written by old versions of transformers; computed here.
    tensors = {k: v for k, v in tensors.items() if not k.endswith("rotary_emb.inv_freq")}
    embedding = "model.embed_tokens.weight"
    if config.tie_word_embeddings and embedding in tensors:
        tensors["lm_head.weight"] = tensors[embedding]
    with torch.device("meta"):
        transformer = Transformer(config)
    fill(transformer, tensors, source, device, dtype)
    transformer.tie_weights()
    return transformer.eval()


def build_vqgan(
    config: VQConfig, tensors: dict[str, Tensor], source: Path, device: torch.device | str = "cpu"
) -> VQGAN:
    """A VQ-GAN in eval mode and fp32, without a decoder where `tensors` have none."""
    with torch.device("meta"):
        vqgan = VQGAN(config, with_decoder=bool(_under("decoder.", tensors)))
    fill(vqgan, tensors, source, device, torch.float32)
    return vqgan.eval()


def fill(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    source: Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> None:
    """Give a module its tensors; `CheckpointError` lists keys and shapes that do not match."""
    wanted = module.state_dict()
    problems = {
        "lacks": wanted.keys() - tensors.keys(),
        "has unknown": tensors.keys() - wanted.keys(),
        "has wrong shapes for": {
            k for k in wanted.keys() & tensors.keys() if wanted[k].shape != tensors[k].shape
        },
    }
    found = [f"{what} {_listed(keys)}" for what, keys in problems.items() if keys]
    if found:
        raise CheckpointError(f"{source} does not fit its config: it {'; it '.join(found)}")
    placed = {k: v.to(device=device, dtype=dtype) for k, v in tensors.items()}
    module.load_state_dict(placed, assign=True)


def _listed(keys: Collection[str]) -> str:
    shown = ", ".join(sorted(keys)[:_SHOWN_KEYS])
    more = f" and {len(keys) - _SHOWN_KEYS} more" if len(keys) > _SHOWN_KEYS else ""
    return f"{len(keys)} keys: {shown}{more}" if len(keys) > 1 else f"the key {shown}"


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> list[str]:
    return [name for name in tensors if name.startswith(prefix)]


def _read_json(path: Path, needed: bool = True) -> dict[str, Any]:
    if not needed and not path.exists():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise CheckpointError(f"{path} is missing or not JSON: get the file again") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} is not a JSON object: get the file again")
    return data


def _tensors(
    transformer: Transformer,
    vqgan: VQGAN,
    dtype: torch.dtype | None,
    vq_dtype: torch.dtype | None,
) -> dict[str, Tensor]:
    language, vision = transformer.state_dict(), vqgan.state_dict()
    if transformer.config.tie_word_embeddings:
        del language["lm_head.weight"]
    tensors = {k: v.detach().to("cpu", dtype).contiguous() for k, v in language.items()}
    for name, value in vision.items():
        tensors[VQ_PREFIX + name] = value.detach().to("cpu", vq_dtype).contiguous()
    return tensors


def _texts(
    config: ModelConfig,
    tokenizer: Mapping[str, Any],
    generation_config: Mapping[str, Any],
    dtype: torch.dtype,
) -> dict[str, str]:
    vocabulary = Vocabulary.from_dict(tokenizer)
    placeholder = next((n for n in IMAGE_PLACEHOLDERS if n in vocabulary.names), None)
    # What transformers looks up to embed pictures; its model cannot be built without.
    images = {n: i for n, i in vocabulary.names.items() if n.startswith(IMAGE_PREFIX)}
    if vocabulary.image_placeholder is not None:
        images["<image>"] = vocabulary.image_placeholder
    more = {"dtype": str(dtype).removeprefix("torch."), "vocabulary_map": images}
    files = {
        "config.json": config.to_dict() | more,
        "generation_config.json": dict(generation_config),
        "tokenizer_config.json": _tokenizer_config(config, placeholder),
        "processor_config.json": _processor_config(config.vq_config, placeholder),
    }
    return {name: json.dumps(data, indent=2) + "\n" for name, data in files.items()}


def _tokenizer_config(config: ModelConfig, placeholder: str | None) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.max_position_embeddings,
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "unk_token": UNK,
        "sep_token": END_OF_TURN,
        "image_token": placeholder,
        "boi_token": BEGIN_IMAGE,
        "eoi_token": END_IMAGE,
        "clean_up_tokenization_spaces": False,
    }


def _processor_config(vq: VQConfig, placeholder: str | None) -> dict[str, Any]:
    side = vq.resolution
    return {
        "processor_class": "ChameleonProcessor",
        "image_seq_length": vq.grid**2,
        "image_token": placeholder,
        "image_processor": {
            "image_processor_type": "ChameleonImageProcessor",
            "size": {"shortest_edge": side},
            "crop_size": {"height": side, "width": side},
            "rescale_factor": 2 / 255,
            "image_mean": [1.0, 1.0, 1.0],
            "image_std": [1.0, 1.0, 1.0],
        },
    }


def _sync(folder: Path) -> None:
    for path in [*folder.iterdir(), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _put_in_place(partial: Path, folder: Path) -> None:
    if not folder.exists():
        partial.rename(folder)
        return
    # A folder cannot be renamed onto a full one: the old one steps aside for a moment.
    old = partial.with_name(f"{partial.name}.old")
    folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old)
