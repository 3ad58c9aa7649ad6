"""A method's settings: fields with a meaning, a unit and a source, and the table that shows them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pydantic

if TYPE_CHECKING:
    from benchmark.method import MethodConfig


def Field(default: Any, *, unit: str | None = None, source: str | None = None, description: str = "", **rules: Any) -> Any:
    """A setting with its default.

    description: what it means. unit: "epochs", "images", "radians"; None where it is a plain number or a choice. source: where the default comes
    from, if not from where the class's `source` says. Everything else (ge, gt, le, lt, ...) is pydantic's.
    """
    extra: dict[str, Any] = {key: value for key, value in (("unit", unit), ("source", source)) if value is not None}
    return pydantic.Field(default, description=description or None, json_schema_extra=extra or None, **rules)


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
        default = field.get_default(call_default_factory=True)
        yield Setting(name, "null" if default is None else str(default), unit, meaning, _extra(field, "source") or homes[0].source)


def _extra(field: pydantic.fields.FieldInfo, key: str) -> str:
    return str(field.json_schema_extra.get(key, "")) if isinstance(field.json_schema_extra, dict) else ""
