"""Real images for the rows that are no data-free methods: which of a set, their identity, and that none of them is in the evaluation set."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from PIL import Image

from dfqbench.data.images import Pixels, prepare, threads
from dfqbench.data.sets import MANY, EvaluationSet
from dfqbench.errors import Notice, UserError
from dfqbench.store.cache import remembered
from dfqbench.task import Task


@dataclass(frozen=True)
class Yardstick:
    """`count` images of a set, evenly spaced over its order, so that all of its classes are there; of a set with training images, of these.

    Their labels are not looked at: what trains on them knows no more of an image than what trains on a synthetic one.
    """

    found: EvaluationSet
    count: int

    def card(self, evaluation: EvaluationSet | None, cache: Path | None = None) -> dict[str, Any]:
        """What identifies the images: a sha256 of their decoded pixels in order, and how many they are.

        Raises UserError where there are fewer, or where any image of the whole set is one of the evaluation set, pixel by pixel. With `cache` (a
        folder) what was found is remembered for as long as both sets stay as they are.
        """
        read, images = self._images()
        there = len(images)
        if self.count > there:
            raise UserError(f"count: {self.count}: {self.found.name} has {there} images")

        def look() -> dict[str, Any]:
            if there >= MANY:
                said = f"yardstick {self.found.name}: looking once at each of {there} images, whether it is a test image"
                warnings.warn(said, Notice, stacklevel=5)
            known = {digest: index for index, digest in enumerate(_digests(*_opened(evaluation, "test")))} if evaluation else {}
            own = _digests(read, images)
            shared = [(index, known[digest]) for index, digest in enumerate(own) if digest in known]
            return {"sha256": _joined(own[index] for index in self._chosen(there)), "shared": shared[:1], "count": len(shared)}

        key = [self.found.name, self.found.digest(cache), self.count, evaluation.digest(cache) if evaluation else None, PIL.__version__]
        answer = remembered(cache, "yardstick", key, look)
        if answer["shared"]:
            assert evaluation is not None
            ((own, of_test),) = answer["shared"]
            said = f"{answer['count']} of its {there} images are in the evaluation set {evaluation.name} (its image {own} is test image {of_test})"
            raise UserError(f"images: {self.found.name}: {said}: students must not be trained on what they are measured on")
        return {"digest": answer["sha256"], "count": self.count}

    def pixels(self, task: Task, digest: str) -> Pixels:
        """The images as the teacher's task wants them: count x H x W x C, uint8. UserError where they are not those of this digest any more."""
        read, there = self._images()
        chosen = self._chosen(len(there))
        if _joined(_digests(read, chosen)) != digest:
            raise UserError(f"yardstick {self.found.name}: its images are not those any more that they were when the sweep was read")
        with ThreadPoolExecutor(threads()) as pool:
            return np.stack(list(pool.map(lambda index: prepare(read(index), task), chosen)))

    def _chosen(self, there: int) -> list[int]:
        return [index * there // self.count for index in range(self.count)]

    def _images(self) -> tuple[Callable[[int], Image.Image], range]:
        return _opened(self.found, self.found.training_split)


def pixel_digest(image: Image.Image) -> str:
    """sha256 of the size and of the pixels as RGB: of what the file shows, however it was written."""
    return hashlib.sha256(f"{image.size} ".encode() + image.convert("RGB").tobytes()).hexdigest()


def _opened(found: EvaluationSet, split: str) -> tuple[Callable[[int], Image.Image], range]:
    read, labels = found._open(split)
    return read, range(len(labels))


def _digests(read: Callable[[int], Image.Image], indices: Iterable[int]) -> list[str]:
    with ThreadPoolExecutor(threads()) as pool:
        return list(pool.map(lambda index: pixel_digest(read(index)), indices))


def _joined(digests: Iterable[str]) -> str:
    total = hashlib.sha256()
    for digest in digests:
        total.update(digest.encode())
    return total.hexdigest()
