from __future__ import annotations

import hashlib
import io
import json
import pickle
import tarfile
import zipfile
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from earlyfusion.errors import DataError, SettingError
from earlyfusion.mini.emoji import build, render, sources
from earlyfusion.mini.emoji.catalogue import STYLES, concept_id, family
from earlyfusion.mini.emoji.dataset import EmojiData, spoken_name
from earlyfusion.mini.emoji.dialogues import (
    TASKS,
    Dialogues,
    caption_pairs,
    chats,
    generate,
    main,
)
from earlyfusion.mini.emoji.phrases import PROMPTS, normalise, particle, with_article
from earlyfusion.mini.emoji.pools import name_of

FOLDER = Path(__file__).parent / "data"


@pytest.fixture(scope="module")
def data() -> EmojiData:
    return EmojiData(FOLDER)


def texts(sample: dict[str, Any], role: str) -> list[str]:
    turns = [m for m in sample["messages"] if m["role"] == role]
    return [p["text"] for t in turns for p in t["content"] if p["type"] == "text"]


def images(sample: dict[str, Any]) -> list[str]:
    return [p["image"] for m in sample["messages"] for p in m["content"] if p["type"] == "image"]


# ---- the data set


def test_rows_carry_spoken_names_and_kinds(data: EmojiData) -> None:
    assert len(data) == len(data.rows) == 36
    row = data.row("noto/1f349")
    assert (row["en"], row["ko"]) == ("watermelon", "수박")
    assert (row["subgroup_en"], row["subgroup_ko"]) == ("fruits", "과일")


def test_splits_partition_the_rows(data: EmojiData) -> None:
    train, val = data.split("train"), data.split("val")
    assert sorted(train + val) == sorted(r["id"] for r in data.rows)
    assert sorted(val) == sorted(data.split("val-pair") + data.split("val-concept"))
    assert data.split("test") == []


def test_images_are_rgb_on_white(data: EmojiData) -> None:
    for image in data.images(r["id"] for r in data.rows):
        assert (image.mode, image.size) == ("RGB", (128, 128))
        assert np.asarray(image).std() > 5
    corner = data.image("noto/1f349").getpixel((0, 0))
    assert corner == (255, 255, 255)


def test_data_travels_to_workers(data: EmojiData) -> None:
    data.image("noto/1f349")
    copy = pickle.loads(pickle.dumps(data))
    assert copy.image("noto/1f349").tobytes() == data.image("noto/1f349").tobytes()


@pytest.mark.parametrize("name", ["metadata.jsonl", "concepts.jsonl"])
def test_a_missing_file_is_one_sentence(tmp_path: Path, name: str) -> None:
    for file in ("metadata.jsonl", "concepts.jsonl"):
        if file != name:
            (tmp_path / file).write_bytes((FOLDER / file).read_bytes())
    with pytest.raises(DataError, match=f"no {name} in .*earlyfusion.mini.emoji.build"):
        EmojiData(tmp_path)


def test_malformed_data_is_one_sentence(tmp_path: Path, data: EmojiData) -> None:
    (tmp_path / "concepts.jsonl").write_bytes((FOLDER / "concepts.jsonl").read_bytes())
    (tmp_path / "metadata.jsonl").write_text('{"id": ', encoding="utf-8")
    with pytest.raises(DataError, match="not JSON"):
        EmojiData(tmp_path)
    (tmp_path / "metadata.jsonl").write_text('{"id": "noto/1f349"}\n', encoding="utf-8")
    with pytest.raises(DataError, match="lacks 'codepoints'"):
        EmojiData(tmp_path)
    with pytest.raises(DataError, match="'noto/nothing' is not in"):
        data.image("noto/nothing")
    with pytest.raises(DataError, match="split 'dev' is unknown"):
        data.split("dev")


def test_spoken_names() -> None:
    assert spoken_name("flag: France", "en") == "flag of France"
    assert spoken_name("깃발: 프랑스", "ko") == "프랑스 깃발"
    assert spoken_name("keycap: 3", "en") == "keycap 3"
    assert spoken_name("키 캡: 3", "ko") == "키캡 3"


# ---- words


