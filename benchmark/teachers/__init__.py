"""Teachers: pretrained networks from torchvision, timm, pytorchcv, the CIFAR ResNets of `cifar.py`, or any factory in a user's file or package.

Importing this package does not import torch; describing a teacher that was described before does not either.
"""

from __future__ import annotations

import fnmatch
import hashlib
import importlib.metadata
import importlib.util
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from benchmark.errors import UserError, UserErrors, nearest
from benchmark.memo import remembered
from benchmark.task import Task

if TYPE_CHECKING:
    from torch import nn

Interpolation = Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"]
ZOOS = ("torchvision", "timm", "pytorchcv", "cifar")
WEIGHT_FILES = (".safetensors", ".pth", ".pt")
UNTRAINED = "untrained"  # for `weights`: what the network's builder drew; good for measuring speed, and nothing else
CARD_VERSION = 1  # raised when what a card says changes, so that remembered ones are not used any more


class TeacherSpec(BaseModel):
    """Which network, with which weights, and what differs from what its zoo says about it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(description="torchvision:NAME, timm:NAME, pytorchcv:NAME, cifar:NAME, path/to/file.py:factory or package.module:factory")
    weights: str | None = Field(None, description="a .safetensors, .pth or .pt file; null: the zoo's weights (IMAGENET1K_V1 for torchvision)")
    classes: int | None = Field(None, ge=2)
    size: int | None = Field(None, ge=1, description="side of the square input image, in pixels")
    mean: tuple[float, ...] | None = Field(None, min_length=1, description="per channel, of images scaled to [0, 1]")
    std: tuple[float, ...] | None = Field(None, min_length=1)
    crop_ratio: float | None = Field(None, gt=0, le=1)
    interpolation: Interpolation | None = None
    name: str | None = Field(None, min_length=1, description="what tables call it; default: what stands behind the colon of `model`")

    @model_validator(mode="after")
    def _normalisation_is_possible(self) -> TeacherSpec:
        if self.mean is not None and self.std is not None and len(self.mean) != len(self.std):
            raise ValueError(f"mean has {len(self.mean)} channels, std has {len(self.std)}")
        if self.std is not None and min(self.std) <= 0:
            raise ValueError("std must be above 0")
        return self

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


@dataclass(frozen=True)
class TeacherCard:
    """What is known about a teacher without having it in memory; enough for planning, identities and tables.

    `model` names a user's file without its folder, and `weights` (a path, 'zoo' or 'factory') is for people: what identifies the teacher is
    `model`, `weights_sha256` and `source_sha256`. The latter is of the one file that holds the factory, not of what that file imports.
    """

    label: str
    model: str
    weights: str
    weights_sha256: str
    source_sha256: str | None
    task: Task
    parameters: int

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "task": self.task.as_dict()}

    @classmethod
    def from_dict(cls, given: dict[str, Any]) -> TeacherCard:
        task: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in given["task"].items()}
        return cls(**{**given, "task": Task(**task)})


def describe(spec: TeacherSpec, cache: Path | None = None) -> TeacherCard:
    """The card of a teacher. The first time, the network is built, its weights are loaded, and it is asked about one grey image.

    With `cache` (a folder) the card is remembered for as long as the spec, the files and the zoo's version stay the same.
    Raises UserError for whatever keeps the teacher from being used.
    """
    _check_files(spec)
    key = [CARD_VERSION, spec.model_dump(mode="json"), _stamp(spec.weights_file), _stamp(spec.source_file), _zoo_version(spec)]
    return TeacherCard.from_dict(remembered(cache, "teacher", key, lambda: _examine(spec).as_dict()))


def load(spec: TeacherSpec) -> nn.Module:
    """The network with its weights: float32, on the CPU, in eval mode, without gradients. Takes nothing from torch's global random stream."""
    _check_files(spec)
    from benchmark.teachers.zoo import build

    return build(spec).network


