"""A GPU's kernel of fake quantization with one grid for the whole tensor: values are read and written once, in their own type.

Imported where there is a GPU: Triton comes with torch's builds for CUDA. No GPU was there when this was written: it was run by Triton's interpreter
(tests/quantization/test_triton_kernel.py), and `kernels.on_grid` compares it with torch's own operations on the GPU that there is before it is used.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

import triton.language as tl

BLOCK = 1024  # values for each program


@triton.jit
def _kernel(x, result, scale, zero_point, count, lowest, highest, has_zero: tl.constexpr, block: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = at < count
    step = tl.load(scale)
    level = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) * tl.div_rn(1.0, step)
    if has_zero:
        level += tl.load(zero_point)
    # clamped twice, since a sum with 1.5 x 2^23 rounds to nearest, ties to even, where the number is small; what is not a number passes
    level = tl.where(level < lowest - 1, lowest - 1, tl.where(level > highest + 1, highest + 1, level))
    level = (level + 12582912.0) - 12582912.0
    level = tl.where(level < lowest, lowest, tl.where(level > highest, highest, level))
    if has_zero:
        level -= tl.load(zero_point)
    tl.store(result + at, (level * step).to(result.dtype.element_ty), mask=inside)


def on_grid(x: Tensor, scale: Tensor, zero_point: Tensor | None, lowest: int, highest: int) -> Tensor:
    """`kernels.elementwise` without channels, in one pass. x: float32, bfloat16 or float16, of any shape and layout."""
    result = torch.empty_like(x)
    if result.stride() != x.stride():  # x has gaps, or overlaps
        x = x.contiguous()
        result = torch.empty_like(x)
    programs, bounds = triton.cdiv(x.numel(), BLOCK), (float(lowest), float(highest))
    if programs:
        # a product and a sum stay two operations, as in torch
        _kernel[(programs,)](x, result, scale, zero_point, x.numel(), *bounds, zero_point is not None, BLOCK, enable_fp_fusion=False)
    return result
