"""Large-kernel attention (Guo et al., 2022, arXiv:2202.09741) and LRQ's long-range generator (spec section 3.2)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dfqbench import Task
from dfqbench_methods.parts.generators import Generator


class LargeKernelAttention(nn.Module):
    """u -> 1x1 -> GELU -> h * 1x1(7x7 dilated by 3 (5x5 (h))) -> 1x1, plus u: N x d x H x W, receptive field 23."""

    def __init__(self, channels: int):
        super().__init__()
        self.enter, self.leave = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, channels, 1)
        self.near = nn.Conv2d(channels, channels, 5, padding=2, groups=channels)
        self.far = nn.Conv2d(channels, channels, 7, padding=9, dilation=3, groups=channels)
        self.mix = nn.Conv2d(channels, channels, 1)

    def forward(self, u: Tensor) -> Tensor:
        h = F.gelu(self.enter(u))
        attended: Tensor = u + self.leave(h * self.mix(self.far(self.near(h))))
        return attended


class LongRangeGenerator(Generator):
    """GDFQ's generator with one attention block: `before` the first convolution, behind its upsampling, or `after` the first block (the authors'
    place for ImageNet)."""

    def __init__(self, task: Task, latent_dim: int, by_class: bool, place: Literal["before", "after"]):
        super().__init__(task, latent_dim, by_class)
        self.place = place
        self.attention = LargeKernelAttention(128)

    def forward(self, latent: Tensor, labels: Tensor | None = None, centers: Tensor | None = None) -> Tensor:
        condition = (labels,) if self.by_class else ()
        x = self.first(latent).view(-1, 128, *self.first_size).contiguous(memory_format=torch.channels_last)
        x = self.norm0(x, *condition)
        if self.place == "before":
            x = self.attention(F.interpolate(x, scale_factor=2, mode="nearest"))
            x = F.conv2d(x, self.block1.weight, self.block1.bias, padding=1)
        else:
            x = self.block1(x)
        x = F.leaky_relu(self.norm1(x, *condition), 0.2, inplace=True)
        if self.place == "after":
            x = self.attention(x)
        x = F.leaky_relu(self.norm2(self.block2(x), *condition), 0.2, inplace=True)
        return self._images(x)
