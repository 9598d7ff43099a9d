"""The embedded model: README's programs, the commands and the examples, run for real."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from test_readme import PACKAGE, READMES, ROOT, blocks

from earlyfusion import Chameleon, Image, SamplingParams, Text
from earlyfusion.checkpoints.hf import CHAT_TEMPLATE
from earlyfusion.cli import main

MINI = PACKAGE / "pretrained" / "mini"
LIST = "Show me three different fruits. Write each name before its picture."
PROGRAMS = [(name, program) for name in READMES for program in blocks(name, "python")]

Run = Callable[..., str]


@pytest.fixture(scope="module")
def model() -> Chameleon:
    return Chameleon.load("mini", device="cpu")


@pytest.fixture
def image_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The bundled image, in a folder that is empty but for it."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copy(MINI / "examples" / "strawberry.png", tmp_path / "strawberry.png"))


@pytest.fixture
def run(image_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: object) -> str:
        code = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert (code, err) == (0, "")
        return out

    return call


def test_files_of_the_model() -> None:
    names = {path.name for path in MINI.iterdir()}
    assert names >= {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "examples",
    }
    assert (MINI / "chat_template.jinja").read_text() == CHAT_TEMPLATE
    assert sum(path.stat().st_size for path in MINI.rglob("*")) <= 40_000_000


@pytest.mark.parametrize(("name", "program"), PROGRAMS, ids=[name for name, _ in PROGRAMS])
def test_readme_programs_run(image_path: Path, name: str, program: str) -> None:
    exec(compile(program, name, "exec"), {"__name__": "readme"})


def test_names_the_bundled_image_in_both_languages(run: Run) -> None:
    common = (
        "--image",
        "strawberry.png",
        "--output",
        "text",
        "--temperature",
        0,
        "--device",
        "cpu",
    )
    assert "strawberry" in run("generate", "What is this?", *common)
    assert "딸기" in run("generate", "이게 뭐야?", *common)


def test_generating_twice_gives_the_same_bytes(run: Run) -> None:
    for folder in ("a", "b"):
        run("generate", "Draw a red apple.", "--output", "image", "--out", folder, "--seed", 0)
    generated = Path("a/image-1.png").read_bytes()
    assert generated == Path("b/image-1.png").read_bytes()
    with PIL.Image.open("a/image-1.png") as image_path:
        assert min(image_path.size) >= 64
        assert len(image_path.getcolors(maxcolors=1 << 20)) > 50


def test_json_is_one_object(run: Run) -> None:
    reply = json.loads(run("generate", "What is this?", "--image", "strawberry.png", "--json"))
    assert reply["text"] and reply["finish_reason"] == "stop"


def test_demo(run: Run) -> None:
    """Naming in both languages, generation, and a mixed list."""
    told = json.loads(run("demo", "--json", "--seed", 5))
    english, korean, generation, mixed = told["steps"]
    assert ("strawberry" in english["text"], "딸기" in korean["text"]) == (True, True)
    assert english["images"] == korean["images"] == [] and generation["text"] == ""
    assert len(generation["images"]) == 1 and len(mixed["images"]) >= 2
    kinds = [segment["type"] for segment in mixed["segments"]]
    assert kinds == ["text", "image"] * len(mixed["images"]), "each name before its picture"
    generated = [*generation["images"], *mixed["images"]]
    assert sorted(generated) == sorted(str(path) for path in Path("earlyfusion-demo").iterdir())
    images = [Path(path).read_bytes() for path in generated]
    assert len({*images}) == len(images)
    assert (told["seed"], told["out"]) == (5, "earlyfusion-demo")


def test_gallery_is_a_sheet_of_the_first_seeds(run: Run, model: Chameleon) -> None:
    told = json.loads(run("gallery", "Draw a cat.", "Draw a tent.", "--count", 3, "--json"))
    assert told["seeds"] == [0, 1, 2] and told["prompts"] == ["Draw a cat.", "Draw a tent."]
    side, gap = 64, 4
    with PIL.Image.open(told["path"]) as made:
        assert made.size == (gap + 3 * (side + gap), gap + 2 * (side + gap))
        x, y = gap + 2 * (side + gap), gap + side + gap
        cell = made.crop((x, y, x + side, y + side))
    alone = model.generate("Draw a tent.", output="image", seed=2).images[0]
    assert np.array_equal(np.asarray(cell), np.asarray(alone))
    assert "seeds 7 to 7" in run(
        "gallery", "Draw a cat.", "--count", 1, "--seed", 7, "-o", "a.webp"
    )
    assert main(["gallery", "--count", "1"]) == 2  # gallery.png is there
    assert main(["gallery", "--count", "0", "-o", "x.png"]) == 2
    assert main(["gallery", "-o", "x.gif"]) == 2
    assert not list(Path().glob("x.*"))


def test_encode_then_decode_comes_near(run: Run, model: Chameleon) -> None:
    run("encode", "strawberry.png", "-o", "c.safetensors", "--device", "cpu")
    run("decode", "c.safetensors", "-o", "decoded", "--device", "cpu")
    before = np.asarray(model.image_tokenizer.square(Image.open("strawberry.png")), np.float64)
    with PIL.Image.open("decoded/image-1.png") as image_path:
        after = np.asarray(image_path, np.float64)
    plain = before.mean((0, 1), keepdims=True)
    assert ((before - after) ** 2).mean() < ((before - plain) ** 2).mean() / 4


def whole(model: Chameleon, seed: int) -> bool:
    """Text and at least one image in order, and every image has all of its codes."""
    sampling = SamplingParams(max_images=3)
    reply = model.generate(LIST, output="interleaved", sampling=sampling, seed=seed)
    codes = [s.codes for s in reply.segments if isinstance(s, Image) and s.codes is not None]
    layout = model.processor.layout
    return (
        isinstance(reply.segments[0], Text)
        and len(codes) == len(reply.images) > 0
        and all(c.shape == (layout.height, layout.width) for c in codes)
    )


def test_interleaved_reply(model: Chameleon) -> None:
    assert whole(model, seed=0)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_interleaved_replies_are_whole_100_times(model: Chameleon) -> None:
    assert [seed for seed in range(100) if not whole(model, seed)] == []


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("ask.py", ["What is this?", "strawberry.png"]),
        ("variations.py", ["Draw a cat.", "cats.png", "2"]),
        ("codes_of_an_image.py", ["strawberry.png", "seen.png"]),
    ],
)
def test_examples_run(
    image_path: Path, script: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    runpy.run_path(str(ROOT / "examples" / script), run_name="__main__")
    for name in arguments:
        assert not name.endswith(".png") or Path(name).is_file()
