"""Evaluation sets of other people: one small class, registered by a plug-in file or by an installed package (entry points `dfqbench.sets`)."""

from __future__ import annotations

import functools
import inspect
from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, TypeVar

import numpy as np
from PIL import Image

from dfqbench.data.images import Labels, Pixels
from dfqbench.data.sets import BUILT_IN, EvaluationSet, content_digest
from dfqbench.errors import UserError
from dfqbench.method import plugins

ENTRY_POINTS = "dfqbench.sets"
S = TypeVar("S", bound="type[OwnSet]")


class OwnSet(EvaluationSet):
    """An evaluation set that is loaded as a whole. Subclass it, decorate the class with `register_set`, and write `class_names` and `load`.

    The docstring's first line is what `dfqbench sets` says. `place` is what stands behind the colon in a config (`my-set:folder`), or None.
    """

    class_names: ClassVar[list[str]] = []  # type: ignore[assignment]  # by class index

    def __init__(self, name: str, place: str | None):
        super().__init__(name, len(self.class_names))
        self.place = place
        self.source = plugins.origin(type(self), Path(inspect.getfile(type(self)))).as_dict()

    @abstractmethod
    def load(self) -> tuple[Pixels, Labels]:
        """The test images and their labels: N x H x W (grey) or N x H x W x 3, uint8, 0 to 255; and N class indices, whole numbers.

        Raise `dfqbench.UserError` with one line where something is missing.
        """

    @functools.cached_property
    def _loaded(self) -> tuple[Pixels, Labels]:
        where = f"evaluation set {self.name!r}"
        try:
            given = self.load()
            images, labels = np.asarray(given[0]), np.asarray(given[1])
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{where} could not be loaded: {plugins.last_line(error)}") from error
        if images.dtype != np.uint8 or images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] != 3):
            raise UserError(f"{where}: images must be uint8, N x H x W or N x H x W x 3, not {images.dtype}, {' x '.join(map(str, images.shape))}")
        if labels.shape != (len(images),) or labels.dtype.kind not in "iu" or not len(labels):
            raise UserError(f"{where}: {len(images)} images need as many labels, whole numbers, not {labels.dtype} of shape {labels.shape}")
        if labels.min() < 0 or labels.max() >= self.classes:
            raise UserError(f"{where}: labels reach from {labels.min()} to {labels.max()}, but class_names has {self.classes} entries")
        return images, labels.astype(np.int64)

    def __len__(self) -> int:
        return len(self._loaded[1])

    def _open(self, split: str) -> tuple[Callable[[int], Image.Image], Labels]:
        if split != "test":
            raise self._no_split(split, "'test'")
        images, labels = self._loaded
        return lambda index: Image.fromarray(images[index]), labels

    def digest(self, cache: Path | None = None) -> str:
        images, labels = self._loaded
        contents = (f"{image.shape} ".encode() + image.tobytes() for image in images)
        return content_digest(self.classes, zip(labels.tolist(), contents, strict=True))


_sets: dict[str, type[OwnSet]] = plugins.table()


def register_set(name: str) -> Callable[[S], S]:
    """Class decorator that makes an evaluation set known by `name`. Raises UserError if the name is taken, naming both places."""

    def add(cls: S) -> S:
        file, known = Path(inspect.getfile(cls)), _sets.get(name)
        if name in BUILT_IN:
            raise UserError(f"two evaluation sets are called {name!r}: the built-in one and that in {file}")
        if known is not None and Path(inspect.getfile(known)).resolve() != file.resolve():
            raise UserError(f"two evaluation sets are called {name!r}: {inspect.getfile(known)} and {file}")
        if not cls.class_names:
            raise UserError(f"evaluation set {name!r}: class_names is empty ({file})")
        _sets[name] = cls
        return cls

    return add


@functools.cache
def _discover() -> None:
    plugins.load_entry_points(ENTRY_POINTS)


def own_sets() -> dict[str, type[OwnSet]]:
    """What is registered by now, installed packages included."""
    _discover()
    return dict(_sets)
