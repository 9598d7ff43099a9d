"""Parts of a long measurement, each in a separate process with a time limit: a crash, a hang or a
lack of memory ends one part only. Each row is sent to the main process as soon as it is measured,
which writes all rows so far, so that little is lost if the machine is."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal

from earlyfusion.bench.harness import Row, line, short

Status = Literal["done", "failed", "stopped", "skipped"]
Measure = Callable[[Any], Iterable[Row]]
"""From the settings of a run to the rows of a part, as they are measured."""

_MIN_SECONDS = 5.0  # with less time left, a part is skipped
_MAX_ERROR_LENGTH = 6000  # characters
_DUMP_BEFORE = 2.0  # a part still running this many seconds before its limit prints its stack


class Skipped(Exception):
    """A part cannot run here; the message is one sentence that says what is missing."""


@dataclass(frozen=True)
class Part:
    """One thing to measure; `seconds` are the most that it may take."""

    name: str
    what: str
    seconds: float
    measure: Measure


@dataclass
class Outcome:
    """The result of a part; `error` says why it is not done."""

    part: str
    status: Status = "done"
    seconds: float = 0.0
    error: str = ""
    rows: list[Row] = field(default_factory=list)

    @property
    def reason(self) -> str:
        """The most informative line of `error`: the last one of a traceback."""
        lines = self.error.strip().splitlines() or [""]
        return lines[-1 if self.status == "failed" and lines[0].startswith("Trace") else 0]


def run_parts(
    parts: Sequence[Part],
    settings: Any,
    minutes: float,
    method: str,
    log: Path,
    save: Callable[[list[Outcome]], None],
) -> list[Outcome]:
    """Run the parts in order, until `minutes` are over. Besides its own seconds, a part may take
    those that later parts do not need. `method` is how processes start: "spawn", or "fork" if no
    device is in use. Their output goes to the file `log`. `save` is called with all outcomes after
    every row."""
    end, outcomes = time.monotonic() + 60 * minutes, list[Outcome]()
    for number, part in enumerate(parts):
        outcome = Outcome(part.name)
        outcomes.append(outcome)
        remaining = end - time.monotonic()
        reserved = sum(later.seconds for later in parts[number + 1 :])
        seconds = min(remaining, max(part.seconds, remaining - reserved))
        if seconds < min(_MIN_SECONDS, part.seconds / 2):
            outcome.status, outcome.error = "skipped", "there was no time left"
        else:
            for _ in _run(part, settings, seconds, method, log, outcome):
                save(outcomes)
        save(outcomes)
        print(line_of(outcome), flush=True)
    return outcomes


def _run(
    part: Part, settings: Any, seconds: float, method: str, log: Path, outcome: Outcome
) -> Iterator[None]:
    """Run one part; yields after each of its rows."""
    context: Any = multiprocessing.get_context(method)
    receiver, sender = context.Pipe(duplex=False)
    start = time.monotonic()
    process = context.Process(target=_measure, args=(part, settings, seconds, log, sender))
    process.start()
    sender.close()
    has_status = False
    try:
        for message in _messages(receiver, start + seconds):
            if isinstance(message, Row):
                outcome.rows.append(message)
                yield
            else:
                outcome.status, outcome.error = message
                has_status = True
    finally:
        timed_out = process.is_alive() and time.monotonic() >= start + seconds
        _kill(process)
        outcome.seconds = round(time.monotonic() - start, 1)
    if not has_status:
        reason = (
            f"it took more than {seconds:.0f} s" if timed_out else _exit_reason(process.exitcode)
        )
        outcome.status = "stopped" if timed_out else "failed"
        outcome.error = f"{reason}\n{_end_of_log(log)}"


def _messages(receiver: Connection, end: float) -> Iterator[Any]:
    """The messages of a part, until it ends or its time is over."""
    while (remaining := end - time.monotonic()) > 0:
        if receiver.poll(min(remaining, 0.5)):
            try:
                yield receiver.recv()
            except EOFError:
                return


def _measure(part: Part, settings: Any, seconds: float, log: Path, sender: Connection) -> None:
    """The main function of a part's process."""
    os.setsid()  # so that it can be ended with all processes that it started
    with log.open("a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout = open(1, "w", encoding="utf-8", buffering=1, closefd=False)
    sys.stderr = open(2, "w", encoding="utf-8", buffering=1, closefd=False)
    print(f"== {part.name}", flush=True)
    if seconds > 2 * _DUMP_BEFORE:
        faulthandler.dump_traceback_later(seconds - _DUMP_BEFORE, file=sys.stderr)
    status: tuple[Status, str] = ("done", "")
    try:
        for row in part.measure(settings):
            sender.send(row)
    except Skipped as reason:
        status = "skipped", str(reason)
    except BaseException:
        text = traceback.format_exc()
        print(text, flush=True)
        status = "failed", text[-_MAX_ERROR_LENGTH:]
    sender.send(status)
    sender.close()
    sys.stdout.flush()
    os._exit(0)  # a library's clean-up at exit may hang


def _kill(process: BaseProcess) -> None:
    """Kill a part's process with all processes that it started."""
    process.join(0.2)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid or 0, signal.SIGKILL)
    if process.is_alive():
        process.kill()
    process.join(5)


