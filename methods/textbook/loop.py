"""What the textbook loops share: rounding, replacing modules, hooks. The numbers in brackets are those of the package's list."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dfqbench import Task, stream_seed


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

    def range_of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.tracking:
            self.batches += 1
            self.average = 0.9 * self.average.to(x) + 0.1 * torch.stack([x.data.min(), x.data.max()])
        low, high = self.average / (1 - 0.9**self.batches)
        return low, high

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(x)
        rounded: Tensor = StraightThrough.apply(x, *grid(*self.range_of(x), self.bits), self.bits)
        return rounded


def quantized(network: nn.Module, bits: int, relu: type[QuantizedReLU] = QuantizedReLU) -> nn.Module:
    """A copy of a network whose ReLUs are modules, with every convolution, linear layer and ReLU replaced."""
    network = copy.deepcopy(network)
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Conv2d | nn.Linear):
                setattr(parent, name, QuantizedWeight(child, bits))
            elif isinstance(child, nn.ReLU):
                setattr(parent, name, relu(bits))
    return network


class Loop:
    """One bit width of one method. `step` is one iteration; `losses` has a row per step: the generator's and the student's.

    network: a CIFAR ResNet, or another whose activations are ReLU modules and whose stages are `stages`.
    """

    relu: ClassVar[type[QuantizedReLU]] = QuantizedReLU
    generator_optimizer: torch.optim.Optimizer
    student_optimizer: torch.optim.Optimizer

    def __init__(self, network: nn.Module, task: Task, bits: int, seed: int, config: Any, device: torch.device | str = "cpu"):
        self.task, self.seed, self.config, self.device = task, seed, config, torch.device(device)
        self.teacher = copy.deepcopy(network).to(self.device).eval().requires_grad_(True)  # (1)
        self.student = quantized(network, bits, self.relu).to(self.device).eval().requires_grad_(True)
        self.streams: dict[str, torch.Generator] = {}
        self.means: list[Tensor] = []
        self.variances: list[Tensor] = []
        self.running: list[tuple[Any, Any]] = []
        self.losses: list[tuple[float, float]] = []
        self.competent = False
        self.label_accuracy = 0.0
        for module in self.teacher.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.register_forward_hook(self._remember)
        self.features: dict[str, list[Tensor]] = {"teacher": [], "student": []}
        for name, net in (("teacher", self.teacher), ("student", self.student)):
            for stage in ("layer1", "layer2", "layer3"):
                net.get_submodule(stage).register_forward_hook(lambda module, given, output, name=name: self.features[name].append(output))
        torch.manual_seed(stream_seed(seed, "setup"))
        self.setup()

    def setup(self) -> None:
        raise NotImplementedError

    def step(self, tracking: bool, distilling: bool) -> None:
        raise NotImplementedError

    def _remember(self, module: Any, given: tuple[Tensor], output: Tensor) -> None:  # (2)
        self.means.append(given[0].mean([0, 2, 3]))
        self.variances.append(given[0].var([0, 2, 3], unbiased=False))
        self.running.append((module.running_mean, module.running_var))

    def stream(self, name: str) -> torch.Generator:
        if name not in self.streams:
            self.streams[name] = torch.Generator(self.device).manual_seed(stream_seed(self.seed, name))
        return self.streams[name]

    def track(self, tracking: bool) -> None:
        for module in self.student.modules():
            if isinstance(module, QuantizedReLU):
                module.tracking = tracking

    def ask(self, network: nn.Module, images: Tensor) -> Tensor:
        """Logits, with what the hooks saw of this pass alone."""
        self.means.clear()
        self.variances.clear()
        self.features["teacher" if network is self.teacher else "student"].clear()
        logits: Tensor = network(images)
        return logits

    def statistics_loss(self) -> Tensor:
        loss = torch.zeros((), device=self.device)
        for mean, variance, (running_mean, running_var) in zip(self.means, self.variances, self.running[-len(self.means) :], strict=True):
            loss = loss + F.mse_loss(mean, running_mean) + F.mse_loss(variance, running_var)
        return loss / len(self.means)

    @staticmethod
    def minimise(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def decay(self, factor: float) -> None:
        """A milestone: the rates of generator and student are multiplied by `factor`."""
        for optimizer in (self.generator_optimizer, self.student_optimizer):
            for group in optimizer.param_groups:
                group["lr"] *= factor

    def become_competent(self) -> None:
        """The same loop without what costs nothing to leave out: (1), (2)'s endless lists, (6), and NCHW."""
        self.competent = True
        self.teacher.requires_grad_(False)
        for module in [self.teacher, self.student, *(m for m in vars(self).values() if isinstance(m, nn.Module))]:
            module.to(memory_format=torch.channels_last)

    def remember(self, generator_loss: Tensor, student_loss: Tensor) -> None:
        if not self.competent:
            self.losses.append((generator_loss.item(), student_loss.item()))

    def note(self, generator_loss: Tensor, student_loss: Tensor, answer: Tensor, labels: Tensor) -> None:  # (6)
        if self.competent:
            self.running.clear()
            return
        self.label_accuracy = float(np.mean(np.argmax(answer.detach().cpu().numpy(), 1) == labels.cpu().numpy()))
        self.remember(generator_loss, student_loss)
