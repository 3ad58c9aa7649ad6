"""Evaluation sets with a class for every pixel, or with boxes: the base classes, also of a plug-in's own, and how images are made to fit."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from dfqbench.data.images import Images, Labels, Pixels, in_colours_of
from dfqbench.data.sets import EvaluationSet
from dfqbench.errors import Notice, UserError
from dfqbench.task import Task
from dfqbench.tasks.detect import Boxes

Mask = npt.NDArray[np.uint8]  # H x W, class indices; what is no class is void
VOID = 255


@dataclass(frozen=True)
class Placed:
    """Where an image of height x width pixels lies within those that a network takes: at the top left, so many pixels high and wide."""

    height: int
    width: int
    inner_height: int
    inner_width: int


def placed(height: int, width: int, task: Task) -> Placed:
    """As large as it can be with its aspect kept; an image that has one side right and the other not too long stays as it is."""
    _, wanted_height, wanted_width = task.image_shape
    scale = min(wanted_height / height, wanted_width / width)
    inner = (min(wanted_height, max(1, round(height * scale))), min(wanted_width, max(1, round(width * scale))))
    return Placed(height, width, *inner)


def fitted(image: Image.Image, task: Task) -> Pixels:
    """One image as H x W x C uint8: grey or RGB, resized to fit in, the rest filled with the mean colour, which is zero once normalised."""
    image = in_colours_of(task, image)
    at = placed(image.height, image.width, task)
    if (at.inner_height, at.inner_width) != (at.height, at.width):
        image = image.resize((at.inner_width, at.inner_height), Image.Resampling[task.interpolation.upper()])
    pixels = np.empty((*task.image_shape[1:], task.channels), np.uint8)
    pixels[:] = np.rint(np.asarray(task.mean) * 255)
    pixels[: at.inner_height, : at.inner_width] = np.asarray(image).reshape(at.inner_height, at.inner_width, task.channels)
    return pixels


class DenseSet(EvaluationSet):
    """Images with a target each; `decode` gives images whose labels are their own places in the set."""

    @abstractmethod
    def open(self, index: int, split: str) -> Image.Image:
        """Test image `index`, or one of another split."""

    @abstractmethod
    def target(self, index: int, split: str = "test") -> Any:
        """A Mask, or Boxes."""

    def count(self, split: str) -> int:
        """Images of a split; UserError for one that there is not."""
        if split != "test":
            raise self._no_split(split, "'test'")
        return len(self)

    def _open(self, split: str) -> tuple[Callable[[int], Image.Image], Labels]:
        return lambda index: self.open(index, split), np.arange(self.count(split), dtype=np.int64)

    def decode(self, task: Task, split: str = "test") -> Images:
        if not self.fits(task.labels):
            raise UserError(f"evaluation set {self.name} has {self.classes} classes, the teacher {task.labels}")
        opened, places = self._open(split)
        shape = (*task.image_shape[1:], task.channels)
        images = Images(lambda index: fitted(opened(index), task), places, shape, task.labels)
        images.targets = lambda index: self.target(index, split)
        images.class_names = [*self.class_names, *map(str, range(self.classes, task.labels))]
        return images


class SegmentationSet(DenseSet):
    kind = "segment"

    def fits(self, classes: int) -> bool:
        """Labels from the teacher's number of classes on are void."""
        return classes <= self.classes

    def check(self, task: Task) -> None:
        super().check(task)
        if task.labels < self.classes:
            names = ", ".join(self.class_names[task.labels :][:3]) + (", ..." if self.classes - task.labels > 3 else "")
            said = f"the teacher has {task.labels} classes: pixels of {names} are not scored"
            warnings.warn(f"evaluation set {self.name}: {said}", Notice, stacklevel=4)
        elif task.labels > self.classes:
            said = f"the largest value in its masks is {self.classes - 1}, the teacher has {task.labels} classes: the others have no pixel here"
            warnings.warn(f"evaluation set {self.name}: {said}", Notice, stacklevel=4)


class DetectionSet(DenseSet):
    kind = "detect"


def boxes_of(entries: Sequence[tuple[Sequence[float], int, bool]], height: int, width: int) -> Boxes:
    """Of (x1, y1, x2, y2), class, ignored."""
    return Boxes(
        np.array([box for box, _, _ in entries], np.float64).reshape(-1, 4),
        np.array([label for _, label, _ in entries], np.int64),
        np.array([ignored for _, _, ignored in entries], bool),
        height,
        width,
    )
