"""ACQ's loop, the plain way: GDFQ's, and the four components one after the other. (There is no published code: as `acq` reads the abstracts.)"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dfqbench import Task
from dfqbench_methods.textbook.gdfq import TextbookGDFQ


class PlacedGenerator(nn.Module):
    """The condition enters the latent, and both blocks through a bump around it and the bump's complement."""

    def __init__(self, task: Task, center_dim: int):
        super().__init__()
        self.side = task.size // 4
        self.embedding = nn.Embedding(task.classes, 100)
        self.center = nn.Linear(2, center_dim)
        self.linear = nn.Linear(100 + center_dim, 128 * self.side**2)
        self.norm0 = nn.BatchNorm2d(128)
        self.conv1, self.norm1 = nn.Conv2d(130, 128, 3, 1, 1), nn.BatchNorm2d(128, 0.8)
        self.conv2, self.norm2 = nn.Conv2d(130, 64, 3, 1, 1), nn.BatchNorm2d(64, 0.8)
        self.conv3, self.norm3 = nn.Conv2d(64, task.channels, 3, 1, 1), nn.BatchNorm2d(task.channels, affine=False)

    @staticmethod
    def with_place(x: Tensor, centers: Tensor) -> Tensor:
        side = x.shape[-1]
        ticks = (torch.arange(side, device=x.device, dtype=x.dtype) + 0.5) / side
        squared = (ticks.view(1, 1, side) - centers[:, 0].view(-1, 1, 1)) ** 2 + (ticks.view(1, side, 1) - centers[:, 1].view(-1, 1, 1)) ** 2
        near = 3 * torch.exp(-squared / (2 * 0.15**2)).unsqueeze(1)
        return torch.cat([x, near, 3 - near], 1)

    def forward(self, noise: Tensor, labels: Tensor, centers: Tensor) -> Tensor:
        latent = torch.cat([self.embedding(labels) * noise, F.leaky_relu(self.center(centers), 0.2)], 1)
        x = self.norm0(self.linear(latent).view(-1, 128, self.side, self.side))
        for conv, norm in ((self.conv1, self.norm1), (self.conv2, self.norm2)):
            x = F.interpolate(self.with_place(x, centers), scale_factor=2)  # (3)
            x = F.leaky_relu(norm(conv(x)), 0.2)
        images: Tensor = self.norm3(torch.tanh(self.conv3(x)))
        return images


def attention(features: Tensor) -> Tensor:
    return (features**2).mean(1)


def center(features: Tensor, sharpness: float) -> Tensor:
    """The centre of mass of the attention map, image by image."""
    found = []
    for one in attention(features):
        mass = ((one - one.min()) / (one.max() - one.min())) ** sharpness
        mass = mass / mass.sum()
        ticks = (torch.arange(len(one), device=one.device, dtype=one.dtype) + 0.5) / len(one)
        found.append(torch.stack([(mass.sum(0) * ticks).sum(), (mass.sum(1) * ticks).sum()]))
    return torch.stack(found)


class TextbookACQ(TextbookGDFQ):
    """With the condition, pairs and all four components."""

    def setup(self) -> None:
        self.generator = PlacedGenerator(self.task, self.config.center_dim).to(self.device)
        self.generator_optimizer = torch.optim.Adam(self.generator.parameters(), lr=1e-3, betas=(0.5, 0.999))
        self.student_optimizer = torch.optim.SGD(self.student.parameters(), lr=1e-4, momentum=0.9, weight_decay=1e-4, nesterov=True)

    def step(self, tracking: bool, distilling: bool) -> None:
        c, half = self.config, self.config.batch_size // 2
        self.track(tracking)
        labels = torch.randint(self.task.classes, (half,), generator=self.stream("labels"), device=self.device).repeat(2)
        places = c.center_margin + (1 - 2 * c.center_margin) * torch.rand(half, 2, generator=self.stream("centers"), device=self.device)
        places = places.repeat(2, 1)
        noise = torch.randn(c.batch_size, 100, generator=self.stream("noise"), device=self.device)
        images = self.generator(noise, labels, places)
        answer = self.ask(self.teacher, images)
        loss = F.cross_entropy(answer, labels) + 0.1 * self.statistics_loss()
        in_eval = list(self.features["teacher"])
        loss = loss + c.matching_weight * ((center(in_eval[-1], c.sharpness) - places) ** 2).sum(1).mean()
        pairs = in_eval[-1].reshape(c.batch_size, -1)
        loss = loss + c.adversarial_weight * F.cosine_similarity(pairs[:half], pairs[half:]).mean()
        for module in self.teacher.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.train()
                module.momentum = 0.0
        self.ask(self.teacher, images)
        self.teacher.eval()
        distance = torch.zeros((), device=self.device)
        for one, other in zip(in_eval, self.features["teacher"], strict=True):
            a, b = (F.normalize(attention(f).reshape(c.batch_size, -1), dim=1) for f in (one, other))
            distance = distance + ((a - b) ** 2).sum(1).mean() / len(in_eval)
        loss = loss + c.consistency_weight * distance
        self.minimise(loss, self.generator_optimizer)
        self.note(loss, self.distil(images.detach(), answer.detach(), labels, distilling), answer, labels)
