"""DFQ: Data-Free Quantization Through Weight Equalization and Bias Correction. Nagel, van Baalen, Blankevoort, Welling. ICCV 2019, arXiv:1906.04721.

Makes a network easier to round without changing it, then takes out the mean error. No images, no training.

    equalise: between two layers with ReLU between,  s_i = sqrt(r1_i / r2_i)      r: ranges of the weights into and out of channel i
              W1_i /= s_i,  b1_i /= s_i,  W2_:i *= s_i, over all such pairs until nothing moves
    absorb:   c = max(0, beta - 3 |gamma|);  b1 -= c,  b2 += W2 c                 where a ReLU passes nearly all values
    ranges:   beta +- n |gamma|
    correct:  b -= (Q(W) - W) E[x]                                                E[x] from beta and gamma

Fidelity: the paper. Only pairs whose first layer nothing else reads are equalised: not what enters a residual sum. The paper folds batch norm first;
where a protocol does not, a norm's scale goes into the weights of the pairs nevertheless and the norm keeps only statistics. Ranges are `round`'s
(n = 3; the paper has 6 at 8 bits). A ReLU6 does not commute with one scale per channel. The paper puts a ReLU in its place; here such a pair is
shrunk as a whole until 20 standard deviations stay below 6, which computes the same; with `raise_ceilings` off it is left alone. A channel with a
millionth of the largest range counts as dead and is not scaled. E[x] goes through sums, poolings and activation functions, and counts padded zeros; a
layer whose input no batch norm describes (the first) is not corrected. Absorbing counts no padding, as in the paper: where a layer pads and
something is absorbed, its border is off by it. Reached here (CIFAR-10 as JPEG, ResNet-20 with 87.44 %, W4A4 / W3A3): 85.38 / 79.17 %; without
correction 84.63 / 64.61, without equalising 85.19 / 78.42; with one grid for each tensor 84.09 / 71.56 (`round`: 83.96 / 68.68,
per tensor 81.32 / 46.05).
"""

from __future__ import annotations

import math

import torch

from dfqbench import Field, Method, MethodConfig, Student, register

REACH = 20.0  # standard deviations that a raised ceiling must be above
DEAD = 1e-6  # of the largest range
SWEEPS = 100  # over all pairs, at most


@register("dfq", paper="arXiv:1906.04721", fidelity="paper", shares_synthesis=True)
class DFQ(Method):
    """Equalised weights, absorbed and corrected biases, no images, no training (Nagel et al., ICCV 2019)."""

    tasks = {"classify", "segment", "detect"}
    needs = {"statistics", "ranges"}
    uses_seed = False

    class Config(MethodConfig):
        source = "the paper"

        equalise: bool = Field(True, description="scale channels so that the weights into and out of each have one range")
        raise_ceilings: bool = Field(True, description="equalise across ReLU6 too, with its ceiling out of reach; off: leave such pairs")
        absorb: bool = Field(True, description="move high biases behind a ReLU into the next layer")
        correct: bool = Field(True, description="correct biases by the mean error of the rounded weights")
        n: float = Field(3.0, gt=0, unit="standard deviations", description="half-width of activation ranges", source="as `round`")

    def finish(self, student: Student) -> None:
        c = self.config
        if c.equalise:
            equalise(student, c.raise_ceilings)
        if c.absorb:
            absorb(student)
        student.set_ranges_from_bn(c.n)
        if c.correct:
            student.correct_biases()


def equalise(student: Student, raise_ceilings: bool = True) -> None:
    """Gives the weights into and out of every channel between two layers the same range, in place."""
    pairs = [p for p in student.pairs() if math.isinf(p.ceiling) or (raise_ceilings and p.distribution is not None)]
    for _ in range(SWEEPS):
        moved = 0.0
        for pair in pairs:
            one, other = pair.ranges()
            alive = (one > DEAD * one.max()) & (other > DEAD * other.max())
            s = torch.where(alive, (one / other).sqrt(), 1.0)
            pair.divide(s)
            moved = max(moved, float(s.log().abs().max()))
        if moved < 1e-3:
            break
    for pair in pairs:
        if pair.distribution is not None and math.isfinite(pair.ceiling):
            mean, deviation = pair.distribution
            reach = float((mean + REACH * deviation).max()) / pair.ceiling
            pair.divide(torch.full_like(mean, max(reach, 1.0)))


def absorb(student: Student) -> None:
    """Moves what a ReLU nearly always passes, beta - 3 |gamma| where that is positive, into the next layer's bias."""
    for pair in student.pairs():
        if pair.rectified and pair.distribution is not None:
            mean, deviation = pair.distribution
            if float((mean + REACH * deviation).max()) <= pair.ceiling * (1 + 1e-6):
                pair.absorb((mean - 3 * deviation).clamp_min(0))
