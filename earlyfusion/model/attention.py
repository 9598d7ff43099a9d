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

_HALF_DTYPES = (torch.bfloat16, torch.float16)

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(q_BTNH, k_BTKH, v_BTKH) -> out_BTNH; query head n reads key head n // (N / K)."""


def dot_product_attention(
    q_BTNH: Tensor,
    k_BTKH: Tensor,
    v_BTKH: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    """Attention scaled by 1 / sqrt(H). `mask` is True where a query sees a key; there may be more
    keys than queries. With `causal`, query t sees the keys up to t."""
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
    """Every token attends to itself and to earlier tokens of its document. `document_BT` numbers
    the documents packed into each row; the tokens of a document are adjacent (None: a row is one
    document). `kernels/fused.py` has a twin for training in bf16 on a CPU."""

    def __init__(self, document_BT: Tensor | None = None) -> None:
        self.document_BT = document_BT
        self.lengths: list[int] | None = None  # of the documents, on a CPU
        # Built here and not in the call, where a compiled block would trace their construction.
        self._varlen_attend: Attend | None = None
        self._fallback: Attend | None = None
        if document_BT is None:
            return
        if document_BT.device.type == "cpu":
            self.lengths = _run_lengths(document_BT)
        else:
            self._varlen_attend, self._fallback = document_attends(document_BT)

    def __call__(self, q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor) -> Tensor:
        if self._varlen_attend is not None and v_BTKH.dtype in _HALF_DTYPES:
            return self._varlen_attend(q_BTNH, k_BTKH, v_BTKH)
        if self.lengths is not None:
            return attend_per_document(q_BTNH, k_BTKH, v_BTKH, self.lengths)
        if self._fallback is None and self.document_BT is not None:
            self._fallback = _fallback_attend(self.document_BT)
        if self._fallback is not None:
            return self._fallback(q_BTNH, k_BTKH, v_BTKH)
        return dot_product_attention(q_BTNH, k_BTKH, v_BTKH, causal=True)


def document_attends(document_BT: Tensor) -> tuple[Attend | None, Attend | None]:
    """Attention within documents on a GPU: torch's variable-length kernel for bf16 and fp16 (None
    if it does not work here), and a fallback for any dtype (None if autocast never needs it)."""
    device_type = document_BT.device.type
    kernel = varlen_kernel(device_type)
    varlen = VarlenAttend(document_BT, kernel) if kernel is not None else None
    autocasts = torch.is_autocast_enabled(device_type)
    if varlen is not None and autocasts and torch.get_autocast_dtype(device_type) in _HALF_DTYPES:
        return varlen, None
    return varlen, _fallback_attend(document_BT)


def _fallback_attend(document_BT: Tensor) -> Attend:
    if document_BT.is_cuda and has_triton():
        return FlexAttend(document_BT, _compiled_flex())
    return _masked_attend(document_BT)


def _masked_attend(document_BT: Tensor) -> Attend:
    return partial(dot_product_attention, mask=_document_mask(document_BT))


def attend_per_document(
    q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor, lengths: list[int]
) -> Tensor:
    """Causal attention within each document; `lengths` are those of all rows in order."""
    # On a CPU a call per document is faster than one call with a mask, which would compute the
    # scores of all pairs of tokens in a row.
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


VarlenKernel = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]
"""(q_SNH, k_SKH, v_SKH, cu_seqlens, max_seqlen) -> out_SNH, for concatenated documents."""


class VarlenAttend:
    """Attention within documents in torch's variable-length kernel, for bf16 and fp16."""

    def __init__(self, document_BT: Tensor, kernel: VarlenKernel) -> None:
        self.cu_seqlens, self._kernel = _cu_seqlens(document_BT), kernel

    def __call__(self, q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor) -> Tensor:
        q_SNH, k_SKH, v_SKH = (x.flatten(0, 1) for x in (q_BTNH, k_BTKH, v_BTKH))
        out_SNH = self._kernel(q_SNH, k_SKH, v_SKH, self.cu_seqlens, q_BTNH.shape[1])
        return out_SNH.view(q_BTNH.shape)


@cache
def varlen_kernel(device_type: str) -> VarlenKernel | None:
    """torch's attention for concatenated documents; None if it does not work on this machine. Its
    arguments differ between versions of torch and some devices lack the kernels, so its values and
    gradients are compared with those of masked attention, once per process."""
    if device_type != "cuda":
        return None
    for grouped in (True, False):
        try:
            kernel = _causal_varlen_kernel(grouped)
            if agrees_with_mask(partial(VarlenAttend, kernel=kernel), torch.device(device_type)):
                return kernel
        except Exception:  # versions and kernels fail in many ways: fall back
            continue
    return None


def _causal_varlen_kernel(grouped: bool = True) -> VarlenKernel:
    """torch's kernel. With `grouped`, it gets fewer key heads than query heads if torch's version
    can; otherwise keys and values are repeated before the call."""
    from torch.nn.attention.varlen import varlen_attn

    parameters = inspect.signature(varlen_attn).parameters
    causal_argument: dict[str, Any] = (
        {"window_size": (-1, 0)} if "window_size" in parameters else {"is_causal": True}
    )
    grouped = grouped and "enable_gqa" in parameters

    def attend(
        q_SNH: Tensor, k_SKH: Tensor, v_SKH: Tensor, cu_seqlens: Tensor, max_seqlen: int
    ) -> Tensor:
        group = q_SNH.shape[1] // k_SKH.shape[1]
        gqa_argument: dict[str, Any] = {"enable_gqa": True} if grouped and group > 1 else {}
        if group > 1 and not grouped:
            k_SKH, v_SKH = (x.repeat_interleave(group, 1) for x in (k_SKH, v_SKH))
        out_SNH = varlen_attn(
            q_SNH,
            k_SKH,
            v_SKH,
            cu_seqlens,
            cu_seqlens,
            max_seqlen,
            max_seqlen,
            **causal_argument,
            **gqa_argument,
        )
        return cast("Tensor", out_SNH)

    return attend


