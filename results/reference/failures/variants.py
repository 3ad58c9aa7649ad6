"""Methods with one thing changed, to find what a failure hangs on: `dfqbench run ... --plugin results/reference/failures/variants.py`."""

from __future__ import annotations

from dataclasses import replace

from dfqbench import Phase, Student, register
from dfqbench_methods.gznq import GZNQ
from dfqbench_methods.intraq import IntraQ
from dfqbench_methods.zaq import ZAQ


def tracked_to_the_end(phases: list[Phase]) -> list[Phase]:
    *before, train = phases
    return [*before, replace(train, calibration_epochs=train.epochs)]


@register("intraq-moving", paper="arXiv:2111.09136", fidelity="code", shares_synthesis=True)
class MovingIntraQ(IntraQ):
    """IntraQ whose activation ranges go on being tracked while the student trains."""

    def phases(self) -> list[Phase]:
        return tracked_to_the_end(super().phases())


@register("gznq-moving", paper="arXiv:2101.08430", fidelity="abstract", shares_synthesis=True)
class MovingGZNQ(GZNQ):
    """GZNQ whose activation ranges go on being tracked while the student trains."""

    def phases(self) -> list[Phase]:
        return tracked_to_the_end(super().phases())


@register("zaq-fixed", paper="arXiv:2103.15263", fidelity="code", shares_synthesis=False)
class FixedZAQ(ZAQ):
    """ZAQ whose student keeps the teacher's BN statistics."""

    batch_norm = "fixed"


@register("zaq-fixed-frozen", paper="arXiv:2103.15263", fidelity="code", shares_synthesis=False)
class FrozenZAQ(FixedZAQ):
    """The same, with activation ranges that are frozen after the first epoch."""

    def phases(self) -> list[Phase]:
        return [replace(phase, calibration_epochs=1) for phase in super().phases()]


@register("zaq-fixed-alone", paper="arXiv:2103.15263", fidelity="code", shares_synthesis=False)
class AloneZAQ(FixedZAQ):
    """ZAQ with fixed BN statistics and without its adversary: the generator stays as it was drawn."""

    def adversary(self, student: Student) -> None:
        pass
