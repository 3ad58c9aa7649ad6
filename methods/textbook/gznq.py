"""GZNQ's making of images, the plain way (its students are calibrated, or trained as GDFQ's are). There is no published code: as `gznq` reads the
abstract."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from dfqbench_methods.textbook.loop import Loop


class TextbookGZNQ(Loop):
    """Image mode. Every step is one of a batch's optimisation."""

    def setup(self) -> None:
        self.past: list[Tensor] = []
        self.number = 0
        self.labels = torch.arange(self.config.synthesis_batch, device=self.device) % self.task.classes
        self.images: Tensor | None = None

    def step(self, tracking: bool, distilling: bool) -> None:
        c, size = self.config, self.config.synthesis_batch
        iteration = self.number % c.synthesis_iterations
        if self.images is None:
            self.images = torch.randn(size, *self.task.image_shape, generator=self.stream("noise"), device=self.device).requires_grad_()
            self.labels = self.labels[torch.randperm(size, generator=self.stream("labels"), device=self.device)]
            self.optimizer = torch.optim.Adam([self.images], lr=c.image_lr, betas=(0.5, 0.9))
        self.optimizer.param_groups[0]["lr"] = c.image_lr / 2 * (1 + math.cos(math.pi * iteration / c.synthesis_iterations))
        draw = torch.rand(3, generator=self.stream("jitter"), device=self.device).tolist()
        shift = tuple(int((2 * c.jitter + 1) * d) - c.jitter for d in draw[:2])
        seen = torch.roll(self.images, shift, (2, 3))
        seen = torch.flip(seen, (3,)) if draw[2] < 0.5 else seen
        answer = self.ask(self.teacher, seen)
        found = self.mixed([part for pair in zip(self.means, self.variances, strict=True) for part in pair])
        wanted = [part for pair in self.running[-len(self.means) :] for part in pair]
        statistics = torch.stack([F.mse_loss(f, w) for f, w in zip(found, wanted, strict=True)]).sum() / len(self.means)
        rough = torch.zeros((), device=self.device)
        for image in self.images:
            rough = rough + (image[:, 1:] - image[:, :-1]).pow(2).sum() + (image[:, :, 1:] - image[:, :, :-1]).pow(2).sum()
        loss = F.cross_entropy(answer, self.labels) + c.bn_weight * statistics
        loss = loss + c.roughness_weight * rough / size + c.size_weight * self.images.pow(2).sum() / size
        loss = loss + c.similarity_weight * self.similarity(self.features["teacher"][-1].mean((2, 3)))
        self.minimise(loss, self.optimizer)
        with torch.no_grad():
            for channel, (low, high) in enumerate(self.task.pixel_range()):
                self.images[:, channel].clamp_(low, high)
        self.remember(loss, loss)
        self.number += 1
        if self.number % c.synthesis_iterations == 0:
            with torch.no_grad():
                self.ask(self.teacher, self.images)
                self.past = self.mixed([part for pair in zip(self.means, self.variances, strict=True) for part in pair])
            self.images = None

    def mixed(self, now: list[Tensor]) -> list[Tensor]:
        share = self.config.statistics_momentum
        return [share * before + (1 - share) * new for before, new in zip(self.past, now, strict=True)] if self.past else now

    def similarity(self, features: Tensor) -> Tensor:
        """Pair by pair."""
        total, pairs = torch.zeros((), device=self.device), 0
        for i in range(len(features)):
            for j in range(len(features)):
                if i != j and self.labels[i] == self.labels[j]:
                    total, pairs = total + F.cosine_similarity(features[i], features[j], dim=0), pairs + 1
        return total / max(pairs, 1)
