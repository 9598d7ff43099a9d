from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import NamedTuple

import PIL.Image
import pytest
import torch

from earlyfusion.checkpoints.codes import load_codes, save_codes
from earlyfusion.checkpoints.hf import save_hf
from earlyfusion.cli import app, main
from earlyfusion.config import PRESETS
from earlyfusion.model.transformer import Transformer
from earlyfusion.model.vqgan import VQGAN
from earlyfusion.processor import train_tokenizer
from earlyfusion.terminal import Screen, half_blocks

COMMANDS = [command.callback.__name__ for command in app.registered_commands if command.callback]


class Ran(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict:
        return json.loads(self.out)


Run = Callable[..., Ran]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model folder: its replies are nonsense of the right form."""
    folder = tmp_path_factory.mktemp("models") / "random"
    config = replace(PRESETS["tiny"], max_position_embeddings=512)
    tokenizer = train_tokenizer(["a picture of a red apple"], 64, config.vocab_size)
    torch.manual_seed(0)
    vqgan, transformer = VQGAN(config.vq_config), Transformer(config)
    save_hf(folder, transformer, vqgan, tokenizer, {"chameleon": {"max_tokens": 24}})
    return folder


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: object) -> Ran:
        code = main([str(argument) for argument in arguments])
        return Ran(code, *capsys.readouterr())

    return call


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "red.png"
    PIL.Image.new("RGB", (20, 30), "red").save(path)
    return path


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    yield


def assert_refused(ran: Ran, *words: str) -> None:
    """Exit code 2 and one sentence on stderr that has these words; nothing on stdout."""
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("Error: ") and ran.err.count("\n") == 1
    assert "Traceback" not in ran.err and ". " not in ran.err.removesuffix(".\n")
    for word in words:
        assert word in ran.err


def size(path: str | Path) -> tuple[int, int]:
    with PIL.Image.open(path) as image:
        return image.size


def bomb(path: Path) -> Path:
    """A PNG whose header says 20,000 x 20,000."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    body = b"IDAT" + zlib.compress(bytes(60_001))
    chunks = [
        struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (header, body)
    ]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    return path


def test_text_reply(run: Run, model: Path, picture: Path) -> None:
    ran = run("generate", "What?", "--image", picture, "--output", "text", "--model", model)
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.endswith("\n")
    assert not Path("out").exists()


def test_json_is_one_object(run: Run, model: Path, picture: Path) -> None:
    ran = run("generate", "What?", "--image", picture, "--model", model, "--seed", 5, "--json")
    assert (ran.code, ran.err) == (0, "")
    reply = ran.json
    assert set(reply) == {
        "text",
        "images",
        "segments",
        "finish_reason",
        "usage",
        "seed",
        "model",
    }
    assert (reply["seed"], reply["model"]) == (5, str(model))
    assert reply["usage"]["completion_tokens"] <= 24
    assert reply["text"] == "\n".join(s["text"] for s in reply["segments"] if s["type"] == "text")


def test_drawing_twice_gives_the_same_bytes(run: Run, model: Path) -> None:
    common = ("generate", "Draw.", "--output", "image", "--seed", 0, "--model", model, "--out")
    first, second = run(*common, "a"), run(*common, "b")
    assert (first.code, second.code) == (0, 0)
    assert first.out.splitlines() == [str(Path("a/image-1.png"))]
    drawn = Path("a/image-1.png").read_bytes()
    assert drawn == Path("b/image-1.png").read_bytes()
    other = run(*common[:5], 1, *common[6:], "c")
    assert other.code == 0 and Path("c/image-1.png").read_bytes() != drawn


def test_codes_read_several_at_once_are_the_same_at_temperature_0(run: Run, model: Path) -> None:
    drawing = ("generate", "Draw.", "--output", "image", "--image-temperature", 0, "--model", model)
    for name, more in (("one", ()), ("many", ("--jacobi", 8))):
        assert run(*drawing, "--out", name, *more).code == 0
    assert Path("one/image-1.png").read_bytes() == Path("many/image-1.png").read_bytes()


def test_interleaved_json_files_are_in_order(run: Run, model: Path) -> None:
    asked = ("--output", "image", "--max-images", 2, "--json", "--model", model)
    reply = run("generate", "Draw two.", *asked).json
    assert [s["path"] for s in reply["segments"]] == reply["images"]
    assert len(reply["images"]) == 2
    assert {size(path) for path in reply["images"]} == {(16, 16)}


def test_seed_is_told_so_that_a_reply_can_be_had_again(run: Run, model: Path) -> None:
    first = run("generate", "Say.", "--output", "text", "--json", "--model", model).json
    again = run(
        *("generate", "Say.", "--output", "text", "--json", "--model", model),
        *("--seed", first["seed"]),
    ).json
    assert first == again


def test_encode_then_decode(run: Run, model: Path, picture: Path) -> None:
    encoded = run("encode", picture, picture, "-o", "c.safetensors", "--model", model, "--json")
    assert encoded.json["shape"] == [2, 8, 8]
    assert load_codes(Path("c.safetensors")).shape == (2, 8, 8)
    decoded = run("decode", "c.safetensors", "-o", "drawn", "--model", model)
    assert decoded.out.split() == [str(Path("drawn/image-1.png")), str(Path("drawn/image-2.png"))]
    assert size("drawn/image-2.png") == (16, 16)


def test_info(run: Run, model: Path) -> None:
    ran = run("info", model, "--json")
    told = ran.json
    config = PRESETS["tiny"]
    assert told["tokens_per_image"] == 66 and told["image_side"] == 16
    assert told["kv_bytes_per_token"]["float32"] == 2 * 4 * 2 * config.kv_heads * config.head_dim
    assert told["vocabulary"]["image"] == 64
    saved = load_parameters(model)
    assert sum(told["parameters"].values()) == saved
    assert told["file_bytes"]["model.safetensors"] > 4 * saved
    assert "tokens per image" in run("info", model).out


def load_parameters(folder: Path) -> int:
    with (folder / "model.safetensors").open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    return sum(
        torch.Size(entry["shape"]).numel() for k, entry in header.items() if k != "__metadata__"
    )


def test_chat_in_a_pipe(
    run: Run, model: Path, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [
        "Hello.",
        f"/image {picture}",
        "What is <image> this?",
        "/save kept",
        "/reset",
        "/quit",
    ]
    monkeypatch.setattr(sys, "stdin", StringIO("\n".join([*lines, "never read"])))
    ran = run("chat", "--output", "text", "--model", model, "--max-tokens", 4)
    assert (ran.code, ran.err) == (0, "")
    saved = json.loads(Path("kept/conversation.json").read_text(encoding="utf-8"))["messages"]
    assert [turn["role"] for turn in saved] == ["user", "assistant", "user", "assistant"]
    assert [part["type"] for part in saved[2]["content"]] == ["text", "image", "text"]
    assert size(Path("kept") / saved[2]["content"][1]["image"]) == (20, 30)


def test_chat_mistake_in_a_pipe(run: Run, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", StringIO("/draw\n"))
    assert_refused(run("chat", "--model", model), "/draw", "/image")


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda path: path, "no file"),
        (lambda path: path.write_text("not a picture"), "PNG"),
        (lambda path: path.write_bytes(b"\x89"), "PNG"),
        (bomb, "20000x20000"),
        (lambda path: path.mkdir(), "folder"),
    ],
    ids=["missing", "text", "one byte", "bomb", "folder"],
)
def test_bad_picture(run: Run, tmp_path: Path, make: Callable[[Path], object], word: str) -> None:
    path = tmp_path / "bad.png"
    make(path)
    assert_refused(run("generate", "What is this?", "--image", path), "bad.png", word)
    assert_refused(run("encode", path, "-o", "c.safetensors"), "bad.png", word)


