"""Many requests from a file of JSON lines, answered in batches; a stopped run can be continued.

A line is an object: "prompt" (a text, parts, or messages), and optionally "id", "images" (for the
<image> placeholders of a prompt that is a text), "output" and any field of SamplingParams. All that
can be checked without opening an image or the model is checked before the first request. A request
that fails later becomes a line of errors.jsonl, and the next run tries it again. Replies become
lines of replies.jsonl in the order in which they finish. A reply's images are written before its
line, so that a killed run leaves no line without its images.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from hashlib import blake2b
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, get_args

from earlyfusion.content import (
    Message,
    Part,
    Text,
    as_messages,
    insert_images,
    read_parts,
    read_turns,
)
from earlyfusion.errors import EarlyFusionError, PromptError, SettingError
from earlyfusion.files import DuplicateKeyError, parse_json, write_whole
from earlyfusion.generation.settings import Output, SamplingParams
from earlyfusion.terminal import png_writer, reply_json

if TYPE_CHECKING:
    from earlyfusion.api import Chameleon, Reply
    from earlyfusion.engine.handle import Handle

# The fields of SamplingParams, without those that JSON cannot express or that a reply's line does
# not show.
_SETTINGS = {field.name for field in fields(SamplingParams)} - {"logprobs", "logits_processors"}
_KEYS = {"id", "prompt", "images", "output"} | _SETTINGS


@dataclass(frozen=True)
class Job:
    """One line of the file. `digest` identifies the prompt with all settings and the model."""

    line: int
    id: str | int
    turns: list[tuple[Any, list[Part]]]
    output: Output
    sampling: SamplingParams
    digest: str

    @property
    def messages(self) -> list[Message]:
        """The turns with their images opened. Raises `ImageError`."""
        return [Message(role, parts) for role, parts in self.turns]


def read_jobs(path: Path, output: Output, sampling: Mapping[str, Any], model: str) -> list[Job]:
    """The jobs of a file. `output` and `sampling` are the defaults of lines; with a seed in
    `sampling`, that of job number i, from 0, is `seed + i`. `model` becomes part of the digests.
    Raises an `EarlyFusionError` that names the line."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError):
        raise PromptError(
            f"{path} cannot be read: give a text file in UTF-8 with one JSON object per line"
        ) from None
    jobs: dict[str, Job] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            defaults = _with_seed(sampling, len(jobs))
            job = _parse_job(number, line, path.parent, output, defaults, model)
            if str(job.id) in jobs:
                first_line = jobs[str(job.id)].line
                raise PromptError(
                    f"its id {job.id!r} is also that of line {first_line}: give each its own"
                )
        except EarlyFusionError as error:
            raise type(error)(f"{path} line {number}: {error}") from None
        jobs[str(job.id)] = job
    if not jobs:
        raise PromptError(f"{path} holds no request: give one JSON object per line")
    return list(jobs.values())


def _with_seed(sampling: Mapping[str, Any], number: int) -> dict[str, Any]:
    """The settings with the seed of job number `number`."""
    seed = sampling.get("seed")
    return dict(sampling) | {"seed": None if seed is None else seed + number}


