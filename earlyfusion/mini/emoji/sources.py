"""Where each image comes from: files and icons of the unpacked packages, matched to concepts.

Some packages name their icons by code points, others by names from various years; the tables below
list what no rule matches.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from earlyfusion.mini.emoji.catalogue import STYLES, Concept, concept_id

Index: TypeAlias = dict[str, str]
Concepts: TypeAlias = dict[str, Concept]

# Names from older CLDR releases, which some packages still use.
_OLD_NAMES: dict[str, str] = dict(
    pair.split("=", 1)
    for pair in """
a-button=1f170 ab-button=1f18e b-button=1f171 o-button=1f17e ballot-box-with-check=2611
blond-haired-person=1f471 blond-haired-man=1f471-200d-2642 blond-haired-woman=1f471-200d-2640
bride-with-veil=1f470-200d-2640 direct-hit=1f3af dizzy-face=1f635 exclamation-mark=2757
question-mark=2753 hugging-face=1f917 pouting-face=1f621 heavy-check-mark=2714
white-heavy-check-mark=2705 heavy-division-sign=2797 division-sign=2797 heavy-minus-sign=2796
minus-sign=2796 heavy-plus-sign=2795 plus-sign=2795 heavy-multiplication-x=2716
multiplication-sign=2716 heavy-large-circle=2b55 heavy-heart-exclamation=2763
laptop-computer=1f4bb man-and-woman-holding-hands=1f46b two-men-holding-hands=1f46c
two-women-holding-hands=1f46d man-in-suit-levitating=1f574 man-with-chinese-cap=1f472
up-text-button=1f199 anticlockwise-arrows-button=1f504 school-backpack=1f392 scorpius=264f
white-medium-star=2b50 flag-for-macau-sar-china=1f1f2-1f1f4 flag-for-macedonia=1f1f2-1f1f0
flag-for-myanmar=1f1f2-1f1f2 flag-for-swaziland=1f1f8-1f1ff flag-for-turkey=1f1f9-1f1f7
flag-for-cocos-islands=1f1e8-1f1e8 flag-for-black-flag=1f3f4 flag-for-chequered-flag=1f3c1
flag-for-crossed-flags=1f38c flag-for-rainbow-flag=1f3f3-200d-1f308
flag-for-triangular-flag=1f6a9 flag-for-white-flag=1f3f3 keycap-pound=23-20e3
cat-face-with-tears-of-joy=1f639 cat-face-with-wry-smile=1f63c
smiling-cat-face-with-heart-eyes=1f63b grinning-cat-face-with-smiling-eyes=1f638
red-wine-glass=1f377 game-dice=1f3b2 anxious-face=1f630 crazy-face=1f92a wine-glass=1f377
""".split()
)

# fxemoji invented its names: these are the ones that no rule matches, or matches wrongly.
_FIREFOX_NAMES: dict[str, str] = dict(
    pair.split("=", 1)
    for pair in """
