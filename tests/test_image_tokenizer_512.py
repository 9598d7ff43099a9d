"""The recipe of the real image tokenizer, at a tiny size."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import PIL.Image
import pytest
import torch
from image_tokenizer_case import TINY, train
from tolerances import assert_same_losses, tolerance
from torch import Tensor, nn

from earlyfusion.checkpoints.assemble import build_vqgan
from earlyfusion.checkpoints.meta import open_vqgan
from earlyfusion.config import PRESETS
from earlyfusion.errors import CheckpointError, DataError, SettingError
from earlyfusion.model.vqgan import VQGAN
from earlyfusion.parallel import ParallelConfig
from earlyfusion.recipes import image_tokenizer_512
from earlyfusion.recipes.run import override
from earlyfusion.train import checkpoint
from earlyfusion.train.discriminator import Discriminator, check_side
from earlyfusion.train.image_tokenizer import (
    HeldOut,
    ImageTokenizerTask,
    VQLossConfig,
    begin_with,
)
from earlyfusion.train.likeness import psnr, ssim
from earlyfusion.train.monitor import read_metrics
from earlyfusion.train.optim import load_optimizer

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Smooth images that a tiny network can learn, and one that is broken."""
    folder = tmp_path_factory.mktemp("photos")
    generator = torch.Generator().manual_seed(0)
    for number in range(40):
        corners = torch.rand(1, 3, 2, 2, generator=generator)
        pixels = nn.functional.interpolate(corners, (24, 32), mode="bilinear")[0]
        values = (pixels * 255).byte().permute(1, 2, 0).numpy()
        PIL.Image.fromarray(values).save(folder / f"{number}.png")
    (folder / "broken.png").write_bytes(b"no picture")
    return folder


