from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch

from earlyfusion import Chameleon, SamplingParams
from earlyfusion.config import PRESETS
from earlyfusion.content import Image
from earlyfusion.errors import DataError, SettingError
from earlyfusion.mini import styles as mini_styles
from earlyfusion.mini.emoji.dataset import EmojiData
from earlyfusion.mini.stage import StageConfig, first_model
from earlyfusion.mini.transformer import Documents, nearest_codes
from earlyfusion.model.vqgan import VQGAN
from earlyfusion.processor import Processor, train_tokenizer
from earlyfusion.recipes.run import RECIPES, load, override, run
from earlyfusion.train import checkpoint
from earlyfusion.train.monitor import read_metrics
from earlyfusion.vocabulary import ImageLayout

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipes of mini for a few steps, at 16 x 16 pixels."""
    out = tmp_path_factory.mktemp("runs")
    small = [f"data={DATA}", "resolution=16", "steps=4", "save_every=3", "log_every=1"]
    run("mini_image_tokenizer", [*small, f"out={out / 'vq'}", "batch=2"])
    network = [
        "warmup_steps=1",
        *small,
        f"image_tokenizer={out / 'vq'}",
        "dialogues=60",
        "hidden_size=32",
        "intermediate_size=64",
        "num_attention_heads=2",
        "num_hidden_layers=2",
        "length=400",
    ]
    run("mini_transformer", [*network, f"out={out / 'first'}"])
    run("mini_answers", [*network, f"out={out / 'lm'}", f"start={out / 'first'}"])
    run("mini_drawings", [*network, f"out={out / 'drawings'}", f"start={out / 'lm'}"])
    run("mini_styles", [*network, f"out={out / 'last'}", f"start={out / 'drawings'}"])
    return out


def test_the_recipes_end_in_a_model_that_reads_and_generates_images(runs: Path) -> None:
    model = Chameleon.load(str(runs / "last" / "model"))
    data = EmojiData(DATA)
    image = Image.of(data.image(data.rows[0]["id"]))
    reply = model.generate(
        [image, "What is this?"], output="text", sampling=SamplingParams(max_tokens=8)
    )
    assert reply.images == [] and reply.usage.completion_tokens <= 8
    generated = model.generate("Draw a cat.", output="image", seed=0)
    assert [i.size for i in generated.images] == [(16, 16)]


def test_training_moved_and_the_run_is_logged(runs: Path) -> None:
    for name in ("vq", "first", "lm", "last"):
        rows = read_metrics(runs / name)
        assert [r["step"] for r in rows] == [0, 1, 2, 3]
        assert rows[-1]["loss"] < rows[0]["loss"]


def test_the_last_stage_cuts_the_images_in_more_ways(runs: Path) -> None:
    before, after = (np.load(runs / name / "codes.npy") for name in ("drawings", "last"))
    assert before.shape[1] == 3 and after.shape[1] == 12
    assert (before[:, 0] == after[:, 0]).all()


def test_noise_swaps_codes_of_images_in_prompts_for_near_ones_and_of_no_other(runs: Path) -> None:
    vqgan = VQGAN(mini_styles.config.model.vq_config)
    near = nearest_codes(vqgan)
    distances = torch.cdist(vqgan.quantize.embedding.weight, vqgan.quantize.embedding.weight)
    assert (near[:, 0] == distances.fill_diagonal_(torch.inf).argmin(1).numpy()).all()
    data = EmojiData(DATA)
    codes = np.zeros((len(data.split("train")), 2, 8, 8), np.int16)
    tokenizer = runs / "noise.json"
    tokenizer.write_text(train_tokenizer(["a name"], 1024, 1400), encoding="utf-8")
    image = {"type": "image", "image": data.split("train")[0]}
    turns = [{"role": r, "content": [image]} for r in ("user", "assistant")]
    config = replace(
        mini_styles.config,
        documents=replace(mini_styles.config.documents, noise=0.5, unchanged=0.0, bare=0.0),
    )
    processor = Processor(tokenizer, ImageLayout(8, 8))
    stream = Documents([(1.0, [{"messages": turns}])], data, codes, near, processor, config)
    rows = [[i for i in stream(k).ids if i in processor.vocabulary.image_tokens] for k in range(20)]
    asked, generated = processor.vocabulary.tokens_to_codes(rows).reshape(20, 2, 64).swapaxes(0, 1)
    assert (generated == 0).all()
    assert 0.4 < (asked != 0).mean() < 0.6 and set(asked.ravel()) <= {0, *near[0].tolist()}


def test_the_second_stage_takes_over_tokenizer_and_codes(runs: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "codes.npy"):
        assert (runs / "first" / name).read_bytes() == (runs / "lm" / name).read_bytes()
    vocab_size = Processor(runs / "first" / "tokenizer.json", ImageLayout(8, 8)).vocabulary.size
    small = replace(PRESETS["mini"], hidden_size=32, intermediate_size=64)
    small = replace(small, num_attention_heads=2, num_hidden_layers=2)
    model = first_model(StageConfig(start=runs / "first", model=small), vocab_size)
    first = checkpoint.weights(runs / "first")
    assert all(torch.equal(value, first[name]) for name, value in model.state_dict().items())
    deeper = first_model(
        StageConfig(start=runs / "first", model=replace(small, num_hidden_layers=5)), vocab_size
    )
    ids = torch.randint(vocab_size, (2, 9))
    assert len(deeper.model.layers) == 5
    torch.testing.assert_close(deeper.eval()(ids), model.eval()(ids))
    added = [layer for layer in deeper.model.layers if not layer.self_attn.o_proj.weight.any()]
    assert len(added) == 3 and all(layer.self_attn.q_proj.weight.any() for layer in added)
    with pytest.raises(DataError, match="start="):
        run(
            "mini_answers",
            [
                f"data={DATA}",
                f"image_tokenizer={runs / 'vq'}",
                "resolution=16",
                "dialogues=10",
                f"start={tmp_path}",
                f"out={tmp_path / 'x'}",
            ],
        )


@pytest.fixture
def own_modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a recipe file adds to the modules and their path is gone after the test."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    for name in [name for name in sys.modules if name.startswith(("recipe_", "beside_mine"))]:
        del sys.modules[name]


@pytest.mark.usefixtures("own_modules")
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_copied_is_the_recipe(name: str, tmp_path: Path) -> None:
    shipped = import_module(RECIPES[name])
    assert shipped.__file__ is not None
    copy = Path(shutil.copy(shipped.__file__, tmp_path / "mine.py"))
    module = load(str(copy))
    assert asdict(module.config) == asdict(shipped.config)
    changed = override(module.config, ["device=cpu"])
    assert isinstance(changed, type(module.config)) and changed != module.config
    assert module.main.__name__ == "main"


@pytest.mark.usefixtures("own_modules")
def test_a_recipe_file_may_import_what_lies_beside_it_and_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = """
from __future__ import annotations
from dataclasses import dataclass
from beside_mine import WORD

