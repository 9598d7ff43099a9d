from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from earlyfusion.config import PRESETS, ModelConfig, VQConfig
from earlyfusion.errors import CheckpointError, SettingError


@pytest.mark.parametrize("name", PRESETS)
def test_a_config_survives_its_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(PRESETS[name].to_dict()))
    read = ModelConfig.from_file(path)
    assert read.to_dict() == PRESETS[name].to_dict()
    assert (read.head_dim, read.kv_heads) == (PRESETS[name].head_dim, PRESETS[name].kv_heads)


def test_true_shapes_of_the_released_sizes() -> None:
    small, large = PRESETS["chameleon-7b"], PRESETS["chameleon-34b"]
    assert (small.hidden_size, small.kv_heads, small.swin_norm) == (4096, 32, False)
    assert (large.hidden_size, large.kv_heads, large.swin_norm) == (8192, 8, True)
    assert small.vq_config.stride == 16 and small.vq_config.grid == 32


def test_leftovers_of_older_files_are_ignored_and_null_is_the_default() -> None:
    data = {"ch": 128, "ch_mult": [1], "attn_resolutions": None, "embed_dim": None}
    assert VQConfig.from_dict(data) == VQConfig()
    rope = {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}
    read = ModelConfig.from_dict({"rope_parameters": rope, "num_key_value_heads": None})
    assert (read.rope_theta, read.kv_heads, read.rope_scaling) == (5e5, 32, rope)
    assert ModelConfig.from_dict({"rope_theta": 123.0}).rope_theta == 123.0


def test_values_that_transformers_also_writes() -> None:
    assert ModelConfig.from_dict({"eos_token_id": [2, 3]}).to_dict()["eos_token_id"] == [2, 3]
    # null is no attention in the transformers classes, not their default.
    assert VQConfig.from_dict({"attn_type": None}).attn_type == "none"


@pytest.mark.parametrize(
    "data",
    [
        {"hidden_size": "abc"},
        {"hidden_size": True},
        {"swin_norm": 1},
        {"rms_norm_eps": "1e-5"},
        {"hidden_act": 3},
        {"rope_scaling": 3},
        {"vq_config": {"channel_multiplier": [1, "2"]}},
        {"vq_config": "small"},
        {"rope_parameters": "linear"},
        {"rope_parameters": {"rope_theta": "1e4"}},
        {"rope_parameters": {"factor": "2", "rope_type": "linear"}},
        {"rope_parameters": {"short_factor": [1, "2"], "rope_type": "longrope"}},
        {"eos_token_id": "</s>"},
    ],
)
def test_wrong_kinds_name_the_field(data: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError) as error:
        ModelConfig.from_dict(data)
    name, value = next(iter(data.items()))
    assert (next(iter(value)) if isinstance(value, dict) else name) in str(error.value)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"hidden_size": 100}, "hidden_size=100"),
        ({"num_attention_heads": 4096}, "odd width 1"),
        ({"num_key_value_heads": 5}, "num_key_value_heads=5"),
        ({"vocab_size": 0}, "vocab_size=0"),
        ({"num_attention_heads": 0}, "num_attention_heads=0"),
        ({"num_key_value_heads": -1}, "num_key_value_heads=-1"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0"),
        ({"rope_parameters": {"rope_theta": 0}}, "rope_theta=0"),
        ({"vq_config": {"base_channels": 33}}, "base_channels=33"),
        ({"rope_theta": 2**200}, "rope_theta=16069"),
        ({"intermediate_size": 2**70}, "intermediate_size=1180591620717411303424 must be 1 to"),
        ({"hidden_size": 2**40}, "hidden_size=1099511627776"),
        ({"vq_config": {"channel_multiplier": []}}, "channel_multiplier="),
        ({"vq_config": {"channel_multiplier": [1, 0]}}, r"channel_multiplier=\(1, 0\) gives"),
        ({"vq_config": {"channel_multiplier": [1, 2**20]}}, "more than 16,777,216 channels"),
        ({"vq_config": {"channel_multiplier": [1] * 99999}}, "needs 1 to 15 levels"),
        ({"vq_config": {"num_res_blocks": -1}}, "num_res_blocks=-1 must be 0 to 1,000"),
        ({"vq_config": {"num_res_blocks": 2**40}}, "num_res_blocks=1099511627776"),
        ({"vq_config": {"in_channels": -1}}, "in_channels=-1"),
        ({"vq_config": {"embed_dim": 2**62}}, "embed_dim=4611686018427387904"),
        ({"vq_config": {"resolution": 2**31}}, "resolution=2147483648 must be 1 to 16,384"),
        ({"vq_config": {"dropout": 3}}, "dropout=3"),
    ],
)
def test_impossible_shapes_name_the_value_when_checked(
    tmp_path: Path, data: dict[str, Any], words: str
) -> None:
    config = ModelConfig.from_dict(data)  # a config is not a model: this alone is no mistake
    with pytest.raises(SettingError, match=words):
        config.check()
    path = tmp_path / "config.json"
    path.write_text(json.dumps(data))
    with pytest.raises(SettingError, match=words):  # the config of a model's folder
        ModelConfig.from_file(path)


def test_a_resolution_that_the_stride_cuts_has_no_grid() -> None:
    config = VQConfig(resolution=520)
    config.check()
    with pytest.raises(SettingError, match="resolution=520 must be a multiple of the stride 16"):
        _ = config.grid


@pytest.mark.parametrize(
    ("data", "kind", "scaling"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear", {"factor": 2.0}),
        (
            {"rope_parameters": {"rope_type": "yarn"}, "original_max_position_embeddings": 77},
            "yarn",
            {"original_max_position_embeddings": 77},
        ),
        (
            {"rope_parameters": {"rope_type": "proportional"}, "partial_rotary_factor": 0.5},
            "proportional",
            {"partial_rotary_factor": 0.5},
        ),
    ],
)
def test_rope_of_older_files_survives(
    data: dict[str, Any], kind: str, scaling: dict[str, Any]
) -> None:
    config = ModelConfig.from_dict(data)
    second = ModelConfig.from_dict(config.to_dict())
    for read in (config, second):
        assert read.rope_type == kind
        assert read.rope_scaling is not None
        assert scaling.items() <= read.rope_scaling.items()


def test_the_activation_survives_its_file() -> None:
    data = ModelConfig.from_dict({"hidden_act": "gelu_new"}).to_dict()
    assert data["hidden_act"] == ModelConfig.from_dict(data).hidden_act == "gelu_new"


def test_a_missing_or_broken_file_is_one_sentence(tmp_path: Path) -> None:
    broken = tmp_path / "config.json"
    broken.write_text("{")
    for path in (broken, tmp_path / "none.json"):
        with pytest.raises(CheckpointError, match="missing or not JSON"):
            ModelConfig.from_file(path)


def test_a_number_of_layers_that_no_memory_holds_is_refused() -> None:
    with pytest.raises(SettingError, match="num_hidden_layers=1000000000 must be 1 to 1,000"):
        ModelConfig(num_hidden_layers=10**9).check()
