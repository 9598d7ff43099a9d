"""Attention without a cache: causal over a whole row, or within the documents packed into a row.

An `Attend` owns mask and cache of one layer, so that the transformer knows neither.

Shapes: B batch, T tokens, N query heads, K key and value heads, H head width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from earlyfusion.model.fused import Tile, attend_documents, document_tiles, is_cpu_training

_LONG = 112  # tokens of a document, on average: from here on tiles of queries are faster

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(q_BTNH, k_BTKH, v_BTKH) -> out_BTNH; query head n reads key head n // (N / K)."""


def dot_product_attention(
    q_BTNH: Tensor,
    k_BTKH: Tensor,
    v_BTKH: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    """Scaled by 1 / sqrt(H). `mask` is boolean, True where a query may look; keys may be longer."""
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
    """Every token attends to itself and to what came before, within its document if given.

    `document_BT` numbers the documents packed into each row; each document is one run of tokens.
    """

    def __init__(self, document_BT: Tensor | None = None) -> None:
        self.document_BT = document_BT
        self._lengths: list[int] | None = None
        self._mask: Tensor | None = None
        self._tiles: list[Tile] = []
        if document_BT is not None and document_BT.device.type == "cpu":
            self._lengths = _run_lengths(document_BT)
        elif document_BT is not None:
            self._mask = _document_mask(document_BT)

    def __call__(self, q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor) -> Tensor:
        if self._lengths is not None:
            if v_BTKH.dtype is torch.bfloat16 and is_cpu_training(q_BTNH, k_BTKH, v_BTKH):
                return self._train(q_BTNH, k_BTKH, v_BTKH, self._lengths)
            return _attend_each(q_BTNH, k_BTKH, v_BTKH, self._lengths, v_BTKH.dtype)
        return dot_product_attention(
            q_BTNH, k_BTKH, v_BTKH, mask=self._mask, causal=self._mask is None
        )

    def _train(self, q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor, lengths: list[int]) -> Tensor:
        if sum(lengths) < _LONG * len(lengths):
            # torch's attention, whose backward pass is faster in fp32.
            return _attend_each(q_BTNH, k_BTKH, v_BTKH, lengths, torch.float32)
        self._tiles = self._tiles or document_tiles(lengths)
        group = q_BTNH.shape[2] // k_BTKH.shape[2]
        if group > 1:
            k_BTKH, v_BTKH = (x.repeat_interleave(group, 2) for x in (k_BTKH, v_BTKH))
        heads = (q_BTNH, k_BTKH, v_BTKH)
        with torch.autocast("cpu", enabled=False):
            q_NSH, k_NSH, v_NSH = (x.flatten(0, 1).transpose(0, 1) for x in heads)
            out_NSH = attend_documents(q_NSH, k_NSH, v_NSH, self._tiles)
        return out_NSH.transpose(0, 1).view(q_BTNH.shape)


def _attend_each(
    q_BTNH: Tensor, k_BTKH: Tensor, v_BTKH: Tensor, lengths: list[int], kind: torch.dtype
) -> Tensor:
    # On a CPU one call a document beats a mask, which pays for every pair of tokens in the row.
    rows = (x.to(kind).flatten(0, 1)[None] for x in (q_BTNH, k_BTKH, v_BTKH))
    pieces = zip(*(torch.split(row, lengths, 1) for row in rows), strict=True)
    with torch.autocast("cpu", enabled=False):
        out = torch.cat([dot_product_attention(q, k, v, causal=True) for q, k, v in pieces], 1)
    return out.view(q_BTNH.shape).to(v_BTKH.dtype)


def _run_lengths(document_BT: Tensor) -> list[int]:
    lengths: list[int] = []
    for row_T in document_BT:
        lengths += torch.unique_consecutive(row_T, return_counts=True)[1].tolist()
    return lengths


def _document_mask(document_BT: Tensor) -> Tensor:
    same_BTT = document_BT[:, :, None] == document_BT[:, None, :]
    return same_BTT.tril()[:, None]
