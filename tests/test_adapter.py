"""Adapters in PEFT's format: ours are read by PEFT, PEFT's are read here, and nothing else is."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from corpora import pairs, tiny_model
from safetensors.torch import load_file, save_file
from test_finetune import finetune
from tiny import CONFIG
from tolerances import assert_close

from earlyfusion import Chameleon, ChameleonForConditionalGeneration
from earlyfusion.checkpoints.adapter import merge_adapter
from earlyfusion.checkpoints.detect import load
from earlyfusion.errors import CheckpointError, SettingError
from earlyfusion.recipes.finetune import config as recipe
from earlyfusion.recipes.run import override, run

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*:UserWarning:peft", "ignore:`is_gradient_checkpointing`:FutureWarning"
)
TOKENS = torch.randint(5, CONFIG.vocab_size, (2, 17), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def tuned(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with adapters, which are merged too."""
    folder = tmp_path_factory.mktemp("tuned")
    finetune(model, pairs(folder / "data", 8), folder / "out", "lora=3", "alpha=5")
    return folder / "out"


def theirs(model: Path) -> Any:
    return ChameleonForConditionalGeneration.from_pretrained(model, dtype=torch.float32).eval()


def text_logits(logits: torch.Tensor) -> torch.Tensor:
    """Those that transformers' classes do not mask."""
    return logits.where(logits > -1e30, 0)


@torch.no_grad()
def logits_of(hf: Any) -> torch.Tensor:
    result: torch.Tensor = hf(input_ids=TOKENS).logits
    return text_logits(result)


def test_peft_reads_what_a_run_leaves(model: Path, tuned: Path) -> None:
    base, hf = logits_of(theirs(model)), theirs(model)
    adapted = peft.PeftModel.from_pretrained(hf, tuned / "adapter").eval()
    merged = logits_of(theirs(tuned / "model"))
    assert (merged - base).abs().max() > 1e-2
    torch.testing.assert_close(logits_of(adapted), merged, atol=1e-4, rtol=1e-4)
    config = json.loads((tuned / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], len(config["target_modules"])) == (3, 5, 7)
    assert config["base_model_name_or_path"] == str(model)


def test_an_adapter_loads_beside_its_base_as_the_merged_model(
    model: Path, tuned: Path, device: torch.device
) -> None:
    merged = load(tuned / "model").transformer.state_dict()
    loaded = Chameleon.load(model, str(device), dtype="float32", adapter=str(tuned / "adapter"))
    for name, tensor in loaded.transformer.state_dict().items():
        assert_close(tensor, merged[name].float(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "more",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "lm_head"], "use_rslora": True},
        {"target_modules": ["down_proj"], "alpha_pattern": {"layers.1.mlp.down_proj": 2}},
        {"target_modules": ["v_proj", "k_proj"], "rank_pattern": {"k_proj": 1}},
    ],
)
def test_an_adapter_of_peft_is_read(
    model: Path, tmp_path: Path, more: dict[str, Any], device: torch.device
) -> None:
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=7, init_lora_weights=False, **more)
    adapted = peft.get_peft_model(theirs(model), config).eval()
    adapted.save_pretrained(tmp_path)
    actual = Chameleon.load(model, str(device), dtype="float32", adapter=tmp_path)
    base = logits_of(theirs(model))
    with torch.no_grad():
        outputs = actual.transformer(TOKENS.to(device)).where(base.to(device) != 0, 0)
    expected = logits_of(adapted)
    assert (expected - base).abs().max() > 1e-2
    assert_close(outputs, expected, atol=2e-4, rtol=2e-4)


def test_merging_is_optional(model: Path, tmp_path: Path) -> None:
    data = pairs(tmp_path / "data", 4)
    fields = [f"data={data}", f"model={model}", "steps=1", "length=100", "warmup_steps=0"]
    run("finetune", [*fields, f"out={tmp_path / 'out'}", "lora=2", "merge=false"])
    assert (tmp_path / "out" / "adapter").is_dir() and not (tmp_path / "out" / "model").exists()
    with pytest.raises(SettingError, match="merge=false"):
        override(recipe, ["merge=false"])


