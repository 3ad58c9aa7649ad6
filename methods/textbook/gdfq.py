"""GDFQ's loop, the plain way.

Where the published code differs: its moving average of ranges divides an average that is corrected already, see `loop`; at its 800 updates both end
alike. It reports the best epoch on the test set.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dfqbench import Task
from dfqbench_methods.textbook.loop import Loop


class Generator(nn.Module):
    """GDFQ's for images of a size that 4 divides, one layer after the other."""

    def __init__(self, task: Task, latent_dim: int = 100):
        super().__init__()
        self.side = task.size // 4
        self.embedding = nn.Embedding(task.classes, latent_dim)
        self.linear = nn.Linear(latent_dim, 128 * self.side**2)
        self.norm0 = nn.BatchNorm2d(128)
        self.block1 = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(128, 128, 3, 1, 1), nn.BatchNorm2d(128, 0.8), nn.LeakyReLU(0.2))
        self.block2 = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(128, 64, 3, 1, 1), nn.BatchNorm2d(64, 0.8), nn.LeakyReLU(0.2))
        self.end = nn.Sequential(nn.Conv2d(64, task.channels, 3, 1, 1), nn.Tanh(), nn.BatchNorm2d(task.channels, affine=False))

    def forward(self, noise: Tensor, labels: Tensor) -> Tensor:
        x = self.linear(self.embedding(labels) * noise).view(-1, 128, self.side, self.side)
        images: Tensor = self.end(self.block2(self.block1(self.norm0(x))))
        return images


class TextbookGDFQ(Loop):
    def setup(self) -> None:
        self.generator: nn.Module = Generator(self.task).to(self.device)
        self.generator_optimizer = torch.optim.Adam(self.generator.parameters(), lr=1e-3, betas=(0.5, 0.999))
        self.student_optimizer = torch.optim.SGD(self.student.parameters(), lr=1e-4, momentum=0.9, weight_decay=1e-4, nesterov=True)

    def step(self, tracking: bool, distilling: bool) -> None:
        self.track(tracking)
        labels = torch.randint(self.task.classes, (self.config.batch_size,), generator=self.stream("labels"), device=self.device)
        noise = torch.randn(self.config.batch_size, 100, generator=self.stream("noise"), device=self.device)
        images = self.generator(noise, labels)
        answer = self.ask(self.teacher, images)
        generator_loss = F.cross_entropy(answer, labels) + 0.1 * self.statistics_loss()
        self.minimise(generator_loss, self.generator_optimizer)
        self.note(generator_loss, self.distil(images.detach(), answer.detach(), labels, distilling), answer, labels)

    def distil(self, images: Tensor, answer: Tensor, labels: Tensor, distilling: bool) -> Tensor:
        logits = self.ask(self.student, images)  # (5)
        divergence = F.kl_div(F.log_softmax(logits / 20.0, 1), F.softmax(answer / 20.0, 1), reduction="none").mean()
        loss = self.label_loss(logits, labels) + 20.0 * 20.0 * divergence
        if distilling:
            self.minimise(loss, self.student_optimizer)
        return loss

    def label_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels)
