"""Weights in fewer bits: 16 (bf16), 8 (an fp32 scale per row) or 4 (a bf16 scale per 32 columns).

Symmetric, rounded to nearest, without calibration data. Rows are padded to multiples of 4 and
columns to multiples of 64 for the compiled step (`kernels/cpu_step.py`). Shapes: O rows and I
columns of a matrix, both padded in `data`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from earlyfusion.errors import SettingError
from earlyfusion.model.transformer import Block, Transformer

BITS = (32, 16, 8, 4)
_DENSE_DTYPES = {32: torch.float32, 16: torch.bfloat16}


class PackedMatrix(NamedTuple):
    """A weight matrix in the compiled step's layout; `rows` and `columns` do not count padding.
    With 4 bits, 32 bytes hold a group of 64 columns as levels plus 8: columns 0 to 31 in the low
    nibbles, 32 to 63 in the high ones."""

    data: Tensor
    scales: Tensor | None
    bits: int
    rows: int
    columns: int

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + (0 if self.scales is None else self.scales.nbytes)


def pack(weight_OI: Tensor, bits: int) -> PackedMatrix:
    """Round a matrix to `bits` per weight: 32 fp32, 16 bf16, 8 and 4 integers with scales. fp32 and
    bf16 matrices that need no padding are not copied."""
    rows, columns = weight_OI.shape
    if weight_OI.dtype == _DENSE_DTYPES.get(bits) and rows % 4 == columns % 64 == 0:
        return PackedMatrix(weight_OI.detach().contiguous(), None, bits, rows, columns)
    padded = (-(-rows // 4) * 4, -(-columns // 64) * 64)
    full = torch.zeros(padded, dtype=torch.float32, device=weight_OI.device)
    full[:rows, :columns] = weight_OI.detach().float()
    if bits == 32:
        return PackedMatrix(full, None, bits, rows, columns)
    if bits == 16:
        return PackedMatrix(full.bfloat16(), None, bits, rows, columns)
    data, scales = _int8(full) if bits == 8 else _int4(full)
    return PackedMatrix(data, scales, bits, rows, columns)


def unpack(matrix: PackedMatrix) -> Tensor:
    """The rounded weights of a packed matrix, fp32 [O, I]."""
    full = matrix.data.float()
    if matrix.bits == 8:
        assert matrix.scales is not None
        full = full * matrix.scales[:, None]
    if matrix.bits == 4:
        assert matrix.scales is not None
        # C groups of 64 columns, B bytes of each: low nibbles first, then high ones.
        bytes_OCB = matrix.data.unflatten(1, (-1, 32))
        levels = torch.stack((bytes_OCB & 15, bytes_OCB >> 4), 2).flatten(1, 2).float() - 8
        full = (levels * matrix.scales.float()[..., None]).flatten(1)
    return full[: matrix.rows, : matrix.columns]


def _int8(full: Tensor) -> tuple[Tensor, Tensor]:
    scales = full.abs().amax(1) / 127
    # A row of zeros, such as padding, has scale 0: do not divide by it.
    levels = (full / scales.clamp_min(1e-30)[:, None]).round()
    return levels.to(torch.int8), scales


def _int4(full: Tensor) -> tuple[Tensor, Tensor]:
    """Levels -8 to 7. The sign of the scale is such that a group's entry of largest absolute value
    gets level -8."""
    groups = full.unflatten(1, (-1, 32))
    largest = groups.gather(2, groups.abs().argmax(2, keepdim=True))
    scales = (largest / -8).bfloat16()
    # Divided by the rounded scale, as `unpack` multiplies by it. Without the clamp, an entry of
    # about the largest absolute value but the opposite sign would get level 8.
    levels = (groups / torch.where(scales == 0, 1.0, scales.float())).round().clamp(-8, 7) + 8
    low, high = levels.to(torch.uint8).unflatten(1, (-1, 2)).unbind(2)
    return (low | high << 4).flatten(1).contiguous(), scales[..., 0].contiguous()


class PackedLinear(nn.Module):
    """A linear layer with packed weights, which are unpacked for each product. `kernels/unpack.py`
    has a twin that unpacks in compiled code."""

    data: Tensor
    scales: Tensor | None
    bias: Tensor | None

    def __init__(self, linear: nn.Linear, bits: int) -> None:
        super().__init__()
        matrix = pack(linear.weight, bits)
        self.bits, self.in_features, self.out_features = bits, matrix.columns, matrix.rows
        self.register_buffer("data", matrix.data)
        self.register_buffer("scales", matrix.scales)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    @property
    def matrix(self) -> PackedMatrix:
        return PackedMatrix(self.data, self.scales, self.bits, self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dense(x.dtype), self.bias)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The rounded weights [O, I] in a dtype."""
        return unpack(self.matrix).to(dtype)


def packed_weight(linear: nn.Module, bits: int) -> PackedMatrix:
    """The packed weight of a linear layer, packed now if it is not yet."""
    if isinstance(linear, PackedLinear):
        return linear.matrix
    assert isinstance(linear, nn.Linear)
    return pack(linear.weight, bits)


def packed_bits(transformer: Transformer) -> int | None:
    packed = (m.bits for m in transformer.modules() if isinstance(m, PackedLinear))
    return next(packed, None)


@torch.no_grad()
def quantise(transformer: Transformer, bits: int) -> Transformer:
    """Round a model's matrices to 8 or 4 bits, in place. The layers' matrices become
    `PackedLinear`. Norms and embedding stay as they are; the head is rounded but stays dense, in
    its dtype. Raises `SettingError` for other numbers of bits."""
    if bits not in (8, 4):
        raise SettingError(f"bits={bits} is not possible: choose 8 or 4")
    packed = packed_bits(transformer)
    if packed == bits:
        return transformer
    if packed is not None:
        raise SettingError(
            f"the weights have {packed} bits already and cannot be rounded to {bits}: "
            "quantise the model that they were made from"
        )
    for block in transformer.model.layers:
        assert isinstance(block, Block)
        for parent in (block.self_attn, block.mlp):
            for name, linear in list(parent.named_children()):
                if isinstance(linear, nn.Linear):
                    setattr(parent, name, PackedLinear(linear, bits))
    # A tied head is the embedding, which must not be rounded.
    if not transformer.config.tie_word_embeddings:
        head = transformer.lm_head.weight
        head.copy_(unpack(pack(head, bits)))
    return transformer
