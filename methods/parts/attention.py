"""Spatial attention of a feature map: where in the image a network looks (Zagoruyko and Komodakis, ICLR 2017), and where it finds a class there
(Zhou et al., CVPR 2016)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dfqbench import Teacher


def attention_map(features: Tensor, power: float = 2.0) -> Tensor:
    """A_ij = (1/K) sum_k |F_kij|^power: N x K x H x W -> N x H x W, not negative."""
    return features.abs().pow(power).mean(1)


def classifier_weight(teacher: Teacher) -> Tensor:
    """The weight of the teacher's last layer, classes x width of its input (a 1x1 convolution's too)."""
    layers = [m for m in teacher.modules() if isinstance(m, nn.Linear | nn.Conv2d) and m.weight.shape[0] == teacher.task.classes]
    return layers[-1].weight.detach().flatten(1)


def class_activation_map(features: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """How much each position speaks for its image's class: sum_k w_yk F_kij, N x K x H x W and labels (N) -> N x H x W, of either sign.

    weight: classes x K. Where a network pools all positions and has one linear layer behind, the map's mean is that class's logit, but for its bias.
    """
    return torch.einsum("nkhw,nk->nhw", features, weight[labels].to(features.dtype))


@torch.no_grad()
def has_class_activation_maps(teacher: Teacher, images: Tensor) -> bool:
    """Whether logits of two images (2 x C x S x S) differ as the means of their class activation maps do: then the maps add up to the logits."""
    if teacher.task.kind != "classify":
        return False
    answer, weight = teacher.observe(images), classifier_weight(teacher)
    pooled = answer.features[-1].mean((2, 3))
    if pooled.shape[1] != weight.shape[1]:
        return False
    return torch.allclose((pooled[0] - pooled[1]) @ weight.T, answer.logits[0] - answer.logits[1], rtol=1e-2, atol=1e-2)


def attention_mass(attention: Tensor, sharpness: float = 2.0) -> Tensor:
    """What a map (N x H x W) puts where: not negative, and adding up to 1 in each image.

    The map is shifted to a minimum of 0, scaled to a maximum of 1 and raised to `sharpness` first: the mean position of a flat map
    would be the image's middle whatever the image.
    """
    lowest, highest = attention.amin((1, 2), keepdim=True), attention.amax((1, 2), keepdim=True)
    mass = ((attention - lowest) / (highest - lowest).clamp_min(1e-12)).pow(sharpness)
    return mass / mass.sum((1, 2), keepdim=True).clamp_min(1e-12)


def attention_center(features: Tensor, sharpness: float = 2.0) -> Tensor:
    """The attention map's centre of mass (N x 2: x, y), see `attention_mass` and `center_of_mass`."""
    return center_of_mass(attention_mass(attention_map(features), sharpness))


def center_of_mass(mass: Tensor) -> Tensor:
    """N x H x W that adds up to 1 -> N x 2 (x, y), with pixel centres at (i + 0.5) / size, so in (0, 1)."""
    _, height, width = mass.shape
    x = (torch.arange(width, device=mass.device) + 0.5) / width
    y = (torch.arange(height, device=mass.device) + 0.5) / height
    return torch.stack([(mass.sum(1) * x).sum(1), (mass.sum(2) * y).sum(1)], 1)


def cell_mass(mass: Tensor, cells: int) -> Tensor:
    """How much of a mass (N x H x W) lies in each of `cells` x `cells` equal parts of the image: N x cells x cells, with the same sum.

    A position that lies in several cells is shared out by area.
    """

    def shares(count: int) -> Tensor:
        """cells x count: how much of each position lies in each cell, along one side."""
        edges = torch.arange(cells, device=mass.device, dtype=mass.dtype)[:, None] / cells
        places = torch.arange(count, device=mass.device, dtype=mass.dtype) / count
        overlap = torch.minimum(edges + 1 / cells, places + 1 / count) - torch.maximum(edges, places)
        return overlap.clamp_min(0) * count

    return shares(mass.shape[1]) @ mass @ shares(mass.shape[2]).T


def cell_loss(mass: Tensor, centers: Tensor, cells: int) -> Tensor:
    """Cross-entropy between the cell in which a point lies (N x 2: x, y) and the mass (N x H x W) in each cell (scalar)."""
    x, y = (centers * cells).long().clamp(0, cells - 1).unbind(1)
    wanted = cell_mass(mass, cells).flatten(1).gather(1, (y * cells + x)[:, None])
    return -wanted.clamp_min(1e-12).log().mean()


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