def _exit_reason(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        return f"its process was ended by {signal.Signals(-exitcode).name}"
    return f"its process ended by itself with status {exitcode}"


def _end_of_log(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")[-_MAX_ERROR_LENGTH:]


def line_of(outcome: Outcome) -> str:
    """A part in a few lines: its outcome, and its rows."""
    head = f"{outcome.part}: {outcome.status}, {outcome.seconds:.0f} s"
    head += f": {outcome.reason}" if outcome.reason else ""
    return "\n".join([head, *(f"    {_row_text(row)}" for row in outcome.rows)])


def _row_text(row: Row) -> str:
    values = ", ".join(f"{name} {short(value)}" for name, value in row.values.items())
    floor = "" if row.floor is None else f"; floor {short(row.floor)}, ratio {row.ratio:.2f}"
    return f"{row.what}: {values} {row.unit}{floor}{'; ' if row.note else ''}{row.note}"


def merged_rows(outcomes: Iterable[Outcome]) -> list[Row]:
    """All rows in order; rows of several parts about the same thing become one."""
    rows: dict[tuple[str, str], Row] = {}
    for row in (row for outcome in outcomes for row in outcome.rows):
        merged = rows.setdefault((row.what, row.unit), Row(row.what, row.unit, {}))
        merged.values |= row.values
        merged.floor = row.floor if merged.floor is None else merged.floor
        merged.note = "; ".join(filter(None, dict.fromkeys([merged.note, row.note])))
    return list(rows.values())


def as_json(outcomes: Iterable[Outcome], **fields: Any) -> str:
    """All outcomes with their rows, after further fields of the caller."""
    return json.dumps(fields | {"parts": [asdict(outcome) for outcome in outcomes]}, indent=1)


def as_markdown(outcomes: Sequence[Outcome]) -> str:
    """A table of the parts' outcomes, and one of all rows."""
    lines = [line("part", "seconds", "outcome"), line("---", "---", "---")]
    for outcome in outcomes:
        words = f"{outcome.status}: {outcome.reason}" if outcome.reason else outcome.status
        lines.append(line(outcome.part, f"{outcome.seconds:.0f}", words.replace("|", "/")))
    lines += ["", line("what", "values", "floor", "ratio", "note"), line(*["---"] * 5)]
    for row in merged_rows(outcomes):
        values = ", ".join(f"{name} {short(value)}" for name, value in row.values.items())
        floor = ("", "") if row.floor is None else (short(row.floor), f"{row.ratio:.2f}")
        lines.append(line(row.what, f"{values} {row.unit}", *floor, row.note.replace("|", "/")))
    return "\n".join(lines) + "\n"
