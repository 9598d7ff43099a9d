"""Files of rows, any of which can be read by its number: JSONL, JSON, CSV, TSV, Parquet, the Arrow
files of `datasets`, WebDataset tar, and a folder of images with their texts.

The positions of rows in a file are found once and stored in a cache folder, under the file's size
and time, so that a large file is not scanned again. A row is a dict; its table reads the images
that it names, since a tar contains its own.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import json
import re
import tarfile
import threading
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Protocol

import numpy as np
import numpy.typing as npt

from earlyfusion.content import MAX_FILE_BYTES, base64_bytes
from earlyfusion.data.joined import Joined
from earlyfusion.errors import DataError
from earlyfusion.files import DuplicateKeyError, files_under, parse_json, replacing

Index = dict[str, npt.NDArray[Any]]
_IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
_INDEX_VERSION = 1  # to be raised when an index holds other arrays
# Row groups of a Parquet file that stay decoded; the rows of this many are shuffled together.
DECODED_GROUPS = 8
_PLACEHOLDER = b"\0"  # in place of an image's bytes in an outline

Outlines = Iterator[dict[str, Any] | None]
"""Rows with `_PLACEHOLDER` in place of the bytes of each image, which says what a row holds without
reading its images; None for a damaged row."""


class Table(Protocol):
    """One file of rows."""

    path: Path
    groups: list[int]
    """Sizes of the groups of rows that are cheap to read together, in order."""
    is_random: bool
    """Whether any row is as cheap to read as the next one."""

    def row(self, number: int) -> dict[str, Any]:
        """Row `number` of the file, from 0. Raises `DataError` if it is damaged."""
        ...

    def outlines(self) -> Outlines:
        """The outlines of all rows, in order."""
        ...

    def read(self, row: Mapping[str, Any], name: str) -> bytes:
        """The bytes of the image that a row names. Raises `DataError` if it cannot be read."""
        ...


class ImageFolder:
    """The folder of image files that rows name; if `confined`, nothing outside is read."""

    def __init__(self, folder: Path, confined: bool) -> None:
        self._folder, self._confined = folder, confined

    def read(self, name: str) -> bytes:
        """The bytes of a file of the folder, or of a data URL. Raises `DataError`."""
        if "://" in name:
            raise DataError(f"the image {name[:80]} is a URL: download it and give its file")
        if name.startswith("data:"):
            return _decode_data_url(name)
        path = Path(name)
        # Rows of an untrusted data set must not show this machine's files to the model.
        if self._confined and (path.is_absolute() or ".." in path.parts):
            raise DataError(f"the image {name[:80]} lies outside the data set: leave the row out")
        path = self._folder / path
        try:
            # The size is checked before reading, as a row may name any file.
            if path.stat().st_size <= MAX_FILE_BYTES:
                return path.read_bytes()
        except (OSError, ValueError):  # ValueError: a null character in the name
            raise DataError(
                f"the image {name[:80]} is not in {self._folder}: put it there, or give its folder "
                "as images"
            ) from None
        raise DataError(f"the image {name[:80]} has over {MAX_FILE_BYTES:,} bytes: make it smaller")


class JsonRows:
    """Rows of JSONL, or of one JSON array, by their first and last byte."""

    is_random = True

    def __init__(self, path: Path, index: Index, images: ImageFolder) -> None:
        self.path, self._images = path, images
        self._starts, self._ends = index["starts"], index["ends"]
        self.groups = [len(self._starts)]

    def row(self, number: int) -> dict[str, Any]:
        with self.path.open("rb") as file:
            return self._row(file, number)

    def outlines(self) -> Outlines:
        with self.path.open("rb") as file:
            for number in range(len(self._starts)):
                yield _read_or_none(partial(self._row, file, number))

    def _row(self, file: BinaryIO, number: int) -> dict[str, Any]:
        start, end = int(self._starts[number]), int(self._ends[number])
        file.seek(start)
        return self._parse_row(file.read(end - start))

    def _parse_row(self, data: bytes) -> dict[str, Any]:
        return _parse_object(data)

    def read(self, row: Mapping[str, Any], name: str) -> bytes:
        return self._images.read(name)


class TarRows:
    """Samples of a WebDataset tar: members of one name make a row, their suffixes its keys. The
    fields of a `json` member become keys of the row. If a dialogue names no images, the image
    members are its images, in the order of their names."""

    is_random = True

    def __init__(self, path: Path, index: Index, images: ImageFolder) -> None:
        self.path, self._index, self._images = path, index, images
        self.groups = [len(index["first"]) - 1]

    def row(self, number: int) -> dict[str, Any]:
        with self.path.open("rb") as file:
            return self._row(number, partial(self._read_member, file))

    def outlines(self) -> Outlines:
        size = self.path.stat().st_size
        with self.path.open("rb") as file:

            def contents(member: int) -> bytes:
                if _is_text(str(self._index["suffix"][member])):
                    return self._read_member(file, member)
                length = int(self._index["size"][member])
                if int(self._index["offset"][member]) + length > size:
                    raise DataError(_TRUNCATED)
                return _PLACEHOLDER if length else b""

            for number in range(self.groups[0]):
                yield _read_or_none(partial(self._row, number, contents))

    def read(self, row: Mapping[str, Any], name: str) -> bytes:
        """An image that a row names: one of its members, or a file in the tar's folder."""
        # Keys are suffixes: everything after the first dot of a member's name.
        base = PurePosixPath(name).name.lower()
        for key in (base, base.partition(".")[2]):
            if isinstance(row.get(key), bytes):
                return bytes(row[key])
        return self._images.read(name)

    def _row(self, number: int, contents: Callable[[int], bytes]) -> dict[str, Any]:
        """Row `number`; `contents` returns the bytes of a member by its index."""
        first, last = (int(self._index["first"][n]) for n in (number, number + 1))
        members = {str(self._index["suffix"][m]): contents(m) for m in range(first, last)}
        row: dict[str, Any] = {}
        for suffix, data in members.items():
            if suffix == "json":
                row |= _parse_object(data)
            else:
                row[suffix] = _decode_text(data) if _is_text(suffix) else data
        # A dialogue in a tar rarely names its images: they are the image members of its sample.
        if {"messages", "conversations", "prompt"} & row.keys() and not _has_images(row):
            images = [row[s] for s in sorted(members, key=_natural_key) if _is_image(s)]
            row |= {"images": images} if images else {}
        return row

    def _read_member(self, file: BinaryIO, member: int) -> bytes:
        offset, size = (int(self._index[name][member]) for name in ("offset", "size"))
        file.seek(offset)
        data = file.read(size)
        if len(data) < size:
            raise DataError(_TRUNCATED)
        return data


