"""Several processes train as one does: the same losses, and checkpoints that any number reads."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import distributed_case
import pytest
import torch
import torch.distributed as dist
from distributed_case import CASES, LENGTH, MODEL, OPTIM, ROWS, document
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from earlyfusion import parallel
from earlyfusion.config import PRESETS
from earlyfusion.data.packing import Packer, RoleWeights
from earlyfusion.errors import CheckpointError, SettingError
from earlyfusion.model.transformer import Transformer
from earlyfusion.parallel import ParallelConfig, check_split, checkpoint_activations
from earlyfusion.train import checkpoint
from earlyfusion.train.language import LanguageTask
from earlyfusion.train.loss import head_loss
from earlyfusion.train.monitor import read_metrics

TESTS = Path(__file__).parent


def torchrun(out: Path, processes: int, *cases: str, restarts: int = 0) -> str:
    """Run cases as `torchrun` runs a training; what it says on standard error."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={processes}", f"--max-restarts={restarts}"]
    command += [str(TESTS / "distributed_case.py"), str(out), *cases]
    done = subprocess.run(
        command,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS.parent)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stderr


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(run)]


def worst(a: Path, b: Path) -> float:
    """The largest difference of two runs' losses."""
    return max(abs(x - y) for x, y in zip(losses(a), losses(b), strict=True))


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of a single process."""
    out = tmp_path_factory.mktemp("one")
    plain = ("one", "one in parts", "one swin", "one bf16", "one meta")
    for name in (*plain, "one adapters", "one head", "one muon"):
        distributed_case.run(name, out)
    return out


TWO = (
    "fsdp killed",
    "fsdp in parts",
    "fsdp meta",
    "fsdp bf16",
    "fsdp half",
    "tensor",
    "tensor meta",
    "fsdp adapters",
    "fsdp head in parts",
    "fsdp muon half",
    "muon go on",
    "tensor muon",
)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of two processes, one of which is killed in the first run and started again."""
    out = tmp_path_factory.mktemp("two")
    said = torchrun(out, 2, *TWO, restarts=1)
    assert "exitcode: -9" in said
    return out


def test_the_runs_learn_so_that_equal_losses_mean_something(one: Path) -> None:
    result = losses(one / "one")
    assert len(result) == 20 and result[-1] < result[0] - 0.5
    for other in ("one-swin", "one-adapters", "one-head"):
        assert worst(one / "one", one / other) > 1e-3


def test_parts_of_a_step_add_up_to_the_step(one: Path) -> None:
    assert worst(one / "one", one / "one-parts") <= 1e-5


@pytest.mark.parametrize(
    ("several", "single"),
    [
        ("fsdp-killed", "one"),
        ("fsdp-parts", "one"),
        ("fsdp-meta", "one-meta"),
        ("tensor", "one"),
        ("tensor-meta", "one-meta"),
        ("fsdp-adapters", "one-adapters"),
        ("fsdp-head-parts", "one-head"),
        ("muon-half", "one-muon"),
        ("tensor-muon", "one-muon"),
    ],
)
def test_two_processes_give_the_losses_of_one(
    one: Path, two: Path, several: str, single: str
) -> None:
    """`meta`: weights initialised in place; `killed`: a process died at step 12 of 20.

    `adapters`, `head`: a part of the model is trained, and what is frozen is cut over both too.
    """
    assert len(losses(two / several)) == 20
    assert worst(two / several, one / single) <= 1e-5


def test_one_process_goes_on_with_muon_from_two(one: Path, two: Path, tmp_path: Path) -> None:
    out = tmp_path / "muon-half"
    shutil.copytree(two / "muon-half", out)
    checkpoint.drop_after(out, 10)
    CASES["muon go on"].run(tmp_path)
    assert len(losses(out)) == 20 and worst(out, one / "one-muon") <= 1e-5


def test_bf16_of_two_processes_is_near_that_of_one(one: Path, two: Path) -> None:
    assert 0 < worst(two / "fsdp-bf16", one / "one") < 2e-2
    tensors = checkpoint.load(two / "fsdp-bf16")[0]["model"]
    assert {t.dtype for t in tensors.values()} == {torch.float32}


def test_one_process_goes_on_from_a_checkpoint_of_two(one: Path, two: Path) -> None:
    tensors, state = checkpoint.load(two / "half")
    full, _ = checkpoint.load(one / "one", 10)
    for name, value in full["model"].items():
        torch.testing.assert_close(tensors["model"][name], value, atol=1e-6, rtol=1e-6)
    for number, moments in full["optimizer"]["state"].items():
        for name, value in moments.items():
            torch.testing.assert_close(
                tensors["optimizer"]["state"][number][name], value, atol=1e-6, rtol=1e-5
            )
    assert state["step"] == 10
    distributed_case.run("go on", two)
    assert worst(two / "half", one / "one") <= 1e-6


