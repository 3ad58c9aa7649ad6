"""Networks with random weights that several rooms' tests look at."""

from __future__ import annotations

import torch
from torch import nn


def randomised(network: nn.Module) -> nn.Module:
    """BN layers as after training; in depthwise layers the first channel all positive and the second all negative."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for m in network.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.running_mean.normal_(0, 0.1, generator=generator)  # type: ignore[union-attr]
                m.running_var.uniform_(0.5, 2, generator=generator)  # type: ignore[union-attr]
                m.weight.uniform_(0.5, 1.5, generator=generator)
                m.bias.normal_(0, 0.1, generator=generator)
            if isinstance(m, nn.Conv2d) and 1 < m.groups == m.in_channels:
                m.weight[0].abs_().add_(0.05)
                m.weight[1].abs_().add_(0.05).neg_()
    return network.eval()
