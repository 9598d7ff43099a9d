# Copyright 2026 the authors of earlyfusion. Licensed under the Apache License 2.0.
"""The two configs, with the fields, defaults and files of transformers' own. As in transformers,
making a config only checks the types of its values. A value that no network can have raises when a
model is built, with the name of the field."""

# No `from __future__ import annotations`: transformers checks fields by their annotations.

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

from earlyfusion.config import ModelConfig, VQConfig
from earlyfusion.errors import SettingError
from earlyfusion.hf.tensor_parallel import LAYERS
from earlyfusion.vocabulary import IMAGE_PLACEHOLDERS


@strict
class ChameleonVQVAEConfig(PreTrainedConfig):
    """Shape of the VQ-GAN. `attn_type` None removes all attention, as in transformers' docs."""

    model_type = "chameleon_vqgan"
    base_config_key = "vq_config"

    embed_dim: int = 256
    num_embeddings: int = 8192
    double_latent: bool = False
    latent_channels: int = 256
    resolution: int = 512
    in_channels: int = 3
    base_channels: int = 128
    channel_multiplier: list[int] | tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    attn_resolutions: list[int] | tuple[int, ...] | None = None
    dropout: float | int = 0.0
    attn_type: str | None = "vanilla"
    initializer_range = 0.02


@strict
class ChameleonConfig(PreTrainedConfig):
    """Shape of the transformer with that of its VQ-GAN. `vocabulary_map` (token name to id) names
    the ids of images; it may be omitted if the model's folder has a tokenizer file.
    `num_key_value_heads` None means one per query head."""

    model_type = "chameleon"
    # transformers before 5.23 reads the first of these, later versions the second.
    sub_configs: ClassVar[dict[str, Any]] = {"vq_config": ChameleonVQVAEConfig}
    sub_configs_defaults: ClassVar[dict[str, Any]] = {"vq_config": ChameleonVQVAEConfig}
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    base_model_tp_plan: ClassVar[dict[str, str]] = LAYERS

    vocab_size: int = 65536
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = 32
    hidden_act: str = "silu"
    max_position_embeddings: int = 4096
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-05
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False
    rope_parameters: dict[str, Any] | None = None
    attention_bias: bool | None = False
    attention_dropout: float | int | None = 0.0
    model_parallel_size: int | None = 1
    swin_norm: bool | None = False
    vq_config: dict[str, Any] | PreTrainedConfig | None = None
    vocabulary_map: dict[str, int] | None = None
    mlp_bias: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        self.vq_config = _as_vq_config(self.vq_config)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        self.image_token_id = (self.vocabulary_map or {}).get(IMAGE_PLACEHOLDERS[1])
        super().__post_init__(**kwargs)


def shape(config: ChameleonConfig) -> ModelConfig:
    """The same shape for the core modules; `SettingError` names an impossible field."""
    dropout = config.attention_dropout or 0.0
    if not 0.0 <= dropout < 1.0:
        raise SettingError(f"attention_dropout={dropout} must be at least 0 and below 1")
    rope = dict(config.rope_parameters or {})
    scaled = rope.get("rope_type", rope.get("type", "default")) != "default"
    return ModelConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=config.rms_norm_eps,
        rope_theta=rope.get("rope_theta", ModelConfig.rope_theta),
        rope_scaling=rope if scaled else None,
        swin_norm=bool(config.swin_norm),
        attention_bias=bool(config.attention_bias),
        mlp_bias=config.mlp_bias,
        tie_word_embeddings=config.tie_word_embeddings,
        hidden_act=config.hidden_act,
        initializer_range=config.initializer_range,
        vq_config=vq_shape(_as_vq_config(config.vq_config)),
    )


def vq_shape(config: ChameleonVQVAEConfig) -> VQConfig:
    """The same shape for the core VQ-GAN; `SettingError` names an impossible field."""
    return VQConfig(
        embed_dim=config.embed_dim,
        num_embeddings=config.num_embeddings,
        double_latent=config.double_latent,
        latent_channels=config.latent_channels,
        resolution=config.resolution,
        in_channels=config.in_channels,
        base_channels=config.base_channels,
        channel_multiplier=tuple(config.channel_multiplier),
        num_res_blocks=config.num_res_blocks,
        attn_resolutions=tuple(config.attn_resolutions or ()),
        dropout=config.dropout,
        attn_type=config.attn_type or "none",
    )


def _as_vq_config(config: dict[str, Any] | PreTrainedConfig | None) -> ChameleonVQVAEConfig:
    if isinstance(config, ChameleonVQVAEConfig):
        return config
    values = config.to_dict() if isinstance(config, PreTrainedConfig) else dict(config or {})
    values.pop("model_type", None)
    return ChameleonVQVAEConfig(**values)
