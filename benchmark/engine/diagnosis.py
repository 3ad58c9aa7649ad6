"""What an epoch's last batch says of a student's health: what its grids clip, how its ranges moved, how far it agrees with the teacher.

Looking changes nothing: no gradient, no random draw, ranges and batch norms at rest. It costs one forward pass per epoch and student.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from dfqbench.method.contract import Batch
from dfqbench.network import Network
from dfqbench.quantization.student import Student
from dfqbench.tasks.answers import answers_of


def look(student: Student, batch: Batch, autocast: AbstractContextManager[Any]) -> dict[str, float]:
    """`clipped`: percent of the activations beyond their grid, in the layer where it is most; nothing where no layer has a range.

    `student_agrees`: percent of the images (pixels, objects) to which the student gives the teacher's answer.
    """
    with torch.no_grad(), autocast:
        logits, shares = student.clipped_shares(batch.images)
    if not len(shares):
        return {}
    agrees = answers_of(student.task).agreement(logits, batch.teacher_logits)
    found = {"clipped": 100 * shares.max(), "student_agrees": 100 * agrees.mean()}
    return {name: float(value) for name, value in found.items()}


def widths(student: Student) -> Tensor:
    """Highest minus lowest value of every activation range, in the order of the forward pass; on the student's device."""
    return torch.stack([q.range.high - q.range.low for q in student.quantizers.values()])


def range_change(before: Tensor | None, now: Tensor) -> dict[str, float]:
    """`range_change`: by which factor a range became wider or narrower, in the layer where it is most; nothing without an earlier look."""
    if before is None or not len(now):
        return {}
    ratio = now.double() / before.to(now.device).double()
    return {"range_change": float(torch.maximum(ratio, 1 / ratio).nan_to_num(nan=math.inf).max())}


def agreements(student: Network, plain: Network | None, batch: Batch, autocast: AbstractContextManager[Any]) -> dict[str, float]:
    """`student_agrees` as in `look`, and `rounding_agrees`, the same of the plainly rounded teacher.

    agreement_error: one standard error of their difference, in points, paired over the images. Nothing without a rounded teacher.
    """
    if plain is None:
        return {}
    agreement = answers_of(student.task).agreement
    with torch.no_grad(), autocast:
        ours, rounded = (agreement(network(batch.images), batch.teacher_logits).double() for network in (student, plain))
    difference = ours - rounded
    error = float(difference.std(correction=0)) / math.sqrt(len(difference))
    return {"student_agrees": 100 * float(ours.mean()), "rounding_agrees": 100 * float(rounded.mean()), "agreement_error": 100 * error}
