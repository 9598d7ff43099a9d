"""Several codes of an image in one pass: the same distribution, and greedy the same codes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from tiny import CONFIG, TEXTS, tiny_processor, tiny_transformer

from earlyfusion import Chameleon, SamplingParams
from earlyfusion.config import ModelConfig
from earlyfusion.engine.backends import cpu
from earlyfusion.engine.blocks import BLOCK_SIZE
from earlyfusion.engine.cache import PagedCache
from earlyfusion.engine.engine import Engine
from earlyfusion.errors import SettingError
from earlyfusion.generation import jacobi
from earlyfusion.generation.jacobi import NO_DRAFT, Window, resample
from earlyfusion.generation.reference import generate, generate_tokens
from earlyfusion.generation.request import Event, Finished, ImageDone, ImagePreview, Request
from earlyfusion.generation.sampler import SamplingTensors, warp
from earlyfusion.model.transformer import Transformer
from earlyfusion.processor import Processor, train_tokenizer
from earlyfusion.vocabulary import ImageLayout

BLOCK = BLOCK_SIZE * PagedCache.token_bytes(CONFIG, torch.float32)
GREEDY: dict[str, Any] = {"temperature": 0, "image_temperature": 0}
OFF: dict[str, Any] = {"guidance_text": 1, "guidance_image": 1}


# --- the rule: exact, by enumeration ---------------------------------------------------------


def enumerate_outcomes(draft_V: torch.Tensor, target_V: torch.Tensor, grid: int) -> torch.Tensor:
    """What `resample` gives for a draft from `draft_V`, over a grid of both its uniform numbers."""
    size = len(draft_V)
    ticks = (torch.arange(grid, dtype=torch.float64) + 0.5) / grid
    uniform_R2 = torch.cartesian_prod(ticks, ticks).repeat(size, 1)
    draft_R = torch.arange(size).repeat_interleave(grid**2)
    rows = len(draft_R)
    drawn_R = resample(draft_R, draft_V.expand(rows, -1), target_V.expand(rows, -1), uniform_R2)
    counts_VV = torch.zeros(size, size, dtype=torch.float64)
    counts_VV.index_put_((draft_R, drawn_R), torch.ones(rows).double(), accumulate=True)
    return counts_VV / grid**2


def test_a_draft_becomes_a_sample_of_the_target_distribution() -> None:
    rng = np.random.default_rng(0)
    for alpha in (0.2, 1.0, 5.0):
        draft_V, expected = torch.from_numpy(rng.dirichlet([alpha] * 5, size=2))
        joint = enumerate_outcomes(draft_V, expected, 200)
        torch.testing.assert_close(draft_V @ joint, expected, atol=2e-3, rtol=0)
        # No rule could keep more: as much as both distributions share.
        kept = (draft_V * joint.diagonal()).sum()
        torch.testing.assert_close(kept, torch.minimum(draft_V, expected).sum(), atol=2e-3, rtol=0)


def test_a_fixed_draft_and_none_are_cases_of_the_rule() -> None:
    expected = torch.tensor([0.1, 0.2, 0.3, 0.4]).double()
    fixed = torch.tensor([0.0, 1.0, 0.0, 0.0]).double()
    joint = enumerate_outcomes(fixed, expected, 100)
    torch.testing.assert_close(fixed @ joint, expected, atol=1e-2, rtol=0)
    ticks = (torch.arange(100).double() + 0.5) / 100
    uniform_R2 = torch.stack([torch.zeros(100).double(), ticks], 1)
    none_R = torch.full((100,), NO_DRAFT)
    zeros = torch.zeros(100, 4).double()
    drawn_R = resample(none_R, zeros, expected.expand(100, -1), uniform_R2)
    assert torch.bincount(drawn_R).tolist() == [10, 20, 30, 40]


def test_equal_distributions_keep_every_draft() -> None:
    wanted_RV = torch.rand(50, 7).double().softmax(-1)
    draft_R = torch.randint(0, 7, (50,))
    assert torch.equal(resample(draft_R, wanted_RV, wanted_RV, torch.rand(50, 2).double()), draft_R)


def test_a_window_settles_up_to_the_first_change() -> None:
    window = Window(4, seed=0, start=0)
    assert window.accept([7], codes_left=9) == [7] and window.drafts == [7, 7, 7]
    window.new_WV = torch.arange(4.0)[:, None]
    assert window.accept([7, 5, 6, 8], codes_left=8) == [7, 5]
    assert window.drafts == [6, 8, 8] and window.old_WV is not None
    assert window.old_WV[:, 0].tolist() == [2, 3]
    # All kept: all final, with the one behind them.
    assert window.accept([6, 8, 8, 1], codes_left=6) == [6, 8, 8, 1]
    assert window.drafts == [1], "two codes are left, and the last place needs no draft"
    assert window.accept([1, 3], codes_left=2) == [1, 3] and window.drafts == []


def test_numbers_come_from_the_seed_and_the_place() -> None:
    first, repeated, other = Window(4, 1, 5), Window(4, 1, 5), Window(4, 1, 6)
    assert first.uniforms() == repeated.uniforms() != other.uniforms()


# --- whole images: the joint distribution --------------------------------------------------

CODEBOOK, IMAGE_CODES, MANY = 4, 4, 20_000
Toy = Callable[[torch.Tensor], torch.Tensor]


def toy(seed: int, scale: float = 1.5) -> Toy:
    """A model of images of 4 codes out of 4: logits [.., 4] for each history [.., i]."""
    rng = torch.Generator().manual_seed(seed)
    tables = [
        scale * torch.randn(CODEBOOK**i, CODEBOOK, generator=rng).double()
        for i in range(IMAGE_CODES)
    ]

    def logits(history: torch.Tensor) -> torch.Tensor:
        place = history.shape[-1]
        powers = CODEBOOK ** torch.arange(place)
        return tables[place][(history * powers).sum(-1)]

    return logits


def guided(text: float, **changes: float) -> Toy:
    """Two branches, then temperature and cuts."""
    full, bare = toy(1), toy(2)
    settings = {"image_temperature": 1.0, "image_top_p": 1.0} | changes

    def logits(history: torch.Tensor) -> torch.Tensor:
        mixed = bare(history) + text * (full(history) - bare(history))
        rows = mixed.reshape(-1, CODEBOOK)
        row = SamplingParams(**settings).resolved({})  # type: ignore[arg-type]
        return warp(
            rows, SamplingTensors.image([row]).select(torch.zeros(len(rows)).long())
        ).view_as(mixed)

    return logits


def joint_of(model: Toy) -> torch.Tensor:
    """Probability of each of the 256 images."""
    images = torch.cartesian_prod(*[torch.arange(CODEBOOK)] * IMAGE_CODES)
    places = range(IMAGE_CODES)
    steps = [model(images[:, :i]).softmax(-1).gather(1, images[:, i : i + 1]) for i in places]
    return torch.cat(steps, 1).prod(1)


def images_by_windows(
    model: Toy, size: int, rule: Callable[..., torch.Tensor] = resample
) -> tuple[torch.Tensor, float]:
    """Codes [MANY, 4] of images drawn in windows, all at once, and passes an image."""
    rng = np.random.default_rng(size)
    codes = torch.zeros(MANY, IMAGE_CODES + 1).long()
    draft_dist = torch.zeros(MANY, IMAGE_CODES + 1, CODEBOOK).double()
    final, num_known = torch.zeros(MANY).long(), torch.zeros(MANY).long()
    passes = 0
    while (open_M := final < IMAGE_CODES).any():
        passes += int(open_M.sum())
        first = final.clone()
        going = open_M.clone()
        before = codes.clone()
        for place in range(IMAGE_CODES):
            inside = open_M & (place >= first) & (place < first + size)
            drafted = inside & (place < num_known)
            draft = torch.where(drafted, before[:, place], NO_DRAFT)
            expected = model(before[:, :place]).softmax(-1)
            old = torch.where(drafted[:, None], draft_dist[:, place], 0)
            numbers = torch.from_numpy(rng.random((MANY, 2)))
            new = rule(draft, old, expected, numbers)
            codes[:, place] = torch.where(inside, new, codes[:, place])
            draft_dist[:, place] = torch.where(inside[:, None], expected, draft_dist[:, place])
            final = torch.where(inside & going, place + 1, final)
            going = going & ~(inside & (new != draft))
            num_known = torch.where(inside, place + 1, num_known)
        # New drafts repeat the last code.
        for place in range(IMAGE_CODES):
            new = open_M & (place >= num_known)
            codes[:, place] = torch.where(new, codes[:, place - 1], codes[:, place])
            one = torch.nn.functional.one_hot(codes[:, place], CODEBOOK).double()
            draft_dist[:, place] = torch.where(new[:, None], one, draft_dist[:, place])
        num_known = torch.full_like(num_known, IMAGE_CODES)
    return codes[:, :IMAGE_CODES], passes / MANY


def distance(codes: torch.Tensor, joint: torch.Tensor) -> float:
    """Chi-square over its degrees of freedom: about 1 where the codes follow `joint`."""
    number = (codes * CODEBOOK ** torch.arange(IMAGE_CODES - 1, -1, -1)).sum(1)
    counts, expected = torch.bincount(number, minlength=len(joint)).double(), joint * len(codes)
    rare = expected < 5
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    some = expected > 0
    return float(((counts - expected)[some] ** 2 / expected[some]).sum() / (some.sum() - 1))


def always(draft: torch.Tensor, old: torch.Tensor, new: torch.Tensor, u: Any) -> torch.Tensor:
    """A wrong rule: keep every draft."""
    return torch.where(draft != NO_DRAFT, draft, resample(draft, old, new, u))


def without_residual(
    draft: torch.Tensor, old: torch.Tensor, new: torch.Tensor, u: Any
) -> torch.Tensor:
    """A wrong rule: draw from the whole of the new distribution after a refusal."""
    kept = resample(draft, old, new, u) == draft
    fresh = resample(torch.full_like(draft, NO_DRAFT), torch.zeros_like(old), new, u)
    return torch.where(kept, draft, fresh)


# With 60 to 255 degrees of freedom the mean square is within 1.5 but for once in 1,000 or less.
LIMIT = 1.5


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize(
    "model",
    [
        pytest.param(toy(0), id="plain"),
        pytest.param(guided(3.0), id="guided"),
        pytest.param(guided(1.0, image_top_p=0.8), id="top-p"),
        pytest.param(guided(2.0, image_top_k=3, image_temperature=0.7), id="all"),
    ],
)
def test_images_follow_the_joint_distribution(model: Toy, size: int) -> None:
    joint = joint_of(model)
    codes, passes = images_by_windows(model, size)
    assert distance(codes, joint) < LIMIT
    assert passes < IMAGE_CODES


def test_wrong_rules_are_detected() -> None:
    model = toy(0)
    joint = joint_of(model)
    for wrong in (always, without_residual):
        codes, _ = images_by_windows(model, 3, wrong)
        assert distance(codes, joint) > 5 * LIMIT


# --- the loop and the engine -----------------------------------------------------------------


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Processor:
    return tiny_processor(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def transformer(processor: Processor, device: torch.device) -> Transformer:
    """Codes that are much alike as inputs: what follows them is too, and drafts are kept."""
    transformer = tiny_transformer(processor, 1.0)
    codes = torch.as_tensor(processor.vocabulary.image_tokens)
    with torch.no_grad():
        weight_VD = transformer.model.embed_tokens.weight
        weight_VD[codes] = weight_VD[codes[:1]] + 0.3 * weight_VD[codes]
    return transformer.to(device)


def make_request(processor: Processor, seed: int, output: Any = "image", **more: Any) -> Request:
    return tiny.make_request(processor, seed, output, **more)


@pytest.fixture(scope="module")
def mixed(processor: Processor) -> list[Request]:
    """Windows of several sizes, greedy and not, one to three branches, beside other requests."""
    return [
        make_request(processor, 0, "text", max_tokens=30, **GREEDY),
        make_request(processor, 1, jacobi=4, image_temperature=2.0, images=2, max_tokens=140),
        make_request(processor, 2, "interleaved", images=2, max_tokens=150, jacobi=8, **OFF),
        make_request(processor, 3, with_image=True, guidance_image=1, jacobi=3, **GREEDY),
        make_request(
            processor, 4, with_image=True, jacobi=64, image_top_p=1, image_temperature=3.0
        ),
        make_request(processor, 5, image_top_k=20),
        make_request(
            processor, 6, "interleaved", jacobi=5, top_p=1, image_top_p=1, temperature=1.5
        ),
        make_request(processor, 3, jacobi=16, **GREEDY, **OFF),
    ]


@pytest.fixture(scope="module")
def expected(
    transformer: Transformer, processor: Processor, mixed: list[Request]
) -> list[list[int]]:
    return [list(generate_tokens(transformer, processor, request)) for request in mixed]


def one_by_one(request: Request) -> Request:
    return replace(request, sampling=replace(request.sampling, jacobi=0))


def run(
    engine: Engine, requests: Sequence[Request], apart: int = 0, rising: bool = False
) -> list[list[int]]:
    handles = []
    for request in requests:
        handles.append(engine.add(request, -len(handles) if rising else 0))
        for _ in range(apart):
            engine.step()
    while engine.busy:
        engine.step()
    return [handle.tokens for handle in handles]


@pytest.fixture(params=["compiled", "torch"])
def step(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "torch":
        monkeypatch.setattr(cpu, "available", lambda: False)
    elif not cpu.available():
        pytest.skip("no C++ compiler here")


@pytest.mark.parametrize("size", [2, 7, 100])
@pytest.mark.parametrize("guidance", [OFF, {}])
def test_greedy_images_are_those_of_one_code_at_a_time(
    transformer: Transformer, processor: Processor, size: int, guidance: dict[str, Any]
) -> None:
    """Drawn text, greedy images: the text behind an image finds the same uniform numbers too."""
    request = make_request(
        processor, 4, "interleaved", max_tokens=150, images=2, image_temperature=0, **guidance
    )
    expected = list(generate_tokens(transformer, processor, request))
    assert processor.vocabulary.end_image in expected[:-1]
    windowed = replace(request, sampling=replace(request.sampling, jacobi=size))
    assert list(generate_tokens(transformer, processor, windowed)) == expected


@pytest.mark.usefixtures("step")
@pytest.mark.parametrize(
    ("options", "apart"),
    [
        pytest.param({}, 0, id="together"),
        pytest.param({}, 3, id="joining"),
        pytest.param({"chunk": 5}, 0, id="chunked"),
        pytest.param({"cache_bytes": 20 * BLOCK}, 4, id="preempted"),
    ],
)
def test_the_engine_equals_the_loop(
    transformer: Transformer,
    processor: Processor,
    mixed: list[Request],
    expected: list[list[int]],
    options: dict[str, Any],
    apart: int,
) -> None:
    engine = Engine(transformer, processor, **options)
    assert run(engine, mixed, apart, rising="cache_bytes" in options) == expected
    assert (engine.preemptions > 2) == ("cache_bytes" in options)
    for number in (3, 7):
        plain = generate_tokens(transformer, processor, one_by_one(mixed[number]))
        assert list(plain) == expected[number]


@pytest.mark.usefixtures("step")
def test_alone_again_and_from_a_prefix(
    transformer: Transformer, processor: Processor, mixed: list[Request], expected: list[list[int]]
) -> None:
    """What a window wrote behind the accepted codes is never taken for read."""
    engine = Engine(transformer, processor, cache_bytes=24 * BLOCK)
    for number in (4, 4, 2, 1):
        handle = engine.add(mixed[number])
        for _ in range(9):
            engine.step()
        handle.cancel()
        assert run(engine, [mixed[number]]) == [expected[number]]


def test_two_threads_read_windows_alike(transformer: Transformer, processor: Processor) -> None:
    """Rows of one window see each other's keys in the compiled step."""
    if not cpu.available():
        pytest.skip("no C++ compiler here")
    try:
        torch.set_num_threads(2)
        request = make_request(processor, 3, jacobi=5, image_temperature=3.0, image_top_p=1.0)
        expected = list(generate_tokens(transformer, processor, request))
        assert run(Engine(transformer, processor), [request]) == [expected]
    finally:
        torch.set_num_threads(1)