@pytest.fixture(scope="module")
def vgg16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights under the names of torchvision."""
    widths = {0: (3, 64), 2: (64, 64), 5: (64, 128), 7: (128, 128), 10: (128, 256), 12: (256, 256)}
    widths |= {14: (256, 256), 17: (256, 512)} | {n: (512, 512) for n in (19, 21, 24, 26, 28)}
    generator, state = torch.Generator().manual_seed(0), {}
    for number, (inputs, outputs) in widths.items():
        scale = (2 / (9 * inputs)) ** 0.5
        weight = torch.randn(outputs, inputs, 3, 3, generator=generator) * scale
        state |= {f"features.{number}.weight": weight}
        state |= {f"features.{number}.bias": torch.zeros(outputs)}
    path = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    torch.save(state, path)
    return path


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(run)]


def differ(a: dict[str, Tensor], b: dict[str, Tensor]) -> set[str]:
    return {name for name in a if not torch.equal(a[name], b[name])}


def test_it_learns_resumes_exactly_and_ends_in_a_folder_that_loads(
    tmp_path: Path, photos: Path, vgg16: Path, device: torch.device
) -> None:
    """With all terms, in parts, by threads: the discriminator and its optimizer are resumed too."""
    fields = [f"data={photos}", "steps=12", "batch=4", "micro_batch=2", "workers=2", "keep=9"]
    fields += ["perceptual=1", f"perceptual_weights={vgg16}", "sample_every=6", "save_every=100"]
    fields += ["adversarial=0.8", "adversarial_from=3", "critic_layers=1", "critic_width=8"]
    train(*fields, f"out={tmp_path / 'whole'}", device=device)
    rows = read_metrics(tmp_path / "whole")
    known = {"loss", "psnr", "ssim", "perceptual", "perplexity", "usage", "commit", "mfu"}
    assert known <= rows[0].keys() and "critic" not in rows[2]
    assert all({"critic", "fooled"} <= row.keys() for row in rows[3:])
    held_out = [row["step"] for row in rows if "held_out_psnr" in row]
    assert held_out == [5, 11]
    assert {"held_out_ssim", "held_out_usage", "held_out_perplexity"} <= rows[5].keys()
    with PIL.Image.open(tmp_path / "whole" / "samples" / "step-00000012.png") as grid:
        assert grid.size == (4 * 132 + 4, 2 * 132 + 4)
    train(*fields, f"out={tmp_path / 'part'}", "stop_after=7", device=device)
    alone = ["trainable=decoder", f"start={tmp_path / 'part'}"]
    with pytest.raises(CheckpointError, match="trainable=all, not decoder"):
        train(*fields, f"out={tmp_path / 'part'}", *alone, device=device)
    with pytest.raises(DataError, match="another out folder"):
        train(*fields, f"out={tmp_path / 'part'}", "smallest=0.7", device=device)
    train(*fields, f"out={tmp_path / 'part'}", device=device)
    assert_same_losses(losses(tmp_path / "part"), losses(tmp_path / "whole"), device)
    (whole, _), (part, _) = (checkpoint.load(tmp_path / name) for name in ("whole", "part"))
    if device.type == "cpu":  # a GPU adds gradients in no fixed order
        assert not differ(whole["model"], part["model"])
        assert not differ(whole["critic"]["net"], part["critic"]["net"])
    model = build_vqgan(*open_vqgan(tmp_path / "whole" / "model"), tmp_path)
    assert not differ(whole["model"], model.state_dict())
    begun = begin_with(VQGAN(model.config), str(tmp_path / "whole" / "model"))
    assert not differ(whole["model"], begun.state_dict())


def test_it_learns_and_counts_what_is_broken(
    tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str], device: torch.device
) -> None:
    train(
        f"data={photos}", "steps=40", "batch=8", "micro_batch=0", f"out={tmp_path}", device=device
    )
    rows = read_metrics(tmp_path)
    assert rows[-1]["psnr"] > rows[0]["psnr"] + 0.8
    assert rows[-1]["held_out_psnr"] > rows[0]["psnr"]
    assert "broken images: " in capsys.readouterr().err
    assert "broken.png" in (tmp_path / "quarantine.jsonl").read_text()


def test_a_step_in_parts_is_the_step(tmp_path: Path, photos: Path, device: torch.device) -> None:
    for micro in (0, 2):
        out = tmp_path / str(micro)
        train(
            f"data={photos}",
            "steps=5",
            "batch=8",
            f"micro_batch={micro}",
            f"out={out}",
            device=device,
        )
    full, parts = (losses(tmp_path / name) for name in ("0", "2"))
    assert max(abs(a - b) for a, b in zip(full, parts, strict=True)) < tolerance(1e-5, device)


@pytest.mark.parametrize("codebook", ["gradient", "ema"])
def test_two_processes_train_as_one(tmp_path: Path, photos: Path, codebook: str) -> None:
    """Gradients and statistics of the codebook are those of the whole batch; resumed by one.

    Codewords that are moved are drawn from the first process's latents, so none is moved here.
    """
    fields = [f"data={photos}", "steps=6", "batch=8", "micro_batch=2", f"codebook={codebook}"]
    fields += ["save_every=4", "revive_until=0"]
    train(*fields, f"out={tmp_path / 'one'}", "save_every=100")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node=2", str(TESTS / "image_tokenizer_case.py"), *fields]
    done = subprocess.run(
        [*command, f"out={tmp_path / 'two'}", "stop_after=4"],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS.parent)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    train(*fields, f"out={tmp_path / 'two'}")
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(two) == 6
    assert max(abs(a - b) for a, b in zip(one, two, strict=True)) < 1e-4


def test_moments_of_another_layout_are_laid_as_their_weights() -> None:
    """What several processes saved comes back row by row, whatever the weights' own layout."""
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    plain = nn.Conv2d(4, 8, 3)
    images = torch.randn(2, 4, 9, 9)
    optimizers = [torch.optim.AdamW(m.parameters(), 1e-2, fused=True) for m in (conv, plain)]
    plain.load_state_dict(conv.state_dict())
    for step in range(3):
        for module, optimizer in zip((conv, plain), optimizers, strict=True):
            optimizer.zero_grad()
            module(images).square().mean().backward()
            if step < 2 or module is plain:
                optimizer.step()
    saved = {
        number: {k: v.clone(memory_format=torch.contiguous_format) for k, v in moments.items()}
        for number, moments in optimizers[0].state_dict()["state"].items()
    }
    load_optimizer(optimizers[0], {"state": saved})
    optimizers[0].step()
    torch.testing.assert_close(conv.weight.detach(), plain.weight.detach(), rtol=1e-4, atol=1e-5)