class ParquetRows:
    """Rows of a Parquet file; a row group is decoded whole, and the last few stay decoded."""

    is_random = False

    def __init__(self, path: Path, images: ImageFolder) -> None:
        self.path, self._images = path, images
        self._file = _open_parquet(path)
        _check_columns(path, self._file.schema_arrow.names)
        metadata = self._file.metadata
        self.groups = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        self._rows = Joined(self.groups)
        self._decoded: OrderedDict[int, Any] = OrderedDict()
        self._lock = threading.Lock()  # a ParquetFile is not safe to use from several threads

    def row(self, number: int) -> dict[str, Any]:
        group, index = self._rows.find(number)
        with self._lock:
            try:
                rows: list[dict[str, Any]] = self._decoded_group(group).slice(index, 1).to_pylist()
            except (OSError, ValueError):
                raise DataError(
                    f"row group {group} is damaged: get {self.path.name} again"
                ) from None
        return rows[0]

    def outlines(self) -> Outlines:
        for group, size in enumerate(self.groups):
            try:
                yield from self._outlines(group)
            except (OSError, ValueError):
                yield from [None] * size

    def read(self, row: Mapping[str, Any], name: str) -> bytes:
        return self._images.read(name)

    def _decoded_group(self, group: int) -> Any:
        """A row group, which is decoded unless it is one of the last `DECODED_GROUPS`."""
        if group not in self._decoded:
            self._decoded[group] = self._file.read_row_group(group)
            while len(self._decoded) > DECODED_GROUPS:
                self._decoded.popitem(last=False)
        self._decoded.move_to_end(group)
        return self._decoded[group]

    def _outlines(self, group: int) -> list[dict[str, Any]]:
        """Rows of a group, without reading byte columns that have a value in every row."""
        metadata = self._file.metadata.row_group(group)
        paths = [metadata.column(i).path_in_schema for i in range(metadata.num_columns)]
        bytes_in_all = [p for i, p in enumerate(paths) if _is_full_of_bytes(metadata.column(i))]
        others = [path for path in paths if path not in bytes_in_all]
        # Bytes in the entries of a list are only skipped beside another column of the entries,
        # which says how many there are.
        skipped = [
            path
            for path in bytes_in_all
            if path.count(".") <= 1 or any(_are_siblings(path, other) for other in others)
        ]
        with self._lock:
            columns = [path for path in paths if path not in skipped]
            table = self._file.read_row_group(group, columns=columns)
        rows: list[dict[str, Any]] = table.to_pylist() or [{} for _ in range(metadata.num_rows)]
        for path in skipped:
            for row in rows:
                _set_placeholder(row, path.split("."))
        return rows


