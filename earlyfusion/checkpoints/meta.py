"""Meta's own layout: consolidated*.pth with params.json, and a tokenizer folder with the VQ-GAN.

The 34B comes in four files, one a GPU. Here they become one model on any device: the tables below
say how shards are joined. Rotary pairs are neighbours in Meta's files and half a head apart in
ours, so queries, keys and their norms are reordered; each shard has its own QK-norm, which is
repeated for each head of that shard. (Facts from github.com/facebookresearch/chameleon.)
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from earlyfusion.checkpoints.hf import Loaded, build_transformer, build_vqgan
from earlyfusion.config import ModelConfig, VQConfig
from earlyfusion.errors import CheckpointError
from earlyfusion.model.vqgan import VQGAN
from earlyfusion.processor import Processor
from earlyfusion.vocabulary import ImageLayout

Join = Callable[[list[Tensor], ModelConfig], Tensor]

TOKENIZER = "text_tokenizer.json"
VQ_CONFIG, VQ_WEIGHTS = "vqgan.yaml", "vqgan.ckpt"


def unrotate(rows: Tensor, head_dim: int) -> Tensor:
    """Reorder each head's rows from neighbouring rotary pairs to halves: 0 2 4 … 1 3 5 …"""
    pairs = rows.view(-1, head_dim // 2, 2, *rows.shape[1:])
    return pairs.transpose(1, 2).reshape(rows.shape)


def _rows(shards: list[Tensor], config: ModelConfig) -> Tensor:
    return torch.cat(shards, 0)


def _columns(shards: list[Tensor], config: ModelConfig) -> Tensor:
    return torch.cat(shards, 1)


def _copies(shards: list[Tensor], config: ModelConfig) -> Tensor:
    # Every shard holds the same; a mean is the fair reading should training have let them drift.
    return torch.stack(shards).float().mean(0).to(shards[0].dtype)


def _rotary_rows(shards: list[Tensor], config: ModelConfig) -> Tensor:
    return unrotate(torch.cat(shards, 0), config.head_dim)


def _norm_of(heads: Callable[[ModelConfig], int]) -> Join:
    def join(shards: list[Tensor], config: ModelConfig) -> Tensor:
        own_HM = torch.stack([unrotate(shard, config.head_dim) for shard in shards])
        return own_HM.repeat_interleave(heads(config) // len(shards), 0)

    return join


_Q_NORM = _norm_of(lambda config: config.num_attention_heads)
_K_NORM = _norm_of(lambda config: config.kv_heads)

_WHOLE: dict[str, tuple[str, Join]] = {
    "tok_embeddings.weight": ("model.embed_tokens.weight", _columns),
    "norm.weight": ("model.norm.weight", _copies),
    "output.weight": ("lm_head.weight", _rows),
}
_LAYER: dict[str, tuple[str, Join]] = {
    "attention.wq.weight": ("self_attn.q_proj.weight", _rotary_rows),
    "attention.wk.weight": ("self_attn.k_proj.weight", _rotary_rows),
    "attention.wv.weight": ("self_attn.v_proj.weight", _rows),
    "attention.wo.weight": ("self_attn.o_proj.weight", _columns),
    "attention.q_normalization.weight": ("self_attn.q_norm.weight", _Q_NORM),
    "attention.q_normalization.bias": ("self_attn.q_norm.bias", _Q_NORM),
    "attention.k_normalization.weight": ("self_attn.k_norm.weight", _K_NORM),
    "attention.k_normalization.bias": ("self_attn.k_norm.bias", _K_NORM),
    "attention_norm.weight": ("input_layernorm.weight", _copies),
    "feed_forward.w1.weight": ("mlp.gate_proj.weight", _rows),
    "feed_forward.w2.weight": ("mlp.down_proj.weight", _columns),
    "feed_forward.w3.weight": ("mlp.up_proj.weight", _rows),
    "ffn_norm.weight": ("post_attention_layernorm.weight", _copies),
}
_IGNORED = {"rope.freqs"}


def load_meta(
    folder: Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    tokenizer: Path | None = None,
) -> Loaded:
    """Read a model folder of Meta's download, whole or in shards.

    The tokenizer folder is `tokenizer`, or the one beside the models: ../../tokenizer.
    """
    tokens = tokenizer or find_tokenizer(folder)
    vqgan = load_vqgan(tokens, device)
    config = read_config(folder, vqgan.config)
    layout = ImageLayout(vqgan.config.grid, vqgan.config.grid)
    return Loaded(
        config=config,
        transformer=build_transformer(config, read_tensors(folder, config), folder, device, dtype),
        vqgan=vqgan,
        processor=Processor(tokens / TOKENIZER, layout),
        folder=folder,
    )


def find_tokenizer(folder: Path) -> Path:
    """The nearest folder with a text_tokenizer.json."""
    places = [
        folder,
        folder / "tokenizer",
        *(p / "tokenizer" for p in folder.absolute().parents[:2]),
    ]
    for place in places:
        if (place / TOKENIZER).is_file():
            return place
    raise CheckpointError(
        f"no {TOKENIZER} beside {folder}: give the folder with Meta's tokenizer and VQ-GAN"
    )


def load_vqgan(folder: Path, device: torch.device | str = "cpu") -> VQGAN:
    """The VQ-GAN of a tokenizer folder (vqgan.yaml, vqgan.ckpt), in fp32 and eval mode."""
    config = _vq_config(folder / VQ_CONFIG)
    state = _torch_load(folder / VQ_WEIGHTS)
    state = state.get("state_dict", state)
    tensors = {k: v for k, v in state.items() if not k.startswith("loss.")}
    return build_vqgan(config, tensors, folder / VQ_WEIGHTS, device)


def read_config(folder: Path, vq_config: VQConfig | None = None) -> ModelConfig:
    """params.json with its "model" part, overruled by consolidate_params.json."""
    params = _read_params(folder / "params.json")
    overruling = folder / "consolidate_params.json"
    merged = params | dict(params.get("model") or {})
    if overruling.exists():
        merged |= _read_params(overruling)
    missing = [n for n in ("dim", "n_layers", "n_heads", "vocab_size") if merged.get(n, -1) <= 0]
    if missing:
        raise CheckpointError(f"{folder} gives no {', '.join(missing)}: params.json is incomplete")
    if not merged.get("qk_normalization", False):
        raise CheckpointError(f"{folder} has no QK-norm: only Chameleon checkpoints can be read")
    return ModelConfig(
        vocab_size=merged["vocab_size"],
        hidden_size=merged["dim"],
        intermediate_size=_inner_width(merged),
        num_hidden_layers=merged["n_layers"],
        num_attention_heads=merged["n_heads"],
        num_key_value_heads=merged.get("n_kv_heads"),
        rms_norm_eps=merged.get("norm_eps", 1e-5),
        rope_theta=merged.get("rope_theta", 10000.0),
        swin_norm=merged.get("swin_norm", False),
        model_parallel_size=merged.get("model_parallel_size", 1),
        vq_config=vq_config or VQConfig(),
    )


def read_tensors(folder: Path, config: ModelConfig) -> dict[str, Tensor]:
    """All tensors under our names, shards joined."""
    shards = [_torch_load(path) for path in _shard_paths(folder)]
    table = _table(config.num_hidden_layers)
    names = [set(shard) - _IGNORED for shard in shards]
    if any(other != names[0] for other in names):
        raise CheckpointError(f"the shards in {folder} hold different keys: download them again")
    joined: dict[str, Tensor] = {}
    for name in sorted(names[0]):
        ours, join = table.get(name, (name, _copies))
        try:
            joined[ours] = join([shard[name] for shard in shards], config)
        except RuntimeError:
            raise CheckpointError(f"{name} in {folder} has a shape unlike params.json") from None
    return joined


def _table(layers: int) -> dict[str, tuple[str, Join]]:
    table = dict(_WHOLE)
    for i in range(layers):
        for name, (ours, join) in _LAYER.items():
            table[f"layers.{i}.{name}"] = (f"model.layers.{i}.{ours}", join)
    return table


def _shard_paths(folder: Path) -> list[Path]:
    whole = folder / "consolidated.pth"
    paths = [whole] if whole.is_file() else sorted(folder.glob("consolidated.*.pth"))
    expected = [f"consolidated.{rank:02}.pth" for rank in range(len(paths))]
    if not paths or (paths != [whole] and [p.name for p in paths] != expected):
        raise CheckpointError(
            f"{folder} lacks consolidated.pth, or one of consolidated.00.pth, .01.pth, …: "
            "download it again"
        )
    return paths


def _inner_width(params: Mapping[str, Any]) -> int:
    """Two thirds of four widths, scaled, and rounded up to a multiple."""
    width = int(2 * (4 * params["dim"]) / 3)
    if params.get("ffn_dim_multiplier") is not None:
        width = int(params["ffn_dim_multiplier"] * width)
    multiple = int(params.get("multiple_of", 256))
    return multiple * ((width + multiple - 1) // multiple)


def _vq_config(path: Path) -> VQConfig:
    try:
        params = yaml.safe_load(path.read_text(encoding="utf-8"))["model"]["params"]
        shape = params["ddconfig"]
        return VQConfig(
            embed_dim=params["embed_dim"],
            num_embeddings=params["n_embed"],
            double_latent=shape["double_z"],
            latent_channels=shape["z_channels"],
            resolution=shape["resolution"],
            in_channels=shape["in_channels"],
            base_channels=shape["ch"],
            channel_multiplier=shape["ch_mult"],
            num_res_blocks=shape["num_res_blocks"],
            attn_resolutions=shape["attn_resolutions"],
            dropout=shape["dropout"],
        )
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        raise CheckpointError(
            f"{path} is missing or no VQ-GAN config: get the file again"
        ) from None


def _read_params(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        raise CheckpointError(f"{path} is missing or no JSON object: download it again") from None


def _torch_load(path: Path) -> dict[str, Any]:
    try:
        data = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return dict(data)
    except (OSError, RuntimeError, ValueError, TypeError, EOFError, pickle.UnpicklingError):
        raise CheckpointError(
            f"{path} is missing, damaged, or holds more than tensors: download it again"
        ) from None
