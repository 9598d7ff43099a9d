"""The folder of a run: what is refused there, who holds it, and what is said at the end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from io import FileIO
from multiprocessing import get_context
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import pytest
import torch
from corpora import pairs, tiny_model
from torch.distributed.checkpoint.state_dict_saver import save as save_shards

from earlyfusion.cli import main
from earlyfusion.errors import CheckpointError, DataError, SettingError
from earlyfusion.recipes.run import run
from earlyfusion.train import checkpoint, folder
from earlyfusion.train.monitor import Monitor, read_metrics

SMALL = ["length=100", "warmup_steps=1", "log_every=1", "save_every=2", "device=cpu", "workers=0"]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The fields that every run here has: a tiny model and eight images with captions."""
    place = tmp_path_factory.mktemp("given")
    model = tiny_model(place / "tiny")
    return [f"data={pairs(place / 'data', 8)}", f"model={model}", *SMALL]


def learn(given: list[str], out: Path, *more: str) -> None:
    run("finetune", [*given, "steps=4", f"out={out}", *more])


def losses(out: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(out)]


def contents(place: Path) -> dict[str, bytes]:
    files = (path for path in place.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(place)): path.read_bytes() for path in files}


@pytest.mark.parametrize("there", ["model/model.safetensors", "samples/step-1.png", "thesis.txt"])
def test_a_folder_of_anything_else_is_refused_and_left_as_it_is(
    given: list[str], tmp_path: Path, there: str
) -> None:
    (tmp_path / there).parent.mkdir(exist_ok=True)
    (tmp_path / there).write_text("mine")
    with pytest.raises(SettingError, match=rf"not empty and holds no run .*{there.split('/')[0]}"):
        learn(given, tmp_path)
    assert contents(tmp_path) == {there: b"mine"}


def test_a_folder_of_runs_is_no_run(given: list[str], tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "metrics.jsonl").touch()
    with pytest.raises(SettingError, match="not empty and holds no run"):
        learn(given, tmp_path)


def test_the_folder_of_a_config_whose_class_was_renamed_continues(tmp_path: Path) -> None:
    note = {"kind": "ImageTokenizerConfig", "fields": {}, "finished": False}
    (tmp_path / folder.NOTE).write_text(json.dumps(note), encoding="utf-8")
    (tmp_path / "metrics.jsonl").touch()
    folder.begin(tmp_path, "SquaresConfig", {})
    with pytest.raises(SettingError, match="another kind"):
        folder.begin(tmp_path, "FinetuneConfig", {})


def test_a_run_that_made_nothing_does_not_keep_its_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no nowhere\.jsonl"):
        run("finetune", ["data=nowhere.jsonl", f"out={tmp_path}"])
    folder.begin(tmp_path, "ImageTokenizerConfig", {})  # not "another kind"


