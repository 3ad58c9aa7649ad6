"""Which preset each method of a sweep runs under, and where one was not named that the teacher's classes suggest: lines for `dfqbench plan`."""

from __future__ import annotations

from collections.abc import Sequence

from dfqbench.method.settings import preset_of
from dfqbench.sweep.variants import Variant
from dfqbench.teachers import TeacherCard

SUGGESTED = {100: "cifar100", 1000: "imagenet"}  # by a teacher's classes; 10 have the methods' defaults


def about_presets(on: Sequence[tuple[TeacherCard, Sequence[Variant]]]) -> list[str]:
    """on: each teacher with the variants that have cells on it. What holds for several teachers is said once."""
    said: dict[str, list[str]] = {}
    for teacher, variants in on:
        for line in filter(None, (_taken(variants), _not_named(teacher, variants))):
            said.setdefault(line, []).append(teacher.label)
    return [f"{', '.join(labels)}: {line}" for line, labels in said.items()]


def _taken(variants: Sequence[Variant]) -> str:
    """Empty where no method starts from a preset."""
    methods: dict[str, list[str]] = {}
    for variant in variants:
        methods.setdefault(variant.preset, []).append(variant.method)
    named = [f"preset {preset}: {_names(methods[preset])}" for preset in sorted(methods) if preset]
    return "; ".join([*named, *(f"no preset: {_names(its)}" for preset, its in methods.items() if not preset)]) if named else ""


def _not_named(teacher: TeacherCard, variants: Sequence[Variant]) -> str:
    wanted = SUGGESTED.get(teacher.task.classes, "")
    having = [v.method for v in variants if wanted and not v.preset and preset_of(v.presets, wanted, v.widths[0])]
    if not having:
        return ""
    return f"no preset is named for {teacher.task.classes} classes: `preset: {wanted}` is known to {_names(having)}"


def _names(methods: Sequence[str]) -> str:
    return ", ".join(dict.fromkeys(methods))
