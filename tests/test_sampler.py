from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tolerances import assert_close

from earlyfusion.errors import SettingError
from earlyfusion.generation.sampler import (
    Sampler,
    SamplingTensors,
    generator,
    penalise,
    pick,
    uniforms,
    warp,
)
from earlyfusion.generation.settings import SamplingParams

OFF = (1.0, 0, 1.0, 0.0, 1.0)
V = 64


@pytest.fixture(scope="module")
def recorded(golden: Path, device: torch.device) -> dict[str, torch.Tensor]:
    with np.load(golden / "expected" / "processors.npz") as file:
        return {name: torch.from_numpy(file[name]).to(device) for name in file}


def settings(recorded: dict[str, torch.Tensor], **changes: float) -> SamplingTensors:
    """The same for all six rows that were recorded."""
    names = ("temperature", "top_k", "top_p", "min_p", "penalty")
    row = tuple(changes.get(name, off) for name, off in zip(names, OFF, strict=True))
    return SamplingTensors.of([row] * 6, recorded["logits"].device)


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert torch.equal(actual.isinf(), expected.isinf())
    assert_close(actual, expected, atol=1e-5, rtol=0)


def seen_tokens(recorded: dict[str, torch.Tensor]) -> torch.Tensor:
    marks = torch.zeros_like(recorded["logits"], dtype=torch.bool)
    return marks.scatter_(1, recorded["input_ids"], True)


def allowed(recorded: dict[str, torch.Tensor]) -> torch.Tensor:
    marks = torch.zeros_like(recorded["logits"], dtype=torch.bool)
    marks[:, recorded["allow_ids"]] = True
    return marks


@pytest.mark.parametrize("penalty", [1.2, 0.8])
def test_repetition_penalty_is_metas(recorded: dict[str, torch.Tensor], penalty: float) -> None:
    actual = penalise(
        recorded["logits"], seen_tokens(recorded), settings(recorded, penalty=penalty).penalty_B
    )
    assert_same(actual, recorded[f"rep_penalty_{penalty}"])


@pytest.mark.parametrize("name", ["temp_0.7", "top_p_0.9", "top_p_0.5", "top_p_0.01"])
def test_one_warp_is_metas(recorded: dict[str, torch.Tensor], name: str) -> None:
    setting, value = name.rsplit("_", 1)
    setting = {"temp": "temperature"}.get(setting, setting)
    assert_same(
        warp(recorded["logits"], settings(recorded, **{setting: float(value)})), recorded[name]
    )


def test_allowed_tokens_are_metas(recorded: dict[str, torch.Tensor]) -> None:
    actual = warp(recorded["logits"].masked_fill(~allowed(recorded), -math.inf), settings(recorded))
    assert_same(actual, recorded["allow_only"])


def test_text_chain_is_metas(recorded: dict[str, torch.Tensor]) -> None:
    chosen = settings(recorded, temperature=0.7, top_p=0.9, penalty=1.2)
    logits = recorded["logits"].masked_fill(~allowed(recorded), -math.inf)
    actual = warp(penalise(logits, seen_tokens(recorded), chosen.penalty_B), chosen)
    assert_same(actual, recorded["text_chain"])
    assert_close(actual.softmax(-1), recorded["text_chain_probs"], atol=1e-5, rtol=0)


def test_rows_keep_their_own_settings(recorded: dict[str, torch.Tensor]) -> None:
    rows = [(1.0, 0, 0.5, 0.0, 1.0), (0.7, 0, 1.0, 0.0, 1.0), (1.0, 0, 0.9, 0.0, 1.0)]
    actual = warp(recorded["logits"][:3], SamplingTensors.of(rows, recorded["logits"].device))
    for row, name in enumerate(("top_p_0.5", "temp_0.7", "top_p_0.9")):
        assert_same(actual[row], recorded[name][row])