class CsvRows(JsonRows):
    """Rows of CSV or TSV, whose first row names the columns; an empty cell counts as missing.
    Messages and other lists are written as JSON in a cell."""

    def __init__(self, path: Path, index: Index, images: ImageFolder) -> None:
        super().__init__(path, index, images)
        self._names = [str(name) for name in index["names"]]
        _check_columns(path, self._names)

    def _parse_row(self, data: bytes) -> dict[str, Any]:
        # newline="": newlines within quotes belong to the cell.
        lines = io.StringIO(data.decode("utf-8"), newline="")
        cells = next(_csv_reader(self.path, lines), [])
        if len(cells) != len(self._names):
            raise DataError(
                f"the row has {len(cells)} cells and the first row {len(self._names)}: quote cells "
                "that hold a delimiter or a newline"
            )
        named_cells = zip(self._names, cells, strict=True)
        return {name: _parse_cell(name, cell) for name, cell in named_cells if cell}


class ArrowRows:
    """Rows of an Arrow file, as `datasets` stores them; the file is memory-mapped."""

    is_random = True

    def __init__(self, path: Path, images: ImageFolder) -> None:
        self.path, self._images = path, images
        self._table = _open_arrow(path)
        _check_columns(path, self._table.column_names)
        self.groups = [self._table.num_rows]

    def row(self, number: int) -> dict[str, Any]:
        rows: list[dict[str, Any]] = self._table.slice(number, 1).to_pylist()
        return rows[0]

    def outlines(self) -> Outlines:
        pyarrow = _pyarrow(self.path)
        for batch in self._table.to_batches(max_chunksize=_ARROW_BATCH):
            columns = [_without_bytes(pyarrow, column) for column in batch.columns]
            yield from pyarrow.RecordBatch.from_arrays(columns, batch.schema.names).to_pylist()

    def read(self, row: Mapping[str, Any], name: str) -> bytes:
        return self._images.read(name)


class CaptionedImages:
    """Images of a folder, each with its text in a .txt file of the same name."""

    is_random = True

    def __init__(self, folder: Path, names: list[str], images: ImageFolder) -> None:
        self.path, self._names, self._images = folder, names, images
        self.groups = [len(names)]

    def row(self, number: int) -> dict[str, Any]:
        text = (self.path / self._names[number]).with_suffix(".txt")
        try:
            caption = _decode_text(text.read_bytes())
        except OSError:
            raise DataError(
                f"{text.name} is missing beside {self._names[number]}: write its text there"
            ) from None
        return {"image": self._names[number], "text": caption}

    def outlines(self) -> Outlines:
        for number in range(len(self._names)):
            yield _read_or_none(partial(self.row, number))

    def read(self, row: Mapping[str, Any], name: str) -> bytes:
        return self._images.read(name)


SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".tar")


def open_table(path: Path, cache: Path, images: ImageFolder) -> Table:
    """Open a file by its suffix, indexing it unless its index is in the cache folder. Raises
    `DataError` for another suffix, or a file that is damaged as a whole."""
    if path.suffix == ".parquet":
        return ParquetRows(path, images)
    if path.suffix == ".arrow":
        return ArrowRows(path, images)
    if path.suffix in _DELIMITERS:
        return CsvRows(path, _load_index(path, cache, _index_csv), images)
    if path.suffix == ".tar":
        return TarRows(path, _load_index(path, cache, _index_tar), images)
    if path.suffix in SUFFIXES:
        return JsonRows(path, _load_index(path, cache, _index_json), images)
    remedy = "unpack it" if path.suffix in (".gz", ".zst", ".zip") else "convert it"
    raise DataError(f"{path} is none of {', '.join(SUFFIXES)}: {remedy}")


def captioned_images(folder: Path) -> list[str]:
    """Names of the images under a folder, in order; none unless one has a text file."""
    images = [p for p in files_under(folder) if p.suffix.lower().lstrip(".") in _IMAGE_SUFFIXES]
    if not any(path.with_suffix(".txt").is_file() for path in images):
        return []
    return sorted(path.relative_to(folder).as_posix() for path in images)


def _read_or_none(read: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
    try:
        return read()
    except DataError:
        return None


def _load_index(path: Path, cache: Path, make: Callable[[Path], Index]) -> Index:
    return cached_arrays(cache / f"{_index_key(path)}.npz", lambda: make(path))


def cached_arrays(path: Path, make: Callable[[], Index]) -> Index:
    """The arrays of an .npz file; if it cannot be read, those of `make`, written to it."""
    try:
        with path.open("rb") as stored, np.load(stored, allow_pickle=False) as arrays:
            return dict(arrays)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error):  # missing, or damaged
        index = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial, partial.open("wb") as file:
        np.savez(file, **index)  # type: ignore[arg-type]
    return index


def _index_key(path: Path) -> str:
    stat = path.stat()
    # The time as well: rows may change without the size.
    key = f"{_INDEX_VERSION} {path.absolute()} {stat.st_size} {stat.st_mtime_ns}"
    return hashlib.sha256(key.encode()).hexdigest()[:24]


def _index_json(path: Path) -> Index:
    """The byte span of each row of JSONL or of a JSON array."""
    # The first character tells a JSON array from JSONL.
    with path.open("rb") as file:
        if file.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:
            file.seek(0)
        while (first := file.read(1)).isspace():
            pass
    spans = _array_spans(path) if first == b"[" else _line_spans(path)
    starts, ends = zip(*spans, strict=True) if spans else ((), ())
    return {"starts": np.array(starts, np.int64), "ends": np.array(ends, np.int64)}


def _line_spans(path: Path) -> list[tuple[int, int]]:
    spans, start = [], 0
    with path.open("rb") as file:
        for line in file:
            if not line.isspace():
                spans.append((start, start + len(line)))
            start += len(line)
    return spans


_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_LISTS = ("messages", "conversations", "prompt", "completion", "texts", "images")


def _csv_reader(path: Path, lines: Iterable[str]) -> Iterator[list[str]]:
    csv.field_size_limit(MAX_FILE_BYTES)  # a cell may be an image
    return csv.reader(lines, delimiter=_DELIMITERS[path.suffix], strict=True)


def _index_csv(path: Path) -> Index:
    """Names of the columns, and the byte span of each row, which may take several lines."""
    ends = [0]  # of the lines, in bytes; the 0 is where the first line starts

    def lines() -> Iterator[str]:
        with path.open("rb") as file:
            for line in file:
                ends.append(ends[-1] + len(line))
                # Spreadsheets write a byte-order mark before the first name.
                yield line.decode("utf-8-sig" if len(ends) == 2 else "utf-8")

    spans: list[tuple[int, int]] = []
    names: list[str] = []
    # The reader reads no line ahead, so a row ends where the lines read so far end.
    row_start = 0
    try:
        for cells in _csv_reader(path, lines()):
            if not names:
                names = [name.strip() for name in cells]
            elif cells:
                spans.append((row_start, ends[-1]))
            row_start = ends[-1]
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


