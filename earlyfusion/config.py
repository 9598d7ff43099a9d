"""Shapes of the two networks, read from and written to a transformers `config.json`. Field names
are those of transformers' `ChameleonConfig` and `ChameleonVQVAEConfig`, so files need no
translation. Paper: arXiv 2405.09818, sections 2.1 (image tokenizer) and 2.3 (stability)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from earlyfusion.errors import CheckpointError, SettingError
from earlyfusion.files import read_json_object

_MAX_LAYERS = 1000
# With the largest of these sizes torch can still count the entries of a matrix.
_MAX_SIZE = 2**24
_MAX_RESOLUTION = 2**14
# The types of the rotary parameters, besides `rope_type`.
_ROPE_TYPES: dict[str, Any] = {
    "factor": float,
    "attention_factor": float,
    "beta_fast": float,
    "beta_slow": float,
    "mscale": float,
    "mscale_all_dim": float,
    "low_freq_factor": float,
    "high_freq_factor": float,
    "partial_rotary_factor": float,
    "original_max_position_embeddings": float,
    "short_factor": list[float],
    "long_factor": list[float],
}


@dataclass(frozen=True)
class VQConfig:
    """Shape of the VQ-GAN. An image of side `resolution` becomes (resolution / stride)^2 codes."""

    embed_dim: int = 256
    """Width of a codeword."""
    num_embeddings: int = 8192
    """Codewords in the codebook."""
    double_latent: bool = False
    """Whether the encoder's last convolution has twice the `latent_channels`."""
    latent_channels: int = 256
    """Channels of the latents that the encoder makes and the decoder reads."""
    resolution: int = 512
    """Side of the square image, in pixels."""
    in_channels: int = 3
    """Channels of an image."""
    base_channels: int = 128
    """Channels of the first level, a multiple of 32."""
    channel_multiplier: tuple[int, ...] = (1, 1, 2, 2, 4)
    """Per level, its channels as a multiple of `base_channels`. Each level but the last halves the
    side."""
    num_res_blocks: int = 2
    """Residual blocks per level of the encoder; the decoder has one more."""
    attn_resolutions: tuple[int, ...] = ()
    """Sides of feature maps, in pixels: the blocks of these levels have attention."""
    dropout: float = 0.0
    """Share of the activations that the residual blocks drop while training."""
    attn_type: str = "vanilla"
    """vanilla: with attention in the middle and at `attn_resolutions`; any other: without."""

    def __post_init__(self) -> None:
        for name in ("channel_multiplier", "attn_resolutions"):
            object.__setattr__(self, name, tuple(getattr(self, name) or ()))

    def check(self) -> None:
        """Raise `SettingError` naming a field with which no network can be built."""
        _require_sizes(
            self, "embed_dim", "num_embeddings", "latent_channels", "in_channels", "base_channels"
        )
        _require_sizes(self, "resolution", largest=_MAX_RESOLUTION)
        _require(
            0 <= self.num_res_blocks <= _MAX_LAYERS,
            "num_res_blocks",
            self.num_res_blocks,
            f"must be 0 to {_MAX_LAYERS:,}",
        )
        _require(0 <= self.dropout <= 1, "dropout", self.dropout, "must be 0 to 1")
        levels = self.channel_multiplier
        most = _MAX_RESOLUTION.bit_length()  # levels, each with half the side of the one before
        _require(
            0 < len(levels) <= most,
            "channel_multiplier",
            levels[:most],
            f"needs 1 to {most} levels",
        )
        _require(
            all(0 < factor <= _MAX_SIZE // self.base_channels for factor in levels),
            "channel_multiplier",
            levels,
            f"gives a level with less than 1 or more than {_MAX_SIZE:,} channels",
        )
        _require(
            self.base_channels % 32 == 0,
            "base_channels",
            self.base_channels,
            "must be a multiple of the 32 groups of the group norm",
        )

    @property
    def stride(self) -> int:
        """Pixels per code, along one side."""
        return 2 ** (len(self.channel_multiplier) - 1)

    @property
    def grid(self) -> int:
        """Codes along one side of an image; `SettingError` if the stride does not
        divide its side."""
        _require(
            self.resolution % self.stride == 0,
            "resolution",
            self.resolution,
            f"must be a multiple of the stride {self.stride}",
        )
        return self.resolution // self.stride

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> VQConfig:
        """Read transformers' `vq_config`; other names in it are ignored."""
        known = _known(cls, data)
        if data.get("attn_type", "") is None:  # as the transformers classes write "no attention"
            known["attn_type"] = "none"
        return cls(**known)

    def to_dict(self) -> dict[str, Any]:
        data = asdict(self) | {"model_type": "chameleon_vqgan"}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in data.items()}


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the transformer. A config may describe a model that cannot be built; `check`, and
    building it, raise then."""

    vocab_size: int = 65536
    """Tokens of text and images."""
    hidden_size: int = 4096
    """Width of the residual stream."""
    intermediate_size: int = 11008
    """Width inside the MLP."""
    num_hidden_layers: int = 32
    """Layers."""
    num_attention_heads: int = 32
    """Query heads per layer; each is `hidden_size / num_attention_heads` wide."""
    num_key_value_heads: int | None = None
    """Key and value heads per layer, shared by groups of query heads (None: one per query head)."""
    max_position_embeddings: int = 4096
    """Context, in tokens."""
    rms_norm_eps: float = 1e-5
    """What RMSNorm adds to the mean square."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    rope_scaling: dict[str, Any] | None = None
    """transformers' `rope_parameters` with `rope_type`, without `rope_theta` (None: plain RoPE)."""
    swin_norm: bool = False
    """Whether the outputs of attention and MLP are normed instead of their inputs (the 34B; paper,
    section 2.3)."""
    attention_bias: bool = False
    """Whether the projections of attention have biases."""
    mlp_bias: bool = False
    """Whether the projections of the MLP have biases."""
    tie_word_embeddings: bool = False
    """Whether the output head has the weights of the input embedding."""
    initializer_range: float = 0.02
    """Standard deviation of new weights."""
    hidden_act: str = "silu"
    """Activation of the MLP, by its name in transformers."""
    model_parallel_size: int = 1
    """Files that a checkpoint of Meta is split into."""
    bos_token_id: int = 0
    """Begins every prompt."""
    eos_token_id: int | list[int] = 2
    """Ends a reply; any of them, if a list."""
    pad_token_id: int | None = 1
    """Fills the shorter rows of a batch."""
    vq_config: VQConfig = field(default_factory=VQConfig)

    def check(self) -> None:
        """Raise `SettingError` naming a field with which no model can be built."""
        heads, kv = self.num_attention_heads, self.kv_heads
        _require_sizes(
            self, "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads"
        )
        # Memory bounds the context later, when a cache is made.
        _require_sizes(self, "max_position_embeddings", largest=2**40)
        # Each layer takes memory before its weights are looked for.
        _require_sizes(self, "num_hidden_layers", largest=_MAX_LAYERS)
        # The angles are fp32.
        _require(0 < self.rope_theta < 1e38, "rope_theta", self.rope_theta, "must be 0 to 1e38")
        _require(
            self.hidden_size % heads == 0,
            "hidden_size",
            self.hidden_size,
            f"must be a multiple of the {heads} attention heads",
        )
        _require(
            self.head_dim % 2 == 0,
            "hidden_size",
            self.hidden_size,
            f"gives heads of odd width {self.head_dim}, which rotary positions cannot pair",
        )
        _require(
            kv > 0 and heads % kv == 0,
            "num_key_value_heads",
            kv,
            f"must divide the {heads} attention heads",
        )
        self.vq_config.check()

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def rope_type(self) -> str:
        scaling = self.rope_scaling or {}
        return str(scaling.get("rope_type") or scaling.get("type") or "default")

    @property
    def kv_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ModelConfig:
        """Read transformers' `config.json`; other names in it are ignored."""
        known = _known(cls, data)
        known["vq_config"] = VQConfig.from_dict(_object(data, "vq_config"))
        # Older files have `rope_scaling`, which also takes precedence in transformers.
        rope = known.get("rope_scaling") or _object(data, "rope_parameters")
        if rope.get("rope_theta") is not None:
            known["rope_theta"] = typed(rope, "rope_theta", float)
        known["rope_scaling"] = _scaling(rope, data)
        return cls(**known)

    @classmethod
    def from_file(cls, path: Path) -> ModelConfig:
        config = cls.from_dict(read_json_object(path, "a model folder needs a config.json"))
        config.check()
        return config

    def to_dict(self) -> dict[str, Any]:
        data = {f.name: getattr(self, f.name) for f in fields(self)}
        data["num_key_value_heads"] = self.kv_heads
        theta, scaling = data.pop("rope_theta"), data.pop("rope_scaling")
        rope = {"rope_type": self.rope_type} | (scaling or {}) | {"rope_theta": theta}
        return data | {
            "architectures": ["ChameleonForConditionalGeneration"],
            "model_type": "chameleon",
            "rope_parameters": rope,
            "vq_config": self.vq_config.to_dict(),
        }


