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
from earlyfusion.errors import SettingError
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
    model: Path
    device: str = "cpu"
    threads: int = 0
    rows_a_shard: int = 2048
    rows: RowSettings = field(default_factory=RowSettings)
    encoding: EncodingSettings = field(default_factory=EncodingSettings)

    def __post_init__(self) -> None:
        if self.rows_a_shard < 1:
            raise SettingError(f"rows_a_shard={self.rows_a_shard} must be at least 1")


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
        """Write one shard; the note of `write_shard`, with the rows that were refused."""
        size = self._job.rows_a_shard
        numbers = range(shard * size, min((shard + 1) * size, len(self._rows)))
        # The caller judges the share of broken rows, over all shards.
        quarantine, forms = Quarantine(None, 1.0), Counter[str]()
        documents: list[TokenSequence | None] = []
        answer_kinds: list[int] = []
        for at in range(0, len(numbers), _BATCH):
            places = [self._rows.find(number) for number in numbers[at : at + _BATCH]]
            read = [self._encoder.read(self.sources[n], row, quarantine) for n, row in places]
            forms.update(row.form for row in read if row.turns is not None)
            documents += self._encoder.encode(read)
            answer_kinds += [row.answer_kind for row in read]
        extra = {"forms": dict(forms), "quarantined": quarantine.entries}
        size = self._processor.vocabulary.size
        return write_shard(self._job.out, shard, documents, answer_kinds, size, extra)


def open_sources(job: Job) -> list[Rows]:
    return [open_rows(source, job.out / INDEX_FOLDER, job.rows) for source in job.sources]


def load_image_tokenizer(source: Source, device: str) -> ImageTokenizer:
    """The image tokenizer of an open checkpoint, without reading the transformer's weights."""
    resolution = source.config.vq_config.resolution
    return ImageTokenizer(vqgan_of(source, device), resolution, source.resize_mode)
