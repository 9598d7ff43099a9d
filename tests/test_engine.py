"""The engine gives the tokens of the reference loop, whatever runs beside a request."""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load, save
from tiny import CONFIG, make_request, tiny_processor, tiny_transformer
from tolerances import assert_close
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from earlyfusion import Chameleon
from earlyfusion.checkpoints import detect
from earlyfusion.engine import runner
from earlyfusion.engine.backends import attention, cpu
from earlyfusion.engine.backends import torch as torch_backend
from earlyfusion.engine.backends.attention import _causal_mask
from earlyfusion.engine.backends.torch import FusedTransformer
from earlyfusion.engine.blocks import BLOCK_SIZE, Branch
from earlyfusion.engine.cache import PagedCache
from earlyfusion.engine.engine import Engine
from earlyfusion.engine.handle import Handle, max_branches
from earlyfusion.engine.runner import ModelRunner
from earlyfusion.engine.scheduler import Piece, Step
from earlyfusion.errors import ContextError, OutOfMemoryError, SettingError, WeightsError
from earlyfusion.generation.event_builder import GrammarState
from earlyfusion.generation.grammar import Grammar
from earlyfusion.generation.lookup import Lookup
from earlyfusion.generation.reference import generate, generate_tokens
from earlyfusion.generation.request import Event, Finished, ImageDone, Request
from earlyfusion.generation.sampler import generator, uniforms
from earlyfusion.generation.settings import SamplingParams
from earlyfusion.model.quantise import quantise
from earlyfusion.model.transformer import FeedForward, Transformer
from earlyfusion.processor import Processor

BLOCK = BLOCK_SIZE * PagedCache.token_bytes(CONFIG, torch.float32)
GREEDY: dict[str, Any] = {"temperature": 0, "image_temperature": 0}
OFF: dict[str, Any] = {"guidance_text": 1, "guidance_image": 1}


@pytest.fixture(autouse=True, params=["compiled", "torch", "static"])
def step(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> str:
    """Every test runs with the compiled step, where there is a compiler, with torch's, and with the
    static step that a GPU captures."""
    if request.param != "compiled":
        monkeypatch.setattr(cpu, "available", lambda: False)
        monkeypatch.setattr(runner, "uses_bursts", lambda device: request.param == "static")
    elif device.type != "cpu" or not cpu.available():
        pytest.skip("the compiled step is for CPUs that have a C++ compiler")
    return str(request.param)


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Processor:
    return tiny_processor(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def transformer(processor: Processor, device: torch.device) -> Transformer:
    return tiny_transformer(processor, 1.0, device)


@pytest.fixture(scope="module")
def mixed(processor: Processor) -> list[Request]:
    """Ten requests that differ in everything."""
    shaped = {"top_p": 0.8, "top_k": 40, "min_p": 0.01, "image_top_k": 20}
    return [
        make_request(processor, 0, "text", max_tokens=30, **GREEDY),
        make_request(processor, 1, "image"),
        make_request(
            processor, 2, "interleaved", images=2, max_tokens=150, repetition_penalty=1.0, **OFF
        ),
        make_request(processor, 3, "image", with_image=True, guidance_image=1, **GREEDY),
        make_request(processor, 4, "text", with_image=True, max_tokens=25, **shaped),
        make_request(processor, 5, "image", with_image=True, **shaped),
        make_request(processor, 6, "interleaved", top_p=1, image_top_p=1, temperature=1.5),
        make_request(processor, 7, "image", guidance_text=2, guidance_image=2, image_top_p=1),
        make_request(processor, 8, "image", negative_prompt="a pear"),
        make_request(
            processor, 9, "image", with_image=True, jacobi=3, negative_prompt="a red apple"
        ),
    ]


@pytest.fixture(scope="module")
def mixed_expected(
    transformer: Transformer, processor: Processor, mixed: list[Request]
) -> list[list[int]]:
    tokens = [list(generate_tokens(transformer, processor, request)) for request in mixed]
    assert {max_branches(request) for request in mixed} == {1, 2, 3}
    return tokens


def run(
    engine: Engine, requests: Sequence[Request], apart: int = 0, rising: bool = False
) -> list[list[int]]:
    """The tokens of each; one joins every `apart` steps, `rising` each before the others."""
    handles: list[Handle] = []
    for request in requests:
        handles.append(engine.add(request, -len(handles) if rising else 0))
        for _ in range(apart):
            engine.step()
    while engine.busy:
        engine.step()
    assert all(handle.finished for handle in handles)
    return [handle.tokens for handle in handles]


# --- token for token -------------------------------------------------------------------------


def changed(processor: Processor, device: torch.device, **changes: Any) -> Transformer:
    model = Transformer(replace(CONFIG, **changes)).eval()
    weights = tiny_transformer(processor, 1.0).state_dict()
    model.load_state_dict(weights, strict=False)  # what an activation learns is not in it
    return model.to(device)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_act": "gelu_new"},
        {"hidden_act": "prelu"},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
    ],
    ids=str,
)
def test_other_activations_and_angles_equal_the_plain_loop(
    processor: Processor,
    mixed: list[Request],
    mixed_expected: list[list[int]],
    changes: dict[str, Any],
    device: torch.device,
) -> None:
    model = changed(processor, device, **changes)
    some = mixed[:3]
    tokens = [list(generate_tokens(model, processor, request)) for request in some]
    assert run(Engine(model, processor), some, 3) == tokens
    if changes.get("rope_scaling", {}).get("rope_type") != "dynamic":  # changes nothing so early
        assert tokens != mixed_expected[:3]


