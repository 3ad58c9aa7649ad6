"""SQuant: On-the-Fly Data-Free Quantization via Diagonal Hessian Approximation. Guo, Qiu, Leng, Gao, Zhang, Liu, Yang, Zhu, Guo. ICLR 2022,
arXiv:2202.07471.

Rounds a weight so that the errors of rounding cancel: first within each kernel, then within each output channel. No images, no training.

    e = round(x) - x, in steps of the grid                            a flip takes a weight to its other neighbour: e -> e +- 1
    K: in each kernel     S = sum e;  flip the round(|S|) weights with the largest |e| whose flip lowers |S|
    C: in each channel    the same over its kernels, each of which offers one weight: the one that K flipped last, back, or its next

so that in the end |S| <= 1/2 in every kernel before C and in every channel after it. 1x1 convolutions and linear layers have no kernels: C alone.

Fidelity: the paper. Rounding follows the authors' code; what differs: the extremes of a weight, which the grid is found from, keep their levels (the
code flips one of the two), and activation ranges are those of `round`, from BN parameters (the paper says so; its code measures noise). With K
and C off this is `round`, to the bit. Reached here (CIFAR-10 as JPEG, ResNet-20 with 87.44 %, W4A4 / W3A3): 85.61 / 80.56 %; K alone 85.54 / 80.37,
C alone 85.34 / 79.08; with one grid for each tensor 85.05 / 77.68 (`round`: 83.96 / 68.68, per tensor 81.32 / 46.05).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dfqbench import Field, Method, MethodConfig, Student, UserError, register

LARGEST_PART = 2**22  # weights that are sorted at once
LARGEST_ZERO_POINT = 2**20  # beyond it float32 hardly tells a grid's levels apart: such a grid is rounded to nearest


@register("squant", paper="arXiv:2202.07471", fidelity="paper", shares_synthesis=True)
class SQuant(Method):
    """Rounding whose errors cancel within kernels and channels, no images, no training (Guo et al., ICLR 2022)."""

    tasks = {"classify", "segment", "detect"}
    needs = {"statistics", "ranges"}
    uses_seed = False

    class Config(MethodConfig):
        source = "the paper"

        kernel: bool = Field(True, description="errors cancel within each kernel (K)")
        channel: bool = Field(True, description="errors cancel within each output channel (C)")
        n: float = Field(3.0, gt=0, unit="standard deviations", description="half-width of activation ranges", source="as `round`")

    @classmethod
    def weight_grids(cls, config: Any) -> Any:
        return ["uniform"]

    def finish(self, student: Student) -> None:
        student.set_ranges_from_bn(self.config.n)
        round_cancelling(student, self.config.kernel, self.config.channel)


def round_cancelling(student: Student, kernel: bool = True, channel: bool = True) -> None:
    """Makes every weight of a student one that rounds as SQuant rounds it, on the grid as it is; activation ranges stay."""
    if student.protocol.weight_grid != "uniform":
        raise UserError(f"errors of rounding cancel on uniform weight grids only, the protocol has {student.protocol.weight_grid!r}")
    for layer in student.layers.values():
        codes, weight = layer.codes(), layer.layer.weight.detach()
        kernels = *weight.shape[:2], -1
        scale, zero_point = (v.double().expand(len(weight))[:, None, None] for v in (codes.scale, codes.zero_point))
        up, down = (layer.can_have(codes.levels + way).reshape(kernels) for way in (1, -1))
        parts = (weight.reshape(kernels), codes.levels.reshape(kernels), up, down, scale, zero_point)
        chosen, rows = [], max(1, LARGEST_PART // weight[0].numel())
        for w, levels, higher, lower, step, zero in zip(*(part.split(rows) for part in parts), strict=True):
            error = levels - (w.double() / step + zero)
            free = torch.where(error > 0, lower, higher) & (error != 0) & (zero.abs() < LARGEST_ZERO_POINT)
            chosen.append(levels + flips(error, free, kernel, channel))
        layer.set_levels(torch.cat(chosen).view_as(weight))


def flips(error: Tensor, free: Tensor, kernel: bool = True, channel: bool = True) -> Tensor:
    """By how many levels (-1, 0 or 1) to round otherwise than to nearest: O x I x K, float32.

    error: rounding errors in steps, float64; free: what may be flipped; both O x I x K.
    """
    direction, priority = -error.sign(), error.abs() * free
    moved = torch.zeros_like(error)
    if kernel and error.shape[2] > 1:
        chosen, offered = cancelling(error, direction, priority)
        moved = chosen * direction
        direction = torch.where(chosen, -direction, direction)
        priority = (error + moved).abs() * offered
    if channel:
        chosen, _ = cancelling(*((t.flatten(1)) for t in (error + moved, direction, priority)))
        moved = moved + chosen.view_as(moved) * direction
    return moved.float()


def cancelling(error: Tensor, direction: Tensor, priority: Tensor) -> tuple[Tensor, Tensor]:
    """Which entries to flip (bool) so that each row's sum of errors comes within 1/2, and the one entry of each row to offer to the next stage.

    All three: rows along the last axis; direction: by what a flip changes the error, priority: 0 where there must be no flip.
    """
    total = error.sum(-1, keepdim=True)
    count = total.abs().round()
    able = (priority > 0) & (direction == -total.sign())
    rank = (priority * able).argsort(stable=True, dim=-1, descending=True).argsort(-1)
    offered = torch.where(count >= total.abs(), count - 1, count)  # too far: the last flip back; not far enough: one more
    return able & (rank < count), able & (rank == offered)
