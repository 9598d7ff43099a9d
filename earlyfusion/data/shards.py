"""Token shards: a corpus as tokens on disk, written once and read without images or texts.

A folder has `index.json` and, for each shard (consecutive rows), two files:

- `00000.npy`: for each token its `id` and its `mark`: the role in bits 0 to 2, bit 3 if it counts
  in the loss, bit 4 if a segment starts;
- `00000.documents.npy`: int64 [rows, 3]: first token, number of tokens, what the answers hold. A
  broken row has no tokens but keeps its number.

The index has checksums of the files, and fingerprints of the tokenizer and image tokenizer that
made them. A shard is written whole or not at all; the index is complete once all shards are there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from earlyfusion.data.encoding import DocumentSplitter
from earlyfusion.data.joined import Joined
from earlyfusion.errors import DataError
from earlyfusion.files import replacing
from earlyfusion.processor import (
    ANSWER_IMAGE,
    CONTROL,
    END,
    LEARNED,
    PROMPT_IMAGE,
    Modality,
    TokenSequence,
)

INDEX = "index.json"
FORMAT = "earlyfusion token shards, version 1"
# Bits of a mark. The role END is written as a CONTROL that counts in the loss.
_ROLE, _IN_LOSS, _STARTS_SEGMENT = 7, 8, 16
_OPEN_SHARDS = 64


def shard_name(number: int) -> str:
    return f"{number:05d}"


def write_shard(
    folder: Path,
    number: int,
    documents: Sequence[TokenSequence | None],
    answer_kinds: Sequence[int],
    vocabulary_size: int,
    extra: Mapping[str, Any],
) -> dict[str, Any]:
    """Write one shard and its note: a JSON file of its counts, its checksums and `extra`, which the
    index replaces in the end. Returns the note. The document of a broken row is None."""
    stored = [document or TokenSequence() for document in documents]
    # An empty document in front, as a shard of broken rows alone would have nothing to join.
    tokens = np.concatenate([_tokens_of(d, vocabulary_size) for d in [TokenSequence(), *stored]])
    lengths = np.array([len(d) for d in stored], np.int64)
    table = np.stack([np.cumsum(lengths) - lengths, lengths, np.asarray(answer_kinds, np.int64)], 1)
    name = shard_name(number)
    files = {f"{name}.npy": tokens, f"{name}.documents.npy": table}
    for file, array in files.items():
        _write(folder / file, partial(np.save, arr=array))
    note = {
        "number": number,
        "rows": len(stored),
        "documents": int((lengths > 0).sum()),
        "tokens": len(tokens),
        "files": {file: checksum(folder / file) for file in files},
        **extra,
    }
    write_json(folder / f"{name}.json", note)
    return note


def read_shard_note(folder: Path, number: int) -> dict[str, Any] | None:
    """The note that `write_shard` wrote; None if it or a file of the shard is missing."""
    note = _read_json(folder / f"{shard_name(number)}.json")
    files = (note or {}).get("files", {"": 0})
    return note if all((folder / file).is_file() for file in files) else None


class TokenShards:
    """The documents of a folder of shards: a `mixture.Documents`. Raises `DataError` if the folder
    is incomplete, damaged, or made for another model."""

    is_random = True
    last_refusal = ""  # broken rows are named where the shards were made

    def __init__(
        self, folder: Path, fingerprints: Mapping[str, str], splitter: DocumentSplitter
    ) -> None:
        index = read_index(folder)
        self.name, self._folder, self.splitter = str(folder), folder, splitter
        _check_index(folder, index, fingerprints)
        self._shards: list[dict[str, Any]] = index["shards"]
        self._rows = Joined(shard["rows"] for shard in self._shards)
        self.groups = [len(self)]
        self.fingerprint = hashlib.sha256(
            json.dumps([shard["files"] for shard in self._shards]).encode()
        ).hexdigest()
        self._open = lru_cache(_OPEN_SHARDS)(self._open_shard)

    def __len__(self) -> int:
        return len(self._rows)

    def document(self, number: int) -> TokenSequence:
        """The whole document `number`; without tokens if its row was broken."""
        shard, row = self._rows.find(number)
        tokens, table = self._open(shard)
        start, length, _ = table[row].tolist()
        return _document_of(tokens[start : start + length])

    def pieces(self, number: int) -> list[TokenSequence]:
        return self.splitter.split(number, self.document(number))

    def answer_kinds(self) -> np.ndarray:
        tables = [self._open(shard)[1] for shard in range(len(self._shards))]
        return np.concatenate([table[:, 2].astype(np.uint8) for table in tables])

    def _open_shard(self, shard: int) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of a shard, and its table of documents."""
        # Checked at the first read, not at opening, which must not read a large corpus whole.
        for file, expected in self._shards[shard]["files"].items():
            if not (self._folder / file).is_file() or checksum(self._folder / file) != expected:
                raise DataError(
                    f"{self._folder / file} is missing or not what was written: remove it and run "
                    "earlyfusion tokenize again"
                )
        name = self._folder / shard_name(self._shards[shard]["number"])
        # Tokens stay on disk; the table of documents is small.
        return np.load(f"{name}.npy", mmap_mode="r"), np.load(f"{name}.documents.npy")


