"""Gaussian noise: what no image at all is worth. The floor under every source of images.

    repeat: x ~ N(0, 1), pixel by pixel;  Q: minimise T^2 KL(P(x) || Q(x))      (after the calibration)

Fidelity: none is claimed; that a student can be distilled on noise is folklore. Normalised images of a task have this mean and deviation, and
nothing else of it. The teacher's answers to noise are nearly the same for every image: few classes, one of them most of the time.
"""

from __future__ import annotations

from torch import Tensor

from dfqbench import Batch, Field, Method, Phase, Student, TrainingConfig, register


@register("gaussian", paper="none", fidelity="paper", shares_synthesis=True)
class Gaussian(Method):
    """Distils on Gaussian noise: the floor under every source of images."""

    tasks = {"classify", "segment", "detect"}
    quick = {"calibration_epochs": 1, "student_lr": 0.01}

    class Config(TrainingConfig):
        calibration_epochs: int = Field(4, ge=1, unit="epochs", description="epochs in which activation ranges are tracked; then they are frozen")
        temperature: float = Field(20.0, gt=0, description="of the distillation: logits are divided by it")

    @property
    def static_step(self) -> bool:
        return True

    def phases(self) -> list[Phase]:
        calibration = min(self.config.calibration_epochs, self.config.epochs)
        return [
            Phase("calibration", calibration, calibration_epochs=calibration),
            Phase("train", self.config.epochs - calibration, distill=True),
        ]

    def synthesize(self) -> Batch:
        images = self.draw_noise(self.config.batch_size, *self.task.image_shape)
        return Batch(images, None, self.teacher(images).detach())

    def distill(self, student: Student, batch: Batch) -> Tensor:
        return self.answers.divergence(student(batch.images), batch.teacher_logits, self.config.temperature)
