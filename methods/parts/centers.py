"""Where a class lies in the teacher's feature space, and how far an image may be from there (IntraQ, CVPR 2022; LRQ, 2023)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity


class ClassCenters(nn.Module):
    """The mean feature of each class over all images that were added.

    sums: classes x K. counts: classes.
    """

    def __init__(self, classes: int, width: int):
        super().__init__()
        self.register_buffer("sums", torch.zeros(classes, width))
        self.register_buffer("counts", torch.zeros(classes))
        self.sums: Tensor
        self.counts: Tensor

    @torch.no_grad()
    def add(self, features: Tensor, labels: Tensor) -> None:
        """Takes in features (N x K) with their labels (N)."""
        self.sums.index_add_(0, labels, features.to(self.sums.dtype))
        self.counts.index_add_(0, labels, torch.ones_like(labels, dtype=self.counts.dtype))

    def bound_loss(self, features: Tensor, labels: Tensor, closest: float, farthest: float, margin: float = 0.0) -> Tensor:
        """[closest - d]_+ + [d - farthest]_+ with d = 1 - cos(angle + margin), averaged over the images whose class has a centre (scalar).

        The angle is that between an image's feature (N x K) and its class's centre; `margin` is in radians.
        """
        known = self.counts[labels] > 0
        centers = self.sums[labels] / self.counts[labels].clamp_min(1)[:, None]
        cosine = cosine_similarity(features, centers).clamp(-1 + 1e-6, 1 - 1e-6)  # the root's gradient is infinite at 1
        distance = 1 - (cosine * math.cos(margin) - (1 - cosine.square()).sqrt() * math.sin(margin))
        outside = (closest - distance).clamp_min(0) + (distance - farthest).clamp_min(0)
        loss: Tensor = (known * outside).sum() / (known.sum() + 1e-6)
        return loss
