from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from earlyfusion import Image, Text
from earlyfusion.errors import SettingError
from earlyfusion.evals import emoji, free
from earlyfusion.evals.gallery import count_different, frechet
from earlyfusion.mini.emoji.dataset import EmojiData
from earlyfusion.mini.emoji.dialogues import generate
from earlyfusion.mini.emoji.wordings import FreeRequest

FOLDER = Path(__file__).parent / "data"


@pytest.fixture(scope="module")
def data() -> EmojiData:
    return EmojiData(FOLDER)


@dataclass
class Reply:
    segments: list[Any] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(s.text for s in self.segments if isinstance(s, Text))

    @property
    def images(self) -> list[PIL.Image.Image]:
        return [s.pil for s in self.segments if isinstance(s, Image) and s.pil]


class Tokenizer:
    """Codes are the images themselves, `levels` grey levels a channel."""

    def __init__(self, levels: int = 256) -> None:
        self.step = 256 // levels

    def encode(self, images: list[PIL.Image.Image]) -> list[np.ndarray]:
        return [np.asarray(i) // self.step for i in images]

    def decode(self, codes: list[np.ndarray]) -> list[PIL.Image.Image]:
        return [PIL.Image.fromarray((c * self.step).astype(np.uint8)) for c in codes]


class Oracle:
    """Knows every image by its bytes and every drawing prompt by its words."""

    def __init__(self, data: EmojiData, tokenizer: Tokenizer) -> None:
        self.image_tokenizer, self.outputs = tokenizer, list[str]()
        self.by_bytes = {data.image(r["id"]).tobytes(): r for r in data.rows}
        requests = [(r["id"], "draw_styled") for r in data.rows]
        requests += [(i, "draw") for i in emoji._first_images(data, 10_000, 0)]
        self.drawn = {
            emoji._image_prompt(data, image_id, lang, table): data.image(image_id)
            for image_id, table in requests
            for lang in ("en", "ko")
        }

    def generate_batch(
        self, prompts: Sequence[Any], *, output: str, sampling: Sequence[Any]
    ) -> list[Reply]:
        assert len(prompts) == len(sampling) <= emoji.BATCH
        self.outputs.append(output)
        return [self.reply(p, output) for p in prompts]

    def reply(self, prompt: Any, output: str) -> Reply:
        if output == "image":
            return Reply([Image(self.drawn[prompt])])
        if output == "text" and isinstance(prompt[0], Image):
            row = self.by_bytes[prompt[0].pil.tobytes()]
            return Reply([Text(row["en"] if prompt[1] == "What is this?" else row["ko"])])
        return Reply([Text("Yes.")])


def test_naming_and_generation_of_a_perfect_model(data: EmojiData) -> None:
    model = Oracle(data, Tokenizer())
    named = emoji.naming(model, data, limit=100, seed=0)
    assert set(named) == {"train", "val-pair", "val-concept"}
    assert all(n[lang]["exact"] == 1 for n in named.values() for lang in ("en", "ko"))
    assert named["val-pair"]["en"]["n"] == len(data.split("val-pair"))
    result = emoji.retrieval(model, data, limit=20, seed=0)
    distance = result.pop("distance")
    assert {k: v["top1"] for k, v in result.items()} == dict.fromkeys(
        ("usual", "any style", "train", "val-pair", "ceiling"), 1
    )
    assert distance == {"n": len(data.split("val-pair")), "drawings": 0, "reconstructions": 0}
    assert result["usual"]["n"] <= result["train"]["n"]


def test_wrong_answers_do_not_count(data: EmojiData) -> None:
    model = Oracle(data, Tokenizer())
    model.by_bytes = dict.fromkeys(model.by_bytes, data.row("noto/1f349"))
    named = emoji.naming(model, data, limit=100, seed=0)
    shown = [data.row(i)["en"] == "watermelon" for i in data.split("train")]
    assert named["train"]["en"]["exact"] == round(sum(shown) / len(shown), 4)
    assert named["val-concept"]["ko"]["exact"] == 0
    model.drawn = dict.fromkeys(model.drawn, data.image("noto/1f349"))
    result = emoji.retrieval(model, data, limit=27, seed=0)
    assert result["train"]["top1"] < 0.2
    assert result["train"]["top1"] <= result["train"]["top5"] <= result["train"]["top10"] < 1
    assert result["distance"]["drawings"] > 0 == result["distance"]["reconstructions"]


def test_yes_is_right_where_the_dialogue_says_so(
    data: EmojiData, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = {"yesno_name": 30.0}
    samples = generate(data, "val", 60, korean=0, tasks=tasks)
    monkeypatch.setattr(emoji, "_dialogues", lambda data: samples)
    model = Oracle(data, Tokenizer())
    model.reply = lambda prompt, output: Reply([Text("Yes.")])  # type: ignore[method-assign]
    result = emoji.questions(model, data, limit=1000)["yesno_name"]
    truth = [s["answer"] == "Yes" for s in samples if s["task"] == "yesno_name"]
    assert result == {"n": len(truth), "exact": round(sum(truth) / len(truth), 4)}
    assert 0 < result["exact"] < 1


def test_well_formed_lists(data: EmojiData) -> None:
    image = Image(data.image("noto/1f349"))
    good = [Text("1. melon"), image, Text("2. pear"), image]
    assert emoji.well_formed(good, 2)
    assert not emoji.well_formed(good, 3)
    assert not emoji.well_formed(good[1:] + good[:1], 2)
    assert not emoji.well_formed([Text("1. melon"), image, Text("3. pear"), image], 2)
    assert not emoji.well_formed([Text("melon"), image, Text("pear"), image], 2)
    assert not emoji.well_formed([Text("1. melon"), Text("x"), Text("2. pear"), image], 2)


def test_right_items_of_a_list(data: EmojiData, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = {"subgroup": "food-fruit", "count": 3, "lang": "en", "check": "images+names"}
    turns = [{"role": "user", "content": [{"type": "text", "text": "Show me three fruits."}]}, {}]
    monkeypatch.setattr(emoji, "_dialogues", lambda data: [sample | {"messages": turns}])
    image = Image(data.image("noto/1f349"))
    model = Oracle(data, Tokenizer())
    answer = [Text("1. pear"), image, Text("2. horse"), image, Text("3. pear"), image]
    model.reply = lambda prompt, output: Reply(answer)  # type: ignore[method-assign]
    result = emoji.lists(model, data, limit=5, seed=0)
    assert result == {"n": 1, "well_formed": 1.0, "right_items": round(1 / 3, 4)}
    assert model.outputs == ["interleaved"]


def test_psnr_of_coarse_codes(data: EmojiData) -> None:
    exact = emoji.reconstruction(Oracle(data, Tokenizer()), data, limit=9, seed=0)
    coarse = emoji.reconstruction(Oracle(data, Tokenizer(levels=16)), data, limit=9, seed=0)
    assert exact == {"n": 9, "psnr_median": 99.0, "psnr_tenth": 99.0}
    assert 20 < coarse["psnr_tenth"] <= coarse["psnr_median"] < 35
    black, white = (PIL.Image.new("RGB", (8, 8), c) for c in ("black", "white"))
    assert emoji.psnr(black, white) == 0


def test_ranks_survive_small_damage(data: EmojiData) -> None:
    gallery = emoji.Gallery(data, "noto")
    for row in data.rows:
        if row["style"] == "noto":
            blurred = data.image(row["id"]).resize((24, 24)).resize((64, 64))
            assert gallery.rank(blurred, row["codepoints"]) == 0
    assert gallery.rank(data.image("noto/1f349"), "1f34c") > 0


def test_report_and_its_table(
    data: EmojiData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = [
        s for s in generate(data, "val", 40) if s["task"] in ("colour", "category", "common")
    ]
    monkeypatch.setattr(emoji, "_dialogues", lambda data: samples)
    model = Oracle(data, Tokenizer())
    model.reply = lambda prompt, output: Reply(  # type: ignore[method-assign]
        [Image(data.image("noto/1f349"))] if output == "image" else [Text("fruits")]
    )
    report = emoji.measure(model, data, limit=4)
    json.dumps(report)
    table = emoji.markdown(report)
    assert table[1] == "| --- | --- | --- | --- |"
    assert all(line.count("|") == 5 for line in table)
    assert any("median PSNR | val | 4 | 99.0 dB" in line for line in table)
    assert any("naming, exact match, ko | val-pair" in line for line in table)
    assert '| seeds 0 to 7 of "Draw a cat." | images | 8 | 1 different, 0 right |' in table
    assert any("says that it does not know | unknown words" in line for line in table)
    requests = emoji.requests_table(report)
    assert all(line.count("|") == 5 for line in requests)
    assert any("How about a banana?" in line for line in requests)
    card = tmp_path / "README.md"
    card.write_text("a\n\n| measure | on | n | score |\n| old |\n\nb\n\n" + requests[0] + "\n")
    emoji.check_card(card)
    emoji.update_card(card, [table, requests])
    assert card.read_text() == "\n".join(["a", "", *table, "", "b", "", *requests, ""])
    card.write_text("no table\n")
    with pytest.raises(SettingError, match="where a table begins"):
        emoji.check_card(card)
    with pytest.raises(SettingError, match="limit=0"):
        emoji.measure(model, data, limit=0)


def test_command_wants_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert emoji.main(["--data", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: no concepts.jsonl in")
    assert error.count("\n") == 1


def test_free_requests_are_judged_by_kind_and_thing(data: EmojiData) -> None:
    gallery = gallery_of(data)
    first = {row["codepoints"]: row for row in data.rows if row["split"] == "train"}
    banana, dog = (Image(data.image(first[c]["id"])) for c in ("1f34c", "1f415"))
    pear = [Text("1. pear"), banana, Text("2. peach"), banana]

    def judged(answer: str, expected: str, *parts: Any, shown: tuple[str, ...] = ()) -> Any:
        request = FreeRequest("en", answer, "", shown, (expected,))
        return free.judge(Reply(list(parts)), request, data, first, gallery)

    assert judged("draw", "1f34c", banana) == (True, True)
    assert judged("draw", "1f34c", dog) == (True, False)
    assert judged("draw", "1f34c", Text("banana")) == (False, False)
    assert judged("name", "1f34c", Text("Banana.")) == (True, True)
    assert judged("name", "1f34c", Text("dog")) == (True, False)
    assert judged("name", "1f34c", Text("Yes")) == judged("name", "1f34c", banana) == (False, False)
    assert judged("yes", "1f34c", Text("Yes")) == judged("no", "1f34c", Text("No")) == (True, True)
    assert judged("no", "1f34c", Text("Yes")) == (True, False)
    both = ("1f34c", "1f415")
    assert judged("which", "1f415", Text("The second"), shown=both) == (True, True)
    assert judged("which", "1f34c", Text("The second"), shown=both) == (True, False)
    assert (
        judged("common", "1f34c", Text("fruits")) == judged("list", "food", *pear) == (True, True)
    )
    assert judged("list", "animal", *pear) == (True, False)
    assert judged("list", "food", banana) == (False, False)
    assert judged("unknown", "", Text("I do not know this one")) == (True, True)
    assert judged("unknown", "", Text("banana")) == (False, False)


def test_refusals_of_one_who_knows_what_it_knows(data: EmojiData) -> None:
    model = Oracle(data, Tokenizer())
    known = {word for row in data.rows for name in (row["en"], row["ko"]) for word in name.split()}

    def reply(prompt: Any, output: str) -> Reply:
        assert output == "auto"
        if isinstance(prompt, str):
            is_known = any(word in prompt for word in known)
        else:
            is_known = prompt[0].pil.tobytes() in model.by_bytes
        return Reply([Text("ok" if is_known else "I do not know this one.")])

    model.reply = reply  # type: ignore[method-assign]
    ids = data.split("train")[:6]
    result = free.refusals(model, data, ids, ids, limit=5)
    assert {what: row["refused"] for what, row in result.items()} == {
        "unknown words": 1,
        "unknown images": 1,
        "known words": 0,
        "known images": 0,
    }
    assert all(row["n"] == 5 for row in result.values())


def test_images_that_differ_are_counted(data: EmojiData) -> None:
    gallery = gallery_of(data)
    one, other = data.image("noto/1f349"), data.image("noto/1f415")
    assert gallery.nearest(one)["codepoints"] == "1f349"
    assert count_different(gallery, [one, one.resize((64, 64)), other, one]) == 2
    several = [data.image(i) for i in data.split("train")]
    assert frechet(gallery, several, several) == pytest.approx(0, abs=1e-3)
    near, far = (frechet(gallery, several[k:], several) for k in (3, len(several) - 3))
    assert 0 < near < far


def test_scenes_that_are_answered_rightly(data: EmojiData) -> None:
    model, answers = Oracle(data, Tokenizer()), iter(["two", "2", "넷"])
    model.reply = lambda prompt, output: Reply([Text(next(answers))])  # type: ignore[method-assign]
    result = free.scene_answers(model, data, 3)
    assert result["n"] == 3 and result["exact"] < 1


def gallery_of(data: EmojiData) -> emoji.Gallery:
    return emoji.Gallery(data)


def test_features_say_where_an_edge_is() -> None:
    image = PIL.Image.new("RGB", (64, 64), "white")
    image.paste("black", (0, 0, 32, 64))
    colours, edges = emoji.features(image)
    assert (colours.size, edges.size) == (768, 256)
    columns = edges.reshape(16, 16)
    assert columns[:, 7:9].mean() > 0.05 and np.delete(columns, (7, 8), 1).max() < 1e-6
