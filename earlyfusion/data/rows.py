"""The rows of a source: a file, a folder, a glob or a hub id, opened as one numbered list. Unusable
rows go to the quarantine: a JSONL file of their file, number and reason."""

from __future__ import annotations

import glob
import hashlib
import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import chain, takewhile
from pathlib import Path
from typing import Any

from earlyfusion.checkpoints.hub import download_dataset, is_hub_id
from earlyfusion.data.joined import Joined
from earlyfusion.data.tables import (
    SUFFIXES,
    CaptionedImages,
    ImageFolder,
    Outlines,
    Table,
    captioned_images,
    open_table,
)
from earlyfusion.errors import DataError, SettingError
from earlyfusion.files import expanded, files_under

_HUB_PATTERNS = [f"*{s}" for s in (*SUFFIXES, ".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")]
_DIGESTED_BYTES = 4096  # at each end of a file


@dataclass(frozen=True)
class RowSettings:
    """Which files of a source are read, and where the images are that rows name."""

    patterns: tuple[str, ...] = ()
    """Files of a folder or hub data set to take, such as `train/*.parquet`; none given: all."""
    images: Path | None = None
    """Folder of the images; None: beside the file of the row."""
    max_broken: float = 0.1
    """Largest share of rows that may be broken, once 100 are read."""

    def __post_init__(self) -> None:
        if not 0 <= self.max_broken <= 1:
            raise SettingError(f"max_broken={self.max_broken} is not a share: give 0 to 1")


class Rows:
    """All rows of a source by number, in the order of its files' names."""

    def __init__(self, name: str, tables: Sequence[Table], fingerprint: str) -> None:
        self.name, self.fingerprint = name, fingerprint
        self.tables = tables
        self._numbers = Joined(sum(table.groups) for table in tables)
        self.groups = [rows for table in tables for rows in table.groups if rows]
        self.is_random = all(table.is_random for table in tables)

    def __len__(self) -> int:
        return len(self._numbers)

    def find(self, number: int) -> tuple[Table, int]:
        """The table of row `number`, and its number in that table."""
        table, table_row = self._numbers.find(number)
        return self.tables[table], table_row

    def outlines(self) -> Outlines:
        """The outlines of all rows, in order."""
        return chain.from_iterable(table.outlines() for table in self.tables)


def open_rows(source: str, cache: Path, settings: RowSettings) -> Rows:
    """Open a file, a folder, a glob or a hub id; `cache` is for indices. Raises `DataError`."""
    captioned = None if settings.patterns or not source else _open_captioned(source)
    if captioned is not None:
        return captioned
    root, paths, from_hub = find_files(source, settings.patterns)
    # A data set from the hub is not trusted: its rows may only name files of its folder.
    tables = [
        open_table(p, cache, ImageFolder(settings.images or p.parent, confined=from_hub))
        for p in paths
    ]
    rows = Rows(source, tables, _fingerprint(root, paths))
    if not len(rows):
        raise DataError(f"{source} holds no rows: give another source")
    return rows


def _open_captioned(source: str) -> Rows | None:
    """The rows of a folder of images with text files; None for a folder with a file of rows, or any
    other source."""
    folder = expanded(source)
    # A file of rows wins: text files beside its images may be anything.
    if not folder.is_dir() or any(p.suffix in SUFFIXES for p in files_under(folder)):
        return None
    names = captioned_images(folder)
    if not names:
        return None
    texts = [p for name in names if (p := (folder / name).with_suffix(".txt")).is_file()]
    # A link to a missing file is a broken row, which is reported when it is read.
    images = [p for name in names if (p := folder / name).is_file()]
    table = CaptionedImages(folder, names, ImageFolder(folder, confined=False))
    return Rows(source, [table], _fingerprint(folder, [*images, *texts]))