def _check_columns(path: Path, names: Sequence[str]) -> None:
    # Empty names may repeat: spreadsheets write several of them after the last column.
    repeated = next((n for i, n in enumerate(names) if n and n in names[:i]), None)
    if repeated is not None:
        raise DataError(f"{path} has the column {repeated!r} twice: rename or remove one")


def _parse_cell(name: str, cell: str) -> Any:
    if name not in _LISTS or not cell.lstrip().startswith("["):
        return cell
    try:
        return parse_json(cell)
    except DuplicateKeyError as error:
        raise DataError(f"in the cell {name} {error}: keep one") from None
    except (ValueError, RecursionError):
        raise DataError(f"the cell {name} is not a whole JSON list: write it again") from None


def _open_arrow(path: Path) -> Any:
    """The table of a file in Arrow's stream format, which `datasets` writes, or its file format."""
    pyarrow = _pyarrow(path)
    for opener in (pyarrow.ipc.open_stream, pyarrow.ipc.open_file):
        try:
            return opener(pyarrow.memory_map(str(path))).read_all()
        except (OSError, ValueError):
            continue
    raise DataError(f"{path} is damaged or not an Arrow file: get it again")


def _pyarrow(path: Path) -> Any:
    """The library, imported; raises `DataError` if it is not installed."""
    try:
        import pyarrow
        import pyarrow.compute
        import pyarrow.parquet
    except ImportError:
        raise DataError(
            f"{path} needs pyarrow to be read: pip install 'earlyfusion[data]'"
        ) from None
    return pyarrow


def _array_spans(path: Path) -> list[tuple[int, int]]:
    """Byte spans of the elements of a JSON array."""
    # The decoder counts characters, the spans count bytes: both positions advance together.
    decoder, separators = json.JSONDecoder(), re.compile(r"[\s,]*")
    spans: list[tuple[int, int]] = []
    try:
        text = path.read_text(encoding="utf-8")
        end = text.index("[") + 1
        byte = len(text[:end].encode())
        while True:
            start = _match_end(separators, text, end)
            byte += len(text[end:start].encode())
            if text[start] == "]":
                return spans
            _, end = decoder.raw_decode(text, start)
            size = len(text[start:end].encode())
            spans.append((byte, byte + size))
            byte += size
    except (ValueError, IndexError, RecursionError):
        raise DataError(
            f"{path} is not a whole JSON array after {len(spans)} rows: get it again, or make it "
            "JSONL"
        ) from None


def _match_end(pattern: re.Pattern[str], text: str, start: int) -> int:
    """Where the match at `start` ends; `start` if there is none."""
    match = pattern.match(text, start)
    return match.end() if match else start


def _index_tar(path: Path) -> Index:
    """The suffix, offset and size of each member, and the first member of each sample."""
    keys, suffixes, offsets, sizes = [], [], [], []
    try:
        # "r:" refuses a compressed tar, in whose members one cannot seek.
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
    # The members of a sample are consecutive, as WebDataset requires.
    first_members = [i for i in range(len(keys)) if i == 0 or keys[i] != keys[i - 1]]
    return {
        "first": np.array([*first_members, len(keys)], np.int64),
        "suffix": np.array(suffixes, np.str_),
        "offset": np.array(offsets, np.int64),
        "size": np.array(sizes, np.int64),
    }


_TRUNCATED = "the tar is cut short within this row: get it again"


def _is_text(suffix: str) -> bool:
    return suffix == "json" or suffix.rpartition(".")[2] in ("txt", "text", "caption", "cls")


