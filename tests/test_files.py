from __future__ import annotations

import errno
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import pytest

from earlyfusion.errors import SettingError
from earlyfusion.files import (
    files_under,
    next_number,
    removed_on_failure,
    replace_folder,
    replacing,
    write_next,
    write_whole,
)


def text(words: str) -> Callable[[BinaryIO], int]:
    return lambda file: file.write(words.encode())


def full(file: BinaryIO) -> None:
    file.write(b"half")
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture(params=[True, False], ids=["links", "no links"])
def disk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk with hard links, and one without."""

    def refused(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    if not request.param:
        monkeypatch.setattr(os, "link", refused)


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_a_folder_is_listed_no_further_than_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rows.jsonl").touch()
    (tmp_path / "images").mkdir()
    listed: list[str] = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: listed.append(str(path)) or scandir(path))
    assert next(files_under(tmp_path)) == tmp_path / "rows.jsonl"
    assert listed == [str(tmp_path)]


@pytest.mark.usefixtures("disk")
def test_a_file_is_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "new" / "deep" / "a.txt"
    with pytest.raises(SettingError, match=r"a\.txt cannot be written \(no space left"):
        write_whole(path, full)
    assert contents(tmp_path) == {}, "folders made for it are removed"
    write_whole(path, text("one"))
    with pytest.raises(SettingError, match=r"a\.txt is there already: .*--overwrite"):
        write_whole(path, text("two"))
    with pytest.raises(SettingError, match="cannot be written"):
        write_whole(path, full, overwrite=True)
    assert contents(path.parent) == {"a.txt": "one"}
    write_whole(path, text("two"), overwrite=True)
    assert contents(path.parent) == {"a.txt": "two"}


@pytest.mark.usefixtures("disk")
def test_any_other_failure_of_the_writer_leaves_nothing_either(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        write_whole(tmp_path / "a", lambda file: {}["missing"])
    assert contents(tmp_path) == {}


@pytest.mark.usefixtures("disk")
def test_the_next_number_is_taken(tmp_path: Path) -> None:
    for number, words in ((1, "one"), (2, "two")):
        path = write_next(tmp_path, "image", ".png", text(words), first=1)
        assert path == tmp_path / f"image-{number}.png"
    (tmp_path / "image-30.PNG").touch()
    (tmp_path / "image-99.jpg").touch()
    os.symlink("nowhere", tmp_path / "image-31.png")
    assert next_number(tmp_path, "image", ".png") == 32
    assert write_next(tmp_path, "image", ".png", text(""), first=31).name == "image-32.png"
    assert next_number(tmp_path / "nowhere", "image", ".png") == 1


@pytest.mark.usefixtures("disk")
def test_writers_beside_each_other_get_numbers_of_their_own(tmp_path: Path) -> None:
    def write(number: int) -> Path:
        return write_next(tmp_path, "a", "", text(str(number)))

    with ThreadPoolExecutor(16) as pool:
        paths = list(pool.map(write, range(100)))
    assert [path.read_text() for path in paths] == [str(number) for number in range(100)]
    assert {path.name for path in paths} == {f"a-{n}" for n in range(1, 101)}
    assert len(list(tmp_path.iterdir())) == 100


def test_what_was_made_goes_when_the_block_fails(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), removed_on_failure() as made:
        made += [write_next(tmp_path, "a", "", text("")) for _ in range(2)]
        raise KeyboardInterrupt
    assert contents(tmp_path) == {}


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for words in ("one", "two"):
        with replacing(path, flush=True) as partial:
            partial.write_text(words)
    with pytest.raises(KeyboardInterrupt), replacing(path) as partial:
        partial.write_text("three")
        raise KeyboardInterrupt
    assert contents(tmp_path) == {"a.json": "two"}


def test_a_finished_folder_takes_the_place_of_another(tmp_path: Path) -> None:
    for words in ("one", "two"):
        partial = tmp_path / ".partial"
        partial.mkdir()
        (partial / words).write_text(words)
        replace_folder(partial, tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    assert contents(tmp_path / "folder") == {"two": "two"}
