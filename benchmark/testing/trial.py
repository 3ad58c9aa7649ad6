"""What the conformance checks run on: a small random network, random images, and a method with quick settings. Nothing is downloaded."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dfqbench.data import Images
from dfqbench.engine.evaluate import evaluate, state_hash
from dfqbench.engine.lockstep import Interrupted, Lockstep
from dfqbench.method.contract import Method, Phase
from dfqbench.method.settings import files_of, without_default
from dfqbench.network import Teacher
from dfqbench.quantization import PROTOCOLS, Bits
from dfqbench.sweep.cell import Bundle, Cell, EvaluationCard
from dfqbench.task import Task
from dfqbench.teachers import TeacherCard

BUDGET = {"epochs": 3, "iterations": 3, "batch_size": 8}
CPU = torch.device("cpu")


class SmallNetwork(nn.Module):
    """Two residual stages with BN and ReLU, for any task."""

    def __init__(self, task: Task):
        super().__init__()
        self.stem, self.norm0 = nn.Conv2d(task.channels, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv1, self.norm1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.down, self.norm2 = nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv3, self.norm3 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.relu, self.pool, self.head = nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Linear(16, task.classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm0(self.stem(x)))
        x = self.relu(self.norm1(self.conv1(x)) + x)
        x = self.relu(self.norm2(self.down(x)))
        x = self.relu(self.norm3(self.conv3(x)) + x)
        logits: Tensor = self.head(self.pool(x).flatten(1))
        return logits


def small_task(channels: int = 3, classes: int = 10, size: int = 32) -> Task:
    """A task of so many channels, classes and pixels a side."""
    return Task(classes, channels, size, (0.5,) * channels, (0.25,) * channels)


def small_teacher(task: Task, kind: type[Teacher] = Teacher) -> Teacher:
    """A `SmallNetwork` whose weights and BN statistics are always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        network = SmallNetwork(task)
        for norm in (m for m in network.modules() if isinstance(m, nn.BatchNorm2d)):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, std=0.2)
            assert norm.running_var is not None
            nn.init.uniform_(norm.running_var, 0.5, 1.5)
    return kind(network, task)


def small_images(task: Task, poisoned: bool = False) -> Images:
    """32 random test images; the poisoned ones are other noise with other labels."""
    random = np.random.default_rng(1 + poisoned)
    shape = (task.size, task.size, task.channels)
    pixels, labels = random.integers(0, 256, (32, *shape), dtype=np.uint8), random.integers(0, task.classes, 32)
    return Images(lambda index: pixels[index], labels.astype(np.int64), shape, task.classes, in_memory=True)


class StopAfter:
    """A watcher that interrupts after so many steps, or never."""

    def __init__(self, stop_after: int | None = None):
        self.stop_after = stop_after

    def step(self, lockstep: Lockstep, phase: Phase) -> None:
        if lockstep.steps_done == self.stop_after:
            raise Interrupted

    def epoch(self, lockstep: Lockstep, phase: Phase) -> None:
        """Nothing to do."""


class Trial:
    """Runs one method with quick settings. `settings` come on top of the method's own `quick` ones."""

    def __init__(self, method: type[Method], settings: dict[str, Any] | None = None):
        self.method, self.settings = method, settings or {}
        fields = method.Config.model_fields
        small = {k: v for k, v in BUDGET.items() if k in fields}
        given = {**small, **method.quick, **self.settings}
        self.config = method.Config(**given)
        self.required = {name: given[name] for name in without_default(method.Config)}

    def start(
        self,
        bits: Iterable[str] = ("w4a4",),
        seed: int = 0,
        task: Task | None = None,
        poisoned: bool = False,
        teacher: Teacher | None = None,
        device: torch.device = CPU,
        protocol: str = "lineage",
    ) -> Lockstep:
        """A lockstep before its first step, evaluated after every epoch."""
        task = task or small_task()
        rules = PROTOCOLS[protocol].for_method(self.method.info.name, self.method.ranges, self.method.batch_norm)
        card = TeacherCard("small", "small", "none", "0" * 64, None, task, 0)
        cells = tuple(
            Cell(
                method=self.method.info.name,
                method_version=self.method.version,
                config=self.config.model_dump(mode="json"),
                files=files_of(self.config),
                teacher=card,
                evaluation=EvaluationCard("noise", "0" * 64, task.classes, 32),
                protocol=rules,
                bits=Bits.parse(width),
                seed=seed,
                precision="fp32",
                shares_synthesis=self.method.info.shares_synthesis,
            )
            for width in bits
        )
        images, teacher = small_images(task, poisoned), teacher or small_teacher(task)
        return Lockstep(Bundle(cells), teacher, device, lambda s: evaluate(s, images, task, device=device), evaluate_every=1)

    def end(self, **options: Any) -> Lockstep:
        lockstep = self.start(**options)
        lockstep.run(StopAfter())
        return lockstep


def ends_of(lockstep: Lockstep) -> dict[str, str]:
    """The hash of each student's weights and ranges, by its bits."""
    return {trainee.name: state_hash(trainee.student) for trainee in lockstep.trainees}
