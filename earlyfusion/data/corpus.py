"""Opens the sources of a mixture: raw rows and token shards alike."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from earlyfusion.data.encoding import DocumentSplitter, Encoder, EncodingSettings, fingerprints
from earlyfusion.data.held_out import ValidationConfig, held_out_numbers
from earlyfusion.data.mixture import (
    Documents,
    Mixture,
    ShuffledDocuments,
    balance_answers,
    two_stages,
)
from earlyfusion.data.rows import Quarantine, Rows, RowSettings, open_rows
from earlyfusion.data.shards import TokenShards, is_shards, shards_mode
from earlyfusion.data.tables import cached_arrays
from earlyfusion.errors import SettingError
from earlyfusion.files import expanded
from earlyfusion.image_tokenizer import ImageTokenizer, Mode
from earlyfusion.processor import Modality, Processor, TokenSequence

# Documents of raw rows kept encoded, so that a small corpus is encoded once, not every epoch.
_CACHED_DOCUMENTS = 20_000


@dataclass
class CorpusConfig:
    """The sources that are read, and how they are mixed. A source is `PATH` or `PATH@WEIGHT`."""

    data: tuple[str, ...] = ()
    """Files, folders, globs, hub ids or folders of token shards."""
    added: tuple[str, ...] = ()
    """Sources that join from document `added_from` on, with half of the weight of all."""
    added_from: int = 0
    """The number of the document from which on `added` joins."""
    balance: bool = True
    """Give answers of text, of images and of both the same share of a source."""
    patterns: tuple[str, ...] = ()
    """Files of a folder or hub data set to take, such as `train/*.parquet`; none: all."""
    images: Path | None = None
    """Folder of the images; None: beside the file of the row."""
    max_broken: float = 0.1
    """Largest share of rows that may be broken, once 100 are read."""
    encoding: EncodingSettings = field(default_factory=EncodingSettings)

    def __post_init__(self) -> None:
        _ = self.rows  # checks `max_broken`

    @property
    def rows(self) -> RowSettings:
        """The settings of the reader of rows."""
        return RowSettings(self.patterns, self.images, self.max_broken)


class _EncodedDocument(NamedTuple):
    """A document in arrays: 5 bytes per token, where lists of Python's integers take over 40."""

    ids: np.ndarray
    role: np.ndarray
    spans: list[tuple[int, int, Modality]]


class RowDocuments:
    """Raw rows as documents: a `mixture.Documents`. A row is encoded when it is first needed, and
    the last `_CACHED_DOCUMENTS` stay in memory. The kinds of answers are stored in the folder
    `cache`."""

    def __init__(
        self,
        rows: Rows,
        encoder: Encoder,
        quarantine: Quarantine,
        splitter: DocumentSplitter,
        cache: Path,
    ) -> None:
        self.name, self.fingerprint = rows.name, rows.fingerprint
        self.groups, self.is_random = rows.groups, rows.is_random
        self._rows, self._encoder, self._quarantine = rows, encoder, quarantine
        self.splitter, self._cache = splitter, cache
        self._document = lru_cache(_CACHED_DOCUMENTS)(self._encode)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def last_refusal(self) -> str:
        return self._quarantine.last_reason

    def pieces(self, number: int) -> list[TokenSequence]:
        encoded = self._document(number)
        if encoded is None:
            return []
        document = TokenSequence(encoded.ids.tolist(), encoded.role.tolist(), encoded.spans)
        return self.splitter.split(number, document)

    def answer_kinds(self) -> np.ndarray:
        # Balancing needs this for every row before the first document: computed once per run.
        path = self._cache / f"{self._answers_key()}.npz"
        arrays = cached_arrays(path, lambda: {"answers": self._encoder.answer_kinds(self._rows)})
        return arrays["answers"]

    def _answers_key(self) -> str:
        """A file name that changes with the rows, and with the order of image and text in pairs."""
        settings = self._encoder.settings
        times = [table.path.stat().st_mtime_ns for table in self._rows.tables]
        key = (self.fingerprint, times, settings.pairs, settings.image_first, settings.pair_seed)
        return f"answers-{hashlib.sha256(repr(key).encode()).hexdigest()[:24]}"

    def _encode(self, number: int) -> _EncodedDocument | None:
        row = self._encoder.read(self._rows, number, self._quarantine)
        [document] = self._encoder.encode([row])
        if document is None:
            return None
        ids, role = np.array(document.ids, np.uint32), np.array(document.role, np.uint8)
        return _EncodedDocument(ids, role, document.spans)


