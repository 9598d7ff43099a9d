"""Measures a model on the emoji data: names, answers, lists, reconstructed and generated images.

    python -m earlyfusion.evals.emoji --model mini --data DIR --limit 300 --seed 0 --out report.json

Prints the model card's table in markdown and writes the numbers as JSON. Text is greedy; images
are generated with the model's own settings, one seed each. Splits: `train` images were trained on;
`val-pair` images were not, but the same things in other styles were; `val-concept` things were
not trained on at all.

Retrieval ranks things by their distance to a generated image: the requested thing should be the
nearest among the images of the requested style or, if no style was requested, also among those of
all styles (`gallery.Gallery`). The ceiling is the score of the image tokenizer's reconstructions of
the true images. Requests in free words, unknown things, scenes and several seeds: see `evals.free`.

`--card FILE` writes the table into a model card, in the place of its table.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from earlyfusion import Chameleon, Image, Message, Text
from earlyfusion.errors import EarlyFusionError, SettingError
from earlyfusion.evals import free
from earlyfusion.evals.asking import (
    BATCH,
    Model,
    Numbers,
    generate_replies,
    greedy_sampling,
    seeded_sampling,
    share,
)
from earlyfusion.evals.gallery import Gallery, features, frechet, resized
from earlyfusion.mini.emoji.dataset import EmojiData
from earlyfusion.mini.emoji.dialogues import Sample, generate, messages_of
from earlyfusion.mini.emoji.phrases import PROMPTS, normalise, particle
from earlyfusion.mini.emoji.pools import name_of, style_of

__all__ = ["Gallery", "features", "main", "markdown", "measure"]

LANGUAGES = ("en", "ko")
NAMED_SPLITS = ("train", "val-pair", "val-concept")
MAX_GENERATED = 100  # per split
MAX_QUESTIONS = 100  # per task
MAX_LISTS = 30  # the longest asks for four images
MAX_REFUSALS = 40  # of each kind
MAX_UNSEEN = 50  # things never trained on, per language
DIALOGUES = 1500  # as many as the published val.jsonl
TOPS = (1, 5, 10)
HEAD = ("| measure | on | n | score |", "| --- | --- | --- | --- |")
REQUESTS_HEAD = ("| request | wanted | reply | kind, thing |", "| --- | --- | --- | --- |")


def measure(
    model: Model,
    data: EmojiData,
    limit: int = 300,
    seed: int = 0,
    save_report: Callable[[Numbers], None] | None = None,
) -> Numbers:
    """All measurements, by name; each takes at most `limit` images or questions.

    `save_report` is called with the report so far after each measurement, as a run may be
    interrupted. Shares are between 0 and 1, PSNR is in dB. Raises `SettingError` if the limit is
    below 1."""
    if limit < 1:
        raise SettingError(f"limit={limit} must be at least 1")
    galleries: dict[str | None, Gallery] = {None: Gallery(data)}
    all_styles = galleries[None]
    num_images = min(limit, MAX_GENERATED)
    requested, named = _first_images(data, limit, seed), _sample_ids(data, "train", limit, seed)
    # The most informative ones come first: a run may be interrupted.
    measures: dict[str, Callable[[], Numbers]] = {
        "naming": lambda: naming(model, data, limit, seed),
        "retrieval": lambda: retrieval(model, data, num_images, seed, galleries),
        "seeds": lambda: free.seeds(model, all_styles),
        "wordings": lambda: free.wordings(model, data, all_styles),
        "questions": lambda: questions(model, data, min(limit, MAX_QUESTIONS)),
        "lists": lambda: lists(model, data, min(limit, MAX_LISTS), seed),
        "refusals": lambda: free.refusals(model, data, requested, named, min(limit, MAX_REFUSALS)),
        "reconstruction": lambda: reconstruction(model, data, limit, seed),
        "scenes": lambda: free.scene_answers(model, data, num_images),
    }
    report: Numbers = {"limit": limit, "seed": seed}
    started = time.monotonic()
    for name, run_measure in measures.items():
        report[name] = run_measure()
        if save_report is not None:
            save_report(report)
        print(f"{name}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    report["seconds"] = round(time.monotonic() - started, 1)
    return report


# ---- text


def naming(model: Model, data: EmojiData, limit: int, seed: int) -> Numbers:
    """Share of images named exactly, by split and language: {split: {lang: {n, exact}}}."""
    report: Numbers = {}
    for split in NAMED_SPLITS:
        num_images = min(limit, MAX_UNSEEN) if split == "val-concept" else limit
        if ids := _sample_ids(data, split, num_images, seed):
            report[split] = {lang: _naming_accuracy(model, data, ids, lang) for lang in LANGUAGES}
    return report


def questions(model: Model, data: EmojiData, limit: int) -> Numbers:
    """Share of validation dialogues answered exactly, by task: {task: {n, exact}}."""
    by_task: dict[str, list[Sample]] = defaultdict(list)
    for sample in _dialogues(data):
        if sample["check"] == "exact" and len(by_task[sample["task"]]) < limit:
            by_task[sample["task"]].append(sample)
    return {
        task: _answer_accuracy(model, data, samples) for task, samples in sorted(by_task.items())
    }


def lists(model: Model, data: EmojiData, limit: int, seed: int) -> Numbers:
    """Interleaved lists: {n, well_formed, right_items}. Well formed: "1. name", image, "2. name",
    image, as many as requested. Right items: the share of the requested items whose name, counted
    once, belongs to the requested subgroup."""
    samples = [s for s in _dialogues(data) if s["check"] == "images+names"][:limit]
    prompts = [_messages(data, s["messages"][:-1]) for s in samples]
    replies = generate_replies(
        model, prompts, "interleaved", seeded_sampling(len(prompts), seed, max_images=5)
    )
    pairs = list(zip(replies, samples, strict=True))
    num_right = sum(_count_right_items(data, reply.segments, sample) for reply, sample in pairs)
    num_requested = sum(sample["count"] for sample in samples)
    return {
        "n": len(samples),
        "well_formed": share([well_formed(r.segments, s["count"]) for r, s in pairs]),
        "right_items": round(num_right / num_requested, 4) if num_requested else None,
    }


def well_formed(segments: Sequence[Any], count: int) -> bool:
    """Whether the segments are `count` pairs of a numbered name and an image."""
    if len(segments) != 2 * count:
        return False
    return all(
        isinstance(text, Text)
        and re.fullmatch(rf"{number}\. \S.*", text.text.strip())
        and isinstance(image, Image)
        for number, (text, image) in enumerate(_pairs(segments), 1)
    )


def _count_right_items(data: EmojiData, segments: Sequence[Any], sample: Sample) -> int:
    rows = [r for r in data.rows if r["subgroup"] == sample["subgroup"]]
    names = {normalise(name_of(r, sample["lang"])) for r in rows}
    texts = (s.text.strip() for s in segments if isinstance(s, Text))
    items = [re.sub(r"^\d+\. ", "", line) for text in texts for line in text.splitlines()]
    return min(len({normalise(i) for i in items} & names), int(sample["count"]))


def _naming_accuracy(model: Model, data: EmojiData, ids: list[str], lang: str) -> Numbers:
    question = PROMPTS["caption"][lang].published[0]
    prompts = [[Image(data.image(i)), question] for i in ids]
    replies = generate_replies(model, prompts, "text", greedy_sampling(prompts))
    # The name as people say it, or as the catalogue lists it.
    rows = [data.row(i) for i in ids]
    accepted = [{name_of(r, lang), r["name_en"] if lang == "en" else r["name_ko"]} for r in rows]
    return _exact([r.text for r in replies], accepted)


def _answer_accuracy(model: Model, data: EmojiData, samples: list[Sample]) -> Numbers:
    prompts = [_messages(data, s["messages"][:-1]) for s in samples]
    replies = generate_replies(model, prompts, "text", greedy_sampling(prompts))
    return _exact([r.text for r in replies], [set(s["accept"]) for s in samples])


def _exact(answers: Sequence[str], accepted: Sequence[set[str]]) -> Numbers:
    """The share of answers that are accepted: {n, exact}."""
    pairs = zip(answers, accepted, strict=True)
    right = [normalise(answer) in {normalise(a) for a in accept} for answer, accept in pairs]
    return {"n": len(right), "exact": share(right)}


# ---- images


def reconstruction(model: Model, data: EmojiData, limit: int, seed: int) -> Numbers:
    """PSNR of images that were encoded to codes and decoded, at the model's resolution: {n,
    psnr_median, psnr_tenth}. Nine tenths of the validation images have at least `psnr_tenth`."""
    images = data.images(_sample_ids(data, "val", limit, seed))
    pairs = zip(images, _reconstruct(model, images), strict=True)
    values = [psnr(resized(image, decoded.size), decoded) for image, decoded in pairs]
    return {
        "n": len(values),
        "psnr_median": round(float(np.median(values)), 2),
        "psnr_tenth": round(float(np.quantile(values, 0.1)), 2),
    }


def psnr(image_a: PIL.Image.Image, image_b: PIL.Image.Image) -> float:
    """Peak signal-to-noise ratio of two images of one size in dB; 99 if they are equal."""
    difference = np.asarray(image_a, np.float64) - np.asarray(image_b, np.float64)
    error = float((difference**2).mean())
    return 99.0 if error == 0 else float(10 * np.log10(255**2 / error))


def retrieval(
    model: Model,
    data: EmojiData,
    limit: int,
    seed: int,
    galleries: dict[str | None, Gallery] | None = None,
) -> Numbers:
    """Ranks of generated images, and how far those of val-pair are from the true images.

    The result is {"usual" | "any style" | "train" | "val-pair" | "ceiling": {n, top1, top5, top10},
    "distance": {n, drawings, reconstructions}}. Half of the requests are in English and half in
    Korean. For "train" and "val-pair" they give name and style, and images are compared with those
    of that style. For the other two they give the name alone: "any style" compares with the
    training images of all styles, "usual" with those of the first style that has the thing. The
    distances are `gallery.frechet`.
    """
    galleries = {None: Gallery(data)} if galleries is None else galleries
    report: Numbers = {}
    ids_of = {"usual": _first_images(data, limit, seed)}
    ids_of |= {split: _sample_ids(data, split, limit, seed) for split in ("train", "val-pair")}
    generated: dict[str, list[PIL.Image.Image | None]] = {}
    for split, ids in ids_of.items():
        task = "draw" if split == "usual" else "draw_styled"
        prompts = [_image_prompt(data, id_, LANGUAGES[i % 2], task) for i, id_ in enumerate(ids)]
        replies = generate_replies(model, prompts, "image", seeded_sampling(len(ids), seed))
        generated[split] = [r.images[0] if r.images else None for r in replies]
        report[split] = _ranks(data, ids, generated[split], galleries)
        if split == "usual":
            report["any style"] = _ranks(data, ids, generated[split], galleries, any_style=True)
    true = data.images(ids_of["val-pair"])
    report["distance"] = _distances(model, generated["val-pair"], true, galleries[None])
    ids = ids_of["val-pair"] or ids_of["train"]
    report["ceiling"] = _ranks(data, ids, _reconstruct(model, data.images(ids)), galleries)
    return report


def _distances(
    model: Model,
    generated: Sequence[PIL.Image.Image | None],
    true: Sequence[PIL.Image.Image],
    gallery: Gallery,
) -> Numbers:
    """Frechet distances of generated and of reconstructed images to the true ones."""
    images = [image for image in generated if image]
    if min(len(images), len(true)) < 2:  # a single image has no variance
        return {"n": len(true), "drawings": None, "reconstructions": None}
    return {
        "n": len(true),
        "drawings": round(frechet(gallery, images, true), 3),
        "reconstructions": round(frechet(gallery, _reconstruct(model, true), true), 3),
    }


def _ranks(
    data: EmojiData,
    ids: Sequence[str],
    images: Sequence[PIL.Image.Image | None],
    galleries: dict[str | None, Gallery],
    any_style: bool = False,
) -> Numbers:
    """How often the requested thing of an image is among the nearest: {n, top1, top5, top10}."""
    ranks = []
    for image_id, image in zip(ids, images, strict=True):
        row = data.row(image_id)
        style = None if any_style else row["style"]
        if style not in galleries:
            galleries[style] = Gallery(data, style)
        gallery = galleries[style]
        last_rank = len(gallery.rows)  # of a reply without an image
        ranks.append(gallery.rank(image, row["codepoints"]) if image else last_rank)
    return {"n": len(ranks)} | {f"top{top}": share([r < top for r in ranks]) for top in TOPS}


def _image_prompt(data: EmojiData, image_id: str, lang: str, task: str = "draw_styled") -> str:
    """The request for an image; with the task "draw" it gives no style."""
    row = data.row(image_id)
    name = name_of(row, lang)
    prompt = PROMPTS[task][lang].published[0]
    return prompt.format(n=name, no=particle(name, "을/를"), s=style_of(row, lang))


def _first_images(data: EmojiData, limit: int, seed: int) -> list[str]:
    """At most `limit` training images, each the first of its thing."""
    first: dict[str, str] = {}
    for image_id in data.split("train"):
        first.setdefault(data.row(image_id)["codepoints"], image_id)
    ids = list(first.values())
    return ids if len(ids) <= limit else random.Random(f"usual-{seed}").sample(ids, limit)


def _reconstruct(model: Model, images: Sequence[PIL.Image.Image]) -> list[PIL.Image.Image]:
    """The images encoded to codes and decoded again."""
    tokenizer = model.image_tokenizer
    decoded: list[PIL.Image.Image] = []
    for start in range(0, len(images), BATCH):
        decoded += tokenizer.decode(tokenizer.encode(list(images[start : start + BATCH])))
    return decoded


# ---- samples and prompts


def _sample_ids(data: EmojiData, split: str, limit: int, seed: int) -> list[str]:
    """At most `limit` ids, the same for the same seed."""
    ids = data.split(split)
    return ids if len(ids) <= limit else random.Random(f"{split}-{seed}").sample(ids, limit)


def _dialogues(data: EmojiData) -> list[Sample]:
    """The published validation dialogues, generated again."""
    return generate(data, "val", DIALOGUES, seed=0, further=0)


def _messages(data: EmojiData, turns: Iterable[dict[str, Any]]) -> list[Message]:
    return messages_of(turns, lambda image_id, role: Image(data.image(image_id)))


def _pairs(segments: Sequence[Any]) -> Iterable[tuple[Any, Any]]:
    return zip(segments[::2], segments[1::2], strict=True)


# ---- reporting


_TESTED_ON = {
    "ceiling": "true images through the codes",
    "usual": "train, no style asked, its first style",
    "any style": "train, no style asked, all styles",
}


def markdown(report: Numbers) -> list[str]:
    """The report as the lines of a table for a model card."""
    return [*HEAD, *_text_lines(report), *_image_lines(report), *_free_lines(report)]


def _text_lines(report: Numbers) -> Iterator[str]:
    """Names, questions and lists."""
    for split, languages in report["naming"].items():
        for lang, result in languages.items():
            yield _shares_line(f"naming, exact match, {lang}", split, result, "exact")
    for task, result in report["questions"].items():
        yield _shares_line(f"question: {task.replace('_', ' ')}", "val dialogues", result, "exact")
    yield _shares_line("lists: well formed", "val dialogues", report["lists"], "well_formed")
    yield _shares_line("lists: right items", "val dialogues", report["lists"], "right_items")


def _image_lines(report: Numbers) -> Iterator[str]:
    """Reconstructed and generated images."""
    result = report["reconstruction"]
    psnr_text = f"{result['psnr_median']:.1f} dB"
    yield _line("reconstruction, median PSNR", "val", result["n"], psnr_text)
    tops = [f"top{top}" for top in TOPS]
    for split, result in report["retrieval"].items():
        if split != "distance":
            on = _TESTED_ON.get(split, split)
            yield _shares_line("drawing retrieval, top 1 / 5 / 10", on, result, *tops)
    result = report["retrieval"]["distance"]
    for images in ("drawings", "reconstructions"):
        distance = "-" if result[images] is None else f"{result[images]:.2f}"
        measure = "distance to true images (Frechet)"
        yield _line(measure, f"val-pair, {images}", result["n"], distance)
    for prompt, result in report["seeds"].items():
        counts = f"{result['different']} different, {result['right']} right"
        yield _line(f'seeds 0 to 7 of "{prompt}"', "images", result["n"], counts)


def _free_lines(report: Numbers) -> Iterator[str]:
    """Free wordings, unknown things and scenes."""
    measure = "free wordings: right kind / also right thing"
    yield _shares_line(measure, "held-out requests", report["wordings"], "kind", "right")
    for prompts, result in report["refusals"].items():
        yield _shares_line("says that it does not know", prompts, result, "refused")
    measure = "questions about scenes (how many, where)"
    yield _shares_line(measure, "scenes not trained on", report["scenes"], "exact")


def _shares_line(measure: str, on: str, result: Numbers, *names: str) -> str:
    """A line with the shares of a result that have these names, in percent."""
    shares = (result[name] for name in names)
    scores = " / ".join("-" if s is None else f"{100 * s:.1f} %" for s in shares)
    return _line(measure, on, result["n"], scores)


def _line(measure: str, on: str, n: int, score: str) -> str:
    return f"| {measure} | {on} | {n} | {score} |"


def requests_table(report: Numbers) -> list[str]:
    """The held-out requests and their replies as the lines of a table."""
    lines = list(REQUESTS_HEAD)
    for row in report["wordings"]["replies"]:
        marks = ", ".join("right" if row[name] else "wrong" for name in ("kind", "right"))
        cells = (row["request"], row["wants"], row["reply"][:60] or "(nothing)", marks)
        lines.append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
    return lines


def update_card(path: Path, tables: Sequence[Sequence[str]]) -> None:
    """Put tables into a card, each in the place of the table with the same first line."""
    lines = path.read_text(encoding="utf-8").split("\n")
    for table in tables:
        begin = end = lines.index(table[0])
        while end < len(lines) and lines[end].startswith("|"):
            end += 1
        lines[begin:end] = table
    path.write_text("\n".join(lines), encoding="utf-8")


def check_card(path: Path) -> None:
    """Raise `SettingError` if a card has no place for the tables."""
    lines = path.read_text(encoding="utf-8").split("\n") if path.is_file() else []
    for heads in (HEAD, REQUESTS_HEAD):
        if heads[0] not in lines:
            raise SettingError(
                f"--card {path} has no line {heads[0]!r}, where a table begins: add it, or give "
                "another file"
            )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command of this file; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m earlyfusion.evals.emoji", description="Measure a model on the emoji data."
    )
    parser.add_argument("--model", default="mini", help="a model's name, folder or hub id")
    parser.add_argument("--data", required=True, help="folder of the emoji data")
    parser.add_argument("--limit", type=int, default=300, help="images or questions per measure")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, help="JSON file for the numbers")
    parser.add_argument("--card", type=Path, help="model card whose tables are written anew")
    args = parser.parse_args(arguments)
    try:
        if args.card:
            check_card(args.card)
        data = EmojiData(args.data)
        model = Chameleon.load(args.model, device=args.device)
        save_report = partial(_write, args.out, args.model) if args.out else None
        report = measure(model, data, args.limit, args.seed, save_report)
        if args.card:
            update_card(args.card, [markdown(report), requests_table(report)])
    except EarlyFusionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if save_report is not None:
        save_report(report)
    print("\n".join([*markdown(report), "", *requests_table(report)]))
    return 0


def _write(path: Path, model: str, report: Numbers) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"model": model} | report, indent=1, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
