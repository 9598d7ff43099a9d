"""Requests in free wordings: composed of parts for training, fixed ones for evaluation.

A composed request is an opening, a core (verb and object), a closing and a punctuation mark, each
chosen at random, with typing noise: other case, no punctuation mark, a typo. `HELD_OUT` are free
requests in wordings that neither the composition nor a table of `phrases.PROMPTS` can produce. They
are for evaluation only (`earlyfusion.evals.free`): never train on them.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from itertools import product
from typing import NamedTuple, TypeVar

LOWER, UPPER, UNMARKED, MISTYPED = 0.25, 0.02, 0.25, 0.04
"""Shares of composed requests: in lower case, in capitals, without the last mark, with a typo."""
T = TypeVar("T")


class Form(NamedTuple):
    """Parts of a request: one choice of each, joined, is a request."""

    openings: Sequence[str]
    cores: Sequence[str]
    closings: Sequence[str]
    marks: Sequence[str]


def _each(*parts: Sequence[str]) -> list[str]:
    return ["".join(chosen) for chosen in product(*parts)]


_VERBS = ("draw", "paint", "sketch", "make", "create", "generate", "design", "doodle", "show")
_THINGS = ("{a}", "{n}", "a picture of {a}", "an image of {a}", "a drawing of {a}")
_FOR = (" ", " me ")
_PLEASE = ("", "", "", ", please", " please", ", thanks", " now")
_HELLO = ("", "", "", "Hi! ", "Hey, ", "Hello, ", "OK, ", "Now ", "Next, ")
_ASKS = _each(("can", "could", "would", "will"), (" you ", " you please "))
_WISHES = (
    "I want ",
    "I need ",
    "I would like ",
    "I'd like ",
    "I'd love ",
    "let me see ",
    "give me ",
)
_LOOK = ("", "", "", "Hi! ", "Hey, ", "Look! ", "Tell me: ", "Quick question: ", "So, ")
_ASKED = ("", "", "", " please", ", please", " exactly")
_DO_KO = ("그려", "만들어", "보여", "스케치해")
_GIVE_KO = (" 줘", "줘", " 주세요", "주세요", " 줄래", " 줄래요", " 줄 수 있어", " 주라")
_HELLO_KO = ("", "", "", "안녕! ", "저기, ", "음, ", "혹시 ", "그럼 ", "이번에는 ")
_LOOK_KO = _HELLO_KO[:7]
_END_KO = ("", ".", "!", "?", "~")
_STYLE = ("{a} in {s} style", "{n} in {s} style", "{a}, {s} style", "a {s} style picture of {a}")
_OBJECT_KO = ("{no} ", "{n} ", "{n} 하나 ", "{n} 그림 ", "{n} 그림을 ", "{n} 하나만 ")
_STYLED_KO = ("{s} 스타일로 {no} ", "{s} 스타일로 {n} ", "{no} {s} 스타일로 ", "{n} {s} 스타일로 ")

# Placeholders in braces are those of `phrases.PROMPTS`.
FORMS: dict[str, dict[str, list[Form]]] = {
    "draw": {
        "en": [
            Form(_HELLO, _each(_VERBS, _FOR, _THINGS), _PLEASE, ".!"),
            Form(_HELLO, _each(_VERBS, (" ",), _THINGS, (" for me",)), _PLEASE, ".!"),
            Form(_HELLO[:5], _each(_ASKS, _VERBS, _FOR, _THINGS), ("",), "?"),
            Form(_HELLO[:5], _each(_ASKS, _VERBS, (" ",), _THINGS), (" for me",), "?"),
            Form(_HELLO[:6], _each(_WISHES, _THINGS), _PLEASE, ".!"),
            Form(("", "", "One more: ", "Now "), _THINGS, (", please", " please", ", drawn"), ".!"),
        ],
        "ko": [
            Form(_HELLO_KO, _each(_OBJECT_KO, ("", "좀 "), _DO_KO, _GIVE_KO), ("",), _END_KO),
            Form(
                _HELLO_KO,
                _each(
                    ("{n} 그림 ", "{n} 그림 하나 ", "{n} 하나 ", "{n} 이미지 "),
                    ("부탁해", "부탁해요", "부탁드려요", "부탁합니다", "필요해", "필요해요"),
                ),
                ("",),
                (".", "!", ""),
            ),
            Form(
                _HELLO_KO[:6],
                _each(("{no} ", "{n} 그림을 ", "{n} "), ("보고 싶어", "보고 싶어요", "갖고 싶어")),
                ("",),
                (".", "!", ""),
            ),
        ],
    },
    "draw_styled": {
        "en": [
            Form(_HELLO, _each(_VERBS, _FOR, _STYLE), _PLEASE, ".!"),
            Form(("", "", "Hey, "), _each(_ASKS, _VERBS, _FOR, _STYLE), ("",), "?"),
            Form(("",), _each(_WISHES, _STYLE), _PLEASE, ".!"),
            Form(("",), _STYLE, (", please", " please"), ".!"),
        ],
        "ko": [
            Form(_HELLO_KO, _each(_STYLED_KO, ("", "좀 "), _DO_KO, _GIVE_KO), ("",), _END_KO),
            Form(
                _HELLO_KO,
                _each(("{s} 스타일 {n} 그림 ", "{s} 스타일로 {n} "), ("부탁해", "부탁해요")),
                ("",),
                (".", "!", ""),
            ),
        ],
    },
    "caption": {
        "en": [
            Form(
                _LOOK,
                [
                    *_each(("what is", "what's"), (" this", " that", " it")),
                    *_each(("what is", "what's"), (" this thing", " this called", " shown here")),
                    *_each(("what is", "what's"), (" in", " on"), (" this picture", " the image")),
                    *_each(("what do you see", "what can you see"), ("", " here", " in this")),
                    *_each(_ASKS, ("tell me what this is", "name this", "say what this is")),
                    "do you know what this is",
                    "what does this show",
                    "what does the picture show",
                ],
                ("", "", ""),
                "?",
            ),
            Form(
                _LOOK[:6],
                _each(
                    ("name ", "describe ", "caption ", "label "),
                    ("this", "this thing", "the picture", "this emoji", "what you see"),
                ),
                _ASKED,
                ".!",
            ),
        ],
        "ko": [
            Form(
                _LOOK_KO,
                _each(
                    ("이거 ", "이게 ", "이건 ", "이것은 ", "이 그림은 ", "이 사진은 "),
                    ("뭐야", "뭐예요", "뭐지", "뭔가요", "무엇인가요", "뭐라고 해", "뭐라고 해요"),
                ),
                ("",),
                "?",
            ),
            Form(
                _LOOK_KO,
                _each(
                    ("이름을 ", "이거 이름 ", "이 그림이 뭔지 ", "이게 뭔지 "),
                    ("말해 줘", "말해줘", "알려 줘", "알려줘", "알려 주세요", "말해 주세요"),
                ),
                ("",),
                (".", "!", ""),
            ),
        ],
    },
    "yesno_name": {
        "en": [
            Form(
                _LOOK,
                _each(("is this ", "is that ", "is it ", "does this show "), ("{a}", "{n}")),
                ("", "", ", yes or no", " or not"),
                "?",
            ),
        ],
        "ko": [
            Form(
                _LOOK_KO,
                _each(("이거 ", "이게 ", "이건 ", "이 그림 ", "이 그림은 "), ("{nya}",)),
                ("", "", ", 아니야"),
                "?",
            ),
        ],
    },
    "which": {
        "en": [
            Form(
                _LOOK,
                _each(
                    ("which", "which one", "which picture", "which image", "which of these"),
                    (" is ", " shows "),
                    ("{a}", "{n}"),
                ),
                ("",),
                "?",
            ),
        ],
        "ko": [
            Form(
                _LOOK_KO,
                _each(
                    ("{ng} ", "{n} ", "{n} 그림은 "),
                    ("몇 번째야", "몇 번째예요", "몇 번째지", "몇 번째 그림이야"),
                ),
                ("",),
                "?",
            ),
        ],
    },
    "common": {
        "en": [
            Form(
                _LOOK,
                [
                    *_each(
                        ("what do ", "so what do "),
                        ("these", "they", "these things", "these pictures", "all of these"),
                        (" have in common", " share"),
                    ),
                    "what kind of things are these",
                    "what sort of things are these",
                    "what are all of these",
                ],
                ("",),
                "?",
            ),
        ],
        "ko": [
            Form(
                _LOOK_KO,
                _each(
                    ("이것들의 ", "이 그림들의 ", "얘네들 ", "이들의 ", "여기 있는 것들의 "),
                    ("공통점이 뭐야", "공통점은 뭐예요", "공통점은 뭐지", "공통점이 뭔가요"),
                ),
                ("",),
                "?",
            ),
        ],
    },
    "category": {
        "en": [
            Form(
                _LOOK,
                _each(
                    ("what kind of thing", "what type of thing", "what category"),
                    (" is this", " is that", " is it", " would this be"),
                ),
                ("",),
                "?",
            ),
        ],
        "ko": [
            Form(
                _LOOK_KO,
                _each(
                    ("이거 ", "이건 ", "이 그림은 "),
                    ("무슨 종류야", "어떤 종류예요", "어떤 종류야", "무슨 분류야"),
                ),
                ("",),
                "?",
            ),
        ],
    },
    "colour": {
        "en": [
            Form(
                _LOOK,
                _each(("what ", "which "), ("colour", "color"), (" is this", " is it", " is that")),
                ("", " mostly"),
                "?",
            ),
        ],
        "ko": [
            Form(
                _LOOK_KO,
                _each(
                    ("이거 ", "이건 ", "이 그림은 "),
                    ("무슨 색이야", "무슨 색이에요", "어떤 색이야"),
                ),
                ("",),
                "?",
            ),
        ],
    },
    "list_draw": {
        "en": [
            Form(
                _HELLO,
                _each(
                    ("show me ", "draw ", "draw me ", "list ", "give me "),
                    ("{num} {kind}{st}", "{num} different {kind}{st}"),
                    (" with pictures", " with names", " and name them", ", each with its name"),
                ),
                ("", "", ", please", " please"),
                ".!",
            ),
            Form(
                ("", "", "Hey, "),
                _each(
                    _ASKS,
                    ("show me ", "draw ", "draw me "),
                    ("{num} {kind}{st}",),
                    (" with pictures", " with names", " and name them"),
                ),
                ("",),
                "?",
            ),
        ],
        "ko": [
            Form(
                _HELLO_KO,
                _each(
                    ("{st}{kind} {num} 가지", "{st}{kind} {num} 가지를", "{st}{kind} {num} 개"),
                    (" 이름과 함께 ", " 그림과 함께 ", " 그림이랑 이름 "),
                    ("보여", "그려"),
                    _GIVE_KO,
                ),
                ("",),
                _END_KO,
            ),
        ],
    },
}


def compose_request(table: str, lang: str, rng: random.Random) -> str | None:
    """A template of a request, with the placeholders of `PROMPTS`; None if the table has none."""
    if table not in FORMS:
        return None
    form = rng.choice(FORMS[table][lang])
    return _join([rng.choice(choices) for choices in form])


def all_templates(table: str, lang: str) -> Iterator[str]:
    """All templates that `compose_request` can return."""
    for form in FORMS[table][lang]:
        yield from map(_join, product(*(dict.fromkeys(choices) for choices in form)))


def _join(parts: Sequence[str]) -> str:
    return re.sub(r"(?:^|(?<=! ))[a-z]", lambda match: match[0].upper(), "".join(parts))


def add_typing_noise(text: str, rng: random.Random) -> str:
    """The request with typing noise: other case, no punctuation mark at its end, or a typo."""
    chance = rng.random()
    if chance < LOWER:
        text = text.lower()
    elif chance < LOWER + UPPER:
        text = text.upper()
    if rng.random() < UNMARKED:
        text = text.rstrip(".!?")
    return _add_typo(text, rng) if rng.random() < MISTYPED else text


def _add_typo(text: str, rng: random.Random) -> str:
    """One typo: two neighbouring letters of a word swapped, one left out, or one doubled."""
    places = [i for i in range(1, len(text) - 2) if text[i - 1 : i + 2].isalpha()]
    if not places:
        return text
    at = rng.choice(places)
    one, other = text[at], text[at + 1]
    changed = rng.choice((other + one, other, one + one + other))
    return text[:at] + changed + text[at + 2 :]


class FreeRequest(NamedTuple):
    """A request in free words, the things in its images, and the things of a right answer.

    `answer` is the kind of answer: draw, name, yes, no, which, kind, common, colour, list, unknown.
    Things are ids of concepts. For `which`, the expected one is one of those in `images`. For
    `list`, `expected` is the prefix of a subgroup. For `unknown` it is empty: a refusal is right.
    """

    lang: str
    answer: str
    text: str
    images: tuple[str, ...] = ()
    expected: tuple[str, ...] = ()


# The things are ones that people know well. Each wording is also in another order of words, or has
# other words, than everything that `FORMS` and `PROMPTS` can give; tests check that.
HELD_OUT = (
    FreeRequest("en", "draw", "i was hoping for a cat", expected=("1f408", "1f431")),
    FreeRequest("en", "draw", "Would you mind drawing a dog?", expected=("1f415", "1f436")),
    FreeRequest("en", "draw", "My little son wishes for a rocket!", expected=("1f680",)),
    FreeRequest("en", "draw", "got a drawing of an elephant?", expected=("1f418",)),
    FreeRequest("en", "draw", "How about a banana?", expected=("1f34c",)),
    FreeRequest("en", "draw", "rainbow pls", expected=("1f308",)),
    FreeRequest("en", "draw", "Surprise me with a guitar", expected=("1f3b8",)),
    FreeRequest("en", "draw", "Put a strawberry on the page.", expected=("1f353",)),
    FreeRequest("en", "draw", "one tent as a picture thank you", expected=("26fa",)),
    FreeRequest("en", "draw", "It would be great to have a sunflower here", expected=("1f33b",)),
    FreeRequest("en", "draw", "Illustrate the word bicycle.", expected=("1f6b2",)),
    FreeRequest("en", "name", "Hmm, what am I looking at?", ("1f353",), ("1f353",)),
    FreeRequest("en", "name", "any idea what this could be", ("1f680",), ("1f680",)),
    FreeRequest("en", "name", "Identify the object.", ("1f34c",), ("1f34c",)),
    FreeRequest("en", "name", "help me out, which word fits this image?", ("1f418",), ("1f418",)),
    FreeRequest("en", "yes", "Would you say that this is a banana?", ("1f34c",), ("1f34c",)),
    FreeRequest("en", "yes", "am I right that it's a guitar?", ("1f3b8",), ("1f3b8",)),
    FreeRequest("en", "no", "surely this must be a rocket?", ("1f349",), ("1f680",)),
    FreeRequest("en", "which", "Where is the dog?", ("1f34c", "1f415"), ("1f415",)),
    FreeRequest("en", "which", "point at the rainbow", ("1f308", "1f353"), ("1f308",)),
    FreeRequest("en", "common", "Find the thing that links both.", ("1f34c", "1f349"), ("1f34c",)),
    FreeRequest("en", "common", "these two belong together, why", ("1f418", "1f434"), ("1f418",)),
    FreeRequest("en", "kind", "How would you classify this?", ("1f34d",), ("1f34d",)),
    FreeRequest("en", "list", "teach me three fruits, drawn and named", expected=("food-fruit",)),
    FreeRequest("en", "list", "two animals with what they are called", expected=("animal",)),
    FreeRequest("en", "unknown", "i was hoping for a carburettor"),
    FreeRequest("ko", "draw", "고양이가 있었으면 좋겠어", expected=("1f408", "1f431")),
    FreeRequest("ko", "draw", "강아지 한 마리 그려 볼까", expected=("1f415", "1f436")),
    FreeRequest("ko", "draw", "무지개 그림 있어?", expected=("1f308",)),
    FreeRequest("ko", "draw", "바나나를 그려 주시면 감사하겠습니다", expected=("1f34c",)),
    FreeRequest("ko", "draw", "우리 아이가 로켓을 좋아해, 그려 줄 거지?", expected=("1f680",)),
    FreeRequest("ko", "draw", "코끼리를 멋지게 표현해 봐", expected=("1f418",)),
    FreeRequest("ko", "name", "여기 보이는 게 도대체 뭘까", ("1f353",), ("1f353",)),
    FreeRequest("ko", "name", "이 물건을 부르는 말은?", ("1f34c",), ("1f34c",)),
    FreeRequest("ko", "yes", "이거 수박 맞지?", ("1f349",), ("1f349",)),
    FreeRequest("ko", "no", "지금 이게 로켓이라는 거야?", ("1f34c",), ("1f680",)),
    FreeRequest("ko", "which", "개는 어디에 있어?", ("1f415", "1f34c"), ("1f415",)),
    FreeRequest("ko", "common", "둘은 무슨 사이야?", ("1f34c", "1f349"), ("1f34c",)),
    FreeRequest("ko", "list", "과일을 세 개쯤 배우고 싶어, 그림도 같이", expected=("food-fruit",)),
)
