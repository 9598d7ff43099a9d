"""The folder of a run: which run it belongs to, who trains in it now, and messages about it.

`run.json` names the class of the run's config and its fields. A folder that holds anything other
than a run of that class is refused before the first step. A lock (flock on `.lock`) keeps a second
process out; the system releases it however the process ends.
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
from earlyfusion.errors import DataError, EarlyFusionError, SettingError
from earlyfusion.files import is_full_disk, replacing
from earlyfusion.train import checkpoint

try:
    import fcntl
except ImportError:  # a system without flock has no lock
    fcntl = None  # type: ignore[assignment]

NOTE, _LOCK = "run.json", ".lock"
# Files of runs from before `run.json` existed.
_OLD_RUN_FILES = ("metrics.jsonl", "data.json", "codes.npy")
# Former names of classes, in `run.json` of older runs, which can still be continued.
_FORMER_NAMES = {
    "SquaresConfig": "ImageTokenizerConfig",
    "EmojiImageTokenizerConfig": "ImageTokenizerConfig",
}
# Fields, and groups of them, that do not change the result.
_FREE_FIELDS = {
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

_locked_here: set[Path] = set()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other runs out of the folder; of several processes the first holds the lock for all.
    Raises `SettingError` with the process that holds it, or if the folder is not writable."""
    path = folder.absolute()
    if fcntl is None or path in _locked_here or processes.rank():
        yield
        return
    with _open_lock(folder) as file:
        _acquire(file, folder)
        _locked_here.add(path)
        try:
            yield
        finally:
            _locked_here.discard(path)


def _acquire(file: TextIO, folder: Path) -> None:
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
            f"out={folder} cannot be made or written to: give another folder"
        ) from None


def begin(
    folder: Path, config_class: str, fields: Mapping[str, str], holds_runs: bool = False
) -> None:
    """Write into the folder which run it belongs to, or check that it belongs to this one.
    `holds_runs`: it holds the folders of several runs. Raises `SettingError` if it holds anything
    else, or a finished run with other fields. Changed fields of a run that continues are printed.
    """
    if processes.rank():
        return
    note = None if _holds_only_note(folder) else _note(folder)
    if note is None:
        _check_is_free(folder, holds_runs)
    else:
        _compare(folder, note, config_class, fields)
    if note is None or not checkpoint.steps(folder):
        _write_note(folder, {"kind": config_class, "fields": dict(fields), "finished": False})


def end(folder: Path, fields: Mapping[str, str], finished: bool) -> None:
    """Write the fields that the run continued with, and whether it is finished."""
    note = _note(folder)
    if note is not None and not processes.rank():
        _write_note(folder, note | {"fields": dict(fields), "finished": finished})


def check_same_data(folder: Path, fingerprint: str, subject: str) -> None:
    """Refuse to continue with other data; `subject` names the data, with its verb. Raises
    `DataError`. A new run writes the fingerprint to `data.json`."""
    path = folder / "data.json"
    if checkpoint.steps(folder) and path.exists():
        if json.loads(path.read_text(encoding="utf-8"))["fingerprint"] != fingerprint:
            raise DataError(
                f"{subject} not what {folder} began with: give the same, or another out folder"
            )
    elif processes.rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"fingerprint": fingerprint}) + "\n", encoding="utf-8")


def notes_folder(folder: Path) -> Path:
    """Where a process writes about its data: a separate folder for each of several processes."""
    several = processes.count() > 1
    return folder / f"process-{processes.rank()}" if several else folder


def _was_finished(note: Mapping[str, Any] | None) -> bool:
    return bool(note and note.get("finished"))


def _holds_only_note(folder: Path) -> bool:
    """Whether a run ended there before it made anything, as with data that is not there."""
    return [path.name for path in folder.iterdir() if not path.name.startswith(".")] == [NOTE]


def _check_is_free(folder: Path, holds_runs: bool) -> None:
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    # Another process of this run may have made its folder already.
    others = [name for name in names if not re.fullmatch(r"process-\d+", name)]
    if others and not any(map(_is_run, (folder, *(folder.iterdir() if holds_runs else ())))):
        raise SettingError(
            f"out={folder} is not empty and holds no run that could continue ({others[0]} is "
            "there): give another out folder"
        )


def _is_run(folder: Path) -> bool:
    return any((folder / sign).exists() for sign in (NOTE, *_OLD_RUN_FILES)) or bool(
        checkpoint.steps(folder)
    )


def _compare(
    folder: Path, note: Mapping[str, Any], config_class: str, fields: Mapping[str, str]
) -> None:
    if note.get("kind") not in (config_class, _FORMER_NAMES.get(config_class)):
        raise SettingError(
            f"out={folder} holds a run of another kind ({note.get('kind')}, not {config_class}): "
            "give another out folder"
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
        say(f"{folder} continues from its checkpoint, now with {', '.join(changed)}")


def _is_free(name: str) -> bool:
    return name in _FREE_FIELDS or name.startswith(_FREE_GROUPS)


def _note(folder: Path) -> dict[str, Any] | None:
    try:
        note = json.loads((folder / NOTE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return note if isinstance(note, dict) else None


def _write_note(folder: Path, note: Mapping[str, Any]) -> None:
    text = json.dumps(note, indent=1, ensure_ascii=False) + "\n"
    with replacing(folder / NOTE) as path:
        path.write_text(text, encoding="utf-8")


def say(sentence: str) -> None:
    """Print to stderr, from the first process only."""
    if not processes.rank():
        print(sentence, file=sys.stderr, flush=True)


def closing_message(folder: Path, command: str, stopped: bool) -> str:
    """Where the results of a run are, and how to continue one that was `stopped`."""
    there = checkpoint.steps(folder)
    if stopped:
        reached = f"holds step {there[-1]:,}" if there else "holds no checkpoint yet"
        return f"stopped: {folder} {reached}; the same command continues from there: {command}"
    if (folder / "model").is_dir():
        where = folder / "model"
        return f"the model is in {where}; try it: earlyfusion chat --model {where}"
    return f"the newest checkpoint is step {there[-1]:,} in {folder}" if there else ""


@contextmanager
def reported_to_torchrun() -> Iterator[None]:
    """Write an error's sentence into the file that `torchrun` shows at its end."""
    try:
        yield
    except EarlyFusionError as error:
        report = os.environ.get("TORCHELASTIC_ERROR_FILE")
        if report:
            with suppress(OSError):
                Path(report).write_text(json.dumps({"message": str(error)}), encoding="utf-8")
        raise


class Terminated(SystemExit):
    """SIGTERM, with the exit code that shells give it."""

    def __init__(self) -> None:
        super().__init__(128 + signal.SIGTERM)


@contextmanager
def termination_raises() -> Iterator[None]:
    """Within the block SIGTERM raises `Terminated`, so that a run can say how to continue."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Terminated

    # With several processes the main thread may be in a collective that no signal interrupts.
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
