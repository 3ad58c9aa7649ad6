"""pareto: ZeroQ's bit allocation (Cai et al., CVPR 2020, arXiv:2001.00281, section 3.2).

    Omega[i, k] = (KL(p || q) + KL(q || p)) / 2  with tensor i alone quantized at width k, on synthetic images
    minimise sum_i Omega[i, k_i]  subject to  sum_i n_i k_i <= budget

The frontier is exact: tensor by tensor, all reachable (bits, sum of Omega), of which those are dropped that cost more bits and are no better. The
sum is not: several tensors together need not cost what they cost one by one. ZeroQ has the widths 2, 4 and 8; here there are six.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dfqbench import Allocator, register_allocator


def cheapest(costs: NDArray[np.float64], entries: Sequence[int], widths: Sequence[int], budget: int) -> list[int]:
    """The width of each tensor with the least sum of `costs` (tensors x widths) and sum of entries x width <= budget: exact.

    Of equal costs the fewest bits. Raises ValueError where not even the narrowest widths are within the budget.
    """
    if sum(entries) * min(widths) > budget:
        raise ValueError(f"{sum(entries)} entries at {min(widths)} bits are over the budget of {budget} bits")
    left = np.cumsum([0, *(min(widths) * n for n in reversed(entries))])[::-1][1:]  # bits that later tensors need at least
    bits, cost, trail = np.zeros(1, np.int64), np.zeros(1), list[tuple[NDArray[np.int64], NDArray[np.int64]]]()
    for i, n in enumerate(entries):
        more = np.array([n * width for width in widths], np.int64)
        nodes = bits[:, None] + more, cost[:, None] + costs[i], np.arange(len(bits))[:, None].repeat(len(widths), 1)
        new_bits, new_cost, parent = (each.ravel() for each in nodes)
        choice = np.tile(np.arange(len(widths)), len(bits))
        order = np.lexsort((new_cost, new_bits))
        order = order[new_bits[order] <= budget - left[i]]
        best = np.minimum.accumulate(new_cost[order])
        order = order[np.concatenate(([True], best[1:] < best[:-1]))]  # only what is better than all that is smaller
        bits, cost = new_bits[order], new_cost[order]
        trail.append((choice[order], parent[order]))
    at, chosen = int(np.argmin(cost)), list[int]()
    for choice, parent in reversed(trail):
        chosen.append(widths[int(choice[at])])
        at = int(parent[at])
    return chosen[::-1]


@register_allocator("pareto", paper="arXiv:2001.00281", fidelity="paper")
class Pareto(Allocator):
    """The least sum of single-layer sensitivities, by an exact dynamic programme (ZeroQ, Cai et al., CVPR 2020)."""

    def allocate(self) -> Sequence[int]:
        problem, vector = self.problem, list(self.problem.uniform)
        for of, budget in problem.groups:
            chosen = cheapest(problem.sensitivities[of], problem.entries[of].tolist(), problem.widths, budget)
            for i, width in zip(of, chosen, strict=True):
                vector[i] = width
        return problem.project(vector)
