from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from corpora import jsonl, pairs, png, tiny_model
from tiny import CONFIG

from earlyfusion import Chameleon
from earlyfusion.checkpoints import detect
from earlyfusion.checkpoints.hf import save_hf
from earlyfusion.cli import main
from earlyfusion.config import PRESETS
from earlyfusion.content import Image
from earlyfusion.data.corpus import CorpusConfig, open_corpus
from earlyfusion.data.encoding import DocumentSplitter, EncodingSettings, fingerprints
from earlyfusion.data.rows import RowSettings
from earlyfusion.data.shard_maker import Job
from earlyfusion.data.shards import TokenShards
from earlyfusion.data.tokenize import tokenize
from earlyfusion.errors import CheckpointError, DataError, SettingError
from earlyfusion.image_tokenizer import ImageTokenizer
from earlyfusion.model.transformer import Transformer
from earlyfusion.parallel import ParallelConfig
from earlyfusion.recipes.finetune import FinetuneConfig, prepare_model
from earlyfusion.recipes.finetune import config as recipe
from earlyfusion.recipes.finetune_7b import config as full
from earlyfusion.recipes.image_head_7b import config as head
from earlyfusion.recipes.lora_7b import config as low_rank
from earlyfusion.recipes.run import override, plan, run
from earlyfusion.train import checkpoint, lora
from earlyfusion.train.monitor import read_metrics
from earlyfusion.train.optim import learning_rate
from earlyfusion.train.plan import Job as PlanJob
from earlyfusion.train.plan import line, parameters_of_block, trained_parameters
from earlyfusion.train.trainer import RunConfig


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    path = pairs(folder, 8)
    messages = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]
    path.write_text(path.read_text() + json.dumps({"messages": messages}) + "\n{broken\n")
    return path


def finetune(model: Path, data: Path | str, out: Path, *more: str) -> dict[str, torch.Tensor]:
    """Run the recipe for 4 steps; the weights it leaves."""
    small = ["steps=4", "length=100", "lr=1e-2", "warmup_steps=1", "log_every=1", "save_every=2"]
    run("finetune", [f"data={data}", f"model={model}", f"out={out}", "max_broken=1", *small, *more])
    return weights(out / "model")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return detect.load(folder).transformer.state_dict()


def losses(out: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(out)]


