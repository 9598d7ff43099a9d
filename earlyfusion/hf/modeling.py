"""transformers' model classes, on the blocks and the VQ-GAN of `earlyfusion.model`.

Arguments, outputs and state dicts are those of transformers' own classes, plus the keys of the VQ
decoder. The differences are intended:

- image logits are real, so a label on an image token has a finite loss. `generate` still leaves
  image tokens out unless a `multimodal_generation_mode` asks for them, and so does the loss of a
  row without image labels;
- a label on a placeholder means the image's own token;
- the image tokenizer stays frozen, in eval mode and in fp32, and never builds a graph;
- `decode_image_tokens` turns image tokens into images.
"""

# Shapes: B batch, T tokens, D model width, N query heads, K key and value heads, H head width, V
# vocabulary, C channels, Y X height and width in pixels, y x in codes.

from __future__ import annotations

import contextlib
import functools
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MethodType
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation.utils import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    BaseModelOutputWithPooling,
    CausalLMOutputWithPast,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from earlyfusion.checkpoints.hf import PACKED
from earlyfusion.config import ModelConfig
from earlyfusion.errors import CheckpointError, ImageError, SettingError
from earlyfusion.hf.configuration import ChameleonConfig, ChameleonVQVAEConfig, shape, vq_shape
from earlyfusion.hf.generation import MultimodalGeneration
from earlyfusion.hf.image_vocabulary import ImageVocabulary, find_names
from earlyfusion.hf.quantisation import choose_layout, footprint, restore_layout
from earlyfusion.hf.tensor_parallel import HEAD, check_processes
from earlyfusion.kernels.conv import torch_convolutions
from earlyfusion.kernels.fused import Attention
from earlyfusion.kernels.twins import accelerate
from earlyfusion.model.rotary import (
    Rotary,
    attention_factor,
    check_rope,
    is_dynamic,
    rotary_frequencies,
)
from earlyfusion.model.transformer import Block, HeadNorm, RMSNorm
from earlyfusion.model.vqgan import VQGAN, ResBlock, SpatialAttention
from earlyfusion.vocabulary import Vocabulary

_DECODER_KEY = re.compile(r"(model\.)?(vqmodel\.)?decoder\.")
_VQ_KEY = re.compile(r"(model\.)?(vqmodel\.)?(encoder|quantize|quant_conv|decoder)\.")
_INSTALL = {
    "flash_attention_2": "flash-attn (pip install flash-attn --no-build-isolation)",
    "flash_attention_3": "flash-attn-3 (the hopper folder of the flash-attention sources)",
}


