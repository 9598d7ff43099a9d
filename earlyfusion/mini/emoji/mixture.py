"""The training documents of the emoji data, and whether their images may change colour.

A mixture has shares of eight sources:
  dialogues  the eighteen tasks of `dialogues.generate`
  pairs      an image and its name, a name with a style and the image (`dialogues.caption_pairs`)
  requests   a request in many wordings, without a style, and the first image of the thing in the
             data; with `varied`, any image of it
  studies    several questions about one image (`dialogues.studies`)
  chats      a request for an image after a question about another one (`dialogues.chats`)
  bare       an image without a request, for guidance
  scenes     several small images in one, requested or asked about (`scenes.scene_samples`)
  unknown    things that the data does not have: "I do not know this one." (`scenes`)
`workers` processes write the sources, each a part with its own seed.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import chain, islice
from multiprocessing import get_context
from pathlib import Path

from earlyfusion.errors import SettingError
from earlyfusion.fields import check_shares
from earlyfusion.mini.emoji.dataset import EmojiData
from earlyfusion.mini.emoji.dialogues import (
    Sample,
    Writer,
    assistant,
    caption_pairs,
    chats,
    generate,
    image_part,
    studies,
    text_part,
    user,
)
from earlyfusion.mini.emoji.phrases import COLOUR_IN_NAME
from earlyfusion.mini.emoji.pools import Pools, name_of
from earlyfusion.mini.emoji.scene_dialogues import scene_samples, unknown_samples
from earlyfusion.mini.emoji.scenes import scenes, unknown_image_ids

SOURCES = ("dialogues", "pairs", "requests", "studies", "chats", "bare", "scenes", "unknown")
_COLOURED = {"colour", "style_name", "caption_style", "study", "restyle"}


@dataclass
class MixtureConfig:
    """The number of documents, and the weights of their sources. Raises `SettingError`."""

    documents: int = 80_000
    """Documents of an epoch."""
    dialogues: float = 0.36
    """Weight of dialogues of the eighteen tasks."""
    pairs: float = 0.24
    """Weight of pairs of an image and its name."""
    requests: float = 0.2
    """Weight of requests for an image without a style."""
    studies: float = 0.15
    """Weight of dialogues with several questions about one image."""
    chats: float = 0.0
    """Weight of chats in which a request for an image follows something else."""
    bare: float = 0.05
    """Weight of images without a request, for guidance."""
    scenes: float = 0.0
    """Weight of dialogues about scenes of several small images."""
    unknown: float = 0.0
    """Weight of dialogues about things that the data does not have."""
    wordings: float = 0.0
    """Share of requests in composed words, with typing noise (`wordings.compose_request`)."""
    varied: bool = False
    """Whether any image of a thing answers a request without a style, in dialogues too."""
    made: int = 3000
    """How many scenes there are for `scenes`; images of nothing known are a quarter of that."""
    icons: Path | None = None
    """The folder of a set of icons (docs/mini.md) that join the training images."""
    tasks: dict[str, float] = field(default_factory=dict)
    """Weights of tasks among the dialogues; of others, the published weights."""
    korean: float = 0.4
    """Share of Korean among dialogues, requests, scenes and unknown things."""
    seed: int = 0
    """All random choices of the documents follow from it."""
    workers: int = 1
    """Processes that write the documents."""

    def __post_init__(self) -> None:
        if min(self.documents, self.workers, self.made) < 1:
            raise SettingError(
                f"documents={self.documents}, workers={self.workers} and made={self.made} must be "
                "at least 1"
            )
        check_shares(self, "wordings")
        shares = [getattr(self, name) for name in SOURCES]
        if min(shares) < 0 or not sum(shares):
            raise SettingError(
                f"the shares of {', '.join(SOURCES)} are {shares}: give 0 or more, and not all 0"
            )


@dataclass(frozen=True)
class _Part:
    """Documents that one process writes."""

    folder: Path
    source: str
    count: int
    seed: int
    config: MixtureConfig


def synthetic_image_ids(data: EmojiData, config: MixtureConfig) -> list[str]:
    """Ids of the synthetic images that documents may show; the same for every seed of a mixture."""
    ids = [scene.id for scene in scenes(data, config.made)] if config.scenes else []
    ids += unknown_image_ids(data, -(-config.made // 4)) if config.unknown else []
    return list(dict.fromkeys(ids))


def load_samples(folder: Path, config: MixtureConfig) -> list[Sample]:
    """All documents of an epoch; the same config, `workers` included, gives the same."""
    total = sum(getattr(config, name) for name in SOURCES)
    parts = []
    for source in SOURCES:
        count = round(config.documents * getattr(config, source) / total)
        per_worker = -(-count // config.workers)
        for worker in range(config.workers if count else 0):
            # Each part has its own seed, so parts can be written in any process and order.
            seed = 1000 * config.seed + worker
            size = min(per_worker, count - worker * per_worker)
            if size > 0:
                parts.append(_Part(folder, source, size, seed, config))
    if config.workers == 1:
        data = EmojiData(folder, config.icons)
        return list(chain.from_iterable(_write_part(part, data) for part in parts))
    # Not by fork: torch's threads and CUDA do not survive it. `map` keeps the order.
    with ProcessPoolExecutor(config.workers, get_context("spawn")) as pool:
        return list(chain.from_iterable(pool.map(_write_part, parts)))


def is_plain(sample: Sample) -> bool:
    """Whether the images of a sample must keep their colours: a question or a name needs them."""
    texts = (
        part["text"]
        for message in sample["messages"]
        for part in message["content"]
        if part["type"] == "text"
    )
    return sample["task"] in _COLOURED or any(COLOUR_IN_NAME.search(text) for text in texts)


def _write_part(part: _Part, data: EmojiData | None = None) -> list[Sample]:
    cfg, count, seed = part.config, part.count, part.seed
    data = data or EmojiData(part.folder, cfg.icons)
    if part.source == "dialogues":
        tasks, mixed = cfg.tasks or None, (cfg.wordings, cfg.varied)
        return generate(data, "train", count, seed, cfg.korean, tasks, 0.5, *mixed)
    if part.source == "studies":
        return list(studies(data, "train", count, seed, turns=3, wordings=cfg.wordings))
    if part.source == "chats":
        return list(chats(data, "train", count, seed, cfg.korean, cfg.wordings))
    if part.source == "scenes":
        made = scenes(data, cfg.made)
        return list(scene_samples(data, made, count, seed, cfg.korean, cfg.wordings))
    if part.source == "unknown":
        unknown = unknown_image_ids(data, -(-cfg.made // 4))
        return list(unknown_samples(data, unknown, count, seed, cfg.korean, cfg.wordings))
    rng = random.Random(f"{part.source}-{part.seed}")
    if part.source == "pairs":
        # Requests for the first image of a thing have their own source.
        pairs = [s for s in caption_pairs(data) if s["task"] != "usual"]
        return _repeat(pairs, part.count, rng)
    return list(islice(_image_answers(part, data, rng), part.count))


def _image_answers(part: _Part, data: EmojiData, rng: random.Random) -> Iterator[Sample]:
    """Training images in turn, as the answers to requests or without one. Requests get the first
    image of each thing, as in the dialogues, unless answers are to vary."""
    pools = Pools(data, "train")
    writer = Writer(pools, rng, 0.7, part.config.wordings)
    if part.source == "requests" and not part.config.varied:
        rows = [images[0] for images in pools.by_concept.values()]
    else:
        rows = [data.row(i) for i in data.split("train")]
    while True:
        rng.shuffle(rows)
        for row in rows:
            lang = "ko" if rng.random() < part.config.korean else "en"
            writer.choose_prompts()
            prompt = [text_part(writer.prompt("draw", lang, n=name_of(row, lang)))]
            request = [user(*prompt)] if part.source == "requests" else []
            yield {
                "task": part.source,
                "lang": lang,
                "split": "train",
                "messages": [*request, assistant(image_part(row))],
            }


def _repeat(samples: list[Sample], count: int, rng: random.Random) -> list[Sample]:
    """`count` samples in random order, each repeated equally often, give or take one."""
    chosen: list[Sample] = []
    while len(chosen) < count:
        rng.shuffle(samples)
        chosen += samples[: count - len(chosen)]
    return chosen
