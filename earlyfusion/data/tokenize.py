"""A corpus -> token shards, by any number of processes; see `shards` for what is written.

Every shard is a run of rows and depends on nothing else, so that it can be made anywhere, in any
order, and again after a kill: what is there is kept, what is missing is made.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from earlyfusion.checkpoints import detect as formats
from earlyfusion.checkpoints.hf import MissingVQGAN, build_vqgan
from earlyfusion.checkpoints.source import Source
from earlyfusion.data.encoding import Encoder, EncodingSettings, Read, fingerprints
from earlyfusion.data.rows import Quarantine, Rows, RowSettings, check_share, open_rows
from earlyfusion.data.shards import (
    FORMAT,
    INDEX,
    read_index,
    read_shard_note,
    shard_name,
    write_json,
    write_shard,
)
from earlyfusion.errors import DataError, SettingError
from earlyfusion.files import full_disk_reported
from earlyfusion.image_tokenizer import ImageTokenizer
from earlyfusion.processor import Processor, TokenSequence

Progress = Callable[[int, int], None]
# Rows whose pictures go through the network together.
_BATCH = 64
_CACHE = ".index"
QUARANTINE = "quarantine.jsonl"


@dataclass(frozen=True)
class Job:
    """What is tokenized, where to, and by which model: all that a process needs to know."""

    sources: tuple[str, ...]
    out: Path
    model: Path
    device: str = "cpu"
    threads: int = 0
    rows_a_shard: int = 2048
    rows: RowSettings = field(default_factory=RowSettings)
    encoding: EncodingSettings = field(default_factory=EncodingSettings)

    def __post_init__(self) -> None:
        if self.rows_a_shard < 1:
            raise SettingError(f"rows_a_shard={self.rows_a_shard} must be at least 1")


@dataclass(frozen=True)
class Summary:
    """What the finished folder holds; `forms` counts the usable rows by form."""

    path: Path
    rows: int
    documents: int
    tokens: int
    shards: int
    quarantined: int
    forms: dict[str, int]
    made_now: int


class Maker:
    """Makes shards; one in each process."""

    def __init__(self, job: Job) -> None:
        if job.threads:
            torch.set_num_threads(job.threads)
        self._job = job
        self._sources = open_sources(job)
        self._ends = _ends(self._sources)
        source = formats.open_source(job.model)
        self._processor = Processor(source.tokenizer, source.layout)
        self._image_tokenizer = load_image_tokenizer(source, job.device)
        self._encoder = Encoder(self._processor, self._image_tokenizer, job.encoding)

    @property
    def encoding(self) -> EncodingSettings:
        """The job's, with the mode that counts."""
        return self._encoder.settings

    def fingerprints(self) -> dict[str, str]:
        return fingerprints(self._processor, self._image_tokenizer)

    def make(self, shard: int) -> dict[str, Any]:
        """Write one shard; what `write_shard` says of it, with the rows that it had to refuse."""
        size = self._job.rows_a_shard
        numbers = range(shard * size, min((shard + 1) * size, self._ends[-1]))
        # The share of broken rows is judged over all shards, by the caller.
        quarantine, forms = Quarantine(None, 1.0), Counter[str]()
        documents: list[TokenSequence | None] = []
        answers: list[int] = []
        for at in range(0, len(numbers), _BATCH):
            places = [self._place(number) for number in numbers[at : at + _BATCH]]
            read = [self._encoder.read(rows, place, quarantine) for rows, place in places]
            forms.update(row.form for row in read if row is not None)
            documents += self._encoded(read)
            answers += [self._encoder.answer(rows, place) for rows, place in places]
        extra = {"forms": dict(forms), "quarantined": quarantine.entries}
        size = self._processor.vocabulary.size
        return write_shard(self._job.out, shard, documents, answers, size, extra)

    def _encoded(self, read: list[Read | None]) -> list[TokenSequence | None]:
        made = iter(self._encoder.encode([row for row in read if row is not None]))
        return [None if row is None else next(made) for row in read]

    def _place(self, number: int) -> tuple[Rows, int]:
        at = next(i for i, end in enumerate(self._ends) if number < end)
        return self._sources[at], number - (self._ends[at - 1] if at else 0)


def tokenize(
    job: Job, workers: int = 1, on_ray: bool = False, progress: Progress = lambda done, total: None
) -> Summary:
    """Make the shards of `job` that are missing; `progress` is told the rows done and all rows.

    Raises `DataError` where the folder holds another corpus, too many rows are broken, or none can
    be used, and `SettingError` where the disk is full.
    """
    if workers < 1:
        raise SettingError(f"workers={workers} must be at least 1")
    with full_disk_reported(job.out):
        made = _tokenize(job, workers, on_ray, progress)
    if not made.documents:
        raise DataError(
            f"none of the {made.rows:,} rows can be used: see {job.out / QUARANTINE}, and give "
            "others in another --out"
        )
    return made


