"""Chat samples from the emoji data, with images in prompts and answers; reproducible by seed.

    python -m earlyfusion.mini.emoji.dialogues --data DIR --split train --n 20000 --seed 0 \
        --out train.jsonl

A sample is one JSON object:
  id, task, lang ("en" | "ko"), split
  messages  [{"role", "content": [{"type": "text", "text"} | {"type": "image", "image": id}]}]
  check     "exact"         the last answer is in `accept`, after `phrases.normalise`
            "image"         the answer is an image; `targets`: concept, style or null, reference
            "images+names"  a list: every name belongs to `subgroup`, an image follows it
  answer, accept, targets, subgroup, count, style where the check needs them
  kind      outside train: the hardest split among its images
Eighteen tasks, three fifths in English. With `further=0` the samples are the published ones.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from earlyfusion.content import Image, Message, Text
from earlyfusion.errors import DataError, SettingError
from earlyfusion.mini.emoji.dataset import EmojiData, Row
from earlyfusion.mini.emoji.phrases import (
    COLOUR_IN_NAME,
    COLOUR_SYNONYMS,
    KOREAN_COLOUR_BEFORE_NOUN,
    NUMBERS,
    ORDINALS,
    PROMPTS,
    STYLE_WORDS,
    WIDE_KINDS,
    normalise,
    particle,
    with_article,
)
from earlyfusion.mini.emoji.pools import Pools, kind_of, main_colour, name_of, style_of, too_similar
from earlyfusion.mini.emoji.wordings import add_typing_noise, compose_request

Sample = dict[str, Any]
Part = dict[str, str]
T = TypeVar("T")

UNCOLOURED_GROUPS = {"flags", "smileys-emotion", "symbols", "people-body"}
HARDEST_LAST = ["train", "val-pair", "val-concept", "test-pair", "test-concept"]


# ---- parts and turns of a sample, as its JSON has them


def text_part(text: str) -> Part:
    return {"type": "text", "text": text}


def image_part(row: Row) -> Part:
    return {"type": "image", "image": row["id"]}


def user(*parts: Part) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


def assistant(*parts: Part) -> dict[str, Any]:
    return {"role": "assistant", "content": list(parts)}


def styled_name(row: Row, lang: str) -> str:
    """The name with the style, as an answer says it: "cat face, Noto style"."""
    word = "style" if lang == "en" else "스타일"
    return f"{name_of(row, lang)}, {style_of(row, lang)} {word}"


class Writer:
    """Writes samples, one per call, with random choices of `rng`. A task returns None if the rows
    that it chose are not suitable. The other arguments are those of `Dialogues`."""

    def __init__(
        self,
        pools: Pools,
        rng: random.Random,
        further: float,
        wordings: float = 0.0,
        varied: bool = False,
    ) -> None:
        self.pools, self.rng, self.further = pools, rng, further
        self.wordings, self.varied = wordings, varied
        self.further_prompts = False

    def write(self, task: str, lang: str) -> Sample | None:
        """One sample of the task, whose `rows` are those of its images."""
        self.choose_prompts()
        return TASKS[task][1](self, lang)

    def choose_prompts(self) -> None:
        """Decide at random whether the next sample is written with the further prompts."""
        # No random number for further=0: the published samples were made without this one.
        self.further_prompts = self.further > 0 and self.rng.random() < self.further

    # ---- choices

    def pick(self, items: Sequence[T]) -> T:
        return items[self.rng.randrange(len(items))]

    def find(self, items: Sequence[T], matches: Callable[[T], bool]) -> T | None:
        """The first of thirty random items that matches, or None."""
        return next((x for x in (self.pick(items) for _ in range(30)) if matches(x)), None)

    def row(self) -> Row:
        """A random row. Half of the time the concept is chosen first, so that concepts with few
        styles are not rare."""
        if self.rng.random() < 0.5:
            return self.pick(self.pools.by_concept[self.pick(self.pools.concepts)])
        return self.pick(self.pools.rows)

    def distinct(self, rows: Sequence[Row], count: int) -> list[Row] | None:
        """`count` rows of different concepts, no two of one family."""
        for _ in range(50):
            chosen = [self.pick(rows) for _ in range(count)]
            if all(len({r[key] for r in chosen}) == count for key in ("codepoints", "family")):
                return chosen
        return None

    def prompt(self, table: str, lang: str, **words: str) -> str:
        """A prompt of the table, with its placeholders filled in."""
        if name := words.get("n"):
            words = {
                "a": with_article(name),
                "no": particle(name, "을/를"),
                "ng": particle(name, "은/는"),
                "nya": particle(name, "이야/야"),
            } | words
        # No random number for wordings=0: see `write`.
        if self.wordings and self.rng.random() < self.wordings:
            template = compose_request(table, lang, self.rng)
            if template is not None:
                return add_typing_noise(template.format(**words), self.rng)
        prompts = PROMPTS[table][lang]
        choices = prompts.further if self.further_prompts else prompts.published
        text = choices[0] if len(choices) == 1 else self.pick(choices)
        text = text.format(**words)
        if self.further_prompts and self.rng.random() < 0.12:
            text = text[:1].lower() + text[1:].rstrip(".")
        return text

    def ask(self, rows: Sequence[Row], question: str) -> dict[str, Any]:
        """The user's turn about some images; with further prompts the question may come first."""
        images = [image_part(r) for r in rows]
        if self.further_prompts and self.rng.random() < 0.2:
            return user(text_part(question), *images)
        return user(*images, text_part(question))

    # ---- forms of samples

    def text_sample(
        self, messages: list[Any], answer: str, rows: Sequence[Row], also: Sequence[str] = ()
    ) -> Sample:
        messages = [*messages, assistant(text_part(answer))]
        return {
            "messages": messages,
            "check": "exact",
            "answer": answer,
            "accept": [answer, *also],
            "rows": list(rows),
        }

    def image_sample(
        self, messages: list[Any], row: Row, styled: bool, rows: Sequence[Row], before: str = ""
    ) -> Sample:
        text = [text_part(before)] if before else []
        target = {
            "concept": row["codepoints"],
            "style": row["style"] if styled else None,
            "reference": row["id"],
        }
        return {
            "messages": [*messages, assistant(*text, image_part(row))],
            "check": "image",
            "targets": [target],
            "rows": list(rows),
        }

    def yes_or_no(self, lang: str, rows: Sequence[Row], question: str, yes: bool) -> Sample:
        if lang == "en":
            answer, also = ("Yes", ["yes"]) if yes else ("No", ["no"])
        else:
            answer, also = ("응", ["네", "예"]) if yes else ("아니", ["아니요", "아니오"])
        return self.text_sample([self.ask(rows, question)], answer, rows, also)

    def ordinal(self, lang: str, rows: Sequence[Row], question: str, index: int) -> Sample:
        word = ORDINALS[lang][index]
        answer, also = ("The " + word, word) if lang == "en" else (word, f"{index + 1}번째")
        return self.text_sample([self.ask(rows, question)], answer, rows, [also])

    # ---- tasks with one image

    def caption(self, lang: str) -> Sample:
        row = self.row()
        question = text_part(self.prompt("caption", lang))
        image = image_part(row)
        turn = user(image, question) if self.rng.random() < 0.7 else user(question, image)
        listed = row["name_en"] if lang == "en" else row["name_ko"]
        return self.text_sample([turn], name_of(row, lang), [row], [listed])

    def caption_style(self, lang: str) -> Sample:
        row = self.row()
        question = self.prompt("caption_style", lang)
        return self.text_sample([self.ask([row], question)], styled_name(row, lang), [row])

    def yesno_name(self, lang: str) -> Sample | None:
        row = self.row()
        yes = self.rng.random() < 0.5
        named: Row | None = row
        if not yes:
            hard = self.rng.random() < 0.5
            pool = self.pools.by_subgroup[row["subgroup"]] if hard else self.pools.rows
            named = self.find(pool, lambda r: r["family"] != row["family"])
        if named is None:
            return None
        question = self.prompt("yesno_name", lang, n=name_of(named, lang))
        return self.yes_or_no(lang, [row], question, yes)

    def yesno_kind(self, lang: str) -> Sample | None:
        if not self.pools.subgroups_of_four:
            return None
        subgroup = self.pick(self.pools.subgroups_of_four)
        row = self.pick(self.pools.by_subgroup[subgroup])
        yes = self.rng.random() < 0.5
        named = (
            subgroup
            if yes
            else self.find(self.pools.subgroups_of_four, lambda s: not too_similar(subgroup, s))
        )
        if named is None:
            return None
        kind = kind_of(self.pools.by_subgroup[named][0], lang)
        return self.yes_or_no(lang, [row], self.prompt("yesno_kind", lang, kind=kind), yes)

    def category(self, lang: str) -> Sample | None:
        if not self.pools.subgroups_of_four:
            return None
        row = self.pick(self.pools.by_subgroup[self.pick(self.pools.subgroups_of_four)])
        question = self.prompt("category", lang)
        return self.text_sample([self.ask([row], question)], kind_of(row, lang), [row])

    def colour(self, lang: str) -> Sample | None:
        for _ in range(40):
            row = self.row()
            if answer := main_colour(row, lang):
                question = self.prompt("colour", lang)
                return self.text_sample(
                    [self.ask([row], question)], answer, [row], COLOUR_SYNONYMS.get(answer, [])
                )
        return None

    def style_name(self, lang: str) -> Sample:
        row = self.row()
        words = STYLE_WORDS[lang]
        others = self.rng.sample([s for s in words if s != row["style"]], 3)
        options = [style_of(row, lang), *(words[s] for s in others)]
        self.rng.shuffle(options)
        question = self.prompt("style_name", lang, options=", ".join(options))
        return self.text_sample([self.ask([row], question)], style_of(row, lang), [row])

    def chat(self, lang: str) -> Sample:
        """A question about an image or a request, then a request for another thing; half of the
        time also a question about that. See `chats`."""
        tasks = (self.caption, self.caption, self.category, self.yesno_name, self.request)
        first = self.pick(tasks)(lang) or self.caption(lang)
        request = self.request(lang)
        messages = [*first["messages"], *request["messages"]]
        if self.rng.random() < 0.5:
            table, answer = self.follow_up(request["rows"][0], lang)
            question = self.prompt(table, lang)
            messages += [user(text_part(question)), assistant(text_part(answer))]
        return {"lang": lang, "messages": messages}

    def request(self, lang: str) -> Sample:
        """A request, in three of four cases without a style, which means the thing's first one."""
        row = self.row()
        styled = self.rng.random() < 0.25
        row = row if styled else self.pools.by_concept[row["codepoints"]][0]
        return self.request_for(row, name_of(row, lang), styled, lang)

    def study(self, row: Row, turns: int) -> Sample:
        """Several questions about one image; see `studies`."""
        first, other = self.rng.sample(["en", "ko"], 2)
        later = [
            (self.prompt("caption", other), name_of(row, other)),
            (self.prompt("category", first), kind_of(row, first)),
            (self.prompt("category", other), kind_of(row, other)),
            (self.prompt("caption_style", first), styled_name(row, first)),
            (self.prompt("caption_style", other), styled_name(row, other)),
        ]
        if colour := main_colour(row, first):
            later.append((self.prompt("colour", first), colour))
        self.rng.shuffle(later)
        question = self.ask([row], self.prompt("caption", first))
        messages = [question, assistant(text_part(name_of(row, first)))]
        for asked, answer in later[: turns - 1]:
            messages += [user(text_part(asked)), assistant(text_part(answer))]
        return {"lang": first, "messages": messages}

    # ---- tasks with several images

    def common(self, lang: str) -> Sample | None:
        count = self.pick([2, 3])
        if not self.pools.subgroups_of_four:
            return None
        rows = self.distinct(self.pools.by_subgroup[self.pick(self.pools.subgroups_of_four)], count)
        if not rows:
            return None
        question = self.prompt("common", lang)
        return self.text_sample([self.ask(rows, question)], kind_of(rows[0], lang), rows)

    def odd(self, lang: str) -> Sample | None:
        if not self.pools.subgroups_of_four:
            return None
        subgroup = self.pick(self.pools.subgroups_of_four)
        other = self.find(self.pools.subgroups_of_four, lambda s: not too_similar(subgroup, s))
        rows = self.distinct(self.pools.by_subgroup[subgroup], 2)
        if not other or not rows:
            return None
        odd_row, index = self.pick(self.pools.by_subgroup[other]), self.rng.randrange(3)
        rows.insert(index, odd_row)
        return self.ordinal(lang, rows, self.prompt("odd", lang), index)

    def which(self, lang: str) -> Sample | None:
        count = self.pick([2, 3, 4])
        rows = self.distinct(self.pools.rows, count)
        if not rows:
            return None
        index = self.rng.randrange(count)
        question = self.prompt("which", lang, n=name_of(rows[index], lang))
        return self.ordinal(lang, rows, question, index)

    def same_thing(self, lang: str) -> Sample | None:
        if not self.pools.in_two_styles:
            return None
        concept = self.pick(self.pools.in_two_styles)
        row = self.pick(self.pools.by_concept[concept])
        yes = self.rng.random() < 0.5
        pool = self.pools.by_concept[concept]
        if not yes:
            hard = self.rng.random() < 0.5
            pool = self.pools.by_subgroup[row["subgroup"]] if hard else self.pools.rows
        other = self.find(
            pool,
            lambda r: r["style"] != row["style"] and (yes or r["family"] != row["family"]),
        )
        if other is None:
            return None
        return self.yes_or_no(lang, [row, other], self.prompt("same_thing", lang), yes)

    def list_name(self, lang: str) -> Sample | None:
        rows = self.distinct(self.pools.rows, self.pick([2, 3]))
        if not rows:
            return None
        question = self.prompt("list_name", lang)
        answer = "\n".join(f"{i}. {name_of(r, lang)}" for i, r in enumerate(rows, 1))
        return self.text_sample([self.ask(rows, question)], answer, rows)

    # ---- tasks answered by an image

    def draw(self, lang: str) -> Sample:
        row = self.row()
        styled = self.rng.random() < (0.4 if self.further_prompts else 0.7)
        row = row if styled else self.usual(row)
        return self.request_for(row, self.coloured(row, lang), styled, lang)

    def request_for(self, row: Row, name: str, styled: bool, lang: str) -> Sample:
        """A request for an image by this name, with or without its style."""
        table = "draw_styled" if styled else "draw"
        question = self.prompt(table, lang, n=name, s=style_of(row, lang))
        return self.image_sample([user(text_part(question))], row, styled, [row])

    def usual(self, row: Row) -> Row:
        """The image that a request without a style means: that of the thing's first style.

        With `varied` it is any image of the thing, so that seeds give different images.
        """
        first = self.further_prompts and not self.varied
        return self.pools.by_concept[row["codepoints"]][0] if first else row

    def coloured(self, row: Row, lang: str) -> str:
        """The name; with further prompts sometimes with the image's clear colour: "yellow taxi"."""
        name = name_of(row, lang)
        if not self.further_prompts or row["group"] in UNCOLOURED_GROUPS or self.rng.random() > 0.3:
            return name
        colour = main_colour(row, lang)
        if not colour or COLOUR_IN_NAME.search(name) or COLOUR_IN_NAME.search(row["en"]):
            return name
        return f"{KOREAN_COLOUR_BEFORE_NOUN.get(colour, colour)} {name}"

    def keyword(self, lang: str) -> Sample | None:
        row = self.row()
        name = name_of(row, lang)
        listed = row["keywords_en"] if lang == "en" else row["keywords_ko"]
        words = [w for w in listed if len(w) > 1 and w.lower() not in name.lower()]
        if len(words) < 2:
            return None
        words = self.rng.sample(words, min(len(words), self.pick([2, 3, 4])))
        row = self.usual(row)
        question = self.prompt("keyword", lang, words=", ".join(words))
        return self.image_sample([user(text_part(question))], row, False, [row], before=name)

    def restyle(self, lang: str) -> Sample | None:
        if not self.pools.in_two_styles:
            return None
        concept = self.pick(self.pools.in_two_styles)
        row = self.pick(self.pools.by_concept[concept])
        other = self.find(self.pools.by_concept[concept], lambda r: r["style"] != row["style"])
        if other is None:
            return None
        question = self.prompt("restyle", lang, s=style_of(other, lang))
        return self.image_sample([self.ask([row], question)], other, True, [row, other])

    def list_draw(self, lang: str) -> Sample | None:
        """ "three fruits": name, image, name, image, name, image."""
        count = self.pick([2, 3, 3, 4])
        kind, pool, subgroup = self.listed_kind(lang)
        rows = self.distinct(pool, count) if pool else None
        if not rows:
            return None
        styled = self.rng.random() < 0.5
        if styled:
            style = rows[0]["style"]
            same_style = [r for r in pool if r["style"] == style]
            rows = self.distinct(same_style, count)
            if not rows:
                return None
        style_word = style_of(rows[0], lang)
        with_style = f" in {style_word} style" if lang == "en" else f"{style_word} 스타일로 "
        number = NUMBERS[lang][count]
        if self.further_prompts and self.rng.random() < 0.2:
            number = str(count)
        question = self.prompt(
            "list_draw", lang, kind=kind, num=number, st=with_style if styled else ""
        )
        parts: list[Part] = []
        for i, row in enumerate(rows, 1):
            parts += [text_part(f"{i}. {name_of(row, lang)}"), image_part(row)]
        return {
            "messages": [user(text_part(question)), assistant(*parts)],
            "check": "images+names",
            "subgroup": subgroup,
            "count": count,
            "style": rows[0]["style"] if styled else None,
            "rows": rows,
        }

    def listed_kind(self, lang: str) -> tuple[str, list[Row], str]:
        """The subgroup of a list: its name in the language, its rows, and its id."""
        if self.further_prompts and self.rng.random() < 0.25:
            prefix = self.pick(list(WIDE_KINDS))
            return WIDE_KINDS[prefix][lang], self.pools.rows_by_wide_kind[prefix], prefix
        if not self.pools.subgroups_of_six:
            return "", [], ""
        subgroup = self.pick(self.pools.subgroups_of_six)
        rows = self.pools.by_subgroup[subgroup]
        return kind_of(rows[0], lang), rows, subgroup

    # ---- tasks with several turns

    def chat_draw_ask(self, lang: str) -> Sample:
        """A request, a question about the image, then another style if there is one."""
        sample = self.draw(lang)
        row: Row = sample["rows"][0]
        table, answer = self.follow_up(row, lang)
        messages = [*sample["messages"], user(text_part(self.prompt(table, lang)))]
        others = [r for r in self.pools.by_concept[row["codepoints"]] if r["style"] != row["style"]]
        if not others:
            return self.text_sample(messages, answer, [row])
        other = self.pick(others)
        question = self.prompt("then_restyle", lang, s=style_of(other, lang))
        turns = [*messages, assistant(text_part(answer)), user(text_part(question))]
        return self.image_sample(turns, other, True, [row, other])

    def follow_up(self, row: Row, lang: str) -> tuple[str, str]:
        """A question about the image of the first turn, and its answer."""
        choices = [
            ("then_kind", kind_of(row, lang)),
            ("then_name", name_of(row, lang)),
            ("then_translate", name_of(row, "ko" if lang == "en" else "en")),
        ]
        return self.pick(choices) if self.further_prompts else choices[0]

    def chat_caption_follow(self, lang: str) -> Sample:
        """A name, then the same in the other language; with further prompts also other turns."""
        sample = self.caption(lang)
        row: Row = sample["rows"][0]
        others = [r for r in self.pools.by_concept[row["codepoints"]] if r["style"] != row["style"]]
        choice = self.rng.random() if self.further_prompts else 1.0
        if choice < 0.25:
            turn = user(text_part(self.prompt("then_kind", lang)))
            return self.text_sample([*sample["messages"], turn], kind_of(row, lang), [row])
        if choice < 0.5 and others:
            other = self.pick(others)
            turn = user(text_part(self.prompt("then_restyle", lang, s=style_of(other, lang))))
            return self.image_sample([*sample["messages"], turn], other, True, [row, other])
        turn = user(text_part(self.prompt("then_translate", lang)))
        answer = name_of(row, "ko" if lang == "en" else "en")
        return self.text_sample([*sample["messages"], turn], answer, [row])


