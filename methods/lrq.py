"""LRQ: Long-Range Zero-Shot Generative Deep Network Quantization. Luo, Gao, Zhang, Fan, Zhang, Xu. Neural Networks 166, 2023, arXiv:2211.06816.

Images are optimised from noise towards BN statistics and a soft target, and kept within bounds of their class's centre in feature space, with an
angular margin added to make that harder; a generator with large-kernel attention sets the activation ranges; the student learns from
the stored images by decoupled distillation.

    for each batch: y ~ uniform, X ~ N(0, 1);  1000 steps of Adam on
        L_BNS + mean (p_y - t)^2 + [lam_l - d]_+ + [d - lam_u]_+,   d = 1 - cos(angle(f, centre_y) + m)
    4 epochs:   generator on CE + 0.1 L_BNS; its images set the students' ranges
    147 epochs: Q on CE + TCKD + 8 NCKD over crops and flips of the stored images

Fidelity: the authors' code (hfutly66/LRQ, a fork of IntraQ), as far as it is public: there, the stored images train the
student and the generator only calibrates; `train_on_generator` adds its images. Of their two programs for CIFAR one has the attention block before
the first convolution (the default), the other has none (`attention: none`). Their CIFAR bounds are unknown: IntraQ's are taken, of which the lower
one (0.05 or 0.02) never acts, since with the margin of 0.5 even an image in its class's centre is at a distance of 1 - cos 0.5 = 0.122 from it.
Reached here, after 1,500 student steps of 64 images on 1,280 images of 300 iterations (CIFAR-10 as JPEG, ResNet-20 with 87.44 %, W4A4 / W3A3,
means of seeds 0 and 1): 85.76 / 79.76 %.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Adam

from dfqbench import Batch, Field, Student, register
from dfqbench_methods.parts.generators import Generator
from dfqbench_methods.parts.large_kernel import LongRangeGenerator
from dfqbench_methods.parts.losses import decoupled_loss
from dfqbench_methods.parts.stored_images import StoredImages, StoredImagesConfig


@register("lrq", paper="arXiv:2211.06816", fidelity="code", shares_synthesis=True)
class LRQ(StoredImages):
    """Long-range zero-shot generative quantization (Luo et al., Neural Networks 2023)."""

    class Config(StoredImagesConfig):
        source = "the authors' code"
        after_images = StoredImagesConfig.after_images | {"attention", "target_weight", "other_weight", "train_on_generator"}

        margin: float = Field(0.5, ge=0, unit="radians", description="m: added to the angle between a feature and its class's centre")
        attention: Literal["before", "after", "none"] = Field("before", description="place of the attention block around the first convolution")
        target_weight: float = Field(1.0, ge=0, description="alpha: weight of the target class's distillation")
        other_weight: float = Field(8.0, ge=0, description="beta: weight of the other classes' distillation")
        train_on_generator: bool = Field(False, description="each step also trains on a batch from the generator", source="chosen here")

        presets = {
            "cifar100": dict(target_low=0.6, closest=0.02, farthest=1.0),
            "imagenet": dict(
                batch_size=16, student_lr=1e-6, milestones=[100, 200, 350], target_low=0.9, closest=0.3, conditioning="batch-norm", attention="after"
            ),
        }

    def setup(self) -> None:
        super().setup()
        c = self.config
        self.margin = c.margin
        by_class = c.conditioning == "batch-norm"
        self.embedding = None if by_class else nn.Embedding(self.task.classes, c.latent_dim)
        plain = (self.task, c.latent_dim, by_class)
        self.generator = Generator(*plain) if c.attention == "none" else LongRangeGenerator(*plain, c.attention)
        learned = [*self.generator.parameters(), *(self.embedding.parameters() if self.embedding else [])]
        self.optimizer = Adam(learned, lr=c.generator_lr, betas=(0.5, 0.999), fused=True)

    def generate(self) -> tuple[Tensor, Tensor]:
        c = self.config
        labels, noise = self.draw_labels(c.batch_size), self.draw_noise(c.batch_size, c.latent_dim)
        latent = noise if self.embedding is None else self.embedding(labels) * noise
        return self.generator(latent, labels), labels

    def synthesize(self) -> Batch:
        if not self.config.train_on_generator:
            return super().synthesize()
        images, labels = self.stored_batch()
        with torch.no_grad():
            more = self.generate()
        images, labels = torch.cat([images, more[0]]), torch.cat([labels, more[1]])
        return Batch(images, labels, self.teacher(images).detach())

    def distill(self, student: Student, batch: Batch) -> Tensor:
        assert batch.labels is not None
        c, logits = self.config, student(batch.images)
        distilled = decoupled_loss(logits, batch.labels, batch.teacher_logits, c.target_weight, c.other_weight)
        return cross_entropy(logits, batch.labels) + distilled
