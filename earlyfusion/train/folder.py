"""The folder of a run: which run it belongs to, its lock, and messages about it.

`run.json` holds the class and the fields of the run's config. A folder that holds anything other
than a run with a config of that class is refused before the first step. A lock (flock on `.lock`)
keeps a second process out; the system releases it however the process ends.
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
# Class of a config -> its former name, in `run.json` of older runs, which can still be continued.
_FORMER_NAMES = {
    "SquaresConfig": "ImageTokenizerConfig",
    "EmojiImageTokenizerConfig": "ImageTokenizerConfig",
}
# Fields, and groups of fields, that do not change the result: they may differ from those of a
# finished run.
_CHANGEABLE_FIELDS = {
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
_CHANGEABLE_GROUPS = ("run.parallel.", "run.watch.")

_locked_here: set[Path] = set()  # folders whose lock this process holds


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other runs out of the folder, which is made if it is missing. Of several processes the
    first holds the lock for all. Raises `SettingError` with the process that holds it already, or
    if the folder is not writable."""
    path = folder.absolute()
    if path in _locked_here or processes.rank():
        yield
        return
    with _open_lock(folder) as file:
        if fcntl is not None:
            _acquire(file, folder)
        _locked_here.add(path)
        try:
            yield
        finally:
            _locked_here.discard(path)


def _acquire(file: TextIO, folder: Path) -> None:
    """Lock the file, and write into it which process holds the lock."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = file.read().strip() or "another process"
        raise SettingError(
            f"out={folder} is in use by {holder}: wait for it, end it, or give another out folder"
        ) from None
    except OSError:  # a file system without locks
        return
    file.seek(0)
    file.truncate()
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()


def _open_lock(folder: Path) -> TextIO:
    """The open lock file of a folder, both created if they are missing."""
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
    """Write `run.json`, or check that the one in the folder is of this run. Prints the fields that
    have changed in a run that continues.

    `holds_runs`: the folder holds the folders of several runs. Raises `SettingError` if it holds
    anything else, another kind of run, or a finished run with other fields.
    """
    if processes.rank():
        return
    # A `run.json` alone is that of a run that ended before its first step, e.g. for want of data.
    note = None if _names_in(folder) == [NOTE] else _note(folder)
    if note is None:
        _check_is_unused(folder, holds_runs)
    else:
        _compare(folder, note, config_class, fields)
    if note is None or not checkpoint.steps(folder):
        _write_note(folder, {"kind": config_class, "fields": dict(fields), "finished": False})


def end(folder: Path, fields: Mapping[str, str], finished: bool) -> None:
    """Write into `run.json` the fields that the run had last, and whether it is finished."""
    note = _note(folder)
    if note is not None and not processes.rank():
        _write_note(folder, note | {"fields": dict(fields), "finished": finished})


def check_same_data(folder: Path, fingerprint: str, subject: str) -> None:
    """Raise `DataError` if the run began with other data. `subject` names the data, with its verb
    ("the data is"). A new run writes the fingerprint of its data to `data.json`."""
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
    has_several = processes.count() > 1
    return folder / f"process-{processes.rank()}" if has_several else folder


def _names_in(folder: Path) -> list[str]:
    """Names of what is in the folder, sorted, without hidden files."""
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def _check_is_unused(folder: Path, holds_runs: bool) -> None:
    """Raise `SettingError` if the folder holds anything but a run without a `run.json`."""
    # Another process of this run may have made its folder already.
    names = [name for name in _names_in(folder) if not re.fullmatch(r"process-\d+", name)]
    if names and not any(map(_is_run, (folder, *(folder.iterdir() if holds_runs else ())))):
        raise SettingError(
            f"out={folder} is not empty and holds no run that could continue ({names[0]} is "
            "there): give another out folder"
        )


def _is_run(folder: Path) -> bool:
    has_run_file = any((folder / name).exists() for name in (NOTE, *_OLD_RUN_FILES))
    return has_run_file or bool(checkpoint.steps(folder))


def _compare(
    folder: Path, note: Mapping[str, Any], config_class: str, fields: Mapping[str, str]
) -> None:
    """Raise `SettingError` if the run of `note` cannot be continued with these fields; print those
    that changed."""
    if note.get("kind") not in (config_class, _FORMER_NAMES.get(config_class)):
        raise SettingError(
            f"out={folder} holds a run of another kind ({note.get('kind')}, not {config_class}): "
            "give another out folder"
        )
    old_fields = note.get("fields", {})
    changed = [
        f"{name}={value} (it was {old_fields[name]})"
        for name, value in fields.items()
        if old_fields.get(name, value) != value and not _is_changeable(name)
    ]
    if changed and note.get("finished"):
        raise SettingError(
            f"out={folder} holds a finished run, and nothing is left to do there with "
            f"{', '.join(changed)}: give another out folder"
        )
    if changed and checkpoint.steps(folder):
        say(f"{folder} continues from its checkpoint, now with {', '.join(changed)}")


def _is_changeable(name: str) -> bool:
    return name in _CHANGEABLE_FIELDS or name.startswith(_CHANGEABLE_GROUPS)


def _note(folder: Path) -> dict[str, Any] | None:
    """The contents of `run.json`; None if it is missing or damaged."""
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
    """A sentence: where the results of a run are, or how to continue one that was `stopped`; "" if
    it has none."""
    steps = checkpoint.steps(folder)
    if stopped:
        reached = f"holds step {steps[-1]:,}" if steps else "holds no checkpoint yet"
        return f"stopped: {folder} {reached}; the same command continues from there: {command}"
    model = folder / "model"
    if model.is_dir():
        return f"the model is in {model}; try it: earlyfusion chat --model {model}"
    return f"the newest checkpoint is step {steps[-1]:,} in {folder}" if steps else ""


@contextmanager
def reported_to_torchrun() -> Iterator[None]:
    """If the block raises an error of ours, write its sentence into the file that `torchrun` shows
    when it ends."""
    try:
        yield
    except EarlyFusionError as error:
        report = os.environ.get("TORCHELASTIC_ERROR_FILE")
        if report:
            with suppress(OSError):
                Path(report).write_text(json.dumps({"message": str(error)}), encoding="utf-8")
        raise


class Terminated(SystemExit):
    """Raised on SIGTERM; has the exit code that shells give it."""

    def __init__(self) -> None:
        super().__init__(128 + signal.SIGTERM)


@contextmanager
def termination_raises() -> Iterator[None]:
    """Within the block, SIGTERM raises `Terminated`, so that a run can say how to continue."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Terminated

    # With several processes the main thread may be in a collective that no signal interrupts.
    has_several = processes.count() > 1
    if has_several or threading.current_thread() is not threading.main_thread():
        yield
        return
    previous_handler = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        with suppress(TypeError):  # a handler that Python did not set
            signal.signal(signal.SIGTERM, previous_handler)
