"""Boxes that images of a detection task are asked for: drawn at random, held against what a detector answers, corrected by what it sees.

`wanted` is N x M x 6 throughout: left, top, right, bottom in pixels, the class (its place among a position's class logits), and 1, or 0 where there
is no box. The boxes of all positions are N x P x 4, as a detector's `boxes` gives them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, one_hot

from dfqbench import Task

SHORTEST, LONGEST = 0.2, 0.8  # sides of a drawn box, in sides of the image
POSITIONS = 9  # that answer for a box
FOCUS = 2.0  # exponent: positions that are right already weigh less


def draw_boxes(count: int, most: int, task: Task, stream: torch.Generator) -> Tensor:
    """One box for each of `count` images, with room for `most`: sides uniform, anywhere inside the image, of any class: N x M x 6."""
    uniform = torch.rand(count, 5, generator=stream, device=stream.device)
    height, width = task.image_shape[1:]
    size = SHORTEST + (LONGEST - SHORTEST) * uniform[:, :2]
    start = uniform[:, 2:4] * (1 - size)
    background = int(task.scores == "softmax")
    kind = background + (uniform[:, 4] * (task.classes - background)).floor()
    ends = torch.cat([start, start + size], 1)
    wanted = torch.zeros(count, most, 6, device=stream.device)
    wanted[:, 0] = torch.stack([ends[:, 0] * width, ends[:, 1] * height, ends[:, 2] * width, ends[:, 3] * height, kind, torch.ones_like(kind)], 1)
    return wanted


def overlaps(ones: Tensor, others: Tensor) -> Tensor:
    """Intersection over union: ... x A x 4 and ... x B x 4 -> ... x A x B."""
    a, b = ones[..., :, None, :], others[..., None, :, :]
    shared = _shared(a, b)
    return shared / (area(a) + area(b) - shared).clamp_min(1e-9)


def generalized_overlap(ones: Tensor, others: Tensor) -> Tensor:
    """GIoU of each box with its partner, ... x 4 both -> ... (torchvision's loss waits for the device)."""
    shared = _shared(ones, others)
    union = area(ones) + area(others) - shared
    hull = area(torch.cat([torch.minimum(ones[..., :2], others[..., :2]), torch.maximum(ones[..., 2:], others[..., 2:])], -1)).clamp_min(1e-9)
    return shared / union.clamp_min(1e-9) - (hull - union) / hull


def area(boxes: Tensor) -> Tensor:
    """... x 4 -> ...; 0 where a box is turned inside out."""
    return (boxes[..., 2] - boxes[..., 0]).clamp_min(0) * (boxes[..., 3] - boxes[..., 1]).clamp_min(0)


def _shared(ones: Tensor, others: Tensor) -> Tensor:
    return area(torch.cat([torch.maximum(ones[..., :2], others[..., :2]), torch.minimum(ones[..., 2:], others[..., 2:])], -1))


@torch.no_grad()
def assigned(boxes: Tensor, wanted: Tensor) -> Tensor:
    """For each position the box that it answers for, an index of the M, or -1: N x P.

    Each wanted box is answered for by the positions whose own boxes (the teacher's) overlap it most; a position answers for one box.
    """
    overlap = overlaps(wanted[..., :4], boxes.detach()) * wanted[..., 5:]
    best, positions = overlap.topk(min(POSITIONS, boxes.shape[1]), 2)
    chosen = torch.zeros_like(overlap).scatter(2, positions, best)
    most, which = chosen.max(1)
    return torch.where(most > 0, which, -1)


def detection_loss(answers: Any, answer: Tensor, boxes: Tensor, wanted: Tensor, answering: Tensor) -> tuple[Tensor, Tensor]:
    """How far an answer is from what is wanted: (of the classes, of the boxes), scalars.

    Classes: cross-entropy of every position, that of one which answers for no box with "nothing", weighed by (1 - p)^2 of the right choice (focal
    loss), summed and divided by the number of positions that answer for a box. Boxes: 1 - GIoU of these positions' boxes (N x P x 4), averaged.

    answers: the detector's `Answers`; answering: see `assigned`.
    """
    logits = answers.parts(answer)[0].float()
    positive = (answering >= 0).float()
    mine = wanted.gather(1, answering.clamp_min(0)[..., None].expand(-1, -1, 6))
    count = positive.sum().clamp_min(1)
    kind = mine[..., 4].long()
    if answers.task.scores == "softmax":
        kind = torch.where(answering >= 0, kind, 0)
        wrong = cross_entropy(logits.flatten(0, 1), kind.flatten(), reduction="none")
    else:
        right = one_hot(kind, answers.task.classes) * positive[..., None]
        wrong = binary_cross_entropy_with_logits(logits, right, reduction="none")
    of_classes = ((1 - torch.exp(-wrong)).pow(FOCUS) * wrong).sum() / count
    missed = 1 - generalized_overlap(boxes.float(), mine[..., :4])
    return of_classes, (missed * positive).sum() / count


@torch.no_grad()
def relabelled(
    found: list[dict[str, Tensor]], wanted: Tensor, task: Task, sure: float = 0.2, same: float = 0.35, areas: tuple[float, float] = (0.01, 0.85)
) -> Tensor:
    """What the images show in the eyes of a detector, whose boxes after suppression `found` has (boxes, scores, labels of each image): N x M x 6.

    A box that it is `sure` of is added where it overlaps none that is there by `same`, and its share of the image's area lies in `areas`; one that is
    there goes where it overlaps none of the detector's by that much. One box always stays.
    """
    height, width = task.image_shape[1:]
    background = int(task.scores == "softmax")  # which a detector's labels do not count
    after = torch.zeros_like(wanted)
    for n, seen in enumerate(found):
        chosen = seen["scores"] > sure
        boxes, kinds = (seen[name][chosen].to(wanted.device, wanted.dtype) for name in ("boxes", "labels"))
        kinds = kinds + background
        there = wanted[n][wanted[n, :, 5] > 0]
        overlap = overlaps(there[:, :4], boxes)
        share = area(boxes) / (height * width)
        new = (overlap < same).all(0) & (share > areas[0]) & (share < areas[1])
        added = torch.cat([boxes[new], kinds[new, None], torch.ones_like(kinds[new, None])], 1)
        kept = torch.cat([there[(overlap >= same).any(1)], added])[: wanted.shape[1]]
        kept = kept if len(kept) else there[:1]
        after[n, : len(kept)] = kept
    return after
