"""Random crops and flips of whole batches, drawn from a method's own random stream."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def crop_and_flip(images: Tensor, stream: torch.Generator, smallest: float = 0.5, flip: bool = True) -> Tensor:
    """Every image its own random resized crop (area in [smallest, 1], aspect 3/4 to 4/3) and horizontal flip: N x C x S x S, differentiable.

    As torchvision's RandomResizedCrop with bilinear sampling, for all images at once; a side that would be longer than the image is cut
    (there it is drawn anew). The gradient with respect to the images is not deterministic on a GPU.
    """
    count, device = len(images), images.device

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=stream, device=device)

    area, ratio = uniform(smallest, 1.0), uniform(math.log(3 / 4), math.log(4 / 3)).exp()
    width, height = (area * ratio).sqrt().clamp_max(1.0), (area / ratio).sqrt().clamp_max(1.0)
    x, y = uniform(-1.0, 1.0) * (1 - width), uniform(-1.0, 1.0) * (1 - height)
    sign = torch.where(uniform(0.0, 1.0) < 0.5, -1.0, 1.0) if flip else torch.ones(count, device=device)
    zero = torch.zeros(count, device=device)
    boxes = torch.stack([torch.stack([width * sign, zero, x], 1), torch.stack([zero, height, y], 1)], 1)
    grid = F.affine_grid(boxes, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
