"""LRQ's loop, the plain way: images one batch after the other, then a generator that sets the ranges, then decoupled distillation."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dfqbench import Task
from dfqbench_methods.parts.augment import crop_and_flip
from dfqbench_methods.textbook.loop import Loop


class LargeKernelAttention(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.first, self.last = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, channels, 1)
        self.near = nn.Conv2d(channels, channels, 5, padding=2, groups=channels)
        self.far = nn.Conv2d(channels, channels, 7, padding=9, dilation=3, groups=channels)
        self.mix = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.gelu(self.first(x))
        result: Tensor = x + self.last(inner * self.mix(self.far(self.near(inner))))
        return result


class LongRangeGenerator(nn.Module):
    """GDFQ's, with attention behind the first upsampling."""

    def __init__(self, task: Task, latent_dim: int):
        super().__init__()
        self.side = task.size // 4
        self.embedding = nn.Embedding(task.classes, latent_dim)
        self.linear = nn.Linear(latent_dim, 128 * self.side**2)
        self.conv1, self.conv2 = nn.Conv2d(128, 128, 3, 1, 1), nn.Conv2d(128, 64, 3, 1, 1)
        self.conv3 = nn.Conv2d(64, task.channels, 3, 1, 1)
        self.norm0, self.norm1, self.norm2 = nn.BatchNorm2d(128), nn.BatchNorm2d(128, 0.8), nn.BatchNorm2d(64, 0.8)
        self.norm3 = nn.BatchNorm2d(task.channels, affine=False)
        self.attention = LargeKernelAttention(128)

    def forward(self, noise: Tensor, labels: Tensor) -> Tensor:
        x = self.norm0(self.linear(self.embedding(labels) * noise).view(-1, 128, self.side, self.side))
        x = self.attention(F.interpolate(x, scale_factor=2))
        x = F.leaky_relu(self.norm1(self.conv1(x)), 0.2)
        x = F.leaky_relu(self.norm2(self.conv2(F.interpolate(x, scale_factor=2))), 0.2)
        images: Tensor = self.norm3(torch.tanh(self.conv3(x)))
        return images


