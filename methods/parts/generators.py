"""Generators of synthetic images, GDFQ's family (spec section 1.3)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dfqbench import Task
from dfqbench_methods.parts.layouts import at_size


def relative_coordinates(centers: Tensor, height: int, width: int | None = None) -> Tensor:
    """Maps (N x 2 x height x width) of each pixel's position relative to a centre (N x 2: x, y), each in units of that side of the image.

    Pixel centres lie at (i + 0.5) / side. Without a width it is the height.
    """
    width = width or height
    down, right = ((torch.arange(side, device=centers.device, dtype=centers.dtype) + 0.5) / side for side in (height, width))
    x = (right[None, :] - centers[:, 0:1])[:, None, :].expand(-1, height, -1)
    y = (down[None, :] - centers[:, 1:2])[:, :, None].expand(-1, -1, width)
    return torch.stack([x, y], 1)


def place_maps(centers: Tensor, height: int, width: int, kind: str) -> Tensor:
    """What tells a convolution where a centre is (N x 2: x, y): N x 2 x height x width.

    "coordinates": each pixel's position relative to the centre. "bump": a Gaussian of height 3 around it, a standard deviation of 0.15
    image sides wide, and what it leaves of 3. The other maps of a layer's input have unit variance: the bump's size is like theirs.
    """
    relative = relative_coordinates(centers, height, width)
    if kind == "coordinates":
        return relative
    near = torch.exp(-relative.square().sum(1, keepdim=True) / (2 * 0.15**2))
    return torch.cat([3 * near, 3 - 3 * near], 1)


class UpsampleConv(nn.Conv2d):
    """Nearest-neighbour upsampling by 2, then a 3x3 convolution with padding 1: N x I x H x W -> N x O x 2H x 2W.

    Both together are one transposed convolution of stride 2, whose 4x4 kernel holds the sums of the taps that fall on the same source
    pixel: the same function with 2.25 times less arithmetic. Parameters and their initialisation are those of the 3x3 layer.
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        taps = F.pad(self.weight, (1, 1, 1, 1))
        taps = taps[:, :, :-1] + taps[:, :, 1:]
        taps = taps[:, :, :, :-1] + taps[:, :, :, 1:]
        y = F.conv_transpose2d(x, taps.transpose(0, 1).flip(2, 3), stride=2, padding=1)
        assert self.bias is not None
        return y.add_(self.bias.to(y.dtype)[:, None, None])  # given to the convolution, its gradient would take a CPU as long as that of the weight


class ClassConditionalBatchNorm(nn.Module):
    """Batch norm whose scale and shift are looked up by class: gamma starts at 1, beta at 0.

    Labels are classes (N), weights with which scales and shifts of several classes are added up (N x classes, float), or layouts (N x H x W).
    """

    def __init__(self, channels: int, classes: int, eps: float = 1e-5):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, eps=eps, affine=False)
        self.gamma = nn.Embedding.from_pretrained(torch.ones(classes, channels), freeze=False)
        self.beta = nn.Embedding.from_pretrained(torch.zeros(classes, channels), freeze=False)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        mixed = labels.is_floating_point()
        if labels.dim() == 3:
            gamma, beta = (class_maps(table, labels, x) for table in (self.gamma, self.beta))
        else:
            gamma, beta = ((labels @ table.weight if mixed else table(labels))[:, :, None, None] for table in (self.gamma, self.beta))
        scaled: Tensor = self.norm(x) * gamma + beta
        return scaled


def class_maps(table: nn.Embedding, layout: Tensor, like: Tensor) -> Tensor:
    """The rows of a table (classes x C) that a layout (N x H x W) asks for, at the size of a map (N x C x h x w): N x C x h x w."""
    maps: Tensor = table(at_size(layout, like))
    return maps.permute(0, 3, 1, 2)


