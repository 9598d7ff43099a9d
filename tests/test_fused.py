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
    compiled_attention,
    document_tiles,
    fused_rms_norm,
    rotated_head_norm,
    swiglu,
)
from earlyfusion.kernels.twins import accelerate
from earlyfusion.model import attention, transformer
from earlyfusion.model.activations import Elementwise
from earlyfusion.model.attention import attend_per_document, dot_product_attention
from earlyfusion.model.rotary import Rotary, rotate
from earlyfusion.model.transformer import HeadNorm, Transformer

LENGTHS = [130, 1, 200, 90, 300]
SMALL = replace(PRESETS["tiny"], hidden_size=64)  # heads of width 16, as compiled code needs
needs_compiler = pytest.mark.skipif(fused.library() is None, reason="needs a C++ compiler")


@pytest.fixture(params=[pytest.param(True, marks=needs_compiler), False], ids=["compiled", "torch"])
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether training.cpp does the work; if not, as on a machine without a compiler."""
    if not request.param:
        monkeypatch.setattr(fused, "library", lambda: None)
    return bool(request.param)


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


def relative_gap(actual: Tensor, exact: Tensor) -> float:
    return float((actual.double() - exact).norm() / exact.norm())


def exact_and_ours(
    ours: Callable[..., Tensor],
    exact: Callable[..., Tensor],
    inputs: list[Tensor],
    towards: Tensor,
) -> list[tuple[Tensor, Tensor]]:
    """Value and gradients of `ours` on the inputs, beside those of `exact` in fp64."""
    pairs = []
    for call, kind in ((ours, None), (exact, torch.float64)):
        given = [x.detach().to(kind or x.dtype).requires_grad_() for x in inputs]
        out = call(*given)
        grads = torch.autograd.grad(out, given, towards.to(out.dtype))
        pairs.append([out.detach(), *grads])
    return list(zip(*pairs, strict=True))


@needs_compiler
@pytest.mark.parametrize(
    ("N", "K", "H"), [(4, 4, 64), (4, 2, 32), (2, 1, 16), (3, 3, 48), (2, 2, 128)]
)
def test_compiled_attention_is_exact_but_for_rounding_to_bf16(N: int, K: int, H: int) -> None:
    lengths = [17, 130, 1, 33, 32, 16, 300]
    generator = torch.Generator().manual_seed(N)
    heads = [torch.randn(sum(lengths), n, H, generator=generator) for n in (N, K, K, N)]
    heads[0] *= 2
    *inputs, towards = (x.bfloat16() for x in heads)

    def exact(*heads: Tensor) -> Tensor:
        return attend_per_document(*(x[None] for x in heads), lengths)[0]

    pairs = exact_and_ours(
        lambda *heads: compiled_attention(*heads, lengths), exact, inputs, towards
    )
    for actual, right in pairs:
        assert relative_gap(actual, right) < 0.003


@needs_compiler
def test_compiled_attention_takes_very_large_scores() -> None:
    q = torch.full((40, 1, 16), 100.0).bfloat16()
    q[1::2] *= -1
    inputs = [x.requires_grad_() for x in (q, q.clone(), torch.randn(40, 1, 16).bfloat16())]
    out = compiled_attention(*inputs, [40])
    for x in (out, *torch.autograd.grad(out.sum(), inputs)):
        assert x.isfinite().all()
    # The scores of equal signs are 40,000 above the others: a mean of these positions' values.
    torch.testing.assert_close(out[2], (inputs[2][0] + inputs[2][2]) / 2, atol=0.02, rtol=0.02)


@needs_compiler
@pytest.mark.parametrize(("T", "N", "H", "rows"), [(37, 4, 64, 2), (37, 3, 16, 1), (130, 2, 48, 2)])
def test_head_norm_with_rotation_is_exact_but_for_rounding_to_bf16(
    T: int, N: int, H: int, rows: int
) -> None:
    generator = torch.Generator().manual_seed(T)
    normal = partial(torch.randn, generator=generator)
    x, towards = (normal(2, T, N, H).mul(3).add(1).bfloat16() for _ in range(2))
    norm, angles = HeadNorm(N, H), normal(rows, T, 1, H // 2)
    rotary = Rotary(angles.cos().repeat(1, 1, 1, 2), torch.cat((-angles.sin(), angles.sin()), -1))
    weights = [normal(N, H), normal(N, H)]

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(
            Wrapped(norm, rotary), {"norm.weight": weight, "norm.bias": bias}, (x,)
        )

    def exact(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        normed = torch.nn.functional.layer_norm(x, (H,), eps=1e-5) * weight + bias
        return rotate(normed, Rotary(rotary.cos.double(), rotary.sin.double()))

    results = exact_and_ours(ours, exact, [x, *weights], towards)
    for (actual, right), allowed in zip(results, [0.003, 0.003, 1e-6, 1e-6], strict=True):
        assert relative_gap(actual, right) < allowed


class Wrapped(torch.nn.Module):
    def __init__(self, norm: HeadNorm, rotary: Rotary) -> None:
        super().__init__()
        self.norm, self.rotary = norm, rotary

    def forward(self, x: Tensor) -> Tensor:
        return rotated_head_norm(x, self.norm, self.rotary)


@needs_compiler
def test_swiglu_is_exact_but_for_rounding_to_bf16() -> None:
    generator = torch.Generator().manual_seed(0)
    gate, up, towards = (
        torch.randn(5, 7, 48, generator=generator).mul(4).bfloat16() for _ in range(3)
    )
    gate[0, 0, :2] = torch.tensor([-200.0, 200.0])  # e^200 is infinite in fp32

    def exact(gate: Tensor, up: Tensor) -> Tensor:
        return torch.nn.functional.silu(gate) * up

    for actual, right in exact_and_ours(swiglu, exact, [gate, up], towards):
        assert relative_gap(actual, right) < 0.003


@needs_compiler
def test_gradients_do_not_depend_on_the_number_of_threads() -> None:
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            generator = torch.Generator().manual_seed(0)
            x = torch.randn(300, 48, generator=generator).requires_grad_()
            weight = torch.randn(48, generator=generator).requires_grad_()
            normed = fused_rms_norm(x, weight, 1e-5, torch.bfloat16)
            heads = normed.view(1, 300, 3, 16)
            norm, tables = HeadNorm(3, 16), torch.randn(2, 1, 300, 1, 16, generator=generator)
            heads = rotated_head_norm(heads, norm, Rotary(*tables))
            out = compiled_attention(*[heads[0]] * 3, [130, 170])
            out = swiglu(out, normed.view(300, 3, 16))
            given = [x, weight, norm.weight, norm.bias]
            results.append([out, *torch.autograd.grad(out.float().square().sum(), given)])
    finally:
        torch.set_num_threads(threads)
    for one, two, three in zip(*results, strict=True):
        assert torch.equal(one, two) and torch.equal(one, three)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_rms_norm_has_the_value_and_gradient_of_torch_s(kind: torch.dtype, compiled: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 70, 48, generator=generator).mul_(5).requires_grad_()
    weight = torch.randn(48, generator=generator).requires_grad_()
    towards = torch.randn(2, 70, 48, generator=generator).to(kind).float()
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
def test_a_step_of_packed_long_documents_in_bf16_is_near_fp32(heads: int, compiled: bool) -> None:
    """Without compiled code, documents of 130 tokens and more take the tiles; grouped keys too."""
    config = replace(SMALL, num_key_value_heads=heads)
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


def each_output(call: Callable[[Tensor, Tensor], Tensor], *given: Tensor) -> list[Tensor]:
    """The backward pass gets a batch of gradients."""
    return [*torch.autograd.functional.jacobian(call, given, vectorize=True)]


def forward_over_reverse(
    call: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor
) -> list[Tensor]:
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    out = call(x, weight)
    with forward_ad.dual_level():
        towards = forward_ad.make_dual(x.detach().cos(), x.detach().sin())
        tangents = [
            forward_ad.unpack_dual(g).tangent
            for g in torch.autograd.grad(out, (x, weight), towards)
        ]
        return [t.detach().clone() for t in tangents if t is not None]


WAYS: list[Derivative] = [
    partial(twice, True),
    partial(twice, False),
    by_functions,
    each_row,
    forward_mode,
    hessian_times,
    each_output,
    forward_over_reverse,
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


@pytest.mark.parametrize("eps", [0, 1])
@pytest.mark.parametrize("width", [16, 12])
def test_rms_norm_takes_whole_numbers_and_single_vectors(
    width: int, eps: int, compiled: bool
) -> None:
    x = torch.randn(width, generator=torch.Generator().manual_seed(0)).requires_grad_()
    norm = RMSNorm(width, eps)
    expected = transformer.RMSNorm.forward(norm, x)
    torch.testing.assert_close(norm(x), expected)
    pairs = [torch.autograd.grad(out.pow(3).sum(), (x, norm.weight)) for out in (norm(x), expected)]
    for one, other in zip(*pairs, strict=True):
        torch.testing.assert_close(one, other)


TABLES = Rotary(*torch.randn(2, 1, 40, 1, 16, generator=torch.Generator().manual_seed(2)))
PASSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "norm": lambda x, y: fused_rms_norm(x.float(), y[0, 0].float(), 1e-5, torch.bfloat16),
    "head norm": lambda x, y: rotated_head_norm(x[None], HeadNorm(3, 16), TABLES),
    "attention": lambda x, y: compiled_attention(x, y, y, [17, 23]),
    "tiles": lambda x, y: attend_documents(x.transpose(0, 1), *[y.transpose(0, 1)] * 2, TILES),
    "swiglu": swiglu,
}
TILES = document_tiles([17, 23])


@needs_compiler
@pytest.mark.parametrize("name", PASSES)
def test_a_gradient_is_the_same_with_a_graph_of_its_own(name: str) -> None:
    """Of inputs that are strided, that occur twice, or of which one depends on the other."""
    source = torch.randn(40, 16, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    source.requires_grad_()
    x = source.transpose(1, 2)
    out = PASSES[name](x, x * 2).float().pow(2).sum()
    plain, again = (
        torch.autograd.grad(out, [source, x], retain_graph=True, create_graph=graph)
        for graph in (False, True)
    )
    for one, other in zip(again, plain, strict=True):
        assert one.requires_grad and relative_gap(one.detach(), other.double()) < 0.01


@needs_compiler
def test_the_default_dtype_changes_nothing() -> None:
    results = []
    for kind in (torch.float32, torch.bfloat16):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(2, 1, 16, generator=generator).requires_grad_()
        norm, head_norm = RMSNorm(16, 1e-5), HeadNorm(1, 16)
        tables = Rotary(*torch.randn(2, 1, 2, 1, 16, generator=generator))
        torch.set_default_dtype(kind)
        try:
            heads = rotated_head_norm(norm(x).bfloat16()[None], head_norm, tables)[0]
            out = compiled_attention(heads, heads, heads, [2]).float().pow(2).sum()
            results.append(
                torch.autograd.grad(out, [x, *norm.parameters(), *head_norm.parameters()])
            )
        finally:
            torch.set_default_dtype(torch.float32)
    for one, other in zip(*results, strict=True):
        assert one.dtype is other.dtype and torch.equal(one, other)


def test_sizes_that_do_not_fit_are_torch_s_to_judge(compiled: bool) -> None:
    with pytest.raises(RuntimeError, match="normalized_shape"):
        RMSNorm(16, 1e-5)(torch.randn(3, 32))
    q_BTNH = torch.randn(1, 4, 2, 16).bfloat16().requires_grad_()
    with pytest.raises(RuntimeError, match="split_with_sizes"):
        CausalAttend(torch.zeros(1, 8, dtype=torch.long))(q_BTNH, q_BTNH, q_BTNH)


@pytest.mark.parametrize("kind", ["one position", "learned"])
def test_other_tables_of_rotation_are_torch_s(kind: str, compiled: bool) -> None:
    layer = accelerate(transformer.Attention(SMALL))
    x_BTNH = torch.randn(2, 5, 4, 16).bfloat16().requires_grad_()
    rotary = Rotary(*torch.randn(2, 2, 1 if kind == "one position" else 5, 1, 16))
    rotary.cos.requires_grad_(kind == "learned")
    out = layer._norm_and_rotate(x_BTNH, layer.q_norm, rotary)
    torch.testing.assert_close(out, rotate(layer.q_norm(x_BTNH), rotary).bfloat16())
    out.sum().backward()
    assert kind != "learned" or rotary.cos.grad is not None


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_model_that_trains_is_traced(compiled: bool) -> None:
    norm = RMSNorm(16, 1e-5)
    x = torch.randn(3, 16)
    traced = torch.jit.trace(norm, x)
    assert "PythonOp" not in str(traced.graph)
    torch.testing.assert_close(traced(x), norm(x))


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
def test_a_model_in_bf16_is_differentiated_twice_as_in_fp32(length: int, compiled: bool) -> None:
    """Along the whole step: by hand in the first pass, by formulas in the second."""
    model = accelerate(Transformer(SMALL))
    model.init_weights(torch.Generator().manual_seed(0))
    tokens_BT = torch.randint(0, 512, (1, length), generator=torch.Generator().manual_seed(1))
    document_BT = torch.zeros_like(tokens_BT)
    weights = [model.model.layers[0].self_attn.v_proj.weight, model.model.norm.weight]
    results = []
    for bf16 in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16), sdpa_kernel(SDPBackend.MATH):
            attends = [CausalAttend(document_BT)] * SMALL.num_hidden_layers
            loss = model.hidden_states(tokens_BT, None, attends).float().pow(2).mean()
            first = torch.autograd.grad(loss, weights, create_graph=True)
            results.append(torch.autograd.grad(sum(g.square().sum() for g in first), weights))
    for exact, actual in zip(*results, strict=True):
        assert exact.norm() > 0 and (actual - exact).norm() < 0.1 * exact.norm()


def noted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Gets the name of each function with a gradient by hand when it is called."""
    served: list[str] = []

    def noting(name: str) -> Callable[..., Tensor]:
        call = getattr(fused, name)

        def noted_call(*args: object) -> Tensor:
            served.append(name)
            return call(*args)

        return noted_call

    names = ("fused_rms_norm", "attend_documents", "compiled_attention")
    for name in (*names, "rotated_head_norm", "swiglu"):
        monkeypatch.setattr(fused, name, noting(name))
    return served


