"""`benchmarks/gpu.py` runs through on a CPU, and a part that goes wrong ends alone."""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch

from earlyfusion.bench import parts
from earlyfusion.bench.harness import OURS, Row
from earlyfusion.bench.limits import Limits, measure_limits
from earlyfusion.bench.parts import Outcome, Part, Skipped, as_json, as_markdown, run_parts
from earlyfusion.model.quantise import pack

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "gpu.py"
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


@pytest.fixture(scope="module")
def script() -> Iterator[Any]:
    """The script as a module."""
    sys.path.insert(0, str(SCRIPT.parent))
    before = list(sys.path)
    try:
        yield importlib.import_module("gpu")
    finally:
        sys.path[:] = [path for path in before if path != str(SCRIPT.parent)]


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of results, and what was printed."""
    pytest.importorskip("transformers")
    out = tmp_path_factory.mktemp("gpu")
    command = [sys.executable, str(SCRIPT), "--rehearse", "--out", str(out)]
    variables = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=variables)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    return out, done.stdout


def test_every_part_runs_through(rehearsal: tuple[Path, str], script: Any) -> None:
    result = json.loads((rehearsal[0] / "results.json").read_text())["parts"]
    assert [part["part"] for part in result] == [part.name for part in script.PARTS]
    for part in result:
        assert part["status"] == "done", part["error"]
        assert part["rows"], part["part"]
        for row in part["rows"]:
            assert row["values"] and all(math.isfinite(v) for v in row["values"].values()), row
            assert row["floor"] is None or row["floor"] > 0, row
        said = f"\n{part['part']}: done"
        assert said in f"\n{rehearsal[1]}"


def test_results_are_few_small_files(rehearsal: tuple[Path, str]) -> None:
    names = {file.name for file in rehearsal[0].iterdir()}
    assert names == {"results.json", "results.md", "results.png", "log.txt"}
    assert all(file.stat().st_size < 2**20 for file in rehearsal[0].iterdir())
    with PIL.Image.open(rehearsal[0] / "results.png") as chart:
        assert chart.width > 500


def test_ours_and_theirs_share_a_row(rehearsal: tuple[Path, str]) -> None:
    table = (rehearsal[0] / "results.md").read_text()
    (line,) = [row for row in table.splitlines() if "tiny float32: a token, context 40" in row
               and "back ends" not in row]  # fmt: skip
    assert line.index("earlyfusion") < line.index("transformers, eager")
    assert "transformers, compiled" in line and "earlyfusion.hf, eager" in line


def test_each_back_end_is_measured_by_name(rehearsal: tuple[Path, str]) -> None:
    result = json.loads((rehearsal[0] / "results.json").read_text())["parts"]
    (rows,) = [part["rows"] for part in result if part["part"] == "backends"]
    kinds = {row["note"] for row in rows}
    assert {"torch is FusedTransformer", "modules is ModuleTransformer"} <= kinds
    assert all(len(row["values"]) == 1 for row in rows)


def test_budgets_fit_into_nine_minutes(script: Any) -> None:
    assert 400 < sum(part.seconds for part in script.PARTS) <= 60 * script.MINUTES < 540
    assert len({part.name for part in script.PARTS}) == len(script.PARTS)


def test_parts_are_chosen_by_name_and_keep_their_order(script: Any) -> None:
    assert [part.name for part in script.chosen(["int8", "limits"])] == ["limits", "int8"]
    with pytest.raises(SystemExit, match="no part is called bf61: choose of limits, "):
        script.chosen(["limits", "bf61"])


def test_a_part_says_what_is_missing(script: Any, tmp_path: Path) -> None:
    settings = sys.modules["gpu_parts.settings"]
    with pytest.raises(Skipped, match="no_such_package not installed"):
        settings.need("pytest", "no_such_package")
    if not torch.cuda.is_available():
        with pytest.raises(Skipped, match="torch sees no CUDA device: use a machine with one"):
            _ = settings.Settings(tmp_path).device


# ---- parts that go wrong


def row(number: float) -> Row:
    return Row("what", "ms", {OURS: number}, floor=0.5)


def well(settings: Any) -> Iterator[Row]:
    yield row(1.0)
    yield row(2.0)


def raises(settings: Any) -> Iterator[Row]:
    yield row(1.0)
    raise torch.OutOfMemoryError("the card is full")


def crashes(settings: Any) -> Iterator[Row]:
    yield row(1.0)
    os.kill(os.getpid(), 9)


def hangs(settings: Path) -> Iterator[Row]:
    yield row(1.0)
    child = subprocess.Popen(["sleep", "100"])
    (settings / "child").write_text(str(child.pid))
    time.sleep(100)


def lacks(settings: Any) -> Iterator[Row]:
    raise Skipped("transformers is not installed")
    yield


def outcomes_of(folder: Path, minutes: float = 1.0, **measures: Any) -> list[Outcome]:
    listed = [Part(name, "", 3.0, measure) for name, measure in measures.items()]
    log = folder / "log"
    log.touch()
    return run_parts(listed, folder, minutes, "fork", log, lambda _: None)


def test_a_part_that_goes_wrong_ends_alone(tmp_path: Path) -> None:
    result = outcomes_of(tmp_path, raises=raises, crashes=crashes, lacks=lacks, well=well)
    assert [o.status for o in result] == ["failed", "failed", "skipped", "done"]
    assert [len(o.rows) for o in result] == [1, 1, 0, 2]
    assert "in raises" in result[0].error and result[0].reason.endswith("the card is full")
    assert result[1].reason == "its process was ended by SIGKILL"
    assert result[2].reason == "transformers is not installed"
    assert "== well" in (tmp_path / "log").read_text()


def test_a_part_that_hangs_is_stopped_with_what_it_started(tmp_path: Path) -> None:
    listed = [Part("hangs", "", 1.5, hangs), Part("well", "", 3.0, well)]
    (tmp_path / "log").touch()
    result = run_parts(listed, tmp_path, 4.5 / 60, "fork", tmp_path / "log", lambda _: None)
    assert [o.status for o in result] == ["stopped", "done"]
    assert result[0].reason == "it took more than 2 s" and len(result[0].rows) == 1
    child = Path("/proc") / (tmp_path / "child").read_text() / "stat"
    assert not child.exists() or child.read_text().split()[2] == "Z"


def test_the_place_where_a_part_hung_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "_DUMP_BEFORE", 0.5)
    (tmp_path / "log").touch()
    (result,) = run_parts(
        [Part("hangs", "", 1.2, hangs)],
        tmp_path,
        1.2 / 60,
        "fork",
        tmp_path / "log",
        lambda _: None,
    )
    assert "in hangs" in result.error


def test_what_is_measured_is_kept_at_once(tmp_path: Path) -> None:
    kept: list[str] = []
    log = tmp_path / "log"
    log.touch()
    keep = lambda outcomes: kept.append(as_json(outcomes))  # noqa: E731
    run_parts([Part("well", "", 3.0, well)], None, 1.0, "fork", log, keep)
    numbers = [len(json.loads(text)["parts"][0]["rows"]) for text in kept]
    assert numbers[:2] == [1, 2]


def test_no_part_begins_after_the_last_minute(tmp_path: Path) -> None:
    result = outcomes_of(tmp_path, 0.0, well=well)
    assert result[0].status == "skipped" and result[0].reason == "there was no time left"


def test_time_that_is_left_goes_to_the_parts_that_need_it(tmp_path: Path) -> None:
    def slow(settings: Any) -> Iterator[Row]:
        time.sleep(1.0)
        yield row(1.0)

    listed = [Part("slow", "", 0.2, slow), Part("well", "", 3.0, well)]
    (tmp_path / "log").touch()
    result = run_parts(listed, None, 1.0, "fork", tmp_path / "log", lambda _: None)
    assert [o.status for o in result] == ["done", "done"]


def test_a_floor_is_a_ratio_of_at_most_one() -> None:
    assert Row("", "ms", {OURS: 4.0, "other": 1.0}, floor=2.0).ratio == 0.5
    assert Row("", "tokens/s", {OURS: 4.0}, floor=8.0).ratio == 0.5
    text = as_markdown([Outcome("part", rows=[Row("a", "ms", {OURS: 4.0}, "b", 2.0)])])
    assert "| a | earlyfusion 4 ms | 2 | 0.50 | b |" in text


def test_limits_are_those_of_the_slower_of_two() -> None:
    limits = Limits(copy=1e9, read=2e9, products=1e12)
    assert limits.milliseconds(5e6) == 5.0
    assert limits.milliseconds(5e6, 8e9) == 8.0
    result = measure_limits(torch.device("cpu"), small=True)
    assert min(result.copy, result.read, result.products) > 1e6


def test_weights_are_packed_where_they_are() -> None:
    for bits in (16, 8):
        matrix = pack(torch.empty(10, 100, device="meta"), bits)
        assert matrix.data.is_meta and (matrix.scales is None or matrix.scales.is_meta)
