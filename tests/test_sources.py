from __future__ import annotations

import csv
import io
import itertools
import json
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from corpora import jsonl, pairs, png, tar, tiny_encoder, tiny_vqgan
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import CONFIG, tiny_processor

from earlyfusion.checkpoints.hub import download_dataset, is_hub_id
from earlyfusion.content import Text
from earlyfusion.data import tables
from earlyfusion.data.corpus import CorpusConfig, open_corpus
from earlyfusion.data.encoding import DocumentSplitter, Encoder, EncodingSettings
from earlyfusion.data.forms import BOTH, IMAGE, TEXT, ImageRef, example_of, form_of
from earlyfusion.data.joined import Joined
from earlyfusion.data.mixture import (
    PrefetchedStream,
    Schedule,
    ShuffledDocuments,
    Stage,
    balance_answers,
    permuted_index,
    two_stages,
)
from earlyfusion.data.packing import Packer, RoleWeights
from earlyfusion.data.rows import Quarantine, RowSettings, find_files, open_rows
from earlyfusion.errors import DataError, SettingError
from earlyfusion.image_tokenizer import ImageTokenizer
from earlyfusion.processor import (
    ANSWER_IMAGE,
    ANSWER_TEXT,
    END,
    PROMPT_IMAGE,
    PROMPT_TEXT,
    Processor,
    TokenSequence,
)


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Processor:
    return tiny_processor(tmp_path_factory.mktemp("tokenizer"))


def opened_rows(source: Path, cache: Path) -> list[Any]:
    """Every row of a source, or why it is broken."""
    rows, results = open_rows(str(source), cache, RowSettings()), []
    for number in range(len(rows)):
        table, place = rows.find(number)
        try:
            results.append(table.row(place))
        except DataError as error:
            results.append(str(error))
    return results


@pytest.mark.parametrize(("suffix", "mark"), [("csv", ","), ("tsv", "\t")])
def test_rows_of_columns(tmp_path: Path, suffix: str, mark: str) -> None:
    messages = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello, you."}]
    rows = [
        ["image", "text", "messages"],
        ["1.png", 'a "red" pear,\non two lines', ""],
        ["2.png", "사과", ""],
        ["", "", json.dumps(messages)],
        ["", "[no list]", ""],
        ["3.png", "x" * 200_000, ""],
    ]
    with io.StringIO(newline="") as file:
        csv.writer(file, delimiter=mark).writerows(rows)
        text = file.getvalue()
    path = tmp_path / f"rows.{suffix}"
    path.write_bytes(("\ufeff" + text + "only one\r\n").encode())
    result = opened_rows(path, tmp_path / "cache")
    assert result[0] == {"image": "1.png", "text": 'a "red" pear,\non two lines'}
    assert result[1] == {"image": "2.png", "text": "사과"}
    assert result[2] == {"messages": messages} and result[3] == {"text": "[no list]"}
    assert len(result[4]["text"]) == 200_000
    assert len(result) == 6 and "1 cells and the first row 3" in result[5]
    assert opened_rows(path, tmp_path / "cache") == result  # from the index


def test_ambiguous_columns_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    for data in (b'text\n"never closed\n', "text\n사과\n".encode("cp949")):
        path.write_bytes(data)
        with pytest.raises(DataError, match="cannot be read after 0 rows"):
            opened_rows(path, tmp_path / "cache")
    for name, mark in (("rows.csv", ","), ("rows.tsv", "\t")):
        file = tmp_path / name
        file.write_text(mark.join(["text", "image", "text"]) + "\n" + mark.join("abc") + "\n")
        with pytest.raises(DataError, match=rf"{name} has the column 'text' twice: rename"):
            opened_rows(file, tmp_path / "cache")
    path.write_text("text,image,,\na,b,,\n")  # as spreadsheets fill up rows
    assert opened_rows(path, tmp_path / "cache") == [{"text": "a", "image": "b"}]
    path.write_text("text\n")
    with pytest.raises(DataError, match="holds no rows"):
        opened_rows(path, tmp_path / "cache")


def test_a_folder_of_images_with_texts_beside_them(tmp_path: Path) -> None:
    folder = tmp_path / "pears"
    (folder / "deep").mkdir(parents=True)
    for number, name in enumerate(("b.png", "a.PNG", "deep/c.png", "lonely.png")):
        (folder / name).write_bytes(png(number))
        if name != "lonely.png":
            (folder / name).with_suffix(".txt").write_text(f"Pear {name}\n", encoding="utf-8")
    rows = opened_rows(folder, tmp_path / "cache")
    assert rows[:3] == [{"image": n, "text": f"Pear {n}"} for n in ("a.PNG", "b.png", "deep/c.png")]
    assert rows[3].startswith("lonely.txt is missing beside lonely.png")
    opened = open_rows(str(folder), tmp_path / "cache", RowSettings())
    table, _ = opened.find(2)
    assert table.read(rows[2], "deep/c.png") == png(2)
    (folder / "b.txt").write_text("Another pear")
    changed = open_rows(str(folder), tmp_path / "cache", RowSettings())
    assert changed.fingerprint != opened.fingerprint
    (folder / "gone.png").symlink_to("nowhere")
    (folder / "gone.txt").write_text("Gone")
    table, at = open_rows(str(folder), tmp_path / "cache", RowSettings()).find(3)
    with pytest.raises(DataError, match=r"gone\.png is not in"):
        table.read(table.row(at), "gone.png")
    for text in folder.rglob("*.txt"):
        text.unlink()
    with pytest.raises(DataError, match=r"nor images with a \.txt beside"):
        opened_rows(folder, tmp_path / "cache")