class TextbookLRQ(Loop):
    """A step optimises images, or tracks ranges on the generator's (`tracking`), or trains on the stored ones (`distilling`)."""

    def setup(self) -> None:
        c = self.config
        self.generator = LongRangeGenerator(self.task, c.latent_dim).to(self.device)
        self.generator_optimizer = torch.optim.Adam(self.generator.parameters(), lr=c.generator_lr, betas=(0.5, 0.999))
        self.student_optimizer = torch.optim.SGD(self.student.parameters(), lr=c.student_lr, momentum=0.9, weight_decay=1e-4, nesterov=True)
        self.stored: list[tuple[Tensor, Tensor, Tensor]] = []  # images, labels, pooled features
        self.images: Tensor | None = None
        self.number = 0
        self.order: list[int] = []

    def step(self, tracking: bool, distilling: bool) -> None:
        if tracking:
            self.calibrate()
        elif distilling:
            self.train()
        else:
            self.optimise()

    def optimise(self) -> None:
        c, size = self.config, self.config.synthesis_batch
        if self.images is None:
            noise = torch.randn(size, *self.task.image_shape, generator=self.stream("noise"), device=self.device)
            self.images = noise.requires_grad_()
            self.labels = torch.randint(self.task.classes, (size,), generator=self.stream("labels"), device=self.device)
            chance, height = torch.rand(2, size, generator=self.stream("targets"), device=self.device)
            self.targets = torch.where(chance < 0.5, torch.ones_like(height), c.target_low + (1 - c.target_low) * height)
            self.optimizer = torch.optim.Adam([self.images], lr=c.image_lr)
            self.plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(self.optimizer, factor=0.1, patience=50, min_lr=1e-4)
        seen = self.images
        if torch.rand((), generator=self.stream("augment"), device=self.device).item() < 0.5:
            seen = crop_and_flip(self.images, self.stream("crops"), c.smallest_crop)
        answer = self.ask(self.teacher, seen)
        probability = F.softmax(answer, 1)[torch.arange(size), self.labels]
        loss = self.statistics_loss() + F.mse_loss(probability, self.targets) + self.bounds(self.features["teacher"][-1].mean((2, 3)))
        self.minimise(loss, self.optimizer)
        self.plateau.step(loss.item())
        self.remember(loss, loss)
        self.number += 1
        if self.number % c.synthesis_iterations == 0:
            images = self.images.detach()
            with torch.no_grad():
                self.ask(self.teacher, images)
            self.stored.append((images, self.labels, self.features["teacher"][-1].mean((2, 3))))
            self.images = None

    def bounds(self, features: Tensor) -> Tensor:
        """Image by image: the angle to the centre of its class, the margin added, must lie within the bounds."""
        c, terms = self.config, []
        for feature, label in zip(features, self.labels, strict=True):
            known = [f[labels == label] for _, labels, f in self.stored]
            if not known or not sum(map(len, known)):
                continue
            angle = torch.acos(torch.clamp(F.cosine_similarity(feature, torch.cat(known).mean(0), dim=0), -1 + 1e-6, 1 - 1e-6))
            distance = 1 - torch.cos(angle + c.margin)
            terms.append(F.relu(c.closest - distance) + F.relu(distance - c.farthest))
        return torch.stack(terms).sum() / (len(terms) + 1e-6) if terms else torch.zeros((), device=self.device)

    def calibrate(self) -> None:
        self.track(True)
        labels = torch.randint(self.task.classes, (self.config.batch_size,), generator=self.stream("labels"), device=self.device)
        noise = torch.randn(self.config.batch_size, self.config.latent_dim, generator=self.stream("noise"), device=self.device)
        images = self.generator(noise, labels)
        answer = self.ask(self.teacher, images)
        loss = F.cross_entropy(answer, labels) + self.config.bn_weight * self.statistics_loss()
        self.minimise(loss, self.generator_optimizer)
        logits = self.ask(self.student, images.detach())  # (5)
        self.note(loss, logits.mean(), answer, labels)

    def train(self) -> None:
        self.track(False)
        every, labels = torch.cat([s[0] for s in self.stored]), torch.cat([s[1] for s in self.stored])
        size = min(self.config.batch_size, len(every))
        if len(self.order) < size:
            self.order = torch.randperm(len(every), generator=self.stream("order"), device=self.device).tolist()
        chosen, self.order = self.order[:size], self.order[size:]
        images, labels = crop_and_flip(every[chosen], self.stream("crops"), self.config.smallest_crop), labels[chosen]
        answer = self.ask(self.teacher, images).detach()
        logits = self.ask(self.student, images)
        loss = F.cross_entropy(logits, labels) + self.decoupled(logits, answer, labels)
        self.minimise(loss, self.student_optimizer)
        self.note(loss, loss, answer, labels)

    def decoupled(self, logits: Tensor, answer: Tensor, labels: Tensor) -> Tensor:
        """alpha TCKD + beta NCKD at temperature 1, the classes one after the other."""
        q, p = F.softmax(logits, 1), F.softmax(answer, 1)
        target, other = torch.zeros((), device=self.device), torch.zeros((), device=self.device)
        for n, label in enumerate(labels.tolist()):
            q_y, p_y = q[n, label], p[n, label]
            target = target + p_y * torch.log(p_y / q_y) + (1 - p_y) * torch.log((1 - p_y) / (1 - q_y))
            rest = [k for k in range(self.task.classes) if k != label]
            q_rest, p_rest = F.softmax(logits[n, rest], 0), F.softmax(answer[n, rest], 0)
            other = other + (p_rest * torch.log(p_rest / q_rest)).sum()
        result: Tensor = (self.config.target_weight * target + self.config.other_weight * other) / len(labels)
        return result
