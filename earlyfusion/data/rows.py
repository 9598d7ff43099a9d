"""The rows of a source: a file, a folder, a glob or a hub id, opened as one numbered list.

Rows that cannot be used go to a quarantine: a JSONL file with their file, number and the reason.
"""

from __future__ import annotations

import bisect
import glob
import hashlib
import json
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import accumulate, takewhile
from pathlib import Path
from typing import Any

from earlyfusion.checkpoints.hub import download_dataset
from earlyfusion.data.tables import (
    SUFFIXES,
    Captioned,
    PictureFolder,
    Table,
    captioned_pictures,
    open_table,
)
from earlyfusion.errors import DataError

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_HUB_PATTERNS = [f"*{s}" for s in (*SUFFIXES, ".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")]
_ENDS = 4096


@dataclass(frozen=True)
class RowSettings:
    """Which files of a source count, and where the pictures lie that rows name."""

    patterns: tuple[str, ...] = ()
    """Files of a folder or hub data set to take, such as `train/*.parquet`; all of them if none."""
    images: Path | None = None
    """Folder of the pictures; None: beside the file of the row."""
    max_broken: float = 0.1
    """Largest share of rows that may be broken, once 100 are read."""

    def __post_init__(self) -> None:
        if not 0 <= self.max_broken <= 1:
            raise DataError(f"max_broken={self.max_broken} is no share: give 0 to 1")


class Rows:
    """All rows of a source by number, in the order of its files' names."""

    def __init__(self, name: str, tables: Sequence[Table], fingerprint: str) -> None:
        self.name, self.fingerprint = name, fingerprint
        self._tables = tables
        self._ends = list(accumulate(sum(table.groups) for table in tables))
        self.groups = [rows for table in tables for rows in table.groups if rows]
        self.is_random = all(table.is_random for table in tables)

    def __len__(self) -> int:
        return self._ends[-1]

    def place(self, number: int) -> tuple[Table, int]:
        """The table of a row and its number there."""
        at = bisect.bisect_right(self._ends, number)
        return self._tables[at], number - (self._ends[at - 1] if at else 0)


def open_rows(source: str, cache: Path, settings: RowSettings) -> Rows:
    """Open a file, the tables in a folder, a glob, or a hub id.

    `cache` is a folder for what is learned about the files. Raises `DataError`.
    """
    if not settings.patterns and (own := _captioned(source)) is not None:
        return own
    root, paths, from_hub = find_files(source, settings.patterns)
    tables = [
        open_table(p, cache, PictureFolder(settings.images or p.parent, confined=from_hub))
        for p in paths
    ]
    rows = Rows(source, tables, _fingerprint(root, paths))
    if not len(rows):
        raise DataError(f"{source} holds no rows: give another source")
    return rows


def _captioned(source: str) -> Rows | None:
    """A folder of pictures with texts beside them, where it has no file of rows."""
    folder = Path(source).expanduser()
    if not folder.is_dir() or any(p.suffix in SUFFIXES for p in folder.rglob("*")):
        return None
    names = captioned_pictures(folder)
    if not names:
        return None
    texts = [p for name in names if (p := (folder / name).with_suffix(".txt")).is_file()]
    mark = _fingerprint(folder, [*(folder / name for name in names), *texts])
    return Rows(source, [Captioned(folder, names, PictureFolder(folder, confined=False))], mark)


def find_files(source: str, patterns: Sequence[str] = ()) -> tuple[Path, list[Path], bool]:
    """The folder and files of a source, in the order of their names, and whether from the hub."""
    path = Path(source).expanduser()
    if path.is_file():
        return path.parent, [path], False
    from_hub = False
    if path.is_dir():
        root, found = path, list(path.rglob("*"))
    elif glob.has_magic(source):
        root = Path(*takewhile(lambda part: not glob.has_magic(part), path.parts))
        found = [Path(p) for p in glob.glob(str(path), recursive=True)]
    elif _HUB_ID.fullmatch(source):
        root, from_hub = download_dataset(source, patterns or _HUB_PATTERNS), True
        found = list(root.rglob("*"))
    else:
        raise DataError(
            f"there is no {source}: give a file, a folder, a glob or a hub id such as org/name"
        )
    wanted = [p for p in found if not patterns or _matches(p, root, patterns)]
    tables = [p for p in wanted if p.suffix in SUFFIXES and p.is_file()]
    # What `datasets` remembers of its own steps beside the rows.
    tables = [p for p in tables if not p.name.startswith(("cache-", "indices-"))]
    # A JSON file beside others describes the data set as a rule.
    tables = [p for p in tables if p.suffix != ".json"] or tables
    if not tables:
        raise DataError(
            f"{source} holds no {', '.join(SUFFIXES)} file, nor pictures with a .txt beside them: "
            "give another source"
        )
    return root, sorted(tables, key=lambda p: p.as_posix()), from_hub


def _matches(path: Path, root: Path, patterns: Sequence[str]) -> bool:
    name = path.relative_to(root).as_posix()
    return any(fnmatch(name, pattern) for pattern in patterns)


def _fingerprint(root: Path, paths: Sequence[Path]) -> str:
    """Of names, sizes, and the first and last bytes of each file: told at once, for any size."""
    digest = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{path.relative_to(root).as_posix()} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(_ENDS))
            file.seek(max(0, size - _ENDS))
            digest.update(file.read(_ENDS))
    return digest.hexdigest()


class Quarantine:
    """Counts rows that cannot be used and files each once; too large a share of them ends the run.

    `path` None files nothing. Safe to use from several threads.
    """

    def __init__(self, path: Path | None, max_broken: float) -> None:
        self.path, self._limit = path, max_broken
        self.good = self.broken = 0
        self.entries: list[dict[str, Any]] = []
        self._filed = _filed(path)
        self._lock = threading.Lock()

    def accept(self, rows: int = 1) -> None:
        with self._lock:
            self.good += rows

    def refuse(self, file: Path, row: int, reason: str) -> None:
        """File a row, numbered from 1; `DataError` where too many were refused."""
        with self._lock:
            self.broken += 1
            if (str(file), row) not in self._filed:
                self._filed.add((str(file), row))
                self._write({"file": str(file), "row": row, "reason": reason})
            check_share(self.broken, self.good, self._limit, reason)

    def _write(self, entry: dict[str, Any]) -> None:
        self.entries.append(entry)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry, ensure_ascii=False) + "\n")


def check_share(broken: int, good: int, limit: float, reason: str) -> None:
    """`DataError` where more than `limit` of at least 100 rows are broken."""
    seen = broken + good
    if seen >= 100 and broken > limit * seen:
        raise DataError(
            f"{broken:,} of {seen:,} rows are broken, the limit is {limit:.0%}: mend them (the "
            f"last one: {reason}) or raise max_broken"
        )


def _filed(path: Path | None) -> set[tuple[str, int]]:
    if path is None or not path.exists():
        return set()
    filed = set()
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
            filed.add((str(entry["file"]), int(entry["row"])))
        except (ValueError, KeyError, TypeError):
            continue  # the last line of a run that was killed
    return filed
