"""Runs what a sweep still lacks: claims cells, runs bundles, writes results; and says in which state every cell is."""

from __future__ import annotations

import errno
import io
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch

from benchmark.cell import Bundle, Cell, bundles, fingerprint
from benchmark.checkpoint import load_checkpoint, save_checkpoint
from benchmark.data import Images
from benchmark.engine import Interrupted, Lockstep, Trainee, check_device, sample_images, unreached_milestones
from benchmark.errors import UserError
from benchmark.evaluate import Evaluation, evaluate, state_hash
from benchmark.made_images import MadeImages
from benchmark.memory import keep_freed_memory
from benchmark.method import Phase
from benchmark.network import Teacher
from benchmark.progress import Progress
from benchmark.provenance import git_revision, provenance
from benchmark.samples import png, sample_grid
from benchmark.status import Status, statuses
from benchmark.store import Store, read_json, write_atomically, write_json
from benchmark.student import Student
from benchmark.sweep import LoadedSweep, tracking_of
from benchmark.teachers import TeacherCard, load
from benchmark.tracking_process import Observer, observer

SAMPLES = 64
PROGRESS_EVERY_S = 5.0
DISK_TROUBLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


@dataclass
class Options:
    """How to run, as opposed to what: nothing here is part of a cell's identity."""

    device: str = "auto"
    checkpoint_every_s: float = 300.0
    retry_failed: bool = False
    stop_at_failure: bool = False  # after the bundle in which a cell failed, so that the rest gets a fresh process
    evaluation_batch: int = 500
    wandb: str | None = None  # online, offline or off instead of what the config says
    graphs: bool = False  # replay training steps as CUDA graphs, where the method allows it


class StopFlag:
    """Set by SIGTERM, SIGUSR2 or Ctrl-C: the step ends, the state is saved. A second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.signal: int | None = None

    @contextmanager
    def installed(self) -> Iterator[StopFlag]:
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.signal(number, self._caught) for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _caught(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number


@dataclass
class Summary:
    """What became of a run's cells."""

    done: int = 0
    failed: int = 0
    left: int = 0  # to other processes, to an earlier failure, or to the next run
    interrupted: bool = False


def run_sweep(loaded: LoadedSweep, store: Store, options: Options, progress: Progress, stop: StopFlag) -> Summary:
    """Runs every cell of the sweep that is not done, and notes which cells it spans."""
    note_sweep(loaded, store)
    return run_cells(loaded, loaded.cells, store, options, progress, stop)


def note_sweep(loaded: LoadedSweep, store: Store) -> None:
    """Which cells a config stands for, so that `table` and `status` need not work it out again."""
    cells = {cell.id: str(cell) for cell in loaded.cells}
    write_json(store.root / "sweeps" / f"{loaded.sweep.name}.json", {"config": loaded.text_sha256, "cells": list(cells), "labels": cells})


def run_cells(loaded: LoadedSweep, cells: list[Cell], store: Store, options: Options, progress: Progress, stop: StopFlag) -> Summary:
    """Runs those of a sweep's cells that are not done. One that fails is recorded and does not keep the others from running."""
    device = check_device(options.device)
    if options.graphs and device.type != "cuda":
        raise UserError(f"--graphs: CUDA graphs need a GPU, and the device is {device}")
    keep_freed_memory()
    if device.type == "cuda":
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False  # fp32 means fp32
    states = statuses(cells, store)
    skipped = {Status.DONE, Status.RUNNING} | (set() if options.retry_failed else {Status.FAILED})
    todo = bundles(cell for cell in cells if states[cell.id].status not in skipped)
    summary = Summary(left=sum(states[cell.id].status in skipped - {Status.DONE} for cell in cells))
    watching = observer(store.root, loaded.sweep.name, tracking_of(loaded.sweep, options.wandb))
    worker = _Worker(loaded, store, device, options, progress, stop, watching)
    progress.start(sum(len(b.cells) for b in todo), len(cells))
    for number, bundle in enumerate(todo):
        if stop.signal is not None:
            summary.interrupted = True
            summary.left += sum(len(b.cells) for b in todo[number:])
            break
        if options.stop_at_failure and summary.failed:
            summary.left += sum(len(b.cells) for b in todo[number:])
            break
        with store.leases([cell.id for cell in bundle.cells]) as held:
            mine = tuple(cell for cell in bundle.cells if cell.id in held and store.result(cell.id) is None)
            summary.left += sum(cell.id not in held for cell in bundle.cells)
            if mine:
                worker.run(Bundle(mine), summary)
    progress.stop()
    watching.close(progress.say, hurry=summary.interrupted)
    return summary


