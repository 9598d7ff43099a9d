"""What a CPU training step computes by hand equals what torch's own operations and graph give."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from earlyfusion.config import PRESETS
from earlyfusion.kernels import fused
from earlyfusion.kernels.fused import (
    CausalAttend,
    RMSNorm,
    attend_documents,
    document_tiles,
    fused_rms_norm,
)
from earlyfusion.kernels.twins import accelerate
from earlyfusion.model import attention, transformer
from earlyfusion.model.attention import dot_product_attention
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
    result = torch.autograd.grad((out.float() * towards).sum(), inputs)
    return [x.float() for x in (out.detach(), *result)]


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
    for actual, right, expected in zip(
        gradients(tiled, inputs, towards), exact, other, strict=True
    ):
        gap, allowed = (
            (actual - right).norm() / right.norm(),
            (expected - right).norm() / right.norm(),
        )
        assert gap < max(0.01, 2 * float(allowed))


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_rms_norm_has_the_value_and_gradient_of_torch_s(kind: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 7, 48, generator=generator).mul_(5).requires_grad_()
    weight = torch.randn(48, generator=generator).requires_grad_()
    towards = torch.randn(2, 7, 48, generator=generator).to(kind).float()
    expected = torch.nn.functional.rms_norm(x, (48,), weight, 1e-5).to(kind)
    actual = fused_rms_norm(x, weight, 1e-5, kind)
    assert actual.dtype is kind
    pairs = zip(
        gradients(actual, [x, weight], towards),
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
    model = accelerate(Transformer(config))
    model.init_weights(torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    tokens_BT = torch.randint(0, 512, (2, 300), generator=generator)
    document_BT = torch.tensor([[0] * 130 + [1] * 170, [2] * 300])
    result = {}
    for bf16 in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            attends = [CausalAttend(document_BT)] * config.num_hidden_layers
            states = model.hidden_states(tokens_BT, None, attends)
        (states.float()[..., :8]).square().mean().backward()
        result[bf16] = {
            n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
        }
    for name, exact in result[False].items():
        gap = (result[True][name] - exact).norm()
        assert gap < 0.05 * exact.norm() + 1e-6, name


def plain_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight


Derivative = Callable[[Callable[[Tensor, Tensor], Tensor], Tensor, Tensor], list[Tensor]]


def twice(graph: bool, call: Callable[[Tensor, Tensor], Tensor], *given: Tensor) -> list[Tensor]:
    """Gradients of a squared gradient; with `graph` the first pass has a gradient of its own."""
    x, weight = (one.detach().clone().requires_grad_() for one in given)
    out = call(x, weight)
    loss = out.square().sum() if graph else out.sum()
    first = torch.autograd.grad(loss, (x, weight), create_graph=True)
    return [*torch.autograd.grad(sum(g.square().sum() for g in first), (x, weight))]


def by_functions(call: Callable[[Tensor, Tensor], Tensor], *given: Tensor) -> list[Tensor]:
    return [*torch.func.grad(lambda *a: call(*a).square().sum(), (0, 1))(*given)]


def each_row(call: Callable[[Tensor, Tensor], Tensor], *given: Tensor) -> list[Tensor]:
    return [torch.func.vmap(torch.func.grad(lambda *a: call(*a).sum()), (0, None))(*given)]


def forward_mode(
    call: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor
) -> list[Tensor]:
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    with forward_ad.dual_level():
        out = call(forward_ad.make_dual(x, x.detach().cos()), weight)
        tangent = forward_ad.unpack_dual(out).tangent
        assert tangent is not None
        return [tangent.detach().clone()]


def hessian_times(call: Callable[[Tensor, Tensor], Tensor], *given: Tensor) -> list[Tensor]:
    gradient = torch.func.grad(lambda *a: call(*a).pow(3).sum())
    return [torch.func.jvp(lambda x: gradient(x, given[1]), given[:1], (given[0].sin(),))[1]]


WAYS: list[Derivative] = [
    partial(twice, True),
    partial(twice, False),
    by_functions,
    each_row,
    forward_mode,
    hessian_times,
]


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")  # torch's own
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_rms_norm_has_every_derivative_of_the_formula(way: Derivative, kind: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 7, 12, generator=generator, dtype=torch.float64)
    weight = torch.randn(12, generator=generator, dtype=torch.float64)
    norm = RMSNorm(12, 1e-5)

    def ours(x: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(norm, {"weight": weight}, (x,))

    expected = way(plain_norm, x, weight)
    actual = way(ours, x.to(kind), weight.to(kind))
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one.double(), other, atol=2e-4, rtol=2e-4)


def test_a_second_derivative_of_tiled_attention_is_torch_s() -> None:
    generator = torch.Generator().manual_seed(0)
    size, tiles = (2, sum(LENGTHS), 16), document_tiles(LENGTHS)
    heads = [torch.randn(size, generator=generator).bfloat16() for _ in range(3)]
    mask = document_mask(LENGTHS)

    def squared(attend: Callable[..., Tensor], kind: torch.dtype) -> list[Tensor]:
        inputs = [x.to(kind).detach().requires_grad_() for x in heads]
        first = torch.autograd.grad(attend(*inputs).float().sum(), inputs[:2], create_graph=True)
        result = torch.autograd.grad(sum(g.float().square().sum() for g in first), inputs)
        return [x.double() for x in result]

    def plain(*given: Tensor) -> Tensor:
        turned = (x.transpose(0, 1)[None] for x in given)
        with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
            return dot_product_attention(*turned, mask=mask)[0].transpose(0, 1)

    actual = squared(lambda *given: attend_documents(*given, tiles), torch.bfloat16)
    for one, exact in zip(actual, squared(plain, torch.float64), strict=True):
        assert (one - exact).norm() < 0.1 * exact.norm()


@pytest.mark.parametrize("length", [40, 200])
def test_a_model_in_bf16_is_differentiated_twice_as_in_fp32(length: int) -> None:
    """Along the whole step: tiles and norms by hand in the first pass, formulas in the second."""
    model = accelerate(Transformer(PRESETS["tiny"]))
    model.init_weights(torch.Generator().manual_seed(0))
    tokens_BT = torch.randint(0, 512, (1, length), generator=torch.Generator().manual_seed(1))
    document_BT = torch.zeros_like(tokens_BT)
    weights = [model.model.layers[0].self_attn.v_proj.weight, model.model.norm.weight]
    results = []
    for bf16 in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16), sdpa_kernel(SDPBackend.MATH):
            attends = [CausalAttend(document_BT)] * PRESETS["tiny"].num_hidden_layers
            loss = model.hidden_states(tokens_BT, None, attends).float().pow(2).mean()
            first = torch.autograd.grad(loss, weights, create_graph=True)
            results.append(torch.autograd.grad(sum(g.square().sum() for g in first), weights))
    for exact, actual in zip(*results, strict=True):
        assert exact.norm() > 0 and (actual - exact).norm() < 0.1 * exact.norm()


def test_twins_serve_in_training_on_a_cpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[str] = []

    def noted(name: str) -> Callable[..., Tensor]:
        call = getattr(fused, name)

        def noting(*args: object) -> Tensor:
            served.append(name)
            return call(*args)

        return noting

    for name in ("fused_rms_norm", "attend_documents"):
        monkeypatch.setattr(fused, name, noted(name))
    document_BT = torch.zeros(1, 200, dtype=torch.long)
    q_BTNH = torch.randn(1, 200, 2, 16).bfloat16()
    norm, plain = RMSNorm(16, 1e-5), transformer.RMSNorm(16, 1e-5)
    with torch.no_grad():
        assert torch.equal(norm(q_BTNH.float()), plain(q_BTNH.float()))
        out = CausalAttend(document_BT)(q_BTNH, q_BTNH, q_BTNH)
        assert torch.equal(out, attention.CausalAttend(document_BT)(q_BTNH, q_BTNH, q_BTNH))
    plain(q_BTNH.float())
    norm.bfloat16()(q_BTNH)
    q_BTNH.requires_grad_()
    CausalAttend(document_BT)(*[q_BTNH.float()] * 3)
    attention.CausalAttend(document_BT)(q_BTNH, q_BTNH, q_BTNH)
    assert served == []
    norm.float()(q_BTNH.float())
    CausalAttend(document_BT)(q_BTNH, q_BTNH, q_BTNH)
    assert served == ["fused_rms_norm", "attend_documents"]
