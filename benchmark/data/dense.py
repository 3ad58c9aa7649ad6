"""Evaluation sets of images with a class for every pixel, or with boxes: folders on a disk, and the base classes of a plug-in's own."""

from __future__ import annotations

import hashlib
import json
import warnings
import xml.etree.ElementTree as ElementTree
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from dfqbench.data.folders import files_below, stamp, unreadable
from dfqbench.data.images import Images, Labels, Pixels, open_image
from dfqbench.data.sets import EvaluationSet, content_digest
from dfqbench.errors import Notice, UserError
from dfqbench.store.cache import cache_folder, remembered
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
    mode = {1: "L", 3: "RGB"}[task.channels]
    image = image if image.mode == mode else image.convert(mode)
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
        images.class_names = self.class_names
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
            warnings.warn(
                f"evaluation set {self.name}: the teacher has {task.labels} classes: pixels of {names} are not scored", Notice, stacklevel=4
            )


class DetectionSet(DenseSet):
    kind = "detect"


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
        found = {path.stem: path for path in files_below(images)[0]}
        targets = {path.stem: path for path in files_below(masks)[0]}
        chosen = _listed(root / "ImageSets/Segmentation/val.txt") or sorted(targets if len(targets) < len(found) else found)
        missing = [stem for stem in chosen if stem not in found or stem not in targets]
        if missing or not chosen:
            what = f"{missing[0]!r} has no {'image' if missing[0] not in found else 'mask'}" if missing else "there is no image"
            raise UserError(f"segmentation folder {root}: {what} ({len(found)} images in {images.name}, {len(targets)} masks in {masks.name})")
        self._pairs = [(found[stem], targets[stem]) for stem in chosen]
        self._names = _listed(root / "classes.txt")
        super().__init__(name, len(self._names) if self._names else self._largest() + 1)

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
            return {"sha256": content_digest(self.classes, ((0, _sha256(a) + _sha256(b)) for a, b in self._pairs))}

        return str(remembered(cache, "set", [str(self.root.resolve()), self.classes, self._stamps()], compute)["sha256"])

    def _stamps(self) -> list[Any]:
        return [stamp(path, self.root) for pair in self._pairs for path in pair]


class CocoFolder(DetectionSet):
    """A JSON file in COCO's format beside (or above) its images, or a folder with one such file. Crowd boxes are ignored ones.

    Classes are the categories sorted by id, as pycocotools and most trained networks have them.
    """

    def __init__(self, name: str, place: Path):
        file = place if place.is_file() else _only_json(place)
        self.root, self.file = file.parent, file
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            categories = sorted(content["categories"], key=lambda entry: int(entry["id"]))
            index = {int(entry["id"]): i for i, entry in enumerate(categories)}
            self._names = [str(entry["name"]) for entry in categories]
            self._images = sorted(content["images"], key=lambda entry: int(entry["id"]))
            boxes: dict[int, list[tuple[list[float], int, bool]]] = {int(entry["id"]): [] for entry in self._images}
            for entry in content["annotations"]:
                x, y, w, h = map(float, entry["bbox"])
                boxes[int(entry["image_id"])].append(([x, y, x + w, y + h], index[int(entry["category_id"])], bool(entry.get("iscrowd", 0))))
        except OSError as error:
            raise unreadable(file, error) from None
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file} is not in COCO's format ({type(error).__name__}: {error})") from None
        self._boxes = [boxes[int(entry["id"])] for entry in self._images]
        super().__init__(name, len(self._names))

    @property
    def class_names(self) -> list[str]:
        return self._names

    def __len__(self) -> int:
        return len(self._images)

    @cached_property
    def _files(self) -> list[Path]:
        """Beside the JSON file, in `images`, or as COCO's own folders have them (annotations/instances_val2017.json, val2017/)."""
        places = [self.root, self.root / "images", self.root.parent / self.file.stem.rpartition("_")[2], self.root.parent]
        found = []
        for entry in self._images:
            path = next((place / entry["file_name"] for place in places if (place / entry["file_name"]).is_file()), None)
            if path is None:
                raise UserError(f"{self.file}: there is no image {entry['file_name']!r} beside it, in {self.root / 'images'} or in {places[2]}")
            found.append(path)
        return found

    def open(self, index: int, split: str) -> Image.Image:
        return open_image(self._files[index])

    def target(self, index: int, split: str = "test") -> Boxes:
        entry = self._images[index]
        return boxes_of(self._boxes[index], int(entry["height"]), int(entry["width"]))

    def check_files(self, cache: Path | None = None) -> None:
        _check_sizes(self, self._files, cache)

    def digest(self, cache: Path | None = None) -> str:
        return _digest_of_boxes(self, self._files, cache)


