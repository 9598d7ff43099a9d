"""Packed weights back to fp32 or bf16 on a CPU by compiled code, `unpack.cpp`. Gives the bits of
`unpack` in `model/quantise.py`, in one pass over the rows. `native.py` builds it."""

# Shapes: O rows and I columns of a matrix.

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from earlyfusion.kernels import native
from earlyfusion.model import quantise
from earlyfusion.model.quantise import PackedMatrix, unpack

_DTYPES = (torch.float32, torch.bfloat16)


class PackedLinear(quantise.PackedLinear):
    def dense(self, dtype: torch.dtype) -> Tensor:
        return dense(self.matrix, dtype)


def dense(matrix: PackedMatrix, dtype: torch.dtype) -> Tensor:
    """`unpack` in a dtype, [O, I]: in compiled code if possible, else in torch."""
    data, scales = matrix.data, matrix.scales
    supported = scales is not None and data.device.type == "cpu" and dtype in _DTYPES
    library = _library() if supported and not torch.compiler.is_compiling() else None
    if library is None or scales is None:
        return unpack(matrix).to(dtype)
    out_OI = data.new_empty(matrix.rows, matrix.columns, dtype=dtype)
    padded_columns = data.shape[1] * 8 // matrix.bits
    library.earlyfusion_unpack(
        data.data_ptr(),
        scales.data_ptr(),
        matrix.bits,
        matrix.rows,
        matrix.columns,
        padded_columns,
        out_OI.data_ptr(),
        int(dtype == torch.bfloat16),
        torch.get_num_threads(),
    )
    return out_OI


@cache
def _library() -> ctypes.CDLL | None:
    library = native.load(Path(__file__).with_name("unpack.cpp"))
    if library is not None:
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        sizes = [number] * 4
        library.earlyfusion_unpack.argtypes = [pointer, pointer, *sizes, pointer, number, number]
        library.earlyfusion_unpack.restype = None
    return library