def test_finetuning_ends_in_a_model_that_answers_and_generates_images(
    model: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    device: torch.device,
) -> None:
    before = weights(model)
    after = finetune(model, data, tmp_path / "out", f"device={device}")
    assert all(not torch.equal(before[name], after[name]) for name in before if "proj" in name)
    tuned = Chameleon.load(str(tmp_path / "out" / "model"), device=str(device))
    assert len(tuned.generate("Draw a pear.", output="image", seed=0).images) == 1
    assert losses(tmp_path / "out")[-1] < losses(tmp_path / "out")[0]
    assert list((tmp_path / "out" / "samples").glob("*.png")), "prompts of the data are drawn"
    filed = (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()
    assert [json.loads(line)["row"] for line in filed] == [10]
    assert "broken rows: 1, see" in capsys.readouterr().err
    vq, tuned_vq = (detect.load(f).vqgan.state_dict() for f in (model, tmp_path / "out" / "model"))
    assert all(torch.equal(vq[name], tuned_vq[name]) for name in vq)


def test_shards_and_rows_train_the_same_and_a_stopped_run_goes_on(
    model: Path, data: Path, tmp_path: Path
) -> None:
    job = Job((str(data),), tmp_path / "shards", model, rows=RowSettings(max_broken=1.0))
    tokenize(job)
    uninterrupted = finetune(model, data, tmp_path / "rows", "workers=0")
    sharded = finetune(model, tmp_path / "shards", tmp_path / "sharded", "workers=3")
    assert losses(tmp_path / "rows") == losses(tmp_path / "sharded")
    finetune(model, data, tmp_path / "part", "stop_after=2", "workers=0")
    resumed = finetune(model, data, tmp_path / "part", "workers=2")
    assert losses(tmp_path / "part") == losses(tmp_path / "rows")
    for name, tensor in uninterrupted.items():
        assert torch.equal(tensor, sharded[name]) and torch.equal(tensor, resumed[name])


def test_other_data_in_the_same_folder_are_refused(model: Path, data: Path, tmp_path: Path) -> None:
    finetune(model, data, tmp_path / "out", "stop_after=2")
    other = jsonl(tmp_path / "other.jsonl", [{"text": "Other words."}])
    with pytest.raises(DataError, match=r"not what .* began with"):
        finetune(model, other, tmp_path / "out")


def test_only_the_image_rows_of_the_head_change(model: Path, data: Path, tmp_path: Path) -> None:
    loaded = detect.load(model)
    images = torch.from_numpy(loaded.processor.vocabulary.image_tokens)
    with torch.no_grad():
        loaded.transformer.lm_head.weight[images] = 0
    locked = tmp_path / "locked"
    tokenizer = loaded.processor.tokenizer_file.read_text()
    save_hf(locked, loaded.transformer, loaded.vqgan, tokenizer, {"chameleon": {}})
    before = weights(locked)
    after = finetune(locked, data, tmp_path / "out", "trainable=image_head", "weight_decay=0.5")
    assert before.keys() == after.keys()
    head = "lm_head.weight"
    changed = (before[head] != after[head]).any(1)
    assert set(changed.nonzero()[:, 0].tolist()) <= set(images.tolist())
    assert changed[images].float().mean() > 0.5 and not before[head][images].any()
    for name in before.keys() - {head}:
        assert torch.equal(before[name], after[name]), name
    _, state = checkpoint.load(tmp_path / "out")
    assert state["step"] == 4
    tensors, _ = checkpoint.load(tmp_path / "out")
    sizes = [s["exp_avg"].shape for s in tensors["optimizer"]["state"].values()]
    assert sizes == [(len(images), CONFIG.hidden_size)]


def lively(model: Transformer) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith("lora_b"):
            torch.nn.init.normal_(parameter, std=0.2)


def test_an_adapter_begins_as_nothing_and_merges_into_the_same_model(model: Path) -> None:
    transformer = detect.load(model).transformer.double()
    names = set(transformer.state_dict())
    tokens = torch.randint(0, CONFIG.vocab_size, (2, 17))
    plain = transformer(tokens)
    lora.adapt(transformer, rank=3)
    trained = {n for n, p in transformer.named_parameters() if p.requires_grad}
    assert len(trained) == CONFIG.num_hidden_layers * 7 * 2
    assert all(".lora_" in name for name in trained)
    torch.testing.assert_close(transformer(tokens), plain, rtol=0, atol=0)
    lively(transformer)
    adapted = transformer(tokens)
    assert not torch.allclose(adapted, plain)
    lora.merge(transformer)
    assert set(transformer.state_dict()) == names
    torch.testing.assert_close(transformer(tokens), adapted, rtol=1e-5, atol=1e-5)


def test_an_adapter_computes_w_plus_its_scaled_product() -> None:
    linear = torch.nn.Linear(6, 5).double()
    adapted = lora.AdaptedLinear(linear, rank=2, alpha=6.0)
    torch.nn.init.normal_(adapted.lora_b)
    x = torch.randn(4, 6, dtype=torch.double)
    weight = linear.weight + 3.0 * adapted.lora_b @ adapted.lora_a
    torch.testing.assert_close(adapted(x), x @ weight.T + linear.bias)
    wide = lora.AdaptedLinear(torch.nn.Linear(400, 5), rank=50, alpha=1.0).lora_a.detach()
    assert 0.99 / 20 < wide.abs().max() <= 1 / 20  # as `nn.Linear`: up to 1 / sqrt(inputs)


def test_lora_trains_adapters_only_and_leaves_a_plain_model(
    model: Path, data: Path, tmp_path: Path
) -> None:
    before = weights(model)
    after = finetune(model, data, tmp_path / "out", "lora=4")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        adapted = ".layers." in name and name.endswith("proj.weight")
        assert torch.equal(tensor, after[name]) != adapted, name
    difference = after["model.layers.0.self_attn.q_proj.weight"].double()
    difference -= before["model.layers.0.self_attn.q_proj.weight"].double()
    values = torch.linalg.svdvals(difference)
    assert values[3] > 0 and values[4] < 1e-5 * values[0]
    tensors, _ = checkpoint.load(tmp_path / "out")
    assert len(tensors["optimizer"]["state"]) == CONFIG.num_hidden_layers * 7 * 2


@pytest.mark.parametrize(
    ("how", "count"), [("lora=4", CONFIG.num_hidden_layers * 7 * 2), ("trainable=image_head", 1)]
)
def test_a_run_of_a_part_keeps_that_part_and_goes_on_to_the_bit(
    model: Path, data: Path, tmp_path: Path, how: str, count: int
) -> None:
    uninterrupted = finetune(model, data, tmp_path / "whole", how)
    finetune(model, data, tmp_path / "part", how, "stop_after=2")
    tensors, state = checkpoint.load(tmp_path / "part", only="model")
    assert len(tensors["model"]) == count and state["began_with"]
    resumed = finetune(model, data, tmp_path / "part", how)
    assert losses(tmp_path / "part") == losses(tmp_path / "whole")
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in uninterrupted.items())


