"""SLQ: Deep Neural Network Compression with Single and Multiple Level Quantization. Xu, Wang, Zhou, Lin, Xiong. AAAI 2018, arXiv:1803.03289; and
INQ (Zhou et al., ICLR 2017, arXiv:1702.03044), of which its rounds come.

Weights go to their levels a part at a time, on any host's images; those that are left learn to make up for it.

    before the first step     each layer's grid (the protocol's: `weight_grid`) is found, and moves no more
    round r of R begins       of each weight tensor the share s_r is fixed, in the order that `order` says; momentum is cleared
    every step                minimise the host's loss with the others in full precision; what is fixed stays as it is, to the bit

    order: magnitude   the largest |w| first (INQ)
           cluster     by level: the one next to zero, then from the largest |level| down; within one the nearest first (SLQ)
           distance    the farthest from its level first (DNQ, by SLQ's code); nearest: the control

In the last round all weights are fixed, and only biases and BN parameters train. A student that is measured has all its weights on their levels.

Fidelity: abstract. Shares are INQ's, and a fifth; in SLQ's code they follow from the sizes of clusters, codewords of free weights are found anew in
each round, and there are 2^(k-1) + 1 of them. The rate is not started again in each round. With `weight_grid: kmeans` and `order: cluster` it is
SLQ, with `pow2` and `magnitude` INQ. Weights that no layer holds train as they do with the host. In version 1 free weights were on the grid, too.
"""

from __future__ import annotations

import math
from typing import Any, Literal, Self

import torch
from pydantic import model_validator
from torch import Tensor

from dfqbench import Batch, Field, HostingConfig, Student, register
from dfqbench_methods.parts.rounds import InRounds


@register("slq", paper="arXiv:1803.03289", fidelity="abstract", shares_synthesis=True)
class SLQ(InRounds):
    """Weights are fixed at their levels in rounds while the others train, on the images of a host (Xu et al., AAAI 2018)."""

    version = 2

    tasks = {"classify", "segment", "detect"}
    needs = {"statistics", "labels"}  # with the host gdfq
    quick = {"host_settings": {"warmup_epochs": 1, "calibration_epochs": 1}}

    class Config(HostingConfig):
        source = "chosen here"
        presets = {"cifar100": dict(host_preset="cifar100"), "imagenet": dict(batch_size=16, host_preset="imagenet")}

        shares: list[float] = Field([0.5, 0.75, 0.875, 0.95, 1.0], description="of each weight tensor, fixed in each round; rounds are equally long")
        order: Literal["magnitude", "cluster", "distance", "nearest"] = Field("magnitude", description="which weights are fixed first")

        @model_validator(mode="after")
        def _shares_rise_to_one(self) -> Self:
            if not self.shares or self.shares != sorted(self.shares) or self.shares[0] <= 0 or self.shares[-1] != 1:
                raise ValueError("shares rise from above 0 to 1, like [0.5, 0.75, 1.0]")
            return self

    @classmethod
    def weight_grids(cls, config: Any) -> Any:
        """A ternary threshold moves with the weight: there, what is fixed could still change its level."""
        return [grid for grid in super().weight_grids(config) if grid != "ternary"]

    @property
    def rounds(self) -> int:
        return len(self.config.shares)

    def fix(self, student: Student, batch: Batch) -> None:
        """Of each weight tensor the share of this round, what is fixed already included."""
        for layer in student.layers.values():
            if not layer.has_fixed_grid:
                layer.fix_grid()
            weight = layer.layer.weight
            free = torch.ones_like(weight, dtype=torch.bool) if layer.free is None else layer.free
            first = fixing_order(weight, layer.quantized_weight(), self.config.order)
            first = first[free.flatten()[first].byte().argsort(stable=True)]  # those that are fixed already come before all others
            fixed = first[: math.ceil(self.config.shares[self.round] * len(first))]
            layer.leave_free(free.flatten().index_fill(0, fixed, False).view_as(weight))


def fixing_order(weight: Tensor, on_grid: Tensor, order: str) -> Tensor:
    """Places in the flattened weight, those that are to be fixed first at the front; ties in the order of the weight."""
    distance = (weight - on_grid).abs().flatten()
    if order == "magnitude":
        return weight.abs().flatten().argsort(descending=True, stable=True)
    if order == "cluster":
        size = on_grid.abs().flatten(1)
        size = torch.where(size == size.amin(1, keepdim=True), torch.inf, size / size.amax(1, keepdim=True)).flatten()
        near = distance.argsort(stable=True)
        return near[size[near].argsort(descending=True, stable=True)]
    return distance.argsort(descending=order == "distance", stable=True)