2hearts=1f495 admissiontickets=1f39f americasglobe=1f30e angry=1f620 anguish=1f627 aok=1f44c
artistpalette=1f3a8 asiaaustraliaglobe=1f30f astonished=1f632 aubergine=1f346
backwithleftwardsarrow=1f519 banana=1f34c bath=1f6c0 beachumbrella=26f1 bear=1f43b
basketballandhoop=1f3c0 beating-heart=1f493 bicyclist=1f6b4 blowfish=1f421 bolt=26a1
bouquet=1f490 bowing=1f647 bunny=1f430 bunnyside=1f407 cat=1f431 catside=1f408 cellphone=1f4f1
chilipepper=1f336 clap=1f44f blonde=1f471 bread=1f35e barchart=1f4ca chartdownwardstrend=1f4c9
chartupwardstrend=1f4c8 chartupwardstrendyen=1f4b9 banknotedollar=1f4b5 banknoteeuro=1f4b6
banknotepound=1f4b7 banknoteyen=1f4b4 bellcancellation=1f515 blackdownpointingbackhand=1f447
blackleftpointingbackhand=1f448 blackrightpointingbackhand=1f449 blackuppointingbackhand=1f446
blackdownpointingdoublearrow=23ec blackleftpointingdoublearrow=23ea
blackrightpointingdoublearrow=23e9 blackuppointingdoublearrow=23eb blackleftpointingarrow=25c0
blackrightpointingarrow=25b6 bookmarktab=1f4d1 boot=1f462 bride=1f470-200d-2640 bunny-ears=1f46f
closedmailboxlowered=1f4ea closedmailboxraised=1f4eb openmailboxlowered=1f4ed
openmailboxraised=1f4ec coldsweat=1f630 confetti=1f38a constructionsign=1f6a7 controlknob=1f39b
cop=1f46e couplekiss=1f48f devilhorns=1f608 dissapointedrelief=1f625 dizzyface=1f635 dog=1f436
dogside=1f415 mouse=1f42d mouseside=1f401 pig=1f437 pigside=1f416 tiger=1f42f tigerside=1f405
leopardside=1f406 dragonhead=1f432 dragonside=1f409 doubleexclaimationmark=203c
eightspokedasterix=2733 endwithleftwardsarrow=1f51a envelopedownarrowabove=1f4e9
europeafricaglobe=1f30d evergreen=1f332 exclaimationquestionmark=2049 fallingleaf=1f342
fishcakeswirl=1f365 flexbicep=1f4aa folder=1f4c1 openfolder=1f4c2 forkknife=1f374
franceflag=1f1eb-1f1f7 italianflag=1f1ee-1f1f9 japanflag=1f1ef-1f1f5 koreaflag=1f1f0-1f1f7
russianflag=1f1f7-1f1fa spanishflag=1f1ea-1f1f8 greatbritainflag=1f1ec-1f1e7
chineseflag=1f1e8-1f1f3 frontfacingchick=1f425 gem=1f48e gma=1f475 gpa=1f474 grintears=1f602
grinsweat=1f605 grinsquint=1f606 halo=1f607 hampster=1f439 headmassage=1f486 heartarrow=1f498
heartblue=1f499 heartgreen=1f49a heartyellow=1f49b heartpurple=1f49c heartribbon=1f49d
hearteyes=1f60d heavyexclaimationmarksymbol=2757 heels=1f460 highspeedtrainbulletnose=1f685
japaneseangrymask=1f479 kissclosedeyes=1f61a kisseyes=1f619 leaffluttering=1f343
leftmagnifyingglass=1f50d rightmagnifyingglass=1f50e lips=1f444 lockandkey=1f510 mahjong=1f004
manltepiececlock=1f570 tie=1f454 mensshoe=1f45e mensrunner=1f45f meridianglobe=1f310
medicalmask=1f637 monkeyhear=1f649 monkeysee=1f648 monkeyspeak=1f64a nogesture=1f645
nomouth=1f636 okgesture=1f646 openmouth=1f62e perservere=1f623 phonerightarrowleft=1f4f2
pigsnout=1f43d poo=1f4a9 pout=1f621 pray=1f64f present=1f381 racecar=1f3ce raincloud=1f327
snowcloud=1f328 snowmountains=1f3d4 raisedhandpartfingers=1f596 raisedhandsfingerssplayed=1f590
running=1f3c3 saggitarius=2650 sandals=1f461 screamfear=1f631 silhouetteohjapan=1f5fe
sixpointedstarwithdot=1f52f sleuthspy=1f575 smallfrown=1f641 smallsmile=1f642 smiletongue=1f60b
smirk=1f60f soonwithrightarrow=1f51c spurtingwhale=1f433 squaredup=1f199 studiomic=1f399
sunraincloud=1f326 whitesunsmallcloud=1f324 sweat=1f613 sweatsplash=1f4a6 swimming=1f3ca
tennisball=1f3be thoughtbaloon=1f4ad tongueout=1f61b tongueoutwink=1f61c
topwithupwardsarrow=1f51d toykotower=1f5fc triumph=1f624 turban=1f473 videocasette=1f4fc
walking=1f6b6 waningbibbousmoon=1f316 whiteheavycheckmark=2705 whiteexclaimationmark=2755
whitemediumstar=2b50 womansshirt=1f45a pinkwallet=1f45b horseface=1f434 cowface=1f42e
monkeyface=1f435
""".split()
)
for _hour in range(1, 13):
    _FIREFOX_NAMES[f"clock{_hour}oclock"] = f"{0x1F54F + _hour:x}"
    _FIREFOX_NAMES[f"clock{_hour}thirty"] = f"{0x1F55B + _hour:x}"


@dataclass(frozen=True)
class Source:
    """One image to render: SVG text, a file, or a character of a font."""

    style: str
    concept: str
    variant: int
    format: Literal["svg", "svg-file", "image-file", "glyph"]
    content: str
    font: str = ""

    @property
    def member(self) -> str:
        return self.concept + (f"~{self.variant + 1}" if self.variant else "")

    @property
    def id(self) -> str:
        return f"{self.style}/{self.member}"


def find_sources(concepts: Concepts, package: Callable[[str], Path]) -> Iterator[Source]:
    """One source for each style, concept and variant; `package` returns a package's folder."""
    index = _name_index(concepts)
    for style, find in _FINDERS.items():
        seen: set[str] = set()
        for source in find(style, package(STYLES[style]["package"]), concepts, index):
            if source.concept in concepts and source.id not in seen:
                seen.add(source.id)
                yield source


