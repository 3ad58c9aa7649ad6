"""Sweeps: a YAML file that spans cells. All errors of a file are found at once, each with its key and value, before anything runs."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, get_origin

from pydantic import ValidationError

from dfqbench.data import EvaluationSet, find_set
from dfqbench.errors import UserError, UserErrors, nearest
from dfqbench.method.contract import Method
from dfqbench.method.hosting import needs_of
from dfqbench.method.info import lacking
from dfqbench.method.registry import find_method, load_plugin
from dfqbench.method.settings import MethodConfig
from dfqbench.quantization import Bits, Protocol, find_protocol
from dfqbench.sweep.cell import Cell, EvaluationCard
from dfqbench.sweep.config_file import VARIABLE, text_digest
from dfqbench.sweep.schema import Sweep
from dfqbench.sweep.students import student_of
from dfqbench.teachers import TeacherCard, TeacherSpec, examine, parse_teacher
from dfqbench.yaml_file import read_yaml


@dataclass(frozen=True)
class LoadedSweep:
    """A sweep with the cells it spans."""

    sweep: Sweep
    path: Path
    text_sha256: str
    evaluation: EvaluationSet
    teachers: dict[TeacherCard, TeacherSpec]
    cells: list[Cell]
    selection: LoadedSelection | None = None


@dataclass(frozen=True)
class LoadedSelection:
    """What makes the images to select on: one cell for each teacher, whose student is never made."""

    cells: list[Cell]
    count: int


def load_sweep(path: Path, cache: Path, plugins: list[str] | None = None) -> LoadedSweep:
    """Reads a config and spans its cells. `cache` is where digests are remembered.

    Raises UserErrors with all that is wrong, each as `file: key: value: what would be right`.
    """
    problems = Problems(path)
    content = read_yaml(path)
    sweep = _validate(content, problems)
    for i, file in enumerate([*(sweep.plugins if sweep else []), *(plugins or [])]):
        problems.catch(f"plugins[{i}]", partial(load_plugin, file))
    found = _parts(sweep, cache, problems) if sweep else None
    problems.raise_all()
    assert sweep is not None
    assert found is not None
    return LoadedSweep(sweep, path, text_digest(path), found.evaluation, found.teachers, _span(sweep, found), _selection(sweep, found))


class Problems:
    """Collects what is wrong with one file."""

    def __init__(self, path: Path):
        self.path = path
        self.lines: list[str] = []

    def add(self, key: str, message: str) -> None:
        self.lines.append(f"{self.path}: {key}: {message}")

    def catch(self, key: str, call: Callable[[], Any]) -> Any:
        """What `call` returns; None, and the problem noted, if it raises UserError. A key with a known problem is not tried."""
        if any(line.startswith((f"{self.path}: {key}: ", f"{self.path}: {key}.", f"{self.path}: {key}[")) for line in self.lines):
            return None
        try:
            return call()
        except UserErrors as errors:
            for message in errors.messages:
                self.add(key, message)
        except UserError as error:
            self.add(key, str(error))
        return None

    def raise_all(self) -> None:
        if self.lines:
            raise UserErrors(dict.fromkeys(self.lines))


def _validate(content: Any, problems: Problems) -> Sweep | None:
    if not isinstance(content, dict):
        problems.add("(whole file)", f"a mapping with the keys {', '.join(Sweep.model_fields)} is expected")
        return None
    content = _with_variables(content, "", problems)
    for key in [key for key in content if key not in Sweep.model_fields]:
        problems.add(str(key), f"unknown key: {nearest(key, Sweep.model_fields)}")
        del content[key]
    bits = content.get("bits")
    if isinstance(bits, list):  # anything else than text here is a mistake that Bits.parse explains best
        content["bits"] = [str(b) for b in bits]
    try:
        return Sweep(**content)
    except ValidationError as error:
        for line in _described(error):
            problems.add(*line)
        return None


def _with_variables(value: Any, key: str, problems: Problems) -> Any:
    """Replaces ${NAME} by the environment's value, everywhere."""
    if isinstance(value, dict):
        return {k: _with_variables(v, f"{key}.{k}".lstrip("."), problems) for k, v in value.items()}
    if isinstance(value, list):
        return [_with_variables(v, f"{key}[{i}]", problems) for i, v in enumerate(value)]
    if not isinstance(value, str):
        return value
    for name in VARIABLE.findall(value):
        if name not in os.environ:
            problems.add(key, f"{value!r}: the environment variable {name} is not set")
    return VARIABLE.sub(lambda m: os.environ.get(m[1], m[0]), value)


