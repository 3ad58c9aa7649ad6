"""The engine against an independent loop that is written the plain way: the same numbers, step by step."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import nn

from benchmark.cell import Bundle, Cell, EvaluationCard
from benchmark.engine import Lockstep
from benchmark.evaluate import Evaluation
from benchmark.method import Phase
from benchmark.network import Teacher
from benchmark.protocol import PROTOCOLS, Bits
from benchmark.registry import find_method
from benchmark.teachers import TeacherCard
from benchmark.teachers.cifar import CifarResNet
from benchmark.testing import small_task
from methods.textbook import TextbookGDFQ


@pytest.fixture
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def network() -> CifarResNet:
    """A CIFAR ResNet of 8 layers with BN statistics that are not those of a new one."""
    torch.manual_seed(3)
    net = CifarResNet(1)
    for norm in (m for m in net.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, std=0.2)
        nn.init.normal_(norm.running_mean, std=0.2)
        nn.init.uniform_(norm.running_var, 0.5, 2.0)
    return net


class Losses:
    """Watches a lockstep: each step's loss, of the generator and of the first student (nan where it does not train)."""

    def __init__(self) -> None:
        self.rows: list[tuple[float, float]] = []

    def step(self, lockstep: Lockstep, phase: Phase) -> None:
        log = lockstep.method._log
        shared, own = log.averages(log.SHARED), log.averages(lockstep.trainees[0].name)
        self.rows.append((shared["generator_ce"] + 0.1 * shared["generator_bns"], own.get("loss", float("nan"))))
        log.reset()

    def epoch(self, lockstep: Lockstep, phase: Phase) -> None:
        """Nothing to do."""


def engine(steps: int, batch_size: int, bits: tuple[str, ...] = ("w4a4",)) -> tuple[Lockstep, Losses]:
    """GDFQ with its ranges tracked in the first fifth of the steps, which are the warm-up."""
    task, method = small_task(size=16), find_method("gdfq")
    config = method.Config(epochs=5, iterations=steps // 5, batch_size=batch_size, warmup_epochs=1, calibration_epochs=1)
    protocol = PROTOCOLS["lineage"].for_method("gdfq", method.ranges, method.batch_norm)
    cells = tuple(
        Cell(
            method="gdfq",
            method_version=method.version,
            config=config.model_dump(mode="json"),
            teacher=TeacherCard("small", "small", "none", "0" * 64, None, task, 0),
            evaluation=EvaluationCard("none", "0" * 64, task.classes, 1),
            protocol=protocol,
            bits=Bits.parse(width),
            seed=0,
            precision="fp32",
            shares_synthesis=True,
        )
        for width in bits
    )
    teacher = Teacher(network(), task)
    lockstep = Lockstep(Bundle(cells), teacher, torch.device("cpu"), lambda student: Evaluation(np.array([True]), 0.0, None, 0.0))
    return lockstep, Losses()


def test_in_float64_fifty_steps_are_those_of_the_textbook_loop(float64: None) -> None:
    steps, batch = 50, 8
    lockstep, losses = engine(steps, batch, ("w4a4", "w3a3"))
    textbook = TextbookGDFQ(network(), small_task(size=16), bits=4, seed=0, batch_size=batch)
    lockstep.run(losses)
    for number in range(steps):
        textbook.step(tracking=number < steps // 5, distilling=number >= steps // 5)
    expected, found = np.array(textbook.losses), np.array(losses.rows)
    assert found[:, 0] == pytest.approx(expected[:, 0], rel=1e-6)
    assert found[steps // 5 :, 1] == pytest.approx(expected[steps // 5 :, 1], rel=1e-6)
    assert np.isnan(found[: steps // 5, 1]).all()
    student = lockstep.trainees[0].student
    theirs = dict(textbook.student.named_parameters())
    for name, layer in student.layers.items():
        assert torch.allclose(layer.layer.weight, theirs[f"{name}.layer.weight"], rtol=1e-6, atol=1e-9), name
    assert not torch.equal(student.layers["conv1"].layer.weight, network().conv1.weight), "something was learned"
    noise, labels = torch.randn(8, 100), torch.arange(8)
    mine, theirs_too = lockstep.method.generator(noise, labels), textbook.generator(noise, labels)  # type: ignore[attr-defined]
    assert torch.allclose(mine, theirs_too, rtol=1e-6, atol=1e-8)


def test_in_float32_the_first_losses_are_those_of_the_textbook_loop() -> None:
    """At 8 bits: at 4, one activation that rounds the other way moves a random network's loss by percents."""
    lockstep, losses = engine(5, 16, ("w8a8",))
    textbook = TextbookGDFQ(network(), small_task(size=16), bits=8, seed=0, batch_size=16)
    lockstep.run(losses)
    for number in range(2):
        textbook.step(tracking=number < 1, distilling=number >= 1)
    assert losses.rows[0][0] == pytest.approx(textbook.losses[0][0], rel=1e-4)
    assert losses.rows[1] == pytest.approx(textbook.losses[1], rel=5e-3)
