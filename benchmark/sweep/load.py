"""Sweeps: a YAML file that spans cells. All errors of a file are found at once, each with its key and value, before anything runs."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dfqbench.data import EvaluationSet, Yardstick, find_set
from dfqbench.errors import nearest
from dfqbench.method.info import lacking
from dfqbench.method.registry import load_plugin
from dfqbench.quantization import Bits, Protocol, find_protocol
from dfqbench.sweep.allocation import Allocation, find_allocations
from dfqbench.sweep.cell import Cell, EvaluationCard, fingerprint
from dfqbench.sweep.config_file import VARIABLE, text_digest
from dfqbench.sweep.presets import about_presets
from dfqbench.sweep.problems import Problems, described
from dfqbench.sweep.schema import WITHOUT_DATA, Budget, NamedSet, Selection, Sweep
from dfqbench.sweep.students import about_work, student_of
from dfqbench.sweep.variants import Variant, find_variants
from dfqbench.task import Kind
from dfqbench.teachers import InMemory, TeacherCard, TeacherSpec, examine, parse_teacher
from dfqbench.yaml_file import read_yaml

ALLOCATE = "allocate"  # what tables call the choice of an allocator, among changed settings


@dataclass(frozen=True)
class LoadedSweep:
    """A sweep with the cells it spans. evaluation: None where it has no evaluation set (`evaluate: none`). remarks: what is to be said
    of teachers and presets. yardsticks: by their digest. pool: the images that bit widths are chosen on, where cells have such."""

    sweep: Sweep
    path: Path
    text_sha256: str
    evaluation: EvaluationSet | None
    teachers: dict[TeacherCard, TeacherSpec | InMemory]
    cells: list[Cell]
    selection: LoadedSelection | None = None
    remarks: Sequence[str] = ()
    yardsticks: Mapping[str, Yardstick] = field(default_factory=dict)
    pool: LoadedSelection | None = None


@dataclass(frozen=True)
class LoadedSelection:
    """What makes the images to select on, or to choose bit widths on: one cell for each teacher, whose student is never made."""

    cells: list[Cell]
    count: int

    def maker(self, teacher: TeacherCard) -> Cell:
        return next(cell for cell in self.cells if cell.teacher == teacher)

    def digest(self, teacher: TeacherCard) -> str:
        """Of what the images of that teacher depend on."""
        maker = self.maker(teacher).identity()
        return fingerprint([{key: value for key, value in maker.items() if key not in ("bits", "protocol", "evaluation")}, self.count])


def load_sweep(path: Path, cache: Path, plugins: list[str] | None = None) -> LoadedSweep:
    """Reads a config and spans its cells. `cache` is where digests are remembered.

    Raises UserErrors with all that is wrong, each as `file: key: value: what would be right`.
    """
    return span_sweep(read_yaml(path), path, text_digest(path), cache, plugins)


def span_sweep(
    content: Any, path: Path, text_sha256: str, cache: Path, plugins: list[str] | None = None, networks: Mapping[str, InMemory] | None = None
) -> LoadedSweep:
    """`load_sweep` of what a file called `path` would hold. networks: those that a caller has in memory, by the names that the content gives them."""
    problems = Problems(path)
    sweep = _validate(content, problems)
    for i, file in enumerate([*(sweep.plugins if sweep else []), *(plugins or [])]):
        problems.catch(f"plugins[{i}]", partial(load_plugin, file))
    found = _parts(sweep, cache, problems, networks) if sweep else None
    problems.raise_all()
    assert sweep is not None
    assert found is not None
    selection = _images(sweep, sweep.selection, found, found.image_makers)
    pool = _images(sweep, sweep.allocation, found, found.pool_makers)
    ran = [(teacher, [v for v in found.variants if v.asked == asked and v.widths]) for teacher, asked in found.presets.items()]
    remarks = found.quantized + about_presets(ran)
    cells = _span(sweep, found, selection, pool)
    _check_labels(sweep, cells, found.variants, problems)
    return LoadedSweep(sweep, path, text_sha256, found.evaluation, found.teachers, cells, selection, remarks, found.yardsticks, pool)


def _check_labels(sweep: Sweep, cells: list[Cell], variants: list[Variant], problems: Problems) -> None:
    """Raises UserErrors for labels of rows that the sweep does not have, or that have one beside their settings."""
    rows = {cell.label for cell in cells} if sweep.labels else set()
    with_labels = [(variant.method, variant.changed) for variant in variants if variant.name and sweep.labels]
    named = {cell.label for cell in cells if (cell.method, cell.changed) in with_labels}
    for row in sweep.labels:
        if row not in rows:
            problems.add("labels", f"{row!r}: no row is called that; {nearest(row, rows)}")
        elif row in named:
            problems.add("labels", f"{row!r}: it has a label among `methods` already")
    problems.raise_all()


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
        content["bits"] = [b if isinstance(b, dict) else str(b) for b in bits]
    try:
        return Sweep(**content)
    except ValidationError as error:
        for line in described(error):
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


@dataclass(frozen=True)
class _Parts:
    """What a sweep's names stand for."""

    protocol: Protocol
    bits: list[tuple[Bits, Allocation | None]]
    evaluation: EvaluationSet | None
    evaluation_card: EvaluationCard | None
    teachers: dict[TeacherCard, TeacherSpec | InMemory]
    presets: dict[TeacherCard, str]
    quantized: list[str]
    variants: list[Variant]
    image_makers: list[Variant]
    pool_makers: list[Variant]
    yardsticks: dict[str, Yardstick]


