"""Spatial attention of a feature map: where in the image a network looks (Zagoruyko and Komodakis, ICLR 2017)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def attention_map(features: Tensor, power: float = 2.0) -> Tensor:
    """A_ij = (1/K) sum_k |F_kij|^power: N x K x H x W -> N x H x W, not negative."""
    return features.abs().pow(power).mean(1)


def attention_center(features: Tensor, sharpness: float = 2.0) -> Tensor:
    """The attention map's centre of mass (N x 2: x, y), with pixel centres at (i + 0.5) / size, so in (0, 1).

    The map is shifted to a minimum of 0, scaled to a maximum of 1 and raised to `sharpness` first: the mean position of a flat map
    would be the image's middle whatever the image.
    """
    attention = attention_map(features)
    lowest, highest = attention.amin((1, 2), keepdim=True), attention.amax((1, 2), keepdim=True)
    mass = ((attention - lowest) / (highest - lowest).clamp_min(1e-12)).pow(sharpness)
    mass = mass / mass.sum((1, 2), keepdim=True).clamp_min(1e-12)
    _, height, width = mass.shape
    x = (torch.arange(width, device=mass.device) + 0.5) / width
    y = (torch.arange(height, device=mass.device) + 0.5) / height
    return torch.stack([(mass.sum(1) * x).sum(1), (mass.sum(2) * y).sum(1)], 1)


def attention_distance(first: list[Tensor], second: list[Tensor]) -> Tensor:
    """Mean over stages and images of || A/||A|| - B/||B|| ||^2 between the attention maps of two lists of features (scalar, 0 to 2)."""
    distances = []
    for a, b in zip(first, second, strict=True):
        one, other = (F.normalize(attention_map(f).flatten(1), dim=1) for f in (a, b))
        distances.append((one - other).square().sum(1).mean())
    return torch.stack(distances).mean()


def spread_within(centers: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Root mean square distance of attention centres (N x 2) to the mean centre of their class (scalar, in image sides)."""
    member = F.one_hot(labels, classes).to(centers.dtype)
    means = (member.T @ centers) / member.sum(0).clamp_min(1)[:, None]
    spread: Tensor = (centers - member @ means).square().sum(1).mean().sqrt()
    return spread


def correlation(first: Tensor, second: Tensor) -> Tensor:
    """Pearson correlation of two lists of points (N x 2 each), over both coordinates together (scalar)."""
    a, b = first - first.mean(0), second - second.mean(0)
    found: Tensor = (a * b).sum() / (a.norm() * b.norm()).clamp_min(1e-12)
    return found
