"""What a CPU training step computes by hand equals what torch's own operations and graph give."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from earlyfusion.config import PRESETS
from earlyfusion.model.attention import CausalAttend, dot_product_attention
from earlyfusion.model.fused import attend_documents, document_tiles, fused_rms_norm
from earlyfusion.model.transformer import Transformer

LENGTHS = [130, 1, 200, 90, 300]


def document_mask(lengths: list[int]) -> Tensor:
    number = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return (number[:, None] == number).tril()


@pytest.mark.parametrize("lengths", [LENGTHS, [128] * 3, [700]])
def test_tiles_cover_each_pair_of_a_document_once(lengths: list[int]) -> None:
    seen = torch.zeros(sum(lengths), sum(lengths), dtype=torch.long)
    for first, last, start, bias_QJ in document_tiles(lengths):
        seen[first:last, start:last] += bias_QJ == 0
    assert torch.equal(seen, document_mask(lengths).long())


def gradients(out: Tensor, inputs: list[Tensor], towards: Tensor) -> list[Tensor]:
    found = torch.autograd.grad((out.float() * towards).sum(), inputs)
    return [x.float() for x in (out.detach(), *found)]


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_tiled_attention_is_as_near_to_exact_as_torch_s_in_bf16(scale: float) -> None:
    generator = torch.Generator().manual_seed(int(scale))
    size = (3, sum(LENGTHS), 16)
    heads = [torch.randn(size, generator=generator) for _ in range(4)]
    heads[0] *= scale
    q, k, v, towards = (x.bfloat16() for x in heads)
    mask = document_mask(LENGTHS)

    def torch_s(kind: torch.dtype) -> list[Tensor]:
        inputs = [x.to(kind).transpose(0, 1)[None].detach().requires_grad_() for x in (q, k, v)]
        out = dot_product_attention(*inputs, mask=mask)
        results = gradients(out, inputs, towards.float().transpose(0, 1)[None])
        return [x[0].transpose(0, 1) for x in results]

    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    tiled = attend_documents(*inputs, document_tiles(LENGTHS))
    exact, other = torch_s(torch.float64), torch_s(torch.bfloat16)
    for ours, right, theirs in zip(gradients(tiled, inputs, towards), exact, other, strict=True):
        gap, allowed = (ours - right).norm() / right.norm(), (theirs - right).norm() / right.norm()
        assert gap < max(0.01, 2 * float(allowed))


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_rms_norm_has_the_value_and_gradient_of_torch_s(kind: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 7, 48, generator=generator).mul_(5).requires_grad_()
    weight = torch.randn(48, generator=generator).requires_grad_()
    towards = torch.randn(2, 7, 48, generator=generator).to(kind).float()
    expected = torch.nn.functional.rms_norm(x, (48,), weight, 1e-5).to(kind)
    ours = fused_rms_norm(x, weight, 1e-5, kind)
    assert ours.dtype is kind
    pairs = zip(
        gradients(ours, [x, weight], towards),
        gradients(expected, [x, weight], towards),
        strict=True,
    )
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-2}[kind]
    for one, other in pairs:
        torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("heads", [4, 2])
def test_a_step_of_packed_long_documents_in_bf16_is_near_fp32(heads: int) -> None:
    """Documents of 130 tokens and more take the tiles; grouped keys too."""
    config = replace(PRESETS["tiny"], num_key_value_heads=heads)
    model = Transformer(config)
    model.init_weights(torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    tokens_BT = torch.randint(0, 512, (2, 300), generator=generator)
    document_BT = torch.tensor([[0] * 130 + [1] * 170, [2] * 300])
    found = {}
    for bf16 in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            attends = [CausalAttend(document_BT)] * config.num_hidden_layers
            states = model.states(tokens_BT, None, attends)
        (states.float()[..., :8]).square().mean().backward()
        found[bf16] = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    for name, exact in found[False].items():
        gap = (found[True][name] - exact).norm()
        assert gap < 0.05 * exact.norm() + 1e-6, name