def steps_of(transformer: Transformer, processor: Processor, request: Request) -> int:
    engine, count = Engine(transformer, processor), 0
    handle = engine.add(request)
    while not handle.finished:
        engine.step()
        count += 1
    return count


def test_fewer_steps(transformer: Transformer, processor: Processor) -> None:
    for shape in (GREEDY, {"image_temperature": 3.0, "image_top_p": 1.0}):
        request = make_request(processor, 3, jacobi=16, **shape)
        assert steps_of(transformer, processor, request) < 40
        assert steps_of(transformer, processor, one_by_one(request)) == 64


def test_rows_that_end_with_a_mark(tmp_path: Path, device: torch.device) -> None:
    """A window stops where the layout has a fixed token."""
    plain = tiny_processor(tmp_path)
    layout = ImageLayout(4, 5, line_end=("<reserved08707>",))
    processor = Processor(tmp_path / "tokenizer.json", layout)
    transformer = tiny_transformer(plain, device=device)
    request = make_request(processor, 2, max_tokens=60, images=2, jacobi=8, image_temperature=0)
    expected = list(generate_tokens(transformer, processor, one_by_one(request)))
    assert list(generate_tokens(transformer, processor, request)) == expected
    sampled = replace(request, sampling=replace(request.sampling, image_temperature=1.0))
    loop = list(generate_tokens(transformer, processor, sampled))
    assert run(Engine(transformer, processor), [request, sampled]) == [expected, loop]


