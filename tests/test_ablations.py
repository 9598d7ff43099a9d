from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from earlyfusion.errors import SettingError
from earlyfusion.mini.ablations import (
    VARIANTS,
    AttentionProbe,
    Trial,
    build,
    config,
    power_law,
    trials,
)
from earlyfusion.model.attention import dot_product_attention
from earlyfusion.recipes.run import override, run

DATA = Path(__file__).parent / "data"
SMALL = ["hidden_size=32", "intermediate_size=64", "num_attention_heads=2", "num_hidden_layers=2"]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two variants at two rates, a few steps each, on images of 16 x 16."""
    runs = tmp_path_factory.mktemp("runs")
    tiny = [f"data={DATA}", "resolution=16", "steps=6", "log_every=1", "save_every=4"]
    run("mini_image_tokenizer", [*tiny, f"out={runs / 'vq'}", "batch=2", "steps=2"])
    arguments = [*tiny, *SMALL, f"image_tokenizer={runs / 'vq'}", f"out={runs / 'out'}"]
    arguments += ["dialogues=60", "length=400", "warmup_steps=1", "held_out=12", "variants=2"]
    arguments += ["precision=fp32", "only=reference,no QK-norm", "rates=1e-3,1e-1"]
    run("ablations", arguments)
    times = {p: p.stat().st_mtime_ns for p in (runs / "out").glob("*/result.json")}
    run("ablations", arguments)  # all is done
    assert times == {p: p.stat().st_mtime_ns for p in (runs / "out").glob("*/result.json")}
    return runs / "out"


def test_a_folder_a_variant_and_a_table_with_curves(out: Path) -> None:
    folders = sorted(p.parent.name for p in out.glob("*/result.json"))
    assert folders == ["no-qk-norm-0.001", "no-qk-norm-0.1", "reference-0.001", "reference-0.1"]
    rows = [json.loads(x) for x in (out / folders[0] / "metrics.jsonl").read_text().splitlines()]
    measured = [r["step"] for r in rows if "valid_text_nats" in r]
    assert measured == [0, 5]
    assert rows[5]["valid_nats"] < rows[0]["valid_nats"] and rows[5]["attention_score"] > 0
    text = (out / "ablations.md").read_text()
    assert text.count("| reference |") == text.count("| no QK-norm |") == 2
    for rate in ("0.001", "0.1"):
        assert f"rate-{rate}.png" in text and (out / f"rate-{rate}.png").stat().st_size > 5000
    assert not list(out.glob("*/step-*"))


def test_variants_of_one_shape_begin_with_the_same_weights() -> None:
    small = override(config, [*SMALL, "device=cpu"])
    reference = build(Trial("reference", VARIANTS["reference"], 1.0), small, 300).state_dict()
    for name, variant in VARIANTS.items():
        model = build(Trial(name, variant, 1.0), small, 300)
        state = model.state_dict()
        assert all(torch.equal(reference[k], v) for k, v in state.items())
        assert any("q_norm" in k for k in state) == variant.qk_norm
        assert model.config.swin_norm == ("norms after" in name)


def test_the_probe_attends_as_usual_and_sees_no_other_document() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 9, 2, 8, generator=generator) for _ in range(3))
    document = torch.tensor([[0] * 4 + [1] * 5])
    mask = (document[:, :, None] == document[:, None]).tril()
    probe = AttentionProbe(document)
    expected = dot_product_attention(q, k, v, mask=mask[:, None])
    torch.testing.assert_close(probe(q, k, v), expected, atol=1e-5, rtol=1e-5)
    scores = torch.einsum("btnh,bsnh->bnts", q, k)[mask[:, None].expand(1, 2, 9, 9)] / 8**0.5
    assert probe.highest == pytest.approx(float(scores.max()), rel=1e-5)


def test_names_are_checked_and_sizes_come_at_the_first_rate() -> None:
    with pytest.raises(SettingError, match=r"\['nothing'\] are unknown"):
        replace(config, only=("nothing",))
    listed = trials(config)
    assert len(listed) == 2 * len(VARIANTS) + 2 == len({t.folder for t in listed})
    assert {t.rate for t in listed if t.name in ("small", "large")} == {config.rates[0]}


def test_a_power_law_is_reported_only_if_there_is_one() -> None:
    told = power_law([(n, 3.0 * n**-0.1) for n in (1e5, 1e6, 5e6)])
    assert "weights^-0.1000" in told and told.startswith("loss = 3 x")
    assert power_law([(1e5, 3.0), (1e6, 2.0), (5e6, 1.95)]).startswith("No power law")