def test_a_run_of_a_part_that_kept_all_goes_on_and_keeps_all(
    model: Path, data: Path, tmp_path: Path
) -> None:
    """As runs did whose state names nothing that they began with."""
    uninterrupted = finetune(model, data, tmp_path / "whole", "lora=4")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(checkpoint, "fingerprint", lambda model: "")
        finetune(model, data, tmp_path / "part", "lora=4", "stop_after=2")
    resumed = finetune(model, data, tmp_path / "part", "lora=4")
    assert losses(tmp_path / "part") == losses(tmp_path / "whole")
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in uninterrupted.items())
    for step in (2, 4):
        tensors, state = checkpoint.load(tmp_path / "part", step)
        assert "lm_head.weight" in tensors["model"] and "began_with" not in state


def test_a_run_of_a_part_refuses_what_it_did_not_begin_with(
    model: Path, data: Path, tmp_path: Path
) -> None:
    finetune(model, data, tmp_path / "out", "lora=4", "stop_after=2")
    other = detect.load(model)
    other.transformer.model.norm.weight.data[3] += 1e-3
    save_hf(
        tmp_path / "other",
        other.transformer,
        other.vqgan,
        other.processor.tokenizer_file.read_text(),
        {"chameleon": {}},
    )
    for wrong, more in ((tmp_path / "other", "lora=4"), (model, "trainable=image_head")):
        with pytest.raises(CheckpointError, match=r"part of a model whose other weights"):
            finetune(wrong, data, tmp_path / "out", more)
    with pytest.raises(CheckpointError, match="part of a model"):
        finetune(model, data, tmp_path / "out")
    with pytest.raises(CheckpointError, match="another shape"):
        finetune(model, data, tmp_path / "out", "lora=3")


def test_frozen_weights_are_compared_by_value_and_not_by_dtype(model: Path) -> None:
    transformer = detect.load(model).transformer.bfloat16()
    assert checkpoint.fingerprint(transformer) == ""
    transformer.requires_grad_(False)
    before = checkpoint.fingerprint(transformer)
    assert checkpoint.fingerprint(transformer.float()) == before
    transformer.lm_head.weight.data = transformer.lm_head.weight.data.roll(1, 1)
    assert checkpoint.fingerprint(transformer) != before


