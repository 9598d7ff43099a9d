"""Trains all of `mini` again, with one command after the one that builds the data.

    python -m earlyfusion.mini.emoji.build --out data/emoji
    earlyfusion train pretrain_mini data=data/emoji

Runs the recipes of mini one after another, each in its own folder under `out`, and prints the
command that would run each alone. Started again after an interruption, it skips finished stages and
continues in the one that was interrupted. `stages=answers,drawings` runs only these; `scale=0.01`
takes a hundredth of the steps and of the documents. The result is `out/chats/model/`. Machine, run
time and scores of the shipped weights are in the model card, earlyfusion/pretrained/mini/README.md.

    earlyfusion train pretrain_mini data=data/emoji device=cuda minutes=9

With `minutes` another chain runs, for a larger model that has not been shipped: an image tokenizer
that learns names, its decoder alone, the transformer on rows assembled on the device, and chats.
Each stage gets a share of the minutes that are left when it begins, so the chain ends in time on
any machine. The result is `out/chat/model/`. The shape is that of `mini_packed_transformer`, unless
a field of `model` is set (on a CPU: `model.max_position_embeddings=2048`): then it is mini's shape
with that change.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, field, replace
from importlib import import_module
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from earlyfusion.config import PRESETS, ModelConfig
from earlyfusion.devices import resolve_device
from earlyfusion.errors import SettingError
from earlyfusion.mini.emoji.dataset import EmojiData
from earlyfusion.mini.packed_transformer import DOCUMENTS, PackedTransformerConfig, prepare
from earlyfusion.mini.stage import StageConfig
from earlyfusion.recipes.run import RECIPES, override
from earlyfusion.train import checkpoint
from earlyfusion.train.device_rows import save_templates


@dataclass(frozen=True)
class Stage:
    """One run of a recipe."""

    recipe: str
    start: str = ""
    """The stage whose newest weights this one starts from ("": random weights). "NAME/model" is the
    model that stage NAME wrote, which may be a mean of weights."""
    fields: tuple[str, ...] = ()
    """Changes to the recipe's config, each FIELD=VALUE."""
    share: float = 0.0
    """Its share of `minutes`, relative to the shares of the other stages."""
    setup_seconds: float = 0.0
    """Time reserved for the work before its first step."""


_BEFORE_SWAPS = (
    *("varied=true", "replace=0.04", "near=0.9"),
    *("changed_answers=0.1", "swapped_answers=0"),
)

STAGES = {
    "image_tokenizer": Stage("mini_image_tokenizer"),
    "transformer": Stage("mini_transformer"),
    "answers": Stage("mini_answers", "transformer"),
    # Before its final run, the recipe was run twice at a constant rate.
    "pairs": Stage(
        "mini_drawings",
        "answers",
        ("rows=2", "pairs=0.55", "usual=0", "studies=0.25", "decay=hold", "stop_after=2750"),
    ),
    "usual": Stage(
        "mini_drawings",
        "pairs",
        ("rows=1", "pairs=0.3", "usual=0.3", "studies=0.22", "decay=hold", "stop_after=1500"),
    ),
    "drawings": Stage("mini_drawings", "usual"),
    # Each of these runs changes the shares of the data, to repair what the run before it had made
    # worse (docs/ablations.md).
    "lists_first": Stage(
        "mini_deeper",
        "drawings",
        (
            *("dialogues=0.32", "pairs=0.28", "requests=0.11", "studies=0.26", "mixture.seed=7"),
            *("codeword_embeddings=true", *_BEFORE_SWAPS),
            *("lr=1e-3", "warmup_steps=100", "steps=6345"),
        ),
    ),
    "images_next": Stage(
        "mini_deeper",
        "lists_first",
        (
            *("dialogues=0.2", "pairs=0.36", "requests=0.21", "studies=0.2", "mixture.seed=9"),
            *_BEFORE_SWAPS,
            *("lr=1e-3", "warmup_steps=100", "steps=8061"),
        ),
    ),
    # The learning rate was planned to fall until step 6,000; the run was stopped at 1,800.
    "swapped": Stage(
        "mini_deeper",
        "images_next",
        (
            *("dialogues=0.2", "pairs=0.32", "requests=0.22", "studies=0.23", "mixture.seed=12"),
            *("varied=true", "changed_answers=0.1", "swapped_answers=0.5"),
            *("lr=1e-3", "warmup_steps=100", "steps=6000", "stop_after=1800"),
        ),
    ),
    "requests": Stage(
        "mini_deeper",
        "swapped",
        (
            *("dialogues=0.18", "pairs=0.24", "requests=0.38", "studies=0.18", "mixture.seed=13"),
            *("swapped_answers=0.3", "lr=1e-3", "steps=4044"),
        ),
    ),
    "names_again": Stage(
        "mini_deeper",
        "requests",
        (
            *("dialogues=0.22", "pairs=0.32", "requests=0.16", "studies=0.27", "mixture.seed=14"),
            *("swapped_answers=0.2", "lr=8e-4", "steps=3977"),
        ),
    ),
    "balanced": Stage(
        "mini_deeper",
        "names_again",
        (
            *("dialogues=0.26", "pairs=0.28", "requests=0.22", "studies=0.21", "mixture.seed=15"),
            *("lr=8e-4", "steps=6618"),
        ),
    ),
    # Its model is the mean of its weights and those of "balanced".
    "last": Stage("mini_deeper", "balanced", ("start_share=0.5",)),
    # Starts from that mean. The shipped model is two thirds that mean and one third this run.
    "chats": Stage(
        "mini_deeper",
        "last/model",
        (
            *("dialogues=0.23", "pairs=0.26", "requests=0.17", "studies=0.15", "chats=0.16"),
            *("documents=40000", "mixture.seed=17", "lr=4e-4", "warmup_steps=30", "steps=900"),
            "start_share=0.667",
        ),
    ),
}