# Task: its weight in the published mix, and its writer.
TASKS: dict[str, tuple[float, Callable[[Writer, str], Sample | None]]] = {
    "caption": (16, Writer.caption),
    "caption_style": (5, Writer.caption_style),
    "draw": (20, Writer.draw),
    "keyword": (3, Writer.keyword),
    "yesno_name": (7, Writer.yesno_name),
    "yesno_kind": (4, Writer.yesno_kind),
    "category": (5, Writer.category),
    "common": (6, Writer.common),
    "odd": (4, Writer.odd),
    "which": (5, Writer.which),
    "same_thing": (4, Writer.same_thing),
    "colour": (5, Writer.colour),
    "style_name": (3, Writer.style_name),
    "list_draw": (5, Writer.list_draw),
    "list_name": (3, Writer.list_name),
    "restyle": (4, Writer.restyle),
    "chat_draw_ask": (3, Writer.chat_draw_ask),
    "chat_caption_follow": (3, Writer.chat_caption_follow),
}


class Dialogues:
    """An endless stream of samples; every `iter()` starts it again at the first.

    `korean` is the share of Korean samples, `further` the share written with the further prompts,
    `tasks` new weights of some tasks (0 leaves a task out). `wordings` is the share of requests
    that are composed, with typing noise (`wordings.compose_request`). With `varied`, any image of
    a thing may answer a request without a style. Samples may repeat; `generate` drops repeats.

    Raises SettingError for an unknown task or an impossible share, DataError for an empty split.
    """

    def __init__(
        self,
        data: EmojiData,
        split: str = "train",
        seed: int = 0,
        korean: float = 0.4,
        tasks: Mapping[str, float] | None = None,
        further: float = 0.5,
        wordings: float = 0.0,
        varied: bool = False,
    ) -> None:
        for name, share in (("korean", korean), ("further", further), ("wordings", wordings)):
            if not 0 <= share <= 1:
                raise SettingError(f"{name} is {share}: give a share from 0 to 1")
        self.split, self.seed, self.korean, self.further = split, seed, korean, further
        self.wordings, self.varied = wordings, varied
        self.weights = _weights(tasks or {})
        self.pools = Pools(data, split)

    def __iter__(self) -> Iterator[Sample]:
        rng = random.Random(f"{self.split}-{self.seed}")
        writer = Writer(self.pools, rng, self.further, self.wordings, self.varied)
        names, weights = list(self.weights), list(self.weights.values())
        misses = 0
        while misses < 1000:
            task = rng.choices(names, weights)[0]
            lang = "ko" if rng.random() < self.korean else "en"
            sample = writer.write(task, lang)
            misses = 0 if sample else misses + 1
            if sample:
                yield self._finish(task, lang, sample)
        raise DataError(
            f"split {self.split!r} is too small for the tasks "
            f"{', '.join(n for n in names if self.weights[n])}: allow more tasks or use more data"
        )

    def _finish(self, task: str, lang: str, sample: Sample) -> Sample:
        rows: list[Row] = sample.pop("rows")
        head: Sample = {"task": task, "lang": lang, "split": self.split}
        if self.split != "train":
            head["kind"] = max((r["split"] for r in rows), key=HARDEST_LAST.index)
            siblings = [r["sibling_in_train"] for r in rows if "sibling_in_train" in r]
            if siblings:
                head["sibling_in_train"] = any(siblings)
        if "accept" in sample:
            sample["accept"] = list(dict.fromkeys(normalise(a) for a in sample["accept"]))
        return head | sample


