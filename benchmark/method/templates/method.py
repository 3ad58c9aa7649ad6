"""my-method: what is new about it, in one sentence. Authors, where and when it was published, arXiv number.

    repeat: z ~ N(0, I), y ~ uniform;  x = G(z, y)
            G: minimise CE(P(x), y) + 0.1 L_BNS(x)
            Q: minimise T^2 KL(P(x) || Q(x))       (after the warm-up)

Fidelity: what it follows, and where it differs from that. Reached here: not measured yet.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim import Adam

from dfqbench import Batch, Field, Method, Phase, Student, TrainingConfig, register
from dfqbench_methods.parts.generators import LabelledGenerator
from dfqbench_methods.parts.losses import batch_norm_loss, divergence_loss


@register("my-method", paper="unpublished", fidelity="paper", shares_synthesis=True)
class MyMethod(Method):
    """What is new about it, in one line: this is what `dfqbench methods` shows."""

    needs = {"statistics", "labels"}
    quick = {"warmup_epochs": 1}

    class Config(TrainingConfig):
        source = "chosen by the author"

        warmup_epochs: int = Field(4, ge=1, unit="epochs", description="epochs in which only the generator trains, and ranges are tracked")
        latent_dim: int = Field(100, ge=1, description="width of the generator's noise")
        bn_weight: float = Field(0.1, ge=0, description="weight of the BN-statistics loss", source="GDFQ's code")
        temperature: float = Field(20.0, gt=0, description="of the distillation: logits are divided by it", source="GDFQ's code")
        generator_lr: float = Field(1e-3, gt=0, description="learning rate of the generator's Adam", source="GDFQ's code")

    def setup(self) -> None:
        self.generator = LabelledGenerator(self.task, self.config.latent_dim, "embedding")
        self.optimizer = Adam(self.generator.parameters(), lr=self.config.generator_lr, betas=(0.5, 0.999))
        self.schedule(self.optimizer, self.config.milestones, self.config.lr_decay)

    def phases(self) -> list[Phase]:
        warmup = min(self.config.warmup_epochs, self.config.epochs)
        return [Phase("warm-up", warmup, calibration_epochs=warmup), Phase("train", self.config.epochs - warmup, distill=True)]

    def synthesize(self) -> Batch:
        c = self.config
        labels = self.draw_labels(c.batch_size)
        images = self.generator(self.draw_noise(c.batch_size, c.latent_dim), labels)
        answer = self.teacher.observe(images)
        loss = cross_entropy(answer.logits, labels) + c.bn_weight * batch_norm_loss(answer)
        self.minimise(loss, self.optimizer)
        self.log("generator_loss", loss)
        return Batch(images.detach(), labels, answer.logits.detach())

    def distill(self, student: Student, batch: Batch) -> Tensor:
        return divergence_loss(student(batch.images), batch.teacher_logits, self.config.temperature)
