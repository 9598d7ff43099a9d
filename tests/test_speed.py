"""`earlyfusion bench`: every figure is there, mistakes are told, warm steps compile nothing."""

from __future__ import annotations

import ctypes
import json
import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from earlyfusion import Chameleon
from earlyfusion.bench.harness import OURS, Row, medians, seconds, table, take_turns
from earlyfusion.bench.shapes import SHAPES, write_random
from earlyfusion.bench.speed import SHORT, Compilations, Meter, bench, resident_bytes
from earlyfusion.cli import main
from earlyfusion.config import PRESETS
from earlyfusion.errors import SettingError
from earlyfusion.kernels import cpu_step

TIMES = {
    "imports", "load", "engine_first_token", "cold_start", "first_short", "token_short",
    "first_long", "token_long", "picture_new", "picture_known", "draw_plain", "draw_guided",
    "draw_again", "draw_again_guided", "encode", "decode",
}  # fmt: skip
OTHERS = {
    "alone", "together", "together_ratio", "compilations", "bandwidth", "matmul_peak",
    "token_weights", "step_2_branches", "step_3_branches",
    "cache", "cache_tokens", "cache_requests", "cache_requests_300",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("random") / "model"
    write_random("tiny", place)
    return place


@pytest.fixture
def meter(folder: Path) -> Meter:
    return Meter(Chameleon.load(folder, device="cpu"), 1)


def test_json_has_every_figure(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(folder), "--rounds", "1", "--json"]) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert err == "" and report["model"] == str(folder) and report["dtype"] == "float32"
    figures = report["figures"]
    memory = {"idle_memory", "model_memory"} if resident_bytes() is not None else set()
    assert set(figures) - {"gpu_memory"} == TIMES | OTHERS | memory
    values = {name: figure["value"] for name, figure in figures.items()}
    assert all(math.isfinite(value) for value in values.values())
    assert all(values[name] > 0 for name in (TIMES | OTHERS) - {"compilations"})
    assert values["compilations"] == 0
    parts = values["imports"] + values["load"] + values["engine_first_token"]
    assert values["cold_start"] == pytest.approx(parts)
    shares = [figures[name]["of_limit"] for name in ("token_short", "token_long", "first_long")]
    assert all(0 < share for share in shares)


def test_table_is_aligned() -> None:
    report = bench(shape="tiny", device="cpu", dtype="int8", rounds=1)
    head, empty, *lines = report.table.splitlines()
    assert head.startswith("random weights, shape tiny, int8, cpu, ") and empty == ""
    assert len(lines) == len(report.figures)
    units = {line[52:].split(" ")[1] for line in lines if len(line) > 53}
    assert units <= {"s", "ms", "MB", "GB/s", "GFLOP/s", "tokens/s", "times"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["mini", "--shape", "tiny"], ["'mini'", "'tiny'", "choose one"]),
        (["--shape", "3b"], ["3b", "7b"]),
        (["--rounds", "0"], ["rounds=0", "1 or more"]),
        (["--rounds", "few"], ["few"]),
        (["--threads", "0"], ["threads=0", f"{os.cpu_count()} cores"]),
        (["--threads", "4096"], ["threads=4096"]),
        (["--dtype", "int3", "--rounds", "1"], ["int3", "int8"]),
        (["no-such-folder"], ["no-such-folder"]),
    ],
)
def test_mistakes_are_one_sentence(
    arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("Error: ") and err.count("\n") == 1
    assert all(word in err for word in words)


def test_unknown_shape_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="3b"):
        write_random("3b", tmp_path / "model")


def test_shapes_have_the_sizes_that_they_are_called_by() -> None:
    sizes = {"110m": 0.11e9, "1b": 1.1e9, "7b": 7.04e9}
    for shape, size in sizes.items():
        config = SHAPES[shape]
        width, inner = config.hidden_size, config.intermediate_size
        matrices = config.num_hidden_layers * (4 * width * width + 3 * width * inner)
        assert matrices + 2 * config.vocab_size * width == pytest.approx(size, rel=0.06)
    assert SHAPES["7b"] == PRESETS["chameleon-7b"]


def test_random_model_speaks_its_whole_vocabulary(folder: Path) -> None:
    vocabulary = Chameleon.load(folder, device="cpu").processor.vocabulary
    assert vocabulary.size == SHAPES["tiny"].vocab_size
    assert vocabulary.num_codes == SHAPES["tiny"].vq_config.num_embeddings


