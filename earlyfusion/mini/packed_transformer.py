"""The transformer of a larger `mini`, on rows that are put together on the device.

    earlyfusion train mini_packed_transformer data=DIR/emoji device=cuda minutes=4 \\
        image_tokenizer=runs/mini_named_image_tokenizer

It learns all tasks of mini from augmented images. All training images are encoded to codes on the
device in many variants: moved, scaled, turned, and in other colours where no colour is asked about.
Documents are on the device too, and every batch of fixed shape is filled anew
(`train.device_rows`), with a tenth of the input codes replaced. Muon trains the matrices; the saved
weights are a moving average. It ends with `model/`. 10 layers of width 320 and an image tokenizer
of 3.2 M weights: 18.8 M in all, 38 MB in fp16. For CPUs take `hidden_size=256 num_hidden_layers=6
resolution=64`. A stage of `pretrain_mini`; measurements are in docs/mini.md.

With `start=`, `num_hidden_layers` may be larger than that of the start: its layers are repeated
(`stage.deepen`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from earlyfusion.config import ModelConfig
from earlyfusion.content import Image
from earlyfusion.data.encoding import plain_document
from earlyfusion.data.packing import RoleWeights
from earlyfusion.devices import resolve_device
from earlyfusion.errors import SettingError
from earlyfusion.fields import check_shares
from earlyfusion.files import replacing
from earlyfusion.mini import named_image_tokenizer as mini_named_image_tokenizer
from earlyfusion.mini.emoji.dataset import ICON
from earlyfusion.mini.emoji.dialogues import Sample, messages_of
from earlyfusion.mini.emoji.mixture import (
    MixtureConfig,
    is_plain,
    load_samples,
    synthetic_image_ids,
)
from earlyfusion.mini.emoji.pools import names_by_count
from earlyfusion.mini.emoji.scenes import make_synthetic_images
from earlyfusion.mini.emoji.tensors import load_emoji, load_images, load_split
from earlyfusion.mini.stage import (
    StageConfig,
    first_model,
    load_image_tokenizer,
    prompted_images,
    save_model,
    text_tokenizer,
)
from earlyfusion.mini.transformer import TASKS
from earlyfusion.model.transformer import Transformer
from earlyfusion.model.vqgan import VQGAN
from earlyfusion.processor import Processor, TokenSequence
from earlyfusion.train.augment import ChangeConfig, changed, resized
from earlyfusion.train.device_rows import (
    CodeNoiseConfig,
    DeviceRows,
    Templates,
    load_templates,
    templates,
)
from earlyfusion.train.image_tokenizer import nearest_codewords
from earlyfusion.train.language import LanguageTask
from earlyfusion.train.optim import OptimConfig
from earlyfusion.train.trainer import RunConfig, train
from earlyfusion.vocabulary import ImageLayout, Vocabulary

BATCH = 256  # images that are encoded at once
DOCUMENTS = "documents.npz"


@dataclass
class VariantsConfig:
    """How many variants of each image are encoded. Raises `SettingError`."""

    plain: int = 12
    """Variants that keep the colours; the first is the image itself."""
    recoloured: int = 12
    """Variants in other colours."""

    def __post_init__(self) -> None:
        if self.plain < 1 or self.recoloured < 0:
            raise SettingError(
                f"plain={self.plain} must be at least 1 and recoloured={self.recoloured} 0 or more"
            )


@dataclass
class PackedTransformerConfig(StageConfig):
    """Training of the transformer on rows that are put together on the device."""

    image_tokenizer: Path = Path("runs/mini_named_image_tokenizer")
    """The run of an image tokenizer, or a model's folder, or `mini`."""
    rows: int = 32
    """Packed rows of a step."""
    prompts: tuple[str, ...] = (
        "Draw a red apple.",
        "Draw a cat.",
        "Draw a cat.",
        "Draw a house.",
        "Draw an elephant.",
        "Can you draw me a rainbow?",
        "무지개를 그려 줘.",
        "Draw a cat face in Noto style.",
    )
    """Requests whose images are generated at the end and at `run.sample_every`."""
    whole_names: bool = False
    """Whether the words of the names of things become whole tokens of a new tokenizer. It takes a
    larger one: with vocab_size=5120 other words take more tokens (docs/mini.md)."""
    codeword_embeddings: bool = False
    """Whether the embeddings of image tokens have the distances of their codewords at the beginning
    (`embed_codewords`). With `start`, they are added to its embeddings."""
    start_share: float = 0.0
    """Share of the weights of `start` in those of `model/`: a mean of both is often better than
    either (Wortsman et al. 2022, arXiv 2109.01903). Checkpoints hold the trained weights alone."""
    mixture: MixtureConfig = field(default_factory=MixtureConfig)
    ways: VariantsConfig = field(default_factory=VariantsConfig)
    cut: CodeNoiseConfig = field(default_factory=CodeNoiseConfig)
    change: ChangeConfig = field(default_factory=ChangeConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_shares(self, "start_share")
        if self.start_share and self.start is None:
            raise SettingError(
                f"start_share={self.start_share:g} needs start=, the run whose weights have it"
            )


class BlankLayout(ImageLayout):
    """A layout that spells every image with code 0: its codes are looked up on the device later."""

    def spell(self, codes_hw: npt.ArrayLike, vocabulary: Vocabulary) -> list[int]:
        return _blank_tokens(self.height, self.width, vocabulary)


@lru_cache
def _blank_tokens(height: int, width: int, vocabulary: Vocabulary) -> list[int]:
    return ImageLayout(height, width).spell(np.zeros((height, width), np.int64), vocabulary)


def load_or_encode_variants(
    vqgan: VQGAN, config: PackedTransformerConfig, ids: list[str]
) -> Tensor:
    """The codes of `encode_variants`: int16 [P, V, C] on the device of the VQ-GAN. They are stored
    as `codes.npy` in the run's folder, because on a CPU they take minutes. A run with a `start`
    takes the codes of that run, if the numbers of images and variants match."""
    path, device = config.run.out / "codes.npy", vqgan.quantize.embedding.weight.device
    variants = config.ways.plain + config.ways.recoloured
    shape = (len(ids), variants, config.model.vq_config.grid**2)
    codes = _stored_codes(path, shape)
    if codes is not None:
        return codes.to(device)
    if config.start is not None:
        codes = _stored_codes(config.start / path.name, shape)
    if codes is None:
        codes = encode_variants(vqgan, config, ids).cpu()
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial, partial.open("wb") as file:
        np.save(file, codes.numpy())
    return codes.to(device)


def _stored_codes(path: Path, shape: tuple[int, ...]) -> Tensor | None:
    """The codes in a file; None if it does not exist or holds those of other images or variants."""
    codes = np.load(path) if path.is_file() else np.empty(0)
    return torch.from_numpy(codes) if codes.shape == shape else None


def training_image_ids(config: PackedTransformerConfig) -> list[str]:
    """Ids of all images that documents may show, in the order of their codes."""
    data = load_emoji(config.data, config.mixture.icons)
    return list(dict.fromkeys([*data.split("train"), *synthetic_image_ids(data, config.mixture)]))


def _load_pixels(config: PackedTransformerConfig, ids: list[str], device: torch.device) -> Tensor:
    """The pixels of all training images on the device: uint8 [P, Y, X, 3]."""
    side, icons = config.model.vq_config.resolution, config.mixture.icons
    table_PYXC = load_split(config.data, "train", side, str(device), icons)
    if len(table_PYXC) == len(ids):
        return table_PYXC
    data, others = load_emoji(config.data, icons), ids[len(table_PYXC) :]
    numbers = {name: number for number, name in enumerate(ids)}
    synthetic_PYXC = make_synthetic_images(others, table_PYXC, numbers)
    icons_at = [n for n, name in enumerate(others) if name.startswith(f"{ICON}/")]
    if icons_at:
        icon_pixels = load_images(data, [others[n] for n in icons_at], side)
        synthetic_PYXC[torch.tensor(icons_at, device=device)] = icon_pixels.to(device)
    return torch.cat((table_PYXC, synthetic_PYXC))


@torch.inference_mode()
def encode_variants(vqgan: VQGAN, config: PackedTransformerConfig, ids: list[str]) -> Tensor:
    """The codes of all variants of P images: int16 [P, V, C] on the device of the VQ-GAN. Variant 0
    is the image itself."""
    side, device = config.model.vq_config.resolution, vqgan.quantize.embedding.weight.device
    table_PYXC = _load_pixels(config, ids, device)
    same_colours = replace(config.change, contrast=0.0, tint=0.0, grey=0.0, unchanged=0.0)
    changes = [None, *[same_colours] * (config.ways.plain - 1)]
    changes += [replace(config.change, unchanged=0.0)] * config.ways.recoloured
    codes = torch.empty(
        len(table_PYXC),
        len(changes),
        config.model.vq_config.grid**2,
        dtype=torch.int16,
        device=device,
    )
    generator = torch.Generator(device)
    for variant, change in enumerate(changes):
        generator.manual_seed(1_000 * config.run.seed + config.mixture.seed * 100 + variant)
        for first in range(0, len(table_PYXC), BATCH):
            pixels = resized(table_PYXC[first : first + BATCH], side)
            pixels = changed(pixels, change, generator) if change else pixels
            codes[first : first + BATCH, variant] = vqgan.encode(pixels).flatten(1).short()
    return codes


def encode_documents(
    samples: list[Sample], processor: Processor, numbers: dict[str, int]
) -> Iterator[tuple[TokenSequence, list[int], bool]]:
    """For each sample its tokens with blank images, the numbers of its images, and whether these
    must keep their colours. `numbers` maps ids of images to their numbers."""
    codes = np.zeros((1, 1), np.int64)
    for sample in samples:
        parts = [part for message in sample["messages"] for part in message["content"]]
        images = [numbers[part["image"]] for part in parts if part["type"] == "image"]
        messages = messages_of(sample["messages"], lambda image_id, role: Image(codes=codes))
        if sample["task"] == "bare":
            document = plain_document(processor, messages[-1].parts, [codes])
        else:
            document = processor.encode_document(messages)
        yield document, images, is_plain(sample)


def prepare(config: PackedTransformerConfig) -> Templates:
    """The documents as templates. The text tokenizer is written to the run's folder.

    This needs neither a device nor an image tokenizer, so that `pretrain_mini` can do it in another
    process while earlier stages train; it writes the templates to `documents.npz`.
    """
    path = config.run.out / DOCUMENTS
    if path.is_file() and (config.run.out / "tokenizer.json").is_file():
        return load_templates(path)
    data, grid = load_emoji(config.data, config.mixture.icons), config.model.vq_config.grid
    samples = load_samples(config.data, config.mixture)
    whole = list(names_by_count(data)) if config.whole_names else ()
    tokenizer = text_tokenizer(config, samples, whole)
    blank = Processor(tokenizer, BlankLayout(grid, grid))
    is_code = np.zeros(blank.vocabulary.size, bool)
    is_code[blank.vocabulary.image_tokens] = True
    numbers = {name: number for number, name in enumerate(training_image_ids(config))}
    return templates(encode_documents(samples, blank, numbers), grid**2, is_code, config.weights)


def build_rows(config: PackedTransformerConfig, vqgan: VQGAN) -> tuple[DeviceRows, Processor]:
    """The rows to train on, and the processor of the model."""
    documents, grid = prepare(config), config.model.vq_config.grid
    processor = Processor(config.run.out / "tokenizer.json", ImageLayout(grid, grid))
    vocabulary = processor.vocabulary
    rows = DeviceRows(
        documents,
        load_or_encode_variants(vqgan, config, training_image_ids(config)),
        config.ways.plain,
        torch.from_numpy(vocabulary.code_to_token),
        nearest_codewords(vqgan),
        config.rows,
        config.length,
        vocabulary.pad,
        config.cut,
        config.run.seed,
    )
    return rows, processor


@torch.no_grad()
def embed_codewords(
    model: Transformer, vqgan: VQGAN, vocabulary: Vocabulary, seed: int, add: bool = False
) -> None:
    """Set the input embeddings of the image tokens to a random projection of their codewords, with
    the standard deviation that they had; with `add`, add it to them.

    Random embeddings have about the same distance from each other, so the transformer would have to
    learn from examples which codes look alike. With these, similar images have similar inputs from
    the first step on.
    """
    codewords_KC = vqgan.quantize.embedding.weight.float().cpu()
    codewords_KC = codewords_KC - codewords_KC.mean(0)
    table_VD = model.model.embed_tokens.weight
    generator = torch.Generator().manual_seed(seed)
    projection_CD = torch.randn(codewords_KC.shape[1], table_VD.shape[1], generator=generator)
    image_tokens = torch.from_numpy(vocabulary.code_to_token).to(table_VD.device)
    before_KD = table_VD[image_tokens]
    projected_KD = (codewords_KC @ projection_CD).to(table_VD)
    projected_KD *= before_KD.std() / projected_KD.std()
    table_VD[image_tokens] = before_KD + projected_KD if add else projected_KD


def main(config: PackedTransformerConfig) -> None:
    vqgan = load_image_tokenizer(config.image_tokenizer, config.model)
    vqgan.to(resolve_device(config.run.device))
    rows, processor = build_rows(config, vqgan)
    model = first_model(config, processor.vocabulary.size)
    if config.codeword_embeddings:
        adds = config.start is not None
        embed_codewords(model, vqgan, processor.vocabulary, config.run.seed, adds)
    images = prompted_images(config, model, processor, vqgan)
    train(LanguageTask(model, rows, config.z_weight), config.run, config.optim, images)
    if config.start_share:
        start = first_model(config, processor.vocabulary.size)
        interpolate(model, start, config.start_share)
    save_model(config, model, vqgan)


@torch.no_grad()
def interpolate(model: Transformer, other: Transformer, share: float) -> None:
    """Set the weights of `model` to `share` times those of `other` plus (1 - `share`) times those
    of `model`."""
    for weight, other_weight in zip(model.parameters(), other.parameters(), strict=True):
        weight.lerp_(other_weight, share)


config = PackedTransformerConfig(
    model=ModelConfig(
        vocab_size=5120,
        hidden_size=320,
        intermediate_size=864,
        num_hidden_layers=10,
        num_attention_heads=5,
        max_position_embeddings=2048,
        vq_config=mini_named_image_tokenizer.config.model,
    ),
    run=RunConfig(
        out=Path("runs/mini_packed_transformer"),
        steps=4000,
        precision="bf16",
        save_every=1000,
        keep=1,
    ),
    optim=OptimConfig(
        lr=2e-3,
        warmup_steps=100,
        decay="hold",
        final_ratio=0.02,
        eps=1e-8,
        kind="muon",
        muon_lr=0.02,
        average=0.995,
    ),
    mixture=MixtureConfig(tasks=dict(TASKS), scenes=0.06, unknown=0.02, wordings=0.5, varied=True),
    weights=RoleWeights(prompt_image=0.05, answer_text=4.0, end=1.0),
    cut=CodeNoiseConfig(replace=0.1, changed_answers=0.3),
    change=ChangeConfig(shift=0.08, scale=0.15, turn=10, contrast=0.3, tint=0.2, grey=0.15),
)