def is_shards(folder: Path) -> bool:
    """Whether the folder holds token shards, complete or not."""
    return (_read_json(folder / INDEX) or {}).get("format") == FORMAT


def shards_mode(folder: Path) -> str:
    """The resize mode of prompts' images in a folder of shards; "" for any other folder."""
    if not is_shards(folder):
        return ""
    # Shards from before the setting was stored were made with "fit".
    return str(read_index(folder).get("encoding", {}).get("prompt_images", "fit"))


def read_index(folder: Path) -> dict[str, Any]:
    """The contents of `index.json`. Raises `DataError` if the folder holds no token shards."""
    index = _read_json(folder / INDEX)
    if index is None or index.get("format") != FORMAT:
        raise DataError(f"{folder} holds no token shards: make them with earlyfusion tokenize")
    return index


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    text = json.dumps(data, indent=1, ensure_ascii=False) + "\n"
    _write(path, lambda file: file.write(text.encode()))


def checksum(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_index(folder: Path, index: Mapping[str, Any], fingerprints: Mapping[str, str]) -> None:
    if not index.get("complete"):
        raise DataError(f"{folder} is not complete: run the same earlyfusion tokenize again")
    for name, fingerprint in fingerprints.items():
        if index["fingerprints"].get(name) != fingerprint:
            raise DataError(
                f"{folder} was made with another {name.replace('_', ' ')} than this model's: "
                "tokenize the corpus with this model"
            )


def _tokens_of(document: TokenSequence, vocabulary_size: int) -> np.ndarray:
    """A document in its stored form: `id` and `mark` per token, 3 or 5 bytes."""
    ids = np.uint16 if vocabulary_size <= 2**16 else np.uint32
    tokens = np.zeros(len(document), [("id", ids), ("mark", np.uint8)])
    role = np.array(document.role, np.uint8)
    mark = np.where(role == END, CONTROL, role)
    mark[np.isin(role, LEARNED)] |= _IN_LOSS
    mark[[start for start, _, _ in document.spans]] |= _STARTS_SEGMENT
    tokens["id"], tokens["mark"] = document.ids, mark
    return tokens


def _document_of(tokens: np.ndarray) -> TokenSequence:
    """A document from its stored form."""
    mark = np.asarray(tokens["mark"])
    role = mark & _ROLE
    starts = np.flatnonzero(mark & _STARTS_SEGMENT)
    spans = _segment_spans(role, starts)
    role[(role == CONTROL) & (mark & _IN_LOSS > 0)] = END
    return TokenSequence(tokens["id"].tolist(), role.tolist(), spans)


def _segment_spans(role: np.ndarray, starts: np.ndarray) -> list[tuple[int, int, Modality]]:
    """The segments that begin there: each ends at the next one or at the next control token."""
    edges = np.union1d(np.flatnonzero(role == CONTROL), starts).tolist()
    end_of = dict(zip(edges, [*edges, len(role)][1:], strict=True))
    modalities: dict[bool, Modality] = {True: "image", False: "text"}
    return [
        (start, end_of[start], modalities[role[start] in (PROMPT_IMAGE, ANSWER_IMAGE)])
        for start in starts.tolist()
    ]


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return data if isinstance(data, dict) else None


def _write(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file, or replace it, once all of it is on disk."""
    with replacing(path, flush=True) as partial, partial.open("wb") as file:
        write(file)
