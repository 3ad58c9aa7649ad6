"""Which network a sweep names, with which weights. No torch here."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from dfqbench.errors import UserError, UserErrors, nearest
from dfqbench.task import Kind, Scores, Task

if TYPE_CHECKING:
    from torch import nn

Interpolation = Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"]
ZOOS = ("torchvision", "timm", "pytorchcv", "cifar", "scenes")
OWN_ZOOS = ("cifar", "scenes")  # defined here, no package's
UNTRAINED = "untrained"  # for `weights`: what the network's builder drew; good for measuring speed, and nothing else


DENSE: dict[Kind, tuple[str, ...]] = {  # what the names of a zoo's networks for other than one class per image begin with
    "segment": ("torchvision:deeplabv3_", "torchvision:fcn_", "torchvision:lraspp_", "scenes:segment"),
    "detect": ("torchvision:fcos_", "torchvision:retinanet_", "torchvision:ssd300_", "torchvision:ssdlite320_", "scenes:detect"),
}
TWO_STAGE = ("fasterrcnn_", "maskrcnn_", "keypointrcnn_")  # torchvision's


def zoo_kind(model: str) -> Kind:
    """What a zoo's network answers, from its name, `ZOO:NAME`."""
    return next((kind for kind, begins in DENSE.items() if model.startswith(begins)), "classify")


class TeacherSpec(BaseModel):
    """Which network, with which weights, and what differs from what its zoo says about it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(
        description="torchvision:NAME, timm:NAME, pytorchcv:NAME, cifar:NAME, scenes:NAME, path/to/file.py:factory or package.module:factory"
    )
    weights: str | None = Field(None, description="a .safetensors, .pth or .pt file; null: the zoo's weights (IMAGENET1K_V1 for torchvision)")
    classes: int | None = Field(None, ge=2)
    size: int | tuple[int, int] | None = Field(None, description="side of the square input image in pixels, or [height, width]")
    kind: Kind | None = Field(None, description="what the network answers: classify, segment or detect; default: what it says of itself, or classify")
    scores: Scores | None = Field(None, description="of a detector: how they are made of its logits, sigmoid, or softmax with the background first")
    exits: int | None = Field(None, ge=1, description="of a classifier with early exits: how many answers it gives, the last at its end")
    mean: tuple[float, ...] | None = Field(None, min_length=1, description="per channel, of images scaled to [0, 1]")
    std: tuple[float, ...] | None = Field(None, min_length=1)
    crop_ratio: float | None = Field(None, gt=0, le=1)
    interpolation: Interpolation | None = None
    name: str | None = Field(None, min_length=1, description="what tables call it; default: what stands behind the colon of `model`")
    preset: str | None = Field(None, min_length=1, description="what methods start from on this network; default: the sweep's `preset`")

    @field_validator("size", mode="before")
    @classmethod
    def _size_is_possible(cls, given: Any) -> Any:
        sides = given if isinstance(given, list | tuple) else (given, given)
        if given is not None and not (len(sides) == 2 and all(isinstance(side, int) and side >= 1 for side in sides)):
            raise ValueError("a whole number of pixels is expected, at least 1, or [height, width]")
        return given

    @model_validator(mode="after")
    def _normalisation_is_possible(self) -> TeacherSpec:
        if self.mean is not None and self.std is not None and len(self.mean) != len(self.std):
            raise ValueError(f"mean has {len(self.mean)} channels, std has {len(self.std)}")
        if self.mean is not None and max(self.mean) > 1:
            raise ValueError("mean is of images scaled to [0, 1]: divide mean and std by 255")
        if self.std is not None and min(self.std) <= 0:
            raise ValueError("std must be above 0")
        return self

    @property
    def height_and_width(self) -> tuple[int, int] | None:
        """Of the input image, in pixels, where `size` is given."""
        return (self.size, self.size) if isinstance(self.size, int) else self.size

    @property
    def source(self) -> tuple[str, str]:
        """(zoo or file, name in it)."""
        place, _, name = self.model.rpartition(":")
        return place, name

    @property
    def label(self) -> str:
        return self.name or self.source[1]

    @property
    def weights_file(self) -> Path | None:
        return Path(self.weights).expanduser() if self.weights is not None else None

    @property
    def source_module(self) -> str | None:
        """An installed module with a factory, as in `package.module:factory`; None for a network of a zoo or of a file."""
        place = self.source[0]
        return place if place not in ZOOS and not place.endswith(".py") else None

    @property
    def source_file(self) -> Path | None:
        """The user's file with the factory, or an installed module's; None for a network of a zoo."""
        place = self.source[0]
        if self.source_module is not None:
            return _file_of_module(self.source_module)
        return Path(place).expanduser() if place.endswith(".py") else None


def parse_teacher(given: str | dict[str, Any]) -> TeacherSpec:
    """A teacher as a sweep writes it: a model's name, or a mapping with `model` and settings.

    Raises UserErrors that name every unknown key and every value that is not allowed. Whether a zoo knows the name is asked by `describe`, which
    has to import the zoo.
    """
    settings = {"model": given} if isinstance(given, str) else given
    if not isinstance(settings, dict) or not isinstance(settings.get("model"), str):
        raise UserError(f"teacher {given!r}: write a model's name, or a mapping that has one under 'model'")
    where = f"teacher {settings['model']!r}"
    unknown = [key for key in settings if key not in TeacherSpec.model_fields]
    if unknown:
        raise UserErrors(f"{where}: unknown setting {key!r}: {nearest(key, TeacherSpec.model_fields)}" for key in unknown)
    try:
        spec = TeacherSpec(**settings)
    except ValidationError as error:
        raise UserErrors(f"{where}: {'.'.join(map(str, e['loc'])) or 'settings'}: {e['msg']}, not {e['input']!r}" for e in error.errors()) from None
    place, name = spec.source
    if not place or not name:
        raise UserError(f"{where}: write ZOO:NAME with a zoo of {', '.join(ZOOS)}, path/to/file.py:factory, or package.module:factory")
    if place not in ZOOS and spec.source_file is None:
        raise UserError(f"{where}: unknown zoo {place!r}: {nearest(place, ZOOS)}; nor is it a module (a file is written path/to/file.py:factory)")
    return spec


def _file_of_module(name: str) -> Path | None:
    """Where an installed module's code stands; None where there is no such module. Only its parent packages are imported."""
    try:
        found = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None
    return Path(found.origin).absolute() if found is not None and found.has_location and found.origin else None


@dataclass(frozen=True)
class Built:
    """A network with its weights, and the task that it was trained for.

    neighbours: what a user's file has imported from beside it, so far: module name -> (file, sha256); for an installed module, the other files
    of its package.
    """

    network: nn.Module
    task: Task
    neighbours: Mapping[str, tuple[Path, str]] = field(default_factory=dict)
