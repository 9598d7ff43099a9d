"""The decoder of an image tokenizer trained by itself: codes stay the same to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from earlyfusion.config import PRESETS
from earlyfusion.errors import CheckpointError, SettingError
from earlyfusion.model.vqgan import VQGAN
from earlyfusion.recipes.run import run
from earlyfusion.train import checkpoint
from earlyfusion.train.image_tokenizer import ImageTokenizerTask, VQLossConfig, begin_with
from earlyfusion.train.monitor import read_metrics
from earlyfusion.train.optim import OptimConfig
from earlyfusion.train.trainer import RunConfig, train

DATA = Path(__file__).parent / "data"
TINY = PRESETS["tiny"].vq_config
DRAWING = ("decoder.", "post_quant_conv.")


def _is_drawing(name: str) -> bool:
    return name.startswith(DRAWING)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("codebook", ["ema", "gradient"])
def test_encoder_and_codebook_stay_and_the_decoder_learns(
    tmp_path: Path, precision: str, codebook: str
) -> None:
    torch.manual_seed(0)
    model = VQGAN(TINY)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pictures = torch.rand(4, 3, 16, 16) * 2 - 1
    codes = model.encode(pictures)
    loss = VQLossConfig(codebook=codebook, revive_every=2, ramp_steps=0)
    task = ImageTokenizerTask(model, loss, lambda _: pictures, 30, "decoder")
    gentle = OptimConfig(lr=2e-3, warmup_steps=2, decay="constant", eps=1e-8)
    run_config = RunConfig(tmp_path, steps=30, log_every=1, precision=precision)
    train(task, run_config, gentle)
    after = model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if _is_drawing(name)}
    assert torch.equal(model.encode(pictures), codes)
    rows = read_metrics(tmp_path)
    assert rows[-1]["psnr"] > rows[0]["psnr"] + 1


def test_the_decoder_sees_exact_codewords_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = VQGAN(TINY)
    pictures = torch.rand(4, 3, 16, 16) * 2 - 1
    codes, seen = model.encode(pictures), []
    decode = model.decode
    monkeypatch.setattr(model, "decode", lambda codes: seen.append(codes) or decode(codes))
    task = ImageTokenizerTask(model, VQLossConfig(), lambda _: pictures, 30, "decoder")
    with torch.autocast("cpu", torch.bfloat16):
        task.loss(0)[0].backward()
    assert torch.equal(seen[0], codes)
    assert all(p.grad is None for n, p in model.named_parameters() if not _is_drawing(n))
    assert all(p.grad is not None for n, p in model.named_parameters() if _is_drawing(n))


def test_the_recipe_goes_on_with_the_decoder_of_another_run(tmp_path: Path) -> None:
    small = [f"data={DATA}", "resolution=16", "steps=4", "log_every=1", "batch=2"]
    run("mini_image_tokenizer", [*small, f"out={tmp_path / 'first'}"])
    alone = [*small, "trainable=decoder", f"start={tmp_path / 'first'}"]
    run("mini_image_tokenizer", [*alone, f"out={tmp_path / 'second'}", "stop_after=2"])
    with pytest.raises(CheckpointError, match="trainable=decoder, not all"):
        run("mini_image_tokenizer", [*small, f"out={tmp_path / 'second'}"])
    run("mini_image_tokenizer", [*alone, f"out={tmp_path / 'second'}"])
    first, second = (checkpoint.load(tmp_path / name)[0]["model"] for name in ("first", "second"))
    for name, value in first.items():
        assert torch.equal(value, second[name]) != _is_drawing(name)


def test_what_cannot_be_begun_with_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="start="):
        run("mini_image_tokenizer", [f"data={DATA}", "trainable=decoder"])
    with pytest.raises(SettingError, match="all or decoder"):
        run("mini_image_tokenizer", [f"data={DATA}", "trainable=encoder"])
    checkpoint.Saver(tmp_path / "other", keep=1, beside=False).save(
        1, {"model": {"x": torch.ones(1)}}, {}
    )
    with pytest.raises(CheckpointError, match="no image tokenizer of this shape"):
        begin_with(VQGAN(TINY), str(tmp_path / "other"))
    with pytest.raises(CheckpointError, match="no model folder"):
        begin_with(VQGAN(TINY), str(tmp_path / "nothing"))


def test_the_embedded_model_can_be_begun_with() -> None:
    model = begin_with(VQGAN(PRESETS["mini"].vq_config), "mini")
    assert model.quantize.embedding.weight.std() > 0
