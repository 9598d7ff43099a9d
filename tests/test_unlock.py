"""Models that are really trained: on eight documents, and to generate images again."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import PIL.Image
import pytest
import torch
from corpora import jsonl

from earlyfusion import Chameleon, SamplingParams
from earlyfusion.checkpoints.detect import load
from earlyfusion.checkpoints.hf import save_hf
from earlyfusion.data.corpus import CorpusConfig, open_corpus
from earlyfusion.evals.emoji import features
from earlyfusion.image_tokenizer import ImageTokenizer
from earlyfusion.mini.emoji.dataset import EmojiData
from earlyfusion.model.transformer import Transformer
from earlyfusion.recipes.run import run

DATA = Path(__file__).parent / "data"


def small_model(folder: Path) -> Path:
    """Random weights of two narrow blocks, with the tokenizers of `mini`."""
    loaded = load("mini")
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    shape["max_position_embeddings"] = 1280
    transformer = Transformer(replace(loaded.config, **shape))
    transformer.init_weights(torch.Generator().manual_seed(0))
    text = loaded.processor.tokenizer_file.read_text(encoding="utf-8")
    save_hf(folder, transformer, loaded.vqgan, text, loaded.generation_defaults)
    return folder


def eight(folder: Path) -> Path:
    """Eight dialogues: images are named, generated, and mixed with text."""
    data, rows = EmojiData(DATA), []
    for number, row in enumerate(data.rows[:8]):
        data.image(row["id"]).save(folder / f"{number}.png")
        image = {"type": "image"}
        question = [{"type": "text", "text": f"{number}: what is this? "}, image]
        answer = [{"type": "text", "text": f"{row['en']}, as "}, image, image]
        answer.append({"type": "text", "text": f" and {row['ko']}."})
        turns = [("user", question), ("assistant", answer[: 1 + number % 4])]
        used = [f"{(number + k) % 8}.png" for k in range(1 + min(number % 4, 2))]
        rows.append({"messages": [{"role": r, "content": c} for r, c in turns], "images": used})
    return jsonl(folder / "eight.jsonl", rows)


def test_eight_documents_are_reproduced_token_for_token(tmp_path: Path) -> None:
    model, rows = small_model(tmp_path / "small"), eight(tmp_path)
    fields = [f"data={rows}", f"model={model}", f"out={tmp_path / 'run'}", "steps=60", "rows=1"]
    fields += ["length=1280", "lr=2e-2", "warmup_steps=10", "dropout=0", "balance=false"]
    run("finetune", [*fields, "log_every=10", "save_every=1000", "device=cpu", "eps=1e-8"])
    loaded = load(tmp_path / "run" / "model")
    tokenizer = ImageTokenizer(loaded.vqgan, loaded.config.vq_config.resolution)
    settings = CorpusConfig((str(rows),), balance=False)
    corpus = open_corpus(settings, loaded.processor, tokenizer, 1280, tmp_path / "again")
    documents = [corpus.stream(n) for n in range(8)]
    images = loaded.processor.vocabulary.image_tokens
    assert len({id_ for d in documents for id_ in d.ids} & set(images.tolist())) > 100
    for document in documents:
        # What follows each true beginning is right: so it is when it goes on from its own.
        ids, answer = torch.tensor(document.ids), np.asarray(document.loss_mask)
        guessed = loaded.transformer(ids[None])[0, :-1].argmax(-1)
        wrong = (guessed != ids[1:])[torch.from_numpy(answer)[1:]]
        assert answer.sum() > 1 and not wrong.any(), f"{int(wrong.sum())} of {answer.sum()}"
    assert sum(len(document) for document in documents) > 1000


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`mini` with zeros for the rows of its head that score image tokens."""
    loaded = load("mini")
    with torch.no_grad():
        loaded.transformer.lm_head.weight[loaded.processor.vocabulary.image_tokens] = 0
    folder = tmp_path_factory.mktemp("locked") / "model"
    text = loaded.processor.tokenizer_file.read_text(encoding="utf-8")
    defaults = loaded.generation_defaults
    save_hf(folder, loaded.transformer, loaded.vqgan, text, defaults, dtype=torch.float16)
    return folder


def test_the_image_rows_alone_teach_a_locked_model_to_draw(locked: Path, tmp_path: Path) -> None:
    data, rows = EmojiData(DATA), {}
    for row in data.rows:
        rows.setdefault(row["codepoints"], row)
    lines = []
    for name, row in rows.items():
        data.image(row["id"]).save(tmp_path / f"{name}.png")
        turns = [("user", f"Draw {row['en']}."), ("assistant", [{"type": "image"}])]
        messages = [{"role": role, "content": content} for role, content in turns]
        lines.append(json.dumps({"messages": messages, "images": [f"{name}.png"]}))
    learn = jsonl(tmp_path / "learn.jsonl", lines)
    fields = [f"model={locked}", f"data={learn}", f"out={tmp_path / 'run'}", "steps=30"]
    fields += ["lr=2e-2", "rows=1", "micro_rows=0", "length=1024", "precision=fp32", "device=cpu"]
    run("image_head_7b", [*fields, "log_every=10", "save_every=100"])

    unlocked = tmp_path / "run" / "model"
    before, after = (load(f).transformer.state_dict() for f in (locked, unlocked))
    images = load(locked).processor.vocabulary.image_tokens
    head = before.pop("lm_head.weight") != after["lm_head.weight"]
    assert set(head.any(1).nonzero()[:, 0].tolist()) <= set(images.tolist())
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())

    names = list(rows)[:6]
    true = [data.image(rows[name]["id"]) for name in names]
    prompts = [f"Draw {rows[name]['en']}." for name in names]
    far, near = (distance(folder, prompts, true) for folder in (locked, unlocked))
    assert near < 0.5 * far


def distance(folder: Path, prompts: list[str], true: list[PIL.Image.Image]) -> float:
    """How far the colours of what a model draws are from those of the true images."""
    model = Chameleon.load(str(folder), device="cpu")
    sampling = SamplingParams(image_temperature=0)
    replies = model.generate_batch(prompts, output="image", sampling=sampling)
    pairs = zip((reply.images[0] for reply in replies), true, strict=True)
    return float(np.mean([np.abs(features(a)[0] - features(b)[0]).mean() for a, b in pairs]))


def example(name: str) -> ModuleType:
    path = Path(__file__).parents[1] / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_examples_make_rows_that_can_be_trained_on_and_measured(tmp_path: Path) -> None:
    example("new_style").main(str(DATA), str(tmp_path))
    lines = (tmp_path / "train.jsonl").read_text().splitlines()
    assert 0 < len(lines) <= 40 and "in cutout style." in lines[0]
    images = [PIL.Image.open(tmp_path / json.loads(line)["images"][0]) for line in lines]
    assert np.asarray(images[0]).reshape(-1, 3).tolist().count([20, 70, 160]) > 1000
    compare = example("before_and_after")
    assert compare.comparison(images, images) == (
        "colours differ by 0.000, on 0% of the area; "
        f"{len(lines)} of {len(lines)} are nearest to their own true image"
    )
    turned = compare.comparison([image.rotate(180) for image in images], images)
    assert "on 0% of the area" in turned and "differ by 0.000" not in turned
    assert compare.sheet([images, images], 16).size == (16 * len(lines), 32)
