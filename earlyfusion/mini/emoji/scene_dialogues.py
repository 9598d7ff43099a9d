"""Dialogues about synthetic images (`scenes.py`) and about unknown things.

`scene_samples` asks what is in a scene, how many and where, or requests a scene. A requested scene
has its things in the order of their names, from the top left. `unknown_samples` requests things
that the data does not have, and asks for the names of images that show nothing known; the answer is
`UNKNOWN_ANSWER`. Their share must stay small. They are worded like requests for known things, so
that a refusal depends on the thing alone. `earlyfusion.evals.emoji` measures both: how often
unknown things are refused, and how often known ones.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

from earlyfusion.mini.emoji.dataset import EmojiData, Row
from earlyfusion.mini.emoji.dialogues import Sample, Writer, assistant, text_part, user
from earlyfusion.mini.emoji.phrases import particle, with_article
from earlyfusion.mini.emoji.pools import Pools, name_of
from earlyfusion.mini.emoji.scenes import Scene, is_ordered

UNKNOWN_ANSWER = {"en": "I do not know this one.", "ko": "이건 모르겠어."}
_NUMBERS = {
    "en": ["", "one", "two", "three", "four", "five", "six"],
    "ko": ["", "한", "두", "세", "네", "다섯", "여섯"],
}
_PLACES = {
    (-1, 0): {"en": "left of", "ko": "왼쪽"},
    (1, 0): {"en": "right of", "ko": "오른쪽"},
    (0, -1): {"en": "above", "ko": "위"},
    (0, 1): {"en": "below", "ko": "아래"},
}
_PLURALS = {
    "mouse": "mice", "ox": "oxen", "goose": "geese", "leaf": "leaves", "wolf": "wolves",
    "knife": "knives", "loaf": "loaves", "fish": "fish", "sheep": "sheep", "deer": "deer",
    "bison": "bison", "squid": "squid", "shrimp": "shrimp", "tomato": "tomatoes",
    "potato": "potatoes", "mango": "mangoes", "foot": "feet", "tooth": "teeth",
}  # fmt: skip
_QUESTIONS: dict[str, dict[str, tuple[str, ...]]] = {
    "count": {
        "en": (
            "How many {p} are there?",
            "How many {p} do you see?",
            "How many {p}?",
            "Count the {p}.",
        ),
        "ko": ("{ng} 몇 {c}야?", "{n} 몇 {c}야?", "{ng} 몇 {c} 있어?", "{n}의 수를 세어 줘."),
    },
    "all": {
        "en": ("How many things are there?", "How many things do you see?", "Count everything."),
        "ko": ("모두 몇 개야?", "전부 몇 개 있어?", "모두 세어 줘."),
    },
    "place": {
        "en": ("What is {where} the {n}?", "What's {where} the {n}?", "{where} the {n}?"),
        "ko": ("{n} {where}에 뭐가 있어?", "{n} {where}에는?", "{n} {where}에 있는 건 뭐야?"),
    },
    "what": {
        "en": ("What is in this picture?", "What do you see?", "Name what you see, with numbers."),
        "ko": ("이 그림에 뭐가 있어?", "무엇이 몇 개 보여?", "뭐가 보여?"),
    },
}  # fmt: skip

# Things that no emoji shows, in both languages; those of them that some data has are left out.
UNKNOWN_THINGS = [
    pair.split("/")
    for pair in (
        "carburettor/카뷰레터 colander/체반 trombone/트롬본 tuba/튜바 oboe/오보에 cello/첼로 "
        "clarinet/클라리넷 xylophone/실로폰 metronome/메트로놈 forklift/지게차 excavator/굴착기 "
        "bulldozer/불도저 hovercraft/호버크라프트 zeppelin/체펠린 gyroscope/자이로스코프 "
        "sextant/육분의 astrolabe/아스트롤라베 oscilloscope/오실로스코프 voltmeter/전압계 "
        "transistor/트랜지스터 capacitor/축전기 resistor/저항기 boiler/보일러 "
        "dishwasher/식기세척기 toaster/토스터 blender/믹서기 whisk/거품기 funnel/깔때기 "
        "corkscrew/코르크따개 thimble/골무 loom/베틀 wheelbarrow/손수레 lawnmower/잔디깎이 "
        "scarecrow/허수아비 greenhouse/온실 aqueduct/수도교 drawbridge/도개교 igloo/이글루 "
        "yurt/유르트 obelisk/오벨리스크 wardrobe/옷장 hammock/해먹 trampoline/트램펄린 "
        "treadmill/러닝머신 javelin/투창 platypus/오리너구리 narwhal/일각돌고래 "
        "axolotl/우파루파 capybara/카피바라 armadillo/아르마딜로 meerkat/미어캣 tapir/테이퍼 "
        "anteater/개미핥기 manatee/매너티 stingray/가오리 pelican/펠리컨 puffin/퍼핀 "
        "toucan/큰부리새 ostrich/타조 magpie/까치 woodpecker/딱따구리 quince/마르멜로 "
        "papaya/파파야 persimmon/감 apricot/살구 gooseberry/구스베리 artichoke/아티초크 "
        "asparagus/아스파라거스 celery/셀러리 cauliflower/콜리플라워 fennel/회향 rhubarb/대황 "
        "parsnip/파스닙 crankshaft/크랭크축 flywheel/플라이휠 turbine/터빈 anemometer/풍속계 "
        "periscope/잠망경 chariot/전차 gondola/곤돌라 raft/뗏목 chandelier/샹들리에 "
        "bagpipes/백파이프 stapler/스테이플러 protractor/각도기 typewriter/타자기 quill/깃펜 "
        "sundial/해시계 barometer/기압계 spatula/뒤집개 ladle/국자"
    ).split()
]
HELD_OUT_THINGS = [
    pair.split("/")
    for pair in (
        "harpsichord/하프시코드 crowbar/쇠지렛대 teleprompter/프롬프터 wolverine/울버린 "
        "okapi/오카피 kumquat/금귤 turnip/순무 trebuchet/투석기 defibrillator/제세동기 "
        "pergola/퍼걸러 weathervane/풍향계 caliper/캘리퍼스 bobsled/봅슬레이 "
        "hydrant/소화전 gargoyle/가고일 zither/치터 spectrometer/분광기 "
        "pangolin/천산갑 sarcophagus/석관 dulcimer/덜시머"
    ).split()
]
"""For evaluation only."""


# ---- dialogues about scenes


def plural(name: str) -> str:
    """The plural of an English name that `is_counted`."""
    *before, head = name.split()
    if head in _PLURALS:
        head = _PLURALS[head]
    elif head.endswith(("s", "x", "z", "ch", "sh")):
        head += "es"
    elif head.endswith("y") and head[-2] not in "aeiou":
        head = head[:-1] + "ies"
    else:
        head += "s"
    return " ".join([*before, head])


def counter(row: Row) -> str:
    """The Korean word that counts such things."""
    return "마리" if row["subgroup"].startswith("animal-") else "개"


def count_phrase(row: Row, count: int, lang: str) -> str:
    """ "two apples", "a banana", "사과 두 개"."""
    if lang == "ko":
        return f"{row['ko']} {_NUMBERS['ko'][count]} {counter(row)}"
    name = row["en"]
    return with_article(name) if count == 1 else f"{_NUMBERS['en'][count]} {plural(name)}"


def describe_scene(data: EmojiData, scene: Scene, lang: str) -> str:
    """What a scene shows: "two apples and a banana"."""
    words = [count_phrase(data.row(i), n, lang) for i, n in scene.counts().items()]
    if lang == "en":
        return " and ".join(words)
    return " ".join([*(particle(word, "과/와") for word in words[:-1]), words[-1]])


def scene_samples(
    data: EmojiData, made: Sequence[Scene], n: int, seed: int, korean: float, wordings: float
) -> Iterator[Sample]:
    """`n` dialogues about the scenes: a request for one, or up to three questions."""
    rng = random.Random(f"scene-samples-{seed}")
    writer = Writer(Pools(data, "train"), rng, further=0.7, wordings=wordings)
    ordered = [scene for scene in made if is_ordered(scene)]
    for _ in range(n if made else 0):
        lang = "ko" if rng.random() < korean else "en"
        writer.choose_prompts()
        head: Sample = {"task": "scene", "lang": lang, "split": "train"}
        if ordered and rng.random() < 0.35:
            scene = rng.choice(ordered)
            words = describe_scene(data, scene, lang)
            prompt = writer.prompt("draw", lang, n=words, a=words)
            while "하나" in prompt:  # "one", which would contradict the numbers
                prompt = writer.prompt("draw", lang, n=words, a=words)
            image = {"type": "image", "image": scene.id}
            yield head | {"messages": [user(text_part(prompt)), assistant(image)]}
        else:
            scene = rng.choice(made)
            questions = [q for q in scene_questions(data, scene, lang, rng) if q][
                : rng.randint(1, 3)
            ]
            image, turns = {"type": "image", "image": scene.id}, list[dict[str, Any]]()
            for number, (question, answer) in enumerate(questions):
                parts = [text_part(question)] if number else [image, text_part(question)]
                turns += [user(*parts), assistant(text_part(answer))]
            yield head | {"messages": turns}


def scene_questions(
    data: EmojiData, scene: Scene, lang: str, rng: random.Random
) -> list[tuple[str, str]]:
    """Questions about a scene and their answers, in random order."""
    counts = scene.counts()
    questions: list[tuple[str, str]] = []
    for image_id, count in counts.items():
        row = data.row(image_id)
        name = name_of(row, lang)
        words = {
            "n": name,
            "p": plural(row["en"]),
            "c": counter(row),
            "ng": particle(name, "은/는"),
        }
        answer = _NUMBERS[lang][count] + (f" {counter(row)}" if lang == "ko" else "")
        questions.append((rng.choice(_QUESTIONS["count"][lang]).format(**words), answer))
        questions += _position_questions(data, scene, image_id, lang, rng) if count == 1 else []
    total_count = sum(counts.values())
    total = _NUMBERS[lang][total_count] + (" 개" if lang == "ko" else "")
    questions.append((rng.choice(_QUESTIONS["all"][lang]), total))
    questions.append((rng.choice(_QUESTIONS["what"][lang]), describe_scene(data, scene, lang)))
    rng.shuffle(questions)
    return questions


def _position_questions(
    data: EmojiData, scene: Scene, image_id: str, lang: str, rng: random.Random
) -> list[tuple[str, str]]:
    """Questions about the neighbours of an image that is in the scene once."""
    at, questions = scene.cells.index(image_id), []
    for step, words in _PLACES.items():
        if other := scene.beside(at, step):
            question = rng.choice(_QUESTIONS["place"][lang])
            text = question.format(n=name_of(data.row(image_id), lang), where=words[lang])
            questions.append((text, name_of(data.row(other), lang)))
    return questions


# ---- dialogues about unknown things


def unknown_samples(
    data: EmojiData, unknown_ids: Sequence[str], n: int, seed: int, korean: float, wordings: float
) -> Iterator[Sample]:
    """`n` dialogues that end in `UNKNOWN_ANSWER`: half about images, half about words."""
    rng = random.Random(f"unknown-{seed}")
    writer = Writer(Pools(data, "train"), rng, further=0.7, wordings=wordings)
    things = unknown_things(data, UNKNOWN_THINGS)
    for _ in range(n):
        lang = "ko" if rng.random() < korean else "en"
        writer.choose_prompts()
        if unknown_ids and rng.random() < 0.5:
            image = {"type": "image", "image": rng.choice(unknown_ids)}
            turn = user(image, text_part(writer.prompt("caption", lang)))
        else:
            known = rng.random() < 0.5
            name = rng.choice(things)[lang == "ko"] if known else invent_word(lang, rng)
            turn = user(text_part(writer.prompt("draw", lang, n=name)))
        messages = [turn, assistant(text_part(UNKNOWN_ANSWER[lang]))]
        yield {"task": "unknown", "lang": lang, "split": "train", "messages": messages}


def unknown_things(data: EmojiData, things: Sequence[Sequence[str]]) -> list[tuple[str, str]]:
    """English and Korean names of the things that share no word with a name of the data."""
    words = {word for row in data.rows for word in f"{row['en']} {row['ko']}".lower().split()}
    return [(english, korean) for english, korean in things if not words & {english, korean}]


def invent_word(lang: str, rng: random.Random) -> str:
    """A word that does not exist, such as "blorvat", made of ordinary syllables."""
    if lang == "ko":
        return "".join(_syllable(rng) for _ in range(rng.randint(2, 4)))
    starts, ends = "bl gr kr v z th sn dw pl m".split(), "t x n m p".split()
    middles = "rv lt mp nk z x gg bb".split()
    sounds = (starts, ["o", "a", "u", "ee", "i"], middles, ["a", "o", "u", "i"], ends)
    return "".join(rng.choice(choices) for choices in sounds)


def _syllable(rng: random.Random) -> str:
    """A Korean syllable: plain consonant, one of five vowels, no final consonant or a soft one."""
    consonant, vowel = rng.choice((0, 2, 3, 5, 6, 7, 9, 11, 12, 18)), rng.choice((0, 4, 8, 13, 20))
    return chr(ord("가") + (consonant * 21 + vowel) * 28 + rng.choice((0, 0, 4, 8, 16, 21)))
