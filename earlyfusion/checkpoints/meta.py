"""Meta's own layout: consolidated*.pth with params.json, and a tokenizer folder with the VQ-GAN.

The 34B comes in four shards, one per GPU. The tables below say how they are joined into one model,
and how a model is split into shards. In Meta's files the two numbers of a rotary pair are adjacent;
here they are half a head apart, so the rows of queries, keys and their norms are reordered. A shard
has one QK-norm for all of its heads; here each head has a copy. Facts from
github.com/facebookresearch/chameleon.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor

from earlyfusion.checkpoints.anole import rotate, unrotate
from earlyfusion.checkpoints.checklist import write_checklist
from earlyfusion.checkpoints.hf import PROCESSOR, read_resize_mode
from earlyfusion.checkpoints.source import (
    META_TOKENIZER,
    MappedFile,
    OnBytes,
    Source,
    Stored,
    find_tokenizer_file,
    open_torch_file,
    read_json,
    torch_load,
)
from earlyfusion.config import ModelConfig, VQConfig, typed
from earlyfusion.errors import CheckpointError
from earlyfusion.files import new_folder
from earlyfusion.model.vqgan import VQGAN
from earlyfusion.vocabulary import ImageLayout, Vocabulary


class Shard(NamedTuple):
    """Number `rank` of `total` shards."""

    rank: int
    total: int


Join = Callable[[list[Tensor], ModelConfig], Tensor]
Split = Callable[[Tensor, Shard, ModelConfig], Tensor]

VQ_CONFIG, VQ_WEIGHTS = "vqgan.yaml", "vqgan.ckpt"
_FREQUENCIES = "rope.freqs"
# The fields of params.json that are read.
_PARAMS: dict[str, Any] = {
    "dim": int,
    "n_layers": int,
    "n_heads": int,
    "n_kv_heads": int,
    "vocab_size": int,
    "multiple_of": int,
    "ffn_dim_multiplier": float,
    "norm_eps": float,
    "rope_theta": float,
    "qk_normalization": bool,
    "swin_norm": bool,
    "max_position_embeddings": int,
    "model_parallel_size": int,
}
_IGNORED = {_FREQUENCIES}  # computed here


def _join_rows(shards: list[Tensor], config: ModelConfig) -> Tensor:
    return torch.cat(shards, 0)


def _join_columns(shards: list[Tensor], config: ModelConfig) -> Tensor:
    return torch.cat(shards, 1)


def _join_replicas(shards: list[Tensor], config: ModelConfig) -> Tensor:
    # All shards should hold the same values. If training let them drift apart, take the mean; in
    # fp64 the mean of equal values is that value to the bit.
    return torch.stack(shards).double().mean(0).to(shards[0].dtype)


def _join_rotary(shards: list[Tensor], config: ModelConfig) -> Tensor:
    return unrotate(torch.cat(shards, 0), config.head_dim)


def _join_norms(heads: Callable[[ModelConfig], int]) -> Join:
    def join(shards: list[Tensor], config: ModelConfig) -> Tensor:
        norms = torch.stack([unrotate(shard, config.head_dim) for shard in shards])
        return norms.repeat_interleave(heads(config) // len(shards), 0)

    return join


def _split_rows(tensor: Tensor, shard: Shard, config: ModelConfig) -> Tensor:
    return tensor.chunk(shard.total, 0)[shard.rank]


def _split_columns(tensor: Tensor, shard: Shard, config: ModelConfig) -> Tensor:
    return tensor.chunk(shard.total, 1)[shard.rank]


def _replicate(tensor: Tensor, shard: Shard, config: ModelConfig) -> Tensor:
    return tensor


def _split_rotary(tensor: Tensor, shard: Shard, config: ModelConfig) -> Tensor:
    return rotate(tensor.chunk(shard.total, 0)[shard.rank], config.head_dim)


def _split_norms(tensor: Tensor, shard: Shard, config: ModelConfig) -> Tensor:
    # The norms of a shard's heads are equal, as `_shard_count` has checked.
    return rotate(tensor.chunk(shard.total, 0)[shard.rank][0], config.head_dim)


class Rule(NamedTuple):
    """The name of a tensor in this package, how its shards are joined, and how it is split."""

    name: str
    join: Join
    split: Split


def _q_norm(name: str) -> Rule:
    return Rule(name, _join_norms(lambda config: config.num_attention_heads), _split_norms)


def _k_norm(name: str) -> Rule:
    return Rule(name, _join_norms(lambda config: config.kv_heads), _split_norms)


_MODEL_RULES: dict[str, Rule] = {
    "tok_embeddings.weight": Rule("model.embed_tokens.weight", _join_columns, _split_columns),
    "norm.weight": Rule("model.norm.weight", _join_replicas, _replicate),
    "output.weight": Rule("lm_head.weight", _join_rows, _split_rows),
}
_LAYER_RULES: dict[str, Rule] = {
    "attention.wq.weight": Rule("self_attn.q_proj.weight", _join_rotary, _split_rotary),
    "attention.wk.weight": Rule("self_attn.k_proj.weight", _join_rotary, _split_rotary),
    "attention.wv.weight": Rule("self_attn.v_proj.weight", _join_rows, _split_rows),
    "attention.wo.weight": Rule("self_attn.o_proj.weight", _join_columns, _split_columns),
    "attention.q_normalization.weight": _q_norm("self_attn.q_norm.weight"),
    "attention.q_normalization.bias": _q_norm("self_attn.q_norm.bias"),
    "attention.k_normalization.weight": _k_norm("self_attn.k_norm.weight"),
    "attention.k_normalization.bias": _k_norm("self_attn.k_norm.bias"),
    "attention_norm.weight": Rule("input_layernorm.weight", _join_replicas, _replicate),
    "feed_forward.w1.weight": Rule("mlp.gate_proj.weight", _join_rows, _split_rows),
    "feed_forward.w2.weight": Rule("mlp.down_proj.weight", _join_columns, _split_columns),
    "feed_forward.w3.weight": Rule("mlp.up_proj.weight", _join_rows, _split_rows),
    "ffn_norm.weight": Rule("post_attention_layernorm.weight", _join_replicas, _replicate),
}


def open_meta(folder: Path, tokenizer: Path | None = None) -> Source:
    """Open a model folder as Meta and Anole publish it, whole or in shards. `tokenizer` is the
    folder of tokenizer and VQ-GAN, or one whose tokenizer/ is (None: the nearest)."""
    if tokenizer is None:
        tokenizer_folder = find_tokenizer(folder)
    else:
        tokenizer_folder = _tokenizer_in(tokenizer) or tokenizer
    vq_config, vq = open_vqgan(tokenizer_folder)
    tokenizer_file = find_tokenizer_file(tokenizer_folder / META_TOKENIZER)
    ids = Vocabulary.from_file(tokenizer_file)
    config = replace(
        read_config(folder, vq_config),
        bos_token_id=ids.bos,
        eos_token_id=ids.eos,
        pad_token_id=ids.pad,
    )
    config.check()
    return Source(
        folder=folder,
        config=config,
        tensors=open_tensors(folder, config),
        vq=vq,
        tokenizer=tokenizer_file,
        layout=ImageLayout(vq_config.grid, vq_config.grid),
        generation_defaults=_generation_defaults(folder),
        resize_mode=read_resize_mode(folder),
    )


def copy_to_meta(source: Source, folder: Path, shards: int | None, on_bytes: OnBytes) -> None:
    """Write an open checkpoint into an empty folder in Meta's layout, with tokenizer/ inside.
    `shards` None means the number that the model came in, or the fewest that can hold it. One shard
    at a time is in memory. Raises `CheckpointError` for a model that the layout cannot hold."""
    config, count = source.config, _shard_count(source, shards)
    tokenizer_folder = folder / "tokenizer"
    tokenizer_folder.mkdir()
    for rank in range(count):
        _write_shard(source, folder, Shard(rank, count), on_bytes)
    _write_tokenizer(source, tokenizer_folder, on_bytes)
    # As in Meta's own folders, only the second file has the vocabulary's size.
    params = {"model_parallel_size": count, "model": _model_params(config)}
    override = {"model_parallel_size": count, "vocab_size": config.vocab_size}
    files = {"params.json": params, "consolidate_params.json": override}
    if source.generation_defaults:
        files["generation_config.json"] = source.generation_defaults
    if source.resize_mode != "crop":
        # Only this package reads this file: Meta's code always crops.
        files[PROCESSOR] = {"image_processor": {"resize_mode": source.resize_mode}}
    for name, data in files.items():
        (folder / name).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    write_checklist(folder)
    write_checklist(tokenizer_folder)


def find_tokenizer(folder: Path) -> Path:
    """The nearest folder with a text_tokenizer.json: this, or tokenizer/ here or in two parents."""
    in_parents = (parent / "tokenizer" for parent in folder.absolute().parents[:2])
    nearest = _tokenizer_in(folder, *in_parents)
    if nearest is None:
        raise CheckpointError(
            f"no {META_TOKENIZER} beside {folder}: give the folder with Meta's tokenizer and VQ-GAN"
        )
    return nearest


def _tokenizer_in(folder: Path, *others: Path) -> Path | None:
    """The first folder with a text_tokenizer.json: this, its tokenizer/, or one of the others."""
    candidates = (folder, folder / "tokenizer", *others)
    return next((path for path in candidates if (path / META_TOKENIZER).is_file()), None)


def open_vqgan(path: Path) -> tuple[VQConfig, dict[str, Stored]]:
    """The VQ-GAN of a tokenizer folder, or of a .ckpt file with a vqgan.yaml in its folder."""
    folder, weights = (path, path / VQ_WEIGHTS) if path.is_dir() else (path.parent, path)
    config = _vq_config(folder / VQ_CONFIG)
    stored = open_torch_file(weights)
    # Checkpoints of training also hold the networks of the loss.
    return config, {k: v for k, v in stored.items() if not k.startswith("loss.")}


def read_config(folder: Path, vq_config: VQConfig | None = None) -> ModelConfig:
    """The model's shape from params.json, its "model" entry, and consolidate_params.json; of a
    field in several, the last one counts."""
    params = read_json(folder / "params.json")
    if params.get("model") is not None:
        params |= typed(params, "model", dict, str(folder / "params.json"))
    override = read_json(folder / "consolidate_params.json", needed=False)
    values, where = params | override, f"the params of {folder}"
    # null leaves the default.
    names = [name for name in _PARAMS if values.get(name) is not None]
    fields = {name: typed(values, name, _PARAMS[name], where) for name in names}
    missing = [n for n in ("dim", "n_layers", "n_heads", "vocab_size") if fields.get(n, -1) <= 0]
    if missing:
        raise CheckpointError(
            f"{folder} gives no {', '.join(missing)}: params.json is incomplete, download it again"
        )
    if not fields.get("qk_normalization", False):
        raise CheckpointError(f"{folder} has no QK-norm: only Chameleon checkpoints can be read")
    if fields.get("multiple_of", 1) < 1:
        raise CheckpointError(
            f"multiple_of={fields['multiple_of']} in {where} must be at least 1: get the file again"
        )
    return ModelConfig(
        vocab_size=fields["vocab_size"],
        hidden_size=fields["dim"],
        intermediate_size=inner_width(fields),
        num_hidden_layers=fields["n_layers"],
        num_attention_heads=fields["n_heads"],
        num_key_value_heads=fields.get("n_kv_heads"),
        rms_norm_eps=fields.get("norm_eps", 1e-5),
        rope_theta=fields.get("rope_theta", 10000.0),
        swin_norm=fields.get("swin_norm", False),
        max_position_embeddings=fields.get("max_position_embeddings", 4096),
        model_parallel_size=fields.get("model_parallel_size", 1),
        vq_config=vq_config or VQConfig(),
    )


def open_tensors(folder: Path, config: ModelConfig) -> dict[str, Stored]:
    """All tensors under this package's names; shards are joined when a tensor is read."""
    paths = _shard_paths(folder, config.model_parallel_size)
    states = [torch_load(path) for path in paths]
    names = [set(shard) - _IGNORED for shard in states]
    if any(other != names[0] for other in names):
        raise CheckpointError(f"the shards in {folder} hold different keys: download them again")
    files = [MappedFile(partial(_open_shard, path)) for path in paths]
    # Also open names without a rule: `checked` will list them as unknown.
    table = _rules(config.num_hidden_layers)
    with_rule = [name for name in table if name in names[0]]
    tensors: dict[str, Stored] = {}
    for name in [*with_rule, *sorted(names[0] - table.keys())]:
        rule = table.get(name, Rule(name, _join_replicas, _replicate))
        try:
            tensors[rule.name] = _join_stored(
                [file.stored(name) for file in files], rule.join, config
            )
        except (RuntimeError, IndexError):
            raise CheckpointError(
                f"{name} in {folder} does not have the shape that params.json says: "
                "download both again"
            ) from None
        except AttributeError:
            raise CheckpointError(
                f"{name} in {folder} is not a tensor: download the file again"
            ) from None
    return tensors


