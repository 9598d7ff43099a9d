"""Makes one shard of a corpus: rows -> tokens -> files. Each process of `tokenize` runs this."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from earlyfusion.checkpoints import detect
from earlyfusion.checkpoints.assemble import vqgan_of
from earlyfusion.checkpoints.source import Source
from earlyfusion.data.encoding import Encoder, EncodingSettings, fingerprints
from earlyfusion.data.joined import Joined
from earlyfusion.data.rows import Quarantine, Rows, RowSettings, open_rows
from earlyfusion.data.shards import write_shard
from earlyfusion.fields import check_at_least
from earlyfusion.image_tokenizer import ImageTokenizer
from earlyfusion.processor import Processor, TokenSequence

# Rows whose images go through the network together.
_BATCH = 64
INDEX_FOLDER = ".index"


@dataclass(frozen=True)
class Job:
    """Which rows are tokenized, where to, and by which model: all that a process needs to know."""

    sources: tuple[str, ...]
    out: Path
    """Folder of the shards."""
    model: Path
    device: str = "cpu"
    threads: int = 0
    """CPU threads of each process; 0: torch's default."""
    rows_a_shard: int = 2048
    rows: RowSettings = field(default_factory=RowSettings)
    encoding: EncodingSettings = field(default_factory=EncodingSettings)

    def __post_init__(self) -> None:
        check_at_least(self, rows_a_shard=1)


class ShardMaker:
    """Makes shards of a job, in any order."""

    def __init__(self, job: Job) -> None:
        if job.threads:
            torch.set_num_threads(job.threads)
        self._job = job
        self.sources = open_sources(job)
        self._rows = Joined(map(len, self.sources))
        source = detect.open_source(job.model)
        self._processor = Processor(source.tokenizer, source.layout)
        self._image_tokenizer = load_image_tokenizer(source, job.device)
        self._encoder = Encoder(self._processor, self._image_tokenizer, job.encoding)

    @property
    def encoding(self) -> EncodingSettings:
        """The job's settings, with the resize mode filled in."""
        return self._encoder.settings

    def fingerprints(self) -> dict[str, str]:
        return fingerprints(self._processor, self._image_tokenizer)

    def make(self, shard: int) -> dict[str, Any]:
        """Write shard number `shard`. Returns the note of `write_shard`, with the counts of forms
        and the rows that went to the quarantine."""
        rows_a_shard = self._job.rows_a_shard
        numbers = range(shard * rows_a_shard, min((shard + 1) * rows_a_shard, len(self._rows)))
        # The caller checks the share of broken rows, over all shards: here any share passes.
        quarantine, forms = Quarantine(None, 1.0), Counter[str]()
        documents: list[TokenSequence | None] = []
        answer_kinds: list[int] = []
        for first in range(0, len(numbers), _BATCH):
            located = map(self._rows.find, numbers[first : first + _BATCH])  # source, row in it
            batch = [self._encoder.read(self.sources[n], row, quarantine) for n, row in located]
            forms.update(row.form for row in batch if row.turns is not None)
            documents += self._encoder.encode(batch)
            answer_kinds += [row.answer_kind for row in batch]
        extra = {"forms": dict(forms), "quarantined": quarantine.entries}
        vocabulary_size = self._processor.vocabulary.size
        return write_shard(self._job.out, shard, documents, answer_kinds, vocabulary_size, extra)


def open_sources(job: Job) -> list[Rows]:
    """The rows of each source of a job."""
    return [open_rows(source, job.out / INDEX_FOLDER, job.rows) for source in job.sources]


def load_image_tokenizer(source: Source, device: str) -> ImageTokenizer:
    """The image tokenizer of an open checkpoint, without reading the transformer's weights."""
    resolution = source.config.vq_config.resolution
    return ImageTokenizer(vqgan_of(source, device), resolution, source.resize_mode)
