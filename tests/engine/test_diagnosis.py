"""What is told of a student's health is right, and being looked at leaves no trace in it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dfqbench import Batch
from dfqbench.engine import lockstep as engine
from dfqbench.engine.checkpoint import load_checkpoint, save_checkpoint
from dfqbench.engine.diagnosis import agreements, look, range_change, widths
from dfqbench.engine.evaluate import Evaluation, state_hash
from dfqbench.engine.lockstep import Interrupted, Lockstep
from dfqbench.network import Teacher
from dfqbench.quantization import PROTOCOLS, Bits
from dfqbench.quantization.student import Student
from dfqbench.run.agreement import rounded
from dfqbench.store.cache import cache_folder
from dfqbench.sweep.cell import Bundle, bundles
from dfqbench.sweep.load import LoadedSweep, load_sweep
from dfqbench.task import Task
from dfqbench.teachers import load
from dfqbench.testing import StopAfter

SweepFile = Callable[..., Path]
CPU = torch.device("cpu")
NO_AUTOCAST = contextlib.nullcontext()


def no_evaluation(student: Any) -> Evaluation:
    return Evaluation(np.array([True]), 100.0, None, 0.0)


def started(loaded: LoadedSweep, **options: Any) -> Lockstep:
    bundle = bundles(loaded.cells)[0]
    card = bundle.cells[0].teacher
    teacher = Teacher(load(loaded.teachers[card]), card.task)
    return Lockstep(Bundle(bundle.cells), teacher, CPU, no_evaluation, plain=lambda cell: rounded(cell, teacher, CPU), **options)


def state_of(lockstep: Lockstep) -> list[Any]:
    students = [state_hash(t.student) for t in lockstep.trainees]
    return [*students, torch.get_rng_state().tolist(), [g.get_state().tolist() for g in lockstep.method._streams.values()]]


@pytest.mark.parametrize("changes", [{}, {"precision": "bf16"}, {"protocol": {"base": "lineage", "batch_norm": "trained"}}, {"protocol": "hardware"}])
def test_looking_changes_no_bit(sweep_file: SweepFile, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]) -> None:
    loaded = load_sweep(sweep_file(**changes), cache_folder())
    looked = started(loaded, evaluate_every=1)
    looked.run(StopAfter())
    assert {"clipped", "student_agrees", "rounding_agrees"} <= looked.trainees[0].history[-1].keys()
    seen = state_of(looked)
    for name in ("look", "agreements", "range_change"):
        monkeypatch.setattr(engine, name, lambda *given: {})
    blind = started(loaded)
    blind.run(StopAfter())
    assert "clipped" not in blind.trainees[0].history[-1]
    assert state_of(blind) == seen


@pytest.mark.parametrize("method", [{"gdfq": {"warmup_epochs": 1, "calibration_epochs": 1}}, {"zaq": {"student_lr": 1e-3}}])
def test_an_interruption_after_an_epochs_last_step_leaves_no_trace(sweep_file: SweepFile, tmp_path: Path, method: Any) -> None:
    """There the batch that the epoch is judged on is from before the interruption; ZAQ's own holds more than a checkpoint may."""
    loaded = load_sweep(sweep_file(methods=[method]), cache_folder())
    whole, first, second, last = (started(loaded, evaluate_every=1) for _ in range(4))
    whole.run(StopAfter())
    for stopped, following, steps in ((first, second, 4), (second, last, 8)):
        with pytest.raises(Interrupted):
            stopped.run(StopAfter(stop_after=steps))
        assert stopped.iteration == 4, "the last step of an epoch is done, the epoch is not"
        save_checkpoint(tmp_path / "checkpoint.pt", stopped.state())
        state, why_not = load_checkpoint(tmp_path / "checkpoint.pt", [t.cell.id for t in stopped.trainees])
        assert state is not None, why_not
        following.restore(state)
    last.run(StopAfter())
    untimed = [[[{k: v for k, v in row.items() if k != "seconds"} for row in t.history] for t in run.trainees] for run in (whole, last)]
    assert untimed[0] == untimed[1]
    tracked = [row["epoch"] for row in untimed[0][0] if "range_change" in row]
    assert tracked == ([2, 3] if "zaq" in method else []), "ranges are compared from the second epoch in which they are tracked"