class FlexAttend:
    """Attention within documents by flex attention, in any dtype. It skips blocks of keys that no
    query of a block sees, and needs no mask over tokens."""

    def __init__(self, document_BT: Tensor, flex: Callable[..., Tensor]) -> None:
        self.blocks, self._flex = document_block_mask(document_BT), flex

    def __call__(self, q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor) -> Tensor:
        heads = (x.transpose(1, 2) for x in (q_BTNH, k_BTKH, v_BTKH))
        grouped = q_BTNH.shape[2] != k_BTKH.shape[2]
        return self._flex(*heads, block_mask=self.blocks, enable_gqa=grouped).transpose(1, 2)


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    # Uncompiled flex attention computes and keeps all scores.
    return torch.compile(flex_attention, dynamic=False)


def document_block_mask(document_BT: Tensor, size: int = 128) -> BlockMask:
    """Which blocks of `size` keys each block of queries sees: fully, partially, or not at all. The
    tokens of a document are adjacent, so the first and last document of each block decide."""
    from torch.nn.attention.flex_attention import BlockMask

    def causal_in_document(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same: Tensor = document_BT[b, query] == document_BT[b, key]
        return same & (key <= query)

    tokens = document_BT.shape[1]
    number_BT = _document_starts(document_BT).cumsum(1)
    first_BI = number_BT[:, ::size]
    last_BI = number_BT[:, torch.arange(size - 1, tokens + size - 1, size).clamp_max(tokens - 1)]
    count, device = first_BI.shape[1], document_BT.device
    before_II = torch.ones(count, count, dtype=torch.bool, device=device).tril(-1)
    diagonal_II = torch.eye(count, dtype=torch.bool, device=device)
    visible_BII = (last_BI[:, None] >= first_BI[:, :, None]) & before_II
    full_BII = (first_BI[:, None] == last_BI[:, :, None]) & before_II
    partial_BII = (visible_BII & ~full_BII) | diagonal_II
    return BlockMask.from_kv_blocks(
        *_kv_block_lists(partial_BII[:, None]),
        *_kv_block_lists(full_BII[:, None]),
        BLOCK_SIZE=size,
        mask_mod=causal_in_document,
        seq_lengths=(tokens, tokens),
    )


def _kv_block_lists(visible: Tensor) -> tuple[Tensor, Tensor]:
    """For each block of queries, the number of visible blocks of keys, and the indices of all
    blocks of keys, visible ones first."""
    indices = visible.int().argsort(dim=-1, descending=True, stable=True)
    return visible.sum(-1).int(), indices.int()


def agrees_with_mask(attend: Callable[[Tensor], Attend], device: torch.device) -> bool:
    """Whether this attention and masked attention have equal values and gradients, to bf16."""
    document_BT = torch.tensor([[0] * 40 + [1] * 24, [0] * 3 + [1] * 61], device=device)
    heads = [torch.randn(2, 64, n, 64, device=device, dtype=torch.bfloat16) for n in (4, 2, 2)]
    results = []
    with torch.enable_grad(), torch.autocast(device.type, enabled=False):
        for candidate in (attend(document_BT), _masked_attend(document_BT)):
            q, k, v = (h.detach().clone().requires_grad_() for h in heads)
            out = candidate(q, k, v)
            out.float().square().sum().backward()
            results.append([t.float() for t in (out, q.grad, k.grad, v.grad) if t is not None])
    return all(
        bool((a - b).norm() < 0.02 * b.norm()) for a, b in zip(results[0], results[1], strict=True)
    )


def _cu_seqlens(document_BT: Tensor) -> Tensor:
    """Offsets at which the documents of all rows begin, then the end of the last one, as int32.

    Padded with empty documents to a length that depends only on the shape of `document_BT`, so
    that a compiled block is not compiled again for each number of documents. The length allows for
    documents of 32 tokens on average; if there are more documents, it is doubled until they fit.
    """
    starts_S = _document_starts(document_BT).flatten()
    # The kernel handles empty documents fast, but one per token would be too many.
    count = int(starts_S.sum())
    capacity = -(-max(1, len(starts_S) // 32) // 128) * 128  # rounded up to a multiple of 128
    while capacity <= count:
        capacity *= 2
    cu_seqlens = torch.full((capacity,), len(starts_S), dtype=torch.int32, device=starts_S.device)
    cu_seqlens[:count] = starts_S.nonzero()[:, 0].int()
    return cu_seqlens


def _document_starts(document_BT: Tensor) -> Tensor:
    """bool [B, T], True where a document begins, as at the first token of each row."""
    starts_BT = torch.ones_like(document_BT, dtype=torch.bool)
    starts_BT[:, 1:] = document_BT[:, 1:] != document_BT[:, :-1]
    return starts_BT
