"""Wordings, scenes, unknown things and icons: what the larger mini learns beside the dialogues."""

from __future__ import annotations

import json
import random
import re
import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from earlyfusion.errors import SettingError
from earlyfusion.mini import packed_transformer
from earlyfusion.mini.emoji import scene_dialogues, scenes
from earlyfusion.mini.emoji.dataset import EmojiData
from earlyfusion.mini.emoji.dialogues import Dialogues, generate
from earlyfusion.mini.emoji.mixture import (
    MixtureConfig,
    is_plain,
    load_samples,
    synthetic_image_ids,
)
from earlyfusion.mini.emoji.phrases import PROMPTS, normalise
from earlyfusion.mini.emoji.scenes import Scene, image_of, make_synthetic_images
from earlyfusion.mini.emoji.tensors import load_emoji, load_split
from earlyfusion.mini.emoji.wordings import (
    FORMS,
    HELD_OUT,
    add_typing_noise,
    all_templates,
    compose_request,
)
from earlyfusion.model.vqgan import VQGAN
from earlyfusion.recipes.run import override

FOLDER = Path(__file__).parent / "data"


@pytest.fixture(scope="module")
def data() -> EmojiData:
    return EmojiData(FOLDER)


def said(sample: dict[str, Any], role: str) -> list[str]:
    turns = [m for m in sample["messages"] if m["role"] == role]
    return [p["text"] for t in turns for p in t["content"] if p["type"] == "text"]


def shown(sample: dict[str, Any]) -> list[str]:
    return [p["image"] for m in sample["messages"] for p in m["content"] if p["type"] == "image"]


# ---- wordings


def skeleton(template: str) -> str:
    """A template without case and marks, every name and number in it as one sign."""
    blank = re.sub(r"(?:\{\w+\}\s*)+", "\0 ", template.replace("{nya}", "\0야"))
    return re.sub(" +", " ", re.sub(r"[^\w\0 ]", "", normalise(blank))).strip()


def test_no_template_gives_a_held_out_request() -> None:
    for lang in ("en", "ko"):
        known = {skeleton(t) for table in FORMS for t in all_templates(table, lang)}
        for prompts in PROMPTS.values():
            known |= {skeleton(t) for t in (*prompts[lang].published, *prompts[lang].further)}
        assert skeleton("Draw {a}, please.") in known if lang == "en" else True
        for request in HELD_OUT:
            words = re.sub(r"[^\w ]", "", normalise(request.text))
            assert request.lang != lang or words not in known
            for begin in range(len(words) if request.lang == lang else 0):
                for end in range(begin + 1, len(words) + 1):
                    if end - begin < len(words):  # a name alone is a request, but not all names are
                        cut = words[:begin] + "\0" + words[end:]
                        assert skeleton(cut) not in known, (request.text, cut)
    languages = [request.lang for request in HELD_OUT]
    assert languages.count("en") >= 20 and languages.count("ko") >= 10


@pytest.mark.parametrize("lang", ["en", "ko"])
def test_composed_requests_have_the_marks_of_their_table(lang: str) -> None:
    rng = random.Random(0)
    for table in FORMS:
        marks = {m for p in PROMPTS[table][lang].further for m in re.findall(r"\{\w+\}", p)}
        marks |= {"{n}", "{a}"} if marks & {"{n}", "{a}", "{no}", "{ng}"} else set()
        result = {compose_request(table, lang, rng) for _ in range(200)}
        assert len(result) > 30
        for template in result:
            assert template and set(re.findall(r"\{\w+\}", template)) <= marks, template
    assert compose_request("odd", lang, rng) is None


def test_people_type_in_many_ways() -> None:
    rng = random.Random(0)
    typed = [add_typing_noise("Draw a banana.", rng) for _ in range(2000)]
    assert 0.15 < np.mean([t.startswith("draw a ") for t in typed]) < 0.35
    assert 0.15 < np.mean([not t.endswith(".") for t in typed]) < 0.35
    known = {"draw a banana", "DRAW A BANANA", "Draw a banana"}
    slips = [t for t in typed if t.rstrip(".") not in known]
    assert 0.02 < len(slips) / 2000 < 0.08
    assert all(abs(len(t.rstrip(".")) - len("draw a banana")) <= 1 for t in slips)


