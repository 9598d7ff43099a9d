"""Conversion: every layout into every other, to the bit, in any number of files, whole or not."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import CONFIG, tiny_processor
from torch import Tensor

from earlyfusion.api import Chameleon
from earlyfusion.checkpoints import checklist
from earlyfusion.checkpoints.anole import rotate, unrotate
from earlyfusion.checkpoints.assemble import LoadedModel
from earlyfusion.checkpoints.convert import _size_text, convert
from earlyfusion.checkpoints.detect import detect, load, locate
from earlyfusion.checkpoints.hf import save_hf
from earlyfusion.checkpoints.lumina import layout
from earlyfusion.checkpoints.meta import inner_width, width_params
from earlyfusion.checkpoints.summary import summarize
from earlyfusion.cli import main
from earlyfusion.content import Image
from earlyfusion.errors import CheckpointError, SettingError
from earlyfusion.files import new_folder
from earlyfusion.model.transformer import Transformer
from earlyfusion.model.vqgan import VQGAN
from earlyfusion.processor import train_tokenizer

MODELS = ("tiny_1", "tiny_mp2_swin_gqa")


def shards_of(folder: Path) -> list[dict[str, Tensor]]:
    paths = sorted(folder.glob("consolidated*.pth"))
    return [torch.load(path, weights_only=True) for path in paths]


def assert_equal_bits(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert value.dtype == two[name].dtype, name
        assert value.shape == two[name].shape, name
        as_bytes = value.contiguous().flatten().view(torch.uint8)
        assert torch.equal(as_bytes, two[name].contiguous().flatten().view(torch.uint8)), name


def assert_same_shards(one: Path, two: Path) -> None:
    actual, expected = shards_of(one), shards_of(two)
    assert len(actual) == len(expected) > 0
    for shard, expected_shard in zip(actual, expected, strict=True):
        assert_equal_bits(shard, expected_shard)


def assert_same_model(one: LoadedModel, two: LoadedModel) -> None:
    assert_equal_bits(one.transformer.state_dict(), two.transformer.state_dict())
    assert_equal_bits(one.vqgan.state_dict(), two.vqgan.state_dict())
    actual, expected = one.config.to_dict(), two.config.to_dict()
    assert actual | {"model_parallel_size": 1} == expected | {"model_parallel_size": 1}


def assert_meta_s_logits(golden: Path, name: str, folder: Path) -> None:
    """The recorded prefill logits in fp32, to the tolerance of the transformer's own test."""
    transformer = load(folder, dtype=torch.float32).transformer
    with np.load(golden / "expected" / f"{name}.fp32.npz") as expected:
        ids, logits = torch.from_numpy(expected["prefill_ids"]), expected["prefill_logits"]
        rows = torch.split(ids, expected["prefill_lens"].tolist())
    with torch.no_grad():
        actual = torch.cat([transformer(row[None])[0] for row in rows])
    gap = (actual - torch.from_numpy(logits)).abs().max()
    assert gap < 1e-5 * max(1.0, float(np.abs(logits).max()))


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A random model in transformers' layout; its heads share their QK-norms."""
    folder = tmp_path / "tiny"
    save_tiny(folder)
    return folder


def save_tiny(folder: Path, **changes: Any) -> None:
    config = replace(CONFIG, **changes)
    torch.manual_seed(0)
    transformer, vqgan = Transformer(config), VQGAN(config.vq_config)
    transformer.init_weights(torch.Generator().manual_seed(0))
    tiny_processor(folder.parent)
    text = (folder.parent / "tokenizer.json").read_text()
    save_hf(folder, transformer, vqgan, text, {"chameleon": {"max_tokens": 8}})


class TestRoundTrips:
    @pytest.mark.parametrize("name", MODELS)
    def test_meta_to_hf_to_meta(self, golden: Path, tmp_path: Path, name: str) -> None:
        source, hf, again = golden / "models" / name, tmp_path / "hf", tmp_path / "meta"
        convert(source, hf, "hf", shards=3)
        assert_same_model(load(hf), load(source))
        assert_meta_s_logits(golden, name, hf)
        convert(hf, again, "meta")
        assert_same_shards(again, source)
        assert_same_model(load(again), load(source))
        assert_meta_s_logits(golden, name, again)
        original = torch.load(golden / "tokenizer" / "vqgan.ckpt", weights_only=True)["state_dict"]
        written = torch.load(again / "tokenizer" / "vqgan.ckpt", weights_only=True)["state_dict"]
        assert_equal_bits(written, {k: v for k, v in original.items() if not k.startswith("loss.")})
        text = (golden / "tokenizer" / "text_tokenizer.json").read_bytes()
        assert (again / "tokenizer" / "text_tokenizer.json").read_bytes() == text

    def test_meta_s_tokenizer_is_found_in_the_folder_around_it(
        self, golden: Path, tmp_path: Path
    ) -> None:
        alone, around = tmp_path / "alone" / "model", tmp_path / "data"
        shutil.copytree(golden / "models" / "tiny_1", alone)
        shutil.copytree(golden / "tokenizer", around / "tokenizer")
        convert(alone, tmp_path / "hf", "hf", tokenizer=around)
        assert_same_model(load(tmp_path / "hf"), load(golden / "models" / "tiny_1"))

    def test_any_number_of_shards(self, golden: Path, tmp_path: Path) -> None:
        folder = golden / "models" / "tiny_1"
        for step, count in enumerate((2, 4, 1)):
            target = tmp_path / str(step)
            convert(folder, target, "meta", shards=count)
            assert len(shards_of(target)) == count
            assert_same_model(load(target), load(golden / "models" / "tiny_1"))
            assert_meta_s_logits(golden, "tiny_1", target)
            folder = target
        assert_same_shards(folder, golden / "models" / "tiny_1")

    def test_hf_to_meta_to_hf(self, tiny: Path, tmp_path: Path) -> None:
        convert(tiny, tmp_path / "meta", "meta", shards=2)
        convert(tmp_path / "meta", tmp_path / "again", "hf")
        actual, expected = load(tmp_path / "again"), load(tiny)
        assert_same_model(actual, expected)
        assert actual.generation_defaults == expected.generation_defaults
        assert (tmp_path / "again" / "tokenizer.json").read_bytes() == (
            tiny / "tokenizer.json"
        ).read_bytes()

    def test_tied_weights_become_two(self, tmp_path: Path) -> None:
        save_tiny(tmp_path / "tied", tie_word_embeddings=True)
        convert(tmp_path / "tied", tmp_path / "meta", "meta")
        tokens_BT = torch.arange(20)[None]
        one, two = load(tmp_path / "tied"), load(tmp_path / "meta")
        assert torch.equal(one.transformer(tokens_BT), two.transformer(tokens_BT))

    def test_an_image_tokenizer_without_attention(self, tmp_path: Path) -> None:
        save_tiny(tmp_path / "tiny", vq_config=replace(CONFIG.vq_config, attn_type="none"))
        convert(tmp_path / "tiny", tmp_path / "meta", "meta")
        assert_same_model(load(tmp_path / "meta"), load(tmp_path / "tiny"))

    def test_another_dtype_leaves_the_vqgan(self, tiny: Path, tmp_path: Path) -> None:
        convert(tiny, tmp_path / "narrow", "hf", dtype=torch.bfloat16)
        tensors = load_file(tmp_path / "narrow" / "model.safetensors")
        kinds = {name.startswith("model.vqmodel."): value.dtype for name, value in tensors.items()}
        assert kinds == {True: torch.float32, False: torch.bfloat16}
        assert json.loads((tmp_path / "narrow" / "config.json").read_text())["dtype"] == "bfloat16"

    def test_transformers_reads_the_files(self, tiny: Path, tmp_path: Path) -> None:
        from transformers import ChameleonForConditionalGeneration

        convert(tiny, tmp_path / "cut", "hf", shards=5)
        expected = ChameleonForConditionalGeneration.from_pretrained(tmp_path / "cut")
        weights = load(tiny).transformer.state_dict()
        state = expected.state_dict()
        assert_equal_bits({name: state[name] for name in weights}, weights)
        assert len(list((tmp_path / "cut").glob("*.safetensors"))) == 5


