"""Learning rates of torch's optimizers: numbers, or tensors on the device that are filled in place.

A captured step reads what lies at an address. A number would stay what it was when the step was captured; a tensor can be filled. torch's fused
kernels take either. A tensor holds the rate in float32, the kernel is handed a number in float64: so where a method's steps can be captured, its
rates are tensors whether they are captured or not, and both ways give the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


def is_fused(optimizer: Optimizer) -> bool:
    """Whether all of its updates are torch's fused kernels: the only ones that read rates and step counts on the device."""
    return all(group.get("fused") for group in optimizer.param_groups)


def place_rates(optimizer: Optimizer, device: torch.device) -> None:
    """Makes the rates of a fused optimizer tensors on `device`, with the values that they have; leaves another optimizer as it is."""
    if not is_fused(optimizer):
        return
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(rate_of(group), dtype=torch.float32, device=device)
        if "capturable" in group:
            group["capturable"] = True  # Adam refuses to be captured without; its fused kernel computes the same either way


def set_rate(group: dict[str, Any], rate: float) -> None:
    """Gives a parameter group another learning rate, in place where it is a tensor."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def rate_of(group: dict[str, Any]) -> float:
    """The learning rate as a number: of a tensor, the shortest that float32 cannot tell from it. Waits for the device there."""
    rate = group["lr"]
    return float(f"{rate.item():.7g}") if isinstance(rate, Tensor) else float(rate)


def learning_rate(initial: float, milestones: Sequence[int], decay: float, epoch: int) -> float:
    """The rate in `epoch` (counted from 0): initial times decay for every milestone that has been reached."""
    return initial * decay ** sum(epoch >= m for m in milestones)


def unreached_milestones(config: Any) -> list[int]:
    """Milestones of a method's config that lie beyond its epochs: they are not rescaled, and the user is told."""
    return [m for m in getattr(config, "milestones", []) if m >= getattr(config, "epochs", 0)]