def _scaling(rope: dict[str, Any], data: dict[str, Any]) -> dict[str, Any] | None:
    """The rotary parameters of a file except `rope_theta`; None for plain RoPE."""
    rope_type = rope.get("rope_type") or rope.get("type") or "default"
    if rope_type == "default":
        return None
    scaling = dict(rope) | {"rope_type": rope_type}
    # transformers also accepts two of them at the top level of the file.
    trained = data.get("original_max_position_embeddings")
    if trained is not None and rope_type in ("llama3", "yarn", "longrope"):
        scaling["original_max_position_embeddings"] = trained
    if data.get("partial_rotary_factor") is not None:
        scaling.setdefault("partial_rotary_factor", data["partial_rotary_factor"])
    for name in scaling.keys() & _ROPE_TYPES.keys():
        if scaling[name] is not None:
            typed(scaling, name, _ROPE_TYPES[name])
    return scaling


def _require(good: bool, name: str, value: object, why: str) -> None:
    if not good:
        raise SettingError(f"{name}={value} {why}")


def _require_sizes(config: ModelConfig | VQConfig, *names: str, largest: int = _MAX_SIZE) -> None:
    for name in names:
        value = getattr(config, name)
        _require(0 < value <= largest, name, value, f"must be 1 to {largest:,}")


