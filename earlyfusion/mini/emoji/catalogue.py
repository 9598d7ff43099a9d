"""The styles, concepts and names of the emoji data.

Order and groups come from emojibase-data; names and keywords from the Unicode CLDR annotations.
Skin tones, components and lone regional indicators are left out.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, TypeAlias

Concept: TypeAlias = dict[str, Any]
NamesAndKeywords: TypeAlias = dict[str, tuple[str, list[str]]]

# Styles with the same `design` show the same drawings in another rendering. Their names are in
# `phrases.STYLE_WORDS`.
STYLES: dict[str, dict[str, Any]] = {
    "twemoji": {
        "package": "@discordapp/twemoji",
        "design": "twemoji",
        "kind": "colour",
        "licence": "CC-BY-4.0",
        "share_alike": False,
        "author": (
            "Twitter, Inc. and other contributors; Jason Sofonia & Justine De "
            "Caires (jdecked/twemoji)"
        ),
        "url": "https://github.com/jdecked/twemoji",
    },
    "noto": {
        "package": "@iconify-json/noto",
        "design": "noto",
        "kind": "colour",
        "licence": "Apache-2.0",
        "share_alike": False,
        "author": "Google Inc. (Noto Emoji)",
        "url": "https://github.com/googlefonts/noto-emoji",
    },
    "fluent-flat": {
        "package": "@iconify-json/fluent-emoji-flat",
        "design": "fluent",
        "kind": "colour",
        "licence": "MIT",
        "share_alike": False,
        "author": "Microsoft Corporation (Fluent Emoji)",
        "url": "https://github.com/microsoft/fluentui-emoji",
    },
    "fluent-3d": {
        "package": "@lobehub/fluent-emoji-3d",
        "design": "fluent",
        "kind": "colour",
        "licence": "MIT",
        "share_alike": False,
        "author": "Microsoft Corporation (Fluent Emoji 3D; npm packaging by LobeHub)",
        "url": "https://github.com/microsoft/fluentui-emoji",
    },
    "emojitwo": {
        "package": "@iconify-json/emojione",
        "design": "emojitwo",
        "kind": "colour",
        "licence": "CC-BY-4.0",
        "share_alike": False,
        "author": (
            "Emojitwo, originally released as EmojiOne 2.2 by Ranks.com, with "
            "contributions from the Emojitwo community"
        ),
        "url": "https://github.com/EmojiTwo/emojitwo",
    },
    "fxemoji": {
        "package": "@iconify-json/fxemoji",
        "design": "fxemoji",
        "kind": "colour",
        "licence": "CC-BY-4.0",
        "share_alike": False,
        "author": "Mozilla Foundation (Firefox OS Emoji)",
        "url": "https://github.com/mozilla/fxemoji",
    },
    "streamline": {
        "package": "@iconify-json/streamline-emojis",
        "design": "streamline",
        "kind": "colour",
        "licence": "CC-BY-4.0",
        "share_alike": False,
        "author": "Streamline (Webalys)",
        "url": "https://github.com/webalys-hq/streamline-vectors",
    },
    "noto-v1": {
        "package": "@iconify-json/noto-v1",
        "design": "noto-v1",
        "kind": "colour",
        "licence": "Apache-2.0",
        "share_alike": False,
        "author": "Google Inc. (Noto Emoji, first generation)",
        "url": "https://github.com/googlefonts/noto-emoji",
    },
    "noto-mono": {
        "package": "@expo-google-fonts/noto-emoji",
        "design": "noto-mono",
        "kind": "line",
        "licence": "OFL-1.1",
        "share_alike": False,
        "author": "Google LLC (Noto Emoji font, monochrome)",
        "url": "https://github.com/googlefonts/noto-emoji",
    },
    "fluent-mono": {
        "package": "@iconify-json/fluent-emoji-high-contrast",
        "design": "fluent",
        "kind": "line",
        "licence": "MIT",
        "share_alike": False,
        "author": "Microsoft Corporation (Fluent Emoji High Contrast)",
        "url": "https://github.com/microsoft/fluentui-emoji",
    },
}

# Own wording: emojibase's Korean subgroup names are partly machine-made.
SUBGROUPS: dict[str, tuple[str, str]] = {
    "face-smiling": ("smiling faces", "웃는 얼굴"),
    "face-affection": ("affectionate faces", "애정 어린 얼굴"),
    "face-tongue": ("faces with tongues", "혀를 내민 얼굴"),
    "face-hand": ("faces with hands", "손을 댄 얼굴"),
    "face-neutral-skeptical": ("neutral or skeptical faces", "무표정하거나 못 미더워하는 얼굴"),
    "face-sleepy": ("sleepy faces", "졸린 얼굴"),
    "face-unwell": ("unwell faces", "아픈 얼굴"),
    "face-hat": ("faces with hats", "모자를 쓴 얼굴"),
    "face-glasses": ("faces with glasses", "안경을 쓴 얼굴"),
    "face-concerned": ("concerned faces", "걱정하는 얼굴"),
    "face-negative": ("angry faces", "화난 얼굴"),
    "face-costume": ("costumed faces and creatures", "분장한 얼굴과 괴물"),
    "cat-face": ("cat faces", "고양이 얼굴"),
    "monkey-face": ("monkey faces", "원숭이 얼굴"),
    "heart": ("hearts", "하트"),
    "emotion": ("emotion symbols", "감정 기호"),
    "hand-fingers-open": ("open hands", "편 손"),
    "hand-fingers-partial": ("hand signs", "손짓"),
    "hand-single-finger": ("pointing fingers", "가리키는 손가락"),
    "hand-fingers-closed": ("closed hands", "쥔 손"),
    "hands": ("pairs of hands", "두 손"),
    "hand-prop": ("hands with props", "물건을 든 손"),
    "body-parts": ("body parts", "신체 부위"),
    "person": ("people", "사람"),
    "person-gesture": ("people making gestures", "몸짓하는 사람"),
    "person-role": ("people at work", "직업인"),
    "person-fantasy": ("fantasy characters", "판타지 인물"),
    "person-activity": ("people doing activities", "활동하는 사람"),
    "person-sport": ("people doing sports", "운동하는 사람"),
    "person-resting": ("people resting", "쉬는 사람"),
    "family": ("families and couples", "가족과 연인"),
    "person-symbol": ("people symbols", "사람 기호"),
    "animal-mammal": ("mammals", "포유류"),
    "animal-bird": ("birds", "새"),
    "animal-amphibian": ("amphibians", "양서류"),
    "animal-reptile": ("reptiles", "파충류"),
    "animal-marine": ("marine animals", "바다 동물"),
    "animal-bug": ("bugs", "벌레"),
    "plant-flower": ("flowers", "꽃"),
    "plant-other": ("plants", "식물"),
    "food-fruit": ("fruits", "과일"),
    "food-vegetable": ("vegetables", "채소"),
    "food-prepared": ("prepared dishes", "조리된 음식"),
    "food-asian": ("Asian dishes", "아시아 음식"),
    "food-marine": ("seafood", "해산물"),
    "food-sweet": ("sweets", "단 음식"),
    "drink": ("drinks", "음료"),
    "dishware": ("dishware", "식기"),
    "place-map": ("globes and maps", "지구본과 지도"),
    "place-geographic": ("landscapes", "자연 풍경"),
    "place-building": ("buildings", "건물"),
    "place-religious": ("religious buildings", "종교 건물"),
    "place-other": ("places", "장소"),
    "transport-ground": ("ground vehicles", "육상 교통수단"),
    "transport-water": ("boats and ships", "수상 교통수단"),
    "transport-air": ("air vehicles", "항공 교통수단"),
    "hotel": ("hotel items", "호텔 용품"),
    "time": ("clocks and timers", "시계"),
    "sky-weather": ("sky and weather", "하늘과 날씨"),
    "event": ("celebration items", "행사 용품"),
    "award-medal": ("medals and awards", "메달과 상"),
    "sport": ("sports equipment", "운동 용품"),
    "game": ("games and toys", "게임과 장난감"),
    "arts-crafts": ("arts and crafts", "미술과 공예"),
    "clothing": ("clothing", "옷과 장신구"),
    "sound": ("sound devices", "소리 관련 물건"),
    "music": ("music items", "음악 용품"),
    "musical-instrument": ("musical instruments", "악기"),
    "phone": ("phones", "전화기"),
    "computer": ("computer devices", "컴퓨터 기기"),
    "light-video": ("light and video devices", "조명과 영상 기기"),
    "book-paper": ("books and papers", "책과 종이"),
    "money": ("money", "돈"),
    "mail": ("mail items", "우편물"),
    "writing": ("writing tools", "필기구"),
    "office": ("office supplies", "사무용품"),
    "lock": ("locks and keys", "자물쇠와 열쇠"),
    "tool": ("tools", "도구"),
    "science": ("science equipment", "과학 장비"),
    "medical": ("medical items", "의료용품"),
    "household": ("household items", "생활용품"),
    "other-object": ("other objects", "기타 물건"),
    "transport-sign": ("public signs", "안내 표지"),
    "warning": ("warning signs", "경고 표지"),
    "arrow": ("arrows", "화살표"),
    "religion": ("religious symbols", "종교 기호"),
    "zodiac": ("zodiac signs", "별자리 기호"),
    "av-symbol": ("media control symbols", "미디어 조작 기호"),
    "gender": ("gender symbols", "성별 기호"),
    "math": ("math symbols", "수학 기호"),
    "punctuation": ("punctuation marks", "문장 부호"),
    "currency": ("currency symbols", "통화 기호"),
    "other-symbol": ("other symbols", "기타 기호"),
    "keycap": ("keycaps", "키캡"),
    "alphanum": ("letter and word buttons", "글자 버튼"),
    "geometric": ("geometric shapes", "도형"),
    "flag": ("flags", "깃발"),
    "country-flag": ("country flags", "국기"),
    "subdivision-flag": ("regional flags", "지역 깃발"),
}
GROUPS: dict[str, tuple[str, str]] = {
    "smileys-emotion": ("faces and emotions", "얼굴과 감정"),
    "people-body": ("people and body parts", "사람과 몸"),
    "animals-nature": ("animals and nature", "동물과 자연"),
    "food-drink": ("food and drink", "음식과 음료"),
    "travel-places": ("travel and places", "여행과 장소"),
    "activities": ("activities", "활동"),
    "objects": ("objects", "물건"),
    "symbols": ("symbols", "기호"),
    "flags": ("flags", "깃발"),
}
LOCALES = tuple(
    "en ko ja zh es fr de pt it ru uk pl nl sv tr ar he hi bn th vi id el cs hu fi".split()
)
_SKIN_TONES = {"1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"}
_ADULTS = {"1f468", "1f469", "1f9d1"}
_FAMILIES = {
    "1f48f": "fam:kiss",
    "1f491": "fam:couple-heart",
    "1f46a": "fam:family",
    "1f46b": "fam:holding-hands",
    "1f46c": "fam:holding-hands",
    "1f46d": "fam:holding-hands",
    "1f385": "fam:claus",
    "1f936": "fam:claus",
    "1f9d1-200d-1f384": "fam:claus",
}


def concept_id(code_points: str) -> str:
    """Lower-case hex code points joined by "-", without the variation selector."""
    return "-".join(f"{int(p, 16):x}" for p in code_points.split("-") if p.lower() != "fe0f")


def characters(concept: str) -> str:
    return "".join(chr(int(p, 16)) for p in concept.split("-"))


def load_concepts(emojibase: Path, annotations: list[tuple[Path, str]]) -> dict[str, Concept]:
    """All concepts in emojibase's order, by id. `annotations` are the unpacked CLDR packages with
    the name of their inner folder; later ones win. `label` is emojibase's own name, which the
    packages' file names follow."""
    groups = json.loads((emojibase / "meta/groups.json").read_text(encoding="utf-8"))
    entries = json.loads((emojibase / "en/data.json").read_text(encoding="utf-8"))
    named = {locale: _annotations(annotations, locale) for locale in LOCALES}
    concepts = {}
    for entry in sorted(entries, key=lambda e: e.get("order", 1e9)):
        if "group" not in entry or groups["groups"][str(entry["group"])] == "component":
            continue
        concept = concept_id(entry["hexcode"])
        if not _SKIN_TONES & set(concept.split("-")):
            group = groups["groups"][str(entry["group"])]
            subgroup = groups["subgroups"][str(entry["subgroup"])]
            concepts[concept] = _concept(entry, concept, group, subgroup, named)
    return concepts


