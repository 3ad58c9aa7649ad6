"""The evaluation sets that `find_set` knows."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from PIL import Image

from dfqbench.data.folders import IMAGE_FILES, are_numbers, class_folders, class_order, files_below, sha256_of, stamp
from dfqbench.data.images import Images, Labels, Pixels, open_image, prepare, threads
from dfqbench.data.pixels import kept
from dfqbench.errors import Notice, UserError
from dfqbench.store.cache import cache_folder, remembered
from dfqbench.task import Kind, Task

BUILT_IN = {
    "digits": "scikit-learn's handwritten digits, 599 test images; needs no download",
    "digit-scenes-segment": "those digits on 300 test scenes of 64 x 64 pixels, a class for each pixel; needs no download",
    "digit-scenes-detect": "the same scenes, a box for each digit; needs no download",
    "cifar10": "CIFAR-10, 10,000 test images; cifar10:ROOT, downloaded into it where absent",
    "cifar100": "CIFAR-100, 10,000 test images; cifar100:ROOT, downloaded into it where absent",
    "imagenet": "ImageNet, 50,000 validation images; imagenet:ROOT or $IMAGENET",
    "imagefolder": "a folder with one sub-folder of images per class; imagefolder:PATH",
    "segmentation": "a folder of images and one of masks of class indices (CamVid's, PASCAL VOC's); segmentation:PATH",
    "voc-detection": "images with boxes in PASCAL VOC's XML files; voc-detection:PATH",
    "coco": "images with boxes in a JSON file of COCO's format; coco:FILE or coco:FOLDER",
}
MANY = 10_000  # images: reading them takes a while


class EvaluationSet(ABC):
    """Labelled images. `name` says which, never where: two machines that keep the same images in different folders mean the same set."""

    kind: Kind = "classify"  # of the networks that can be evaluated on it
    training_split: str = "test"  # the name of the training images, or of all where the set has no others
    other_order: list[str] | None = None  # the class names as others may have sorted them, where that is not `class_names`
    source: dict[str, str] | None = None  # where a plug-in's code came from, plugins.Origin

    def __init__(self, name: str, classes: int):
        self.name = name
        self.classes = classes

    @property
    @abstractmethod
    def class_names(self) -> list[str]:
        """By class index."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of test images."""

    @abstractmethod
    def digest(self, cache: Path | None = None) -> str:
        """sha256 over the test images in order: class index and stored bytes of each, whatever decodes them, and no path.

        With `cache` (a folder) the answer is remembered for as long as the listing, the sizes and the times of the files stay the same.
        """

    @abstractmethod
    def _open(self, split: str) -> tuple[Callable[[int], Image.Image], Labels]:
        """(a function that opens image i, the labels); UserError for a split that this set does not have."""

    def decode(self, task: Task, split: str = "test") -> Images:
        """The images as the teacher's task wants them. UserError where the classes differ or an image cannot be read."""
        if not self.fits(task.classes):
            raise UserError(f"evaluation set {self.name} has {self.classes} classes, the teacher {task.classes}")
        opened, labels = self._open(split)

        def keep(shape: tuple[int, ...], decode: Callable[[Pixels], None]) -> Pixels | None:
            # the digest is of the test images: only they can be told apart by it
            return kept(lambda: self.digest(cache_folder()), task, split, shape, decode) if split == "test" else None

        return Images(lambda index: prepare(opened(index), task), labels, (task.size, task.size, task.channels), task.classes, keep=keep)

    def fits(self, classes: int) -> bool:
        """Whether a network with so many classes can be evaluated on this set."""
        return classes == self.classes

    def check(self, task: Task) -> None:
        """UserError for what would keep `decode` from working, as far as it can be told without decoding the set."""
        if task.channels not in (1, 3):
            raise UserError(f"evaluation set {self.name} gives images with 1 or 3 channels, the teacher takes {task.channels}")

    def check_files(self, cache: Path | None = None) -> None:
        """UserError where files of images are damaged. With `cache` (a folder), what was found whole once is not looked at again."""
        return  # where a set is no folder of files, opening it tells

    def _no_split(self, split: str, known: str) -> UserError:
        return UserError(f"evaluation set {self.name} has no split {split!r}, only {known}")


