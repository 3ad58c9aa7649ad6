"""How the range of an activation is estimated from the batches that pass: what one batch says, and how batches are combined.

| name | one batch says | combined by |
|---|---|---|
| ema | its lowest and highest value | exponential moving average, momentum 0.9, bias corrected |
| minmax | its lowest and highest value | the extremes of all batches |
| percentile | its 0.01th and 99.99th percentile | exponential moving average |
| mse | the clipping of its extremes, out of 100, with the least squared rounding error | exponential moving average |
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dfqbench.quantization.fake_quantize import fake_quantize, grid
from dfqbench.quantization.protocol import RangeEstimatorName

MOMENTUM = 0.9  # of the lineage's code
PERCENTILE = 0.9999
MSE_CANDIDATES = 100
LARGEST_SAMPLE = 2**20  # values that a percentile or an MSE search looks at; more are thinned by an even stride


class RangeEstimator(nn.Module):
    """Tracks the range of a tensor. `forward(x)` takes a batch in; `low`, `high` (scalars) are the estimate so far.

    The moving average is r_t = 0.9 r_{t-1} + 0.1 new with r_0 = 0, and the estimate r_t / (1 - 0.9^t), so that a constant range is
    right from the first batch on. (The lineage's code feeds the corrected value back into the average and overshoots a
    thousandfold for about 170 batches: spec section 1.5.)
    """

    low: Tensor
    high: Tensor
    average: Tensor
    batches: Tensor

    def __init__(self, kind: RangeEstimatorName, bits: int, symmetric: bool = False, zero_in_range: bool = False):
        super().__init__()
        self.kind, self.bits, self.symmetric, self.zero_in_range = kind, bits, symmetric, zero_in_range
        self.register_buffer("low", torch.zeros(()))
        self.register_buffer("high", torch.zeros(()))
        self.register_buffer("average", torch.zeros(2))
        self.register_buffer("batches", torch.zeros(()))

    @torch.no_grad()
    def forward(self, x: Tensor) -> None:
        x = x.detach()
        new = torch.stack(self.of_batch(x if x.dtype == torch.float64 else x.float()))
        self.batches += 1
        if self.kind == "minmax":
            first = self.batches == 1
            self.low.copy_(torch.where(first, new[0], torch.minimum(self.low, new[0])))
            self.high.copy_(torch.where(first, new[1], torch.maximum(self.high, new[1])))
        else:
            self.average.mul_(MOMENTUM).add_(new, alpha=1 - MOMENTUM)
            corrected = self.average / (1 - MOMENTUM**self.batches)
            self.low.copy_(corrected[0])
            self.high.copy_(corrected[1])

    @torch.no_grad()
    def set(self, low: float, high: float) -> None:
        """As if one batch had been seen, with this range."""
        self.low.fill_(low)
        self.high.fill_(high)
        self.average.copy_((1 - MOMENTUM) * torch.stack((self.low, self.high)))
        self.batches.fill_(1)

    def of_batch(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Low and high (scalars) of one batch."""
        if self.kind == "percentile":
            values = _thinned(x)
            low, high = torch.quantile(values, torch.tensor([1 - PERCENTILE, PERCENTILE], dtype=values.dtype, device=values.device))
            return low, high
        low, high = x.amin(), x.amax()
        if self.kind == "mse":
            return self._least_error(_thinned(x), low, high)
        return low, high

    def _least_error(self, values: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Shrinks [low, high] in even steps towards zero and keeps the range whose grid has the least squared error on `values`."""
        errors = []
        shares = torch.arange(1, MSE_CANDIDATES + 1, device=values.device, dtype=values.dtype) / MSE_CANDIDATES
        for share in shares:
            scale, zero_point = grid(low * share, high * share, self.bits, self.symmetric, self.zero_in_range)
            errors.append((fake_quantize(values, scale, zero_point, self.bits, symmetric=self.symmetric) - values).square().mean())
        best = shares.index_select(0, torch.stack(errors).argmin().view(1))[0]  # as an index, the number would be waited for
        return low * best, high * best


def _thinned(x: Tensor) -> Tensor:
    """An even stride that has no factor in common with the tensor's size visits every row, column and channel alike."""
    values = x.flatten()
    stride = -(-values.numel() // LARGEST_SAMPLE)
    while math.gcd(stride, values.numel()) > 1:
        stride += 1
    return values[::stride]
