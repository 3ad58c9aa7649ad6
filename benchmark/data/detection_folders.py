"""Images with boxes in folders on a disk: COCO's JSON, PASCAL VOC's XML."""

from __future__ import annotations

import hashlib
import json
import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dfqbench.data.dense import DetectionSet, boxes_of
from dfqbench.data.folders import by_stem, lines_of, sha256_of, stamp, unreadable
from dfqbench.data.images import Images, open_image
from dfqbench.data.sets import content_digest
from dfqbench.errors import Notice, UserError
from dfqbench.store.cache import remembered
from dfqbench.task import Task
from dfqbench.tasks.detect import Boxes


class CocoFolder(DetectionSet):
    """A JSON file in COCO's format beside (or above) its images, or a folder with one such file. Crowd boxes are ignored ones.

    Classes are the categories sorted by id, as pycocotools has them; for a teacher with more classes, as torchvision's of COCO with its 80 categories
    among ids up to 90, they are the ids themselves, or one less where the teacher's first class is no unused one.
    """

    def __init__(self, name: str, place: Path):
        file = place if place.is_file() else _only_json(place)
        self.root, self.file = file.parent, file
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            categories = sorted(content["categories"], key=lambda entry: int(entry["id"]))
            index = {int(entry["id"]): i for i, entry in enumerate(categories)}
            self._names, self._ids = [str(entry["name"]) for entry in categories], list(index)
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

    def _among(self, labels: int) -> list[int]:
        """The class indices of the categories, for a teacher with so many; empty where it has others."""
        first, last = min(self._ids, default=0), max(self._ids, default=0)
        if labels == self.classes:
            return list(range(labels))
        return [number - (last + 1 - labels) for number in self._ids] if last - min(first, 1) < labels <= last + 1 else []

    def fits(self, classes: int) -> bool:
        return bool(self._among(classes))

    def check(self, task: Task) -> None:
        super().check(task)
        if task.labels != self.classes:
            said = f"the teacher has {task.labels} classes: category ids are their indices, {self._names[-1]} (id {self._ids[-1]}) is"
            warnings.warn(f"evaluation set {self.name}: {said} class {self._among(task.labels)[-1]} of 0 to {task.labels - 1}", Notice, stacklevel=4)

    def decode(self, task: Task, split: str = "test") -> Images:
        images = super().decode(task, split)
        places = np.array(self._among(task.labels))
        images.class_names = [""] * task.labels
        for place, name in zip(places.tolist(), self._names, strict=True):
            images.class_names[place] = name
        images.targets = lambda index: replace(own := self.target(index, split), labels=places[own.labels])
        return images

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
        chosen = lines_of(root / "ImageSets/Main/val.txt") or list(files)
        if not chosen or (lost := [stem for stem in chosen if stem not in files]):
            raise UserError(f"VOC folder {root}: {f'there is no {where / lost[0]}.xml' if chosen else f'there is no .xml file in {where}'}")
        images = by_stem(root / "JPEGImages" if (root / "JPEGImages").is_dir() else root)
        self._files, self._sizes, named = [], [], []
        for stem in chosen:
            if stem not in images:
                raise UserError(f"VOC folder {root}: there is no image for {files[stem]}")
            size, objects = _voc_objects(files[stem])
            self._files.append(images[stem])
            self._sizes.append(size)
            named.append(objects)
        self._names = lines_of(root / "classes.txt") or sorted({kind for objects in named for _, kind, _ in objects})
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
    targets = [found.target(index) for index in range(len(files))]
    texts = [json.dumps([t.boxes.tolist(), t.labels.tolist(), t.ignored.tolist(), t.height, t.width]).encode() for t in targets]

    def compute() -> dict[str, Any]:
        return {"sha256": content_digest(found.classes, ((0, sha256_of(path) + text) for path, text in zip(files, texts, strict=True)))}

    annotated = hashlib.sha256(b"\n".join([str(found.classes).encode(), *texts])).hexdigest()
    return str(remembered(cache, "set", [[str(path), *stamp(path, path.parent)] for path in files] + [annotated], compute)["sha256"])


def _only_json(folder: Path) -> Path:
    found = [*folder.glob("*.json"), *folder.glob("annotations/instances_val*.json")] if folder.is_dir() else []
    if len(found) != 1:
        said = f"{len(found)} .json files are in it: name one" if folder.is_dir() else "there is no such file or folder"
        raise UserError(f"COCO folder {folder}: {said}")
    return found[0]