@pytest.mark.parametrize(
    "how", ["lora=4", pytest.param("trainable=image_head", marks=pytest.mark.slow)]
)
def test_two_processes_leave_the_model_of_one(
    model: Path, data: Path, tmp_path: Path, how: str
) -> None:
    """And a run of either that stopped half-way is gone on with by the other."""
    same = ["rows=2", "micro_rows=1", "device=cpu", "dropout=0", how]
    one = finetune(model, data, tmp_path / "one", *same)
    finetune(model, data, tmp_path / "begun", *same, "stop_after=2")
    started = [("two", []), ("half", ["stop_after=2"]), ("begun", [])]
    runs = [[str(model), str(data), out, *same, *more] for out, more in started]
    two_processes(tmp_path, runs)
    two, gone_on = (weights(tmp_path / name / "model") for name in ("two", "begun"))
    kept = [checkpoint.load(tmp_path / name)[0]["model"].keys() for name in ("two", "one")]
    assert kept[0] == kept[1] and "model.norm.weight" not in kept[0]
    resumed = finetune(model, data, tmp_path / "half", *same)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(gone_on[name], tensor, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(resumed[name], tensor, atol=1e-5, rtol=1e-5)


def two_processes(folder: Path, runs: list[list[str]]) -> None:
    """`finetune_here` of each of these in two processes that work in a folder."""
    script = f"import test_finetune as t; [t.finetune_here(*given) for given in {runs!r}]"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node=2", "--no-python", sys.executable, "-c", script]
    paths = os.pathsep.join(str(p) for p in (Path(__file__).parent, Path(__file__).parents[1]))
    done = subprocess.run(
        command,
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def finetune_here(model: str, data: str, out: str, *more: str) -> None:
    """What each process runs: `finetune` into a folder of this one."""
    small = ["steps=4", "length=100", "lr=1e-2", "warmup_steps=1", "log_every=1", "save_every=2"]
    fields = [f"data={data}", f"model={model}", f"out={out}", "max_broken=1", *small]
    run("finetune", [*fields, *more])


def test_dropout_is_set_on_every_block(model: Path, device: torch.device) -> None:
    transformer = prepare_model(detect.load(model, device), FinetuneConfig(dropout=0.5)).train()
    tokens = torch.randint(0, CONFIG.vocab_size, (1, 9)).to(device)
    assert not torch.equal(transformer(tokens), transformer(tokens))
    transformer.eval()
    assert torch.equal(transformer(tokens), transformer(tokens))


def test_products_that_are_not_trained_stay_small_and_give_the_same(
    tmp_path: Path, device: torch.device
) -> None:
    """Of a model stored in bf16 and computed in it, frozen weights of blocks are not widened."""
    loaded = detect.load(tiny_model(tmp_path / "tiny"), device, torch.bfloat16)
    tokens = torch.randint(0, CONFIG.vocab_size, (2, 9)).to(device)
    for changes in ({"lora": 2}, {"trainable": "image_head"}):
        widths, logits = [], []
        for precision in ("bf16", "fp32"):
            config = FinetuneConfig(run=RunConfig(precision=precision), **changes)
            model = prepare_model(deepcopy(loaded), config).eval()
            kinds = {n: p.dtype for n, p in model.named_parameters()}
            widths.append({kinds[n] for n in kinds if n.endswith("proj.weight")})
            assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
            with torch.autocast(device.type, torch.bfloat16):
                logits.append(model(tokens))
        assert widths == [{torch.bfloat16}, {torch.float32}]
        assert torch.equal(*logits)


def test_the_settings_are_the_papers() -> None:
    assert (recipe.optim.lr, recipe.optim.decay, recipe.optim.weight_decay) == (1e-5, "cosine", 0.1)
    assert recipe.dropout == 0.05 and recipe.z_weight == 1e-5 and recipe.corpus.balance
    assert (recipe.weights.prompt_text, recipe.weights.prompt_image) == (0, 0)
    settings = recipe.corpus.encoding
    assert (settings.resize_mode, settings.answer_images) == ("", "crop")
    assert full.rows * full.length == 128 * 4096 and full.optim == recipe.optim


def test_the_recipes_of_the_7b_are_what_their_names_say() -> None:
    assert (low_rank.trains, low_rank.lora, low_rank.alpha) == ("adapters", 16, 32)
    assert low_rank.optim.lr == 2e-4
    assert head.trains == "image_head" and head.optim.lr == 1e-3 and head.optim.decay == "linear"
    assert (head.optim.weight_decay, head.z_weight, head.dropout) == (0, 0, 0)
    assert head.run.steps == 5859 * 3 // head.rows  # Anole's images, three times over
    assert learning_rate(head.optim, 1000, 2000) == pytest.approx(0.5e-3, rel=0.02)


def test_a_plan_counts_what_is_trained(capsys: pytest.CaptureFixture[str]) -> None:
    said = {name: plan(name, []).splitlines() for name in ("finetune_7b", "lora_7b")}
    states = {name: float(lines[4].split()[7]) for name, lines in said.items()}
    assert states["finetune_7b"] == pytest.approx(16 * 7.0137e9 / 2**30, rel=0.01)
    assert states["lora_7b"] < 15 and "39,976,960 trained" in said["lora_7b"][0]
    size = PRESETS["mini"].vq_config.num_embeddings * PRESETS["mini"].hidden_size
    assert f", {size:,} trained" in plan("image_head_7b", ["model=mini"])
    with pytest.raises(SettingError, match="download it first"):
        plan("lora_7b", ["model=org/other"])
    with pytest.raises(SettingError, match="no plan"):
        plan("pretrain_mini", [])


def test_a_plan_counts_what_a_gpu_gathers() -> None:
    config = PRESETS["chameleon-7b"]
    layout = ParallelConfig(tensor=1, shard=8)
    job = PlanJob(config, layout, rows=8, length=128, micro_rows=1, tokens=1e9, dropout=0.0)
    weights = parameters_of_block(config)
    tables = 2 * config.vocab_size * config.hidden_size
    # Two blocks in bf16, a block's gradient in bf16 and fp32, both tables and their gradients.
    assert line(job, 8).gathered == (2 * 2 + 2 + 4) * weights + (2 + 2) * tables


def test_weights_of_adapters_are_counted_as_they_are(model: Path) -> None:
    transformer = detect.load(model).transformer
    lora.adapt(transformer, rank=3)
    result = sum(p.numel() for p in transformer.parameters() if p.requires_grad)
    job = PlanJob(transformer.config, ParallelConfig(), 1, 64, 0, 1.0, trainable="adapters", lora=3)
    assert trained_parameters(job) == result and lora.trainable_part(transformer) == "adapters"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["alpha=8"], "alpha=8 scales adapters"),
        (["lora=4", "tensor=2"], "tensor=2 cannot split"),
        (["trainable=image_head", "tensor=2"], "tensor=2 cannot split"),
        (["rows=8", "micro_rows=3"], "choose a multiple of 3"),
        (["dropout=1"], "dropout=1.0 must be"),
        (["trainable=head"], "choose all or image_head"),
        (["lora=4", "trainable=image_head"], "choose one"),
        (["lora=-1"], "lora=-1 must be 0"),
        (["rows=0"], "rows=0 must be 1"),
        (["warmup_steps=-1"], "warmup_steps=-1 must be 0"),
        (["weight_decay=-1"], "weight_decay=-1.0 must be 0"),
        (["clip=-1"], "clip=-1.0 must be 0"),
        (["beta2=1"], "beta2=1.0 must be"),
        (["resize_mode=stretch"], "choose fit or crop"),
        (["prompt_images=stretch"], "choose fit or crop"),
        (["max_broken=2"], "max_broken=2"),
    ],
)
def test_an_impossible_setting_is_refused_at_once(changes: list[str], words: str) -> None:
    with pytest.raises((SettingError, DataError), match=words):
        override(recipe, changes)


