"""One process at work: trains a bundle, evaluates its students and writes what they reached."""

from __future__ import annotations

import errno
import gc
import math
import signal
import time
import traceback
from typing import Any

import torch

from dfqbench.analysis.warning_signs import signs
from dfqbench.engine.checkpoint import load_checkpoint
from dfqbench.engine.device import DeviceLost, is_lost, out_of_memory, products_in
from dfqbench.engine.evaluate import Evaluated, state_hash
from dfqbench.engine.lockstep import Interrupted, Lockstep, Trainee
from dfqbench.engine.synthesis_cache import SynthesisCache
from dfqbench.errors import UserError
from dfqbench.export.find import NAME as STUDENT
from dfqbench.export.size import size_of
from dfqbench.export.student_file import save_student
from dfqbench.files import read_json, write_atomically
from dfqbench.method.learning_rate import unreached_milestones
from dfqbench.metrics import METRICS, metric_of
from dfqbench.network import Teacher
from dfqbench.quantization.student import Student
from dfqbench.run.agreement import rounded
from dfqbench.run.allocations import Allocations
from dfqbench.run.options import Options, StopFlag, Summary
from dfqbench.run.progress import Progress
from dfqbench.run.rehearsal import rehearse, why_not_replayed
from dfqbench.run.samples import png, sample_grid, sample_images
from dfqbench.run.scoring import Scoring, teacher_record
from dfqbench.run.watcher import Watcher
from dfqbench.run.yardstick import yardstick_of
from dfqbench.store import Store
from dfqbench.store.provenance import git_revision, provenance
from dfqbench.sweep.cell import Bundle, Cell
from dfqbench.sweep.load import LoadedSweep
from dfqbench.teachers import TeacherCard, load
from dfqbench.tracking.process import Observer

SAMPLES = 64
DISK_TROUBLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