def generate(
    data: EmojiData,
    split: str = "train",
    n: int = 20_000,
    seed: int = 0,
    korean: float = 0.4,
    tasks: Mapping[str, float] | None = None,
    further: float = 0.5,
    wordings: float = 0.0,
    varied: bool = False,
) -> list[Sample]:
    """`n` different samples with ids; the arguments are those of `Dialogues`.

    Raises DataError if the split does not have that many different ones.
    """
    seen: set[str] = set()
    samples: list[Sample] = []
    repeats = 0
    for sample in Dialogues(data, split, seed, korean, tasks, further, wordings, varied):
        if len(samples) >= n or repeats > 1000:
            break
        key = json.dumps(sample["messages"], ensure_ascii=False)
        repeats = repeats + 1 if key in seen else 0
        if key not in seen:
            seen.add(key)
            samples.append({"id": f"{split}-{seed}-{len(samples):06d}", **sample})
    if len(samples) < n:
        raise DataError(
            f"{n} samples were requested and split {split!r} gives {len(samples)} different ones: "
            "ask for fewer or use more data"
        )
    return samples


def caption_pairs(data: EmojiData, split: str = "train") -> Iterator[Sample]:
    """The plain documents of every image: its name from it, and it from its name.

    Three per image and language: the question with the image, its name with the style, and the
    request for it in that style. The first image of a thing also has its name and the request
    without a style, as task "usual". They have the form of dialogues.
    """
    concepts: set[str] = set()
    for image_id in data.split(split):
        row = data.row(image_id)
        first = row["codepoints"] not in concepts
        concepts.add(row["codepoints"])
        for lang in ("en", "ko"):
            name, style = name_of(row, lang), style_of(row, lang)
            words = {"n": name, "no": particle(name, "을/를"), "s": style}
            plain, styled = (
                PROMPTS[table][lang].published[0].format(**words)
                for table in ("draw", "draw_styled")
            )
            short = f"{name}, {style} style" if lang == "en" else f"{name}, {style} 스타일로."
            question = user(image_part(row), text_part(PROMPTS["caption"][lang].published[0]))
            head = {"lang": lang, "split": split}
            yield {"task": "name", **head, "messages": [question, assistant(text_part(name))]}
            requests = [("picture", short), ("picture", styled)]
            for task, request in requests + [("usual", name), ("usual", plain)] * first:
                messages = [user(text_part(request)), assistant(image_part(row))]
                yield {"task": task, **head, "messages": messages}