TIMED_STAGES = {
    "image_tokenizer": Stage("mini_named_image_tokenizer", share=0.3, setup_seconds=10),
    "decoder": Stage(
        "mini_named_image_tokenizer",
        "image_tokenizer",
        ("trainable=decoder", "naming=0", "perturb=0.1", "lr=5e-4"),
        share=0.08,
        setup_seconds=2,
    ),
    "transformer": Stage("mini_packed_transformer", "", ("prompts=",), share=0.5, setup_seconds=25),
    "chat": Stage("mini_packed_chat", "transformer", ("prompts=",), share=0.12, setup_seconds=10),
}
_OVERHEAD = 0.08  # share of the minutes kept for work between the stages and after the last one
_MAX_SETUP = 0.2  # setup may take at most this share of the remaining minutes
_ENDLESS = 1_000_000  # never reached: the clock ends these runs
_MAX_WORKERS = 12
_PACKED = {"mini_packed_transformer", "mini_packed_chat"}

# Fields that depend on the type of device, for recipes that have them.
_ON_GPU = {"precision": "bf16", "plain": 10, "recoloured": 10}
_ON_CPU = {
    "precision": "fp32",
    "batch": 16,
    "rows": 2,
    "plain": 3,
    "recoloured": 3,
    "documents": 40_000,
    "made": 1_000,
    "warmup_steps": 50,
    "save_every": 200,
}


@dataclass
class PretrainMiniConfig:
    """Which stages are trained, at which scale or in which time. Raises `SettingError`."""

    data: Path = Path("data/emoji")
    """Folder of the emoji data (docs/mini.md)."""
    out: Path = Path("runs/pretrain_mini")
    """Folder of all stages, each in a folder of its own."""
    stages: tuple[str, ...] = tuple(STAGES)
    """The stages to run, in their order; the results of earlier ones must be in `out`."""
    scale: float = 1.0
    """Share of the steps and of the documents of each stage."""
    minutes: float = 0.0
    """Time limit for all stages together (0: train the shipped weights, by steps)."""
    changes: tuple[str, ...] = ()
    """With `minutes`, fields of stages: `transformer.muon_lr=0.03,image_tokenizer.naming=0.1`."""
    workers: int = 0
    """With `minutes`, processes that write documents (0: up to 12 with a GPU, 1 without). With more
    than one, the documents of all stages are written while the first stage trains."""
    icons: Path | None = None
    """With `minutes`, a folder of icons (docs/mini.md) to add to the images."""
    length: int = 2048
    """Tokens of a row."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:1."""
    model: ModelConfig = field(default_factory=lambda: PRESETS["mini"])

    def __post_init__(self) -> None:
        if self.minutes < 0:
            raise SettingError(f"minutes={self.minutes:g} must be 0 (by steps) or more")
        if self.minutes and self.stages == tuple(STAGES):
            self.stages = tuple(TIMED_STAGES)
        unknown = [name for name in self.stages if name not in self.chain]
        if unknown or not self.stages:
            raise SettingError(
                f"stages={','.join(self.stages)} names {unknown[0] if unknown else 'none'!r}: "
                f"choose of {', '.join(self.chain)}"
            )
        stages = [change.partition(".")[0] for change in self.changes]
        wrong = [name for name in stages if name not in TIMED_STAGES]
        if wrong or (stages and not self.minutes):
            raise SettingError(
                f"changes={','.join(self.changes)} must be STAGE.FIELD=VALUE of "
                f"{', '.join(TIMED_STAGES)}, and needs minutes="
            )
        if self.workers < 0 or (self.icons and not self.minutes):
            raise SettingError(
                f"workers={self.workers} must be 0 or more, and icons={self.icons} needs minutes="
            )
        if not 0 < self.scale <= 1:
            raise SettingError(f"scale={self.scale:g} must be over 0 and at most 1")

    @property
    def chain(self) -> dict[str, Stage]:
        """All stages, in the order in which they run."""
        return TIMED_STAGES if self.minutes else STAGES


