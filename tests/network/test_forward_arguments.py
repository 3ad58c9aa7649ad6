"""Arguments of a forward beside the images: fixed at their defaults while the network is traced, or refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dfqbench.errors import UserError
from dfqbench.network.network import Teacher
from dfqbench.quantization import PROTOCOLS, Bits, find_protocol
from dfqbench.quantization.student import Student
from dfqbench.task import Task

TASK = Task(10, 3, 8, (0.5,) * 3, (0.25,) * 3)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu, self.fc = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Linear(4, 10)

    def features(self, x: Tensor) -> Tensor:
        return self.relu(self.conv(x))  # type: ignore[no-any-return]


class Flag(Net):
    def forward(self, images: Tensor, return_features: bool = False, mask: Tensor | None = None, scale: float = 2.0) -> Any:
        x = self.features(images)
        if mask is not None:
            x = x * mask
        logits = self.fc(x.mean((2, 3))) * scale
        return (logits, x) if return_features else logits


class KeywordOnly(Net):
    def forward(self, x: Tensor, *, mode: str = "logits", **others: Any) -> Any:
        x = self.features(x)
        if mode == "logits" and not others.get("features"):
            return self.fc(x.mean((2, 3)))
        return x


class Variable(Net):
    def forward(self, *images: Tensor, **others: Any) -> Any:
        assert not others
        return self.fc(self.features(images[0]).mean((2, 3)))


class Decorated(Net):
    @torch.no_grad()
    def forward(self, x: Tensor, twice: bool = True) -> Any:
        x = self.features(x)
        return self.fc(x.mean((2, 3))) * (2 if twice else 1)


@pytest.mark.parametrize("kind", [Flag, KeywordOnly, Variable, Decorated])
def test_arguments_with_defaults_are_no_inputs_of_the_graph(kind: type[Net]) -> None:
    network, x = kind().eval(), torch.randn(2, 3, 8, 8)
    teacher = Teacher(network, TASK)
    assert [n.op for n in teacher.traced.graph.nodes].count("placeholder") == 1
    with torch.no_grad():
        assert torch.equal(teacher(x), network(x))
        for protocol in (*PROTOCOLS.values(), find_protocol({"base": "lineage", "input_bits": 8})):
            student = Student(teacher, protocol, Bits(4, 4))
            student.track_ranges(True)
            assert student(x).shape == (2, 10)
            student.check_ranges()
            assert student.observe(x).logits.shape == (2, 10)


def test_the_image_keeps_the_name_that_the_forward_gives_it() -> None:
    student = Student(Teacher(Flag(), TASK), find_protocol({"base": "lineage", "input_bits": 8}), Bits(4, 4))
    assert next(iter(student.quantizers)) == "images"


class Two(Net):
    def forward(self, x: Tensor, mask: Tensor, scale: Tensor) -> Any:
        return self.fc((self.features(x) * mask).mean((2, 3))) * scale


class NoImage(Net):
    def forward(self) -> Any:
        return self.fc(self.features(torch.zeros(1, 3, 8, 8)).mean((2, 3)))


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (Two, r"Two cannot be traced by torch\.fx: its forward takes 'mask' and 'scale' beside the images: give each a default"),
        (NoImage, r"NoImage cannot be traced by torch\.fx: its forward takes no images"),
    ],
)
def test_a_second_argument_without_a_default_is_named(kind: type[Net], said: str) -> None:
    with pytest.raises(UserError, match=said):
        Teacher(kind(), TASK)
