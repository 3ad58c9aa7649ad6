"""MLQ: which layers are fixed, in which order, and that ternary weights stay what they were, into the file."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from dfqbench import Batch
from dfqbench.engine.lockstep import Interrupted
from dfqbench.export.student_file import load_student_file, save_student
from dfqbench.method.registry import find_method
from dfqbench.quantization import Bits, find_protocol
from dfqbench.quantization.student import Student
from dfqbench.testing import StopAfter, Trial, ends_of, small_task, small_teacher
from dfqbench_methods.mlq import MLQ

HOST = {"warmup_epochs": 1, "calibration_epochs": 1}


def started(grid: str = "ternary", rounds: int = 4, **settings: Any) -> tuple[MLQ, Student, torch.optim.Optimizer, Batch]:
    """Two student steps to come in each round."""
    teacher = small_teacher(small_task(size=16))
    budget = {"epochs": 2, "iterations": 2 * rounds, "batch_size": 4, "student_lr": 0.01, "layer_rounds": rounds}
    method = MLQ(teacher, MLQ.Config(**budget, host_settings=HOST, **settings), seed=0)
    protocol = find_protocol({"weight_grid": grid, "weight_granularity": "per-tensor" if grid == "kmeans" else "per-channel"})
    student = Student(teacher, protocol, Bits(2, 4)).to(memory_format=torch.channels_last)
    for quantizer in student.quantizers.values():
        quantizer.set_range(-3, 3)
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return method, student, method.student_optimizer(student), Batch(images, torch.arange(4), teacher(images).detach())


def step(method: MLQ, student: Student, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
    method.before_step(next(phase for phase in method.phases() if phase.distill))
    method.student_step(student, method.distill(student, batch), optimizer)


def fixed_in(student: Student) -> list[str]:
    return [name for name, layer in student.layers.items() if layer.has_fixed_grid]


@pytest.mark.parametrize("grid", ["uniform", "pow2", "ternary", "kmeans"])
def test_layers_are_fixed_round_by_round_and_stay_to_the_bit(grid: str) -> None:
    method, student, optimizer, batch = started(grid)
    count, then = len(student.layers), dict[str, torch.Tensor]()
    for update in range(8):
        free = {name: layer.layer.weight.detach().clone() for name, layer in student.layers.items() if not layer.has_fixed_grid}
        step(method, student, optimizer, batch)
        assert len(fixed_in(student)) == -(-(update // 2 + 1) * count // 4)
        for name, layer in student.layers.items():
            if name in then:
                assert torch.equal(layer.layer.weight, then[name])
                assert torch.equal(layer.quantized_weight(), layer.layer.weight), "levels map to themselves"
            elif layer.has_fixed_grid:
                then[name] = layer.layer.weight.detach().clone()
            else:
                assert not torch.equal(layer.layer.weight, free[name]), "what is free trains"
    assert len(then) == count
    if grid == "ternary":
        assert all(len(channel.unique()) <= 3 for layer in student.layers.values() for channel in layer.layer.weight)


@pytest.mark.parametrize(("order", "first"), [("loss", max), ("ascending", min)])
def test_the_order_is_that_of_what_each_layer_alone_costs(order: str, first: Any) -> None:
    method, student, optimizer, batch = started(rounds=len(started()[1].layers), order=order)
    for _ in range(2):  # with all in full precision, and with one layer fixed
        costs = {}
        for name in student.layers:
            alone = copy.deepcopy(student)
            for other, layer in alone.layers.items():
                layer.enabled = layer.has_fixed_grid or other == name
            theirs = batch.teacher_logits.log_softmax(1)
            costs[name] = float((theirs.exp() * (theirs - alone(batch.images).log_softmax(1))).sum(1).mean())
        known = set(fixed_in(student))
        step(method, student, optimizer, batch)
        (new,) = set(fixed_in(student)) - known
        assert new == first(set(costs) - known, key=costs.__getitem__)
        step(method, student, optimizer, batch)


def test_from_the_image_to_the_answer() -> None:
    method, student, optimizer, batch = started(order="forward")
    names = list(student.layers)
    for update in range(8):
        step(method, student, optimizer, batch)
        assert fixed_in(student) == names[: -(-(update // 2 + 1) * len(names) // 4)]


@pytest.mark.slow
def test_interrupted_where_a_round_begins_it_ends_with_the_same_bits_and_its_file_answers_alike(tmp_path: Path) -> None:
    trial = Trial(find_method("mlq"), {"epochs": 3, "iterations": 4, "layer_rounds": 2})
    whole = trial.end()
    for stop in (7, 8, 9):  # the second round begins with the ninth step
        first, second = trial.start(), trial.start()
        with pytest.raises(Interrupted):
            first.run(StopAfter(stop))
        second.restore(copy.deepcopy(first.state()))
        second.run(StopAfter())
        assert ends_of(second) == ends_of(whole)
    student = whole.trainees[0].student
    assert not any("left_free" in name for name in student.state_dict())
    save_student(student, tmp_path / "student.safetensors")
    images = torch.randn(4, *whole.method.task.image_shape)
    assert torch.equal(load_student_file(tmp_path / "student.safetensors")(images), student(images))
