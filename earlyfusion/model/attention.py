"""Attention without a cache: causal over a whole row, or within the documents packed into a row.

An `Attend` owns the mask and the cache of one layer, so the transformer knows neither. Packed
documents on a GPU use torch's variable-length attention (bf16 and fp16, where it works), else flex
attention with a block mask, or without Triton a token mask. On a CPU there is one call per
document.
"""

# Shapes: B batch, T tokens, S tokens of all rows, N query heads, K key and value heads, H head
# width, I blocks of tokens.

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache, partial
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._triton import has_triton

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

_HALF = (torch.bfloat16, torch.float16)

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(q_BTNH, k_BTKH, v_BTKH) -> out_BTNH; query head n reads key head n // (N / K)."""


def dot_product_attention(
    q_BTNH: Tensor,
    k_BTKH: Tensor,
    v_BTKH: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    """Scaled by 1 / sqrt(H). `mask` is True where a query may look; keys may outnumber queries."""
    out_BNTH = F.scaled_dot_product_attention(
        q_BTNH.transpose(1, 2),
        k_BTKH.transpose(1, 2),
        v_BTKH.transpose(1, 2),
        attn_mask=mask,
        is_causal=causal,
        enable_gqa=q_BTNH.shape[2] != k_BTKH.shape[2],
    )
    return out_BNTH.transpose(1, 2)


class CausalAttend:
    """Every token attends to itself and to those before it, within its document if given.
    `document_BT` numbers the documents packed into each row; each is one run of tokens.
    `kernels/fused.py` has a twin for training in bf16 on a CPU."""

    def __init__(self, document_BT: Tensor | None = None) -> None:
        self.document_BT = document_BT
        self.lengths: list[int] | None = None  # of the documents, on a CPU
        # Made here, not in the call, where a compiled block would trace their construction.
        self._half: Attend | None = None
        self._any: Attend | None = None
        if document_BT is None:
            return
        if document_BT.device.type == "cpu":
            self.lengths = _run_lengths(document_BT)
        else:
            self._half, self._any = document_attends(document_BT)

    def __call__(self, q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor) -> Tensor:
        if self._half is not None and v_BTKH.dtype in _HALF:
            return self._half(q_BTNH, k_BTKH, v_BTKH)
        if self.lengths is not None:
            return attend_each(q_BTNH, k_BTKH, v_BTKH, self.lengths)
        if self._any is None and self.document_BT is not None:
            self._any = _any_attend(self.document_BT)
        if self._any is not None:
            return self._any(q_BTNH, k_BTKH, v_BTKH)
        return dot_product_attention(q_BTNH, k_BTKH, v_BTKH, causal=True)


def document_attends(document_BT: Tensor) -> tuple[Attend | None, Attend | None]:
    """Attention within documents on a GPU: one `Attend` for bf16 and fp16, one for any dtype. The
    first is None if torch's does not work here, the second if autocast makes it unneeded."""
    device_type = document_BT.device.type
    varlen = packed_attention(device_type)
    half = VarlenAttend(document_BT, varlen) if varlen is not None else None
    autocasts = torch.is_autocast_enabled(device_type)
    if half is not None and autocasts and torch.get_autocast_dtype(device_type) in _HALF:
        return half, None
    return half, _any_attend(document_BT)


def _any_attend(document_BT: Tensor) -> Attend:
    if document_BT.is_cuda and has_triton():
        return FlexAttend(document_BT, _compiled_flex())
    return _masked(document_BT)


def _masked(document_BT: Tensor) -> Attend:
    return partial(dot_product_attention, mask=_document_mask(document_BT))


def attend_each(q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor, lengths: list[int]) -> Tensor:
    """Causal attention within each document; `lengths` are those of all rows in order."""
    # On a CPU a call per document beats a mask, which computes every pair of tokens in the row.
    rows = (x.to(v_BTKH.dtype).flatten(0, 1)[None] for x in (q_BTNH, k_BTKH, v_BTKH))
    documents = zip(*(torch.split(row, lengths, 1) for row in rows), strict=True)
    with torch.autocast("cpu", enabled=False):
        out = torch.cat([dot_product_attention(q, k, v, causal=True) for q, k, v in documents], 1)
    return out.view(q_BTNH.shape)


def _run_lengths(document_BT: Tensor) -> list[int]:
    lengths: list[int] = []
    for row_T in document_BT:
        lengths += torch.unique_consecutive(row_T, return_counts=True)[1].tolist()
    return lengths


def _document_mask(document_BT: Tensor) -> Tensor:
    same_BTT = document_BT[:, :, None] == document_BT[:, None, :]
    return same_BTT.tril()[:, None]


Varlen = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]
"""(q_SNH, k_SKH, v_SKH, ends, most) -> out_SNH: documents one after another, of `most` tokens."""


class VarlenAttend:
    """Attention over documents by their ends, in torch's kernel for bf16 and fp16."""

    def __init__(self, document_BT: Tensor, varlen: Varlen) -> None:
        self.ends, self._varlen = _sequence_ends(document_BT), varlen

    def __call__(self, q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor) -> Tensor:
        q_SNH, k_SKH, v_SKH = (x.flatten(0, 1) for x in (q_BTNH, k_BTKH, v_BTKH))
        out_SNH = self._varlen(q_SNH, k_SKH, v_SKH, self.ends, q_BTNH.shape[1])
        return out_SNH.view(q_BTNH.shape)


@cache
def packed_attention(device_type: str) -> Varlen | None:
    """torch's attention for documents packed one after another; None if it does not work here. Its
    argument names differ between versions, and some devices lack the kernels, so its values and
    gradients are compared once with those of a mask."""
    if device_type != "cuda":
        return None
    for grouped in (True, False):
        try:
            found = _causal_varlen(grouped)
            if agrees_with_mask(partial(VarlenAttend, varlen=found), torch.device(device_type)):
                return found
        except Exception:  # versions and kernels fail in many ways: fall back
            continue
    return None


