"""Loads an open checkpoint into modules: checks names and shapes, then reads each tensor. The
transformer keeps its file's dtype unless another is requested. The VQ-GAN is always fp32 in memory:
in bf16 some codes would differ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from earlyfusion.checkpoints.source import EMBEDDING, HEAD, Source, Stored, check_names
from earlyfusion.config import ModelConfig, VQConfig
from earlyfusion.devices import move_to_huge_pages
from earlyfusion.errors import CheckpointError
from earlyfusion.image_tokenizer import MissingVQGAN, Mode
from earlyfusion.kernels.twins import accelerate
from earlyfusion.model.quantise import quantise
from earlyfusion.model.transformer import Transformer
from earlyfusion.model.vqgan import VQGAN
from earlyfusion.processor import Processor


@dataclass
class LoadedModel:
    """A whole model read from a folder, on its device, in eval mode."""

    config: ModelConfig
    transformer: Transformer
    vqgan: VQGAN | MissingVQGAN
    processor: Processor
    generation_defaults: dict[str, Any] = field(default_factory=dict)
    folder: Path = Path()
    resize_mode: Mode = "crop"

    @property
    def can_draw(self) -> bool:
        """Whether codes can become images; transformers' own files have no VQ decoder."""
        return self.vqgan.decoder is not None


def assemble(
    source: Source,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    packed: bool = False,
) -> LoadedModel:
    """Read an open checkpoint into modules; `dtype` None keeps that of the file. 8- and 4-bit
    weights are refused unless `packed` is True and `dtype` None. Raises `CheckpointError`."""
    config, folder = source.config, source.folder
    if not packed or dtype is not None:
        check_not_packed(source)
    transformer = build_transformer(config, source.tensors, folder, device, dtype, source.bits)
    return LoadedModel(
        config=config,
        transformer=transformer,
        vqgan=vqgan_of(source, device),
        processor=open_processor(source),
        generation_defaults=source.generation_defaults,
        folder=folder,
        resize_mode=source.resize_mode,
    )


def checked(source: Source) -> Source:
    """Check that names, shapes and tokenizer fit the config, without reading a tensor. Returns
    `source`, to which a head that is tied to the embedding is added. Raises `CheckpointError`."""
    if source.config.tie_word_embeddings and EMBEDDING in source.tensors:
        source.tensors.setdefault(HEAD, source.tensors[EMBEDDING])
    _check_fits(_empty_transformer(source.config, source.bits), source.tensors, source.folder)
    if source.vq:
        _check_fits(_empty_vqgan(source.config.vq_config, source.vq), source.vq, source.folder)
    open_processor(source)
    return source


def check_not_packed(source: Source) -> None:
    """Raise `CheckpointError` if the weights have 8 or 4 bits."""
    if source.bits is not None:
        raise CheckpointError(
            f"{source.folder} holds weights in {source.bits} bits, which only Chameleon.load reads,"
            " on one process and in the dtype they have: give the model that they were made from"
        )


def open_processor(source: Source) -> Processor:
    """The processor of an open checkpoint; `CheckpointError` if the tokenizer does not fit it."""
    processor = Processor(source.tokenizer, source.layout)
    vocabulary, config = processor.vocabulary, source.config
    source.layout.template(vocabulary)  # raises if a token of the layout is missing
    if source.is_shard:  # its config counts the shard's tokens; the whole was checked before
        return processor
    if vocabulary.size > config.vocab_size:
        raise CheckpointError(
            f"{source.tokenizer} has {vocabulary.size:,} tokens and the model knows "
            f"{config.vocab_size:,}: give the tokenizer that the model was trained with"
        )
    if vocabulary.num_codes != config.vq_config.num_embeddings:
        raise CheckpointError(
            f"{source.tokenizer} names {vocabulary.num_codes:,} image codes and the model has "
            f"{config.vq_config.num_embeddings:,}: give the tokenizer that it was trained with"
        )
    return processor


def build_transformer(
    config: ModelConfig,
    tensors: Mapping[str, Stored],
    folder: Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    bits: int | None = None,
) -> Transformer:
    """A transformer in eval mode with the values of `tensors`; `folder` is their source, for
    errors."""
    if config.tie_word_embeddings and EMBEDDING in tensors:
        tensors = {**tensors, HEAD: tensors[EMBEDDING]}
    transformer = _empty_transformer(config, bits)
    _fill(transformer, tensors, folder, device, dtype)
    transformer.tie_weights()
    if torch.device(device).type == "cpu":
        move_to_huge_pages(transformer)
    return accelerate(transformer.eval())


def vqgan_of(source: Source, device: torch.device | str = "cpu") -> VQGAN | MissingVQGAN:
    """The VQ-GAN of an open checkpoint; a `MissingVQGAN` if it has none."""
    config = source.config.vq_config
    if not source.vq:
        return MissingVQGAN(config).to(device).eval()
    return build_vqgan(config, source.vq, source.folder, device)


def build_vqgan(
    config: VQConfig,
    tensors: Mapping[str, Stored],
    folder: Path,
    device: torch.device | str = "cpu",
) -> VQGAN:
    """A VQ-GAN in eval mode and fp32, without a decoder if `tensors` have none."""
    vqgan = _empty_vqgan(config, tensors)
    _fill(vqgan, tensors, folder, device, torch.float32)
    return accelerate(vqgan.eval())


def _empty_transformer(config: ModelConfig, bits: int | None) -> Transformer:
    """A transformer without memory for its weights."""
    with torch.device("meta"):
        transformer = Transformer(config)
        return quantise(transformer, bits) if bits else transformer


def _empty_vqgan(config: VQConfig, names: Mapping[str, object]) -> VQGAN:
    """A VQ-GAN without memory for its weights, with a decoder if `names` has one."""
    with torch.device("meta"):
        return VQGAN(config, with_decoder=any(name.startswith("decoder.") for name in names))


def _check_fits(module: nn.Module, tensors: Mapping[str, Stored], folder: Path) -> None:
    """Raise `CheckpointError` if names, shapes or types of tensors do not fit the module."""
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    check_names(expected, {name: stored.shape for name, stored in tensors.items()}, folder)
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point() and not tensors[name].dtype.is_floating_point:
            raise CheckpointError(
                f"{folder} holds {name} as {tensors[name].dtype}, which is no type of weights: get "
                "it again, or give the model that it was made from"
            )


def _fill(
    module: nn.Module,
    tensors: Mapping[str, Stored],
    folder: Path,
    device: torch.device | str,
    dtype: torch.dtype | None,
) -> None:
    """Give a module its tensors; `CheckpointError` lists keys and shapes that do not match."""
    _check_fits(module, tensors, folder)
    values: dict[str, Tensor] = {
        name: stored.read().to(device=device, dtype=dtype) for name, stored in tensors.items()
    }
    module.load_state_dict(values, assign=True)