def test_held_out_figures_are_those_of_codes(tmp_path: Path, device: torch.device) -> None:
    torch.manual_seed(0)
    model = VQGAN(PRESETS["tiny"].vq_config).eval().to(device)
    images = (torch.rand(5, 3, 16, 16) * 2 - 1).to(device)
    figures = HeldOut(model, images, num_shown=3, batch=2)(9, tmp_path)
    with torch.no_grad():
        codes = model.encode(images)
        decoded = model.decode(codes).clamp(-1, 1)
    assert figures["held_out_psnr"] == pytest.approx(float(psnr(decoded, images).mean()), abs=1e-4)
    assert figures["held_out_ssim"] == pytest.approx(float(ssim(decoded, images).mean()), abs=1e-4)
    assert figures["held_out_usage"] == pytest.approx(len(codes.unique()) / 64)
    shares = codes.flatten().bincount() / codes.numel()
    entropy = -(shares[shares > 0] * shares[shares > 0].log()).sum()
    assert figures["held_out_perplexity"] == pytest.approx(float(entropy.exp()), rel=1e-4)
    with PIL.Image.open(tmp_path / "step-00000009.png") as grid:
        first = grid.getpixel((4 + 132 + 3, 4 + 3))
    expected = ((images[1, :, 0, 0] + 1) * 127.5).round().int().tolist()
    assert first == tuple(expected)
    assert HeldOut(model, images[:0])(1, tmp_path) == {}


def test_the_discriminator_learns_to_tell_and_its_weight_balances(device: torch.device) -> None:
    torch.manual_seed(0)
    discriminator = Discriminator(layers=1, width=8, lr=2e-3, device=device)
    reals, fakes = torch.rand(4, 3, 16, 16) * 0.2 + 0.5, torch.rand(4, 3, 16, 16) * 0.2 - 0.7
    reals, fakes = reals.to(device), fakes.to(device)
    results = [discriminator.train_step([(reals, fakes)], 1.0, None) for _ in range(40)]
    assert results[0] == pytest.approx(1.0, abs=0.3) and results[-1] < 0.3
    halves = [(reals[:2], fakes[:2]), (reals[2:], fakes[2:])]
    assert discriminator.train_step(halves, 0.5, None) == pytest.approx(results[-1], abs=0.1)
    check_side(3, 64)
    with pytest.raises(SettingError, match=r"critic_layers=3 .* give 1 to 2"):
        check_side(3, 16)


@pytest.mark.parametrize(("step", "share"), [(0, 0.0), (5, 0.5), (20, 1.0)])
def test_the_commitment_grows_over_the_ramp(step: int, share: float, device: torch.device) -> None:
    images = (torch.rand(2, 3, 16, 16) * 2 - 1).to(device)
    losses = {}
    for commitment in (0.0, 0.25):
        torch.manual_seed(0)
        terms = VQLossConfig(commitment=commitment, ramp_steps=10, revive_until=0.0)
        model = VQGAN(PRESETS["tiny"].vq_config).to(device)
        task = ImageTokenizerTask(model, terms, lambda _: images, 30)
        losses[commitment], figures, _ = task.loss(step)
    added = float((losses[0.25] - losses[0.0]).detach())
    assert added == pytest.approx(0.25 * share * float(figures["commit"]), rel=1e-3, abs=1e-6)


def test_operations_of_an_image() -> None:
    """A convolution of the real shape by hand is a known share of all."""
    config = PRESETS["tiny"].vq_config
    torch.manual_seed(0)

    def task(trainable: str) -> ImageTokenizerTask:
        return ImageTokenizerTask(VQGAN(config), VQLossConfig(), lambda _: None, 1, trainable)  # type: ignore[arg-type, return-value]

    full, decoder = task("all").flops_per_unit, task("decoder").flops_per_unit
    first = 2 * 16 * 16 * 9 * 3 * 32
    assert full > 100 * first and full / 3 < decoder < full


def test_what_cannot_be_trained_so_is_refused(tmp_path: Path, photos: Path) -> None:
    config = override(image_tokenizer_512.config, [*TINY, f"data={photos}"])
    assert config.run.out == Path("runs/image_tokenizer_512")
    for fields, words in [
        (["batch=6", "micro_batch=4"], "batch=6"),
        (["trainable=decoder"], "start="),
        (["workers=-1"], "workers=-1"),
        (["checked=0"], "checked=0"),
        (["revive_every=0"], "revive_every=0"),
    ]:
        with pytest.raises(SettingError, match=words):
            train(f"data={photos}", f"out={tmp_path}", *fields)
    with pytest.raises(DataError, match=r"no file nowhere\.pth"):
        train(f"data={photos}", f"out={tmp_path}", "perceptual=1", "perceptual_weights=nowhere.pth")
    with pytest.raises(SettingError, match="data is empty"):
        train(f"out={tmp_path}")
    task = ImageTokenizerTask(VQGAN(PRESETS["tiny"].vq_config), VQLossConfig(), lambda _: None, 1)  # type: ignore[arg-type, return-value]
    with pytest.raises(SettingError, match="tensor=2"):
        task.distribute(None, ParallelConfig(tensor=2), False, torch.float32)
