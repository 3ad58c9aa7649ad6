"""my-allocator: what is new about it, in one sentence. Authors, where and when it was published, arXiv number.

    b = equal widths
    repeat: one tensor's width is drawn anew, the others are projected onto the budget;  kept if the cost falls

Fidelity: what it follows, and where it differs from that. Reached here: not measured yet.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dfqbench import Allocator, AllocatorConfig, Field, register_allocator


@register_allocator("my-allocator", paper="unpublished", fidelity="paper")
class MyAllocator(Allocator):
    """What is new about it, in one line: this is what `dfqbench allocators` shows."""

    quick = {"tries": 5}

    class Config(AllocatorConfig):
        source = "chosen by the author"

        tries: int = Field(200, ge=1, description="choices that are tried, beside equal widths")

    def allocate(self) -> Sequence[int]:
        problem, stream = self.problem, self.problem.random("my-allocator")
        best = problem.uniform
        for _ in range(self.config.tries):
            i, k = (int(torch.randint(among, (), generator=stream)) for among in (len(problem.tensors), len(problem.widths)))
            other = problem.project([*best[:i], problem.widths[k], *best[i + 1 :]], keep=[i])
            best = min(best, other, key=problem.cost)
        return best
