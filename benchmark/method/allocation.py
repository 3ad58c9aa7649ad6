"""The bit-allocation problem: a width for each weight, within a budget, so that the quantized network stays close to its teacher.

An allocator asks it what a choice of widths costs, and how much one tensor alone costs at each width. Nothing here has seen data: the images are
synthetic, of a random stream that no method trains on.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dfqbench.errors import UserError
from dfqbench.method.contract import stream_seed
from dfqbench.network import Teacher
from dfqbench.quantization import Bits, Protocol
from dfqbench.quantization.layers import ActivationQuantizer, QuantizedLayer
from dfqbench.quantization.student import Student
from dfqbench.tasks.answers import answers_of

Vector = tuple[int, ...]  # a width for each tensor of a problem
WIDTHS = (2, 3, 4, 5, 6, 8)
BATCH = 256  # images at once
FLOOR = 1e-12  # of a cost under a logarithm, nats


@dataclass(frozen=True)
class Allocatable:
    """A tensor that may have any width: its name in the student, its entries (of an activation: for one image)."""

    name: str
    entries: int
    is_weight: bool


class AllocationProblem:
    """Which width each tensor is to have. What a protocol pins (a first layer at 8 bits) is none of them, and keeps its width.

    tensors: in the order of the forward pass. widths: those that each may have, ascending. budget: total bits that the weights may have together:
    their entries times the average; where `activations` are to be chosen too, these have a budget of their own.
    student: its weights are the teacher's, its activation ranges those of `images` in full precision. evaluations: choices that were tried.
    """

    def __init__(self, teacher: Teacher, protocol: Protocol, bits: Bits, images: Tensor, seed: int = 0, activations: bool = False):
        """images: N x C x H x W. Raises UserError where there is nothing to choose."""
        fixed = "folded" if protocol.batch_norm == "folded" else "fixed"  # the same for every method, whatever it declares for itself
        rules = protocol.model_copy(update={"ranges": "ema", "batch_norm": fixed})
        self.teacher, self.images, self.seed, self.widths = teacher, images, seed, WIDTHS
        student = Student(teacher, rules, Bits(WIDTHS[0], bits.activations))
        if activations:
            student = Student(teacher, rules, Bits(WIDTHS[0], WIDTHS[0]))
        other = Student(teacher, rules, Bits(WIDTHS[1], WIDTHS[1] if activations else bits.activations)).tensors
        free = {name: module for name, module in student.tensors.items() if other[name].bits != module.bits}  # pinned are those that stay
        shapes = {str(n.target): n.meta["shape"] for n in student.traced.graph.nodes if n.op == "call_module" and "shape" in n.meta}
        self.student = student.to(images.device).to(memory_format=torch.channels_last).requires_grad_(False)
        self.tensors = tuple(_allocatable(name, module, shapes) for name, module in free.items())
        self._modules = list(free.values())
        if not any(t.is_weight for t in self.tensors):
            name = teacher.traced.meta["network"]
            raise UserError(f"{name}: no weight whose width could be chosen: the protocol {protocol.name!r} fixes all of them")
        self.entries: NDArray[np.int64] = np.array([t.entries for t in self.tensors])
        averages = ((True, bits.weights), (False, float(bits.activations)))
        kinds = [([i for i, t in enumerate(self.tensors) if t.is_weight == of_weights], average) for of_weights, average in averages]
        self._groups = [(of, average, round(100 * average) * int(self.entries[of].sum()) // 100) for of, average in kinds if of]
        self._known: dict[Vector, float] = {}
        self._calibrate()

    @torch.no_grad()
    def _calibrate(self) -> None:
        with self.student.full_precision():
            self.student.track_ranges(True)
            for batch in self.images.split(BATCH):
                self.student(batch)
            self.student.track_ranges(False)

    @property
    def budget(self) -> int:
        """Bits that all weights may have together."""
        return self._groups[0][2]

    @property
    def groups(self) -> list[tuple[list[int], int]]:
        """Indices of tensors that share a budget, with it: the weights, and the activations where these are chosen too."""
        return [(list(of), budget) for of, _, budget in self._groups]

    @property
    def evaluations(self) -> int:
        return len(self._known)

    def random(self, stream: str) -> torch.Generator:
        """The random stream of that name, on the CPU."""
        return torch.Generator().manual_seed(stream_seed(self.seed, f"allocation/{stream}"))

    # --- what a choice costs ------------------------------------------------------------------------------------------

    def cost(self, vector: Sequence[int]) -> float:
        """Mean KL(teacher || student) over the images, in nats, when all tensors are quantized; remembered."""
        key = tuple(vector)
        if key not in self._known:
            self._known[key] = self.cost_on(key, self.images)
        return self._known[key]

    def cost_on(self, vector: Sequence[int], images: Tensor) -> float:
        """The same on other images (N x C x H x W), not remembered."""
        self._set(vector)
        teacher = self._teacher_answers if images is self.images else self._answers(self.teacher, images)
        return float(self._divergence(self._answers(self.student, images), teacher))

    def reward(self, vector: Sequence[int]) -> float:
        """log cost(uniform) - log cost(vector): 0 for what is no better than equal widths, and without a scale."""
        return math.log(max(self.cost(self.uniform), FLOOR)) - math.log(max(self.cost(vector), FLOOR))

    @cached_property
    def sensitivities(self) -> NDArray[np.float64]:
        """Tensors x widths: (KL(p||q) + KL(q||p)) / 2 in nats where that tensor alone is quantized, at that width (ZeroQ, section 3.2)."""
        p, found = self._teacher_answers, np.zeros((len(self.tensors), len(self.widths)))
        with self.student.full_precision():
            for i, module in enumerate(self._modules):
                module.enabled = True
                for k, width in enumerate(self.widths):
                    _set_bits(module, width)
                    q = self._answers(self.student, self.images)
                    found[i, k] = float(self._divergence(q, p) + self._divergence(p, q)) / 2
                module.enabled = False
        return found

    @cached_property
    def rounding_errors(self) -> NDArray[np.float64]:
        """Weights x widths: sum of squared differences between a weight and its rounded self; nan for activations and weights of no layer."""
        found = np.full((len(self.tensors), len(self.widths)), np.nan)
        for i, module in enumerate(self._modules):
            if isinstance(module, QuantizedLayer):
                for k, width in enumerate(self.widths):
                    module.bits = width
                    found[i, k] = float((module.quantized_weight() - module.layer.weight).double().square().sum())
        return found

    @property
    def float_weights(self) -> list[nn.Parameter | None]:
        """The student's own float weights, of `student.full_precision()`; None for activations and for weights that no layer holds."""
        weights: list[Any] = [module.layer.weight if isinstance(module, QuantizedLayer) else None for module in self._modules]
        return weights

    def _set(self, vector: Sequence[int]) -> None:
        for module, width in zip(self._modules, vector, strict=True):
            _set_bits(module, width)

    @cached_property
    def _teacher_answers(self) -> Tensor:
        return self._answers(self.teacher, self.images)

    @torch.no_grad()
    def _answers(self, network: nn.Module, images: Tensor) -> Tensor:
        """As the task has them (`Answers`), float32."""
        return torch.cat([network(batch).float() for batch in images.split(BATCH)])

    def _divergence(self, ours: Tensor, theirs: Tensor) -> Tensor:
        """Mean KL(theirs || ours) over images, in nats."""
        return answers_of(self.teacher.task).divergence_per_image(ours.double(), theirs.double()).mean()

    # --- what is feasible ---------------------------------------------------------------------------------------------

    @cached_property
    def uniform(self) -> Vector:
        """Equal widths; where the average is none of them, the next lower one, filled up."""
        vector = [self.widths[0]] * len(self.tensors)
        for of, average, _ in self._groups:
            for i in of:
                vector[i] = max(width for width in self.widths if width <= average)
        return self.project(vector)

    def is_feasible(self, vector: Sequence[int]) -> bool:
        return all(int(self.entries[of] @ np.array(vector)[of]) <= budget for of, budget in self.groups)

    def project(self, vector: Sequence[int], keep: Collection[int] = ()) -> Vector:
        """The vector within its budgets, of which nothing is left that one tensor's next width could use: projected again, it stays.

        While it is over, one tensor goes a step down: the one whose sensitivity rises least for each bit that this saves. Then tensors go up by the
        reverse rule, as long as one fits. keep: tensors that stay as they are, where the budget allows it.
        """
        steps = [self.widths.index(width) for width in vector]
        for of, budget in self.groups:
            held = [i for i in of if i not in keep]
            while self._bits(steps, of) > budget:
                down = list(self._moves(steps, held, -1)) or list(self._moves(steps, of, -1))
                steps[min(down)[1]] -= 1
            while up := [move for move in self._moves(steps, held, 1) if self._bits(steps, of) + move[2] <= budget]:
                steps[min(up)[1]] += 1
        return tuple(self.widths[k] for k in steps)

    def _moves(self, steps: list[int], of: Sequence[int], by: int) -> Iterator[tuple[float, int, int]]:
        """(rise of the sensitivity for each bit, tensor, bits more) of every tensor that can go one step."""
        for i in of:
            k = steps[i] + by
            if 0 <= k < len(self.widths):
                bits = int(self.entries[i]) * (self.widths[k] - self.widths[steps[i]])
                yield float(self.sensitivities[i, k] - self.sensitivities[i, steps[i]]) / abs(bits), i, bits

    def _bits(self, steps: list[int], of: Sequence[int]) -> int:
        return sum(int(self.entries[i]) * self.widths[steps[i]] for i in of)


def _set_bits(module: Any, width: int) -> None:
    if isinstance(module, ActivationQuantizer):
        module.set_bits(width)
    else:
        module.bits = width


def _allocatable(name: str, module: Any, shapes: dict[str, tuple[int, ...]]) -> Allocatable:
    if isinstance(module, ActivationQuantizer):
        return Allocatable(name, math.prod(shapes[name][1:]), is_weight=False)
    return Allocatable(name, module.layer.weight.numel() if isinstance(module, QuantizedLayer) else math.prod(shapes[name]), is_weight=True)
