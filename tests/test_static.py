"""The static step: tokens of the reference loop, in bursts, without a look at any value."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from tiny import CONFIG, make_request, tiny_processor, tiny_transformer

from earlyfusion.engine.backends.torch import FusedTransformer
from earlyfusion.engine.blocks import BLOCK_SIZE
from earlyfusion.engine.cache import PagedCache
from earlyfusion.engine.engine import Engine
from earlyfusion.engine.handle import Handle
from earlyfusion.engine.scheduler import Scheduler
from earlyfusion.engine.static.bursts import BUCKETS, Bursts
from earlyfusion.engine.static.grammars import MAX_GRAMMARS, Grammars
from earlyfusion.engine.static.rows import Rows
from earlyfusion.engine.static.step import Kind
from earlyfusion.generation.grammar import Grammar
from earlyfusion.generation.reference import generate, generate_tokens
from earlyfusion.generation.request import Finished, Request
from earlyfusion.kernels.decode import FP8
from earlyfusion.model.transformer import Transformer
from earlyfusion.processor import Processor
from earlyfusion.vocabulary import ImageLayout

BLOCK = BLOCK_SIZE * PagedCache.token_bytes(CONFIG, torch.float32)
GREEDY: dict[str, Any] = {"temperature": 0, "image_temperature": 0}
LAYOUTS = [ImageLayout(2, 3), ImageLayout(8, 8), ImageLayout(1, 1)]


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Processor:
    return tiny_processor(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def transformer(processor: Processor, device: torch.device) -> Transformer:
    return tiny_transformer(processor, begin_image=1.0, device=device)


@st.composite
def requests(draw: st.DrawFn, processor: Processor) -> Request:
    """One request of any kind; the images are small, so that several fit."""
    chosen: dict[str, Any] = {
        "temperature": draw(st.sampled_from([0.0, 0.7, 1.5])),
        "image_temperature": draw(st.sampled_from([0.0, 1.0])),
        "top_k": draw(st.sampled_from([0, 5])),
        "top_p": draw(st.sampled_from([0.8, 1.0])),
        "min_p": draw(st.sampled_from([0.0, 0.05])),
        "image_top_k": draw(st.sampled_from([0, 7])),
        "image_top_p": draw(st.sampled_from([0.9, 1.0])),
        "repetition_penalty": draw(st.sampled_from([1.0, 1.4])),
        "guidance_text": draw(st.sampled_from([1.0, 3.0])),
        "guidance_image": draw(st.sampled_from([1.0, 1.2, 3.0])),
    }
    steered = draw(st.sampled_from(["", "", "", "jacobi", "lookup", "logprobs", "stop", "words"]))
    chosen |= {
        "": {},
        "jacobi": {"jacobi": 3},
        "lookup": {"prompt_lookup": 2},
        "logprobs": {"logprobs": 1},
        "stop": {"stop": "e"},
        "words": {"bad_words": ("a",)},
    }[steered]
    output = draw(st.sampled_from(["text", "image", "interleaved"]))
    seed, with_image = draw(st.integers(0, 12)), draw(st.booleans())
    max_tokens, images = draw(st.integers(12, 45)), draw(st.integers(1, 3))
    request = make_request(processor, seed, output, with_image, max_tokens, images, **chosen)
    stops = draw(st.sampled_from([(), (), (processor.vocabulary.pad,), tuple(range(40, 90))]))
    return replace(request, stops=stops, layout=LAYOUTS[0])


class Crowd(NamedTuple):
    """Requests, the number of steps between one and the next, the number of tokens after which
    each is cancelled (None: never), and the blocks of the cache."""

    members: list[Request]
    apart: list[int]
    cancelled_after: list[int | None]
    blocks: int


@st.composite
def crowds(draw: st.DrawFn, processor: Processor) -> Crowd:
    members = draw(st.lists(requests(processor), min_size=1, max_size=4))
    apart = [draw(st.integers(0, 3)) for _ in members]
    limits = st.sampled_from([None, None, None, 0, 1, 7])
    return Crowd(members, apart, [draw(limits) for _ in members], draw(st.sampled_from([12, 40])))


def at_once(requests: list[Request]) -> Crowd:
    return Crowd(requests, [0] * len(requests), [None] * len(requests), 0)


def run(engine: Engine, crowd: Crowd) -> list[list[int]]:
    handles: list[Handle] = []

    def step() -> None:
        engine.step()
        for handle, limit in zip(handles, crowd.cancelled_after, strict=False):
            if limit is not None and len(handle.tokens) >= limit and not handle.finished:
                handle.cancel()

    for one, steps in zip(crowd.members, crowd.apart, strict=True):
        handles.append(engine.add(one))
        for _ in range(steps):
            step()
    while engine.busy:
        step()
    assert engine.used_blocks == 0
    return [handle.tokens for handle in handles]


def loop_tokens(transformer: Transformer, processor: Processor, request: Request) -> list[int]:
    """The tokens of the reference loop, up to a stop string."""
    tokens = list(generate_tokens(transformer, processor, request))
    if request.sampling.stop is None:
        return tokens
    *_, last = generate(transformer, processor, request)
    assert isinstance(last, Finished)
    return tokens[: last.usage.completion_tokens]


def check_equality(
    transformer: Transformer,
    processor: Processor,
    examples: int,
    static: bool,
    number: int | None = None,
) -> None:
    """So many crowds; a `number` always gives the same. Each member has the tokens of the plain
    loop, or, without the static step, those of an engine that runs it alone; a cancelled one the
    first of them."""
    chosen = settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
    seeded = seed(number) if number is not None else lambda test: test
    alone = Engine(transformer, processor, cache_bytes=200 * BLOCK)

    def expected_tokens(request: Request) -> list[int]:
        if static:
            return loop_tokens(transformer, processor, request)
        return run(alone, at_once([request]))[0]

    @seeded
    @chosen
    @given(crowds(processor))
    def equals(crowd: Crowd) -> None:
        engine = Engine(
            transformer, processor, cache_bytes=crowd.blocks * BLOCK, static=static or None
        )
        replies = run(engine, crowd)
        for request, tokens, limit in zip(
            crowd.members, replies, crowd.cancelled_after, strict=True
        ):
            expected = expected_tokens(request)
            assert tokens == (expected if limit is None else expected[: len(tokens)])
            assert limit is None or len(tokens) >= min(limit, len(expected))

    equals()


@pytest.mark.parametrize("static", [True, False])
def test_any_crowd_equals_each_member_alone(
    transformer: Transformer, processor: Processor, static: bool
) -> None:
    check_equality(transformer, processor, 16, static)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("number", range(8))
def test_5000_crowds_equal_each_member_alone(
    transformer: Transformer, processor: Processor, number: int, static: bool
) -> None:
    check_equality(transformer, processor, 625, static, number)


# --- grammars ---------------------------------------------------------------------------------


def grammars_of(processor: Processor) -> list[Grammar]:
    ends = [(), (processor.vocabulary.pad,), (7, 8, 9)]
    return [Grammar(processor.vocabulary, layout, stops) for layout in LAYOUTS for stops in ends]


def tables_of(processor: Processor) -> Grammars:
    vocabulary = processor.vocabulary
    return Grammars(vocabulary.size, 100, vocabulary.begin_image, torch.device("cpu"))


def states(grammar: Grammar) -> Iterator[list[int]]:
    slots = range(grammar.image_tokens + 1)
    for slot in slots:
        for images in (0, 1):
            for max_tokens in (1, grammar.image_tokens, grammar.image_tokens + 1):
                yield from ([slot, images, max_tokens, text] for text in (0, 1))


def test_tables_say_what_each_grammar_says(processor: Processor) -> None:
    """All states, and all tokens that may follow: masks, forced tokens, next states, ends."""
    tables, all_grammars = tables_of(processor), grammars_of(processor)
    # Each group is larger than the last, and takes the place of tables that are there.
    for several in (all_grammars[:3], all_grammars[2:], all_grammars[: MAX_GRAMMARS - 1]):
        numbers = tables.numbers_of(several)
        assert numbers is not None
        for grammar in several:
            state_RF = torch.tensor(list(states(grammar)))
            grammar_R = torch.full((len(state_RF),), numbers[grammar])
            allowed_RV = grammar.mask(state_RF)
            assert torch.equal(tables.mask(state_RF, grammar_R), allowed_RV)
            done_R = grammar.done(state_RF)
            assert torch.equal(tables.done(state_RF, grammar_R), done_R)
            forced_R = tables.forced(state_RF, grammar_R)
            only_R = (allowed_RV.sum(1) == 1) & ~done_R
            codes = len(grammar.code_ids)
            assert codes > 1  # otherwise a code would be an only token
            assert torch.equal(
                forced_R >= 0, only_R | ((state_RF[:, 3] == 0) & (state_RF[:, 0] == 0))
            )
            assert torch.equal(forced_R[only_R], allowed_RV[only_R].int().argmax(1))
            row_N, token_N = (allowed_RV & ~done_R[:, None]).nonzero().unbind(1)
            before_NF, which_N = state_RF[row_N], grammar_R[row_N]
            after_NF = grammar.advance(before_NF, token_N)
            assert torch.equal(tables.advance(before_NF, token_N, which_N), after_NF)


def test_tables_that_do_not_fit_in(processor: Processor) -> None:
    tables, several = tables_of(processor), grammars_of(processor)
    assert tables.numbers_of(several) is None and len(several) > MAX_GRAMMARS
    assert tables.numbers_of([Grammar(processor.vocabulary, ImageLayout(11, 11))]) is None
    assert tables.numbers_of(several[:1]) is not None


# --- the step ---------------------------------------------------------------------------------


@pytest.mark.parametrize("swin_norm", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, FP8], ids=str)
def test_no_value_is_read(
    processor: Processor, swin_norm: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the meta device there are no values, so a step that looks at one fails."""
    config, device = replace(CONFIG, swin_norm=swin_norm), torch.device("meta")
    transformer = Transformer(config).eval().to(device)
    cache = PagedCache(config, 4, 64, dtype, device)
    grammar = Grammar(processor.vocabulary, processor.layout, device=device)
    with torch.no_grad():
        fused = FusedTransformer(transformer, cache)
        # Loading may read values: which ids the codes have.
        monkeypatch.setattr(
            fused, "product", lambda ids: lambda x_RD: transformer.lm_head(x_RD)[:, ids]
        )
        burst = Bursts({"": (transformer, fused)}, cache, grammar)
        rows = Rows.of(3, 3, config.vocab_size, device)
        for only_codes in (False, True):
            for greedy in (False, True):
                burst._step.run(rows, Kind(only_codes, greedy))