class Worker:
    """Runs bundles one after the other, keeping the evaluation images and the last teacher in memory."""

    def __init__(
        self, loaded: LoadedSweep, store: Store, device: torch.device, options: Options, progress: Progress, stop: StopFlag, watching: Observer
    ):
        self.loaded, self.store, self.device, self.options, self.progress, self.stop = loaded, store, device, options, progress, stop
        self.watching = watching
        git_revision()  # as it is now, when the code is loaded, not when a cell ends
        self._scoring = Scoring(loaded, store, device, options, stop)
        self._allocations = Allocations(loaded, store.root, device, stop)
        self._teacher: tuple[TeacherCard, Teacher] | None = None
        self._remarks: set[str] = set()  # what has been told once already

    def run(self, bundle: Bundle, summary: Summary) -> None:
        try:
            with products_in(bundle.cells[0].precision):
                self._run(bundle, summary)
        except OSError as error:
            if error.errno not in DISK_TROUBLE:
                raise
            raise UserError(
                f"results folder {self.store.root}: {error.strerror}; what is saved so far stays, the same command goes on from there"
            ) from error
        except Exception as error:
            if not is_lost(error, self.device):
                raise
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            lost = f"{self.device} answers no more ({type(error).__name__}: {reason}): this process ends, its cells stay to be done"
            self._log(bundle, lost, told=False)
            raise DeviceLost(f"{lost}; the same command goes on from what is saved", [cell.id for cell in bundle.cells]) from error

    def _run(self, bundle: Bundle, summary: Summary) -> None:
        for cell in bundle.cells:
            self.store.write_cell(cell.record())
            self.watching.begun(cell.id)
        try:
            lockstep = self._train(bundle)
        except Interrupted:
            summary.interrupted = True
            summary.left += len(bundle.cells)
            return
        except Exception as error:  # one bad cell never sinks the others: recorded as what it is, with its traceback
            if (isinstance(error, OSError) and error.errno in DISK_TROUBLE) or is_lost(error, self.device):
                raise  # not the cell's fault
            message = str(error).strip() or type(error).__name__
            if isinstance(error, torch.OutOfMemoryError):
                message = out_of_memory(error, bundle.cells[0].config, len(bundle.cells))
            for cell in bundle.cells:
                self._failed(cell, type(error).__name__, message, traceback.format_exc())
            summary.failed += len(bundle.cells)
            return
        pictures = self._pictures(lockstep)
        for trainee in lockstep.trainees:
            if trainee.failed is not None:
                self._failed(trainee.cell, "Diverged", trainee.failed, "", steps=lockstep.student_steps)
                summary.failed += 1
            else:
                self._finished(trainee, lockstep, pictures)
                summary.done += 1
        self.store.finished_bundle(bundle.id)

    def _train(self, bundle: Bundle) -> Lockstep:
        first = bundle.cells[0]
        card = first.teacher
        teacher = self._load_teacher(card)
        with products_in("fp32"):  # what cells of other precisions share
            score = self._scoring.of(bundle, teacher, lambda line: self._log(bundle, line))
            widths = self._allocations.of(bundle, teacher, lambda line: self._log(bundle, line))

        def evaluate_student(student: Student) -> Evaluated:
            self.progress.evaluating()
            watcher.evaluating()
            before = state_hash(student)
            result = score(student)
            if state_hash(student) != before:
                raise RuntimeError("evaluation changed the student: its weights or ranges are not those from before")
            return result

        rehearse(bundle, teacher, self.device, lambda line: self._log(bundle, line))
        replays = self._replays(bundle, teacher)
        work = self.store.bundle_folder(bundle.id)
        watcher = Watcher(self.store, work / "checkpoint.pt", self.options, self.progress, self.stop, self.watching)
        every = self.loaded.sweep.evaluate_every
        plain, real = lambda cell: rounded(cell, teacher, self.device, widths.get(cell.id)), yardstick_of(first, self.loaded, self.device)
        lockstep = Lockstep(bundle, teacher, self.device, evaluate_student, every, work, plain, real, widths)
        if replays:
            lockstep.replay_steps(lambda line: self._log(bundle, line), streams=self.options.streams)
        made = SynthesisCache(self.store.images_folder, work, lockstep)
        state, why_not = load_checkpoint(watcher.path, lockstep.members)
        if state is not None:
            lockstep.restore(state)
            about_images = ""
        else:
            about_images = made.take_over()
        self.progress.bundle(bundle, lockstep.steps, lockstep.steps_done)
        self._say_about(lockstep, resumed=state is not None, why_not=why_not, about_images=about_images)
        watcher.when_made = lambda: self._keep(made, bundle)
        watcher.start(lockstep)
        try:
            lockstep.run(watcher)
        except Interrupted:
            self._log(bundle, f"stopped by {signal.Signals(self.stop.signal or 0).name} after step {lockstep.steps_done}, saved")
            raise
        finally:
            watcher.end()
        watcher.warn(lockstep)
        return lockstep

    def _replays(self, bundle: Bundle, teacher: Teacher) -> bool:
        """Steps as CUDA graphs: where that is asked for; where nothing is said, on a GPU, for a method that allows it, if a check of it passes."""
        if self.options.graphs is not None or self.device.type != "cuda":
            return bool(self.options.graphs)
        why = why_not_replayed(bundle, teacher, self.device, self.options.streams)
        if why:
            self._log(bundle, f"steps of {bundle.cells[0].method} are not replayed but run as they are: {why}")
        return why is None

    def _keep(self, made: SynthesisCache, bundle: Bundle) -> None:
        trouble = made.keep()
        if trouble:
            self._log(bundle, trouble)

    def _say_about(self, lockstep: Lockstep, resumed: bool, why_not: str, about_images: str) -> None:
        if resumed:
            self._log(lockstep.bundle, f"resumed at step {lockstep.steps_done} of {lockstep.steps}")
        else:
            self._log(lockstep.bundle, f"started, {lockstep.steps} steps", told=False)
        for line in filter(None, (f"starting again from the beginning: {why_not}" if why_not else "", about_images)):
            self._log(lockstep.bundle, line)
        method, student = lockstep.method, lockstep.trainees[0].student
        beyond, remarks = unreached_milestones(method.config), []
        if beyond:
            remarks.append(
                f"{method.info.name}: learning-rate milestones {', '.join(map(str, beyond))} lie beyond the last epoch and are not reached "
                "(they are never rescaled)"
            )
        if any(phase.distill for phase in lockstep.phases) and not lockstep.student_steps:
            remarks.append(f"{method.info.name}: no epoch of this budget trains the student: what comes before training takes all of them")
        if student.left_float:
            teacher = lockstep.bundle.cells[0].teacher.label
            remarks.append(f"{teacher}: kept in float, no quantizer is known for them: {', '.join(student.left_float)}")
        for line in remarks:
            self._log(lockstep.bundle, line, told=line not in self._remarks)
            self._remarks.add(line)

    def _log(self, bundle: Bundle, line: str, told: bool = True) -> None:
        """Into the log of each cell, and `told` to who watches."""
        if told:
            self.progress.say(line)
        for cell in bundle.cells:
            self.store.append_log(cell.id, line)

    def _load_teacher(self, card: TeacherCard) -> Teacher:
        if self._teacher is None or self._teacher[0] != card:
            self._teacher = (card, Teacher(load(self.loaded.teachers[card], card), card.task))
            gc.collect()  # tracing leaves a frame that refers to itself, and through its callers to a whole bundle
        return self._teacher[1]

    def _pictures(self, lockstep: Lockstep) -> dict[str, bytes]:
        """File name -> PNG of what the method wants to show. A picture that fails is told, and costs no result."""
        found = {}
        if lockstep.last_batch is not None:
            found["samples.png"] = sample_grid(*sample_images(lockstep.last_batch, SAMPLES), lockstep.method.task)
        try:
            with torch.no_grad(), lockstep.autocast:
                found |= {f"{name}.png": png(picture) for name, picture in lockstep.method.pictures().items()}
        except Exception as error:
            self._log(lockstep.bundle, f"no pictures from {lockstep.method.info.name}: {type(error).__name__}: {error}")
        return found

    def _finished(self, trainee: Trainee, lockstep: Lockstep, pictures: dict[str, bytes]) -> None:
        cell, evaluation = trainee.cell, trainee.evaluation
        assert evaluation is not None
        seconds = lockstep.watch.read()
        own, shared = seconds.get(trainee.name, 0.0), seconds.get(lockstep.SHARED, 0.0)
        metric = evaluation.metric
        evaluated = [{"epoch": row["epoch"], metric: row[metric]} for row in trainee.history if metric in row]
        last = {"epoch": len(lockstep.epochs), metric: evaluation.value}
        best = max([*evaluated, last], key=lambda row: float(row[metric]))
        if trainee.history:
            trainee.history[-1][metric] = evaluation.value
            self.store.write_history(cell.id, trainee.history)
        for name, content in (evaluation.files() | pictures).items():
            write_atomically(self.store.folder(cell.id) / name, content)
        kept = self._kept_student(trainee, lockstep)
        result = {
            "id": cell.id,
            "cell": cell.record(),
            **evaluation.scores(),
            **(self._scoring.beside(cell, lockstep.teacher, lockstep.widths.get(cell.id)) if metric == "agreement" else {}),
            **self._scoring.exits(cell, trainee.student, cell.precision),
            "best": best,
            "evaluations": len(evaluated) + (not evaluated or evaluated[-1]["epoch"] != last["epoch"]),
            "last_epoch": len(lockstep.epochs),
            "steps": lockstep.student_steps,
            "teacher": read_json(teacher_record(self.store, cell)),
            "student_state": state_hash(trainee.student),
            "student": kept,
            "left_float": trainee.student.left_float,
            "warnings": [sign.as_dict() for sign in signs(trainee.history)],
            "seconds": {"own": round(own, 3), "shared": round(shared, 3), "bundle": [c.id for c in lockstep.bundle.cells]},
            **_cpu_seconds(trainee, lockstep),
            **self._size(trainee, lockstep),
            **({"allocation": self._allocations.record(cell)} if cell.allocation else {}),
            "provenance": self._provenance(lockstep),
            "finished": time.time(),
        }
        self.store.append_log(cell.id, f"done: {METRICS[metric].name} {evaluation.value:.2f} % at epoch {last['epoch']}")
        self.store.write_result(cell.id, result)
        self.watching.finished(cell.id)
        self.progress.done(cell, _reached(result))

    def _size(self, trainee: Trainee, lockstep: Lockstep) -> dict[str, Any]:
        """Of teacher and student. A network that cannot be counted is told, and costs no result."""
        try:
            return {"size": {"teacher": size_of(lockstep.teacher).as_dict(), "student": size_of(trainee.student).as_dict()}}
        except Exception as error:
            self._log(lockstep.bundle, f"no size: {type(error).__name__}: {error}")
            return {}

    def _kept_student(self, trainee: Trainee, lockstep: Lockstep) -> dict[str, Any]:
        """Writes student.safetensors: its `sha256` and `bytes`. A student that has no form in a file is told, and costs no result."""
        cell = trainee.cell
        if self.loaded.sweep.store.students == "off":
            return {}
        about = {"cell": cell.record(), "steps": lockstep.student_steps, "last_epoch": len(lockstep.epochs)}
        try:
            return save_student(trainee.student, self.store.folder(cell.id) / STUDENT, about)
        except UserError as error:
            self.store.append_log(cell.id, str(error))
            self.progress.say(str(error))
            return {"not_kept": str(error)}

    def _provenance(self, lockstep: Lockstep) -> dict[str, Any]:
        """On what, and, where it was so: that steps were replayed (at once), and which cell made the images in how many seconds."""
        graphs = ({"graphs": True} | ({"streams": True} if lockstep.parts.streams else {})) if lockstep.parts.replayed else {}
        return provenance(self.device) | graphs | ({"images": lockstep.images_from} if lockstep.images_from else {})

    def _failed(self, cell: Cell, kind: str, message: str, trace: str, **known: Any) -> None:
        self.store.append_log(cell.id, f"failed: {kind}: {message}")
        self.store.write_failure(cell.id, kind, message, trace, **known)
        self.watching.failed(cell.id)
        self.progress.failed(cell, f"{kind}: {message.splitlines()[0]}")


def _reached(result: dict[str, Any]) -> str:
    """For those who watch."""
    if "agreement" not in result:
        metric = metric_of(result)
        return f"{metric.name} {result[metric.key]:.2f} % (teacher {result['teacher'][metric.key]:.2f} %)"
    plain = result["plain_rounding"]
    beside = f" (plain rounding: {plain['agreement']:.2f} %, {plain['kl']:.3g})" if plain else ""
    return f"agreement with the teacher {result['agreement']:.2f} %, KL {result['kl']:.3g} nats{beside}"


def _cpu_seconds(trainee: Trainee, lockstep: Lockstep) -> dict[str, Any]:
    """Processor time beside the clock's; nothing where an earlier version began the cell and did not measure it."""
    cpu = {"own": lockstep.watch.cpu.get(trainee.name, 0.0), "shared": lockstep.watch.cpu.get(lockstep.SHARED, 0.0)}
    return {"cpu_seconds": {part: round(seconds, 3) for part, seconds in cpu.items()}} if all(map(math.isfinite, cpu.values())) else {}
