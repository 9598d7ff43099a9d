"""A corpus -> token shards, by any number of processes; `shards` describes the files. A shard
depends only on its rows, so shards can be made anywhere and in any order. A repeated command only
makes the missing ones."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from earlyfusion.data.cluster import make_on_ray
from earlyfusion.data.encoding import EncodingSettings
from earlyfusion.data.rows import Rows, check_share
from earlyfusion.data.shard_maker import INDEX_FOLDER, Job, ShardMaker
from earlyfusion.data.shards import (
    FORMAT,
    INDEX,
    read_index,
    read_shard_note,
    shard_name,
    write_json,
)
from earlyfusion.errors import DataError, SettingError
from earlyfusion.files import full_disk_reported

Progress = Callable[[int, int], None]
"""Called with the number of rows done and the number of all rows."""
QUARANTINE = "quarantine.jsonl"


@dataclass(frozen=True)
class Summary:
    """Counts of the finished folder. `forms` counts the usable rows by form; `made_now` are the
    shards that this command made."""

    path: Path
    rows: int
    documents: int
    tokens: int
    shards: int
    quarantined: int
    forms: dict[str, int]
    made_now: int


def tokenize(
    job: Job, workers: int = 1, on_ray: bool = False, progress: Progress = lambda done, total: None
) -> Summary:
    """Make the missing shards of `job` with `workers` processes, or actors with `on_ray`. Raises
    `DataError` if the folder holds another corpus, too many rows are broken, or none can be used,
    and `SettingError` if the disk is full."""
    if workers < 1:
        raise SettingError(f"workers={workers} must be at least 1")
    with full_disk_reported(job.out):
        summary = _tokenize(job, workers, on_ray, progress)
    if not summary.documents:
        raise DataError(
            f"none of the {summary.rows:,} rows can be used: see {job.out / QUARANTINE}, and give "
            "others in another --out"
        )
    return summary


def _tokenize(job: Job, workers: int, on_ray: bool, progress: Progress) -> Summary:
    job.out.mkdir(parents=True, exist_ok=True)
    maker = ShardMaker(job)
    total = sum(map(len, maker.sources))
    head = _index_head(job, maker.sources, maker.encoding, maker.fingerprints())
    # The index is written before the first shard, so that another job is refused.
    if _begin(job.out, head):
        return _summary(job.out, made_now=0)
    shards = range(-(-total // job.rows_a_shard))
    notes = {n: note for n in shards if (note := read_shard_note(job.out, n)) is not None}
    missing = [n for n in shards if n not in notes]
    progress(_rows_done(notes), total)
    for note in _make_shards(job, maker, missing, workers, on_ray):
        notes[note["number"]] = note
        _check_quarantine(notes.values(), job.rows.max_broken)
        progress(_rows_done(notes), total)
    _finish(job.out, head, [notes[n] for n in shards])
    return _summary(job.out, made_now=len(missing))


def _make_shards(
    job: Job, maker: ShardMaker, shards: list[int], workers: int, on_ray: bool
) -> Iterator[dict[str, Any]]:
    """Make shards, and yield their notes in the order of completion. `maker` is used if they are
    made in this process."""
    if on_ray:
        yield from make_on_ray(job, shards, workers)
    elif workers == 1 or len(shards) <= 1:
        yield from map(maker.make, shards)
    else:
        yield from _make_in_processes(job, shards, min(workers, len(shards)))


def _make_in_processes(job: Job, shards: list[int], workers: int) -> Iterator[dict[str, Any]]:
    """The notes of shards, as processes finish them."""
    # Not by fork, which torch's threads do not survive.
    context = get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(job,)) as pool:
        try:
            # In any order: the index lists them by number at the end.
            futures = [pool.submit(_make_shard, shard) for shard in shards]
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool:
            raise DataError(
                f"one of {workers} workers died, perhaps for want of memory: run the same command "
                "again with fewer --workers; finished shards are kept"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_maker: ShardMaker | None = None  # of a worker process, which makes many shards


def _start_worker(job: Job) -> None:
    global _maker
    _maker = ShardMaker(job)


def _make_shard(shard: int) -> dict[str, Any]:
    assert _maker is not None
    return _maker.make(shard)


def _index_head(
    job: Job, sources: list[Rows], encoding: EncodingSettings, digests: dict[str, str]
) -> dict[str, Any]:
    """The head of the index: everything that the shards depend on."""
    return {
        "format": FORMAT,
        "fingerprints": digests,
        "sources": [
            {"name": rows.name, "rows": len(rows), "fingerprint": rows.fingerprint}
            for rows in sources
        ],
        "rows_a_shard": job.rows_a_shard,
        "encoding": asdict(encoding),
    }


def _begin(out: Path, head: dict[str, Any]) -> bool:
    """Begin the index, or check that it has the same head. Returns whether all shards are done."""
    if not (out / INDEX).exists():
        if any(path for path in out.iterdir() if path.name != INDEX_FOLDER):
            raise DataError(f"{out} is not empty and holds no token shards: choose another --out")
        write_json(out / INDEX, head | {"complete": False})
        return False
    index = read_index(out)
    changed = [key.replace("_", " ") for key, value in head.items() if index.get(key) != value]
    if changed:
        raise DataError(
            f"{out} holds shards with other {' and '.join(changed)}: choose another --out, or "
            "remove it"
        )
    return bool(index["complete"])


def _finish(out: Path, head: dict[str, Any], notes: list[dict[str, Any]]) -> None:
    """Write the quarantine, then the index with all shards, then remove their notes."""
    refused = [entry for note in notes for entry in note["quarantined"]]
    lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in refused)
    (out / QUARANTINE).write_text(lines, encoding="utf-8")
    forms = sum((Counter(note["forms"]) for note in notes), Counter[str]())
    totals = {name: sum(note[name] for note in notes) for name in ("rows", "documents", "tokens")}
    shard_keys = ("number", "rows", "documents", "tokens", "files")
    shards = [{key: note[key] for key in shard_keys} for note in notes]
    counts = {"complete": True, **totals, "quarantined": len(refused), "forms": dict(forms)}
    write_json(out / INDEX, head | counts | {"shards": shards})
    # Last: if killed before this, the folder is complete and only has superfluous notes.
    for note in notes:
        (out / f"{shard_name(note['number'])}.json").unlink()


def _summary(out: Path, made_now: int) -> Summary:
    """The summary of a finished folder."""
    index = read_index(out)
    return Summary(
        path=out,
        rows=index["rows"],
        documents=index["documents"],
        tokens=index["tokens"],
        shards=len(index["shards"]),
        quarantined=index["quarantined"],
        forms=index["forms"],
        made_now=made_now,
    )


def _check_quarantine(notes: Iterable[dict[str, Any]], limit: float) -> None:
    refused = [entry for note in notes for entry in note["quarantined"]]
    good = sum(note["documents"] for note in notes)
    # Over all shards so far, as a single bad file may fill one of them.
    if refused:
        check_share(len(refused), good, limit, refused[-1]["reason"])


def _rows_done(notes: dict[int, dict[str, Any]]) -> int:
    return sum(note["rows"] for note in notes.values())
