"""The lockstep engine: one stream of synthetic batches, students of several bit widths trained on it side by side.

Whatever a student ends with is bit-identical to what it would end with alone: students share the images and nothing else. (Over 300 lines: the
loop and what a checkpoint holds of it are read together.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from dfqbench.engine.device import Stopwatch, autocast_of
from dfqbench.engine.diagnosis import agreements, look, range_change, widths
from dfqbench.engine.evaluate import Evaluated
from dfqbench.engine.method_state import optimizers_of, restorable_of, restore_state, set_up, state_of
from dfqbench.engine.step_graph import CapturedParts, CudaRecorder, Eager, Parts, Recorder
from dfqbench.method.contract import Batch, Phase
from dfqbench.method.learning_rate import is_fused, learning_rate, place_rates, rate_of, set_rate
from dfqbench.method.log import Log
from dfqbench.network import Teacher
from dfqbench.quantization.student import Student
from dfqbench.sweep.cell import Bundle, Cell, fingerprint

BATCH = [field.name for field in fields(Batch)]  # a method's own batches may hold more, which nobody but the method asks for


class Interrupted(Exception):
    """The run was asked to stop and has saved its state."""


class Watcher(Protocol):
    """What the engine tells while it runs, and what it asks."""

    def step(self, lockstep: Lockstep, phase: Phase) -> None:
        """After every step; may save a checkpoint, may raise Interrupted."""

    def epoch(self, lockstep: Lockstep, phase: Phase) -> None:
        """After every epoch, when history has its new row."""


@dataclass
class Trainee:
    """One cell's student with what belongs to it alone."""

    cell: Cell
    student: Student
    optimizer: torch.optim.Optimizer | None
    history: list[dict[str, Any]] = field(default_factory=list)
    failed: str | None = None
    widths: Tensor | None = None  # of its ranges, when they were last tracked
    evaluation: Evaluated | None = None  # the latest

    @property
    def name(self) -> str:
        return self.cell.width


