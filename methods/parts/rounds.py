"""Weights that are fixed in rounds, on a host's images, while the others make up for it."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dfqbench import Batch, HostingMethod, Phase, Student


class InRounds(HostingMethod):
    """The loss is the host's. In training what is not fixed computes in full precision; whoever measures the student sees all of it on its grid.

    What is left to write: how many rounds there are, and `fix`. Rounds are equally long; momentum is cleared where one begins; what is fixed stays to
    the bit, and in the last round, when all weights are, biases and BN parameters train.
    """

    updates, round, begins = 0, -1, False  # of every student alike: steps begun, the round, and whether this step begins it

    @property
    def rounds(self) -> int:
        raise NotImplementedError

    def fix(self, student: Student, batch: Batch) -> None:
        """Round `self.round` begins: says of each layer what is free from here on (`layer.leave_free`), and finds the grid of what is not."""
        raise NotImplementedError

    @property
    def static_step(self) -> bool:
        return self.host.static_step

    def before_step(self, phase: Phase) -> Hashable:
        """None where a round begins."""
        kind = super().before_step(phase)
        if not phase.distill:
            return kind
        steps = sum(phase.epochs * (phase.iterations or self.config.iterations) for phase in self.phases() if phase.distill)
        now = self.updates * self.rounds // steps
        self.begins, self.round, self.updates = now > self.round, now, self.updates + 1
        return None if self.begins else kind

    def distill(self, student: Student, batch: Batch) -> Tensor:
        if self.begins:
            with torch.no_grad():
                self.fix(student, batch)
        with loosened(student.layers.values()):
            return self.host.distill(student, batch)

    def student_step(self, student: Student, loss: Tensor, optimizer: Optimizer) -> None:
        if self.begins:
            for state in optimizer.state.values():
                if state.get("momentum_buffer") is not None:
                    state["momentum_buffer"].zero_()
        layers = list(student.layers.values())
        before = [layer.layer.weight.detach().clone() for layer in layers]
        self.minimise(loss, optimizer)
        with torch.no_grad():
            for layer, old in zip(layers, before, strict=True):
                layer.layer.weight.copy_(torch.where(layer.get_buffer("left_free"), layer.layer.weight, old))

    def finish(self, student: Student) -> None:
        super().finish(student)
        for layer in student.layers.values():
            layer.leave_free(None)


@contextlib.contextmanager
def loosened(layers: Any) -> Iterator[None]:
    """Inside, what these layers have free is not on their grids."""
    layers = list(layers)
    for layer in layers:
        layer.loose = True
    try:
        yield
    finally:
        for layer in layers:
            layer.loose = False
