"""ZAQ's loop, the plain way.

Where the published code differs: its ranges never stand still, not in evaluation either, and see real images; its normalisation hands vectors that
were rounded to zero an enormous gradient (see `unit`): its students explode within three steps at W4A4, within sixty at W6A8.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dfqbench import Task
from dfqbench_methods.textbook.loop import Loop, QuantizedReLU


class Generator(nn.Module):
    def __init__(self, task: Task, latent_dim: int):
        super().__init__()
        self.side = task.size // 4
        self.linear = nn.Linear(latent_dim, 128 * self.side**2)
        self.norm0 = nn.BatchNorm2d(128)
        self.block1 = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(128, 128, 3, 1, 1), nn.BatchNorm2d(128), nn.LeakyReLU(0.2))
        self.block2 = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(128, 64, 3, 1, 1), nn.BatchNorm2d(64), nn.LeakyReLU(0.2))
        self.end = nn.Sequential(nn.Conv2d(64, task.channels, 3, 1, 1), nn.Tanh(), nn.BatchNorm2d(task.channels, affine=False))

    def forward(self, noise: Tensor) -> Tensor:
        x = self.linear(noise).view(-1, 128, self.side, self.side)
        images: Tensor = self.end(self.block2(self.block1(self.norm0(x))))
        return images


def unit(features: Tensor) -> Tensor:
    """Unit length over channels. (The public code hands vectors that were rounded to zero a gradient of 1e12: at 4 bits the loss explodes.)"""
    length = features.norm(dim=1, keepdim=True)
    return torch.where(length > 0, features / torch.where(length > 0, length, torch.ones_like(length)), torch.zeros_like(features))


def spatial(x: Tensor, gamma: float) -> Tensor:
    """N x C x P; the P x P matrix is kept for the way back (9)."""
    related = torch.softmax(x.transpose(1, 2) @ x, 2)
    return gamma * (x @ related.transpose(1, 2)) + x


def channel(x: Tensor, gamma: float) -> Tensor:
    energy = x @ x.transpose(1, 2)
    related = torch.softmax(energy.max(2, keepdim=True)[0] - energy, 2)
    return gamma * (related @ x) + x


class RangeToTheEnd(QuantizedReLU):
    """A running minimum and maximum that never stands still."""

    def __init__(self, bits: int):
        super().__init__(bits)
        self.low: Tensor | None = None
        self.high: Tensor | None = None

    def range_of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.low = x.data.min() if self.low is None else torch.minimum(self.low, x.data.min())
        self.high = x.data.max() if self.high is None else torch.maximum(self.high, x.data.max())
        return self.low, self.high


class TextbookZAQ(Loop):
    relu = RangeToTheEnd

    def setup(self) -> None:
        c = self.config
        self.generator = Generator(self.task, c.latent_dim).to(self.device)
        self.generator_optimizer = torch.optim.Adam(self.generator.parameters(), lr=c.generator_lr)
        self.student_optimizer = torch.optim.SGD(self.student.parameters(), lr=c.student_lr, momentum=0.9, weight_decay=c.student_weight_decay)
        self.student.train()
        self.number = 0

    def discrepancy(self, images: Tensor) -> tuple[Tensor, Tensor]:
        answer, logits = self.ask(self.teacher, images), self.ask(self.student, images)
        loss = F.l1_loss(logits, answer)
        for q, p in zip(self.features["student"], self.features["teacher"], strict=True):
            q, p = (unit(f).flatten(2) for f in (q, p))
            for relation in (spatial, channel):
                loss = loss + self.config.relation_weight * F.l1_loss(relation(q, self.config.gamma), relation(p, self.config.gamma))
        return loss, answer

    def step(self, tracking: bool, distilling: bool) -> None:
        c = self.config
        noise = torch.randn(c.batch_size, c.latent_dim, generator=self.stream("noise"), device=self.device)
        loss, answer = self.discrepancy(self.generator(noise).detach())
        self.minimise(loss, self.student_optimizer)
        self.number += 1
        opposed = torch.zeros((), device=self.device)
        if self.number % c.student_steps == 0:
            noise = torch.randn(c.batch_size, c.latent_dim, generator=self.stream("noise"), device=self.device)
            opposed, _ = self.discrepancy(self.generator(noise))
            strength = self.features["teacher"][-1].abs().mean()
            self.minimise(-opposed - c.activation_weight * strength, self.generator_optimizer)
        self.note(opposed, loss, answer, answer.argmax(1))
