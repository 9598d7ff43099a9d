"""The folder of a run: whose it is, who trains in it now, and what a person is told of it.

`run.json` names the kind of the run and its fields. A folder that holds anything else than a run of
that kind is refused before a step is taken. A lock (flock on `.lock`) keeps a second process out;
the system releases it with the process, however that ends.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from earlyfusion import processes
from earlyfusion.errors import EarlyFusionError, SettingError
from earlyfusion.files import is_full_disk
from earlyfusion.train import checkpoint

try:
    import fcntl
except ImportError:  # a system without flock has no lock
    fcntl = None  # type: ignore[assignment]

NOTE, _LOCK = "run.json", ".lock"
# What runs leave that were begun before there was a note.
_SIGNS = ("metrics.jsonl", "data.json", "codes.npy")
# Fields that change nothing of what is learned, and whole groups of them.
_FREE = {
    "run.out",
    "run.device",
    "run.compile",
    "run.save_every",
    "run.save_beside",
    "run.keep",
    "run.log_every",
    "run.stop_after",
    "run.sample_every",
    "run.wandb",
    "run.peak_tflops",
    "workers",
    "micro_rows",
    "prompts",
    "merge",
}
_FREE_GROUPS = ("run.parallel.", "run.watch.")

_held: set[Path] = set()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep the folder to this process; of several the first holds it for all.

    Raises `SettingError` that names the process which has it, or where nothing can be written.
    """
    own = folder.absolute()
    if fcntl is None or own in _held or processes.rank():
        yield
        return
    with _open_lock(folder) as file:
        _take(file, folder)
        _held.add(own)
        try:
            yield
        finally:
            _held.discard(own)


def _take(file: TextIO, folder: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        who = file.read().strip() or "another process"
        raise SettingError(
            f"out={folder} is being trained in by {who}: wait for it, end it, or give another out "
            "folder"
        ) from None
    except OSError:  # a file system without locks
        return
    file.seek(0)
    file.truncate()
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()


def _open_lock(folder: Path) -> TextIO:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _LOCK).touch()
        return (folder / _LOCK).open("r+", encoding="utf-8")
    except OSError as error:
        if is_full_disk(error):
            raise
        raise SettingError(
            f"out={folder} is no folder that can be written to: give another"
        ) from None


def begin(folder: Path, kind: str, fields: Mapping[str, str], of_runs: bool = False) -> None:
    """Make the folder that of a run of `kind`, or find that it is; `of_runs`: of several, inside.

    Raises `SettingError` where it holds anything else, or a finished run of other fields. Of a run
    that goes on with other fields a sentence is said.
    """
    if processes.rank():
        return
    note = _note(folder)
    if note is None:
        _check_is_free(folder, of_runs)
    else:
        _compare(folder, note, kind, fields)
    if note is None or not checkpoint.steps(folder):
        _write_note(folder, {"kind": kind, "fields": dict(fields), "finished": False})


def end(folder: Path, fields: Mapping[str, str], finished: bool) -> None:
    """Note with which fields it went on, and whether nothing is left to train."""
    note = _note(folder)
    if note is not None and not processes.rank():
        _write_note(folder, note | {"fields": dict(fields), "finished": finished})


def _was_finished(note: Mapping[str, Any] | None) -> bool:
    return bool(note and note.get("finished"))


def _check_is_free(folder: Path, of_runs: bool) -> None:
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    # Of several processes another may have been quicker.
    others = [name for name in names if not re.fullmatch(r"process-\d+", name)]
    if others and not any(map(_is_run, (folder, *(folder.iterdir() if of_runs else ())))):
        raise SettingError(
            f"out={folder} is not empty and holds no run that could go on ({others[0]} is there): "
            "give another out folder"
        )


def _is_run(folder: Path) -> bool:
    return any((folder / sign).exists() for sign in (NOTE, *_SIGNS)) or bool(
        checkpoint.steps(folder)
    )


def _compare(folder: Path, note: Mapping[str, Any], kind: str, fields: Mapping[str, str]) -> None:
    if note.get("kind") != kind:
        raise SettingError(
            f"out={folder} holds a run of another kind ({note.get('kind')}, not {kind}): give "
            "another out folder"
        )
    before = note.get("fields", {})
    changed = [
        f"{name}={value} (it was {before[name]})"
        for name, value in fields.items()
        if before.get(name, value) != value and not _is_free(name)
    ]
    if changed and _was_finished(note):
        raise SettingError(
            f"out={folder} holds a finished run, and nothing is left to do there with "
            f"{', '.join(changed)}: give another out folder"
        )
    if changed and checkpoint.steps(folder):
        say(f"{folder} goes on from its checkpoint, now with {', '.join(changed)}")


def _is_free(name: str) -> bool:
    return name in _FREE or name.startswith(_FREE_GROUPS)


def _note(folder: Path) -> dict[str, Any] | None:
    try:
        note = json.loads((folder / NOTE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return note if isinstance(note, dict) else None


def _write_note(folder: Path, note: Mapping[str, Any]) -> None:
    part = folder / f".{NOTE}.part"
    part.write_text(json.dumps(note, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(part, folder / NOTE)


def say(sentence: str) -> None:
    """Tell a person, once where there are several processes."""
    if not processes.rank():
        print(sentence, file=sys.stderr, flush=True)


def farewell(folder: Path, command: str, stopped: bool) -> str:
    """Where the results lie and how to go on, of a run that ended or was `stopped`."""
    there = checkpoint.steps(folder)
    if stopped:
        reached = f"holds step {there[-1]:,}" if there else "holds no checkpoint yet"
        return f"stopped: {folder} {reached}; the same command goes on from there: {command}"
    if (folder / "model").is_dir():
        where = folder / "model"
        return f"the model lies in {where}; try it: earlyfusion chat --model {where}"
    return f"the newest checkpoint is step {there[-1]:,} in {folder}" if there else ""


@contextmanager
def told_to_torchrun() -> Iterator[None]:
    """Put the sentence of a mistake where `torchrun` finds it: its own report ends with that."""
    try:
        yield
    except EarlyFusionError as error:
        report = os.environ.get("TORCHELASTIC_ERROR_FILE")
        if report:
            with suppress(OSError):
                Path(report).write_text(json.dumps({"message": str(error)}), encoding="utf-8")
        raise


class Terminated(SystemExit):
    """SIGTERM, with the exit code that shells give to it."""

    def __init__(self) -> None:
        super().__init__(128 + signal.SIGTERM)


@contextmanager
def termination_raises() -> Iterator[None]:
    """SIGTERM raises `Terminated` within, so that a run can say how to go on."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Terminated

    # Several processes may wait for one another in what no signal wakes them from.
    several = processes.count() > 1
    if several or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        with suppress(TypeError):  # a handler that Python did not set
            signal.signal(signal.SIGTERM, before)
