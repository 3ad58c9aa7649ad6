"""Trains the `scenes:` networks on scenes of digits, so that teachers for dense tasks can be had without any download."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfqbench.data.digit_scenes import Scenes
from dfqbench.engine.evaluate import normalise
from dfqbench.errors import UserError
from dfqbench.task import Task
from dfqbench.teachers.scenes import STRIDES, boxes_of, centres

BATCH, PEAK_LR, WEIGHT_DECAY = 16, 4e-3, 1e-4  # AdamW, one cycle: what short trainings of such networks have in common
REACH = 0.8  # strides by which a position's centre may lie beside a box's, for the box to be its own
BORDER = 20.0  # pixels: boxes whose longer side is above belong to the coarse level


def train_scenes(
    network: nn.Module, drawn: Scenes, task: Task, epochs: int, seed: int, progress: Callable[[str], None], device: torch.device
) -> None:
    """Train in place, without augmentation: scenes are drawn at random already. The last epoch is the result."""
    network.to(device).to(memory_format=torch.channels_last).train()
    stream = torch.Generator().manual_seed(seed)
    mean, std = (torch.tensor(values, device=device).view(1, -1, 1, 1) for values in (task.mean, task.std))
    images = torch.from_numpy(drawn.images)[..., None].to(device)
    masks = torch.from_numpy(drawn.masks).long().to(device)
    targets = [targets_of(box, label, task) for box, label in zip(drawn.boxes, drawn.labels, strict=True)] if task.kind == "detect" else []
    positions = [torch.stack(part).to(device) for part in zip(*targets, strict=True)]
    steps = len(images) // BATCH
    optimizer = torch.optim.AdamW(network.parameters(), lr=PEAK_LR, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LR, total_steps=steps * epochs, pct_start=0.25)
    for epoch in range(1, epochs + 1):
        started, total = time.monotonic(), 0.0
        for chosen in torch.randperm(len(images), generator=stream).tensor_split(steps):
            chosen = chosen.to(device)
            answer = network(normalise(images[chosen], mean, std))
            if task.kind == "segment":
                loss = F.cross_entropy(answer, masks[chosen])
            else:
                loss = detection_loss(answer, *(part[chosen] for part in positions))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            total += loss.item() / steps
        if not np.isfinite(total):
            raise UserError(f"training diverged in epoch {epoch} (loss {total}); nothing is written")
        progress(f"epoch {epoch}/{epochs}: loss {total:.4f}, {time.monotonic() - started:.1f} s")
    network.eval()


def targets_of(boxes: np.ndarray, labels: np.ndarray, task: Task) -> tuple[Tensor, Tensor]:
    """What an image's positions (P, level after level) should say: class (P int64, -1 for none) and box (P x 4 pixels).

    A box belongs to one level by its longer side, there to the positions near its centre, at least to the nearest; the smallest box wins.
    """
    _, height, width = task.image_shape
    classes, where = [], []
    for level, stride in enumerate(STRIDES):
        middle = centres(height // stride, width // stride, stride)
        own, box = torch.full((len(middle),), -1), torch.zeros(len(middle), 4)
        sides = (boxes[:, 2:] - boxes[:, :2]).max(1)
        for index in np.argsort(-sides):
            if (sides[index] > BORDER) == bool(level):
                wanted = torch.from_numpy(boxes[index])
                away = (middle - (wanted[:2] + wanted[2:]) / 2).abs().amax(1)
                near = (away < REACH * stride) | (away == away.min())
                own[near], box[near] = int(labels[index]), wanted
        classes.append(own)
        where.append(box)
    return torch.cat(classes), torch.cat(where)


def detection_loss(levels: Sequence[tuple[Tensor, Tensor]], classes: Tensor, boxes: Tensor) -> Tensor:
    """Quality focal loss (scores should be the boxes' IoU) and GIoU loss, for each position with a box; classes N x P, boxes N x P x 4."""
    from torchvision.ops import generalized_box_iou_loss

    said = torch.cat([logits.flatten(2).transpose(1, 2) for logits, _ in levels], 1)
    found = torch.cat([boxes_of(numbers, stride) for (_, numbers), stride in zip(levels, STRIDES, strict=True)], 1)
    image, position = (classes >= 0).nonzero(as_tuple=True)
    count = max(len(image), 1)
    ours, theirs = found[image, position], boxes[image, position]
    quality = torch.zeros_like(said)
    quality[image, position, classes[image, position]] = paired_iou(ours.detach(), theirs)
    focal = F.binary_cross_entropy_with_logits(said, quality, reduction="none") * (said.detach().sigmoid() - quality).abs()
    loss: Tensor = (focal.sum() + 2 * generalized_box_iou_loss(ours, theirs, reduction="sum")) / count
    return loss


def paired_iou(a: Tensor, b: Tensor) -> Tensor:
    """Of boxes with each other, K x 4 and K x 4 -> K."""
    inner = (torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])).clamp(min=0).prod(1)
    iou: Tensor = inner / ((a[:, 2:] - a[:, :2]).prod(1) + (b[:, 2:] - b[:, :2]).prod(1) - inner)
    return iou
