"""The engine with smaller keys and values: bf16 and int8, in torch and in compiled code."""

from __future__ import annotations

import math
from array import array
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny import CONFIG, TEXTS, tiny_processor, tiny_transformer
from tolerances import assert_close

from earlyfusion.engine import cache
from earlyfusion.engine.backends import attention, cpu
from earlyfusion.engine.backends import torch as torch_backend
from earlyfusion.engine.blocks import BLOCK_SIZE, Branch, Copy
from earlyfusion.engine.cache import MEMORY_SHARE, PagedCache
from earlyfusion.engine.engine import Engine
from earlyfusion.engine.handle import Handle
from earlyfusion.engine.runner import ModelRunner
from earlyfusion.engine.scheduler import Piece, Plan, Step
from earlyfusion.errors import SettingError
from earlyfusion.generation.grammar import Grammar
from earlyfusion.generation.request import Request
from earlyfusion.generation.settings import SamplingParams
from earlyfusion.kernels import decode
from earlyfusion.model.kv_cache import KVCache
from earlyfusion.model.rotary import rotary_tables
from earlyfusion.model.transformer import Transformer
from earlyfusion.processor import Processor

# Of the largest logit: a key or value is off by at most 1 / 256 (bf16) or 1 / 254 (int8) of its
# vector's largest entry; in fp8 by at most 1 / 16 of itself.
TOLERANCE = {"fp32": 1e-5, "bf16": 0.05, "int8": 0.05, "fp8": 0.3}


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
def transformer(processor: Processor, device: torch.device) -> Transformer:
    return tiny_transformer(processor, 1.0, device)


def states(
    transformer: Transformer, processor: Processor, kept: str | None, lengths: list[int]
) -> torch.Tensor:
    """What the head reads for rows that read a prompt at once, then eight tokens singly."""
    size = transformer.lm_head.weight.shape[0]
    grammar = Grammar(processor.vocabulary, processor.layout, (), size)
    model = ModelRunner(transformer, grammar, 2 * len(lengths), 64, kept)
    numbers = torch.Generator().manual_seed(sum(lengths))
    rows = [torch.randint(4, size, (n + 8,), generator=numbers).tolist() for n in lengths]
    branches = [Branch(row, array("q", [n, n + len(rows)])) for n, row in enumerate(rows)]
    prompts = zip(branches, lengths, strict=True)
    model.run(Plan([], [Piece(branch, 0, n) for branch, n in prompts], []), [])
    hidden = []
    for more in range(8):
        pieces = [Piece(b, n + more, 1) for b, n in zip(branches, lengths, strict=True)]
        with torch.inference_mode():
            hidden.append(model.backend.hidden_states(Step(pieces)))
    return torch.stack(hidden)


