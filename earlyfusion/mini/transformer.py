"""The transformer of `mini`, first stage: dialogues about images, in English and Korean.

    earlyfusion train mini_transformer data=DIR/emoji image_tokenizer=runs/mini_image_tokenizer

It learns the form of all 18 kinds of task, what images look like, and both languages. The command
encodes the images to codes, trains a text tokenizer and the transformer on packed dialogues, and
writes `model/` under the run's folder in transformers' layout. Repeated, it continues from the
newest checkpoint. Machine, run time and scores of the shipped weights are in the model card
(earlyfusion/pretrained/mini/README.md).
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from earlyfusion.config import PRESETS
from earlyfusion.content import Image
from earlyfusion.data.encoding import plain_document
from earlyfusion.data.images import to_pixels
from earlyfusion.data.packing import Packer, RoleWeights
from earlyfusion.errors import SettingError
from earlyfusion.fields import check_at_least, check_shares
from earlyfusion.mini.emoji.dataset import EmojiData
from earlyfusion.mini.emoji.dialogues import (
    Sample,
    caption_pairs,
    generate,
    messages_of,
    studies,
)
from earlyfusion.mini.image_tokenizer import AugmentConfig, augment_image
from earlyfusion.mini.stage import (
    StageConfig,
    file_of_start,
    first_model,
    load_image_tokenizer,
    prompted_images,
    save_model,
    text_tokenizer,
)
from earlyfusion.model.vqgan import VQGAN
from earlyfusion.processor import Processor, TokenSequence
from earlyfusion.train.language import LanguageTask
from earlyfusion.train.optim import OptimConfig
from earlyfusion.train.trainer import RunConfig, train
from earlyfusion.vocabulary import ImageLayout

# Share of each kind of dialogue. All others build on caption and draw, which come most often.
TASKS = {
    "caption": 26.0,
    "draw": 26.0,
    "caption_style": 4.0,
    "keyword": 2.0,
    "yesno_name": 4.0,
    "yesno_kind": 2.0,
    "category": 5.0,
    "common": 6.0,
    "odd": 2.0,
    "which": 3.0,
    "same_thing": 2.0,
    "colour": 5.0,
    "style_name": 2.0,
    "list_draw": 4.0,
    "list_name": 2.0,
    "restyle": 3.0,
    "chat_draw_ask": 2.0,
    "chat_caption_follow": 2.0,
}


@dataclass
class DocumentsConfig:
    """Sources of the documents and their shares, and the codes of their images. Raises
    `SettingError`."""

    dialogues: int = 150_000
    """Number of different dialogues; documents are chosen among them."""
    tasks: dict[str, float] = field(default_factory=lambda: dict(TASKS))
    """Weight of each task among the dialogues."""
    korean: float = 0.4
    """Share of the dialogues in Korean."""
    seed: int = 100
    """Seed of the dialogues and of the variants of images."""
    pairs: float = 0.35
    """Share of plain pairs of image and name among the documents."""
    usual: float = 0.0
    """Share of requests without a style and the first image of the thing, among the documents."""
    studies: float = 0.0
    """Share of dialogues with several questions about one image."""
    unchanged: float = 0.0
    """Share of the images in prompts that keep the first variant; the others get a random one."""
    bare: float = 0.1
    """Share of answers with an image whose request is dropped, for guidance."""
    variants: int = 3
    """Versions of each image in codes: the first as it is, the others shifted and scaled."""
    noise: float = 0.0
    """Share of the codes of a changed image in a prompt that are replaced by a near codeword."""

    def __post_init__(self) -> None:
        check_at_least(self, dialogues=1, variants=1)
        check_shares(self, "korean", "unchanged", "bare", "noise")
        if min(*self.shares) < 0:
            raise SettingError(
                f"pairs={self.pairs}, usual={self.usual} and studies={self.studies} are shares: "
                "give 0 or more each, and together at most 1"
            )

    @property
    def shares(self) -> tuple[float, float, float, float]:
        """The shares of dialogues, pairs, requests and studies among the documents."""
        dialogues = 1 - self.pairs - self.usual - self.studies
        return dialogues, self.pairs, self.usual, self.studies


@dataclass
class TransformerConfig(StageConfig):
    """Training of the transformer of mini on packed dialogues."""

    prompts: tuple[str, ...] = (
        "Draw a red apple.",
        "Draw a cat face.",
        "Draw a rainbow.",
        "Draw the flag of France.",
        "무지개를 그려 줘.",
        "Draw a cat face in Noto style.",
    )
    """Requests whose images are generated at the end and at `run.sample_every`."""
    documents: DocumentsConfig = field(default_factory=DocumentsConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)


@torch.inference_mode()
def encode_variants(vqgan: VQGAN, data: EmojiData, config: TransformerConfig) -> np.ndarray:
    """Codes of every training image in every variant: int16 [images, variants, h, w]."""
    variants, side = config.documents.variants, config.model.vq_config.resolution
    plain, changed = replace(config.augment, share=0.0), replace(config.augment, share=1.0)
    ids, grid = data.split("train"), config.model.vq_config.grid
    table = np.zeros((len(ids), variants, grid, grid), np.int16)
    for start in range(0, len(ids), 32):
        images = data.images(ids[start : start + 32])
        for variant in range(variants):
            rng = np.random.default_rng([config.documents.seed, start, variant])
            augment = changed if variant else plain
            pixels = to_pixels([augment_image(image, side, augment, rng) for image in images])
            table[start : start + 32, variant] = vqgan.encode(pixels).numpy()
    return table


def nearest_codes(vqgan: VQGAN) -> np.ndarray:
    """The eight codes whose codewords are nearest to each, the nearest first: int16 [codes, 8]."""
    codewords = vqgan.quantize.embedding.weight.detach().float()
    # Not `nearest_codewords`, which orders equal codewords differently: the shipped stages were
    # trained with this order.
    nearest = torch.cdist(codewords, codewords).argsort(1)[:, 1:9]  # without itself
    return nearest.cpu().numpy().astype(np.int16)


class Documents:
    """The stream of documents: document k is a random sample, with random variants of its images.

    `sources` are samples with the share of each source; `codes` come from `encode_variants`,
    `nearest` from `nearest_codes`. This is not a `data.mixture.Mixture`, whose random numbers
    depend on the row and come in another order. Here they follow from the number of the document;
    with any other order, the shipped stages could not be trained again to the same losses.
    """

    def __init__(
        self,
        sources: list[tuple[float, list[Sample]]],
        data: EmojiData,
        codes: np.ndarray,
        nearest: np.ndarray,
        processor: Processor,
        config: TransformerConfig,
    ) -> None:
        self._shares, self._sources = zip(*sources, strict=True)
        self._codes, self._nearest = codes, nearest
        self._number_of = {name: i for i, name in enumerate(data.split("train"))}
        self._processor, self._config = processor, config

    def __call__(self, number: int) -> TokenSequence:
        cfg, seed = self._config.documents, self._config.run.seed
        # A separate generator per document: any can be made at any time, by any thread.
        rng = np.random.default_rng([seed, 7, number])
        source = self._sources[int(rng.choice(len(self._sources), p=self._shares))]
        sample = source[int(rng.integers(len(source)))]
        messages = messages_of(sample["messages"], partial(self._image, rng))
        answer = messages[-1]
        # An image without its request trains the unconditional branch of guidance.
        if isinstance(answer.parts[0], Image) and rng.random() < cfg.bare:
            codes = answer.parts[0].codes
            assert codes is not None
            return plain_document(self._processor, answer.parts[:1], [codes])
        return self._processor.encode_document(messages)

    def _image(self, rng: np.random.Generator, image_id: str, role: str) -> Image:
        # Images in answers are always the first variant; only images in prompts vary.
        changes = role == "user" and rng.random() >= self._config.documents.unchanged
        variants = self._codes.shape[1] if changes else 1
        codes = self._codes[self._number_of[image_id], int(rng.integers(variants))]
        if changes:
            codes = self._add_noise(codes, rng)
        return Image(codes=codes.astype(np.int64))

    def _add_noise(self, codes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        if not self._config.documents.noise:
            return codes
        swapped = rng.random(codes.shape) < self._config.documents.noise
        other = self._nearest[codes, rng.integers(self._nearest.shape[1], size=codes.shape)]
        return np.where(swapped, other, codes)


def sources(config: TransformerConfig, data: EmojiData) -> list[tuple[float, list[Sample]]]:
    """Samples with their shares: dialogues, pairs, requests for the first image of each thing, and
    studies."""
    cfg = config.documents
    samples = generate(data, "train", cfg.dialogues, cfg.seed, cfg.korean, cfg.tasks)
    pairs = list(caption_pairs(data))
    study_samples = samples
    if cfg.studies:
        study_samples = list(studies(data, "train", cfg.dialogues, cfg.seed, turns=3))
    usual = [pair for pair in pairs if pair["task"] == "usual"]
    # If these requests have their own share, the pairs leave them out.
    plain = [pair for pair in pairs if pair["task"] != "usual"] if cfg.usual else pairs
    return list(zip(cfg.shares, (samples, plain, usual, study_samples), strict=True))


def prepare(config: TransformerConfig) -> tuple[VQGAN, Processor, Documents]:
    """The image tokenizer, the processor and the stream of documents. Writes the tokenizer and the
    images' codes, made or taken from `start`, into the run's folder."""
    config.run.out.mkdir(parents=True, exist_ok=True)
    data = EmojiData(config.data)
    mixed = sources(config, data)
    vqgan = load_image_tokenizer(config.image_tokenizer, config.model)
    _copy_codes(config)
    (_, samples), *_ = mixed
    tokenizer = text_tokenizer(config, [*samples, *caption_pairs(data)])
    table, grid = config.run.out / "codes.npy", config.model.vq_config.grid
    if not table.exists():
        np.save(table, encode_variants(vqgan, data, config))
    processor = Processor(tokenizer, ImageLayout(grid, grid))
    codes, nearest = np.load(table), nearest_codes(vqgan)
    return vqgan, processor, Documents(mixed, data, codes, nearest, processor, config)


def _copy_codes(config: TransformerConfig) -> None:
    """Copy the codes of the run `start`, unless they exist or have another number of variants."""
    if config.start is None:
        return
    source, target = file_of_start(config.start, "codes.npy"), config.run.out / "codes.npy"
    if np.load(source, "r").shape[1] == config.documents.variants and not target.exists():
        shutil.copy(source, target)


def main(config: TransformerConfig) -> None:
    vqgan, processor, documents = prepare(config)
    model = first_model(config, processor.vocabulary.size)
    packer = Packer(documents, config.weights, config.rows, config.length, processor.vocabulary.pad)
    images = prompted_images(config, model, processor, vqgan)
    train(LanguageTask(model, packer, config.z_weight), config.run, config.optim, images)
    save_model(config, model, vqgan)


config = TransformerConfig(
    model=replace(PRESETS["mini"], num_hidden_layers=6),  # the last stages add four layers
    # At step 2,000 the second stage takes over: mini/answers.py.
    run=RunConfig(
        out=Path("runs/mini_transformer"),
        steps=4800,
        stop_after=2000,
        precision="bf16",
        sample_every=500,
    ),
    optim=OptimConfig(lr=2e-3, warmup_steps=100, decay="cosine", final_ratio=0.02, eps=1e-8),
    weights=RoleWeights(prompt_image=0.1, answer_text=3.0, end=1.0),
    augment=AugmentConfig(share=1.0, shift=0.06, scale=0.1, mirror=0.0, recolour=0.0),
)