def _open_shard(path: Path) -> Callable[[str], Tensor]:
    return torch_load(path).__getitem__


def _join_stored(shards: Sequence[Stored], join: Join, config: ModelConfig) -> Stored:
    """One tensor from its shards, which are read when it is read."""
    # Run on meta tensors, to learn the shape of the joined one.
    empty_shards = [torch.empty(s.shape, dtype=s.dtype, device="meta") for s in shards]
    result = join(empty_shards, config)
    return Stored(
        result.dtype, tuple(result.shape), lambda: join([s.read() for s in shards], config)
    )


def _rules(layers: int) -> dict[str, Rule]:
    """The rule for each of Meta's names, in the order of the network."""
    embedding, *last = _MODEL_RULES.items()
    blocks = [
        (f"layers.{i}.{name}", rule._replace(name=f"model.layers.{i}.{rule.name}"))
        for i in range(layers)
        for name, rule in _LAYER_RULES.items()
    ]
    return dict([embedding, *blocks, *last])


def _shard_paths(folder: Path, count: int) -> list[Path]:
    """The weight files in order; `count` is the number of shards that the config names."""
    single_file = folder / "consolidated.pth"
    paths = [single_file] if single_file.is_file() else sorted(folder.glob("consolidated.*.pth"))
    expected = [f"consolidated.{rank:02}.pth" for rank in range(len(paths))]
    if not paths or (paths != [single_file] and [p.name for p in paths] != expected):
        raise CheckpointError(
            f"{folder} lacks consolidated.pth, or one of consolidated.00.pth, .01.pth, …: "
            "download it again"
        )
    if paths != [single_file] and len(paths) < count:
        absent = ", ".join(f"consolidated.{rank:02}.pth" for rank in range(len(paths), count))
        raise CheckpointError(
            f"{folder} lacks {absent}: its params.json says {count} shards; download it again"
        )
    return paths


