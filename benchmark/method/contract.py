"""The contract of a method: what a data-free quantizer writes, and what the engine does for it.

A method owns its losses and its images. The engine owns everything else: the loop, devices, precision, the quantizer and its
ranges, learning-rate schedules, evaluation, checkpoints, logging and progress. A method never sees data: it is handed the
teacher, a description of the task, and random streams.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from dfqbench.method.image_set import ImageSet
from dfqbench.method.info import MethodInfo, Needs
from dfqbench.method.learning_rate import set_rate
from dfqbench.method.log import Log, Value
from dfqbench.method.settings import MethodConfig
from dfqbench.quantization.protocol import GRID_WIDTHS, BatchNormMode, RangeEstimatorName, WeightGridName
from dfqbench.task import Kind, Task
from dfqbench.tasks.answers import Answers, answers_of

if TYPE_CHECKING:
    from dfqbench.network import Teacher
    from dfqbench.quantization.student import Student


@dataclass(frozen=True)
class Phase:
    """A stretch of epochs in which every step does the same.

    Each step synthesizes one batch. In the first `calibration_epochs` every student runs on it with its activation ranges
    tracked; afterwards they are frozen. With `distill`, every student is also trained on the batch.

    iterations: steps per epoch, the config's `iterations` where None. batch: what makes this phase's batches, `synthesize` where
    None. step: what a step does instead of all that, where no student takes part yet (optimising images, say).
    """

    name: str
    epochs: int
    distill: bool = False
    calibration_epochs: int = 0
    iterations: int | None = None
    batch: Callable[[], Batch] | None = None
    step: Callable[[], None] | None = None


@dataclass
class Batch:
    """N synthetic images with what belongs to them, all detached from autograd.

    images: N x C x H x W, normalised. labels: N (int64), or None where a method has none. teacher_logits: N x classes, or what
    else the teacher answers (`Answers`); labels of dense tasks are the method's own business.
    """

    images: Tensor
    labels: Tensor | None
    teacher_logits: Tensor


def stream_seed(seed: int, name: str) -> int:
    """The seed of a named random stream: it depends on the cell's seed and the name, and on nothing else of the cell."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "big") >> 1