@dataclass
class ChameleonVQVAEModelOutput(BaseModelOutputWithPooling):
    """`last_hidden_state` is that before `quant_conv`; `image_tokens` are codes, [B * y * x]."""

    quantized_last_hidden_state: Tensor | None = None
    image_tokens: Tensor | None = None
    embedding_loss: Tensor | None = None


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention step by step, which also returns its weights: (out_BTNH, weights_BNTT)."""
    # Here query is [B, N, T, H]; key and value are [B, K, T, H].
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    scores_BNTT = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores_BNTT = scores_BNTT + attention_mask[..., : key.shape[-2]]
    weights_BNTT = scores_BNTT.softmax(-1, dtype=torch.float32).to(query.dtype)
    weights_BNTT = nn.functional.dropout(weights_BNTT, dropout, module.training)
    return (weights_BNTT @ value).transpose(1, 2).contiguous(), weights_BNTT


class InterfaceAttend:
    """The `Attend` of one layer, through transformers' attention interface and cache. `weights` are
    those of the last call, or None if the interface gives none."""

    def __init__(self, layer: Any, mask: Any, cache: Cache | None, kwargs: Mapping[str, Any]):
        self._layer, self._mask, self._cache, self._kwargs = layer, mask, cache, kwargs
        self.weights: Tensor | None = None

    def __call__(self, q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor) -> Tensor:
        layer = self._layer
        # In transformers' attention functions and caches, heads come before tokens.
        q, k, v = (x.transpose(1, 2) for x in (q_BTNH, k_BTKH, v_BTKH))
        if self._cache is not None:
            k, v = self._cache.update(k, v, layer.layer_idx)
        attend: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(
            layer.config._attn_implementation, eager_attention_forward
        )
        mask = self._mask.to(q.device) if isinstance(self._mask, Tensor) else self._mask
        dropout = layer.attention_dropout if layer.training else 0.0
        out_BTNH, self.weights = attend(
            layer, q, k, v, mask, dropout=dropout, scaling=layer.scaling, **self._kwargs
        )
        out: Tensor = out_BTNH.reshape(q_BTNH.shape)
        return out


def _fill_special_ids(generation: Any, config: ChameleonConfig) -> None:
    """Set missing special ids to those of the model's config: without an end token, replies would
    only end at their maximum length."""
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(generation, name) is None:
            setattr(generation, name, getattr(config, name))


class ChameleonRotaryEmbedding(nn.Module):
    """Cosines and sines of positions in fp32, each [B, T, H]. In the dynamic variants all rows use
    one length, the largest position of the call plus one. As in transformers, a length beyond the
    trained one is remembered until a call fits the trained one again."""

    inv_freq: Tensor
    original_inv_freq: Tensor

    def __init__(self, config: ChameleonConfig) -> None:
        super().__init__()
        self.config = config
        self._shape = shape(config)
        self.rope_type = self._shape.rope_type
        self.attention_scaling = attention_factor(self._shape)
        self.max_seq_len_cached = self.original_max_seq_len = config.max_position_embeddings
        frequencies = rotary_frequencies(self._shape, torch.get_default_device())
        self.register_buffer("inv_freq", frequencies, persistent=False)
        self.register_buffer("original_inv_freq", frequencies.clone(), persistent=False)

    @torch.no_grad()
    def reset(self) -> None:
        """Fill the buffers of a model that was built on the meta device."""
        for buffer in (self.inv_freq, self.original_inv_freq):
            init.copy_(buffer, rotary_frequencies(self._shape, torch.device("cpu")))

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        inv_freq = self._frequencies(position_ids).to(x.device, torch.float32)
        angles = position_ids[..., None].float() * inv_freq
        both = torch.cat((angles, angles), -1)
        return both.cos() * self.attention_scaling, both.sin() * self.attention_scaling

    def _frequencies(self, position_ids: Tensor) -> Tensor:
        if not is_dynamic(self._shape):
            return self.inv_freq
        length = position_ids.max() + 1
        # A traced graph can neither read a number back nor write an attribute.
        traced = torch.compiler.is_compiling()
        if self.rope_type == "dynamic" and not traced:
            length = torch.tensor(self._remember_length(int(length)), device=length.device)
        inv_freq = rotary_frequencies(self._shape, length.device, length[None])
        if not traced:
            self.inv_freq = inv_freq
        return inv_freq

    def _remember_length(self, length: int) -> int:
        if length > self.max_seq_len_cached:
            self.max_seq_len_cached = length
        elif length < self.original_max_seq_len:
            self.max_seq_len_cached = self.original_max_seq_len
        return self.max_seq_len_cached


class ChameleonAttention(Attention):
    """The core's attention with transformers' arguments."""

    def __init__(self, config: ChameleonConfig, core: ModelConfig, layer_idx: int) -> None:
        super().__init__(core)
        self.config, self.layer_idx = config, layer_idx
        self.is_causal = True
        self.scaling = core.head_dim**-0.5
        self.num_key_value_groups = core.num_attention_heads // core.kv_heads
        self.attention_dropout = float(config.attention_dropout or 0.0)

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        output_attentions: bool = False,
        use_cache: bool = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention's output [B, T, D], and its weights if the implementation returns them."""
        assert position_embeddings is not None
        cos, sin = position_embeddings
        # The core expects the sign of the rotation in the first half of the sines.
        half = sin.shape[-1] // 2
        signed = torch.cat((-sin[..., :half], sin[..., half:]), -1)
        rotary = Rotary(cos[:, :, None], signed[:, :, None])
        more = kwargs | {"position_ids": position_ids}
        attend = InterfaceAttend(self, attention_mask, past_key_values, more)
        return super().forward(hidden_states, rotary, attend), attend.weights


