from __future__ import annotations

from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from serve_case import STRAWBERRY, mini
from tiny import make_request, tiny_processor, tiny_transformer
from tolerances import assert_close

from earlyfusion import EarlyFusionError, Image
from earlyfusion.generation import guidance
from earlyfusion.generation.guidance import Condition
from earlyfusion.generation.reference import Reader, generate_tokens
from earlyfusion.generation.settings import guidance_weights
from earlyfusion.vocabulary import Vocabulary

BOS, BEGIN, END, TURN = 0, 17, 16, 18
VOCABULARY = cast(
    Vocabulary,
    SimpleNamespace(bos=BOS, begin_image=BEGIN, end_image=END, image_tokens=np.arange(4, 16)),
)
IMAGE = [BEGIN, 5, 6, 4, END]


@pytest.mark.parametrize(("text", "image"), [(3.0, 1.2), (1.0, 1.0)])
def test_combine_is_metas(golden: Path, text: float, image: float, device: torch.device) -> None:
    with np.load(golden / "expected" / "processors.npz") as file:
        full, image_only, unconditional = torch.from_numpy(file["logits"]).to(device).chunk(3)
        expected = torch.from_numpy(file[f"cfg3_text{text}_image{image}"])
    actual = guidance.combine(full, image_only, unconditional, text, image)
    assert_close(actual.repeat(3, 1), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["tiny_1", "tiny_mp2_swin_gqa"])
def test_mix_gives_metas_recorded_logits(golden: Path, name: str, device: torch.device) -> None:
    cases = {"image_greedy": (3.0, 1.2), "image_greedy_after_image": (2.0, 1.7)}
    checked = 0
    with np.load(golden / "expected" / f"{name}.generation_logits.npz") as file:
        for key in file:
            case, step = key.split("/")
            if case not in cases or not step.startswith("cfg_in"):
                continue
            text, image = cases[case]
            rows = torch.from_numpy(file[key]).to(device).split(1)
            names: tuple[Condition, ...] = ("full", "image_only", "unconditional")
            kept = guidance.needed_conditions(text, image, has_images=case != "image_greedy")
            logits = {n: r for n, r in zip(names, rows, strict=True) if n in kept}
            expected = torch.from_numpy(file[key.replace("cfg_in", "cfg_out")])[:1]
            actual = guidance.combine_needed(logits, text, image)
            assert_close(actual, expected, atol=5e-4, rtol=0)
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
        kept = guidance.needed_conditions(text, image, has_images)
        assert kept[0] == "full"
        expected = guidance.combine(full, image_only, unconditional, text, image)
        actual = guidance.combine_needed({name: every[name] for name in kept}, text, image)
        torch.testing.assert_close(actual, expected)
        counts.add(len(kept))
    assert counts == ({1, 2, 3} if has_images else {1, 2})


def test_metas_settings_need_two_branches_after_text_and_three_after_an_image() -> None:
    assert guidance.needed_conditions(3.0, 1.2, has_images=False) == ("full", "unconditional")
    assert guidance.needed_conditions(3.0, 1.2, True) == ("full", "image_only", "unconditional")
    assert (
        guidance.needed_conditions(1.0, 1.0, True)
        == guidance.needed_conditions(1.0, 7.0, False)
        == ("full",)
    )


def test_branch_prompts() -> None:
    history = [BOS, 30, *IMAGE, 31, TURN, 32, BEGIN]
    prompts: dict[Condition, list[int]] = {
        "full": history,
        "image_only": [BOS, *IMAGE, BEGIN],
        "unconditional": [BOS, BEGIN],
    }
    for branch, expected in prompts.items():
        assert guidance.condition_prompt(branch, history, VOCABULARY) == expected
    assert guidance.has_images(history, VOCABULARY)
    assert not guidance.has_images([BOS, 30, TURN, BEGIN], VOCABULARY)


def test_a_negative_prompt_replaces_only_the_unconditional_branch() -> None:
    history, negative = [BOS, 30, *IMAGE, TURN, BEGIN], [BOS, 40, 41, TURN]
    conditions: tuple[Condition, ...] = ("full", "image_only", "unconditional")
    prompts = [
        guidance.condition_prompt(c, history, VOCABULARY, negative=negative) for c in conditions
    ]
    assert prompts == [history, [BOS, *IMAGE, BEGIN], [*negative, BEGIN]]


@pytest.mark.parametrize("with_image", [False, True], ids=["text", "image"])
def test_a_negative_prompt_follows_the_formula(
    tmp_path: Path, with_image: bool, device: torch.device
) -> None:
    """Written out once more: whole sequences through the transformer, no branches that cancel."""
    processor = tiny_processor(tmp_path)
    transformer, vocabulary = tiny_transformer(processor, device=device), processor.vocabulary
    request = make_request(
        processor, 1, "image", with_image, negative_prompt="배 a pear", image_temperature=0
    )
    tokens = list(generate_tokens(transformer, processor, request))
    words = processor.encode_text("배 a pear")
    negative = [vocabulary.bos, *words, vocabulary.end_of_turn, vocabulary.begin_image]
    full = [*request.ids, vocabulary.begin_image]
    image_ids = [token for token in full if token not in {*vocabulary.text_tokens.tolist()}]
    bare = [t for t in image_ids if t != vocabulary.end_of_turn] if with_image else negative

    def logits(ids: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            return Reader(transformer, len(ids)).read(ids)[0]

    text, image = guidance_weights(request.sampling)
    assert tokens[0] == vocabulary.begin_image
    for at in range(1, 65):
        tail = tokens[1:at]
        away = logits([*negative, *tail])
        of_images = logits([*bare, *tail])
        guided = away + image * (of_images - away) + text * (logits([*full, *tail]) - of_images)
        codes = guided[vocabulary.image_tokens.tolist()]
        assert tokens[at] == int(vocabulary.image_tokens[int(codes.argmax())])


def test_a_negative_prompt_changes_an_image_of_mini() -> None:
    images = {
        negative: mini().generate(
            "Draw a fruit.", "image", seed=3, guidance_text=3, negative_prompt=negative
        )
        for negative in (None, "Draw a red apple.", "Draw a banana.")
    }
    codes = [reply.segments[0].codes.tolist() for reply in images.values()]  # type: ignore[union-attr]
    assert codes[0] != codes[1] != codes[2] != codes[0]


STRAWBERRY_PROMPT = [Image.open(STRAWBERRY), "Draw it again."]


@pytest.mark.parametrize(
    ("prompt", "output", "settings", "sentence"),
    [
        ("Draw a cat.", "text", {"guidance_text": 3}, "this reply can have none"),
        ("Draw a cat.", "auto", {"max_images": 0, "guidance_text": 3}, "this reply can have none"),
        ("Draw a cat.", "image", {}, "no effect with guidance_text=1"),
        ("Draw a cat.", "image", {"guidance_image": 3}, "no effect with guidance_text=1"),
        (STRAWBERRY_PROMPT, "image", {"guidance_text": 3}, "no effect with guidance_image=1"),
        ("Draw a cat.", "image", {"guidance_text": 3, "negative_prompt": " "}, "use words"),
        ("Draw a cat.", "image", {"guidance_text": 3, "negative_prompt": 5}, "use words"),
        (
            "Draw a cat.",
            "image",
            {"guidance_text": 3, "max_tokens": 70, "negative_prompt": "no " * 40},
            "raise max_tokens",
        ),
    ],
)
def test_a_negative_prompt_without_effect_is_refused(
    prompt: Any, output: Any, settings: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(EarlyFusionError, match=sentence):
        mini().generate(prompt, output, **{"negative_prompt": "a dog", **settings})