def find_files(source: str, patterns: Sequence[str] = ()) -> tuple[Path, list[Path], bool]:
    """A source's folder and files, sorted by name, and whether they are from the hub."""
    path = expanded(source)
    if not source:
        raise DataError("the name of a source is empty: give a file, a folder, a glob or a hub id")
    if path.is_file():
        return path.parent, [path], False
    from_hub = False
    if path.is_dir():
        root, files = path, list(files_under(path))
    elif glob.has_magic(source):
        root = Path(*takewhile(lambda part: not glob.has_magic(part), path.parts))
        files = [Path(p) for p in glob.glob(str(path), recursive=True)]
    elif is_hub_id(source):
        root, from_hub = download_dataset(source, patterns or _HUB_PATTERNS), True
        files = list(files_under(root))
    else:
        raise DataError(
            f"there is no {source}: give a file, a folder, a glob or a hub id such as org/name"
        )
    matching = [p for p in files if not patterns or _matches(p, root, patterns)]
    tables = [p for p in matching if p.suffix in SUFFIXES and p.is_file()]
    # `datasets` stores intermediate results beside the rows.
    tables = [p for p in tables if not p.name.startswith(("cache-", "indices-"))]
    # A JSON file beside other tables usually describes the data set.
    tables = [p for p in tables if p.suffix != ".json"] or tables
    if not tables:
        raise DataError(
            f"{source} holds no {', '.join(SUFFIXES)} file, nor images with a .txt beside them: "
            "give another source"
        )
    # The same order on every machine, as much depends on a row's number.
    return root, sorted(tables, key=lambda p: p.as_posix()), from_hub


def _matches(path: Path, root: Path, patterns: Sequence[str]) -> bool:
    name = path.relative_to(root).as_posix()
    return any(fnmatch(name, pattern) for pattern in patterns)


def _fingerprint(root: Path, paths: Sequence[Path]) -> str:
    """Digest of the name, size, and first and last bytes of each file, which is fast."""
    digest = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{path.relative_to(root).as_posix()} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(_DIGESTED_BYTES))
            file.seek(max(0, size - _DIGESTED_BYTES))
            digest.update(file.read(_DIGESTED_BYTES))
    return digest.hexdigest()


class Quarantine:
    """Counts unusable rows and writes each down once; too many of them end the run. Without a
    `path` nothing is written. Thread-safe."""

    def __init__(self, path: Path | None, max_broken: float) -> None:
        self.path, self._limit = path, max_broken
        self.good = self.broken = 0
        self.last_reason = ""  # of the row that was refused last
        self.entries: list[dict[str, Any]] = []
        self._written = _rows_in_file(path)
        self._lock = threading.Lock()

    def accept(self) -> None:
        """Count a usable row."""
        with self._lock:
            self.good += 1

    def refuse(self, file: Path, row: int, reason: str) -> None:
        """Write down a row, numbered from 1; `DataError` if too many were refused."""
        with self._lock:
            # Counted in each epoch, but written down once.
            self.broken += 1
            self.last_reason = reason
            if (str(file), row) not in self._written:
                self._written.add((str(file), row))
                self._write({"file": str(file), "row": row, "reason": reason})
            check_share(self.broken, self.good, self._limit, reason)

    def _write(self, entry: dict[str, Any]) -> None:
        self.entries.append(entry)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry, ensure_ascii=False) + "\n")


def check_share(broken: int, good: int, limit: float, reason: str) -> None:
    """Raise `DataError` if more than `limit` of at least 100 rows are broken."""
    # The share of fewer rows says little.
    total = broken + good
    if total >= 100 and broken > limit * total:
        raise DataError(
            f"{broken:,} of {total:,} rows are broken, the limit is {limit:.0%}: mend them (the "
            f"last one: {reason}) or raise max_broken"
        )


def _rows_in_file(path: Path | None) -> set[tuple[str, int]]:
    """File and number of the rows that earlier runs have written down."""
    if path is None or not path.exists():
        return set()
    rows = set()
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
            rows.add((str(entry["file"]), int(entry["row"])))
        except (ValueError, KeyError, TypeError):
            continue  # the last line of a run that was killed
    return rows
