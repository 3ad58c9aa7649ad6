"""An evaluation set: a bright blob, whose class is the quarter of the image that it lies in."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dfqbench.data import OwnSet, register_set


@register_set("blobs")
class Blobs(OwnSet):
    """200 grey images of 16 x 16 pixels with a blob in one of four quarters."""

    class_names = ["top left", "top right", "bottom left", "bottom right"]

    def load(self) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
        random = np.random.default_rng(0)
        labels = random.integers(0, 4, 200)
        images = random.integers(0, 60, (200, 16, 16), dtype=np.uint8)
        for image, label in zip(images, labels, strict=True):
            top, left = 8 * (label // 2) + random.integers(1, 5), 8 * (label % 2) + random.integers(1, 5)
            image[top : top + 3, left : left + 3] = 250
        return images, labels
