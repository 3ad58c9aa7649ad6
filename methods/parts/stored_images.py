"""Images that are optimised once, within bounds of their class's centre, and then train the student: what IntraQ and its fork LRQ share.

for each batch: y ~ uniform, X ~ N(0, 1), t = 1 or ~ U(eps_t, 1) with equal odds;  1000 steps of Adam, half of them on crops and flips of X, on
    L_BNS + mean (p_y - t)^2 + [lam_l - d]_+ + [d - lam_u]_+,   d = 1 - cos(angle(f, centre_y) + margin)
4 epochs:   a generator on CE + 0.1 L_BNS; its images set the students' ranges
147 epochs: Q on crops and flips of the stored images
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim import Adam, Optimizer

from dfqbench import Batch, Field, Phase, TrainingConfig
from dfqbench_methods.parts.augment import crop_and_flip
from dfqbench_methods.parts.centers import ClassCenters
from dfqbench_methods.parts.losses import batch_norm_loss
from dfqbench_methods.parts.pixels import OptimisesBatches, start_anew
from dfqbench_methods.parts.plateau import Plateau


class StoredImagesConfig(TrainingConfig):
    """The settings that both methods have."""

    source = "IntraQ's code, CIFAR-10"
    after_images = {*TrainingConfig.model_fields, "calibration_epochs", "latent_dim", "conditioning", "bn_weight", "generator_lr"}

    epochs: int = Field(151, ge=1, unit="epochs", description="training in all, calibration included; the making of images comes before")
    batch_size: int = Field(256, ge=2)
    milestones: list[int] = Field([20, 40, 60], description="epochs from which on the student's learning rate is multiplied by lr_decay")
    images: int = Field(5120, ge=1, unit="images", description="stored images")
    synthesis_batch: int = Field(256, ge=1, unit="images", description="images optimised together")
    synthesis_iterations: int = Field(1000, ge=1, unit="steps", description="steps on each batch of images")
    image_lr: float = Field(0.5, gt=0, description="Adam's learning rate on the pixels")
    target_low: float = Field(0.95, ge=0, le=1, description="eps_t: half of the images have a target probability between it and 1")
    closest: float = Field(0.05, ge=0, unit="1 - cosine", description="lam_l: smallest distance to the centre that costs nothing")
    farthest: float = Field(0.8, ge=0, unit="1 - cosine", description="lam_u: largest distance to the centre that costs nothing")
    smallest_crop: float = Field(0.5, gt=0, le=1, unit="share of the area", description="smallest area of a random crop")
    calibration_epochs: int = Field(4, ge=1, unit="epochs", description="epochs in which the generator trains and ranges are tracked")
    latent_dim: int = Field(100, ge=1, description="width of the generator's noise")
    conditioning: Literal["embedding", "batch-norm"] = Field("embedding", description="how the class enters the generator")
    bn_weight: float = Field(0.1, ge=0, description="the generator's weight of the BN-statistics loss")
    generator_lr: float = Field(1e-3, gt=0, description="learning rate of the generator's Adam")


class StoredImages(OptimisesBatches):
    """Makes and stores the images, and calibrates. A subclass builds a generator with its `optimizer`, and writes `generate` and `distill`."""

    needs = {"statistics", "features", "labels"}
    quick = {"images": 8, "synthesis_batch": 4, "synthesis_iterations": 3, "calibration_epochs": 1}
    Config: ClassVar[type[StoredImagesConfig]] = StoredImagesConfig
    margin = 0.0  # radians

    optimizer: Optimizer

    def setup(self) -> None:
        c = self.config
        self.stored = self.image_set("images")
        self.pixels = torch.zeros(c.synthesis_batch, *self.task.image_shape).contiguous(memory_format=torch.channels_last).requires_grad_()
        self.labels, self.targets = torch.zeros(c.synthesis_batch, dtype=torch.long), torch.zeros(c.synthesis_batch)
        self.pixel_optimizer = Adam([self.pixels], lr=c.image_lr, fused=self.device.type == "cuda")
        self.plateau = Plateau(self.pixel_optimizer, patience=50, min_lr=1e-4)
        self.centers = ClassCenters(self.task.classes, self.features(self.pixels[:1]).shape[1])
        self.augments = False

    def before_step(self, phase: Phase) -> Hashable:
        """Of a batch of images: 1 where they are cropped and flipped, None where they are finished."""
        c = self.config
        if phase.step is None:
            if phase.batch is None:
                self.stored.pick(c.batch_size, shuffle=self.random("order"))
            return 0
        self.next_iteration()
        self.augments = torch.rand((), generator=self.random("augment", on_cpu=True)).item() < 0.5
        return None if self.finishes_batch else int(self.augments)

    def generate(self) -> tuple[Tensor, Tensor]:
        """Images with gradients to the generator, and their labels."""
        raise NotImplementedError

    def phases(self) -> list[Phase]:
        c = self.config
        calibration = min(c.calibration_epochs, c.epochs)
        return [
            Phase("images", math.ceil(c.images / c.synthesis_batch), iterations=c.synthesis_iterations, step=self.optimise),
            Phase("calibration", calibration, calibration_epochs=calibration, batch=self.calibrate),
            Phase("train", c.epochs - calibration, distill=True),
        ]

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """The teacher's pooled last-stage features, N x K."""
        return self.teacher.observe(images).features[-1].mean((2, 3))

    def optimise(self) -> None:
        """One step on the pixels of the current batch; its last one stores the batch and moves the centres."""
        c = self.config
        seen = crop_and_flip(self.pixels, self.random("crops"), c.smallest_crop) if self.augments else self.pixels
        answer = self.teacher.observe(seen)
        probability = answer.logits.softmax(1).gather(1, self.labels[:, None])[:, 0]
        bounds = self.centers.bound_loss(answer.features[-1].mean((2, 3)), self.labels, c.closest, c.farthest, self.margin)
        loss = batch_norm_loss(answer) + (probability - self.targets).square().mean() + bounds
        self.minimise(loss, self.pixel_optimizer)
        self.plateau.step(loss)
        self.log("image_loss", loss)
        self.log("bound_loss", bounds)
        if self.finishes_batch:
            self.finish_batch()

    def begin_batch(self) -> None:
        c = self.config
        with torch.no_grad():
            self.pixels.copy_(self.draw_noise(*self.pixels.shape))
            uniform = torch.rand(2, c.synthesis_batch, generator=self.random("targets"), device=self.device)
            self.targets.copy_(torch.where(uniform[0] < 0.5, 1.0, c.target_low + (1 - c.target_low) * uniform[1]))
        self.labels.copy_(self.draw_labels(c.synthesis_batch))
        start_anew(self.pixel_optimizer)
        self.plateau.begin(c.image_lr)

    @torch.no_grad()
    def finish_batch(self) -> None:
        self.stored.add(self.pixels, self.labels)
        self.centers.add(self.features(self.pixels), self.labels)

    def calibrate(self) -> Batch:
        """A batch of the generator, which learns from it."""
        images, labels = self.generate()
        answer = self.teacher.observe(images)
        label_loss, statistics_loss = cross_entropy(answer.logits, labels), batch_norm_loss(answer)
        self.minimise(label_loss + self.config.bn_weight * statistics_loss, self.optimizer)
        self.log("generator_ce", label_loss)
        self.log("generator_bns", statistics_loss)
        return Batch(images.detach(), labels, answer.logits.detach())

    def stored_batch(self) -> tuple[Tensor, Tensor]:
        """Crops and flips of the stored images that were picked, and their labels."""
        images, labels = self.stored.picked
        return crop_and_flip(images, self.random("crops"), self.config.smallest_crop), labels

    def synthesize(self) -> Batch:
        images, labels = self.stored_batch()
        return Batch(images, labels, self.teacher(images).detach())
