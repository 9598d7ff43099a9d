"""The product of two tiles, in the kernels and in Triton's interpreter."""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(a, b, total):
    """`total` + a b, summed in fp32; fp32 factors are not rounded to fewer bits."""
    if INTERPRETED:
        # The interpreter stores bf16 as integers, which it would multiply.
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")
