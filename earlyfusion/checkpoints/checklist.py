"""Meta's checklist.chk: lines of md5sum beside a model's files, written, and verified once a file.

The sum of a large file is kept in the user's cache folder for as long as its size and time of
change stay: reading 14 GB takes longer than loading them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from earlyfusion.errors import CheckpointError

CHECKLIST = "checklist.chk"
_LINE = re.compile(r"([0-9a-f]{32}) [ *](\S+)")
# Smaller files are read again: that costs no time.
_KEPT_FROM = 2**24
_MAX_KEPT = 1000


def verify_checklist(folder: Path) -> None:
    """Compare the files of a folder with its checklist.chk; without one there is nothing to do.

    Raises `CheckpointError` for the first file that differs. A file that is not there, or is not
    listed, is for others to miss.
    """
    path = folder / CHECKLIST
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        found = _LINE.fullmatch(line.strip())
        file = folder / found[2] if found else None
        if found and file and file.is_file() and _known_md5(file) != found[1]:
            raise CheckpointError(
                f"{file} is not what {path.name} says: download it again, or load it as it is "
                "with --no-verify (verify=False in Python)"
            )


def write_checklist(folder: Path) -> None:
    """List the files of a folder as `md5sum -c` reads them."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    lines = [f"{_md5(path)}  {path.name}\n" for path in files]
    (folder / CHECKLIST).write_text("".join(lines), encoding="utf-8")


def _known_md5(path: Path) -> str:
    """The sum of a file, from the cache where the file has not changed since it was read."""
    state = path.stat()
    if state.st_size < _KEPT_FROM:
        return _md5(path)
    key, now = str(path.resolve()), [state.st_size, state.st_mtime_ns]
    known = _kept().get(key)
    if isinstance(known, list) and known[:2] == now and len(known) == 3:
        return str(known[2])
    found = _md5(path)
    _keep(key, [*now, found])
    return found


def _cache() -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "earlyfusion"
    return folder / "checklists.json"


def _kept() -> dict[str, Any]:
    try:
        data = json.loads(_cache().read_text(encoding="utf-8"))
    except (OSError, ValueError, RuntimeError):  # no file, no JSON, no home
        return {}
    return data if isinstance(data, dict) else {}


def _keep(key: str, entry: list[Any]) -> None:
    """Add an entry, if the cache can be written to; another process may overrule it."""
    data = _kept() | {key: entry}
    text = json.dumps(dict([*data.items()][-_MAX_KEPT:]))
    with contextlib.suppress(OSError, RuntimeError):
        part = _cache().with_name(f"checklists.{os.getpid()}.part")
        part.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text, encoding="utf-8")
        os.replace(part, _cache())


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