def test_a_part_of_a_checkpoint_can_be_read_alone(two: Path) -> None:
    tensors, _ = checkpoint.load(two / "fsdp-meta", only="model")
    assert tensors.keys() == {"model"} and "lm_head.weight" in tensors["model"]


def test_a_flipped_bit_in_a_shard_is_noticed(two: Path, tmp_path: Path) -> None:
    """Lengths do not show it; checkpoints without checksums still count."""
    checkpoint_of_two(two, run := tmp_path / "run")
    folder = run / "step-00000010" / checkpoint.SHARDS
    assert len(list(folder.glob("*.crc32"))) == 2
    assert checkpoint.newest_undamaged(run) == (10, [])
    shard = next(folder.glob("*.distcp"))
    written = bytearray(shard.read_bytes())
    written[len(written) // 2] ^= 1
    shard.write_bytes(written)
    with pytest.raises(CheckpointError, match="is damaged"):
        checkpoint.newest_undamaged(run)
    for noted in folder.glob("*.crc32"):
        noted.unlink()
    assert checkpoint.newest_undamaged(run) == (10, [])


@pytest.mark.slow
def test_four_processes_give_the_losses_of_one(one: Path, two: Path, tmp_path: Path) -> None:
    """HSDP, tensor x shard, and going on from a checkpoint of two and from one of one."""
    half = tmp_path / "half"
    (tmp_path / "from-one").mkdir()
    checkpoint_of_two(two, half)
    single = replace(CASES["one"], folder="from-one", stop_after=10)
    single.run(tmp_path)
    cases = ("hybrid", "hybrid head", "tensor fsdp", "tensor fsdp meta", "go on", "from one")
    torchrun(tmp_path, 4, *cases)
    for folder in ("hybrid", "tensor-fsdp"):
        assert worst(tmp_path / folder, one / "one") <= 1e-5
    assert worst(tmp_path / "tensor-fsdp-meta", one / "one-meta") <= 1e-5
    assert worst(tmp_path / "hybrid-head", one / "one-head") <= 1e-5
    for folder in ("half", "from-one"):
        assert len(losses(tmp_path / folder)) >= 10
        assert abs(losses(tmp_path / folder)[-1] - losses(one / "one")[-1]) <= 1e-6


def checkpoint_of_two(two: Path, to: Path) -> None:
    to.mkdir()
    shutil.copytree(two / "fsdp-killed" / "step-00000010", to / "step-00000010")


@pytest.mark.parametrize("how", ["selective", "full"])
def test_computing_again_changes_no_gradient_and_keeps_less(how: str) -> None:
    tokens = torch.randint(5, MODEL.vocab_size, (2, 64))

    def measured(repeated: str) -> tuple[list[torch.Tensor], int]:
        torch.manual_seed(0)
        model = Transformer(MODEL, dropout=0.1).train()
        model.init_weights()
        checkpoint_activations(model, repeated)
        kept: dict[int, int] = {}

        def keep(x: torch.Tensor) -> torch.Tensor:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss = model(tokens).square().mean()
        loss.backward()
        return [p.grad for p in model.parameters() if p.grad is not None], sum(kept.values())

    plain, full = measured("none")
    repeated, less = measured(how)
    torch.testing.assert_close(repeated, plain, atol=0, rtol=0)
    assert less < (0.75 if how == "selective" else 0.5) * full


class _Slice:
    """The rows of a head that one of two processes would hold; the other's are computed too."""

    def __init__(self, head: torch.Tensor, first: int, x: torch.Tensor, targets: torch.Tensor):
        self.first, self._head, self._x, self._targets = first, head, x, targets
        self._at = 0

    def combine(self, log_z: torch.Tensor, chosen: torch.Tensor) -> Any:
        logits = self._x[self._at : self._at + len(log_z)] @ self._head.T
        targets = self._targets[self._at : self._at + len(log_z)]
        self._at += len(log_z)
        return logits.logsumexp(-1), logits.gather(1, targets[:, None])[:, 0]


def test_a_slice_of_the_vocabulary_gives_its_part_of_the_gradient() -> None:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(2, 9, 16, generator=generator, requires_grad=True)
    head = torch.randn(40, 16, generator=generator, requires_grad=True)
    targets = torch.randint(0, 40, (2, 9), generator=generator)
    weight = torch.rand(2, 9, generator=generator)
    full = head_loss(x, head, targets, weight, z_weight=0.1)
    grad_x, grad_head = torch.autograd.grad(full.total, (x, head))
    parts = []
    for first in (0, 20):
        rows = head[first : first + 20].detach().requires_grad_()
        slice_ = _Slice(head.detach(), first, x.detach().flatten(0, 1), targets.flatten())
        part: Any = slice_
        loss = head_loss(x, rows, targets, weight, z_weight=0.1, block=4, vocab_slice=part)
        torch.testing.assert_close(loss.total, full.total)
        torch.testing.assert_close(loss.nats_BT, full.nats_BT)
        parts.append(torch.autograd.grad(loss.total, (x, rows)))
    torch.testing.assert_close(parts[0][0] + parts[1][0], grad_x)
    torch.testing.assert_close(torch.cat((parts[0][1], parts[1][1])), grad_head)


def test_shares_of_the_packer_are_blocks_of_one_batch() -> None:
    def packer(share: tuple[int, int]) -> Packer:
        return Packer(document, RoleWeights(), ROWS, LENGTH, pad=1).for_share(share)

    full = packer((0, 1))
    shares = [packer((rank, 2)) for rank in range(2)]
    for _ in range(3):
        batch, parts = full.next(), [share.next() for share in shares]
        for column, pieces in zip(batch, zip(*parts, strict=True), strict=True):
            assert torch.equal(column, torch.cat(pieces))
    assert {p.cursor for p in (full, *shares)} == {full.cursor}


def test_the_mesh_is_cut_as_asked_or_refused() -> None:
    assert ParallelConfig().sizes(8) == (1, 8, 1)
    assert ParallelConfig(shard=2).sizes(8) == (4, 2, 1)
    assert ParallelConfig(tensor=2, shard=2).sizes(8) == (2, 2, 2)
    with pytest.raises(SettingError, match="start a multiple of 2"):
        ParallelConfig(tensor=2).sizes(1)
    with pytest.raises(SettingError, match="multiple of 6"):
        ParallelConfig(tensor=2, shard=3).sizes(8)
    with pytest.raises(SettingError, match="selective"):
        ParallelConfig(checkpointing="some")
    with pytest.raises(SettingError, match="checkpointing_every=0 must be at least 1"):
        ParallelConfig(checkpointing="full", checkpointing_every=0)
    with pytest.raises(SettingError, match="checkpointing_every=2 has no effect"):
        ParallelConfig(checkpointing_every=2)
    with pytest.raises(SettingError, match="at least 1"):
        ParallelConfig(tensor=0)
    with pytest.raises(SettingError, match="2 kv_heads"):
        check_split(PRESETS["tiny"], 4)
    with pytest.raises(SettingError, match="tied"):
        check_split(replace(PRESETS["tiny"], tie_word_embeddings=True), 2)
    model = Transformer(MODEL)
    with pytest.raises(SettingError, match="multiple of 3"):
        LanguageTask(model, Packer(document, RoleWeights(), 4, LENGTH, 1), micro_rows=3)


def test_an_index_of_shards_cannot_run_code(tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "harmed"),)

    folder = tmp_path / "step-00000001"
    (folder / checkpoint.SHARDS).mkdir(parents=True)
    (folder / checkpoint.STATE).write_text("{}")
    (folder / checkpoint.SHARDS / ".metadata").write_bytes(pickle.dumps(Harm()))
    with pytest.raises(CheckpointError, match="does not belong there"):
        checkpoint.load(tmp_path)
    assert not (tmp_path / "harmed").exists()


