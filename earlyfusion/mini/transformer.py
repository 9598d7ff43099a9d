"""The transformer of `mini`, first stage; and what writes a model folder.

    earlyfusion train mini_transformer data=DIR/emoji image_tokenizer=runs/mini_image_tokenizer

Cuts the pictures into codes, trains a text tokenizer, trains the transformer on dialogues (packed,
18 kinds of task, English and Korean) and writes `model/` under the run's folder in the transformers
layout. The run is resumable: the same command goes on from the newest checkpoint. Machine, run time
and scores of the shipped weights stand in the model card (earlyfusion/pretrained/mini/README.md).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from earlyfusion.checkpoints.hf import save_hf
from earlyfusion.config import PRESETS, ModelConfig
from earlyfusion.content import Image, Message, Text
from earlyfusion.data.encoding import plain_document
from earlyfusion.data.packing import Packer, RoleWeights
from earlyfusion.data.pictures import to_pixels
from earlyfusion.devices import resolve_device
from earlyfusion.errors import DataError
from earlyfusion.image_tokenizer import ImageTokenizer
from earlyfusion.kernels.twins import accelerate
from earlyfusion.mini.emoji.dataset import EmojiData
from earlyfusion.mini.emoji.dialogues import Sample, caption_pairs, generate, studies
from earlyfusion.mini.image_tokenizer import AugmentConfig, augmented
from earlyfusion.model.transformer import Transformer
from earlyfusion.model.vqgan import VQGAN
from earlyfusion.processor import Processor, TokenSequence, train_tokenizer
from earlyfusion.train import checkpoint
from earlyfusion.train.language import LanguageTask, job_of
from earlyfusion.train.optim import OptimConfig
from earlyfusion.train.plan import Job
from earlyfusion.train.samples import PromptedPictures, encoded_prompts
from earlyfusion.train.trainer import RunConfig, train
from earlyfusion.vocabulary import ImageLayout

GENERATION = {
    "text": {"temperature": 0.0},
    "image": {"temperature": 0.5, "top_p": 0.9},
    "guidance": {"text": 1.0, "image": 1.0},
}


# Share of each kind of dialogue: naming and drawing carry all others, so they come most often.
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
    """What the documents are made of."""

    dialogues: int = 150_000
    tasks: dict[str, float] = field(default_factory=lambda: dict(TASKS))
    korean: float = 0.4
    seed: int = 100
    pairs: float = 0.35
    """Share of plain pairs of picture and name among the documents."""
    usual: float = 0.0
    """Share of requests without a style and the first picture of the thing, among the documents."""
    studies: float = 0.0
    """Share of dialogues with several questions about one picture."""
    unchanged: float = 0.0
    """Share of the pictures in prompts that are taken as they are, besides the chance of it."""
    bare: float = 0.1
    """Share of drawings whose request is dropped, for guidance."""
    variants: int = 3
    """Ways each picture is cut into codes: the first as it is, the others shifted and scaled."""
    noise: float = 0.0
    """Share of the codes of changed pictures in prompts that become a near codeword."""


@dataclass
class TransformerConfig:
    data: Path = Path("data/emoji")
    image_tokenizer: Path = Path("runs/mini_image_tokenizer")
    start: Path | None = None
    """The run whose newest weights, tokenizer and codes this one begins with."""
    rows: int = 2
    length: int = 2048
    dropout: float = 0.0
    z_weight: float = 1e-5
    prompts: tuple[str, ...] = (
        "Draw a red apple.",
        "Draw a cat face.",
        "Draw a rainbow.",
        "Draw the flag of France.",
        "무지개를 그려 줘.",
        "Draw a cat face in Noto style.",
    )
    """Requests whose pictures are drawn at `run.sample_every`."""
    run: RunConfig = field(default_factory=RunConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    documents: DocumentsConfig = field(default_factory=DocumentsConfig)
    weights: RoleWeights = field(default_factory=RoleWeights)
    augment: AugmentConfig = field(default_factory=AugmentConfig)

    def job(self) -> Job:
        return job_of(self.model, self.run, self.rows, self.length, self.dropout)


def load_image_tokenizer(run: Path, config: ModelConfig) -> VQGAN:
    """The newest weights of an image tokenizer's run, rounded as they are shipped: to fp16."""
    tensors = checkpoint.weights(run)
    vqgan = VQGAN(config.vq_config)
    vqgan.load_state_dict({k: v.half().float() for k, v in tensors.items()})
    return accelerate(vqgan.eval().requires_grad_(False))


