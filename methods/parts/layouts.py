"""What is asked of an image of a segmentation task: a class for each pixel, drawn at random. Nothing here waits for a device."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, interpolate

from dfqbench import Answers, Method, Task

FEWEST, MOST = 2, 6  # regions of an image


def draw_labels(method: Method, count: int) -> Tensor:
    """What `count` images are to show, from the method's stream "labels": a class each (N), or for segmentation a layout (N x H x W); int64."""
    return voronoi(count, method.task, method.random("labels")) if method.task.kind == "segment" else method.draw_labels(count)


def voronoi(count: int, task: Task, stream: torch.Generator) -> Tensor:
    """Layouts of Voronoi cells, N x H x W: each image has 2 to 6 regions (or as many as there are classes), no two of one class.

    A pixel belongs to the nearest of the regions' points, which are uniform over the image; the number of regions is uniform too.
    """
    device, most = stream.device, min(MOST, task.classes)
    height, width = task.image_shape[1:]

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=stream, device=device)

    points = uniform(count, most, 2)
    regions = FEWEST + (uniform(count, 1) * (most - FEWEST + 1)).floor()
    classes = uniform(count, task.classes).argsort(1)[:, :most]
    sides = [(side, torch.arange(side, device=device) + 0.5) for side in (height, width)]
    down, right = ((points[:, :, i, None] * side - ticks).square() for i, (side, ticks) in enumerate(sides))
    distance = down[:, :, :, None] + right[:, :, None, :]
    unused = torch.arange(most, device=device) >= regions
    nearest = (distance + unused[:, :, None, None] * 1e9).argmin(1)
    return classes.gather(1, nearest.flatten(1)).view(nearest.shape)


def choices(answers: Answers, answer: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (M x K) with their labels (M): of each image, or, where labels are layouts (N x H x W, at the size of the images), of each pixel."""
    return answers.rows(answer), at_size(labels, answer).flatten() if labels.dim() == 3 else labels


def label_loss(answers: Answers, answer: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy in nats: of each image's label (N), or of each pixel's (N x H x W, at the size of the images), averaged (scalar)."""
    return cross_entropy(*choices(answers, answer, labels))


def label_accuracy(answer: Tensor, labels: Tensor) -> Tensor:
    """The share of the images, or of the pixels, to which a network gives the class that was asked for (scalar)."""
    return (answer.argmax(1) == at_size(labels, answer)).float().mean()


def at_size(labels: Tensor, answer: Tensor) -> Tensor:
    """A layout (N x H x W) at the size of an answer or a map (N x C x h x w): each position has the class of one pixel in its middle.

    Labels of images stay as they are.
    """
    if labels.dim() != 3 or labels.shape[1:] == answer.shape[2:]:
        return labels
    return interpolate(labels[:, None].float(), tuple(answer.shape[2:]), mode="nearest-exact")[:, 0].long()