def test_top_k_and_min_p_are_transformers(recorded: dict[str, torch.Tensor]) -> None:
    from transformers import MinPLogitsWarper, TopKLogitsWarper

    ids, logits = recorded["input_ids"], recorded["logits"]
    for k in (1, 5, 200, 900):
        assert_same(warp(logits, settings(recorded, top_k=k)), TopKLogitsWarper(k)(ids, logits))
    for p in (0.05, 0.3, 1.0):
        assert_same(warp(logits, settings(recorded, min_p=p)), MinPLogitsWarper(p)(ids, logits))


def test_pick_inverts_the_cumulative_probability(device: torch.device) -> None:
    logits = torch.tensor([[-math.inf, math.log(0.25), -math.inf, math.log(0.75), -math.inf]])
    logits = logits.to(device)
    points = {0.0: 1, 0.2499: 1, 0.2501: 3, 0.999: 3, math.nextafter(1.0, 0.0): 3}
    for uniform, token in points.items():
        uniform_1 = torch.tensor([uniform], dtype=torch.float64, device=device)
        assert pick(logits, uniform_1).tolist() == [token]


def test_pick_follows_the_distribution(device: torch.device) -> None:
    probabilities = torch.tensor([0.1, 0.0, 0.6, 0.3])
    uniform = torch.rand(20_000, dtype=torch.float64, generator=generator(0))
    columns = pick(probabilities.log().to(device).expand(20_000, 4), uniform.to(device)).cpu()
    shares = torch.bincount(columns, minlength=4) / 20_000
    torch.testing.assert_close(shares, probabilities, atol=0.02, rtol=0)
    assert shares[1] == 0


def batch(size: int, device: torch.device) -> dict[str, torch.Tensor]:
    source = generator(5)
    inputs = {
        "logits_BV": torch.randn(size, V, generator=source) * 4,
        "allowed_BV": torch.rand(size, V, generator=source) < 0.7,
        "seen_BV": torch.rand(size, V, generator=source) < 0.2,
        "in_image_B": torch.arange(size) % 2 == 0,
        "uniform_B": uniforms([generator(seed) for seed in range(size)]),
    }
    return {name: values.to(device) for name, values in inputs.items()}


def mixed_rows(size: int) -> list[SamplingParams]:
    kinds = [
        {},
        {"temperature": 0, "image_temperature": 0},
        {"top_k": 3, "image_top_k": 9},
        {"min_p": 0.3, "image_top_p": 1.0, "top_p": 1.0},
    ]
    return [SamplingParams(**kinds[i % 4]).resolved({}) for i in range(size)]


def test_a_row_does_not_depend_on_its_batch(device: torch.device) -> None:
    inputs, rows = batch(64, device), mixed_rows(64)
    together = Sampler(rows, device).sample(**inputs)
    alone = [
        Sampler([rows[i]], device).sample(**{k: v[i : i + 1] for k, v in inputs.items()})
        for i in range(64)
    ]
    assert torch.equal(together, torch.cat(alone))
    assert inputs["allowed_BV"].gather(1, together[:, None]).all()


def test_temperature_0_is_the_best_token_after_the_penalty(device: torch.device) -> None:
    logits = torch.tensor([[1.0, 1.1, 0.2]])
    inputs: dict[str, Any] = {
        "logits_BV": logits,
        "allowed_BV": torch.ones(1, 3, dtype=torch.bool),
        "seen_BV": torch.tensor([[False, True, False]]),
        "uniform_B": torch.tensor([0.999]),
    }
    inputs = {name: values.to(device) for name, values in inputs.items()}
    sampler = Sampler([SamplingParams(temperature=0, image_temperature=0).resolved({})], device)
    no, yes = torch.tensor([[False], [True]], device=device)
    assert sampler.sample(**inputs, in_image_B=no).tolist() == [0]
    # Images know no repetition penalty.
    assert sampler.sample(**inputs, in_image_B=yes).tolist() == [1]