def main(config: PretrainMiniConfig) -> None:
    EmojiData(config.data, config.icons)  # refuse a wrong folder now, not at a later stage
    chosen = [name for name in config.chain if name in config.stages]
    budget = TimeBudget(config, chosen)
    preparation = prepare_ahead(config, chosen)
    for number, name in enumerate(chosen, 1):
        stage = config.chain[name]
        if preparation and stage.recipe in _PACKED:
            preparation.join()  # if it failed, the stage makes its documents itself
        if config.minutes:
            recipe_config = timed_config(config, name, budget)
        else:
            recipe_config = stage_config(config, name)
        head = f"stage {number} of {len(chosen)}, {name}:"
        if is_done(recipe_config):
            print(f"{head} done, in {recipe_config.run.out}", flush=True)
            continue
        print(f"{head} {' '.join(['earlyfusion train', stage.recipe, *stage.fields])}", flush=True)
        recipe(stage).main(recipe_config)
    print(f"the last stage's folder: {config.out / chosen[-1]}")


def prepare_ahead(config: PretrainMiniConfig, chosen: list[str]) -> BaseProcess | None:
    """Start a process that writes the documents of all stages while the first one trains. Returns
    None if all are written, or if there is only one worker, which the training itself needs."""
    if not config.minutes or _workers(config) == 1:
        return None
    packed = [name for name in chosen if config.chain[name].recipe in _PACKED]
    configs = [timed_config(config, name, None) for name in packed]
    missing = [cfg for cfg in configs if not (cfg.run.out / DOCUMENTS).is_file()]
    if not missing:
        return None
    process = get_context("spawn").Process(target=_prepare_all, args=(missing,))
    process.start()
    return process


def _prepare_all(configs: list[PackedTransformerConfig]) -> None:
    for config in configs:
        save_templates(config.run.out / DOCUMENTS, prepare(config))


def _workers(config: PretrainMiniConfig) -> int:
    """How many processes write documents."""
    on_gpu = resolve_device(config.device).type == "cuda"
    return config.workers or (min(_MAX_WORKERS, os.cpu_count() or 1) if on_gpu else 1)


def recipe(stage: Stage) -> Any:
    """The module of a stage's recipe."""
    return import_module(RECIPES[stage.recipe])


def stage_config(config: PretrainMiniConfig, name: str) -> Any:
    """The config of a stage: its recipe's, with the stage's changes, folder and scale."""
    stage = STAGES[name]
    base = override(recipe(stage).config, list(stage.fields))
    run = replace(
        base.run,
        out=config.out / name,
        device=config.device,
        steps=_scaled(base.run.steps, config.scale),
        stop_after=_scaled(base.run.stop_after, config.scale),
        save_every=_scaled(base.run.save_every, config.scale),
    )
    warmup = int(base.optim.warmup_steps * config.scale)
    optim = replace(base.optim, warmup_steps=warmup)
    result = replace(base, data=config.data, run=run, optim=optim)
    if name == "image_tokenizer":
        return replace(result, model=config.model.vq_config)
    # The first stages train six of mini's ten layers; other models are divided in the same way.
    share = base.model.num_hidden_layers / PRESETS["mini"].num_hidden_layers
    layers = max(1, round(config.model.num_hidden_layers * share))
    result = replace(
        result,
        model=replace(config.model, num_hidden_layers=layers),
        length=config.length,
        image_tokenizer=config.out / "image_tokenizer",
        start=config.out / stage.start if stage.start else None,
    )
    if isinstance(result, PackedTransformerConfig):
        documents = _scaled(result.mixture.documents, config.scale)
        return replace(result, mixture=replace(result.mixture, documents=documents))
    dialogues = _scaled(result.documents.dialogues, config.scale)
    return replace(result, documents=replace(result.documents, dialogues=dialogues))


