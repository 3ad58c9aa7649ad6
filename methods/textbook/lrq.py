"""LRQ's loop, the plain way: IntraQ's with a margin, another generator and decoupled distillation.

Where the published code differs: it clamps no cosine (the root's gradient is infinite at 1), and for CIFAR one of its two programs has no
attention block. Its paper lets the generator's images train the student; in its code, as here, they set the ranges alone.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dfqbench import Task
from dfqbench_methods.textbook.gdfq import Generator
from dfqbench_methods.textbook.intraq import TextbookIntraQ


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
    """GDFQ's, with attention behind the first upsampling or the first block."""

    def __init__(self, task: Task, latent_dim: int, place: str):
        super().__init__()
        self.place = place
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
        x = F.interpolate(x, scale_factor=2)
        x = self.attention(x) if self.place == "before" else x
        x = F.leaky_relu(self.norm1(self.conv1(x)), 0.2)
        x = self.attention(x) if self.place == "after" else x
        x = F.leaky_relu(self.norm2(self.conv2(F.interpolate(x, scale_factor=2))), 0.2)
        images: Tensor = self.norm3(torch.tanh(self.conv3(x)))
        return images


class TextbookLRQ(TextbookIntraQ):
    def new_generator(self) -> nn.Module:
        c = self.config
        return Generator(self.task, c.latent_dim) if c.attention == "none" else LongRangeGenerator(self.task, c.latent_dim, c.attention)

    def distance(self, cosine: Tensor) -> Tensor:
        """The margin is added to the angle."""
        return 1 - torch.cos(torch.acos(torch.clamp(cosine, -1 + 1e-6, 1 - 1e-6)) + self.config.margin)

    def images_to_calibrate(self) -> int:
        return int(self.config.batch_size)

    def distillation(self, logits: Tensor, answer: Tensor, labels: Tensor) -> Tensor:
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