def _parts(sweep: Sweep, cache: Path, problems: Problems, networks: Mapping[str, InMemory] | None = None) -> _Parts | None:
    """Looks everything up; None where something is wrong, which `problems` then holds."""
    protocol = problems.catch("protocol", lambda: find_protocol(sweep.protocol))
    bits = find_allocations(sweep.bits, problems, cache)
    for i, (width, allocation) in enumerate(bits):
        if protocol and width:
            problems.catch(f"bits[{i}]", partial(protocol.check_bits, width, allocation is not None))
    has_data = sweep.evaluate.set != WITHOUT_DATA
    evaluation = problems.catch("evaluate", lambda: find_set(sweep.evaluate.set)) if has_data else None
    card = problems.catch("evaluate", lambda: _evaluation_card(evaluation, sweep.evaluate, cache)) if evaluation else None
    yardsticks, cards = _yardsticks(sweep, evaluation if card else None, cache, problems)
    teachers: dict[TeacherCard, TeacherSpec | InMemory] = {}
    found: list[tuple[int, TeacherCard, dict[str, Any]]] = []
    presets: dict[TeacherCard, str] = {}
    question = student_of(protocol) if protocol else None
    for i, given in enumerate(sweep.teachers):
        held = networks.get(given) if networks and isinstance(given, str) else None
        spec = held or problems.catch(f"teachers[{i}]", partial(parse_teacher, given))
        examined = problems.catch(f"teachers[{i}]", partial(examine, spec, cache, question)) if spec else None
        if examined is None:
            continue
        teacher, student = examined
        teachers[teacher] = spec
        preset = (spec.preset if isinstance(spec, TeacherSpec) else None) or sweep.preset or ""
        if presets.setdefault(teacher, preset) != preset:
            problems.add(f"teachers[{i}].preset", f"{preset!r}: the same network stands above with {presets[teacher]!r}: a network has one preset")
        found.append((i, teacher, student or {}))
        if student and student["refused"]:
            problems.add(f"teachers[{i}]", f"{teacher.label}: {student['refused']}")
        if card and evaluation and evaluation.kind != teacher.task.kind:
            kind = teacher.task.kind
            problems.add(f"teachers[{i}]", f"{teacher.label} is there to {kind}, evaluation set {card.name} is for networks that {evaluation.kind}")
        elif card and evaluation and not evaluation.fits(teacher.task.labels):
            problems.add(f"teachers[{i}]", f"{teacher.label} has {teacher.task.labels} classes, evaluation set {card.name} has {card.classes}")
        elif card and evaluation:
            problems.catch(f"teachers[{i}]", partial(evaluation.check, teacher.task))
    asked = sweep.model_copy(update={"bits": list(dict.fromkeys(str(width) for width, _ in bits if width))})  # a method is not told who allocates
    tasks, asked_presets = {teacher.task for teacher in teachers}, {*presets.values()} or {sweep.preset or ""}
    variants, makers = find_variants(asked, protocol, tasks, asked_presets, problems, cache, cards)
    pool_makers: list[Variant] = []
    if any(allocation for _, allocation in bits) and not problems.lines:
        of_pool = asked.model_copy(update={"methods": [], "yardsticks": {}, "selection": sweep.allocation, "budget": Budget()})
        _, pool_makers = find_variants(of_pool, protocol, tasks, asked_presets, problems, cache, images_key="allocation.images")
        _check_pool(sweep, variants, makers, pool_makers, problems)
    if len(makers) > len({v.asked for v in makers}):
        problems.add("selection.images", f"{len(makers)} variants, exactly one is expected: no lists of values here")
    if not has_data and sweep.selection and sweep.selection.seed in sweep.seeds and {v.method for v in makers} & {v.method for v in variants}:
        problems.add("selection.seed", f"{sweep.selection.seed} is also a seed of the sweep: students would be scored on images that they have seen")
    for (i, teacher, _), (_, chooser) in itertools.product(found, bits):
        if chooser and (kind := teacher.task.kind) not in chooser.tasks:
            problems.add(f"teachers[{i}]", f"{teacher.label} is there to {kind}, for which allocator {chooser.allocator} is not defined")
    for (i, teacher, student), variant in itertools.product(found, [*variants, *makers, *pool_makers]):
        if variant.asked != presets[teacher]:
            continue
        if teacher.task.kind not in variant.tasks:
            kind, defined = teacher.task.kind, _defined_for(teacher.task.kind)
            problems.add(
                f"teachers[{i}]", f"{teacher.label} is there to {kind}, for which method {variant.method}, as it is set, is not defined: {defined}"
            )
            continue
        lacks = lacking(variant.needs, teacher.offers)
        if "ranges" in variant.needs and student.get("ranges"):
            lacks.append(f"ranges ({student['ranges']})")
        for lack in lacks:
            problems.add(f"teachers[{i}]", f"{teacher.label} does not have what method {variant.method} needs: {lack}")
    if problems.lines or protocol is None or (has_data and card is None):
        return None
    quantized = [line for _, teacher, student in found if (line := about_work(teacher.label, protocol.name, student))]
    return _Parts(protocol, bits, evaluation, card, teachers, presets, quantized, variants, makers, pool_makers, yardsticks)