def test_dialogues_take_composed_wordings_and_any_image(data: EmojiData) -> None:
    only = {name: float(name == "draw") for name in ("draw", *Dialogues(data).weights)}
    mixed = Dialogues(data, tasks=only, further=1, wordings=1, varied=True, korean=0.5)
    result = list(islice(mixed, 400))
    requests = [said(s, "user")[0] for s in result]
    assert len(set(requests)) > 350
    bananas = {shown(s)[0] for s in result if not s["targets"][0]["style"]}
    styles = {i.split("/")[0] for i in bananas if i.endswith("/1f34c")}
    assert len(styles) > 1  # without a style any image of the thing may be the answer
    assert not any("{" in text for text in requests)
    with pytest.raises(SettingError, match="wordings is 2"):
        Dialogues(data, wordings=2)


# ---- scenes


def test_a_scene_has_its_id_and_consists_of_its_images(data: EmojiData) -> None:
    scene = Scene(2, 2, ("noto/1f34c", "noto/1f34c", "", "noto/1f415"))
    assert Scene.of(scene.id) == scene
    assert scene.counts() == {"noto/1f34c": 2, "noto/1f415": 1}
    assert scene.beside(0, (1, 0)) == "noto/1f34c" and scene.beside(1, (1, 0)) == ""
    assert scene.beside(3, (0, -1)) == "noto/1f34c"
    pixels = np.asarray(image_of(data, scene.id))
    assert pixels.shape == (128, 128, 3)
    assert (pixels[64:, :64] == 255).all()  # the empty cell
    assert np.array_equal(pixels[:64, :64], pixels[:64, 64:])
    small = np.asarray(data.image("noto/1f415").resize((64, 64)), np.float64)
    assert np.abs(small - pixels[64:, 64:]).mean() < 8
    table = load_split(FOLDER, "train", 16, "cpu")
    numbers = {name: number for number, name in enumerate(data.split("train"))}
    several = [s.id for s in scenes.scenes(data, 20)] + scenes.unknown_image_ids(data, 20)
    result = make_synthetic_images(several, table, numbers)
    assert result.shape == (len(several), 16, 16, 3) and result.dtype == torch.uint8
    alone = make_synthetic_images(several[3:4], table, numbers)
    assert torch.equal(alone[0], result[3])


def test_strangers_are_other_images(data: EmojiData) -> None:
    result = scenes.unknown_image_ids(data, 30)
    assert (
        result == scenes.unknown_image_ids(data, 30) != scenes.unknown_image_ids(data, 30, seed=1)
    )
    mixed = next(i for i in result if i.startswith("scrambled/"))
    before = np.asarray(data.image(mixed.split(":")[1])).reshape(-1, 3)
    after = np.asarray(image_of(data, mixed)).reshape(-1, 3)
    assert not np.array_equal(before, after)
    assert np.array_equal(np.sort(before, 0), np.sort(after, 0))
    noise = [np.asarray(image_of(data, f"noise/{n}")) for n in (1, 2, 1)]
    assert np.array_equal(noise[0], noise[2]) and not np.array_equal(noise[0], noise[1])