class Lockstep:
    """A bundle in training. `run` goes from where it is to the end; `state` and `restore` carry it over an interruption.

    epoch, iteration: position in the plan: `iteration` steps of `epoch` (counted over all phases) are done. parts: how the parts of a step are run;
    as they are, unless `replay_steps` was called.
    """

    SHARED = "shared"

    def __init__(
        self,
        bundle: Bundle,
        teacher: Teacher,
        device: torch.device,
        evaluate: Callable[[Student], Evaluated],
        evaluate_every: int | None = None,
        work: Path | None = None,
        plain: Callable[[Cell], Student | None] = lambda cell: None,
        yardstick: Tensor | None = None,
        widths: Mapping[str, Mapping[str, int]] | None = None,
    ):
        """plain: makes the teacher plainly rounded, as a cell has it, to compare its student with; None where that cannot be.

        yardstick: see `set_up`. widths: bits by tensor of each cell that has an allocation, by its id.
        """
        first = bundle.cells[0]
        self.widths = widths or {}
        self.bundle, self.device, self.evaluate, self.evaluate_every, self.plain = bundle, device, evaluate, evaluate_every, plain
        self.autocast = autocast_of(first, device)
        self.teacher = teacher.to(device).to(memory_format=torch.channels_last)
        self.method = set_up(first, self.teacher, device, work, yardstick)
        self.phases = self.method.phases()
        self.epochs = [(phase, index) for phase in self.phases for index in range(phase.epochs)]
        self.trainees = [self._trainee(cell) for cell in bundle.cells]
        self._restorable = restorable_of(self.method)
        self.epoch = self.iteration = 0
        self.watch = Stopwatch(device)
        self.last_batch: Batch | None = None
        self.parts: Parts = Eager()
        self._place_rates()
        self.images_from: dict[str, Any] | None = None  # the cell that made them and in how many seconds, where they were taken over

    def _trainee(self, cell: Cell) -> Trainee:
        own = self.widths[cell.id] if cell.allocation else None
        student = Student(self.teacher, cell.protocol, cell.bits, own).to(self.device).to(memory_format=torch.channels_last)
        trains = any(phase.distill for phase in self.phases)
        optimizer = self.method.student_optimizer(student) if trains else None
        if optimizer is not None:
            c = self.method.config
            self.method.schedule(optimizer, getattr(c, "milestones", []), getattr(c, "lr_decay", 1.0))
        return Trainee(cell, student, optimizer)

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """The method's own and the students'."""
        return [*optimizers_of(self.method), *(t.optimizer for t in self.trainees if t.optimizer is not None)]

    def _place_rates(self) -> None:
        if self.device.type == "cuda" and self.method.static_step:
            for optimizer in self.optimizers:
                place_rates(optimizer, self.device)

    def replay_steps(self, say: Callable[[str], None], make_recorder: Callable[[], Recorder] | None = None, streams: bool = False) -> None:
        """From here on, steps are recorded and replayed (as CUDA graphs): see `step_graph`. Where that cannot be, `say` gets a line that says why.

        streams: students are replayed at the same time; each gets an equal share of the seconds that they take together.
        """
        name, loose = self.method.info.name, [type(optimizer).__name__ for optimizer in self.optimizers if not is_fused(optimizer)]
        if not self.method.static_step:
            say(f"steps of {name} are not replayed but run as they are: they are not the same operations every time (static_step)")
        elif loose:
            say(f"steps of {name} are not replayed but run as they are: its {loose[0]} is not one of torch's fused optimizers (fused=True)")
        else:
            students = {t.name: (t.student, t.optimizer) for t in self.trainees}
            device = self.device  # not the lockstep itself: it would keep itself alive
            self.parts = CapturedParts(self.method, students, make_recorder or (lambda: CudaRecorder(device)), say, streams)

    @property
    def active(self) -> list[Trainee]:
        """The students still in training: one that diverged has left."""
        return [t for t in self.trainees if t.failed is None]

    def iterations_of(self, phase: Phase) -> int:
        """Steps per epoch."""
        return phase.iterations if phase.iterations is not None else int(self.method.config.iterations)

    @property
    def steps_done(self) -> int:
        return sum(self.iterations_of(phase) for phase, _ in self.epochs[: self.epoch]) + self.iteration

    @property
    def steps(self) -> int:
        return sum(self.iterations_of(phase) for phase, _ in self.epochs)

    @property
    def _at_end_of_epoch(self) -> bool:
        """Whether all steps of the epoch are done, but not what follows them."""
        return self.epoch < len(self.epochs) and self.iteration == self.iterations_of(self.epochs[self.epoch][0])

    @property
    def making_epochs(self) -> int:
        """Epochs at the beginning of the plan that only make images: no student takes part."""
        return next((i for i, (phase, _) in enumerate(self.epochs) if phase.step is None), len(self.epochs))

    @property
    def student_steps(self) -> int:
        """Updates that each student gets."""
        return sum(self.iterations_of(phase) for phase, _ in self.epochs if phase.distill)

    # --- the loop -----------------------------------------------------------------------------------------------------

    def run(self, watcher: Watcher) -> None:
        """Trains to the end of the plan, then lets the method finish every student and evaluates it.

        Raises what the method raises, and Interrupted where the watcher does.
        """
        while self.epoch < len(self.epochs) and self.active:
            phase, index = self.epochs[self.epoch]
            calibrating = index < phase.calibration_epochs
            self.begin_epoch(phase, calibrating)
            while self.iteration < self.iterations_of(phase):
                self.step(phase, calibrating)
                self.iteration += 1
                watcher.step(self, phase)
            self._end_epoch(phase, self.method._log.averages(Log.SHARED), calibrating)
            self.epoch, self.iteration = self.epoch + 1, 0
            watcher.epoch(self, phase)
        for trainee in self.active:
            with self.watch.of(trainee.name):
                self.method.finish(trainee.student)
            trainee.student.check_ranges()
            trainee.evaluation = self.evaluate(trainee.student)
            for row in trainee.history[-1:]:
                row |= self._agreements(trainee)

    def begin_epoch(self, phase: Phase, calibrating: bool) -> None:
        """Learning rates and modes of an epoch."""
        epoch = sum(phase.step is None for phase, _ in self.epochs[: self.epoch])  # a milestone never counts the making of images
        for optimizer, milestones, decay in self.method._schedules:
            for group in optimizer.param_groups:
                set_rate(group, learning_rate(group["initial_lr"], milestones, decay, epoch))
        self.parts.begin((phase, calibrating))
        for trainee in self.active:
            trainee.student.training_mode(phase.distill)
            trainee.student.track_ranges(calibrating)

    def skip_epoch(self, logged: dict[str, float], seconds: float) -> None:
        """Goes past an epoch that only makes images, whose work was brought here from elsewhere.

        logged: the epoch's averages. seconds: what the work had cost by its end.
        """
        phase, _ = self.epochs[self.epoch]
        self.begin_epoch(phase, calibrating=False)
        self.watch.totals[self.SHARED] = seconds
        self._end_epoch(phase, logged)
        self.epoch += 1

    def step(self, phase: Phase, calibrating: bool) -> None:
        """One step of a phase: images, then every student."""
        with self.watch.of(self.SHARED):
            self.parts.next(self.method.before_step(phase))
            batch = self.parts.run(self.SHARED, lambda: self._synthesize(phase))
        if phase.step is not None:
            return
        assert batch is not None
        self.last_batch = batch
        students = self.active if phase.distill or calibrating else []
        for at_once in [students] if self.parts.streams and students else [[trainee] for trainee in students]:
            with self.watch.of(*(trainee.name for trainee in at_once)):
                for trainee in at_once:
                    self.parts.run(trainee.name, lambda trainee=trainee: self._train(trainee, batch, phase.distill))  # type: ignore[misc]
                self.parts.join()

    def _synthesize(self, phase: Phase) -> Batch | None:
        with self.autocast:
            if phase.step is not None:
                phase.step()
                return None
            return (phase.batch or self.method.synthesize)()

    def _train(self, trainee: Trainee, batch: Batch, distill: bool) -> None:
        """One student's part: an update, or a look at the batch that its ranges are tracked on."""
        with self.method._log.of(trainee.name):
            if not distill:
                with torch.no_grad(), self.autocast:
                    trainee.student(batch.images)
                return
            assert trainee.optimizer is not None
            with self.autocast:
                loss = self._loss(trainee.student, batch)
            self.method.log("loss", loss)
            self.method.student_step(trainee.student, loss, trainee.optimizer)
            if not self.method.info.shares_synthesis:
                with self.autocast:
                    self.method.adversary(trainee.student)

    def _loss(self, student: Student, batch: Batch) -> Tensor:
        """The method's; of a network with early exits the sum over them, each learning from the teacher's same exit."""
        loss = self.method.distill(student, batch)
        for exit in range(self.teacher.task.exits - 1):
            with student.answering_at(exit), self.teacher.answering_at(exit):
                with torch.no_grad():
                    said = self.teacher(batch.images)
                loss = loss + self.method.distill(student, replace(batch, teacher_logits=said))
        return loss

    def _end_epoch(self, phase: Phase, shared: dict[str, float], calibrating: bool = False) -> None:
        """shared: the averages of what was logged outside any student."""
        log, epoch, seconds = self.method._log, self.epoch + 1, self.watch.read()
        for trainee in self.active:
            trainee.student.training_mode(False)
            trainee.student.track_ranges(False)
            row: dict[str, Any] = {"epoch": epoch, "phase": phase.name, **shared, **log.averages(trainee.name)}
            if trainee.optimizer is not None and phase.distill:
                row["student_lr"] = rate_of(trainee.optimizer.param_groups[0])
            if self.last_batch is not None and (phase.distill or calibrating):
                row |= look(trainee.student, self.last_batch, self.autocast)
            if calibrating:
                before, trainee.widths = trainee.widths, widths(trainee.student)
                row |= range_change(before, trainee.widths)
            if self._evaluates_after(epoch, trainee):
                trainee.evaluation = self.evaluate(trainee.student)
                row[trainee.evaluation.metric] = trainee.evaluation.value
                row |= self._agreements(trainee)
            row["seconds"] = round(seconds.get(self.SHARED, 0.0) + seconds.get(trainee.name, 0.0), 3)
            trainee.history.append(row)
            if not math.isfinite(row.get("loss", 0.0)):
                trainee.failed = f"diverged: the loss is {row['loss']} in epoch {epoch}"
        log.reset()

    def _agreements(self, trainee: Trainee) -> dict[str, float]:
        return agreements(trainee.student, self.plain(trainee.cell), self.last_batch, self.autocast) if self.last_batch is not None else {}

    def _evaluates_after(self, epoch: int, trainee: Trainee) -> bool:
        """The last epoch is evaluated after `finish`; a student without ranges has nothing to say yet."""
        due = self.evaluate_every is not None and epoch % self.evaluate_every == 0 and epoch < len(self.epochs)
        return due and all(q.has_range for q in trainee.student.quantizers.values())

    # --- interruption -------------------------------------------------------------------------------------------------

    @property
    def members(self) -> list[str]:
        """Its cells, each with its tensors' widths where it has an allocation: what a state is a state of."""
        return [cell.id + (f" {fingerprint(dict(self.widths[cell.id]))}" if cell.allocation else "") for cell in self.bundle.cells]

    def method_state(self) -> dict[str, Any]:
        """The method's own part of `state`. Raises TypeError naming an attribute that could not be restored."""
        return state_of(self.method, self._restorable)

    def state(self) -> dict[str, Any]:
        """Tensors, numbers and strings only: everything that the rest of the run depends on."""
        return {
            "members": self.members,
            "epoch": self.epoch,
            "iteration": self.iteration,
            "method": self.method_state(),
            "students": {
                t.name: {
                    "network": t.student.state_dict(),
                    "optimizer": t.optimizer.state_dict() if t.optimizer else None,
                    "history": t.history,
                    "failed": t.failed,
                    "widths": t.widths,
                }
                for t in self.trainees
            },
            "global_random": torch.get_rng_state(),
            "cuda_random": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            "seconds": dict(self.watch.read()),
            "cpu_seconds": dict(self.watch.cpu),
            "images_from": self.images_from,
            "last_batch": {name: getattr(self.last_batch, name) for name in BATCH} if self.last_batch and self._at_end_of_epoch else None,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from a state saved by a bundle of the same members."""
        self.epoch, self.iteration = state["epoch"], state["iteration"]
        restore_state(self.method, state["method"])
        for trainee in self.trainees:
            saved = state["students"][trainee.name]
            trainee.student.load_state_dict(saved["network"])
            if trainee.optimizer is not None:
                trainee.optimizer.load_state_dict(saved["optimizer"])
            trainee.history, trainee.failed, trainee.widths = saved["history"], saved["failed"], saved.get("widths")
        self._place_rates()  # loaded optimizers hold other tensors
        self.parts.forget()
        torch.set_rng_state(state["global_random"].cpu())
        if state["cuda_random"] is not None:
            torch.cuda.set_rng_state(state["cuda_random"].cpu(), self.device)
        self.watch.goes_on(state["seconds"], state.get("cpu_seconds"))
        self.images_from = state.get("images_from")
        parts: dict[str, Any] = {k: v if v is None else v.to(self.device) for k, v in (state.get("last_batch") or {}).items()}
        self.last_batch = Batch(**parts) if parts else None