def _parse_job(
    number: int, line: str, folder: Path, output: Output, defaults: dict[str, Any], model: str
) -> Job:
    """The job of a line; raises an `EarlyFusionError` that does not name the line."""
    entry = _parse_line(line)
    job_id, job_output = entry.get("id", number), entry.get("output", output)
    if isinstance(job_id, bool) or not isinstance(job_id, str | int):
        raise PromptError("its id is neither a text nor a whole number: give one, or leave it out")
    if job_output not in get_args(Output):
        raise SettingError.unknown("output", job_output, get_args(Output))
    settings = defaults | {key: value for key, value in entry.items() if key in _SETTINGS}
    content = json.dumps([entry, job_id, job_output, settings, model], sort_keys=True)
    turns = _parse_turns(entry, folder)
    _check_turns(turns)
    digest = blake2b(content.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
    return Job(number, job_id, turns, job_output, SamplingParams(**settings), digest)


def _parse_line(line: str) -> dict[str, Any]:
    """The object of a line. Raises an `EarlyFusionError` for anything else or an unknown field."""
    try:
        entry = parse_json(line)
    except DuplicateKeyError as error:
        raise PromptError(f"{error}: keep one") from None
    except (ValueError, RecursionError):
        entry = None
    if not isinstance(entry, dict):
        raise PromptError('it is not a JSON object: give one such as {"prompt": "Draw a cat."}')
    for key in entry:
        if key not in _KEYS:
            similar = get_close_matches(key, _KEYS, 1) or [", ".join(sorted(_KEYS))]
            raise SettingError(f"its field {key!r} is unknown: use {similar[0]}")
    if "prompt" not in entry:
        raise PromptError("it has no prompt: give a text, a list of parts or a list of messages")
    return entry


def _parse_turns(entry: dict[str, Any], folder: Path) -> list[tuple[Any, list[Part]]]:
    """The role and the parts of each turn of a line's prompt; images are paths."""
    prompt, images = entry["prompt"], entry.get("images", [])
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise PromptError("its images are not a list of paths: give a list, even of one")
    if isinstance(prompt, str):
        return [("user", list(insert_images(prompt, [folder / image for image in images])))]
    if images:
        raise PromptError("its images have no place: only a prompt that is a text takes them")
    if isinstance(prompt, list) and any(isinstance(p, dict) and "role" in p for p in prompt):
        return list(read_turns(prompt, folder))
    return [("user", read_parts(prompt, folder))]


def _check_turns(turns: Sequence[tuple[Any, list[Part]]]) -> None:
    """Raise `PromptError` for what cannot be a prompt. Images are not opened: a text replaces
    each."""
    for path in (part for _, parts in turns for part in parts if isinstance(part, Path)):
        if not os.path.isfile(path):
            raise PromptError(
                f"there is no file {path}: paths are relative to the folder of the requests"
            )
    as_messages(
        [
            Message(role, [p if isinstance(p, str | Text) else Text("image") for p in parts])
            for role, parts in turns
        ]
    )


class Replies:
    """The folder of a batch: replies.jsonl, errors.jsonl and pictures/; locked by one process.
    Raises `SettingError` for a folder with other content, or one that another process writes to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._path, self._errors = folder / "replies.jsonl", list[dict[str, Any]]()

    def __enter__(self) -> Replies:
        try:
            if not self._path.exists() and self.folder.exists() and any(self.folder.iterdir()):
                raise SettingError(
                    f"{self.folder} holds other things: choose a new folder with --out"
                )
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("a+b")
        except OSError:
            raise SettingError(
                f"{self.folder} is not a folder that can be written to: choose another with --out"
            ) from None
        try:
            # The lock ends with the process, so a killed run blocks nobody.
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise SettingError(
                f"{self.folder} is being written to by another batch: wait for it, or choose "
                "another folder with --out"
            ) from None
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def remaining(self, jobs: Sequence[Job]) -> list[Job]:
        """The jobs without a reply. Removes an unfinished line of a killed run. Raises
        `SettingError` if the folder holds replies to other requests."""
        self._file.seek(0)
        data = self._file.read()
        complete = data[: data.rfind(b"\n") + 1]  # without an incomplete last line
        digests = dict(map(self._read_digest, complete.splitlines()))
        for job in jobs:
            if digests.get(str(job.id), job.digest) != job.digest:
                raise SettingError(
                    f"{self.folder} holds the reply to another request of id {job.id!r}, or "
                    "to one with other options: choose a new folder with --out"
                )
        if len(complete) < len(data):
            self._file.truncate(len(complete))
        return [job for job in jobs if str(job.id) not in digests]

    def _read_digest(self, line: bytes) -> tuple[str, str]:
        """The id and the digest of the job that a line of replies.jsonl answers."""
        try:
            reply = json.loads(line)
            return str(reply["id"]), str(reply["request"])
        except (ValueError, KeyError, TypeError):
            raise SettingError(
                f"{self._path} is not a file of replies: choose a new folder with --out"
            ) from None

    def add(self, job: Job, reply: Reply, seed: int | None) -> None:
        """Write a reply. Raises `SettingError` on a full disk."""
        names: dict[int, str] = {}
        for number, image in enumerate(reply.message.images, 1):
            name = f"pictures/{job.line:05}-{job.digest[:8]}-{number}.png"
            # An existing file of this name is from a run that was killed before it wrote the line.
            write_whole(self.folder / name, png_writer(image), overwrite=True)
            names[id(image)] = name
        row = {"id": job.id, "request": job.digest, "output": job.output, "seed": seed}
        row |= reply_json(reply, lambda image: names[id(image)])
        try:
            self._file.write(_to_json_line(row))
            self._file.flush()
        except OSError:
            raise SettingError(
                f"{self._path} cannot be written: free the disk and run the same command again"
            ) from None

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def add_error(self, job: Job, error: EarlyFusionError) -> None:
        """Note a failed job for errors.jsonl."""
        self._errors.append({"id": job.id, "line": job.line, "error": str(error)})

    def close(self) -> None:
        """Write errors.jsonl; if there are no errors, delete the file of an earlier run."""
        path = self.folder / "errors.jsonl"
        if self._errors:
            text = b"".join(map(_to_json_line, self._errors))
            write_whole(path, lambda file: file.write(text), overwrite=True)
        else:
            path.unlink(missing_ok=True)


def _to_json_line(data: dict[str, Any]) -> bytes:
    # A lone surrogate has no bytes in UTF-8.
    return (json.dumps(data, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def answer_all(
    chameleon: Chameleon, jobs: Sequence[Job], replies: Replies, progress: Callable[[], object]
) -> None:
    """Answer all jobs, as many at a time as the engine runs; calls `progress` after each."""
    waiting = deque(jobs)
    running: list[tuple[Job, Handle]] = []
    try:
        while waiting or running:
            while waiting and len(running) < chameleon.engine.most_running:
                _start(chameleon, waiting.popleft(), running, replies, progress)
            # A request whose tokens are all determined by its constraints finishes without a step.
            if running and not any(handle.finished for _, handle in running):
                chameleon.engine.step()
            for job, handle in [pair for pair in running if pair[1].finished]:
                running.remove((job, handle))
                _finish(chameleon, job, handle, replies)
                progress()
    finally:
        for _, handle in running:
            handle.cancel()
        replies.close()


def _start(
    chameleon: Chameleon,
    job: Job,
    running: list[tuple[Job, Handle]],
    replies: Replies,
    progress: Callable[[], object],
) -> None:
    """Start a job, or note its error."""
    try:
        request = chameleon.request(job.messages, job.output, job.sampling)
        running.append((job, chameleon.engine.add(request)))
    except EarlyFusionError as error:
        replies.add_error(job, error)
        progress()


def _finish(chameleon: Chameleon, job: Job, handle: Handle, replies: Replies) -> None:
    """Write the reply of a finished job, or note its error."""
    try:
        reply = chameleon.collect(handle)
    except EarlyFusionError as error:
        replies.add_error(job, error)
    else:
        replies.add(job, reply, handle.request.sampling.seed)
