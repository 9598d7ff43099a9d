"""The engine with smaller keys and values: bf16 and int8, in torch and in compiled code."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import CONFIG, TEXTS, tiny_processor, tiny_transformer

from earlyfusion.engine.backends import cpu
from earlyfusion.engine.cache import Cache
from earlyfusion.engine.engine import Engine
from earlyfusion.engine.handle import Handle
from earlyfusion.engine.runner import ModelRunner
from earlyfusion.engine.scheduler import Branch, Copy, Piece, Plan
from earlyfusion.engine.step import Step
from earlyfusion.errors import SettingError
from earlyfusion.generation.grammar import Grammar
from earlyfusion.generation.request import Request
from earlyfusion.generation.settings import SamplingParams
from earlyfusion.model.kv_cache import KVCache
from earlyfusion.model.transformer import Transformer
from earlyfusion.processor import Processor

CPU = torch.device("cpu")
# Of the largest logit: a key or value is off by at most 1 / 256 (bf16) or 1 / 254 (int8) of its
# vector's largest entry.
TOLERANCE = {"fp32": 1e-5, "bf16": 0.05, "int8": 0.05}


@pytest.fixture(params=["compiled", "torch"])
def step(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(cpu, "available", lambda: False)
    elif not cpu.available():
        pytest.skip("no C++ compiler here")
    return str(request.param)


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Processor:
    return tiny_processor(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def transformer(processor: Processor) -> Transformer:
    return tiny_transformer(processor, begin_image=1.0)


def states(
    transformer: Transformer, processor: Processor, kept: str | None, lengths: list[int]
) -> torch.Tensor:
    """What the head reads for rows that read a prompt at once, then eight tokens singly."""
    size = transformer.lm_head.weight.shape[0]
    grammar = Grammar(processor.vocabulary, processor.layout, (), size)
    model = ModelRunner(transformer, grammar, len(lengths), 64, kept)
    numbers = torch.Generator().manual_seed(sum(lengths))
    rows = [torch.randint(4, size, (n + 8,), generator=numbers).tolist() for n in lengths]
    branches = [Branch(row, slot) for slot, row in enumerate(rows)]
    prompts = zip(branches, lengths, strict=True)
    model.run(Plan([], [Piece(branch, 0, n) for branch, n in prompts], []), [])
    seen = []
    for more in range(8):
        pieces = [Piece(b, n + more, 1) for b, n in zip(branches, lengths, strict=True)]
        with torch.inference_mode():
            seen.append(model.backend.states(Step(pieces, CPU)))
    return torch.stack(seen)


@pytest.mark.parametrize("kept", ["fp32", "bf16", "int8"])
def test_states_are_near_those_of_the_whole_cache(
    transformer: Transformer,
    processor: Processor,
    kept: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lengths = [3, 17, 2, 40, 9]
    own = states(transformer, processor, None, lengths)
    small = states(transformer, processor, kept, lengths)
    largest = float(own.abs().max())
    error = float((small - own).abs().max()) / largest
    assert error <= TOLERANCE[kept] and (error > 1e-5) == (kept != "fp32")
    monkeypatch.setattr(cpu, "available", lambda: False)
    plain = states(transformer, processor, kept, lengths)
    # The same rounding in torch and in compiled code, but for what lies at half a level.
    assert (plain - small).abs().max() <= max(error / 2, 1e-5) * largest
    assert (plain - small).abs().mean() < 1e-3 * largest


def request(processor: Processor, seed: int, output: str, shown: bool, room: int) -> Request:
    vocabulary, ids = processor.vocabulary, [processor.vocabulary.bos]
    if shown:
        codes = np.random.default_rng(seed).integers(0, 64, (8, 8))
        ids += processor.layout.spell(codes, vocabulary)
    ids += [*processor.encode_text(TEXTS[seed % 3][:12]), vocabulary.end_of_turn]
    sampling = SamplingParams(seed=seed).resolved({})
    return Request(ids, output, sampling, int(output != "text"), room)  # type: ignore[arg-type]


def run(engine: Engine, requests: list[Request], apart: int = 0) -> list[list[int]]:
    handles: list[Handle] = []
    for asked in requests:
        handles.append(engine.add(asked, -len(handles)))
        for _ in range(apart):
            engine.step()
    while engine.busy:
        engine.step()
    assert all(handle.finished for handle in handles)
    return [handle.tokens for handle in handles]


def agreement(one: list[list[int]], two: list[list[int]]) -> float:
    pairs = [a == b for x, y in zip(one, two, strict=True) for a, b in zip(x, y, strict=False)]
    return sum(pairs) / len(pairs)


@pytest.mark.parametrize("kept", ["bf16", "int8"])
def test_guided_preempted_and_from_a_prefix(
    transformer: Transformer, processor: Processor, kept: str, step: str
) -> None:
    """Rounding may turn a close draw, and what follows it; without an error most tokens stay."""
    asked = [request(processor, i, "image", i > 0, 66) for i in range(3)]
    asked += [request(processor, 3, "text", True, 30), request(processor, 4, "text", False, 30)]
    engine = Engine(transformer, processor, cache_dtype=kept)
    alone = [run(engine, [one])[0] for one in asked]
    assert agreement(alone, run(Engine(transformer, processor), asked)) > 0.6
    assert agreement(run(engine, asked), alone) > 0.9  # from what the slots keep, side by side
    slot = engine.slot_bytes
    small = Engine(transformer, processor, cache_bytes=4 * slot, cache_dtype=kept)
    assert agreement(run(small, asked, apart=4), alone) > 0.6 and small.preemptions > 0


def test_a_copied_slot_holds_the_same() -> None:
    cache = Cache(CONFIG, 3, 8, torch.int8, CPU)
    for layer, scales in zip(cache.layers, cache.scales, strict=True):
        layer.copy_(torch.randint(-127, 128, layer.shape))
        scales.uniform_()
    before = [layer.read(2, 8, torch.float32)[1].clone() for layer in cache.layer_caches]
    cache.copy(Copy(0, 2, 5))
    for kept, old in zip(cache.layer_caches, before, strict=True):
        source, target = (kept.read(slot, 8, torch.float32) for slot in (0, 2))
        for part in (0, 1):
            assert torch.equal(source[part][:, :5], target[part][:, :5])
        assert torch.equal(target[1][:, 5:], old[:, 5:])


def test_smaller_entries_make_more_slots(transformer: Transformer, processor: Processor) -> None:
    budget = 8 * Engine(transformer, processor).slot_bytes
    slots = {
        kept: Engine(transformer, processor, cache_bytes=budget, cache_dtype=kept).slots
        for kept in ("fp32", "bf16", "int8")
    }
    width = CONFIG.head_dim
    assert slots == {"fp32": 8, "bf16": 16, "int8": 8 * 4 * width // (width + 4)}
    for kept, dtype in (("fp32", torch.float32), ("int8", torch.int8)):
        cache = Cache(CONFIG, 2, 5, dtype, CPU)
        held = sum(part.nbytes for part in (*cache.layers, *cache.scales))
        assert held == 2 * 5 * Cache.token_bytes(CONFIG, dtype), kept


def test_zeros_stay_zeros() -> None:
    cache = Cache(CONFIG, 1, 2, torch.int8, CPU)
    rows = torch.arange(CONFIG.kv_heads) * 2
    zero = torch.zeros(1, CONFIG.kv_heads, CONFIG.head_dim)
    cache.layer_caches[0].store(rows, zero, zero)
    assert not cache.layer_caches[0].read(0, 2, torch.float32)[0].any()


def test_another_dtype_is_refused(transformer: Transformer, processor: Processor) -> None:
    with pytest.raises(SettingError, match="cache_dtype='int4' is unknown: use one of fp32"):
        Engine(transformer, processor, cache_dtype="int4")


def test_rows_of_the_plain_cache_may_be_ragged() -> None:
    """Prompts padded on the right, one token a row, two and one; and pieces of prompts beside one
    that begins, as long as all will be: each row as alone."""
    shape = CONFIG
    torch.manual_seed(0)
    model = Transformer(shape).eval().requires_grad_(False)
    model.init_weights()
    rows = [torch.randint(4, shape.vocab_size, (n,)) for n in (9, 4, 7)]
    prompts = [[6, 1, 4], [1, 1, 1], [2, 1, 2], [0, 1, 0]], [[2, 0, 1], [2, 4, 3], [5, 0, 3]]
    for order, pieces in ((order, p) for order in ([0, 1, 2], [2, 0, 1]) for p in prompts):
        cache, slots_B = KVCache(shape, 4, 12), torch.tensor([3, 0, 2])
        mine, read_B = [rows[number] for number in order], torch.zeros(3, dtype=torch.int64)
        got: list[list[torch.Tensor]] = [[], [], []]
        for news in ([piece[number] for number in order] for piece in pieces):
            width = max(news)
            valid_BT = torch.arange(width) < torch.tensor(news)[:, None]
            tokens_BT = torch.zeros(3, width, dtype=torch.int64)
            for row, (tokens, new) in enumerate(zip(mine, news, strict=True)):
                tokens_BT[row, :new] = tokens[int(read_B[row]) :][:new]
            positions_BT = read_B[:, None] + torch.arange(width)
            attends = cache.attends(slots_B, read_B, valid_BT)
            states_BTD = model.states(tokens_BT, positions_BT, attends)
            for row, new in enumerate(news):
                got[row].append(states_BTD[row, :new])
            read_B = read_B + torch.tensor(news)
        for tokens, parts in zip(mine, got, strict=True):
            torch.testing.assert_close(torch.cat(parts), model.states(tokens[None])[0])