class Generator(nn.Module):
    """Latent vector (N x latent_dim) -> normalised images (N x C x H x W) for a task with images of H x W.

    Linear to 128 maps of a quarter of that -> BN -> [x2, 3x3 conv 128 -> BN -> LeakyReLU] -> [x2, 3x3 conv 64 -> BN -> LeakyReLU] ->
    3x3 conv -> tanh -> BN without affine, which makes every batch zero-mean and unit-variance per channel. The inner BNs'
    eps of 0.8 is the authors' (an argument in another's place, kept by the whole lineage). With `by_class`, the three inner
    BNs are class-conditional. A side that 4 does not divide is cropped from the next one that it does.

    With `by_place` ("coordinates" or "bump": see `place_maps`), both blocks also see where a given centre lies (N x 2, in [0, 1]). With `by_layout`
    the maps of the linear layer are multiplied by the embedding of the class that a layout (N x H x W) has there.
    """

    def __init__(self, task: Task, latent_dim: int, by_class: bool = False, by_place: str | None = None, eps: float = 0.8, by_layout: bool = False):
        super().__init__()
        self.size = task.image_shape[1:]
        self.first_size = [-(-side // 4) for side in self.size]
        self.first = nn.Linear(latent_dim, 128 * math.prod(self.first_size))
        maps = 2 if by_place else 0
        self.block1, self.block2 = UpsampleConv(128 + maps, 128), UpsampleConv(128 + maps, 64)
        self.last = nn.Conv2d(64, task.channels, 3, padding=1)

        def norm(channels: int, eps: float = 1e-5) -> nn.Module:
            return ClassConditionalBatchNorm(channels, task.classes, eps) if by_class else nn.BatchNorm2d(channels, eps=eps)

        self.norm0, self.norm1, self.norm2 = norm(128), norm(128, eps), norm(64, eps)
        self.to_images = nn.BatchNorm2d(task.channels, affine=False)
        self.by_class, self.by_place = by_class, by_place
        self.layout = nn.Embedding(task.classes, 128) if by_layout else None

    def _placed(self, x: Tensor, centers: Tensor | None) -> Tensor:
        if self.by_place is None:
            return x
        assert centers is not None
        maps = place_maps(centers, x.shape[2], x.shape[3], self.by_place).to(x.dtype)
        return torch.cat([x, maps], 1).contiguous(memory_format=torch.channels_last)

    def forward(self, latent: Tensor, labels: Tensor | None = None, centers: Tensor | None = None) -> Tensor:
        condition = (labels,) if self.by_class else ()
        x = self.first(latent).view(-1, 128, *self.first_size).contiguous(memory_format=torch.channels_last)
        if self.layout is not None:
            assert labels is not None
            x = x * class_maps(self.layout, labels, x)
        x = self.norm0(x, *condition)
        x = F.leaky_relu(self.norm1(self.block1(self._placed(x, centers)), *condition), 0.2, inplace=True)
        x = F.leaky_relu(self.norm2(self.block2(self._placed(x, centers)), *condition), 0.2, inplace=True)
        return self._images(x)

    def _images(self, x: Tensor) -> Tensor:
        pixels = torch.tanh(self.last(x)[:, :, : self.size[0], : self.size[1]])
        images: Tensor = self.to_images(pixels.contiguous())  # a batch norm of so few channels takes a CPU six times as long in channels_last
        return images.contiguous(memory_format=torch.channels_last)


class LabelledGenerator(nn.Module):
    """GDFQ's generator: noise z (N x latent_dim) and labels y (N) -> images (N x C x H x W).

    conditioning "embedding" (the authors' for CIFAR): the latent is Embedding(y) * z. "batch-norm" (theirs for ImageNet): the latent is z, the class
    enters by class-conditional BN. For a segmentation task labels are layouts (N x H x W): it is not the latent but the maps made of it that are
    multiplied, position by position, and batch norms are conditioned position by position too.

    With a `center_dim`, ACQ's position-condition generator: it is also given points c (N x 2, in [0, 1]), embedded in so many more entries of the
    latent vector; `place` as `by_place` of `Generator`.
    """

    def __init__(self, task: Task, latent_dim: int, conditioning: str, center_dim: int = 0, place: str | None = None):
        super().__init__()
        by_embedding, dense = conditioning == "embedding", task.kind == "segment"
        self.embedding = nn.Embedding(task.classes, latent_dim) if by_embedding and not dense else None
        self.center = nn.Linear(2, center_dim) if center_dim else None
        width = latent_dim + center_dim
        self.generator = Generator(task, width, by_class=not by_embedding, by_place=place, by_layout=by_embedding and dense)

    def forward(self, noise: Tensor, labels: Tensor, centers: Tensor | None = None) -> Tensor:
        latent = noise if self.embedding is None else self.embedding(labels) * noise
        if self.center is not None:
            latent = torch.cat([latent, F.leaky_relu(self.center(centers), 0.2)], 1)
        images: Tensor = self.generator(latent, labels, centers)
        return images
