"""IntraQ's loop, the plain way: images one batch after the other, then a generator that sets the ranges, then students on the stored images.

Where the published code differs: it drops the last of the stored images, up to 63, from the centres of their classes, and draws features of other
classes that nothing reads; neither is done here. It crops image by image; the crops here are those of `parts.augment`. Ranges as in `loop`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dfqbench_methods.parts.augment import crop_and_flip
from dfqbench_methods.textbook.gdfq import Generator
from dfqbench_methods.textbook.loop import Loop


class TextbookIntraQ(Loop):
    """A step optimises images, or tracks ranges on the generator's (`tracking`), or trains on the stored ones (`distilling`)."""

    def setup(self) -> None:
        c = self.config
        self.generator = self.new_generator().to(self.device)
        self.generator_optimizer = torch.optim.Adam(self.generator.parameters(), lr=c.generator_lr, betas=(0.5, 0.999))
        self.student_optimizer = torch.optim.SGD(self.student.parameters(), lr=c.student_lr, momentum=0.9, weight_decay=1e-4, nesterov=True)
        self.stored: list[tuple[Tensor, Tensor, Tensor]] = []  # images, labels, pooled features
        self.images: Tensor | None = None
        self.number = 0
        self.order: list[int] = []

    def new_generator(self) -> nn.Module:
        return Generator(self.task, self.config.latent_dim)

    def decay(self, factor: float) -> None:
        """The generator has finished by then."""
        for group in self.student_optimizer.param_groups:
            group["lr"] *= factor

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
        """Image by image: the distance to the centre of its class must lie within the bounds."""
        c, terms = self.config, []
        for feature, label in zip(features, self.labels, strict=True):
            known = [f[labels == label] for _, labels, f in self.stored]
            if not known or not sum(map(len, known)):
                continue
            distance = self.distance(F.cosine_similarity(feature, torch.cat(known).mean(0), dim=0))
            terms.append(F.relu(c.closest - distance) + F.relu(distance - c.farthest))
        return torch.stack(terms).sum() / (len(terms) + 1e-6) if terms else torch.zeros((), device=self.device)

    def distance(self, cosine: Tensor) -> Tensor:
        return 1 - cosine

    def images_to_calibrate(self) -> int:
        return int(self.config.calibration_batch)

    def calibrate(self) -> None:
        self.track(True)
        count = self.images_to_calibrate()
        labels = torch.randint(self.task.classes, (count,), generator=self.stream("labels"), device=self.device)
        noise = torch.randn(count, self.config.latent_dim, generator=self.stream("noise"), device=self.device)
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
        loss = F.cross_entropy(logits, labels) + self.distillation(logits, answer, labels)
        self.minimise(loss, self.student_optimizer)
        self.note(loss, loss, answer, labels)

    def distillation(self, logits: Tensor, answer: Tensor, labels: Tensor) -> Tensor:
        divergence = F.kl_div(F.log_softmax(logits / 20.0, 1), F.softmax(answer / 20.0, 1), reduction="batchmean")
        return 20.0 * 20.0 * 20.0 * divergence
