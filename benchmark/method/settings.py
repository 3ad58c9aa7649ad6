"""A method's settings: fields with a meaning, a unit and a source, and the table that shows them."""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import pydantic
from pydantic import AfterValidator, BaseModel, ConfigDict, PlainSerializer
from pydantic_core import PydanticCustomError


def Field(default: Any, *, unit: str | None = None, source: str | None = None, description: str = "", later: bool = False, **rules: Any) -> Any:
    """A setting with its default.

    description: what it means. unit: "epochs", "images", "radians"; None where it is a plain number or a choice. source: where the default comes
    from, if not from where the class's `source` says. later: the setting came when there were results already, and its default changes none of them:
    it is no part of a cell's identity where it has its default. Everything else (ge, gt, le, lt, ...) is pydantic's.
    """
    if later:
        rules["exclude_if"] = lambda value: value == default
    extra: dict[str, Any] = {key: value for key, value in (("unit", unit), ("source", source)) if value is not None}
    return pydantic.Field(default, description=description or None, json_schema_extra=extra or None, **rules)


def _existing(path: Path) -> Path:
    path = path.expanduser()
    if not path.is_file():
        raise PydanticCustomError("no_file", "there is no such file")
    return path


def _digest(path: Path) -> str:
    status = path.stat()
    return _sha256(path.resolve(), status.st_size, status.st_mtime_ns)


@functools.lru_cache
def _sha256(path: Path, size: int, modified: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# A setting that names a file, relative to the working directory. It must exist; what identifies a cell is the file's sha256, never its path.
InputFile = Annotated[Path, AfterValidator(_existing), PlainSerializer(_digest, return_type=str, when_used="json")]


class MethodConfig(BaseModel):
    """Settings of a method. Unknown keys are errors; every field takes part in a cell's identity.

    `presets` names sets of other defaults: `presets = {"imagenet": dict(batch_size=16)}`; see `preset_of` for names. `source` says where the defaults
    come from, unless a field's own `source` does. `after_images` names the settings that the leading phases which only make images do not depend on:
    cells that differ in nothing else take each other's images over. A subclass adds what it knows of its own settings; what is not named keeps cells
    apart.

    A setting of type `InputFile` takes part by the content of its file; one that changes no number is left out by `exclude=True`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, ignored_types=(dict,), validate_default=True)
    presets: ClassVar[dict[str, dict[str, Any]]] = {}
    source: ClassVar[str] = "not given"
    after_images: ClassVar[set[str]] = set()

    @classmethod
    def preset(cls, wanted: str) -> dict[str, Any]:
        """The settings of the preset that `preset_of` finds among these for a wanted one; none where there is none."""
        return cls.presets.get(preset_of(cls.presets, wanted), {})


def preset_of(presets: Collection[str], wanted: str, width: str = "") -> str:
    """The name of the preset that a method with these has for a wanted one at a bit width (`w4a4`); "" where it has none.

    A network's own comes before a data set's, and one for some bits of weights before one for all: of `imagenet-resnet50` at w5a5 the first that
    there is of `imagenet-resnet50-w5`, `imagenet-resnet50`, `imagenet-w5` and `imagenet`.
    """
    parts, weights = wanted.split("-"), width.split("a")[0]
    names = ["-".join(parts[:count]) for count in range(len(parts), 0, -1)]
    return next((name for stem in names for name in (f"{stem}-{weights}", stem) if name in presets), "")


def files_of(config: MethodConfig) -> dict[str, str]:
    """The paths of the files that settings name, by the name of the setting."""
    return {name: str(value) for name, value in config if isinstance(value, Path)}


def without_default(config: type[MethodConfig]) -> list[str]:
    """The settings that have to be given."""
    return [name for name, field in config.model_fields.items() if field.is_required()]


class TrainingConfig(MethodConfig):
    """What every method that trains a student can be told. The defaults are the lineage's (spec section 1.4, CIFAR)."""

    source = "GDFQ's code, CIFAR"

    epochs: int = Field(400, ge=1, unit="epochs", description="training in all, warm-up included")
    iterations: int = Field(200, ge=1, unit="steps", description="steps per epoch")
    batch_size: int = Field(200, ge=2, unit="images", description="synthetic images per step")
    student_lr: float = Field(1e-4, gt=0, description="learning rate of the student's SGD (Nesterov)")
    student_momentum: float = Field(0.9, ge=0, lt=1, description="momentum of the student's SGD")
    student_weight_decay: float = Field(1e-4, ge=0, description="weight decay of the student's SGD")
    milestones: list[int] = Field(
        [100, 200, 300], unit="epochs", description="epochs from which on learning rates are multiplied by lr_decay; never rescaled"
    )
    lr_decay: float = Field(0.1, gt=0, le=1, description="what learning rates are multiplied by at each milestone")


@dataclass(frozen=True)
class Setting:
    """What `methods show` says of one setting; all of it text."""

    name: str
    default: str
    unit: str
    meaning: str
    source: str


def settings_of(config: type[MethodConfig]) -> Iterator[Setting]:
    """The settings of a config in their order, inherited ones first.

    A source is the field's own, or that of the class in which the default stands. What a field that only changes the default does not say again
    (meaning, unit) is taken from where it was first declared.
    """
    for name, field in config.model_fields.items():
        homes: list[type[MethodConfig]] = [cls for cls in config.__mro__ if name in inspect.get_annotations(cls)]  # type: ignore[misc]
        declared = [cls.model_fields[name] for cls in homes]
        meaning = next((f.description for f in declared if f.description), "")
        unit = next((unit for f in declared if (unit := _extra(f, "unit"))), "")
        default = "required" if field.is_required() else field.get_default(call_default_factory=True)
        yield Setting(name, "null" if default is None else str(default), unit, meaning, _extra(field, "source") or homes[0].source)


def _extra(field: pydantic.fields.FieldInfo, key: str) -> str:
    return str(field.json_schema_extra.get(key, "")) if isinstance(field.json_schema_extra, dict) else ""
