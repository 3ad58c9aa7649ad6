"""The CIFAR ResNets of He et al. (arXiv:1512.03385, section 4.2): 6n+2 layers, 16/32/64 channels, shortcuts without parameters (option A).

Two variants each, defined here: `_weighted` pools with learned weights, a product that no layer holds; `_exits` also answers after its second stage
(an early exit, as in BranchyNet, arXiv:1709.01686).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfqbench.errors import UserError, nearest

BLOCKS_PER_STAGE = {"resnet20": 3, "resnet32": 5, "resnet44": 7, "resnet56": 9}


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut; every activation is a module of its own, so that torch.fx sees each as a node with a name."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu2 = nn.ReLU()
        self.stride = stride
        self.padding = (outputs - inputs) // 2  # zero channels on either side of a shortcut

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.relu1(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.padding:
            # every second pixel; a pooling, since the gradient of a slice loses the memory layout, and all before it would pay for that
            x = F.pad(F.avg_pool2d(x, 1, self.stride), (0, 0, 0, 0, self.padding, self.padding))
        out = self.relu2(out + x)
        return out


class CifarResNet(nn.Module):
    """N x in_channels x H x W normalised images -> N x classes logits."""

    def __init__(self, blocks: int, classes: int = 10, in_channels: int = 3):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        self.layer1 = self._stage(16, 16, blocks, stride=1)
        self.layer2 = self._stage(16, 32, blocks, stride=2)
        self.layer3 = self._stage(32, 64, blocks, stride=2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(64, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    @staticmethod
    def _stage(inputs: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
        return nn.Sequential(Block(inputs, outputs, stride), *(Block(outputs, outputs, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(self.pool(x).flatten(1))
        return logits


class WeightedPool(nn.Module):
    """N x C x side x side -> N x C: a weighted sum over positions, with weights of its own for each channel; begins as their mean."""

    def __init__(self, channels: int, side: int):
        super().__init__()
        self.weight = nn.Parameter(torch.full((1, channels, side, side), 1 / side**2))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.weight).sum((2, 3))


class WeightedResNet(CifarResNet):
    """Pools by weights: takes images of 32 x 32 only."""

    def __init__(self, blocks: int, classes: int = 10, in_channels: int = 3):
        super().__init__(blocks, classes, in_channels)
        self.pool = WeightedPool(64, 8)  # type: ignore[assignment]


class ExitingResNet(CifarResNet):
    """Answers twice: (logits after the second stage, logits at the end), N x classes each."""

    exits = 2

    def __init__(self, blocks: int, classes: int = 10, in_channels: int = 3):
        super().__init__(blocks, classes, in_channels)
        self.early = nn.Linear(32, classes)
        nn.init.kaiming_normal_(self.early.weight)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        halfway = self.layer2(self.layer1(self.relu(self.bn1(self.conv1(x)))))
        return self.early(self.pool(halfway).flatten(1)), self.linear(self.pool(self.layer3(halfway)).flatten(1))


KINDS: dict[str, type[CifarResNet]] = {"": CifarResNet, "_exits": ExitingResNet, "_weighted": WeightedResNet}
NETWORKS = {name + suffix: (kind, blocks) for name, blocks in BLOCKS_PER_STAGE.items() for suffix, kind in KINDS.items()}


def cifar_resnet(name: str, classes: int = 10, in_channels: int = 3) -> CifarResNet:
    """`resnet20`, `resnet32`, `resnet44` or `resnet56`, and each with `_weighted` or `_exits` behind; UserError for another name."""
    if name not in NETWORKS:
        raise UserError(f"unknown network 'cifar:{name}': {nearest(name, NETWORKS)}")
    kind, blocks = NETWORKS[name]
    return kind(blocks, classes, in_channels)