def test_what_the_recipe_refuses(model: Path, data: Path, tmp_path: Path) -> None:
    out = f"out={tmp_path / 'out'}"
    words = jsonl(tmp_path / "words.jsonl", [{"text": "Only words."}])
    cases: list[tuple[list[str], Any]] = [
        ([f"model={model}", out], "data=PATH"),
        ([f"model={model}", out, f"data={data}", "lora=33"], "lora=33 is not a rank"),
        (
            [f"model={model}", out, f"data={data}", "length=513"],
            "length=513 is longer than the context",
        ),
        ([f"model={model}", out, "data=nowhere.jsonl"], "there is no nowhere.jsonl"),
        ([f"model={model}", out, f"data={words}", "trainable=image_head"], "no answer of the data"),
    ]
    for changes, words in cases:
        with pytest.raises((SettingError, DataError), match=words):
            run("finetune", changes)


def wide(folder: Path) -> tuple[Path, Path]:
    """A row whose image, twice as wide as high, comes first; and that image."""
    folder.mkdir(exist_ok=True)
    (folder / "wide.png").write_bytes(png(3, (256, 128)))
    return jsonl(folder / "wide.jsonl", [{"image": "wide.png", "caption": "pear"}]), (
        folder / "wide.png"
    )


def prompt_and_training_tokens(
    tuned: Path, row: Path, image_path: Path, index: Path
) -> tuple[list[int], list[int]]:
    """Tokens of the image as a prompt of the tuned model, and in a document of the training."""
    chameleon = Chameleon.load(str(tuned), device="cpu")
    asked = chameleon.request([Image.open(image_path)], output="text").ids
    encoding = EncodingSettings(image_first=1.0)
    config = CorpusConfig(data=(str(row),), encoding=encoding)
    corpus = open_corpus(config, chameleon.processor, chameleon.image_tokenizer, 100, index)
    return list(asked), corpus.stream(0).ids[: len(asked)]