class IconSet:
    """An unpacked icon package: SVGs by name, and its table of code points if it has one."""

    def __init__(self, folder: Path) -> None:
        self.set = json.loads((folder / "icons.json").read_text(encoding="utf-8"))
        self.aliases = self.set.get("aliases", {})
        self.names = sorted([*self.set["icons"], *self.aliases])
        table = folder / "chars.json"
        text = table.read_text(encoding="utf-8") if table.is_file() else "{}"
        self.chars: dict[str, str] = json.loads(text)

    def svg(self, name: str) -> str | None:
        """The icon as an SVG document; None for an alias that turns or mirrors another icon."""
        for _ in range(5):
            if name not in self.aliases:
                break
            alias = self.aliases[name]
            if {"rotate", "hFlip", "vFlip"} & alias.keys():
                return None
            name = alias["parent"]
        icon = self.set["icons"].get(name)
        if icon is None:
            return None
        width = icon.get("width", self.set.get("width", 16))
        height = icon.get("height", self.set.get("height", 16))
        box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
        body = icon["body"].replace("currentColor", "#000")
        return (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{box}" width="{width}" height="{height}">{body}</svg>'
        )

    def sources(self, style: str, matches: Iterable[tuple[str, str | None]]) -> Iterator[Source]:
        """One source per concept from (icon name, concept) matches: the first that has an SVG."""
        seen: set[str] = set()
        for name, concept in matches:
            if concept and concept not in seen and (svg := self.svg(name)):
                seen.add(concept)
                yield Source(style, concept, 0, "svg", svg)


# ---- styles


def _twemoji(style: str, folder: Path, concepts: Concepts, index: Index) -> Iterator[Source]:
    for path in sorted((folder / "dist/svg").glob("*.svg")):
        yield Source(style, concept_id(path.stem), 0, "svg-file", str(path))


def _fluent_3d(style: str, folder: Path, concepts: Concepts, index: Index) -> Iterator[Source]:
    # The package fills gaps in Microsoft's set with art from elsewhere, above all flags. Flags are
    # left out here; the manifest lists only what Microsoft's flat set has as well.
    for path in sorted((folder / "assets").glob("*.webp")):
        concept = concept_id(path.stem)
        if concept in concepts and concepts[concept]["group"] != "flags":
            yield Source(style, concept, 0, "image-file", str(path))


def _by_code_points(style: str, folder: Path, concepts: Concepts, index: Index) -> Iterator[Source]:
    icons = IconSet(folder)
    by_code = [(name, concept_id(code)) for code, name in sorted(icons.chars.items())]
    by_name = [(name, _concept_named(name, index)) for name in icons.names]
    known = [match for match in by_code if match[1] in concepts]
    yield from icons.sources(style, [*known, *by_name])


def _by_name(style: str, folder: Path, concepts: Concepts, index: Index) -> Iterator[Source]:
    icons = IconSet(folder)
    names = sorted(icons.names, key=lambda n: (n not in index, n))
    yield from icons.sources(style, [(n, _concept_named(n, index)) for n in names])


