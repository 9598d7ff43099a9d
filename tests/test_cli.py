from __future__ import annotations

import fcntl
import inspect
import json
import os
import pty
import re
import resource
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import fields as dataclass_fields
from dataclasses import replace
from io import BytesIO, StringIO, TextIOWrapper
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL.Image
import pytest
import torch
import typer

from earlyfusion.api import Chameleon, Reply
from earlyfusion.batch import read_jobs
from earlyfusion.checkpoints.codes import load_codes, save_codes
from earlyfusion.checkpoints.hf import save_hf
from earlyfusion.cli import app, main
from earlyfusion.config import PRESETS
from earlyfusion.errors import SettingError, shortened
from earlyfusion.generation.settings import SamplingParams
from earlyfusion.model.transformer import Transformer
from earlyfusion.model.vqgan import VQGAN
from earlyfusion.options import parse_bytes
from earlyfusion.processor import train_tokenizer
from earlyfusion.recipes.run import RECIPES
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
def image_path(tmp_path: Path) -> Path:
    path = tmp_path / "red.png"
    PIL.Image.new("RGB", (20, 30), "red").save(path)
    return path


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    yield


def assert_refused(result: Ran, *words: str) -> None:
    """Exit code 2 and one sentence on stderr that has these words; nothing on stdout."""
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("Error: ") and result.err.count("\n") == 1
    assert "Traceback" not in result.err and ". " not in result.err.removesuffix(".\n")
    for word in words:
        assert word in result.err


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


def test_text_reply(run: Run, model: Path, image_path: Path) -> None:
    args = ("generate", "What?", "--image", image_path, "--output", "text", "--model", model)
    result = run(*args, "--seed", 5)  # some seeds give an empty text
    assert (result.code, result.err) == (0, "")
    assert result.out.endswith("\n")
    assert not Path("out").exists()


def test_json_is_one_object(run: Run, model: Path, image_path: Path) -> None:
    result = run(
        "generate", "What?", "--image", image_path, "--model", model, "--seed", 5, "--json"
    )
    assert (result.code, result.err) == (0, "")
    reply = result.json
    assert set(reply) == {
        "text",
        "images",
        "segments",
        "finish_reason",
        "usage",
        "seed",
        "model",
        "output",
        "settings",
    }
    assert (reply["seed"], reply["model"], reply["output"]) == (5, str(model), "auto")
    assert reply["settings"]["max_tokens"] == 24 and reply["settings"]["image_top_k"] == 0
    assert reply["usage"]["completion_tokens"] <= 24
    assert reply["text"] == "\n".join(s["text"] for s in reply["segments"] if s["type"] == "text")


def test_generating_twice_gives_the_same_bytes(run: Run, model: Path) -> None:
    common = ("generate", "Draw.", "--output", "image", "--seed", 0, "--model", model, "--out")
    first, second = run(*common, "a"), run(*common, "b")
    assert (first.code, second.code) == (0, 0)
    assert first.out.splitlines() == [str(Path("a/image-1.png"))]
    generated = Path("a/image-1.png").read_bytes()
    assert generated == Path("b/image-1.png").read_bytes()
    other = run(*common[:5], 1, *common[6:], "c")
    assert other.code == 0 and Path("c/image-1.png").read_bytes() != generated


def test_codes_read_several_at_once_are_the_same_at_temperature_0(run: Run, model: Path) -> None:
    command = ("generate", "Draw.", "--output", "image", "--image-temperature", 0, "--model", model)
    for name, more in (("one", ()), ("many", ("--jacobi", 8))):
        assert run(*command, "--out", name, *more).code == 0
    assert Path("one/image-1.png").read_bytes() == Path("many/image-1.png").read_bytes()


def test_interleaved_json_files_are_in_order(run: Run, model: Path) -> None:
    options = ("--output", "image", "--max-images", 2, "--json", "--model", model)
    reply = run("generate", "Draw two.", *options).json
    assert [s["path"] for s in reply["segments"]] == reply["images"]
    assert len(reply["images"]) == 2
    assert {size(path) for path in reply["images"]} == {(16, 16)}


def test_the_seed_is_printed_so_that_a_reply_can_be_repeated(run: Run, model: Path) -> None:
    first = run("generate", "Say.", "--output", "text", "--json", "--model", model).json
    second = run(
        *("generate", "Say.", "--output", "text", "--json", "--model", model),
        *("--seed", first["seed"]),
    ).json
    assert first == second


def test_encode_then_decode(run: Run, model: Path, image_path: Path) -> None:
    encoded = run(
        "encode", image_path, image_path, "-o", "c.safetensors", "--model", model, "--json"
    )
    assert encoded.json["shape"] == [2, 8, 8]
    assert load_codes(Path("c.safetensors")).shape == (2, 8, 8)
    decoded = run("decode", "c.safetensors", "-o", "decoded", "--model", model)
    assert decoded.out.split() == [
        str(Path("decoded/image-1.png")),
        str(Path("decoded/image-2.png")),
    ]
    assert size("decoded/image-2.png") == (16, 16)


def test_info(run: Run, model: Path) -> None:
    result = run("info", model, "--json")
    summary = result.json
    config = PRESETS["tiny"]
    assert summary["tokens_per_image"] == 66 and summary["image_side"] == 16
    assert summary["kv_bytes_per_token"]["float32"] == 2 * 4 * 2 * config.kv_heads * config.head_dim
    assert summary["vocabulary"]["image"] == 64
    saved = load_parameters(model)
    assert sum(summary["parameters"].values()) == saved
    assert summary["file_bytes"]["model.safetensors"] > 4 * saved
    cache, context = summary["default_cache"], summary["context"]
    assert cache["tokens float32"] >= 3 * context
    assert (
        cache["bytes float32"] == cache["tokens float32"] * summary["kv_bytes_per_token"]["float32"]
    )
    assert cache["requests of 300 tokens float32"] == cache["tokens float32"] // 32 // 10
    shown = run("info", model).out
    assert "tokens per image" in shown and "default cache requests of 300 tokens" in shown