@pytest.mark.parametrize("kept", ["fp32", "bf16", "int8"])
def test_states_are_near_those_of_the_whole_cache(
    transformer: Transformer,
    processor: Processor,
    kept: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lengths = [3, 17, 2, 40, 9]
    unrounded = states(transformer, processor, None, lengths)
    small = states(transformer, processor, kept, lengths)
    largest = float(unrounded.abs().max())
    error = float((small - unrounded).abs().max()) / largest
    assert error <= TOLERANCE[kept] and (error > 1e-5) == (kept != "fp32")
    monkeypatch.setattr(cpu, "available", lambda: False)
    plain = states(transformer, processor, kept, lengths)
    # The same rounding in torch and in compiled code, but for what lies at half a level.
    assert (plain - small).abs().max() <= max(error / 2, 1e-5) * largest
    assert (plain - small).abs().mean() < 1e-3 * largest


def make_request(
    processor: Processor, seed: int, output: str, with_image: bool, max_tokens: int
) -> Request:
    vocabulary, ids = processor.vocabulary, [processor.vocabulary.bos]
    if with_image:
        codes = np.random.default_rng(seed).integers(0, 64, (8, 8))
        ids += processor.layout.spell(codes, vocabulary)
    ids += [*processor.encode_text(TEXTS[seed % 3][:12]), vocabulary.end_of_turn]
    sampling = SamplingParams(seed=seed).resolved({})
    return Request(ids, output, sampling, int(output != "text"), max_tokens)  # type: ignore[arg-type]


def run(engine: Engine, requests: list[Request], apart: int = 0) -> list[list[int]]:
    handles: list[Handle] = []
    for request in requests:
        handles.append(engine.add(request, -len(handles)))
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
    requests = [make_request(processor, i, "image", i > 0, 66) for i in range(3)]
    requests += [
        make_request(processor, 3, "text", True, 30),
        make_request(processor, 4, "text", False, 30),
    ]
    engine = Engine(transformer, processor, cache_dtype=kept)
    alone = [run(engine, [one])[0] for one in requests]
    assert agreement(alone, run(Engine(transformer, processor), requests)) > 0.6
    assert agreement(run(engine, requests), alone) > 0.9  # from what the cache keeps, side by side
    room = 20 * engine.cache_size.block_bytes
    small = Engine(transformer, processor, cache_bytes=room, cache_dtype=kept)
    assert agreement(run(small, requests, apart=4), alone) > 0.6 and small.preemptions > 0


def test_fp8_is_near_the_whole_cache_in_both_kinds_of_steps(
    transformer: Transformer, processor: Processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "available", lambda: False)
    lengths = [3, 17, 2, 40, 9]
    unrounded = states(transformer, processor, None, lengths)
    error = (states(transformer, processor, "fp8", lengths) - unrounded).abs()
    assert 1e-3 < error.max() / unrounded.abs().max() < TOLERANCE["fp8"]
    monkeypatch.setattr(cache, "has_fp8", lambda _: True)
    requests = [
        make_request(processor, 0, "image", True, 66),
        make_request(processor, 1, "text", False, 30),
    ]
    one, two = (
        run(Engine(transformer, processor, cache_dtype="fp8", static=static), requests)
        for static in (False, True)
    )
    assert one == two


def test_fp8_keeps_what_it_can_and_is_refused_elsewhere(
    transformer: Transformer, processor: Processor, device: torch.device
) -> None:
    kept = decode.to_cache_dtype(
        torch.tensor([1e4, -1e4, 448.0, 0.3, math.nan]), decode.FP8
    ).float()
    assert kept[:3].tolist() == [448.0, -448.0, 448.0] and kept[4].isnan()
    assert kept[3] == pytest.approx(0.3, rel=1 / 16)
    if not cache.has_fp8(device):
        with pytest.raises(SettingError, match=f"cache_dtype='fp8' needs a GPU .* not {device}"):
            Engine(transformer, processor, cache_dtype="fp8")


def test_a_copied_block_begins_with_the_same(device: torch.device) -> None:
    cache = PagedCache(CONFIG, 3, 64, torch.int8, device)
    scales = cache.scales_BL2KS
    assert scales is not None
    cache.kv_BL2KSH.copy_(torch.randint(-127, 128, cache.kv_BL2KSH.shape))
    scales.uniform_()
    before = cache.kv_BL2KSH.clone(), scales.clone()
    cache.copy(Copy(0, 2, 5))
    for now, old in ((cache.kv_BL2KSH, before[0]), (scales, before[1])):
        assert torch.equal(now[:2], old[:2])
        assert torch.equal(now[2, :, :, :, :5], old[0, :, :, :, :5])
        assert torch.equal(now[2, :, :, :, 5:], old[2, :, :, :, 5:])
    cache.clear([1])
    assert not cache.kv_BL2KSH[1].any() and not scales[1].any() and cache.kv_BL2KSH[0].any()


def test_smaller_entries_make_more_blocks(
    transformer: Transformer, processor: Processor, device: torch.device
) -> None:
    budget = 80 * Engine(transformer, processor).cache_size.block_bytes
    engines = {
        kept: Engine(transformer, processor, cache_bytes=budget + 1, cache_dtype=kept)
        for kept in ("fp32", "bf16", "int8")
    }
    width = CONFIG.head_dim
    blocks = {kept: engine.cache_size.blocks for kept, engine in engines.items()}
    assert blocks == {"fp32": 80, "bf16": 160, "int8": 80 * 4 * width // (width + 4)}
    size = engines["bf16"].cache_size
    assert size.tokens == 160 * BLOCK_SIZE and size.bytes == budget
    assert [size.requests(tokens) for tokens in (32, 33, 300)] == [160, 80, 16]
    for kept, dtype in (("fp32", torch.float32), ("int8", torch.int8)):
        cache = PagedCache(CONFIG, 2, 50, dtype, device)
        cache_bytes = cache.kv_BL2KSH.nbytes + (
            0 if (s := cache.scales_BL2KS) is None else s.nbytes
        )
        assert cache_bytes == 2 * BLOCK_SIZE * PagedCache.token_bytes(CONFIG, dtype), kept


@pytest.mark.parametrize(
    ("free", "blocks"), [(0, 3 * 8), (10**15, 64 * 8), (10 * 10**6, None)], ids=str
)
def test_the_default_size_is_a_share_of_the_free_memory(
    transformer: Transformer,
    processor: Processor,
    monkeypatch: pytest.MonkeyPatch,
    free: int,
    blocks: int | None,
) -> None:
    """Of a context of 256 tokens: 8 blocks. At least three of them, at most 64."""
    monkeypatch.setattr(cache, "free_bytes", lambda device: free)
    size = Engine(transformer, processor).cache_size
    assert size.blocks == (blocks or int(free * MEMORY_SHARE["cpu"]) // size.block_bytes)
    assert blocks or 3 * 8 < size.blocks < 64 * 8
    on_gpu = cache.cache_size(1000, 256, torch.device("cuda"))  # blocks of 32,000 bytes
    assert on_gpu.blocks == max(24, min(int(0.8 * free) // 32_000, 64 * 8))


def test_a_context_that_no_memory_holds_is_cut_to_what_is_free(
    processor: Processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Transformer(replace(CONFIG, max_position_embeddings=10**9)).eval()
    model.init_weights(torch.Generator().manual_seed(0))
    request = make_request(processor, 3, "text", False, 20)
    bytes_of_block = BLOCK_SIZE * PagedCache.token_bytes(CONFIG, torch.float32)
    monkeypatch.setattr(cache, "free_bytes", lambda device: 500 * bytes_of_block)
    for limit, blocks in ((None, 500), (40 * bytes_of_block, 40)):
        engine = Engine(model, processor, cache_bytes=limit)
        assert engine.cache_size.blocks == blocks
        assert run(engine, [request])[0]
    long = replace(request, max_tokens=10**6)
    with pytest.raises(SettingError, match=r"the cache has 1,280: give it .* smaller max_tokens"):
        engine.add(long)


@pytest.mark.parametrize("limit", ["2GB", 2e9, True])
def test_a_cache_of_no_whole_number_of_bytes(
    transformer: Transformer, processor: Processor, limit: Any
) -> None:
    with pytest.raises(SettingError, match=r"cache_bytes is a .*: give a whole number"):
        Engine(transformer, processor, cache_bytes=limit)


@pytest.mark.parametrize("blocks", [10**12, 10**18])
def test_a_cache_that_no_memory_holds_is_refused(transformer: Transformer, blocks: int) -> None:
    with pytest.raises(SettingError, match=r"takes [\d,]+ bytes, but cpu has .*cache_bytes"):
        cache.PagedCache(transformer.config, blocks, 256, torch.float32, torch.device("cpu"))


def test_many_requests_hold_only_what_they_have_read(
    transformer: Transformer, processor: Processor
) -> None:
    """40 requests at once, of some 40 tokens each, in room for ten contexts."""
    requests = [make_request(processor, seed, "text", False, 20) for seed in range(40)]
    engine = Engine(transformer, processor)
    alone = [run(engine, [one])[0] for one in requests]
    small = Engine(transformer, processor, cache_bytes=80 * engine.cache_size.block_bytes)
    handles = [small.add(one) for one in requests]
    small.step()
    assert all(len(handle.branches[0].blocks) in (1, 2) for handle in handles)
    while small.busy:
        small.step()
    assert small.preemptions == 0
    assert agreement([handle.tokens for handle in handles], alone) > 0.9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_the_definitions_of_kernels_are_what_the_torch_back_end_does(
    dtype: torch.dtype, device: torch.device
) -> None:
    """kernels/decode.py over the engine's cache: norm, rotation and store to the bit; attention."""
    torch.manual_seed(0)
    caches = [PagedCache(CONFIG, 6, 64, dtype, device) for _ in range(2)]
    for tensors in zip(*(one._tensors() for one in caches), strict=True):
        fresh = torch.randn(tensors[0].shape)
        for tensor in tensors:
            tensor.copy_(fresh.mul(40).round() if tensor.dtype == torch.int8 else fresh)
    by_definition, by_backend = (one.layers[1] for one in caches)
    heads, keys, width = CONFIG.num_attention_heads, CONFIG.kv_heads, CONFIG.head_dim
    table = torch.tensor([[3, 1], [0, 5], [4, 2]], device=device)
    places = torch.tensor([0, 37, 31], device=device)
    norms = decode.HeadNorms(*torch.randn(2, heads + keys, width).to(device))
    rotary = rotary_tables(CONFIG, torch.arange(64, device=device)[None])
    angles = decode.Angles(rotary.cos[0, :, 0], rotary.sin[0, :, 0])
    qkv = torch.randn(3, heads + 2 * keys, width).to(device)
    layer = SimpleNamespace(head_weight=norms.weight, head_bias=norms.bias)
    positions = rotary.cos[0][places], rotary.sin[0][places]
    rotated = torch_backend._norm_and_rotate(qkv[:, : heads + keys], layer, *positions)  # type: ignore[arg-type]
    in_block = table.gather(1, (places // 32)[:, None])[:, 0], places % 32
    by_backend.store(*in_block, rotated[:, heads:], qkv[:, heads + keys :])
    blocks = decode.LayerBlocks(*by_definition)
    queries = decode.norm_rotate_store(qkv, norms, angles, places, blocks, table)
    assert torch.equal(queries, rotated[:, :heads])
    assert all(torch.equal(*pair) for pair in zip(*(c._tensors() for c in caches), strict=True))
    ends = places + 1
    beyond = (torch.arange(64, device=device) >= ends[:, None])[:, None, None]
    mask = torch.zeros(3, 1, 1, 64, device=device).masked_fill(beyond, -torch.inf)
    group = attention._Group(slice(0, 3), table, 64, mask)
    expected = attention._attend_group(by_backend, queries, group)
    actual = decode.attend(queries, blocks, table, ends)
    assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_zeros_stay_zeros(device: torch.device) -> None:
    layer = PagedCache(CONFIG, 1, 32, torch.int8, device).layers[0]
    zero = torch.zeros(1, CONFIG.kv_heads, CONFIG.head_dim, device=device)
    block = torch.tensor([0], device=device)
    layer.store(block, block + 3, zero, zero)
    assert not layer.read(block[None], 32, torch.float32)[0].any()


def test_another_dtype_is_refused(transformer: Transformer, processor: Processor) -> None:
    with pytest.raises(SettingError, match="cache_dtype='int4' is unknown: use one of fp32"):
        Engine(transformer, processor, cache_dtype="int4")


def test_rows_of_the_plain_cache_may_be_ragged(device: torch.device) -> None:
    """Prompts padded on the right, one token a row, two and one; and pieces of prompts beside one
    that begins, as long as all will be: each row as alone."""
    shape = CONFIG
    torch.manual_seed(0)
    model = Transformer(shape).eval().requires_grad_(False)
    model.init_weights()
    model.to(device)
    rows = [torch.randint(4, shape.vocab_size, (n,), device=device) for n in (9, 4, 7)]
    prompts = [[6, 1, 4], [1, 1, 1], [2, 1, 2], [0, 1, 0]], [[2, 0, 1], [2, 4, 3], [5, 0, 3]]
    for order, pieces in ((order, p) for order in ([0, 1, 2], [2, 0, 1]) for p in prompts):
        cache = KVCache(shape, 4, 12, device=device)
        slots_B = torch.tensor([3, 0, 2], device=device)
        expected_rows, read_B = [rows[number] for number in order], torch.zeros_like(slots_B)
        actual: list[list[torch.Tensor]] = [[], [], []]
        for news in ([piece[number] for number in order] for piece in pieces):
            width = max(news)
            places_T, news_B = torch.arange(width, device=device), torch.tensor(news, device=device)
            valid_BT = places_T < news_B[:, None]
            tokens_BT = torch.zeros(3, width, dtype=torch.int64, device=device)
            for row, (tokens, new) in enumerate(zip(expected_rows, news, strict=True)):
                tokens_BT[row, :new] = tokens[int(read_B[row]) :][:new]
            positions_BT = read_B[:, None] + places_T
            attends = cache.attends(slots_B, read_B, valid_BT)
            states_BTD = model.hidden_states(tokens_BT, positions_BT, attends)
            for row, new in enumerate(news):
                actual[row].append(states_BTD[row, :new])
            read_B = read_B + news_B
        for tokens, parts in zip(expected_rows, actual, strict=True):
            assert_close(torch.cat(parts), model.hidden_states(tokens[None])[0])
