"""The whole of `mini` again, by one command after that of the data.

    python -m earlyfusion.recipes.emoji.build --out data/emoji
    earlyfusion train pretrain_mini data=data/emoji

Runs the recipes of mini one after another, each in a folder of its own under `out`, and says at
each which it is and the command that would run it alone. Killed and started again, it goes on in
the stage where it was; stages that are done are passed over. `stages=answers,drawings` runs some
only; `scale=0.01` takes a hundredth of the steps and of the documents. Ends with
`out/drawings/model/`. Machine, run time and scores of the shipped weights: the model card,
earlyfusion/pretrained/mini/README.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from earlyfusion.config import PRESETS, ModelConfig
from earlyfusion.errors import SettingError
from earlyfusion.recipes import override
from earlyfusion.recipes.emoji.dataset import EmojiData
from earlyfusion.train import checkpoint


@dataclass(frozen=True)
class Stage:
    """A recipe with what is changed in it; `start` names the stage whose weights it begins with."""

    recipe: str
    start: str = ""
    fields: tuple[str, ...] = ()


STAGES = {
    "image_tokenizer": Stage("mini_image_tokenizer"),
    "transformer": Stage("mini_transformer"),
    "answers": Stage("mini_answers", "transformer"),
    # Two runs of the recipe whose rate did not fall came before its own.
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
}


@dataclass
class PretrainMiniConfig:
    data: Path = Path("data/emoji")
    out: Path = Path("runs/pretrain_mini")
    stages: tuple[str, ...] = tuple(STAGES)
    """Which to run, in the order that they have; those before must be in `out`."""
    scale: float = 1.0
    """Share of the steps and of the documents of each stage."""
    length: int = 2048
    device: str = "auto"
    model: ModelConfig = field(default_factory=lambda: PRESETS["mini"])

    def __post_init__(self) -> None:
        unknown = [name for name in self.stages if name not in STAGES]
        if unknown or not self.stages:
            raise SettingError(
                f"stages={','.join(self.stages)} names {unknown[0] if unknown else 'none'!r}: "
                f"choose of {', '.join(STAGES)}"
            )
        if not 0 < self.scale <= 1:
            raise SettingError(f"scale={self.scale:g} must be over 0 and at most 1")


def main(config: PretrainMiniConfig) -> None:
    EmojiData(config.data)  # refused now, not at a later stage
    chosen = [name for name in STAGES if name in config.stages]
    for number, name in enumerate(chosen, 1):
        stage, made = STAGES[name], stage_config(config, name)
        head = f"stage {number} of {len(chosen)}, {name}:"
        if is_done(made):
            print(f"{head} done, in {made.run.out}", flush=True)
            continue
        print(f"{head} {' '.join(['earlyfusion train', stage.recipe, *stage.fields])}", flush=True)
        recipe(stage).main(made)
    print(f"the last stage's folder: {config.out / chosen[-1]}")


def recipe(stage: Stage) -> Any:
    return import_module(f"earlyfusion.recipes.{stage.recipe}")


def stage_config(config: PretrainMiniConfig, name: str) -> Any:
    """The config of a stage: its recipe's, with its changes, in its folder, at the scale asked."""
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
    made = replace(base, data=config.data, run=run, optim=replace(base.optim, warmup_steps=warmup))
    if name == "image_tokenizer":
        return replace(made, model=config.model.vq_config)
    dialogues = _scaled(base.documents.dialogues, config.scale)
    return replace(
        made,
        model=config.model,
        length=config.length,
        image_tokenizer=config.out / "image_tokenizer",
        start=config.out / stage.start if stage.start else None,
        documents=replace(base.documents, dialogues=dialogues),
    )


def is_done(made: Any) -> bool:
    """Whether a stage has its last checkpoint and, if it leaves one, its model."""
    last = min(made.run.steps, made.run.stop_after or made.run.steps)
    trained = checkpoint.steps(made.run.out)[-1:] == [last]
    leaves_model = hasattr(made, "documents")
    return trained and (not leaves_model or (made.run.out / "model" / "config.json").is_file())


def _scaled(count: int, scale: float) -> int:
    return max(1, round(count * scale)) if count else 0


config = PretrainMiniConfig()