def test_folders_that_datasets_saved(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    images = [PIL.Image.open(io.BytesIO(png(n))) for n in range(3)]
    columns = {"image": images, "text": [f"pear {n}" for n in range(3)]}
    dataset = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    dataset = dataset.select([2, 0, 1])
    dataset.save_to_disk(str(tmp_path / "one"), num_shards=2)
    datasets.DatasetDict({"train": dataset}).save_to_disk(str(tmp_path / "many"))
    (tmp_path / "one" / "cache-0123.arrow").write_bytes(b"of a step of datasets")
    for name in ("one", "many"):
        rows = opened_rows(tmp_path / name, tmp_path / "cache")
        assert [row["text"] for row in rows] == ["pear 2", "pear 0", "pear 1"]
        pixels = np.asarray(PIL.Image.open(io.BytesIO(rows[1]["image"]["bytes"])))
        assert (pixels == np.asarray(images[0])).all()
        assert example_of(rows[0], image_first=True).form == "pair"
    (tmp_path / "bad.arrow").write_bytes(b"no table")
    with pytest.raises(DataError, match="not an Arrow file"):
        opened_rows(tmp_path / "bad.arrow", tmp_path / "cache")


def short_turns(row: dict[str, Any], image_first: bool = True) -> list[tuple[str, list[Any]]]:
    """Turns of a row in short: texts as they are, images as what names them."""
    return [
        (role, [part.text if isinstance(part, Text) else part.source for part in parts])
        for role, parts in example_of(row, image_first).turns
    ]


MESSAGES = {
    "messages": [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "A pear."},
        {"role": "user", "content": "Draw it."},
        {"role": "assistant", "content": [{"type": "image"}]},
    ],
    "images": ["a.png", {"bytes": b"BYTES", "path": None}],
}
LLAVA = {
    "id": "1",
    "image": "a.jpg",
    "conversations": [
        {"from": "human", "value": "<image>\nWhat is this?"},
        {"from": "gpt", "value": "A pear."},
    ],
}
FORMS: dict[str, tuple[dict[str, Any], list[tuple[str, list[Any]]]]] = {
    "messages": (
        MESSAGES,
        [
            ("user", ["a.png", "What?"]),
            ("assistant", ["A pear."]),
            ("user", ["Draw it."]),
            ("assistant", [b"BYTES"]),
        ],
    ),
    "conversations": (LLAVA, [("user", ["a.jpg", "What is this?"]), ("assistant", ["A pear."])]),
    "prompt": (
        {"prompt": "What?", "completion": [{"role": "assistant", "content": "Pear."}],
         "image": "a.png"},
        [("user", ["a.png", "What?"]), ("assistant", ["Pear."])],
    ),
    "interleaved": (
        {"texts": ["One", None, "two"], "images": [None, "b.png", None]},
        [("assistant", ["One", "b.png", "two"])],
    ),
    "pair": (
        {"image": {"path": "c.png"}, "caption": "pear"},
        [("user", ["c.png"]), ("assistant", ["pear"])],
    ),
    "text": ({"text": "Only words."}, [("assistant", ["Only words."])]),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_each_format_is_detected_by_its_keys_and_read(form: str) -> None:
    row, turns = FORMS[form]
    assert form_of(row) == form
    assert short_turns(row) == turns


def test_the_image_of_a_pair_comes_first_or_second() -> None:
    row = FORMS["pair"][0]
    assert short_turns(row, image_first=False) == [("user", ["pear"]), ("assistant", ["c.png"])]
    plain = example_of(row, False, plain_pairs=True)
    assert plain.turns == [("assistant", [Text("pear"), ImageRef("c.png")])]


def test_neighbours_of_one_role_and_the_system_are_joined() -> None:
    messages = [("system", "Be kind."), ("user", "Hi"), ("assistant", "Yo"), ("assistant", "!")]
    row = {"messages": [{"role": role, "content": text} for role, text in messages]}
    assert short_turns(row) == [
        ("user", ["Be kind.", "\n", "Hi"]),
        ("assistant", ["Yo", "\n", "!"]),
    ]


def test_images_without_marks_go_before_the_first_prompt() -> None:
    row = LLAVA | {"image": ["a.jpg", "b.jpg"]}
    row["conversations"] = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "Pears"}]
    assert short_turns(row)[0] == ("user", ["a.jpg", "b.jpg", "What?"])