# Paths of Parquet columns that outlines may skip: a column, a field of a struct, or a field of the
# structs of a list.
_BYTES_COLUMN = re.compile(
    r"[^.]+|(?!.*\.(array|list|element)$)[^.]+\.[^.]+|[^.]+\.list\.[^.]+\.[^.]+"
)


def _is_full_of_bytes(column: Any) -> bool:
    """Whether a column chunk of a Parquet file has bytes, not text, in each of its rows."""
    statistics = column.statistics
    return (
        column.physical_type == "BYTE_ARRAY"
        and _BYTES_COLUMN.fullmatch(column.path_in_schema) is not None
        and statistics is not None
        and statistics.logical_type.type == "NONE"  # else a string
        and statistics.has_null_count
        and statistics.null_count == 0
        and not (statistics.has_min_max and statistics.min == b"")  # some may be empty
    )


def _are_siblings(path: str, other: str) -> bool:
    return path.rpartition(".")[0] == other.rpartition(".")[0]


def _set_placeholder(row: dict[str, Any], path: Sequence[str]) -> None:
    """Put `_PLACEHOLDER` into a column of bytes that was not read; `path` is in a form of
    `_BYTES_COLUMN`."""
    *outer, name = path
    if len(outer) > 1:  # list.element: each entry of the list has the column
        for entry in row[outer[0]]:
            entry[name] = _PLACEHOLDER
    else:
        (row.setdefault(outer[0], {}) if outer else row)[name] = _PLACEHOLDER


_ARROW_BATCH = 1024


def _without_bytes(pyarrow: Any, column: Any) -> Any:
    """An Arrow array with `_PLACEHOLDER` in place of each value of bytes that is not empty. Only
    the offsets are read, so that the bytes of a mapped file stay on disk."""
    dtype, types = column.type, pyarrow.types
    if types.is_binary(dtype) or types.is_large_binary(dtype):
        has_bytes = pyarrow.compute.greater(pyarrow.compute.binary_length(column), 0)
        return pyarrow.compute.if_else(has_bytes, _PLACEHOLDER, b"")
    if types.is_struct(dtype):
        fields = [_without_bytes(pyarrow, column.field(i)) for i in range(dtype.num_fields)]
        names = [dtype.field(i).name for i in range(dtype.num_fields)]
        return pyarrow.StructArray.from_arrays(fields, names, mask=column.is_null())
    return column


def _open_parquet(path: Path) -> Any:
    pyarrow = _pyarrow(path)
    try:
        return pyarrow.parquet.ParquetFile(path)
    except (OSError, ValueError):
        raise DataError(f"{path} is damaged or not a Parquet file: get it again") from None


def _parse_object(data: bytes) -> dict[str, Any]:
    """The row in the bytes of a JSON object. Raises `DataError`."""
    try:
        row = parse_json(data)
    except DuplicateKeyError as error:
        raise DataError(f"in the row {error}: keep one") from None
    except (ValueError, RecursionError):
        raise DataError("the row is not whole JSON: write one object per line") from None
    if not isinstance(row, dict):
        raise DataError(f"the row is a JSON {type(row).__name__}: write an object")
    return row


def _decode_text(data: bytes) -> str:
    try:
        return data.decode("utf-8").strip()
    except UnicodeDecodeError:
        raise DataError("a text of the row is not UTF-8: write it again") from None


def _decode_data_url(name: str) -> bytes:
    # data:image/png;base64,… is the only kind that chat protocols use.
    head, _, data = name.partition(",")
    try:
        return base64_bytes(data) if head.endswith(";base64") else b""
    except ValueError:
        raise DataError("the data URL of an image is damaged: write it as base64") from None


def _has_images(row: Mapping[str, Any]) -> bool:
    return any(row.get(key) is not None for key in ("image", "images"))


def _is_image(suffix: str) -> bool:
    return suffix.rpartition(".")[2] in _IMAGE_SUFFIXES


def _natural_key(name: str) -> list[tuple[int, str]]:
    """Sorts 2.png before 10.png."""
    return [(int(d or 0), w) for d, w in re.findall(r"(\d*)(\D*)", name)]