def test_one_burst_samples_a_whole_row_of_an_image(
    transformer: Transformer, processor: Processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host looks once for 32 codes of one request, and once for 16 of several."""
    lengths: list[int] = []
    sample = Bursts.sample

    def counted(self: Bursts, handles: Any, steps: int) -> list[list[int]]:
        tokens = sample(self, handles, steps)
        lengths.append(max(map(len, tokens)))
        return tokens

    monkeypatch.setattr(Bursts, "sample", counted)
    for number, expected in ((1, [32, 32]), (2, [16, 16, 16, 16])):
        lengths.clear()
        requests = [
            make_request(processor, seed, "image", seed > 0, max_tokens=66)
            for seed in range(number)
        ]
        run(Engine(transformer, processor, static=True), at_once(requests))
        assert lengths[: len(expected)] == expected


@pytest.mark.parametrize("number", [150, 200])
def test_crowds_of_the_largest_bucket_and_beyond(
    transformer: Transformer, processor: Processor, number: int
) -> None:
    requests = [make_request(processor, seed % 3, "text", max_tokens=5) for seed in range(number)]
    expected = [list(generate_tokens(transformer, processor, one)) for one in requests[:3]]
    engine = Engine(transformer, processor, static=True, chunk=10_000)  # all begin together
    actual = run(engine, at_once(requests))
    assert actual == [expected[which % 3] for which in range(number)]
    assert engine.runner.bursts is not None
    rows = {shape.rows for shape in engine.runner.bursts._graphs.shapes}
    assert (max(rows, default=0) == BUCKETS[-1]) == (number < BUCKETS[-1])


def test_rows_freeze_where_their_blocks_end(
    transformer: Transformer, processor: Processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A frozen row writes where nobody reads, while the others go on."""
    monkeypatch.setattr(Scheduler, "grow", lambda *_: None)
    requests = [make_request(processor, seed, "text", max_tokens=90) for seed in range(5)]
    expected = [list(generate_tokens(transformer, processor, one)) for one in requests]
    assert run(Engine(transformer, processor, static=True), at_once(requests)) == expected


def test_a_full_cache_takes_no_blocks_early(transformer: Transformer, processor: Processor) -> None:
    """Bursts never preempt: there are as few preemptions as without them."""
    requests = [make_request(processor, seed, "text", max_tokens=60, **GREEDY) for seed in range(6)]
    counts = []
    for static in (False, True):
        engine = Engine(transformer, processor, cache_bytes=14 * BLOCK, static=static)
        run(engine, at_once(requests))
        counts.append(engine.preemptions)
    assert counts[1] <= counts[0]


@pytest.mark.gpu
def test_captured_steps_equal_called_ones(processor: Processor) -> None:
    """On a CUDA device, fp32: all kinds of requests, tokens of the reference loop there."""
    transformer = tiny_transformer(processor, begin_image=1.0).cuda()
    engine = Engine(transformer, processor)
    assert engine.runner.bursts is not None
    engine.warm_up()
    captured = engine.runner.bursts._graphs.shapes
    assert len(captured) == 60
    requests = [
        make_request(processor, seed, "interleaved", seed % 2 == 1, max_tokens=70)
        for seed in range(8)
    ]
    requests += [
        make_request(processor, seed, "image", seed % 2 == 1, **GREEDY) for seed in range(4)
    ]
    expected = [list(generate_tokens(transformer, processor, one)) for one in requests]
    assert run(engine, at_once(requests)) == expected
    before = torch.cuda.memory_stats()["num_device_alloc"]
    assert run(engine, at_once(requests)) == expected
    assert engine.runner.bursts._graphs.shapes == captured
    assert torch.cuda.memory_stats()["num_device_alloc"] == before
