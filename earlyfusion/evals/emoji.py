"""Measures a model on the emoji data: names, answers, lists, reconstructions, drawings.

    python -m earlyfusion.evals.emoji --model mini --data DIR --limit 300 --seed 0 --out report.json

Prints the model card's table in markdown and writes the numbers as JSON. Text is greedy; pictures
are drawn with the model's own settings, one seed each. Splits: `train` pictures were trained on;
`val-pair` pictures were not, but the same things in other styles were; `val-concept` things were
not trained on at all.

Retrieval asks whether a drawing is nearer to the requested concept than to others of its style.
Every picture becomes two blocks of numbers: RGB at 16 x 16 after a light blur, and the mean edge
strength of its grey version in 16 x 16 cells. Each block is divided by its standard deviation over
the style's pictures; pictures compare by the mean squared difference, edges counting half. The
ceiling is the score of the image tokenizer's reconstructions of the true pictures.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import PIL.Image
from PIL import ImageFilter

from earlyfusion import Chameleon, Image, Message, SamplingParams, Text
from earlyfusion.errors import EarlyFusionError, SettingError
from earlyfusion.mini.emoji.dataset import EmojiData
from earlyfusion.mini.emoji.dialogues import Sample, generate, messages_of
from earlyfusion.mini.emoji.phrases import PROMPTS, normalise, particle
from earlyfusion.mini.emoji.pools import name_of, style_of

Features: TypeAlias = npt.NDArray[np.float32]
Numbers: TypeAlias = dict[str, Any]

BATCH = 16
LANGUAGES = ("en", "ko")
NAMED_SPLITS = ("train", "val-pair", "val-concept")
MAX_DRAWINGS = 100  # per split
MAX_QUESTIONS = 100  # per task
MAX_LISTS = 30  # the longest asks for four pictures
MAX_UNSEEN = 50  # things never trained on, per language
DIALOGUES = 1500  # as many as the published val.jsonl
TOPS = (1, 5, 10)
ANSWER_TOKENS = 64


class Model(Protocol):
    """The model to be measured: `earlyfusion.Chameleon`, or anything with these methods."""

    @property
    def image_tokenizer(self) -> Any: ...

    def generate_batch(
        self, prompts: Sequence[Any], *, output: Any, sampling: Any = None
    ) -> list[Any]: ...


def measure(model: Model, data: EmojiData, limit: int = 300, seed: int = 0) -> Numbers:
    """All measurements; `limit` bounds the pictures or questions of each. Shares are between 0 and
    1, PSNR is in dB. Raises SettingError for a limit below 1."""
    if limit < 1:
        raise SettingError(f"limit is {limit}: give at least 1")
    measures: dict[str, Callable[[], Numbers]] = {
        "naming": lambda: naming(model, data, limit, seed),
        "questions": lambda: questions(model, data, min(limit, MAX_QUESTIONS)),
        "lists": lambda: lists(model, data, min(limit, MAX_LISTS), seed),
        "reconstruction": lambda: reconstruction(model, data, limit, seed),
        "retrieval": lambda: retrieval(model, data, min(limit, MAX_DRAWINGS), seed),
    }
    report: Numbers = {"limit": limit, "seed": seed}
    started = time.monotonic()
    for name, run in measures.items():
        report[name] = run()
        print(f"{name}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    report["seconds"] = round(time.monotonic() - started, 1)
    return report


# ---- text


def naming(model: Model, data: EmojiData, limit: int, seed: int) -> Numbers:
    """Share of pictures named exactly, by split and language: {split: {lang: {n, exact}}}."""
    report: Numbers = {}
    for split in NAMED_SPLITS:
        most = min(limit, MAX_UNSEEN) if split == "val-concept" else limit
        if ids := _chosen(data, split, most, seed):
            report[split] = {lang: _named(model, data, ids, lang) for lang in LANGUAGES}
    return report


def questions(model: Model, data: EmojiData, limit: int) -> Numbers:
    """Share of validation dialogues answered exactly, by task: {task: {n, exact}}."""
    by_task: dict[str, list[Sample]] = defaultdict(list)
    for sample in _dialogues(data):
        if sample["check"] == "exact" and len(by_task[sample["task"]]) < limit:
            by_task[sample["task"]].append(sample)
    return {task: _answered(model, data, samples) for task, samples in sorted(by_task.items())}


def lists(model: Model, data: EmojiData, limit: int, seed: int) -> Numbers:
    """Interleaved lists: {n, well_formed, right_items}. Well formed: "1. name", picture, "2. name",
    picture, as many as requested. Right items: the share of the requested items whose name, counted
    once, belongs to the requested subgroup."""
    samples = [s for s in _dialogues(data) if s["check"] == "images+names"][:limit]
    prompts = [_messages(data, s["messages"][:-1]) for s in samples]
    replies = _replies(model, prompts, "interleaved", _drawn_with(len(prompts), seed, max_images=5))
    formed = [well_formed(r.segments, s["count"]) for r, s in zip(replies, samples, strict=True)]
    right = [_right_items(data, r.segments, s) for r, s in zip(replies, samples, strict=True)]
    requested = sum(s["count"] for s in samples)
    return {
        "n": len(samples),
        "well_formed": _share(formed),
        "right_items": round(sum(right) / requested, 4) if requested else None,
    }


def well_formed(segments: Sequence[Any], count: int) -> bool:
    """Whether the segments are `count` pairs of a numbered name and a picture."""
    if len(segments) != 2 * count:
        return False
    return all(
        isinstance(text, Text)
        and re.fullmatch(rf"{number}\. \S.*", text.text.strip())
        and isinstance(image, Image)
        for number, (text, image) in enumerate(_pairs(segments), 1)
    )


def _right_items(data: EmojiData, segments: Sequence[Any], sample: Sample) -> int:
    rows = [r for r in data.rows if r["subgroup"] == sample["subgroup"]]
    names = {normalise(name_of(r, sample["lang"])) for r in rows}
    texts = (s.text.strip() for s in segments if isinstance(s, Text))
    items = [re.sub(r"^\d+\. ", "", line) for text in texts for line in text.splitlines()]
    return min(len({normalise(i) for i in items} & names), int(sample["count"]))


def _named(model: Model, data: EmojiData, ids: list[str], lang: str) -> Numbers:
    question = PROMPTS["caption"][lang].published[0]
    replies = _replies(model, [[Image(data.image(i)), question] for i in ids], "text", _greedy(ids))
    rows = [data.row(i) for i in ids]
    listed = [r["name_en"] if lang == "en" else r["name_ko"] for r in rows]
    accepted = [{name_of(r, lang), n} for r, n in zip(rows, listed, strict=True)]
    return _exact([r.text for r in replies], accepted)


def _answered(model: Model, data: EmojiData, samples: list[Sample]) -> Numbers:
    prompts = [_messages(data, s["messages"][:-1]) for s in samples]
    replies = _replies(model, prompts, "text", _greedy(prompts))
    return _exact([r.text for r in replies], [set(s["accept"]) for s in samples])


def _exact(answers: Sequence[str], accepted: Sequence[set[str]]) -> Numbers:
    pairs = zip(answers, accepted, strict=True)
    right = [normalise(answer) in {normalise(a) for a in accept} for answer, accept in pairs]
    return {"n": len(right), "exact": _share(right)}


# ---- pictures


def reconstruction(model: Model, data: EmojiData, limit: int, seed: int) -> Numbers:
    """PSNR of pictures that went through codes and back, at the model's resolution: {n,
    psnr_median, psnr_tenth}. Nine tenths of the validation pictures exceed the last."""
    pictures = data.images(_chosen(data, "val", limit, seed))
    pairs = zip(pictures, _reconstructed(model, pictures), strict=True)
    values = [psnr(_resized(before, after.size), after) for before, after in pairs]
    return {
        "n": len(values),
        "psnr_median": round(float(np.median(values)), 2),
        "psnr_tenth": round(float(np.quantile(values, 0.1)), 2),
    }


def psnr(one: PIL.Image.Image, other: PIL.Image.Image) -> float:
    """Peak signal-to-noise ratio of two pictures of one size in dB; 99 if they are equal."""
    difference = np.asarray(one, np.float64) - np.asarray(other, np.float64)
    error = float((difference**2).mean())
    return 99.0 if error == 0 else float(10 * np.log10(255**2 / error))


def retrieval(model: Model, data: EmojiData, limit: int, seed: int) -> Numbers:
    """Ranks of drawings among the pictures of their style. {"usual" | "train" | "val-pair" |
    "ceiling": {n, top1, top5, top10}}. Half of the requests are in English and half in Korean. They
    give name and style, or, in "usual", only the name, which is then compared in the first style
    that has the thing among the training pictures."""
    galleries: dict[str, Gallery] = {}
    report: Numbers = {}
    chosen = {"usual": _first_pictures(data, limit, seed)}
    chosen |= {split: _chosen(data, split, limit, seed) for split in ("train", "val-pair")}
    for split, ids in chosen.items():
        table = "draw" if split == "usual" else "draw_styled"
        prompts = [_drawing_prompt(data, id_, LANGUAGES[i % 2], table) for i, id_ in enumerate(ids)]
        replies = _replies(model, prompts, "image", _drawn_with(len(ids), seed))
        drawn = [r.images[0] if r.images else None for r in replies]
        report[split] = _ranks(data, ids, drawn, galleries)
    ids = _chosen(data, "val-pair", limit, seed) or _chosen(data, "train", limit, seed)
    report["ceiling"] = _ranks(data, ids, _reconstructed(model, data.images(ids)), galleries)
    return report


class Gallery:
    """The pictures of one style, with which drawings are compared."""

    def __init__(self, data: EmojiData, style: str) -> None:
        rows = [r for r in data.rows if r["style"] == style]
        self.concepts = np.array([r["codepoints"] for r in rows])
        blocks = [features(data.image(r["id"])) for r in rows]
        colours, edges = (np.stack(block) for block in zip(*blocks, strict=True))
        self.scales = (float(colours.std()) or 1.0, float(edges.std()) or 1.0)
        self.rows = np.stack([self._join(*block) for block in blocks])

    def rank(self, picture: PIL.Image.Image, concept: str) -> int:
        """How many other concepts are nearer to the picture than this one: 0 is a hit."""
        distances = ((self.rows - self._join(*features(picture))) ** 2).sum(1)
        nearest = distances[self.concepts == concept].min()
        return len(set(self.concepts[distances < nearest].tolist()) - {concept})

    def _join(self, colours: Features, edges: Features) -> Features:
        weights = (
            1 / self.scales[0] / colours.size**0.5,
            0.5**0.5 / self.scales[1] / edges.size**0.5,
        )
        return np.concatenate([colours * weights[0], edges * weights[1]])


def features(picture: PIL.Image.Image) -> tuple[Features, Features]:
    """Colours [768] and edges [256] of a picture, each from 0 to 1: see the top of this file."""
    small = _resized(picture.convert("RGB"), (64, 64))
    blurred = small.filter(ImageFilter.GaussianBlur(2)).resize((16, 16), PIL.Image.Resampling.BOX)
    grey = np.asarray(small.convert("L"), np.float32) / 255
    down, right = np.gradient(grey)
    edges = np.hypot(down, right).reshape(16, 4, 16, 4).mean((1, 3))
    colours = np.asarray(blurred, np.float32).ravel() / np.float32(255)
    return colours, edges.astype(np.float32).ravel()


def _ranks(
    data: EmojiData,
    ids: Sequence[str],
    pictures: Sequence[PIL.Image.Image | None],
    galleries: dict[str, Gallery],
) -> Numbers:
    ranks = []
    for image_id, picture in zip(ids, pictures, strict=True):
        row = data.row(image_id)
        if row["style"] not in galleries:
            galleries[row["style"]] = Gallery(data, row["style"])
        gallery = galleries[row["style"]]
        missed = len(gallery.rows)
        ranks.append(gallery.rank(picture, row["codepoints"]) if picture else missed)
    return {"n": len(ranks)} | {f"top{top}": _share([r < top for r in ranks]) for top in TOPS}


def _drawing_prompt(data: EmojiData, image_id: str, lang: str, table: str = "draw_styled") -> str:
    row = data.row(image_id)
    name = name_of(row, lang)
    prompt = PROMPTS[table][lang].published[0]
    return prompt.format(n=name, no=particle(name, "을/를"), s=style_of(row, lang))


def _first_pictures(data: EmojiData, limit: int, seed: int) -> list[str]:
    """At most `limit` training pictures, each the first of its thing."""
    first: dict[str, str] = {}
    for image_id in data.split("train"):
        first.setdefault(data.row(image_id)["codepoints"], image_id)
    ids = list(first.values())
    return ids if len(ids) <= limit else random.Random(f"usual-{seed}").sample(ids, limit)


def _reconstructed(model: Model, pictures: Sequence[PIL.Image.Image]) -> list[PIL.Image.Image]:
    done: list[PIL.Image.Image] = []
    for start in range(0, len(pictures), BATCH):
        tokenizer = model.image_tokenizer
        done += tokenizer.decode(tokenizer.encode(list(pictures[start : start + BATCH])))
    return done


def _resized(picture: PIL.Image.Image, size: tuple[int, int]) -> PIL.Image.Image:
    if picture.size == size:
        return picture
    return picture.resize(size, PIL.Image.Resampling.LANCZOS)


# ---- asking


def _chosen(data: EmojiData, split: str, limit: int, seed: int) -> list[str]:
    """At most `limit` ids, the same for the same seed."""
    ids = data.split(split)
    return ids if len(ids) <= limit else random.Random(f"{split}-{seed}").sample(ids, limit)


def _dialogues(data: EmojiData) -> list[Sample]:
    """The published validation dialogues, generated again."""
    return generate(data, "val", DIALOGUES, seed=0, further=0)


def _messages(data: EmojiData, turns: Iterable[dict[str, Any]]) -> list[Message]:
    return messages_of(turns, lambda image_id, role: Image(data.image(image_id)))


def _greedy(prompts: Sequence[Any]) -> list[SamplingParams]:
    return [SamplingParams(temperature=0, max_tokens=ANSWER_TOKENS)] * len(prompts)


def _drawn_with(count: int, seed: int, max_images: int | None = None) -> list[SamplingParams]:
    """The model's default settings for pictures, one seed per reply; text is greedy."""
    seeds = range(seed, seed + count)
    return [SamplingParams(temperature=0, max_images=max_images, seed=s) for s in seeds]


