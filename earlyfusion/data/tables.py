"""Files of rows, of which any row can be had by its number.

JSONL, JSON, CSV, TSV, Parquet, the Arrow files of `datasets`, WebDataset tar, and a folder of
pictures with a text beside each.

Where each row lies is found once and kept in a cache folder under the file's size and time, so
that a large file is not read through again. A row is a dict; names of pictures in it are looked
up by the table, since a tar holds its own.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
import tarfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from earlyfusion.content import MAX_FILE_BYTES
from earlyfusion.errors import DataError

Index = dict[str, npt.NDArray[Any]]
_PICTURE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
_INDEX_VERSION = 1
# Row groups of a Parquet file that stay decoded; a pool of the shuffle must fit.
KEPT_GROUPS = 8


class Table(Protocol):
    """One file of rows. `groups` are the rows that are cheap to have together, in order."""

    path: Path
    groups: list[int]
    is_random: bool

    def row(self, number: int) -> dict[str, Any]: ...
    def read(self, row: Mapping[str, Any], name: str) -> bytes: ...


class PictureFolder:
    """Where the picture files that rows name lie; with `confined`, nothing outside is read."""

    def __init__(self, folder: Path, confined: bool) -> None:
        self._folder, self._confined = folder, confined

    def read(self, name: str) -> bytes:
        if "://" in name:
            raise DataError(f"the image {name[:80]} is on the net: download it and give its file")
        if name.startswith("data:"):
            return _data_url(name)
        path = Path(name)
        if self._confined and (path.is_absolute() or ".." in path.parts):
            raise DataError(f"the image {name[:80]} lies outside the data set: leave the row out")
        try:
            path = self._folder / path
            if path.stat().st_size > MAX_FILE_BYTES:
                raise DataError(f"the image {name[:80]} has over {MAX_FILE_BYTES:,} bytes")
            return path.read_bytes()
        except (OSError, ValueError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"the image {name[:80]} is not in {self._folder}") from None


class Lines:
    """Rows of JSONL, or of one JSON array."""

    is_random = True

    def __init__(self, path: Path, index: Index, pictures: PictureFolder) -> None:
        self.path, self._pictures = path, pictures
        self._starts, self._ends = index["starts"], index["ends"]
        self.groups = [len(self._starts)]

    def row(self, number: int) -> dict[str, Any]:
        start, end = int(self._starts[number]), int(self._ends[number])
        with self.path.open("rb") as file:
            file.seek(start)
            data = file.read(end - start)
        return _json_object(data)

    def read(self, row: Mapping[str, Any], name: str) -> bytes:
        return self._pictures.read(name)


class TarRows:
    """Samples of a WebDataset tar: members of one name make a row, their suffixes its keys.

    The fields of a `json` member are the row's own. Where a dialogue names no pictures, the
    picture members are its pictures, in the order of their names.
    """

    is_random = True

    def __init__(self, path: Path, index: Index, pictures: PictureFolder) -> None:
        self.path, self._index, self._pictures = path, index, pictures
        self.groups = [len(index["first"]) - 1]

    def row(self, number: int) -> dict[str, Any]:
        members = self._members(number)
        row: dict[str, Any] = {}
        for suffix, data in members.items():
            if suffix == "json":
                row |= _json_object(data)
            elif suffix.rpartition(".")[2] in ("txt", "text", "caption", "cls"):
                row[suffix] = _decoded(data)
            else:
                row[suffix] = data
        if {"messages", "conversations", "prompt"} & row.keys() and not _names_pictures(row):
            own = [row[s] for s in sorted(members, key=_natural) if _is_picture(s)]
            row |= {"images": own} if own else {}
        return row

    def read(self, row: Mapping[str, Any], name: str) -> bytes:
        """A picture that a row names: one of its members, or a file beside the tar."""
        base = PurePosixPath(name).name.lower()
        for key in (base, base.partition(".")[2]):
            if isinstance(row.get(key), bytes):
                return bytes(row[key])
        return self._pictures.read(name)

    def _members(self, number: int) -> dict[str, bytes]:
        first, last = (int(self._index["first"][n]) for n in (number, number + 1))
        with self.path.open("rb") as file:
            return {
                str(self._index["suffix"][at]): _slice(
                    file, int(self._index["offset"][at]), int(self._index["size"][at])
                )
                for at in range(first, last)
            }


class ParquetRows:
    """Rows of a Parquet file; a row group is decoded whole and the last few are kept."""

    is_random = False

    def __init__(self, path: Path, pictures: PictureFolder) -> None:
        self.path, self._pictures = path, pictures
        self._file = _open_parquet(path)
        metadata = self._file.metadata
        self.groups = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        self._starts = np.cumsum([0, *self.groups])
        self._kept: OrderedDict[int, Any] = OrderedDict()
        self._lock = threading.Lock()

    def row(self, number: int) -> dict[str, Any]:
        group = int(np.searchsorted(self._starts, number, "right")) - 1
        with self._lock:
            try:
                table = self._group(group)
                place = number - int(self._starts[group])
                rows: list[dict[str, Any]] = table.slice(place, 1).to_pylist()
            except (OSError, ValueError):
                raise DataError(
                    f"row group {group} is damaged: get {self.path.name} again"
                ) from None
        return rows[0]

    def read(self, row: Mapping[str, Any], name: str) -> bytes:
        return self._pictures.read(name)

    def _group(self, group: int) -> Any:
        if group not in self._kept:
            self._kept[group] = self._file.read_row_group(group)
            while len(self._kept) > KEPT_GROUPS:
                self._kept.popitem(last=False)
        self._kept.move_to_end(group)
        return self._kept[group]


class Columns:
    """Rows of CSV or TSV, whose first row names the columns; an empty cell is as good as none.

    Of messages and other lists a cell holds JSON.
    """

    is_random = True

    def __init__(self, path: Path, index: Index, pictures: PictureFolder) -> None:
        self.path, self._pictures = path, pictures
        self._starts, self._ends = index["starts"], index["ends"]
        self._names = [str(name) for name in index["names"]]
        self.groups = [len(self._starts)]

    def row(self, number: int) -> dict[str, Any]:
        start, end = int(self._starts[number]), int(self._ends[number])
        with self.path.open("rb") as file:
            file.seek(start)
            lines = io.StringIO(file.read(end - start).decode("utf-8"), newline="")
        cells = next(_csv_reader(self.path, lines), [])
        if len(cells) != len(self._names):
            raise DataError(
                f"the row has {len(cells)} cells and the first row {len(self._names)}: quote cells "
                "that hold a delimiter or a line end"
            )
        named = zip(self._names, cells, strict=True)
        return {name: _cell(name, cell) for name, cell in named if cell}

    def read(self, row: Mapping[str, Any], name: str) -> bytes:
        return self._pictures.read(name)


class ArrowRows:
    """Rows of an Arrow file, as `datasets` keeps them; the file is mapped, not read."""

    is_random = True

    def __init__(self, path: Path, pictures: PictureFolder) -> None:
        self.path, self._pictures = path, pictures
        self._table = _open_arrow(path)
        self.groups = [self._table.num_rows]

    def row(self, number: int) -> dict[str, Any]:
        rows: list[dict[str, Any]] = self._table.slice(number, 1).to_pylist()
        return rows[0]

    def read(self, row: Mapping[str, Any], name: str) -> bytes:
        return self._pictures.read(name)


class Captioned:
    """Pictures of a folder, each with its text in a file of the same name that ends in .txt."""

    is_random = True

    def __init__(self, folder: Path, names: list[str], pictures: PictureFolder) -> None:
        self.path, self._names, self._pictures = folder, names, pictures
        self.groups = [len(names)]

    def row(self, number: int) -> dict[str, Any]:
        text = (self.path / self._names[number]).with_suffix(".txt")
        try:
            said = _decoded(text.read_bytes())
        except OSError:
            raise DataError(
                f"there is no {text.name} beside {self._names[number]}: write its text there"
            ) from None
        return {"image": self._names[number], "text": said}

    def read(self, row: Mapping[str, Any], name: str) -> bytes:
        return self._pictures.read(name)


SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".tar")


def open_table(path: Path, cache: Path, pictures: PictureFolder) -> Table:
    """Open a file by its suffix, indexing it unless the cache folder knows it.

    Raises `DataError` for another suffix and for a file that is damaged as a whole.
    """
    if path.suffix == ".parquet":
        return ParquetRows(path, pictures)
    if path.suffix == ".arrow":
        return ArrowRows(path, pictures)
    if path.suffix in _DELIMITERS:
        return Columns(path, _indexed(path, cache, _index_csv), pictures)
    if path.suffix == ".tar":
        return TarRows(path, _indexed(path, cache, _index_tar), pictures)
    if path.suffix in SUFFIXES:
        return Lines(path, _indexed(path, cache, _index_json), pictures)
    remedy = "unpack it" if path.suffix in (".gz", ".zst", ".zip") else "convert it"
    raise DataError(f"{path} is none of {', '.join(SUFFIXES)}: {remedy}")


def captioned_pictures(folder: Path) -> list[str]:
    """Names of the pictures under a folder, in order; none unless one has a text beside it."""
    found = [p for p in folder.rglob("*") if p.suffix.lower().lstrip(".") in _PICTURE_SUFFIXES]
    if not any(path.with_suffix(".txt").is_file() for path in found):
        return []
    return sorted(path.relative_to(folder).as_posix() for path in found)


def _indexed(path: Path, cache: Path, make: Callable[[Path], Index]) -> Index:
    kept = cache / f"{_index_key(path)}.npz"
    try:
        with np.load(kept, allow_pickle=False) as file:
            return dict(file)
    except (OSError, ValueError, EOFError):
        index = make(path)
    part = kept.with_suffix(f".{os.getpid()}.part")
    cache.mkdir(parents=True, exist_ok=True)
    with part.open("wb") as file:
        np.savez(file, **index)  # type: ignore[arg-type]
    os.replace(part, kept)
    return index


def _index_key(path: Path) -> str:
    stat = path.stat()
    named = f"{_INDEX_VERSION} {path.absolute()} {stat.st_size} {stat.st_mtime_ns}"
    return hashlib.sha256(named.encode()).hexdigest()[:24]


def _index_json(path: Path) -> Index:
    with path.open("rb") as file:
        while (first := file.read(1)).isspace():
            pass
    spans = _array_spans(path) if first == b"[" else _line_spans(path)
    starts, ends = zip(*spans, strict=True) if spans else ((), ())
    return {"starts": np.array(starts, np.int64), "ends": np.array(ends, np.int64)}


def _line_spans(path: Path) -> list[tuple[int, int]]:
    spans, at = [], 0
    with path.open("rb") as file:
        for line in file:
            if not line.isspace():
                spans.append((at, at + len(line)))
            at += len(line)
    return spans


_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_LISTS = ("messages", "conversations", "prompt", "completion", "texts", "images")


def _csv_reader(path: Path, lines: Iterable[str]) -> Iterator[list[str]]:
    csv.field_size_limit(MAX_FILE_BYTES)  # a cell may be a picture
    return csv.reader(lines, delimiter=_DELIMITERS[path.suffix], strict=True)


def _index_csv(path: Path) -> Index:
    """Names of the columns, and the byte span of each row, which may run over several lines."""
    ends = [0]

    def lines() -> Iterator[str]:
        with path.open("rb") as file:
            for line in file:
                ends.append(ends[-1] + len(line))
                yield line.decode("utf-8-sig" if len(ends) == 2 else "utf-8")

    spans: list[tuple[int, int]] = []
    names: list[str] = []
    before = 0
    try:
        for cells in _csv_reader(path, lines()):
            if not names:
                names = [name.strip() for name in cells]
            elif cells:
                spans.append((before, ends[-1]))
            before = ends[-1]
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(
            f"{path} cannot be read after {len(spans)} rows ({error}): write it as UTF-8, with "
            "cells of several lines in quotes"
        ) from None
    starts, stops = zip(*spans, strict=True) if spans else ((), ())
    return {
        "starts": np.array(starts, np.int64),
        "ends": np.array(stops, np.int64),
        "names": np.array(names, np.str_),
    }


def _cell(name: str, cell: str) -> Any:
    if name not in _LISTS or not cell.lstrip().startswith("["):
        return cell
    try:
        return json.loads(cell)
    except (ValueError, RecursionError):
        raise DataError(f"the cell {name} is no whole JSON list: write it again") from None


def _open_arrow(path: Path) -> Any:
    """The table of a file in Arrow's format of streams, which `datasets` writes, or of files."""
    pyarrow = _pyarrow(path)
    for opener in (pyarrow.ipc.open_stream, pyarrow.ipc.open_file):
        try:
            return opener(pyarrow.memory_map(str(path))).read_all()
        except (OSError, ValueError):
            continue
    raise DataError(f"{path} is damaged or no Arrow file: get it again")