class TimeBudget:
    """Divides `minutes` among the stages. Time spent before an interruption counts."""

    def __init__(self, config: PretrainMiniConfig, chosen: list[str]) -> None:
        self._config, self._chosen, self._since = config, chosen, time.monotonic()
        self._before = sum(_seconds(config.out / name) for name in chosen)

    def minutes(self, name: str) -> float:
        """The minutes of a stage: its share of those that are left when it begins. Written to its
        folder, so that they stay the same after an interruption."""
        path = self._config.out / name / "minutes.json"
        if path.is_file():
            return float(json.loads(path.read_text(encoding="utf-8")))
        chain = self._config.chain
        later = self._chosen[self._chosen.index(name) :]
        share = chain[name].share / sum(chain[other].share for other in later)
        spent = (self._before + time.monotonic() - self._since) / 60
        left = self._config.minutes * (1 - _OVERHEAD) - spent
        # Reserve the setup time of all later stages; otherwise the last stage would pay for it.
        left -= min(sum(chain[other].setup_seconds for other in later) / 60, left * _MAX_SETUP)
        minutes = max(0.001, round(left * share, 4))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{minutes}\n", encoding="utf-8")
        return minutes


def _seconds(run: Path) -> float:
    """Seconds that a run has trained."""
    if not checkpoint.steps(run):
        return 0.0
    return float(checkpoint.load_state(run).get("seconds", 0.0))


def timed_config(config: PretrainMiniConfig, name: str, budget: TimeBudget | None) -> Any:
    """The config of a stage that ends after its minutes of the `budget`, on the device of
    `config`. Without a `budget` no minutes are set, which is enough for all but training."""
    stage, on_gpu = config.chain[name], resolve_device(config.device).type == "cuda"
    base = recipe(stage).config
    start = config.out / stage.start
    device_fields = _ON_GPU if on_gpu else _ON_CPU
    fields = [f"{k}={v}" for k, v in device_fields.items() if _has_field(base, k)]
    fields += [*stage.fields, *([f"start={start}"] if stage.start else [])]
    fields += [f"minutes={budget.minutes(name)}"] if budget else []
    fields += [f"steps={_ENDLESS}", f"device={config.device}"]
    fields += [f"icons={config.icons}"] if config.icons else []
    fields += [c.removeprefix(f"{name}.") for c in config.changes if c.startswith(f"{name}.")]
    result = override(base, [*fields, f"out={config.out / name}", f"data={config.data}"])
    other_shape = config.model != PRESETS["mini"]
    if not isinstance(result, PackedTransformerConfig):
        return replace(result, model=config.model.vq_config) if other_shape else result
    mixture = replace(
        result.mixture,
        documents=_scaled(result.mixture.documents, config.scale),
        workers=_workers(config),
    )
    return replace(
        result,
        model=config.model if other_shape else result.model,
        image_tokenizer=config.out / "decoder",
        length=config.length,
        mixture=mixture,
        run=replace(result.run, compile=on_gpu),
    )


def _has_field(config: Any, name: str) -> bool:
    """Whether a config or one of the configs in its fields has a field of this name."""
    parts = [config, *(v for v in vars(config).values() if hasattr(v, "__dataclass_fields__"))]
    return any(name in part.__dataclass_fields__ for part in parts)


def is_done(config: Any) -> bool:
    """Whether a stage wrote its last checkpoint and, if it is one of the transformer, its model."""
    run = config.run
    last = min(run.steps, run.stop_after or run.steps)
    trained = checkpoint.steps(run.out)[-1:] == [last]
    if run.minutes:
        trained = trained or _seconds(run.out) >= 60 * run.minutes
    writes_model = isinstance(config, StageConfig)
    return trained and (not writes_model or (run.out / "model" / "config.json").is_file())


def _scaled(count: int, scale: float) -> int:
    return max(1, round(count * scale)) if count else 0


config = PretrainMiniConfig()