def small_student(bits: str = "w4a4", protocol: str = "lineage") -> Student:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5))
    return Student(Teacher(network.eval(), Task(5, 3, 8, (0.0,) * 3, (1.0,) * 3)), PROTOCOLS[protocol], Bits.parse(bits))


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def test_clipped_is_the_share_beyond_the_grid_in_the_worst_layer() -> None:
    student, images = small_student(), drawn(6, 3, 8, 8)
    first, second = student.quantizers.values()
    seen: dict[int, torch.Tensor] = {}
    for q in (first, second):
        q.set_range(0.0, 0.4)
        q.register_forward_pre_hook(lambda q, given: seen.__setitem__(id(q), given[0].double()))
    batch = Batch(images, None, drawn(6, 5))
    found = look(student, batch, NO_AUTOCAST)
    # a value is clipped where it is nearer to a 17th level than to the 16th: beyond 15.5 of 15 steps
    shares = [float((seen[id(q)] > 15.5 * 0.4 / 15).double().mean()) for q in (first, second)]
    assert min(shares) < max(shares) < 1
    assert found["clipped"] == pytest.approx(100 * max(shares), abs=1e-3)
    assert found["student_agrees"] == 100 * float((student(images).argmax(1) == batch.teacher_logits.argmax(1)).float().mean())
    assert not any(q._forward_pre_hooks for q in small_student().quantizers.values())


def test_a_layer_without_a_range_has_no_share_and_a_student_without_any_is_not_judged() -> None:
    student, batch = small_student(), Batch(drawn(2, 3, 8, 8), None, drawn(2, 5))
    assert look(student, batch, NO_AUTOCAST) == {}
    next(iter(student.quantizers.values())).set_range(0.0, 100.0)
    assert look(student, batch, NO_AUTOCAST)["clipped"] == 0.0


def test_not_a_number_counts_as_clipped() -> None:
    student, images = small_student(), drawn(2, 3, 8, 8)
    for q in student.quantizers.values():
        q.set_range(0.0, 100.0)
    with torch.no_grad():
        student.layers["0"].layer.weight.fill_(float("nan"))
    assert look(student, Batch(images, None, drawn(2, 5)), NO_AUTOCAST)["clipped"] == 100.0


def test_a_change_of_ranges_is_a_factor_either_way() -> None:
    student = small_student()
    for q, high in zip(student.quantizers.values(), (1.0, 8.0), strict=True):
        q.set_range(-1.0, high)
    before = widths(student)
    assert before.tolist() == [2.0, 9.0]
    assert range_change(None, before) == {}
    assert range_change(before, torch.tensor([3.0, 9.0])) == {"range_change": 1.5}
    assert range_change(before, torch.tensor([2.0, 3.0])) == {"range_change": 3.0}
    assert range_change(before, torch.tensor([float("nan"), 9.0])) == {"range_change": float("inf")}


class Answers(nn.Module):
    """Gives the classes that it is told to."""

    task = Task(3, 3, 1, (0.0,) * 3, (1.0,) * 3)

    def __init__(self, classes: list[int]):
        super().__init__()
        self.logits = torch.nn.functional.one_hot(torch.tensor(classes), 3).float()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.logits


def test_agreements_are_of_the_same_images_and_their_error_is_that_of_the_pairs() -> None:
    right = [0, 1, 2, 0, 1, 2, 0, 1]
    batch = Batch(torch.zeros(8, 3, 1, 1), None, Answers(right).logits)
    ours, plain = Answers([0, 1, 2, 0, 0, 0, 1, 0]), Answers([0, 1, 2, 1, 1, 2, 0, 1])
    found = agreements(ours, plain, batch, NO_AUTOCAST)  # type: ignore[arg-type]
    differences = np.array([0, 0, 0, 1, -1, -1, -1, -1])
    assert (found["student_agrees"], found["rounding_agrees"]) == (50.0, 87.5)
    assert found["agreement_error"] == pytest.approx(100 * differences.std() / np.sqrt(8))
    assert agreements(ours, None, batch, NO_AUTOCAST) == {}  # type: ignore[arg-type]