@pytest.mark.parametrize(
    ("options", "apart"),
    [
        pytest.param({}, 0, id="together"),
        pytest.param({}, 3, id="joining"),
        pytest.param({"chunk": 5}, 0, id="chunked"),
        pytest.param({"cache_bytes": 20 * BLOCK}, 4, id="preempted"),
    ],
)
def test_mixed_requests_equal_the_plain_loop(
    transformer: Transformer,
    processor: Processor,
    mixed: list[Request],
    mixed_expected: list[list[int]],
    options: dict[str, Any],
    apart: int,
) -> None:
    engine = Engine(transformer, processor, **options)
    assert run(engine, mixed, apart, rising="cache_bytes" in options) == mixed_expected
    assert (engine.preemptions > 4) == ("cache_bytes" in options)


@pytest.mark.parametrize("size", [1, 4, 30])
@pytest.mark.parametrize("blocks", [None, 18])
def test_prompt_lookup_changes_no_token(
    transformer: Transformer,
    processor: Processor,
    mixed: list[Request],
    size: int,
    blocks: int | None,
    step: str,
) -> None:
    """Greedy and not, with a penalty, where an image may begin, beside others, with few blocks."""
    if step == "static" and size != 4:
        pytest.skip("steps with guesses are not static")
    texts = [one for one in mixed if one.output != "image"]
    texts += [
        make_request(
            processor, 20, "text", max_tokens=120, temperature=0.3, repetition_penalty=1.0
        ),
        make_request(processor, 21, "text", max_tokens=120, repetition_penalty=1.3, **GREEDY),
        make_request(
            processor, 22, "interleaved", max_tokens=150, temperature=0.1, repetition_penalty=1.0
        ),
    ]
    expected = [list(generate_tokens(transformer, processor, asked)) for asked in texts]
    guessing = [replace(a, sampling=replace(a.sampling, prompt_lookup=size)) for a in texts]
    engine = Engine(transformer, processor, cache_bytes=blocks and blocks * BLOCK)
    asked = [*guessing, mixed[1], mixed[9]]
    assert run(engine, asked, 3, rising=blocks is not None)[: len(texts)] == expected
    assert (engine.preemptions > 0) == (blocks is not None)


