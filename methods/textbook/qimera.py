"""Qimera's loop, the plain way: GDFQ's with noisy embeddings instead of labels, and now and then several of them, slot by slot.

Where the published code differs from its paper: for ImageNet its class-conditional norms average over the K classes of a mixture (`mean`, here
as there) where a sum is meant. Ranges as in `loop`. Its log line that compares labels of different shapes is left out.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dfqbench import Task
from dfqbench_methods.textbook.gdfq import TextbookGDFQ


class ConditionalNorm(nn.Module):
    """Scale and shift of each class; those of a mixture slot by slot."""

    def __init__(self, channels: int, classes: int, eps: float):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, eps, affine=False)
        self.scales, self.shifts = nn.Parameter(torch.ones(classes, channels)), nn.Parameter(torch.zeros(classes, channels))

    def forward(self, x: Tensor, labels: Tensor, shares: Tensor) -> Tensor:
        """labels, shares: N x K."""
        scale, shift = torch.zeros_like(x[:, :, 0, 0]), torch.zeros_like(x[:, :, 0, 0])
        for slot in range(labels.shape[1]):
            scale = scale + shares[:, slot, None] * self.scales[labels[:, slot]] / labels.shape[1]
            shift = shift + shares[:, slot, None] * self.shifts[labels[:, slot]] / labels.shape[1]
        placed: Tensor = self.norm(x) * scale[:, :, None, None] + shift[:, :, None, None]
        return placed


class Generator(nn.Module):
    """GDFQ's from a latent vector, with plain norms or class-conditional ones."""

    def __init__(self, task: Task, latent_dim: int, by_class: bool):
        super().__init__()
        self.side, self.by_class = task.size // 4, by_class
        self.linear = nn.Linear(latent_dim, 128 * self.side**2)
        self.conv1, self.conv2, self.conv3 = (nn.Conv2d(a, b, 3, 1, 1) for a, b in ((128, 128), (128, 64), (64, task.channels)))
        shapes = ((128, 1e-5), (128, 0.8), (64, 0.8))
        self.norms = nn.ModuleList(ConditionalNorm(n, task.classes, eps) if by_class else nn.BatchNorm2d(n, eps) for n, eps in shapes)
        self.last = nn.BatchNorm2d(task.channels, affine=False)

    def forward(self, latent: Tensor, labels: Tensor, shares: Tensor) -> Tensor:
        asked = (labels, shares) if self.by_class else ()
        norm0, norm1, norm2 = self.norms
        x = norm0(self.linear(latent).view(-1, 128, self.side, self.side), *asked)
        x = F.leaky_relu(norm1(self.conv1(F.interpolate(x, scale_factor=2)), *asked), 0.2)  # (3)
        x = F.leaky_relu(norm2(self.conv2(F.interpolate(x, scale_factor=2)), *asked), 0.2)
        images: Tensor = self.last(torch.tanh(self.conv3(x)))
        return images


class TextbookQimera(TextbookGDFQ):
    def setup(self) -> None:
        c = self.config
        start = self.teacher.get_submodule("linear").weight.detach().clone()  # type: ignore[operator, union-attr]
        if c.embedding == "random":
            start = torch.randn(start.shape, device=self.device)
        self.table = nn.Parameter(start)
        self.generator = Generator(self.task, start.shape[1], c.conditioning == "batch-norm").to(self.device)
        self.generator_optimizer = torch.optim.Adam([self.table, *self.generator.parameters()], lr=1e-3, betas=(0.5, 0.999))
        self.student_optimizer = torch.optim.SGD(self.student.parameters(), lr=1e-4, momentum=0.9, weight_decay=1e-4, nesterov=True)

    def step(self, tracking: bool, distilling: bool) -> None:
        c, size, width = self.config, self.config.batch_size, self.table.shape[1]
        self.track(tracking)
        mixing = torch.rand((), generator=self.stream("mixing"), device=self.device).item() < c.mixing
        slots = c.mixed_classes if mixing else 1
        labels = torch.randint(self.task.classes, (size * slots,), generator=self.stream("labels"), device=self.device).view(size, slots)
        noise = torch.randn(*((size, slots, width) if mixing else (size, width)), generator=self.stream("noise"), device=self.device)
        shares = torch.ones(size, 1, device=self.device)
        if mixing:
            shares = F.softmax(torch.randn(size, slots, generator=self.stream("shares"), device=self.device), 1)
            latent = torch.zeros(size, width, device=self.device)
            for slot in range(slots):  # normalised over the batch and the width together
                latent = latent + shares[:, slot, None] * F.layer_norm(self.table[labels[:, slot]] + noise[:, slot], (size, width))
        else:
            latent = F.layer_norm(self.table[labels[:, 0]] + noise, (width,))
        self.targets = torch.zeros(size, self.task.classes, device=self.device)
        for image in range(size):
            for slot in range(slots):
                self.targets[image, labels[image, slot]] += shares[image, slot]
        images = self.generator(latent, labels, shares)
        answer = self.ask(self.teacher, images)
        loss = self.soft_entropy(answer) + 0.1 * self.statistics_loss()
        self.minimise(loss, self.generator_optimizer)
        self.note(loss, self.distil(images.detach(), answer.detach(), labels, distilling), answer, self.targets.argmax(1))

    def soft_entropy(self, logits: Tensor) -> Tensor:
        return -(self.targets * F.log_softmax(logits, 1)).sum(1).mean()

    def label_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return self.soft_entropy(logits)
