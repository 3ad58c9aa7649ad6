"""Optimising the pixels of images, as DeepInversion does (Yin et al., CVPR 2020)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dfqbench import Task


def jitter(images: Tensor, pixels: int, stream: torch.Generator) -> Tensor:
    """The whole batch shifted by up to `pixels` each way, wrapped around, and flipped half of the time; by a stream of the CPU, nothing waits."""
    return drawn_jitter(pixels, stream)(images)


def drawn_jitter(pixels: int, stream: torch.Generator) -> Callable[[Tensor], Tensor]:
    """One such shift and flip, for all that is to go the same way (N x ... x H x W)."""
    draw = torch.rand(3, generator=stream, device=stream.device).tolist()
    down, right = (int((2 * pixels + 1) * d) - pixels for d in draw[:2])

    def moved(maps: Tensor) -> Tensor:
        shifted = torch.roll(maps, (down, right), (-2, -1))
        return shifted.flip(-1) if draw[2] < 0.5 else shifted

    return moved


def roughness(images: Tensor) -> Tensor:
    """Squared differences of neighbouring pixels, summed over an image and averaged over the batch (scalar)."""
    down, right = images[:, :, 1:] - images[:, :, :-1], images[:, :, :, 1:] - images[:, :, :, :-1]
    return (down.square().sum() + right.square().sum()) / len(images)


@torch.no_grad()
def clip_to_pixels(images: Tensor, task: Task) -> None:
    """In place: no value that a real pixel cannot have after normalisation."""
    for channel, (low, high) in enumerate(task.pixel_range()):
        images[:, channel].clamp_(low, high)


def same_class_similarity(features: Tensor, labels: Tensor) -> Tensor:
    """Mean cosine of the features (N x K) of two different images of one class (scalar; 0 where no class has two)."""
    unit = torch.nn.functional.normalize(features, dim=1)
    same = labels[:, None] == labels[None, :]
    same = same & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    return (unit @ unit.T * same).sum() / same.sum().clamp_min(1)