def inner_width(params: Mapping[str, Any]) -> int:
    """Meta's formula for the width of the feed-forward, from params.json."""
    width = int(2 * (4 * params["dim"]) / 3)
    if params.get("ffn_dim_multiplier") is not None:
        width = int(params["ffn_dim_multiplier"] * width)
    multiple = int(params.get("multiple_of", 256))
    return multiple * ((width + multiple - 1) // multiple)  # rounded up


def _vq_config(path: Path) -> VQConfig:
    """The VQ-GAN's shape from vqgan.yaml, in the names of Esser et al. 2021."""
    try:
        params = yaml.safe_load(path.read_text(encoding="utf-8"))["model"]["params"]
        shape = params["ddconfig"]
        return VQConfig.from_dict(
            {
                "embed_dim": params["embed_dim"],
                "num_embeddings": params["n_embed"],
                "double_latent": shape["double_z"],
                "latent_channels": shape["z_channels"],
                "resolution": shape["resolution"],
                "in_channels": shape["in_channels"],
                "base_channels": shape["ch"],
                "channel_multiplier": shape["ch_mult"],
                "num_res_blocks": shape["num_res_blocks"],
                "attn_resolutions": shape["attn_resolutions"],
                "dropout": shape["dropout"],
                "attn_type": shape.get("attn_type", "vanilla"),  # Meta's own files leave it out
            }
        )
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError):
        raise CheckpointError(
            f"{path} is missing or not a VQ-GAN config: get the file again"
        ) from None


