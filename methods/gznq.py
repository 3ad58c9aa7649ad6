"""GZNQ: Generative Zero-shot Network Quantization. He, Lu, Xu, Hu, Wang, Cheng. CVPR workshops 2021, arXiv:2101.08430.

Images of every category are reconstructed from what the teacher's BN layers remember, and calibrate (or fine-tune) the student.

    for each batch: y balanced, x ~ N(0, 1);  T steps of Adam (cosine) on
        CE(P(x), y) + 10 L_BN(x) + roughness + size + within-class similarity
    keep (x, y) where P is more than 50 % sure of y
    post-training: ranges of least squared error, bias correction;   fine-tuning: CE + T^2 KL over the images

Segmentation: y is a class for each pixel (Voronoi cells of 2 to 6 classes), P's doubt a mean over pixels, and no two images are of one class. A
detector's images are asked for nothing: BN statistics and roughness alone.

Fidelity: abstract. Only its first page could be read: BN mean and variance by squares, cross-entropy, the reading as
generative modelling. The rest is reconstructed from the practice of its time (DeepInversion's priors). BN statistics describe
a data set, not a batch: the loss compares a mix of the earlier batches' statistics and this one's. `mode: generator` makes
each batch by a small generator of its own with a latent vector per image (GENIE's way) instead of by pixels. Reached here,
post-training, with 1,280 images of 300 steps (CIFAR-10 as JPEG, ResNet-20 with 87.44 %, W4A4 / W3A3, means of two seeds): 85.49 / 77.85 %.
Fine-tuning at 1e-4 diverges there at W3A3: activations leave their frozen ranges, and the unclipped gradient of `lineage` does not bring them
back. Under a protocol with `gradient: clipped` it reaches 79.83 % (results/reference/failures).
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Literal

import torch
from torch import Tensor
from torch.optim import Adam

from dfqbench import Batch, Field, Observation, Phase, Student, TrainingConfig, register
from dfqbench_methods.parts.generators import Generator
from dfqbench_methods.parts.layouts import at_size, draw_labels, label_loss
from dfqbench_methods.parts.pixels import OptimisesBatches, clip_to_pixels, drawn_jitter, roughness, same_class_similarity, start_anew


@register("gznq", paper="arXiv:2101.08430", fidelity="abstract", shares_synthesis=True)
class GZNQ(OptimisesBatches):
    """Images reconstructed from BN statistics, for calibration or fine-tuning (He et al., CVPRW 2021)."""

    ranges = "mse"
    tasks = {"classify", "segment", "detect"}
    needs = {"statistics", "features", "labels"}
    quick = {"images": 8, "synthesis_batch": 8, "synthesis_iterations": 3, "confidence": 0.0}

    class Config(TrainingConfig):
        source = "chosen here: only the abstract is public"
        after_images = {*TrainingConfig.model_fields, "finetune", "temperature"}

        finetune: bool = Field(False, description="train the student on the images; otherwise post-training with bias correction")
        epochs: int = Field(150, ge=0, unit="epochs", description="fine-tuning")
        batch_size: int = Field(256, ge=2)
        mode: Literal["image", "generator"] = Field("image", description="optimise pixels, or a small generator per batch")
        images: int = Field(5120, ge=1, unit="images", description="images to make; those that the teacher doubts are dropped")
        synthesis_batch: int = Field(256, ge=2, unit="images", description="images optimised together")
        synthesis_iterations: int = Field(2000, ge=1, unit="steps", description="steps on each batch of images")
        image_lr: float = Field(0.1, gt=0, description="Adam's learning rate on pixels or latents, cosine to 0")
        image_generator_lr: float = Field(0.01, gt=0, description="Adam's learning rate on a batch's generator, x 0.95 every 100 steps")
        bn_weight: float = Field(10.0, ge=0, description="weight of the BN-statistics loss")
        statistics_momentum: float = Field(0.5, ge=0, lt=1, description="share of the earlier batches in the compared statistics")
        roughness_weight: float = Field(1e-4, ge=0, description="weight of the squared differences of neighbouring pixels")
        size_weight: float = Field(1e-5, ge=0, description="weight of the squared pixels, summed over an image")
        similarity_weight: float = Field(0.1, ge=0, description="weight of the similarity of images of one class")
        jitter: int = Field(4, ge=0, unit="pixels", description="by how much a batch is shifted at most")
        confidence: float = Field(0.5, ge=0, le=1, description="images whose label the teacher gives less probability are dropped")
        temperature: float = Field(20.0, gt=0, description="of the distillation: logits are divided by it")

        presets = {"imagenet": dict(batch_size=16, student_lr=1e-5, synthesis_batch=64, jitter=30)}

    def setup(self) -> None:
        c = self.config
        self.stored = self.image_set("images")
        self.generator: Generator | None = Generator(self.task, 256, eps=1e-5) if c.mode == "generator" else None
        shape = (c.synthesis_batch, 256) if self.generator else (c.synthesis_batch, *self.task.image_shape)
        self.source = torch.zeros(shape).requires_grad_()  # what is optimised: pixels, or one latent vector per image
        self.labels = torch.arange(c.synthesis_batch) % self.task.classes  # of a detector's images none is ever asked for
        if self.task.kind == "segment":
            self.labels = torch.zeros(c.synthesis_batch, *self.task.image_shape[1:], dtype=torch.long)
        groups = [{"params": [self.source], "lr": c.image_lr}]
        if self.generator:
            groups.append({"params": list(self.generator.parameters()), "lr": c.image_generator_lr})
        self.optimizer = Adam(groups, betas=(0.5, 0.9), fused=self.device.type == "cuda")
        self.past: list[Tensor] = []  # statistics of the batches so far: mean and variance of every BN layer in turn

    def phases(self) -> list[Phase]:
        c = self.config
        making = Phase("images", math.ceil(c.images / c.synthesis_batch), iterations=c.synthesis_iterations, step=self.optimise)
        calibration = Phase("calibration", 1, iterations=math.ceil(c.images / c.batch_size), calibration_epochs=1)
        return [making, calibration] + [Phase("train", c.epochs, distill=True)] * c.finetune

    def before_step(self, phase: Phase) -> Hashable:
        """None where a batch is finished: how many images are kept depends on them."""
        c = self.config
        if phase.step is None:
            if not len(self.stored):
                raise RuntimeError(f"the teacher is sure of none of the {c.images} images: more iterations, or a lower confidence")
            self.stored.pick(c.batch_size)
            return 0
        done = self.next_iteration()
        self.set_rate(self.optimizer, c.image_lr * 0.5 * (1 + math.cos(math.pi * done / c.synthesis_iterations)))
        if self.generator:
            self.set_rate(self.optimizer, c.image_generator_lr * 0.95 ** (done // 100), group=1)
        return None if self.finishes_batch else 0

    def make(self) -> Tensor:
        return self.generator(self.source) if self.generator else self.source

    def optimise(self) -> None:
        """One step on the current batch; its last one stores what the teacher is sure of."""
        c = self.config
        images = self.make()
        moved = drawn_jitter(c.jitter, self.random("jitter"))
        answer = self.teacher.observe(moved(images))
        asked: Tensor | float = 0.0
        if self.task.kind != "detect":
            labels = self.labels if self.task.kind == "classify" else moved(self.labels)
            asked = self.log("image_ce", label_loss(self.answers, answer.logits, labels))
        statistics_loss = self.log("image_bns", self.statistics_loss(answer))
        loss = asked + c.bn_weight * statistics_loss
        loss = loss + (c.roughness_weight * roughness(images) + c.size_weight * images.square().sum() / len(images))
        if self.task.kind == "classify":
            similarity = self.log("image_similarity", same_class_similarity(answer.features[-1].mean((2, 3)), self.labels))
            loss = loss + c.similarity_weight * similarity
        self.minimise(self.log("image_loss", loss), self.optimizer)
        if not self.generator:
            clip_to_pixels(self.source, self.task)
        if self.finishes_batch:
            self.finish_batch()

    @torch.no_grad()
    def begin_batch(self) -> None:
        self.source.copy_(self.draw_noise(*self.source.shape))
        if self.task.kind == "segment":
            self.labels.copy_(draw_labels(self, len(self.labels)))
        else:
            self.labels.copy_(self.labels[torch.randperm(len(self.labels), generator=self.random("labels"), device=self.device)])
        start_anew(self.optimizer)
        for module in self.generator.modules() if self.generator else ():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()  # type: ignore[operator]

    @torch.no_grad()
    def finish_batch(self) -> None:
        images = self.make()
        answer = self.teacher.observe(images)
        sure = self.confidence(answer.logits) >= self.config.confidence
        self.log("kept", sure.float().mean())
        labels = self.labels if self.task.kind != "segment" else self.labels.to(torch.int16)  # a class for each pixel takes room
        self.stored.add(images[sure], labels[sure])
        self.past = self.mixed([part for pair in answer.statistics() for part in pair])

    def confidence(self, answer: Tensor) -> Tensor:
        """How probable the teacher finds what each image was asked to show (N): its class, its pixels' classes on average; 1 where it was nothing."""
        if self.task.kind == "detect":
            return answer.new_ones(len(answer))
        found: Tensor = answer.softmax(1).gather(1, at_size(self.labels, answer)[:, None])[:, 0]
        return found if found.dim() == 1 else found.mean((1, 2))

    def mixed(self, now: list[Tensor]) -> list[Tensor]:
        share = self.config.statistics_momentum
        return [share * before + (1 - share) * new for before, new in zip(self.past, now, strict=True)] if self.past else now

    def statistics_loss(self, answer: Observation) -> Tensor:
        """Squared distance of the mixed statistics to those that BN layers remember, averaged over channels, variances, means and layers."""
        found = self.mixed([part for pair in answer.statistics() for part in pair])
        wanted = [part for bn in answer.batch_norms for part in (bn.running_mean, bn.running_var)]
        distances = [(f - w).square().mean() for f, w in zip(found, wanted, strict=True) if w is not None]
        return torch.stack(distances).sum() / len(answer.batch_norms)

    def synthesize(self) -> Batch:
        """The stored images in their order, around and around."""
        images, labels = self.stored.picked
        return Batch(images, None if self.task.kind == "detect" else labels.long(), self.teacher(images).detach())

    def distill(self, student: Student, batch: Batch) -> Tensor:
        answer = student(batch.images)
        distilled = self.answers.divergence(answer, batch.teacher_logits, self.config.temperature)
        return distilled if batch.labels is None else label_loss(self.answers, answer, batch.labels) + distilled

    def finish(self, student: Student) -> None:
        if not self.config.finetune:
            student.correct_biases(self.stored.images[: self.config.synthesis_batch])
