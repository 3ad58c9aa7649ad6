"""How a student is scored without data: how far it is from its teacher on synthetic images that nothing was trained on.

Nothing here opens an evaluation set.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dfqbench.engine.device import autocast_of
from dfqbench.engine.evaluate import Evaluation, in_batches_that_fit
from dfqbench.engine.lockstep import Interrupted
from dfqbench.engine.method_state import set_up
from dfqbench.errors import UserError
from dfqbench.files import kept_once
from dfqbench.method.contract import Phase
from dfqbench.method.registry import find_method
from dfqbench.network import Network, Teacher
from dfqbench.quantization.student import Student
from dfqbench.run.options import StopFlag
from dfqbench.run.rehearsal import rehearse
from dfqbench.sweep.cell import Bundle, Cell
from dfqbench.tasks.answers import answers_of

BATCH = 256


def agreement(student: Network, teacher: Network, images: Tensor, autocast: Any, smaller: Callable[[int], None] = lambda size: None) -> Evaluation:
    """How far the student is from the teacher on images (N x C x H x W).

    `loss` is the mean KL(teacher || student) in nats, `top1` the share of equal answers in percent (`Answers`). smaller: as of `evaluate`.
    """
    return in_batches_that_fit(lambda size: _agreement(student, teacher, images, autocast, size), BATCH, smaller)


@torch.inference_mode()
def _agreement(student: Network, teacher: Network, images: Tensor, autocast: Any, batch_size: int) -> Evaluation:
    answers, divergences, equal = answers_of(teacher.task), [], []
    for batch in images.split(batch_size):
        with autocast:
            theirs, ours = (network(batch).float() for network in (teacher, student))
        divergences.append(answers.divergence_per_image(ours, theirs))
        equal.append(answers.agreement(ours, theirs))
    same = torch.cat(equal).cpu().numpy()
    return Evaluation(same == 1, 100.0 * float(np.mean(same, dtype=np.float64)), None, float(torch.cat(divergences).double().mean()), "agreement")


def made_images(cell: Cell, teacher: Teacher, device: torch.device, count: int, stop: StopFlag) -> Tensor:
    """At most `count` images (N x C x H x W), each once, of the cell's method after its whole plan, without any student.

    Raises Interrupted at the next step after a signal; nothing is saved.
    """
    method = set_up(cell, teacher, device, None)
    phases, last = method.phases(), Phase("more", 1)
    with autocast_of(cell, device):
        for phase in phases:
            for _ in range(phase.epochs * (phase.iterations if phase.iterations is not None else int(method.config.iterations))):
                if stop.signal is not None:
                    raise Interrupted
                if phase.step is not None or phase.batch is None:
                    method.before_step(phase)
                    (phase.step or method.synthesize)()
        made: list[Tensor] = []
        while sum(map(len, made)) < count:
            method.before_step(last)
            made.append(method.synthesize().images.detach().float())
    images = torch.cat(made)[:count]
    low, high = (images.new_tensor(limit).view(1, -1, 1, 1) for limit in zip(*teacher.task.pixel_range(), strict=True))
    images = images.clamp(low, high)  # as every real image is; what a protocol does to an input's range must not decide
    first = {image.numpy().tobytes(): i for i, image in reversed([*enumerate(images.cpu())])}  # a method with few images gives them again and again
    return images[sorted(first.values())]


def kept_images(path: Path, maker: Cell, teacher: Teacher, device: torch.device, count: int, say: Callable[[str], None], stop: StopFlag) -> Tensor:
    """`made_images`, from the file where the first call left them, of this or of another process; `say` is told when they are made."""
    if not path.exists():
        say(f"making {count} images with {maker.label}, seed {maker.seed}")
        rehearse(Bundle((maker,)), teacher, device, say)
        images = made_images(maker, teacher, device, count, stop).cpu().contiguous()
        with kept_once(path) as temporary:
            save_file({"images": images}, temporary)
    return load_file(path)["images"].to(device).contiguous(memory_format=torch.channels_last)


def rounded(cell: Cell, teacher: Teacher, device: torch.device, own: Mapping[str, int] | None = None) -> Student | None:
    """The cell's teacher rounded without any training; None where its batch norms do not say enough. Nothing random is drawn, nor any seed set.

    own: bits by tensor, of a cell that has an allocation.
    """
    method = find_method("round")
    try:
        student = Student(teacher, cell.protocol, cell.bits, own).to(device).to(memory_format=torch.channels_last)
        method(teacher, method.Config(), 0, device).finish(student)
        student.check_ranges()
    except UserError:
        return None
    return student


def plain_rounding(
    cell: Cell, teacher: Teacher, images: Tensor, device: torch.device, own: Mapping[str, int] | None = None
) -> dict[str, float] | None:
    """`agreement` in percent and `kl` in nats of `rounded`; None where there is none."""
    student = rounded(cell, teacher, device, own)
    if student is None:
        return None
    found = agreement(student, teacher, images, autocast_of(cell, device))
    return {"agreement": found.top1, "kl": found.loss}
