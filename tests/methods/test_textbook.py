"""The engine against independent loops that are written the plain way: the same losses, step by step, and the same weights and ranges in the end.

Whole plans in small: warm-up, ranges that are tracked and then frozen, a milestone at which rates fall, all in float64, where the two may differ by
their order of summation alone.
"""

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
from dfqbench_methods.textbook.ait import TextbookAIT
from dfqbench_methods.textbook.gdfq import TextbookGDFQ
from dfqbench_methods.textbook.gznq import TextbookGZNQ
from dfqbench_methods.textbook.intraq import TextbookIntraQ
from dfqbench_methods.textbook.loop import Loop, QuantizedReLU
from dfqbench_methods.textbook.lrq import TextbookLRQ
from dfqbench_methods.textbook.qimera import TextbookQimera
from dfqbench_methods.textbook.zaq import RangeToTheEnd, TextbookZAQ
from dfqbench_methods.textbook.zeroq import RangeFromZero, TextbookZeroQ

SIZE = 8  # of images: two pixels are left to the last stage


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
    task, method = small_task(size=SIZE), find_method(name)
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


def textbook(kind: type[Loop], lockstep: Lockstep, bits: int = 4) -> Loop:
    return kind(network(), small_task(size=SIZE), bits, 0, lockstep.method.config)


def ranges(module: QuantizedReLU) -> list[float]:
    if isinstance(module, RangeToTheEnd | RangeFromZero):
        assert module.low is not None
        assert module.high is not None
        return [module.low.item(), module.high.item()]
    return (module.average / (1 - 0.9**module.batches)).tolist()


def assert_same_student(lockstep: Lockstep, plain: Loop) -> None:
    """All parameters and BN statistics, and the ranges of all activations; of the lockstep's first student."""
    student = lockstep.trainees[0].student
    theirs = dict(plain.student.state_dict())
    ours = {name.removeprefix("traced."): value for name, value in student.state_dict().items() if not name.startswith("traced.quantizers")}
    compared = [name for name in theirs if not name.endswith("num_batches_tracked")]
    assert set(compared) <= set(ours)
    for name in compared:
        assert torch.allclose(ours[name], theirs[name], rtol=1e-6, atol=1e-9), name
    for name, module in student.quantized_modules.items():
        quantizer, plain_module = student.quantizers[name], plain.student.get_submodule(module)
        assert isinstance(plain_module, QuantizedReLU)
        assert [quantizer.range.low.item(), quantizer.range.high.item()] == pytest.approx(ranges(plain_module), rel=1e-6, abs=1e-9), name


def assert_same_generator(lockstep: Lockstep, plain: Loop) -> None:
    """By shapes, since names differ: the parameters as sorted sums."""
    sums = [
        sorted((tuple(p.shape), p.abs().sum().item(), p.square().sum().item()) for p in generator.parameters())
        for generator in (_generator(lockstep.method), _generator(plain))
    ]
    assert [shape for shape, *_ in sums[0]] == [shape for shape, *_ in sums[1]]
    for (shape, *mine), (_, *other) in zip(*sums, strict=True):
        assert mine == pytest.approx(other, rel=1e-6), shape


def _generator(owner: Any) -> nn.Module:
    found = getattr(owner, "host", owner).generator
    assert isinstance(found, nn.Module)
    return found