def _generation_defaults(folder: Path) -> dict[str, Any]:
    """Sampling defaults; only folders that this package wrote have them."""
    return read_json(folder / "generation_config.json", needed=False)


def _write_shard(source: Source, folder: Path, shard: Shard, on_bytes: OnBytes) -> None:
    """Write one weight file: each tensor is read whole and split."""
    config, tensors = source.config, {}
    for name, rule in _rules(config.num_hidden_layers).items():
        shard_tensor = rule.split(source.tensors[rule.name].read(), shard, config)
        # A copy: for a view, torch would write the whole tensor that it belongs to.
        tensors[name] = shard_tensor.clone(memory_format=torch.contiguous_format)
        on_bytes(shard_tensor.nbytes)
    tensors[_FREQUENCIES] = _rotary_frequencies(config)
    name = f"consolidated.{shard.rank:02}.pth" if shard.total > 1 else "consolidated.pth"
    torch.save(tensors, folder / name)


def _write_tokenizer(source: Source, folder: Path, on_bytes: OnBytes) -> None:
    text = source.tokenizer.read_text(encoding="utf-8-sig")
    (folder / META_TOKENIZER).write_text(text, encoding="utf-8")
    _write_vqgan(folder, source.config.vq_config, {k: s.read() for k, s in source.vq.items()})
    on_bytes(sum(stored.nbytes for stored in source.vq.values()))


