"""A model in memory is written, copied, moved and closed."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_api import content
from tiny import CONFIG, tiny_processor, tiny_transformer

from earlyfusion import Chameleon, CheckpointError, SettingError, TextDelta
from earlyfusion.checkpoints import lumina
from earlyfusion.checkpoints.assemble import assemble
from earlyfusion.checkpoints.convert import convert
from earlyfusion.checkpoints.detect import open_source
from earlyfusion.checkpoints.summary import summarize
from earlyfusion.hf import ChameleonForConditionalGeneration
from earlyfusion.image_tokenizer import ImageTokenizer
from earlyfusion.kernels.twins import accelerate
from earlyfusion.model.quantise import quantise
from earlyfusion.model.vqgan import VQGAN
from earlyfusion.processor import Processor


@pytest.fixture
def model(tmp_path: Path) -> Chameleon:
    processor = tiny_processor(tmp_path)
    torch.manual_seed(0)
    # With the compiled code of a loaded model, whose pixels torch gives but for rounding.
    vqgan = accelerate(VQGAN(CONFIG.vq_config).eval())
    tokenizer = ImageTokenizer(vqgan, CONFIG.vq_config.resolution)
    transformer = tiny_transformer(processor, begin_image=1.0)
    return Chameleon(transformer, tokenizer, processor, {"top_k": 30}, "tiny")


def answers(model: Chameleon) -> list[Any]:
    shown = np.arange(12 * 20 * 3, dtype=np.uint8).reshape(12, 20, 3)
    prompts = ["a pear", ["What? ", shown], "Draw."]
    outputs: list[Any] = ["interleaved", "text", "image"]
    replies = model.generate_batch(prompts, outputs, seed=3, max_tokens=90)
    return [content(reply) for reply in replies]


def rounded(model: Chameleon, dtype: str) -> Chameleon:
    if dtype in ("int8", "int4"):
        quantise(model.transformer, int(dtype[3:]))
    else:
        model.transformer.to(getattr(torch, dtype))
    return model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8", "int4"])
def test_a_saved_model_answers_as_before(model: Chameleon, tmp_path: Path, dtype: str) -> None:
    rounded(model, dtype).image_tokenizer.mode = "fit"
    (tmp_path / "README.md").write_text("A card.\n")
    (tmp_path / "NOTICE.md").write_text("Kept — 그대로.\n", encoding="utf-8")
    model.folder = tmp_path
    before = answers(model)
    place = model.save(str(tmp_path / "own" / "saved"))
    reloaded = Chameleon.load(place, "cpu", "auto" if dtype.startswith("int") else dtype)
    assert answers(reloaded) == before
    for name, tensor in model.transformer.state_dict().items():
        assert torch.equal(reloaded.transformer.state_dict()[name], tensor), name
    assert reloaded.image_tokenizer.mode == "fit" and reloaded.can_draw
    assert reloaded.request("x").sampling.top_k == 30
    assert (place / "README.md").read_text() == "A card.\n"
    assert (place / "NOTICE.md").read_text(encoding="utf-8") == "Kept — 그대로.\n"
    # Saved once more, from what was loaded: the same bytes.
    second = reloaded.save(tmp_path / "second")
    names = sorted(path.name for path in place.iterdir())
    assert names == sorted(path.name for path in second.iterdir())
    assert all((place / n).read_bytes() == (second / n).read_bytes() for n in names)


def test_saving_replaces_nothing_unasked(model: Chameleon, tmp_path: Path) -> None:
    place = model.save(tmp_path / "saved")
    before = {path.name: path.read_bytes() for path in place.iterdir()}
    with torch.no_grad():
        model.transformer.lm_head.weight.neg_()
    with pytest.raises(CheckpointError, match="is not empty: choose another folder, or set overwr"):
        model.save(place)
    assert {path.name: path.read_bytes() for path in place.iterdir()} == before
    model.save(place, overwrite=True)
    assert (place / "model.safetensors").read_bytes() != before["model.safetensors"]
    actual = tmp_path / "mine"
    actual.mkdir()
    model.save(actual)  # an empty folder is none to keep
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(CheckpointError, match="is not empty"):
            model.save(tmp_path / "notes", overwrite)
        with pytest.raises(CheckpointError, match=r"cannot be written|is not empty"):
            model.save(tmp_path / "notes" / "diary.txt", overwrite)
    assert (tmp_path / "notes" / "diary.txt").read_text() == "mine"
    assert not [path for path in tmp_path.rglob(".*")], "nothing half written is left"


def test_a_full_disk_is_one_sentence_and_leaves_nothing(
    model: Chameleon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("earlyfusion.checkpoints.hf._write_safetensors", full)
    with pytest.raises(CheckpointError, match=r"No space left on device\): free the disk"):
        model.save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    assert not [path for path in tmp_path.rglob(".*")]


def test_packed_weights_are_read_by_load_alone(model: Chameleon, tmp_path: Path) -> None:
    dense = summarize(model.save(tmp_path / "dense")).parameters
    place = rounded(model, "int4").save(tmp_path / "packed")
    assert json.loads((place / "config.json").read_text())["quantization_config"] == {
        "quant_method": "earlyfusion",
        "bits": 4,
    }
    sentence = "holds weights in 4 bits, which only Chameleon.load reads"
    with pytest.raises(CheckpointError, match=f"packed {sentence}"):
        ChameleonForConditionalGeneration.from_pretrained(place)
    with pytest.raises(CheckpointError, match=sentence):
        assemble(open_source(place))
    with pytest.raises(CheckpointError, match=sentence):
        convert(str(place), tmp_path / "meta", "meta")
    with pytest.raises(CheckpointError, match=sentence):
        Chameleon.load(place, "cpu", "float32")
    with pytest.raises(SettingError, match="have 4 bits already and cannot be rounded to 8"):
        Chameleon.load(place, "cpu", "int8")
    assert Chameleon.load(place, "cpu", "int4").generate("x", max_tokens=2).usage
    told = summarize(place).parameters
    assert told["image_tokenizer"] == dense["image_tokenizer"]
    # Columns are padded to 64, which the tiny model's are not.
    assert dense["transformer"] <= told["transformer"] < 2.5 * dense["transformer"]
    config = json.loads((place / "config.json").read_text())
    config["quantization_config"]["bits"] = 3
    (place / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="names weights of 3 bits"):
        Chameleon.load(place)


def test_a_model_of_another_layout_keeps_it(model: Chameleon, tmp_path: Path) -> None:
    file = model.processor.tokenizer_file
    data = json.loads(file.read_text())
    first = max(data["model"]["vocab"].values()) + 1
    for number, name in enumerate(["<reserved08799>", "<reserved08804>"]):
        data["model"]["vocab"][name] = first + number
    file.write_text(json.dumps(data))
    other = Processor(file, lumina.layout(8))
    relative = Chameleon(model.transformer, model.image_tokenizer, other)
    assert Chameleon.load(relative.save(tmp_path / "l")).processor.layout == other.layout


def test_a_model_shows_what_it_is(model: Chameleon) -> None:
    assert repr(model) == ("<Chameleon tiny: 0.1 M parameters, float32, cpu, context 256 tokens>")
    full = sum(p.numel() for p in model.transformer.parameters())
    assert round(full / 1e6, 1) == 0.1
    assert ", int4, cpu" in repr(rounded(model, "int4")) and "0.1 M" in repr(model)
    assert "mini: " in repr(Chameleon.load("mini", "cpu"))


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_copies_are_models_of_their_own(model: Chameleon, way: str, dtype: str) -> None:
    before = answers(rounded(model, dtype))  # the engine is made, and may share weights
    events = model.stream("a pear", "text", seed=1, max_tokens=20)
    next(events)  # and busy
    other = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
    list(events)
    assert answers(other) == before and repr(other) == repr(model)
    with torch.no_grad():
        other.transformer.lm_head.weight.neg_()
    assert answers(other) != before
    assert answers(model) == before


def test_moving(model: Chameleon, monkeypatch: pytest.MonkeyPatch) -> None:
    before = answers(model)
    assert model.to("cpu") is model.to(torch.device("cpu")) is model.to("auto")
    assert answers(model) == before
    for device in ("cuda:99", "meta", "mps:7"):
        with pytest.raises(SettingError, match=f"device='{device}' is not on this machine"):
            model.to(device)
    with pytest.raises(SettingError, match="device='gpu' is unknown"):
        model.to("gpu")
    events = model.stream("a pear", "text", seed=1, max_tokens=20)
    next(events)
    with pytest.raises(SettingError, match="is answering"):
        model.to("cpu")
    events.close()  # type: ignore[attr-defined]
    moved: list[torch.nn.Module] = []
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, place: moved.append(self) or self)
    model.to("cpu")
    assert moved == [model.transformer, model.image_tokenizer.vqgan]


@pytest.mark.gpu
def test_a_model_moves_to_a_gpu_and_back(model: Chameleon) -> None:
    before = answers(model)
    there = answers(model.to("cuda"))
    assert model.transformer.lm_head.weight.is_cuda and "cuda" in repr(model)
    assert [len(segments) for segments in there] == [len(segments) for segments in before]
    assert answers(model.to("cpu")) == before


def test_a_shared_model_is_only_asked(
    model: Chameleon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("earlyfusion.api.peers_of", lambda transformer: object())
    with pytest.raises(SettingError, match="cannot be moved"):
        model.to("cpu")
    with pytest.raises(SettingError, match="score is not offered"):
        model.score("x", ["y"])
    with pytest.raises(CheckpointError, match="cannot be saved"):
        model.save(tmp_path / "part")


def test_closing_ends_what_runs(model: Chameleon) -> None:
    before = answers(model)
    events = model.stream("a pear", "text", seed=1, max_tokens=40)
    started = [next(events)]
    engine = model.engine
    model.close()
    model.close()
    with pytest.raises(SettingError, match="was closed while this request ran"):
        started.extend(events)
    assert all(isinstance(event, TextDelta) for event in started)
    assert not engine.busy and model.engine is not engine
    assert answers(model) == before