def _causal_varlen(grouped: bool = True) -> Varlen:
    """torch's kernel; `grouped`: let it share key heads among query heads itself."""
    from torch.nn.attention.varlen import varlen_attn

    named = inspect.signature(varlen_attn).parameters
    how: dict[str, Any] = (
        {"window_size": (-1, 0)} if "window_size" in named else {"is_causal": True}
    )
    grouped = grouped and "enable_gqa" in named

    def attend(q_SNH: Tensor, k_SKH: Tensor, v_SKH: Tensor, ends: Tensor, most: int) -> Tensor:
        group = q_SNH.shape[1] // k_SKH.shape[1]
        more: dict[str, Any] = {"enable_gqa": True} if grouped and group > 1 else {}
        if group > 1 and not grouped:
            k_SKH, v_SKH = (x.repeat_interleave(group, 1) for x in (k_SKH, v_SKH))
        found = varlen_attn(q_SNH, k_SKH, v_SKH, ends, ends, most, most, **how, **more)
        return cast("Tensor", found)

    return attend


class FlexAttend:
    """Attention over documents by flex attention, in any dtype. Only blocks of keys that some query
    of a block sees are computed; no token mask is made."""

    def __init__(self, document_BT: Tensor, flex: Callable[..., Tensor]) -> None:
        self.blocks, self._flex = document_blocks(document_BT), flex

    def __call__(self, q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor) -> Tensor:
        heads = (x.transpose(1, 2) for x in (q_BTNH, k_BTKH, v_BTKH))
        grouped = q_BTNH.shape[2] != k_BTKH.shape[2]
        return self._flex(*heads, block_mask=self.blocks, enable_gqa=grouped).transpose(1, 2)


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    # Uncompiled, it would compute and keep all scores.
    return torch.compile(flex_attention, dynamic=False)


def document_blocks(document_BT: Tensor, size: int = 128) -> BlockMask:
    """Which blocks of `size` keys each block of queries sees: wholly, partly, or not at all. Each
    document is one run of tokens, so the documents at the ends of the blocks decide."""
    from torch.nn.attention.flex_attention import BlockMask

    def sees(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same: Tensor = document_BT[b, query] == document_BT[b, key]
        return same & (key <= query)

    tokens = document_BT.shape[1]
    run_BT = _begins(document_BT).cumsum(1)
    first_BI = run_BT[:, ::size]
    last_BI = run_BT[:, torch.arange(size - 1, tokens + size - 1, size).clamp_max(tokens - 1)]
    before_II = torch.ones(2 * first_BI.shape[1:], device=run_BT.device, dtype=torch.bool).tril(-1)
    some_BII = (last_BI[:, None] >= first_BI[:, :, None]) & before_II
    whole_BII = (first_BI[:, None] == last_BI[:, :, None]) & before_II
    part_BII = (some_BII & ~whole_BII) | torch.eye(len(before_II), device=run_BT.device).bool()
    return BlockMask.from_kv_blocks(
        *_listed(part_BII[:, None]),
        *_listed(whole_BII[:, None]),
        BLOCK_SIZE=size,
        mask_mod=sees,
        seq_lengths=(tokens, tokens),
    )


def _listed(seen: Tensor) -> tuple[Tensor, Tensor]:
    """Per block of queries: how many blocks of keys it sees, and their numbers, those first."""
    indices = seen.int().argsort(dim=-1, descending=True, stable=True)
    return seen.sum(-1).int(), indices.int()


def agrees_with_mask(attend: Callable[[Tensor], Attend], device: torch.device) -> bool:
    """Whether attention over documents gives the values and gradients of a mask, in bf16."""
    document_BT = torch.tensor([[0] * 40 + [1] * 24, [0] * 3 + [1] * 61], device=device)
    heads = [torch.randn(2, 64, n, 64, device=device, dtype=torch.bfloat16) for n in (4, 2, 2)]
    results = []
    with torch.enable_grad(), torch.autocast(device.type, enabled=False):
        for way in (attend(document_BT), _masked(document_BT)):
            q, k, v = (h.detach().clone().requires_grad_() for h in heads)
            out = way(q, k, v)
            out.float().square().sum().backward()
            results.append([t.float() for t in (out, q.grad, k.grad, v.grad) if t is not None])
    return all(
        bool((a - b).norm() < 0.02 * b.norm()) for a, b in zip(results[0], results[1], strict=True)
    )


def _sequence_ends(document_BT: Tensor) -> Tensor:
    """Offsets at which the documents of all rows begin, and the end of the last one: int32. Padded
    with empty documents, so that a compiled block sees one shape for each shape of `document_BT`
    while documents have 32 tokens on average; for shorter ones there is room for twice as many,
    then four times."""
    begins_S = _begins(document_BT).flatten()
    # An empty document costs the kernel little, but one for every token would be too many.
    room, count = -(-max(1, len(begins_S) // 32) // 128) * 128, int(begins_S.sum())
    while room <= count:
        room *= 2
    ends = torch.full((room,), len(begins_S), dtype=torch.int32, device=begins_S.device)
    ends[:count] = begins_S.nonzero()[:, 0].int()
    return ends


def _begins(document_BT: Tensor) -> Tensor:
    """Whether a document begins at each token; one begins at the first token of a row."""
    begins_BT = torch.ones_like(document_BT, dtype=torch.bool)
    begins_BT[:, 1:] = document_BT[:, 1:] != document_BT[:, :-1]
    return begins_BT