def test_a_change_that_is_refused_is_not_noted(
    given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    learn(given, tmp_path, "stop_after=2")
    with pytest.raises(
        CheckpointError, match=r"give optim\.lr=.* \(not .*\), or another out folder"
    ):
        learn(given, tmp_path, "lr=0.5")
    capsys.readouterr()
    learn(given, tmp_path)
    assert "continues from its checkpoint" not in capsys.readouterr().err


def test_a_file_is_no_folder_and_a_hidden_file_is_no_hindrance(
    given: list[str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SettingError, match="cannot be made or written to"):
        learn(given, tmp_path / "file")
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / ".gitkeep").touch()
    learn(given, tmp_path / "kept")
    assert checkpoint.steps(tmp_path / "kept")[-1] == 4


def test_a_run_goes_on_and_says_what_changed(
    given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    learn(given, tmp_path, "stop_after=2", "log_every=2")
    assert "step 2 of 4, as stop_after says" in capsys.readouterr().err
    learn(given, tmp_path, "dropout=0.2")
    stderr = capsys.readouterr().err
    assert "continues from its checkpoint, now with dropout=0.2 (it was 0.05)" in stderr
    assert "log_every" not in stderr
    assert f"the model is in {tmp_path / 'model'}" in stderr
    learn(given, tmp_path, "dropout=0.2", "log_every=3", "stop_after=0")  # nothing to do, and fine
    with pytest.raises(SettingError, match=r"finished run.* with rows=2 \(it was 1\)"):
        learn(given, tmp_path, "dropout=0.2", "rows=2")
    with pytest.raises(SettingError, match="run of another kind"):
        run("pretrain_7b", [f"out={tmp_path}"])


def test_a_run_of_before_there_were_notes_goes_on(given: list[str], tmp_path: Path) -> None:
    learn(given, tmp_path, "stop_after=2")
    (tmp_path / folder.NOTE).unlink()
    learn(given, tmp_path)
    assert checkpoint.steps(tmp_path)[-1] == 4
    assert json.loads((tmp_path / folder.NOTE).read_text())["finished"] is True


def hold(place: str, held: Event, leave: Event) -> None:
    with folder.locked(Path(place)):
        held.set()
        leave.wait(300)


def test_a_second_run_in_a_folder_is_refused_until_the_first_is_gone(
    given: list[str], tmp_path: Path
) -> None:
    context = get_context("spawn")
    held, leave = context.Event(), context.Event()
    first = context.Process(target=hold, args=(str(tmp_path), held, leave))
    first.start()
    assert held.wait(200) and first.pid is not None
    with pytest.raises(SettingError, match=f"in use by process {first.pid} on"):
        learn(given, tmp_path)
    assert not checkpoint.steps(tmp_path)
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    learn(given, tmp_path)
    with folder.locked(tmp_path), folder.locked(tmp_path):  # within one process it is one lock
        pass
    with folder.locked(tmp_path):
        assert f"process {os.getpid()} on" in (tmp_path / ".lock").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:7", "mps"])
def test_a_device_that_is_not_there_is_refused(
    given: list[str], tmp_path: Path, device: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SettingError, match=f"device='{device}' is not on this machine"):
        learn(given, tmp_path / "out", f"device={device}")
    source = given[0].removeprefix("data=")
    assert main(["tokenize", source, "-o", str(tmp_path / "t"), "--device", device]) == 2
    assert "is not on this machine" in capsys.readouterr().err


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        (checkpoint.TENSORS, cut),
        (checkpoint.TENSORS, flip),
        (checkpoint.TENSORS, Path.unlink),
        (checkpoint.STATE, cut),
    ],
)
def test_the_older_checkpoint_is_taken_where_the_newest_is_damaged(
    given: list[str],
    tmp_path: Path,
    name: str,
    damage: Callable[[Path], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    learn(given, tmp_path / "whole", "steps=6", "seed=3")
    learn(given, tmp_path / "part", "steps=6", "seed=3", "stop_after=4")
    assert checkpoint.steps(tmp_path / "part") == [2, 4]
    damage(tmp_path / "part" / "step-00000004" / name)
    capsys.readouterr()
    if damage is not flip:  # found by the sums that a resume looks at
        with pytest.raises(CheckpointError, match="is damaged"):
            checkpoint.load(tmp_path / "part")
    learn(given, tmp_path / "part", "steps=6", "seed=3")
    stderr = capsys.readouterr().err
    assert "step-00000004 is damaged and was renamed to damaged-step-00000004: " in stderr
    assert "the run continues from step 2" in stderr
    assert losses(tmp_path / "part") == losses(tmp_path / "whole")
    assert checkpoint.steps(tmp_path / "part") == [4, 6]


def test_a_run_whose_checkpoints_are_all_damaged_is_refused(
    given: list[str], tmp_path: Path
) -> None:
    learn(given, tmp_path, "stop_after=2")
    cut(tmp_path / "step-00000002" / checkpoint.TENSORS)
    with pytest.raises(CheckpointError, match=r"every checkpoint in .* is damaged"):
        learn(given, tmp_path)
    assert checkpoint.steps(tmp_path) == [2]


@pytest.mark.filterwarnings("ignore:torch.distributed:UserWarning")
@pytest.mark.parametrize("damage", [cut, Path.unlink])
def test_shards_that_are_cut_short_do_not_count(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    for step in (1, 2):
        place = tmp_path / f"step-{step:08d}"
        tensors = {"model/x": torch.full((999,), float(step))}
        save_shards(tensors, checkpoint_id=place / checkpoint.SHARDS, no_dist=True)
        (place / checkpoint.STATE).write_text(json.dumps({"step": step}))
    assert checkpoint.newest_undamaged(tmp_path) == (2, [])
    damage(next((tmp_path / "step-00000002" / checkpoint.SHARDS).glob("*.distcp")))
    step, told = checkpoint.newest_undamaged(tmp_path)
    assert step == 1 and "continues from step 1" in told[0]


def limited(kilobytes: int, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """The command line in a process of which no file may grow over so many kilobytes."""
    script = (
        "import resource, sys\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({kilobytes << 10}, -1))\n"
        "from earlyfusion.cli import main\n"
        f"sys.exit(main({arguments!r}))"
    )
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.parametrize("kilobytes", [4, 100])
def test_a_full_disk_ends_a_run_with_a_sentence_and_it_goes_on(
    given: list[str], tmp_path: Path, kilobytes: int
) -> None:
    command = ["train", "finetune", *given, "steps=4", f"out={tmp_path}"]
    done = limited(kilobytes, command)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert f"{tmp_path} cannot be written to (file too large): make room and" in done.stderr
    assert main(command) == 0 and checkpoint.steps(tmp_path)[-1] == 4


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_full_disk_ends_tokenize_with_a_sentence_and_it_goes_on(
    given: list[str], tmp_path: Path, workers: str
) -> None:
    values = dict(field.split("=", 1) for field in given)
    command = ["tokenize", values["data"], "-o", str(tmp_path / "out"), "--model", values["model"]]
    command += ["--shard-rows", "4", "--workers", workers, "--device", "cpu"]
    done = limited(1, command)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert f"{tmp_path / 'out'} cannot be written to" in done.stderr.replace("\n", " ")
    assert not list((tmp_path / "out").glob(".*.part"))
    assert main(command) == 0


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT as in a terminal: a shell's job in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_without_locks_of_the_system_a_run_still_gets_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder, "fcntl", None)
    out = tmp_path / "runs" / "new"
    with folder.locked(out), folder.locked(out):
        folder.begin(out, "FinetuneConfig", {"run.steps": "4"})
    assert json.loads((out / folder.NOTE).read_text())["fields"] == {"run.steps": "4"}


def test_a_cut_line_of_metrics_does_not_stop_a_run_from_continuing(tmp_path: Path) -> None:
    """A machine that loses its power or a full disk may leave half of the last line."""
    whole = "".join(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in range(3))
    (tmp_path / "metrics.jsonl").write_text(whole + '{"step": 3, "lo')
    assert [row["step"] for row in read_metrics(tmp_path)] == [0, 1, 2]
    monitor = Monitor(tmp_path, 2, 4)
    monitor.log(2, {"loss": 0.5})
    monitor.close()
    assert losses(tmp_path) == [1.0, 1.0, 0.5]


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_until_the_figures_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sent: signal.Signals
) -> None:
    """Raised in between, it could keep the thread of TensorBoard waiting for two minutes."""
    written: list[str] = []

    class Board:
        def add_scalar(self, name: str, value: float, step: int) -> None:
            if not written:
                signal.raise_signal(sent)
            written.append(name)

        def close(self) -> None: ...

    monkeypatch.setattr("earlyfusion.train.monitor._summary_writer", lambda run, first: Board())
    monitor = Monitor(tmp_path, 0, 2)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        with folder.termination_raises():
            with pytest.raises((KeyboardInterrupt, folder.Terminated)):
                monitor.log(0, {"loss": 1.0})
            assert written == ["loss", "per_second", "eta_seconds"]
            monitor.log(1, {"loss": 1.0})
    finally:
        monitor.close()
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("write", [2, 4, 7])
def test_a_signal_amid_a_checkpoint_is_no_error_of_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sent: signal.Signals, write: int
) -> None:
    class Interrupted(FileIO):
        written = 0

        def write(self, data: Any) -> int:
            self.written += 1
            if self.written == write:
                signal.raise_signal(sent)
            return super().write(data)

    saver = checkpoint.Saver(tmp_path, keep=1, in_background=False)
    monkeypatch.setattr(checkpoint.Path, "open", lambda path, mode: Interrupted(path, mode))
    with folder.termination_raises(), pytest.raises((KeyboardInterrupt, folder.Terminated)):
        saver.save(1, {"model": {"x": torch.zeros(1000), "y": torch.zeros(10)}}, {})
    assert checkpoint.steps(tmp_path) == []


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_that_is_stopped_says_how_to_go_on(
    given: list[str], tmp_path: Path, sent: signal.Signals, code: int
) -> None:
    out = tmp_path / "a run"
    command = ["train", "finetune", *given, "steps=100000", f"out={out}"]
    with subprocess.Popen(
        [sys.executable, "-m", "earlyfusion", *command],
        stderr=subprocess.PIPE,
        text=True,
        # A shell's job in the background ignores Ctrl-C, and so would what it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        deadline = time.monotonic() + 200
        while not checkpoint.steps(out) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(sent)
        _, said = process.communicate(timeout=100)
    assert process.returncode == code and "Traceback" not in said, said
    last = said.splitlines()[-1]
    assert last.startswith(f"stopped: {out} holds step ")
    assert f"the same command continues from there: earlyfusion train finetune {given[0]}" in last
    assert last.endswith(f"'out={out}'")
