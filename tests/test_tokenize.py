from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corpora import jsonl, pairs, png, tiny_model, tiny_vqgan
from tiny import CONFIG

from earlyfusion.checkpoints import detect
from earlyfusion.cli import main
from earlyfusion.data.corpus import CorpusConfig, open_corpus
from earlyfusion.data.encoding import DocumentSplitter, Encoder, EncodingSettings, fingerprints
from earlyfusion.data.rows import Quarantine, RowSettings
from earlyfusion.data.shard_maker import Job, ShardMaker, open_sources
from earlyfusion.data.shards import TokenShards, is_shards, read_index, write_shard
from earlyfusion.data.tokenize import tokenize
from earlyfusion.errors import DataError, SettingError
from earlyfusion.image_tokenizer import ImageTokenizer
from earlyfusion.processor import ANSWER_TEXT, CONTROL, END, Processor, TokenSequence


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs, dialogues with a text answer, an interleaved document and two broken rows."""
    folder = tmp_path_factory.mktemp("corpus")
    path = pairs(folder, 14)
    messages = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]
    (folder / "bad.png").write_bytes(png(0)[:50])
    rows = [
        {"messages": messages},
        {"texts": ["One", None, "two"], "images": [None, "3.png", None]},
        {"image": "bad.png", "caption": "broken"},
        "{",
        {"text": "Plain words."},
    ]
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text(path.read_text() + "\n".join(lines) + "\n")
    return path


def job(corpus: Path, out: Path, model: Path, **options: Any) -> Job:
    rows = RowSettings(max_broken=0.5)
    return Job((str(corpus),), out, model, rows_a_shard=4, rows=rows, **options)


def pieces(model: Path) -> tuple[Processor, ImageTokenizer]:
    loaded = detect.load(model)
    return loaded.processor, ImageTokenizer(loaded.vqgan, CONFIG.vq_config.resolution)


def shards_of(folder: Path, model: Path, limit: int = 1000) -> TokenShards:
    processor, tokenizer = pieces(model)
    return TokenShards(
        folder, fingerprints(processor, tokenizer), DocumentSplitter(limit, processor.vocabulary)
    )


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file()}


def test_shards_hold_the_documents_of_the_rows(corpus: Path, model: Path, tmp_path: Path) -> None:
    recorded = []
    result = tokenize(
        job(corpus, tmp_path / "out", model), progress=lambda *done: recorded.append(done)
    )
    assert (result.rows, result.documents, result.shards, result.quarantined) == (19, 17, 5, 2)
    assert result.forms == {"pair": 14, "messages": 1, "interleaved": 1, "text": 1}
    assert [done for done, _ in recorded] == [0, 4, 8, 12, 16, 19] and {t for _, t in recorded} == {
        19
    }
    shards = shards_of(tmp_path / "out", model)
    [rows] = open_sources(job(corpus, tmp_path / "out", model))
    encoder = Encoder(*pieces(model), EncodingSettings())
    total = 0
    for number in range(19):
        read = encoder.read(rows, number, Quarantine(None, 1.0))
        document = encoder.encode([read])[0] or TokenSequence()
        assert shards.document(number) == document
        total += len(document)
    assert total == result.tokens
    filed = (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()
    assert [json.loads(line)["row"] for line in filed] == [17, 18]


def test_training_reads_shards_and_raw_rows_alike(
    corpus: Path, model: Path, tmp_path: Path
) -> None:
    tokenize(job(corpus, tmp_path / "out", model))
    processor, tokenizer = pieces(model)
    streams = [
        open_corpus(
            CorpusConfig(data=(str(data),), max_broken=1), processor, tokenizer, 90, tmp_path / "r"
        ).stream
        for data in (corpus, tmp_path / "out")
    ]
    raw, sharded = ([stream(number) for number in range(60)] for stream in streams)
    assert raw == sharded and len({tuple(d.ids) for d in raw}) == 17


def test_processes_give_the_same_bytes_as_one(corpus: Path, model: Path, tmp_path: Path) -> None:
    tokenize(job(corpus, tmp_path / "one", model, threads=1))
    tokenize(job(corpus, tmp_path / "two", model, threads=1), workers=2)
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_what_is_there_is_kept_and_what_is_missing_is_made(
    corpus: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = job(corpus, tmp_path / "whole", model)
    tokenize(full)
    part = job(corpus, tmp_path / "part", model)
    real, count = ShardMaker.make, 0

    def until_the_power_fails(maker: ShardMaker, shard: int) -> dict[str, Any]:
        nonlocal count
        count += 1
        if count == 3:
            (part.out / ".00002.npy.1.part").write_bytes(b"half")
            raise KeyboardInterrupt
        return real(maker, shard)

    with monkeypatch.context() as patch:
        patch.setattr(ShardMaker, "make", until_the_power_fails)
        with pytest.raises(KeyboardInterrupt):
            tokenize(part)
    with pytest.raises(DataError, match="is not complete: run the same"):
        shards_of(part.out, model)
    assert tokenize(part).made_now == 3
    (part.out / ".00002.npy.1.part").unlink()
    assert files(part.out) == files(full.out)
    assert tokenize(part).made_now == 0


def _tokenize(job: Job) -> None:
    tokenize(job)


def test_a_killed_run_leaves_whole_shards(model: Path, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "t.jsonl", [{"text": f"row {n}"} for n in range(400)])
    work = job(path, tmp_path / "out", model)
    process = multiprocessing.get_context("spawn").Process(target=_tokenize, args=(work,))
    process.start()
    deadline = time.monotonic() + 90
    while len(list(work.out.glob("0*.json"))) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    kept = len(list(work.out.glob("0*.json")))
    assert 5 <= kept < 100
    assert tokenize(work).made_now == 100 - kept
    shards = shards_of(work.out, model)
    assert len(shards) == 400 and all(len(shards.document(n)) for n in range(0, 400, 37))


def test_a_folder_of_another_corpus_or_model_is_refused(
    corpus: Path, model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    tokenize(job(corpus, out, model))
    with pytest.raises(DataError, match="other rows a shard"):
        tokenize(Job((str(corpus),), out, model, rows=RowSettings(max_broken=0.5)))
    other = jsonl(tmp_path / "o.jsonl", [{"text": "x"}])
    with pytest.raises(DataError, match="other sources"):
        tokenize(job(other, out, model))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    with pytest.raises(DataError, match="is not empty"):
        tokenize(job(corpus, tmp_path / "full", model))
    processor, tokenizer = pieces(model)
    changed = tiny_vqgan()
    changed.quantize.embedding.weight[0, 0] += 1
    marks = fingerprints(processor, ImageTokenizer(changed, CONFIG.vq_config.resolution))
    splitter = DocumentSplitter(100, processor.vocabulary)
    with pytest.raises(DataError, match="another image tokenizer than this model's"):
        TokenShards(out, marks, splitter)
    with pytest.raises(DataError, match="another tokenizer"):
        TokenShards(out, fingerprints(processor, tokenizer) | {"tokenizer": "x"}, splitter)
    with pytest.raises(DataError, match="no token shards"):
        shards_of(tmp_path, model)
    assert is_shards(out) and not is_shards(tmp_path)


def test_a_decoder_of_its_own_does_not_matter_to_the_fingerprint(model: Path) -> None:
    processor, tokenizer = pieces(model)
    before = fingerprints(processor, tokenizer)
    assert tokenizer.vqgan.decoder is not None
    tokenizer.vqgan.decoder.conv_out.weight.data += 1
    assert fingerprints(processor, tokenizer) == before
    tokenizer.vqgan.encoder.conv_in.weight.data += 1
    assert fingerprints(processor, tokenizer) != before


def test_a_damaged_shard_is_detected_by_its_checksum(
    corpus: Path, model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    tokenize(job(corpus, out, model))
    data = bytearray((out / "00001.npy").read_bytes())
    data[-2] ^= 1
    (out / "00001.npy").write_bytes(data)
    shards = shards_of(out, model)
    assert len(shards.document(0))
    with pytest.raises(DataError, match=r"00001\.npy is missing or not what was written"):
        shards.document(5)


def test_too_many_broken_rows_end_it_and_a_dead_worker_is_reported(
    corpus: Path, model: Path, tmp_path: Path
) -> None:
    rows = [{"text": "x"}] * 60 + [{"y": 1}] * 60
    path = jsonl(tmp_path / "r.jsonl", rows)
    strict = Job((str(path),), tmp_path / "out", model, rows_a_shard=30)
    with pytest.raises(DataError, match=r"60 of 120 rows are broken, the limit is 10%"):
        tokenize(strict)
    with pytest.raises(SettingError, match="workers=0"):
        tokenize(strict, workers=0)


def test_large_vocabularies_fit_in(tmp_path: Path) -> None:
    document = TokenSequence([0, 70_000, 2], [CONTROL, ANSWER_TEXT, END], [(1, 2, "text")])
    small = TokenSequence([0, 65_535], [CONTROL, CONTROL])
    write_shard(tmp_path, 0, [small], [0], 2**16, {})
    assert np.load(tmp_path / "00000.npy").dtype["id"] == np.dtype("<u2")
    write_shard(tmp_path, 0, [document, None], [0, 0], 2**16 + 5000, {})
    assert np.load(tmp_path / "00000.npy")["id"].tolist() == [0, 70_000, 2]


def test_the_command(
    corpus: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["tokenize", str(corpus), "-o", str(out), "--model", str(model), "--device", "cpu"]
    assert main([*command, "--json"]) == 0
    stdout = json.loads(capsys.readouterr().out)
    assert stdout["documents"] == 17 and stdout["shards"] == 1 and stdout["path"] == str(out)
    assert read_index(out)["complete"] and stdout["forms"]["pair"] == 14
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "17 documents of 19 rows (1 interleaved, 1 messages, 14 pair, 1 text)" in printed
    assert f"2 broken rows: see {out / 'quarantine.jsonl'}" in printed


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--pattern", "*.tar"], "holds no"),
        (["--image-first", "2"], "image_first=2.0 is not a share"),
        (["--max-broken", "-1"], "max_broken=-1.0"),
        (["--workers", "0"], "workers=0"),
        (["--shard-rows", "0"], "rows_a_shard=0"),
        (["--pairs", "twins"], "twins"),
        (["--ray"], r"pip install 'earlyfusion[ray]'"),
    ],
)
def test_a_mistake_is_one_sentence(
    corpus: Path,
    model: Path,
    tmp_path: Path,
    options: list[str],
    words: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    command = ["tokenize", str(corpus.parent), "-o", str(tmp_path / "o"), "--model", str(model)]
    assert main([*command, *options]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_a_corpus_of_which_nothing_can_be_used_is_an_error(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = jsonl(tmp_path / "broken.jsonl", ["{", "{"])
    command = ["tokenize", str(broken), "-o", str(tmp_path / "out"), "--model", str(model)]
    for _ in range(2):  # again, from what is there
        assert main([*command, "--max-broken", "1"]) == 2
        assert "none of the 2 rows can be used: see" in capsys.readouterr().err.replace("\n", " ")


def test_rows_of_a_second_source_keep_their_own_numbers(model: Path, tmp_path: Path) -> None:
    first = jsonl(tmp_path / "first.jsonl", [{"text": f"First {n}."} for n in range(3)])
    rows = [{"text": "Second 0."}, "{", {"text": "Second 2."}, {"text": "Second 3."}]
    second = jsonl(tmp_path / "second.jsonl", rows)
    settings = RowSettings(max_broken=1.0)
    new_job = Job((str(first), str(second)), tmp_path / "out", model, rows_a_shard=2, rows=settings)
    tokenize(new_job)
    shards, processor = shards_of(tmp_path / "out", model), pieces(model)[0]
    read = [processor.decode_text(shards.document(n).ids).strip() for n in range(len(shards))]
    assert read == ["First 0.", "First 1.", "First 2.", "Second 0.", "", "Second 2.", "Second 3."]
    [filed] = (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()
    assert json.loads(filed)["file"] == str(second) and json.loads(filed)["row"] == 2
