"""AIT: It's All In the Teacher. Zero-Shot Quantization Brought Closer to the Teacher. Choi, Lee, Hong, Yu, Park, Kim, Lee. CVPR 2022,
arXiv:2203.17008.

A way to train the student on any host's images (GDFQ's, Qimera's): no cross-entropy, and steps long enough to reach the next integers.

    Q:   minimise T^2 mean KL(P(x) || Q(x))
    GI:  for each weight tensor w with the step u of SGD (momentum, Nesterov):
             the smallest a >= 1 with  share of integers of w that a step of a lr u changes  >=  rho     (by doubling, then bisection)
             w <- w - a lr u

Fidelity: the authors' code (iamkanghyunchoi/ait), whose steps it repeats up to rounding: the bisection makes at most five steps and its last
midpoint is taken, whichever side it lies on; a range is found anew for the moved weight, so a moved extreme re-grids its whole channel and counts.
Images, epochs, batch and warm-up are the host's; over Qimera their scripts mix other numbers of classes than Qimera's own (`hosts`). Deviations:
the host's; where no factor changes enough integers (a tensor without gradient) the step stays SGD's own, while theirs doubles without end. Reached
here, over GDFQ, after 1,500 student steps of 64 images (CIFAR-10 as JPEG, ResNet-20 with 87.44 %, W4A4 / W3A3, means of seeds 0 and 1): 85.67 /
78.64 %.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dfqbench import Batch, Field, HostingConfig, HostingMethod, Student, register
from dfqbench_methods.parts import inundation

BISECTIONS = 5
CLOSE_ENOUGH = 0.01  # of the share that is wanted: bisection ends there
NETWORKS = ("resnet18", "resnet50", "mobilenetv2")  # that the authors' ImageNet scripts name


def direction(optimizer: Optimizer, weight: Tensor, old: Tensor) -> Tensor:
    """The Nesterov direction that the optimizer has just gone from `old`, without the learning rate: g + momentum b, b being updated already."""
    group = optimizer.param_groups[0]
    assert weight.grad is not None
    gradient = weight.grad + group["weight_decay"] * old
    moved: Tensor = gradient + group["momentum"] * optimizer.state[weight]["momentum_buffer"]
    return moved


def useful_factors(weights: list[Tensor], steps: list[Tensor]) -> list[float]:
    """For each tensor the factor above which doubling its step changes no integer any more; 0 where there is no step.

    So far away an output channel's weights are lost in rounding: what is quantized is the step alone, whose integers do not depend on its length.
    """
    sizes = [[t.flatten(1).abs().amax(1) for t in pair] for pair in zip(weights, steps, strict=True)]
    far = [(weight / torch.finfo(weight.dtype).eps / step).nan_to_num(posinf=0.0).amax() for weight, step in sizes]
    found: list[float] = torch.stack(far).tolist()
    return found


def step_factors(useful: list[float], shares: Callable[[dict[int, float]], dict[int, float]], wanted: float, limit: float = math.inf) -> list[float]:
    """By how much each step is to be lengthened (1 or more) to change the wanted share of integers.

    `shares` takes factors by index and answers the changed shares. Doubling goes on while the share is too small and the factor not above `limit`; a
    step that changes too little up to its `useful` factor is not lengthened.
    """
    factors = dict.fromkeys(range(len(useful)), 1.0)
    short = [i for i, share in shares(factors).items() if share < wanted]
    bounds = dict.fromkeys(short, (1.0, 1.0))
    while short:
        bounds |= {i: (bounds[i][1], 2 * bounds[i][1]) for i in short}
        short = [i for i, share in shares({i: bounds[i][1] for i in short}).items() if share < wanted and bounds[i][1] < limit]
        for i in [i for i in short if bounds[i][1] > useful[i]]:
            short.remove(i)
            del bounds[i]
    for _ in range(BISECTIONS):
        middles = {i: (low + high) / 2 for i, (low, high) in bounds.items()}
        for i, share in shares(middles).items():
            factors[i], (low, high) = middles[i], bounds.pop(i)
            if abs(share - wanted) >= CLOSE_ENOUGH * wanted:
                bounds[i] = (middles[i], high) if share < wanted else (low, middles[i])
    return list(factors.values())


@register("ait", paper="arXiv:2203.17008", fidelity="code", shares_synthesis=True)
class AIT(HostingMethod):
    """KL alone and gradient inundation, on the images of a host (Choi et al., CVPR 2022)."""

    version = 2
    tasks = {"classify", "segment"}
    needs = {"statistics", "labels"}  # with the host gdfq
    quick = {"host_settings": {"warmup_epochs": 1, "calibration_epochs": 1}, "student_lr": 0.01}

    class Config(HostingConfig):
        source = "the authors' code, CIFAR"

        student_weight_decay: float = Field(0.0, ge=0)
        temperature: float = Field(20.0, gt=0, description="of the distillation: logits are divided by it")
        changed_share: float = Field(
            1e-3, gt=0, le=1, description="rho: share of a tensor's integers that a step is to change; decays as the rate does"
        )
        first_limit: float = Field(100.0, ge=1, description="in a student's first epoch doubling ends above this factor")

        presets = {
            "cifar100": dict(host_preset="cifar100"),
            **{name: dict(batch_size=16, changed_share=1e-4, host_preset=name) for name in ("imagenet", *(f"imagenet-{net}" for net in NETWORKS))},
        }
        hosts = {
            "qimera": {
                "": dict(embedding="teacher"),
                "cifar100": dict(mixed_classes=25, embedding="teacher"),
                "imagenet": dict(mixed_classes=250),
                "imagenet-resnet50": dict(mixed_classes=100, embedding="teacher", mixing=0.4),
            }
        }

    at_once = True  # whether all students' layers are looked at together

    @property
    def static_step(self) -> bool:
        """Layer by layer, each doubling waits for the one before."""
        return self.host.static_step and self.at_once

    def distill(self, student: Student, batch: Batch) -> Tensor:
        """The mean is over all N x C elements, as in GDFQ's code; of segmentation over those of all pixels."""
        return self.answers.divergence(student(batch.images), batch.teacher_logits, self.config.temperature) / self.task.classes

    def student_optimizer(self, student: Student) -> Optimizer:
        optimizer = super().student_optimizer(student)
        layers = list(student.layers.values())
        device = layers[0].layer.weight.device
        optimizer.param_groups[0]["updates"] = torch.zeros((), device=device)  # kept with the optimizer, so each student has its own
        self.at_once = self.at_once and inundation.goes(layers)
        if inundation.goes(layers):  # what no step shall wait for is made now
            inundation.layout(tuple(layer.layer.weight.shape for layer in layers), device)
        return optimizer

    def student_step(self, student: Student, loss: Tensor, optimizer: Optimizer) -> None:
        """A plain step for all, which moves the momentum; then the weights of all layers are set to where a longer one ends."""
        group, layers = optimizer.param_groups[0], list(student.layers.values())
        weights = [layer.layer.weight for layer in layers]
        before = [weight.detach().clone() for weight in weights]
        self.minimise(loss, optimizer)
        if not isinstance(group["updates"], Tensor) or group["updates"].device != before[0].device:  # a checkpoint is read onto the CPU
            group["updates"] = torch.as_tensor(group["updates"], dtype=torch.float32, device=before[0].device)
        updates = group["updates"]
        limit = torch.where(updates < self.config.iterations, self.config.first_limit, math.inf)
        updates += 1
        share = self.config.changed_share * group["lr"] / group["initial_lr"]
        if inundation.goes(layers):
            with torch.no_grad():
                moved, found = self.together(optimizer, layers, before, share, limit)
                for weight, new in zip(weights, moved.split([weight.numel() for weight in weights]), strict=True):
                    weight.copy_(new.view(weight.shape))
            self.log("step_factor", found.mean())
            return
        with torch.no_grad():
            steps = [group["lr"] * direction(optimizer, weight, old) for weight, old in zip(weights, before, strict=True)]
            levels = [layer.weight_levels(old) for layer, old in zip(layers, before, strict=True)]

            def shares(factors: dict[int, float]) -> dict[int, float]:
                """Of each tensor in question, the share of integers that a step of that length changes: one wait for the device for all."""
                changed = [(layers[i].weight_levels(before[i] - a * steps[i]) != levels[i]).float().mean() for i, a in factors.items()]
                return dict(zip(factors, torch.stack(changed).tolist(), strict=True)) if changed else {}

            factors = step_factors(useful_factors(before, steps), shares, float(share), float(limit))
            for weight, old, step, factor in zip(weights, before, steps, factors, strict=True):
                weight.copy_(old - factor * step)
        self.log("step_factor", sum(factors) / len(factors))

    def together(self, optimizer: Optimizer, layers: list[Any], before: list[Tensor], share: Any, limit: Tensor) -> tuple[Tensor, Tensor]:
        """The same for all layers at once, without waiting for the device: the new weights, one after the other, and the layers' factors."""
        group, weights = optimizer.param_groups[0], [layer.layer.weight for layer in layers]
        gradients, buffers = (
            [t.flatten() for t in part] for part in ([w.grad for w in weights], [optimizer.state[w]["momentum_buffer"] for w in weights])
        )
        old = torch.cat([weight.flatten() for weight in before])
        step = group["lr"] * (torch.cat(gradients) + group["weight_decay"] * old + group["momentum"] * torch.cat(buffers))
        return inundation.lengthened(layers, old, step, share, limit, BISECTIONS, CLOSE_ENOUGH)