def _concept(
    entry: dict[str, Any],
    concept: str,
    group: str,
    subgroup: str,
    named: dict[str, NamesAndKeywords],
) -> Concept:
    names: dict[str, str] = {}
    keywords: dict[str, list[str]] = {}
    for locale, table in named.items():
        if annotation := table.get(characters(concept)):
            names[locale] = annotation[0]
            keywords[locale] = [k for k in annotation[1] if k.lower() != annotation[0].lower()]
    if "en" not in names:
        names["en"], keywords["en"] = entry["label"], entry.get("tags", [])
    return {
        "id": concept,
        "emoji": entry["emoji"],
        "order": entry["order"],
        "version": entry["version"],
        "group": group,
        "subgroup": subgroup,
        "group_en": GROUPS[group][0],
        "group_ko": GROUPS[group][1],
        "subgroup_en": SUBGROUPS[subgroup][0],
        "subgroup_ko": SUBGROUPS[subgroup][1],
        "name_en": names["en"],
        "keywords_en": keywords["en"],
        "name_ko": names.get("ko", ""),
        "keywords_ko": keywords.get("ko", []),
        "family": family(concept, names["en"], subgroup),
        "names": names,
        "label": entry["label"],
    }


def _annotations(packages: list[tuple[Path, str]], locale: str) -> NamesAndKeywords:
    """Name and keywords of every annotated string of one locale."""
    annotations: NamesAndKeywords = {}
    for folder, inner in packages:
        path = folder / inner / locale / "annotations.json"
        if not path.is_file():
            continue
        table = json.loads(path.read_text(encoding="utf-8"))[inner]["annotations"]
        for text, entry in table.items():
            if name := (entry.get("tts") or [None])[0]:
                keywords = list(dict.fromkeys(entry.get("default") or []))
                annotations[text.replace("\ufe0f", "")] = (name, keywords)
    return annotations


def family(concept: str, name: str, subgroup: str) -> str:
    """The id shared by variants in gender, hair or direction; no split separates a family."""
    parts = concept.split("-")
    if parts[-2:] == ["200d", "27a1"]:  # facing right
        parts = parts[:-2]
    if len(parts) > 2 and parts[-2] == "200d" and parts[-1] in ("2640", "2642"):
        parts = parts[:-2]
    by_adult = ("person-role", "person-activity", "person", "person-resting")
    if parts[0] in _ADULTS and len(parts) > 2 and subgroup in by_adult:
        parts = ["1f9d1", *parts[1:]]
    if subgroup in ("family", "person-symbol") and "200d" in parts:
        signs = {"1f48b": "fam:kiss", "2764": "fam:couple-heart", "1f91d": "fam:holding-hands"}
        return next((f for sign, f in signs.items() if sign in parts), "fam:family")
    key = "-".join(parts)
    if key not in _FAMILIES and subgroup == "time" and re.search(r"o.clock|thirty", name):
        return "fam:clock-" + re.sub(r"\W+", "", re.sub(r"o.clock|thirty", "", name))
    return _FAMILIES.get(key, key)