def test_a_tuned_model_sees_images_as_it_did_in_training(model: Path, tmp_path: Path) -> None:
    row, image = wide(tmp_path / "data")
    result = {}
    for way in ("", "resize_mode=crop", "resize_mode=fit", "prompt_images=fit"):
        out = tmp_path / f"out-{way}"
        finetune(model, row, out, "steps=1", "image_first=1", *([way] if way else []))
        trained = json.loads((out / "model" / "processor_config.json").read_text())
        assert trained["image_processor"]["resize_mode"] == (way.partition("=")[2] or "crop")
        asked, seen = prompt_and_training_tokens(out / "model", row, image, tmp_path / "index")
        assert asked == seen
        result[way] = asked
    assert result[""] == result["resize_mode=crop"] != result["resize_mode=fit"]
    assert result["resize_mode=fit"] == result["prompt_images=fit"]
    # A model that fits images in goes on to do so.
    finetune(tmp_path / "out-resize_mode=fit" / "model", row, tmp_path / "again", "steps=1")
    assert Chameleon.load(str(tmp_path / "again" / "model")).image_tokenizer.mode == "fit"
    with pytest.raises(SettingError, match=r"resize_mode=crop and prompt_images=fit differ"):
        override(recipe, ["resize_mode=crop", "prompt_images=fit"])


def test_the_mode_of_token_shards_is_that_of_the_tuned_model(model: Path, tmp_path: Path) -> None:
    row, image = wide(tmp_path / "data")
    shards = tmp_path / "shards"
    command = ["tokenize", str(row), "-o", str(shards), "--model", str(model), "--image-first", "1"]
    assert main([*command, "--resize-mode", "fit", "--device", "cpu"]) == 0
    finetune(model, shards, tmp_path / "out", "steps=1")
    tuned = tmp_path / "out" / "model"
    asked, _ = prompt_and_training_tokens(tuned, row, image, tmp_path / "index")
    loaded = detect.load(model)
    marks = fingerprints(loaded.processor, ImageTokenizer(loaded.vqgan, 16))
    document = TokenShards(
        shards, marks, DocumentSplitter(200, loaded.processor.vocabulary)
    ).document(0)
    assert document.ids[: len(asked)] == asked
    with pytest.raises(SettingError, match=r"made with resize_mode=fit, but .* crop: tokenize"):
        finetune(model, shards, tmp_path / "other", "resize_mode=crop")
    assert main([*command[:3], f"{shards}2", *command[4:], "--prompt-images", "crop"]) == 0
    with pytest.raises(SettingError, match=r"2 was made with resize_mode=crop"):
        finetune(model, f"{shards},{shards}2", tmp_path / "both")


def test_notices_go_along_and_the_card_says_what_it_was_tuned_on(
    model: Path, data: Path, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(model, tmp_path / "base"))
    (base / "NOTICE.md").write_text("Pictures by others.")
    (base / "LICENSE").write_text("Apache-2.0")
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n\n# Base\n\nIts scores.\n")
    finetune(base, data, tmp_path / "out", "lora=2", "seed=8")
    tuned = tmp_path / "out" / "model"
    for name in ("NOTICE.md", "LICENSE"):
        assert (tuned / name).read_bytes() == (base / name).read_bytes()
    card = (tuned / "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\n---\n\n# A fine-tuned model\n")
    for said in (f"| began with | {base} |", f"| data | {data} |", "adapters of rank 2", "| 4, 1 "):
        assert said in card
    assert card.endswith("# Base\n\nIts scores.\n") and card.count("license:") == 1
    finetune(tuned, data, tmp_path / "twice")
    second = (tmp_path / "twice" / "model" / "README.md").read_text()
    assert second.count("# A fine-tuned model") == 2 and second.count("license:") == 1


def test_a_run_without_a_terminal_prints_first_and_last_step_and_a_long_warm_up(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finetune(model, data, tmp_path / "out", "warmup_steps=50")
    stderr = capsys.readouterr().err
    lines = [line for line in stderr.splitlines() if line.startswith("step ")]
    assert lines[0].startswith("step 0: warmup_steps=50 takes all of steps=4: the rate ends at 0.0")
    assert [line[:11] for line in lines[1:]] == ["step 1 of 4", "step 4 of 4"]
    assert "loss " in lines[1] and "s left" in lines[1] and "s left" not in lines[2]
    finetune(model, data, tmp_path / "short", "warmup_steps=3")
    assert "warmup_steps" not in capsys.readouterr().err


@pytest.mark.slow
def test_a_mistake_stands_in_the_report_of_torchrun(
    model: Path, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(AssertionError) as report:
        two_processes(tmp_path, [[str(model), str(data), "out", "rows=1", "device=cpu"]])
    cause = str(report.value).rpartition("Root Cause")[2]
    assert "rows=1 cannot be shared by 2 data ranks" in cause and "multiple of 2" in cause
