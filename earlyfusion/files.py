"""Files and folders that are written whole or not at all.

Each is written under a hidden name in the same folder and then renamed or linked, so that a full
disk, a crash or a kill leaves nothing half written under the final name. `replacing` and
`new_folder` replace what is there. `write_whole` and `write_next` are for files that a person asked
for: they never overwrite unasked, and report disk errors as `SettingError`, one sentence with path,
reason and remedy. JSON is read here too: Python's reader silently keeps the last value of a key
that is given twice, `parse_json` refuses it.
"""

from __future__ import annotations

import errno
import glob
import json
import os
import platform
import re
import secrets
import shutil
import signal
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from hashlib import blake2b
from itertools import takewhile
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO, NoReturn

from earlyfusion.errors import CheckpointError, SettingError

Write = Callable[[BinaryIO], object]


def files_under(folder: Path) -> Iterator[Path]:
    """All files in a folder and its subfolders, in no order, without hidden ones. Links to folders
    are followed; a folder that has several paths is read under one of them."""
    visited: set[tuple[int, int]] = set()
    to_visit = [str(folder)]
    while to_visit:
        # `os.walk` does not follow links. They come last, so that a folder that is also linked is
        # read under its real path.
        for current, folders, names in os.walk(to_visit.pop(0)):
            stat = os.stat(current)
            if (stat.st_dev, stat.st_ino) in visited:
                folders.clear()  # so that `os.walk` does not enter them
                continue
            visited.add((stat.st_dev, stat.st_ino))
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            paths = [os.path.join(current, name) for name in folders]
            to_visit += [path for path in paths if os.path.islink(path)]
            yield from (Path(current, name) for name in names if not name.startswith("."))


