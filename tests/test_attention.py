"""Attention within packed documents, in every way, against a mask of all pairs of tokens."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tolerances import assert_close
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.nn.attention.flex_attention import flex_attention

from earlyfusion import parallel
from earlyfusion.config import PRESETS
from earlyfusion.data.packing import Packer, RoleWeights
from earlyfusion.model import attention
from earlyfusion.model.attention import (
    Attend,
    CausalAttend,
    FlexAttend,
    VarlenAttend,
    document_block_mask,
)
from earlyfusion.model.transformer import Transformer
from earlyfusion.processor import ANSWER_TEXT, CONTROL, END, TokenSequence
from earlyfusion.train import language
from earlyfusion.train.loss import head_loss

TINY = PRESETS["tiny"]
CPU = torch.device("cpu")

# Uncompiled flex attention says that it is slow, and torch's compiler reads `.grad`.
pytestmark = [
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
    pytest.mark.filterwarnings("ignore:The .grad attribute"),
]


@pytest.fixture(autouse=True)
def _flex_has_gradients_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch has the formula of the backward pass there, but refuses to run it, as it is slow."""
    monkeypatch.setattr(
        sys.modules["torch.nn.attention.flex_attention"], "_validate_device", ignore
    )


def ignore(*_: Any) -> None:
    pass


def by_document(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, most: int) -> Tensor:
    """What torch's kernel for documents of different lengths computes, one after another."""
    assert ends.dtype == torch.int32 and int(ends[0]) == 0 and int(ends[-1]) == len(q)
    out = torch.zeros_like(q)
    for first, last in zip(ends.tolist(), ends[1:].tolist(), strict=False):
        assert 0 <= last - first <= most
        heads = (x[first:last].transpose(0, 1)[None] for x in (q, k, v))
        actual = F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)
        out[first:last] = actual[0].transpose(0, 1)
    return out


WAYS: dict[str, Callable[[Tensor], Attend]] = {
    "varlen": partial(VarlenAttend, kernel=by_document),
    "flex": partial(FlexAttend, flex=flex_attention),
    "cpu": CausalAttend,
}


def packed(rows: list[list[int]], device: torch.device = CPU) -> Tensor:
    """The document of each token, from the lengths of the documents of each row."""
    numbers = [torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in rows]
    return torch.stack(numbers).to(device)


def lengths_of(tokens: int, cuts: list[int]) -> list[int]:
    ends = [*sorted({cut % tokens for cut in cuts} - {0}), tokens]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


PACKINGS = st.integers(1, 300).flatmap(
    lambda tokens: st.lists(
        st.lists(st.integers(0, 299), max_size=12).map(partial(lengths_of, tokens)),
        min_size=1,
        max_size=3,
    )
)