def test_bytes_of_a_token_are_those_of_the_weights(meter: Meter) -> None:
    transformer = meter.model.transformer
    layers = [m for m in transformer.model.layers.modules() if isinstance(m, nn.Linear)]
    vocabulary, config = meter.model.processor.vocabulary, meter.config
    rows = len(vocabulary.text_tokens) + 2  # what ends a text, and what begins an image
    weights = sum(4 * m.weight.numel() for m in layers)
    head = 4 * rows * config.hidden_size
    assert meter.token_bytes(0) == weights + head
    keys_and_values = 2 * config.num_hidden_layers * config.kv_heads * config.head_dim * 4
    assert meter.token_bytes(100) - meter.token_bytes(0) == 100 * keys_and_values


def test_operations_of_a_prompt_are_those_that_torch_counts(meter: Meter) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    tokens = torch.randint(100, 400, (1, 64))
    plain = sdpa_kernel(SDPBackend.MATH)  # the others are not counted on a CPU
    with FlopCounterMode(display=False) as counted, torch.no_grad(), plain:
        logits_BTV = meter.model.transformer(tokens)
    head = 2 * logits_BTV.numel() * meter.config.hidden_size
    # What is counted has the whole square of the attention: twice what is looked back at.
    unseen = 2 * 64 * 64 * meter.config.num_hidden_layers * meter.config.hidden_size
    assert counted.get_total_flops() == meter.operations(64) + unseen + head


def test_counter_of_compilations_sees_what_it_should() -> None:
    with Compilations() as nothing:
        torch.ones(3).sum()
    with Compilations() as process:
        subprocess.run([sys.executable, "-c", ""], check=True)
    with Compilations() as library:
        ctypes.CDLL(None)
    assert (nothing.number, process.number, library.number) == (0, 1, 1)


@pytest.mark.skipif(not cpu_step.available(), reason="needs a C++ compiler")
def test_warm_steps_build_and_load_nothing(folder: Path) -> None:
    """In a fresh process: the compiled step comes once, with the first engine, then never again."""
    script = (
        "import sys, torch; torch.set_num_threads(1)\n"
        "from earlyfusion import Chameleon\n"
        "from earlyfusion.bench.speed import Compilations, Meter\n"
        "with Compilations() as first:\n"
        "    meter = Meter(Chameleon.load(sys.argv[1], device='cpu'), 1)\n"
        "    meter.mixed()\n"
        "with Compilations() as then:\n"
        "    for _ in range(3): meter._run_all(meter._mixed_requests())\n"
        "    second = Meter(Chameleon.load(sys.argv[1], device='cpu'), 1)\n"
        "    second._run_all(second._mixed_requests())\n"
        "print(first.number > 0, then.number, 'torch._inductor' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder)], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["True", "0", "False"]


def test_prompts_of_a_short_context_fit(meter: Meter) -> None:
    for request in meter._mixed_requests():
        assert len(request.ids) + request.max_tokens <= meter.config.max_position_embeddings
    assert len(meter._request(SHORT, 5, {}).ids) == SHORT


def test_contenders_take_turns_and_the_first_round_does_not_count() -> None:
    order: list[str] = []

    def measure(name: str) -> float:
        order.append(name)
        return float(len(order))

    result = take_turns({name: partial(measure, name) for name in "ab"}, rounds=3)
    assert order == ["a", "b"] * 4
    assert result == {"a": [3, 5, 7], "b": [4, 6, 8]}
    assert medians(result, 10) == {"a": 50, "b": 60}
    assert seconds(lambda: None, clock=iter([1.0, 3.5]).__next__) == 2.5


def test_a_table_says_how_many_times_as_fast_ours_is() -> None:
    rows = [
        Row("a token", "ms", {OURS: 2.0, "other": 3.0, "third": 1.0}),
        Row("texts", "tokens/s", {OURS: 2000.0, "other": 500.0}, "of 8"),
    ]
    assert table(rows).splitlines()[2:] == [
        "| a token | 2 ms | other 3, third 1 | 1.50, 0.50 |  |",
        "| texts | 2,000 tokens/s | other 500 | 4.00 | of 8 |",
    ]
