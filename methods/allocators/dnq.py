"""dnq: a width per layer by policy gradient. After DNQ (Xu et al., arXiv:1812.02375), of which the abstract alone is public.

    theta = 0 (tensors x widths)
    repeat: b_1..b_16 ~ softmax(theta), each projected onto the budget
            r_j = log J(uniform) - log J(b_j)            J: mean KL to the teacher on synthetic images
            A_j = (r_j - EMA(r)) / std(r)
            theta += Adam(mean_j A_j grad log pi(sampled b_j) + c grad entropy)
    the vector with the least J of all that were tried

Of DNQ this has what its abstract says: one width per layer, chosen by policy gradient. Policy, reward, constraint and constants were chosen here:
a table instead of a recurrent controller, which has nothing to carry over from one network to another; a projection instead of a penalty, so that
rewards can be compared. The gradient is that of what was sampled, before the projection.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.distributions import Categorical

from dfqbench import Allocator, AllocatorConfig, Field, register_allocator


@register_allocator("dnq", paper="arXiv:1812.02375", fidelity="abstract")
class DNQ(Allocator):
    """Policy gradient with one softmax over widths per layer, rewarded by the KL to the teacher (after DNQ, Xu et al., 2018)."""

    quick = {"updates": 3, "samples": 4}

    class Config(AllocatorConfig):
        updates: int = Field(200, ge=1, description="steps of the policy")
        samples: int = Field(16, ge=2, description="vectors per step; what was tried before is remembered")
        learning_rate: float = Field(0.05, gt=0, description="of the policy's Adam")
        baseline: float = Field(0.9, ge=0, lt=1, description="momentum of the moving average that rewards are compared with")
        entropy: float = Field(0.01, ge=0, description="weight of the policy's entropy at first; it falls to 0 over three quarters of the steps")

    def allocate(self) -> Sequence[int]:
        c, problem, stream = self.config, self.problem, self.problem.random("dnq")
        theta = torch.zeros(len(problem.tensors), len(problem.widths), requires_grad=True)
        optimizer = torch.optim.Adam([theta], lr=c.learning_rate)
        best, average = problem.uniform, None
        for update in range(c.updates):
            policy = Categorical(logits=theta)
            drawn = torch.multinomial(policy.probs.detach(), c.samples, replacement=True, generator=stream).T  # samples x tensors
            vectors = [problem.project([problem.widths[k] for k in row]) for row in drawn.tolist()]
            rewards = torch.tensor([problem.reward(vector) for vector in vectors])
            best = min([best, *vectors], key=problem.cost)
            average = rewards.mean() if average is None else c.baseline * average + (1 - c.baseline) * rewards.mean()
            advantages = (rewards - average) / (rewards.std() + 1e-8)
            weight = c.entropy * max(0.0, 1 - update / (0.75 * c.updates))
            loss = -(advantages * policy.log_prob(drawn).sum(1)).mean() - weight * policy.entropy().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return best
