"""Random crops and flips of whole batches, drawn from a method's own random stream."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def crop_and_flip(images: Tensor, stream: torch.Generator, smallest: float = 0.5, flip: bool = True) -> Tensor:
    """Every image its own random resized crop (area in [smallest, 1], aspect 3/4 to 4/3) and horizontal flip: N x C x S x S, differentiable.

    As torchvision's RandomResizedCrop with bilinear sampling, for all images at once; a side that would be longer than the image is cut
    (there it is drawn anew). On a GPU images that are optimised go through `cut`: the gradient of torch's kernel is not deterministic there.
    """
    count, device = len(images), images.device

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=stream, device=device)

    area, ratio = uniform(smallest, 1.0), uniform(math.log(3 / 4), math.log(4 / 3)).exp()
    width, height = (area * ratio).sqrt().clamp_max(1.0), (area / ratio).sqrt().clamp_max(1.0)
    x, y = uniform(-1.0, 1.0) * (1 - width), uniform(-1.0, 1.0) * (1 - height)
    sign = torch.where(uniform(0.0, 1.0) < 0.5, -1.0, 1.0) if flip else torch.ones(count, device=device)
    if device.type == "cuda" and images.requires_grad:
        return cut(images, height, y, width * sign, x)
    zero = torch.zeros(count, device=device)
    boxes = torch.stack([torch.stack([width * sign, zero, x], 1), torch.stack([zero, height, y], 1)], 1)
    grid = F.affine_grid(boxes, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def cut(images: Tensor, height: Tensor, y: Tensor, width: Tensor, x: Tensor) -> Tensor:
    """A rectangle of each image (N x C x H x W), scaled to the whole size, bilinear: two matrix products for each image and channel.

    height, width (N each): the rectangle's sides, in sides of the image; a negative one mirrors. y, x: its middle, from -1 to 1.
    """

    def weights(share: Tensor, middle: Tensor, size: int) -> Tensor:
        """Of each source row in each target row, N x size x size."""
        ticks = torch.arange(size, device=images.device, dtype=torch.float32)
        target = (2 * ticks + 1) / size - 1
        source = ((share[:, None] * target + middle[:, None] + 1) * size - 1) / 2
        return (1 - (source.clamp(0, size - 1)[:, :, None] - ticks).abs()).clamp_min(0)

    with torch.autocast(images.device.type, enabled=False):
        rows, columns = weights(height, y, images.shape[2]), weights(width, x, images.shape[3])
        found: Tensor = rows[:, None] @ images.float() @ columns[:, None].mT
    return found.contiguous(memory_format=torch.channels_last)