def small_model(tmp_path: Path) -> tuple[Transformer, Processor]:
    """Images of 3 codes out of 5."""
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text(train_tokenizer(TEXTS, 5, 300))
    processor = Processor(tokenizer, ImageLayout(1, 3))
    config = ModelConfig(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
        vq_config=CONFIG.vq_config,
    )
    transformer = Transformer(config).eval()
    transformer.init_weights(torch.Generator().manual_seed(1))
    with torch.no_grad():
        transformer.lm_head.weight.mul_(25)
    return transformer, processor


@torch.no_grad()
def exact_joint(transformer: Transformer, processor: Processor, request: Request) -> torch.Tensor:
    """Probabilities of the 125 images, from whole forwards of both branches."""
    vocabulary = processor.vocabulary
    tokens = vocabulary.image_tokens
    images = torch.cartesian_prod(*[torch.as_tensor(np.sort(tokens))] * 3)

    def logits(before: list[int]) -> torch.Tensor:
        start = torch.tensor([*before, vocabulary.begin_image]).expand(len(images), -1)
        rows = transformer(torch.cat([start, images], 1))[:, -4:-1]
        return rows[..., torch.as_tensor(np.sort(tokens))]

    text = request.sampling.guidance_text
    bare = logits([vocabulary.bos])
    mixed = bare + text * (logits(list(request.ids)) - bare)
    settings = SamplingTensors.image([request.sampling]).select(torch.zeros(3 * len(images)).long())
    steps = warp(mixed.view(-1, 5), settings).double().softmax(-1).view(-1, 3, 5)
    index = torch.cartesian_prod(*[torch.arange(5)] * 3)
    return steps.gather(-1, index[..., None])[..., 0].prod(1)