PLAN = {"epochs": 5, "iterations": 10, "batch_size": 8, "milestones": [4]}
WITH_WARMUP = PLAN | {"warmup_epochs": 1, "calibration_epochs": 2}
GENERATED: dict[str, tuple[str, type[Loop], dict[str, Any], str]] = {
    "gdfq": ("gdfq", TextbookGDFQ, WITH_WARMUP, "generator_loss"),
    "acq": ("acq", TextbookACQ, WITH_WARMUP, "generator_loss"),
    "zaq": ("zaq", TextbookZAQ, PLAN | {"student_lr": 0.01}, "adversary"),
    "qimera": ("qimera", TextbookQimera, WITH_WARMUP | {"mixed_classes": 3}, ""),
    "qimera on imagenet": ("qimera", TextbookQimera, WITH_WARMUP | {"embedding": "teacher", "mixing": 0.7, "conditioning": "batch-norm"}, ""),
    "ait": ("ait", TextbookAIT, PLAN | {"host_settings": {"warmup_epochs": 1, "calibration_epochs": 2}}, "generator_loss"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind", "settings", "logged"), GENERATED.values(), ids=GENERATED)
def test_in_float64_fifty_steps_are_those_of_the_textbook_loop(
    float64: None, name: str, kind: type[Loop], settings: dict[str, Any], logged: str
) -> None:
    lockstep, losses = engine(name, settings, ("w4a4", "w3a3") if name == "gdfq" else ("w4a4",))
    plain = textbook(kind, lockstep)
    lockstep.run(losses)
    warmup, tracked = (0, 50) if name == "zaq" else (10, 20)
    for number in range(50):
        if number == 40:
            plain.decay(0.1)
        plain.step(tracking=number < tracked, distilling=number >= warmup)
    assert losses.student[warmup:] == pytest.approx([row[1] for row in plain.losses[warmup:]], rel=1e-6)
    generated = losses.generator[logged] if logged else np.add(losses.generator["generator_ce"], 0.1 * np.array(losses.generator["generator_bns"]))
    assert list(generated) == pytest.approx([row[0] for row in plain.losses if row[0]], rel=1e-6)
    assert_same_student(lockstep, plain)
    assert_same_generator(lockstep, plain)
    assert name != "ait" or min(losses.generator["step_factor"][1:]) > 2, "steps are lengthened"
    assert not torch.equal(lockstep.trainees[0].student.layers["conv1"].layer.weight, network().conv1.weight), "something was learned"


STORED = {"epochs": 4, "iterations": 5, "batch_size": 6, "images": 16, "synthesis_batch": 8, "milestones": [3], "calibration_epochs": 1}
FROM_STORED: dict[str, tuple[str, type[Loop], dict[str, Any]]] = {
    "intraq": ("intraq", TextbookIntraQ, {"closest": 0.1, "farthest": 0.3, "student_lr": 1e-5, "image_lr": 8.0}),
    "lrq": ("lrq", TextbookLRQ, {"closest": 0.3, "margin": 0.2}),
    "lrq without attention": ("lrq", TextbookLRQ, {"attention": "none"}),
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind", "settings"), FROM_STORED.values(), ids=FROM_STORED)
def test_in_float64_images_are_made_and_students_trained_on_them_as_by_the_textbook_loop(
    float64: None, name: str, kind: type[Loop], settings: dict[str, Any]
) -> None:
    """Two batches of images, the second with centres to keep to, and for IntraQ with a rate that falls; ranges; two rates of the student."""
    making = 60
    lockstep, losses = engine(name, STORED | {"synthesis_iterations": making} | settings)
    plain = textbook(kind, lockstep)
    lockstep.run(losses)
    for number in range(2 * making + 20):
        if number == 2 * making + 15:
            plain.decay(0.1)
        plain.step(tracking=2 * making <= number < 2 * making + 5, distilling=number >= 2 * making + 5)
    assert losses.generator["image_loss"] == pytest.approx([row[0] for row in plain.losses[: 2 * making]], rel=1e-6)
    assert any(losses.generator["bound_loss"]), "the second batch has centres to keep to"
    assert isinstance(plain, TextbookIntraQ)
    assert plain.optimizer.param_groups[0]["lr"] == (0.8 if name == "intraq" else 0.5)
    assert losses.student[2 * making + 5 :] == pytest.approx([row[0] for row in plain.losses[2 * making + 5 :]], rel=1e-6)
    assert_same_student(lockstep, plain)


@pytest.mark.slow
def test_in_float64_zeroq_has_the_images_ranges_and_logits_of_its_textbook_loop(float64: None) -> None:
    lockstep, losses = engine("zeroq", {"images": 8, "synthesis_iterations": 60, "patience": 5, "image_lr": 2.0})
    plain = textbook(TextbookZeroQ, lockstep)
    assert isinstance(plain, TextbookZeroQ)
    lockstep.run(losses)
    for number in range(61):
        plain.step(tracking=number == 60, distilling=False)
    assert losses.generator["statistics_loss"] == pytest.approx([row[0] for row in plain.losses], rel=1e-6)
    assert torch.allclose(lockstep.method.images, plain.images, rtol=1e-6, atol=1e-6)  # type: ignore[attr-defined]
    assert plain.generator_optimizer.param_groups[0]["lr"] < 2.0, "the rate has fallen"
    assert_same_student(lockstep, plain)
    plain.track(False)
    unseen = torch.randn(4, 3, SIZE, SIZE)
    assert torch.allclose(lockstep.trainees[0].student(unseen), plain.student(unseen), rtol=1e-6)


@pytest.mark.slow
def test_in_float64_gznq_makes_the_images_of_its_textbook_loop(float64: None) -> None:
    settings = {"images": 16, "synthesis_batch": 8, "synthesis_iterations": 25, "batch_size": 8, "confidence": 0.0}
    lockstep, losses = engine("gznq", settings)
    plain = textbook(TextbookGZNQ, lockstep)
    lockstep.run(losses)
    for _ in range(50):
        plain.step(tracking=False, distilling=False)
    assert losses.generator["image_loss"] == pytest.approx([row[0] for row in plain.losses], rel=1e-6)


def test_in_float32_the_first_losses_are_those_of_the_textbook_loop() -> None:
    """At 8 bits: at 4, one activation that rounds the other way moves a random network's loss by percents."""
    lockstep, losses = engine("gdfq", WITH_WARMUP | {"epochs": 2, "iterations": 1, "batch_size": 16}, ("w8a8",))
    plain = textbook(TextbookGDFQ, lockstep, bits=8)
    lockstep.run(losses)
    for number in range(2):
        plain.step(tracking=True, distilling=number >= 1)
    assert losses.generator["generator_loss"][0] == pytest.approx(plain.losses[0][0], rel=1e-4)
    assert losses.student[1] == pytest.approx(plain.losses[1][1], rel=5e-3)