@dataclass
class Corpus:
    """An open corpus: its stream of documents, and a count of the rows that were not used."""

    stream: Mixture
    fingerprint: str
    """A digest of everything that the stream depends on."""
    quarantine: Quarantine
    documents: list[Documents]
    """The sources of the stream."""
    resize_mode: Mode = "crop"
    """How images of prompts are made square, in all of its sources."""
    held_out: list[tuple[Documents, np.ndarray]] = field(default_factory=list)
    """Sources with the numbers of their rows that are not in the stream."""

    def report(self) -> list[str]:
        """Sentences on rows that were left out or shortened."""
        sentences = []
        if self.quarantine.broken:
            sentences.append(f"broken rows: {self.quarantine.broken:,}, see {self.quarantine.path}")
        for documents in self.documents:
            splitter = documents.splitter
            too_long = f"documents of {documents.name} too long for a row"
            if splitter.shortened:
                sentences.append(f"{too_long}: {len(splitter.shortened):,} shortened")
            if splitter.dropped:
                sentences.append(f"{too_long}: {len(splitter.dropped):,} dropped")
        return sentences


def open_corpus(
    config: CorpusConfig,
    processor: Processor,
    image_tokenizer: ImageTokenizer,
    length: int,
    run: Path,
    seed: int = 0,
    validation: ValidationConfig | None = None,
) -> Corpus:
    """Open the sources of `config` for packed rows of `length` tokens. Rows that `validation` holds
    out are not in the stream. The quarantine and the indices of files are written to the folder
    `run`. Raises `DataError` for sources that cannot be used, and `SettingError` for settings that
    are not possible."""
    _check_config(config, processor, length)
    validation = validation or ValidationConfig()
    # A source in both `data` and `added` is opened once, and gets a share of each.
    sources = list(dict.fromkeys((*config.data, *config.added)))
    paths = [_path_and_weight(source)[0] for source in sources]
    encoding = _with_shards_mode(config.encoding, [*paths, *validation.validation_data])
    encoding = encoding.for_model(image_tokenizer.mode)
    encoder = Encoder(processor, image_tokenizer, encoding)
    quarantine = Quarantine(run / "quarantine.jsonl", config.max_broken)
    digests = fingerprints(processor, image_tokenizer)

    def open_documents(path: str) -> Documents:
        # A row of `length` positions takes one more token, as the last is only a target.
        folder, splitter = expanded(path), DocumentSplitter(length + 1, processor.vocabulary)
        if is_shards(folder):
            return TokenShards(folder, digests, splitter)
        rows = open_rows(path, run / "index", config.rows)
        return RowDocuments(rows, encoder, quarantine, splitter, run / "index")

    documents = [open_documents(path) for path in paths]
    held_out = [
        (opened, held_out_numbers(len(opened), validation.validation, seed, number))
        for number, opened in enumerate(documents)
    ]
    stream = _mix(config, dict(zip(sources, held_out, strict=True)), seed)
    measured = [open_documents(path) for path in validation.validation_data]
    held_out += [(opened, np.arange(len(opened))) for opened in measured]
    digest = _digest(replace(config, encoding=encoding), documents, seed, validation.validation)
    return Corpus(stream, digest, quarantine, documents, encoding.mode, held_out)