def save_vqgan(folder: Path, vqgan: VQGAN) -> None:
    """Write vqgan.yaml and vqgan.ckpt, which `convert` accepts as `image_tokenizer`."""
    with new_folder(folder) as unfinished:
        _write_vqgan(unfinished, vqgan.config, vqgan.state_dict())


def _write_vqgan(folder: Path, config: VQConfig, state: Mapping[str, Tensor]) -> None:
    shape = yaml.safe_dump({"model": {"params": _vq_params(config)}})
    (folder / VQ_CONFIG).write_text(shape, encoding="utf-8")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    torch.save({"state_dict": tensors}, folder / VQ_WEIGHTS)


def _rotary_frequencies(config: ModelConfig) -> Tensor:
    """The rotary frequencies, which Meta's files hold and this package computes: [head_dim / 2]."""
    steps = torch.arange(0, config.head_dim, 2).float()
    return 1.0 / config.rope_theta ** (steps / config.head_dim)


def check_meta(source: Source) -> None:
    """Raise `CheckpointError` for a model that Meta's layout cannot hold in any number of files."""
    config = source.config
    reasons = {
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "rope_scaling": bool(config.rope_scaling),
        f"hidden_act={config.hidden_act}": config.hidden_act not in ("silu", "swish"),
        "the size tokens of Lumina-mGPT": source.family != "chameleon",
    }
    reason = next((name for name, applies in reasons.items() if applies), None)
    if reason:
        raise CheckpointError(f"Meta's layout has no place for {reason}: convert to hf")
    with torch.device("meta"):
        expected = VQGAN(config.vq_config).state_dict()
    if not set(expected) <= set(source.vq):
        raise CheckpointError(
            f"Meta's layout needs a whole image tokenizer, which {source.folder} lacks: "
            "give one with --image-tokenizer"
        )