def studies(
    data: EmojiData, split: str, n: int, seed: int, turns: int = 4, wordings: float = 0.0
) -> Iterator[Sample]:
    """`n` dialogues with several questions about one image, each image equally often.

    The first question is for the name, in one of the languages; the others are for the name in the
    other one, the subgroup, a clear colour, and the name with the style, in any order. An image
    takes many tokens and a question few, so this teaches image understanding at the lowest cost.
    """
    rng = random.Random(f"study-{split}-{seed}")
    writer = Writer(Pools(data, split), rng, 0.5, wordings)
    rows = [data.row(i) for i in data.split(split)]
    for number in range(n):
        if number % len(rows) == 0:
            rng.shuffle(rows)
        writer.choose_prompts()
        yield {"task": "study", "split": split, **writer.study(rows[number % len(rows)], turns)}


def chats(
    data: EmojiData, split: str, n: int, seed: int, korean: float = 0.4, wordings: float = 0.0
) -> Iterator[Sample]:
    """`n` chats in which a request for an image follows a question about another image, or another
    request. None of the tasks has this, and without it a model answers such a request in words."""
    rng = random.Random(f"chat-{split}-{seed}")
    writer = Writer(Pools(data, split), rng, 0.5, wordings)
    for _ in range(n):
        writer.choose_prompts()
        lang = "ko" if rng.random() < korean else "en"
        yield {"task": "chat", "split": split, **writer.chat(lang)}