class ChameleonDecoderLayer(GradientCheckpointingLayer, Block):  # type: ignore[misc]
    """The core's block with transformers' arguments."""

    def __init__(self, config: ChameleonConfig, core: ModelConfig, layer_idx: int) -> None:
        super().__init__(core, 0.0, ChameleonAttention(config, core, layer_idx))

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, output_attentions: bool = False, **kwargs: Any
    ) -> tuple[Tensor, ...]:
        """The states [B, T, D], and with `output_attentions` the attention weights."""
        weights_seen: list[Any] = []

        def attention(states_BTD: Tensor) -> Tensor:
            out, weights = self.self_attn(
                hidden_states=states_BTD, output_attentions=output_attentions, **kwargs
            )
            weights_seen.append(weights)
            return cast("Tensor", out)

        x_BTD = hidden_states + self._sublayer(attention, self.input_layernorm, hidden_states)
        x_BTD = x_BTD + self._sublayer(self.mlp, self.post_attention_layernorm, x_BTD)
        return (x_BTD, *weights_seen) if output_attentions else (x_BTD,)


class ChameleonPreTrainedModel(PreTrainedModel):
    """Shared by the three model classes: how transformers loads, saves and initialises them."""

    config: ChameleonConfig
    config_class = ChameleonConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["ChameleonDecoderLayer", "ChameleonVQVAE"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]
    _keep_in_fp32_modules_strict: ClassVar[list[str]] = ["vqmodel"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs: ClassVar[dict[str, Any]] = {
        "hidden_states": ChameleonDecoderLayer,
        "attentions": ChameleonAttention,
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, ChameleonRotaryEmbedding):
            module.reset()
            return
        super()._init_weights(module)
        if isinstance(module, HeadNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; a checkpoint without a VQ decoder gives a model without one."""
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if isinstance(model.base_model, ChameleonModel):
            model.base_model.freeze_image_tokenizer()
            check_processes(model.base_model.shape, model._tp_size or 1)
        if model.can_generate():
            _fill_special_ids(model.generation_config, model.config)
        return loaded

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As in torch, but with `strict` a state dict whose VQ-GAN has no decoder, as in
        transformers' checkpoints, also removes the model's decoder."""
        keys = [key for key in state_dict if _VQ_KEY.match(key)]
        if strict and keys and not any(_DECODER_KEY.match(key) for key in keys):
            self._drop_decoder()
        return super().load_state_dict(state_dict, strict, assign)

    def _drop_decoder(self) -> None:
        for module in self.modules():
            if isinstance(module, ChameleonVQVAE):
                module.drop_decoder()

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Bytes that the weights take in memory, with those of packed weights and scales."""
        return footprint(self, return_buffers)

    def dequantize(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, and also correct after a forward on the CPU."""
        restore_layout(self)
        return super().dequantize(*args, **kwargs)

    def _adjust_missing_and_unexpected_keys(self, loading_info: Any) -> None:
        super()._adjust_missing_and_unexpected_keys(loading_info)
        # Only the decoder is missing: a complete checkpoint of transformers'.
        missing = {key for key in loading_info.missing_keys if _DECODER_KEY.match(key)}
        lacks_image_tokenizer = any(
            _VQ_KEY.match(key) for key in loading_info.missing_keys - missing
        )
        if missing and not lacks_image_tokenizer:
            loading_info.missing_keys = set(loading_info.missing_keys) - missing
            self._drop_decoder()

    def _check_and_adjust_attn_implementation(
        self, attn_implementation: str | None, *args: Any, **kwargs: Any
    ) -> str:
        try:
            chosen: str = super()._check_and_adjust_attn_implementation(
                attn_implementation, *args, **kwargs
            )
        except ImportError:
            name = str(attn_implementation)
            raise SettingError(
                f"attn_implementation={name!r} is not installed: install "
                f"{_INSTALL.get(name, name)} or choose 'sdpa', 'eager' or 'flex_attention'"
            ) from None
        return chosen


class ChameleonVQVAE(ChameleonPreTrainedModel):
    """The VQ-GAN: images to codes and back. Alone it can be trained; inside a model it is frozen.
    `decoder` is None if the checkpoint had none."""

    config: ChameleonVQVAEConfig
    config_class = ChameleonVQVAEConfig
    main_input_name = "pixel_values"
    _no_split_modules: ClassVar[list[str]] = ["ResBlock", "SpatialAttention"]
    _keep_in_fp32_modules_strict: ClassVar[list[str]] = []
    _can_record_outputs: ClassVar[dict[str, Any]] = {
        "hidden_states": ResBlock,
        "attentions": SpatialAttention,
    }

    def __init__(self, config: ChameleonVQVAEConfig) -> None:
        super().__init__(config)
        core = accelerate(VQGAN(vq_shape(config)))
        # The same modules with the core's methods; unregistered, or each key would appear twice.
        # One dict for both, so that a module that a quantiser replaces is replaced in both.
        self.__dict__["vqgan"] = core
        self._modules = core._modules
        self.quantize.beta = getattr(config, "beta", 0.25)
        self.eval()
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def encode(self, pixel_values: Tensor, **kwargs: Any) -> ChameleonVQVAEModelOutput:
        """Codes of images [B, C, Y, X] in [-1, 1], of any float type; no graph while frozen."""
        if any(p.requires_grad for p in self.parameters()):
            return self._encode(pixel_values)
        # Rounded arithmetic gives other codes, so autocast only applies while the VQ-GAN trains.
        with torch.no_grad(), torch.autocast(pixel_values.device.type, enabled=False):
            return self._encode(pixel_values)

    def _encode(self, pixel_values: Tensor) -> ChameleonVQVAEModelOutput:
        self._keep_codebook()
        with torch_convolutions():
            hidden = self.encoder(pixel_values.to(self.quant_conv.weight.dtype))
            quantized, loss, codes = self.quantize(self.quant_conv(hidden))
        return ChameleonVQVAEModelOutput(
            last_hidden_state=hidden,
            quantized_last_hidden_state=quantized,
            image_tokens=codes,
            embedding_loss=loss,
        )

    def decode(self, codes: Tensor) -> Tensor:
        """Images of codes [B, y, x]: [B, C, Y, X], in about [-1, 1] and not clamped. Raises
        `ImageError` for a code outside the codebook, `CheckpointError` without a decoder."""
        self._keep_codebook()
        return self.core.decode(codes)

    def forward(
        self, pixel_values: Tensor | None = None, codes: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """As `encode`; as `decode` if only `codes` are given. Unlike those, it runs the hooks of
        this module, with which FSDP and accelerate load its weights."""
        if pixel_values is None and codes is not None:
            return self.decode(codes)
        return self.encode(pixel_values, **kwargs)

    @property
    def core(self) -> VQGAN:
        """The core VQ-GAN over the same modules."""
        core: VQGAN = self.__dict__["vqgan"]
        return core

    def drop_decoder(self) -> None:
        """Remove the decoder; `decode` then raises `CheckpointError`."""
        del self.decoder
        for module in (self, self.core):
            # A registered None would silently accept a decoder's weights; an attribute does not.
            module.decoder = None

    def _keep_codebook(self) -> None:
        """Exclude the codebook from accelerate's offloading, which only loads called modules."""
        embedding = self.quantize.embedding
        if embedding.weight.is_meta and hasattr(embedding, "_hf_hook"):
            from accelerate.hooks import remove_hook_from_module  # type: ignore

            with torch.no_grad():
                table = embedding(torch.arange(embedding.num_embeddings))
            remove_hook_from_module(embedding)
            embedding.weight = nn.Parameter(table, requires_grad=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ChameleonVQVAE:
        """As in torch, but frozen weights keep their precision in `model.half()` and the like:
        rounded ones give other codes."""
        frozen = not any(p.requires_grad for p in self.parameters())

        def without_rounding(tensor: Tensor) -> Tensor:
            changed = fn(tensor)
            narrower = changed.dtype.itemsize < tensor.dtype.itemsize
            return tensor.to(changed.device) if narrower else changed

        super()._apply(without_rounding if frozen else fn, recurse)
        return self

    def train(self, mode: bool = True) -> ChameleonVQVAE:
        """Frozen weights stay in eval mode."""
        super().train(mode and any(p.requires_grad for p in self.parameters()))
        return self


class ChameleonModel(ChameleonPreTrainedModel):
    """Embedding, blocks, final norm and image tokenizer: tokens and images to hidden states."""

    def __init__(self, config: ChameleonConfig) -> None:
        super().__init__(config)
        _check_not_packed(config)
        self.shape = shape(config)
        self.shape.check()
        check_rope(self.shape)
        self.padding_idx, self.vocab_size = config.pad_token_id, config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            ChameleonDecoderLayer(config, self.shape, number)
            for number in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.vqmodel = ChameleonVQVAE._from_config(config.vq_config)
        self.rotary_emb = ChameleonRotaryEmbedding(config)
        # Not the last norm: its twin's results have autocast's dtype, which only blocks expect.
        accelerate(self.layers)
        self.gradient_checkpointing = False
        names = config.vocabulary_map
        self._mapping = ImageVocabulary(names) if names else None
        if self._mapping:
            with contextlib.suppress(CheckpointError):  # raised again when an image comes
                self._mapping.prepare()
        self.register_state_dict_pre_hook(restore_layout)
        self.register_load_state_dict_pre_hook(restore_layout)
        self.post_init()
        self.freeze_image_tokenizer()

    @property
    def vocabulary_mapping(self) -> ImageVocabulary:
        """Which ids are images: from the config, else from the tokenizer file of the folder."""
        if self._mapping is None:
            self._mapping = ImageVocabulary(find_names(None, self.config.name_or_path))
        return self._mapping

    @property
    def vocabulary(self) -> Vocabulary:
        """All token ids; `CheckpointError` if neither config nor folder names them."""
        try:
            return self.vocabulary_mapping.vocabulary
        except CheckpointError:
            names = find_names(self.config.vocabulary_map, self.config.name_or_path)
            self._mapping = ImageVocabulary(names)
            return self._mapping.vocabulary

    def use_vocabulary(self, source: Any) -> None:
        """Take the token ids from a `Vocabulary`, or from this model's processor or tokenizer."""
        tokenizer = getattr(source, "tokenizer", source)
        names = source.names if isinstance(source, Vocabulary) else tokenizer.get_vocab()
        self._mapping = ImageVocabulary(names)

    def freeze_image_tokenizer(self) -> None:
        """Freeze the image tokenizer; its codes pass no gradient anyway."""
        self.vqmodel.requires_grad_(False)
        self.vqmodel.eval()

    def get_image_tokens(self, pixel_values: Tensor) -> Tensor:
        """Token ids [B, y * x] of images, without begin and end."""
        codes = self.vqmodel(pixel_values, return_dict=True).image_tokens
        return self.vocabulary_mapping.convert_img2bpe(codes).view(len(pixel_values), -1)

    @can_return_tuple
    def get_image_features(self, pixel_values: Tensor, **kwargs: Any) -> Any:
        """The VQ-GAN's output; its `pooler_output` is the images' embeddings [B, y * x, D]."""
        outputs = self.vqmodel(pixel_values, return_dict=True, **kwargs)
        tokens = self.to_token_ids(outputs).view(len(pixel_values), -1)
        outputs.pooler_output = self.get_input_embeddings()(tokens)
        return outputs

    def decode_image_tokens(
        self, image_tokens: Tensor, height: int | None = None, width: int | None = None
    ) -> Tensor:
        """Images [B, C, Y, X], in about [-1, 1], of image tokens [B, n]. Other tokens in a row
        are ignored; of several images the last one is taken. `height` and `width` count codes
        (default: the model's own size)."""
        if height is None or width is None:
            grid = self.shape.vq_config.grid
            height, width = height or grid, width or grid
        rows = [self._last_image(row, height * width) for row in image_tokens]
        codes = self.vocabulary_mapping.convert_bpe2img(torch.stack(rows))
        with torch.no_grad():
            return cast("Tensor", self.vqmodel(codes=codes.view(-1, height, width)))

    def fill_image_tokens(self, input_ids: Tensor, pixel_values: Tensor) -> Tensor:
        """`input_ids` with the images' own tokens in place of the placeholders."""
        return self.fill_placeholders(input_ids, self.get_image_tokens(pixel_values))

    def get_placeholder_mask(
        self, input_ids: Tensor | None, inputs_embeds: Tensor, image_features: Tensor
    ) -> Tensor:
        """True at placeholders, [B, T, 1]; `ImageError` unless images and placeholders match."""
        if input_ids is None:
            # Without ids, placeholders are found by their embedding.
            token = torch.tensor(self._placeholder(), device=inputs_embeds.device)
            mask_BT = (inputs_embeds == self.get_input_embeddings()(token)).all(-1)
        else:
            mask_BT = input_ids == self._placeholder()
        mask_BT = _checked(mask_BT, math.prod(image_features.shape[:-1]))
        return mask_BT.unsqueeze(-1).to(inputs_embeds.device)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Hidden states [B, T, D] after the final norm, as `BaseModelOutputWithPast`. Takes exactly
        one of `input_ids` and `inputs_embeds`; images replace placeholders."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        x_BTD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        x_BTD = self._insert_image_features(input_ids, x_BTD, pixel_values, mm_encoder_outputs)
        traced = cast("Any", torch.jit).is_tracing()  # outputs of a trace cannot hold a cache
        if use_cache and past_key_values is None and not traced:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            position_ids = _positions(x_BTD, past_key_values)
        self._choose_quantised_layout(x_BTD.device)
        for_layers = kwargs | {
            "attention_mask": create_causal_mask(
                config=self.config,
                inputs_embeds=x_BTD,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
            ),
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "use_cache": use_cache,
            "position_embeddings": self.rotary_emb(x_BTD, position_ids=position_ids),
        }
        for layer in self.layers:
            x_BTD = layer(x_BTD, **for_layers)[0]
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(x_BTD), past_key_values=past_key_values
        )

    def fill_encoded(self, input_ids: Tensor, encoded: Mapping[str, Any] | None) -> Tensor:
        """`input_ids` with the tokens of already encoded images for the placeholders, if any."""
        image = _encoded_image(encoded)
        if image is None:
            return input_ids
        return self.fill_placeholders(input_ids, self.to_token_ids(image))

    def to_token_ids(self, encoded: Any) -> Tensor:
        """Token ids of the VQ-GAN's output, flat [B * y * x]."""
        return self.vocabulary_mapping.convert_img2bpe(encoded.image_tokens)

    def fill_placeholders(self, input_ids: Tensor, tokens: Tensor) -> Tensor:
        """`input_ids` [B, T] with image tokens, in order, in place of the placeholders. Raises
        `ImageError` unless there are as many of both."""
        mask_BT = _checked(input_ids == self._placeholder(), tokens.numel())
        return input_ids.masked_scatter(mask_BT, tokens.to(input_ids))

    def _choose_quantised_layout(self, device: torch.device) -> None:
        quantised = getattr(self.config, "quantization_config", None) is not None
        if quantised and device.type == "cpu" and not torch.compiler.is_compiling():
            choose_layout(self.layers)

    def _insert_image_features(
        self,
        input_ids: Tensor | None,
        x_BTD: Tensor,
        pixel_values: Tensor | None,
        encoded: dict[str, Any] | None,
    ) -> Tensor:
        if pixel_values is not None and encoded is not None:
            raise ValueError("You cannot specify both pixel_values and mm_encoder_outputs")
        if pixel_values is not None:
            encoded = {"image": self.get_image_features(pixel_values, return_dict=True)}
        image = _encoded_image(encoded)
        if image is None:
            return x_BTD
        features = image.pooler_output.to(x_BTD.device, x_BTD.dtype)
        return x_BTD.masked_scatter(self.get_placeholder_mask(input_ids, x_BTD, features), features)

    def _placeholder(self) -> int:
        token = self.vocabulary_mapping.image_token_id
        token = self.config.image_token_id if token is None else token
        if token is None:
            raise ImageError(
                "the model has no placeholder token for images: give it a vocabulary_map with "
                "'<image>', or call model.use_vocabulary(processor)"
            )
        return int(token)

    def _last_image(self, row_T: Tensor, count: int) -> Tensor:
        tokens = row_T[self.vocabulary_mapping.is_image(row_T)]
        if len(tokens) < count:
            raise ImageError(
                f"an image of this model has {count} image tokens but a row holds {len(tokens)}: "
                "generate with multimodal_generation_mode='image-only'"
            )
        return tokens[-count:]


class ChameleonForConditionalGeneration(
    MultimodalGeneration, ChameleonPreTrainedModel, GenerationMixin
):
    """The model with its head: tokens and images to logits, and `generate`."""

    output_modalities = ("text", "image")
    image_logits = True
    # Quantisers skip these modules, which they match by full name.
    _keep_in_fp32_modules: ClassVar[list[str]] = ["model.vqmodel"]
    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan: ClassVar[dict[str, str]] = HEAD

    def __init__(self, config: ChameleonConfig) -> None:
        super().__init__(config)
        self.model = ChameleonModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
        self.model.freeze_image_tokenizer()

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "forward":
            value = self._with_tokens(value)
            if self.model._mapping is not None or self.config.name_or_path:
                with contextlib.suppress(CheckpointError):  # raised again when an image comes
                    # Made now, as a compiled forward could not keep tables that it makes.
                    self.model.vocabulary_mapping.prepare(self.device)
        super().__setattr__(name, value)

    def _with_tokens(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """A forward that TRL assigns to the model, with the images' own tokens in its ids and
        labels. It computes the loss itself, without the `forward` below."""
        # accelerate unwraps methods, so a method of this model must stay a method.
        if getattr(forward, "__self__", None) is self:
            function = cast("Any", forward).__func__
            return MethodType(_filling_forward(function), self)
        return _filling_forward(forward, self)

    def _fill_placeholders(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        if kwargs.get("fused_lm_head") and kwargs.get("pixel_values") is not None:
            ids, pixels = kwargs["input_ids"], kwargs["pixel_values"]
            filled_ids = self.model.fill_image_tokens(ids, pixels)
            labels = _relabel_placeholders(kwargs["labels"], ids, filled_ids)
            return kwargs | {"input_ids": filled_ids, "labels": labels, "pixel_values": None}
        return kwargs

    def use_vocabulary(self, source: Any) -> None:
        self.model.use_vocabulary(source)

    def get_image_tokens(self, pixel_values: Tensor) -> Tensor:
        return self.model.get_image_tokens(pixel_values)

    def get_image_features(self, pixel_values: Tensor, **kwargs: Any) -> Any:
        return self.model.get_image_features(pixel_values, **kwargs)

    def decode_image_tokens(self, image_tokens: Tensor, **kwargs: Any) -> Tensor:
        return self.model.decode_image_tokens(image_tokens, **kwargs)

    def fill_image_tokens(self, input_ids: Tensor, pixel_values: Tensor) -> Tensor:
        return self.model.fill_image_tokens(input_ids, pixel_values)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        mm_encoder_outputs: dict[str, Any] | None = None,
        image_logits: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Logits [B, T, V], or of the last `logits_to_keep` positions, as `CausalLMOutputWithPast`.

        `labels` may name image tokens. If labels and `input_ids` both hold the placeholder, the
        label is the image's own token. A row without image labels has the loss of transformers'
        own class, which leaves image tokens out of the softmax. `image_logits=True` uses the whole
        vocabulary for every row; False matches transformers' class in logits and loss; None takes
        the attribute of that name.
        """
        with_image_logits = self.image_logits if image_logits is None else image_logits
        if pixel_values is not None and labels is not None and mm_encoder_outputs is None:
            # The labels need the images' tokens, too: encode once for both.
            mm_encoder_outputs = {"image": self.get_image_features(pixel_values, return_dict=True)}
            pixel_values = None
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            mm_encoder_outputs=mm_encoder_outputs,
            return_dict=True,
            **{k: v for k, v in kwargs.items() if k != "num_items_in_batch"},
        )
        logits_BTV = self.lm_head(_kept_positions(outputs.last_hidden_state, logits_to_keep))
        if not with_image_logits:
            logits_BTV = self._mask_image_logits(logits_BTV)
        scored_BTV = logits_BTV
        if labels is not None and with_image_logits:
            labels = self._image_labels(labels, input_ids, mm_encoder_outputs, logits_to_keep)
            if image_logits is None:
                shifted = kwargs.get("shift_labels")
                scored_BTV = self._mask_image_logits_of_text_rows(logits_BTV, shifted, labels)
        return CausalLMOutputWithPast(
            loss=None if labels is None else self._loss(scored_BTV, labels, kwargs),
            logits=logits_BTV,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = True,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As in transformers; images are only passed on with the prompt."""
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(
            input_ids,
            pixel_values=pixel_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        if not is_first_iteration and use_cache:  # images are in the cache
            inputs["pixel_values"] = None
        return inputs

    def _image_labels(
        self,
        labels: Tensor,
        input_ids: Tensor | None,
        encoded: dict[str, Any] | None,
        logits_to_keep: int | Tensor,
    ) -> Tensor:
        if input_ids is None or _encoded_image(encoded) is None:
            return labels
        filled_ids = self.model.fill_encoded(input_ids, encoded)
        kept, filled = (_kept_positions(ids, logits_to_keep) for ids in (input_ids, filled_ids))
        return _relabel_placeholders(labels, kept, filled)

    def _mask_image_logits(self, logits_BTV: Tensor) -> Tensor:
        columns = self.model.vocabulary_mapping.image_columns(logits_BTV.device)
        return logits_BTV.index_fill(-1, columns, torch.finfo(logits_BTV.dtype).min)

    def _mask_image_logits_of_text_rows(
        self, logits_BTV: Tensor, shifted: Tensor | None, labels: Tensor
    ) -> Tensor:
        """Logits for the loss: without image tokens in rows that have no image label."""
        # Per row, so that a row's loss does not depend on its batch.
        mapping, device = self.model.vocabulary_mapping, logits_BTV.device
        if not mapping.image_tokens:
            return logits_BTV
        learned = labels[:, 1:] if shifted is None else shifted.view(len(labels), -1)
        has_image_label_B = mapping.is_image(learned.to(device)).any(1)
        image_V = torch.zeros(logits_BTV.shape[-1], dtype=torch.bool, device=device)
        image_V = image_V.index_fill(0, mapping.image_columns(device), True)
        blocked_B1V = ~has_image_label_B[:, None, None] & image_V
        return logits_BTV.masked_fill(blocked_B1V, torch.finfo(logits_BTV.dtype).min)

    def _loss(self, logits_BTV: Tensor, labels: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
        loss: Tensor = self.loss_function(
            logits=logits_BTV, labels=labels, vocab_size=self.config.vocab_size, **kwargs
        )
        return loss


def _encoded_image(encoded: Mapping[str, Any] | None) -> Any:
    """The VQ-GAN's output among `mm_encoder_outputs`, or None."""
    return encoded.get("image") if encoded else None


def _positions(x_BTD: Tensor, cache: Cache | None) -> Tensor:
    """Positions [1, T] behind those in the cache."""
    past = cache.get_seq_length() if cache is not None else 0
    return (torch.arange(x_BTD.shape[1], device=x_BTD.device) + past)[None]


def _kept_positions(values_BT: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """The values of the last `logits_to_keep` positions, or at those indices; all for 0. As in
    transformers, a negative number leaves out so many at the beginning."""
    if isinstance(logits_to_keep, Tensor):
        return values_BT[:, logits_to_keep]
    return values_BT[:, -logits_to_keep:]


def _filling_forward(forward: Callable[..., Any], owner: Any = None) -> Callable[..., Any]:
    """`forward` with filled placeholders: for a function of the model `owner`, or for a method."""

    @functools.wraps(forward)
    def with_filled_placeholders(*args: Any, **kwargs: Any) -> Any:
        model = args[0] if owner is None else owner
        return forward(*args, **model._fill_placeholders(kwargs))

    return with_filled_placeholders


def _relabel_placeholders(labels: Tensor, ids: Tensor, filled_ids: Tensor) -> Tensor:
    """Labels with the tokens of `filled_ids` where labels and `ids` both hold the placeholder."""
    return torch.where((labels == ids) & (filled_ids != ids), filled_ids, labels)


def _check_not_packed(config: ChameleonConfig) -> None:
    """Raise `CheckpointError` for packed weights, which transformers would replace by random
    ones."""
    packed = getattr(config, "quantization_config", None)
    if isinstance(packed, dict) and packed.get("quant_method") == PACKED:
        raise CheckpointError(
            f"{config.name_or_path} holds weights in {packed.get('bits')} bits, which only "
            "Chameleon.load reads: give the model that they were made from"
        )


def _checked(mask_BT: Tensor, features: int) -> Tensor:
    """The mask of placeholders; `ImageError` unless there are as many as features."""
    if torch.compiler.is_exporting():
        # An exported graph cannot call Python: it checks the count by itself.
        torch._check_tensor_all(mask_BT.sum() == features)
        return mask_BT
    if torch.compiler.is_compiling():
        return _checked_in_graph(mask_BT, features)
    _check_count(mask_BT, features)
    return mask_BT


def _check_count(mask_BT: Tensor, features: int) -> None:
    """Raise `ImageError` unless there are as many placeholders as image features."""
    tokens = int(mask_BT.sum())
    if tokens != features:
        raise ImageError(
            f"Image features and image tokens do not match, tokens: {tokens}, features: {features}"
        )


# An operator of its own, as reading a number would break a compiled graph in two. It returns the
# mask, since torch leaves out operators without a result; a CUDA graph cannot hold it.
@torch.library.custom_op(
    "earlyfusion::checked_placeholders", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,)
)
def _checked_in_graph(mask_BT: Tensor, features: int) -> Tensor:
    _check_count(mask_BT, features)
    return mask_BT.clone()


@_checked_in_graph.register_fake
def _(mask_BT: Tensor, features: int) -> Tensor:
    return torch.empty_like(mask_BT)
