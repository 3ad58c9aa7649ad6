"""hawq: HAWQ-V3's integer programme (Yao et al., ICML 2021, arXiv:2011.10680) with a trace that needs no data.

    minimise sum_i tr_i ||W_i - Q_k(W_i)||^2 x_ik   subject to  sum_k x_ik = 1,  sum n_i k x_ik <= budget,  x binary
    tr_i = E ||d log p(y | x) / dW_i||^2 / n_i      x: synthetic images, y drawn from the teacher's own softmax

HAWQ takes the Hutchinson trace of the loss' Hessian on labelled images, divided by the number of weights. Where labels are drawn from the network's
own answers, the Fisher information is the expectation of that Hessian, up to the curvature of the network itself. HAWQ-V3 chooses between 4 and 8
bits, leaves first and last layer out and ties a residual's 1x1 convolution to the main one; here the protocol says what is left out, there are six
widths, and nothing is tied.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import nn

from dfqbench import Allocator, AllocatorConfig, Field, UserError, register_allocator


@register_allocator("hawq", paper="arXiv:2011.10680", fidelity="paper")
class HAWQ(Allocator):
    """Rounding errors weighed by a data-free Fisher trace, the best sum by integer programming (HAWQ-V3, Yao et al., ICML 2021)."""

    of_activations = False
    tasks = {"classify"}
    quick = {"images": 4}

    class Config(AllocatorConfig):
        images: int = Field(64, ge=1, unit="images", description="of which the trace is the mean; one pass forward and back for each")

    def allocate(self) -> Sequence[int]:
        problem = self.problem
        weights = problem.float_weights
        if any(weight is None for weight in weights):
            raise UserError("allocator hawq: a weight that no layer holds has no gradient of its own: take pareto or descent")
        cost = self._traces([weight for weight in weights if weight is not None])[:, None] * problem.rounding_errors
        tensors, widths = cost.shape
        each = np.kron(np.eye(tensors), np.ones(widths))
        bits = np.kron(problem.entries, problem.widths).astype(float)
        scale = max(float(cost.max()), 1e-300)  # the solver's tolerances are absolute
        rules = [LinearConstraint(each, 1, 1), LinearConstraint(bits[None] / problem.budget, -np.inf, 1)]
        found = milp(cost.ravel() / scale, constraints=rules, integrality=np.ones(cost.size), bounds=Bounds(0, 1), options={"mip_rel_gap": 0.0})
        if found.x is None:
            raise RuntimeError(f"the integer programme has no solution: {found.message}")
        return problem.project([problem.widths[k] for k in found.x.reshape(cost.shape).argmax(1)])

    def _traces(self, weights: Sequence[nn.Parameter]) -> NDArray[np.float64]:
        """Mean over images of the squared gradient of log p(y | x), per entry of each weight."""
        problem, total = self.problem, np.zeros(len(weights))
        images, stream = problem.images[: self.config.images], problem.random("hawq")
        for weight in weights:
            weight.requires_grad_(True)
        with problem.student.full_precision(), torch.enable_grad():
            for image in images.split(1):
                answer = problem.student(image).float().log_softmax(1)[0]
                label = int(torch.multinomial(answer.detach().exp().cpu(), 1, generator=stream))
                gradients = torch.autograd.grad(answer[label], weights)
                total += [float(gradient.double().square().mean()) for gradient in gradients]
        for weight in weights:
            weight.requires_grad_(False)
        return total / len(images)
