"""The engine gives the tokens of the plain loop, whatever runs beside a request."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from tiny import CONFIG, request, tiny_processor, tiny_transformer

from earlyfusion import Chameleon
from earlyfusion.checkpoints.meta import load_meta
from earlyfusion.engine import network, runner
from earlyfusion.engine.engine import Engine
from earlyfusion.engine.network import Network
from earlyfusion.engine.request import Handle, most_branches
from earlyfusion.engine.runner import Cache
from earlyfusion.engine.scheduler import Branch, Piece
from earlyfusion.errors import ContextError, SettingError
from earlyfusion.generation.grammar import Grammar, Walk
from earlyfusion.generation.reference import (
    Event,
    Finished,
    ImageDone,
    Request,
    draw_tokens,
    generate,
)
from earlyfusion.generation.sampler import generator, uniforms
from earlyfusion.generation.settings import SamplingParams
from earlyfusion.model.transformer import Transformer
from earlyfusion.processor import Processor

SLOT = CONFIG.max_position_embeddings * Cache.token_bytes(CONFIG, torch.float32)
GREEDY: dict[str, Any] = {"temperature": 0, "image_temperature": 0}
OFF: dict[str, Any] = {"guidance_text": 1, "guidance_image": 1}


@pytest.fixture(autouse=True, params=["compiled", "torch"])
def step(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test runs with the compiled step, where there is a compiler, and without."""
    if request.param == "torch":
        monkeypatch.setattr(runner, "available", lambda: False)
    elif not runner.available():
        pytest.skip("no C++ compiler here")


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Processor:
    return tiny_processor(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def transformer(processor: Processor) -> Transformer:
    return tiny_transformer(processor, begin_image=1.0)


@pytest.fixture(scope="module")
def mixed(processor: Processor) -> list[Request]:
    """Eight requests that differ in everything."""
    shaped = {"top_p": 0.8, "top_k": 40, "min_p": 0.01, "image_top_k": 20}
    return [
        request(processor, 0, "text", room=30, **GREEDY),
        request(processor, 1, "image"),
        request(processor, 2, "interleaved", images=2, room=150, repetition_penalty=1.0, **OFF),
        request(processor, 3, "image", picture=True, guidance_image=1, **GREEDY),
        request(processor, 4, "text", picture=True, room=25, **shaped),
        request(processor, 5, "image", picture=True, **shaped),
        request(processor, 6, "interleaved", top_p=1, image_top_p=1, temperature=1.5),
        request(processor, 7, "image", guidance_text=2, guidance_image=2, image_top_p=1),
    ]


@pytest.fixture(scope="module")
def wanted(transformer: Transformer, processor: Processor, mixed: list[Request]) -> list[list[int]]:
    tokens = [list(draw_tokens(transformer, processor, asked)) for asked in mixed]
    assert {most_branches(asked) for asked in mixed} == {1, 2, 3}
    return tokens


def run(
    engine: Engine, requests: Sequence[Request], apart: int = 0, rising: bool = False
) -> list[list[int]]:
    """The tokens of each; one joins every `apart` steps, `rising` each before the others."""
    handles: list[Handle] = []
    for asked in requests:
        handles.append(engine.add(asked, -len(handles) if rising else 0))
        for _ in range(apart):
            engine.step()
    while engine.busy:
        engine.step()
    assert all(handle.finished for handle in handles)
    return [handle.tokens for handle in handles]


# --- token for token -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "apart"),
    [
        pytest.param({}, 0, id="together"),
        pytest.param({}, 3, id="joining"),
        pytest.param({"chunk": 5}, 0, id="chunked"),
        pytest.param({"cache_bytes": 4 * SLOT}, 4, id="preempted"),
    ],
)
def test_mixed_requests_equal_the_plain_loop(
    transformer: Transformer,
    processor: Processor,
    mixed: list[Request],
    wanted: list[list[int]],
    options: dict[str, Any],
    apart: int,
) -> None:
    engine = Engine(transformer, processor, **options)
    assert run(engine, mixed, apart, rising="cache_bytes" in options) == wanted
    assert (engine.preemptions > 4) == ("cache_bytes" in options)


