"""The compiled decode step against the transformer itself, on random models of odd shapes."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from earlyfusion.config import PRESETS, ModelConfig
from earlyfusion.engine.backends.cpu import compiled_transformer
from earlyfusion.engine.cache import PagedCache
from earlyfusion.generation import guidance
from earlyfusion.generation.sampler import SamplingTensors, penalise, pick, warp
from earlyfusion.kernels import cpu_step, native
from earlyfusion.kernels import unpack as compiled
from earlyfusion.kernels.cpu_step import Choice, CpuStep, fits
from earlyfusion.kernels.twins import accelerate
from earlyfusion.kernels.unpack import dense
from earlyfusion.model.kv_cache import KVCache
from earlyfusion.model.quantise import BITS, pack, quantise, unpack
from earlyfusion.model.transformer import Transformer

needs_compiler = pytest.mark.skipif(not cpu_step.available(), reason="no C++ compiler here")

# A product reads activations rounded to bf16 at 16 bits, and at 8 and 4 bits, on some processors,
# rounded to 16 bits with a scale for each 512 columns.
TOLERANCE = {32: 1e-5, 16: 3e-2, 8: 5e-4, 4: 3e-2}


def config(width: int, heads: int, key_heads: int, inner: int, swin: bool = False) -> ModelConfig:
    return replace(
        PRESETS["tiny"],
        hidden_size=width,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        intermediate_size=inner,
        num_hidden_layers=3,
        vocab_size=515,
        swin_norm=swin,
        tie_word_embeddings=False,
    )


def random_model(shape: ModelConfig, seed: int) -> Transformer:
    torch.manual_seed(seed)
    model = Transformer(shape).eval().requires_grad_(False)
    model.init_weights()
    for parameter in model.parameters():
        parameter += 0.05 * torch.randn_like(parameter)
    return model


class Paged:
    """A cache with sequences whose blocks are in any order."""

    def __init__(
        self,
        shape: ModelConfig,
        sequences: int,
        length: int,
        dtype: torch.dtype = torch.float32,
        block_size: int = 32,
    ) -> None:
        each = -(-length // block_size)
        self.length, number = length, sequences * each
        self.cache = PagedCache(shape, number, length, dtype, torch.device("cpu"), block_size)
        self.tables_QN = torch.randperm(number).view(sequences, each)

    def step(self, model: Transformer, bits: int) -> CpuStep:
        cache = self.cache
        return CpuStep(model, cache.kv_BL2KSH, self.length, bits, cache.scales_BL2KS)

    def states(
        self,
        step: CpuStep,
        tokens: torch.Tensor,
        sequences: torch.Tensor,
        positions: torch.Tensor,
    ) -> torch.Tensor:
        tables = [self.tables_QN[number].data_ptr() for number in sequences.tolist()]
        shared = len(set(tables)) < len(tables)
        return step.states(tokens, positions, tables, shared)

    @property
    def kv_L2QKPH(self) -> torch.Tensor:
        """Keys and values in fp32 of all sequences, as their tables order them."""
        layers = [
            torch.stack(layer.read(self.tables_QN, self.length, torch.float32))
            for layer in self.cache.layers
        ]
        return torch.stack(layers)

    def fill(self, kv_L2QKPH: torch.Tensor) -> None:
        count, length = self.tables_QN.shape[0], self.length
        positions = torch.arange(length).repeat(count)
        size = self.cache.block_size
        blocks = self.tables_QN[torch.arange(count).repeat_interleave(length), positions // size]
        for layer, kv_2QKPH in zip(self.cache.layers, kv_L2QKPH, strict=True):
            layer.store(blocks, positions % size, *kv_2QKPH.transpose(2, 3).flatten(1, 2))


def as_engine_keeps(cache: KVCache) -> torch.Tensor:
    """[L, 2, Q, K, P, H] of slots Q."""
    return torch.stack((cache.k_LSPKH, cache.v_LSPKH), 1).transpose(3, 4)


def rounded(model: Transformer, bits: int) -> Transformer:
    """The model with the weights that `bits` leave of it."""
    copy = Transformer(model.config).eval().requires_grad_(False)
    copy.load_state_dict(model.state_dict())
    for name, weight in copy.named_parameters():
        if weight.dim() == 2 and "norm" not in name and "embed" not in name:
            weight.copy_(unpack(pack(weight, bits)))
    return copy


@needs_compiler
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    ("shape", "rows"),
    [
        (config(64, 4, 4, 176), 1),
        (config(96, 6, 2, 200), 3),
        (config(80, 5, 5, 136, swin=True), 6),
        (config(128, 2, 1, 352, swin=True), 5),
    ],
)
def test_steps_equal_the_transformer(shape: ModelConfig, rows: int, bits: int) -> None:
    model = random_model(shape, rows + bits)
    same = rounded(model, bits)
    paged, expected_cache = Paged(shape, rows + 2, 40), KVCache(shape, rows + 2, 40)
    step = paged.step(model, bits)
    head = step.product(model.lm_head.weight)
    slots, lengths = torch.randperm(rows + 2)[:rows], torch.zeros(rows, dtype=torch.int64)
    for _ in range(36):
        tokens = torch.randint(0, shape.vocab_size, (rows,))
        attends = expected_cache.attends(slots, lengths)
        expected = same(tokens[:, None], lengths[:, None], attends)[:, 0]
        logits = head(paged.states(step, tokens, slots, lengths))
        error = (logits - expected).abs().max() / expected.abs().max()
        assert error < TOLERANCE[bits]
        lengths = lengths + 1
    if bits == 32:
        expected_kv = as_engine_keeps(expected_cache)
        torch.testing.assert_close(paged.kv_L2QKPH, expected_kv, rtol=1e-5, atol=1e-5)


@needs_compiler
def test_rows_of_different_lengths_and_a_bf16_cache() -> None:
    shape = config(64, 4, 2, 100)
    model = random_model(shape, 7)
    expected_cache, paged = KVCache(shape, 3, 50), Paged(shape, 3, 50, torch.bfloat16)
    expected_cache.k_LSPKH.normal_()
    expected_cache.v_LSPKH.normal_()
    paged.fill(as_engine_keeps(expected_cache))
    slots, lengths = torch.tensor([2, 0, 1]), torch.tensor([0, 49, 14])
    tokens = torch.tensor([3, 100, 514])
    step = paged.step(model, 32)
    logits = step.product(model.lm_head.weight)(paged.states(step, tokens, slots, lengths))
    attends = expected_cache.attends(slots, lengths)
    expected = model(tokens[:, None], lengths[:, None], attends)[:, 0]
    # The new key and value are rounded to bf16 before they are read.
    torch.testing.assert_close(logits, expected, rtol=0.02, atol=0.02)


@needs_compiler
@pytest.mark.parametrize("lengths", [[0], [3, 15, 0], [16, 17, 33, 31, 2, 40, 8, 24, 9]])
@pytest.mark.parametrize("width", [64, 96])
def test_an_int8_cache_is_read_as_the_torch_path_reads_it(width: int, lengths: list[int]) -> None:
    shape = config(width, 4, 2, 100)
    model, rows = random_model(shape, width + len(lengths)), len(lengths)
    paged = Paged(shape, rows, 41, torch.int8)
    paged.fill(torch.randn(shape.num_hidden_layers, 2, rows, 2, 41, width // 4))
    other = Paged(shape, rows, 41)
    other.fill(paged.kv_L2QKPH)
    tokens, sequences = torch.randint(0, 515, (rows,)), torch.randperm(rows)
    places = torch.tensor(lengths)
    small = paged.states(paged.step(model, 32), tokens, sequences, places)
    large = other.states(other.step(model, 32), tokens, sequences, places)
    # They differ in the new token's key and value only, rounded to 1 / 254 of the largest entry.
    torch.testing.assert_close(small, large, rtol=0.05, atol=0.05)
    assert (small - large).abs().mean() < 0.02
    blocks, offsets = paged.tables_QN[sequences, places // 32], places % 32
    for layer in paged.cache.layers:
        assert (layer.kv_B2KSH[blocks, :, :, offsets].abs().amax(-1) == 127).all()
    # Of the first layer, where all before is equal.
    exact = other.kv_L2QKPH[0][:, sequences, :, places]
    stored = paged.kv_L2QKPH[0][:, sequences, :, places]
    assert ((stored - exact).abs().amax(-1) <= exact.abs().amax(-1) / 253).all()


@needs_compiler
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize(
    ("heads", "key_heads", "width", "block_sizes"),
    [(4, 2, 16, (16, 48)), (3, 3, 12, (16, 48)), (2, 1, 64, (16, 48)), (2, 1, 64, (32, 96))],
)
def test_a_token_does_not_depend_on_what_is_read_with_it(
    bits: int,
    kept: torch.dtype,
    heads: int,
    key_heads: int,
    width: int,
    block_sizes: tuple[int, int],
) -> None:
    """To the bit: states, logits, keys and values, in pieces, beside others, in blocks of another
    size and order, with one thread and several."""
    shape = config(heads * width, heads, key_heads, 200)
    model = random_model(shape, bits)
    tokens = torch.randint(0, 515, (61,))
    known: list[torch.Tensor] = []
    threads = torch.get_num_threads()
    pieces = ([61], [1] * 61, [7] * 9, [16, 17, 12, 16], [33, 1, 1, 26])
    try:
        for number, sizes in enumerate([*pieces, *pieces]):
            torch.set_num_threads(1 + 2 * (number >= len(pieces)))
            paged = Paged(shape, 3, 61, kept, block_sizes[number % 2])
            step = paged.step(model, bits)
            head, states, at = step.product(model.lm_head.weight), list[torch.Tensor](), 0
            for size in sizes:
                new = tokens[at : at + size]
                beside = torch.randint(0, 515, (at % 3 * 2,))  # a neighbour with a prompt
                both = torch.cat((beside, new))
                slots = torch.tensor([2] * len(beside) + [1] * len(new))
                places = torch.cat((torch.arange(len(beside)), at + torch.arange(len(new))))
                states.append(paged.states(step, both, slots, places)[len(beside) :])
                at += size
            states_TD = torch.cat(states)
            logits_TV = head(states_TD)
            assert torch.equal(logits_TV[5:7], head(states_TD[5:7]))
            actual = [states_TD, logits_TV, paged.kv_L2QKPH[:, :, 1]]
            known = known or actual
            assert all(torch.equal(a, b) for a, b in zip(actual, known, strict=True))
            assert states_TD.isfinite().all()
    finally:
        torch.set_num_threads(threads)


@needs_compiler
@pytest.mark.parametrize("width", [32, 64, 96, 128])
def test_attention_over_bf16_does_not_round_queries_and_weights_to_bf16(width: int) -> None:
    """Attention runs on AMX in blocks of 32 tokens, and in fp32 in blocks of 48; one layer only, as
    the next one rounds its keys to bf16, which makes small differences large."""
    shape = replace(config(4 * width, 4, 2, 200), num_hidden_layers=1)
    model = random_model(shape, width)
    for name in ("q", "k"):  # scores of different sizes
        getattr(model.model.layers[0].self_attn, f"{name}_norm").weight.mul_(3)
    tokens = torch.randint(0, 515, (70,))
    states = []
    for block_size in (32, 48):
        paged = Paged(shape, 1, 70, torch.bfloat16, block_size)
        step, zeros = paged.step(model, 32), torch.zeros(70, dtype=torch.int64)
        together = paged.states(step, tokens, zeros, torch.arange(70))
        alone = paged.states(step, tokens[-1:], zeros[:1], torch.tensor([69]))
        assert torch.equal(alone, together[-1:])
        states.append(together)
    error = (states[0] - states[1]).abs().max() / states[1].abs().max()
    assert error < 1e-4


@needs_compiler
@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "key_heads", "width"), [(4, 2, 32), (3, 3, 64)])
def test_long_prompts_are_the_same_in_pieces_of_any_size(
    kept: torch.dtype, heads: int, key_heads: int, width: int
) -> None:
    """To the bit. On AMX up to 128 queries attend together, fewer behind many tokens. What no token
    of the sequence has stored is NaN."""
    length = 2900
    shape = replace(config(heads * width, heads, key_heads, 64), num_hidden_layers=1)
    model, tokens = random_model(shape, heads), torch.randint(0, 515, (length,))
    known, threads = None, torch.get_num_threads()
    pieces = ([length], [length], [1300, 129, 1, 33, 2, 17, 960, 128, 97, 45, 15, 31, 64, 78])
    try:
        for number, sizes in enumerate(pieces):
            torch.set_num_threads(2 - number % 2)
            paged = Paged(shape, 1, length, kept)
            paged.cache.kv_BL2KSH.fill_(torch.nan)
            step, states, at = paged.step(model, 32), list[torch.Tensor](), 0
            for size in sizes:
                places = torch.arange(at, at + size)
                zeros = torch.zeros(size, dtype=torch.int64)
                states.append(paged.states(step, tokens[at : at + size], zeros, places))
                at += size
            states_TD = torch.cat(states)
            assert at == length and states_TD.isfinite().all()
            known = states_TD if known is None else known
            assert torch.equal(states_TD, known)
        for place in (0, 127, 128, 1300, 2047, 2048, length - 1):
            last = torch.tensor([place])
            alone = paged.states(step, tokens[last], torch.zeros(1, dtype=torch.int64), last)
            assert torch.equal(alone, states_TD[last])
    finally:
        torch.set_num_threads(threads)


@needs_compiler
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    ("outputs", "inputs"),
    [(36, 1100), (4, 512), (52, 70), (140, 4200), (40, 1900), (44, 1080), (20, 40)],
)
def test_products_of_many_rows_are_those_of_one(bits: int, outputs: int, inputs: int) -> None:
    """To the bit, over several blocks of columns and panels of rows that are not full."""
    step = Paged(config(64, 4, 4, 100), 1, 8).step(random_model(config(64, 4, 4, 100), 1), bits)
    weight_OI, x_RI = torch.randn(outputs, inputs), torch.randn(90, inputs)
    multiply = step.product(weight_OI)
    alone_RO = torch.cat([multiply(row) for row in x_RI.split(1)])
    rounded_OI = unpack(pack(weight_OI, bits))
    # Errors of rounded inputs add up as a root.
    close = (1e-4, 1e-3) if bits == 32 else (2e-3, {8: 2.5e-4}.get(bits, 0.006) * inputs**0.5)
    torch.testing.assert_close(alone_RO, x_RI @ rounded_OI.T, rtol=close[0], atol=close[1])
    sizes = (90, 61, 49, 48, 45, 44, 43, 36, 35, 29, 28, 27, 22, 21, 13, 12, 11, *range(9, 1, -1))
    for rows in sizes:
        assert torch.equal(multiply(x_RI[:rows]), alone_RO[:rows])


@needs_compiler
def test_products_do_not_depend_on_the_default_dtype() -> None:
    small = config(64, 4, 4, 100)
    multiply = Paged(small, 1, 8).step(random_model(small, 1), 32).product(torch.randn(4, 64))
    x_RI = torch.randn(1, 64)
    expected = multiply(x_RI)
    torch.set_default_dtype(torch.bfloat16)
    try:
        actual = multiply(x_RI)
    finally:
        torch.set_default_dtype(torch.float32)
    assert actual.dtype is torch.float32 and torch.equal(actual, expected)


@needs_compiler
@pytest.mark.parametrize("bits", [8, 4])
def test_an_odd_input_does_not_spoil_the_rest(bits: int) -> None:
    """A large entry, tiny ones, zeros; what is not finite stays so, in its row only."""
    weight_OI, x_RI = torch.randn(20, 1200), torch.randn(7, 1200)
    x_RI[1, 3], x_RI[2, 700], x_RI[4, 1199] = 3000.0, math.nan, -math.inf
    x_RI[5] = 0.0
    x_RI[6] *= 1e-20
    small = config(64, 4, 4, 100)
    y_RO = Paged(small, 1, 8).step(random_model(small, 1), bits).product(weight_OI)(x_RI)
    expected_RO = x_RI @ unpack(pack(weight_OI, bits)).T
    assert y_RO.isfinite().all(1).tolist() == [True, True, False, True, False, True, True]
    assert not y_RO[5].any()
    for row in (0, 1, 3, 6):
        error = (y_RO[row] - expected_RO[row]).abs().max() / expected_RO[row].abs().max()
        assert error < {8: 1e-3, 4: 8e-3}[bits]


@needs_compiler
@pytest.mark.parametrize("bits", BITS)
def test_a_whole_prompt_equals_the_transformer(bits: int) -> None:
    shape = config(96, 6, 2, 200)
    model, tokens = random_model(shape, bits), torch.randint(0, 515, (50,))
    paged = Paged(shape, 2, 64)
    step = paged.step(model, bits)
    ones, places = torch.ones(50, dtype=torch.int64), torch.arange(50)
    logits = step.product(model.lm_head.weight)(paged.states(step, tokens, ones, places))
    expected = rounded(model, bits)(tokens[None])[0]
    assert (logits - expected).abs().max() / expected.abs().max() < TOLERANCE[bits]


@needs_compiler
def test_no_token_is_sampled_from_logits_that_are_not_finite() -> None:
    shape = config(64, 4, 4, 100)
    step = Paged(shape, 1, 4).step(random_model(shape, 1), 32)
    logits = torch.randn(6, 100)
    good = logits[[0, 5]].clone()
    logits[1, 99], logits[2, 3], logits[3, 0] = torch.nan, torch.inf, torch.nan
    logits[4] = -torch.inf
    uniform = torch.full((6,), 0.5, dtype=torch.float64)
    for temperature in (0.0, 1.0):
        generated = sample_rows(
            step, logits, SamplingTensors.of([(temperature, 0, 0.9, 0.0, 1.0)] * 6), uniform
        )
        alone = sample_rows(
            step, good, SamplingTensors.of([(temperature, 0, 0.9, 0.0, 1.0)] * 2), uniform[:2]
        )
        assert generated.tolist() == [alone[0], -1, -1, -1, -1, alone[1]]
    blocked = torch.zeros(100, dtype=torch.bool)
    blocked[99] = True  # what may not come may be anything
    row = [logits[1].data_ptr()] * 3
    choice = Choice(*row, blocked.data_ptr(), None, 100, 0, 1, 1, 0.0, 1.0, 0.0, 1, 0.5)
    assert step.sample([choice]) == [int(logits[1, :99].argmax())]


@needs_compiler
@pytest.mark.parametrize("bits", BITS)
def test_a_part_of_the_head_is_that_part_of_the_logits(bits: int) -> None:
    shape = config(64, 4, 4, 100)
    model = random_model(shape, 1)
    step = Paged(shape, 1, 4).step(model, bits)
    states, weight = torch.randn(2, 64), model.lm_head.weight
    full = step.product(weight)(states)
    for first, last in ((0, 515), (4, 8), (7, 200), (513, 515)):
        part = step.product(weight[first:last])
        assert torch.equal(part(states), full[:, first:last])


def sample_rows(
    step: CpuStep, logits: torch.Tensor, settings: SamplingTensors, uniform: torch.Tensor
) -> torch.Tensor:
    """One token per row, without guidance or a mask."""
    row_bytes, columns = 4 * logits.stride(0), logits.shape[1]
    warps = torch.stack([settings.temperature_B, settings.top_p_B, settings.min_p_B]).T.tolist()
    choices = [
        Choice(*[logits.data_ptr() + n * row_bytes] * 3, None, None, columns, k, 1, 1, *rest, 1, u)
        for n, (k, rest, u) in enumerate(
            zip(settings.top_k_B.tolist(), warps, uniform.tolist(), strict=True)
        )
    ]
    return torch.tensor(step.sample(choices))


@needs_compiler
def test_sampling_combines_conditions_then_masks_then_penalises() -> None:
    """In rows of a wider matrix, as many as leave a rest behind vectors."""
    shape = config(64, 4, 4, 100)
    step = Paged(shape, 1, 4).step(random_model(shape, 1), 32)
    for columns in (1, 15, 16, 77, 640):
        wide = torch.randn(3, 24, columns + 4)
        full, image_only, unconditional = (rows[:, :columns] for rows in wide)
        blocked, seen = (torch.rand(2, 24, columns) < 0.4).unbind()
        blocked[:, -1] = False
        settings = SamplingTensors.of(
            [(0.0 if n % 3 else 0.7, 0, 0.9, 0.0, 1.0 + n / 20) for n in range(24)]
        )
        uniform = torch.rand(24, dtype=torch.float64)
        mixed = guidance.combine(full, image_only, unconditional, 1.5, 2.5)
        mixed = penalise(mixed.masked_fill(blocked, -torch.inf), seen, settings.penalty_B)
        generated = step.sample(
            [
                Choice(
                    full[n].data_ptr(),
                    image_only[n].data_ptr(),
                    unconditional[n].data_ptr(),
                    blocked[n].data_ptr(),
                    seen[n].data_ptr(),
                    columns,
                    0,
                    1.5,
                    2.5,
                    settings.temperature_B[n].item(),
                    0.9,
                    0.0,
                    settings.penalty_B[n].item(),
                    uniform[n].item(),
                )
                for n in range(24)
            ]
        )
        picked = pick(warp(mixed, settings), uniform)
        expected = torch.where(settings.temperature_B == 0, mixed.argmax(-1), picked)
        assert (torch.tensor(generated) == expected).sum() >= 23  # sums in another order


@needs_compiler
def test_sampling_is_not_affected_by_wider_rows_before() -> None:
    """A thread reuses its memory: what a wide row leaves there must not count in the next one."""
    shape = config(64, 4, 4, 100)
    step = Paged(shape, 1, 4).step(random_model(shape, 1), 32)
    rows = 24
    settings = SamplingTensors.of([(0.7, 0, 0.9, 0.0, 1.0)] * rows)
    for columns in (1, 16, 40, 100, 112, 120, 128):
        wide, narrow = torch.randn(rows, 640), torch.randn(rows, columns)
        uniform = torch.rand(rows, dtype=torch.float64)
        choices = [
            Choice(*[row.data_ptr()] * 3, None, None, len(row), 0, 1, 1, 0.7, 0.9, 0, 1, number)
            for *pair, number in zip(wide, narrow, uniform.tolist(), strict=True)
            for row in pair
        ]
        expected = pick(warp(narrow, settings), uniform)
        # The two add up in different orders: where top_p cuts exactly at a sum, one may differ.
        assert (torch.tensor(step.sample(choices))[1::2] == expected).sum() >= rows - 1


@needs_compiler
@pytest.mark.parametrize("levels", [0, 7])
def test_sampled_tokens_equal_the_samplers(levels: int) -> None:
    """With `levels` the logits take only so many values, so that thresholds meet equal ones."""
    shape = config(64, 4, 4, 100)
    step = Paged(shape, 1, 4).step(random_model(shape, 1), 32)
    equal, total = 0, 0
    for size in (1, 5, 64, 1000):
        rows = [
            (t, k, p, m, 1.0)
            for t in (0.3, 1.0, 2.5)
            for k in (0, 1, 3, 40, 2000)
            for p in (0.001, 0.2, 0.9, 0.999, 1.0)
            for m in (0.0, 0.02, 0.5, 1.0)
        ]
        logits = 3 * torch.randn(len(rows), size)
        if levels:
            logits = (logits * levels / 10).round() * 10 / levels
        if size > 5:
            logits[:, :3] = -torch.inf
            logits[torch.rand(logits.shape) < 0.2] = -torch.inf
        settings, uniform = SamplingTensors.of(rows), torch.rand(len(rows), dtype=torch.float64)
        uniform[::50], uniform[1::50] = 0, 1 - 2**-53
        generated = sample_rows(step, logits, settings, uniform)
        left = warp(logits, settings)
        assert torch.isfinite(left[torch.arange(len(rows)), generated]).float().mean() > 0.995
        equal += int((generated == pick(left, uniform)).sum())
        total += len(rows)
    # The two add up in different orders: where top_p cuts exactly at a sum, one token may differ.
    assert equal >= 0.99 * total
    greedy = sample_rows(
        step, logits, SamplingTensors.of([(0.0, *row[1:]) for row in rows]), uniform
    )
    assert torch.equal(greedy, logits.argmax(-1))
    plain = SamplingTensors.of([(1.0, 0, 1.0, 0.0, 1.0)] * 500)
    logits, uniform = torch.randn(500, 700), torch.rand(500, dtype=torch.float64)
    assert torch.equal(sample_rows(step, logits, plain, uniform), pick(logits, uniform))


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantised_model_gives_what_its_rounded_weights_give(bits: int) -> None:
    shape = config(64, 4, 2, 176)
    model = random_model(shape, bits)
    expected = rounded(model, bits)
    dense = sum(p.nbytes for p in model.parameters())
    small = accelerate(quantise(model, bits))
    tokens = torch.randint(0, shape.vocab_size, (2, 9))
    torch.testing.assert_close(small(tokens), expected(tokens))
    kept = [*small.parameters(), *small.buffers()]
    assert sum(t.nbytes for t in kept) < dense * (0.5 + bits / 64)
    repeated = {n: unpack(pack(w, bits)) for n, w in expected.named_parameters() if "proj" in n}
    for name, weight in expected.named_parameters():
        assert name not in repeated or torch.equal(repeated[name], weight)  # rounding twice is once
    if cpu_step.available():
        caches = Paged(shape, 1, 4), Paged(shape, 1, 4)
        steps = caches[0].step(small, bits), caches[1].step(expected, bits)
        place = torch.zeros(1, dtype=torch.int64)
        token = torch.tensor([5])
        first, second = (
            cache.states(step, token, place, place)
            for cache, step in zip(caches, steps, strict=True)
        )
        assert torch.equal(first, second)


@pytest.mark.parametrize(("bits", "most"), [(32, 0.0), (16, 0.004), (8, 0.004), (4, 0.13)])
def test_packing_keeps_the_weights_up_to_a_step_of_the_scale(bits: int, most: float) -> None:
    weight = torch.randn(10, 100)
    matrix = pack(weight, bits)
    assert (unpack(matrix) - weight).abs().max() <= most * weight.abs().max() + 1e-12
    assert matrix.nbytes <= 12 * 128 * (bits + 0.5) / 8 + 12 * 4
    assert not unpack(pack(torch.zeros(4, 64), bits)).any()


def test_structures_have_the_same_fields_in_both_languages() -> None:
    """The sizes are compared at load; names and order here."""
    folder = Path(cpu_step.__file__).parent
    files = ("cpu_step.cpp", "sampling.h", "operands.h")
    text = "".join((folder / name).read_text() for name in files)
    for name in ("Matrix", "Layer", "Model", "Choice"):
        (body,) = re.findall(
            rf"^struct {name} {{\n(.*?)^(?:}};|\n)", text, re.DOTALL | re.MULTILINE
        )
        lines = re.sub(r"//.*", "", body).split(";")
        declared = [re.findall(r"(\w+)(?=\s*(?:,|$))", line.strip()) for line in lines]
        fields = [field for field, *_ in getattr(cpu_step, f"_{name}")._fields_]
        assert [field for names in declared for field in names] == fields
    assert [field for field, _ in cpu_step._Choice._fields_] == [*Choice._fields]


def test_a_changed_header_is_built_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source, header, deeper = (tmp_path / name for name in ("a.cpp", "b.h", "c.h"))
    source.write_text('#include "b.h"\nextern "C" int answer() { return N; }\n')
    header.write_text('#pragma once\n#include "c.h"\n#include "b.h"\n')
    assert [path.name for path in native.sources(Path(cpu_step.__file__).with_suffix(".cpp"))] == [
        "cpu_step.cpp",
        "attention_amx.h",
        "gemm.h",
        "sampling.h",
        "simd.h",
        "gemm_amx.h",
        "gemm_avx2_blocked.h",
        "gemm_avx2_int16.h",
        "gemm_avx2_packed.h",
        "gemm_avx512.h",
        "operands.h",
    ]
    for number in (3, 4):
        deeper.write_text(f"#define N {number}\n")
        library = native.load(source)
        assert library is None or library.answer() == number
    assert native.sources(source) == [source, header, deeper]


@pytest.mark.skipif(shutil.which("clang++") is None, reason="no clang++ here")
@pytest.mark.parametrize("name", ["cpu_step", "conv", "training", "unpack"])
def test_clang_builds_every_file(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", "clang++")
    monkeypatch.setattr(native, "_FLAGS", (*native._FLAGS, "-O0"))  # faster than -O3
    monkeypatch.delenv("EARLYFUSION_NATIVE", raising=False)
    empty = tmp_path / "empty.cpp"
    empty.write_text("#include <omp.h>\n")
    # Not with the project's flags: one that clang++ refuses has to fail the test.
    command = ["clang++", "-fopenmp", "-shared", "-fPIC", str(empty), "-o", str(tmp_path / "a.so")]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("this clang++ has no OpenMP")
    assert native.load(Path(native.__file__).with_name(f"{name}.cpp")) is not None


def test_without_a_compiler_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(config(64, 4, 4, 100), 1)
    monkeypatch.setenv("EARLYFUSION_NATIVE", "0")
    cpu_step._library.cache_clear()
    try:
        assert not cpu_step.available()
        with pytest.raises(ValueError, match="compiler"):
            Paged(model.config, 1, 4).step(model, 32)
    finally:
        cpu_step._library.cache_clear()


@needs_compiler
def test_only_bf16_weights_on_amx_have_large_steps_of_prompts() -> None:
    shape = config(64, 4, 4, 100)
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    for dtype in (torch.float32, torch.bfloat16):
        cache = Paged(shape, 1, 4).cache
        backend = compiled_transformer(Transformer(shape).to(dtype), cache)
        assert backend is not None and backend.chunk_factor in (1, 4)
        if "amx_bf16" not in flags or dtype == torch.float32:
            assert backend.chunk_factor == 1


def test_what_the_compiled_step_does_not_take() -> None:
    shape = config(64, 4, 4, 100)
    biased = replace(shape, attention_bias=True)
    cache = Paged(shape, 1, 4).cache.kv_BL2KSH
    assert fits(Transformer(shape), cache)
    assert not fits(Transformer(biased), cache)
    given = Transformer(shape)
    given.model.layers[1].mlp.up_proj = torch.nn.Linear(64, 100)
    assert not fits(given, cache)
    for kind in ("silu", "swish", "gelu"):
        other = Transformer(shape)
        object.__setattr__(other.config, "hidden_act", kind)
        try:
            assert fits(other, cache) == (kind != "gelu")
        finally:
            object.__delattr__(other.config, "hidden_act")
    with pytest.raises(ValueError, match="a cache in fp32, bf16 or scaled int8"):
        CpuStep(Transformer(shape), cache.to(torch.int8), 4, 32)
    assert not fits(Transformer(shape), cache.half())
    assert not fits(Transformer(shape), Paged(shape, 1, 4, block_size=8).cache.kv_BL2KSH)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", [(12, 64), (7, 100), (33, 352)])
def test_the_compiled_unpacking_gives_the_same_bits(
    shape: tuple[int, int], bits: int, dtype: torch.dtype
) -> None:
    matrix = pack(torch.randn(shape) * 10 ** torch.randn(shape[0], 1), bits)
    assert compiled._library() is not None
    assert torch.equal(dense(matrix, dtype), unpack(matrix).to(dtype))


def test_without_a_compiler_weights_are_unpacked_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_library", lambda: None)
    matrix = pack(torch.randn(8, 64), 4)
    assert torch.equal(dense(matrix, torch.bfloat16), unpack(matrix).bfloat16())


def test_without_a_home_folder_torch_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that runs under a number without a name."""

    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(native.Path, "home", home)
    with pytest.warns(RuntimeWarning, match="home directory.*XDG_CACHE_HOME names a folder"):
        assert native.load(Path(cpu_step.__file__).with_suffix(".cpp")) is None


@needs_compiler
def test_what_cannot_be_built_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = tmp_path / "wrong.cpp"
    source.write_text("int answer() { return unknown; }\n")
    with pytest.warns(RuntimeWarning, match=r"^wrong.cpp cannot .*error: .*unknown.*torch"):
        assert native.load(source) is None
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.warns(RuntimeWarning, match="No such file or directory: 'no-such-compiler'"):
        assert native.load(source) is None
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("XDG_CACHE_HOME", str(source))
    with pytest.warns(RuntimeWarning, match="Not a directory.*XDG_CACHE_HOME names a folder"):
        assert native.load(source) is None