def write_samples(samples: Sequence[Sample], path: Path) -> None:
    """Write one JSON object per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for sample in samples:
            file.write(json.dumps(sample, ensure_ascii=False, separators=(",", ":")) + "\n")


def messages_of(
    turns: Iterable[Mapping[str, Any]], load_image: Callable[[str, str], Image]
) -> list[Message]:
    """Turns of a sample; `load_image` maps an image's id and the role of its turn to an `Image`."""
    return [
        Message(
            turn["role"], [_content(part, turn["role"], load_image) for part in turn["content"]]
        )
        for turn in turns
    ]


def _content(part: Part, role: str, load_image: Callable[[str, str], Image]) -> Text | Image:
    return Text(part["text"]) if part["type"] == "text" else load_image(part["image"], role)


def texts_of(samples: Iterable[Sample]) -> Iterator[str]:
    """Every text of the samples, to train a tokenizer on."""
    for sample in samples:
        for message in sample["messages"]:
            yield from (part["text"] for part in message["content"] if part["type"] == "text")


def _weights(changed: Mapping[str, float]) -> dict[str, float]:
    unknown = sorted(set(changed) - set(TASKS))
    if unknown:
        raise SettingError(f"task {unknown[0]!r} is unknown: choose among {', '.join(TASKS)}")
    weights = {name: float(changed.get(name, weight)) for name, (weight, _) in TASKS.items()}
    if min(weights.values()) < 0 or not any(weights.values()):
        raise SettingError(
            "task weights must not be negative or all zero: raise at least one above 0"
        )
    return weights


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Make chat samples from the emoji data.")
    parser.add_argument("--data", type=Path, required=True, help="folder of the emoji data")
    parser.add_argument("--split", default="train", choices=["train", "val", "test"])
    parser.add_argument("--n", type=int, default=20_000, help="how many samples")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--korean", type=float, default=0.4, help="share of Korean samples")
    parser.add_argument("--further", type=float, default=0.5, help="share with the further prompts")
    parser.add_argument("--out", type=Path, required=True, help="the JSONL file to write")
    args = parser.parse_args(arguments)
    try:
        data = EmojiData(args.data)
        samples = generate(data, args.split, args.n, args.seed, args.korean, None, args.further)
        write_samples(samples, args.out)
    except (DataError, SettingError) as error:
        parser.error(str(error))
    print(f"{len(samples)} samples in {args.out}")


if __name__ == "__main__":
    main()