class Method:
    """A data-free quantizer. Subclass it, decorate the class with `register`, and write what is the method's own:

    - `Config`: its settings;
    - `setup()`: builds what it needs (generators, their optimizers) as plain attributes;
    - `phases()`: how long, and what happens to the students;
    - `synthesize()`: one batch of images (and the step of the generator, if there is one);
    - `distill(student, batch)`: the loss of one student on one batch.

    A method without training overrides only `finish(student)`.

    Everything assigned to `self` in `setup` or later is checkpointed: modules, optimizers and whatever else has a
    `state_dict`, tensors, random streams, numbers, strings, other methods, and lists, tuples and dicts of these. A module or optimizer must
    exist after `setup`, so that its state can be loaded into it.
    """

    Config: ClassVar[type[MethodConfig]] = MethodConfig
    version: ClassVar[int] = 1  # raise it whenever the same settings give other numbers than before
    ranges: ClassVar[RangeEstimatorName | None] = None  # None: the protocol's choice
    batch_norm: ClassVar[BatchNormMode | None] = None  # None: the protocol's choice
    uses_seed: ClassVar[bool] = True  # False: nothing is random, one cell serves all seeds
    tasks: ClassVar[set[Kind]] = {"classify"}  # what kinds of teachers it is defined for; `self.answers` compares answers of any kind
    needs: ClassVar[set[Needs]] = set()  # beside the teacher's logits: "statistics" (BN), "features" (of stages), ... (info.py)
    quick: ClassVar[dict[str, Any]] = {}  # settings with which the conformance checks take seconds, beside a small budget
    expected_failures: ClassVar[dict[str, str]] = {}  # conformance checks that cannot hold, each with the reason
    info: ClassVar[MethodInfo]  # set by `register`

    config: Any

    @property
    def static_step(self) -> bool:
        """Whether steps of one kind, as configured, are the same operations on the same tensors, so that a GPU can replay a captured one.

        Then `synthesize`, `distill` and whatever else runs in a step wait for nothing (`.item()`, masks as indices, `torch.tensor(...)`), branch on
        nothing that moves, keep no number and bind no new tensor in `self`, and use torch's fused optimizers. A conformance check holds it. Of a
        phase all steps are of one kind, unless `before_step` tells several apart.
        """
        return False

    def __init__(self, teacher: Teacher, config: MethodConfig, seed: int, device: torch.device | str = "cpu", work: Path | None = None):
        self.teacher = teacher
        self.task: Task = teacher.task
        self.config = config
        self.seed = seed
        self.device = torch.device(device)
        self._streams: dict[str, torch.Generator] = {}
        self._schedules: list[tuple[torch.optim.Optimizer, list[int], float]] = []
        self._log = Log()
        self._work = work
        self._image_sets: list[ImageSet] = []

    # --- what a method writes -----------------------------------------------------------------------------------------

    def setup(self) -> None:
        """Builds what the method needs. New modules and tensors are made on the right device without being told."""

    def phases(self) -> list[Phase]:
        """The training plan; none means that `finish` does it all. Asked before `setup` too, to tell how long a run will take."""
        return []

    def before_step(self, phase: Phase) -> Hashable:
        """Called before every step of a phase; returns of which kind that step is, or None where it is like no other.

        The place for what a replayed step cannot do: counting, drawing what Python decides by, setting a rate, filling tensors (in place) that the
        step reads, picking the next images of a set. A kind is a small number or text; a step of kind None is never replayed.
        """
        return 0

    def synthesize(self) -> Batch:
        """One batch, and whatever is learned in making it. It sees no student: with `shares_synthesis` it serves all bit widths."""
        raise NotImplementedError(f"{type(self).__name__} has phases but no synthesize()")

    def distill(self, student: Student, batch: Batch) -> Tensor:
        """The loss (scalar) that one student is to minimise on one batch."""
        raise NotImplementedError(f"{type(self).__name__} has a phase with distill=True but no distill()")

    def student_optimizer(self, student: Student) -> torch.optim.Optimizer:
        """SGD with Nesterov momentum over all weights, biases and BN parameters, as the lineage has it."""
        c = self.config
        momentum = {"momentum": c.student_momentum, "nesterov": c.student_momentum > 0}  # torch refuses Nesterov's with none
        return torch.optim.SGD(student.parameters(), lr=c.student_lr, weight_decay=c.student_weight_decay, fused=True, **momentum)

    def student_step(self, student: Student, loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
        """One update of a student; override it where the update itself is the idea."""
        self.minimise(loss, optimizer)

    def adversary(self, student: Student) -> None:
        """After every update of a student, where images are to depend on it: the generator's move against this student.

        Only for methods that do not share synthesis, whose bundles have one student each.
        """

    def finish(self, student: Student) -> None:
        """After the last phase, before evaluation: post-training edits."""

    def pictures(self) -> dict[str, Tensor]:
        """What is worth a look after the run, beside a grid of the last images: file name without ending -> 3 x H x W in [0, 1].

        Asked for once, after everything else; it changes no number. Write names as words with hyphens.
        """
        return {}

    @classmethod
    def tasks_with(cls, config: Any) -> set[Kind]:
        """The kinds of `tasks` for which it is defined with these settings: all of them, unless a setting decides what the loss is."""
        return set(cls.tasks)

    @classmethod
    def weight_grids(cls, config: Any) -> Collection[WeightGridName]:
        """The protocol's weight grids with which it works with these settings: all, unless it sets the levels of weights itself."""
        return GRID_WIDTHS

    @classmethod
    def widths(cls, config: Any, asked: Sequence[str]) -> Sequence[str]:
        """Of the bit widths that a sweep asks for (`w4a4`, ...), those at which there is a cell with these settings: all of them.

        For what was made for one width elsewhere. Raise UserError where none is left.
        """
        return asked

    # --- what a method uses -------------------------------------------------------------------------------------------

    @property
    def answers(self) -> Answers:
        """How the teacher's and a student's answers are compared, whatever the kind of task."""
        return answers_of(self.task)

    def random(self, stream: str, on_cpu: bool = False) -> torch.Generator:
        """The random stream of that name, on the method's device; pass it as `generator=` to torch's random functions.

        on_cpu: on the CPU whatever the device, for numbers that Python itself decides by, so that no step waits for the device.
        """
        if stream not in self._streams:
            if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(f"the random stream {stream!r} is first drawn from in the captured step: the steps before were others")
            device = torch.device("cpu") if on_cpu else self.device
            self._streams[stream] = torch.Generator(device).manual_seed(stream_seed(self.seed, stream))
        return self._streams[stream]

    def draw_labels(self, count: int) -> Tensor:
        """`count` class indices, uniform over the task's classes."""
        return torch.randint(self.task.classes, (count,), generator=self.random("labels"), device=self.device)

    def draw_noise(self, *shape: int) -> Tensor:
        """Standard normal noise."""
        return torch.randn(*shape, generator=self.random("noise"), device=self.device)

    def image_set(self, name: str) -> ImageSet:
        """A new, empty set for finished images; assign it to an attribute in `setup`."""
        self._image_sets.append(ImageSet(name, self._work, self.device))
        return self._image_sets[-1]

    def minimise(self, loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
        """One step of `optimizer` down the gradient of `loss`."""
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    def schedule(self, optimizer: torch.optim.Optimizer, milestones: Sequence[int], decay: float) -> None:
        """Multiplies the optimizer's learning rates by `decay` from each milestone on.

        Milestones are epochs, counted over all phases but those whose steps only make images.
        """
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        self._schedules.append((optimizer, list(milestones), decay))

    def set_rate(self, optimizer: torch.optim.Optimizer, rate: float, group: int = 0) -> None:
        """Gives a parameter group of an optimizer another learning rate from here on; where steps are replayed, in `before_step`."""
        set_rate(optimizer.param_groups[group], rate)

    def log(self, name: str, value: Value) -> Value:
        """Averages a scalar over the epoch into history.csv, and hands it back. Within `distill` and `student_step` it belongs to that student."""
        self._log.add(name, value)
        return value