def with_gradients(attend: Attend, heads: list[Tensor]) -> list[Tensor]:
    given = [head.clone().requires_grad_() for head in heads]
    out = attend(*given)
    (out * torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out)).sum().backward()
    return [out.detach(), *(x.grad for x in given if x.grad is not None)]


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=12, deadline=None)
@given(rows=PACKINGS, groups=st.sampled_from([1, 2, 4]))
@example(rows=[[256], [128, 128]], groups=1)  # documents that end where blocks and rows do
@example(rows=[[1] * 40], groups=2)
@example(rows=[[129, 127, 1], [1, 255, 1]], groups=4)
def test_documents_equal_a_mask_with_their_gradients(
    way: str, rows: list[list[int]], groups: int
) -> None:
    """In fp32 within 1e-5: grouped heads, one document a row, one token a document."""
    torch.compiler.reset()  # uncompiled, flex attention is still traced for each shape
    document_BT = packed(rows)
    shape, generator = document_BT.shape, torch.Generator().manual_seed(len(rows))
    heads = [torch.randn(*shape, n, 16, generator=generator) for n in (4, 4 // groups, 4 // groups)]
    actual = with_gradients(WAYS[way](document_BT), heads)
    expected = with_gradients(attention._masked_attend(document_BT), heads)
    for one, other in zip(actual, expected, strict=True):
        assert_close(one, other, atol=1e-5, rtol=1e-5)


@settings(max_examples=60, deadline=None)
@given(rows=PACKINGS, size=st.sampled_from([4, 16, 128]))
def test_blocks_are_those_of_the_mask(rows: list[list[int]], size: int) -> None:
    document_BT = packed(rows)
    blocks = document_block_mask(document_BT, size)
    mask_BTT = attention._document_mask(document_BT)[:, 0]
    beyond = -mask_BTT.shape[-1] % size
    tiles = (
        F.pad(mask_BTT, (0, beyond, 0, beyond)).unflatten(1, (-1, size)).unflatten(3, (-1, size))
    )
    assert torch.equal(blocks.to_dense()[:, 0].bool(), tiles.any(4).any(2))
    # The last block may be cut short, so that it counts as whole where all that is there is seen.
    inside = torch.ones_like(mask_BTT)
    inside = F.pad(inside, (0, beyond, 0, beyond)).unflatten(1, (-1, size)).unflatten(3, (-1, size))
    full = (tiles | ~inside).all(4).all(2)
    assert blocks.full_kv_num_blocks is not None
    counted = full & ~torch.eye(full.shape[-1], dtype=torch.bool)
    assert torch.equal(blocks.full_kv_num_blocks[:, 0].long(), counted.sum(-1))


def test_the_ends_of_documents_have_one_length_for_all_packings() -> None:
    few = attention._cu_seqlens(packed([[5, 3], [8]]))
    assert len(few) == 128 and few[:4].tolist() == [0, 5, 8, 16]
    assert {len(attention._cu_seqlens(packed([[4096 // n] * n]))) for n in (1, 2, 64)} == {128}
    assert len(attention._cu_seqlens(packed([[2] * 128]))) == 256
    assert attention._cu_seqlens(packed([[1] * 300]))[:301].tolist() == list(range(301))


def test_a_kernel_that_is_wrong_is_not_taken() -> None:
    assert attention.agrees_with_mask(WAYS["varlen"], CPU)
    assert attention.agrees_with_mask(WAYS["flex"], CPU)

    def skewed(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, most: int) -> Tensor:
        return by_document(q, k, v, ends, most) * 1.1

    assert not attention.agrees_with_mask(partial(VarlenAttend, kernel=skewed), CPU)
    assert attention.varlen_kernel("cpu") is None


def test_half_precision_takes_the_kernel_and_fp32_the_other(monkeypatch: Any) -> None:
    document_BT = packed([[5, 3], [8]])
    q, k = torch.randn(2, 8, 4, 16), torch.randn(2, 8, 2, 16)
    expected = CausalAttend(document_BT)(q, k, k)
    monkeypatch.setattr(attention, "varlen_kernel", lambda _: by_document)
    half, rest = attention.document_attends(document_BT)
    assert isinstance(half, VarlenAttend) and rest is not None
    torch.testing.assert_close(rest(q, k, k), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert attention.document_attends(document_BT)[1] is None
    monkeypatch.setattr(attention, "varlen_kernel", lambda _: None)
    with torch.autocast("cpu", torch.bfloat16):
        half, rest = attention.document_attends(document_BT)
    assert half is None and rest is not None


def model_gradients(
    model: Transformer, attend: Callable[[Tensor], Attend], pieces: int = 1
) -> dict[str, Tensor]:
    """Gradients of the loss of two packed rows, over `pieces` micro batches."""
    document_BT = packed([[70, 40, 20], [100, 30]])
    generator = torch.Generator().manual_seed(1)
    tokens_BT = torch.randint(TINY.vocab_size, document_BT.shape, generator=generator)
    model.zero_grad()
    for row in torch.arange(2).chunk(pieces):
        torch.manual_seed(5)  # dropout
        attends = [attend(document_BT[row])] * model.config.num_hidden_layers
        x_BTD = model.hidden_states(tokens_BT[row], attends=attends)
        weight_BT = torch.ones(x_BTD.shape[:2])
        targets_BT = tokens_BT[row].roll(-1, 1)
        loss = head_loss(x_BTD, model.lm_head.weight, targets_BT, weight_BT, 0.01)
        (loss.total / pieces).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", parallel.CHECKPOINTING)
@pytest.mark.parametrize("way", ["varlen", "flex"])
@pytest.mark.parametrize("pieces", [1, 2])
def test_a_model_learns_the_same_in_every_way(way: str, checkpointing: str, pieces: int) -> None:
    """Grouped heads, QK-norm, dropout, recomputed blocks, micro batches: fp32 within 1e-5."""
    torch.manual_seed(0)
    model = Transformer(replace(TINY, num_key_value_heads=2), 0.1 if pieces == 1 else 0.0)
    model.init_weights()
    expected = model_gradients(model, lambda d: attention._masked_attend(d))
    parallel.checkpoint_activations(model, checkpointing)
    result = model_gradients(model, WAYS[way], pieces)
    for name, gradient in expected.items():
        assert_close(result[name], gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("checkpointing", ["selective", "full"])
@pytest.mark.parametrize("every", [1, 2, 3, 9])
def test_blocks_that_are_computed_again_change_no_bit(checkpointing: str, every: int) -> None:
    """One in every n of five: gradients of each are equal to the bit, and so many run twice."""
    torch.manual_seed(0)
    model = Transformer(replace(TINY, num_hidden_layers=5))
    model.init_weights()
    expected, calls = model_gradients(model, attention._masked_attend), list[int]()
    for number, block in enumerate(model.model.layers):
        block.mlp.register_forward_pre_hook(lambda *_, number=number: calls.append(number))
    parallel.checkpoint_activations(model, checkpointing, every)
    result = model_gradients(model, attention._masked_attend)
    assert all(torch.equal(result[name], gradient) for name, gradient in expected.items())
    second = {number for number in range(5) if calls.count(number) == 2}
    assert second == set(range(0, 5, every))


@pytest.mark.parametrize("grouped", [True, False])
def test_torchs_packed_attention_is_called_as_this_version_names_it(grouped: bool) -> None:
    """Traced without numbers, as a compiled block would: its kernels need a GPU."""
    attend, counter = attention._causal_varlen_kernel(grouped), CompileCounter()

    def summed(q: Tensor, k: Tensor, ends: Tensor) -> Tensor:
        return attend(q.flatten(0, 1), k.flatten(0, 1), k.flatten(0, 1), ends, 64).sum()

    traced = torch.compile(summed, backend=counter, fullgraph=True)
    q, k = (torch.empty(2, 64, heads, 16, dtype=torch.bfloat16, device="meta") for heads in (4, 2))
    assert traced(q, k, torch.empty(128, dtype=torch.int32, device="meta")).shape == ()
    assert counter.frame_count == 1


@pytest.mark.parametrize("checkpointing", parallel.CHECKPOINTING)
@pytest.mark.parametrize("way", ["varlen", "flex"])
def test_a_training_compiles_one_graph_of_a_block(
    monkeypatch: pytest.MonkeyPatch, way: str, checkpointing: str
) -> None:
    """With no break, and none more in the next steps: other documents, bf16, dropout."""
    torch.compiler.reset()
    counter, frames = CompileCounter(), list[int]()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    monkeypatch.setattr(language, "CausalAttend", TRACED[way])
    torch.manual_seed(0)
    model = Transformer(TINY, 0.1)
    model.init_weights()
    task = language.LanguageTask(model, Packer(document, RoleWeights(), rows=2, length=64, pad=1))
    parallel.checkpoint_activations(model, checkpointing)
    parallel.compile_blocks(model, True, fullgraph=True)
    for step in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            loss, _, _ = task.loss(step)
        loss.backward()
        frames.append(counter.frame_count)
    assert frames == [1, 1, 1]


def summed(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, most: int) -> Tensor:
    """In place of a kernel: operations of fixed shape that read the ends too."""
    return q + k.repeat_interleave(q.shape[1] // k.shape[1], 1) * ends.sum() / most


TRACED = {"varlen": partial(VarlenAttend, kernel=summed), "flex": WAYS["flex"]}


def document(number: int) -> TokenSequence:
    size = 4 + 7 * number % 23
    role = [CONTROL] + [ANSWER_TEXT] * (size - 2) + [END]
    return TokenSequence(ids=[5 + (number + place) % 40 for place in range(size)], role=role)
