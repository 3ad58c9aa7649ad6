"""GDFQ's training loop as the field's public code writes it: the yardstick of `dfqbench speed`, and an independent check of the engine.

It knows nothing of the engine: modules are replaced one by one, statistics come from hooks, every bit width is a run of its own. In
float64 both end with the same numbers. What makes it slow is kept on purpose; all of it is in the public code of the GDFQ family
(GDFQ, Qimera, AdaDFQ, IntraQ, and what was made from them):

1. The teacher's weights require gradients: each generator step computes them and nobody reads them.
2. Hooks on every BN layer append means, variances (two passes over each input) and, without end, the running statistics.
3. Upsampling makes four times the pixels before a 3x3 convolution reads them.
4. Fake quantization is six elementwise operations with a temporary each, for weights and activations.
5. The student runs in the warm-up, with a graph, though nothing is learned from it.
6. Every step waits for the device: accuracies go through numpy, losses through Python floats.
7. One student: each bit width pays for generator and teacher again.
8. float32, NCHW, eager mode, optimizers that loop over parameters.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmark.method import stream_seed
from benchmark.task import Task


class StraightThrough(torch.autograd.Function):
    """Rounding whose gradient is the identity; so is that of the clamping around it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
        half = 2 ** (bits - 1)
        level = torch.round(scale * x - zero)
        level = torch.clamp(level, -half, half - 1)
        return (level + zero) / scale

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        return gradient, None, None, None


def grid(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    scale = (2**bits - 1) / torch.clamp(high - low, min=1e-8)
    return scale, torch.round(scale * low) + 2 ** (bits - 1)


class QuantizedWeight(nn.Module):
    """A convolution or linear layer whose weight is rounded in every forward pass."""

    def __init__(self, layer: nn.Module, bits: int):
        super().__init__()
        self.layer, self.bits = layer, bits

    def forward(self, x: Tensor) -> Tensor:
        weight: Any = self.layer.weight
        rows = weight.data.contiguous().view(len(weight), -1)
        low, high = rows.min(1).values, rows.max(1).values
        scale, zero = (v.view(-1, *[1] * (weight.dim() - 1)) for v in grid(low, high, self.bits))
        rounded = StraightThrough.apply(weight, scale, zero, self.bits)
        bias: Any = self.layer.bias
        if isinstance(self.layer, nn.Conv2d):
            return F.conv2d(x, rounded, bias, self.layer.stride, self.layer.padding)
        return F.linear(x, rounded, bias)


class QuantizedReLU(nn.Module):
    """ReLU, then rounding to a range that is tracked while `tracking` (with the bias correction that the public code gets wrong)."""

    def __init__(self, bits: int):
        super().__init__()
        self.bits, self.tracking = bits, True
        self.average, self.batches = torch.zeros(2), 0

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(x)
        if self.tracking:
            self.batches += 1
            self.average = 0.9 * self.average.to(x) + 0.1 * torch.stack([x.data.min(), x.data.max()])
        low, high = self.average / (1 - 0.9**self.batches)
        rounded: Tensor = StraightThrough.apply(x, *grid(low, high, self.bits), self.bits)
        return rounded


def quantized(network: nn.Module, bits: int) -> nn.Module:
    """A copy of a network whose ReLUs are modules, with every convolution, linear layer and ReLU replaced."""
    network = copy.deepcopy(network)
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Conv2d | nn.Linear):
                setattr(parent, name, QuantizedWeight(child, bits))
            elif isinstance(child, nn.ReLU):
                setattr(parent, name, QuantizedReLU(bits))
    return network


