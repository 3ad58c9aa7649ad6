"""Ripples: distils on random plane waves. No paper; an example of a method in a package of its own."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dfqbench import Batch, Field, Method, Phase, Student, TrainingConfig, register


@register("ripples", paper="none", fidelity="paper", shares_synthesis=True)
class Ripples(Method):
    """Distils on random plane waves."""

    class Config(TrainingConfig):
        source = "chosen by the author"

        calibration_epochs: int = Field(1, ge=1, unit="epochs", description="epochs in which activation ranges are tracked")
        waves: float = Field(3.0, gt=0, unit="waves per image", description="largest number of waves across an image")

    def phases(self) -> list[Phase]:
        return [Phase("train", self.config.epochs, distill=True, calibration_epochs=self.config.calibration_epochs)]

    def synthesize(self) -> Batch:
        c, size = self.config, self.task.size
        ticks = torch.arange(size, device=self.device) / size
        way = c.waves * (2 * torch.rand(c.batch_size, self.task.channels, 2, 1, 1, generator=self.random("waves"), device=self.device) - 1)
        phase = self.draw_noise(c.batch_size, self.task.channels, 1, 1)
        images = math.sqrt(2) * torch.sin(2 * math.pi * (way[:, :, 0] * ticks[:, None] + way[:, :, 1] * ticks[None, :]) + phase)
        self.log("contrast", images.std())
        return Batch(images, None, self.teacher(images).detach())

    def distill(self, student: Student, batch: Batch) -> Tensor:
        return (student(batch.images) - batch.teacher_logits).square().mean()
