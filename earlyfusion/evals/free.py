"""Evaluations of free wordings, refusals, scenes and variety over seeds.

For free wordings and refusals the model itself chooses between text and images (`auto`). The
requests and the unknown things are those that training never uses
(`earlyfusion.mini.emoji.wordings.HELD_OUT`, `scene_dialogues.HELD_OUT_THINGS`).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from earlyfusion import Image, Text
from earlyfusion.evals.asking import Model, Numbers, generate_replies, seeded_sampling, share
from earlyfusion.evals.gallery import Gallery, count_different
from earlyfusion.mini.emoji.dataset import EmojiData, Row
from earlyfusion.mini.emoji.phrases import ORDINALS, PROMPTS, normalise, particle, with_article
from earlyfusion.mini.emoji.pools import kind_of, name_of
from earlyfusion.mini.emoji.scene_dialogues import (
    HELD_OUT_THINGS,
    UNKNOWN_ANSWER,
    scene_questions,
    unknown_things,
)
from earlyfusion.mini.emoji.scenes import image_of, scenes, unknown_image_ids
from earlyfusion.mini.emoji.wordings import HELD_OUT, FreeRequest

SEED_PROMPTS = {"Draw a cat.": "cat", "Draw a house.": "house", "Draw an elephant.": "elephant"}
"""A request, and a word that is in the names of all things that it may mean."""
SEEDS = 8
HELD_OUT_SEED = 1  # of synthetic images; training has those of seed 0
_YES = {"yes", "응", "네", "예"}
_NO = {"no", "아니", "아니요", "아니오"}


def seeds(model: Model, gallery: Gallery) -> dict[str, Numbers]:
    """The images of `SEEDS` seeds for each of a few requests: {prompt: {n, different, right}}.

    `different` is `gallery.count_different`. `right` is the number of images whose nearest training
    image has a name with the requested word ("cat face" is a cat).
    """
    report = {}
    for prompt, word in SEED_PROMPTS.items():
        replies = generate_replies(model, [prompt] * SEEDS, "image", seeded_sampling(SEEDS, 0))
        images = [image for reply in replies for image in reply.images[:1]]
        right = sum(word in gallery.nearest(image)["en"].split() for image in images)
        report[prompt] = {"n": SEEDS, "different": count_different(gallery, images), "right": right}
    return report


# ---- free wordings


def wordings(model: Model, data: EmojiData, gallery: Gallery) -> Numbers:
    """The held-out requests: {n, kind, right, replies: [{lang, request, wants, reply, …}]}.

    `kind` is the share whose answer is of the right kind (an image, a name, yes or no, …), `right`
    of those that also have the right thing. Requests for things that the data lacks are left out.
    """
    first_rows: dict[str, Row] = {}  # concept -> its first training image
    for image_id in data.split("train"):
        first_rows.setdefault(data.row(image_id)["codepoints"], data.row(image_id))
    requests = [r for r in HELD_OUT if _is_answerable(data, first_rows, r)]
    prompts = [
        [*(Image(data.image(first_rows[concept]["id"])) for concept in r.images), r.text]
        for r in requests
    ]
    sampling = seeded_sampling(len(prompts), 0, max_images=5)
    replies = generate_replies(model, prompts, "auto", sampling)
    verdicts = [
        judge(reply, r, data, first_rows, gallery)
        for reply, r in zip(replies, requests, strict=True)
    ]
    reply_rows = [
        {"lang": r.lang, "request": r.text, "wants": r.answer, "reply": reply_line(reply)}
        | {"kind": kind, "right": right}
        for r, reply, (kind, right) in zip(requests, replies, verdicts, strict=True)
    ]
    return {
        "n": len(requests),
        "kind": share([kind for kind, _ in verdicts]),
        "right": share([right for _, right in verdicts]),
        "replies": reply_rows,
    }


def _is_answerable(data: EmojiData, first_rows: dict[str, Row], request: FreeRequest) -> bool:
    """Whether the data has the images of a request, and a right answer."""
    if request.answer == "list":
        return any(row["subgroup"].startswith(request.expected) for row in data.rows)
    has_answer = not request.expected or any(c in first_rows for c in request.expected)
    return has_answer and all(concept in first_rows for concept in request.images)


def judge(
    reply: Any, request: FreeRequest, data: EmojiData, first_rows: dict[str, Row], gallery: Gallery
) -> tuple[bool, bool]:
    """Whether a reply is of the right kind, and whether it also has the right thing. `first_rows`
    has the first training image of each thing, by concept."""
    answer, lang, text = request.answer, request.lang, normalise(reply.text)
    if answer == "draw":
        if not reply.images:
            return False, False
        return True, gallery.nearest(reply.images[0])["codepoints"] in request.expected
    if answer == "list":
        return _judge_list(reply, request, data)
    if reply.images:
        return False, False
    if answer == "unknown":
        return is_refusal(reply), is_refusal(reply)
    if answer in ("yes", "no"):
        return text in _YES | _NO, text in (_YES if answer == "yes" else _NO)
    if answer == "which":
        ordinals = [normalise(word) for word in ORDINALS[lang]]
        index = request.images.index(request.expected[0])
        ordinal = text.removeprefix("the ")
        return ordinal in ordinals, ordinal == ordinals[index]
    row = first_rows[request.expected[0]]
    if answer == "name":
        names = {normalise(name_of(r, lang)) for r in data.rows}
        return text in names, text == normalise(name_of(row, lang))
    kinds = {normalise(kind_of(r, lang)) for r in data.rows}
    return text in kinds, text == normalise(kind_of(row, lang))


def _judge_list(reply: Any, request: FreeRequest, data: EmojiData) -> tuple[bool, bool]:
    """A list needs two names and two images; it is right if all names are of the requested kind."""
    rows = [r for r in data.rows if r["subgroup"].startswith(request.expected)]
    names = {normalise(name_of(r, request.lang)) for r in rows}
    texts = [s.text for s in reply.segments if isinstance(s, Text)]
    items = [normalise(line.lstrip("0123456789. ")) for t in texts for line in t.splitlines()]
    items = [item for item in items if item]
    is_list = len(reply.images) >= 2 and len(items) >= 2
    return is_list, is_list and set(items) <= names


def is_refusal(reply: Any) -> bool:
    """Whether a reply says that the thing is not known, and has no image."""
    answers = {normalise(answer) for answer in UNKNOWN_ANSWER.values()}
    return not reply.images and normalise(reply.text) in answers


def reply_line(reply: Any) -> str:
    """A reply as one line; images are in brackets."""
    parts = [s.text.strip() if isinstance(s, Text) else "[image]" for s in reply.segments]
    return " ".join(" ".join(parts).split())


# ---- unknown things, and scenes


def refusals(
    model: Model, data: EmojiData, requested: Sequence[str], named: Sequence[str], limit: int
) -> dict[str, Numbers]:
    """Shares of replies that say "I do not know this one": {what: {n, refused}}.

    "unknown words" and "unknown images" should all be refused (held-out words, and noise and
    scrambled images that training did not have); "known words" and "known images" (`requested`
    and `named`, ids of training images) never. Half of the requests are in Korean.
    """
    things = unknown_things(data, HELD_OUT_THINGS)[:limit]
    unknown_names = [pair[number % 2] for number, pair in enumerate(things)]
    known_names = [name_of(data.row(i), _lang(n)) for n, i in enumerate(requested[:limit])]
    unknown_images = [
        image_of(data, i) for i in unknown_image_ids(data, min(limit, 20), HELD_OUT_SEED)
    ]
    known_images = data.images(named[:limit])
    prompts_by_kind: dict[str, list[Any]] = {
        "unknown words": [_request(name, _lang(n)) for n, name in enumerate(unknown_names)],
        "unknown images": [[Image(p), _question(_lang(n))] for n, p in enumerate(unknown_images)],
        "known words": [_request(name, _lang(n)) for n, name in enumerate(known_names)],
        "known images": [[Image(p), _question(_lang(n))] for n, p in enumerate(known_images)],
    }
    report = {}
    for kind, prompts in prompts_by_kind.items():
        replies = generate_replies(
            model, prompts, "auto", seeded_sampling(len(prompts), 0, max_images=1)
        )
        refused = share([is_refusal(reply) for reply in replies])
        report[kind] = {"n": len(prompts), "refused": refused}
    return report


def _lang(number: int) -> str:
    """The language of request `number`: half of them are in Korean."""
    return ("en", "ko")[number % 2]


def _request(name: str, lang: str) -> str:
    template = "Draw {a}." if lang == "en" else "{no} 그려 줘."
    return template.format(a=with_article(name), no=particle(name, "을/를"))


def _question(lang: str) -> str:
    return PROMPTS["caption"][lang].published[0]


def scene_answers(model: Model, data: EmojiData, limit: int) -> Numbers:
    """Questions about scenes that training did not have: {n, exact}. Half are in Korean."""
    rng, prompts, expected = random.Random(0), list[Any](), list[str]()
    for number, scene in enumerate(scenes(data, limit, HELD_OUT_SEED)):
        question, answer = scene_questions(data, scene, _lang(number), rng)[0]
        prompts.append([Image(image_of(data, scene.id)), question])
        expected.append(normalise(answer))
    replies = generate_replies(model, prompts, "text", seeded_sampling(len(prompts), 0))
    right = [normalise(r.text) == answer for r, answer in zip(replies, expected, strict=True)]
    return {"n": len(right), "exact": share(right)}
