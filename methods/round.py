"""Rounding: no training, no images. The floor that every method has to beat.

Weights go to the nearest level of their grid; activation ranges come from the teacher's BN parameters as in data-free
quantization (Nagel et al., ICCV 2019, arXiv:1906.04721, section 4.3): a BN output has mean beta and standard deviation
gamma, so the range is beta +- n gamma. Only that part of DFQ is here: no weight equalisation, no bias correction.
Reached here (CIFAR-10 as JPEG, ResNet-20 with 87.44 %, W4A4 / W3A3): 83.96 / 68.68 %.
"""

from __future__ import annotations

from dfqbench import Field, Method, MethodConfig, Student, register


@register("round", paper="arXiv:1906.04721", fidelity="paper", shares_synthesis=True)
class Round(Method):
    """Nearest rounding, activation ranges from batch-norm parameters (Nagel et al., ICCV 2019); no training."""

    tasks = {"classify", "segment", "detect"}
    needs = {"statistics", "ranges"}
    uses_seed = False

    class Config(MethodConfig):
        source = "chosen here; DFQ takes 6 at 8 bits"

        n: float = Field(3.0, gt=0, unit="standard deviations", description="half-width of activation ranges")

    def finish(self, student: Student) -> None:
        student.set_ranges_from_bn(self.config.n)
