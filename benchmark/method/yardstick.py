"""Real images in a method's place: the one source that is handed data, for rows that are no data-free methods (`yardsticks` of a sweep)."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from dfqbench.method.contract import Batch, Method, Phase
from dfqbench.method.settings import Field, TrainingConfig


class YardstickConfig(TrainingConfig):
    """What a method that trains can be told, of which only the batch and the plan count here."""

    calibration_epochs: int = Field(4, ge=1, unit="epochs", description="epochs in which activation ranges are tracked", source="GDFQ's code")


class YardstickImages(Method):
    """Batches of real images, in a random order that is drawn anew where less than a batch is left of it.

    They are as they are: not cropped, not flipped, without labels.

    The engine puts the images (N x C x H x W, normalised) into `handed` between `__init__` and `setup`. It does so for the cells of a sweep's
    `yardsticks` and for no others, and looks for this class and no other: a registered method is handed nothing.
    """

    Config = YardstickConfig
    handed: Tensor | None = None

    def setup(self) -> None:
        if self.handed is None:
            raise RuntimeError("a yardstick was handed no images")
        images, self.handed = self.handed, None
        self.stored = self.image_set("yardstick")
        self.stored.add(images, torch.zeros(len(images), dtype=torch.long))

    def phases(self) -> list[Phase]:
        calibration = min(self.config.calibration_epochs, self.config.epochs)
        return [
            Phase("calibration", calibration, calibration_epochs=calibration),
            Phase("train", self.config.epochs - calibration, distill=True),
        ]

    @property
    def static_step(self) -> bool:
        return True

    def before_step(self, phase: Phase) -> Hashable:
        self.stored.pick(self.config.batch_size, shuffle=self.random("order"))
        return 0

    def synthesize(self) -> Batch:
        images, _ = self.stored.picked
        return Batch(images, None, self.teacher(images).detach())