@contextmanager
def replacing(path: Path, flush: bool = False) -> Iterator[Path]:
    """A hidden path to write to, which replaces `path` if the block succeeds. `flush` waits until
    the file is on disk, so that it survives a power cut. The folder must exist. Disk errors are
    raised as they are."""
    # The suffix comes last, so that readers looking for `*.json` do not find it.
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        yield partial
        if flush:
            flush_to_disk(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def replace_folder(partial: Path, folder: Path) -> None:
    """Give a finished folder its name; an existing one is moved aside first, then removed."""
    if not folder.exists():
        os.replace(partial, folder)
        return
    # A folder cannot be renamed onto a non-empty one.
    old = partial.with_name(f"{partial.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    os.replace(folder, old)
    os.replace(partial, folder)
    shutil.rmtree(old, ignore_errors=True)


def flush_to_disk(path: Path) -> None:
    """Wait until a file, or the list of names of a folder, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, write: Write, overwrite: bool = False) -> None:
    """Write a file with `write(file)`, creating missing folders, which are removed on failure.
    Raises `SettingError` if it cannot be written, or exists and `overwrite` is False."""
    with _written_beside(path, write) as part:
        if overwrite:
            os.replace(part, path)
        elif not _give_free_name(part, path):
            raise path_exists_error(path)


def write_next(folder: Path, stem: str, suffix: str, write: Write, first: int = 1) -> Path:
    """Write `folder/stem-N.suffix` with the next free number N, from `first` up; returns its path.
    Safe with other processes that write there: each gets a different number."""
    number = first
    with _written_beside(folder / f"{stem}{suffix}", write) as part:
        while not _give_free_name(part, path := folder / f"{stem}-{number}{suffix}"):
            number += 1
    return path


def next_number(folder: Path, stem: str, suffix: str) -> int:
    """One more than the largest number N of the files `stem-N.suffix` in a folder."""
    name = re.compile(rf"{re.escape(stem)}-(\d+){re.escape(suffix)}", re.IGNORECASE)
    try:
        matches = [name.fullmatch(entry) for entry in os.listdir(folder)]
    except OSError:
        return 1
    return max((int(match[1]) for match in matches if match), default=0) + 1


def path_exists_error(path: Path) -> SettingError:
    """The error for a path that exists and must not be replaced."""
    return SettingError(
        f"{path} is there already: choose another name, or replace it with --overwrite"
    )


def check_writable(folder: Path) -> None:
    """Raise `SettingError` unless files, or the folder itself, can be created."""
    try:
        nearest = next(p for p in (folder, *folder.absolute().parents) if p.exists())
        is_writable = nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)
    except OSError:
        is_writable = False
    if not is_writable:
        raise SettingError(
            f"{folder} cannot be made or written to: choose another folder with --out"
        )


@contextmanager
def removed_on_failure() -> Iterator[list[Path]]:
    """A list to add new files to; they are deleted if the block fails."""
    new_files: list[Path] = []
    try:
        yield new_files
    except BaseException:
        for path in new_files:
            path.unlink(missing_ok=True)
        raise


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `folder` at the end, or is removed on failure. SIGTERM
    counts as a failure. A killed process leaves a hidden folder next to `folder`; nothing takes it
    for a model, and the next call for the same `folder` removes it and says so on stderr."""
    prefix = f".{folder.name}.earlyfusion-{_machine_id()}."
    with _ended_by_sigterm(), _parents_of(folder) as parent:
        _remove_leftovers(folder, prefix)
        part = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        handle = os.open(part, os.O_RDONLY)
        try:
            _lock(handle)
            yield part
            part.chmod(0o755)
            for path in [*part.rglob("*"), part]:
                flush_to_disk(path)
            replace_folder(part, folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
            os.close(handle)


@contextmanager
def _parents_of(path: Path) -> Iterator[Path]:
    """Create the missing parents of `path`; those created are removed on failure."""
    missing = list(takewhile(lambda folder: not folder.exists(), path.absolute().parents))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield path.parent
    except BaseException:
        for folder in missing:
            with suppress(OSError):  # another process has put something there
                folder.rmdir()
        raise


def _machine_id() -> str:
    """A name for this machine, as processes and locks of others cannot be seen from here."""
    return blake2b(platform.node().encode(), digest_size=4).hexdigest()


def _lock(handle: int) -> bool:
    """Lock an open folder until this process closes it or ends; False if that is impossible."""
    if sys.platform == "win32":
        return False
    import fcntl

    with suppress(OSError):
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


def _remove_leftovers(folder: Path, prefix: str) -> None:
    """Remove hidden folders of killed runs: those with our prefix that nobody locks."""
    for leftover in folder.parent.glob(f"{glob.escape(prefix)}*"):
        # If it was killed between two renames, this is the only copy of the old folder.
        if leftover.suffix == ".old" and not folder.exists():
            continue
        with suppress(OSError):
            handle = os.open(leftover, os.O_RDONLY)
            try:
                if _lock(handle):
                    shutil.rmtree(leftover)
                    print(f"removed {leftover}, left by a run that was killed", file=sys.stderr)
            finally:
                os.close(handle)


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM raises `SystemExit`, so that every `finally` runs, unless someone else handles it."""
    is_main_thread = threading.current_thread() is threading.main_thread()
    if not is_main_thread or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def end(number: int, frame: FrameType | None) -> NoReturn:
        signal.signal(number, signal.SIG_IGN)  # a second one would interrupt the clean-up
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def _written_beside(path: Path, write: Write) -> Iterator[Path]:
    """A hidden file with the finished contents, in the folder of `path`. The block gives it its
    name; it is removed afterwards if it is still there. An `OSError`, also one of the block,
    becomes a `SettingError` about `path`."""
    part = path.with_name(f".{secrets.token_hex(8)}.part")
    try:
        with _parents_of(path):
            try:
                with part.open("xb") as file:
                    write(file)
                yield part
            finally:
                part.unlink(missing_ok=True)
    except OSError as error:
        reason = error.strerror or "the disk refuses it"
        raise SettingError(
            f"{path} cannot be written ({reason[:1].lower()}{reason[1:]}): "
            "free the disk or choose another place"
        ) from None


def _give_free_name(part: Path, path: Path) -> bool:
    """Give a finished file its name, unless the name is taken."""
    try:
        os.link(part, path)
        return True
    except FileExistsError:
        return False
    except OSError:
        return _give_free_name_without_links(part, path)


def _give_free_name_without_links(part: Path, path: Path) -> bool:
    """`_give_free_name` on a disk without hard links: take the name first, then fill the file."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    except FileExistsError:
        return False
    os.replace(part, path)
    return True


_FULL_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def full_disk_reported(folder: Path) -> Iterator[None]:
    """Turn the errors of a full disk into a `SettingError` that says how to continue."""
    try:
        yield
    except OSError as error:
        if not is_full_disk(error):
            raise
        reason = (error.strerror or "no room left").lower()
        raise SettingError(
            f"{folder} cannot be written to ({reason}): make room and run the same command again, "
            "which continues from what is there"
        ) from None


def reason_of(error: OSError) -> str:
    """The system's words for an error, such as "No space left on device"."""
    return os.strerror(error.errno) if error.errno else "the disk reports an error"


def unwritable(folder: Path, error: OSError) -> CheckpointError:
    """The error of a model folder that cannot be written."""
    return CheckpointError(
        f"{folder} cannot be written ({reason_of(error)}): free the disk or choose another folder"
    )


def is_full_disk(error: BaseException) -> bool:
    """Whether an error says that a disk or a quota is full."""
    if not isinstance(error, OSError):
        return False
    # numpy reports a short write without an errno: "N requested and M written".
    return error.errno in _FULL_DISK_ERRORS or "requested and" in str(error)


def expanded(path: str | Path) -> Path:
    """A path with its ~ replaced; that of a user who has no home folder stays as it is."""
    return Path(os.path.expanduser(path))


class DuplicateKeyError(ValueError):
    """An object has a key twice; `str(error)` says which."""


def parse_json(data: str | bytes) -> Any:
    """`json.loads`, but raises `DuplicateKeyError` for a key given twice."""
    return json.loads(data, object_pairs_hook=_unique_keys)


def read_json_object(path: Path, remedy: str) -> dict[str, Any]:
    """The object in a file of a model; `CheckpointError` if it is missing or anything else. A
    byte-order mark is skipped."""
    try:
        data = parse_json(path.read_text(encoding="utf-8-sig"))
    except DuplicateKeyError as error:
        raise CheckpointError(f"{path} is ambiguous: {error}, keep one") from None
    except (OSError, ValueError, RecursionError):
        raise CheckpointError(f"{path} is missing or not JSON: {remedy}") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} is not a JSON object: {remedy}")
    return data


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The dict of a JSON object's keys and values. Raises `DuplicateKeyError`."""
    data = dict(pairs)
    if len(data) < len(pairs):
        repeated = next(k for k, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise DuplicateKeyError(f"the key {repeated[:80]!r} is given twice")
    return data


@contextmanager
def signals_wait() -> Iterator[None]:
    """SIGINT and SIGTERM are handled only after the block. Otherwise they could raise an exception
    anywhere in it: inside another library's queue, which then may keep a lock and hang, or while a
    child process is half started, which then prints errors."""
    # Not blocked, as the system would then give them to another thread, and children inherit that.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []
    previous_handlers = {
        number: signal.signal(number, lambda n, _: received.append(n))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in previous_handlers.items():
            with suppress(TypeError):  # a handler that Python did not set
                signal.signal(number, handler)
        for received_number in received:
            signal.raise_signal(received_number)
