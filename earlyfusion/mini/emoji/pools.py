"""The rows of a split that questions may use, by concept and subgroup, and their names."""

from __future__ import annotations

from collections import Counter, defaultdict

from earlyfusion.errors import DataError
from earlyfusion.mini.emoji.dataset import ICON, EmojiData, Row
from earlyfusion.mini.emoji.phrases import ICON_WORDS, STYLE_WORDS, WIDE_KINDS

NEAREST_IN_TRAIN = 0.015  # held-out images nearer than this to one of train are not used
LINE_STYLES = {"openmoji-line", "noto-mono", "fluent-mono", ICON}
COLOURS_ASKED = set("black white gray red orange yellow green blue purple pink brown".split())

# Subgroups whose members do not visibly share a kind.
VAGUE = set(
    "emotion other-object other-symbol place-other household hotel sound person-symbol alphanum "
    "punctuation person hand-prop event light-video music gender place-geographic".split()
)
# Subgroups too similar to be contrasted in one question.
SIMILAR = [
    set(line.split())
    for line in (
        "country-flag flag subdivision-flag",
        "family person-role person-activity person-sport person-gesture person-fantasy "
        "person-resting person person-symbol",
        "face-smiling face-affection face-tongue face-hand face-neutral-skeptical face-sleepy "
        "face-unwell face-hat face-glasses face-concerned face-negative face-costume cat-face "
        "monkey-face animal-mammal",
        "hand-fingers-open hand-fingers-partial hand-single-finger hand-fingers-closed hands "
        "hand-prop body-parts",
        "food-prepared food-asian food-marine food-sweet food-vegetable food-fruit animal-marine",
        "place-building place-religious place-other",
        "tool writing office science household",
        "arrow av-symbol geometric alphanum keycap math punctuation currency",
        "music musical-instrument sound",
        "plant-other plant-flower food-vegetable",
        "phone computer light-video",
        "animal-bug animal-reptile animal-amphibian",
    )
]


def too_similar(one: str, other: str) -> bool:
    """Whether two subgroups look too similar to be contrasted in a question."""
    return one == other or any(one in group and other in group for group in SIMILAR)


def name_of(row: Row, lang: str) -> str:
    """The name of the thing in an image, in a language ("en" or "ko")."""
    return row["en"] if lang == "en" else row["ko"]


def kind_of(row: Row, lang: str) -> str:
    """The name of its subgroup: "fruits"."""
    return row["subgroup_en"] if lang == "en" else row["subgroup_ko"]


def style_of(row: Row, lang: str) -> str:
    """The name of its style: "Noto"."""
    return ICON_WORDS[lang] if row["style"] == ICON else STYLE_WORDS[lang][row["style"]]


def main_colour(row: Row, lang: str) -> str | None:
    """The colour that most of an image has, or None if there is no such colour."""
    shares = row["colour_shares"]
    if row["style"] in LINE_STYLES or not shares or row["colours"][0] not in COLOURS_ASKED:
        return None
    if shares[0] < 0.6 or (len(shares) > 1 and shares[1] > 0.25):
        return None
    return row["colours"][0] if lang == "en" else row["colours_ko"][0]


def names_by_count(data: EmojiData) -> dict[str, int]:
    """Names of the training things in both languages, those with most images first."""
    rows = [data.row(i) for i in data.split("train")]
    counts = Counter(name_of(row, lang) for row in rows for lang in ("en", "ko"))
    return dict(counts.most_common())


class Pools:
    """The rows of one split that questions may use, all and by concept and subgroup.

    `in_two_styles` are concepts with images in several styles. `subgroups_of_four` and
    `subgroups_of_six` have at least so many concepts, which visibly share a kind.
    `rows_by_wide_kind` are rows by a kind wider than a subgroup. Raises `DataError` for an empty
    split.
    """

    def __init__(self, data: EmojiData, split: str) -> None:
        ids = data.split(split)
        rows = [data.row(i) for i in ids]
        self.rows = [r for r in rows if r.get("nn_train", 9) >= NEAREST_IN_TRAIN]
        if not self.rows:
            raise DataError(f"split {split!r} of {data.folder} has no images: build the data again")
        self.by_concept: dict[str, list[Row]] = defaultdict(list)
        self.by_subgroup: dict[str, list[Row]] = defaultdict(list)
        for row in self.rows:
            self.by_concept[row["codepoints"]].append(row)
            self.by_subgroup[row["subgroup"]].append(row)
        self.concepts = sorted(self.by_concept)
        self.in_two_styles = [
            c for c in self.concepts if len({r["style"] for r in self.by_concept[c]}) > 1
        ]
        self.subgroups_of_four = self._subgroups(at_least=4)
        self.subgroups_of_six = self._subgroups(at_least=6)
        self.rows_by_wide_kind = {
            prefix: [r for r in self.rows if r["subgroup"].startswith(prefix + "-")]
            for prefix in WIDE_KINDS
        }

    def _subgroups(self, at_least: int) -> list[str]:
        def concepts(rows: list[Row]) -> int:
            return len({r["codepoints"] for r in rows})

        return sorted(
            s
            for s, rows in self.by_subgroup.items()
            if concepts(rows) >= at_least and s not in VAGUE
        )