def test_scenes_are_asked_about_truly(data: EmojiData) -> None:
    words = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6}
    all_scenes = scenes.scenes(data, 200)
    rng = random.Random(1)
    counted = placed = 0
    for scene in all_scenes:
        counts = scene.counts()
        assert 1 <= sum(counts.values()) <= scenes.MAX_CELLS
        named = {data.row(i)["en"]: n for i, n in counts.items()}
        for question, answer in scene_dialogues.scene_questions(data, scene, "en", rng):
            requests = [n for name, n in named.items() if scene_dialogues.plural(name) in question]
            if "thing" in question or "everything" in question:
                assert words[answer] == sum(counts.values())
            elif requests and "How many" in question:
                assert words[answer] == requests[0]
                counted += 1
            elif "left of" in question:
                middle = next(i for i in counts if f"the {data.row(i)['en']}?" in question)
                at = scene.cells.index(middle)
                assert data.row(scene.cells[at - 1])["en"] == answer
                placed += 1
    assert counted > 50 and placed > 10
    banana, dog = data.row("noto/1f34c"), data.row("noto/1f415")
    assert (
        scene_dialogues.count_phrase(banana, 2, "en"),
        scene_dialogues.count_phrase(banana, 1, "en"),
    ) == (
        "two bananas",
        "a banana",
    )
    assert scene_dialogues.count_phrase(dog, 2, "ko") == "개 두 마리"
    scene = Scene(2, 2, ("noto/1f34c", "noto/1f34c", "noto/1f415", ""))
    assert scene_dialogues.describe_scene(data, scene, "en") == "two bananas and a dog"
    assert scene_dialogues.describe_scene(data, scene, "ko") == "바나나 두 개와 개 한 마리"
    assert [scene_dialogues.plural(n) for n in ("fox", "cherry", "wolf", "hot dog", "key")] == [
        "foxes",
        "cherries",
        "wolves",
        "hot dogs",
        "keys",
    ]


def test_generated_scenes_have_their_things_in_order(data: EmojiData) -> None:
    result = scenes.scenes(data, 100)
    created = list(scene_dialogues.scene_samples(data, result, 300, 0, 0.4, 0.5))
    assert len(created) == 300
    generated = [s for s in created if s["messages"][-1]["content"][0]["type"] == "image"]
    assert 60 < len(generated) < 150
    for sample in generated:
        scene = Scene.of(shown(sample)[0])
        assert scenes.is_ordered(scene)
        if sample["lang"] == "en":
            words = scene_dialogues.describe_scene(data, scene, "en").lower()
            asked = said(sample, "user")[0].lower()
            assert words in asked or abs(len(asked) - len(words)) < 60  # a slip of the fingers
    assert list(scene_dialogues.scene_samples(data, [], 5, 0, 0.4, 0.5)) == []


# ---- unknown things


def test_unknown_things_are_refused_and_are_unknown(data: EmojiData) -> None:
    strange = scenes.unknown_image_ids(data, 20)
    result = list(scene_dialogues.unknown_samples(data, strange, 200, 0, 0.5, 0.5))
    assert {said(s, "assistant")[-1] for s in result} == set(
        scene_dialogues.UNKNOWN_ANSWER.values()
    )
    assert all(said(s, "assistant") == [scene_dialogues.UNKNOWN_ANSWER[s["lang"]]] for s in result)
    pictures_shown = [s for s in result if shown(s)]
    assert 60 < len(pictures_shown) < 140
    things = scene_dialogues.unknown_things(
        data, [("banana", "바나나"), ("lathe", "선반"), ("x", "수박")]
    )
    assert things == [("lathe", "선반")]
    kept = {
        english
        for english, _ in scene_dialogues.unknown_things(data, scene_dialogues.UNKNOWN_THINGS)
    }
    assert not kept & {english for english, _ in scene_dialogues.HELD_OUT_THINGS} and len(kept) > 80
    rng = random.Random(0)
    assert len({scene_dialogues.invent_word("en", rng) for _ in range(100)}) > 90
    assert all("가" <= c <= "힣" for _ in range(50) for c in scene_dialogues.invent_word("ko", rng))


# ---- the mixture, and icons


MIXED = MixtureConfig(
    documents=200, scenes=0.2, unknown=0.1, wordings=0.5, varied=True, made=40, tasks={"draw": 9.0}
)


def test_the_mixture_has_scenes_and_unknown_things(data: EmojiData) -> None:
    result = load_samples(FOLDER, MIXED)
    tasks = [s["task"] for s in result]
    assert tasks.count("scene") == 31 and tasks.count("unknown") == 15
    assert result == load_samples(FOLDER, MIXED)
    known = {*data.split("train"), *synthetic_image_ids(data, MIXED)}
    assert {i for s in result for i in shown(s)} <= known
    assert any(not is_plain(s) for s in result if s["task"] == "scene")
    with pytest.raises(SettingError, match="wordings=2"):
        MixtureConfig(wordings=2)
    with pytest.raises(SettingError, match="made=0"):
        MixtureConfig(made=0)