class Digits(EvaluationSet):
    """scikit-learn's 1797 handwritten digits (the test part of UCI optdigits, by 13 people), 8 x 8 pixels with values 0 to 16.

    Values are scaled to 0..255, images resampled to the task's size. The first 1198 are for training, the last 599 for testing: the images come
    writer after writer, so that nearly all test images are by people whom no training image is by; dealing images out in turn would put the same
    hand on both sides. Each class has 55 to 62 test images.
    """

    TRAIN = 1198
    training_split = "train"

    def __init__(self) -> None:
        super().__init__("digits", classes=10)

    @property
    def class_names(self) -> list[str]:
        return [str(digit) for digit in range(10)]

    def __len__(self) -> int:
        return 1797 - self.TRAIN

    @cached_property
    def _all(self) -> tuple[Pixels, Labels]:
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise UserError(f"evaluation set 'digits' needs scikit-learn: pip install scikit-learn ({error})") from None
        loaded = load_digits()
        return np.rint(loaded.images * (255 / 16)).astype(np.uint8), loaded.target.astype(np.int64)

    def _split(self, split: str) -> tuple[Pixels, Labels]:
        where = {"train": slice(None, self.TRAIN), "test": slice(self.TRAIN, None)}.get(split)
        if where is None:
            raise self._no_split(split, "'train' and 'test'")
        pixels, labels = self._all
        return pixels[where], labels[where]

    def _open(self, split: str) -> tuple[Callable[[int], Image.Image], Labels]:
        pixels, labels = self._split(split)
        return lambda index: Image.fromarray(pixels[index]), labels

    def digest(self, cache: Path | None = None) -> str:
        def compute() -> dict[str, Any]:
            pixels, labels = self._split("test")
            return {"sha256": content_digest(self.classes, zip(labels.tolist(), (image.tobytes() for image in pixels), strict=True))}

        return str(remembered(cache, "set", ["digits", self.TRAIN, importlib.metadata.version("scikit-learn")], compute)["sha256"])


class Cifar(EvaluationSet):
    """CIFAR-10 or CIFAR-100 as torchvision keeps them in a folder; downloaded into it where they are not there."""

    training_split = "train"
    FILES = {"cifar10": "cifar-10-batches-py/test_batch", "cifar100": "cifar-100-python/test"}

    def __init__(self, name: str, root: Path):
        super().__init__(name, classes=10 if name == "cifar10" else 100)
        self.root = root

    @property
    def class_names(self) -> list[str]:
        return list(self._load("test").classes)

    def __len__(self) -> int:
        return 10_000

    def _load(self, split: str) -> Any:
        if split not in ("train", "test"):
            raise self._no_split(split, "'train' and 'test'")
        try:
            from torchvision import datasets
        except ImportError as error:
            raise UserError(f"evaluation set {self.name!r} needs torchvision: pip install torchvision ({error})") from None
        kind = datasets.CIFAR10 if self.name == "cifar10" else datasets.CIFAR100
        try:
            with contextlib.redirect_stdout(sys.stderr):  # it prints its progress, and output may be a table
                return kind(self.root, train=split == "train", download=True)  # checks the files' md5 and keeps those that are there
        except Exception as error:  # URLError, OSError, RuntimeError: torchvision does not wrap them
            raise UserError(
                f"evaluation set {self.name!r} is not in {self.root} and could not be downloaded ({type(error).__name__}: {error}): "
                f"write {self.name}:ROOT, or set the environment variable DFQBENCH_DATA"
            ) from error

    def _open(self, split: str) -> tuple[Callable[[int], Image.Image], Labels]:
        loaded = self._load(split)
        return lambda index: Image.fromarray(loaded.data[index]), np.asarray(loaded.targets, np.int64)

    def digest(self, cache: Path | None = None) -> str:
        def compute() -> dict[str, Any]:
            loaded = self._load("test")
            return {"sha256": content_digest(self.classes, zip(loaded.targets, (image.tobytes() for image in loaded.data), strict=True))}

        file = self.root / self.FILES[self.name]
        if not file.is_file():  # the download comes first: only then there is a file whose size and time can be remembered
            self._load("test")
        return str(remembered(cache, "set", [self.name, stamp(file, self.root)], compute)["sha256"])


