"""What the conformance checks run on: a small random network, random images, and a method with quick settings. Nothing is downloaded."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import nn

from dfqbench.data import Images
from dfqbench.engine.evaluate import Evaluation, evaluate, normalise, state_hash
from dfqbench.engine.lockstep import Interrupted, Lockstep
from dfqbench.method.contract import Method, Phase
from dfqbench.method.settings import files_of, without_default
from dfqbench.network import Teacher
from dfqbench.quantization import PROTOCOLS, Bits
from dfqbench.quantization.student import Student
from dfqbench.sweep.cell import Bundle, Cell, EvaluationCard
from dfqbench.task import Kind, Task
from dfqbench.tasks.answers import answers_of
from dfqbench.teachers import TeacherCard
from dfqbench.testing.networks import NETWORKS

BUDGET = {"epochs": 3, "iterations": 3, "batch_size": 8}
DENSE_BUDGET = {"epochs": 2, "iterations": 2, "batch_size": 4}
CPU = torch.device("cpu")


def small_task(channels: int = 3, classes: int = 10, size: int = 32, kind: Kind = "classify", width: int | None = None) -> Task:
    """A task of so many channels, classes and pixels a side."""
    return Task(classes, channels, size, (0.5,) * channels, (0.25,) * channels, kind=kind, width=width)


def small_task_of(kind: Kind) -> Task:
    """The task on which a method is tried for this kind; images of the dense ones are not square."""
    return small_task(size=16) if kind == "classify" else small_task(classes=5, size=16, kind=kind, width=24)


def small_teacher(task: Task, kind: type[Teacher] = Teacher) -> Teacher:
    """A small network for the kind of task, whose weights and BN statistics are always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        network = NETWORKS[task.kind](task)
        for norm in (m for m in network.modules() if isinstance(m, nn.BatchNorm2d)):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, std=0.2)
            assert norm.running_var is not None
            nn.init.uniform_(norm.running_var, 0.5, 1.5)
    return kind(network, task)


def small_images(task: Task, poisoned: bool = False) -> Images:
    """32 random test images; the poisoned ones are other noise with other labels (of the images, whatever the kind: see `small_evaluation`)."""
    random = np.random.default_rng(1 + poisoned)
    channels, height, width = task.image_shape
    shape = (height, width, channels)
    pixels, labels = random.integers(0, 256, (32, *shape), dtype=np.uint8), random.integers(0, task.classes, 32)
    return Images(lambda index: pixels[index], labels.astype(np.int64), shape, task.classes, in_memory=True)


def small_evaluation(images: Images, teacher: Teacher, device: torch.device) -> Callable[[Student], Evaluation]:
    """How students are evaluated: by labels, or in dense tasks by how far they agree with the teacher on the images."""
    task = teacher.task
    if task.kind == "classify":
        return lambda student: evaluate(student, images, task, device=device)
    (pixels, _), *_ = images.batches(len(images))
    mean, std = (torch.tensor(values, device=device).view(1, -1, 1, 1) for values in (task.mean, task.std))
    shown, answers = normalise(torch.from_numpy(pixels).to(device), mean, std), answers_of(task)

    @torch.inference_mode()
    def agreement(student: Student) -> Evaluation:
        ours, theirs = student(shown), teacher(shown)
        agreed = answers.agreement(ours, theirs).double().cpu().numpy()
        return Evaluation(agreed > 0.5, 100 * float(agreed.mean()), None, float(answers.divergence(ours, theirs)), "agreement")

    return agreement


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
    """Runs one method with quick settings on a small teacher of one kind. `settings` come on top of the method's own `quick` ones."""

    def __init__(self, method: type[Method], settings: dict[str, Any] | None = None, kind: Kind = "classify"):
        self.method, self.settings, self.kind, self.task = method, settings or {}, kind, small_task_of(kind)
        fields = method.Config.model_fields
        small = {k: v for k, v in (BUDGET if kind == "classify" else DENSE_BUDGET).items() if k in fields}
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
        task = task or self.task
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
        return Lockstep(Bundle(cells), teacher, device, small_evaluation(images, teacher, device), evaluate_every=1)

    def end(self, **options: Any) -> Lockstep:
        lockstep = self.start(**options)
        lockstep.run(StopAfter())
        return lockstep

    @functools.cached_property
    def ended(self) -> Lockstep:
        """One run of `end()` that several checks look at, and none goes on with."""
        return self.end()


def ends_of(lockstep: Lockstep) -> dict[str, str]:
    """The hash of each student's weights and ranges, by its bits."""
    return {trainee.name: state_hash(trainee.student) for trainee in lockstep.trainees}
