"""GDFQ: Generative Low-bitwidth Data Free Quantization. Xu, Li, Zhuang, Liu, Cao, Liang, Tan. ECCV 2020, arXiv:2003.03603.

A generator learns to make images that the teacher classifies as the label they were made from, and whose statistics are those that the teacher's BN
layers remember; the student learns from the teacher on these images.

    repeat: z ~ N(0, I), y ~ uniform;  x = G(z, y)
            G: minimise CE(P(x), y) + 0.1 L_BNS(x)
            Q: minimise CE(Q(x), y) + T^2 mean KL(P(x) || Q(x))      (after the warm-up)

Segmentation (chosen here, the paper has none): y is a class for each pixel, Voronoi cells of 2 to 6 classes, and both losses are means over pixels.

Fidelity: the authors' code (xushoukai/GDFQ). Deviations: activation ranges are tracked by a moving average with the right bias correction
(theirs overshoots for about 170 steps and is right after its 800), and the reported number is the last epoch's. Reached here (CIFAR-10 as JPEG,
ResNet-20 with 87.44 %, W4A4 / W3A3): 85.04 / 74.88 % after 3,200 student steps of 64, three seeds; the authors' code 85.28 / 75.58 %, one seed.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn
from torch.optim import Adam

from dfqbench import Batch, Field, Method, Phase, Student, TrainingConfig, register
from dfqbench_methods.parts.generators import LabelledGenerator
from dfqbench_methods.parts.layouts import choices, draw_labels, label_loss
from dfqbench_methods.parts.losses import batch_norm_loss, distillation_loss


@register("gdfq", paper="arXiv:2003.03603", fidelity="code", shares_synthesis=True)
class GDFQ(Method):
    """Generative low-bitwidth data-free quantization (Xu et al., ECCV 2020)."""

    tasks = {"classify", "segment"}
    needs = {"statistics", "labels"}
    quick = {"warmup_epochs": 1, "calibration_epochs": 1}

    class Config(TrainingConfig):
        source = "the authors' code, CIFAR"

        warmup_epochs: int = Field(4, ge=0, unit="epochs", description="epochs in which only the generator trains")
        calibration_epochs: int = Field(4, ge=1, unit="epochs", description="epochs in which activation ranges are tracked; then they are frozen")
        latent_dim: int = Field(100, ge=1, description="width of the generator's noise")
        conditioning: Literal["embedding", "batch-norm"] = Field("embedding", description="how the class enters the generator")
        bn_weight: float = Field(0.1, ge=0, description="weight of the BN-statistics loss")
        kd_weight: float = Field(1.0, ge=0, description="weight of the distillation term")
        temperature: float = Field(20.0, gt=0, description="of the distillation: logits are divided by it")
        generator_lr: float = Field(1e-3, gt=0, description="learning rate of the generator's Adam")

        presets = {"imagenet": dict(batch_size=16, warmup_epochs=50, student_lr=1e-6, conditioning="batch-norm")}

    @property
    def static_step(self) -> bool:
        return True

    def setup(self) -> None:
        c = self.config
        self.generator: nn.Module = self.new_generator()
        self.optimizer = Adam(self.generator.parameters(), lr=c.generator_lr, betas=(0.5, 0.999), fused=True)
        self.schedule(self.optimizer, c.milestones, c.lr_decay)

    def new_generator(self) -> nn.Module:
        return LabelledGenerator(self.task, self.config.latent_dim, self.config.conditioning)

    def phases(self) -> list[Phase]:
        c = self.config
        warmup = min(c.warmup_epochs, c.epochs)
        tracked_later = max(c.calibration_epochs - warmup, 0)
        return [
            Phase("warm-up", warmup, calibration_epochs=c.calibration_epochs),
            Phase("train", c.epochs - warmup, distill=True, calibration_epochs=tracked_later),
        ]

    def synthesize(self) -> Batch:
        c = self.config
        labels = draw_labels(self, c.batch_size)
        images = self.generator(self.draw_noise(c.batch_size, c.latent_dim), labels)
        answer = self.teacher.observe(images)
        asked_loss = self.log("generator_ce", label_loss(self.answers, answer.logits, labels))
        statistics_loss = self.log("generator_bns", batch_norm_loss(answer))
        loss = self.log("generator_loss", asked_loss + c.bn_weight * statistics_loss)
        self.minimise(loss, self.optimizer)
        return Batch(images.detach(), labels, answer.logits.detach())

    def distill(self, student: Student, batch: Batch) -> Tensor:
        assert batch.labels is not None
        logits, labels = choices(self.answers, student(batch.images), batch.labels)
        return distillation_loss(logits, labels, self.answers.rows(batch.teacher_logits), self.config.temperature, self.config.kd_weight)