@pytest.mark.parametrize(
    ("word", "pair", "expected"),
    [
        ("사과", "을/를", "사과를"),
        ("수박", "을/를", "수박을"),
        ("판다", "이야/야", "판다야"),
        ("곰", "은/는", "곰은"),
        ("연필", "으로/로", "연필로"),
        ("손", "으로/로", "손으로"),
        ("3D", "을/를", "3D를"),
        ("키캡 3", "을/를", "키캡 3을"),
        ("키캡 2", "을/를", "키캡 2를"),
    ],
)
def test_particles(word: str, pair: str, expected: str) -> None:
    assert particle(word, pair) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("red apple", "a red apple"),
        ("orange", "an orange"),
        ("hourglass done", "an hourglass done"),
        ("unicorn", "a unicorn"),
        ("umbrella with rain drops", "an umbrella with rain drops"),
        ("ewe", "a ewe"),
        ("grapes", "grapes"),
        ("smiling face with hearts", "a smiling face with hearts"),
        ("bus", "a bus"),
        ("glass of milk", "a glass of milk"),
        ("fire", "fire"),
        ("fire engine", "a fire engine"),
        ("flag of Peru", "the flag of Peru"),
        ("Pisces", "Pisces"),
        ("Christmas tree", "a Christmas tree"),
        ("two o’clock", "two o’clock"),
        ("man lifting weights", "a man lifting weights"),
        ("family: man, boy", "family: man, boy"),
    ],
)
def test_articles(name: str, expected: str) -> None:
    assert with_article(name) == expected


def test_normalise_forgives_only_form() -> None:
    assert normalise("  The Second. ") == "the second"
    assert normalise("man’s  shoe") == normalise("Man's shoe")
    assert normalise("red apple") != normalise("green apple")


def test_every_prompt_fills(data: EmojiData) -> None:
    words = {
        "n": "x",
        "a": "a x",
        "no": "x를",
        "ng": "x는",
        "nya": "x야",
        "s": "3D",
        "kind": "fruits",
    }
    words |= {"num": "two", "options": "a, b", "words": "a, b", "st": ""}
    for table in PROMPTS.values():
        for prompts in table.values():
            for prompt in prompts.published + prompts.further:
                assert "{" not in prompt.format(**words)


def test_asked_for_in_the_readme() -> None:
    assert "Draw {a}." in PROMPTS["draw"]["en"].further
    assert "{n} 그려 줘." in PROMPTS["draw"]["ko"].further
    assert "Show me {num} {kind}{st}, with pictures." in PROMPTS["list_draw"]["en"].further
    assert "What do these have in common?" in PROMPTS["common"]["en"].further


# ---- dialogues


