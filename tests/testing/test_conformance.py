"""All built-in methods pass the conformance checks, and the checks find what they are for."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from dfqbench import Batch, Method, Phase, Student, TrainingConfig
from dfqbench.method.hosting import tasks_of
from dfqbench.method.registry import find_method, list_methods, register
from dfqbench.method.settings import without_default
from dfqbench.testing import Trial, check_method, method_checks
from dfqbench.testing.declarations import what_it_needs_is_declared
from dfqbench.testing.outcomes import CHECKS, DENSE_CHECKS, outcomes

pytestmark = pytest.mark.slow

BUILT_IN = [  # without those whose tests give them the settings that have no default
    method.info.name for method in list_methods() if method.info.origin == "built in" and not without_default(method.Config)
]


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_built_in_method_passes_every_check(name: str) -> None:
    (method,) = list_methods(name)
    method_checks(method)


@pytest.mark.parametrize(
    ("name", "used"),
    [("gdfq", "labels, statistics"), ("zaq", "features"), ("round", "ranges"), ("intraq", "features, labels, statistics")],
)
def test_what_a_method_asks_for_is_seen_and_has_to_be_declared(name: str, used: str) -> None:
    method = find_method(name)
    what_it_needs_is_declared(Trial(method))
    silent = type("Silent", (method,), {"__module__": __name__, "needs": set()})
    with pytest.raises(AssertionError) as caught:
        what_it_needs_is_declared(Trial(register(f"silent-{name}", paper="x", fidelity="paper")(silent)))
    assert str(caught.value).startswith(f"it uses {used}, which is not declared")


class Sound(Method):
    """Distils on noise; the methods below each break one thing."""

    class Config(TrainingConfig):
        pass

    def phases(self) -> list[Phase]:
        return [Phase("train", self.config.epochs, distill=True, calibration_epochs=1)]

    def images(self) -> Tensor:
        return self.draw_noise(self.config.batch_size, *self.task.image_shape)

    def synthesize(self) -> Batch:
        images = self.images()
        return Batch(images, None, self.teacher(images).detach())

    def distill(self, student: Student, batch: Batch) -> Tensor:
        loss: Tensor = (student(batch.images) - batch.teacher_logits).square().mean()
        return loss


class GlobalRandomness(Sound):
    def images(self) -> Tensor:
        torch.seed()
        return torch.randn(self.config.batch_size, *self.task.image_shape)


class SquareImages(Sound):
    """Claims kinds of tasks whose images are not square."""

    tasks = {"classify", "segment", "detect"}

    def images(self) -> Tensor:
        return self.draw_noise(self.config.batch_size, self.task.channels, self.task.size, self.task.size)


class WrongShape(Sound):
    def synthesize(self) -> Batch:
        batch = super().synthesize()
        return Batch(batch.images, torch.zeros(1, dtype=torch.long), batch.teacher_logits)


class TeacherInTraining(Sound):
    def synthesize(self) -> Batch:
        self.teacher.batch_norms[0].running_mean.add_(0.1)  # type: ignore[union-attr]
        return super().synthesize()


class LivesOffTheModule(Sound):
    """Keeps its state where no checkpoint finds it."""

    count = [0]

    def setup(self) -> None:
        self.count[0] = 0

    def images(self) -> Tensor:
        self.count[0] += 1
        return super().images() * self.count[0]


class LooksAtEvaluation(Sound):
    def finish(self, student: Student) -> None:
        import gc

        from dfqbench.data import Images

        seen = sum(int(o.pixels.sum()) for o in gc.get_objects() if type(o) is Images and o.pixels is not None)
        with torch.no_grad():
            next(student.parameters()).add_(seen * 1e-9)


class NoRanges(Sound):
    def phases(self) -> list[Phase]:
        return [Phase("train", self.config.epochs, distill=True)]


class LearnsNothing(Sound):
    """Its loss depends on no weight."""

    quick: ClassVar[dict[str, Any]] = {"student_weight_decay": 0.0}

    def distill(self, student: Student, batch: Batch) -> Tensor:
        return 0 * super().distill(student, batch)


class NeverSteps(Sound):
    """Finds every gradient, and takes no step."""

    def student_step(self, student: Student, loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
        loss.backward()  # type: ignore[no-untyped-call]


class HookedStudent(Sound):
    """Changes what a module of the student does, which no file can hold."""

    def finish(self, student: Student) -> None:
        next(iter(student.quantizers.values())).register_forward_hook(lambda module, given, answer: answer * 1.01)


class OnlyThreeChannels(Sound):
    def images(self) -> Tensor:
        return self.draw_noise(self.config.batch_size, 3, self.task.size, self.task.size)


class SharedButNot(Sound):
    """Says that it shares, but each student's loss draws from the common stream."""

    def distill(self, student: Student, batch: Batch) -> Tensor:
        return super().distill(student, batch) * (1 + self.draw_noise(1).abs().mean())


def test_qat_trains_detectors_by_divergence_alone() -> None:
    settings = {"student": "kl", "student_lr": 0.01, "host": "gaussian", "host_settings": {"calibration_epochs": 1}}
    found = check_method(find_method("qat"), settings)
    assert [str(outcome) for outcome in found if not outcome.good] == []
    assert {"(segment)", "(detect)"} <= {outcome.check.split()[-1] for outcome in found}
    assert tasks_of(find_method("qat"), find_method("qat").Config(**settings)) == {"classify", "segment", "detect"}
    assert tasks_of(find_method("qat"), find_method("qat").Config(student="kl")) == {"classify", "segment"}, "gdfq, the host, has no boxes"
    assert tasks_of(find_method("qat"), find_method("qat").Config(student="dkd")) == {"classify"}


def test_a_sound_method_passes() -> None:
    method_checks(register("sound", paper="x", fidelity="paper", shares_synthesis=True)(Sound))


@pytest.mark.parametrize(
    ("broken", "check"),
    [
        (GlobalRandomness, "one_seed_repeats_and_two_differ"),
        (WrongShape, "images_are_normalised_images"),
        (TeacherInTraining, "the_teacher_is_untouched"),
        (LivesOffTheModule, "interrupted_equals_uninterrupted"),
        (LooksAtEvaluation, "a_poisoned_evaluation_set_changes_nothing"),
        (NoRanges, "students_end_evaluated_with_finite_weights"),
        (NeverSteps, "students_end_evaluated_with_finite_weights"),
        (LearnsNothing, "students_end_evaluated_with_finite_weights"),
        (HookedStudent, "students_end_evaluated_with_finite_weights"),
        (OnlyThreeChannels, "any_task_works"),
        (SharedButNot, "shared_synthesis_is_true_to_its_word"),
        (SquareImages, "images_are_normalised_images (segment)"),
    ],
)
def test_a_broken_method_fails_the_check_that_is_for_it(broken: type[Any], check: str) -> None:
    method = register(broken.__name__.lower(), paper="x", fidelity="paper", shares_synthesis=True)(broken)
    if broken is not SquareImages:
        assert next(outcome for outcome in outcomes(method) if outcome.check == check).failure is not None
        return
    found = {o.check: o.failure for o in check_method(method)}
    assert len(found) == len(CHECKS) + (len(broken.tasks) - 1) * len(DENSE_CHECKS)
    assert found[check] is not None
    assert found["images_are_normalised_images (detect)"] is not None


def test_a_method_that_fails_a_check_is_told_which() -> None:
    method = register("noranges", paper="x", fidelity="paper", shares_synthesis=True)(NoRanges)
    with pytest.raises(AssertionError, match="students_end_evaluated_with_finite_weights"):
        method_checks(method)