class ImageFolder(EvaluationSet):
    """A folder with one sub-folder of image files per class. Classes are the sub-folders sorted by name, or as numbers where all names are whole
    numbers; images are sorted by path within their class.

    Numbers with gaps are class indices of a network that has more classes than the folder: `classes` is one more than the largest.
    """

    def __init__(self, name: str, root: Path):
        self.root = root
        self._class_names, other = class_order(class_folders(root))
        self.other_order = other if other != self._class_names else None
        self.is_part = are_numbers(other) and _have_gaps([int(folder) for folder in self._class_names])
        if self.other_order and are_numbers(other) and not self.is_part:
            first = next(i for i, folder in enumerate(other) if folder != self._class_names[i])
            said = f"class folders are sorted as numbers ({self._class_names[first]} before {other[first]}), not as text"
            warnings.warn(f"image folder {root}: {said}", Notice, stacklevel=3)
        self._files: list[tuple[int, Path]] = []
        left_out: list[Path] = []
        empty: list[str] = []
        for place, folder in enumerate(self._class_names):
            index = int(folder) if self.is_part else place
            images, others = files_below(root / folder)
            self._files += [(index, path) for path in images]
            left_out += others
            if not images:
                empty.append(folder)
        if empty:
            more = f" and {len(empty) - 3} more" if len(empty) > 3 else ""
            raise UserError(
                f"image folder {root}: no image in class {', '.join(empty[:3])}{more} (image files end with {', '.join(sorted(IMAGE_FILES))})"
            )
        if left_out:
            warnings.warn(f"image folder {root}: {len(left_out)} files are no images and left out, the first is {left_out[0]}", Notice, stacklevel=3)
        if self.is_part:
            there = f"{len(self._class_names)} class folders, from {self._class_names[0]} to {self._class_names[-1]}: their names are class indices"
            warnings.warn(f"image folder {root}: {there}, and the other classes have no image", Notice, stacklevel=3)
            self.other_order = None
        super().__init__(name, classes=int(self._class_names[-1]) + 1 if self.is_part else len(self._class_names))

    @property
    def class_names(self) -> list[str]:
        return [str(index) for index in range(self.classes)] if self.is_part else self._class_names

    def fits(self, classes: int) -> bool:
        """Part of a network's classes is enough, where folders say which."""
        return classes >= self.classes if self.is_part else classes == self.classes

    def __len__(self) -> int:
        return len(self._files)

    def _open(self, split: str) -> tuple[Callable[[int], Image.Image], Labels]:
        if split != "test":
            raise self._no_split(split, "the folder itself, which is 'test'")
        return lambda index: open_image(self._files[index][1]), np.array([label for label, _ in self._files], np.int64)

    def check_files(self, cache: Path | None = None) -> None:
        """Decodes every image once, whoever asks: hours of training end with an evaluation."""

        def trouble(entry: tuple[int, Path]) -> str | None:
            try:
                open_image(entry[1], coarsely=True)
            except UserError as error:
                return str(error)
            return None

        def look() -> dict[str, Any]:
            if len(self) >= MANY:
                warnings.warn(f"evaluation set {self.name}: looking once at each of {len(self)} images, whether it can be read", Notice, stacklevel=4)
            with ThreadPoolExecutor(threads()) as pool:
                found = [said for said in pool.map(trouble, self._files) if said]
            if found:
                raise UserError(found[0] + (f"; {len(found) - 1} more of {len(self)} images cannot be read either" if len(found) > 1 else ""))
            return {"images": len(self)}

        remembered(cache, "whole", [self.digest(cache), PIL.__version__], look)

    def digest(self, cache: Path | None = None) -> str:
        def hashed(entry: tuple[int, Path]) -> tuple[int, bytes]:
            return entry[0], sha256_of(entry[1])

        def compute() -> dict[str, Any]:
            with ThreadPoolExecutor() as pool:
                return {"sha256": content_digest(self.classes, pool.map(hashed, self._files))}

        key = [str(self.root.resolve()), [[index, *stamp(path, self.root)] for index, path in self._files]]
        return str(remembered(cache, "set", key, compute)["sha256"])


def _have_gaps(numbers: list[int]) -> bool:
    """Whether one is missing between the first and the last."""
    return numbers != list(range(numbers[0], numbers[0] + len(numbers)))


def content_digest(classes: int, images: Iterable[tuple[int, bytes]]) -> str:
    """One sha256 from the class index and the bytes of each image; lengths enter, so that no byte can move from one image to the next."""
    total = hashlib.sha256(f"{classes} classes\n".encode())
    for label, content in images:
        total.update(f"{label} {len(content)} ".encode())
        total.update(content)
    return total.hexdigest()
