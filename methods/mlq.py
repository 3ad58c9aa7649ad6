"""MLQ: Deep Neural Network Compression with Single and Multiple Level Quantization. Xu, Wang, Zhou, Lin, Xiong. AAAI 2018, arXiv:1803.03289.

For very few bits, ternary weights above all: layers go to their levels a few at a time, on any host's images; the others make up for it.

    round r of R begins    of L layers, those are fixed that bring their number to ceil((r + 1) L / R): first the one whose loss rises most
                           when it alone is put on its grid, as all weights are now; its weight becomes its levels. Momentum is cleared
    every step             minimise the host's loss with the layers that are left in full precision; what is fixed stays, to the bit

    order: loss        the layer that costs most first, so that most of the others can make up for it
           ascending   the control: it last
           forward     from the image to the answer

The rise of the loss is that of the divergence from the teacher on the batch with which the round begins, activations quantized. In the last round all
weights are fixed, and only biases and BN parameters train. A student that is measured has all its weights on their levels.

Fidelity: abstract (incremental layer compensation, ternary weights). The order by loss as it is in each round, rounds of equal length and whole
layers are ours: the paper also splits a layer's weights, which is `slq`. Weights that no layer holds train as they do with the host.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch

from dfqbench import Batch, Field, HostingConfig, Student, register
from dfqbench_methods.parts.rounds import InRounds, loosened


@register("mlq", paper="arXiv:1803.03289", fidelity="abstract", shares_synthesis=True)
class MLQ(InRounds):
    """Layers are put on their levels and fixed in rounds while the others train, on the images of a host (Xu et al., AAAI 2018)."""

    tasks = {"classify", "segment", "detect"}
    needs = {"statistics", "labels"}  # with the host gdfq
    quick = {"host_settings": {"warmup_epochs": 1, "calibration_epochs": 1}, "layer_rounds": 2}

    class Config(HostingConfig):
        source = "chosen here"
        presets = {"cifar100": dict(host_preset="cifar100"), "imagenet": dict(batch_size=16, host_preset="imagenet")}

        layer_rounds: int = Field(5, ge=1, description="in how many rounds all layers are fixed; they are equally long")
        order: Literal["loss", "ascending", "forward"] = Field("loss", description="which layers are fixed first")

    @property
    def rounds(self) -> int:
        return int(self.config.layer_rounds)

    def fix(self, student: Student, batch: Batch) -> None:
        layers = list(student.layers.values())
        for layer in layers:
            if layer.free is None:
                layer.leave_free(torch.ones_like(layer.layer.weight, dtype=torch.bool))
        waiting = [layer for layer in layers if not layer.has_fixed_grid]
        count = math.ceil((self.round + 1) * len(layers) / self.rounds) - (len(layers) - len(waiting))
        if count <= 0:
            return
        if self.config.order != "forward" and count < len(waiting):
            rises = self.rises(student, batch, waiting)
            order = rises.argsort(descending=self.config.order == "loss", stable=True).tolist()
            waiting = [waiting[i] for i in order]
        for layer in waiting[:count]:
            layer.fix_weight()
            layer.leave_free(torch.zeros_like(layer.layer.weight, dtype=torch.bool))

    @torch.no_grad()
    def rises(self, student: Student, batch: Batch, waiting: list[Any]) -> torch.Tensor:
        """The divergence from the teacher with each of these layers alone on its grid, beside those that are fixed: one number for each."""
        found = []
        with loosened(student.layers.values()):
            for layer in waiting:
                layer.loose = False
                found.append(self.answers.divergence(student(batch.images), batch.teacher_logits))
                layer.loose = True
        return torch.stack(found)