def _mix(
    config: CorpusConfig, sources: Mapping[str, tuple[Documents, np.ndarray]], seed: int
) -> Mixture:
    """The stream of the sources, each given as its documents and the numbers of those that are held
    out."""
    shuffled: dict[str, ShuffledDocuments] = {}
    # Per source, the weights of its parts (see `_shuffle`) by their names.
    weights: dict[str, dict[str, float]] = {}
    for number, (source, (documents, held_out)) in enumerate(sources.items()):
        # By number, not by name, so that a corpus that was moved gives the same documents.
        parts = _shuffle(documents, config.balance, seed, f"source {number}", held_out)
        shuffled |= {name: part for name, (_, part) in parts.items()}
        _, weight = _path_and_weight(source)
        weights[source] = {name: weight * share for name, (share, _) in parts.items()}
    stages = two_stages(
        _weights_of(config.data, weights), _weights_of(config.added, weights), config.added_from
    )
    return Mixture(shuffled, stages, seed)


def _with_shards_mode(encoding: EncodingSettings, paths: Sequence[str]) -> EncodingSettings:
    """The settings with the resize mode of the token shards among the sources, if any. Raises
    `SettingError` if it differs from that of the settings or of other shards, as the model can have
    only one."""
    modes = {path: mode for path in paths if (mode := shards_mode(expanded(path)))}
    config_mode = encoding.resize_mode or encoding.prompt_images
    for path, mode in modes.items():
        expected = config_mode or next(iter(modes.values()))
        if mode != expected:
            raise SettingError(
                f"{path} was made with resize_mode={mode}, but the settings or other sources have "
                f"{expected}: tokenize it again, or leave resize_mode out"
            )
    return replace(encoding, resize_mode=next(iter(modes.values()), config_mode))


def _check_config(config: CorpusConfig, processor: Processor, length: int) -> None:
    """Raise `SettingError` without sources, or for rows that are too short for an image."""
    if not config.data:
        raise SettingError("data is empty: give data=PATH, or data=PATH@WEIGHT,PATH@WEIGHT")
    needed = processor.layout.num_tokens + 2
    if needed > length:
        raise SettingError(f"length={length} cannot hold an image: raise it to {needed} or more")


def _digest(
    config: CorpusConfig, documents: Sequence[Documents], seed: int, held_out: float
) -> str:
    """Digest of everything that the stream depends on."""
    settings = [config.encoding, seed, config.balance, config.added_from]
    # Left out if it is 0, so that runs from before it existed keep their digest.
    settings += [held_out] if held_out else []
    # Without names of files, as a corpus that was moved is the same.
    weights = [_path_and_weight(source)[1] for source in (*config.data, *config.added)]
    text = repr([settings, weights, [d.fingerprint for d in documents]])
    return hashlib.sha256(text.encode()).hexdigest()


def _shuffle(
    documents: Documents, balance: bool, seed: int, key: str, held_out: np.ndarray
) -> dict[str, tuple[float, ShuffledDocuments]]:
    """The parts of a source, without its held-out rows: one part per kind of answer with `balance`,
    else a single one. By name, each with its share of the source's weight."""
    numbers = np.setdiff1d(np.arange(len(documents)), held_out) if len(held_out) else None
    if balance:
        return balance_answers(documents, seed, key, numbers)
    return {key: (1.0, ShuffledDocuments(documents, seed, key, numbers))}


def _weights_of(
    sources: Sequence[str], weights: Mapping[str, dict[str, float]]
) -> dict[str, float]:
    """The weights of all parts of these sources, by the parts' names."""
    return {part: weight for source in sources for part, weight in weights[source].items()}


def _path_and_weight(source: str) -> tuple[str, float]:
    """Path and weight of a source given as `PATH` or `PATH@WEIGHT`."""
    path, at_sign, number = source.rpartition("@")
    if not at_sign:
        return source, 1.0
    try:
        weight = float(number)
    except ValueError:  # the @ belongs to the path
        return source, 1.0
    if not 0 < weight < float("inf"):
        raise SettingError(f"weight {weight} of {path} must be over 0: leave the source out")
    return path, weight