def test_modalities_of_answers() -> None:
    kinds = {form: example_of(row, True).answer_kind for form, (row, _) in FORMS.items()}
    assert kinds["conversations"] == kinds["text"] == TEXT
    assert kinds["messages"] == kinds["interleaved"] == BOTH
    assert example_of(FORMS["pair"][0], False).answer_kind == IMAGE


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"url": 1}, r"keys \(url\) are of no known form"),
        (LLAVA | {"image": ["a", "b"]}, "1 images are marked but 2 given"),
        (LLAVA | {"image": None}, "more images are marked than given"),
        ({"messages": [{"role": "user", "content": "hi"}]}, "last turn is not the assistant's"),
        ({"messages": [{"role": "tool", "content": "hi"}]}, "role 'tool' is unknown"),
        ({"messages": [{"role": "user", "content": None}]}, "content is of type NoneType"),
        ({"messages": ["hi"]}, "not an object of role and content"),
        ({"messages": []}, "last turn is not"),
        (
            {"messages": [{"role": r, "content": "x"} for r in ("assistant", "user", "assistant")]},
            "begin with the user's",
        ),
        ({"messages": [{"role": "user", "content": " "}]}, "a turn is empty"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "'video' is unknown"),
        ({"texts": ["a"], "images": []}, "1 texts but 0 images"),
        ({"texts": ["a"], "images": ["b"]}, "a text and an image"),
        ({"image": "a.png", "caption": 3}, "the caption is of type int"),
        ({"image": {"bytes": None}, "caption": "x"}, "neither a file name nor bytes"),
    ],
)
def test_a_row_that_breaks_its_form_says_why(row: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        example_of(row, True)


# Files of rows.


def open_all(source: str | Path, cache: Path, **options: Any) -> list[dict[str, Any]]:
    rows = open_rows(str(source), cache, RowSettings(**options))
    found_at = [rows.find(number) for number in range(len(rows))]
    return [table.row(place) for table, place in found_at]


ROWS = [{"text": f"row {n} 배"} for n in range(7)]


def test_rows_of_jsonl_and_of_a_json_array(tmp_path: Path) -> None:
    lines = jsonl(tmp_path / "a.jsonl", ROWS)
    lines.write_text("\n" + lines.read_text().replace("\n", "\n\n", 2))
    (tmp_path / "b.json").write_text(" " + json.dumps(ROWS, indent=2, ensure_ascii=False))
    (tmp_path / "c.json").write_text(json.dumps(ROWS))
    (tmp_path / "bom.json").write_text(json.dumps(ROWS), encoding="utf-8-sig")
    for name in ("a.jsonl", "b.json", "c.json", "bom.json"):
        assert open_all(tmp_path / name, tmp_path / "cache") == ROWS, name
    (tmp_path / "d.json").write_text(json.dumps(ROWS)[:-3])
    with pytest.raises(DataError, match="not a whole JSON array after 6 rows"):
        open_all(tmp_path / "d.json", tmp_path / "cache")


def test_a_key_or_column_given_twice_is_refused(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a", "text": "b"}\n{"text": "c"}\n')
    broken, full = opened_rows(path, tmp_path / "cache")
    assert broken == "in the row the key 'text' is given twice: keep one"
    assert full == {"text": "c"}
    path = tmp_path / "rows.csv"
    path.write_text('messages\n"[{""role"": ""user"", ""role"": ""assistant""}]"\n')
    [broken] = opened_rows(path, tmp_path / "cache")
    assert broken == "in the cell messages the key 'role' is given twice: keep one"
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, ["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    with pyarrow.OSFile(str(tmp_path / "rows.arrow"), "wb") as file:
        with pyarrow.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    for name in ("rows.parquet", "rows.arrow"):
        with pytest.raises(DataError, match=rf"{name} has the column 'text' twice"):
            opened_rows(tmp_path / name, tmp_path / "cache")


def test_rows_of_parquet_are_those_of_pyarrow(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    rows = [{"image": {"bytes": png(n), "path": f"{n}.png"}, "caption": f"{n}"} for n in range(25)]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=4)
    assert open_all(tmp_path / "a.parquet", tmp_path) == rows
    opened = open_rows(str(tmp_path / "a.parquet"), tmp_path, RowSettings())
    assert opened.groups == [4, 4, 4, 4, 4, 4, 1] and not opened.is_random
    (tmp_path / "b.parquet").write_bytes(b"no")
    with pytest.raises(DataError, match="damaged or not a Parquet"):
        open_all(tmp_path / "b.parquet", tmp_path)


def test_parquet_without_pyarrow_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.parquet").write_bytes(b"x")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(DataError, match=r"pip install 'earlyfusion\[data\]'"):
        open_all(tmp_path / "a.parquet", tmp_path)


def test_samples_of_a_tar(tmp_path: Path) -> None:
    dialogue = json.dumps({"conversations": LLAVA["conversations"]}).encode()
    named = json.dumps({"image": "0.png", "caption": "named"}).encode()
    members = {
        "./x/1.jpg": b"P1",
        "./x/1.txt": b"pear\n",
        "./x/2.png": b"P2",
        "./x/2.json": dialogue,
        "y/1.0.png": b"P3",
        "y/1.json": named,
        "y/3.cls": b"\xff",
    }
    path = tar(tmp_path / "a.tar", members)
    rows = open_rows(str(path), tmp_path, RowSettings())
    table, _ = rows.find(0)
    assert len(rows) == 4
    assert short_turns(table.row(0)) == [("user", [b"P1"]), ("assistant", ["pear"])]
    assert short_turns(table.row(1))[0] == ("user", [b"P2", "What is this?"])
    assert table.read(table.row(2), "0.png") == b"P3"
    with pytest.raises(DataError, match="not UTF-8"):
        table.row(3)
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(DataError, match=r"cut short|damaged"):
        open_all(path, tmp_path)


def test_row_positions_are_indexed_once_and_again_after_a_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, cache = jsonl(tmp_path / "a.jsonl", ROWS), tmp_path / "cache"
    assert open_all(path, cache) == ROWS
    with monkeypatch.context() as patch:
        patch.setattr(tables, "_index_json", lambda _: pytest.fail("indexed again"))
        assert open_all(path, cache) == ROWS
    jsonl(path, ROWS[:3])
    assert open_all(path, cache) == ROWS[:3]
    for index in cache.iterdir():
        index.write_bytes(b"cut")
    assert open_all(path, cache) == ROWS[:3]


def test_files_of_a_folder_a_glob_and_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data" / "val").mkdir(parents=True)
    for name in ("b.jsonl", "a.jsonl", "val/c.jsonl", "README.md", "info.json"):
        (tmp_path / "data" / name).write_text("{}\n")

    def names(source: str | Path, *patterns: str) -> list[str]:
        return [path.name for path in find_files(str(source), patterns)[1]]

    folder = tmp_path / "data"
    assert names(folder) == ["a.jsonl", "b.jsonl", "c.jsonl"]
    assert names(folder, "val/*") == ["c.jsonl"]
    assert names(folder, "*.json") == ["info.json"]
    assert names(folder / "*.jsonl") == ["a.jsonl", "b.jsonl"]
    assert names(folder / "**" / "*.jsonl", "val/*") == ["c.jsonl"]
    assert len(open_all(folder / "*.jsonl", tmp_path / "cache")) == 2
    requests = []

    def download(hub_id: str, **options: Any) -> str:
        requests.append((hub_id, options["repo_type"], options["allow_patterns"]))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert names("org/name", "val/*") == ["c.jsonl"]
    assert requests == [("org/name", "dataset", ["val/*"])]
    assert names("org/name") == ["a.jsonl", "b.jsonl", "c.jsonl"]
    assert "*.parquet" in requests[-1][2]

    def fail(*_: Any, **__: Any) -> str:
        raise OSError

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(DataError, match="could not be downloaded from the hub"):
        names("org/name")


@pytest.mark.parametrize(
    ("source", "words"),
    [("none.jsonl", "there is no none.jsonl"), ("empty", r"holds no \.jsonl"), ("e.jsonl", "rows")],
)
def test_missing_and_empty_sources_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("e.jsonl").write_text("\n")
    with pytest.raises(DataError, match=words):
        open_rows(source, tmp_path, RowSettings())


def test_images_of_the_net_and_outside_of_a_hub_data_set_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "out.png").write_bytes(b"P")
    open_folder, confined = (tables.ImageFolder(tmp_path / "in", c) for c in (False, True))
    assert open_folder.read("../out.png") == b"P"
    for name in ("../out.png", str(tmp_path / "out.png")):
        with pytest.raises(DataError, match="outside the data set"):
            confined.read(name)
    with pytest.raises(DataError, match="is a URL"):
        open_folder.read("https://example.com/a.png")
    with pytest.raises(DataError, match="is not in"):
        open_folder.read("none.png")
    assert open_folder.read("data:image/png;base64,UE5H") == b"PNG"
    assert open_folder.read("data:image/png;base64,UE5\nH\n") == b"PNG"


def test_outlines_are_the_rows_with_a_byte_in_place_of_each_image(tmp_path: Path) -> None:
    pyarrow, parquet = (pytest.importorskip(f"pyarrow{name}") for name in ("", ".parquet"))
    images = [{"bytes": png(n), "path": None} for n in range(9)]
    some = [None if n % 3 else image for n, image in enumerate(images)]
    columns = {
        "image": images,
        "sometimes": some,
        "png": [png(n) for n in range(9)],
        "images": [[image, {"bytes": b"", "path": "a.png"}] for image in images],
        "all": [[image, image] for image in images],
        "text": [f"pear {n}" for n in range(9)],
    }
    table = pyarrow.table(columns)
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=4)
    with pyarrow.ipc.new_stream(str(tmp_path / "b.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=4)
    members = {f"{n}.{s}": d for n in range(3) for s, d in (("png", png(n)), ("txt", b"pear"))}
    tar(tmp_path / "c.tar", members | {"3.png": b"", "3.txt": b"none", "4.json": b"{"})

    def short(value: Any) -> Any:
        """Whether bytes are there, and all else as it is."""
        if isinstance(value, dict):
            return {key: short(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [short(inner) for inner in value]
        return bool(value) if isinstance(value, bytes) else value

    for name in ("a.parquet", "b.arrow", "c.tar"):
        rows = open_rows(str(tmp_path / name), tmp_path / "cache", RowSettings())
        outlines = [short(row) for row in rows.outlines()]
        full = opened_rows(tmp_path / name, tmp_path / "cache")
        assert outlines == [None if isinstance(row, str) else short(row) for row in full]
    [file] = open_rows(str(tmp_path / "a.parquet"), tmp_path, RowSettings()).tables
    [first, *_] = file.outlines()
    assert first is not None
    assert len(first["image"]["bytes"]) == len(first["png"]) == 1  # not read
    assert [len(image["bytes"]) for image in first["all"]] == [1, 1]


@given(st.lists(st.integers(0, 4), min_size=1, max_size=9))
def test_joined_lists_are_one_list(sizes: list[int]) -> None:
    joined = Joined(sizes)
    entries = [(which, at) for which, size in enumerate(sizes) for at in range(size)]
    assert [joined.find(number) for number in range(len(joined))] == entries


# Tokens of rows.


def documents(
    encoder: Encoder, path: Path, quarantine: Quarantine | None = None
) -> list[TokenSequence | None]:
    rows = open_rows(str(path), path.parent / "cache", RowSettings())
    quarantine = quarantine or Quarantine(None, 1.0)
    read = [encoder.read(rows, number, quarantine) for number in range(len(rows))]
    return [encoder.encode([row])[0] for row in read]


@pytest.mark.parametrize(
    ("settings", "prompt_mode"),
    [({}, "crop"), ({"resize_mode": "fit"}, "fit"), ({"prompt_images": "fit"}, "fit")],
)
def test_images_of_prompts_are_resized_as_set_and_those_of_answers_cropped(
    tmp_path: Path, processor: Processor, settings: dict[str, str], prompt_mode: str
) -> None:
    (tmp_path / "a.png").write_bytes(png(3, (40, 16)))
    parts = [{"type": "image"}, {"type": "text", "text": "Draw."}]
    row = {
        "messages": [
            {"role": "user", "content": parts},
            {"role": "assistant", "content": [{"type": "image"}]},
        ],
        "images": ["a.png", "a.png"],
    }
    encoder = tiny_encoder(processor, **settings)
    document = documents(encoder, jsonl(tmp_path / "r.jsonl", [row]))[0]
    assert document is not None
    vq, vocabulary = ImageTokenizer(tiny_vqgan(), 16), processor.vocabulary
    codes = {
        mode: vq.encode([tmp_path / "a.png"], mode)[0].numpy()  # type: ignore[arg-type]
        for mode in ("fit", "crop")
    }
    assert not np.array_equal(codes["fit"], codes["crop"])
    expected = [
        vocabulary.bos,
        *processor.layout.spell(codes[prompt_mode], vocabulary),
        *processor.encode_text("Draw."),
        vocabulary.end_of_turn,
        *processor.layout.spell(codes["crop"], vocabulary),
        vocabulary.eos,
    ]
    assert document.ids == expected
    size = processor.layout.num_tokens
    counted = [role in (ANSWER_TEXT, ANSWER_IMAGE) for role in document.role]
    assert document.loss_mask == [*counted[:-1], True]  # the prompt is masked
    assert document.role.count(PROMPT_IMAGE) == document.role.count(ANSWER_IMAGE) == size


def test_half_of_the_pairs_have_the_image_first(tmp_path: Path, processor: Processor) -> None:
    path = pairs(tmp_path, 60)
    result = documents(tiny_encoder(processor), path)
    first = [d.spans[0][2] for d in result if d is not None]
    assert 18 <= first.count("image") <= 42
    second = documents(tiny_encoder(processor), path)
    assert [d.ids for d in result if d] == [d.ids for d in second if d]
    text_first = documents(tiny_encoder(processor, image_first=0.0, pairs="document"), path)
    for document in text_first:
        assert document is not None and document.spans[0][2] == "text"
        assert {PROMPT_TEXT, PROMPT_IMAGE}.isdisjoint(document.role)
        assert document.loss_mask == [False] + [True] * (len(document) - 1)


def test_broken_rows_are_listed_with_their_reason_and_counted(
    tmp_path: Path, processor: Processor
) -> None:
    (tmp_path / "bad.png").write_bytes(png(0)[:60])
    rows = [
        {"text": "good"},
        "{not json",
        {"image": "bad.png", "caption": "x"},
        {"image": "https://a.b/c.png", "caption": "x"},
        {"text": "half \ud800"},
        {"text": "good too"},
    ]
    path, quarantine_file = jsonl(tmp_path / "r.jsonl", rows), tmp_path / "q" / "quarantine.jsonl"
    for _ in range(2):  # the second run files nothing again
        quarantine = Quarantine(quarantine_file, 0.1)
        result = documents(tiny_encoder(processor), path, quarantine)
        assert [d is not None for d in result] == [True, False, False, False, False, True]
        assert (quarantine.good, quarantine.broken) == (2, 4)
        entries = [json.loads(line) for line in quarantine_file.read_text().splitlines()]
        assert [entry["row"] for entry in entries] == [2, 3, 4, 5]
        assert {entry["file"] for entry in entries} == {str(path)}
        for entry, word in zip(entries, ("JSON", "damaged", "URL", "character"), strict=True):
            assert word in entry["reason"]


def test_too_many_broken_rows_end_the_run(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path / "q.jsonl", 0.1)
    for _ in range(90):
        quarantine.accept()
    for row in range(10):
        quarantine.refuse(Path("a"), row, "why")
    with pytest.raises(DataError, match=r"11 of 101 rows are broken, the limit is 10%.*why"):
        quarantine.refuse(Path("a"), 10, "why")


# Documents that are longer than a row.


def plain(processor: Processor, *lengths: int) -> TokenSequence:
    """A plain document of texts; a length below 0 is an image."""
    vocabulary, document = processor.vocabulary, TokenSequence()
    document.add_control(vocabulary.bos)
    text = int(vocabulary.text_tokens[0])
    for length in lengths:
        codes = np.full((processor.layout.height, processor.layout.width), -length % 8)
        spelled = processor.layout.spell(codes, vocabulary)
        tokens, kind = ([text] * length, "text") if length > 0 else (spelled, "image")
        document.add_segment(tokens, "assistant", kind)  # type: ignore[arg-type]
    document.add_control(vocabulary.eos, END)
    return document


def test_a_plain_document_is_split_between_its_segments(processor: Processor) -> None:
    size = processor.layout.num_tokens
    limit = size + 12
    full = plain(processor, 8, -1, 30, -2)
    splitter = DocumentSplitter(limit, processor.vocabulary)
    parts = splitter.split(0, full)
    assert (
        all(len(piece) <= limit for piece in parts) and len(parts) > 1 and splitter.shortened == {0}
    )
    bos, eos = processor.vocabulary.bos, processor.vocabulary.eos
    inner = [i for piece in parts for i in piece.ids if i not in (bos, eos)]
    assert inner == full.ids[1:-1]
    assert [piece.ids[0] for piece in parts] == [bos] * len(parts)
    assert [piece.ids[-1] == eos for piece in parts] == [False] * (len(parts) - 1) + [True]
    begins = [piece.ids.count(processor.vocabulary.begin_image) for piece in parts]
    ends = [piece.ids.count(processor.vocabulary.end_image) for piece in parts]
    assert begins == ends and sum(begins) == 2
    assert splitter.split(1, plain(processor, 4)) == [plain(processor, 4)]
    assert splitter.split(2, TokenSequence()) == [] and splitter.dropped == set()
    narrow = DocumentSplitter(size + 1, processor.vocabulary)
    assert narrow.split(3, full) == [] and narrow.dropped == {3}


def test_a_dialogue_keeps_the_exchanges_that_fit(tmp_path: Path, processor: Processor) -> None:
    turns = [("user", "Hi."), ("assistant", "Hello."), ("user", "Again."), ("assistant", "Yes.")]
    row = {"messages": [{"role": role, "content": text} for role, text in turns]}
    short = {"messages": row["messages"][:2]}
    full, first = documents(tiny_encoder(processor), jsonl(tmp_path / "r.jsonl", [row, short]))
    assert full is not None and first is not None
    for limit in range(len(first), len(full)):
        assert DocumentSplitter(limit, processor.vocabulary).split(0, full) == [first]
    assert DocumentSplitter(len(full), processor.vocabulary).split(0, full) == [full]
    splitter = DocumentSplitter(len(first) - 1, processor.vocabulary)
    assert splitter.split(5, full) == [] and splitter.dropped == {5}


# Mixing, shuffling, sharding.


class Numbers:
    """A source whose document n is made of the token n."""

    def __init__(
        self, count: int, groups: list[int] | None = None, empty: tuple[int, ...] = ()
    ) -> None:
        self.name = self.fingerprint = "numbers"
        self.groups, self.is_random = groups or [count], groups is None
        self.splitter, self._count, self._empty = DocumentSplitter(10, None), count, empty  # type: ignore[arg-type]
        self.reads: list[int] = []

    def __len__(self) -> int:
        return self._count

    def pieces(self, number: int) -> list[TokenSequence]:
        self.reads.append(number)
        return [] if number in self._empty else [TokenSequence(ids=[number])]

    def answer_kinds(self) -> np.ndarray:
        return np.array([n % 3 == 0 for n in range(self._count)], np.uint8)


@given(st.integers(1, 3000), st.integers(0, 2**64))
@settings(max_examples=30, deadline=None)
def test_permuted_indices_are_a_permutation(size: int, key: int) -> None:
    assert sorted(permuted_index(n, size, key) for n in range(size)) == list(range(size))


def test_permuted_indices_are_mixed_well() -> None:
    size = 2000
    places = np.array([permuted_index(n, size, 7) for n in range(size)])
    assert abs(np.corrcoef(np.arange(size), places)[0, 1]) < 0.1
    assert (np.diff(places) == 1).sum() < 10
    others = np.array([permuted_index(n, size, 8) for n in range(size)])
    assert (places == others).sum() < 12


@pytest.mark.parametrize("groups", [None, [5, 0, 11, 20, 4, 1, 1, 30, 9, 2, 17]])
def test_an_epoch_has_every_row_once_and_each_its_own_order(groups: list[int] | None) -> None:
    order = ShuffledDocuments(Numbers(100, groups), 1, "a")
    epochs = [[order.number(epoch, place) for place in range(100)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(100)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != list(range(100))
    assert epochs[0] == [
        ShuffledDocuments(Numbers(100, groups), 1, "a").number(0, n) for n in range(100)
    ]
    assert epochs[0] != [
        ShuffledDocuments(Numbers(100, groups), 2, "a").number(0, n) for n in range(100)
    ]


def test_row_groups_are_read_a_few_at_a_time() -> None:
    groups = [10] * 40
    order = ShuffledDocuments(Numbers(400, groups), 0, "a")
    touched = [order.number(0, place) // 10 for place in range(400)]
    pool = 10 * tables.DECODED_GROUPS
    for start in range(0, 400, pool):
        assert len(set(touched[start : start + pool])) == tables.DECODED_GROUPS


def test_sources_come_by_weight_and_none_repeats_before_its_epoch_ends() -> None:
    schedule = Schedule([Stage(0, {"a": 3.0, "b": 1.0})], seed=5)
    places = [schedule.locate(number) for number in range(10_000)]
    for name, share in (("a", 0.75), ("b", 0.25)):
        actual = [place.position for place in places if place.source == name]
        assert actual == list(range(len(actual)))
        assert len([d for d in places[:4096] if d.source == name]) == 4096 * share
    other = Schedule([Stage(0, {"a": 3.0, "b": 1.0})], seed=6)
    assert [other.locate(n) for n in range(100)] != places[:100]
    with pytest.raises(SettingError, match="under 1 in 4096"):
        Schedule([Stage(0, {"a": 1e6, "b": 1.0})], 0)
    with pytest.raises(SettingError, match="weight 0"):
        Schedule([Stage(0, {"a": 0.0})], 0)


def test_the_second_stage_halves_the_first_and_goes_on_where_it_stopped() -> None:
    stages = two_stages({"a": 2.0, "b": 1.0}, {"good": 4.0}, start=5000)
    assert dict(stages[1].weights) == pytest.approx({"a": 1 / 3, "b": 1 / 6, "good": 0.5})
    schedule = Schedule(stages, seed=1)
    places = [schedule.locate(number) for number in range(5000 + 4096)]
    counts = Counter(place.source for place in places[5000:])
    assert counts["good"] == 2048 and counts["a"] == pytest.approx(4096 / 3, abs=1)
    assert "good" not in {place.source for place in places[:5000]}
    for name in ("a", "b", "good"):
        actual = [place.position for place in places if place.source == name]
        assert actual == list(range(len(actual)))
    assert two_stages({"a": 1.0}, {}, 10) == (Stage(0, {"a": 1.0}),)


@pytest.mark.parametrize("workers", [1, 4])
def test_workers_change_only_the_time(workers: int) -> None:
    threads = set()

    def stream(number: int) -> TokenSequence:
        threads.add(threading.current_thread().name)
        return TokenSequence(ids=[number])

    prefetched = PrefetchedStream(stream, workers, depth=8)
    order = [*range(30), 29, 30, 200, 201, 5, 6]  # a packer asks again for what did not fit
    assert [prefetched(number).ids[0] for number in order] == order
    prefetched.close()
    assert threading.current_thread().name not in threads


def test_kinds_of_answers_are_balance_answers() -> None:
    orders = balance_answers(Numbers(90, [30] * 3), 0, "a")
    kinds = {name: (share, len(order)) for name, (share, order) in orders.items()}
    assert kinds == {"a (text)": (0.5, 60), "a (images)": (0.5, 30)}
    numbers = [orders["a (images)"][1].number(0, place) for place in range(30)]
    assert sorted(numbers) == list(range(0, 90, 3))
    rare = Numbers(100)
    rare.answer_kinds = lambda: np.array([n == 7 for n in range(100)], np.uint8)  # type: ignore[method-assign]
    shares = [share for share, _ in balance_answers(rare, 0, "a").values()]
    assert shares == pytest.approx([0.5 / 0.54, 0.04 / 0.54])


# A whole corpus.


def corpus_of(processor: Processor, run: Path, length: int = 100, **config: Any) -> Any:
    tokenizer = ImageTokenizer(tiny_vqgan(), CONFIG.vq_config.resolution)
    return open_corpus(CorpusConfig(**config), processor, tokenizer, length, run)


def test_a_broken_row_is_replaced_and_a_resumed_stream_is_the_same(
    tmp_path: Path, processor: Processor
) -> None:
    path = pairs(tmp_path, 20)
    with path.open("a") as file:
        file.write("{broken\n")
    corpus = corpus_of(processor, tmp_path / "run", data=(str(path),))
    documents = [corpus.stream(number) for number in range(60)]
    assert corpus.report() == [f"broken rows: 1, see {tmp_path / 'run' / 'quarantine.jsonl'}"]
    second = corpus_of(processor, tmp_path / "other", data=(str(path),))
    assert [second.stream(number) for number in range(59, 30, -1)] == documents[59:30:-1]
    assert second.fingerprint == corpus.fingerprint
    path.write_text(path.read_text().replace("pear 3", "plum 3"))
    changed = corpus_of(processor, tmp_path / "other", data=(str(path),))
    assert changed.fingerprint != corpus.fingerprint


def test_the_packer_takes_the_stream_and_its_cursor_is_all_its_state(
    tmp_path: Path, processor: Processor
) -> None:
    pairs(tmp_path / "a", 12)
    jsonl(tmp_path / "b.jsonl", [{"text": "word " * n} for n in range(1, 60, 4)])
    data = (f"{tmp_path / 'a'}@3", str(tmp_path / "b.jsonl"))

    def packer() -> Packer:
        corpus = corpus_of(processor, tmp_path / "run", data=data)
        return Packer(corpus.stream, RoleWeights(), 2, 100, processor.vocabulary.pad)

    first = packer()
    batches = [first.next() for _ in range(6)]
    second = packer()
    second.cursor = 0
    for _ in range(3):
        second.next()
    third = packer()
    third.cursor = second.cursor
    for batch in batches[3:]:
        for actual, expected in zip(third.next(), batch, strict=True):
            assert actual.equal(expected)


def test_modalities_of_answers_are_determined_once_per_run(
    tmp_path: Path, processor: Processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = pairs(tmp_path, 8)
    first = corpus_of(processor, tmp_path / "run", data=(str(path),))
    monkeypatch.setattr(Encoder, "answer_kinds", None)
    second = corpus_of(processor, tmp_path / "run", data=(str(path),))
    assert [second.stream(n) for n in range(20)] == [first.stream(n) for n in range(20)]
    with pytest.raises(TypeError):  # pairs that are turned around otherwise have other answers
        settings = EncodingSettings(pair_seed=1)
        corpus_of(processor, tmp_path / "run", data=(str(path),), encoding=settings)


def test_each_epoch_reads_the_next_part_of_a_long_document(
    tmp_path: Path, processor: Processor
) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"text": "".join(f"<{n}>" for n in range(200))}])
    corpus = corpus_of(processor, tmp_path / "run", data=(str(path),), balance=False)
    pieces = [corpus.stream(number) for number in range(40)]
    count = len({tuple(piece.ids) for piece in pieces})
    assert 1 < count < 40 and pieces[count:] == pieces[: 40 - count]
    texts = [processor.decode_text(piece.ids) for piece in pieces[:count]]
    assert "".join(texts) == "".join(f"<{n}>" for n in range(200))
    assert corpus.report() == [f"documents of {path} too long for a row: 1 shortened"]


def test_what_open_corpus_refuses(tmp_path: Path, processor: Processor) -> None:
    path = str(jsonl(tmp_path / "a.jsonl", [{"messages": MESSAGES["messages"][1:2]}]))
    with pytest.raises(SettingError, match="data=PATH"):
        corpus_of(processor, tmp_path)
    with pytest.raises(SettingError, match="length=20 cannot hold an image"):
        corpus_of(processor, tmp_path, length=20, data=(path,))
    with pytest.raises(SettingError, match=r"weight -1\.0"):
        corpus_of(processor, tmp_path, data=(f"{path}@-1",))
    unusable = jsonl(tmp_path / "b.jsonl", [{"x": n} for n in range(3)])
    with pytest.raises(DataError, match=r"no usable|are broken"):
        corpus_of(processor, tmp_path, data=(str(unusable),)).stream(0)


def test_a_data_set_of_the_hub_needs_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(DataError, match=r"org/name is not .*: pip install huggingface_hub"):
        download_dataset("org/name", ["*.jsonl"])


def test_paths_are_not_hub_ids() -> None:
    accepted = [name for name in ("a/b", "org/na-me.x") if is_hub_id(name)]
    refused = [n for n in ("a", "a/b/c", "./a", "/a/b") if is_hub_id(n)]
    assert len(accepted) == 2 and not refused


def test_numbers_of_a_source_do_not_depend_on_the_order_of_calls() -> None:
    order = ShuffledDocuments(Numbers(50, [7] * 7 + [1]), 3, "a")
    positions = list(itertools.product(range(3), range(0, 50, 7)))
    forward = [order.number(*place) for place in positions]
    assert [order.number(*place) for place in positions[::-1]] == forward[::-1]


def test_a_part_without_usable_rows_is_replaced_by_the_others(
    tmp_path: Path, processor: Processor
) -> None:
    path = jsonl(tmp_path / "r.jsonl", [{"text": f"word {n}"} for n in range(20)])
    broken = {"prompt": "Draw.", "completion": "<image>", "image": "missing.png"}
    with path.open("a") as file:
        file.write(json.dumps(broken) + "\n")
    corpus = corpus_of(processor, tmp_path / "run", data=(str(path),))
    documents = [corpus.stream(number) for number in range(100)]
    assert all(len(document) for document in documents) and corpus.quarantine.broken == 1
    again = corpus_of(processor, tmp_path / "other", data=(str(path),))
    assert [again.stream(number) for number in range(99, 0, -1)] == documents[99:0:-1]
    only = jsonl(tmp_path / "only.jsonl", [broken] * 3)
    with pytest.raises(DataError, match=r"only.jsonl gives no usable document: .*missing.png"):
        corpus_of(processor, tmp_path / "run", data=(str(only),)).stream(0)


def test_a_part_too_small_for_a_share_joins_the_largest() -> None:
    rare = Numbers(200_000)
    rare.answer_kinds = lambda: np.array([n == 7 for n in range(200_000)], np.uint8)  # type: ignore[method-assign]
    parts = balance_answers(rare, 0, "a")
    assert {name: (share, len(part)) for name, (share, part) in parts.items()} == {
        "a (text)": (1.0, 200_000)
    }
    Schedule([Stage(0, {name: share for name, (share, _) in parts.items()})], 0)


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf"])
def test_an_impossible_weight_is_reported_with_its_source(
    tmp_path: Path, processor: Processor, weight: str
) -> None:
    path = jsonl(tmp_path / "r.jsonl", [{"text": "a word"}])
    with pytest.raises(SettingError, match=f"weight {float(weight)} of .*r.jsonl must be over 0"):
        corpus_of(processor, tmp_path / "run", data=(f"{path}@{weight}",))


@pytest.mark.parametrize("damage", [lambda data: data[:-30], lambda data: data[:200] + b"?" * 80])
def test_a_damaged_index_is_made_again(tmp_path: Path, damage: Any) -> None:
    path, cache = jsonl(tmp_path / "a.jsonl", ROWS), tmp_path / "cache"
    assert open_all(path, cache) == ROWS
    for index in cache.iterdir():
        index.write_bytes(damage(index.read_bytes()))
    assert open_all(path, cache) == ROWS


def test_links_to_folders_are_followed_and_hidden_files_left_out(tmp_path: Path) -> None:
    folder, other = tmp_path / "data", tmp_path / "other"
    for part in (folder / "a", folder / ".ipynb_checkpoints", other / "deep"):
        part.mkdir(parents=True)
    named = {
        folder / "a" / "1.jsonl": 1,
        folder / "a" / "._1.jsonl": 2,
        folder / ".ipynb_checkpoints" / "1-checkpoint.jsonl": 3,
        other / "deep" / "2.jsonl": 4,
    }
    for path, number in named.items():
        jsonl(path, [{"text": str(number)}])
    (folder / "0").symlink_to(other)
    (folder / "1").symlink_to(folder / "a")  # the same rows again
    (other / "deep" / "up").symlink_to(folder)  # without an end
    assert open_all(folder, tmp_path / "cache") == [{"text": "4"}, {"text": "1"}]
    # A link may also be the source itself.
    (tmp_path / "link").symlink_to(other)
    rows = open_all(tmp_path / "link", tmp_path / "cache")
    assert {"text": "4"} in rows and len(rows) == 2