def test_the_published_samples_are_made_again(data: EmojiData) -> None:
    """The hash is of what the data's first generator writes for this folder, seed and count."""
    samples = generate(data, n=200, seed=0, further=0)
    text = json.dumps(samples, ensure_ascii=False, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    assert digest == "2110e7b7316a41695510695e48c04e2a96ecef1f7fccf2921420d033381d0d04"


def test_the_same_seed_makes_the_same_samples(data: EmojiData) -> None:
    first = generate(data, n=60, seed=3)
    assert first == generate(data, n=60, seed=3)
    assert first != generate(data, n=60, seed=4)
    stream = Dialogues(data, seed=3)
    assert list(islice(stream, 20)) == list(islice(stream, 20))


def test_samples_differ_and_stay_in_their_split(data: EmojiData) -> None:
    for split in ("train", "val"):
        samples = generate(data, split, n=80, seed=1)
        assert len({json.dumps(s["messages"]) for s in samples}) == 80
        allowed = set(data.split(split))
        assert all(set(images(s)) <= allowed for s in samples)
        assert all(("kind" in s) == (split == "val") for s in samples)


@pytest.mark.parametrize("task", sorted(TASKS))
@pytest.mark.parametrize("further", [0.0, 1.0])
def test_every_task(data: EmojiData, task: str, further: float) -> None:
    only = {name: float(name == task) for name in TASKS}
    for sample in islice(Dialogues(data, seed=5, tasks=only, further=further, korean=0.5), 30):
        assert sample["task"] == task
        assert [m["role"] for m in sample["messages"]] == ["user", "assistant"] * (
            len(sample["messages"]) // 2
        )
        last = sample["messages"][-1]["content"]
        if sample["check"] == "exact":
            assert [p["text"] for p in last] == [sample["answer"]]
            assert normalise(sample["answer"]) in sample["accept"]
        elif sample["check"] == "image":
            target = sample["targets"][0]
            assert last[-1]["image"] == target["reference"]
            assert data.row(target["reference"])["codepoints"] == target["concept"]
        else:
            assert len(last) == 2 * sample["count"]
            rows = [data.row(p["image"]) for p in last[1::2]]
            assert all(r["subgroup"].startswith(sample["subgroup"]) for r in rows)


def test_answers_are_true(data: EmojiData) -> None:
    for sample in islice(Dialogues(data, seed=7), 400):
        rows = [data.row(i) for i in images(sample)]
        name = "en" if sample["lang"] == "en" else "ko"
        if sample["task"] == "caption":
            assert sample["answer"] == rows[0][name]
        if sample["task"] == "common":
            assert {sample["answer"]} == {r["subgroup_" + name] for r in rows}
        if sample["task"] == "same_thing":
            same = rows[0]["codepoints"] == rows[1]["codepoints"]
            assert sample["answer"] in (("Yes", "응") if same else ("No", "아니"))
        if sample["task"] == "draw" and sample["targets"][0]["style"]:
            assert rows[0][name] in texts(sample, "user")[0] or name == "en"


def test_shares(data: EmojiData) -> None:
    samples = list(islice(Dialogues(data, seed=2, korean=0.25, tasks={"draw": 200}), 600))
    korean = sum(s["lang"] == "ko" for s in samples) / 600
    generated = sum(s["task"] == "draw" for s in samples) / 600
    assert 0.18 < korean < 0.32
    assert generated > 0.55
    assert all(s["lang"] == "en" for s in islice(Dialogues(data, korean=0), 50))


def test_articles_and_particles_reach_the_prompts(data: EmojiData) -> None:
    only = {name: float(name == "draw") for name in TASKS}
    asked = {texts(s, "user")[0] for s in islice(Dialogues(data, tasks=only, further=1), 3000)}
    assert "Draw a banana." in asked
    assert "바나나를 그려 줘." in asked
    assert "수박을 그려 줘." in asked
    assert not any("수박를" in a or "a orange" in a or "{" in a for a in asked)


def test_impossible_settings(data: EmojiData) -> None:
    with pytest.raises(SettingError, match="task 'sing' is unknown"):
        Dialogues(data, tasks={"sing": 1})
    with pytest.raises(SettingError, match="weights"):
        Dialogues(data, tasks=dict.fromkeys(TASKS, 0.0))
    with pytest.raises(SettingError, match="korean is 2"):
        Dialogues(data, korean=2)
    with pytest.raises(DataError, match="no images"):
        Dialogues(data, split="test")
    with pytest.raises(DataError, match="different ones"):
        generate(data, n=10**6, tasks={n: float(n == "restyle") for n in TASKS}, further=0)
    with pytest.raises(DataError, match="too small"):
        next(iter(Dialogues(data, "val", tasks={n: float(n == "odd") for n in TASKS})))


def test_caption_pairs_hold_both_orders(data: EmojiData) -> None:
    pairs = list(caption_pairs(data))
    things = {data.row(i)["codepoints"] for i in data.split("train")}
    assert len(pairs) == 6 * len(data.split("train")) + 4 * len(things)
    own_pairs = [p for p in pairs if images(p) == ["noto/1f349"]]
    assert [texts(p, "assistant") for p in own_pairs if p["task"] == "name"] == [
        ["watermelon"],
        ["수박"],
    ]
    first = next(i for i in data.split("train") if data.row(i)["en"] == "watermelon")
    for image_id in (first, "noto/1f349"):
        own_pairs = [p for p in pairs if images(p) == [image_id] and p["task"] != "name"]
        asked = {texts(p, "user")[0] for p in own_pairs}
        assert ("usual" in {p["task"] for p in own_pairs}) == (image_id == first)
        assert ("수박을 그려 줘." in asked) == ("watermelon" in asked) == (image_id == first)
    assert {
        "watermelon, Noto style",
        "수박, 노토 스타일로.",
        "Draw watermelon in Noto style.",
    } <= asked


def test_chats_end_with_a_request_after_something_else(data: EmojiData) -> None:
    samples = list(chats(data, "train", 300, seed=1, wordings=0.3))
    assert samples == list(chats(data, "train", 300, seed=1, wordings=0.3))
    num_turns = Counter(len(sample["messages"]) for sample in samples)
    assert set(num_turns) == {4, 6} and min(num_turns.values()) > 100
    named = 0
    for sample in samples:
        roles = [message["role"] for message in sample["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        request, reply = sample["messages"][2:4]
        assert [part["type"] for part in request["content"]] == ["text"]
        [image] = reply["content"]
        row = data.row(image["image"])
        said = request["content"][0]["text"].lower()
        # A typo in a name is possible (`wordings.add_typing_noise`), but rare.
        named += name_of(row, sample["lang"]).lower() in said
        if len(roles) == 6:
            answer = sample["messages"][5]["content"][0]["text"]
            kinds = {row["subgroup_en"], row["subgroup_ko"], row["en"], row["ko"]}
            assert answer in kinds
    assert named > 270


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "train.jsonl"
    main(["--data", str(FOLDER), "--n", "5", "--out", str(out)])
    written = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert written == generate(EmojiData(FOLDER), n=5)
    with pytest.raises(SystemExit, match="2"):
        main(["--data", str(tmp_path / "none"), "--out", str(out)])
    assert "no concepts.jsonl" in capsys.readouterr().err


# ---- the builder


def test_the_packaged_manifest_lists_the_sample(data: EmojiData) -> None:
    manifest = build.read_manifest(build.HERE / "manifest.json.gz")
    assert len(manifest["images"]) == 11_437
    assert {s.split("-")[0] for s in manifest["images"].values()} == {"train", "val"}
    assert all(manifest["images"][r["id"]] == r["split"] for r in data.rows)
    assert {i.split("/")[0] for i in manifest["images"]} == set(STYLES)
    assert not any(s["share_alike"] for s in STYLES.values())


def test_a_manifest_must_be_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "manifest.json"
    with pytest.raises(DataError, match="no manifest at"):
        build.read_manifest(path)
    for text in ("{", "[]", '{"packages": {}}'):
        path.write_text(text)
        with pytest.raises(DataError, match="is not a manifest"):
            build.read_manifest(path)
    assert build.main(["--out", str(tmp_path / "out"), "--manifest", str(path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_unpack_leaves_out_links_and_climbers(tmp_path: Path) -> None:
    archive = tmp_path / "package.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        for name in ("package/a/b.txt", "package/../../evil.txt", "package"):
            member = tarfile.TarInfo(name)
            member.size = 2
            tar.addfile(member, io.BytesIO(b"ok"))
        link = tarfile.TarInfo("package/link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hosts"
        tar.addfile(link)
    build.unpack(archive, tmp_path / "out" / "folder")
    results = [p for p in tmp_path.rglob("*") if p.is_file() or p.is_symlink()]
    assert sorted(p.name for p in results) == ["b.txt", "package.tgz"]


def test_concept_ids_and_families() -> None:
    assert concept_id("2764-FE0F-200D-1F525") == "2764-200d-1f525"
    assert family("1f469-200d-1f33e", "woman farmer", "person-role") == "1f9d1-200d-1f33e"
    assert family("1f3c3-200d-2640-200d-27a1", "…", "person-activity") == "1f3c3"
    assert family("1f550", "one o’clock", "time") == family("1f55c", "one-thirty", "time")
    assert family("1f34e", "red apple", "food-fruit") == "1f34e"


def test_icon_sets_match_by_code_then_by_name(tmp_path: Path) -> None:
    icons = {"pear": {"body": "<a/>"}, "melon": {"body": '<b fill="currentColor"/>', "width": 8}}
    aliases = {"cantaloupe": {"parent": "melon"}, "turned": {"parent": "pear", "rotate": 1}}
    table = {"icons": icons, "aliases": aliases, "width": 32, "height": 32}
    (tmp_path / "icons.json").write_text(json.dumps(table))
    (tmp_path / "chars.json").write_text(json.dumps({"1f348": "cantaloupe"}))
    concepts = {
        "1f348": {"name_en": "melon", "label": "melon"},
        "1f350": {"name_en": "pear", "label": "pear"},
    }
    index = sources._name_index(concepts)
    result = list(sources._by_code_points("noto", tmp_path, concepts, index))
    assert [s.id for s in result] == ["noto/1f348", "noto/1f350"]
    assert 'viewBox="0 0 8 32"' in result[0].content and "#000" in result[0].content
    assert sources.IconSet(tmp_path).svg("turned") is None


@pytest.mark.parametrize(
    ("rgb", "word"),
    [
        ((0, 0, 0), "black"),
        ((255, 255, 255), "white"),
        ((128, 128, 128), "gray"),
        ((221, 46, 68), "red"),
        ((255, 204, 77), "yellow"),
        ((120, 177, 89), "green"),
        ((85, 172, 238), "blue"),
        ((170, 142, 214), "purple"),
        ((193, 105, 79), "brown"),
    ],
)
def test_colour_words(rgb: tuple[int, int, int], word: str) -> None:
    pixels = np.full((16, 16, 3), 255, np.uint8)
    pixels[:8] = rgb
    alpha = np.zeros((16, 16), np.uint8)
    alpha[:8] = 255
    assert render.colour_words(pixels, alpha) == [(word, 1.0)]
    assert render.colour_words(pixels, alpha * 0) == []


def test_on_white_squares_and_scales() -> None:
    wide = PIL.Image.new("RGBA", (64, 32), (255, 0, 0, 255))
    flat, alpha = render.on_white(wide)
    assert flat.size == alpha.size == (128, 128)
    assert flat.getpixel((64, 2)) == (255, 255, 255)
    assert flat.getpixel((64, 64)) == (255, 0, 0)
    assert (alpha.getpixel((64, 2)), alpha.getpixel((64, 64))) == (0, 255)


def test_written_data_reads_back(data: EmojiData, tmp_path: Path) -> None:
    """The writer, given the sample's own images, makes the sample's rows and images again."""
    raw = [json.loads(x) for x in (FOLDER / "metadata.jsonl").read_text("utf-8").splitlines()]
    rendered = [
        render.Rendered(
            sources.Source(r["style"], r["codepoints"], r["variant"], "svg", ""),
            zipfile.ZipFile(FOLDER / r["file"]).read(r["member"]),
            list(zip(r["colours"], r["colour_shares"], strict=True)),
            render._thumbnail(data.image(r["id"])),
        )
        for r in reversed(raw)
    ]
    listed = {r["codepoints"]: {k: r[k] for k in r if k[:4] in ("name", "keyw")} for r in raw}
    concepts = {c: data.concepts[c] | listed[c] | {"label": ""} for c in data.concepts}
    packages = dict(r["source"].rsplit("@", 1) for r in raw)
    packages |= {s["package"]: "1" for s in STYLES.values() if s["package"] not in packages}
    manifest = {"packages": packages, "images": {r["id"]: r["split"] for r in raw}}
    build.write(tmp_path, rendered, concepts, manifest)
    written = [json.loads(x) for x in (tmp_path / "metadata.jsonl").read_text("utf-8").splitlines()]
    unlike = {"nn_train", "nn_train_id", "sibling_in_train"}  # these depend on all of the data
    keep = [{k: v for k, v in r.items() if k not in unlike} for r in raw]
    assert [{k: v for k, v in r.items() if k not in unlike} for r in written] == keep
    second = EmojiData(tmp_path)
    assert second.concepts == data.concepts
    assert all(second.image(r["id"]).tobytes() == data.image(r["id"]).tobytes() for r in raw)
    held = next(r for r in written if r["split"] == "val-pair")
    assert held["nn_train"] == pytest.approx(nearest_by_hand(second, held["id"]), abs=1e-4)


def nearest_by_hand(data: EmojiData, image_id: str) -> float:
    rendered = render._thumbnail(data.image(image_id))
    others = (render._thumbnail(data.image(i)) for i in data.split("train"))
    return min(float(np.abs(rendered - o).mean()) for o in others)
