"""Opening what a mixture is made of: raw rows and token shards alike."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from earlyfusion.data.encoding import Encoder, EncodingSettings, Fit, fingerprints
from earlyfusion.data.held_out import ValidationConfig, held_out_numbers
from earlyfusion.data.mixture import Documents, Mixture, Order, balanced, two_stages
from earlyfusion.data.rows import Quarantine, Rows, RowSettings, open_rows
from earlyfusion.data.shards import TokenShards, is_shards, packed, shards_mode, unpacked
from earlyfusion.errors import SettingError
from earlyfusion.image_tokenizer import ImageTokenizer, Mode
from earlyfusion.processor import Processor, TokenSequence

# Documents of raw rows that stay encoded: a small corpus is cut into codes once, not every epoch.
_KEPT_DOCUMENTS = 20_000


@dataclass
class CorpusConfig:
    """What is read, and how it is mixed. A source is `PATH` or `PATH@WEIGHT`."""

    data: tuple[str, ...] = ()
    """Files, folders, globs, hub ids or folders of token shards."""
    added: tuple[str, ...] = ()
    """Sources that join from document `added_from` on, with half of the weight of all."""
    added_from: int = 0
    balance: bool = True
    """Give answers of text, of pictures and of both the same share of a source."""
    patterns: tuple[str, ...] = ()
    images: Path | None = None
    max_broken: float = 0.1
    encoding: EncodingSettings = field(default_factory=EncodingSettings)

    def __post_init__(self) -> None:
        _ = self.rows

    @property
    def rows(self) -> RowSettings:
        return RowSettings(self.patterns, self.images, self.max_broken)


class RowDocuments:
    """Raw rows as documents, encoded when they are asked for."""

    def __init__(self, rows: Rows, encoder: Encoder, quarantine: Quarantine, fit: Fit) -> None:
        self.name, self.fingerprint = rows.name, rows.fingerprint
        self.groups, self.is_random = rows.groups, rows.is_random
        self._rows, self._encoder, self._quarantine = rows, encoder, quarantine
        self.fit = fit
        self._document = lru_cache(_KEPT_DOCUMENTS)(self._encoded)

    def __len__(self) -> int:
        return len(self._rows)

    def pieces(self, number: int) -> list[TokenSequence]:
        document = self._document(number)
        return [] if document is None else self.fit.pieces(number, unpacked(document))

    def answers(self) -> np.ndarray:
        return np.array([self._encoder.answer(self._rows, n) for n in range(len(self))], np.uint8)

    def _encoded(self, number: int) -> np.ndarray | None:
        read = self._encoder.read(self._rows, number, self._quarantine)
        if read is None:
            return None
        size = self._encoder.processor.vocabulary.size
        return packed(self._encoder.encode([read])[0], size)


@dataclass
class Corpus:
    """An open corpus: its stream of documents, and what became of its rows so far."""

    stream: Mixture
    fingerprint: str
    quarantine: Quarantine
    documents: list[Documents]
    resize_mode: Mode = "crop"
    """How pictures of prompts become squares, in all of its sources."""
    held_out: list[tuple[Documents, np.ndarray]] = field(default_factory=list)
    """Sources with the numbers of their rows that are not in the stream."""

    def report(self) -> list[str]:
        """Sentences on rows that were left out or cut."""
        said = []
        if self.quarantine.broken:
            said.append(f"broken rows: {self.quarantine.broken:,}, see {self.quarantine.path}")
        for documents in self.documents:
            for what in ("cut", "dropped"):
                count = len(getattr(documents.fit, what))
                if count:
                    said.append(
                        f"documents of {documents.name} too long for a row: {count:,} {what}"
                    )
        return said


def open_corpus(
    config: CorpusConfig,
    processor: Processor,
    image_tokenizer: ImageTokenizer,
    length: int,
    run: Path,
    seed: int = 0,
    validation: ValidationConfig | None = None,
) -> Corpus:
    """Open the sources of `config` for rows of `length` tokens.

    What `validation` holds out is not in the stream. `run` takes the quarantine and what is learned
    about the files. Raises `DataError` and `SettingError`.
    """
    _check(config, processor, length)
    quarantine = Quarantine(run / "quarantine.jsonl", config.max_broken)
    paths = [_weighted(source)[0] for source in (*config.data, *config.added)]
    paths += validation.validation_data if validation else ()
    encoding = _one_mode(config.encoding, paths).of_model(image_tokenizer.mode)
    encoder = Encoder(processor, image_tokenizer, encoding)
    marks = fingerprints(processor, image_tokenizer)

    def opened(path: str) -> Documents:
        folder, fit = Path(path).expanduser(), Fit(length + 1, processor.vocabulary)
        if is_shards(folder):
            return TokenShards(folder, marks, fit)
        rows = open_rows(path, run / "index", config.rows)
        return RowDocuments(rows, encoder, quarantine, fit)

    orders: dict[str, Order] = {}
    shares: dict[str, dict[str, float]] = {}
    documents, held_out = [], []
    watched = validation or ValidationConfig()
    for place, source in enumerate(dict.fromkeys((*config.data, *config.added))):
        path, weight = _weighted(source)
        documents.append(opened(path))
        held = held_out_numbers(len(documents[-1]), watched.validation, seed, place)
        held_out.append((documents[-1], held))
        mine = _orders(documents[-1], config.balance, seed, f"source {place}", held)
        orders |= {name: order for name, (_, order) in mine.items()}
        shares[source] = {name: weight * share for name, (share, _) in mine.items()}
    first, added = (_joined(shares, names) for names in (config.data, config.added))
    stream = Mixture(orders, two_stages(first, added, config.added_from), seed)
    for path in watched.validation_data:
        other = opened(path)
        held_out.append((other, np.arange(len(other))))
    digest = _digest(replace(config, encoding=encoding), documents, seed, watched.validation)
    return Corpus(stream, digest, quarantine, documents, encoding.mode, held_out)


def _one_mode(encoding: EncodingSettings, paths: Sequence[str]) -> EncodingSettings:
    """The settings with the mode of the token shards among the sources, where there are any.

    Raises `SettingError` where two modes would meet: the model can have one only.
    """
    modes = {path: mode for path in paths if (mode := shards_mode(Path(path).expanduser()))}
    told = encoding.resize_mode or encoding.prompt_images
    for path, mode in modes.items():
        other = told or next(iter(modes.values()))
        if mode != other:
            raise SettingError(
                f"{path} was made with resize_mode={mode}, and {other} is asked for or found in "
                "other sources: tokenize it again, or leave resize_mode out"
            )
    return replace(encoding, resize_mode=next(iter(modes.values()), told))


def _check(config: CorpusConfig, processor: Processor, length: int) -> None:
    if not config.data:
        raise SettingError("data is empty: give data=PATH, or data=PATH@WEIGHT,PATH@WEIGHT")
    needed = processor.layout.num_tokens + 2
    if needed > length:
        raise SettingError(f"length={length} cannot hold a picture: raise it to {needed} or more")


def _digest(
    config: CorpusConfig, documents: Sequence[Documents], seed: int, held_out: float
) -> str:
    """Of everything that the stream depends on."""
    ways = [config.encoding, seed, config.balance, config.added_from]
    ways += [held_out] if held_out else []
    weights = [_weighted(source)[1] for source in (*config.data, *config.added)]
    told = repr([ways, weights, [d.fingerprint for d in documents]])
    return hashlib.sha256(told.encode()).hexdigest()


def _orders(
    documents: Documents, balance: bool, seed: int, key: str, held_out: np.ndarray
) -> dict[str, tuple[float, Order]]:
    """The source without what is held out, or its parts by kind of answer, with their shares."""
    rest = np.setdiff1d(np.arange(len(documents)), held_out) if len(held_out) else None
    whole = {key: (1.0, Order(documents, seed, key, rest))}
    return balanced(documents, seed, key, rest) if balance else whole


def _joined(shares: Mapping[str, dict[str, float]], names: Sequence[str]) -> dict[str, float]:
    return {order: share for name in names for order, share in shares[name].items()}


def _weighted(source: str) -> tuple[str, float]:
    path, at, weight = source.rpartition("@")
    if not at:
        return source, 1.0
    try:
        return path, float(weight)
    except ValueError:
        return source, 1.0
