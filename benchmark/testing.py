"""Conformance checks for methods: what the engine and every table rely on. A plug-in's own test is one line:

    def test_conformance(): method_checks(MyMethod)

Everything runs on a small random network and random images; nothing is downloaded and no real image is seen.
"""

from __future__ import annotations

import tempfile
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from benchmark.cell import Bundle, Cell, EvaluationCard
from benchmark.checkpoint import load_checkpoint, save_checkpoint
from benchmark.data import Images
from benchmark.engine import Interrupted, Lockstep
from benchmark.evaluate import evaluate, state_hash
from benchmark.method import Method, Phase
from benchmark.network import Teacher
from benchmark.protocol import PROTOCOLS, Bits
from benchmark.task import Task
from benchmark.teachers import TeacherCard

BUDGET = {"epochs": 3, "iterations": 3, "batch_size": 8}
LARGEST_PIXEL = 50.0  # in standard deviations: beyond it an image is no normalised image any more


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
    return Task(classes, channels, size, (0.5,) * channels, (0.25,) * channels)


def small_teacher(task: Task) -> Teacher:
    """A `SmallNetwork` whose weights and BN statistics are always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        network = SmallNetwork(task)
        for norm in (m for m in network.modules() if isinstance(m, nn.BatchNorm2d)):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, std=0.2)
            assert norm.running_var is not None
            nn.init.uniform_(norm.running_var, 0.5, 1.5)
    return Teacher(network, task)


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
        self.config = method.Config(**{**small, **method.quick, **self.settings})

    def start(self, bits: Iterable[str] = ("w4a4",), seed: int = 0, task: Task | None = None, poisoned: bool = False) -> Lockstep:
        """A lockstep before its first step, evaluated after every epoch."""
        task = task or small_task()
        protocol = PROTOCOLS["lineage"].for_method(self.method.info.name, self.method.ranges, self.method.batch_norm)
        card = TeacherCard("small", "small", "none", "0" * 64, None, task, 0)
        cells = tuple(
            Cell(
                method=self.method.info.name,
                method_version=self.method.version,
                config=self.config.model_dump(mode="json"),
                teacher=card,
                evaluation=EvaluationCard("noise", "0" * 64, task.classes, 32),
                protocol=protocol,
                bits=Bits.parse(width),
                seed=seed,
                precision="fp32",
                shares_synthesis=self.method.info.shares_synthesis,
            )
            for width in bits
        )
        images = small_images(task, poisoned)
        return Lockstep(Bundle(cells), small_teacher(task), torch.device("cpu"), lambda s: evaluate(s, images, task), evaluate_every=1)

    def end(self, **options: Any) -> Lockstep:
        lockstep = self.start(**options)
        lockstep.run(StopAfter())
        return lockstep


def ends_of(lockstep: Lockstep) -> dict[str, str]:
    """The hash of each student's weights and ranges, by its bits."""
    return {trainee.name: state_hash(trainee.student) for trainee in lockstep.trainees}


# --- the checks: each takes a Trial and raises AssertionError with what to mend ---------------------------------------


def defaults_are_valid(trial: Trial) -> None:
    """The settings have defaults, and the plan is made of phases."""
    method = trial.method(small_teacher(small_task()), trial.method.Config(), seed=0)
    torch.manual_seed(0)
    method.setup()
    assert all(isinstance(phase, Phase) for phase in method.phases()), "phases() must return a list of Phase"


def unknown_settings_fail(trial: Trial) -> None:
    """A misspelt setting is an error."""
    try:
        trial.method.Config(no_such_setting=1)  # type: ignore[call-arg]
    except ValidationError:
        return
    raise AssertionError("Config accepts unknown settings: derive it from MethodConfig or TrainingConfig")


def students_end_evaluated_with_finite_weights(trial: Trial) -> None:
    """Every quantizer has a range, weights are finite, and what trains has moved."""
    lockstep = trial.start()
    student = lockstep.trainees[0].student
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    lockstep.run(StopAfter())
    assert lockstep.trainees[0].failed is None, lockstep.trainees[0].failed
    assert lockstep.trainees[0].evaluation is not None, "the student was never evaluated"
    for name, parameter in student.named_parameters():
        assert torch.isfinite(parameter).all(), f"{name} is not finite"
    if lockstep.student_steps:
        still = [name for name, p in student.named_parameters() if torch.equal(p, before[name])]
        assert not still, f"these parameters of the student never moved: {', '.join(still)}"


def the_teacher_is_untouched(trial: Trial) -> None:
    """No parameter or buffer of the teacher moves, and none gets a gradient."""
    lockstep = trial.start()
    before = state_hash(lockstep.teacher)
    lockstep.run(StopAfter())
    assert state_hash(lockstep.teacher) == before, "the teacher's parameters or buffers changed"
    assert all(p.grad is None and not p.requires_grad for p in lockstep.teacher.parameters()), "the teacher's parameters got gradients"
    assert not any(m.training for m in lockstep.teacher.modules()), "the teacher was left in training mode"