@pytest.mark.parametrize("prompt", ["", "  \n"])
def test_empty_prompt(run: Run, prompt: str) -> None:
    assert_refused(run("generate", prompt), "empty")


def test_prompt_longer_than_the_context(run: Run, model: Path) -> None:
    assert_refused(run("generate", "word " * 5000, "--model", model), "limit 512")


def test_placeholders_do_not_match(run: Run, picture: Path) -> None:
    ran = run("generate", "<image> and <image>?", "--image", picture)
    assert_refused(ran, "2 places", "1 images")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--output", "video"], ["--output", "video", "interleaved"]),
        (["--top-p", "3"], ["3", "above 0 and at most 1"]),
        (["--temperature", "hot"], ["--temperature", "hot"]),
        (["--jacobi", "1"], ["jacobi=1", "2 to 1,024"]),
        (["--seed", "-1"], ["-1"]),
        (["--device", "tpu"], ["tpu"]),
        (["--colour", "red"], ["--colour", "generate --help"]),
        (["--model", "nowhere"], ["nowhere", "mini"]),
        (["and", "more"], ["more"]),
    ],
    ids=lambda value: " ".join(value[:2]) if value[0].startswith("--") else None,
)
def test_unknown_option_value(run: Run, options: list[str], words: list[str]) -> None:
    assert_refused(run("generate", "Draw a cat.", *options), *words)


