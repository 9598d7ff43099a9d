"""Meta's own layout: consolidated*.pth with params.json, and a tokenizer folder with the VQ-GAN.

The 34B comes in four files, one a GPU. Here they become one model on any device, and a model
becomes any number of them: the tables below say how shards are joined and cut. Rotary pairs are
neighbours in Meta's files and half a head apart in ours, so queries, keys and their norms are
reordered; each shard has its own QK-norm, which is repeated for each head of that shard. (Facts
from github.com/facebookresearch/chameleon.)
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor

from earlyfusion.checkpoints.anole import rotate, unrotate
from earlyfusion.checkpoints.checklist import write_checklist
from earlyfusion.checkpoints.hf import (
    PROCESSOR,
    Loaded,
    assemble,
    build_vqgan,
    find_tokenizer_file,
    open_pickle,
    read_resize_mode,
)
from earlyfusion.checkpoints.source import (
    MappedFile,
    Source,
    Step,
    Stored,
    new_folder,
    torch_load,
)
from earlyfusion.config import ModelConfig, VQConfig
from earlyfusion.errors import CheckpointError
from earlyfusion.model.vqgan import VQGAN
from earlyfusion.vocabulary import ImageLayout


class Part(NamedTuple):
    """One of so many shards."""

    rank: int
    of: int


Join = Callable[[list[Tensor], ModelConfig], Tensor]
Cut = Callable[[Tensor, Part, ModelConfig], Tensor]

TOKENIZER = "text_tokenizer.json"
VQ_CONFIG, VQ_WEIGHTS = "vqgan.yaml", "vqgan.ckpt"
_FREQUENCIES = "rope.freqs"
_IGNORED = {_FREQUENCIES}


def _join_rows(shards: list[Tensor], config: ModelConfig) -> Tensor:
    return torch.cat(shards, 0)


def _join_columns(shards: list[Tensor], config: ModelConfig) -> Tensor:
    return torch.cat(shards, 1)


def _join_copies(shards: list[Tensor], config: ModelConfig) -> Tensor:
    # Every shard holds the same; a mean is the fair reading should training have let them drift.
    # In fp64 the mean of equal values is that value, to the bit.
    return torch.stack(shards).double().mean(0).to(shards[0].dtype)


def _join_rotary(shards: list[Tensor], config: ModelConfig) -> Tensor:
    return unrotate(torch.cat(shards, 0), config.head_dim)


def _join_norms(heads: Callable[[ModelConfig], int]) -> Join:
    def join(shards: list[Tensor], config: ModelConfig) -> Tensor:
        own_HM = torch.stack([unrotate(shard, config.head_dim) for shard in shards])
        return own_HM.repeat_interleave(heads(config) // len(shards), 0)

    return join


def _cut_rows(whole: Tensor, part: Part, config: ModelConfig) -> Tensor:
    return whole.chunk(part.of, 0)[part.rank]


def _cut_columns(whole: Tensor, part: Part, config: ModelConfig) -> Tensor:
    return whole.chunk(part.of, 1)[part.rank]


def _cut_copies(whole: Tensor, part: Part, config: ModelConfig) -> Tensor:
    return whole


def _cut_rotary(whole: Tensor, part: Part, config: ModelConfig) -> Tensor:
    return rotate(whole.chunk(part.of, 0)[part.rank], config.head_dim)


def _cut_norms(whole: Tensor, part: Part, config: ModelConfig) -> Tensor:
    # All heads of the shard have this one: `_shard_count` has seen to it.
    return rotate(whole.chunk(part.of, 0)[part.rank][0], config.head_dim)


class Rule(NamedTuple):
    """Our name of a tensor, how shards of it are joined, and how one is cut out."""

    ours: str
    join: Join
    cut: Cut


def _q_norm(name: str) -> Rule:
    return Rule(name, _join_norms(lambda config: config.num_attention_heads), _cut_norms)


def _k_norm(name: str) -> Rule:
    return Rule(name, _join_norms(lambda config: config.kv_heads), _cut_norms)


_WHOLE: dict[str, Rule] = {
    "tok_embeddings.weight": Rule("model.embed_tokens.weight", _join_columns, _cut_columns),
    "norm.weight": Rule("model.norm.weight", _join_copies, _cut_copies),
    "output.weight": Rule("lm_head.weight", _join_rows, _cut_rows),
}
_LAYER: dict[str, Rule] = {
    "attention.wq.weight": Rule("self_attn.q_proj.weight", _join_rotary, _cut_rotary),
    "attention.wk.weight": Rule("self_attn.k_proj.weight", _join_rotary, _cut_rotary),
    "attention.wv.weight": Rule("self_attn.v_proj.weight", _join_rows, _cut_rows),
    "attention.wo.weight": Rule("self_attn.o_proj.weight", _join_columns, _cut_columns),
    "attention.q_normalization.weight": _q_norm("self_attn.q_norm.weight"),
    "attention.q_normalization.bias": _q_norm("self_attn.q_norm.bias"),
    "attention.k_normalization.weight": _k_norm("self_attn.k_norm.weight"),
    "attention.k_normalization.bias": _k_norm("self_attn.k_norm.bias"),
    "attention_norm.weight": Rule("input_layernorm.weight", _join_copies, _cut_copies),
    "feed_forward.w1.weight": Rule("mlp.gate_proj.weight", _join_rows, _cut_rows),
    "feed_forward.w2.weight": Rule("mlp.down_proj.weight", _join_columns, _cut_columns),
    "feed_forward.w3.weight": Rule("mlp.up_proj.weight", _join_rows, _cut_rows),
    "ffn_norm.weight": Rule("post_attention_layernorm.weight", _join_copies, _cut_copies),
}


def load_meta(
    folder: Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    tokenizer: Path | None = None,
) -> Loaded:
    """Read a model folder of Meta's download, whole or in shards.

    The tokenizer folder is `tokenizer`, or the one beside the models: ../../tokenizer.
    """
    return assemble(open_meta(folder, tokenizer), device, dtype)


def open_meta(folder: Path, tokenizer: Path | None = None) -> Source:
    """Open a model folder of Meta's download, or of Anole's, whole or in shards."""
    tokens = tokenizer or find_tokenizer(folder)
    vq_config, vq = open_vqgan(tokens)
    config = read_config(folder, vq_config)
    return Source(
        folder=folder,
        config=config,
        tensors=open_tensors(folder, config),
        vq=vq,
        tokenizer=find_tokenizer_file(tokens / TOKENIZER),
        layout=ImageLayout(vq_config.grid, vq_config.grid),
        generation_defaults=_own_defaults(folder),
        resize_mode=read_resize_mode(folder),
    )


def write_meta(source: Source, folder: Path, shards: int | None, step: Step) -> None:
    """Write an open checkpoint into an empty folder as Meta's, with tokenizer/ inside of it.

    `shards` None takes as many as the model came in, or as few as can hold it. One shard at a time
    is in memory; `step` is told the bytes of each tensor. Raises `CheckpointError` for what the
    layout cannot hold.
    """
    config, count = source.config, _shard_count(source, shards)
    tokens = folder / "tokenizer"
    tokens.mkdir()
    for rank in range(count):
        _write_shard(source, folder, Part(rank, count), step)
    _write_tokenizer(source, tokens, step)
    params = {"model_parallel_size": count, "model": _model_params(config)}
    overruling = {"model_parallel_size": count, "vocab_size": config.vocab_size}
    files = {"params.json": params, "consolidate_params.json": overruling}
    if source.generation_defaults:
        files["generation_config.json"] = source.generation_defaults
    if source.resize_mode != "crop":
        # Meta's own code crops and has no file for it: only this package reads this one.
        files[PROCESSOR] = {"image_processor": {"resize_mode": source.resize_mode}}
    for name, data in files.items():
        (folder / name).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    for place in (folder, tokens):
        write_checklist(place)


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
    config, stored = open_vqgan(folder)
    tensors = {name: entry.read() for name, entry in stored.items()}
    return build_vqgan(config, tensors, folder / VQ_WEIGHTS, device)


def open_vqgan(place: Path) -> tuple[VQConfig, dict[str, Stored]]:
    """The VQ-GAN of a tokenizer folder, or of a .ckpt file with vqgan.yaml beside it."""
    folder, weights = (place, place / VQ_WEIGHTS) if place.is_dir() else (place.parent, place)
    config = _vq_config(folder / VQ_CONFIG)
    stored = open_pickle(weights)
    return config, {k: v for k, v in stored.items() if not k.startswith("loss.")}


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
        max_position_embeddings=merged.get("max_position_embeddings", 4096),
        model_parallel_size=merged.get("model_parallel_size", 1),
        vq_config=vq_config or VQConfig(),
    )


def read_tensors(folder: Path, config: ModelConfig) -> dict[str, Tensor]:
    """All tensors under our names, shards joined."""
    return {name: stored.read() for name, stored in open_tensors(folder, config).items()}


def open_tensors(folder: Path, config: ModelConfig) -> dict[str, Stored]:
    """All tensors under our names, shards joined as they are read."""
    paths = _shard_paths(folder, config.model_parallel_size)
    opened = [torch_load(path) for path in paths]
    names = [set(shard) - _IGNORED for shard in opened]
    if any(other != names[0] for other in names):
        raise CheckpointError(f"the shards in {folder} hold different keys: download them again")
    files = [MappedFile(partial(_lookup, path)) for path in paths]
    table = _table(config.num_hidden_layers)
    in_order = [name for name in table if name in names[0]]
    joined: dict[str, Stored] = {}
    for name in [*in_order, *sorted(names[0] - table.keys())]:
        rule = table.get(name, Rule(name, _join_copies, _cut_copies))
        try:
            joined[rule.ours] = _joined([file.stored(name) for file in files], rule.join, config)
        except (RuntimeError, IndexError):
            raise CheckpointError(f"{name} in {folder} has a shape unlike params.json") from None
        except AttributeError:
            raise CheckpointError(f"{name} in {folder} is no tensor: download it again") from None
    return joined


def _lookup(path: Path) -> Callable[[str], Tensor]:
    return torch_load(path).__getitem__


def _joined(shards: Sequence[Stored], join: Join, config: ModelConfig) -> Stored:
    blanks = [torch.empty(s.shape, dtype=s.dtype, device="meta") for s in shards]
    whole = join(blanks, config)
    return Stored(whole.dtype, tuple(whole.shape), lambda: join([s.read() for s in shards], config))


def _table(layers: int) -> dict[str, Rule]:
    """Meta's names and what they mean, in the order of the network."""
    embedding, *last = _WHOLE.items()
    blocks = [
        (f"layers.{i}.{name}", rule._replace(ours=f"model.layers.{i}.{rule.ours}"))
        for i in range(layers)
        for name, rule in _LAYER.items()
    ]
    return dict([embedding, *blocks, *last])