class VocFolder(DetectionSet):
    """PASCAL VOC's XML files (in Annotations, or beside the images) and images (in JPEGImages). Difficult boxes are ignored ones.

    Of a VOC folder the images named in ImageSets/Main/val.txt. Classes are the names in the files, sorted, or the lines of classes.txt.
    """

    def __init__(self, name: str, root: Path):
        self.root = root
        where = root / "Annotations" if (root / "Annotations").is_dir() else root
        files = {path.stem: path for path in sorted(where.glob("*.xml"))}
        chosen = _listed(root / "ImageSets/Main/val.txt") or list(files)
        if not chosen or (lost := [stem for stem in chosen if stem not in files]):
            raise UserError(f"VOC folder {root}: {f'there is no {where / lost[0]}.xml' if chosen else f'there is no .xml file in {where}'}")
        images = {path.stem: path for path in files_below(root / "JPEGImages" if (root / "JPEGImages").is_dir() else root)[0]}
        self._files, self._sizes, named = [], [], []
        for stem in chosen:
            if stem not in images:
                raise UserError(f"VOC folder {root}: there is no image for {files[stem]}")
            size, objects = _voc_objects(files[stem])
            self._files.append(images[stem])
            self._sizes.append(size)
            named.append(objects)
        self._names = _listed(root / "classes.txt") or sorted({kind for objects in named for _, kind, _ in objects})
        index = {kind: i for i, kind in enumerate(self._names)}
        unknown = next((kind for objects in named for _, kind, _ in objects if kind not in index), None)
        if unknown is not None:
            raise UserError(f"VOC folder {root}: class {unknown!r} is not in classes.txt")
        self._boxes = [[(box, index[kind], hard) for box, kind, hard in objects] for objects in named]
        super().__init__(name, len(self._names))

    @property
    def class_names(self) -> list[str]:
        return self._names

    def __len__(self) -> int:
        return len(self._files)

    def open(self, index: int, split: str) -> Image.Image:
        return open_image(self._files[index])

    def target(self, index: int, split: str = "test") -> Boxes:
        return boxes_of(self._boxes[index], *self._sizes[index])

    def check_files(self, cache: Path | None = None) -> None:
        _check_sizes(self, self._files, cache)

    def digest(self, cache: Path | None = None) -> str:
        return _digest_of_boxes(self, self._files, cache)


def boxes_of(entries: Sequence[tuple[Sequence[float], int, bool]], height: int, width: int) -> Boxes:
    """Of (x1, y1, x2, y2), class, ignored."""
    return Boxes(
        np.array([box for box, _, _ in entries], np.float64).reshape(-1, 4),
        np.array([label for _, label, _ in entries], np.int64),
        np.array([ignored for _, _, ignored in entries], bool),
        height,
        width,
    )


def _voc_objects(file: Path) -> tuple[tuple[int, int], list[tuple[list[float], str, bool]]]:
    """((height, width), boxes). VOC counts pixels from 1, and its last pixel belongs to the box."""
    try:
        tree = ElementTree.parse(file)
        size = (int(tree.findtext("size/height", "")), int(tree.findtext("size/width", "")))
        found = []
        for entry in tree.iter("object"):
            x1, y1, x2, y2 = (float(entry.findtext(f"bndbox/{side}", "")) for side in ("xmin", "ymin", "xmax", "ymax"))
            found.append(([x1 - 1, y1 - 1, x2, y2], entry.findtext("name", "").strip(), entry.findtext("difficult", "0").strip() == "1"))
    except (OSError, ElementTree.ParseError, ValueError) as error:
        raise UserError(f"{file} is not in PASCAL VOC's format ({error})") from None
    return size, found


def _check_sizes(found: DetectionSet, files: Sequence[Path], cache: Path | None) -> None:
    def look() -> dict[str, Any]:
        for index, path in enumerate(files):
            image, target = open_image(path), found.target(index)
            if (image.height, image.width) != (target.height, target.width):
                raise UserError(f"{path} has {image.width} x {image.height} pixels, its annotation says {target.width} x {target.height}")
        return {"images": len(files)}

    remembered(cache, "whole", [found.digest(cache), "boxes"], look)


def _digest_of_boxes(found: DetectionSet, files: Sequence[Path], cache: Path | None) -> str:
    def compute() -> dict[str, Any]:
        targets = (found.target(index) for index in range(len(files)))
        texts = (json.dumps([t.boxes.tolist(), t.labels.tolist(), t.ignored.tolist(), t.height, t.width]).encode() for t in targets)
        return {"sha256": content_digest(found.classes, ((0, _sha256(path) + text) for path, text in zip(files, texts, strict=True)))}

    annotated = hashlib.sha256(repr([found.target(index) for index in range(len(files))]).encode()).hexdigest()
    return str(remembered(cache, "set", [[str(path), *stamp(path, path.parent)] for path in files] + [annotated], compute)["sha256"])


def _folder(root: Path, names: Sequence[str], what: str) -> Path:
    found = next((root / name for name in names if (root / name).is_dir()), None)
    if found is None:
        said = "there is no such folder" if not root.is_dir() else f"there is no folder of {what}: {', '.join(names)}"
        raise UserError(f"segmentation folder {root}: {said}")
    return found


def _listed(file: Path) -> list[str]:
    """The lines of a text file that is there; their first words for VOC's lists."""
    if not file.is_file():
        return []
    lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [line.split()[0] for line in lines] if file.parent.parent.name == "ImageSets" else lines


def _only_json(folder: Path) -> Path:
    found = [*folder.glob("*.json"), *folder.glob("annotations/instances_val*.json")] if folder.is_dir() else []
    if len(found) != 1:
        said = f"{len(found)} .json files are in it: name one" if folder.is_dir() else "there is no such file or folder"
        raise UserError(f"COCO folder {folder}: {said}")
    return found[0]


def _sha256(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError as error:
        raise unreadable(path, error) from error
