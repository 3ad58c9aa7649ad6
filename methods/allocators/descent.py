"""descent: coordinate descent on the measured cost, from the dynamic programme's solution, with restarts.

    repeat: for each tensor i in random order, for each other width: set it, project the others onto the budget, keep it if the cost falls
    until a whole round brings nothing;  then again from the solution of `pareto` with some widths drawn anew

A comparator: it needs no learning, and says what evaluating alone brings beyond adding up sensitivities.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dfqbench import Allocator, AllocatorConfig, Field, register_allocator
from dfqbench_methods.allocators.pareto import Pareto


@register_allocator("descent", paper="none: a comparator", fidelity="paper")
class Descent(Allocator):
    """Coordinate descent from the solution of pareto, restarted: a comparator for searches."""

    quick = {"evaluations": 12, "restarts": 2}

    class Config(AllocatorConfig):
        evaluations: int = Field(3200, ge=1, description="vectors that are tried at most, as many as dnq's")
        restarts: int = Field(16, ge=1, description="starts; the first is the solution of pareto itself")
        drawn_anew: float = Field(0.2, gt=0, le=1, description="share of widths that a later start draws anew")

    def allocate(self) -> Sequence[int]:
        problem, stream = self.problem, self.problem.random("descent")
        start = best = problem.project(Pareto(problem, self.config).allocate())
        for restart in range(self.config.restarts):
            vector = list(start)
            if restart:
                again = torch.rand(len(vector), generator=stream) < self.config.drawn_anew
                drawn = torch.randint(len(problem.widths), (len(vector),), generator=stream).tolist()
                vector = [problem.widths[k] if new else width for k, new, width in zip(drawn, again.tolist(), vector, strict=True)]
            best = min(best, self._descended(problem.project(vector), stream), key=problem.cost)
            if self._is_spent:
                break
        return best

    @property
    def _is_spent(self) -> bool:
        return bool(self.problem.evaluations >= self.config.evaluations)

    def _descended(self, vector: tuple[int, ...], stream: torch.Generator) -> tuple[int, ...]:
        problem, before = self.problem, None
        while vector != before and not self._is_spent:
            before = vector
            for i in torch.randperm(len(vector), generator=stream).tolist():
                others = [[*vector[:i], width, *vector[i + 1 :]] for width in problem.widths if width != vector[i]]
                for other in others:
                    if self._is_spent:
                        return vector
                    vector = min(vector, problem.project(other, keep=[i]), key=problem.cost)
        return vector
