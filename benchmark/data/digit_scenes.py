"""Scenes of handwritten digits, drawn from scikit-learn's: small data for segmentation and detection that need no download.

One to five digits of 12 to 28 pixels on a canvas of 64 x 64 grey pixels, some a little over another, on a slanted, noisy background. Test scenes
show digits of the test part of `Digits` alone, hence of other writers than training scenes. Every draw is an integer of numpy's legacy generator,
whose stream is fixed for good.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from dfqbench.data.dense import DenseSet, DetectionSet, Mask, SegmentationSet, boxes_of
from dfqbench.data.images import Labels, Pixels
from dfqbench.data.sets import Digits, content_digest
from dfqbench.errors import UserError
from dfqbench.store.cache import remembered
from dfqbench.tasks.detect import Boxes

SIDE = 64
SMALLEST, LARGEST, MOST = 12, 28, 5  # side of a digit's square in pixels, digits on a scene
INK = 96  # of 255: from here on a pixel of a digit belongs to its mask
OVERLAP = 0.15  # of the smaller of two squares, at most
COUNTS = {"train": 3000, "test": 300}
CLASSES = [str(digit) for digit in range(10)]


@dataclass(frozen=True)
class Scenes:
    """`images` and `masks`: N x 64 x 64 uint8; a mask is 0 on the background and 1 + d on digit d.

    `boxes[i]`: n_i x 4 float32, x1, y1, x2, y2 in pixels around the digit's mask, covered parts included; `labels[i]`: n_i digits.
    """

    images: Pixels
    masks: Pixels
    boxes: list[npt.NDArray[np.float32]]
    labels: list[Labels]


class _OfDigits(DenseSet):
    training_split = "train"

    def __len__(self) -> int:
        return COUNTS["test"]

    def count(self, split: str) -> int:
        if split not in COUNTS:
            raise self._no_split(split, "'train' and 'test'")
        return COUNTS[split]

    def open(self, index: int, split: str) -> Image.Image:
        return Image.fromarray(scenes(split).images[index])

    def _bytes(self, index: int) -> bytes:
        """Of a test scene's target."""
        raise NotImplementedError

    def digest(self, cache: Path | None = None) -> str:
        def compute() -> dict[str, Any]:
            images = scenes("test").images
            return {"sha256": content_digest(self.classes, ((0, image.tobytes() + self._bytes(i)) for i, image in enumerate(images)))}

        code = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
        versions = [importlib.metadata.version(package) for package in ("scikit-learn", "pillow")]
        return str(remembered(cache, "set", [self.name, code, *versions], compute)["sha256"])


class SceneMasks(_OfDigits, SegmentationSet):
    """`digit-scenes-segment`: background, and a class for each digit."""

    def __init__(self) -> None:
        super().__init__("digit-scenes-segment", 1 + len(CLASSES))

    @property
    def class_names(self) -> list[str]:
        return ["background", *CLASSES]

    def target(self, index: int, split: str = "test") -> Mask:
        """64 x 64."""
        mask: Mask = scenes(split).masks[index]
        return mask

    def _bytes(self, index: int) -> bytes:
        return self.target(index).tobytes()


class SceneBoxes(_OfDigits, DetectionSet):
    """`digit-scenes-detect`: a box around each digit."""

    def __init__(self) -> None:
        super().__init__("digit-scenes-detect", len(CLASSES))

    @property
    def class_names(self) -> list[str]:
        return CLASSES

    def target(self, index: int, split: str = "test") -> Boxes:
        drawn = scenes(split)
        return boxes_of([(box, label, False) for box, label in zip(drawn.boxes[index].tolist(), drawn.labels[index], strict=True)], SIDE, SIDE)

    def _bytes(self, index: int) -> bytes:
        found = self.target(index)
        return found.boxes.tobytes() + found.labels.tobytes()


@cache
def scenes(split: str) -> Scenes:
    """The 3000 training or 300 test scenes, always the same. UserError for another split."""
    if split not in COUNTS:
        raise UserError(f"digit scenes have no split {split!r}, only 'train' and 'test'")
    opened, digits = Digits()._split(split)
    stream = np.random.RandomState(list(COUNTS).index(split))
    drawn = [_scene(opened, digits, stream) for _ in range(COUNTS[split])]
    images, masks, boxes, labels = zip(*drawn, strict=True)
    return Scenes(np.stack(images), np.stack(masks), list(boxes), list(labels))


def _scene(pixels: Pixels, digits: Labels, stream: np.random.RandomState) -> tuple[Pixels, Pixels, npt.NDArray[np.float32], Labels]:
    image, mask = _background(stream), np.zeros((SIDE, SIDE), np.uint8)
    squares: list[tuple[int, int, int]] = []
    boxes, labels = [], []
    for _ in range(stream.randint(1, MOST + 1)):
        for _attempt in range(20):
            side = int(stream.randint(SMALLEST, LARGEST + 1))
            top, left = (int(v) for v in stream.randint(0, SIDE - side + 1, 2))
            if not any(_overlap((top, left, side), other) > OVERLAP for other in squares):
                break
        else:  # the canvas is full
            break
        squares.append((top, left, side))
        chosen, strength = int(stream.randint(len(digits))), int(stream.randint(140, 256))
        shape = np.asarray(Image.fromarray(pixels[chosen]).resize((side, side), Image.Resampling.BICUBIC)).astype(np.int64)
        there = (slice(top, top + side), slice(left, left + side))
        image[there] = np.maximum(image[there], shape * strength // 255)
        inked = shape >= INK
        mask[there][inked] = 1 + digits[chosen]
        rows, columns = np.flatnonzero(inked.any(1)), np.flatnonzero(inked.any(0))
        boxes.append([left + columns[0], top + rows[0], left + columns[-1] + 1, top + rows[-1] + 1])
        labels.append(digits[chosen])
    return image.astype(np.uint8), mask, np.array(boxes, np.float32), np.array(labels, np.int64)


def _background(stream: np.random.RandomState) -> npt.NDArray[np.int64]:
    """Grey values of up to 100: a plane, and noise on it."""
    level, down, right, noise = (int(v) for v in (stream.randint(0, 50), stream.randint(-20, 21), stream.randint(-20, 21), stream.randint(1, 31)))
    place = np.arange(SIDE)
    plane = level + (down * place[:, None] + right * place) // SIDE
    grey: npt.NDArray[np.int64] = np.clip(plane + stream.randint(0, noise, (SIDE, SIDE)), 0, 100)
    return grey


def _overlap(a: tuple[int, int, int], b: tuple[int, int, int]) -> float:
    """Of two squares (top, left, side): their common area as a share of the smaller one's."""
    height, width = (max(0, min(a[i] + a[2], b[i] + b[2]) - max(a[i], b[i])) for i in (0, 1))
    return height * width / min(a[2], b[2]) ** 2
