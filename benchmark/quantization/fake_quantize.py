"""Uniform fake quantization: float tensors whose values lie on a grid of 2^k levels, with a straight-through gradient.

A grid is (scale, zero_point): level q in 0..2^k-1 stands for (q - zero_point) * scale. The zero point is a whole number kept as
float32, and it need not be a level itself: a depthwise channel whose weights all have one sign gets all of its levels on
that side of zero.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dfqbench.quantization.kernels import along, elementwise, on_grid, scaled

SMALLEST_RANGE = 1e-8  # of the lineage's code: a range never counts as narrower


def levels(bits: int, symmetric: bool = False) -> tuple[int, int]:
    """Lowest and highest level: 0..2^k-1, or -(2^(k-1)-1)..2^(k-1)-1 where the grid is symmetric."""
    if symmetric:
        return -(2 ** (bits - 1) - 1), 2 ** (bits - 1) - 1
    return 0, 2**bits - 1


def grid(low: Tensor, high: Tensor, bits: int, symmetric: bool = False, zero_in_range: bool = False) -> tuple[Tensor, Tensor]:
    """The grid that spans [low, high] (any equal shapes, float32): scale and zero point of that shape.

    Asymmetric (spec section 1.5, with unsigned levels): scale = (high - low) / (2^k - 1), zero_point = -round(low / scale).
    Symmetric: scale = max(|low|, |high|) / (2^(k-1) - 1), zero_point = 0.
    """
    lowest, highest = levels(bits, symmetric)
    if symmetric:
        scale = torch.maximum(low.abs(), high.abs()).clamp_min(SMALLEST_RANGE) / highest
        return scale, torch.zeros_like(scale)
    if zero_in_range:
        low, high = low.clamp_max(0.0), high.clamp_min(0.0)
    scale = (high - low).clamp_min(SMALLEST_RANGE) / (highest - lowest)
    return scale, -torch.round(low / scale)


class _FakeQuantize(torch.autograd.Function):
    """x -> (clamp(round(x / scale + zero_point)) - zero_point) * scale; the gradient passes, everywhere or where nothing was clipped."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, lowest: int, highest: int, channel_axis: int | None, clipped: bool, from_zero: bool
    ) -> Tensor:
        if clipped:
            ctx.save_for_backward(reached(x, scale, zero_point, lowest, highest, channel_axis))
        ctx.clipped = clipped
        zero = None if from_zero else zero_point
        if x.is_cuda and x.dtype != torch.float64:
            if channel_axis is None:
                return on_grid(x, scale, zero, lowest, highest)
            # of weights, one grid for each channel: torch's kernel; its other one wants zero points that an int32 can hold
            return torch.fake_quantize_per_channel_affine(x.float(), scale, zero_point, channel_axis, lowest, highest).to(x.dtype)
        return elementwise(x, scale, zero, lowest, highest, channel_axis)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None, None, None, None]:  # type: ignore[override]
        if ctx.clipped:
            (inside,) = ctx.saved_tensors
            gradient = gradient * inside
        return gradient, None, None, None, None, None, None, None


def reached(x: Tensor, scale: Tensor, zero_point: Tensor, lowest: int, highest: int, channel_axis: int | None = None) -> Tensor:
    """Which entries of x round to a level of the grid (bool); the others are clipped, and so is what is not a number."""
    level = scaled(x, scale, channel_axis).add_(along(channel_axis, zero_point, x)).round_()
    return (level >= lowest) & (level <= highest)


class _RectifyAndQuantize(torch.autograd.Function):
    """fake_quantize(relu(x)) where 0 is the lowest level: clamping to the levels rectifies. The gradient passes where x > 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, highest: int) -> Tensor:
        ctx.save_for_backward(x)
        return (on_grid if x.is_cuda and x.dtype != torch.float64 else elementwise)(x, scale, None, 0, highest)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return torch.ops.aten.threshold_backward(gradient, x, 0), None, None


def rectify_and_quantize(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """`fake_quantize(x.relu(), scale, 0, bits, from_zero=True)` in one pass less."""
    result: Tensor = _RectifyAndQuantize.apply(x, scale, levels(bits)[1])
    return result


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bits: int,
    *,
    symmetric: bool = False,
    channel_axis: int | None = None,
    clipped_gradient: bool = False,
    from_zero: bool = False,
) -> Tensor:
    """x on the grid of `grid()`; scale and zero point are scalars, or one per channel along `channel_axis`.

    Rounding happens in float32 whatever the precision of x; the result has x's dtype. The gradient with respect to x is the
    identity ("straight-through"), or zero where x was clipped if `clipped_gradient`; the grid gets none. `from_zero`: the zero point is known to
    be 0, which saves work on a CPU.
    """
    lowest, highest = levels(bits, symmetric)
    result: Tensor = _FakeQuantize.apply(x, scale, zero_point, lowest, highest, channel_axis, clipped_gradient, from_zero)
    return result
