"""TSZSQ: Task-Specific Zero-shot Quantization-Aware Training for Object Detection. Li, Chen, Wang, Zhao, Chen. ICCV 2025, arXiv:2507.16782.

Images are optimised until the detector finds sampled boxes in them, the boxes are corrected by what it finds, and the student learns detection itself
beside distillation.

    for each batch: one box per image, of any class, pixels ~ U(0, 1);  2500 steps of Adam (cosine), parts of the images erased at random
        0.5 L_det(P(x), boxes) + 0.0005 TV + 0.01 sum_l r_l + 2 r_1        r_l = ||mean - mu_l|| + ||var - v_l|| of BN layer l
        from step 800 on: boxes that P sees are added, those that it does not see removed
    Q: minimise 0.04 L_det(Q(x), boxes) + 0.1 KL + MSE of features         KL: softmax over all that one scale of the head says of an image, T = 4

Fidelity: the paper; weights, rates and thresholds are those of its code for YOLOv5. What differs: a detector here is any network with maps of class
logits and boxes, and brings no training loss. L_det is made of its answer: the nine positions whose boxes (the teacher's) overlap a wanted one most
answer for it; focal loss of the classes of all positions, 1 - GIoU of the boxes of these, weighed 0.5 and 0.05 as theirs are; objectness has no term.
Where a box lies must be known of every position and not only of those that are left after suppression: the detector needs `boxes`. Features are those
at the ends of stages, not of every layer; the student is quantized as the protocol says, where theirs has its first layer and head in 32 bit and
learns its ranges. Boxes are corrected every 50 steps, not in each; no mosaics; TV is the root of the summed squares. Their KL mixes coordinates
and classes of all positions in one distribution: `divergence: choices` compares position by position instead. The last epoch is reported.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax, mse_loss
from torch.optim import Adam, Optimizer

from dfqbench import Batch, Field, Observation, Phase, Student, TrainingConfig, UserError, register
from dfqbench_methods.parts.boxes import assigned, detection_loss, draw_boxes, relabelled
from dfqbench_methods.parts.pixels import OptimisesBatches, roughness, start_anew

OF_CLASSES, OF_BOXES = 0.5, 0.05  # in the detection loss


@dataclass
class DetectionBatch(Batch):
    """A batch with the teacher's stage features; labels are the boxes (`parts.boxes`)."""

    features: list[Tensor]