def _streamline(style: str, folder: Path, concepts: Concepts, index: Index) -> Iterator[Source]:
    icons = IconSet(folder)
    named = {c["name_en"]: concept for concept, c in concepts.items()}
    countries = {_slug(n[6:]): c for n, c in named.items() if n.startswith("flag: ")}
    others = {"flag-in-hole": "26f3", "gesturing-ok": "1f646"}
    for name in icons.names:
        base, _, number = name.rpartition("-") if re.search(r"-\d+$", name) else (name, "", "1")
        concept = _concept_named(base, index) or others.get(base) or countries.get(base)
        if base == "turkey":
            concept = countries["turkiye"]
        svg = icons.svg(name)
        if concept in concepts and svg:
            yield Source(style, concept, int(number) - 1, "svg", svg)


def _fxemoji(style: str, folder: Path, concepts: Concepts, index: Index) -> Iterator[Source]:
    icons = IconSet(folder)
    exact, loose = _squashed_names(concepts)

    def match(name: str) -> str | None:
        squashed = _squash(name)
        return _FIREFOX_NAMES.get(name) or exact.get(squashed) or loose.get(squashed)

    def match_rank(name: str) -> tuple[bool, bool, str]:
        return name not in _FIREFOX_NAMES, _squash(name) not in exact, name

    names = sorted(icons.names, key=match_rank)
    yield from icons.sources(style, [(n, match(n)) for n in names])


def _noto_mono(style: str, folder: Path, concepts: Concepts, index: Index) -> Iterator[Source]:
    font = str(folder / "400Regular/NotoEmoji_400Regular.ttf")
    for concept, entry in concepts.items():
        yield Source(style, concept, 0, "glyph", entry["emoji"], font)


_FINDERS: dict[str, Callable[[str, Path, Concepts, Index], Iterator[Source]]] = {
    "twemoji": _twemoji,
    "noto": _by_code_points,
    "fluent-flat": _by_code_points,
    "fluent-3d": _fluent_3d,
    "emojitwo": _by_name,
    "fxemoji": _fxemoji,
    "streamline": _streamline,
    "noto-v1": _by_name,
    "noto-mono": _noto_mono,
    "fluent-mono": _by_code_points,
}


# ---- names


def _slug(name: str) -> str:
    name = name.lower().replace("ñ", "n").replace("#", "hash").replace("*", "asterisk")
    name = unicodedata.normalize("NFKD", name.replace("&", "and"))
    name = "".join(c for c in name if not unicodedata.combining(c))
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"['’“”.!]", "", name)).strip("-")


def _squash(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "", name.lower())


def _name_index(concepts: Concepts) -> Index:
    """Slug of a name -> concept; flags and keycaps also under other forms in use."""
    index: Index = {}
    for concept, entry in concepts.items():
        for name in (entry["label"], entry["name_en"]):
            slugs = [_slug(name)]
            if name.startswith("flag: "):
                slugs += [_slug("flag for " + name[6:]), "flag-" + _slug(name[6:])]
            if name.startswith("keycap: "):
                slugs.append(_slug("keycap-" + name[8:]))
            for slug in slugs:
                index.setdefault(slug, concept)
    return index


def _concept_named(name: str, index: Index) -> str | None:
    if name in _OLD_NAMES or name in index:
        return _OLD_NAMES.get(name) or index[name]
    for old, new in (("cat-face", "cat"), ("-face", ""), ("flag-for-flag-", "flag-")):
        if old in name and name.replace(old, new) in index:
            return index[name.replace(old, new)]
    return None


def _squashed_names(concepts: Concepts) -> tuple[Index, Index]:
    """Names without spaces -> concept: whole ones, and ones without usual first and last words."""
    exact: Index = {}
    loose: Index = {}
    for concept, entry in concepts.items():
        names = {entry["label"], entry["name_en"]}
        if "-" not in concept:
            names.add(unicodedata.name(chr(int(concept, 16)), "").lower())
        for name in sorted(names - {""}):
            exact.setdefault(_squash(name), concept)
            for short in _shortened(name):
                loose.setdefault(_squash(short), concept)
    return exact, loose


def _shortened(name: str) -> Iterator[str]:
    for first in ("black ", "white ", "heavy ", ""):
        for last in (" face", " symbol", " sign", " button", ""):
            fits = name.startswith(first) and name.endswith(last)
            if fits and len(name) > len(first) + len(last):
                yield name[len(first) : len(name) - len(last)]
