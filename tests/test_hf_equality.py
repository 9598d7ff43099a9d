"""The transformers face against transformers' own class: every shape, every search, both ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from test_hf_models import NAMES, PLACEHOLDER, TEXT, stock_model
from tolerances import assert_below
from torch import Tensor

from earlyfusion.hf import ChameleonConfig, ChameleonForConditionalGeneration

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SHAPES: dict[str, dict[str, Any]] = {
    "pre_norm": {},
    "post_norm": {"swin_norm": True},
    "gqa": {"num_key_value_heads": 2},
    "one_key_head": {"num_key_value_heads": 1, "swin_norm": True},
    "attention_bias": {"attention_bias": True},
    "mlp_bias": {"mlp_bias": True},
    "tied": {"tie_word_embeddings": True},
    "model_parallel_2": {"model_parallel_size": 2, "num_key_value_heads": 2, "swin_norm": True},
    "model_parallel_4": {"model_parallel_size": 4},
    "linear_rope": {
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}
    },
    "llama3_rope": {"rope_parameters": LLAMA3},
    "everything": {
        "swin_norm": True,
        "num_key_value_heads": 2,
        "model_parallel_size": 2,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
        "rope_parameters": LLAMA3,
    },
}
SEARCHES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "beam": {"do_sample": False, "num_beams": 3},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "top_k": 20},
}
PROMPTS = 20


def prompts(device: torch.device) -> dict[str, Tensor]:
    """20 prompts of 3 to 24 text tokens, every fourth with an image, padded on the left."""
    generator = torch.Generator().manual_seed(11)
    text = [int(token) for token in TEXT if 4 <= token < PLACEHOLDER]
    rows, images = [], 0
    for number in range(PROMPTS):
        sampled = torch.randint(len(text), (3 + number,), generator=generator)
        row = [0, *(text[place] for place in sampled)]
        if number % 4 == 3:
            row[2:2] = [91, *[PLACEHOLDER] * 64, 92]
            images += 1
        rows.append(row)
    width = max(map(len, rows))
    pixels = torch.rand(images, 3, 16, 16, generator=generator) * 2 - 1
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return {
        "input_ids": torch.tensor([[1] * (width - len(row)) + row for row in rows], device=device),
        "attention_mask": torch.tensor(mask, device=device),
        "pixel_values": pixels.to(device),
    }


def some(inputs: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """One prompt alone, without its padding."""
    mask = inputs["attention_mask"][row].bool()
    ids = inputs["input_ids"][row, mask][None]
    alone = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if PLACEHOLDER in ids:
        alone["pixel_values"] = inputs["pixel_values"][row // 4][None]
    return alone


class Pair:
    """One random checkpoint in transformers' class and in ours; transformers saved it."""

    def __init__(self, folder: Path, device: torch.device, **shape: Any) -> None:
        self.folder = folder
        self.stock = stock_model(**shape)
        self.stock.save_pretrained(folder)
        self.own = ChameleonForConditionalGeneration.from_pretrained(folder).eval()
        self.stock.to(device)
        self.own.to(device)

    def generated(self, inputs: dict[str, Tensor], **how: Any) -> list[Tensor]:
        """What the two give, each from the same seed."""
        results = []
        for model in (self.stock, self.own):
            torch.manual_seed(5)
            results.append(model.generate(**inputs, max_new_tokens=8, **how))
        return results


@pytest.fixture(scope="module", params=SHAPES)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, device: torch.device
) -> Pair:
    return Pair(tmp_path_factory.mktemp(request.param), device, **SHAPES[request.param])


def test_state_dicts(pair: Pair) -> None:
    model = ChameleonForConditionalGeneration(ChameleonConfig(**pair.stock.config.to_dict()))
    expected, actual = pair.stock.state_dict(), model.state_dict()
    assert {k: v.shape for k, v in expected.items()}.items() <= {
        k: v.shape for k, v in actual.items()
    }.items()
    assert {k.split("decoder.")[0] for k in actual.keys() - expected.keys()} == {"model.vqmodel."}


@torch.no_grad()
def test_logits(pair: Pair, device: torch.device) -> None:
    inputs = prompts(device)
    mask = inputs["attention_mask"].bool()
    expected, actual = pair.stock(**inputs).logits[mask], pair.own(**inputs).logits[mask]
    gap = (expected - actual)[:, TEXT.to(device)].abs()
    assert_below(gap, 1e-5 * max(1.0, float(actual.abs().max())))
    images = torch.tensor(sorted(NAMES.values()), device=device)
    assert (expected[:, images] == torch.finfo(torch.float32).min).all()
    assert actual[:, images].abs().max() < 1e3


@pytest.mark.parametrize("how", SEARCHES)
def test_20_prompts(pair: Pair, how: str, device: torch.device) -> None:
    expected, actual = pair.generated(prompts(device), **SEARCHES[how])
    assert expected.shape[0] == PROMPTS
    assert torch.equal(expected, actual)
    new = actual[:, prompts(device)["input_ids"].shape[1] :]
    assert len({tuple(row.tolist()) for row in new}) > PROMPTS // 2


@pytest.mark.parametrize(
    "how", ["greedy", *(pytest.param(how, marks=pytest.mark.slow) for how in ("beam", "sampling"))]
)
def test_20_prompts_one_by_one(tmp_path: Path, how: str, device: torch.device) -> None:
    pair, inputs = Pair(tmp_path, device, **SHAPES["model_parallel_2"]), prompts(device)
    for row in range(PROMPTS):
        assert torch.equal(*pair.generated(some(inputs, row), **SEARCHES[how])), row


def test_each_loads_what_the_other_saved(pair: Pair, tmp_path: Path, device: torch.device) -> None:
    for key, value in pair.own.state_dict().items():
        assert torch.equal(value, pair.stock.state_dict()[key]), key
    torch.manual_seed(2)
    full = ChameleonForConditionalGeneration(ChameleonConfig(**pair.own.config.to_dict())).eval()
    full.save_pretrained(tmp_path)
    reloaded, loading = transformers.ChameleonForConditionalGeneration.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not loading["missing_keys"] and not loading["mismatched_keys"]
    assert all("decoder" in key for key in loading["unexpected_keys"])
    for key, value in reloaded.state_dict().items():
        assert torch.equal(value, full.state_dict()[key]), key
    ids = torch.tensor([[0, 50, 60, 61]], device=device)
    with torch.no_grad():
        gap = reloaded.to(device)(ids).logits - full.to(device)(ids).logits
    assert_below(gap[..., TEXT.to(device)].abs(), 1e-5)


def test_a_config_is_the_same_in_both(pair: Pair, tmp_path: Path) -> None:
    pair.own.config.save_pretrained(tmp_path)
    actual = transformers.ChameleonConfig.from_pretrained(tmp_path).to_dict()
    expected = transformers.ChameleonConfig.from_pretrained(pair.folder).to_dict()
    for config in (actual, expected):
        del config["vq_config"]["dtype"]  # ours stays in fp32 and says so
    assert actual == expected
