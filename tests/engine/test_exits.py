"""Early exits: which answer a network gives, what its students learn from, and what leaving early costs and saves."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dfqbench.data import Images
from dfqbench.engine.exits import early_exits
from dfqbench.errors import UserError
from dfqbench.network import Teacher
from dfqbench.quantization import PROTOCOLS, Bits
from dfqbench.quantization.student import Student
from dfqbench.task import Task

TASK = Task(3, 1, 4, (0.0,), (1.0,), exits=2)


class TwoExits(nn.Module):
    """8 channels at 4 x 4, an exit, 4 channels at 2 x 2, an exit."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.first, self.second = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 4, 2, 2)
        self.early, self.late = nn.Linear(8, 3), nn.Linear(4, 3)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=generator)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        halfway = self.first(x).relu()
        return self.early(halfway.mean((2, 3))), self.late(self.second(halfway).relu().mean((2, 3)))


def images(count: int = 40) -> Images:
    generator = np.random.default_rng(3)
    pixels = generator.integers(0, 256, (count, 4, 4, 1), dtype=np.uint8)
    return Images(lambda index: pixels[index], generator.integers(0, 3, count), (4, 4, 1), 3)


def test_a_network_answers_at_its_end_unless_it_is_asked_elsewhere() -> None:
    teacher, x = Teacher(TwoExits(), TASK), torch.rand(5, 1, 4, 4)
    early, late = TwoExits()(x)
    assert torch.allclose(teacher(x), late, atol=1e-5)
    assert torch.allclose(teacher.observe(x).logits, late, atol=1e-5)
    with teacher.answering_at(0):
        assert torch.allclose(teacher(x), early, atol=1e-5)
        assert torch.allclose(teacher.observe(x).logits, early, atol=1e-5)
    with teacher.answering_at(None):
        assert torch.allclose(teacher(x), torch.stack([early, late], 1), atol=1e-5)
    student = Student(teacher, PROTOCOLS["lineage"], Bits(8, 8))
    assert set(student.layers) == {"first", "second", "early", "late"}
    assert student(x).shape == (5, 3)


def test_leaving_early_by_hand() -> None:
    shown, teacher = images(), Teacher(TwoExits(), TASK)
    found = early_exits(teacher, shown, TASK, torch.device("cpu"), "fp32", batch_size=7)
    assert shown.pixels is not None
    with torch.no_grad():
        answers = TwoExits()(torch.from_numpy(shown.pixels).permute(0, 3, 1, 2).float() / 255)
    right = [answer.argmax(1).numpy() == shown.labels for answer in answers]
    assert found["top1"] == pytest.approx([100 * r.mean() for r in right])
    first, early, second, late = 16 * 9 * 8, 8 * 3, 4 * 4 * 8 * 4, 4 * 3
    assert found["macs"] == [first + early, first + early + second + late]
    for at in found["leaving"]:
        leaves = answers[0].softmax(1).amax(1).numpy() >= at["confidence"]
        assert at["shares"] == pytest.approx([100 * leaves.mean(), 100 - 100 * leaves.mean()], abs=1e-3)
        assert at["top1"] == pytest.approx(100 * np.where(leaves, right[0], right[1]).mean())
        assert at["macs"] == round(found["macs"][0] * leaves.mean() + found["macs"][1] * (1 - leaves.mean()))
    assert 0 < found["leaving"][0]["shares"][0] < 100


def test_what_is_not_finite_never_leaves_early() -> None:
    network = TwoExits()
    network.early.bias.data[0] = float("nan")
    found = early_exits(Teacher(network, TASK), images(), TASK, torch.device("cpu"), "fp32")
    assert found["top1"][0] == 0
    assert all(at["shares"] == [0, 100] and at["top1"] == found["top1"][1] for at in found["leaving"])


@pytest.mark.parametrize(
    ("exits", "said"),
    [(1, "if these are early exits, say `exits: 2`"), (3, "not with (1, 3) logits at each of 3 exits")],
)
def test_exits_are_declared(exits: int, said: str) -> None:
    with pytest.raises(UserError, match="answers one image") as error:
        Teacher(TwoExits(), replace(TASK, exits=exits))
    assert said in str(error.value)


@pytest.mark.slow
def test_a_sweep_trains_on_all_exits_and_tells_what_each_is_worth(tmp_path: Any, sweep_file: Any, dfqbench: Any) -> None:
    import json

    weights = tmp_path / "exits.safetensors"
    assert dfqbench("pretrain", "digits", "--model", "cifar:resnet20_exits", "--epochs", 1, "--out", weights)[0] == 0
    config = sweep_file(teachers=[{"model": "cifar:resnet20_exits", "weights": str(weights)}], methods=["gdfq"], bits=["w8a8"])
    assert dfqbench("run", config, "--results", tmp_path / "r")[0] == 0
    [path] = (tmp_path / "r").glob("runs/*/result.json")
    result = json.loads(path.read_text())
    assert result["exits"]["top1"][1] == result["top1"]
    assert len(result["exits"]["macs"]) == len(result["teacher"]["exits"]["top1"]) == 2
    code, out, _ = dfqbench("evaluate", result["id"], "--on", "digits", "--results", tmp_path / "r")
    assert code == 0
    assert "exit 1: top-1" in out
    assert "leaving at 90% confidence" in out
