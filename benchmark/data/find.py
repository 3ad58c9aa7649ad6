"""Finds evaluation sets: the built-in ones, and those that plug-ins registered."""

from __future__ import annotations

import fnmatch
import inspect
import os
import re
from collections.abc import Callable
from pathlib import Path

from dfqbench.data.detection_folders import CocoFolder, VocFolder
from dfqbench.data.digit_scenes import SceneBoxes, SceneMasks
from dfqbench.data.own import own_sets
from dfqbench.data.segmentation_folder import SegmentationFolder
from dfqbench.data.sets import BUILT_IN, Cifar, Digits, EvaluationSet, ImageFolder
from dfqbench.errors import UserError, nearest
from dfqbench.method import plugins

OFFLINE: dict[str, Callable[[], EvaluationSet]] = {"digits": Digits, "digit-scenes-segment": SceneMasks, "digit-scenes-detect": SceneBoxes}
DENSE_FOLDERS: dict[str, Callable[[str, Path], EvaluationSet]] = {
    "segmentation": SegmentationFolder,
    "voc-detection": VocFolder,
    "coco": CocoFolder,
}


def find_set(text: str) -> EvaluationSet:
    """The evaluation set that a sweep names.

    - `digits`: scikit-learn's handwritten digits, which need no download; `digit-scenes-segment` and `digit-scenes-detect`: scenes of them
    - `cifar10`, `cifar100`, with `:ROOT`: torchvision's folder, filled by a download where it is empty; default $DFQBENCH_DATA or ~/.cache/dfqbench
    - `imagenet`, with `:ROOT`: the 1000 folders n01440764 ... of validation images, or the folder above with `val` in it; default $IMAGENET
    - `imagefolder:PATH`: a folder with one sub-folder of images per class, sorted by name, or as numbers where
      all of them are whole numbers (torchvision sorts those as text: `10` before `2`)
    - `segmentation:PATH`, `voc-detection:PATH`, `coco:PATH`: images with masks or boxes
    - whatever a plug-in registered (`register_set`), with or without `:PLACE`

    Folders are listed here, and errors in them raised as UserError; CIFAR is opened when it is first needed.
    """
    name, _, place = text.partition(":")
    path = Path(place).expanduser() if place else None
    if name not in BUILT_IN:
        own = own_sets()
        if name in own:
            return own[name](name, place or None)
        hint = "".join(f"; broken plug-in {plugin}: {why}" for plugin, why in plugins.broken.items())
        raise UserError(f"unknown evaluation set {text!r}: {nearest(name, [*BUILT_IN, *own])}{hint}")
    if name in OFFLINE:
        if path is not None:
            raise UserError(f"evaluation set {text!r}: {name!r} comes with scikit-learn and takes no folder")
        return OFFLINE[name]()
    if name in ("cifar10", "cifar100"):
        return Cifar(name, path or Path(os.environ.get("DFQBENCH_DATA") or "~/.cache/dfqbench").expanduser())
    if name == "imagenet":
        return _imagenet(path)
    if path is None:
        raise UserError(f"evaluation set {text!r}: write {name}:PATH")
    if name in DENSE_FOLDERS:
        return DENSE_FOLDERS[name](f"{name}:{path.resolve().name}", path)
    return ImageFolder(f"imagefolder:{path.resolve().name}", path)


def list_sets(pattern: str = "*") -> list[tuple[str, str, str]]:
    """(name, where it comes from, what it is) of every evaluation set whose name matches the wildcard, sorted by name."""
    found = [(name, "built in", about) for name, about in BUILT_IN.items()]
    for name, cls in own_sets().items():
        found.append((name, str(plugins.origin(cls, Path(inspect.getfile(cls)))), (inspect.getdoc(cls) or "").split("\n")[0]))
    return sorted(entry for entry in found if fnmatch.fnmatchcase(entry[0], pattern))


def _imagenet(root: Path | None) -> ImageFolder:
    if root is None:
        if not os.environ.get("IMAGENET"):
            raise UserError("evaluation set 'imagenet': write imagenet:ROOT, or set the environment variable IMAGENET to the folder")
        root = Path(os.environ["IMAGENET"]).expanduser()
    found = ImageFolder("imagenet", root / "val" if (root / "val").is_dir() else root)
    # A subset, or folders with other names, would sort to other labels than those of every ImageNet teacher.
    others = [name for name in found.class_names if not re.fullmatch(r"n\d{8}", name)]
    if others or found.classes != 1000:
        what = f"{others[0]!r} is no WordNet id" if others else f"{found.classes} class folders"
        raise UserError(f"evaluation set 'imagenet': {found.root} must have the 1000 class folders n01440764 ... n15075141, but: {what}")
    return found
