"""Several processes answer as one does: a model of which each holds a shard of every layer."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import torch
from tensor_parallel_case import CASES, GOLDEN, ODD, SWIN, Case, answers, random_model
from tiny import CONFIG, tiny_processor

from earlyfusion import Chameleon, SamplingParams
from earlyfusion.config import PRESETS, ModelConfig
from earlyfusion.engine.engine import Engine
from earlyfusion.engine.peers import Peers, from_tensors, to_tensors
from earlyfusion.engine.tensor_parallel import shard_config, shard_tensor, split
from earlyfusion.errors import SettingError
from earlyfusion.generation.reference import generate_tokens
from earlyfusion.model.quantise import pack, unpack
from earlyfusion.model.transformer import Transformer
from earlyfusion.processor import Processor

TESTS = Path(__file__).parent
WHOLE = ("embed_tokens", "lm_head", "layernorm", "norm.weight")


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Processor:
    return tiny_processor(tmp_path_factory.mktemp("tiny"))


def run(out: Path, processes: int, *cases: str) -> None:
    script = TESTS / "tensor_parallel_case.py"
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script), str(out), str(processes), *cases],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS.parent)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]


def read(path: Path) -> Any:
    return json.loads(path.read_text())


# ---- a shard, by itself


class Threads:
    """Stands for `Peers`: shards in threads of one process."""

    def __init__(self, count: int) -> None:
        self.count, self.barrier, self.values = count, Barrier(count), dict[int, torch.Tensor]()

    def of(self, rank: int) -> Any:
        threads = self

        class One:
            leads = rank == 0
            count = threads.count

            def __init__(self) -> None:
                self.rank = rank

            def broadcast(self, x: torch.Tensor) -> torch.Tensor:
                return threads.all(rank, x)[0].clone()

            def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
                return torch.stack(threads.all(rank, x)).sum(0)

        return One()

    def all(self, rank: int, x: torch.Tensor) -> list[torch.Tensor]:
        self.values[rank] = x
        self.barrier.wait()
        values = [self.values[n] for n in range(self.count)]
        self.barrier.wait()
        return values


def wide(heads: int, keys: int, config: ModelConfig = CONFIG) -> ModelConfig:
    return replace(
        config, hidden_size=8 * heads, num_attention_heads=heads, num_key_value_heads=keys
    )


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        pytest.param(CONFIG, 2, id="grouped keys"),
        pytest.param(wide(4, 4), 4, id="each its own keys"),
        pytest.param(wide(8, 2), 8, id="four share a key"),
        pytest.param(wide(6, 2, SWIN), 3, id="keys of two groups"),
        pytest.param(ODD, 2, id="biases, tied, odd width"),
        pytest.param(replace(ODD, swin_norm=True), 4, id="all of it"),
    ],
)
def test_shards_add_up_to_the_whole(processor: Processor, config: ModelConfig, parts: int) -> None:
    full_model = random_model(config, processor)
    threads = Threads(parts)
    shares = [split(full_model, threads.of(rank)) for rank in range(parts)]
    tokens = torch.randint(0, config.vocab_size, (2, 9))

    def logits(part: Transformer) -> torch.Tensor:
        with torch.no_grad():
            return part(tokens)

    with ThreadPoolExecutor(parts) as pool:
        logits_of_shards, *_ = pool.map(logits, shares)
    torch.testing.assert_close(logits_of_shards, logits(full_model), atol=2e-5, rtol=1e-5)


def test_a_shard_keeps_its_share_and_nothing_else(processor: Processor) -> None:
    full_model = random_model(SWIN, processor)
    for name, tensor in full_model.named_parameters():
        for rank in range(2):
            shard = shard_tensor(name, tensor, SWIN, rank, 2)
            assert shard.untyped_storage().nbytes() == shard.nbytes
            if not any(part in name for part in WHOLE):
                assert shard.numel() * 2 == tensor.numel(), name


@pytest.mark.parametrize("parts", [2, 4, 8, 16])
def test_the_34b_can_be_cut(parts: int) -> None:
    config = shard_config(PRESETS["chameleon-34b"], 1, parts)
    assert config.num_attention_heads == 64 // parts
    assert config.kv_heads == max(1, 8 // parts)
    assert config.intermediate_size == 22016 // parts and config.head_dim == 128


def test_what_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingError, match=r"3 cannot share 4 attention heads.*1, 2, 4$"):
        shard_config(CONFIG, 0, 3)
    with pytest.raises(SettingError, match="tensor_parallel=2 is not the number of processes, 1"):
        Chameleon.load("mini", "cpu", tensor_parallel=2)
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(SettingError, match="3 cannot share 4 attention heads"):
        Chameleon.load("mini", "cpu", tensor_parallel=3)
    with pytest.raises(SettingError, match="each process of a shared model takes its own"):
        Chameleon.load("mini", "cuda:1", tensor_parallel=3)


def test_angles_that_change_with_the_length_are_refused(processor: Processor) -> None:
    """Before anything is sent: the others do not know how long a sequence is."""
    scaling = {"rope_type": "dynamic", "factor": 2.0}
    config = replace(CONFIG, rope_scaling=scaling, max_position_embeddings=64)
    shard = split(random_model(config, processor), Threads(2).of(0))
    with pytest.raises(SettingError, match=r"context_tokens=96: .* change beyond 64 tokens"):
        Engine(shard, processor, context_tokens=96)


def test_replayed_collectives_that_never_end_are_an_error() -> None:
    """As those of a graph do when another process has ended."""
    peers, answers = Peers.__new__(Peers), iter([False, False, True])
    peers.collectives_left = 0
    peers.wait(lambda: next(answers), seconds=5)
    assert peers.collectives_left == 0
    with pytest.raises(ConnectionError, match="a process that shares the model has ended"):
        peers.wait(lambda: False, seconds=0.01)
    assert peers.collectives_left == 1  # closing aborts what is pending instead of waiting for it


def test_messages_of_any_length_arrive() -> None:
    for size in (0, 1, 510, 511, 512, 513, 3000):
        numbers = torch.randint(0, 2**40, (size,)).tolist()
        sent = deque(to_tensors(numbers))
        actual = from_tensors(lambda empty, sent=sent: empty.copy_(sent.popleft()))
        assert actual == numbers and not sent


# ---- processes


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("two")
    run(out, 2, "tiny", "static", "static swin", "swin", "draw", "caught", "between", "script")
    return out


def one(case: str, processor: Processor) -> list[list[int]]:
    """The tokens of a single process."""
    case_of = CASES[case]
    assert isinstance(case_of, Case)
    full_model = case_of.model(processor)
    return answers(Engine(full_model, processor), case_of.asked(processor))


def check_tokens(out: Path, case: str, processor: Processor) -> None:
    *expected, cut_off = one(case, processor)
    *results, cancelled = read(out / case / "tokens.json")
    assert results == expected
    assert [len(tokens) for tokens in results][1] == 66
    assert len(cancelled) >= 20 and cancelled[:20] == cut_off[:20]


@pytest.mark.parametrize("case", ["tiny", "swin", "static", "static swin"])
def test_two_processes_give_the_tokens_of_one(two: Path, processor: Processor, case: str) -> None:
    """Mixed requests, one cancelled; where the cache is small prompts are read in pieces, requests
    step back, and blocks are taken that another has left spoilt."""
    assert read(two / case / "ended.json") == [0, 0], output_of(two, case, 0) + output_of(
        two, case, 1
    )
    check_tokens(two, case, processor)
    assert (read(two / case / "preemptions.json") > 0) == (case in ("tiny", "static"))
    assert (read(two / case / "shapes.json") > 2) == case.startswith("static")


def test_static_steps_of_two_processes_equal_the_plain_loop(
    two: Path, processor: Processor
) -> None:
    case = CASES["static"]
    assert isinstance(case, Case)
    full_model, tokens = case.model(processor), read(two / "static" / "tokens.json")
    expected = [list(generate_tokens(full_model, processor, one)) for one in case.asked(processor)]
    assert tokens[:-1] == expected[:-1] and tokens[-1] == expected[-1][: len(tokens[-1])]


def test_all_shapes_are_captured_before_the_first_request(two: Path) -> None:
    """The processes make as many calls before each capture; five numbers of rows of four kinds."""
    assert read(two / "static swin" / "warm.json") == 20
    assert read(two / "static swin" / "shapes.json") == 20


@pytest.mark.parametrize("case", ["tiny", "swin"])
def test_each_process_holds_its_share(two: Path, processor: Processor, case: str) -> None:
    case_of = CASES[case]
    assert isinstance(case_of, Case)
    full_bytes = {
        name: tensor.nbytes
        for name, tensor in random_model(case_of.config, processor).named_parameters()
    }
    first, second = (read(two / case / str(rank) / "held.json") for rank in range(2))
    for name, size in full_bytes.items():
        shard_name = name.replace("o_proj", "o_proj.linear").replace(
            "down_proj", "down_proj.linear"
        )
        if not any(part in name for part in WHOLE):
            assert first[shard_name] == second[shard_name] == size / 2, name
    assert first["lm_head.weight"] == full_bytes["lm_head.weight"]
    assert (
        second["lm_head.weight"]
        == second["model.embed_tokens.weight"]
        == 4 * case_of.config.hidden_size
    )


def test_an_error_behind_the_sums_leaves_all_at_work(two: Path, processor: Processor) -> None:
    assert read(two / "draw" / "tokens.json") == one("tiny", processor)[:1]
    assert read(two / "draw" / "ended.json") == [0, 0]


def output_of(out: Path, case: str, rank: int) -> str:
    return (out / case / f"said-{rank}.txt").read_text()


def test_an_error_inside_a_step_ends_the_others(two: Path) -> None:
    assert read(two / "caught" / "ended.json") == [1, 1]
    for rank in range(2):
        assert output_of(two, "caught", rank).endswith("has ended: start the program again\n")


def test_a_program_that_fails_lets_the_others_go(two: Path) -> None:
    assert read(two / "between" / "ended.json") == [1, 0]
    assert "ZeroDivisionError: between two steps" in output_of(two, "between", 0)
    assert output_of(two, "between", 1) == ""


def script_reply(model: Chameleon) -> list[str]:
    greedy = SamplingParams(temperature=0, max_tokens=8)
    return [r.text for r in model.generate_batch(["a pear", "an apple"], "text", greedy)]


def test_a_script_goes_on_in_the_first_process(two: Path) -> None:
    out = two / "script"
    assert read(out / "ended.json") == [0, 0] and output_of(two, "script", 1) == ""
    full_model = Chameleon.load(GOLDEN, "cpu", "float32")
    assert read(out / "replies.json") == script_reply(full_model)
    held_bytes = read(out / "held.json")
    for name, tensor in full_model.transformer.named_parameters():
        if "q_proj" in name or "up_proj" in name:
            assert held_bytes[name] * 2 == tensor.nbytes
    older, shared, repeated = read(out / "refused.json")
    assert older.startswith("another engine has been made")
    assert shared.startswith("this model is shared by 2 processes")
    assert repeated.startswith("this program shares a model already")


@pytest.fixture(scope="module")
def more(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("more")
    run(
        out,
        2,
        "odd",
        "static odd",
        "half",
        "int8",
        "inside",
        "interrupted",
        "killed",
        "peer killed",
    )
    return out


@pytest.mark.slow
def test_shapes_and_dtypes(more: Path, processor: Processor) -> None:
    check_tokens(more, "odd", processor)
    check_tokens(more, "static odd", processor)
    results = read(more / "half" / "tokens.json")
    assert [len(tokens) for tokens in results[:2]] == [20, 66]


@pytest.mark.slow
def test_rounded_weights_are_those_of_the_parts(more: Path) -> None:
    """int8 has a scale for each row that a process holds."""
    full_model = Chameleon.load(GOLDEN, "cpu", "float32")
    with torch.no_grad():
        for name, tensor in full_model.transformer.named_parameters():
            parts = 2 if "o_proj" in name or "down_proj" in name else 1
            if "proj" in name or "lm_head" in name:
                rounded = [unpack(pack(part, 8)) for part in tensor.chunk(parts, 1)]
                tensor.copy_(torch.cat(rounded, 1))
    assert read(more / "int8" / "replies.json") == script_reply(full_model)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "codes"),
    [
        ("inside", [1, 1]),
        ("interrupted", [-signal.SIGINT, 1]),
        ("killed", [-signal.SIGKILL, 1]),
        ("peer killed", [1, -signal.SIGKILL]),
    ],
)
def test_nobody_waits_for_one_that_has_gone(more: Path, case: str, codes: list[int]) -> None:
    assert read(more / case / "ended.json") == codes


@pytest.mark.slow
def test_four_processes_give_the_tokens_of_one(processor: Processor, tmp_path: Path) -> None:
    """Of the tiny model two processes each hold the same keys; the odd one has a single head."""
    run(tmp_path, 4, "tiny", "odd", "caught")
    check_tokens(tmp_path, "tiny", processor)
    check_tokens(tmp_path, "odd", processor)
    assert read(tmp_path / "caught" / "ended.json") == [1, 1, 1, 1]


@pytest.mark.slow
def test_torchrun_and_the_command_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    arguments = "-m earlyfusion generate Hello --output text --max-tokens 5 --seed 1 --json"
    done = subprocess.run(
        [*command, *arguments.split(), "--device", "cpu"],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS.parent)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    settings = SamplingParams(max_tokens=5)
    expected = Chameleon.load("mini", "cpu").generate("Hello", "text", settings, seed=1)
    assert json.loads(done.stdout)["text"] == expected.text
