"""Sample images generated during a run: they are there, and do not change the training."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import PIL.Image
import pytest
import torch
from corpora import tiny_vqgan
from tiny import CONFIG, tiny_processor, tiny_transformer

from earlyfusion.content import Image, Message, Text
from earlyfusion.data.packing import Packer, RoleWeights
from earlyfusion.errors import SettingError
from earlyfusion.generation.reference import generate
from earlyfusion.generation.request import ImageDone, Request
from earlyfusion.generation.settings import SamplingParams
from earlyfusion.image_tokenizer import ImageTokenizer
from earlyfusion.model.transformer import Block, Transformer
from earlyfusion.processor import ANSWER_TEXT, CONTROL, END, Processor, TokenSequence
from earlyfusion.train import lora, trainer
from earlyfusion.train.language import LanguageTask
from earlyfusion.train.monitor import read_metrics
from earlyfusion.train.optim import OptimConfig
from earlyfusion.train.samples import PromptedImages, encoded_prompts, image_prompts
from earlyfusion.train.trainer import RunConfig, train

OPTIM = OptimConfig(lr=1e-2, warmup_steps=2, eps=1e-8)
PROMPTS = ("Draw a red apple, please.", "사과를 그려 줘.")
DEFAULTS: dict[str, Any] = {"guidance_text": 1.0, "guidance_image": 1.0}


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Processor:
    return tiny_processor(tmp_path_factory.mktemp("tokenizer"))


def document(processor: Processor, number: int) -> TokenSequence:
    side = processor.layout.height
    codes = torch.full((side, side), number % 7).numpy()
    turns = [
        Message("user", [Text(f"Draw {number % 3}.")]),
        Message("assistant", [Image(codes=codes)]),
    ]
    return processor.encode_document(turns)


def language_task(processor: Processor, rank: int = 0) -> LanguageTask:
    torch.manual_seed(0)
    transformer = tiny_transformer(processor).train()
    for block in transformer.modules():
        if isinstance(block, Block):
            block.dropout = 0.1
    if rank:
        lora.adapt(transformer, rank)
    length = CONFIG.max_position_embeddings
    packer = Packer(lambda n: document(processor, n), RoleWeights(), rows=1, length=length, pad=1)
    return LanguageTask(transformer, packer)


def shows(processor: Processor, transformer: Transformer) -> PromptedImages:
    tokenizer = ImageTokenizer(tiny_vqgan(), CONFIG.vq_config.resolution)
    return PromptedImages(
        transformer, processor, tokenizer, encoded_prompts(processor, PROMPTS), DEFAULTS, seed=3
    )


@pytest.mark.parametrize("rank", [0, 2])
def test_losses_are_equal_to_the_bit_with_and_without_samples(
    tmp_path: Path, processor: Processor, rank: int
) -> None:
    run = RunConfig(tmp_path / "without", steps=6, log_every=1)
    train(language_task(processor, rank), run, OPTIM)
    task = language_task(processor, rank)
    modes = {name: module.training for name, module in task.model.named_modules()}
    sampled = replace(run, out=tmp_path / "with", sample_every=2)
    shows(processor, task.model)(0, tmp_path)
    train(task, sampled, OPTIM, shows(processor, task.model))
    first, second = (
        [row["loss"] for row in read_metrics(tmp_path / name)] for name in ("without", "with")
    )
    assert first == second and len(set(first)) == 6
    assert modes == {name: module.training for name, module in task.model.named_modules()}
    assert any(modes.values())
    names = sorted(path.name for path in (sampled.out / "samples").iterdir())
    steps = ("00000002", "00000004", "00000006")
    assert names == [f"step-{step}.{kind}" for step in steps for kind in ("json", "png")]
    told = json.loads((sampled.out / "samples" / "step-00000002.json").read_text("utf-8"))
    assert told["step"] == 2 and told["prompts"] == list(PROMPTS)
    begun = (tmp_path / "step-00000000.png").read_bytes()
    assert begun != (sampled.out / "samples" / "step-00000006.png").read_bytes()


def test_the_images_are_those_of_the_reference_loop(tmp_path: Path, processor: Processor) -> None:
    transformer = tiny_transformer(processor)
    shows(processor, transformer)(7, tmp_path)
    tokenizer = ImageTokenizer(tiny_vqgan(), CONFIG.vq_config.resolution)
    with PIL.Image.open(tmp_path / "step-00000007.png") as sheet:
        shown = sheet.convert("RGB")
    side = CONFIG.vq_config.resolution
    for number, (_, ids) in enumerate(encoded_prompts(processor, PROMPTS)):
        sampling = SamplingParams(seed=3 + number).resolved(DEFAULTS)
        request = Request(
            ids, "image", sampling, max_images=1, max_tokens=processor.layout.num_tokens
        )
        events = generate(transformer, processor, request)
        codes = next(event.codes for event in events if isinstance(event, ImageDone))
        image = tokenizer.decode(torch.from_numpy(codes)[None])[0]
        left = 4 + number * (128 + 4)
        cut = shown.crop((left, 4, left + 128, 132))
        assert cut.resize((side, side), PIL.Image.Resampling.NEAREST).tobytes() == image.tobytes()


def test_prompts_are_found_in_the_data(processor: Processor) -> None:
    result = image_prompts(processor, lambda number: document(processor, number), count=2)
    assert [name for name, _ in result] == ["Draw 0.", "Draw 1."]
    expected = processor.encode([Message("user", [Text("Draw 1.")])]).ids
    assert list(result[1][1]) == expected
    silent = TokenSequence(ids=[0, 9, 2], role=[CONTROL, ANSWER_TEXT, END])
    assert image_prompts(processor, lambda _: silent, count=2) == []


def test_a_prompt_without_room_for_an_image_is_refused(processor: Processor) -> None:
    tokenizer = ImageTokenizer(tiny_vqgan(), CONFIG.vq_config.resolution)
    long = [("long", [5] * CONFIG.max_position_embeddings)]
    with pytest.raises(SettingError, match="leave no room"):
        PromptedImages(tiny_transformer(processor), processor, tokenizer, long, DEFAULTS)


def test_figures_of_samples_go_to_the_metrics(tmp_path: Path, processor: Processor) -> None:
    run = RunConfig(tmp_path, steps=5, log_every=4, sample_every=2)
    train(language_task(processor), run, OPTIM, lambda step, folder: {"quality": float(step)})
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [0, 1, 3, 4]
    assert [row.get("quality") for row in rows] == [None, 2.0, 4.0, 5.0]


def test_impossible_settings_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingError, match="sample_every=-1"):
        RunConfig(sample_every=-1)
    monkeypatch.setattr(trainer, "find_spec", lambda name: None)
    with pytest.raises(SettingError, match="pip install wandb"):
        RunConfig(wandb=True)


class _Wandb(ModuleType):
    """Takes what would go to Weights & Biases."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.begun: list[dict[str, Any]] = []
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.ended = 0

    def init(self, **settings: Any) -> _Wandb:
        self.begun.append(settings)
        return self

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.rows.append((step, metrics))

    def finish(self) -> None:
        self.ended += 1


def test_weights_and_biases_get_the_same_figures(
    tmp_path: Path, processor: Processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = _Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr(trainer, "find_spec", lambda name: object())
    run = RunConfig(tmp_path, steps=4, log_every=1, wandb=True)
    train(language_task(processor), replace(run, stop_after=2), OPTIM)
    train(language_task(processor), run, OPTIM)
    assert [step for step, _ in wandb.rows] == [0, 1, 2, 3]
    assert [m["loss"] for _, m in wandb.rows] == [r["loss"] for r in read_metrics(tmp_path)]
    first, second = wandb.begun
    assert first["id"] == second["id"] and first["resume"] == "allow" and wandb.ended == 2