def _shard_count(source: Source, requested: int | None) -> int:
    """How many shards to write; `CheckpointError` if that number cannot hold the model."""
    config, possible = source.config, _possible_shards(source)
    count = requested or config.model_parallel_size
    if count in possible:
        return count
    if possible and requested is None:
        return min(possible)
    if not possible:
        raise CheckpointError(
            f"{source.folder} has QK-norms that differ within each possible shard, and Meta's "
            "layout has one per shard: convert to hf"
        )
    raise CheckpointError(
        f"{count} shards are not possible: they must divide the {config.num_attention_heads} "
        f"heads and {config.kv_heads} key heads, and the heads of a shard share one QK-norm; "
        f"choose {' or '.join(map(str, possible))}"
    )


def _possible_shards(source: Source) -> list[int]:
    """The numbers of shards that can hold the model, ascending."""
    config = source.config
    # Every dimension that is split must be divisible.
    common = math.gcd(
        config.num_attention_heads,
        config.kv_heads,
        config.hidden_size,
        config.intermediate_size,
        config.vocab_size,
    )
    norms = [s.read() for n, s in source.tensors.items() if ".q_norm." in n or ".k_norm." in n]
    return [n for n in range(1, common + 1) if common % n == 0 and _can_share(norms, n)]


def _can_share(norms: Sequence[Tensor], shards: int) -> bool:
    """Whether all heads of a shard have the same QK-norm, so that one can be stored for them."""
    per_shard = chain.from_iterable(norm.chunk(shards, 0) for norm in norms)
    return all(torch.equal(norm, norm[:1].expand_as(norm)) for norm in per_shard)


def _model_params(config: ModelConfig) -> dict[str, Any]:
    """The "model" entry of params.json."""
    return {
        "dim": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.kv_heads,
        **width_params(config.hidden_size, config.intermediate_size),
        "norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "qk_normalization": True,
        "swin_norm": config.swin_norm,
        # Meta's code ignores this field.
        "max_position_embeddings": config.max_position_embeddings,
    }


def width_params(dim: int, width: int) -> dict[str, Any]:
    """The fields from which `inner_width` gives this width."""
    for multiple in (256, 128, 64, 32, 16, 8, 4, 2, 1):
        if inner_width({"dim": dim, "multiple_of": multiple}) == width:
            return {"multiple_of": multiple}
    # No multiple gives this width: use 1 and a factor. The 0.5 keeps `inner_width`, which rounds
    # down, from ending one below.
    factor = (width + 0.5) / int(2 * (4 * dim) / 3)
    return {"multiple_of": 1, "ffn_dim_multiplier": factor}


def _vq_params(config: VQConfig) -> dict[str, Any]:
    """The inverse of `_vq_config`: the `params` of vqgan.yaml."""
    return {
        "embed_dim": config.embed_dim,
        "n_embed": config.num_embeddings,
        "ddconfig": {
            "double_z": config.double_latent,
            "z_channels": config.latent_channels,
            "resolution": config.resolution,
            "in_channels": config.in_channels,
            "out_ch": config.in_channels,
            "ch": config.base_channels,
            "ch_mult": list(config.channel_multiplier),
            "num_res_blocks": config.num_res_blocks,
            "attn_resolutions": list(config.attn_resolutions),
            "dropout": config.dropout,
        }
        | ({} if config.attn_type == "vanilla" else {"attn_type": config.attn_type}),
    }
