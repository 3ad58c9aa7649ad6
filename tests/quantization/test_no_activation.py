"""A protocol that quantizes activations and finds none is an error, never a student in full precision that is called W8A2."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dfqbench.errors import UserError
from dfqbench.network.network import Teacher
from dfqbench.quantization import Bits, find_protocol
from dfqbench.quantization.student import Student
from dfqbench.task import Task

TASK = Task(10, 3, 8, (0.5,) * 3, (0.25,) * 3)


class Net(nn.Module):
    def __init__(self, act: Callable[[Tensor], Tensor]):
        super().__init__()
        self.c1, self.c2, self.fc, self.act = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 10), act

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.c2(self.act(self.c1(x))).mean((2, 3)))  # type: ignore[no-any-return]


LINEAR = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))


@pytest.mark.parametrize("act", [lambda x: x, lambda x: torch.where(x > 0, x, 0 * x), nn.Identity()])
@pytest.mark.parametrize("protocol", ["lineage", {"base": "lineage", "input_bits": 8}])
def test_lineage_names_a_network_without_activation_functions(act: Callable[[Tensor], Tensor], protocol: object) -> None:
    with pytest.raises(
        UserError, match=r"Net: the protocol 'lineage.*' finds no activation to quantize: it has no activation function that is known"
    ):
        Student(Teacher(Net(act), TASK), find_protocol(protocol), Bits(8, 2))  # type: ignore[arg-type]


def test_a_network_whose_answer_is_its_only_activation_has_none() -> None:
    with pytest.raises(UserError, match="finds no activation to quantize"):
        Student(Teacher(nn.Sequential(LINEAR, nn.Sigmoid()), TASK), find_protocol("lineage"), Bits(8, 2))


def test_layer_inputs_are_activations_whatever_they_come_from() -> None:
    assert len(Student(Teacher(Net(nn.Identity()), TASK), find_protocol("hardware"), Bits(8, 2)).quantizers) == 3
    assert [q.bits for q in Student(Teacher(LINEAR, TASK), find_protocol("hardware"), Bits(8, 2)).quantizers.values()] == [8]
    with pytest.raises(UserError, match="it has no convolution or linear layer that reads anything but the image"):
        Student(Teacher(LINEAR, TASK), find_protocol({"base": "hardware", "input_bits": None}), Bits(8, 2))