@pytest.mark.parametrize(
    ("given", "size"), [("1000000", 10**6), ("1.5MB", 1_500_000), ("2GiB", 2**31), ("3 k", 3000)]
)
def test_the_cache_takes_as_many_bytes_as_asked_for(given: str, size: int) -> None:
    assert parse_bytes(given) == size


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("1000", "holds no block of 32 tokens"),
        ("2 apples", "'2 apples' is not a number of bytes such as"),
        ("10kB", "the cache has"),
    ],
)
def test_a_cache_that_is_too_small_is_refused(
    run: Run, model: Path, given: str, words: str
) -> None:
    command = ("generate", "a", "--model", model, "--output", "text", "--max-tokens", "100")
    result = run(*command, "--cache-bytes", given)
    assert result.code == 2 and words in result.err and "Traceback" not in result.err


def load_parameters(folder: Path) -> int:
    with (folder / "model.safetensors").open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    return sum(
        torch.Size(entry["shape"]).numel() for k, entry in header.items() if k != "__metadata__"
    )


def test_chat_in_a_pipe(
    run: Run, model: Path, image_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [
        "Hello.",
        f"/image {image_path}",
        "What is <image> this?",
        "/save kept",
        "/reset",
        "/quit",
    ]
    monkeypatch.setattr(sys, "stdin", StringIO("\n".join([*lines, "never read"])))
    result = run("chat", "--output", "text", "--model", model, "--max-tokens", 4)
    assert (result.code, result.err) == (0, "")
    saved = json.loads(Path("kept/conversation.json").read_text(encoding="utf-8"))["messages"]
    assert [turn["role"] for turn in saved] == ["user", "assistant", "user", "assistant"]
    assert [part["type"] for part in saved[2]["content"]] == ["text", "image", "text"]
    assert size(Path("kept") / saved[2]["content"][1]["image"]) == (20, 30)


Chat = Callable[..., Ran]


@pytest.fixture
def chat(run: Run, model: Path, monkeypatch: pytest.MonkeyPatch) -> Chat:
    """`chat(line, ..., options=[...])`: a chat in a pipe."""

    def call(*lines: str, options: tuple[object, ...] = ()) -> Ran:
        monkeypatch.setattr(sys, "stdin", StringIO("\n".join(lines)))
        common = ("--model", model, "--output", "text", "--max-tokens", 4, "--seed", 0)
        return run("chat", *common, *options)

    return call


def saved_turns(folder: str) -> list[dict]:
    """The turns of a saved conversation."""
    return json.loads((Path(folder) / "conversation.json").read_text(encoding="utf-8"))["messages"]


def user_texts(folder: str) -> list[str]:
    return [turn["content"][-1]["text"] for turn in saved_turns(folder) if turn["role"] == "user"]


def test_a_line_that_is_not_utf_8_costs_itself(
    run: Run, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = TextIOWrapper(BytesIO(b"Hell\xf6.\nHello.\n/save kept\n"), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", lines)
    result = run("chat", "--model", model, "--output", "text", "--max-tokens", 4)
    assert result.code == 2 and "half a character" in result.err
    assert result.err.count("\n") == 1 and user_texts("kept") == ["Hello."]


def test_chat_mistake_in_a_pipe(chat: Chat) -> None:
    assert_refused(chat("/draw"), "/draw", "/image")


def test_chat_in_a_pipe_continues_after_a_mistake(chat: Chat) -> None:
    result = chat("One.", "/draw", "/image nowhere.png", "Two.", "/save conv")
    assert result.code == 2 and result.err.count("Error: ") == result.err.count("\n") == 2
    assert user_texts("conv") == ["One.", "Two."]


def test_chat_warns_about_unsaved_turns(chat: Chat) -> None:
    result = chat("One.", "/save conv", "Two.", "Three.")
    assert result.code == 0 and result.err.startswith("2 turns not saved: /save FOLDER")
    assert result.err.count("\n") == 1
    assert "1 turn not saved" in chat("One.", "/quit").err
    assert "1 turn not saved, /undo brings" in chat("One.", "/reset", "/undo", "/save b").out
    assert user_texts("b") == ["One."]


def test_chat_save_overwrites_nothing(chat: Chat, image_path: Path) -> None:
    chat("A.", "/save conv", "/reset", "B.", "/save conv")
    assert user_texts("conv") == ["A."]
    Path("own").mkdir()
    for name in ("conversation.json", "image-1.png"):
        (Path("own") / name).write_text("mine")
    result = chat(f"/image {image_path}", "B.", "/save own", "/save new")
    assert result.code == 2 and "own exists and holds other things" in result.err
    assert {path.read_text() for path in Path("own").iterdir()} == {"mine"}
    assert user_texts("new") == ["B."]
    # Without a name, each conversation gets a folder of its own.
    for words in ("C.", "D.", "E."):
        assert chat(words, "/save", f"{words}{words}", "/save").code == 0
    saved = [user_texts(name) for name in ("conversation", "conversation-2", "conversation-3")]
    assert saved == [["C.", "C.C."], ["D.", "D.D."], ["E.", "E.E."]]
    (Path("new") / "conversation.json").write_text("{}")
    assert not chat("F.", "/save F", "/save f").code


def test_chat_save_again_keeps_images_once(chat: Chat, image_path: Path) -> None:
    lines = [
        f"/image {image_path}",
        "One.",
        "/save conv",
        f"/image {image_path}",
        "Two.",
        "/save conv",
    ]
    assert chat(*lines).code == 0
    assert sorted(path.name for path in Path("conv").iterdir()) == [
        "conversation.json",
        "image-1.png",
        "image-2.png",
    ]
    second = chat("/load conv", "Three.", "/save")
    assert second.code == 0 and user_texts("conv") == ["One.", "Two.", "Three."]
    assert len(list(Path("conv").iterdir())) == 3


def test_chat_save_on_a_full_disk_leaves_nothing(chat: Chat, image_path: Path) -> None:
    PIL.Image.effect_noise((64, 64), 90).save(image_path)
    with files_of_at_most(2000):
        result = chat(f"/image {image_path}", "One.", f"/image {image_path}", "Two.", "/save conv")
    assert result.code == 2 and "cannot be written" in result.err
    assert not Path("conv").exists()


def test_a_resumed_chat_gives_the_same_answers(chat: Chat, image_path: Path) -> None:
    """A saved chat answers as if it had not been left, with its generated images."""
    image_options = ("--output", "image", "--max-tokens", 80)
    first = [f"/image {image_path}", "Draw one.", "/save conv"]
    full = chat(*first, "And now?", "/save whole", options=image_options)
    assert full.code == 0 and saved_turns("whole")[:2] == saved_turns("conv")
    [reply] = without_paths(saved_turns("whole")[-1])
    assert reply["codes"]
    for name, lines, options in (
        ("a", ["And now?"], (*image_options, "--resume", "conv")),
        ("b", ["Other.", "/load conv", "And now?"], image_options),
    ):
        second = chat(*lines, f"/save {name}", options=options)
        assert second.code == 0, second.err
        assert without_paths(saved_turns(name)[-1]) == [reply]
    # Without its codes the generated image is encoded again, and the answer differs.
    data = json.loads(Path("conv/conversation.json").read_text())
    Path("conv/conversation.json").write_text(json.dumps(data | {"codebook": ""}))
    chat("And now?", "/save c", options=(*image_options, "--resume", "conv"))
    assert without_paths(saved_turns("c")[-1]) != [reply]


def without_paths(turn: dict) -> list[dict]:
    return [{k: v for k, v in part.items() if k != "image"} for part in turn["content"]]


def test_chat_drops_codes_of_another_image_tokenizer(chat: Chat, image_path: Path) -> None:
    chat("Draw.", "/save conv", options=("--output", "image", "--max-tokens", 80))
    path = Path("conv/conversation.json")
    text = path.read_text()
    for change in (lambda data: data | {"codebook": "0"}, lambda data: data):
        data = change(json.loads(text))
        data["messages"][1]["content"][0]["codes"] = [[63] * 8] * 8
        path.write_text(json.dumps(data))
        assert chat("/load conv", "/save copy", "/load copy").code == 0
        codes = saved_turns("copy")[1]["content"][0].get("codes")
        assert (codes is None) == (data["codebook"] == "0")
        shutil.rmtree("copy")


def test_chat_undo(chat: Chat, image_path: Path) -> None:
    result = chat("One.", f"/image {image_path}", "Two.", "/undo", "/save a", "Three.", "/save b")
    assert result.code == 0
    assert user_texts("a") == ["One."]
    assert [part["type"] for part in saved_turns("b")[2]["content"]] == ["image", "text"]
    assert_refused(chat("/undo"), "nothing to undo")


@pytest.mark.parametrize(
    "data",
    [
        "",
        "[]",
        "[" * 50_000,
        '{"messages": 5}',
        '{"messages": [{"role": "user", "content": "a"}]}',
        '{"messages": [{"role": "user", "content": [{"type": "image", "image": "no.png"}]}]}',
        '{"messages": [{"role": "robot", "content": "a"}]}',
        '{"messages": [{"role": "user", "content": 7}, {"role": "assistant", "content": "b"}]}',
        None,
    ],
)
def test_chat_refuses_to_resume_other_folders(chat: Chat, data: str | None) -> None:
    Path("conv").mkdir()
    if data is not None:
        Path("conv/conversation.json").write_text(data)
    assert_refused(chat(options=("--resume", "conv")))
    assert_refused(chat("/load conv"))


@pytest.mark.parametrize("name", ["my berry.png", "it's.png", 'a "b".png', "back\\slash.png"])
def test_chat_takes_paths_as_terminals_paste_them(
    chat: Chat, image_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = image_path.parent / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    image_path.rename(home / name)
    escaped = "".join(c if c.isalnum() or c in "/.-_~" else f"\\{c}" for c in f"~/{name}")
    for typed in (shlex.quote(str(home / name)), f"{home}/{name}", f"~/{name}", escaped):
        result = chat(f"/image {typed}", "What?", "/save ~/kept")
        assert (result.code, result.err) == (0, ""), typed
        assert user_texts(str(home / "kept")) == ["What?"]
        shutil.rmtree(home / "kept")
    assert not Path("~").exists()


def test_chat_has_the_sampling_options_of_generate(run: Run) -> None:
    names = {c.callback.__name__: c.callback for c in app.registered_commands if c.callback}
    fields = {field.name for field in dataclass_fields(SamplingParams)}
    had = [set(inspect.signature(names[name]).parameters) & fields for name in SAMPLERS]
    assert all(options == had[0] and len(options) >= 15 for options in had)
    for name, value in (("--top-p", 3), ("--image-top-k", -1), ("--jacobi", 1)):
        assert_refused(run("chat", name, value), "is not possible")


SAMPLERS = ("generate", "chat", "batch")


class Terminal(NamedTuple):
    code: int
    out: str


def at_a_terminal(command: list[object], *keys: str, **environment: str) -> Terminal:
    """Run a command at a terminal of its own; each of `keys` is typed at a prompt of the chat."""
    main_end, other_end = pty.openpty()

    def at_the_terminal() -> None:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # shells ignore it for what is in background

    started = subprocess.Popen(
        [sys.executable, "-m", "earlyfusion", *map(str, command)],
        stdin=other_end,
        stdout=other_end,
        stderr=other_end,
        start_new_session=True,
        preexec_fn=at_the_terminal,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), **environment},
    )
    os.close(other_end)
    shown, typed = b"", 0
    while True:
        try:
            shown += os.read(main_end, 65_536)
        except OSError:  # the other end is closed
            break
        if typed < len(keys) and shown.count(b"> ") > typed:
            # An interrupt between the prompt and the reading would be noticed after the next line.
            time.sleep(0.5 if keys[typed] == "\x03" else 0)
            os.write(main_end, keys[typed].encode())
            typed += 1
    os.close(main_end)
    return Terminal(started.wait(), shown.decode().replace("\r\n", "\n"))


def test_ctrl_c_at_the_prompt_asks_once(model: Path) -> None:
    command = ["chat", "--model", model, "--output", "text", "--max-tokens", 2]
    result = at_a_terminal(command, "Hello.\n", "\x03", "\x03", TERM="dumb")
    assert result.code == 130 and result.out.count("1 turn not saved") == 1
    result = at_a_terminal(command, "Hello.\n", "/quit\n", "/save kept\n", "\x04", TERM="dumb")
    assert result.code == 0 and result.out.count("1 turn not saved") == 1
    assert Path("kept/conversation.json").is_file()
    assert at_a_terminal(command, "\x03", TERM="dumb").code == 130


@pytest.mark.parametrize(
    ("environment", "blocks"),
    [
        ({"TERM": "xterm-256color"}, True),
        ({"TERM": "xterm-256color", "NO_COLOR": "1"}, False),
        ({"TERM": "dumb"}, False),
        ({"TERM": "xterm-256color", "PYTHONIOENCODING": "ascii"}, False),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else None,
)
def test_images_at_a_terminal(model: Path, environment: dict[str, str], blocks: bool) -> None:
    command = ["generate", "Draw.", "--output", "image", "--model", model]
    clean = {"NO_COLOR": "", "COLORTERM": "", "PYTHONIOENCODING": "utf-8"}
    result = at_a_terminal(command, **clean | environment)
    assert result.code == 0 and ("▀" in result.out) == blocks and "u2580" not in result.out
    if environment["TERM"] == "dumb":
        assert result.out == f"{Path('out/image-1.png')}\n"


def test_a_pipe_gives_the_prompt_or_the_image(
    run: Run, model: Path, image_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pipe(data: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", TextIOWrapper(BytesIO(data)))

    def ask(*arguments: object) -> str:
        common = ("--model", model, "--output", "text", "--seed", 3, "--temperature", 50)
        result = run("generate", *common, *arguments)
        assert (result.code, result.err) == (0, "")
        return result.out

    answer = ask("What is this, 이게 뭐야?")
    assert ask("What?") != answer
    pipe("What is this, 이게 뭐야?\r\n".encode())
    assert ask("-") == answer
    Path("question.txt").write_bytes("\ufeffWhat is this, 이게 뭐야?\n".encode())
    assert ask("--prompt-file", "question.txt") == answer
    pipe(image_path.read_bytes())
    assert ask("What?", "--image", "-") == ask("What?", "--image", image_path) != ask("What?")
    pipe(b"\xff\xfe")
    assert_refused(run("generate", "-"), "standard input", "UTF-8")
    pipe(b"no image")
    assert_refused(run("generate", "What?", "--image", "-"), "standard input", "PNG")
    assert_refused(run("generate", "-", "--image", "-"), "only one")
    assert_refused(run("generate", "a", "--prompt-file", "question.txt"), "question.txt")
    assert_refused(run("generate", "--prompt-file", "nowhere.txt"), "nowhere.txt")
    assert_refused(run("generate", "--prompt-file", image_path), "red.png", "UTF-8")


def test_an_address_is_quoted_as_typed(run: Run) -> None:
    address = "https://example.org/a.png"
    assert_refused(run("generate", "What?", "--image", address), address, "download")
    assert_refused(run("encode", address, "-o", "c.safetensors"), address, "download")


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Longer files fail as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_images_overwrite_nothing(run: Run, model: Path, image_path: Path) -> None:
    command = ("generate", "Draw.", "--output", "image", "--model", model, "--seed")
    for seed in (0, 1):
        run(*command, seed)
    first, second = (Path(f"out/image-{n}.png").read_bytes() for n in (1, 2))
    assert first != second
    run(*command, 0, "--out", "other")
    assert Path("other/image-1.png").read_bytes() == first
    # The user's own image, in the folder of the generated ones.
    own_image = Path("mine/image-7.png")
    own_image.parent.mkdir()
    image_path.rename(own_image)
    before = own_image.read_bytes()
    reply = run(*command, 0, "--image", own_image, "--out", "mine", "--json").json
    assert reply["images"] == [str(Path("mine/image-8.png"))]
    assert own_image.read_bytes() == before
    run("encode", own_image, "-o", "c.safetensors", "--model", model)
    for number in (9, 10):
        result = run("decode", "c.safetensors", "-o", "mine", "--model", model)
        assert result.out.split() == [str(Path(f"mine/image-{number}.png"))]


def test_codes_are_overwritten_only_on_request(run: Run, model: Path, image_path: Path) -> None:
    target = Path("c.safetensors")
    target.write_text("mine")
    result = run("encode", image_path, "-o", target, "--model", "nowhere")
    assert_refused(result, "c.safetensors is there already", "--overwrite")
    assert target.read_text() == "mine"
    assert run("encode", image_path, "-o", target, "--model", model, "--overwrite").code == 0
    assert load_codes(target).shape == (1, 8, 8)


def test_full_disk_leaves_nothing(run: Run, model: Path, image_path: Path) -> None:
    with files_of_at_most(100):
        result = run("generate", "Draw.", "--output", "image", "--model", model)
        assert_refused(result, "image", "cannot be written", "file too large")
        assert_refused(run("encode", image_path, "-o", "out/c.npy", "--model", model), "c.npy")
    assert not Path("out").exists()


def test_codes_as_npy(run: Run, model: Path, image_path: Path) -> None:
    for name in ("c.npy", "c.safetensors"):
        assert run("encode", image_path, "-o", name, "--model", model).code == 0
    codes = np.load("c.npy")
    assert codes.dtype == np.int64 and (codes == load_codes(Path("c.safetensors"))).all()
    assert run("decode", "c.npy", "-o", "decoded", "--model", model).code == 0
    for name in ("c.npz", "c.pt", "c.json"):
        assert_refused(run("encode", image_path, "-o", name, "--model", "nowhere"), name, ".npy")
        assert not Path(name).exists()
    Path("bad.npy").write_bytes(b"\x93NUMPY")
    assert_refused(run("decode", "bad.npy"), "bad.npy")
    with BytesIO() as file:
        header = {"descr": "<i8", "fortran_order": False, "shape": (10**6, 10**5, 100)}
        np.lib.format.write_array_header_1_0(file, header)
        Path("giant.npy").write_bytes(file.getvalue() + bytes(800))
    assert_refused(run("decode", "giant.npy"), "giant.npy")


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
def test_bad_image(run: Run, tmp_path: Path, make: Callable[[Path], object], word: str) -> None:
    path = tmp_path / "bad.png"
    make(path)
    assert_refused(run("generate", "What is this?", "--image", path), "bad.png", word)
    assert_refused(run("encode", path, "-o", "c.safetensors"), "bad.png", word)


def test_empty_names(run: Run) -> None:
    """As an unset variable of a shell gives them."""
    assert_refused(run("generate", "What is this?", "--image", ""), "--image is empty")
    assert_refused(run("encode", "", "-o", "c.npy"), "name of an image is empty")
    for command in ("info", "bench"):
        assert_refused(run(command, ""), "the name of the model is empty")
    assert_refused(run("tokenize", "", "-o", "shards"), "the name of a source is empty")


def test_home_of_an_unknown_user(run: Run) -> None:
    path = "~no-such-user/x"
    for arguments in (
        ["info", path],
        ["generate", "Hello", "--model", path],
        ["convert", path, "y", "--to", "hf"],
        ["tokenize", path, "-o", "y"],
        ["train", "finetune", f"data={path}"],
        ["train", "finetune", f"model={path}"],
    ):
        assert_refused(run(*arguments), path)


@pytest.mark.parametrize("prompt", ["", "  \n"])
def test_empty_prompt(run: Run, prompt: str) -> None:
    assert_refused(run("generate", prompt), "empty")


def test_prompt_longer_than_the_context(run: Run, model: Path) -> None:
    assert_refused(run("generate", "word " * 5000, "--model", model), "limit 512")


def test_placeholders_do_not_match(run: Run, image_path: Path) -> None:
    result = run("generate", "<image> and <image>?", "--image", image_path)
    assert_refused(result, "2 places", "1 image is")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--output", "video"], ["'--output': 'video' is not", "interleaved"]),
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


def test_impossible_out_folder(run: Run, tmp_path: Path) -> None:
    """Found before the model is loaded: this model does not exist, and goes unnoticed."""
    (tmp_path / "file").write_text("in the way")
    out = tmp_path / "file" / "out"
    for name in (out, tmp_path / "file", tmp_path / ("x" * 300)):
        result = run("generate", "Draw a cat.", "--out", name, "--model", "nowhere")
        assert_refused(result, shortened(str(name)), "--out")
    assert_refused(run("demo", "--out", out), "--out")
    assert_refused(run("chat", "--out", out, "--model", "nowhere"), "--out")


def test_no_such_command_or_argument(run: Run) -> None:
    assert_refused(run("paint"), "paint", "earlyfusion --help")
    assert_refused(run("generate"), "prompt", "generate --help")
    assert_refused(run("train", "no_such_recipe"), "no_such_recipe", "mini_transformer")
    assert_refused(run("train", "mini_image_tokenizer", "no_such_field=1"), "no_such_field")


def test_files_without_codes_are_refused(run: Run, model: Path, image_path: Path) -> None:
    assert_refused(run("decode", "nothing.safetensors"), "nothing.safetensors")
    assert_refused(run("decode", image_path), "red.png", "encode")
    save_codes(Path("far.safetensors"), torch.full((1, 8, 8), 64).numpy())
    assert_refused(run("decode", "far.safetensors", "--model", model), "63")


def test_many_codes_are_decoded_in_batches(
    run: Run, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes = np.random.default_rng(0).integers(0, 64, (5, 8, 8))
    save_codes(Path("five.npy"), codes)
    at_once = run("decode", "five.npy", "-o", "at-once", "--model", model, "--json").json
    monkeypatch.setattr("earlyfusion.terminal._DECODE_BATCH", 2)
    parts = run("decode", "five.npy", "-o", "in-parts", "--model", model, "--json").json
    assert len(at_once["images"]) == 5
    for one, two in zip(at_once["images"], parts["images"], strict=True):
        assert Path(one).read_bytes() == Path(two).read_bytes()


def test_codes_are_written_whole(tmp_path: Path) -> None:
    target = tmp_path / "c.safetensors"
    save_codes(target, torch.arange(8).view(2, 2, 2).numpy())
    assert load_codes(target).tolist() == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]
    assert [path.name for path in tmp_path.iterdir()] == [target.name]


def test_interrupt_is_130(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("earlyfusion.recipes.run.run", interrupted)
    result = run("train", "mini_transformer")
    assert (result.code, result.out, result.err) == (130, "", "")


def in_shell(command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", command.replace("earlyfusion", f'"{sys.executable}" -m earlyfusion', 1)],
        cwd=Path(__file__).parent.parent,
        env=os.environ | environment,
        capture_output=True,
        encoding="utf-8",
    )


def test_output_closed_by_its_reader() -> None:
    done = in_shell("earlyfusion --help | true; exit ${PIPESTATUS[0]}")
    assert (done.returncode, done.stderr) == (141, "")
    done = in_shell("earlyfusion info | head -1; exit ${PIPESTATUS[0]}")
    assert done.returncode in (0, 141) and done.stderr == "" and done.stdout.count("\n") == 1


def test_closed_streams_are_empty(monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    for name in ("stdin", "stdout"):
        monkeypatch.setattr(sys, name, None)
    assert main(["chat", "--model", str(model)]) == 0
    assert main(["generate", "-", "--model", str(model)]) == 2
    sys.stdin.close()
    sys.stdout.close()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a full device")
def test_a_full_disk_under_the_output(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(["info"]) == 2
    assert "Error: the output cannot be written, as the disk is full" in capsys.readouterr().err


def test_terminal_without_utf8(model: Path) -> None:
    command = f'earlyfusion generate Say. --output text --seed 3 --model "{model}"'
    plain = in_shell(command, PYTHONIOENCODING="ascii")
    assert (plain.returncode, plain.stderr) == (0, "")
    printed = [in_shell(f"{command} --json", PYTHONIOENCODING=name) for name in ("ascii", "utf-8")]
    assert printed[0].stdout.isascii()
    assert json.loads(printed[0].stdout) == json.loads(printed[1].stdout)


def test_json_to_a_stream_without_an_encoding() -> None:
    with redirect_stdout(StringIO()) as output:
        assert main(["info", "--json"]) == 0
    assert json.loads(output.getvalue())["model"] == "mini"


def test_no_command_shows_the_help(run: Run) -> None:
    result = run()
    assert (result.code, result.err) == (2, "") and "generate" in result.out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples(run: Run, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    result = run(command, "--help")
    assert result.code == 0
    assert f" earlyfusion {command}" in result.out.partition("Examples:")[2]


def test_version_and_completion(run: Run) -> None:
    assert run("--version").out.strip() == "0.1.0"
    words = {"COMP_WORDS": "earlyfusion gen", "COMP_CWORD": "1"}
    done = in_shell("earlyfusion", _EARLYFUSION_COMPLETE="complete_bash", **words)
    assert done.stdout.split() == ["generate"]


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("train fine", {"finetune", "finetune_7b"}),
        ("train my", {"my_recipe.py"}),
        ("train finetune pre", {"precision="}),
        ("train finetune steps=5 parallel.t", set()),
        ("train finetune steps=5 ten", {"tensor="}),
        ("train finetune precision=b", {"precision=bf16"}),
        ("train finetune precision = b", {"bf16"}),
        ("train finetune precision =", {"fp32", "bf16"}),
        ("train finetune wandb=t", {"wandb=true"}),
        ("train no_such_recipe st", set()),
        ("generate --dtype b", {"bfloat16"}),
        ("batch --dtype int", {"int8", "int4"}),
        ("chat --device cp", {"cpu"}),
        ("generate --model m", {"mini", "models/"}),
        ("generate --model models/", {"models/one/"}),
        ("generate --output i", {"image", "interleaved"}),
    ],
)
def test_completion(
    run: Run, words: str, offered: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("models/one").mkdir(parents=True)
    Path("models/file").touch()
    Path("my_recipe.py").touch()
    monkeypatch.setenv("_EARLYFUSION_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", f"earlyfusion {words}")
    monkeypatch.setenv("COMP_CWORD", str(len(words.split())))
    result = run()
    assert (result.code, set(result.out.split())) == (0, offered)


def test_help_of_train_names_recipes_and_fields(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    help_text = run("train", "--help").out
    for name in RECIPES:
        assert f" {name}: " in help_text
    help_text = run("train", "finetune", "steps=5", "--help").out
    assert "earlyfusion train finetune data=captions.jsonl" in help_text
    for line in ("precision                    str = fp32", "steps                        int = "):
        assert f"  {line}" in help_text
    assert "Rank of low-rank adapters" in help_text
    assert_refused(run("train", "no_such_recipe", "--help"), "no_such_recipe", "finetune")


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


def write_requests(*lines: object, path: str = "in/requests.jsonl") -> Path:
    Path(path).parent.mkdir(exist_ok=True)
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    Path(path).write_text("\n".join(texts) + "\n")
    return Path(path)


def replies_in(folder: str = "replies") -> dict[object, dict]:
    lines = (Path(folder) / "replies.jsonl").read_text(encoding="utf-8").splitlines()
    replies = [json.loads(line) for line in lines]
    assert len({reply["id"] for reply in replies}) == len(replies)
    return {reply["id"]: reply for reply in replies}


Batch = Callable[..., Ran]


@pytest.fixture
def batch(run: Run, model: Path) -> Batch:
    def call(*options: object, out: str = "replies") -> Ran:
        return run("batch", "in/requests.jsonl", "-o", out, "--model", model, *options)

    return call


def test_batch_answers_as_generate_does(
    run: Run, batch: Batch, model: Path, image_path: Path
) -> None:
    Path("in").mkdir()
    image_path.rename("in/red.png")
    image = {"type": "image", "image": "red.png"}
    turns = [
        {"role": "user", "content": ["Look: ", image]},
        {"role": "assistant", "content": "Red."},
        {"role": "user", "content": [{"type": "text", "text": "What is this?"}]},
    ]
    write_requests(
        {"prompt": "Say.", "output": "text", "seed": 5, "temperature": 50, "stop": ["z"]},
        "",
        {"id": "draw", "prompt": "Draw.", "output": "image", "max_images": 2},
        {"id": "parts", "prompt": ["What is ", image, "?"], "seed": 5},
        {"id": "marks", "prompt": "What is <image>?", "images": ["red.png"], "seed": 5},
        {"id": "turns", "prompt": turns},
    )
    result = batch("--output", "text", "--max-tokens", 140, "--seed", 10)
    assert (result.code, result.err) == (0, "") and "5 new replies" in result.out
    replies = replies_in()
    assert set(replies) == {1, "draw", "parts", "marks", "turns"}
    assert [replies[name]["seed"] for name in (1, "draw", "parts", "turns")] == [5, 11, 5, 14]
    common = ("--model", model, "--max-tokens", 140, "--json")
    for name, options in (
        (1, ("Say.", "--output", "text", "--seed", 5, "--temperature", 50, "--stop", "z")),
        ("parts", ("What is <image>?", "--image", "in/red.png", "--output", "text", "--seed", 5)),
        ("draw", ("Draw.", "--output", "image", "--seed", 11, "--max-images", 2)),
    ):
        alone = run("generate", *options, *common).json
        for key in ("text", "usage", "finish_reason", "seed", "output"):
            assert replies[name][key] == alone[key], (name, key)
        for actual, expected in zip(replies[name]["images"], alone["images"], strict=True):
            assert (Path("replies") / actual).read_bytes() == Path(expected).read_bytes()
    assert replies["parts"]["text"] == replies["marks"]["text"]
    assert len(replies["draw"]["images"]) == 2
    names = {path.name for path in Path("replies").iterdir()}
    assert names == {"replies.jsonl", "pictures"}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", ["not a JSON object"]),
        ("[1]", ["not a JSON object"]),
        ({"text": "a"}, ["'text'", "use"]),
        ({"prompt": "a", "temprature": 1}, ["'temprature' is unknown: use temperature"]),
        ({"id": "a"}, ["no prompt"]),
        ({"prompt": " "}, ["prompt is empty"]),
        ({"prompt": 7}, ["a part of a prompt"]),
        ({"prompt": "a", "output": "video"}, ["video", "interleaved"]),
        ({"prompt": "a", "top_p": 3}, ["top_p=3", "at most 1"]),
        ({"prompt": "a", "id": 1.5}, ["id"]),
        ('{"prompt": "a", "prompt": "b"}', ["the key 'prompt' is given twice"]),
        ({"prompt": "a", "id": "first"}, ["'first'", "line 1"]),
        ({"prompt": [{"type": "image", "image": "no.png"}]}, ["there is no file in/no.png"]),
        ({"prompt": "a", "images": ["no.png"]}, ["there is no file in/no.png"]),
        ({"prompt": "<image>"}, ["marks 1 place"]),
        ({"prompt": [{"role": "assistant", "content": "a"}]}, ["assistant's"]),
        ({"prompt": [{"role": "robot", "content": "a"}]}, ["robot"]),
    ],
    ids=str,
)
def test_batch_refuses_a_bad_line_before_the_start(
    run: Run, line: object, words: list[str]
) -> None:
    write_requests({"prompt": "Fine.", "id": "first"}, "", line)
    result = run("batch", "in/requests.jsonl", "-o", "replies", "--model", "nowhere")
    assert_refused(result, "in/requests.jsonl line 3: ", *words)
    assert not Path("replies").exists()


def test_batch_refuses_other_files_and_folders(run: Run, batch: Batch) -> None:
    assert_refused(run("batch", "nowhere.jsonl", "-o", "replies"), "nowhere.jsonl")
    write_requests("")
    assert_refused(batch(), "no request")
    write_requests({"prompt": "One."})
    for name, text in (("notes.txt", "mine"), ("replies.jsonl", "mine\n")):
        folder = Path(name.partition(".")[0])
        folder.mkdir()
        (folder / name).write_text(text)
        assert_refused(batch(out=str(folder)), str(folder), "--out")
        assert {path.read_text() for path in folder.iterdir()} == {text}
    assert_refused(batch(out="in/requests.jsonl"), "in/requests.jsonl", "--out")
    locked = Path("held/replies.jsonl")
    locked.parent.mkdir()
    with locked.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert_refused(batch(out="held"), "held", "another batch")


def test_batch_records_what_fails_later_and_tries_it_again(batch: Batch, image_path: Path) -> None:
    bad = Path("in/bad.png")
    bad.parent.mkdir()
    bad.write_text("no picture")
    write_requests(
        {"prompt": "What?", "images": ["bad.png"]},
        {"prompt": "Fine.", "id": "fine"},
        {"prompt": "word " * 5000, "id": "long"},
    )
    result = batch("--output", "text", "--json")
    assert result.code == 2 and result.json == {
        "path": "replies",
        "replies": 1,
        "new": 1,
        "errors": 2,
    }
    assert result.err == f"Error: 2 requests of 3 failed: see {Path('replies/errors.jsonl')}\n"
    errors = [json.loads(line) for line in Path("replies/errors.jsonl").read_text().splitlines()]
    assert [(error["id"], error["line"]) for error in errors] == [(1, 1), ("long", 3)]
    assert "PNG" in errors[0]["error"] and "limit 512" in errors[1]["error"]
    before = replies_in()
    image_path.replace(bad)
    assert batch("--output", "text").code == 2
    assert list(replies_in()) == ["fine", 1] and replies_in()["fine"] == before["fine"]
    assert len(Path("replies/errors.jsonl").read_text().splitlines()) == 1


def test_batch_records_an_answer_that_fails(batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    collect, failed = Chameleon.collect, []

    def collect_or_fail_once(self: Chameleon, events: object) -> Reply:
        if not failed:
            failed.append(events)
            raise SettingError("the answer is no number")
        return collect(self, events)  # type: ignore[arg-type]

    monkeypatch.setattr(Chameleon, "collect", collect_or_fail_once)
    write_requests(*({"prompt": f"Say {number}."} for number in range(3)))
    assert batch("--output", "text").code == 2
    assert len(replies_in()) == 2
    assert "the answer is no number" in Path("replies/errors.jsonl").read_text()


def test_batch_resumes_after_a_truncated_line(batch: Batch) -> None:
    lines = [{"prompt": f"Say {number}.", "id": number} for number in range(6)]
    write_requests(*lines)
    common = ("--output", "text", "--max-tokens", 8, "--seed", 0)
    assert batch(*common, out="whole").code == 0
    assert batch(*common).code == 0
    path = Path("replies/replies.jsonl")
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b"\n", len(data) // 2) + 20])
    finished = path.read_bytes().count(b"\n")
    result = batch(*common)
    assert result.code == 0 and f"{6 - finished} new repl" in result.out and 0 < finished < 5
    assert replies_in() == replies_in("whole")
    assert "0 new replies" in batch(*common).out
    # The same ids with other requests or options are not the same batch.
    assert_refused(batch(*common[:3], 9, *common[4:]), "another request")
    for options in (["--fit"], ["--crop"], ["--dtype", "bf16"]):
        assert_refused(batch(*common, *options), "one with other options")
    write_requests({"prompt": "Other.", "id": 3})
    assert_refused(batch(*common), "another request of id 3")
    assert replies_in() == replies_in("whole")


def test_a_killed_batch_resumes_without_repeating_replies(batch: Batch, model: Path) -> None:
    lines = [
        {"prompt": f"Draw {number}.", "output": ("text", "image")[number % 2]}
        for number in range(200)
    ]
    write_requests(*lines)
    common = ("--seed", "0", "--max-tokens", "70")
    command = [sys.executable, "-m", "earlyfusion", "batch", "in/requests.jsonl", "-o", "replies"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    started = subprocess.Popen([*command, "--model", model, *common], env=environment)
    path = Path("replies/replies.jsonl")
    while started.poll() is None and not (path.exists() and path.read_bytes().count(b"\n") > 3):
        time.sleep(0.01)
    started.kill()
    assert started.wait() == -9
    killed_at = path.read_bytes().count(b"\n")
    assert 3 < killed_at < 200
    assert batch(*common).code == 0
    assert batch(*common, out="whole").code == 0
    assert replies_in() == replies_in("whole") and len(replies_in()) == 200
    for reply in replies_in().values():
        for name in reply["images"]:
            assert (Path("replies") / name).read_bytes() == (Path("whole") / name).read_bytes()


def test_batch_on_a_full_disk(batch: Batch) -> None:
    write_requests({"prompt": "Draw.", "output": "image"})
    with files_of_at_most(100):
        assert_refused(batch(), "cannot be written")
    assert Path("replies/replies.jsonl").read_text() == ""
    assert batch().code == 0 and len(replies_in()) == 1


DOCS = Path(__file__).parent.parent / "docs" / "cli.md"


def blocks(language: str) -> list[str]:
    text = DOCS.read_text(encoding="utf-8")
    result = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [block for kind, block in result if kind == language]


def test_docs_name_every_command_and_show_no_other(image_path: Path) -> None:
    lines = [line for block in blocks("") for line in block.splitlines()]
    commands = [shlex.split(line.partition(" < ")[0])[1:] for line in lines]
    group = typer.main.get_command(app)
    for words in commands:
        group.commands[words[0]].make_context(words[0], words[1:])  # type: ignore[attr-defined]
    assert {words[0] for words in commands} == set(COMMANDS)
    text = DOCS.read_text(encoding="utf-8")
    fields = inspect.signature(SamplingParams).parameters
    for name in SAMPLERS:
        options = group.commands[name].params  # type: ignore[attr-defined]
        for option in (option for option in options if option.name in fields):
            assert f"`{option.opts[0]}`" in text


def test_docs_show_requests_that_a_batch_accepts(image_path: Path, tmp_path: Path) -> None:
    [requests] = blocks("json")
    write_requests(*requests.splitlines())
    image_path.rename(tmp_path / "in" / "cat.png")
    jobs = read_jobs(Path("in/requests.jsonl"), "auto", {"seed": 7}, "mini")
    assert [job.id for job in jobs] == [1, "cat", "parts", "turns"]
    assert [job.sampling.seed for job in jobs] == [1, 8, 9, 10]
    assert [len(job.messages) for job in jobs] == [1, 1, 1, 3]


def test_batch_refuses_fields_that_would_be_ignored() -> None:
    for name in ("logprobs", "logits_processors"):
        write_requests({"prompt": "a", name: 1})
        with pytest.raises(SettingError, match=f"line 1: its field '{name}' is unknown"):
            read_jobs(Path("in/requests.jsonl"), "auto", {}, "mini")
