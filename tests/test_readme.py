"""README says what is there: its file tree, its commands, and the Korean README says the same."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import typer

from earlyfusion.cli import app

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "earlyfusion"
READMES = ("README.md", "README.ko.md")
LEFT_OUT = {"__init__.py", "__main__.py", "__pycache__", "py.typed"}


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(name: str, language: str = "") -> list[str]:
    result = re.findall(r"^```(\w*)\n(.*?)^```$", read(name), re.DOTALL | re.MULTILINE)
    return [text for kind, text in result if kind == language]


def tree(name: str) -> list[tuple[str, str]]:
    """Entries of the file tree with what is said of them; those in the package are indented."""
    block = next(block for block in blocks(name) if block.startswith("earlyfusion/"))
    rows = [re.fullmatch(r"(\s*\S+)\s*(.*)", line) for line in block.splitlines()]
    return [(row[1], row[2]) for row in rows if row]


@pytest.mark.parametrize("name", READMES)
def test_tree_of_the_package_is_the_disk(name: str) -> None:
    named = {entry.strip() for entry, _ in tree(name) if entry.startswith("  ")}
    on_disk = {
        path.name + "/" * path.is_dir() for path in PACKAGE.iterdir() if path.name not in LEFT_OUT
    }
    assert named == on_disk


@pytest.mark.parametrize("name", READMES)
def test_each_line_of_the_tree_says_what_is_there(name: str) -> None:
    assert not [entry for entry, words in tree(name)[1:] if not words]


def test_the_architecture_has_a_line_for_every_file_of_every_room() -> None:
    rooms = re.split(r"^\*\*`(.+)/`\*\*$", read("docs/architecture.md"), flags=re.MULTILINE)[1:]
    listed = {
        f"{room}/{file}"
        for room, text in zip(rooms[::2], rooms[1::2], strict=True)
        for file, words in re.findall(r"^\| `(\S+)` \| (.+) \|$", text, re.MULTILINE)
        if words.strip()
    }
    code = {".py", ".cpp", ".h", ".js", ".css", ".html", ".svg"}
    on_disk = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*")
        if path.suffix in code and path.parent != PACKAGE and path.name not in LEFT_OUT
    }
    assert listed == on_disk


@pytest.mark.parametrize("name", READMES)
def test_tree_around_the_package_is_there(name: str) -> None:
    folders = [entry for entry, _ in tree(name) if not entry.startswith(" ")]
    assert set(folders) == {
        f"{path.name}/"
        for path in ROOT.iterdir()
        if path.is_dir() and not path.name.startswith(".") and tracked(path)
    }
    docs = next(words for entry, words in tree(name) if entry == "docs/")
    assert set(docs.split(", ")) == {path.name for path in (ROOT / "docs").iterdir()}


def tracked(folder: Path) -> bool:
    """Not one of the folders that .gitignore names; outside of a clone, there are none."""
    ignored = {line.strip("/") for line in read(".gitignore").split()}
    return folder.name not in ignored and not folder.name.endswith(".egg-info")


@pytest.mark.parametrize("name", READMES)
def test_commands_are_ones_that_exist(name: str) -> None:
    lines = [line for block in blocks(name) for line in block.splitlines()]
    commands = [shlex.split(line)[1:] for line in lines if line.startswith("earlyfusion ")]
    assert len(commands) >= 8
    group = typer.main.get_command(app)
    for words in commands:
        command = group.commands[words[0]]  # type: ignore[attr-defined]
        command.make_context(words[0], words[1:])


def test_both_languages_show_the_same() -> None:
    english, korean = READMES
    outside_the_tree = [
        [block for block in blocks(name) if not block.startswith("earlyfusion/")]
        for name in READMES
    ]
    assert outside_the_tree[0] == outside_the_tree[1]
    assert [entry for entry, _ in tree(english)] == [entry for entry, _ in tree(korean)]
    assert read(english).count("\n## ") == read(korean).count("\n## ")
    assert len(blocks(english, "python")) == len(blocks(korean, "python"))


@pytest.mark.parametrize("name", READMES)
def test_short_enough_to_be_read(name: str) -> None:
    assert len(read(name).splitlines()) <= 160


@pytest.mark.parametrize("name", [*READMES, "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_somewhere(name: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", read(name)):
        assert "://" in target or (ROOT / target).exists(), target


def test_ci_runs_the_commands_of_the_readme() -> None:
    script = read(".ci/run")
    for word in ("earlyfusion demo", "scripts/test"):
        pattern = re.search(rf"readme_line '({word})'", script)
        assert pattern
        results = [line for line in read("README.md").splitlines() if word in line]
        assert [line for line in results if line.startswith("pip install -c constraints.txt")]
    assert subprocess.run(["bash", "-n", str(ROOT / ".ci" / "run")]).returncode == 0
