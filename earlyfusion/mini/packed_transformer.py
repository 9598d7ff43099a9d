"""The transformer of a larger `mini` on rows that are put together on the device.

    earlyfusion train mini_packed_transformer data=DIR/emoji device=cuda minutes=4 \\
        image_tokenizer=runs/mini_named_image_tokenizer

All training pictures are cut into codes on the device in many ways: moved, scaled, turned, in other
colours where no colour is asked about. Documents lie there too, and every batch of fixed shape is
filled anew (`train.device_rows`), with a tenth of the input codes replaced. Matrices learn by Muon;
the weights that count are a moving average. It ends with `model/`. 10 layers of width 320 and an
image tokenizer of 3.2 M weights: 18.8 M in all, 38 MB in fp16. `hidden_size=256
num_hidden_layers=6` and `resolution=64` are for CPUs. Stage of `pretrain_mini`; what is measured
stands in docs/train.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from earlyfusion.checkpoints.hf import save_hf
from earlyfusion.config import ModelConfig
from earlyfusion.content import Image, Message, Text
from earlyfusion.data.encoding import plain_document
from earlyfusion.data.packing import RoleWeights
from earlyfusion.devices import resolve_device
from earlyfusion.errors import DataError
from earlyfusion.files import replacing
from earlyfusion.image_tokenizer import ImageTokenizer
from earlyfusion.mini import named_image_tokenizer as mini_named_image_tokenizer
from earlyfusion.mini.emoji.dialogues import Sample
from earlyfusion.mini.emoji.mixture import MixtureConfig, is_plain, samples
from earlyfusion.mini.emoji.tensors import opened, pictures
from earlyfusion.mini.transformer import GENERATION, TASKS, load_image_tokenizer, texts
from earlyfusion.model.transformer import Transformer
from earlyfusion.model.vqgan import VQGAN
from earlyfusion.processor import Processor, TokenSequence, train_tokenizer
from earlyfusion.train import checkpoint
from earlyfusion.train.augment import ChangeConfig, changed, resized
from earlyfusion.train.device_rows import CutConfig, DeviceRows, templates
from earlyfusion.train.image_tokenizer import nearest_codewords
from earlyfusion.train.language import LanguageTask, job_of
from earlyfusion.train.optim import OptimConfig
from earlyfusion.train.plan import Job
from earlyfusion.train.samples import PromptedPictures, encoded_prompts
from earlyfusion.train.trainer import RunConfig, train
from earlyfusion.vocabulary import ImageLayout, Vocabulary

BATCH = 256  # pictures that are cut at a time


@dataclass
class WaysConfig:
    """In how many ways each picture is cut: the first is exact, then so many keep the colours."""

    plain: int = 12
    recoloured: int = 12

    def __post_init__(self) -> None:
        if self.plain < 1 or self.recoloured < 0:
            raise DataError(
                f"plain={self.plain} must be at least 1 and recoloured={self.recoloured} 0 up"
            )


@dataclass
class PackedTransformerConfig:
    data: Path = Path("data/emoji")
    image_tokenizer: Path = Path("runs/mini_named_image_tokenizer")
    start: Path | None = None
    """The run whose newest weights and tokenizer this one begins with."""
    rows: int = 32
    length: int = 2048
    dropout: float = 0.0
    z_weight: float = 1e-5
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
    """Requests whose pictures are drawn at the end and at `run.sample_every`."""
    run: RunConfig = field(default_factory=RunConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    mixture: MixtureConfig = field(default_factory=MixtureConfig)
    weights: RoleWeights = field(default_factory=RoleWeights)
    ways: WaysConfig = field(default_factory=WaysConfig)
    cut: CutConfig = field(default_factory=CutConfig)
    change: ChangeConfig = field(default_factory=ChangeConfig)

    def job(self) -> Job:
        return job_of(self.model, self.run, self.rows, self.length, self.dropout)


class BlankLayout(ImageLayout):
    """Spells every picture as one of code 0: its own codes are looked up later."""

    def spell(self, codes_hw: npt.ArrayLike, vocabulary: Vocabulary) -> list[int]:
        return _blank(self.height, self.width, vocabulary)


@lru_cache
def _blank(height: int, width: int, vocabulary: Vocabulary) -> list[int]:
    return ImageLayout(height, width).spell(np.zeros((height, width), np.int64), vocabulary)


def cut_once(vqgan: VQGAN, config: PackedTransformerConfig) -> Tensor:
    """What `cut` gives, kept in `codes.npy` under the run: on a CPU it takes minutes."""
    path, device = config.run.out / "codes.npy", vqgan.quantize.embedding.weight.device
    if path.is_file():
        return torch.from_numpy(np.load(path)).to(device)
    codes = cut(vqgan, config)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial, partial.open("wb") as file:
        np.save(file, codes.cpu().numpy())
    return codes


@torch.inference_mode()
def cut(vqgan: VQGAN, config: PackedTransformerConfig) -> Tensor:
    """Codes of every training picture in every way, on the device: int16 [P, V, C]."""
    side, device = config.model.vq_config.resolution, vqgan.quantize.embedding.weight.device
    table_PYXC = pictures(config.data, "train", side, str(device))
    kept = replace(config.change, contrast=0.0, tint=0.0, grey=0.0, unchanged=0.0)
    every = [None, *[kept] * (config.ways.plain - 1)]
    every += [replace(config.change, unchanged=0.0)] * config.ways.recoloured
    codes = torch.empty(
        len(table_PYXC),
        len(every),
        config.model.vq_config.grid**2,
        dtype=torch.int16,
        device=device,
    )
    generator = torch.Generator(device)
    for way, how in enumerate(every):
        generator.manual_seed(1_000 * config.run.seed + config.mixture.seed * 100 + way)
        for first in range(0, len(table_PYXC), BATCH):
            pixels = resized(table_PYXC[first : first + BATCH], side)
            pixels = changed(pixels, how, generator) if how else pixels
            codes[first : first + BATCH, way] = vqgan.encode(pixels).flatten(1).short()
    return codes


def documents(
    found: list[Sample], processor: Processor, place: dict[str, int]
) -> Iterator[tuple[TokenSequence, list[int], bool]]:
    """Samples as tokens with blank pictures, with the numbers of the pictures, and if plain."""
    blank = np.zeros((1, 1), np.int64)
    for sample in found:
        shown = [place[p["image"]] for p in _parts(sample) if p["type"] == "image"]
        if sample["task"] == "bare":
            document = plain_document(processor, [Image(codes=blank)], [blank])
            yield document, shown, is_plain(sample)
            continue
        messages = [
            Message(m["role"], [_part(p, blank) for p in m["content"]]) for m in sample["messages"]
        ]
        yield processor.encode_document(messages), shown, is_plain(sample)


def _parts(sample: Sample) -> Iterator[dict[str, str]]:
    return (part for message in sample["messages"] for part in message["content"])


def _part(raw: dict[str, str], blank: npt.NDArray[np.int64]) -> Text | Image:
    return Text(raw["text"]) if raw["type"] == "text" else Image(codes=blank)


def text_tokenizer(config: PackedTransformerConfig, found: list[Sample]) -> Path:
    """The tokenizer's file under the run: there, taken from `start`, or trained on the texts."""
    path = config.run.out / "tokenizer.json"
    if path.exists():
        return path
    if config.start is not None:
        given = config.start / path.name
        if not given.is_file():
            raise DataError(
                f"{config.start} holds no {path.name}: start={config.start} must name a run of "
                "this recipe"
            )
        text = given.read_text(encoding="utf-8")
    else:
        codebook = config.model.vq_config.num_embeddings
        text = train_tokenizer(texts(found), codebook, config.model.vocab_size)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def rows_of(config: PackedTransformerConfig, vqgan: VQGAN) -> tuple[DeviceRows, Processor]:
    """The rows to learn from, and the processor of the model."""
    data, grid = opened(config.data), config.model.vq_config.grid
    found = samples(config.data, config.mixture)
    path = text_tokenizer(config, found)
    processor = Processor(path, ImageLayout(grid, grid))
    vocabulary = processor.vocabulary
    is_code = np.zeros(vocabulary.size, bool)
    is_code[vocabulary.image_tokens] = True
    place = {name: number for number, name in enumerate(data.split("train"))}
    stream = documents(found, Processor(path, BlankLayout(grid, grid)), place)
    made = templates(stream, grid**2, is_code, config.weights)
    rows = DeviceRows(
        made,
        cut_once(vqgan, config),
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


def begun(config: PackedTransformerConfig, words: int) -> Transformer:
    """The model on its device, with weights drawn from the run's seed or those of `start`."""
    torch.manual_seed(config.run.seed)
    model = Transformer(replace(config.model, vocab_size=words), config.dropout)
    model = model.to(resolve_device(config.run.device))
    model.init_weights()
    if config.start is not None:
        checkpoint.load_model(model, checkpoint.weights(config.start), config.start)
    return model


def main(config: PackedTransformerConfig) -> None:
    vqgan = load_image_tokenizer(config.image_tokenizer, config.model)
    vqgan.to(resolve_device(config.run.device))
    rows, processor = rows_of(config, vqgan)
    model = begun(config, processor.vocabulary.size)
    image_tokenizer = ImageTokenizer(vqgan, config.model.vq_config.resolution)
    shows = PromptedPictures(
        model,
        processor,
        image_tokenizer,
        encoded_prompts(processor, config.prompts),
        {"chameleon": GENERATION},
        config.run.seed,
    )
    train(LanguageTask(model, rows, config.z_weight), config.run, config.optim, shows)
    save(config, model, vqgan)


def save(config: PackedTransformerConfig, model: Transformer, vqgan: VQGAN) -> None:
    """Write the model folder under the run."""
    text = (config.run.out / "tokenizer.json").read_text(encoding="utf-8")
    half: dict[str, Any] = {"dtype": torch.float16, "vq_dtype": torch.float16}
    out = config.run.out / "model"
    save_hf(out, model.eval().cpu(), vqgan.cpu(), text, {"chameleon": GENERATION}, **half)


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
    mixture=MixtureConfig(tasks=dict(TASKS)),
    weights=RoleWeights(prompt_image=0.05, answer_text=4.0, end=1.0),
    cut=CutConfig(replace=0.1, changed_answers=0.3),
    change=ChangeConfig(shift=0.08, scale=0.15, turn=10, contrast=0.3, tint=0.2, grey=0.15),
)
