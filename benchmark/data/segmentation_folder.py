"""Images with masks of class indices in a folder on a disk, as CamVid and PASCAL VOC have them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dfqbench.data.dense import VOID, Mask, SegmentationSet
from dfqbench.data.folders import by_stem, lines_of, sha256_of, stamp
from dfqbench.data.images import open_image
from dfqbench.data.sets import content_digest
from dfqbench.errors import UserError
from dfqbench.store.cache import cache_folder, remembered


class SegmentationFolder(SegmentationSet):
    """A folder with images and, under the same names, masks: one channel or a palette, in which a value is a class index and 255 void.

    Images lie in `images`, `img`, `image`, `test` or VOC's JPEGImages, masks in `masks`, `labels`, `lab`, `testannot` or VOC's SegmentationClass; of
    a VOC folder those named in ImageSets/Segmentation/val.txt. Class names are the lines of classes.txt; without it, numbers up to the largest value.
    """

    IMAGES = ("images", "img", "image", "test", "JPEGImages")
    MASKS = ("masks", "labels", "lab", "testannot", "SegmentationClass")

    def __init__(self, name: str, root: Path):
        self.root = root
        images, masks = _folder(root, self.IMAGES, "images"), _folder(root, self.MASKS, "masks")
        found, targets = by_stem(images), by_stem(masks)
        chosen = lines_of(root / "ImageSets/Segmentation/val.txt") or sorted(targets if len(targets) < len(found) else found)
        missing = [stem for stem in chosen if stem not in found or stem not in targets]
        if missing or not chosen:
            what = f"{missing[0]!r} has no {'image' if missing[0] not in found else 'mask'}" if missing else "there is no image"
            raise UserError(f"segmentation folder {root}: {what} ({len(found)} images in {images.name}, {len(targets)} masks in {masks.name})")
        self._pairs = [(found[stem], targets[stem]) for stem in chosen]
        self._names = lines_of(root / "classes.txt")
        super().__init__(name, len(self._names) if self._names else self._largest() + 1)

    def fits(self, classes: int) -> bool:
        """Masks alone do not say that a class is missing in them."""
        return not self._names or super().fits(classes)

    @property
    def class_names(self) -> list[str]:
        return self._names or [str(index) for index in range(self.classes)]

    def __len__(self) -> int:
        return len(self._pairs)

    def _largest(self) -> int:
        def look() -> dict[str, Any]:
            values = (mask[mask != VOID] for mask in map(self.target, range(len(self))))
            return {"largest": max((int(value.max()) for value in values if value.size), default=0)}

        return int(remembered(cache_folder(), "largest", self._stamps(), look)["largest"])

    def open(self, index: int, split: str) -> Image.Image:
        return open_image(self._pairs[index][0])

    def target(self, index: int, split: str = "test") -> Mask:
        """H x W."""
        image = open_image(self._pairs[index][1])
        if image.mode not in ("L", "P", "1"):
            raise UserError(f"{self._pairs[index][1]} is no mask of class indices: it has the mode {image.mode}, one channel or a palette is wanted")
        return np.asarray(image, np.uint8)

    def check_files(self, cache: Path | None = None) -> None:
        def look() -> dict[str, Any]:
            for index, (path, mask) in enumerate(self._pairs):
                image, target = open_image(path), self.target(index)
                if (image.height, image.width) != target.shape:
                    raise UserError(f"{mask} has {target.shape[1]} x {target.shape[0]} pixels, its image {image.width} x {image.height}")
            return {"images": len(self)}

        remembered(cache, "whole", [self.digest(cache), "segmentation"], look)

    def digest(self, cache: Path | None = None) -> str:
        def compute() -> dict[str, Any]:
            return {"sha256": content_digest(self.classes, ((0, sha256_of(a) + sha256_of(b)) for a, b in self._pairs))}

        return str(remembered(cache, "set", [str(self.root.resolve()), self.classes, self._stamps()], compute)["sha256"])

    def _stamps(self) -> list[Any]:
        return [stamp(path, self.root) for pair in self._pairs for path in pair]


def _folder(root: Path, names: Sequence[str], what: str) -> Path:
    found = next((root / name for name in names if (root / name).is_dir()), None)
    if found is None:
        said = "there is no such folder" if not root.is_dir() else f"there is no folder of {what}: {', '.join(names)}"
        raise UserError(f"segmentation folder {root}: {said}")
    return found