def _described(error: ValidationError, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(key, message) for each finding of pydantic, in our words."""
    for finding in error.errors():
        key = prefix
        for part in finding["loc"]:
            if isinstance(part, int):
                key += f"[{part}]"
            elif part not in ("str", "dict[str,any]") and not str(part).startswith("dict["):
                key = f"{key}.{part}".lstrip(".")
        if finding["type"] == "missing":
            yield key, "missing"
        else:
            yield key, f"{finding['input']!r}: {finding['msg'][0].lower()}{finding['msg'][1:]}"


@dataclass(frozen=True)
class _Parts:
    """What a sweep's names stand for."""

    protocol: Protocol
    bits: list[Bits]
    evaluation: EvaluationSet
    evaluation_card: EvaluationCard
    teachers: dict[TeacherCard, TeacherSpec]
    variants: list[tuple[type[Method], MethodConfig, dict[str, Any]]]
    image_makers: list[tuple[type[Method], MethodConfig, dict[str, Any]]]


def _parts(sweep: Sweep, cache: Path, problems: Problems) -> _Parts | None:
    """Looks everything up; None where something is wrong, which `problems` then holds."""
    protocol = problems.catch("protocol", lambda: find_protocol(sweep.protocol))
    bits = [problems.catch(f"bits[{i}]", partial(Bits.parse, b)) for i, b in enumerate(sweep.bits)]
    evaluation = problems.catch("evaluate", lambda: find_set(sweep.evaluate.set))
    card = problems.catch("evaluate", lambda: _evaluation_card(evaluation, sweep.evaluate.name, cache)) if evaluation else None
    teachers: dict[TeacherCard, TeacherSpec] = {}
    found: list[tuple[int, TeacherCard, dict[str, str | None]]] = []
    question = student_of(protocol) if protocol else None
    for i, given in enumerate(sweep.teachers):
        spec = problems.catch(f"teachers[{i}]", partial(parse_teacher, given))
        examined = problems.catch(f"teachers[{i}]", partial(examine, spec, cache, question)) if spec else None
        if examined is None:
            continue
        teacher, student = examined
        teachers[teacher] = spec
        found.append((i, teacher, student or {}))
        if student and student["refused"]:
            problems.add(f"teachers[{i}]", f"{teacher.label}: {student['refused']}")
        if card and teacher.task.classes != card.classes:
            problems.add(f"teachers[{i}]", f"{teacher.label} has {teacher.task.classes} classes, evaluation set {card.name} has {card.classes}")
        elif card:
            problems.catch(f"teachers[{i}]", partial(evaluation.check, teacher.task))
    variants = [v for i, given in enumerate(sweep.methods) for v in _variants(f"methods[{i}]", given, sweep, protocol, problems)]
    makers = _variants("selection.images", sweep.selection.images, sweep, protocol, problems) if sweep.selection else []
    if len(makers) > 1:
        problems.add("selection.images", f"{len(makers)} variants, exactly one is expected: no lists of values here")
    for (i, teacher, student), (method, config, _) in itertools.product(found, [*variants, *makers]):
        needs = needs_of(method, config)
        lacks = lacking(needs, teacher.offers)
        if "ranges" in needs and student.get("ranges"):
            lacks.append(f"ranges ({student['ranges']})")
        for lack in lacks:
            problems.add(f"teachers[{i}]", f"{teacher.label} does not have what method {method.info.name} needs: {lack}")
    if problems.lines or protocol is None or evaluation is None or card is None:
        return None
    return _Parts(protocol, bits, evaluation, card, teachers, variants, makers)


def _selection(sweep: Sweep, parts: _Parts) -> LoadedSelection | None:
    if sweep.selection is None:
        return None
    makers = replace(parts, variants=parts.image_makers, bits=parts.bits[:1])
    return LoadedSelection(_span(sweep.model_copy(update={"seeds": [sweep.selection.seed]}), makers), sweep.selection.count)


def _span(sweep: Sweep, parts: _Parts) -> list[Cell]:
    cells = []
    for teacher, (method, config, changed) in itertools.product(parts.teachers, parts.variants):
        settings, source = config.model_dump(mode="json"), method.info.source.as_dict()  # once for all seeds and widths: sweeps can be large
        protocol = parts.protocol.for_method(method.info.name, method.ranges, method.batch_norm)
        first = Cell(
            method=method.info.name,
            method_version=method.version,
            config=settings,
            teacher=teacher,
            evaluation=parts.evaluation_card,
            protocol=protocol,
            bits=parts.bits[0],
            seed=0,
            precision=sweep.precision,
            shares_synthesis=method.info.shares_synthesis,
            changed=changed,
            fidelity=method.info.fidelity,
            plugin=f"{method.info.origin} {method.info.source_sha256[:12]}",
            source=source,
        )
        cells += [first.at(width, seed if method.uses_seed else 0) for seed, width in itertools.product(sweep.seeds, parts.bits)]
    return list({cell.id: cell for cell in cells}.values())


def _evaluation_card(found: EvaluationSet, name: str | None, cache: Path) -> EvaluationCard:
    return EvaluationCard(name or found.name, found.digest(cache), found.classes, len(found))


def _variants(
    key: str, given: str | dict[str, dict[str, Any] | None], sweep: Sweep, protocol: Protocol | None, problems: Problems
) -> list[tuple[type[Method], MethodConfig, dict[str, Any]]]:
    """The method of one entry with each of its settings: a list value spans a grid."""
    if isinstance(given, dict) and len(given) != 1:
        problems.add(key, f"{given!r}: one method with its settings is expected, like {{gdfq: {{bn_weight: 1.0}}}}")
        return []
    name, settings = (given, {}) if isinstance(given, str) else next(iter(given.items()))
    settings = dict(settings or {})
    key = f"{key}.{name}"
    method = problems.catch(key, lambda: find_method(name))
    if method is None:
        return []
    if protocol is not None:
        problems.catch(key, lambda: protocol.for_method(name, method.ranges, method.batch_norm))
    preset = settings.pop("preset", None)
    if preset is not None and preset not in method.Config.presets:
        problems.add(f"{key}.preset", f"{preset!r}: unknown preset: {nearest(preset, method.Config.presets)}")
        return []
    fields = method.Config.model_fields
    unknown = [k for k in settings if k not in fields]
    for setting in unknown:
        problems.add(f"{key}.{setting}", f"unknown setting: {nearest(setting, [*fields, 'preset'])}")
    base = method.Config.presets.get(preset or sweep.preset or "", {}) | {k: v for k, v in sweep.budget.given().items() if k in fields}
    axes = {k: v if _spans(v, fields[k].annotation) else [v] for k, v in settings.items() if k in fields}
    variants = []
    for values in itertools.product(*axes.values()):
        chosen = dict(zip(axes, values, strict=True))
        try:
            config = method.Config(**{**base, **chosen})
        except ValidationError as error:
            for line in _described(error, key):
                problems.add(*line)
            continue
        plain = method.Config(**base).model_dump(mode="json")
        changed = {k: v for k, v in config.model_dump(mode="json").items() if k in chosen and v != plain[k]}
        variants.append((method, config, changed))
    return variants


def _spans(value: Any, annotation: Any) -> bool:
    """Whether a setting's value is a list of values to try: for a setting that is a list itself, a list of lists."""
    if not isinstance(value, list):
        return False
    takes_list = annotation is list or get_origin(annotation) in (list, tuple)
    return not takes_list or (bool(value) and all(isinstance(v, list) for v in value))