def test_alone_equals_the_plain_loop(
    transformer: Transformer, processor: Processor, mixed: list[Request], wanted: list[list[int]]
) -> None:
    engine = Engine(transformer, processor)
    for asked, tokens in zip(mixed, wanted, strict=True):
        assert run(engine, [asked]) == [tokens]


def test_attention_may_be_cut_anywhere(
    transformer: Transformer,
    processor: Processor,
    mixed: list[Request],
    wanted: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(runner, "_PADDING", 0)
    assert run(Engine(transformer, processor), mixed) == wanted


def test_weights_that_are_not_packed(
    processor: Processor,
    mixed: list[Request],
    wanted: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(network, "_has_room", lambda transformer: False)
    plain = tiny_transformer(processor, begin_image=1.0)
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    engine = Engine(plain, processor)
    assert run(engine, mixed) == wanted
    attention = plain.model.layers[0].self_attn
    stores = {p.weight.untyped_storage().data_ptr() for p in (attention.q_proj, attention.k_proj)}
    assert len(stores) == 1, "held twice"
    saved = load(save(plain.state_dict()))
    assert saved.keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in saved.items())
    # They can still be trained, and the engine follows.
    plain(torch.tensor([[1, 2, 3]])).sum().backward()
    with torch.no_grad():
        attention.q_proj.weight.add_(attention.q_proj.weight.grad, alpha=30)
    want = list(draw_tokens(plain, processor, mixed[0]))
    assert run(engine, mixed[:1]) == [want] != wanted[:1]


def test_other_linear_modules_are_called_as_they_are(
    processor: Processor, mixed: list[Request], wanted: list[list[int]]
) -> None:
    class Doubled(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 2

    plain = tiny_transformer(processor, begin_image=1.0)
    for layer in plain.model.layers:
        layer.mlp.up_proj.__class__ = Doubled
    assert run(Engine(plain, processor), mixed[:1]) != wanted[:1]
    want = list(draw_tokens(plain, processor, mixed[0]))
    assert run(Engine(plain, processor), mixed[:1]) == [want]


def test_stop_tokens_of_one_request_leave_the_others_alone(
    transformer: Transformer, processor: Processor, mixed: list[Request], wanted: list[list[int]]
) -> None:
    vocabulary = processor.vocabulary
    asked = replace(mixed[2], stops=(vocabulary.end_of_turn, vocabulary.pad))
    want = list(draw_tokens(transformer, processor, asked))
    engine = Engine(transformer, processor)
    first = engine.add(mixed[2])
    engine.step()
    second = engine.add(asked)
    assert run(engine, [mixed[6]]) == [wanted[6]]
    assert first.tokens == wanted[2] and second.tokens == want


@pytest.mark.parametrize("name", ["tiny_1", "tiny_mp2_swin_gqa"])
def test_both_block_layouts(golden: Path, name: str) -> None:
    loaded = load_meta(golden / "models" / name, dtype=torch.float32)
    vocabulary = loaded.processor.vocabulary
    settings = SamplingParams(seed=0, **GREEDY).resolved({})
    ids = [vocabulary.bos, *loaded.processor.encode_text("a pear"), vocabulary.end_of_turn]
    texts = [Request(ids[: i + 2], "text", settings, 0, 12) for i in range(3)]
    want = [list(draw_tokens(loaded.transformer, loaded.processor, asked)) for asked in texts]
    assert run(Engine(loaded.transformer, loaded.processor, slot_tokens=64), texts) == want


def test_the_embedded_model() -> None:
    model = Chameleon.load("mini", device="cpu", dtype="float32")
    short = SamplingParams(max_tokens=20)
    asked = [
        model.request("Draw a red apple.", "image", seed=0),
        model.request("What is a pear?", "text", short, seed=1),
        model.request("Show me three different fruits.", "interleaved", short, seed=2),
    ]
    want = [list(draw_tokens(model.transformer, model.processor, one)) for one in asked]
    assert run(model.engine, asked) == want


def test_hidden_states_equal_the_modules(transformer: Transformer) -> None:
    """Whole prompts, pieces and single tokens of several slots in one step; fp32, 1e-5."""
    rows = [torch.randint(0, CONFIG.vocab_size, (n,)).tolist() for n in (9, 1, 14, 5)]
    lean, cache = Network(transformer, 32), Cache(CONFIG, 6, 32, torch.float32, torch.device("cpu"))
    branches = [Branch(row, slot) for row, slot in zip(rows, (4, 1, 0, 5), strict=True)]
    got: dict[int, list[torch.Tensor]] = {}
    with torch.inference_mode():
        for width in (4, 1, 3, 1, 1, 99):
            pieces = [Piece(b, b.read, min(width, b.pending)) for b in branches if b.pending]
            step = runner._Step(pieces, cache)
            x_TD = lean.forward(step.tokens_T, step.positions_T, step.attentions())
            for piece in pieces:
                last = step.last_of[piece.branch]
                states = lean.final(x_TD[last + 1 - piece.size : last + 1])
                got.setdefault(id(piece.branch), []).append(states @ transformer.lm_head.weight.T)
                piece.branch.read = piece.end
        for branch in branches:
            want = transformer(torch.tensor([branch.tokens]))[0]
            torch.testing.assert_close(torch.cat(got[id(branch)]), want, atol=1e-5, rtol=1e-5)


def test_bfloat16_runs(processor: Processor) -> None:
    half = tiny_transformer(processor, begin_image=1.0).to(torch.bfloat16)
    engine = Engine(half, processor)
    first, second = (run(engine, [request(processor, 1, "image")]) for _ in range(2))
    assert first == second and len(first[0]) == 66


# --- what a request leaves and finds ---------------------------------------------------------


def read_tokens(engine: Engine, asked: Request, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many tokens the network reads for a request."""
    counts: list[int] = []
    forward = Network.forward

    def counted(self: Network, tokens_T: torch.Tensor, *rest: Any) -> torch.Tensor:
        counts.append(len(tokens_T))
        return forward(self, tokens_T, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Network, "forward", counted)
        run(engine, [asked])
    return sum(counts)


def test_a_picture_is_read_once(
    transformer: Transformer,
    processor: Processor,
    mixed: list[Request],
    wanted: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine, asked = Engine(transformer, processor), mixed[4]
    cold = read_tokens(engine, asked, monkeypatch)
    other = replace(asked, ids=[*asked.ids[:67], *asked.ids[:0:-1][:5]])
    want = list(draw_tokens(transformer, processor, other))
    assert run(engine, [other]) == [want]
    warm = read_tokens(engine, asked, monkeypatch)
    assert warm <= cold - 67
    assert run(engine, [asked]) == [wanted[4]]


def test_new_weights_are_followed(processor: Processor, mixed: list[Request]) -> None:
    plain = tiny_transformer(processor, begin_image=1.0)
    engine = Engine(plain, processor)
    before = run(engine, mixed[:1])
    with torch.no_grad():
        plain.model.layers[1].mlp.down_proj.weight.mul_(30)
    after = run(engine, mixed[:1])
    assert after == [list(draw_tokens(plain, processor, mixed[0]))] != before


def test_cancelled_neighbours_change_nothing(
    transformer: Transformer, processor: Processor, mixed: list[Request], wanted: list[list[int]]
) -> None:
    engine = Engine(transformer, processor)
    handles = [engine.add(asked) for asked in mixed]
    rng = random.Random(0)
    for handle in rng.sample(handles, 4):
        for _ in range(rng.randrange(12)):
            engine.step()
        handle.cancel()
        handle.cancel()
    cut = [
        handle
        for handle in handles
        if not handle.finished and handle.entry.branches[0].slot is None
    ]
    while engine.busy:
        engine.step()
    for handle, tokens in zip(handles, wanted, strict=True):
        assert handle.tokens == (tokens if handle.finished else tokens[: len(handle.tokens)])
    assert 0 < len(cut) and sum(handle.finished for handle in handles) >= 4


def test_closing_the_iterator_cancels(transformer: Transformer, processor: Processor) -> None:
    engine = Engine(transformer, processor)
    events = engine.generate(request(processor, 1, "image"))
    next(events)
    assert engine.busy
    events.close()  # type: ignore[attr-defined]
    assert not engine.busy


def test_events_equal_those_of_the_plain_loop(
    transformer: Transformer, processor: Processor, mixed: list[Request]
) -> None:
    engine = Engine(transformer, processor)
    streams = [iter(engine.add(asked)) for asked in mixed[:3]]
    for stream, asked in zip(streams, mixed, strict=False):
        got, want = list(stream), list(generate(transformer, processor, asked))
        assert values(got) == values(want)


def values(events: Sequence[Event]) -> list[object]:
    return [e.codes.tolist() if isinstance(e, ImageDone) else e for e in events]


def test_threads_share_one_engine(
    transformer: Transformer, processor: Processor, mixed: list[Request], wanted: list[list[int]]
) -> None:
    engine = Engine(transformer, processor)
    got: dict[int, Event] = {}

    def ask(number: int) -> None:
        got[number] = list(engine.generate(mixed[number]))[-1]

    threads = [Thread(target=ask, args=(number,)) for number in (0, 1, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, event in got.items():
        assert isinstance(event, Finished)
        assert event.usage.completion_tokens == len(wanted[number])
    assert len(got) == 3 and not engine.busy


def test_a_step_that_breaks_ends_what_runs_and_nothing_else(
    transformer: Transformer,
    processor: Processor,
    mixed: list[Request],
    wanted: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = Engine(transformer, processor)
    handle, other = engine.add(mixed[0]), engine.add(mixed[1])
    engine.step()
    with monkeypatch.context() as patch:
        patch.setattr(runner.ModelRunner, "_draw", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.step()
    assert not engine.busy
    for broken in (handle, other):
        with pytest.raises(RuntimeError, match="engine failed"):
            list(broken)
    assert run(engine, mixed[:1]) == wanted[:1]


def test_what_can_never_run_is_refused(transformer: Transformer, processor: Processor) -> None:
    small = Engine(transformer, processor, cache_bytes=SLOT)
    with pytest.raises(SettingError, match="3 slots, the cache has 1"):
        small.add(request(processor, 1, "image"))
    small.check(request(processor, 1, "image", **OFF))
    with pytest.raises(ContextError, match=r"limit 256: shorten"):
        small.add(request(processor, 1, "text", room=256))
    with pytest.raises(SettingError, match="holds no slot"):
        Engine(transformer, processor, cache_bytes=10)


# --- the pieces it relies on -----------------------------------------------------------------


def test_a_walk_is_a_row_of_the_grammar(processor: Processor) -> None:
    vocabulary = processor.vocabulary
    grammar = Grammar(vocabulary, processor.layout, (vocabulary.pad,))
    rng = random.Random(0)
    outputs: list[Any] = ["text", "image", "interleaved", "interleaved"]
    for output in outputs * 3:
        images, room = rng.randrange(1, 3), rng.randrange(66, 200)
        walk, state = Walk(grammar, output, images, room), grammar.start([output], [images], [room])
        while True:
            assert walk.state == state[0].tolist()
            assert walk.done == bool(grammar.done(state))
            assert walk.in_image == bool(grammar.in_image(state))
            if walk.done:
                break
            [allowed] = grammar.mask(state)
            choices = allowed.nonzero()[:, 0].tolist()
            assert walk.forced == (choices[0] if len(choices) == 1 else None)
            if not walk.in_image:
                assert walk.may_begin == bool(allowed[vocabulary.begin_image])
            begin = walk.may_begin and rng.random() < 0.1
            token = vocabulary.begin_image if begin else rng.choice(choices)
            walk.advance(token)
            state = grammar.advance(state, torch.tensor([token]))


def test_uniform_numbers_drawn_at_once_are_those_of_single_calls() -> None:
    one, many = generator(5), generator(5)
    at_once = [torch.rand(64, dtype=torch.float64, generator=many) for _ in range(2)]
    assert torch.equal(torch.cat(at_once), torch.cat([uniforms([one]) for _ in range(128)]))