@torch.inference_mode()
def picture_codes(vqgan: VQGAN, data: EmojiData, config: TransformerConfig) -> np.ndarray:
    """Codes of every training picture in every variant: int16 [pictures, variants, h, w]."""
    variants, side = config.documents.variants, config.model.vq_config.resolution
    plain, changed = replace(config.augment, share=0.0), replace(config.augment, share=1.0)
    ids, grid = data.split("train"), config.model.vq_config.grid
    table = np.zeros((len(ids), variants, grid, grid), np.int16)
    for start in range(0, len(ids), 32):
        pictures = data.images(ids[start : start + 32])
        for variant in range(variants):
            rng = np.random.default_rng([config.documents.seed, start, variant])
            how = changed if variant else plain
            pixels = to_pixels([augmented(p, side, how, rng) for p in pictures])
            table[start : start + 32, variant] = vqgan.encode(pixels).numpy()
    return table


def near_codes(vqgan: VQGAN, count: int = 8) -> np.ndarray:
    """The `count` codewords nearest to each, itself left out: int16 [codes, count]."""
    codewords = vqgan.quantize.embedding.weight.detach().float()
    nearest = torch.cdist(codewords, codewords).argsort(1)[:, 1 : count + 1]
    return nearest.cpu().numpy().astype(np.int16)


