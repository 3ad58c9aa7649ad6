"""ZeroQ: A Novel Zero Shot Quantization Framework. Cai, Yao, Dong, Gholami, Mahoney, Keutzer. CVPR 2020, arXiv:2001.00281.

One batch of noise is optimised until every single image of it has the statistics that the teacher's BN layers remember. The batch sets the
activation ranges; nothing is trained.

    x ~ nearly zero;  500 steps of Adam on
        sum_l mean_n ( ||m_nl - mu_l||^2 + ||sd_nl - sigma_l||^2 )  +  mean_n ( ||mean(x_n)||^2 + ||std(x_n) - 1||^2 )

with per-image mean m_nl and deviation sd_nl over the positions of BN layer l's input. Fidelity: the authors' code (its uniform path), whose steps
it repeats up to rounding, where statistics are those of BN inputs (theirs pairs convolutions with BN layers by order of definition). Their initial
noise is uniform in +-127.5 divided by a variance of 5418.75 where its root was meant: kept. Reached here (CIFAR-10 as JPEG, ResNet-20 with 87.44 %,
W4A4 / W3A3, means of seeds 0 and 1): 82.78 / 61.38 %.

The optimisation is chaotic: one pixel of 64 images moved by its last digit moves all by 0.003 (root mean square) after 20 steps and by 0.09 after
500, in units of a pixel's deviation. So the same seed with another order of summation (another machine, number of threads or version of torch) ends
2 to 3 points apart at W3A3, and the authors' code does so against itself. One run says little, and the spread over seeds is not the whole noise.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Adam

from dfqbench import Batch, Field, Method, MethodConfig, Observation, Phase, register
from dfqbench_methods.parts.plateau import Plateau

EPS = 1e-6


@register("zeroq", paper="arXiv:2001.00281", fidelity="code", shares_synthesis=True)
class ZeroQ(Method):
    """Noise optimised towards BN statistics, for calibration only (Cai et al., CVPR 2020)."""

    ranges = "minmax"
    tasks = {"classify", "segment", "detect"}
    needs = {"statistics"}
    quick = {"images": 4, "synthesis_iterations": 6}

    class Config(MethodConfig):
        source = "the authors' code"

        images: int = Field(64, ge=1, unit="images", description="images in the one batch")
        synthesis_iterations: int = Field(500, ge=0, unit="steps", description="steps on the images")
        image_lr: float = Field(0.5, gt=0, description="Adam's learning rate on the pixels")
        patience: int = Field(100, ge=1, unit="steps", description="steps without progress before the learning rate falls tenfold")

    def setup(self) -> None:
        shape = (self.config.images, *self.task.image_shape)
        levels = torch.randint(0, 255, shape, generator=self.random("noise"), device=self.device)
        self.images = ((levels - 127.5) / 5418.75).contiguous(memory_format=torch.channels_last).requires_grad_()
        self.optimizer = Adam([self.images], lr=self.config.image_lr, fused=self.device.type == "cuda")
        self.plateau = Plateau(self.optimizer, patience=self.config.patience, min_lr=1e-4)

    @property
    def static_step(self) -> bool:
        """On a CPU its optimizer is not torch's fused one."""
        return self.device.type == "cuda"

    def phases(self) -> list[Phase]:
        return [
            Phase("synthesis", 1, iterations=self.config.synthesis_iterations, step=self.optimise),
            Phase("calibration", 1, iterations=1, calibration_epochs=1),
        ]

    def optimise(self) -> None:
        loss = image_statistics_loss(self.teacher.observe(self.images), self.images)
        self.minimise(loss, self.optimizer)
        self.plateau.step(loss)
        self.log("statistics_loss", loss)

    def synthesize(self) -> Batch:
        images = self.images.detach()
        return Batch(images, None, self.teacher(images).detach())


def image_statistics_loss(answer: Observation, images: Tensor) -> Tensor:
    """Squared distance of every single image's statistics to the BN layers', and of its pixels' to mean 0 and deviation 1 (scalar).

    Summed over layers and channels, averaged over images; deviations are unbiased, a map of one position has none.
    """
    mean, deviation = _per_image(images)
    loss = (mean.square() + (deviation - 1).square()).sum(1).mean()
    for x, bn in zip(answer.bn_inputs, answer.batch_norms, strict=True):
        assert bn.running_mean is not None
        assert bn.running_var is not None
        mean, deviation = _per_image(x)
        loss = loss + (mean - bn.running_mean).square().sum(1).mean()
        if x.shape[2:].numel() > 1:
            loss = loss + (deviation - (bn.running_var + EPS).sqrt()).square().sum(1).mean()
    return loss


def _per_image(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased standard deviation over the positions of each channel: N x C each, float32 at least."""
    x = x if x.dtype == torch.float64 else x.float()
    positions = tuple(range(2, x.dim()))
    if not positions:  # of a batch norm behind a linear layer
        return x, torch.zeros_like(x)
    mean = x.mean(positions, keepdim=True)
    variance = (x - mean).square().sum(positions) / max(x.shape[2:].numel() - 1, 1)
    mean = mean.flatten(1)
    return mean, (variance + EPS).sqrt()