def test_twins_serve_in_training_on_a_cpu_alone(
    monkeypatch: pytest.MonkeyPatch, compiled: bool
) -> None:
    served = noted(monkeypatch)
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
    assert served == ["fused_rms_norm", "compiled_attention" if compiled else "attend_documents"]


def test_documents_longer_than_compiled_code_is_fast_for_take_tiles(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    served = noted(monkeypatch)
    document_BT = torch.zeros(1, fused._TILED_DOCUMENT, dtype=torch.long)
    q_BTNH = torch.randn(*document_BT.shape, 1, 16).bfloat16().requires_grad_()
    CausalAttend(document_BT)(q_BTNH, q_BTNH, q_BTNH)
    assert served == ["attend_documents"]


def step_of(model: Transformer, autocast: bool = True) -> None:
    tokens_BT = torch.arange(40)[None]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        attends = [CausalAttend(torch.zeros_like(tokens_BT))] * model.config.num_hidden_layers
        states_BTD = model.hidden_states(tokens_BT, None, attends)
    states_BTD.float().square().mean().backward()


def test_blocks_take_compiled_passes_in_bf16_and_only_then(
    monkeypatch: pytest.MonkeyPatch, compiled: bool
) -> None:
    served = noted(monkeypatch)
    model = accelerate(Transformer(SMALL))
    model.init_weights(torch.Generator().manual_seed(0))
    step_of(model, autocast=False)
    assert set(served) == {"fused_rms_norm"}
    step_of(model)
    passes = {"rotated_head_norm", "compiled_attention", "swiglu"} if compiled else set()
    assert set(served) == {"fused_rms_norm"} | passes


@pytest.mark.parametrize("everywhere", [True, False])
def test_global_hooks_and_replaced_forwards_are_not_passed_over(everywhere: bool) -> None:
    called: list[str] = []

    def note(module: torch.nn.Module, *_: object) -> None:
        called.append(type(module).__name__)

    model = accelerate(Transformer(SMALL))
    model.init_weights(torch.Generator().manual_seed(0))
    if everywhere:
        handle = torch.nn.modules.module.register_module_forward_hook(note)
        try:
            step_of(model)
        finally:
            handle.remove()
    else:
        for module in model.modules():
            if isinstance(module, HeadNorm | Elementwise):
                forward = module.forward
                module.forward = lambda x, m=module, f=forward: (note(m), f(x))[1]
        step_of(model)
    assert (
        called.count("HeadNorm") == 2 * called.count("Elementwise") == 2 * len(model.model.layers)
    )


def test_hooks_and_other_activations_are_not_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    served = noted(monkeypatch)
    model = accelerate(Transformer(replace(SMALL, hidden_act="gelu")))
    model.init_weights(torch.Generator().manual_seed(0))
    called = []
    for layer in model.model.layers:
        for norm in (layer.self_attn.q_norm, layer.self_attn.k_norm):
            norm.register_forward_hook(lambda *_: called.append("hook"))
    step_of(model)
    assert len(called) == 2 * len(model.model.layers)
    assert "swiglu" not in served and "rotated_head_norm" not in served
