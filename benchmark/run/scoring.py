"""What students are scored on: an evaluation set, or images that nothing was trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dfqbench.data import EvaluationSet, Images
from dfqbench.engine.device import autocast_of
from dfqbench.engine.evaluate import Evaluated, Precision, evaluate_task
from dfqbench.engine.exits import early_exits
from dfqbench.files import read_json, write_json
from dfqbench.network import Network, Teacher
from dfqbench.quantization.student import Student
from dfqbench.run.agreement import agreement, kept_images, plain_rounding
from dfqbench.run.class_order import doubt_about_classes
from dfqbench.run.options import Options, StopFlag
from dfqbench.store import Store
from dfqbench.sweep.cell import Bundle, Cell, fingerprint
from dfqbench.sweep.load import LoadedSweep

Score = Callable[[Student], Evaluated]
Say = Callable[[str], None]


class Scoring:
    """Keeps the images in memory from bundle to bundle; a teacher's own accuracy is measured once for each set."""

    def __init__(self, loaded: LoadedSweep, store: Store, device: torch.device, options: Options, stop: StopFlag):
        self.loaded, self.store, self.device, self.options, self.stop = loaded, store, device, options, stop
        self._images: dict[str, Images] = {}
        self._teachers_seen: set[Path] = set()
        self._unseen = torch.empty(0)

    def of(self, bundle: Bundle, teacher: Teacher, say: Say) -> Score:
        """What scores the students of a bundle; what is to be told goes to `say`."""
        if self.loaded.evaluation is None:
            return self._without_data(bundle.cells[0], teacher, say)
        return self._on_images(bundle.cells[0], teacher, self.loaded.evaluation, say)

    def beside(self, cell: Cell, teacher: Teacher, own: Mapping[str, int] | None = None) -> dict[str, Any]:
        """What a cell without data has beside its scores; the same settings give other images elsewhere, where rounding differs."""
        made = hashlib.sha256(self._unseen.cpu().contiguous().numpy().tobytes()).hexdigest()
        return {"plain_rounding": plain_rounding(cell, teacher, self._unseen, self.device, own), "unseen_sha256": made}

    def exits(self, cell: Cell, network: Network, precision: Precision) -> dict[str, Any]:
        """What a network with early exits has beside its scores on the evaluation set, under `exits`; nothing of others."""
        images = self._images.get(fingerprint(cell.teacher.task.as_dict()))
        if cell.teacher.task.exits == 1 or images is None:
            return {}
        return {"exits": early_exits(network, images, cell.teacher.task, self.device, precision, self.options.evaluation_batch)}

    def _on_images(self, cell: Cell, teacher: Teacher, found: EvaluationSet, say: Say) -> Score:
        """Accuracy on the evaluation set."""
        key = fingerprint(cell.teacher.task.as_dict())
        if key not in self._images:
            self._images = {key: found.decode(cell.teacher.task)}
        images = self._images[key]
        self._measure_teacher(cell, teacher, images, found, say)
        return lambda student: self._evaluate(student, cell, images, say)

    def _without_data(self, cell: Cell, teacher: Teacher, say: Say) -> Score:
        """Agreement with the teacher on images that nothing was trained on."""
        teacher.to(self.device).to(memory_format=torch.channels_last)
        self._unseen = self._unseen_images(cell, teacher, say)
        autocast = autocast_of(cell, self.device)
        path = teacher_record(self.store, cell)
        if read_json(path) is None:
            write_json(path, {"teacher": cell.record()["teacher"], "evaluation": cell.record()["evaluation"], "metric": "agreement"})
        return lambda student: agreement(student, teacher, self._unseen, autocast, lambda size: say(smaller_batches(size)))

    def _unseen_images(self, cell: Cell, teacher: Teacher, say: Say) -> Tensor:
        selection = self.loaded.selection
        assert selection is not None
        path = self.store.root / "unseen" / f"{selection.digest(cell.teacher)}.safetensors"
        return kept_images(path, selection.maker(cell.teacher), teacher, self.device, selection.count, say, self.stop)

    def _evaluate(self, network: Any, cell: Cell, images: Images, say: Say, precision: Precision | None = None) -> Evaluated:
        def smaller(size: int) -> None:
            say(smaller_batches(size))
            self.options.evaluation_batch = size  # the next evaluation would run out of memory, too

        task, batch = cell.teacher.task, self.options.evaluation_batch
        return evaluate_task(network, images, task, self.device, precision or cell.precision, batch, smaller)

    def _measure_teacher(self, cell: Cell, teacher: Teacher, images: Images, found: EvaluationSet, say: Say) -> None:
        """The teacher's own accuracy, in full precision."""
        path = teacher_record(self.store, cell)

        def measured(shown: Images) -> Evaluated:
            teacher.to(self.device).to(memory_format=torch.channels_last)
            return self._evaluate(teacher, cell, shown, say, "fp32")

        known = read_json(path)
        if known is None:
            result = measured(images)
            known = {"teacher": cell.record()["teacher"], "evaluation": cell.record()["evaluation"], **result.scores()}
            known |= self.exits(cell, teacher, "fp32")
            write_json(path, known)
        if path not in self._teachers_seen:
            self._teachers_seen.add(path)
            doubt = doubt_about_classes(found, images, known["top1"], lambda shown: measured(shown).value) if "top1" in known else None
            if doubt:
                say(f"teacher {cell.teacher.label}: {doubt}")


def smaller_batches(size: int) -> str:
    """What is told where an evaluation ran out of memory."""
    return f"out of memory in evaluation: tried again with batches of {size}; where rounding differs, last bits of logits may too"


def teacher_record(store: Store, cell: Cell) -> Path:
    """Where the teacher's own accuracy on the cell's evaluation set is kept."""
    return store.root / "teachers" / f"{fingerprint([cell.identity()['teacher'], cell.evaluation.digest])}.json"