def list_models(pattern: str = "*") -> list[str]:
    """Every model name of the zoos that matches a wildcard, with or without its zoo: `timm:resnet*`, `resnet18*`.

    `my_nets.py:*` and `my_package.nets:*` list what that file or module defines: functions and classes, any of which may be a factory.
    A zoo whose package is not installed is left out with a warning. Being listed does not promise that the zoo has weights for it.
    """
    from benchmark.teachers.zoo import factory_names, zoo_names

    place, _, names_wanted = pattern.rpartition(":")
    if place and place not in ZOOS and not any(sign in place for sign in "*?["):
        spec = parse_teacher(f"{place}:{names_wanted or '*'}")
        return [f"{place}:{name}" for name in factory_names(spec) if fnmatch.fnmatchcase(name, names_wanted or "*")]
    found: list[str] = []
    for zoo in ZOOS:
        try:
            names = zoo_names(zoo)
        except UserError as error:
            warnings.warn(f"{error}; its models are not listed", stacklevel=2)
            continue
        found += [f"{zoo}:{name}" for name in names if fnmatch.fnmatchcase(f"{zoo}:{name}", pattern) or fnmatch.fnmatchcase(name, pattern)]
    return found


def _examine(spec: TeacherSpec) -> TeacherCard:
    import torch

    from benchmark.teachers.weights import hash_tensors
    from benchmark.teachers.zoo import build, check_answer

    built = build(spec)
    check_answer(built, spec)
    place, name = spec.source
    if spec.source_file is not None:
        place = spec.source_module or spec.source_file.name
        with torch.random.fork_rng(devices=[]):
            torch.seed()
            again = build(spec).network
        if hash_tensors(again.state_dict().items()) != hash_tensors(built.network.state_dict().items()):
            raise UserError(f"teacher {spec.model!r}: the factory returns other weights each time; let it load trained ones, or give `weights: FILE`")
    return TeacherCard(
        label=spec.label,
        model=f"{place}:{name}",
        weights=spec.weights or ("zoo" if spec.source_file is None else "factory"),
        weights_sha256=_sha256(spec.weights_file) if spec.weights_file else hash_tensors(built.network.state_dict().items()),
        source_sha256=_sha256(spec.source_file) if spec.source_file else None,
        task=built.task,
        parameters=sum(parameter.numel() for parameter in built.network.parameters()),
    )


def _check_files(spec: TeacherSpec) -> None:
    where = f"teacher {spec.model!r}"
    if spec.source_file is not None and not spec.source_file.is_file():
        raise UserError(f"{where}: there is no file {spec.source_file}")
    if spec.weights_file is None:
        return
    if spec.weights_file.suffix not in WEIGHT_FILES:
        raise UserError(f"{where}: weights {spec.weights!r} must be a file that ends with {', '.join(WEIGHT_FILES[:-1])} or {WEIGHT_FILES[-1]}")
    if not spec.weights_file.is_file():
        raise UserError(f"{where}: there is no weights file {spec.weights_file}")


def _file_of_module(name: str) -> Path | None:
    """Where an installed module's code stands; None where there is no such module. Only its parent packages are imported."""
    try:
        found = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None
    return Path(found.origin) if found is not None and found.has_location and found.origin else None


def _stamp(path: Path | None) -> list[Any] | None:
    """What changes when a file changes, without reading it."""
    if path is None:
        return None
    status = path.stat()
    return [str(path.resolve()), status.st_size, status.st_mtime_ns]


def _zoo_version(spec: TeacherSpec) -> str | None:
    place = spec.source[0]
    if spec.source_module is not None:
        packages = importlib.metadata.packages_distributions().get(place.split(".")[0], [])
        return ", ".join(f"{package} {importlib.metadata.version(package)}" for package in packages) or None
    if place not in ZOOS or place == "cifar":
        return None
    try:
        return importlib.metadata.version(place)
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"teacher {spec.model!r} needs the package {place!r}: pip install {place}") from None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
