"""Options that are made from the fields of dataclasses."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, get_args

import pytest
import typer

from earlyfusion import cli, options
from earlyfusion.data.encoding import EncodingSettings
from earlyfusion.data.rows import RowSettings
from earlyfusion.data.tokenize import Job
from earlyfusion.errors import SettingError, shortened
from earlyfusion.fields import fields_in_source
from earlyfusion.generation.settings import SamplingParams
from earlyfusion.options import FieldsOf, with_options

CLASSES = [
    (cli.Sampling, SamplingParams),
    (cli.Rows, RowSettings),
    (cli.Encoding, EncodingSettings),
]
ROOT = Path(options.__file__).parent


def group(annotation: Any) -> FieldsOf:
    [results] = [extra for extra in get_args(annotation) if isinstance(extra, FieldsOf)]
    return results


@pytest.mark.parametrize(("annotation", "cls"), CLASSES, ids=lambda x: getattr(x, "__name__", ""))
def test_the_source_says_what_the_class_has(annotation: Any, cls: Any) -> None:
    result = list(fields_in_source(ROOT / group(annotation).source, group(annotation).name))
    assert [(f.name, f.default) for f in result] == [(f.name, f.default) for f in fields(cls)]


def made(command: str) -> Iterator[tuple[str, Any]]:
    for option in typer.main.get_command(cli.app).commands[command].params:  # type: ignore[attr-defined]
        yield option.name, option


def test_every_option_has_a_meaning_and_the_default_of_its_field() -> None:
    tokenize, generate = dict(made("tokenize")), dict(made("generate"))
    for f in (*fields(RowSettings), *fields(EncodingSettings)):
        unset = f.default in ("", ())
        assert tokenize[f.name].default == (None if unset else f.default) and tokenize[f.name].help
    assert tokenize["shard_rows"].default == Job.rows_a_shard
    omitted = group(cli.Sampling).omitted
    assert {f.name for f in fields(SamplingParams)} - set(generate) == set(omitted)
    assert all(option.help for name, option in generate.items() if name != "help")


def test_a_command_gets_only_what_is_set(tmp_path: Path) -> None:
    source = tmp_path / "settings.py"
    source.write_text(
        "@dataclass\nclass Settings:\n"
        '    """Of a test."""\n\n'
        '    share: float = 0.5\n    """How much."""\n'
        "    words: tuple[str, ...] = ()\n"
        "    folder: Path | None = None\n"
        '    mode: str = ""\n    """One of two."""\n'
        "    secret: int = 0\n",
        encoding="utf-8",
    )
    settings = FieldsOf(
        str(source), "Settings", flags={"words": "--word"}, choices={"mode": ("a", "b")}
    )
    actual: list[Any] = []
    globals()["Settings"] = Annotated[dict[str, Any], settings]

    @with_options
    def command(settings: Settings, more: str = "x") -> None:  # type: ignore[name-defined]  # noqa: F821
        actual.append((settings, more))

    app = typer.Typer()
    app.command()(command)

    def run(*arguments: str) -> object:
        app(list(arguments), standalone_mode=False)
        return actual.pop()

    assert run() == ({"share": 0.5, "secret": 0}, "x")
    given = ("--word", "a", "--word", "b", "--mode", "b", "--share", "1", "--folder", "f")
    expected = {"share": 1.0, "words": ("a", "b"), "folder": Path("f"), "mode": "b", "secret": 0}
    assert run(*given, "--more", "y") == (expected, "y")
    for wrong in (("--share", "half"), ("--mode", "c"), ("--secret", "1.5")):
        with pytest.raises(typer.TyperException, match=wrong[1]):
            run(*wrong)


@pytest.mark.parametrize("value", ["x" * 100_000, "x y " * 25_000])
@pytest.mark.parametrize(
    "command",
    [
        ["generate", "Hello", "--output"],
        ["generate", "Hello", "--seed"],
        ["generate", "Hello", "--model"],
        ["generate", "Hello", "--image"],
        ["train"],
        ["train", "mini_transformer"],
        ["train", "mini_transformer", "steps="],
        ["convert", "mini", "--to", "hf"],
        ["decode", "--out", "images"],
        ["serve", "--port"],
        ["serve", "--host"],
        [],
    ],
    ids=" ".join,
)
def test_no_error_repeats_a_long_value(
    command: list[str], value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*command, value]
    if command and command[-1].endswith("="):
        arguments = [*command[:-1], command[-1] + value]
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("Error: ") and len(error) < 4200 and "…" in error


def test_a_shortened_sentence_keeps_its_remedy() -> None:
    short = f"field 'abc' is unknown: this recipe has {', '.join(['name'] * 200)}, or 'x'"
    assert shortened(short) == short
    for value in ("x" * 999, "x y " * 300):
        error = SettingError(f"seed={value!r} is not possible: use a number, as seed='7'")
        assert str(error).startswith("seed='x") and len(str(error)) < 250
        assert str(error).endswith("' is not possible: use a number, as seed='7'")
        assert str(pickle.loads(pickle.dumps(error))) == shortened(str(error)) == str(error)
    assert len(str(SettingError("a b " * 9999))) < 4000
