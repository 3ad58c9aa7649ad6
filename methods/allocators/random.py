"""random: vectors drawn at random, the best one kept: what a search has to beat that evaluates as many.

Each width is drawn uniformly, and the vector is then projected onto the budget by sensitivities, as dnq's vectors are: it is random search within
the same feasible set, not a search without knowledge. The first vector is the uniform one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dfqbench import Allocator, AllocatorConfig, Field, register_allocator


@register_allocator("random", paper="none: a comparator", fidelity="paper")
class Random(Allocator):
    """The best of random feasible choices: a comparator for searches."""

    quick = {"evaluations": 8}

    class Config(AllocatorConfig):
        evaluations: int = Field(3200, ge=1, description="vectors that are tried, as many as dnq's; the uniform one is the first")

    def allocate(self) -> Sequence[int]:
        problem, stream = self.problem, self.problem.random("random")
        best = problem.uniform
        for _ in range(self.config.evaluations - 1):
            drawn = torch.randint(len(problem.widths), (len(problem.tensors),), generator=stream)
            best = min(best, problem.project([problem.widths[k] for k in drawn.tolist()]), key=problem.cost)
        return best