def _tokenize(job: Job, workers: int, on_ray: bool, progress: Progress) -> Summary:
    job.out.mkdir(parents=True, exist_ok=True)
    sources = open_sources(job)
    total = sum(map(len, sources))
    maker = Maker(job)
    plan = _plan(job, sources, maker.encoding, maker.fingerprints())
    if _begin(job.out, plan):
        return _summary(job.out, made_now=0)
    shards = range(-(-total // job.rows_a_shard))
    notes = {n: note for n in shards if (note := read_shard_note(job.out, n)) is not None}
    missing = [n for n in shards if n not in notes]
    progress(_rows_done(notes), total)
    for note in _made(job, missing, workers, on_ray):
        notes[note["number"]] = note
        _check_quarantine(notes.values(), job.rows.max_broken)
        progress(_rows_done(notes), total)
    _finish(job.out, plan, [notes[n] for n in shards])
    return _summary(job.out, made_now=len(missing))


def open_sources(job: Job) -> list[Rows]:
    return [open_rows(source, job.out / _CACHE, job.rows) for source in job.sources]


def load_image_tokenizer(source: Source, device: str) -> ImageTokenizer:
    """The image tokenizer of an open checkpoint; nothing of the transformer is read."""
    config = source.config.vq_config
    tensors = {name: stored.read() for name, stored in source.vq.items()}
    vqgan = (
        build_vqgan(config, tensors, source.folder, device)
        if tensors
        else MissingVQGAN(config).to(device).eval()
    )
    return ImageTokenizer(vqgan, config.resolution, source.resize_mode)


def _made(job: Job, shards: list[int], workers: int, on_ray: bool) -> Iterator[dict[str, Any]]:
    """The shards as they are done."""
    if on_ray:
        from earlyfusion.data.cluster import make_on_ray

        yield from make_on_ray(job, shards, workers)
    elif workers == 1 or len(shards) <= 1:
        maker = Maker(job) if shards else None
        for shard in shards:
            assert maker is not None
            yield maker.make(shard)
    else:
        yield from _made_by_processes(job, shards, min(workers, len(shards)))


def _made_by_processes(job: Job, shards: list[int], workers: int) -> Iterator[dict[str, Any]]:
    context = get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_start, initargs=(job,)) as pool:
        try:
            waiting = [pool.submit(_make, shard) for shard in shards]
            for done in as_completed(waiting):
                yield done.result()
        except BrokenProcessPool:
            raise DataError(
                f"one of {workers} workers died, perhaps for want of memory: run the same command "
                "again with fewer --workers; finished shards are kept"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_maker: Maker | None = None


def _start(job: Job) -> None:
    global _maker
    _maker = Maker(job)


def _make(shard: int) -> dict[str, Any]:
    assert _maker is not None
    return _maker.make(shard)


def _plan(
    job: Job, sources: list[Rows], encoding: EncodingSettings, marks: dict[str, str]
) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "fingerprints": marks,
        "sources": [
            {"name": rows.name, "rows": len(rows), "fingerprint": rows.fingerprint}
            for rows in sources
        ],
        "rows_a_shard": job.rows_a_shard,
        "encoding": asdict(encoding),
    }


def _begin(out: Path, plan: dict[str, Any]) -> bool:
    """Write the plan, or check that it is that of the folder; whether all of it is done."""
    if not (out / INDEX).exists():
        if any(path for path in out.iterdir() if path.name != _CACHE):
            raise DataError(f"{out} is not empty and holds no token shards: choose another --out")
        write_json(out / INDEX, plan | {"complete": False})
        return False
    found = read_index(out)
    changed = [key.replace("_", " ") for key, value in plan.items() if found.get(key) != value]
    if changed:
        raise DataError(
            f"{out} holds shards with other {' and '.join(changed)}: choose another --out, or "
            "remove it"
        )
    return bool(found["complete"])


def _finish(out: Path, plan: dict[str, Any], notes: list[dict[str, Any]]) -> None:
    refused = [entry for note in notes for entry in note["quarantined"]]
    lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in refused)
    (out / QUARANTINE).write_text(lines, encoding="utf-8")
    forms = sum((Counter(note["forms"]) for note in notes), Counter[str]())
    totals = {name: sum(note[name] for note in notes) for name in ("rows", "documents", "tokens")}
    kept = ("number", "rows", "documents", "tokens", "files")
    shards = [{key: note[key] for key in kept} for note in notes]
    done = {"complete": True, **totals, "quarantined": len(refused), "forms": dict(forms)}
    write_json(out / INDEX, plan | done | {"shards": shards})
    for note in notes:
        (out / f"{shard_name(note['number'])}.json").unlink()


def _summary(out: Path, made_now: int) -> Summary:
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
    if refused:
        check_share(len(refused), good, limit, refused[-1]["reason"])


def _rows_done(notes: dict[int, dict[str, Any]]) -> int:
    return sum(note["rows"] for note in notes.values())


def _ends(sources: list[Rows]) -> list[int]:
    return list(accumulate(map(len, sources)))