class TestAsMetaReadsIt:
    """What Meta's loader asserts, and what its formulas give."""

    def test_params_and_names(self, golden: Path, tmp_path: Path) -> None:
        folder = golden / "models" / "tiny_mp2_swin_gqa"
        convert(folder, tmp_path / "copy", "meta")
        params = json.loads((tmp_path / "copy" / "params.json").read_text())["model"]
        original = json.loads((folder / "params.json").read_text())["model"]
        width = inner_width(original)
        assert inner_width(params) == width
        shared = ("dim", "n_layers", "n_heads", "n_kv_heads", "norm_eps", "rope_theta", "swin_norm")
        assert {name: params[name] for name in shared} == {name: original[name] for name in shared}
        overrides = json.loads((tmp_path / "copy" / "consolidate_params.json").read_text())
        assert overrides == {"model_parallel_size": 2, "vocab_size": 1280}
        assert "rope.freqs" in shards_of(tmp_path / "copy")[0]

    @pytest.mark.parametrize(
        ("dim", "width"), [(4096, 11008), (8192, 22016), (256, 704), (64, 7), (64, 4099)]
    )
    def test_the_formula_gives_every_width(self, dim: int, width: int) -> None:
        assert inner_width({"dim": dim} | width_params(dim, width)) == width

    def test_checklists_are_those_of_md5sum(self, tiny: Path, tmp_path: Path) -> None:
        convert(tiny, tmp_path / "meta", "meta")
        for folder in (tmp_path / "meta", tmp_path / "meta" / "tokenizer"):
            subprocess.run(["md5sum", "--quiet", "-c", "checklist.chk"], cwd=folder, check=True)

    def test_rotation_has_an_inverse(self) -> None:
        rows = torch.arange(24).view(12, 2)
        assert torch.equal(rotate(unrotate(rows, 4), 4), rows)
        assert rotate(torch.tensor([0, 2, 1, 3]), 4).tolist() == [0, 1, 2, 3]