def test_prompt_lookup_takes_fewer_steps(
    transformer: Transformer, processor: Processor, step: str
) -> None:
    free = make_request(processor, 0, "text", max_tokens=100, repetition_penalty=1.0, **GREEDY)
    text = "".join(e.text for e in generate(transformer, processor, free) if hasattr(e, "text"))
    for changes in ({}, {"stop": text[-len(text) // 3 :][:4]}):
        settings = {"repetition_penalty": 1.0, **GREEDY, **changes}
        request = make_request(processor, 0, "text", max_tokens=100, **settings)
        loop_events, steps = values(list(generate(transformer, processor, request))), []
        for size in (None, 8):
            sampling = replace(request.sampling, prompt_lookup=size)
            engine, number = Engine(transformer, processor), 0
            handle = engine.add(replace(request, sampling=sampling))
            while engine.busy:
                engine.step()
                number += 1
            steps.append(number)
            assert values(list(handle)) == loop_events
        # One step of the engine draws several tokens where it is static and without lookup.
        assert step == "static" or steps[1] <= 0.9 * steps[0]


def test_a_lookup_guesses_what_followed_the_same_tokens_last() -> None:
    lookup, history = Lookup(3), list[int]()
    guesses = []
    for token in (1, 2, 3, 4, 5, 1, 2, 6, 1, 2, 3, 4):
        history.append(token)
        guesses.append(lookup.guess(history))
    # The longest run decides, even where a shorter one came later.
    assert guesses[6] == [3, 4, 5] and guesses[9] == [6, 1, 2] and guesses[11] == [5, 1, 2]
    assert not any(guesses[n] for n in (0, 1, 2, 3, 4, 5, 7, 8))


def test_alone_equals_the_plain_loop(
    transformer: Transformer,
    processor: Processor,
    mixed: list[Request],
    mixed_expected: list[list[int]],
) -> None:
    engine = Engine(transformer, processor)
    for request, tokens in zip(mixed, mixed_expected, strict=True):
        assert run(engine, [request]) == [tokens]


def test_attention_may_be_split_into_any_groups(
    transformer: Transformer,
    processor: Processor,
    mixed: list[Request],
    mixed_expected: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention, "PADDING_BYTES", 0)
    assert run(Engine(transformer, processor), mixed) == mixed_expected


def test_weights_that_are_not_packed(
    processor: Processor,
    mixed: list[Request],
    mixed_expected: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    device: torch.device,
) -> None:
    monkeypatch.setattr(torch_backend, "fits_second_copy", lambda transformer: False)
    plain = tiny_transformer(processor, 1.0, device)
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    engine = Engine(plain, processor)
    assert run(engine, mixed) == mixed_expected
    attention = plain.model.layers[0].self_attn
    stores = {p.weight.untyped_storage().data_ptr() for p in (attention.q_proj, attention.k_proj)}
    assert step == "compiled" or len(stores) == 1, "held twice"
    saved = {name: value.to(device) for name, value in load(save(plain.state_dict())).items()}
    assert saved.keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in saved.items())
    # They can still be trained, and the engine follows.
    plain(torch.tensor([[1, 2, 3]], device=device)).sum().backward()
    with torch.no_grad():
        attention.q_proj.weight.add_(attention.q_proj.weight.grad, alpha=30)
    expected = list(generate_tokens(plain, processor, mixed[0]))
    assert run(engine, mixed[:1]) == [expected] != mixed_expected[:1]


def test_other_linear_modules_are_called_as_they_are(
    processor: Processor,
    mixed: list[Request],
    mixed_expected: list[list[int]],
    device: torch.device,
) -> None:
    class Doubled(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 2

    plain = tiny_transformer(processor, 1.0, device)
    for layer in plain.model.layers:
        layer.mlp.up_proj.__class__ = Doubled
    assert run(Engine(plain, processor), mixed[:1]) != mixed_expected[:1]
    expected = list(generate_tokens(plain, processor, mixed[0]))
    assert run(Engine(plain, processor), mixed[:1]) == [expected]


def test_stop_tokens_of_one_request_leave_the_others_alone(
    transformer: Transformer,
    processor: Processor,
    mixed: list[Request],
    mixed_expected: list[list[int]],
) -> None:
    vocabulary = processor.vocabulary
    request = replace(mixed[2], stops=(vocabulary.end_of_turn, vocabulary.pad))
    expected = list(generate_tokens(transformer, processor, request))
    engine = Engine(transformer, processor)
    first = engine.add(mixed[2])
    engine.step()
    second = engine.add(request)
    assert run(engine, [mixed[6]]) == [mixed_expected[6]]
    assert first.tokens == mixed_expected[2] and second.tokens == expected


@pytest.mark.parametrize("name", ["tiny_1", "tiny_mp2_swin_gqa"])
def test_both_block_layouts(golden: Path, name: str, device: torch.device) -> None:
    loaded = detect.load(golden / "models" / name, device, torch.float32)
    vocabulary = loaded.processor.vocabulary
    settings = SamplingParams(seed=0, **GREEDY).resolved({})
    ids = [vocabulary.bos, *loaded.processor.encode_text("a pear"), vocabulary.end_of_turn]
    texts = [Request(ids[: i + 2], "text", settings, 0, 12) for i in range(3)]
    expected = [
        list(generate_tokens(loaded.transformer, loaded.processor, request)) for request in texts
    ]
    assert run(Engine(loaded.transformer, loaded.processor, context_tokens=64), texts) == expected


def test_the_embedded_model(device: torch.device) -> None:
    model = Chameleon.load("mini", str(device), "float32")
    short = SamplingParams(max_tokens=20)
    requests = [
        model.request("Draw a red apple.", "image", seed=0),
        model.request("What is a pear?", "text", short, seed=1),
        model.request("Show me three different fruits.", "interleaved", short, seed=2),
    ]
    expected = [list(generate_tokens(model.transformer, model.processor, one)) for one in requests]
    assert run(model.engine, requests) == expected


def test_hidden_states_equal_the_modules(transformer: Transformer, device: torch.device) -> None:
    """Whole prompts, pieces and single tokens of several sequences in one step; fp32, 1e-5."""
    rows = [torch.randint(0, CONFIG.vocab_size, (n,)).tolist() for n in (9, 1, 14, 5)]
    cache = PagedCache(CONFIG, 6, 32, torch.float32, device)
    fused = FusedTransformer(transformer, cache)
    branches = [Branch(row, array("q", [n])) for row, n in zip(rows, (4, 1, 0, 5), strict=True)]
    actual: dict[int, list[torch.Tensor]] = {}
    with torch.inference_mode():
        for width in (4, 1, 3, 1, 1, 99):
            pieces = [
                Piece(b, b.num_computed, min(width, b.pending)) for b in branches if b.pending
            ]
            step = Step(pieces)
            x_TD = transformer.model.norm(fused.run_layers(step))
            rows = x_TD.split([piece.size for piece in step.pieces])
            for piece, states in zip(step.pieces, rows, strict=True):
                actual.setdefault(id(piece.branch), []).append(
                    states @ transformer.lm_head.weight.T
                )
                piece.branch.num_computed = piece.end
        for branch in branches:
            expected = transformer(torch.tensor([branch.tokens], device=device))[0]
            assert_close(torch.cat(actual[id(branch)]), expected, atol=1e-5, rtol=1e-5)


def test_bfloat16_runs(processor: Processor, device: torch.device) -> None:
    half = tiny_transformer(processor, 1.0, device).to(torch.bfloat16)
    engines = [Engine(half, processor) for _ in range(2)]
    first, second = (run(engine, [make_request(processor, 1, "image")]) for engine in engines)
    assert first == second and len(first[0]) == 66


def in_dtype(processor: Processor, name: str, device: torch.device) -> Transformer:
    plain = tiny_transformer(processor, 1.0, device)
    if name in ("int8", "int4"):
        return quantise(plain.to(torch.bfloat16), int(name[3]))
    return plain.to(getattr(torch, name))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
def test_a_reply_does_not_depend_on_how_its_prompt_was_read(
    processor: Processor, mixed: list[Request], dtype: str, step: str, device: torch.device
) -> None:
    """Whole, in pieces, from a prefix, beside others, with more threads: token for token."""
    if step != "compiled":
        pytest.skip("torch adds in another order for another number of rows")
    model, threads = in_dtype(processor, dtype, device), torch.get_num_threads()
    requests = [
        replace(one, max_tokens=min(one.max_tokens, 70)) for one in (mixed[4], mixed[3], mixed[6])
    ]
    alone = [run(Engine(model, processor), [one])[0] for one in requests]
    second = Engine(model, processor)
    for _ in range(2):
        assert [run(second, [one])[0] for one in requests] == alone
    for chunk in (2, 7, 31):
        assert run(Engine(model, processor, chunk=chunk), requests) == alone
    assert run(Engine(model, processor), [*mixed[:3], *requests], 2)[3:] == alone
    try:
        torch.set_num_threads(threads + 1)
        assert run(Engine(model, processor, chunk=50), requests) == alone
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(("rows", "end"), [(1, 6), (4, 11)])
def test_the_causal_mask_of_a_gpu_is_that_of_a_cpu(rows: int, end: int) -> None:
    q, k, v = torch.randn(1, 2, rows, 8), torch.randn(1, 2, end, 8), torch.randn(1, 2, end, 8)
    outputs = [
        F.scaled_dot_product_attention(q, k, v, attn_mask=_causal_mask(rows, end, device))
        for device in (torch.device("cpu"), torch.device("cuda"))
    ]
    torch.testing.assert_close(*outputs)


# --- what a request leaves and finds ---------------------------------------------------------


def read_tokens(engine: Engine, request: Request, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many tokens the model reads for a request."""
    counts: list[int] = []
    states = engine.runner.backend.hidden_states

    def counted(step: Step) -> torch.Tensor:
        counts.append(len(step.tokens))
        return states(step)

    with monkeypatch.context() as patch:
        patch.setattr(engine.runner.backend, "hidden_states", counted)
        run(engine, [request])
    return sum(counts)


def test_an_image_is_read_once(
    transformer: Transformer,
    processor: Processor,
    mixed: list[Request],
    mixed_expected: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine, request = Engine(transformer, processor), mixed[4]
    cold = read_tokens(engine, request, monkeypatch)
    other = replace(request, ids=[*request.ids[:67], *request.ids[:0:-1][:5]])
    expected = list(generate_tokens(transformer, processor, other))
    assert run(engine, [other]) == [expected]
    warm = read_tokens(engine, request, monkeypatch)
    assert warm <= cold - 67
    assert run(engine, [request]) == [mixed_expected[4]]


def test_memory_is_taken_before_it_is_used(
    transformer: Transformer,
    processor: Processor,
    mixed: list[Request],
    mixed_expected: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
    device: torch.device,
) -> None:
    engine, request, cleared = Engine(transformer, processor), mixed[4], list[int]()
    clear = engine.runner.clear
    monkeypatch.setattr(
        engine.runner, "clear", lambda numbers: (cleared.extend(numbers), clear(numbers))
    )

    def touched() -> list[int]:
        cleared.clear()
        while engine.touch_memory():
            pass
        return [*cleared]

    on_cpu, context = device.type == "cpu", -(-engine.context_tokens // BLOCK_SIZE)
    assert touched() == [*range(context * on_cpu)]
    assert run(engine, [request]) == [mixed_expected[4]]
    used = sum(bool(engine._scheduler.pool.content(block)) for block in range(context))
    # As many again as the request has used, and none that holds its keys and values.
    assert used > 0 and touched() == [*range(context, context + used)] * on_cpu
    assert run(engine, [request]) == [mixed_expected[4]]
    later = Engine(transformer, processor)
    assert run(later, [request]) == [mixed_expected[4]]
    while later.touch_memory():
        pass
    assert run(later, [request]) == [mixed_expected[4]]
    monkeypatch.setattr("earlyfusion.engine.engine.TOUCHED_AHEAD", 2 * BLOCK)
    limited = Engine(transformer, processor)
    assert [limited.touch_memory() for _ in range(4)] == [on_cpu, on_cpu, False, False]
    small = Engine(transformer, processor, cache_bytes=BLOCK)
    assert [small.touch_memory() for _ in range(2)] == [on_cpu, False]


def test_new_weights_take_effect(
    processor: Processor, mixed: list[Request], device: torch.device
) -> None:
    plain = tiny_transformer(processor, 1.0, device)
    engine = Engine(plain, processor)
    before = run(engine, mixed[:1])
    with torch.no_grad():
        plain.model.layers[1].mlp.down_proj.weight.mul_(30)
    after = run(engine, mixed[:1])
    assert after == [list(generate_tokens(plain, processor, mixed[0]))] != before


def test_cancelled_requests_do_not_affect_the_others(
    transformer: Transformer,
    processor: Processor,
    mixed: list[Request],
    mixed_expected: list[list[int]],
) -> None:
    engine = Engine(transformer, processor)
    handles = [engine.add(request) for request in mixed]
    rng = random.Random(0)
    for handle in rng.sample(handles, 4):
        for _ in range(rng.randrange(12)):
            engine.step()
        handle.cancel()
        handle.cancel()
    cut = [handle for handle in handles if not handle.finished and not handle.branches[0].blocks]
    while engine.busy:
        engine.step()
    for handle, tokens in zip(handles, mixed_expected, strict=True):
        assert handle.tokens == (tokens if handle.finished else tokens[: len(handle.tokens)])
    assert 0 < len(cut) and sum(handle.finished for handle in handles) >= 4


def test_closing_the_iterator_cancels(transformer: Transformer, processor: Processor) -> None:
    engine = Engine(transformer, processor)
    events = engine.generate(make_request(processor, 1, "image"))
    next(events)
    assert engine.busy
    events.close()  # type: ignore[attr-defined]
    assert not engine.busy


def test_events_equal_those_of_the_plain_loop(
    transformer: Transformer, processor: Processor, mixed: list[Request]
) -> None:
    engine = Engine(transformer, processor)
    streams = [iter(engine.add(request)) for request in mixed[:3]]
    for stream, request in zip(streams, mixed, strict=False):
        actual, expected = list(stream), list(generate(transformer, processor, request))
        assert values(actual) == values(expected)


def values(events: Sequence[Event]) -> list[object]:
    return [e.codes.tolist() if isinstance(e, ImageDone) else e for e in events]


def test_threads_share_one_engine(
    transformer: Transformer,
    processor: Processor,
    mixed: list[Request],
    mixed_expected: list[list[int]],
) -> None:
    """Whoever steps, each thread gets the events of its own request, in order and none twice."""
    engine, numbers = Engine(transformer, processor), (0, 1, 4)
    actual: dict[int, list[Event]] = {}

    def ask(number: int) -> None:
        actual[number] = list(engine.generate(mixed[number]))

    threads = [Thread(target=ask, args=(number,)) for number in numbers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    loop_events = {
        number: list(generate(transformer, processor, mixed[number])) for number in numbers
    }
    assert {n: values(events) for n, events in actual.items()} == {
        n: values(events) for n, events in loop_events.items()
    }
    assert not engine.busy


def test_a_failing_step_ends_only_the_running_requests(
    transformer: Transformer,
    processor: Processor,
    mixed: list[Request],
    mixed_expected: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = Engine(transformer, processor)
    handle, other = engine.add(mixed[0]), engine.add(mixed[1])
    engine.step()
    with monkeypatch.context() as patch:
        patch.setattr(ModelRunner, "run", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.step()
    assert not engine.busy
    for broken in (handle, other):
        with pytest.raises(RuntimeError, match="engine failed"):
            list(broken)
    assert run(engine, mixed[:1]) == mixed_expected[:1]


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("x: can't allocate memory: 9")])
def test_out_of_memory_ends_one_request(
    transformer: Transformer,
    processor: Processor,
    mixed: list[Request],
    mixed_expected: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    engine = Engine(transformer, processor)
    handles = [engine.add(request) for request in mixed[:4]]
    for _ in range(3):
        engine.step()

    def fail(*_: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(ModelRunner, "run", fail)
        engine.step()
    with pytest.raises(OutOfMemoryError, match="no memory for 4 requests at once"):
        list(handles[3])
    while engine.busy:
        engine.step()
    assert [handle.tokens for handle in handles[:3]] == mixed_expected[:3]


def test_a_reply_whose_events_fail_ends_alone(
    transformer: Transformer,
    processor: Processor,
    mixed: list[Request],
    mixed_expected: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = Engine(transformer, processor)
    good, bad = engine.add(mixed[0]), engine.add(mixed[1])
    monkeypatch.setattr(bad, "accept", lambda tokens: 1 / 0)
    while engine.busy:
        engine.step()
    assert good.tokens == mixed_expected[0] and isinstance(bad.error, ZeroDivisionError)


def test_requests_that_can_never_run_are_refused(
    transformer: Transformer, processor: Processor
) -> None:
    small = Engine(transformer, processor, cache_bytes=8 * BLOCK)
    with pytest.raises(SettingError, match=r"3 x \d+ tokens, the cache has 256: .* guidances to 1"):
        small.add(make_request(processor, 1, "image"))
    small.check(make_request(processor, 1, "image", **OFF))
    with pytest.raises(SettingError, match="3 x"):
        small.add(make_request(processor, 1, "interleaved"))
    with pytest.raises(ContextError, match=r"limit 256: shorten"):
        small.add(make_request(processor, 1, "text", max_tokens=256))
    with pytest.raises(SettingError, match="holds no block"):
        Engine(transformer, processor, cache_bytes=10)


def test_text_runs_in_one_branch(transformer: Transformer, processor: Processor) -> None:
    """Guidance takes no blocks where no image may come, whatever its weights are."""
    small = Engine(transformer, processor, cache_bytes=4 * BLOCK)
    text = make_request(
        processor, 0, "text", max_tokens=5, guidance_text=3, guidance_image=2, **GREEDY
    )
    without = make_request(processor, 0, "interleaved", max_tokens=5, images=0, **GREEDY)
    for request in (text, replace(text, max_images=1), without):
        assert run(small, [request]) == [list(generate_tokens(transformer, processor, request))]


def test_nothing_is_sampled_behind_a_stop_string(
    transformer: Transformer, processor: Processor
) -> None:
    free = make_request(processor, 0, "text", max_tokens=30, **GREEDY)
    text = "".join(e.text for e in generate(transformer, processor, free) if hasattr(e, "text"))
    stop = text[len(text) // 3 :][:3]
    request = make_request(processor, 0, "text", max_tokens=30, stop=stop, **GREEDY)
    loop_events = list(generate(transformer, processor, request))
    engine = Engine(transformer, processor)
    handle = engine.add(request)
    assert values(list(handle)) == values(loop_events)
    assert isinstance(loop_events[-1], Finished) and loop_events[-1].reason == "stop"
    assert len(handle.tokens) == loop_events[-1].usage.completion_tokens < 30
    assert not engine.busy and not handle.events


# --- what stands in the module tree ----------------------------------------------------------


class Scaled(nn.Module):
    """What another module gives, times a factor."""

    def __init__(self, inner: nn.Module, factor: float = 0.5) -> None:
        super().__init__()
        self.inner, self.factor = inner, factor

    def forward(self, *inputs: Any) -> Any:
        return self.inner(*inputs) * self.factor


def halved(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    return output * 0.5


def shifted(module: nn.Module, inputs: Any) -> Any:
    return (inputs[0] + 0.3, *inputs[1:])


def third_place(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    """Patches one place of a prompt, as it stands in the reference loop: (1, T, D), read whole."""
    if output.shape[1] > 1:
        output = output.clone()
        output[:, 2] = 0
    return output


def halve_feed_forwards(module: nn.Module, inputs: Any, output: Any) -> Any:
    return output * 0.5 if isinstance(module, FeedForward) else None


def hook(name: str, function: Any = halved) -> Any:
    return lambda model: model.get_submodule(name).register_forward_hook(function).remove


def before(name: str) -> Any:
    return lambda model: model.get_submodule(name).register_forward_pre_hook(shifted).remove


def wrap(name: str, kind: Any = Scaled) -> Any:
    owner, _, last = name.rpartition(".")

    def change(model: nn.Module) -> Any:
        module = model.get_submodule(name)
        setattr(model.get_submodule(owner), last, kind(module))
        return lambda: setattr(model.get_submodule(owner), last, module)

    return change


def assign_forward(model: Any) -> Any:
    mlp = model.model.layers[1].mlp
    plain = mlp.forward
    mlp.forward = lambda x: plain(x) * 0.5
    return lambda: mlp.__dict__.pop("forward")


def patch_class(model: Any) -> Any:
    plain = FeedForward.forward
    FeedForward.forward = lambda self, x: plain(self, x) * 0.5  # type: ignore[method-assign]
    return lambda: setattr(FeedForward, "forward", plain)


CHANGES = {
    "a hook on a block": hook("model.layers.0"),
    "a hook on one place of a prompt": hook("model.layers.0", third_place),
    "a hook on a linear module": hook("model.layers.0.mlp.down_proj"),
    "a hook on the embedding": hook("model.embed_tokens"),
    "a hook on the last norm": hook("model.norm"),
    "a hook on the head": hook("lm_head"),
    "a hook on the transformer": hook(""),
    "a hook before attention": before("model.layers.0.self_attn"),
    "a hook before a norm": before("model.layers.1.post_attention_layernorm"),
    "a hook on all modules": lambda _: register_module_forward_hook(halve_feed_forwards).remove,
    "a linear module wrapped": wrap("model.layers.0.mlp.down_proj"),
    "a block of another class": wrap("model.layers.0"),
    "a head of another class": wrap("lm_head"),
    "an embedding of another class": wrap("model.embed_tokens"),
    "a norm of another class": wrap(
        "model.norm", lambda norm: nn.LayerNorm(CONFIG.hidden_size).to(norm.weight.device)
    ),
    "a head with a bias": wrap("lm_head", lambda head: with_bias(head)),
    "a projection with a bias": wrap("model.layers.0.mlp.up_proj", lambda part: with_bias(part)),
    "forward assigned": assign_forward,
    "forward of a class replaced": patch_class,
}


CHANGES_OF_STATIC = ("a hook on a block", "a head of another class", "forward assigned")
"""Enough to see static steps give way to the modules, and come back."""


def with_bias(linear: nn.Linear) -> nn.Linear:
    other = nn.Linear(linear.in_features, linear.out_features)
    other.weight = linear.weight
    nn.init.normal_(other.bias, generator=torch.Generator().manual_seed(0))
    return other.to(linear.weight.device)


@pytest.mark.parametrize("name", CHANGES)
def test_changes_of_the_module_tree_take_effect(
    processor: Processor,
    mixed: list[Request],
    mixed_expected: list[list[int]],
    name: str,
    device: torch.device,
    step: str,
) -> None:
    if step == "static" and name not in CHANGES_OF_STATIC:
        pytest.skip("a changed tree has no static steps, whatever was changed")
    plain = tiny_transformer(processor, 1.0, device)
    requests = [
        replace(mixed[0], max_tokens=8),
        make_request(processor, 3, "interleaved", True, 12),
    ]
    engine = Engine(plain, processor)
    untouched = run(engine, requests)
    assert untouched[0] == mixed_expected[0][:8]
    undo = CHANGES[name](plain)
    try:
        expected = [list(generate_tokens(plain, processor, one)) for one in requests]
        assert run(engine, requests) == expected != untouched
        assert run(engine, requests[::-1]) == expected[::-1], "with what the first left behind"
        assert run(Engine(plain, processor), requests) == expected, (
            "changed before the engine was made"
        )
    finally:
        undo()
    assert run(engine, requests) == untouched


def test_a_hook_registered_while_requests_run(
    processor: Processor,
    mixed: list[Request],
    mixed_expected: list[list[int]],
    device: torch.device,
) -> None:
    plain = tiny_transformer(processor, 1.0, device)
    engine = Engine(plain, processor)
    first = engine.add(mixed[1])
    for _ in range(5):
        engine.step()
    hung = plain.model.layers[0].register_forward_hook(halved)
    expected = list(generate_tokens(plain, processor, mixed[0]))
    assert run(engine, mixed[:1]) == [expected] != mixed_expected[:1]
    assert first.finished and len(first.tokens) == len(mixed_expected[1])
    assert first.tokens[:5] == mixed_expected[1][:5]
    hung.remove()
    assert run(engine, mixed[:1]) == mixed_expected[:1]


def test_hooks_see_the_same_calls_as_in_the_plain_loop(
    processor: Processor, mixed: list[Request], device: torch.device
) -> None:
    """Every prompt whole, though the cache holds it already and chunks are short."""
    plain = tiny_transformer(processor, 1.0, device)
    engine, recorded = Engine(plain, processor, chunk=5), list[tuple[int, ...]]()
    request = replace(mixed[4], max_tokens=4)
    run(engine, [request])
    plain.model.layers[0].register_forward_hook(lambda m, i, o: recorded.append(tuple(o.shape)))
    list(generate_tokens(plain, processor, request))
    expected = recorded[:]
    for _ in range(2):
        recorded.clear()
        run(engine, [request])
        assert recorded == expected and expected[0] == (1, len(request.ids), CONFIG.hidden_size)


def test_modules_that_cannot_run_are_refused(
    processor: Processor,
    mixed: list[Request],
    mixed_expected: list[list[int]],
    device: torch.device,
) -> None:
    plain = tiny_transformer(processor, 1.0, device)
    engine, block = Engine(plain, processor), plain.model.layers[0]
    plain.model.layers[0] = nn.Linear(CONFIG.hidden_size, CONFIG.hidden_size)
    with pytest.raises(SettingError, match=r"layers\[0\] is a Linear, which cannot be a layer"):
        engine.add(mixed[0])
    plain.model.layers[0] = block
    last = plain.model.layers[-1]
    del plain.model.layers[-1]
    with pytest.raises(SettingError, match=r"has 1 layers, but its config says 2"):
        engine.add(mixed[0])
    plain.model.layers.append(last)
    assert run(engine, mixed[:1]) == mixed_expected[:1]


@pytest.mark.parametrize("target", ["lm_head", "q_proj"])
def test_adapters_of_peft_take_effect_and_run_in_batches(
    processor: Processor,
    mixed: list[Request],
    mixed_expected: list[list[int]],
    target: str,
    device: torch.device,
) -> None:
    peft = pytest.importorskip("peft")
    plain = tiny_transformer(processor, 1.0, device)
    engine = Engine(plain, processor)
    assert run(engine, mixed[:2]) == mixed_expected[:2]
    torch.manual_seed(0)
    adapter = peft.LoraConfig(r=4, lora_alpha=64, target_modules=[target], init_lora_weights=False)
    peft.inject_adapter_in_model(adapter, plain)
    plain.eval()
    expected = [list(generate_tokens(plain, processor, one)) for one in mixed[:4]]
    assert run(engine, mixed[:4]) == expected and expected[:2] != mixed_expected[:2]
    assert not engine.runner.backend.needs_whole_prompts


# --- weights that are not finite -------------------------------------------------------------


@pytest.mark.parametrize("output", ["text", "image"])
@pytest.mark.parametrize("jacobi", [None, 4])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_raise(
    processor: Processor, output: str, jacobi: int | None, value: float, device: torch.device
) -> None:
    broken = tiny_transformer(processor, device=device)
    with torch.no_grad():
        broken.model.layers[1].mlp.down_proj.weight[3, 0] = value
    for settings in ({}, GREEDY):
        request = make_request(processor, 1, output, jacobi=jacobi, **settings)
        engine = Engine(broken, processor)
        with pytest.raises(WeightsError, match=r"not finite .* run `earlyfusion info MODEL`"):
            list(engine.generate(request))
        assert not engine.busy
        with pytest.raises(WeightsError, match="not finite"):
            list(generate(broken, processor, request))


def test_a_failing_request_does_not_affect_the_others(
    processor: Processor,
    mixed: list[Request],
    mixed_expected: list[list[int]],
    device: torch.device,
) -> None:
    plain = tiny_transformer(processor, 1.0, device)
    used = {*mixed_expected[0], *mixed_expected[4], *mixed[0].ids, *mixed[4].ids}
    broken = next(t for t in processor.vocabulary.text_tokens.tolist() if t not in used)
    with torch.no_grad():
        plain.model.embed_tokens.weight[broken] = torch.nan
    engine = Engine(plain, processor, cache_bytes=16 * BLOCK)
    # What follows takes the blocks of the one that failed, and looks back beside the long one.
    long, bad = engine.add(mixed[4]), engine.add(replace(mixed[4], ids=[*mixed[4].ids, broken]))
    with pytest.raises(WeightsError):
        list(bad)
    assert run(engine, [mixed[0]]) == [mixed_expected[0]]
    while engine.busy:
        engine.step()
    assert long.tokens == mixed_expected[4]
    with pytest.raises(WeightsError):
        list(bad)


# --- the pieces it relies on -----------------------------------------------------------------


def test_a_grammar_state_is_a_row_of_the_grammar(processor: Processor) -> None:
    vocabulary = processor.vocabulary
    grammar = Grammar(vocabulary, processor.layout, (vocabulary.pad,))
    rng = random.Random(0)
    outputs: list[Any] = ["text", "image", "interleaved", "interleaved"]
    for output in outputs * 3:
        images, max_tokens = rng.randrange(1, 3), rng.randrange(66, 200)
        grammar_state, state = (
            GrammarState(grammar, output, images, max_tokens),
            grammar.start([output], [images], [max_tokens]),
        )
        while True:
            assert grammar_state.row == state[0].tolist()
            assert grammar_state.done == bool(grammar.done(state))
            assert grammar_state.in_image == bool(grammar.in_image(state))
            if grammar_state.done:
                break
            [allowed] = grammar.mask(state)
            choices = allowed.nonzero()[:, 0].tolist()
            assert grammar_state.forced == (choices[0] if len(choices) == 1 else None)
            if not grammar_state.in_image:
                assert grammar_state.may_begin_image == bool(allowed[vocabulary.begin_image])
            begin = grammar_state.may_begin_image and rng.random() < 0.1
            token = vocabulary.begin_image if begin else rng.choice(choices)
            grammar_state.advance(token)
            state = grammar.advance(state, torch.tensor([token]))


def test_uniform_numbers_generated_at_once_are_those_of_single_calls() -> None:
    one, many = generator(5), generator(5)
    at_once = [torch.rand(64, dtype=torch.float64, generator=many) for _ in range(2)]
    assert torch.equal(torch.cat(at_once), torch.cat([uniforms([one]) for _ in range(128)]))


# --- angles that depend on the length ----------------------------------------------------------


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rope_that_depends_on_the_length_equals_the_plain_loop(
    processor: Processor, mixed: list[Request], kind: str, device: torch.device
) -> None:
    half, trained = CONFIG.head_dim // 2, 24
    longrope = {"short_factor": [1.0] * half, "long_factor": [2.5] * half}
    longrope |= {"original_max_position_embeddings": trained}
    scaling = {"rope_type": kind, "factor": 3.0} | (longrope if kind == "longrope" else {})
    length = trained if kind == "dynamic" else CONFIG.max_position_embeddings
    config = replace(CONFIG, rope_scaling=scaling, max_position_embeddings=length)
    transformer = Transformer(config).eval()
    transformer.load_state_dict(tiny_transformer(processor, 1.0).state_dict())
    transformer.to(device)
    texts = [
        replace(request, max_tokens=60) for request in (mixed[0], mixed[4]) if len(request.ids) < 90
    ]
    expected = [list(generate_tokens(transformer, processor, request)) for request in texts]
    assert (
        max(len(request.ids) + len(t) for request, t in zip(texts, expected, strict=True)) > trained
    )
    context = CONFIG.max_position_embeddings
    assert run(Engine(transformer, processor, context_tokens=context), texts) == expected