def _defined_for(kind: Kind) -> str:
    from dfqbench.method.registry import list_methods

    return f"those that are: {', '.join(sorted(method.info.name for method in list_methods() if kind in method.tasks))}"


def _yardsticks(
    sweep: Sweep, evaluation: EvaluationSet | None, cache: Path, problems: Problems
) -> tuple[dict[str, Yardstick], dict[str, dict[str, Any]]]:
    """Those that are there, by their digest; and of all, by name, digest and count, or nothing where something is wrong."""
    made: dict[str, Yardstick] = {}
    cards: dict[str, dict[str, Any]] = {}
    for name, given in sweep.yardsticks.items():
        found = problems.catch(f"yardsticks.{name}.images", partial(find_set, given.images))
        yardstick = Yardstick(found, given.count) if found else None
        card = problems.catch(f"yardsticks.{name}", partial(yardstick.card, evaluation, cache)) if yardstick else None
        cards[name] = card or {}
        if card and yardstick:
            made[card["digest"]] = yardstick
    return made, cards


def _check_pool(sweep: Sweep, variants: list[Variant], makers: list[Variant], pool_makers: list[Variant], problems: Problems) -> None:
    """Adds what would let images for one purpose be those for another."""
    pool = sweep.allocation
    if len(pool_makers) > len({v.asked for v in pool_makers}):
        problems.add("allocation.images", f"{len(pool_makers)} variants, exactly one is expected: no lists of values here")
    methods = {v.method for v in pool_makers}
    if pool.seed in sweep.seeds and methods & {v.method for v in variants}:
        problems.add("allocation.seed", f"{pool.seed} is also a seed of the sweep: widths would be chosen on images that students are trained on")
    if sweep.selection and pool.seed == sweep.selection.seed and methods & {v.method for v in makers}:
        problems.add("allocation.seed", f"{pool.seed} is also the seed of `selection`: widths would be chosen on images that students are scored on")
    if pool.count < 2:
        problems.add("allocation.count", f"{pool.count}: 2 at least: a half chooses, a half checks")