@pytest.mark.parametrize("settings", [OFF, {"guidance_text": 2.5, "image_top_p": 0.9}])
def test_the_engine_samples_from_the_joint_distribution(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    """2,000 images of the engine beside all images enumerated."""
    transformer, processor = small_model(tmp_path)
    tokens = np.sort(processor.vocabulary.image_tokens).tolist()
    shaped = {"image_temperature": 1.0, "image_top_p": 1.0, "jacobi": 3} | settings

    def request_with_seed(seed: int) -> Request:
        sampling = SamplingParams(seed=seed, **shaped).resolved({})
        ids = [processor.vocabulary.bos, *processor.encode_text("a pear")]
        return Request(ids, "image", sampling, 1, 5)

    engine = Engine(transformer, processor, context_tokens=32)
    handles = [engine.add(request_with_seed(seed)) for seed in range(2000)]
    while engine.busy:
        engine.step()
    sampled = torch.tensor([[tokens.index(t) for t in handle.tokens[1:4]] for handle in handles])
    joint = exact_joint(transformer, processor, request_with_seed(0))
    counts = torch.bincount((sampled * torch.tensor([25, 5, 1])).sum(1), minlength=125).double()
    expected = joint * len(sampled)
    rare = expected < 5
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    some = expected > 0
    assert 8 < some.sum()
    assert ((counts - expected)[some] ** 2 / expected[some]).sum() / (some.sum() - 1) < 2


# --- settings, previews -----------------------------------------------------------


@pytest.mark.parametrize("size", [1, -2, 1025, 2.5, True])
def test_impossible_windows_are_refused(size: Any) -> None:
    with pytest.raises(SettingError, match=r"use 0 \(off\) or a whole number from 2 to 1,024"):
        SamplingParams(jacobi=size)


def test_off_unless_asked_for() -> None:
    assert not SamplingParams().resolved({}).jacobi
    assert SamplingParams().resolved({"jacobi": 8}).jacobi == 8
    assert SamplingParams(jacobi=0).resolved({"jacobi": 8}).jacobi == 0


def without_previews(events: Sequence[Event]) -> list[object]:
    return [e.codes.tolist() if isinstance(e, ImageDone) else e for e in events]


def test_previews_are_further_events(transformer: Transformer, processor: Processor) -> None:
    request = make_request(processor, 1, **GREEDY)
    plain = list(generate(transformer, processor, request))
    for size in (0, 8):
        sampling = replace(request.sampling, jacobi=size)
        every = replace(request, sampling=sampling, preview_every=24)
        events = list(Engine(transformer, processor).generate(every))
        previews = [e for e in events if isinstance(e, ImagePreview)]
        others = [e for e in events if not isinstance(e, ImagePreview)]
        assert without_previews(others) == without_previews(plain)
        [done] = [e for e in events if isinstance(e, ImageDone)]
        assert [p.codes_done for p in previews] == [24, 48]
        for preview in previews:
            codes, number = preview.codes.ravel(), preview.codes_done
            assert (codes[:number] == done.codes.ravel()[:number]).all()
            assert (codes[number:] == codes[number - 1]).all()


def test_the_preview_of_a_stream_is_an_image(device: torch.device) -> None:
    model = Chameleon.load("mini", str(device), "float32")
    stream = model.stream("Draw a red apple.", "image", seed=0, preview_every=20)
    events = list(stream)
    previews = [e for e in events if isinstance(e, ImagePreview)]
    assert [p.codes_done for p in previews] == [20, 40, 60]
    assert isinstance(events[-1], Finished)
    for preview in previews:
        assert preview.pil is not None
        pixels = np.asarray(preview.pil).reshape(8, 8, 8, 8, 3).swapaxes(1, 2)
        grey = (pixels == 128).all((2, 3, 4)).ravel()
        assert not grey[: preview.codes_done].any() and grey[preview.codes_done :].all()
    with pytest.raises(SettingError, match="preview_every=-1 is not possible"):
        model.stream("Draw a red apple.", "image", preview_every=-1)


def test_drafts_are_sampled_or_certain() -> None:
    first, second = Window(4, 0, 0), Window(4, 0, 0)
    first.drafts, first.old_WV = [1, 2, 2], torch.tensor([[0.25, 0.5, 0.25]]).double()
    actual = jacobi.draft_distributions(
        [first, second], [[1, 2, 2], []], torch.empty(5, 3).double()
    )
    assert actual.tolist() == [[0.25, 0.5, 0.25], [0, 0, 1], [0, 0, 1], [0, 0, 0], [0, 0, 0]]
