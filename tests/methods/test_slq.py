"""SLQ: what is fixed, in which order, and that it stays to the bit, through a checkpoint and into the file."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from dfqbench import Batch
from dfqbench.engine.method_state import restore_state, state_of
from dfqbench.method.registry import find_method
from dfqbench.quantization import Bits, find_protocol
from dfqbench.quantization.student import Student
from dfqbench.testing import Trial, small_task, small_teacher
from dfqbench_methods.parts.rounds import loosened
from dfqbench_methods.slq import SLQ, fixing_order

HOST = {"warmup_epochs": 1, "calibration_epochs": 1}
ORDERS = ("magnitude", "cluster", "distance", "nearest")
GRIDS = ("uniform", "pow2", "apot", "kmeans")


def started(grid: str, **settings: Any) -> tuple[SLQ, Student, torch.optim.Optimizer]:
    """Ten student steps to come: two in each round."""
    teacher = small_teacher(small_task(size=16))
    budget = {"epochs": 2, "iterations": 10, "batch_size": 4, "student_lr": 0.01}
    method = SLQ(teacher, SLQ.Config(**budget, host_settings=HOST, **settings), seed=0)
    protocol = find_protocol({"weight_grid": grid, "weight_granularity": "per-tensor" if grid == "kmeans" else "per-channel"})
    student = Student(teacher, protocol, Bits(4, 4)).to(memory_format=torch.channels_last)
    for quantizer in student.quantizers.values():
        quantizer.set_range(-3, 3)
    return method, student, method.student_optimizer(student)


def step(method: SLQ, student: Student, optimizer: torch.optim.Optimizer, seed: int) -> None:
    images, labels = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(seed)), torch.arange(4)
    method.before_step(next(phase for phase in method.phases() if phase.distill))
    loss = method.distill(student, Batch(images, labels, method.teacher(images).detach()))
    method.student_step(student, loss, optimizer)


def free_of(student: Student) -> list[Tensor]:
    return [layer.get_buffer("left_free") for layer in student.layers.values()]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("order", ORDERS)
def test_what_is_fixed_stays_to_the_bit_and_in_the_end_nothing_is_free(order: str, grid: str) -> None:
    method, student, optimizer = started(grid, order=order)
    layers = list(student.layers.values())
    last: list[Tensor] = []
    for update, share in enumerate([0.5, 0.5, 0.75, 0.75, 0.875, 0.875, 0.95, 0.95, 1.0, 1.0]):
        before = [(layer.layer.weight.detach().clone(), layer.quantized_weight().detach().clone()) for layer in layers]
        step(method, student, optimizer, update)
        for layer, free, (weight, on_grid) in zip(layers, free_of(student), before, strict=True):
            fixed = ~free
            assert int(fixed.sum()) == -int(-share * free.numel() // 1)
            assert torch.equal(layer.layer.weight[fixed], weight[fixed])
            assert torch.equal(layer.quantized_weight()[fixed], on_grid[fixed])
            assert bool(fixed.all()) or not torch.equal(layer.layer.weight, weight), "what is free trains"
        if last:
            assert all(bool((now <= then).all()) for now, then in zip(free_of(student), last, strict=True)), "fixed once, fixed to the end"
        last = [free.clone() for free in free_of(student)]


@pytest.mark.parametrize("grid", GRIDS)
def test_what_is_free_is_float_in_training_and_on_its_grid_for_whoever_measures(grid: str) -> None:
    """In the images' way through the network, convolutions with batch norms behind them and the last layer alike."""
    method, student, optimizer = started(grid)
    step(method, student, optimizer, 0)
    images = torch.randn(4, 3, 16, 16)
    mixed = copy.deepcopy(student)
    for layer, free in zip(mixed.layers.values(), free_of(student), strict=True):
        with torch.no_grad():
            layer.layer.weight.copy_(torch.where(free, layer.layer.weight, layer.quantized_weight()))
        layer.enabled = False
    measured = student(images)
    with loosened(student.layers.values()):
        trained = student(images)
    assert torch.allclose(trained, mixed(images), atol=1e-5)
    assert not torch.allclose(trained, measured, atol=1e-3)
    assert torch.equal(student(images), measured)
    for layer in mixed.layers.values():
        layer.enabled = True
    assert torch.allclose(mixed(images), measured, atol=1e-5), "what is fixed is on its levels, what is free rounds to its own"


def test_momentum_is_cleared_where_a_round_begins_and_nowhere_else() -> None:
    method, student, optimizer = started("uniform", student_momentum=0.9)
    weight = student.layers["head"].layer.weight if "head" in student.layers else next(iter(student.layers.values())).layer.weight
    cleared = []
    for update in range(6):
        if update:
            optimizer.state[weight]["momentum_buffer"].fill_(1e6)
        step(method, student, optimizer, update)
        cleared.append(bool(optimizer.state[weight]["momentum_buffer"].abs().max() < 1e5))
    assert cleared == [True, False, True, False, True, False]


@pytest.mark.parametrize("grid", GRIDS)
def test_a_student_goes_on_from_its_state_to_the_bit(grid: str) -> None:
    method, student, optimizer = started(grid)
    for update in range(3):
        step(method, student, optimizer, update)
    other_method, other, other_optimizer = started(grid)
    restore_state(other_method, state_of(method))
    other.load_state_dict(copy.deepcopy(student.state_dict()))
    other_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for update in range(3, 8):
        step(method, student, optimizer, update)
        step(other_method, other, other_optimizer, update)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in student.state_dict().items())
    images = torch.randn(4, 3, 16, 16)
    assert torch.equal(student(images), other(images))


def test_orders_by_hand() -> None:
    weight, on_grid = torch.tensor([[0.9, -0.1, 0.6, -1.0, 0.2]]), torch.tensor([[1.0, 0.0, 0.5, -1.0, 0.0]])
    found = {order: fixing_order(weight, on_grid, order).tolist() for order in ORDERS}
    assert found["magnitude"] == [3, 0, 2, 4, 1]
    assert found["cluster"] == [1, 4, 3, 0, 2]
    assert found["distance"][0] == 4
    assert found["nearest"][0] == 3


@pytest.mark.parametrize("shares", [[], [0.5], [0.7, 0.5, 1.0], [0.0, 1.0], [0.5, 1.5]])
def test_shares_that_are_none_are_refused(shares: list[float]) -> None:
    with pytest.raises(ValidationError, match="shares rise from above 0 to 1"):
        SLQ.Config(shares=shares)


def test_ternary_weights_are_not_for_it() -> None:
    assert set(SLQ.weight_grids(SLQ.Config())) == {"uniform", "pow2", "apot", "kmeans"}
    with pytest.raises(ValueError, match="moves with its weight"):
        next(iter(Student(small_teacher(small_task()), find_protocol({"weight_grid": "ternary"}), Bits(2, 4)).layers.values())).fix_grid()


@pytest.mark.slow
def test_the_images_are_the_hosts_to_the_bit() -> None:
    alone = Trial(find_method("gdfq"), HOST).end()
    wrapped = Trial(SLQ, {"host_settings": HOST, "milestones": alone.method.config.milestones}).end()
    assert alone.last_batch is not None
    assert wrapped.last_batch is not None
    assert torch.equal(alone.last_batch.images, wrapped.last_batch.images)