@register("tszsq", paper="arXiv:2507.16782", fidelity="paper", shares_synthesis=True)
class TSZSQ(OptimisesBatches):
    """Images made to show sampled boxes, and a student that learns detection on them (Li et al., ICCV 2025)."""

    tasks = {"detect"}
    needs = {"statistics", "features", "labels", "boxes"}
    quick = {"images": 8, "synthesis_batch": 4, "synthesis_iterations": 4, "relabel_from": 2, "relabel_every": 1, "calibration_epochs": 1}

    class Config(TrainingConfig):
        source = "the authors' code, YOLOv5"
        after_images = {
            *TrainingConfig.model_fields, "calibration_epochs", "student_label_weight", "kl_weight", "feature_weight", "temperature", "divergence"
        }  # fmt: skip

        epochs: int = Field(100, ge=1, unit="epochs", description="training in all, calibration included; the making of images comes before")
        batch_size: int = Field(32, ge=1)
        milestones: list[int] = Field([], unit="epochs", description="epochs from which on the student's learning rate is multiplied by lr_decay")
        student_momentum: float = Field(0.9, ge=0, lt=1, description="first beta of the student's Adam", source="Adam's own")
        student_weight_decay: float = Field(0.0, ge=0, description="weight decay of the student's Adam", source="Adam's own")
        calibration_epochs: int = Field(4, ge=1, unit="epochs", description="in which ranges are tracked; then they are frozen", source="GDFQ's code")
        images: int = Field(5120, ge=1, unit="images", description="images to make")
        synthesis_batch: int = Field(64, ge=1, unit="images", description="images optimised together")
        synthesis_iterations: int = Field(2500, ge=1, unit="steps", description="steps on each batch of images")
        image_lr: float = Field(0.2, gt=0, description="Adam's learning rate on pixels in [0, 1], cosine to 0")
        label_weight: float = Field(0.5, ge=0, description="weight of the detection loss of the images")
        bn_weight: float = Field(0.01, ge=0, description="weight of the BN statistics of each layer")
        first_bn_weight: float = Field(2.0, ge=0, description="further weight of those of the first layer")
        roughness_weight: float = Field(5e-4, ge=0, description="weight of the differences of neighbouring pixels")
        erased: float = Field(0.5, ge=0, le=1, description="share of the images of which a part is erased in a step", source="chosen here")
        most_boxes: int = Field(32, ge=1, unit="boxes", description="boxes of an image, at most", source="chosen here")
        relabel_from: int = Field(800, ge=0, unit="steps", description="step from which on boxes are corrected")
        relabel_every: int = Field(50, ge=1, unit="steps", description="steps between two corrections", source="chosen here")
        student_label_weight: float = Field(0.04, ge=0, description="weight of the detection loss of the student")
        kl_weight: float = Field(0.1, ge=0, description="weight of the divergence")
        feature_weight: float = Field(1.0, ge=0, description="weight of the squared differences of features")
        temperature: float = Field(4.0, gt=0, description="of the divergence: what is compared is divided by it")
        divergence: Literal["flat", "choices"] = Field("flat", description="all that a scale says as one distribution (theirs), or each position's")

    def setup(self) -> None:
        c = self.config
        if self.teacher.boxes is None or self.teacher.decode is None:
            raise UserError("tszsq wants a detector with `decode` and `boxes`, which says where the box of every position is")
        self.stored = self.image_set("images")
        self.pixels = torch.zeros(c.synthesis_batch, *self.task.image_shape).contiguous(memory_format=torch.channels_last).requires_grad_()
        self.mean, self.std = (torch.tensor(values).view(1, -1, 1, 1) for values in (self.task.mean, self.task.std))
        self.wanted = torch.zeros(c.synthesis_batch, c.most_boxes, 6)
        self.optimizer = Adam([self.pixels], lr=c.image_lr, fused=self.device.type == "cuda")

    def phases(self) -> list[Phase]:
        c = self.config
        calibration = min(c.calibration_epochs, c.epochs)
        return [
            Phase("images", math.ceil(c.images / c.synthesis_batch), iterations=c.synthesis_iterations, step=self.optimise),
            Phase("calibration", calibration, calibration_epochs=calibration),
            Phase("train", c.epochs - calibration, distill=True),
        ]

    def before_step(self, phase: Phase) -> Hashable:
        """None where boxes are corrected by what the detector sees, and where a batch is finished."""
        c = self.config
        if phase.step is None:
            self.stored.pick(c.batch_size, shuffle=self.random("order"))
            return 0
        done = self.next_iteration()
        self.set_rate(self.optimizer, c.image_lr * 0.5 * (1 + math.cos(math.pi * done / c.synthesis_iterations)))
        return None if self.corrects_boxes or self.finishes_batch else 0

    @property
    def corrects_boxes(self) -> bool:
        since = self.iteration - self.config.relabel_from
        return bool(since >= 0 and since % self.config.relabel_every == 0)

    # --- images -------------------------------------------------------------------------------------------------------

    def normalised(self) -> Tensor:
        return (self.pixels - self.mean) / self.std

    def optimise(self) -> None:
        """One step on the pixels of the current batch; its last one stores the batch."""
        c = self.config
        answer = self.teacher.observe(self.with_erased_parts(self.normalised()))
        asked = self.log("image_detection", self.detection_loss(answer.logits, answer.logits, self.wanted))
        layers = self.layer_distances(answer)
        statistics = self.log("image_bns", c.bn_weight * layers.sum() + c.first_bn_weight * layers[0])
        smooth = c.roughness_weight * (roughness(self.pixels) * len(self.pixels) + 1e-12).sqrt()
        self.minimise(self.log("image_loss", c.label_weight * asked + statistics + smooth), self.optimizer)
        with torch.no_grad():
            self.pixels.clamp_(0, 1)
        if self.corrects_boxes:
            self.relabel()
        if self.finishes_batch:
            self.stored.add(self.normalised(), self.wanted.clone())

    @torch.no_grad()
    def begin_batch(self) -> None:
        self.pixels.copy_(torch.rand(self.pixels.shape, generator=self.random("noise"), device=self.device))
        self.wanted.copy_(draw_boxes(len(self.pixels), self.config.most_boxes, self.task, self.random("labels")))
        start_anew(self.optimizer)

    @torch.no_grad()
    def relabel(self) -> None:
        assert self.teacher.decode is not None
        found = self.teacher.decode(self.native(self.teacher(self.normalised())), *self.task.image_shape[1:])
        self.wanted = relabelled(found, self.wanted, self.task)
        self.log("boxes", self.wanted[..., 5].sum(1).mean())

    def with_erased_parts(self, images: Tensor) -> Tensor:
        """A rectangle of some images, of up to half of each side, is the mean of a normalised pixel."""
        share, *drawn = torch.rand(5, len(images), 1, generator=self.random("erase"), device=self.device)
        inside = []
        for side, start, length in zip(images.shape[2:], drawn[:2], drawn[2:], strict=True):
            ticks = (torch.arange(side, device=self.device) + 0.5) / side
            inside.append((ticks >= start * (1 - length / 2)) & (ticks <= start * (1 - length / 2) + length / 2))
        erased = inside[0][:, :, None] & inside[1][:, None, :] & (share < self.config.erased)[:, :, None]
        kept: Tensor = images * ~erased[:, None]
        return kept

    def layer_distances(self, answer: Observation) -> Tensor:
        """Of each BN layer: how far mean and variance of the batch are from those that it remembers, as lengths of vectors."""
        pairs = zip(answer.statistics(), answer.batch_norms, strict=True)
        return torch.stack([(mean - bn.running_mean).norm() + (variance - bn.running_var).norm() for (mean, variance), bn in pairs])  # type: ignore[operator]

    # --- what boxes cost ----------------------------------------------------------------------------------------------

    def native(self, answer: Tensor) -> Any:
        return self.teacher.native(answer.float())

    def boxes_of(self, answer: Tensor) -> Tensor:
        assert self.teacher.boxes is not None
        return self.teacher.boxes(self.native(answer), *self.task.image_shape[1:])

    def detection_loss(self, answer: Tensor, teacher_answer: Tensor, wanted: Tensor) -> Tensor:
        answering = assigned(self.boxes_of(teacher_answer), wanted)
        of_classes, of_boxes = detection_loss(self.answers, answer, self.boxes_of(answer), wanted, answering)
        loss: Tensor = OF_CLASSES * of_classes + OF_BOXES * of_boxes
        return loss

    # --- the student --------------------------------------------------------------------------------------------------

    def student_optimizer(self, student: Student) -> Optimizer:
        c = self.config
        return Adam(student.parameters(), lr=c.student_lr, betas=(c.student_momentum, 0.999), weight_decay=c.student_weight_decay, fused=True)

    @torch.no_grad()
    def synthesize(self) -> DetectionBatch:
        images, boxes = self.stored.picked
        answer = self.teacher.observe(images)
        return DetectionBatch(images, boxes, answer.logits, answer.features)

    def distill(self, student: Student, batch: Batch) -> Tensor:
        assert isinstance(batch, DetectionBatch)
        assert batch.labels is not None
        c, answer = self.config, student.observe(batch.images)
        asked = self.log("detection", self.detection_loss(answer.logits, batch.teacher_logits, batch.labels))
        features = torch.stack([mse_loss(ours, theirs) for ours, theirs in zip(answer.features, batch.features, strict=True)]).mean()
        divergence = self.log("divergence", self.divergence(answer.logits, batch.teacher_logits))
        loss: Tensor = c.student_label_weight * asked + c.kl_weight * divergence + c.feature_weight * self.log("features", features)
        return loss

    def divergence(self, ours: Tensor, theirs: Tensor) -> Tensor:
        temperature = self.config.temperature
        if self.config.divergence == "choices":
            return self.answers.divergence(ours, theirs, temperature)
        flat = [[torch.cat([part.flatten(1) for part in level], 1) / temperature for level in self.native(a)] for a in (ours, theirs)]
        scales = [kl_div(log_softmax(q, 1), log_softmax(p, 1), reduction="batchmean", log_target=True) for q, p in zip(*flat, strict=True)]
        return torch.stack(scales).sum()
