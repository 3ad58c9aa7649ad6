"""ZeroQ's one batch of images, the plain way, and the ranges that it sets.

Where the published code differs from its paper: the initial noise is divided by its variance where the standard deviation is meant (kept). It pairs
convolutions with BN layers by order of definition, as here; for a network whose definition has another order than its forward pass that is wrong, and
`zeroq` takes the inputs of BN layers. It has no mixed-precision search.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dfqbench_methods.textbook.loop import Loop, QuantizedReLU


class RangeFromZero(QuantizedReLU):
    """A running minimum and maximum that start from 0, and stand still when they are not tracked."""

    def __init__(self, bits: int):
        super().__init__(bits)
        self.low, self.high = torch.zeros(()), torch.zeros(())

    def range_of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.tracking:
            self.low, self.high = torch.minimum(self.low.to(x), x.data.min()), torch.maximum(self.high.to(x), x.data.max())
        return self.low, self.high


class TextbookZeroQ(Loop):
    """A step optimises the images, or (`tracking`) sets the ranges by them."""

    relu = RangeFromZero

    def setup(self) -> None:
        c = self.config
        norms = [m for m in self.teacher.modules() if isinstance(m, nn.BatchNorm2d)]
        convolutions = [m for m in self.teacher.modules() if isinstance(m, nn.Conv2d)]
        self.pairs = list(zip(convolutions, norms, strict=True))
        self.outputs: dict[nn.Module, Tensor] = {}
        for convolution in convolutions:
            convolution.register_forward_hook(self._keep)
        levels = torch.randint(0, 255, (c.images, *self.task.image_shape), generator=self.stream("noise"), device=self.device)
        self.images = ((levels - 127.5) / 5418.75).requires_grad_()
        self.generator_optimizer = torch.optim.Adam([self.images], lr=c.image_lr)
        self.plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(self.generator_optimizer, factor=0.1, patience=c.patience, min_lr=1e-4)

    def _keep(self, module: nn.Module, given: Any, output: Tensor) -> None:
        self.outputs[module] = output

    def step(self, tracking: bool, distilling: bool) -> None:
        self.track(tracking)
        if tracking:
            with torch.no_grad():
                self.ask(self.student, self.images)
            return
        self.ask(self.teacher, self.images)
        loss = self.distance(self.images, torch.zeros(self.task.channels), torch.ones(self.task.channels))
        for convolution, norm in self.pairs:
            assert norm.running_mean is not None
            assert norm.running_var is not None
            loss = loss + self.distance(self.outputs[convolution], norm.running_mean, torch.sqrt(norm.running_var + 1e-6))
        self.minimise(loss, self.generator_optimizer)
        self.plateau.step(loss.item())
        self.remember(loss, loss)

    def distance(self, x: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
        """Image by image: squared distances summed over channels."""
        total = torch.zeros((), device=self.device)
        for image in x:
            pixels = image.reshape(len(image), -1)
            spread = torch.sqrt(pixels.var(1, unbiased=True) + 1e-6)
            total = total + ((pixels.mean(1) - mean.to(x)) ** 2).sum() + ((spread - deviation.to(x)) ** 2).sum()
        return total / len(x)