@pytest.fixture
def icons(data: EmojiData, tmp_path: Path) -> Path:
    """A set of three icons, drawn by what is at hand: a banana, an odd thing, one held out."""
    (tmp_path / "images").mkdir()
    shutil.copy(FOLDER / data.row("noto/1f34c")["file"], tmp_path / "images" / "set.zip")
    style = {"style": "set", "file": "images/set.zip", "licence": "MIT", "source": "x@1"}
    named = [("banana", "train"), ("flux", "train"), ("gear knob", "val"), ("horse", "train")]
    rows = [
        {"id": f"set/{name}", "split": split, "name_en": name, "keywords_en": []}
        | style
        | {"member": data.row("noto/1f34c")["member"]}
        for name, split in named
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "metadata.jsonl").write_text(lines, encoding="utf-8")
    return tmp_path


def test_icons_join_where_their_things_are_known(data: EmojiData, icons: Path) -> None:
    joined = EmojiData(FOLDER, icons)
    new = set(joined.split("train")) - set(data.split("train"))
    assert new == {"icon/set/banana"}  # a horse is held out
    assert joined.split("unknown-train") == ["icon/set/flux"]
    assert joined.split("unknown-val") == ["icon/set/gear knob"]
    row = joined.row("icon/set/banana")
    assert (row["codepoints"], row["ko"], row["style"]) == ("1f34c", "바나나", "icon")
    assert joined.image(row["id"]).size == joined.image("icon/set/flux").size == (128, 128)
    assert joined.split("val") == data.split("val")
    only = {name: float(name == "caption_style") for name in Dialogues(joined).weights}
    answers = {s["answer"] for s in islice(Dialogues(joined, tasks=only), 400)}
    assert "banana, icon style" in answers
    assert any(i.startswith("icon/") for i in scenes.unknown_image_ids(joined, 20))
    assert generate(joined, n=30, tasks={n: float(n == "style_name") for n in only})


def test_all_images_are_encoded_and_the_next_stage_takes_their_codes(
    icons: Path, tmp_path: Path
) -> None:
    fields = [f"data={FOLDER}", f"icons={icons}", "resolution=16", "plain=1", "recoloured=1"]
    fields += ["made=12", "documents=40", f"out={tmp_path / 'a'}", "device=cpu"]
    config = override(packed_transformer.config, fields)
    torch.manual_seed(0)
    vqgan = VQGAN(config.model.vq_config).eval()
    ids = packed_transformer.training_image_ids(config)
    table = packed_transformer._load_pixels(config, ids, torch.device("cpu"))
    train = load_emoji(FOLDER, icons).split("train")
    assert ids[: len(train)] == train and len(table) == len(ids) > len(train) + 12
    strange = ids.index("icon/set/flux")
    assert torch.equal(table[strange], table[train.index("icon/set/banana")])
    codes = packed_transformer.load_or_encode_variants(vqgan, config, ids)
    assert codes.shape == (len(ids), 2, config.model.vq_config.grid**2)
    after = override(config, [f"out={tmp_path / 'b'}", f"start={tmp_path / 'a'}"])
    changed = codes.flip(0)
    np.save(tmp_path / "a" / "codes.npy", changed.numpy())
    assert torch.equal(packed_transformer.load_or_encode_variants(vqgan, after, ids), changed)
    # The stage after that finds them in the folder of the second.
    third = override(config, [f"out={tmp_path / 'c'}", f"start={tmp_path / 'b'}"])
    assert torch.equal(packed_transformer.load_or_encode_variants(vqgan, third, ids), changed)
    other = override(after, ["plain=2", "recoloured=1"])
    assert packed_transformer.load_or_encode_variants(vqgan, other, ids).shape[1] == 3