def _replies(
    model: Model, prompts: Sequence[Any], output: str, sampling: Sequence[SamplingParams]
) -> list[Any]:
    replies: list[Any] = []
    for start in range(0, len(prompts), BATCH):
        rows = slice(start, start + BATCH)
        replies += model.generate_batch(
            list(prompts[rows]), output=output, sampling=list(sampling[rows])
        )
    return replies


def _pairs(segments: Sequence[Any]) -> Iterable[tuple[Any, Any]]:
    return zip(segments[::2], segments[1::2], strict=True)


def _share(values: Sequence[bool]) -> float | None:
    return round(sum(values) / len(values), 4) if values else None


# ---- reporting


def markdown(report: Numbers) -> list[str]:
    """The report as the lines of a table for a model card."""
    lines = ["| measure | on | n | score |", "| --- | --- | --- | --- |"]

    def add(measure: str, on: str, n: int, *scores: float | None) -> None:
        shown = " / ".join("-" if s is None else f"{100 * s:.1f} %" for s in scores)
        lines.append(f"| {measure} | {on} | {n} | {shown} |")

    for split, languages in report["naming"].items():
        for lang, found in languages.items():
            add(f"naming, exact match, {lang}", split, found["n"], found["exact"])
    for task, found in report["questions"].items():
        add(f"question: {task.replace('_', ' ')}", "val dialogues", found["n"], found["exact"])
    found = report["lists"]
    add("lists: well formed", "val dialogues", found["n"], found["well_formed"])
    add("lists: right items", "val dialogues", found["n"], found["right_items"])
    found = report["reconstruction"]
    lines.append(
        f"| reconstruction, median PSNR | val | {found['n']} | {found['psnr_median']:.1f} dB |"
    )
    for split, found in report["retrieval"].items():
        on = {"ceiling": "true pictures through the codes", "usual": "train, no style asked"}
        scores = [found[f"top{top}"] for top in TOPS]
        add("drawing retrieval, top 1 / 5 / 10", on.get(split, split), found["n"], *scores)
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m earlyfusion.evals.emoji", description="Measure a model on the emoji data."
    )
    parser.add_argument("--model", default="mini", help="a model's name, folder or hub id")
    parser.add_argument("--data", required=True, help="folder of the emoji data")
    parser.add_argument("--limit", type=int, default=300, help="pictures or questions a measure")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, help="JSON file for the numbers")
    args = parser.parse_args(arguments)
    try:
        data = EmojiData(args.data)
        model = Chameleon.load(args.model, device=args.device)
        report = measure(model, data, args.limit, args.seed)
    except EarlyFusionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"model": args.model} | report, indent=1)
        args.out.write_text(text + "\n", encoding="utf-8")
    print("\n".join(markdown(report)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
