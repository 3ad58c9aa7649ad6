"""A learning rate that falls where a loss makes no progress: torch's ReduceLROnPlateau, on a GPU without waiting for the loss."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

FACTOR, THRESHOLD = 0.1, 1e-4  # of torch's class: by how much the rate falls, and the share of the best loss that counts as progress


class Plateau:
    """Divides the rate of an optimizer's first group by ten after more than `patience` steps in a row without progress, down to `min_lr`.

    On a CPU it is torch's own. On a GPU rate, best loss and count are tensors there, by the same rules; the optimizer must be one of torch's fused
    ones, which read a rate that is a tensor.
    """

    def __init__(self, optimizer: Optimizer, patience: int, min_lr: float):
        self.optimizer, self.patience, self.min_lr = optimizer, patience, min_lr
        self.device = optimizer.param_groups[0]["params"][0].device
        self.begin(optimizer.param_groups[0]["lr"])

    def begin(self, rate: float) -> None:
        """As if no step had been made, at this rate. On a GPU in place."""
        (group,) = self.optimizer.param_groups
        if self.device.type == "cpu":
            group["lr"] = rate
            self.scheduler = ReduceLROnPlateau(self.optimizer, factor=FACTOR, patience=self.patience, threshold=THRESHOLD, min_lr=self.min_lr)
            return
        if not isinstance(group["lr"], Tensor):
            group["lr"] = torch.zeros((), device=self.device)
            self.best, self.idle = torch.zeros((), device=self.device), torch.zeros((), device=self.device)
        group["lr"].fill_(rate)
        self.best.fill_(float("inf"))
        self.idle.zero_()

    @torch.no_grad()
    def step(self, loss: Tensor) -> None:
        """loss: a scalar."""
        if self.device.type == "cpu":
            self.scheduler.step(loss.item())
            return
        loss, rate = loss.detach(), self.optimizer.param_groups[0]["lr"]
        better = loss < self.best * (1 - THRESHOLD)
        self.best.copy_(torch.where(better, loss, self.best))
        self.idle.add_(1).mul_(~better)
        over = self.idle > self.patience
        rate.copy_(torch.where(over, (rate * FACTOR).clamp_min(self.min_lr), rate))
        self.idle.mul_(~over)

    def state_dict(self) -> dict[str, object]:
        if self.device.type == "cpu":
            return self.scheduler.state_dict()
        return {"best": self.best, "idle": self.idle}  # the rate is the optimizer's

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if self.device.type == "cpu":
            self.scheduler.load_state_dict(state)
            return
        (group,) = self.optimizer.param_groups
        group["lr"] = group["lr"].to(self.device)  # the optimizer is loaded before, from a file that was read onto the CPU
        self.best.copy_(state["best"])
        self.idle.copy_(state["idle"])