def test_lowest_temperature_does_not_overflow(device: torch.device) -> None:
    sampler = Sampler([SamplingParams(temperature=0.01).resolved({})], device)
    logits = torch.tensor([[3e4, -3e4, 2.9e4]])
    inputs = (
        logits,
        torch.ones(1, 3, dtype=torch.bool),
        torch.zeros(1, 3, dtype=torch.bool),
        torch.tensor([False]),
        torch.tensor([0.5]),
    )
    token = sampler.sample(*(values.to(device) for values in inputs))
    assert token.tolist() == [0]


def test_sampler_refuses_unresolved_settings() -> None:
    with pytest.raises(TypeError, match="resolved"):
        Sampler([SamplingParams(temperature=1)])


BAD = [
    ("temperature", -1),
    ("temperature", math.nan),
    ("temperature", math.inf),
    ("temperature", 0.001),
    ("temperature", True),
    ("temperature", "hot"),
    ("image_temperature", [1]),
    ("top_p", 0),
    ("top_p", 1.5),
    ("image_top_p", -0.1),
    ("top_k", -1),
    ("top_k", 2.0),
    ("image_top_k", True),
    ("min_p", 1.01),
    ("min_p", math.nan),
    ("repetition_penalty", 0),
    ("guidance_text", -1),
    ("guidance_image", math.inf),
    ("max_tokens", 0),
    ("max_tokens", 1.5),
    ("max_images", -1),
    ("seed", -1),
    ("seed", 2**64),
    pytest.param("seed", 10**9999, id="huge"),
    ("seed", "x" * 999),
    ("seed", object()),
    ("stop", ""),
    ("stop", ["a", ""]),
    ("stop", [1]),
    ("stop", 3),
    ("stop", ["a"] * 17),
]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_impossible_settings_are_refused_in_a_sentence(name: str, value: object) -> None:
    with pytest.raises(SettingError) as error:
        SamplingParams(**{name: value})  # type: ignore[arg-type]
    sentence = str(error.value)
    assert sentence.startswith(name) and ":" in sentence
    assert len(sentence) < 160 and "0x" not in sentence and "\n" not in sentence


def test_edges_are_allowed() -> None:
    SamplingParams(temperature=0, top_p=1, top_k=0, min_p=0, seed=2**63 - 1, max_images=0)
    assert SamplingParams(stop="x").stop_strings == ("x",)
    assert SamplingParams(stop=["x", "y"]).stop_strings == ("x", "y")
    assert SamplingParams().stop_strings == ()


def test_resolved_prefers_the_caller_then_the_model_then_meta() -> None:
    file = {
        "eos_token_id": 2,
        "top_k": 50,
        "chameleon": {
            "text": {"temperature": 0.5, "top_p": 0.8},
            "image": {"temperature": 1.0, "top_k": 7},
            "guidance_text": 2.0,
            "guidance_image": 1.0,
            "future_setting": 1,
        },
    }
    actual = SamplingParams(temperature=0, seed=3).resolved(file)
    expected = SamplingParams(
        temperature=0,
        top_p=0.8,
        top_k=0,
        min_p=0.0,
        repetition_penalty=1.2,
        image_temperature=1.0,
        image_top_p=0.9,
        image_top_k=7,
        guidance_text=2.0,
        guidance_image=1.0,
        seed=3,
    )
    assert actual == expected
    assert actual == SamplingParams(temperature=0, seed=3).resolved(file["chameleon"])  # type: ignore[arg-type]
    assert SamplingParams().resolved({"eos_token_id": 2, "top_k": 50}) == SamplingParams.meta()


def test_metas_settings() -> None:
    meta = SamplingParams.meta()
    assert (meta.temperature, meta.top_p, meta.repetition_penalty) == (0.7, 0.9, 1.2)
    assert (meta.image_temperature, meta.image_top_p) == (0.7, 0.9)
    assert (meta.guidance_text, meta.guidance_image) == (3.0, 1.2)


def test_settings_need_no_torch() -> None:
    code = "import earlyfusion.generation.settings, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