class _Worker:
    """Runs bundles one after the other, keeping the evaluation images and the last teacher in memory."""

    def __init__(
        self, loaded: LoadedSweep, store: Store, device: torch.device, options: Options, progress: Progress, stop: StopFlag, watching: Observer
    ):
        self.loaded, self.store, self.device, self.options, self.progress, self.stop = loaded, store, device, options, progress, stop
        self.watching = watching
        git_revision()  # as it is now, when the code is loaded, not when a cell ends
        self._images: dict[str, Images] = {}
        self._teacher: tuple[TeacherCard, Teacher] | None = None

    def run(self, bundle: Bundle, summary: Summary) -> None:
        try:
            self._run(bundle, summary)
        except OSError as error:
            if error.errno not in DISK_TROUBLE:
                raise
            raise UserError(
                f"results folder {self.store.root}: {error.strerror}; what is saved so far stays, the same command goes on from there"
            ) from error

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
            if isinstance(error, OSError) and error.errno in DISK_TROUBLE:
                raise  # not the cell's fault
            for cell in bundle.cells:
                self._failed(cell, type(error).__name__, str(error).strip() or type(error).__name__, traceback.format_exc())
            summary.failed += len(bundle.cells)
            return
        pictures = self._pictures(lockstep)
        for trainee in lockstep.trainees:
            if trainee.failed is not None:
                self._failed(trainee.cell, "Diverged", trainee.failed, "")
                summary.failed += 1
            else:
                self._finished(trainee, lockstep, pictures)
                summary.done += 1
        self.store.finished_bundle(bundle.id)

    def _train(self, bundle: Bundle) -> Lockstep:
        first = bundle.cells[0]
        card = first.teacher
        teacher = self._load_teacher(card)
        images = self._decoded(card)
        self._measure_teacher(first, teacher, images)

        def evaluate_student(student: Student) -> Evaluation:
            self.progress.evaluating()
            watcher.evaluating()
            before = state_hash(student)
            result = self._evaluate(student, first, images)
            if state_hash(student) != before:
                raise RuntimeError("evaluation changed the student: its weights or ranges are not those from before")
            return result

        work = self.store.bundle_folder(bundle.id)
        watcher = _Watcher(self.store, work / "checkpoint.pt", self.options, self.progress, self.stop, self.watching)
        lockstep = Lockstep(bundle, teacher, self.device, evaluate_student, self.loaded.sweep.evaluate_every, work)
        if self.options.graphs:
            lockstep.replay_steps(lambda line: self._log(bundle, line))
        made = MadeImages(self.store.images_folder, work, lockstep)
        state, why_not = load_checkpoint(watcher.path, [cell.id for cell in bundle.cells])
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
        return lockstep

    def _keep(self, made: MadeImages, bundle: Bundle) -> None:
        trouble = made.keep()
        if trouble:
            self._log(bundle, trouble)

    def _say_about(self, lockstep: Lockstep, resumed: bool, why_not: str, about_images: str) -> None:
        lines = [f"resumed at step {lockstep.steps_done} of {lockstep.steps}"] if resumed else [f"started, {lockstep.steps} steps"]
        if why_not:
            lines.append(f"starting again from the beginning: {why_not}")
        if about_images:
            lines.append(about_images)
        beyond = unreached_milestones(lockstep.method.config)
        if beyond:
            lines.append(
                f"learning-rate milestones {', '.join(map(str, beyond))} lie beyond the last epoch and are not reached (they are never rescaled)"
            )
        left_float = lockstep.trainees[0].student.left_float
        if left_float:
            lines.append(f"kept in float, no quantizer is known for them: {', '.join(left_float)}")
        for line in lines:
            self._log(lockstep.bundle, line)

    def _log(self, bundle: Bundle, line: str) -> None:
        self.progress.say(line)
        for cell in bundle.cells:
            self.store.append_log(cell.id, line)

    def _load_teacher(self, card: TeacherCard) -> Teacher:
        if self._teacher is None or self._teacher[0] != card:
            self._teacher = (card, Teacher(load(self.loaded.teachers[card]), card.task))
        return self._teacher[1]

    def _decoded(self, card: TeacherCard) -> Images:
        key = fingerprint(card.task.as_dict())
        if key not in self._images:
            self._images = {key: self.loaded.evaluation.decode(card.task)}
        return self._images[key]

    def _evaluate(self, network: Any, cell: Cell, images: Images) -> Evaluation:
        return evaluate(network, images, cell.teacher.task, device=self.device, precision=cell.precision, batch_size=self.options.evaluation_batch)

    def _measure_teacher(self, cell: Cell, teacher: Teacher, images: Images) -> dict[str, Any]:
        """The teacher's own accuracy, in full precision: measured once per teacher and set."""
        path = teacher_record(self.store, cell)
        known = read_json(path)
        if known is None:
            teacher.to(self.device).to(memory_format=torch.channels_last)
            result = evaluate(teacher, images, cell.teacher.task, device=self.device, precision="fp32", batch_size=self.options.evaluation_batch)
            known = {"teacher": cell.record()["teacher"], "evaluation": cell.record()["evaluation"], **_scores(result)}
            write_json(path, known)
        return dict(known)

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
        evaluated = [{"epoch": row["epoch"], "top1": row["top1"]} for row in trainee.history if "top1" in row]
        last = {"epoch": len(lockstep.epochs), "top1": evaluation.top1}
        best = max([*evaluated, last], key=lambda row: float(row["top1"]))
        if trainee.history:
            trainee.history[-1]["top1"] = evaluation.top1
            self.store.write_history(cell.id, trainee.history)
        buffer = io.BytesIO()
        np.save(buffer, np.packbits(evaluation.correct))
        write_atomically(self.store.folder(cell.id) / "correct.npy", buffer.getvalue())
        for name, content in pictures.items():
            write_atomically(self.store.folder(cell.id) / name, content)
        result = {
            "id": cell.id,
            "cell": cell.record(),
            **_scores(evaluation),
            "best": best,
            "evaluations": len(evaluated) + (not evaluated or evaluated[-1]["epoch"] != last["epoch"]),
            "last_epoch": len(lockstep.epochs),
            "steps": lockstep.student_steps,
            "teacher": read_json(teacher_record(self.store, cell)),
            "student_state": state_hash(trainee.student),
            "left_float": trainee.student.left_float,
            "seconds": {"own": round(own, 3), "shared": round(shared, 3), "bundle": [c.id for c in lockstep.bundle.cells]},
            "provenance": self._provenance(lockstep),
            "finished": time.time(),
        }
        self.store.append_log(cell.id, f"done: top-1 {evaluation.top1:.2f} % at epoch {last['epoch']}")
        self.store.write_result(cell.id, result)
        self.watching.finished(cell.id)
        self.progress.done(cell, evaluation.top1, float(result["teacher"]["top1"]))

    def _provenance(self, lockstep: Lockstep) -> dict[str, Any]:
        """On what, and, where it was so: that steps were replayed, and which cell made the images in how many seconds."""
        graphs = {"graphs": True} if lockstep.parts.replayed else {}
        return provenance(self.device) | graphs | ({"images": lockstep.images_from} if lockstep.images_from else {})

    def _failed(self, cell: Cell, kind: str, message: str, trace: str) -> None:
        self.store.append_log(cell.id, f"failed: {kind}: {message}")
        self.store.write_failure(cell.id, kind, message, trace)
        self.watching.failed(cell.id)
        self.progress.failed(cell, f"{kind}: {message.splitlines()[0]}")


