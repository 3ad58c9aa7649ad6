"""The contract of a method: what a data-free quantizer writes, and what the engine does for it.

A method owns its losses and its images. The engine owns everything else: the loop, devices, precision, the quantizer and its
ranges, learning-rate schedules, evaluation, checkpoints, logging and progress. A method never sees data: it is handed the
teacher, a description of the task, and random streams.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from benchmark.image_set import ImageSet
from benchmark.protocol import BatchNormMode, RangeEstimatorName
from benchmark.settings import Field
from benchmark.task import Task

if TYPE_CHECKING:
    from benchmark.network import Teacher
    from benchmark.registry import MethodInfo, Needs
    from benchmark.student import Student


class MethodConfig(BaseModel):
    """Settings of a method. Unknown keys are errors; every field takes part in a cell's identity.

    `presets` names sets of other defaults: `presets = {"imagenet": dict(batch_size=16)}`. `source` says where the defaults come from, unless a
    field's own `source` does. `after_images` names the settings that the leading phases which only make images do not depend on: cells that differ
    in nothing else take each other's images over. A subclass adds what it knows of its own settings; what is not named keeps cells apart.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, ignored_types=(dict,), validate_default=True)
    presets: ClassVar[dict[str, dict[str, Any]]] = {}
    source: ClassVar[str] = "not given"
    after_images: ClassVar[set[str]] = set()


class TrainingConfig(MethodConfig):
    """What every method that trains a student can be told. The defaults are the lineage's (spec section 1.4, CIFAR)."""

    source = "GDFQ's code, CIFAR"

    epochs: int = Field(400, ge=0, unit="epochs", description="training in all, warm-up included")
    iterations: int = Field(200, ge=1, unit="steps", description="steps per epoch")
    batch_size: int = Field(200, ge=2, unit="images", description="synthetic images per step")
    student_lr: float = Field(1e-4, gt=0, description="learning rate of the student's SGD (Nesterov)")
    student_momentum: float = Field(0.9, ge=0, lt=1, description="momentum of the student's SGD")
    student_weight_decay: float = Field(1e-4, ge=0, description="weight decay of the student's SGD")
    milestones: list[int] = Field(
        [100, 200, 300], unit="epochs", description="epochs from which on learning rates are multiplied by lr_decay; never rescaled"
    )
    lr_decay: float = Field(0.1, gt=0, le=1, description="what learning rates are multiplied by at each milestone")


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

    images: N x C x H x W, normalised. labels: N (int64), or None where a method has none. teacher_logits: N x classes.
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
    needs: ClassVar[set[Needs]] = set()  # beside the teacher's logits: "statistics" (BN), "features" (of stages), "labels"
    quick: ClassVar[dict[str, Any]] = {}  # settings with which the conformance checks take seconds, beside a small budget
    expected_failures: ClassVar[dict[str, str]] = {}  # conformance checks that cannot hold, each with the reason
    info: ClassVar[MethodInfo]  # set by `register`

    config: Any

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
        """The training plan; none means that `finish` does it all."""
        return []

    def synthesize(self) -> Batch:
        """One batch, and whatever is learned in making it. It sees no student: with `shares_synthesis` it serves all bit widths."""
        raise NotImplementedError(f"{type(self).__name__} has phases but no synthesize()")

    def distill(self, student: Student, batch: Batch) -> Tensor:
        """The loss (scalar) that one student is to minimise on one batch."""
        raise NotImplementedError(f"{type(self).__name__} has a phase with distill=True but no distill()")

    def student_optimizer(self, student: Student) -> torch.optim.Optimizer:
        """SGD with Nesterov momentum over all weights, biases and BN parameters, as the lineage has it."""
        c = self.config
        return torch.optim.SGD(
            student.parameters(), lr=c.student_lr, momentum=c.student_momentum, weight_decay=c.student_weight_decay, nesterov=True, fused=True
        )

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

    # --- what a method uses -------------------------------------------------------------------------------------------

    def random(self, stream: str) -> torch.Generator:
        """The random stream of that name, on the method's device; pass it as `generator=` to torch's random functions."""
        if stream not in self._streams:
            self._streams[stream] = torch.Generator(self.device).manual_seed(stream_seed(self.seed, stream))
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

    def log(self, name: str, value: Tensor | float) -> None:
        """Averages a scalar over the epoch into history.csv. Within `distill` and `student_step` it belongs to that student."""
        self._log.add(name, value)


