"""The whole of mini by one command: its stages, and what a killed run does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from earlyfusion import Chameleon
from earlyfusion.errors import DataError, SettingError
from earlyfusion.recipes import mini_drawings, override, run
from earlyfusion.recipes.pretrain_mini import STAGES, config, stage_config
from earlyfusion.train import checkpoint
from earlyfusion.train.monitor import read_metrics

DATA = Path(__file__).parent / "data"
SMALL = [
    f"data={DATA}",
    "scale=0.0005",
    "resolution=16",
    "hidden_size=32",
    "intermediate_size=64",
    "num_attention_heads=2",
    "num_hidden_layers=2",
    "length=400",
]


def test_the_stages_are_the_recipes_in_their_order() -> None:
    made = {name: stage_config(config, name) for name in STAGES}
    assert made["drawings"].documents == mini_drawings.config.documents
    assert made["drawings"].optim == mini_drawings.config.optim
    pairs, usual = made["pairs"], made["usual"]
    assert (pairs.run.stop_after, pairs.optim.decay, pairs.rows) == (2750, "hold", 2)
    assert (usual.run.stop_after, usual.optim.decay, usual.rows) == (1500, "hold", 1)
    assert [m.run.out.name for m in made.values()] == list(STAGES)
    starts = [m.start for name, m in made.items() if name != "image_tokenizer"]
    assert starts == [None, *(m.run.out for m in list(made.values())[1:-1])]


def test_a_killed_run_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fields = [*SMALL, f"out={tmp_path}"]
    save = checkpoint.Saver.save

    def killed(saver: checkpoint.Saver, step: int, *rest: Any) -> None:
        save(saver, step, *rest)
        if (tmp_path / "answers" / "step-00000001").is_dir():
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Saver, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            run("pretrain_mini", fields)
    said = capsys.readouterr().out
    assert "stage 3 of 6, answers: earlyfusion train mini_answers" in said and "pairs" not in said
    assert checkpoint.steps(tmp_path / "answers") == [1]
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "transformer").rglob("*") if p.is_file()}
    run("pretrain_mini", fields)
    said = capsys.readouterr().out
    assert said.count(": done, in") == 2 and "stage 6 of 6, drawings:" in said
    assert "rows=2 pairs=0.55 usual=0 studies=0.25 decay=hold" in said
    assert {p: p.stat().st_mtime_ns for p in times} == times
    assert [row["step"] for row in read_metrics(tmp_path / "answers")] == [0, 1]
    model = Chameleon.load(str(tmp_path / "drawings" / "model"))
    assert len(model.generate("Draw a cat.", output="image", seed=0).images) == 1
    run("pretrain_mini", fields)
    assert capsys.readouterr().out.count(": done, in") == 6


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["stages=answers,drawing"], "names 'drawing': choose of image_tokenizer"),
        (["stages="], "choose of image_tokenizer"),
        (["scale=0"], "scale=0 must be over 0"),
        (["scale=2"], "scale=2 must be over 0 and at most 1"),
    ],
)
def test_what_cannot_be_is_refused_at_once(changes: list[str], words: str) -> None:
    with pytest.raises(SettingError, match=words):
        override(config, changes)


def test_a_stage_without_those_before_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="data"):
        run("pretrain_mini", [f"data={tmp_path / 'none'}", f"out={tmp_path}"])
    with pytest.raises((SettingError, DataError, ValueError), match="image_tokenizer"):
        run("pretrain_mini", [*SMALL, f"out={tmp_path}", "stages=answers"])