def _known(cls: type[ModelConfig] | type[VQConfig], data: dict[str, Any]) -> dict[str, Any]:
    """The fields of `cls` that a file gives; null leaves the default."""
    types = get_type_hints(cls)
    names = [f.name for f in fields(cls) if f.name != "vq_config"]
    return {name: typed(data, name, types[name]) for name in names if data.get(name) is not None}


def _object(data: dict[str, Any], name: str) -> dict[str, Any]:
    """The JSON object of this name, empty if there is none."""
    found: dict[str, Any] = typed(data, name, dict) if data.get(name) is not None else {}
    return found


def typed(data: Mapping[str, Any], name: str, expected: Any, where: str = "config.json") -> Any:
    """`data[name]`; `CheckpointError`, which names the file `where`, if it is not `expected`."""
    value = data[name]
    if not _fits(value, expected):
        raise CheckpointError(
            f"{name}={value!r} in {where} is of the wrong type: it must be "
            f"{getattr(expected, '__name__', expected)}"
        )
    return value


def _fits(value: object, expected: Any) -> bool:
    if get_origin(expected) is UnionType:
        return any(_fits(value, each) for each in get_args(expected))
    if get_origin(expected) in (list, tuple):
        item = get_args(expected)[0]
        return isinstance(value, list | tuple) and all(_fits(v, item) for v in value)
    if expected is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    # For isinstance a bool is an int; in a config it is not.
    is_same = (expected is bool) == isinstance(value, bool)
    return is_same and isinstance(value, get_origin(expected) or expected)


_TINY_VQ = VQConfig(
    embed_dim=8,
    num_embeddings=64,
    latent_channels=16,
    resolution=16,
    base_channels=32,
    channel_multiplier=(1, 1),
    num_res_blocks=1,
)
_7B = ModelConfig()

PRESETS: dict[str, ModelConfig] = {
    "chameleon-7b": _7B,
    "chameleon-34b": replace(
        _7B,
        hidden_size=8192,
        intermediate_size=22016,
        num_hidden_layers=48,
        num_attention_heads=64,
        num_key_value_heads=8,
        swin_norm=True,
    ),
    "mini": ModelConfig(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=10,
        num_attention_heads=4,
        max_position_embeddings=1024,
        vq_config=VQConfig(
            embed_dim=16,
            num_embeddings=1024,
            latent_channels=64,
            resolution=64,
            base_channels=32,
            channel_multiplier=(1, 2, 4, 4),
            num_res_blocks=1,
        ),
    ),
    "tiny": ModelConfig(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        vq_config=_TINY_VQ,
    ),
}
