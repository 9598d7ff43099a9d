from __future__ import annotations

from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch

from earlyfusion.generation import guidance
from earlyfusion.generation.guidance import Condition
from earlyfusion.vocabulary import Vocabulary

BOS, BEGIN, END, TURN = 0, 17, 16, 18
VOCABULARY = cast(
    Vocabulary,
    SimpleNamespace(bos=BOS, begin_image=BEGIN, end_image=END, image_tokens=np.arange(4, 16)),
)
PICTURE = [BEGIN, 5, 6, 4, END]


@pytest.mark.parametrize(("text", "image"), [(3.0, 1.2), (1.0, 1.0)])
def test_combine_is_metas(golden: Path, text: float, image: float) -> None:
    with np.load(golden / "expected" / "processors.npz") as file:
        full, image_only, unconditional = torch.from_numpy(file["logits"]).chunk(3)
        want = torch.from_numpy(file[f"cfg3_text{text}_image{image}"])
    got = guidance.combine(full, image_only, unconditional, text, image)
    torch.testing.assert_close(got.repeat(3, 1), want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["tiny_1", "tiny_mp2_swin_gqa"])
def test_mix_gives_metas_recorded_logits(golden: Path, name: str) -> None:
    cases = {"image_greedy": (3.0, 1.2), "image_greedy_after_image": (2.0, 1.7)}
    checked = 0
    with np.load(golden / "expected" / f"{name}.generation_logits.npz") as file:
        for key in file:
            case, step = key.split("/")
            if case not in cases or not step.startswith("cfg_in"):
                continue
            text, image = cases[case]
            rows = torch.from_numpy(file[key]).split(1)
            names: tuple[Condition, ...] = ("full", "image_only", "unconditional")
            kept = guidance.needed(text, image, has_images=case != "image_greedy")
            logits = {n: r for n, r in zip(names, rows, strict=True) if n in kept}
            want = torch.from_numpy(file[key.replace("cfg_in", "cfg_out")])[:1]
            got = guidance.mix(logits, text, image)
            torch.testing.assert_close(got, want, atol=5e-4, rtol=0)
            checked += 1
    assert checked >= 5


@pytest.mark.parametrize("has_images", [True, False])
def test_fewer_branches_give_the_same_logits(has_images: bool) -> None:
    rows = torch.randn(3, 1, 50, generator=torch.Generator().manual_seed(1)).double()
    full, unconditional = rows[0], rows[2]
    image_only = rows[1] if has_images else unconditional
    every: dict[Condition, torch.Tensor] = {
        "full": full,
        "image_only": image_only,
        "unconditional": unconditional,
    }
    counts = set()
    for text, image in product((0.0, 1.0, 1.2, 3.0), repeat=2):
        kept = guidance.needed(text, image, has_images)
        assert kept[0] == "full"
        want = guidance.combine(full, image_only, unconditional, text, image)
        got = guidance.mix({name: every[name] for name in kept}, text, image)
        torch.testing.assert_close(got, want)
        counts.add(len(kept))
    assert counts == ({1, 2, 3} if has_images else {1, 2})


def test_metas_settings_need_two_branches_after_text_and_three_after_an_image() -> None:
    assert guidance.needed(3.0, 1.2, has_images=False) == ("full", "unconditional")
    assert guidance.needed(3.0, 1.2, True) == ("full", "image_only", "unconditional")
    assert guidance.needed(1.0, 1.0, True) == guidance.needed(1.0, 7.0, False) == ("full",)


def test_branch_prompts() -> None:
    history = [BOS, 30, *PICTURE, 31, TURN, 32, BEGIN]
    prompts: dict[Condition, list[int]] = {
        "full": history,
        "image_only": [BOS, *PICTURE, BEGIN],
        "unconditional": [BOS, BEGIN],
    }
    for branch, want in prompts.items():
        assert guidance.prompt(branch, history, VOCABULARY) == want
    assert guidance.has_images(history, VOCABULARY)
    assert not guidance.has_images([BOS, 30, TURN, BEGIN], VOCABULARY)