def test_an_index_names_members_of_enumerations_by_getattr_and_nothing_else() -> None:
    """As Python 3.11.0 to 3.11.3 write them."""
    from torch.distributed.checkpoint import metadata

    class Got:
        def __init__(self, *names: Any) -> None:
            self.names = names

        def __reduce__(self) -> Any:
            return getattr, self.names

    def read(*names: Any) -> Any:
        return checkpoint._IndexUnpickler(io.BytesIO(pickle.dumps(Got(*names)))).load()

    kind = metadata._MEM_FORMAT_ENCODING
    assert read(kind, "TORCH_PRESERVE_FORMAT") is kind.TORCH_PRESERVE_FORMAT
    for names in ((kind, "__init__"), (metadata.Metadata, "__init__"), (kind, "mro")):
        with pytest.raises(pickle.UnpicklingError, match="does not belong there"):
            read(*names)


def test_settings_of_a_run_meet_its_checkpoint(two: Path) -> None:
    other = replace(CASES["go on"], model=replace(MODEL, intermediate_size=96), folder="fsdp-meta")
    with pytest.raises(CheckpointError, match="another shape"):
        other.run(two)
    assert OPTIM.eps == 1e-5


@contextmanager
def fake_processes(count: int) -> Iterator[None]:
    """The first of so many processes that hear and tell nothing: enough to cut a model."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    try:
        yield
    finally:
        dist.destroy_process_group()


def test_the_tensor_plan_cuts_each_layer_and_only_norms_stay_whole() -> None:
    """Losses would be the same if it cut nothing."""
    model = Transformer(replace(MODEL, attention_bias=False))
    full = {name: parameter.numel() for name, parameter in model.named_parameters()}
    with fake_processes(2):
        mesh = init_device_mesh("cpu", (1, 1, 2), mesh_dim_names=parallel.AXES)
        parallel.apply_tensor_parallel(model, mesh)
        parts = {n: cast(DTensor, p).to_local().numel() for n, p in model.named_parameters()}
    for name, part in parts.items():
        is_norm = name.endswith(("layernorm.weight", "model.norm.weight"))
        assert part == (full[name] if is_norm else full[name] // 2), name
    assert len(parts) == len(full)
