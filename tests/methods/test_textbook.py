"""The engine against an independent loop that is written the plain way: the same numbers, step by step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dfqbench.engine.evaluate import Evaluation
from dfqbench.engine.lockstep import Lockstep
from dfqbench.method.contract import Phase
from dfqbench.method.registry import find_method
from dfqbench.network import Teacher
from dfqbench.quantization import PROTOCOLS, Bits
from dfqbench.sweep.cell import Bundle, Cell, EvaluationCard
from dfqbench.teachers import TeacherCard
from dfqbench.teachers.cifar import CifarResNet
from dfqbench.testing import small_task
from dfqbench_methods.textbook.acq import TextbookACQ
from dfqbench_methods.textbook.gdfq import TextbookGDFQ
from dfqbench_methods.textbook.gznq import TextbookGZNQ
from dfqbench_methods.textbook.loop import Loop
from dfqbench_methods.textbook.lrq import TextbookLRQ
from dfqbench_methods.textbook.zaq import TextbookZAQ


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
    """Watches a lockstep: what every step logged, for the generator by name and for the first student (nan where it does not train)."""

    def __init__(self) -> None:
        self.generator: dict[str, list[float]] = {}
        self.student: list[float] = []

    def step(self, lockstep: Lockstep, phase: Phase) -> None:
        log = lockstep.method._log
        shared, own = log.averages(log.SHARED), log.averages(lockstep.trainees[0].name)
        for name, value in (shared | own).items():
            self.generator.setdefault(name, []).append(value)
        self.student.append(own.get("loss", float("nan")))
        log.reset()

    def epoch(self, lockstep: Lockstep, phase: Phase) -> None:
        """Nothing to do."""


def engine(name: str, settings: dict[str, Any], bits: tuple[str, ...] = ("w4a4",)) -> tuple[Lockstep, Losses]:
    task, method = small_task(size=16), find_method(name)
    config = method.Config(**settings)
    protocol = PROTOCOLS["lineage"].for_method(name, method.ranges, method.batch_norm)
    cells = tuple(
        Cell(
            method=name,
            method_version=method.version,
            config=config.model_dump(mode="json"),
            teacher=TeacherCard("small", "small", "none", "0" * 64, None, task, 0),
            evaluation=EvaluationCard("none", "0" * 64, task.classes, 1),
            protocol=protocol,
            bits=Bits.parse(width),
            seed=0,
            precision="fp32",
            shares_synthesis=method.info.shares_synthesis,
        )
        for width in bits
    )
    teacher = Teacher(network(), task)
    lockstep = Lockstep(Bundle(cells), teacher, torch.device("cpu"), lambda student: Evaluation(np.array([True]), 0.0, None, 0.0))
    return lockstep, Losses()


def textbook(kind: type[Loop], lockstep: Lockstep, bits: int) -> Loop:
    return kind(network(), small_task(size=16), bits, 0, lockstep.method.config)


WITH_WARMUP = {"epochs": 5, "iterations": 10, "batch_size": 8, "warmup_epochs": 1, "calibration_epochs": 1}
GENERATED: list[tuple[str, type[Loop], dict[str, Any], str]] = [
    ("gdfq", TextbookGDFQ, WITH_WARMUP, "generator_loss"),
    ("acq", TextbookACQ, WITH_WARMUP, "generator_loss"),
    ("zaq", TextbookZAQ, {"epochs": 5, "iterations": 10, "batch_size": 8, "student_lr": 0.01}, "adversary"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind", "settings", "logged"), GENERATED, ids=[g[0] for g in GENERATED])
def test_in_float64_fifty_steps_are_those_of_the_textbook_loop(
    float64: None, name: str, kind: type[Loop], settings: dict[str, Any], logged: str
) -> None:
    lockstep, losses = engine(name, settings, ("w4a4", "w3a3") if find_method(name).info.shares_synthesis else ("w4a4",))
    plain = textbook(kind, lockstep, bits=4)
    lockstep.run(losses)
    warmup = 10 * int(settings.get("warmup_epochs", 0))
    for number in range(50):
        plain.step(tracking=number < warmup, distilling=number >= warmup)
    assert losses.student[warmup:] == pytest.approx([row[1] for row in plain.losses[warmup:]], rel=1e-6)
    assert losses.generator[logged] == pytest.approx([row[0] for row in plain.losses if row[0]], rel=1e-6)
    student = lockstep.trainees[0].student
    theirs = dict(plain.student.named_parameters())
    for layer_name, layer in student.layers.items():
        assert torch.allclose(layer.layer.weight, theirs[f"{layer_name}.layer.weight"], rtol=1e-6, atol=1e-9), layer_name
    assert not torch.equal(student.layers["conv1"].layer.weight, network().conv1.weight), "something was learned"
    mine, other = (dict(sorted((tuple(p.shape), p.abs().sum().item()) for p in g.parameters())) for g in (lockstep.method.generator, plain.generator))  # type: ignore[attr-defined]
    assert mine == pytest.approx(other, rel=1e-6)


@pytest.mark.slow
def test_in_float64_lrq_is_its_textbook_loop_through_all_three_phases(float64: None) -> None:
    settings = {"epochs": 3, "iterations": 5, "batch_size": 6, "images": 16, "synthesis_batch": 8, "synthesis_iterations": 15}
    lockstep, losses = engine("lrq", settings | {"calibration_epochs": 1, "closest": 0.3, "margin": 0.2})
    plain = textbook(TextbookLRQ, lockstep, bits=4)
    lockstep.run(losses)
    for number in range(45):
        plain.step(tracking=30 <= number < 35, distilling=number >= 35)
    assert losses.generator["image_loss"] == pytest.approx([row[0] for row in plain.losses[:30]], rel=1e-6)
    assert losses.generator["bound_loss"][-1] > 0, "the second batch has centres to keep to"
    assert losses.student[35:] == pytest.approx([row[0] for row in plain.losses[35:]], rel=1e-6)


@pytest.mark.slow
def test_in_float64_gznq_makes_the_images_of_its_textbook_loop(float64: None) -> None:
    settings = {"images": 16, "synthesis_batch": 8, "synthesis_iterations": 15, "batch_size": 8, "confidence": 0.0}
    lockstep, losses = engine("gznq", settings)
    plain = textbook(TextbookGZNQ, lockstep, bits=4)
    lockstep.run(losses)
    for _ in range(30):
        plain.step(tracking=False, distilling=False)
    assert losses.generator["image_loss"] == pytest.approx([row[0] for row in plain.losses], rel=1e-6)


def test_in_float32_the_first_losses_are_those_of_the_textbook_loop() -> None:
    """At 8 bits: at 4, one activation that rounds the other way moves a random network's loss by percents."""
    lockstep, losses = engine("gdfq", WITH_WARMUP | {"epochs": 2, "iterations": 1, "batch_size": 16}, ("w8a8",))
    plain = textbook(TextbookGDFQ, lockstep, bits=8)
    lockstep.run(losses)
    for number in range(2):
        plain.step(tracking=number < 1, distilling=number >= 1)
    assert losses.generator["generator_loss"][0] == pytest.approx(plain.losses[0][0], rel=1e-4)
    assert losses.student[1] == pytest.approx(plain.losses[1][1], rel=5e-3)
