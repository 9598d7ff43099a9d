"""The head that names what codewords show, and the decoder on wrong codes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tolerances import assert_same_losses

from earlyfusion.config import PRESETS
from earlyfusion.errors import SettingError
from earlyfusion.mini.emoji.dataset import EmojiData
from earlyfusion.mini.emoji.tensors import Labels, load_split
from earlyfusion.model.vqgan import VQGAN
from earlyfusion.recipes.run import run
from earlyfusion.train import checkpoint
from earlyfusion.train.image_tokenizer import (
    ImageTokenizerTask,
    VQLossConfig,
    begin_with,
    nearest_codewords,
)
from earlyfusion.train.monitor import read_metrics
from earlyfusion.train.optim import OptimConfig
from earlyfusion.train.semantic import UNKNOWN, SemanticHead, naming_loss
from earlyfusion.train.trainer import RunConfig, train

DATA = Path(__file__).parent / "data"
TINY = PRESETS["tiny"].vq_config
GENTLE = OptimConfig(lr=2e-3, warmup_steps=2, decay="constant", eps=1e-8)


def four(device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    pixels, labels = (
        torch.rand(4, 3, 16, 16) * 2 - 1,
        torch.tensor([[0, 0], [1, 0], [2, 1], [3, 1]]),
    )
    return pixels.to(device), labels.to(device)


def task_of(naming: float, steps: int, device: torch.device) -> ImageTokenizerTask:
    torch.manual_seed(0)
    model, batch = VQGAN(TINY).to(device), four(device)
    head = SemanticHead(TINY.embed_dim, TINY.grid, [4, 2], width=32).to(device) if naming else None
    config = VQLossConfig(naming=naming, revive_every=2, ramp_steps=4)
    return ImageTokenizerTask(model, config, lambda _: batch, steps, head=head)


def test_naming_is_learnt_from_codewords_and_leaves_the_files_as_they_are(
    tmp_path: Path, device: torch.device
) -> None:
    task, run = task_of(0.5, 40, device), tmp_path / "named"
    run_config = RunConfig(run, device=str(device), steps=40, log_every=1, save_every=40)
    train(task, run_config, GENTLE)
    rows = read_metrics(tmp_path / "named")
    assert rows[-1]["naming"] < 0.75 * rows[0]["naming"] and rows[-1]["named"] >= 0.75
    assert rows[-1]["psnr"] > rows[0]["psnr"]
    tensors, _ = checkpoint.load(tmp_path / "named")
    assert tensors["model"].keys() == VQGAN(TINY).state_dict().keys()
    assert set(tensors["head"]) == set(
        SemanticHead(TINY.embed_dim, TINY.grid, [4, 2], width=32).state_dict()
    )
    begin_with(VQGAN(TINY), str(tmp_path / "named"))


def test_the_names_reach_the_encoder_through_the_codewords(device: torch.device) -> None:
    gradients = []
    for naming in (0.0, 0.5):
        task = task_of(naming, 10, device)
        task.loss(5)[0].backward()
        weight = task.model.quant_conv.weight.grad
        assert weight is not None
        gradients.append(weight.clone())
    assert not torch.allclose(gradients[0], gradients[1], rtol=1e-3)
    head = SemanticHead(8, 16, [4]).to(device)
    latents = torch.randn(2, 8, 16, 16).to(device).requires_grad_()
    naming_loss(head(latents), torch.tensor([[0], [1]], device=device))[0].backward()
    assert latents.grad is not None and latents.grad.abs().sum() > 0


def test_a_run_with_a_head_goes_on_to_the_bit(tmp_path: Path, device: torch.device) -> None:
    uninterrupted = RunConfig(tmp_path / "whole", device=str(device), steps=6, log_every=1)
    train(task_of(0.5, 6, device), uninterrupted, GENTLE)
    part = replace(uninterrupted, out=tmp_path / "part", stop_after=3)
    train(task_of(0.5, 6, device), part, GENTLE)
    part.stop_after = 0
    train(task_of(0.5, 6, device), part, GENTLE)
    first, second = ([r["loss"] for r in read_metrics(r.out)] for r in (uninterrupted, part))
    assert_same_losses(second, first, device)


def test_labels_that_are_unknown_do_not_count(device: torch.device) -> None:
    logits = [torch.tensor([[5.0, 0.0], [0.0, 5.0]], device=device)]
    right = naming_loss(logits, torch.tensor([[0], [UNKNOWN]], device=device))
    assert right[1] == 1.0 and right[0] < 0.5
    none = torch.tensor([[UNKNOWN], [UNKNOWN]], device=device)
    assert naming_loss(logits, none) == (0.0, 0.0)
    wrong = naming_loss(logits, torch.tensor([[1], [0]], device=device))
    assert wrong[1] == 0.0 and wrong[0] > 2


def test_a_head_and_its_weight_go_together() -> None:
    with pytest.raises(SettingError, match="give a head"):
        ImageTokenizerTask(VQGAN(TINY), VQLossConfig(naming=0.5), lambda _: four(), 1)
    with pytest.raises(SettingError, match="perturb"):
        VQLossConfig(perturb=2)


def test_perturbed_codes_are_near_ones_and_only_the_decoder_sees_them(
    device: torch.device,
) -> None:
    torch.manual_seed(0)
    model, (pixels, _) = VQGAN(TINY).to(device), four(device)
    near = nearest_codewords(model, 3)
    distances = torch.cdist(model.quantize.embedding.weight, model.quantize.embedding.weight)
    assert torch.equal(near, distances.fill_diagonal_(torch.inf).topk(3, largest=False).indices)
    config = VQLossConfig(perturb=0.5)
    task = ImageTokenizerTask(model, config, lambda _: pixels, 10, "decoder")
    codes, recorded = model.encode(pixels), list[torch.Tensor]()
    decode = model.decode
    model.decode = lambda codes: recorded.append(codes) or decode(codes)  # type: ignore[method-assign]
    task.loss(0)[0].backward()
    changed = recorded[0] != codes
    assert 0.4 < changed.float().mean() < 0.6
    allowed = nearest_codewords(model)[codes[changed]]
    assert (allowed == recorded[0][changed][:, None]).any(1).all()
    assert torch.equal(task._results[0].codes_N, codes.flatten())


def test_in_bf16_the_codes_are_still_the_nearest(device: torch.device) -> None:
    torch.manual_seed(0)
    model, (pixels, _) = VQGAN(TINY).to(device), four(device)
    with torch.no_grad():
        model.quantize.embedding.weight.mul_(0.02).add_(1.0)  # codewords close to each other
    with torch.autocast(device.type, torch.bfloat16):
        out = model(pixels)
    assert torch.equal(out.codes, model.nearest_codes(out.latents.detach().float()))


def test_images_and_labels_of_the_data() -> None:
    data = EmojiData(DATA)
    table = load_split(DATA, "train", 16, "cpu")
    assert table.shape == (len(data.split("train")), 16, 16, 3) and table.dtype == torch.uint8
    labels = Labels(data)
    result = labels.of(data.split("train"))
    assert result.min() == 0 and tuple((result.max(0).values + 1).tolist()) == labels.answers
    held_out = labels.of(data.split("val-concept"))
    assert (held_out[:, 0] == UNKNOWN).all()


def test_the_recipe_names_held_out_images_and_its_decoder_goes_on(
    tmp_path: Path, device: torch.device
) -> None:
    small = [f"data={DATA}", "resolution=16", "steps=3", "log_every=1", "batch=2"]
    small += [f"device={device}", "precision=fp32"]
    run("mini_named_image_tokenizer", [*small, f"out={tmp_path / 'first'}"])
    last = read_metrics(tmp_path / "first")[-1]
    assert 0 <= last["held_out_named"] <= 1 and last["held_out_psnr"] > 0
    alone = ["trainable=decoder", "naming=0", "perturb=0.1", f"start={tmp_path / 'first'}"]
    run("mini_named_image_tokenizer", [*small, *alone, f"out={tmp_path / 'second'}"])
    first, second = (checkpoint.weights(tmp_path / name) for name in ("first", "second"))
    decoder = ("decoder.", "post_quant_conv.")
    assert all(torch.equal(first[n], second[n]) != n.startswith(decoder) for n in first)
