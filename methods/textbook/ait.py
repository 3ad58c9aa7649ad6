"""AIT's student on GDFQ's generator, the plain way: every tensor's step is doubled and bisected by itself.

Where the published code differs: its doubling has no end where a tensor gets no gradient; none does here.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dfqbench_methods.textbook.gdfq import TextbookGDFQ
from dfqbench_methods.textbook.loop import QuantizedWeight, grid


def levels(weight: Tensor, bits: int) -> Tensor:
    """The integers of a weight on the grid of its own output channels."""
    rows = weight.reshape(len(weight), -1)
    scale, zero = grid(rows.min(1).values, rows.max(1).values, bits)
    return torch.round(scale[:, None] * rows - zero[:, None])


class TextbookAIT(TextbookGDFQ):
    def setup(self) -> None:
        super().setup()
        c = self.config
        self.rounded = [module for module in self.student.modules() if isinstance(module, QuantizedWeight)]
        own = {id(module.layer.weight) for module in self.rounded}
        others = [p for p in self.student.parameters() if id(p) not in own]
        self.student_optimizer = torch.optim.SGD(others, lr=c.student_lr, momentum=0.9, nesterov=True)
        self.buffers: list[Tensor | None] = [None] * len(self.rounded)
        self.rate, self.share, self.updates = c.student_lr, c.changed_share, 0

    def decay(self, factor: float) -> None:
        super().decay(factor)
        self.rate, self.share = self.rate * factor, self.share * factor

    def distil(self, images: Tensor, answer: Tensor, labels: Tensor, distilling: bool) -> Tensor:
        logits = self.ask(self.student, images)  # (5)
        loss = 400.0 * F.kl_div(F.log_softmax(logits / 20.0, 1), F.softmax(answer / 20.0, 1), reduction="none").mean()
        if distilling:
            self.student.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self.student_optimizer.step()
            for number, module in enumerate(self.rounded):
                self.inundate(number, module)
            self.updates += 1
        return loss

    @torch.no_grad()
    def inundate(self, number: int, module: QuantizedWeight) -> None:
        weight, buffer = module.layer.weight, self.buffers[number]
        gradient: Tensor = weight.grad  # type: ignore[assignment, union-attr]
        buffer = gradient.clone() if buffer is None else 0.9 * buffer + gradient
        self.buffers[number] = buffer
        step, before = self.rate * (gradient + 0.9 * buffer), levels(weight, module.bits)  # type: ignore[arg-type]

        def changed(factor: float) -> float:  # (6)
            return float((levels(weight - factor * step, module.bits) != before).double().mean())  # type: ignore[operator]

        factor = 1.0
        if changed(factor) < self.share:
            first_epoch = self.updates < self.config.iterations
            while changed(factor) < self.share and not (first_epoch and factor > 100):
                factor *= 2
            low, high = factor / 2, factor
            for _ in range(5):
                factor = (low + high) / 2
                share = changed(factor)
                if abs(share - self.share) < self.share / 100:
                    break
                low, high = (factor, high) if share < self.share else (low, factor)
        weight -= factor * step  # type: ignore[operator]