class Generator(nn.Module):
    def __init__(self, task: Task, latent_dim: int = 100):
        super().__init__()
        self.side = task.size // 4
        self.embedding = nn.Embedding(task.classes, latent_dim)
        self.linear = nn.Linear(latent_dim, 128 * self.side**2)
        self.norm0 = nn.BatchNorm2d(128)
        self.block1 = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(128, 128, 3, 1, 1), nn.BatchNorm2d(128, 0.8), nn.LeakyReLU(0.2))
        self.block2 = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(128, 64, 3, 1, 1), nn.BatchNorm2d(64, 0.8), nn.LeakyReLU(0.2))
        self.end = nn.Sequential(nn.Conv2d(64, task.channels, 3, 1, 1), nn.Tanh(), nn.BatchNorm2d(task.channels, affine=False))

    def forward(self, noise: Tensor, labels: Tensor) -> Tensor:
        x = self.linear(self.embedding(labels) * noise).view(-1, 128, self.side, self.side)
        images: Tensor = self.end(self.block2(self.block1(self.norm0(x))))
        return images


class TextbookGDFQ:
    """One bit width. `step` is one iteration; `losses` has a row per step: the generator's and the student's."""

    def __init__(self, network: nn.Module, task: Task, bits: int, seed: int, batch_size: int, device: torch.device | str = "cpu"):
        self.task, self.batch_size, self.device = task, batch_size, torch.device(device)
        self.teacher = copy.deepcopy(network).eval().requires_grad_(True)  # (1)
        self.student = quantized(network, bits).eval().requires_grad_(True)
        torch.manual_seed(stream_seed(seed, "setup"))
        self.generator = Generator(task).to(self.device)
        self.noise, self.labels = (torch.Generator(self.device).manual_seed(stream_seed(seed, name)) for name in ("noise", "labels"))
        self.generator_optimizer = torch.optim.Adam(self.generator.parameters(), lr=1e-3, betas=(0.5, 0.999))
        self.student_optimizer = torch.optim.SGD(self.student.parameters(), lr=1e-4, momentum=0.9, weight_decay=1e-4, nesterov=True)
        self.means: list[Tensor] = []
        self.variances: list[Tensor] = []
        self.running: list[tuple[Any, Any]] = []
        for module in self.teacher.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.register_forward_hook(self._remember)
        self.losses: list[tuple[float, float]] = []
        self.label_accuracy = 0.0

    def _remember(self, module: Any, given: tuple[Tensor], output: Tensor) -> None:  # (2)
        self.means.append(given[0].mean([0, 2, 3]))
        self.variances.append(given[0].var([0, 2, 3], unbiased=False))
        self.running.append((module.running_mean, module.running_var))

    def step(self, tracking: bool, distilling: bool) -> None:
        for module in self.student.modules():
            if isinstance(module, QuantizedReLU):
                module.tracking = tracking
        labels = torch.randint(self.task.classes, (self.batch_size,), generator=self.labels, device=self.device)
        noise = torch.randn(self.batch_size, 100, generator=self.noise, device=self.device)
        images = self.generator(noise, labels)
        self.means.clear()
        self.variances.clear()
        answer = self.teacher(images)
        statistics_loss = torch.zeros((), device=self.device)
        for mean, variance, (running_mean, running_var) in zip(self.means, self.variances, self.running[-len(self.means) :], strict=True):
            statistics_loss = statistics_loss + F.mse_loss(mean, running_mean) + F.mse_loss(variance, running_var)
        generator_loss = F.cross_entropy(answer, labels) + 0.1 * statistics_loss / len(self.means)
        self.generator_optimizer.zero_grad()
        generator_loss.backward()
        self.generator_optimizer.step()

        logits = self.student(images.detach())  # (5)
        divergence = F.kl_div(F.log_softmax(logits / 20.0, 1), F.softmax(answer.detach() / 20.0, 1), reduction="none").mean()
        student_loss = F.cross_entropy(logits, labels) + 20.0 * 20.0 * divergence
        if distilling:
            self.student_optimizer.zero_grad()
            student_loss.backward()
            self.student_optimizer.step()
        self.label_accuracy = float(np.mean(np.argmax(answer.detach().cpu().numpy(), 1) == labels.cpu().numpy()))  # (6)
        self.losses.append((generator_loss.item(), student_loss.item()))