class _Watcher:
    """Shows progress and saves: every so many seconds, and at the end of the step in which a signal came."""

    def __init__(self, store: Store, path: Path, options: Options, progress: Progress, stop: StopFlag, watching: Observer):
        self.store, self.path, self.options, self.progress, self.stop, self.watching = store, path, options, progress, stop, watching
        self.saved_at = time.monotonic()
        self.noted: dict[str, Any] = {}
        self.lockstep: Lockstep | None = None
        self.when_made: Callable[[], None] = lambda: None  # called once the phases that only make images are over

    def start(self, lockstep: Lockstep) -> None:
        self.lockstep, self.began, self.first_step = lockstep, time.monotonic(), lockstep.steps_done
        self._note("starting")

    def evaluating(self) -> None:
        self._note("evaluating")

    def _note(self, phase: str) -> None:
        """How far the bundle is, for `dfqbench status`."""
        if self.lockstep is None:
            return
        done, seconds = self.lockstep.steps_done, time.monotonic() - self.began
        rate = (done - self.first_step) / seconds if seconds > 0 else 0.0
        self.noted = {"phase": phase, "step": done, "steps": self.lockstep.steps, "rate": round(rate, 3), "time": time.time()}
        for trainee in self.lockstep.trainees:
            self.store.write_progress(trainee.cell.id, self.noted)

    def step(self, lockstep: Lockstep, phase: Phase) -> None:
        self.progress.step(phase.name)
        if self.stop.signal is not None or time.time() - self.noted["time"] >= PROGRESS_EVERY_S:
            self._note(phase.name)
        if self.stop.signal is not None:
            save_checkpoint(self.path, lockstep.state())
            raise Interrupted
        if time.monotonic() - self.saved_at >= self.options.checkpoint_every_s:
            try:
                save_checkpoint(self.path, lockstep.state())
            except OSError as error:
                self.progress.say(f"checkpoint not written ({error.strerror}); going on, trying again in {self.options.checkpoint_every_s:g} s")
            self.saved_at = time.monotonic()

    def epoch(self, lockstep: Lockstep, phase: Phase) -> None:
        for trainee in lockstep.trainees:
            self.store.write_history(trainee.cell.id, trainee.history)
            self.watching.epoch(trainee.cell.id)
        if lockstep.epoch == lockstep.making_epochs:
            self.when_made()
        self.progress.epoch(lockstep.epoch, len(lockstep.epochs), {t.name: t.history[-1] for t in lockstep.trainees})


def teacher_record(store: Store, cell: Cell) -> Path:
    """Where the teacher's own accuracy on the cell's evaluation set is kept."""
    return store.root / "teachers" / f"{fingerprint([cell.identity()['teacher'], cell.evaluation.digest])}.json"


def _scores(evaluation: Evaluation) -> dict[str, Any]:
    return {
        "top1": evaluation.top1,
        "top5": evaluation.top5,
        "correct": int(evaluation.correct.sum()),
        "images": int(evaluation.correct.size),
        "loss": evaluation.loss,
    }