def damaged(adapter: Path, place: Path, **changes: Any) -> Path:
    place.mkdir()
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file(changes.pop("tensors", tensors), place / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text()) | changes
    (place / "adapter_config.json").write_text(json.dumps(config))
    return place


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_type": "LOHA"}, "of type LOHA"),
        ({"use_dora": True}, "with use_dora"),
        ({"modules_to_save": ["lm_head"]}, "with modules_to_save"),
        ({"init_lora_weights": "pissa"}, "with init_lora_weights='pissa'"),
        ({"alora_invocation_tokens": [5]}, "with alora_invocation_tokens"),
        ({"bias": "all"}, "with biases"),
        ({"lora_alpha": None}, "no lora_alpha"),
        (
            {"tensors": {"base_model.model.x.weight": torch.ones(1)}},
            "not adapt a linear",
        ),
        (
            {"tensors": {"base_model.model.x.lora_A.weight": torch.ones(1, 1)}},
            "lacks one of the two",
        ),
        ({"tensors": {}}, "lacks one of the two"),
        ({"alpha_pattern": [1]}, "an alpha_pattern that is not one of"),
        ({"alpha_pattern": {"(": 3}}, "an alpha_pattern that is not one of"),
        *(
            ({"tensors": {"base_model.model.x.lora_A.weight": matrix}}, "is no matrix of an")
            for matrix in (torch.ones(1), torch.ones(0, 3), torch.ones(1, 1, dtype=torch.int8))
        ),
    ],
)
def test_an_adapter_that_cannot_be_added_is_refused(
    model: Path, tuned: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    folder = damaged(tuned / "adapter", tmp_path / "a", **changes)
    with pytest.raises(CheckpointError, match=words):
        merge_adapter(load(model).transformer, folder)


def test_an_adapter_of_another_model_changes_nothing(
    model: Path, tuned: Path, tmp_path: Path
) -> None:
    transformer = load(model).transformer
    before = {name: tensor.clone() for name, tensor in transformer.state_dict().items()}
    first = "base_model.model.model.layers.0.mlp.up_proj."
    wrong = {f"{first}lora_A.weight": torch.ones(1, 3), f"{first}lora_B.weight": torch.ones(5, 1)}
    good = load_file(tuned / "adapter" / "adapter_model.safetensors")
    folder = damaged(tuned / "adapter", tmp_path / "a", tensors=good | wrong)
    with pytest.raises(CheckpointError, match=r"of another model: model\.layers\.0\.mlp\.up_proj"):
        merge_adapter(transformer, folder)
    assert all(torch.equal(before[n], t) for n, t in transformer.state_dict().items())
    with pytest.raises(CheckpointError, match="missing"):
        merge_adapter(transformer, tmp_path / "nowhere")
    with pytest.raises(SettingError, match="several processes"):
        Chameleon.load(model, tensor_parallel=2, adapter=folder)
    assert math.isfinite(float(transformer(TOKENS).detach().sum()))


def test_a_run_of_an_adapter_says_where_it_is(tuned: Path, tmp_path: Path) -> None:
    run_folder = tmp_path / "run"
    shutil.copytree(tuned / "adapter", run_folder / "adapter")
    (run_folder / "step-00000001").mkdir()
    (run_folder / "step-00000001" / "state.json").touch()
    inside = str(run_folder / "adapter")
    with pytest.raises(CheckpointError, match="run holds an adapter and not a whole") as error:
        Chameleon.load(run_folder)
    assert f"adapter={inside!r}" in str(error.value)
    with pytest.raises(CheckpointError, match=f"missing in .*run: give {inside}"):
        Chameleon.load("mini", adapter=run_folder)
    with pytest.raises(CheckpointError, match=r"missing in .*nowhere: give the folder of"):
        Chameleon.load("mini", adapter=tmp_path / "nowhere")