def _shard_paths(folder: Path, count: int) -> list[Path]:
    whole = folder / "consolidated.pth"
    paths = [whole] if whole.is_file() else sorted(folder.glob("consolidated.*.pth"))
    expected = [f"consolidated.{rank:02}.pth" for rank in range(len(paths))]
    if not paths or (paths != [whole] and [p.name for p in paths] != expected):
        raise CheckpointError(
            f"{folder} lacks consolidated.pth, or one of consolidated.00.pth, .01.pth, …: "
            "download it again"
        )
    if paths != [whole] and len(paths) < count:
        absent = ", ".join(f"consolidated.{rank:02}.pth" for rank in range(len(paths), count))
        raise CheckpointError(
            f"{folder} lacks {absent}: its params.json says {count} shards; download it again"
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


def _own_defaults(folder: Path) -> dict[str, Any]:
    """Sampling defaults, which only folders of our own writing have."""
    path = folder / "generation_config.json"
    return _read_params(path) if path.is_file() else {}


def _read_params(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        raise CheckpointError(f"{path} is missing or no JSON object: download it again") from None


def _write_shard(source: Source, folder: Path, part: Part, step: Step) -> None:
    config, shard = source.config, {}
    for name, rule in _table(config.num_hidden_layers).items():
        cut = rule.cut(source.tensors[rule.ours].read(), part, config)
        # A view would bring the whole tensor into the file.
        shard[name] = cut.clone(memory_format=torch.contiguous_format)
        step(cut.nbytes)
    shard[_FREQUENCIES] = _frequencies(config)
    name = f"consolidated.{part.rank:02}.pth" if part.of > 1 else "consolidated.pth"
    torch.save(shard, folder / name)


def _write_tokenizer(source: Source, folder: Path, step: Step) -> None:
    text = source.tokenizer.read_text(encoding="utf-8")
    (folder / TOKENIZER).write_text(text, encoding="utf-8")
    _write_vqgan(folder, source.config.vq_config, {k: s.read() for k, s in source.vq.items()})
    step(sum(stored.nbytes for stored in source.vq.values()))


def save_vqgan(folder: Path, vqgan: VQGAN) -> None:
    """Write a VQ-GAN as a tokenizer folder (vqgan.yaml, vqgan.ckpt) that `load_vqgan` reads."""
    with new_folder(folder) as partial:
        _write_vqgan(partial, vqgan.config, vqgan.state_dict())


def _write_vqgan(folder: Path, config: VQConfig, state: Mapping[str, Tensor]) -> None:
    shape = yaml.safe_dump({"model": {"params": _vq_params(config)}})
    (folder / VQ_CONFIG).write_text(shape, encoding="utf-8")
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    torch.save({"state_dict": whole}, folder / VQ_WEIGHTS)


def _frequencies(config: ModelConfig) -> Tensor:
    steps = torch.arange(0, config.head_dim, 2).float()
    return 1.0 / config.rope_theta ** (steps / config.head_dim)


def check_meta(source: Source) -> None:
    """`CheckpointError` for what Meta's layout cannot hold, whatever the number of shards."""
    config = source.config
    reasons = {
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "rope_scaling": bool(config.rope_scaling),
        f"hidden_act={config.hidden_act}": config.hidden_act not in ("silu", "swish"),
        "the size tokens of Lumina-mGPT": source.kind != "chameleon",
    }
    found = next((name for name, there in reasons.items() if there), None)
    if found:
        raise CheckpointError(f"Meta's layout has no place for {found}: convert to hf")
    with torch.device("meta"):
        wanted = VQGAN(config.vq_config).state_dict()
    if not set(wanted) <= set(source.vq):
        raise CheckpointError(
            f"Meta's layout needs a whole image tokenizer, which {source.folder} lacks: "
            "give one with --image-tokenizer"
        )


def _shard_count(source: Source, asked: int | None) -> int:
    """How many shards to write; `CheckpointError` where so many, or any, cannot hold the model."""
    config, possible = source.config, _possible_shards(source)
    count = asked or config.model_parallel_size
    if count in possible:
        return count
    if possible and asked is None:
        return min(possible)
    if not possible:
        raise CheckpointError(
            f"{source.folder} has QK-norms that differ inside of every cut, and Meta's layout "
            "has one for each shard: convert to hf"
        )
    raise CheckpointError(
        f"{count} shards are not possible: they must divide the {config.num_attention_heads} "
        f"heads and {config.kv_heads} key heads, and the heads of a shard share one QK-norm; "
        f"choose {' or '.join(map(str, possible))}"
    )


def _possible_shards(source: Source) -> list[int]:
    config = source.config
    common = math.gcd(
        config.num_attention_heads,
        config.kv_heads,
        config.hidden_size,
        config.intermediate_size,
        config.vocab_size,
    )
    norms = [s.read() for n, s in source.tensors.items() if ".q_norm." in n or ".k_norm." in n]
    return [n for n in range(1, common + 1) if common % n == 0 and _shared(norms, n)]


def _shared(norms: Sequence[Tensor], shards: int) -> bool:
    """Whether the heads of each shard have the same norm."""
    pieces = chain.from_iterable(norm.chunk(shards, 0) for norm in norms)
    return all(torch.equal(piece, piece[:1].expand_as(piece)) for piece in pieces)


def _model_params(config: ModelConfig) -> dict[str, Any]:
    """The "model" part of params.json; Meta's code skips the last name, this package reads it."""
    return {
        "dim": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.kv_heads,
        **_width_params(config.hidden_size, config.intermediate_size),
        "norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "qk_normalization": True,
        "swin_norm": config.swin_norm,
        "max_position_embeddings": config.max_position_embeddings,
    }


def _width_params(dim: int, width: int) -> dict[str, Any]:
    """What makes `_inner_width` give this width: a multiple, and a factor where none does."""
    for multiple in (256, 128, 64, 32, 16, 8, 4, 2, 1):
        if _inner_width({"dim": dim, "multiple_of": multiple}) == width:
            return {"multiple_of": multiple}
    factor = (width + 0.5) / int(2 * (4 * dim) / 3)
    return {"multiple_of": 1, "ffn_dim_multiplier": factor}


def _vq_params(config: VQConfig) -> dict[str, Any]:
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
        },
    }