def test_out_folder_that_cannot_be(run: Run, tmp_path: Path) -> None:
    """Found before the model is loaded: this model does not exist, and goes unnoticed."""
    (tmp_path / "file").write_text("in the way")
    out = tmp_path / "file" / "out"
    for name in (out, tmp_path / "file", tmp_path / ("x" * 300)):
        ran = run("generate", "Draw a cat.", "--out", name, "--model", "nowhere")
        assert_refused(ran, str(name), "--out")
    assert_refused(run("demo", "--out", out), "--out")
    assert_refused(run("chat", "--out", out, "--model", "nowhere"), "--out")


def test_no_such_command_or_argument(run: Run) -> None:
    assert_refused(run("paint"), "paint", "earlyfusion --help")
    assert_refused(run("generate"), "prompt", "generate --help")
    assert_refused(run("train", "no_such_recipe"), "no_such_recipe", "mini_transformer")
    assert_refused(run("train", "mini_image_tokenizer", "no_such_field=1"), "no_such_field")


def test_codes_that_are_none(run: Run, model: Path, picture: Path) -> None:
    assert_refused(run("decode", "nothing.safetensors"), "nothing.safetensors")
    assert_refused(run("decode", picture), "red.png", "encode")
    save_codes(Path("far.safetensors"), torch.full((1, 8, 8), 64).numpy())
    assert_refused(run("decode", "far.safetensors", "--model", model), "63")


def test_codes_are_written_whole(tmp_path: Path) -> None:
    target = tmp_path / "c.safetensors"
    save_codes(target, torch.arange(8).view(2, 2, 2).numpy())
    assert load_codes(target).tolist() == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]
    assert [path.name for path in tmp_path.iterdir()] == [target.name]


def test_interrupt_is_130(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("earlyfusion.recipes.run", interrupted)
    ran = run("train", "mini_transformer")
    assert (ran.code, ran.out, ran.err) == (130, "", "")


def in_shell(command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", command.replace("earlyfusion", f'"{sys.executable}" -m earlyfusion', 1)],
        cwd=Path(__file__).parent.parent,
        env=os.environ | environment,
        capture_output=True,
        encoding="utf-8",
    )


def test_reader_that_goes_away() -> None:
    done = in_shell("earlyfusion --help | true; exit ${PIPESTATUS[0]}")
    assert (done.returncode, done.stderr) == (1, "")


def test_terminal_without_utf8(model: Path) -> None:
    asked = f'earlyfusion generate Say. --output text --seed 3 --model "{model}"'
    plain = in_shell(asked, PYTHONIOENCODING="ascii")
    assert (plain.returncode, plain.stderr) == (0, "")
    told = [in_shell(f"{asked} --json", PYTHONIOENCODING=name) for name in ("ascii", "utf-8")]
    assert told[0].stdout.isascii()
    assert json.loads(told[0].stdout) == json.loads(told[1].stdout)


def test_no_command_shows_the_help(run: Run) -> None:
    ran = run()
    assert (ran.code, ran.err) == (2, "") and "generate" in ran.out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples(run: Run, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    ran = run(command, "--help")
    assert ran.code == 0
    assert f" earlyfusion {command}" in ran.out.partition("Examples:")[2]


def test_version_and_completion(run: Run) -> None:
    assert run("--version").out.strip() == "0.1.0"
    words = {"COMP_WORDS": "earlyfusion gen", "COMP_CWORD": "1"}
    done = in_shell("earlyfusion", _EARLYFUSION_COMPLETE="complete_bash", **words)
    assert done.stdout.split() == ["generate"]


def test_half_blocks_show_two_pixels_each() -> None:
    image = PIL.Image.new("RGB", (4, 4), (255, 0, 0))
    image.paste((0, 0, 255), (0, 2, 4, 4))
    blocks = half_blocks(image, 2)
    assert blocks.plain == "▀▀"
    style = blocks.spans[0].style
    assert not isinstance(style, str) and style.color and style.bgcolor
    assert style.color.triplet and style.color.triplet.red > 200
    assert style.bgcolor.triplet and style.bgcolor.triplet.blue > 200


def test_text_of_the_model_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    screen = Screen()
    screen.text(" \x1b[2Jred\x07")
    screen.text("\u009b apple")
    screen.end()
    assert capsys.readouterr().out == "[2Jred apple\n"
