"""ZAQ's structural comparison of feature maps: spatial and channel relations (spec section 8)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def spatial_relation(x: Tensor, gamma: float = 0.1) -> Tensor:
    """S(f) = gamma X A^T + f with A = softmax(X^T X) over positions: N x C x P -> N x C x P.

    That is scaled-dot-product attention of the positions to each other with scale 1, so the P x P matrix is never kept.
    """
    positions = x.transpose(1, 2)[:, None]
    related = F.scaled_dot_product_attention(positions, positions, positions, scale=1.0)
    return gamma * related[:, 0].transpose(1, 2) + x


def channel_relation(x: Tensor, gamma: float = 0.1) -> Tensor:
    """Ch(f) = gamma A X + f with A = softmax(max_row(E) - E), E = X X^T over channels: N x C x P -> N x C x P.

    The row maximum only shifts the softmax: A = softmax(-E).
    """
    return gamma * torch.softmax(-(x @ x.transpose(1, 2)), 2) @ x + x


def pooled(features: Tensor, largest: int) -> Tensor:
    """N x C x H x W averaged over equal windows, so that no side is longer than `largest`; unchanged where none is.

    (Windows of one size: the backward pass of torch's adaptive pooling is not deterministic on a GPU.)
    """
    window = [-(-side // largest) for side in features.shape[2:]]
    return features if max(window) == 1 else F.avg_pool2d(features, window, ceil_mode=True, count_include_pad=False)


def channel_normalised(features: Tensor) -> Tensor:
    """Unit length over channels: N x C x H x W; a vector of zeros stays one, and gets no gradient.

    (Division by a length clamped at 1e-12 would hand it a gradient of 1e12, and at few bits many vectors are rounded to zero.)
    """
    length = torch.linalg.vector_norm(features, dim=1, keepdim=True)
    unit: Tensor = features * (length > 0) / length.clamp_min(1e-12)
    return unit


def relation_loss(students: list[Tensor], teachers: list[Tensor], gamma: float = 0.1) -> Tensor:
    """SCRM: sum over stages of mean |S(f_Q) - S(f_P)| + mean |Ch(f_Q) - Ch(f_P)| (scalar); features N x C x H x W, normalised over channels first."""
    total = students[0].new_zeros(())
    for student, teacher in zip(students, teachers, strict=True):
        q, p = (channel_normalised(f).flatten(2) for f in (student, teacher))
        for relation in (spatial_relation, channel_relation):
            total = total + (relation(q, gamma) - relation(p, gamma)).abs().mean()
    return total
