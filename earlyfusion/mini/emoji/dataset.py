"""Reads a folder of the emoji data: rows, names, images.

The folder holds `metadata.jsonl` (a row per image), `concepts.jsonl` (a row per concept) and
`images/<style>.zip`. An image's id is `<style>/<member without .webp>`.
"""

from __future__ import annotations

import io
import json
import threading
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from PIL import Image

from earlyfusion.errors import DataError

SPLITS = ("train", "val", "val-pair", "val-concept", "test", "test-pair", "test-concept")
ICON = "icon"
"""The style of icons; those of things without a name here are in the two splits `UNKNOWN`."""
UNKNOWN = ("unknown-train", "unknown-val")


class Row(TypedDict):
    """One image; `en` and `ko` are its names as people say them: "flag of France"."""

    id: str
    split: str
    style: str
    file: str
    member: str
    codepoints: str
    variant: int
    emoji: str
    group: str
    subgroup: str
    name_en: str
    keywords_en: list[str]
    name_ko: str
    keywords_ko: list[str]
    colours: list[str]
    colour_shares: list[float]
    colours_ko: list[str]
    family: str
    design: str
    licence: str
    source: str
    sibling_in_train: NotRequired[bool]
    nn_train: NotRequired[float]
    nn_train_id: NotRequired[str]
    en: str
    ko: str
    group_en: str
    group_ko: str
    subgroup_en: str
    subgroup_ko: str


def spoken_name(name: str, lang: str) -> str:
    """The catalogue's name as people say it: flags and keycaps are reworded."""
    if lang == "en":
        if name.startswith("flag: "):
            return "flag of " + name[6:]
        return name.replace("keycap: ", "keycap ")
    if name.startswith("깃발: "):
        return name[4:] + " 깃발"
    return name.replace("키 캡: ", "키캡 ")


def _words(names: Iterable[str]) -> set[str]:
    """The words of some names, without case and the s of a plural."""
    return {w.removesuffix("s") for n in names for w in n.lower().replace("-", " ").split()}


class EmojiData:
    """The data of one folder.

    `rows` has the order of metadata.jsonl; `concepts` is keyed by their ids. Archives are read into
    memory at first use (30 MB for all ten), so that threads and forked workers share no file
    position. `icons` is the folder of a set of icons (docs/mini.md): those named as a training
    thing join the training images, and those that share no word with any thing are `UNKNOWN`.

    Raises DataError if the folder, a file of it or a field is missing.
    """

    def __init__(self, folder: str | Path, icons: str | Path | None = None) -> None:
        self.folder = Path(folder)
        self.icons = None if icons is None else Path(icons)
        self.concepts = {c["id"]: c for c in self._lines("concepts.jsonl")}
        self.rows: list[Row] = [self._row(r) for r in self._lines("metadata.jsonl")]
        if self.icons:
            self.rows += self._icon_rows(self.icons)
        self._by_id = {r["id"]: r for r in self.rows}
        self._archives: dict[str, zipfile.ZipFile] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.rows)

    def __reduce__(self) -> tuple[type[EmojiData], tuple[Path, Path | None]]:
        return EmojiData, (self.folder, self.icons)

    def row(self, image_id: str) -> Row:
        """The row of one image; DataError for an id that the folder does not have."""
        if image_id not in self._by_id:
            raise DataError(
                f"image {image_id!r} is not in {self.folder}: "
                "ids are <style>/<member> as in metadata.jsonl"
            )
        return self._by_id[image_id]

    def split(self, name: str) -> list[str]:
        """Ids of one split in file order; "val" is val-pair and val-concept together."""
        if name not in SPLITS + UNKNOWN:
            raise DataError(f"split {name!r} is unknown: choose one of {', '.join(SPLITS)}")
        return [
            r["id"] for r in self.rows if r["split"] == name or r["split"].split("-")[0] == name
        ]

    def image(self, image_id: str) -> Image.Image:
        """The image, RGB 128 x 128 on white."""
        row = self.row(image_id)
        try:
            data = self._archive(row["file"]).read(row["member"])
        except KeyError:
            raise DataError(
                f"{row['member']} is missing from {self.folder / row['file']}: build the data again"
            ) from None
        with Image.open(io.BytesIO(data)) as image:
            return image.convert("RGB")

    def images(self, ids: Iterable[str]) -> list[Image.Image]:
        return [self.image(i) for i in ids]

    def _archive(self, file: str) -> zipfile.ZipFile:
        with self._lock:
            if file not in self._archives:
                self._archives[file] = zipfile.ZipFile(io.BytesIO(self._bytes(file)))
            return self._archives[file]

    def _bytes(self, name: str) -> bytes:
        path = self.folder / name
        if not path.is_file():
            raise DataError(
                f"no {name} in {self.folder}: give the folder of the emoji data, or make one with "
                f"`python -m earlyfusion.mini.emoji.build --out {self.folder}`"
            )
        return path.read_bytes()

    def _text(self, name: str) -> str:
        return self._bytes(name).decode("utf-8")

    def _icon_rows(self, folder: Path) -> list[Row]:
        train_rows = {r["en"].lower(): r for r in self.rows if r["split"] == "train"}
        known = {word for r in self.rows for word in _words([r["en"], *r["keywords_en"]])}
        rows: list[Row] = []
        for raw in self._lines(str(folder.resolve() / "metadata.jsonl")):
            icon = {
                "id": f"{ICON}/{raw['id']}",
                "style": ICON,
                "file": str(folder.resolve() / raw["file"]),
                "member": raw["member"],
                "colours": [],
                "colour_shares": [],
                "colours_ko": [],
                "licence": raw["licence"],
                "source": raw["source"],
            }
            match = train_rows.get(raw["name_en"].lower())
            if match and raw["split"] == "train":
                rows.append({**match, **icon})  # type: ignore[typeddict-item]
            elif not _words([raw["name_en"], *raw["keywords_en"]]) & known:
                name, split = raw["name_en"], f"unknown-{raw['split']}"
                icon |= {"split": split, "en": name, "ko": name, "subgroup": split}
                icon |= {"codepoints": icon["id"], "family": icon["id"]}
                rows.append({**self.rows[0], **icon})  # type: ignore[typeddict-item]
        return rows

    def _lines(self, name: str) -> list[dict[str, Any]]:
        lines = self._text(name).split("\n")
        try:
            return [json.loads(line) for line in lines if line]
        except json.JSONDecodeError as error:
            raise DataError(
                f"{self.folder / name} holds a line that is not JSON: {error.msg}"
            ) from None

    def _row(self, raw: dict[str, Any]) -> Row:
        try:
            concept = self.concepts[raw["codepoints"]]
            raw["en"] = spoken_name(raw["name_en"], "en")
            raw["ko"] = spoken_name(raw["name_ko"], "ko")
            for key in ("group_en", "group_ko", "subgroup_en", "subgroup_ko"):
                raw[key] = concept[key]
        except KeyError as missing:
            raise DataError(
                f"metadata.jsonl of {self.folder} lacks {missing} in a row: build the data again"
            ) from None
        return raw  # type: ignore[return-value]
