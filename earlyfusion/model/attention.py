"""Attention without a cache: causal over a whole row, or within the documents packed into a row.

An `Attend` owns the mask and the cache of one layer, so that the transformer knows neither. On a
GPU torch's attention for packed documents serves if it works there, else a mask; on a CPU a call
per document.

Shapes: B batch, T tokens, N query heads, K key and value heads, H head width.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(q_BTNH, k_BTKH, v_BTKH) -> out_BTNH; query head n reads key head n // (N / K)."""


def dot_product_attention(
    q_BTNH: Tensor,
    k_BTKH: Tensor,
    v_BTKH: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    """Scaled by 1 / sqrt(H). `mask` is True where a query may look; there may be more keys than
    queries."""
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

    `document_BT` numbers the documents packed into each row; each document is one run of tokens.
    `kernels/fused.py` has a twin for training in bf16 on a CPU.
    """

    def __init__(self, document_BT: Tensor | None = None) -> None:
        self.document_BT = document_BT
        self.lengths: list[int] | None = None  # of the documents, on a CPU
        self._mask: Tensor | None = None
        if document_BT is not None and document_BT.device.type == "cpu":
            self.lengths = _run_lengths(document_BT)
        # Looked up here and not in the call: a compiled block would trace the trial that fills the
        # cache.
        self._packed: Callable[..., Tensor] | None = None
        self._ends: Tensor | None = None
        if document_BT is not None and self.lengths is None:
            self._packed = packed_attention(document_BT.device.type)
            if self._packed is not None:
                self._ends = _sequence_ends(document_BT)
            else:
                self._mask = _document_mask(document_BT)

    def __call__(self, q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor) -> Tensor:
        if self._packed is not None and v_BTKH.dtype in (torch.bfloat16, torch.float16):
            return _attend_packed(q_BTNH, k_BTKH, v_BTKH, self._ends, self._packed)
        if self.lengths is not None:
            return attend_each(q_BTNH, k_BTKH, v_BTKH, self.lengths)
        if self._mask is None and self.document_BT is not None:
            self._mask = _document_mask(self.document_BT)
        return dot_product_attention(
            q_BTNH, k_BTKH, v_BTKH, mask=self._mask, causal=self._mask is None
        )


def attend_each(q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor, lengths: list[int]) -> Tensor:
    """Causal attention within each document; `lengths` are those of all rows, one after another."""
    # On a CPU a call per document beats a mask, which pays for every pair of tokens in the row.
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


@cache
def packed_attention(device: str) -> Callable[..., Tensor] | None:
    """torch's attention for documents packed one after another; None if it does not work here.

    Its argument names differ between versions, and some devices lack the kernels: it is compared
    once with a mask, forward and backward, before anything relies on it.
    """
    if device != "cuda":
        return None
    try:
        found = _causal_varlen()
        return found if _agrees_with_mask(found, torch.device(device)) else None
    except Exception:  # whatever a version or a kernel raises: a mask works everywhere
        return None


def _causal_varlen() -> Callable[..., Tensor]:
    from torch.nn.attention.varlen import varlen_attn

    named = inspect.signature(varlen_attn).parameters
    how: dict[str, Any] = (
        {"window_size": (-1, 0)} if "window_size" in named else {"is_causal": True}
    )

    def attend(q_SNH: Tensor, k_SNH: Tensor, v_SNH: Tensor, ends: Tensor, most: int) -> Tensor:
        return cast("Tensor", varlen_attn(q_SNH, k_SNH, v_SNH, ends, ends, most, most, **how))

    return attend


def _agrees_with_mask(attend: Callable[..., Tensor], device: torch.device) -> bool:
    document_BT = torch.tensor([[0] * 40 + [1] * 24, [0] * 3 + [1] * 61], device=device)
    shape = (2, 64, 2, 64)
    heads = [torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(3)]
    results = []
    with torch.enable_grad():
        for packed in (True, False):
            q, k, v = (h.detach().clone().requires_grad_() for h in heads)
            if packed:
                out = _attend_packed(q, k, v, _sequence_ends(document_BT), attend)
            else:
                out = dot_product_attention(q, k, v, mask=_document_mask(document_BT))
            out.float().square().sum().backward()
            results.append([t.float() for t in (out, q.grad, k.grad, v.grad) if t is not None])
    return all(
        bool((a - b).norm() < 0.02 * b.norm()) for a, b in zip(results[0], results[1], strict=True)
    )


def _attend_packed(
    q_BTNH: Tensor,
    k_BTKH: Tensor,
    v_BTKH: Tensor,
    ends: Tensor | None,
    attend: Callable[..., Tensor],
) -> Tensor:
    group = q_BTNH.shape[2] // k_BTKH.shape[2]
    if group > 1:
        k_BTKH, v_BTKH = (x.repeat_interleave(group, 2) for x in (k_BTKH, v_BTKH))
    q_SNH, k_SNH, v_SNH = (x.flatten(0, 1) for x in (q_BTNH, k_BTKH, v_BTKH))
    return attend(q_SNH, k_SNH, v_SNH, ends, q_BTNH.shape[1]).view(q_BTNH.shape)


def _sequence_ends(document_BT: Tensor, multiple: int = 128) -> Tensor:
    """Offsets at which the documents of all rows begin, and the end of the last one: int32.

    Empty documents fill it up to a multiple of `multiple`, so that a compiled block sees few
    shapes.
    """
    begins_BT = torch.ones_like(document_BT, dtype=torch.bool)
    begins_BT[:, 1:] = document_BT[:, 1:] != document_BT[:, :-1]
    starts = begins_BT.flatten().nonzero()[:, 0]
    filling = multiple - len(starts) % multiple
    return F.pad(starts, (0, filling), value=document_BT.numel()).int()