class Documents:
    """Document k of the training stream, a pure function of k.

    `codes` and `near` are what `picture_codes` and `near_codes` give.
    """

    def __init__(
        self,
        sources: list[tuple[float, list[Sample]]],
        data: EmojiData,
        codes: np.ndarray,
        near: np.ndarray,
        processor: Processor,
        config: TransformerConfig,
    ) -> None:
        self._shares, self._sources = zip(*sources, strict=True)
        self._codes, self._near = codes, near
        self._place = {name: i for i, name in enumerate(data.split("train"))}
        self._processor, self._config = processor, config

    def __call__(self, number: int) -> TokenSequence:
        cfg, seed = self._config.documents, self._config.run.seed
        rng = np.random.default_rng([seed, 7, number])
        source = self._sources[int(rng.choice(len(self._sources), p=self._shares))]
        sample = source[int(rng.integers(len(source)))]
        messages = [self._message(m, rng) for m in sample["messages"]]
        answer = messages[-1]
        if isinstance(answer.parts[0], Image) and rng.random() < cfg.bare:
            codes = answer.parts[0].codes
            assert codes is not None
            return plain_document(self._processor, answer.parts[:1], [codes])
        return self._processor.encode_document(messages)

    def _message(self, raw: dict[str, Any], rng: np.random.Generator) -> Message:
        parts = [self._part(p, raw["role"], rng) for p in raw["content"]]
        return Message(raw["role"], parts)

    def _part(self, raw: dict[str, str], role: str, rng: np.random.Generator) -> Text | Image:
        if raw["type"] == "text":
            return Text(raw["text"])
        changes = role == "user" and rng.random() >= self._config.documents.unchanged
        variants = self._codes.shape[1] if changes else 1
        codes = self._codes[self._place[raw["image"]], int(rng.integers(variants))]
        if changes:
            codes = self._noisy(codes, rng)
        return Image(codes=codes.astype(np.int64))

    def _noisy(self, codes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        if not self._config.documents.noise:
            return codes
        swapped = rng.random(codes.shape) < self._config.documents.noise
        other = self._near[codes, rng.integers(self._near.shape[1], size=codes.shape)]
        return np.where(swapped, other, codes)


def texts(samples: Iterable[Sample]) -> Iterable[str]:
    for sample in samples:
        for message in sample["messages"]:
            yield from (part["text"] for part in message["content"] if part["type"] == "text")


def prepare(config: TransformerConfig) -> tuple[VQGAN, Processor, Documents]:
    """Pictures in codes and the tokenizer under `config.run.out`, made or taken from `start`."""
    out, cfg = config.run.out, config.documents
    out.mkdir(parents=True, exist_ok=True)
    data = EmojiData(config.data)
    samples = generate(data, "train", cfg.dialogues, cfg.seed, cfg.korean, cfg.tasks)
    pairs = list(caption_pairs(data))
    vqgan = load_image_tokenizer(config.image_tokenizer, config.model)
    _begin_with(config.start, out, cfg.variants)
    tokenizer, table, grid = out / "tokenizer.json", out / "codes.npy", config.model.vq_config.grid
    if not tokenizer.exists():
        codebook = config.model.vq_config.num_embeddings
        text = train_tokenizer(texts([*samples, *pairs]), codebook, config.model.vocab_size)
        tokenizer.write_text(text, encoding="utf-8")
    if not table.exists():
        np.save(table, picture_codes(vqgan, data, config))
    processor = Processor(tokenizer, ImageLayout(grid, grid))
    several = (
        list(studies(data, "train", cfg.dialogues, cfg.seed, turns=3)) if cfg.studies else samples
    )
    usual = [pair for pair in pairs if pair["task"] == "usual"]
    plain = [pair for pair in pairs if pair["task"] != "usual"] if cfg.usual else pairs
    shares = (1 - cfg.pairs - cfg.usual - cfg.studies, cfg.pairs, cfg.usual, cfg.studies)
    sources = list(zip(shares, (samples, plain, usual, several), strict=True))
    return (
        vqgan,
        processor,
        Documents(sources, data, np.load(table), near_codes(vqgan), processor, config),
    )


def _begin_with(start: Path | None, out: Path, variants: int) -> None:
    """Take over the tokenizer and the codes of another run, unless they are there.

    Codes in another number of variants are left behind, to be cut again.
    """
    for name in ("tokenizer.json", "codes.npy") if start else ():
        assert start is not None
        if not (start / name).is_file():
            raise DataError(
                f"{start} holds no {name}: start={start} must name a run of this recipe"
            )
        other = name == "codes.npy" and np.load(start / name, "r").shape[1] != variants
        if not other and not (out / name).exists():
            shutil.copy(start / name, out / name)


def main(config: TransformerConfig) -> None:
    vqgan, processor, documents = prepare(config)
    torch.manual_seed(config.run.seed)
    size = processor.vocabulary.size
    model_config = replace(config.model, vocab_size=size)
    model = Transformer(model_config, config.dropout).to(resolve_device(config.run.device))
    model.init_weights()
    if config.start is not None:
        model.load_state_dict(checkpoint.weights(config.start))
    packer = Packer(documents, config.weights, config.rows, config.length, processor.vocabulary.pad)
    image_tokenizer = ImageTokenizer(vqgan, config.model.vq_config.resolution)
    prompts = encoded_prompts(processor, config.prompts)
    shows = PromptedPictures(
        model, processor, image_tokenizer, prompts, {"chameleon": GENERATION}, config.run.seed
    )
    train(LanguageTask(model, packer, config.z_weight), config.run, config.optim, shows)
    save_hf(
        config.run.out / "model",
        model.eval(),
        vqgan,
        (config.run.out / "tokenizer.json").read_text(encoding="utf-8"),
        {"chameleon": GENERATION},
        dtype=torch.float16,
        vq_dtype=torch.float16,
    )


config = TransformerConfig(
    model=PRESETS["mini"],
    # The second stage, mini/answers.py, takes over at step 2,000.
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
