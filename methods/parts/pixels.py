"""Optimising the pixels of images, as DeepInversion does (Yin et al., CVPR 2020)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dfqbench import Method, Task


class OptimisesBatches(Method):
    """Makes batches of images one after the other, by `synthesis_iterations` steps on each. A subclass writes `begin_batch`."""

    iteration = 0  # of the step on the batch in hand, from 1 on

    @property
    def static_step(self) -> bool:
        """On a CPU the optimizer of the images is not torch's fused one."""
        return self.device.type == "cuda"

    @property
    def finishes_batch(self) -> bool:
        """Whether the step in hand is the last on its batch."""
        return bool(self.iteration == self.config.synthesis_iterations)

    def next_iteration(self) -> int:
        """For `before_step`: begins a batch where the last one is finished; how many steps were done on it."""
        done: int = self.iteration % self.config.synthesis_iterations
        if done == 0:
            self.begin_batch()
        self.iteration = done + 1
        return done

    def begin_batch(self) -> None:
        """Fills what the steps start from, in place."""
        raise NotImplementedError


def jitter(images: Tensor, pixels: int, stream: torch.Generator) -> Tensor:
    """The whole batch shifted by up to `pixels` each way, wrapped around, and flipped half of the time. Nothing waits for the device."""
    return drawn_jitter(pixels, stream)(images)


def drawn_jitter(pixels: int, stream: torch.Generator) -> Callable[[Tensor], Tensor]:
    """One such shift and flip, for all that is to go the same way (N x ... x H x W).

    A stream of a GPU is left there: shift and flip are indices, and the same operations every time.
    """
    draw = torch.rand(3, generator=stream, device=stream.device)
    if stream.device.type == "cuda":
        return lambda maps: _Moved.apply(maps, ((2 * pixels + 1) * draw[:2]).long() - pixels, draw[2] < 0.5)  # type: ignore[no-any-return]
    (down, right), flips = (int((2 * pixels + 1) * d) - pixels for d in draw[:2].tolist()), draw[2].item() < 0.5

    def moved(maps: Tensor) -> Tensor:
        shifted = torch.roll(maps, (down, right), (-2, -1))
        return shifted.flip(-1) if flips else shifted

    return moved


class _Moved(torch.autograd.Function):
    """Rolled by a shift (down, right) and, where `flips`, mirrored: by indices, and the gradient by those that go back."""

    @staticmethod
    def forward(ctx: Any, maps: Tensor, shift: Tensor, flips: Tensor) -> Tensor:
        height, width = maps.shape[-2:]
        rows, columns = torch.arange(height, device=maps.device), torch.arange(width, device=maps.device)
        seen = torch.where(flips, width - 1 - columns, columns)
        back = (columns + shift[1]) % width
        ctx.back = (rows + shift[0]) % height, torch.where(flips, width - 1 - back, back)
        return _laid(maps[..., ((rows - shift[0]) % height)[:, None], (seen - shift[1]) % width])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        rows, columns = ctx.back
        return _laid(gradient[..., rows[:, None], columns]), None, None


def _laid(maps: Tensor) -> Tensor:
    return maps.contiguous(memory_format=torch.channels_last) if maps.dim() == 4 else maps


@torch.no_grad()
def start_anew(optimizer: Optimizer) -> None:
    """As if the optimizer had made no step: what it remembers is zero, in place."""
    for state in optimizer.state.values():
        for remembered in state.values():
            remembered.zero_()


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