@dataclass
class Config:
    steps: int = 1
    word: str | None = None

def main(config: Config) -> None:
    print(WORD, config.steps, config.word)

config = Config()
"""
    for folder, word in (("one", "first"), ("two", "second")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.py").write_text(source.replace("int = 1", f"int = {len(word)}"))
    (tmp_path / "one" / "beside_mine.py").write_text("WORD = 'beside'\n")
    monkeypatch.chdir(tmp_path / "one")
    run("mine.py", ["word=here"])
    run(str(tmp_path / "two" / "mine.py"), [])
    assert capsys.readouterr().out.split() == ["beside", "5", "here", "beside", "6", "None"]


@pytest.mark.usefixtures("own_modules")
def test_a_recipe_file_that_fails_leaves_no_module(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("config = 1 / 0\n")
    before = set(sys.modules)
    with pytest.raises(ZeroDivisionError):
        load(str(tmp_path / "mine.py"))
    assert set(sys.modules) == before


def test_an_unknown_recipe_and_a_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="mini_transformer"):
        run("nothing", [])
    (tmp_path / "empty.py").write_text("x = 1\n")
    with pytest.raises(SettingError, match="not a recipe"):
        run(str(tmp_path / "empty.py"), [])


@pytest.mark.parametrize(
    ("recipe", "field", "words"),
    [
        ("mini_transformer", "rows=0", "rows=0 must be 1 or more"),
        ("mini_packed_transformer", "length=0", "length=0 must be 1 or more"),
        ("mini_answers", "dropout=1", "dropout=1.0 must be at least 0 and below 1"),
        ("mini_answers", "z_weight=-1", "z_weight=-1.0 must be 0 or more"),
        ("mini_answers", "dialogues=0", "dialogues=0 must be 1 or more"),
        ("mini_styles", "variants=0", "variants=0 must be 1 or more"),
        ("mini_styles", "noise=2", "noise=2.0 must be a share from 0 to 1"),
        ("mini_drawings", "pairs=0.9", r"pairs=0.9, usual=0.36 and studies=0.34 .* at most 1"),
        ("ablations", "rates=", "rates= must be"),
        ("ablations", "rates=0.1,-1", "rates=0.1,-1.0 must be"),
        ("ablations", "rates=0.1,nan", "rates='0.1,nan' cannot be read"),
        ("ablations", "rows=0", "rows=0 must be 1 or more"),
    ],
)
def test_fields_that_no_training_of_mini_can_have_are_refused(
    recipe: str, field: str, words: str
) -> None:
    with pytest.raises(SettingError, match=words):
        override(load(recipe).config, [field])