def images_are_normalised_images(trial: Trial) -> None:
    """Batches have the task's shape, are finite, not constant, and carry no autograd history."""
    lockstep = trial.end()
    batch = lockstep.last_batch
    if batch is None:
        assert not lockstep.epochs or all(phase.step for phase, _ in lockstep.epochs), "a phase ran, but no batch was made"
        return
    images = batch.images
    assert tuple(images.shape[1:]) == lockstep.method.task.image_shape, f"images of shape {tuple(images.shape)}"
    assert torch.isfinite(images).all(), "images are not finite"
    assert images.std() > 0, "all pixels are equal"
    assert images.abs().max() < LARGEST_PIXEL, f"pixels reach {images.abs().max():.0f} standard deviations"
    assert not images.requires_grad, "detach the images: they must not carry autograd history"
    assert not batch.teacher_logits.requires_grad, "detach the teacher's logits"
    assert tuple(batch.teacher_logits.shape) == (len(images), lockstep.method.task.classes), "teacher_logits must be N x classes"
    if batch.labels is not None:
        assert batch.labels.shape[0] == len(images), "one label per image"


def one_seed_repeats_and_two_differ(trial: Trial) -> None:
    """All randomness comes from the seed, and only a method with uses_seed=False gives equal students for two."""
    first, again, other = (trial.end(seed=seed) for seed in (0, 0, 1))
    assert ends_of(first) == ends_of(again), "the same seed gave other students: draw random numbers with generator=self.random(...)"
    if not trial.method.uses_seed:
        assert ends_of(first) == ends_of(other), "uses_seed is False, but two seeds gave different students"
    elif first.epochs:
        assert ends_of(first) != ends_of(other), "two seeds gave the same student: the seed is not used"


def interrupted_equals_uninterrupted(trial: Trial) -> None:
    """Stopped after any step and resumed from the file, the students end with the same bits."""
    whole = trial.end()
    for stop_after in sorted({1, whole.steps // 2, whole.steps} - {0}):
        if stop_after > whole.steps:
            continue
        first = trial.start()
        try:
            first.run(StopAfter(stop_after))
        except Interrupted:
            pass
        else:
            raise AssertionError(f"step {stop_after} of {whole.steps} was never reached")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "checkpoint.pt"
            save_checkpoint(path, first.state())
            state, why = load_checkpoint(path, [t.cell.id for t in first.trainees])
        assert state is not None, why
        torch.manual_seed(12345)
        second = trial.start()
        second.restore(state)
        second.run(StopAfter())
        assert ends_of(second) == ends_of(whole), f"interrupted after step {stop_after}, the students end with other bits"


def a_poisoned_evaluation_set_changes_nothing(trial: Trial) -> None:
    """Weights and ranges are bit-identical whatever the evaluation set holds."""
    assert ends_of(trial.end()) == ends_of(trial.end(poisoned=True)), "the students depend on the evaluation set"


def shared_synthesis_is_true_to_its_word(trial: Trial) -> None:
    """With shares_synthesis, a student in lockstep has the bits that it has alone."""
    if not trial.method.info.shares_synthesis:
        return
    assert trial.method.adversary is Method.adversary, "adversary() is never called with shares_synthesis=True"
    together = ends_of(trial.end(bits=("w8a8", "w4a4", "w3a3")))
    assert ends_of(trial.end(bits=("w4a4",)))["w4a4"] == together["w4a4"], "alone, the student ends with other bits than in lockstep"


def any_task_works(trial: Trial) -> None:
    """1 and 3 channels, 10 and 1000 classes, 32 and 64 pixels."""
    fields = trial.method.Config.model_fields
    short = Trial(trial.method, trial.settings | {k: v for k, v in {"epochs": 2, "iterations": 2}.items() if k in fields})
    for channels, classes, size in ((1, 10, 32), (3, 1000, 32), (3, 10, 64)):
        try:
            short.end(task=small_task(channels, classes, size))
        except Exception as error:
            raise AssertionError(f"{channels} channels, {classes} classes, {size} pixels: {type(error).__name__}: {error}") from error


CHECKS: tuple[Callable[[Trial], None], ...] = (
    defaults_are_valid,
    unknown_settings_fail,
    students_end_evaluated_with_finite_weights,
    the_teacher_is_untouched,
    images_are_normalised_images,
    one_seed_repeats_and_two_differ,
    interrupted_equals_uninterrupted,
    a_poisoned_evaluation_set_changes_nothing,
    shared_synthesis_is_true_to_its_word,
    any_task_works,
)


@dataclass(frozen=True)
class Outcome:
    """What one check said: held, or why not (with the last line of a traceback where the method raised)."""

    check: str
    meaning: str
    failure: str | None


def check_method(method: type[Method], settings: dict[str, Any] | None = None) -> list[Outcome]:
    """Runs every check on a registered method."""
    trial = Trial(method, settings)
    outcomes = []
    for check in CHECKS:
        failure = None
        try:
            check(trial)
        except AssertionError as error:
            failure = str(error)
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            failure = f"{type(error).__name__}: {error} ({Path(place.filename).name}, line {place.lineno})"
        outcomes.append(Outcome(check.__name__, (check.__doc__ or "").strip(), failure))
    return outcomes


def method_checks(method: type[Method], **settings: Any) -> None:
    """Raises AssertionError with a line for every check that did not hold."""
    failed = [f"{o.check}: {o.failure}" for o in check_method(method, settings) if o.failure is not None]
    assert not failed, f"{method.info.name} fails {len(failed)} of {len(CHECKS)} checks:\n" + "\n".join(failed)