class TestWholeOrNot:
    def test_a_failure_leaves_nothing(self, tiny: Path, tmp_path: Path) -> None:
        before = sorted(tmp_path.iterdir())

        def stop(done: int, total: int) -> None:
            if done > total // 2:
                raise KeyboardInterrupt

        for to in ("hf", "meta"):
            with pytest.raises(KeyboardInterrupt):
                convert(tiny, tmp_path / "out", to, progress=stop)
        assert sorted(tmp_path.iterdir()) == before

    def test_a_failure_removes_the_folders_that_it_made(self, tiny: Path, tmp_path: Path) -> None:
        (tmp_path / "there").mkdir()
        before = sorted(tmp_path.rglob("*"))

        def stop(done: int, total: int) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            convert(tiny, tmp_path / "there" / "some" / "deep" / "out", "hf", progress=stop)
        assert sorted(tmp_path.rglob("*")) == before
        convert(tiny, tmp_path / "there" / "some" / "deep" / "out", "hf")
        with pytest.raises(KeyboardInterrupt):
            convert(tiny, tmp_path / "there" / "some" / "other" / "out", "hf", progress=stop)
        assert sorted((tmp_path / "there" / "some").iterdir()) == [tmp_path / "there/some/deep"]

    def converting(self, tiny: Path, target: Path, then: str) -> subprocess.Popen[str]:
        """A process that runs a statement when all tensors are written."""
        script = (
            "import os, pathlib, signal, sys, time; "
            "from earlyfusion.checkpoints.convert import convert; "
            "convert(sys.argv[1], pathlib.Path(sys.argv[2]), 'hf', "
            f"progress=lambda done, total: ({then}) if done == total else None)"
        )
        command = [sys.executable, "-c", script, str(tiny), str(target)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def test_sigterm_leaves_nothing(self, tiny: Path, tmp_path: Path) -> None:
        before = sorted(tmp_path.iterdir())
        ends = "os.kill(os.getpid(), signal.SIGTERM)"
        with self.converting(tiny, tmp_path / "out", ends) as process:
            assert process.wait() == 128 + signal.SIGTERM
        assert sorted(tmp_path.iterdir()) == before

    def test_a_handler_of_the_program_stays(self, tiny: Path, tmp_path: Path) -> None:
        recorded: list[int] = []
        before = signal.signal(signal.SIGTERM, lambda number, frame: recorded.append(number))
        try:
            convert(
                tiny,
                tmp_path / "out",
                "hf",
                progress=lambda *_: recorded or os.kill(os.getpid(), signal.SIGTERM),
            )
        finally:
            signal.signal(signal.SIGTERM, before)
        assert recorded == [signal.SIGTERM]
        assert before is signal.SIG_DFL
        assert (tmp_path / "out" / "config.json").is_file()
        convert(tiny, tmp_path / "two", "hf")
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL

    def test_leftovers_go_unless_they_are_in_use(
        self, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        target = tmp_path / "out"
        unrelated, other_machine = tmp_path / ".out.a1b2c3d4", tmp_path / ".out.earlyfusion-0.x"
        for folder in (unrelated, other_machine):
            folder.mkdir()
        with self.converting(tiny, target, "os._exit(9)") as process:
            assert process.wait() == 9
        [dead] = set(tmp_path.glob(".out.*")) - {unrelated, other_machine}
        with self.converting(tiny, target, "print(flush=True), time.sleep(600)") as process:
            try:
                assert process.stdout is not None and process.stdout.readline() == "\n"
                assert not dead.exists()  # the second run took it away
                [alive] = set(tmp_path.glob(".out.*")) - {unrelated, other_machine}
                convert(tiny, target, "hf")
                assert alive.exists()
                assert capsys.readouterr().err == ""
            finally:
                process.kill()
        shutil.rmtree(target)
        convert(tiny, target, "hf")
        assert f"removed {alive}, left by a run that was killed" in capsys.readouterr().err
        assert set(tmp_path.glob(".out.*")) == {unrelated, other_machine}

    def test_the_only_copy_of_a_model_is_not_removed(self, tiny: Path, tmp_path: Path) -> None:
        """Killed between two renames, a save leaves the old model under a hidden name."""
        with new_folder(tmp_path / "out") as partial:
            old = partial.with_name(f"{partial.name}.old")
        shutil.rmtree(tmp_path / "out")
        old.mkdir()
        convert(tiny, tmp_path / "out", "hf")
        assert old.is_dir()
        shutil.rmtree(tmp_path / "out")
        convert(tiny, tmp_path / "out", "hf")
        with new_folder(tmp_path / "out"):
            pass
        assert not old.exists()

    def test_a_killed_conversion_leaves_no_model(self, tiny: Path, tmp_path: Path) -> None:
        script = (
            "import os, pathlib, sys; from earlyfusion.checkpoints.convert import convert; "
            "convert(sys.argv[1], pathlib.Path(sys.argv[2]), 'hf', "
            "progress=lambda done, total: os._exit(9) if done == total else None)"
        )
        target = tmp_path / "out"
        ran = subprocess.run([sys.executable, "-c", script, tiny, target], env=os.environ)
        assert ran.returncode == 9
        assert not target.exists()
        [left] = tmp_path.glob(".out.*")
        with pytest.raises(CheckpointError, match="holds no model"):
            load(left)

    def test_progress_runs_to_the_end(self, tiny: Path, tmp_path: Path) -> None:
        recorded: list[tuple[int, int]] = []
        convert(tiny, tmp_path / "out", "hf", progress=lambda *step: recorded.append(step))
        done, totals = zip(*recorded, strict=True)
        assert list(done) == sorted(done)
        assert set(totals) == {done[-1]}
        assert done[-1] < (tmp_path / "out" / "model.safetensors").stat().st_size


class TestValues:
    """Weights that are NaN or infinite: told by `info`, refused by `convert`."""

    @pytest.fixture
    def broken(self, tiny: Path) -> Path:
        tensors = load_file(tiny / "model.safetensors")
        for name in ("mlp.down_proj", "mlp.up_proj", "self_attn.v_proj"):
            tensors[f"model.layers.0.{name}.weight"][0, 0] = torch.nan
        tensors["model.vqmodel.quant_conv.bias"][:2] = -torch.inf
        save_file(tensors, tiny / "model.safetensors")
        return tiny

    @pytest.mark.parametrize("to", ["hf", "meta"])
    def test_convert_refuses(self, broken: Path, tmp_path: Path, to: str) -> None:
        before = sorted(tmp_path.iterdir())
        words = r"5 values are NaN or infinite \(1 in model\.layers\.0\.\S+, 1 in .*1 more tensor\)"
        with pytest.raises(CheckpointError, match=words):
            convert(broken, tmp_path / "out", to)
        assert sorted(tmp_path.iterdir()) == before
        convert(broken, tmp_path / "out", to, verify=False)
        kept = load(tmp_path / "out").transformer.state_dict()
        assert kept["model.layers.0.mlp.up_proj.weight"].isnan().sum() == 1

    @pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
    def test_floats_of_8_bits_become_bf16(
        self, tiny: Path, tmp_path: Path, dtype: torch.dtype
    ) -> None:
        tensors = load_file(tiny / "model.safetensors")
        name = "model.layers.0.mlp.up_proj.weight"
        tensors[name] = tensors[name].to(dtype)
        save_file(tensors, tiny / "model.safetensors")
        assert main(["info", str(tiny)]) == 0
        convert(tiny, tmp_path / "hf", "hf")
        kept = load_file(tmp_path / "hf" / "model.safetensors")[name]
        assert kept.dtype == torch.bfloat16 and torch.equal(kept.to(dtype), tensors[name])

    @pytest.mark.parametrize("to", ["hf", "meta"])
    def test_floats_of_8_bits_in_meta_s_files_too(
        self, golden: Path, tmp_path: Path, to: str
    ) -> None:
        folder = shutil.copytree(golden / "models" / "tiny_1", tmp_path / "m")
        shutil.copytree(golden / "tokenizer", folder / "tokenizer")
        weights, images = folder / "consolidated.pth", folder / "tokenizer" / "vqgan.ckpt"
        for path, name in ((weights, "norm.weight"), (images, "quant_conv.weight")):
            content = torch.load(path, weights_only=True)
            state = content.get("state_dict", content)
            state[name] = state[name].to(torch.float8_e4m3fn)
            torch.save(content, path)
        assert main(["info", str(folder), "--no-verify"]) == 0
        convert(folder, tmp_path / to, to, verify=False)
        both = [load(path, verify=False) for path in (folder, tmp_path / to)]
        norms = [model.transformer.model.norm.weight for model in both]
        assert norms[0].dtype == torch.bfloat16 and torch.equal(*norms)

    @pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64])
    def test_unknown_dtypes_of_weights_are_refused(
        self, tiny: Path, tmp_path: Path, dtype: torch.dtype
    ) -> None:
        tensors = load_file(tiny / "model.safetensors")
        tensors["model.norm.weight"] = tensors["model.norm.weight"].to(dtype)
        save_file(tensors, tiny / "model.safetensors")
        for read in (lambda: load(tiny), lambda: convert(tiny, tmp_path / "hf", "hf")):
            with pytest.raises(CheckpointError, match=r"holds model\.norm\.weight as torch"):
                read()

    def test_a_dtype_that_is_too_narrow_is_refused(self, tiny: Path, tmp_path: Path) -> None:
        tensors = load_file(tiny / "model.safetensors")
        tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = 70_000
        save_file(tensors, tiny / "model.safetensors")
        with pytest.raises(CheckpointError, match=r"float16 is too narrow for .*1 value is NaN or"):
            convert(tiny, tmp_path / "out", "hf", dtype=torch.float16)
        convert(tiny, tmp_path / "out", "hf", dtype=torch.bfloat16)

    def test_info_reports_them(
        self, broken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["info", str(broken)]) == 0
        [line] = [x for x in capsys.readouterr().out.splitlines() if x.startswith("finite")]
        assert "no: 5 values are NaN or infinite" in line
        assert main(["info", str(broken), "--no-verify"]) == 0
        assert "finite" not in capsys.readouterr().out
        assert main(["convert", str(broken), str(tmp_path / "out"), "--to", "hf"]) == 2
        assert "--no-verify" in capsys.readouterr().err
        assert main(["info", "mini", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["finite"] == "yes"

    def test_only_the_image_tokenizer(self, tiny: Path) -> None:
        tensors = load_file(tiny / "model.safetensors")
        tensors["model.vqmodel.quant_conv.bias"][0] = torch.nan
        save_file(tensors, tiny / "model.safetensors")
        sentence = "no: 1 value is NaN or infinite (1 in model.vqmodel.quant_conv.bias)"
        assert summarize(tiny).finite == sentence


class TestChecklists:
    @pytest.fixture
    def meta(self, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        convert(tiny, tmp_path / "meta", "meta")
        return tmp_path / "meta"

    def flip(self, path: Path) -> None:
        """Another last bit of a weight: whatever does not sum the file takes it."""
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)

    @pytest.mark.parametrize("name", ["consolidated.pth", "tokenizer/vqgan.ckpt"])
    def test_a_flipped_bit(
        self, meta: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        self.flip(meta / name)
        message = rf"{Path(name).name} is not what checklist\.chk says.*--no-verify"
        with pytest.raises(CheckpointError, match=message):
            Chameleon.load(meta)
        with pytest.raises(CheckpointError, match=message):
            convert(meta, tmp_path / "out", "hf")
        assert Chameleon.load(meta, verify=False).config.hidden_size == CONFIG.hidden_size
        convert(meta, tmp_path / "out", "hf", verify=False)
        requests = [
            "generate",
            "Hello",
            "--output",
            "text",
            "--max-tokens",
            "1",
            "--model",
            str(meta),
        ]
        chat = ["chat", "--output", "text", "--max-tokens", "1", "--model", str(meta)]
        for command in (["info", str(meta)], requests, chat):
            assert main(command) == 2
            assert "checklist.chk" in capsys.readouterr().err
        assert main(["info", str(meta), "--no-verify"]) == 0
        assert main([*requests, "--no-verify"]) == 0

    def test_an_added_image_tokenizer_is_verified_too(
        self, tiny: Path, meta: Path, tmp_path: Path
    ) -> None:
        self.flip(meta / "tokenizer" / "vqgan.ckpt")
        for path in (meta, meta / "tokenizer", meta / "tokenizer" / "vqgan.ckpt"):
            with pytest.raises(CheckpointError, match=r"vqgan\.ckpt is not what"):
                convert(tiny, tmp_path / "out", "hf", image_tokenizer=path)

    def test_large_files_are_hashed_once(
        self, meta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        hashed: list[str] = []
        md5 = checklist._md5

        def recording_md5(path: Path) -> str:
            hashed.append(path.name)
            return md5(path)

        monkeypatch.setattr(checklist, "_md5", recording_md5)
        monkeypatch.setattr(checklist, "_MIN_CACHED_BYTES", 100_000)
        load(meta)
        assert "consolidated.pth" in hashed and "params.json" in hashed
        hashed.clear()
        load(meta)
        assert "params.json" in hashed and "consolidated.pth" not in hashed
        weights = meta / "consolidated.pth"
        self.flip(weights)
        with pytest.raises(CheckpointError, match="is not what"):
            load(meta)
        assert "consolidated.pth" in hashed
        (tmp_path / "cache" / "earlyfusion" / "checklists.json").write_text("[")
        self.flip(weights)
        assert load(meta).config.hidden_size == CONFIG.hidden_size

    def test_a_cache_that_cannot_be_written(
        self, meta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "file").touch()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        monkeypatch.setattr(checklist, "_MIN_CACHED_BYTES", 0)
        assert load(meta).config.hidden_size == CONFIG.hidden_size


class TestMistakes:
    def test_a_folder_in_use(self, tiny: Path, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"tiny is there already: choose another"):
            convert(tiny, tiny, "hf")

    def test_a_target_that_is_a_file_or_empty(self, tiny: Path, tmp_path: Path) -> None:
        file, empty = tmp_path / "file", tmp_path / "empty"
        file.write_text("mine")
        empty.mkdir()
        with pytest.raises(CheckpointError, match="file is there already"):
            convert(tiny, file, "hf")
        assert file.read_text() == "mine"
        convert(tiny, empty, "hf")
        assert_same_model(load(empty), load(tiny))

    def test_a_disk_that_fills_up(
        self, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = sorted(tmp_path.iterdir())

        def fill(done: int, total: int) -> None:
            raise OSError(errno.ENOSPC, "no room")

        with pytest.raises(CheckpointError, match=r"out cannot be written \(No space left"):
            convert(tiny, tmp_path / "out", "hf", progress=fill)
        assert sorted(tmp_path.iterdir()) == before

    @pytest.mark.parametrize(
        ("to", "options", "sentence"),
        [
            ("hf", {"shards": 0}, "shards=0 is not possible"),
            ("hf", {"shards": 5000}, "5000 files cannot hold"),
            ("gguf", {}, "to='gguf' is unknown: use one of hf, meta"),
            ("meta", {"shards": 3}, r"3 shards are not possible.*choose 1 or 2$"),
            ("meta", {"image_tokenizer": Path("nowhere")}, "no model folder nowhere"),
        ],
    )
    def test_options(
        self, tiny: Path, tmp_path: Path, to: Any, options: dict[str, Any], sentence: str
    ) -> None:
        with pytest.raises((CheckpointError, SettingError), match=sentence):
            convert(tiny, tmp_path / "out", to, **options)
        assert not (tmp_path / "out").exists()

    def test_norms_that_a_merged_file_cannot_hold(self, golden: Path, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"1 shards are not possible.*; choose 2$"):
            convert(golden / "models" / "tiny_mp2_swin_gqa", tmp_path / "out", "meta", shards=1)

    def test_norms_that_no_file_can_hold(self, tiny: Path, tmp_path: Path) -> None:
        self.rewrite(tiny, lambda tensors: tensors[NORM].copy_(torch.rand(4, 8)))
        with pytest.raises(CheckpointError, match="QK-norms that differ"):
            convert(tiny, tmp_path / "out", "meta")

    @pytest.mark.parametrize(
        ("change", "name"),
        [
            ({"mlp_bias": True}, "mlp_bias"),
            ({"attention_bias": True}, "attention_bias"),
            ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling"),
            ({"hidden_act": "gelu"}, "hidden_act=gelu"),
        ],
    )
    def test_meta_s_format_cannot_hold_everything(
        self, tmp_path: Path, change: dict[str, Any], name: str
    ) -> None:
        save_tiny(tmp_path / "other", **change)
        with pytest.raises(CheckpointError, match=f"no place for {name}: convert to hf"):
            convert(tmp_path / "other", tmp_path / "out", "meta")

    def test_another_activation_is_kept(self, tmp_path: Path) -> None:
        save_tiny(tmp_path / "gelu", hidden_act="gelu")
        convert(tmp_path / "gelu", tmp_path / "copy", "hf")
        assert json.loads((tmp_path / "copy/config.json").read_text())["hidden_act"] == "gelu"

    def test_keys_are_checked_before_writing(self, tiny: Path, tmp_path: Path) -> None:
        self.rewrite(tiny, lambda tensors: tensors.pop(NORM))
        with pytest.raises(CheckpointError, match=rf"lacks the key {NORM}"):
            convert(tiny, tmp_path / "out", "hf")

    def test_a_file_unlike_its_checklist(self, golden: Path, tmp_path: Path) -> None:
        folder = tmp_path / "models" / "tiny"
        shutil.copytree(golden / "models" / "tiny_1", folder)
        (tmp_path / "tokenizer").symlink_to(golden.absolute() / "tokenizer")
        state = torch.load(folder / "consolidated.pth", weights_only=True)
        state["norm.weight"] += 1
        torch.save(state, folder / "consolidated.pth")
        with pytest.raises(CheckpointError, match=r"consolidated\.pth is not what checklist\.chk"):
            convert(folder, tmp_path / "out", "hf")

    def test_a_full_disk(self, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 0))
        with pytest.raises(CheckpointError, match=r"needs 1\.1 MB and the disk has 0 bytes left"):
            convert(tiny, tmp_path / "out", "hf")

    def test_a_parent_that_cannot_be_written_to(self, tiny: Path, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        for target in (Path("/proc/models/out"), tmp_path / "file" / "out"):
            with pytest.raises(CheckpointError, match=rf"{target} cannot be written \("):
                convert(tiny, target, "hf")

    @pytest.mark.parametrize("count", [9, 12_300, 1_100_000, 14_200_000_000])
    def test_sizes_in_words(self, count: int) -> None:
        words = {9: "9 bytes", 12_300: "12.3 kB", 1_100_000: "1.1 MB", 14_200_000_000: "14.2 GB"}
        assert _size_text(count) == words[count]

    @pytest.mark.parametrize("to", ["hf", "meta"])
    @pytest.mark.parametrize(
        ("text", "sentence"),
        [
            ("{}", "no model.vocab"),
            ("[]", "is not a JSON object"),
            ('{"model": {"type": "BPE", "vocab": {}, "merges": []}}', "has no token <s>"),
            ("mini", "4,096 tokens and the model knows"),
        ],
    )
    def test_an_unusable_tokenizer(
        self, tiny: Path, tmp_path: Path, to: Any, text: str, sentence: str
    ) -> None:
        other = (locate("mini") / "tokenizer.json").read_text()
        (tiny / "tokenizer.json").write_text(other if text == "mini" else text)
        before = sorted(tmp_path.iterdir())
        with pytest.raises(CheckpointError, match=sentence):
            convert(tiny, tmp_path / "out", to, progress=lambda *_: pytest.fail("written"))
        assert sorted(tmp_path.iterdir()) == before
        with pytest.raises(CheckpointError, match=sentence):
            summarize(tiny)
        with pytest.raises(CheckpointError, match=sentence):
            load(tiny)

    def test_codes_of_another_tokenizer(self, tiny: Path, tmp_path: Path) -> None:
        text = train_tokenizer(["a"], 32, CONFIG.vocab_size)
        (tiny / "tokenizer.json").write_text(text)
        with pytest.raises(CheckpointError, match="names 32 image codes and the model has 64"):
            convert(tiny, tmp_path / "out", "hf")

    def test_added_words_stay_words(self, tiny: Path, tmp_path: Path) -> None:
        """A word of `added_tokens` is one token here, in copies, and in transformers' tokenizer."""
        data = json.loads(train_tokenizer(["a"], CONFIG.vq_config.num_embeddings, 400))
        token = 1 + max(data["model"]["vocab"].values())
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        data["added_tokens"].append(
            {"id": token, "content": "사과나무"} | flags | {"special": False}
        )
        (tiny / "tokenizer.json").write_text(json.dumps(data))
        convert(tiny, tmp_path / "meta", "meta")
        convert(tmp_path / "meta", tmp_path / "hf", "hf")
        from transformers import AutoTokenizer

        for folder in (tiny, tmp_path / "meta", tmp_path / "hf"):
            processor = load(folder).processor
            ids = processor.encode_text("a 사과나무.")
            assert ids.count(token) == 1
            assert processor.decode_text(ids) == "a 사과나무."
            assert token in processor.vocabulary.text_tokens
        stock = AutoTokenizer.from_pretrained(tmp_path / "hf")
        assert stock("a 사과나무.", add_special_tokens=False)["input_ids"] == ids

    def test_ids_of_a_tokenizer_in_another_order(self, tiny: Path, tmp_path: Path) -> None:
        data = json.loads((tiny / "tokenizer.json").read_text())
        vocab = data["model"]["vocab"]
        new_ids = {"<s>": vocab["</s>"], "</s>": vocab["<pad>"], "<pad>": vocab["<s>"]}
        vocab |= new_ids
        for entry in data["added_tokens"]:
            entry["id"] = new_ids.get(entry["content"], entry["id"])
        (tiny / "tokenizer.json").write_text(json.dumps(data))
        convert(tiny, tmp_path / "meta", "meta")
        convert(tmp_path / "meta", tmp_path / "hf", "hf")
        config = load(tmp_path / "hf").config
        ids = (config.bos_token_id, config.eos_token_id, config.pad_token_id)
        assert ids == (new_ids["<s>"], new_ids["</s>"], new_ids["<pad>"])

    def test_card_and_notices_are_copied(self, tiny: Path, tmp_path: Path) -> None:
        papers = {"README.md": "# Tiny", "NOTICE.md": "Made of", "LICENSE": "Apache"}
        for name, text in papers.items():
            (tiny / name).write_text(text)
        (tiny / "notes.md").write_text("mine")
        convert(tiny, tmp_path / "meta", "meta")
        convert(tmp_path / "meta", tmp_path / "hf", "hf")
        for copy in ("meta", "hf"):
            assert {n: (tmp_path / copy / n).read_text() for n in papers} == papers
            assert not (tmp_path / copy / "notes.md").exists()
        (tmp_path / "meta" / "README.md").write_text("# Mine")
        assert load(tmp_path / "meta").config.hidden_size == CONFIG.hidden_size

    def test_shards_that_are_possible(self, tmp_path: Path) -> None:
        convert("mini", tmp_path / "meta", "meta")
        assert len(shards_of(tmp_path / "meta")) == 4

    def rewrite(self, folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")


NORM = "model.layers.0.self_attn.q_norm.weight"


class TestImageTokenizers:
    @pytest.fixture
    def without_vqgan(self, tiny: Path, tmp_path: Path) -> Path:
        """The model without any VQ-GAN, as Lumina's files are."""
        return self.without(tiny, tmp_path / "bare", "model.vqmodel.")

    def without(self, folder: Path, target: Path, prefix: str) -> Path:
        shutil.copytree(folder, target)
        tensors = load_file(folder / "model.safetensors")
        tensors = {k: v for k, v in tensors.items() if not k.startswith(prefix)}
        save_file(tensors, target / "model.safetensors")
        return target

    def test_without_one_text_works(self, without_vqgan: Path) -> None:
        model = Chameleon.load(without_vqgan)
        assert model.generate("Hello", output="text", seed=0).usage.completion_tokens > 0
        assert not model.can_draw
        with pytest.raises(CheckpointError, match="no VQ decoder"):
            model.generate("Draw.", output="image")
        image = Image.from_array(np.zeros((16, 16, 3), dtype=np.uint8))
        with pytest.raises(CheckpointError, match=r"no image tokenizer.*--image-tokenizer"):
            model.generate(["What?", image], output="text")
        with pytest.raises(CheckpointError, match="no image tokenizer"):
            model.image_tokenizer.decode(torch.zeros(1, 8, 8, dtype=torch.int64))
        assert summarize(without_vqgan).parameters["image_tokenizer"] == 0
        assert model.to("cpu").image_tokenizer.device.type == "cpu"
        assert not model.image_tokenizer.vqgan.state_dict()

    def test_saved_again_it_still_has_none(self, without_vqgan: Path, tmp_path: Path) -> None:
        loaded = load(without_vqgan)
        text = (without_vqgan / "tokenizer.json").read_text()
        save_hf(tmp_path / "again", loaded.transformer, loaded.vqgan, text, {})
        assert not any("vqmodel" in n for n in load_file(tmp_path / "again" / "model.safetensors"))

    def test_one_is_added(self, tiny: Path, without_vqgan: Path, tmp_path: Path) -> None:
        convert(tiny, tmp_path / "meta", "meta")
        sources = [
            tiny,
            tmp_path / "meta",
            tmp_path / "meta" / "tokenizer",
            tmp_path / "meta" / "tokenizer" / "vqgan.ckpt",
        ]
        for number, source in enumerate(sources):
            target = tmp_path / f"whole-{number}"
            convert(without_vqgan, target, "hf", image_tokenizer=source)
            assert_same_model(load(target), load(tiny))

    def test_a_decoder_is_added(self, tiny: Path, tmp_path: Path) -> None:
        half = self.without(tiny, tmp_path / "half", "model.vqmodel.decoder.")
        convert(half, tmp_path / "still", "hf")
        assert not load(tmp_path / "still").can_draw
        convert(half, tmp_path / "whole", "hf", image_tokenizer=tiny)
        assert_same_model(load(tmp_path / "whole"), load(tiny))
        with pytest.raises(CheckpointError, match=r"whole image tokenizer.*--image-tokenizer"):
            convert(half, tmp_path / "meta", "meta")

    def test_another_codebook_is_refused(self, tiny: Path, tmp_path: Path, golden: Path) -> None:
        other = tmp_path / "strange"
        shutil.copytree(tiny, other)
        tensors = load_file(other / "model.safetensors")
        tensors["model.vqmodel.quantize.embedding.weight"] += 1
        save_file(tensors, other / "model.safetensors")
        with pytest.raises(CheckpointError, match="their codebooks differ"):
            convert(tiny, tmp_path / "out", "hf", image_tokenizer=other)

    def test_a_codebook_of_another_shape_is_refused(self, tiny: Path, tmp_path: Path) -> None:
        narrower = replace(CONFIG.vq_config, embed_dim=CONFIG.vq_config.embed_dim // 2)
        save_tiny(tmp_path / "narrow", vq_config=narrower)
        with pytest.raises(CheckpointError, match="their codebooks differ"):
            convert(tiny, tmp_path / "out", "hf", image_tokenizer=tmp_path / "narrow")

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"num_embeddings": 32}, "makes 8 x 8 codes of 32,"),
            ({"channel_multiplier": (1, 2, 2)}, "makes 4 x 4 codes of 64,"),
        ],
    )
    def test_other_codes_are_refused(
        self, without_vqgan: Path, tmp_path: Path, change: dict[str, Any], words: str
    ) -> None:
        save_tiny(tmp_path / "other", vq_config=replace(CONFIG.vq_config, **change))
        with pytest.raises(CheckpointError, match=words):
            convert(without_vqgan, tmp_path / "out", "hf", image_tokenizer=tmp_path / "other")

    def test_a_model_without_an_image_tokenizer_has_none_to_copy(
        self, tiny: Path, without_vqgan: Path, tmp_path: Path
    ) -> None:
        with pytest.raises(CheckpointError, match="bare holds no image tokenizer"):
            convert(tiny, tmp_path / "out", "hf", image_tokenizer=without_vqgan)

    def test_another_size_is_refused(
        self, without_vqgan: Path, tmp_path: Path, golden: Path
    ) -> None:
        with pytest.raises(CheckpointError, match=r"makes 1 x 1 codes of 512.*expects 8 x 8 of 64"):
            convert(without_vqgan, tmp_path / "out", "hf", image_tokenizer=golden / "tokenizer")


class TestAnole:
    """Its fork of transformers has one QK-norm per layer and Meta's order of rotary pairs."""

    def early_fork(self, tiny: Path, folder: Path) -> Path:
        shutil.copytree(tiny, folder)
        (folder / "model.safetensors").unlink()
        tensors = {}
        for name, value in load_file(tiny / "model.safetensors").items():
            if "q_proj" in name or "k_proj" in name:
                value = rotate(value, CONFIG.head_dim)
            if "q_norm" in name or "k_norm" in name:
                value = rotate(value[0], CONFIG.head_dim)
            tensors[name] = value
        torch.save(tensors, folder / "pytorch_model.bin")
        return folder

    def test_its_names_and_order(self, tiny: Path, tmp_path: Path) -> None:
        tensors = load_file(tiny / "model.safetensors")
        for name, value in tensors.items():
            if "_norm.weight" in name or "_norm.bias" in name:
                value.copy_(torch.rand(value.shape[-1], generator=torch.Generator().manual_seed(1)))
        save_file(tensors, tiny / "model.safetensors")
        folder = self.early_fork(tiny, tmp_path / "early")
        assert detect(folder) == "anole"
        assert_same_model(load(folder), load(tiny))
        convert(folder, tmp_path / "hf", "hf")
        assert detect(tmp_path / "hf") == "hf"
        assert_same_model(load(tmp_path / "hf"), load(tiny))

    def test_heads_of_another_width(self, tiny: Path, tmp_path: Path) -> None:
        folder = self.early_fork(tiny, tmp_path / "early")
        data = json.loads((folder / "config.json").read_text()) | {"num_attention_heads": 8}
        (folder / "config.json").write_text(json.dumps(data))
        with pytest.raises(CheckpointError, match=r"wrong shapes|another width"):
            load(folder)

    def test_its_export_names_no_frequencies(self, golden: Path, tmp_path: Path) -> None:
        folder = tmp_path / "models" / "anole"
        shutil.copytree(golden / "models" / "tiny_1", folder)
        (folder / "checklist.chk").unlink()
        (tmp_path / "tokenizer").symlink_to(golden.absolute() / "tokenizer")
        state = torch.load(folder / "consolidated.pth", weights_only=True)
        torch.save(state | {"rope.freqs": None}, folder / "consolidated.pth")
        assert_same_model(load(folder), load(golden / "models" / "tiny_1"))
        convert(folder, tmp_path / "again", "meta")
        assert_same_shards(tmp_path / "again", golden / "models" / "tiny_1")


class TestLumina:
    @pytest.fixture
    def folder(self, tiny: Path, tmp_path: Path) -> Path:
        """A folder as Lumina's: no VQ-GAN, no tokenizer, one QK-norm for all heads."""
        folder = tmp_path / "lumina"
        folder.mkdir()
        data = json.loads((tiny / "config.json").read_text())
        data["architectures"] = ["ChameleonXLLMXForConditionalGeneration"]
        (folder / "config.json").write_text(json.dumps(data))
        tensors = load_file(tiny / "model.safetensors")
        tensors = {k: v for k, v in tensors.items() if "vqmodel" not in k}
        tensors = {k: v[:1] if "q_norm" in k or "k_norm" in k else v for k, v in tensors.items()}
        save_file({k: v.clone() for k, v in tensors.items()}, folder / "model.safetensors")
        return folder

    @pytest.fixture
    def tokenizer(self, tiny: Path, tmp_path: Path) -> Path:
        """Meta's tokenizer folder with the reserved tokens that Lumina spells sizes with."""
        convert(tiny, tmp_path / "meta", "meta")
        path = tmp_path / "meta" / "tokenizer" / "text_tokenizer.json"
        data = json.loads(path.read_text())
        first = max(data["model"]["vocab"].values()) + 1
        for number, name in enumerate(("<reserved08799>", "<reserved08804>")):
            token = {"id": first + number, "content": name, "special": True}
            data["model"]["vocab"][name] = first + number
            flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            data["added_tokens"].append(token | flags)
        path.write_text(json.dumps(data))
        (path.parent / "checklist.chk").unlink()
        return path.parent

    @pytest.mark.parametrize(("grid", "tokens"), [(32, 1060), (48, 2356), (64, 4164)])
    def test_its_images_are_longer(self, grid: int, tokens: int) -> None:
        image_layout = layout(grid)
        assert image_layout.num_tokens == tokens
        assert image_layout.head[1:] == (f"<reserved0{8800 + grid // 2}>",) * 2

    def test_an_odd_grid_has_no_size_token(self) -> None:
        with pytest.raises(CheckpointError, match="7 x 7 codes has no size token"):
            layout(7)

    def test_with_all_parts_it_generates_images(
        self, folder: Path, tokenizer: Path, tmp_path: Path
    ) -> None:
        assert detect(folder) == "lumina"
        with pytest.raises(CheckpointError, match=r"tokenizer\.json is missing.*--tokenizer"):
            load(folder)
        full = tmp_path / "whole"
        convert(folder, full, "hf", tokenizer=tokenizer, image_tokenizer=tokenizer)
        assert detect(full) == "lumina"
        model = Chameleon.load(full)
        assert model.processor.layout == layout(8)
        assert model.defaults["chameleon"]["image"]["top_k"] == 2000
        reply = model.generate("Draw.", output="image", seed=0)
        assert reply.images[0].size == (16, 16)
        assert reply.usage.completion_tokens == 8 * 9 + 4
        ids = model.processor.layout.spell(np.zeros((8, 8), int), model.processor.vocabulary)
        names = {i: name for name, i in model.processor.vocabulary.names.items()}
        tokens = [names[i] for i in ids]
        assert tokens[:3] == ["<racm3:break>", "<reserved08804>", "<reserved08804>"]
        assert tokens[11::9] == ["<reserved08799>"] * 8
        assert tokens[-1] == "<eoss>"

    def test_the_parts_are_found_in_the_folder_around_tokenizer(
        self, folder: Path, tokenizer: Path, tmp_path: Path
    ) -> None:
        around = tmp_path / "data"
        shutil.copytree(tokenizer, around / "tokenizer")
        convert(folder, tmp_path / "a", "hf", tokenizer=around, image_tokenizer=around)
        convert(folder, tmp_path / "b", "hf", tokenizer=tokenizer, image_tokenizer=tokenizer)
        assert_same_model(load(tmp_path / "a"), load(tmp_path / "b"))

    def test_meta_s_format_cannot_hold_its_layout(
        self, folder: Path, tokenizer: Path, tmp_path: Path
    ) -> None:
        with pytest.raises(CheckpointError, match="no place for the size tokens of Lumina"):
            convert(folder, tmp_path / "m", "meta", tokenizer=tokenizer, image_tokenizer=tokenizer)


def tensors_of(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def config_of(folder: Path, **changes: Any) -> None:
    data = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(data | changes))


def truncate(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


EXTRA = {"extra.weight": torch.zeros(1)}
DAMAGE: dict[str, Callable[[Path], object]] = {
    "weights truncated": lambda f: truncate(f / "model.safetensors", 900_000),
    "weights empty": lambda f: truncate(f / "model.safetensors", 0),
    "weights of noise": lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 4096),
    "no weights": lambda f: (f / "model.safetensors").unlink(),
    "no such shard": lambda f: (f / "model.safetensors.index.json").write_text(
        '{"weight_map": {"lm_head.weight": "model-2.safetensors"}}'
    ),
    "a key is missing": lambda f: tensors_of(f, lambda t: t.pop(NORM)),
    "a key too many": lambda f: tensors_of(f, lambda t: t.update(EXTRA)),
    "a key of another shape": lambda f: tensors_of(
        f, lambda t: t.update({NORM: t[NORM].flatten()})
    ),
    "no VQ weights but one": lambda f: tensors_of(
        f, lambda t: [t.pop(n) for n in [*t] if "vqmodel.encoder" in n]
    ),
    "config is no JSON": lambda f: truncate(f / "config.json", 100),
    "config is a list": lambda f: (f / "config.json").write_text("[]"),
    "no config": lambda f: (f / "config.json").unlink(),
    "more layers": lambda f: config_of(f, num_hidden_layers=9),
    "fewer layers": lambda f: config_of(f, num_hidden_layers=1),
    "other heads": lambda f: config_of(f, num_attention_heads=3),
    "another width": lambda f: config_of(f, hidden_size=64),
    "another vocabulary": lambda f: config_of(f, vocab_size=77),
    "no tokenizer": lambda f: (f / "tokenizer.json").unlink(),
    "tokenizer is no JSON": lambda f: truncate(f / "tokenizer.json", 1000),
    "tokenizer is empty": lambda f: (f / "tokenizer.json").write_text("{}"),
    "settings are no JSON": lambda f: truncate(f / "generation_config.json", 3),
    "processor is no JSON": lambda f: truncate(f / "processor_config.json", 3),
}
META_DAMAGE: dict[str, Callable[[Path], object]] = {
    "shard truncated": lambda f: truncate(f / "consolidated.00.pth", 5000),
    "first shard missing": lambda f: (f / "consolidated.00.pth").unlink(),
    "second shard missing": lambda f: (f / "consolidated.01.pth").unlink(),
    "params are no JSON": lambda f: truncate(f / "params.json", 9),
    "params are empty": lambda f: (f / "params.json").write_text("{}"),
    "no VQ weights": lambda f: (f / "tokenizer" / "vqgan.ckpt").unlink(),
    "VQ config is no YAML": lambda f: (f / "tokenizer" / "vqgan.yaml").write_text("{"),
    "no tokenizer": lambda f: shutil.rmtree(f / "tokenizer"),
    "a file unlike its checklist": lambda f: (f / "consolidate_params.json").write_text(
        (f / "consolidate_params.json").read_text() + "\n"
    ),
}


class TestDamage:
    """A damaged model gives one sentence and exit code 2, and no copy of it appears."""

    def assert_refused(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        target = folder.parent / "copy"
        load = ["generate", "Hello", "--output", "text", "--max-tokens", "1", "--model"]
        for command in (
            ["info", str(folder)],
            ["convert", str(folder), str(target), "--to", "hf"],
            [*load, str(folder)],
        ):
            assert main(command) == 2, command
            out, err = capsys.readouterr()
            assert out == ""
            assert err.startswith("Error: ")
            assert err.count("\n") == 1
        assert [*folder.parent.glob("*copy*")] == []

    @pytest.mark.parametrize("kind", DAMAGE)
    def test_transformers_layout(
        self, tiny: Path, kind: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        DAMAGE[kind](tiny)
        self.assert_refused(tiny, capsys)

    @pytest.mark.parametrize("kind", META_DAMAGE)
    def test_meta_s_layout(
        self, tiny: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        convert(tiny, tmp_path / "meta", "meta", shards=2)
        META_DAMAGE[kind](tmp_path / "meta")
        self.assert_refused(tmp_path / "meta", capsys)


class TestCommand:
    def test_hf_to_meta_to_hf(
        self, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        meta, again = str(tmp_path / "meta"), str(tmp_path / "back")
        arguments = ["convert", str(tiny), meta, "--to", "meta", "--shards", "2", "--json"]
        assert main(arguments) == 0
        result = json.loads(capsys.readouterr().out)
        assert result["layout"] == "meta"
        assert {"consolidated.00.pth", "consolidated.01.pth", "tokenizer/vqgan.ckpt"} <= set(
            result["file_bytes"]
        )
        assert main(["convert", meta, again, "--to", "hf", "--dtype", "float32"]) == 0
        assert "model.safetensors" in capsys.readouterr().out
        assert_same_model(load(Path(again)), load(tiny))

    def test_a_mistake_is_a_sentence(
        self, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["convert", str(tiny), str(tmp_path / "m"), "--to", "gguf"]) == 2
        assert main(["convert", str(tiny), str(tiny), "--to", "hf"]) == 2
        errors = capsys.readouterr().err.splitlines()
        assert len(errors) == 2
        assert "is there already" in errors[1]