def _pyarrow(path: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(
            f"{path} needs pyarrow to be read: pip install 'earlyfusion[data]'"
        ) from None
    return pyarrow


def _array_spans(path: Path) -> list[tuple[int, int]]:
    """Byte spans of the elements of a JSON array."""
    decoder, between = json.JSONDecoder(), re.compile(r"[\s,]*")
    spans: list[tuple[int, int]] = []
    try:
        text = path.read_text(encoding="utf-8")
        at, byte = text.index("[") + 1, len(text[: text.index("[") + 1].encode())
        while True:
            start = _end(between, text, at)
            byte += len(text[at:start].encode())
            if text[start] == "]":
                return spans
            _, at = decoder.raw_decode(text, start)
            size = len(text[start:at].encode())
            spans.append((byte, byte + size))
            byte += size
    except (ValueError, IndexError, RecursionError):
        raise DataError(
            f"{path} is no whole JSON array after {len(spans)} rows: get it again, or make it JSONL"
        ) from None


def _end(pattern: re.Pattern[str], text: str, at: int) -> int:
    found = pattern.match(text, at)
    return found.end() if found else at


def _index_tar(path: Path) -> Index:
    keys, suffixes, offsets, sizes = [], [], [], []
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                name = PurePosixPath(member.name)
                stem, dot, suffix = name.name.partition(".")
                if member.isreg() and stem and dot:
                    keys.append(str(name.with_name(stem)))
                    suffixes.append(suffix.lower())
                    offsets.append(member.offset_data)
                    sizes.append(member.size)
    except (tarfile.TarError, OSError, EOFError):
        raise DataError(f"{path} is damaged or compressed: get it again, as a plain tar") from None
    new = [i for i in range(len(keys)) if i == 0 or keys[i] != keys[i - 1]]
    return {
        "first": np.array([*new, len(keys)], np.int64),
        "suffix": np.array(suffixes, np.str_),
        "offset": np.array(offsets, np.int64),
        "size": np.array(sizes, np.int64),
    }


def _open_parquet(path: Path) -> Any:
    pyarrow = _pyarrow(path)
    try:
        return pyarrow.parquet.ParquetFile(path)
    except (OSError, ValueError):
        raise DataError(f"{path} is damaged or no Parquet file: get it again") from None


def _json_object(data: bytes) -> dict[str, Any]:
    try:
        row = json.loads(data)
    except (ValueError, RecursionError):
        raise DataError("the row is no whole JSON: write one object a line") from None
    if not isinstance(row, dict):
        raise DataError(f"the row is a JSON {type(row).__name__}: write an object")
    return row


def _decoded(data: bytes) -> str:
    try:
        return data.decode("utf-8").strip()
    except UnicodeDecodeError:
        raise DataError("a text of the row is not UTF-8: write it again") from None


def _slice(file: Any, offset: int, size: int) -> bytes:
    file.seek(offset)
    data: bytes = file.read(size)
    if len(data) < size:
        raise DataError("the tar is cut short within this row: get it again")
    return data


def _data_url(name: str) -> bytes:
    import base64
    import binascii

    head, _, data = name.partition(",")
    try:
        return base64.b64decode(data, validate=True) if head.endswith(";base64") else b""
    except (binascii.Error, ValueError):
        raise DataError("the data URL of an image is damaged: write it as base64") from None


def _names_pictures(row: Mapping[str, Any]) -> bool:
    return any(row.get(key) is not None for key in ("image", "images"))


def _is_picture(suffix: str) -> bool:
    return suffix.rpartition(".")[2] in _PICTURE_SUFFIXES


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts 2.png before 10.png."""
    return [(int(d or 0), w) for d, w in re.findall(r"(\d*)(\D*)", name)]
