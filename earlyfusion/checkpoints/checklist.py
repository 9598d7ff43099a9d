"""Meta's checklist.chk, the md5 sums of a model's files: written, and verified once per file. The
sum of a large file is cached in the user's cache folder, with the file's size and time of change:
summing 14 GB takes longer than loading them."""

from __future__ import annotations

import hashlib
import json
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from earlyfusion.errors import CheckpointError, SettingError
from earlyfusion.files import write_whole

CHECKLIST = "checklist.chk"
_LINE = re.compile(r"([0-9a-f]{32}) [ *](\S+)")
# Smaller files are summed again each time, which is fast.
_MIN_CACHED_BYTES = 2**24
_MAX_CACHED = 1000  # entries of the cache; the oldest goes first


def verify_checklist(folder: Path) -> None:
    """Compare the files of a folder with its checklist.chk, if it has one. Raises `CheckpointError`
    for the first file that differs. Missing or unlisted files are skipped."""
    path = folder / CHECKLIST
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        match = _LINE.fullmatch(line.strip())
        file = folder / match[2] if match else None
        if match and file and file.is_file() and _cached_md5(file) != match[1]:
            raise CheckpointError(
                f"{file} is not what {path.name} says: download it again, or load it as it is "
                "with --no-verify (verify=False in Python)"
            )


def write_checklist(folder: Path) -> None:
    """List the files of a folder in the format of `md5sum -c`."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    lines = [f"{_md5(path)}  {path.name}\n" for path in files]
    (folder / CHECKLIST).write_text("".join(lines), encoding="utf-8")


def _cached_md5(path: Path) -> str:
    """The sum of a file, from the cache if the file has not changed since."""
    state = path.stat()
    if state.st_size < _MIN_CACHED_BYTES:
        return _md5(path)
    key, version = str(path.resolve()), [state.st_size, state.st_mtime_ns]
    entry = _read_cache().get(key)
    if isinstance(entry, list) and entry[:2] == version and len(entry) == 3:
        return str(entry[2])
    md5 = _md5(path)
    _write_cache(key, [*version, md5])
    return md5


def _cache_file() -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "earlyfusion"
    return folder / "checklists.json"


def _read_cache() -> dict[str, Any]:
    try:
        data = json.loads(_cache_file().read_text(encoding="utf-8"))
    except (OSError, ValueError, RuntimeError):  # no file, not JSON, no home folder
        return {}
    return data if isinstance(data, dict) else {}


def _write_cache(key: str, entry: list[Any]) -> None:
    # If two processes do this at once, one entry is lost, and its file is summed again later.
    entries = _read_cache() | {key: entry}
    text = json.dumps(dict([*entries.items()][-_MAX_CACHED:]))
    with suppress(SettingError, RuntimeError):  # not writable, no home folder
        write_whole(_cache_file(), lambda file: file.write(text.encode()), overwrite=True)


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
