"""Weight grids that are no even steps: a table of levels times a scale, found from the weight as it is now, with a straight-through gradient.

| grid | levels of k bits, ascending | scale | a weight gets |
|---|---|---|---|
| pow2 | 0 and +-2^-j, j = 0..2^(k-1)-2 | 2^floor(log2(4/3 max abs w)), as INQ (Zhou et al., ICLR 2017) | the nearest |
| apot | 0 and +-sums of powers of two (Li et al., ICLR 2020), the largest 1 | max abs w | the nearest |
| ternary | -1, 0, 1 | the mean abs w of those beyond the threshold | 0 within 0.7 mean abs w, its sign beyond (Li et al., TWN, 2016) |
| kmeans | 2^k codewords that Lloyd's iterations find | 1 | the nearest |

Scales are those of a channel, or of the whole weight; a codebook is always the whole weight's. All is a function of the weight alone.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import torch
from torch import Tensor

from dfqbench.quantization.fake_quantize import SMALLEST_RANGE, grid, levels
from dfqbench.quantization.protocol import WeightGridName

THRESHOLD = 0.7  # of TWN: this share of the mean absolute weight
ITERATIONS = 10  # of Lloyd: for ResNet-20's weights, more take less than 1 % off the squared error
_SUMS: dict[int, tuple[tuple[int, ...], ...]] = {  # negative powers of two of apot, of which each sum takes one or none from every group
    2: ((0,),),
    3: ((0, 1, 2),),
    4: ((1, 2, 4), (3,)),
    5: ((1, 3, 5), (2, 4, 6)),
}


@functools.cache
def fixed_levels(kind: WeightGridName, bits: int) -> tuple[float, ...]:
    """The levels of a grid that is no codebook, ascending, -1 to 1."""
    if kind == "ternary":
        return -1.0, 0.0, 1.0
    if kind == "pow2":
        sizes = [2.0**-j for j in range(2 ** (bits - 1) - 1)]
    else:
        sums = {sum(2.0**-p for p in chosen if p is not None) for chosen in itertools.product(*((None, *group) for group in _SUMS[bits]))}
        sizes = [value / max(sums) for value in sums if value]
    return tuple(sorted([0.0, *sizes, *(-size for size in sizes)]))


@functools.cache
def _table(kind: WeightGridName, bits: int, device: torch.device) -> Tensor:
    return torch.tensor(fixed_levels(kind, bits), device=device)


@torch.no_grad()
def find_table(rows: Tensor, kind: WeightGridName, bits: int) -> tuple[Tensor, Tensor]:
    """(scales, table) for weights C x n, a row for each scale: C, and 2^bits levels or fewer in ascending order; both float32."""
    if kind == "kmeans":
        return torch.ones(len(rows), device=rows.device), codebook(rows.flatten(), bits)
    size = rows.abs()
    if kind == "ternary":
        outside = size > _threshold(rows)
        scale = ((size.double() * outside).sum(1) / outside.sum(1).clamp_min(1)).float()
    else:
        scale = size.amax(1).float().clamp_min(SMALLEST_RANGE)
        if kind == "pow2":
            scale = torch.ldexp(torch.ones_like(scale), torch.frexp(scale * (4 / 3)).exponent - 1)
    return scale, _table(kind, bits, rows.device)


def _threshold(rows: Tensor) -> Tensor:
    return (THRESHOLD * rows.double().abs().mean(1, keepdim=True)).to(rows.dtype)


@torch.no_grad()
def indices(rows: Tensor, scale: Tensor, table: Tensor, kind: WeightGridName) -> Tensor:
    """Which level of the table each weight gets: C x n, int64."""
    if kind == "ternary":
        threshold = _threshold(rows)
        return (rows > threshold).long() - (rows < -threshold).long() + 1
    return torch.bucketize(rows.double() / scale.double()[:, None], (table[1:].double() + table[:-1].double()) / 2)


def on_table(rows: Tensor, scale: Tensor, table: Tensor, kind: WeightGridName) -> Tensor:
    """The weights on their levels, C x n in their own dtype; the gradient passes everywhere."""
    result: Tensor = _OnTable.apply(rows, indices(rows, scale, table, kind), scale, table)
    return result


class _OnTable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, scale: Tensor, table: Tensor) -> Tensor:
        return (table[index] * scale[:, None]).to(rows.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        return gradient, None, None, None


@torch.no_grad()
def codebook(values: Tensor, bits: int, iterations: int = ITERATIONS, start: Tensor | None = None) -> Tensor:
    """2^bits codewords for values (n), ascending float32: Lloyd's iterations (nearest codeword, then the mean of its values) from `start`.

    The squared error never rises from one to the next. A codeword that nothing is nearest to stays. Sums are of whole numbers (values in steps of a
    power of two, finer than float32's), so that their order, and with it device and threads, has no part in them.

    start: 2^bits ascending codewords; by default those that are best for a normal distribution of the values' mean and deviation (by Panter and
    Dite's rule, density as the cube root of the values').
    """
    fine = 2.0 ** (61 - values.numel().bit_length())
    if start is None:
        start = _normal_start(values, bits)
    if not iterations:
        return start
    largest = values.abs().amax().double()
    step = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent) / fine
    ordered = (values.double() / step).round().long().sort().values
    sums = torch.cat([ordered.new_zeros(1), ordered.cumsum(0)])
    ordered_as_float, words = ordered.double(), start.double() / step
    for _ in range(iterations):
        ends = torch.searchsorted(ordered_as_float, (words[1:] + words[:-1]) / 2)
        ends = torch.cat([ends.new_zeros(1), ends, ends.new_full((1,), len(ordered))])
        counts = ends.diff()
        words = torch.where(counts > 0, sums[ends].diff().double() / counts.clamp_min(1), words)
    return (words * step).float()


def _normal_start(values: Tensor, bits: int) -> Tensor:
    wide = values.double()
    mean = wide.mean()
    deviation = (wide - mean).square().mean().sqrt().clamp_min(SMALLEST_RANGE)
    shares = (torch.arange(2**bits, dtype=torch.float64, device=values.device) + 0.5) / 2**bits
    start: Tensor = mean + 3**0.5 * deviation * torch.special.ndtri(shares)
    return start.float()


def uniform_start(values: Tensor, bits: int, symmetric: bool = False) -> Tensor:
    """The levels of the even grid that spans the values, as codewords: with no iteration the codebook is that grid."""
    scale, zero_point = grid(values.amin().float(), values.amax().float(), bits, symmetric)
    lowest, highest = levels(bits, symmetric)
    return (torch.arange(lowest, highest + 1, device=values.device, dtype=torch.float32) - zero_point) * scale
