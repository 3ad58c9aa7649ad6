"""A false `static_step` is found on a CPU, and the message says what the step does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from dfqbench import Batch, Method, Phase, Student, TrainingConfig
from dfqbench.method.registry import find_method, register
from dfqbench.testing import StopAfter, Trial
from dfqbench.testing.declarations import static_steps_are_the_same_every_time
from dfqbench.testing.static_steps import ComparedParts


class Same(Method):
    """Distils on noise with the same operations every time; the methods below each break that."""

    needs = {"labels"}

    class Config(TrainingConfig):
        batch_size: int = 4

    @property
    def static_step(self) -> bool:
        return True

    def setup(self) -> None:
        self.steps, self.mean, self.turns = 0, torch.zeros(()), [torch.zeros(3), torch.ones(3)]

    def phases(self) -> list[Phase]:
        return [Phase("train", self.config.epochs, distill=True, calibration_epochs=1)]

    def synthesize(self) -> Batch:
        images = self.draw_noise(self.config.batch_size, *self.task.image_shape)
        labels = self.draw_labels(self.config.batch_size)
        with torch.no_grad():
            self.more(images, labels)
        return Batch(images, labels, self.teacher(images).detach())

    def more(self, images: Tensor, labels: Tensor) -> None:
        self.mean.mul_(0.9).add_(images.mean())
        self.log("mean", self.mean)
        images.add_(one_hot(labels, self.task.classes).float().mean())

    def distill(self, student: Student, batch: Batch) -> Tensor:
        loss: Tensor = (student(batch.images) - batch.teacher_logits).square().mean()
        return loss


class ReadsAValue(Same):
    def more(self, images: Tensor, labels: Tensor) -> None:
        if images.sum() > 0:
            images.neg_()


class FetchesAList(Same):
    def more(self, images: Tensor, labels: Tensor) -> None:
        images.mul_(1.0 + max(labels.tolist()))


class MasksAnIndex(Same):
    def more(self, images: Tensor, labels: Tensor) -> None:
        images.add_(images[labels > 4].sum())


class LogsANumber(Same):
    def more(self, images: Tensor, labels: Tensor) -> None:
        self.log("constant", 1.0)


class KeepsCount(Same):
    def more(self, images: Tensor, labels: Tensor) -> None:
        self.steps += 1


class BindsATensor(Same):
    def more(self, images: Tensor, labels: Tensor) -> None:
        self.mean = images.mean()


class BindsBefore(Same):
    def before_step(self, phase: Phase) -> int:
        self.mean = torch.rand((), generator=self.random("mean"))
        return 0


class TakesTurns(Same):
    """Without a word to `self`: which tensor it reads depends on a count that the log keeps."""

    def more(self, images: Tensor, labels: Tensor) -> None:
        count = self._log.counts().get(("", "turn"), 0)
        images.add_(self.turns[count % 2].sum())
        self.log("turn", images.mean())


class OtherNumbers(Same):
    def more(self, images: Tensor, labels: Tensor) -> None:
        images.mul_(0.99 ** self._log.counts().get(("", "turn"), 0))
        self.log("turn", images.mean())


class OtherShapes(Same):
    def more(self, images: Tensor, labels: Tensor) -> None:
        images.add_(images[: 1 + self._log.counts().get(("", "turn"), 0) % 3].mean())
        self.log("turn", images.mean())


class DependsOnTheSeed(Same):
    def more(self, images: Tensor, labels: Tensor) -> None:
        images.mul_(1.0 + self.seed)


def compared(method: type[Any]) -> ComparedParts:
    name = method.__name__.lower()
    lockstep = Trial(register(name, paper="x", fidelity="paper", shares_synthesis=True)(method), {"epochs": 1, "iterations": 5}).start()
    lockstep.parts = parts = ComparedParts(lockstep)
    lockstep.run(StopAfter())
    return parts


def test_what_is_the_same_every_time_passes() -> None:
    parts = compared(Same)
    assert parts.compared == 4
    assert {name for _, _, name in parts.operations} == {"shared", "w4a4"}
    assert all(len(operations) > 20 for operations in parts.operations.values())


@pytest.mark.parametrize(
    ("broken", "told"),
    [
        (ReadsAValue, "the making of images reads a tensor's value"),
        (FetchesAList, "moves values between the device and Python (tolist)"),
        (MasksAnIndex, "a mask as an index"),
        (LogsANumber, "makes a tensor of Python numbers"),
        (KeepsCount, "replaces or changes self.steps"),
        (BindsATensor, "replaces or changes self.mean"),
        (BindsBefore, "other operations than in the step before: aten::mul_"),
        (TakesTurns, "other operations than in the step before: aten::sum"),
        (OtherNumbers, "other operations than in the step before: aten::mul_"),
        (OtherShapes, "other operations than in the step before: aten::slice"),
    ],
)
def test_what_a_replay_would_get_wrong_is_named(broken: type[Any], told: str) -> None:
    with pytest.raises(AssertionError) as caught:
        compared(broken)
    assert told in str(caught.value)


@pytest.mark.slow
def test_two_seeds_must_do_the_same() -> None:
    method = register("dependsontheseed", paper="x", fidelity="paper", shares_synthesis=True)(DependsOnTheSeed)
    with pytest.raises(AssertionError, match="with another seed, steps are other operations"):
        static_steps_are_the_same_every_time(Trial(method))


def test_what_a_built_in_method_does_not_claim_would_be_found() -> None:
    claims = type("ClaimsStatic", (find_method("ait"),), {"__module__": __name__, "static_step": True})
    method = register("claims-static", paper="x", fidelity="code", shares_synthesis=True)(claims)
    with pytest.raises(AssertionError, match=r"a student's step (reads a tensor's value|moves values)"):
        static_steps_are_the_same_every_time(Trial(method))