def _images(sweep: Sweep, given: Selection | None, parts: _Parts, variants: list[Variant]) -> LoadedSelection | None:
    if given is None or not variants:
        return None
    width = next(width for width, _ in parts.bits if str(width) in variants[0].widths)
    makers = replace(parts, variants=variants, bits=[(width, None)])
    return LoadedSelection(_span(sweep.model_copy(update={"seeds": [given.seed]}), makers), given.count)


def _span(sweep: Sweep, parts: _Parts, unseen: LoadedSelection | None = None, pool: LoadedSelection | None = None) -> list[Cell]:
    """unseen: the images on which cells are scored where there is no evaluation set. pool: those on which bit widths are chosen."""
    cells = []
    for teacher, variant in itertools.product(parts.teachers, parts.variants):
        if variant.asked != parts.presets[teacher]:
            continue
        first = Cell(
            method=variant.method,
            method_version=variant.version,
            config=variant.config,
            teacher=teacher,
            evaluation=parts.evaluation_card or _without_data(teacher, unseen),
            protocol=parts.protocol.for_method(variant.method, variant.ranges, variant.batch_norm),
            bits=parts.bits[0][0],
            seed=0,
            precision=sweep.precision,
            shares_synthesis=variant.shares_synthesis,
            changed=variant.changed,
            fidelity=variant.fidelity,
            plugin=variant.plugin,
            source=variant.source,
            files=variant.files,
            name=variant.name,
            group=variant.group,
            preset=variant.preset,
            by_width=tuple(variant.by_width),
            steps=variant.steps.get(str(teacher.task)),
        )
        seeds = sweep.seeds if variant.uses_seed else [0]
        for text in dict.fromkeys(allocation.text if allocation else "" for _, allocation in parts.bits):
            its = [(width, given) for width, given in parts.bits if (given.text if given else "") == text and str(width) in variant.widths]
            if not its or (text and variant.fidelity == "released"):  # what others have released has the bits that they gave it
                continue
            own = _allocated(first, its[0][1], pool)
            if called := sweep.labels.get(own.label):
                own = replace(own, name=called.label or own.name, group=called.group or own.group)
            cells += [own.at(width, seed) for seed, (width, _) in itertools.product(seeds, its)]
    return list({cell.id: cell for cell in cells}.values())


def _allocated(cell: Cell, allocation: Allocation | None, pool: LoadedSelection | None) -> Cell:
    """The cell with its widths left to an allocator, which tables show as they show a setting."""
    if allocation is None:
        return cell
    assert pool is not None
    maker = pool.maker(cell.teacher)
    made = {"images": {maker.method: maker.config}, "seed": maker.seed, "count": pool.count}
    named = f"{cell.name} ({allocation.text})" if cell.name else ""
    changed = {**cell.changed, ALLOCATE: allocation.text}
    return replace(cell, allocation=allocation.on(pool.digest(cell.teacher), made), changed=changed, name=named)


def _without_data(teacher: TeacherCard, unseen: LoadedSelection | None) -> EvaluationCard:
    if unseen is None:  # of the cells that make these images
        return EvaluationCard(WITHOUT_DATA, WITHOUT_DATA, teacher.task.classes, 0)
    maker = unseen.maker(teacher)
    made, selection = f"{maker.label}, seed {maker.seed}", {"images": {maker.method: maker.config}, "seed": maker.seed, "count": unseen.count}
    return EvaluationCard(WITHOUT_DATA, f"{WITHOUT_DATA} {unseen.digest(teacher)}", teacher.task.classes, unseen.count, made, selection)


def _evaluation_card(found: EvaluationSet, named: NamedSet, cache: Path) -> EvaluationCard:
    found.check_files(cache)
    kind, colon, _ = named.set.partition(":")
    return EvaluationCard(named.name or found.name, found.digest(cache), found.classes, len(found), set=kind + colon, source=found.source)