class Log:
    """Running sums of logged scalars, kept where they were computed so that nothing waits for the device."""

    SHARED = ""

    def __init__(self) -> None:
        self.scope = self.SHARED
        self.sums: dict[str, dict[str, list[Any]]] = {}

    @contextmanager
    def of(self, scope: str) -> Iterator[None]:
        """Inside, values belong to the student of that name."""
        self.scope = scope
        try:
            yield
        finally:
            self.scope = self.SHARED

    def add(self, name: str, value: Tensor | float) -> None:
        value = value.detach() if isinstance(value, Tensor) else torch.tensor(float(value))
        value = value if value.dtype == torch.float64 else value.float()
        entry = self.sums.setdefault(self.scope, {}).setdefault(name, [torch.zeros_like(value), 0])
        entry[0] += value
        entry[1] += 1

    def averages(self, scope: str) -> dict[str, float]:
        """The means since the last reset."""
        return {name: float(total) / count for name, (total, count) in self.sums.get(scope, {}).items()}

    def reset(self) -> None:
        self.sums = {}


def state_of(method: Method) -> dict[str, Any]:
    """Everything that a checkpoint must hold of a method. Raises TypeError naming an attribute that cannot be saved."""
    own = {name: value for name, value in vars(method).items() if name not in _GIVEN}
    return {
        "attributes": {name: _save(value, f"self.{name}") for name, value in own.items()},
        "streams": {name: stream.get_state() for name, stream in method._streams.items()},
        "log": {scope: {name: list(entry) for name, entry in values.items()} for scope, values in method._log.sums.items()},
    }


def restore_state(method: Method, state: dict[str, Any]) -> None:
    """Brings a method that was just set up to a saved state."""
    for name, value in state["attributes"].items():
        setattr(method, name, _load(value, getattr(method, name, None), f"self.{name}"))
    for name, stream in state["streams"].items():
        method.random(name).set_state(stream.cpu())
    method._log.sums = state["log"]


_GIVEN = {"teacher", "task", "config", "seed", "device", "_streams", "_schedules", "_log", "_work", "_image_sets"}  # what __init__ makes anew


def _save(value: Any, name: str) -> Any:
    if isinstance(value, Method):
        return {"method": state_of(value)}
    if hasattr(value, "state_dict"):
        return {"state_dict": value.state_dict()}
    if isinstance(value, torch.Generator):
        return {"generator": value.get_state()}
    if isinstance(value, Tensor):
        return {"tensor": value.detach()}
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    if isinstance(value, list | tuple):
        return {type(value).__name__: [_save(v, f"{name}[{i}]") for i, v in enumerate(value)]}
    if isinstance(value, dict):
        return {"dict": {k: _save(v, f"{name}[{k!r}]") for k, v in value.items()}}
    raise TypeError(
        f"{name} is a {type(value).__name__}, which cannot be checkpointed: keep a tensor, a number, a list or dict of these, "
        "something with a state_dict, or compute it where it is needed"
    )


def _load(saved: dict[str, Any], current: Any, name: str) -> Any:
    ((kind, content),) = saved.items()
    if kind == "method":
        restore_state(current, content)
        return current
    if kind in ("state_dict", "generator"):
        if current is None:
            raise TypeError(f"{name} was made after setup(), so it cannot be restored: make it in setup()")
        if kind == "state_dict":
            current.load_state_dict(content)
        else:
            current.set_state(content.cpu())
        return current
    if kind == "tensor":
        if isinstance(current, Tensor) and current.shape == content.shape and current.dtype == content.dtype:
            with torch.no_grad():
                current.copy_(content)  # in place: an optimizer may hold this very tensor
            return current
        return content
    if kind == "value":
        return content
    if kind == "dict":
        return {k: _load(v, current.get(k) if isinstance(current, dict) else None, f"{name}[{k!r}]") for k, v in content.items()}
    have = current if isinstance(current, list | tuple) else ()
    loaded = [_load(v, have[i] if i < len(have) else None, f"{name}[{i}]") for i, v in enumerate(content)]
    return tuple(loaded) if kind == "tuple" else loaded


def learning_rate(initial: float, milestones: Sequence[int], decay: float, epoch: int) -> float:
    """The rate in `epoch` (counted from 0): initial times decay for every milestone that has been reached."""
    return initial * decay ** sum(epoch >= m for m in milestones)


def image_sets_of(method: Method) -> Iterator[ImageSet]:
    """The image sets of a method, and of the methods inside it."""
    yield from method._image_sets
    for value in vars(method).values():
        if isinstance(value, Method):
            yield from image_sets_of(value)


def modules_of(method: Method) -> Iterator[nn.Module]:
    """The modules that a method, and the methods inside it, made for themselves."""
    for name, value in vars(method).items():
        if isinstance(value, Method):
            yield from modules_of(value)
        elif name not in _GIVEN:
            yield from (v for v in (value if isinstance(value, list | tuple) else [value]) if isinstance(v, nn.Module))
