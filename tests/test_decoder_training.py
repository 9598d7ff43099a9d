"""The decoder or the encoder of an image tokenizer trained alone: the rest stays to the bit."""

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
from earlyfusion.train.semantic import SemanticHead
from earlyfusion.train.trainer import RunConfig, train

DATA = Path(__file__).parent / "data"
TINY = PRESETS["tiny"].vq_config
DECODER = ("decoder.", "post_quant_conv.")


def _is_of_decoder(name: str) -> bool:
    return name.startswith(DECODER)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("codebook", ["ema", "gradient"])
def test_encoder_and_codebook_stay_and_the_decoder_learns(
    tmp_path: Path, precision: str, codebook: str
) -> None:
    torch.manual_seed(0)
    model = VQGAN(TINY)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images = torch.rand(4, 3, 16, 16) * 2 - 1
    codes = model.encode(images)
    loss = VQLossConfig(codebook=codebook, revive_every=2, ramp_steps=0)
    task = ImageTokenizerTask(model, loss, lambda _: images, 30, "decoder")
    gentle = OptimConfig(lr=2e-3, warmup_steps=2, decay="constant", eps=1e-8)
    run_config = RunConfig(tmp_path, steps=30, log_every=1, precision=precision)
    train(task, run_config, gentle)
    after = model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if _is_of_decoder(name)}
    assert torch.equal(model.encode(images), codes)
    rows = read_metrics(tmp_path)
    assert rows[-1]["psnr"] > rows[0]["psnr"] + 1


def test_the_decoder_sees_exact_codewords_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = VQGAN(TINY)
    images = torch.rand(4, 3, 16, 16) * 2 - 1
    codes, recorded = model.encode(images), []
    decode = model.decode
    monkeypatch.setattr(model, "decode", lambda codes: recorded.append(codes) or decode(codes))
    task = ImageTokenizerTask(model, VQLossConfig(), lambda _: images, 30, "decoder")
    with torch.autocast("cpu", torch.bfloat16):
        task.loss(0)[0].backward()
    assert torch.equal(recorded[0], codes)
    assert all(p.grad is None for n, p in model.named_parameters() if not _is_of_decoder(n))
    assert all(p.grad is not None for n, p in model.named_parameters() if _is_of_decoder(n))


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
        assert torch.equal(value, second[name]) != _is_of_decoder(name)


@pytest.mark.parametrize("first_level", [0, 1])
def test_codebook_and_decoder_stay_and_the_encoder_learns(
    tmp_path: Path, first_level: int, device: torch.device
) -> None:
    torch.manual_seed(0)
    model = VQGAN(TINY).to(device)
    head = SemanticHead(TINY.embed_dim, TINY.grid, (4,)).to(device)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images = (torch.rand(4, 3, 16, 16) * 2 - 1).to(device)
    labels, codes = torch.arange(4, device=device)[:, None], model.encode(images)
    decoded = model.decode(codes)
    loss = VQLossConfig(naming=1.0, match=0.01, drawn=0.5, first_level=first_level, revive_every=2)
    task = ImageTokenizerTask(model, loss, lambda _: (images, labels), 30, "encoder", head=head)
    assert task.loss(0)[1]["match"] == 0
    gentle = OptimConfig(lr=2e-3, warmup_steps=2, decay="constant", eps=1e-8)
    where = RunConfig(tmp_path, steps=30, log_every=1, precision="fp32", device=str(device))
    train(task, where, gentle)
    after = model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    levels = ("encoder.conv_in.", "encoder.down.0.") if first_level else ()
    learns = {n for n in before if n.startswith(("encoder.", "quant_conv."))}
    assert changed == {n for n in learns if not n.startswith(levels)}
    assert torch.equal(model.decode(codes), decoded)
    rows = read_metrics(tmp_path)
    assert rows[0]["named"] < 1 and rows[-1]["named"] == 1 and rows[-1]["match"] > 0


def test_only_a_share_of_the_images_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, recorded = VQGAN(TINY), []
    pixels = model.pixels
    monkeypatch.setattr(model, "pixels", lambda x: recorded.append(x) or pixels(x))
    images = torch.rand(8, 3, 16, 16) * 2 - 1
    config = VQLossConfig(drawn=0.25, match=1.0, ramp_steps=0)
    task = ImageTokenizerTask(model, config, lambda _: images, 30, "encoder")
    with torch.no_grad():
        model.quant_conv.bias += 0.5
    loss, figures, count = task.loss(0)
    codes = model.encode(images)
    assert torch.allclose(recorded[0], model.embed(codes)[:2], atol=1e-5) and count == 8
    decoded = model.decode(codes)[:2]
    terms = (decoded - images[:2]).abs().mean() + (decoded - images[:2]).square().mean()
    moved = model.latents(images)
    terms += 0.25 * (moved - model.embed(codes)).square().mean()
    terms += 0.25 / (moved - 0.5).var()  # latents were moved by 0.5
    assert torch.allclose(loss, terms, rtol=1e-4)
    assert torch.allclose(figures["match"], 0.25 / (moved - 0.5).var(), rtol=1e-4)


def test_what_cannot_be_begun_with_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="start="):
        run("mini_image_tokenizer", [f"data={DATA}", "trainable=decoder"])
    with pytest.raises(SettingError, match="all or decoder or encoder"):
        run("mini_image_tokenizer", [f"data={DATA}", "trainable=codebook"])
    with pytest.raises(SettingError, match="trainable=encoder needs an image tokenizer"):
        run("mini_image_tokenizer", [f"data={DATA}", "trainable=encoder"])
    for field in ("match=0.1", "drawn=0.5", "first_level=1"):
        with pytest.raises(SettingError, match="need trainable=encoder"):
            run("mini_image_tokenizer", [f"data={DATA}", field])
    encoder = [f"data={DATA}", "trainable=encoder", "start=mini"]
    with pytest.raises(SettingError, match="needs a decoder that learns"):
        run("mini_image_tokenizer", [*encoder, "adversarial=0.1"])
    with pytest.raises(SettingError, match="drawn=0"):
        run("mini_image_tokenizer", [*encoder, "drawn=0"])
    with pytest.raises(SettingError, match="give at most 1"):
        ImageTokenizerTask(VQGAN(TINY), VQLossConfig(first_level=2), lambda _: None, 1, "encoder")  # type: ignore[arg-type, return-value]
    checkpoint.Saver(tmp_path / "other", keep=1, in_background=False).save(
        1, {"model": {"x": torch.ones(1)}}, {}
    )
    with pytest.raises(CheckpointError, match="no image tokenizer of this shape"):
        begin_with(VQGAN(TINY), str(tmp_path / "other"))
    with pytest.raises(CheckpointError, match="no model folder"):
        begin_with(VQGAN(TINY), str(tmp_path / "nothing"))


def test_the_embedded_model_can_be_begun_with() -> None:
    model = begin_with(VQGAN(PRESETS["mini"].vq_config), "mini")
    assert model.quantize.embedding.weight.std() > 0
