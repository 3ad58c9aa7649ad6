"""The methods of a sweep with each of their settings, as cells know them; remembered, so that the next `plan` needs no torch."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from string import Formatter
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, get_origin

from pydantic import ValidationError

from dfqbench.errors import UserError, nearest
from dfqbench.method import registry
from dfqbench.method.catalogue import code_state
from dfqbench.method.info import Fidelity, Needs
from dfqbench.method.settings import MethodConfig, files_of, preset_of, without_default
from dfqbench.quantization import Protocol
from dfqbench.quantization.protocol import BatchNormMode, RangeEstimatorName
from dfqbench.store.cache import remembered
from dfqbench.sweep.problems import Problems, described
from dfqbench.sweep.schema import Sweep
from dfqbench.task import Kind, Task

if TYPE_CHECKING:
    from dfqbench.method.contract import Method

Entry = str | Mapping[str, dict[str, Any] | str | None]


NAMING = ("label", "group")  # beside the method in an entry of `methods`


@dataclass(frozen=True)
class Configured:
    """A method with settings. changed: those that are not the method's own; name, group, asked, preset, by_width: see `Variant`."""

    method: type[Method]
    config: MethodConfig
    changed: dict[str, Any]
    widths: Sequence[str]
    name: str
    group: str
    asked: str
    preset: str
    by_width: list[str]


@dataclass(frozen=True)
class Variant:
    """A method with complete settings; all of it JSON. changed: settings that differ from the method's own; needs: with those of the one that it
    wraps, as have tasks; widths: those of the sweep's bit widths at which it has cells; files: paths by setting; steps: by phase, by the
    teacher's task as text; none where nobody asked; name, group: what tables are to call it and where it belongs, empty where the sweep does not
    say; asked: the preset of the teachers that it is for, preset: that of the method which it starts from; empty where there is none; presets:
    all that the method has; by_width: settings that presets have otherwise at other bit widths of the sweep."""

    method: str
    version: int
    ranges: RangeEstimatorName | None
    batch_norm: BatchNormMode | None
    uses_seed: bool
    shares_synthesis: bool
    fidelity: Fidelity
    plugin: str
    source: dict[str, str]
    config: dict[str, Any]
    changed: dict[str, Any]
    needs: list[Needs]
    tasks: list[Kind]
    widths: list[str]
    files: dict[str, str]
    steps: dict[str, dict[str, int] | None]
    name: str
    group: str
    asked: str
    preset: str
    presets: list[str]
    by_width: list[str]

    @classmethod
    def of(cls, found: Configured, tasks: Collection[Task]) -> Variant:
        from dfqbench.method.hosting import needs_of, tasks_of

        method, config = found.method, found.config
        info, settings = method.info, config.model_dump(mode="json")
        return cls(
            method=info.name,
            version=method.version,
            ranges=method.ranges,
            batch_norm=method.batch_norm,
            uses_seed=method.uses_seed,
            shares_synthesis=info.shares_synthesis,
            fidelity=info.fidelity,
            plugin=f"{info.origin} {info.source_sha256[:12]}",
            source=info.source.as_dict(),
            config=settings,
            changed=found.changed,
            needs=sorted(needs_of(method, config)),
            tasks=sorted(tasks_of(method, config)),
            widths=list(found.widths),
            files=files_of(config),
            steps={str(task): steps_of(method, settings | files_of(config), task) for task in tasks},
            name=found.name,
            group=found.group,
            asked=found.asked,
            preset=found.preset,
            presets=list(method.Config.presets),
            by_width=found.by_width,
        )


def find_variants(
    sweep: Sweep,
    protocol: Protocol | None,
    tasks: Collection[Task],
    presets: Collection[str],
    problems: Problems,
    cache: Path,
    yardsticks: Mapping[str, dict[str, Any]] | None = None,
    images_key: str = "selection.images",
) -> tuple[list[Variant], list[Variant]]:
    """(those of the methods, those of the method that makes images to select on); what is wrong is added to `problems`.

    presets: those that teachers ask for, "" for none; there are variants for each of them. yardsticks: digest and count by name, empty where they
    are not known. images_key: what the key of the images is called in the config.

    Remembered where nothing is wrong and no code but the suite's has a say, for as long as neither its files nor any installed package change.
    The steps for each of the teachers' tasks are remembered with it: they need the methods too.
    """
    images, real = [sweep.selection.images] if sweep.selection else [], yardsticks or {}
    known = registry.untouched() and protocol is not None and not problems.lines
    code = code_state() if known else None

    def ask() -> dict[str, Any]:
        from dfqbench.method.hosting import methods_of

        entries: list[tuple[str, str, Entry, Sweep]] = [("methods", f"methods[{i}]", given, sweep) for i, given in enumerate(sweep.methods)]
        entries += [("images", images_key, given, sweep.model_copy(update={"bits": sweep.bits[:1]})) for given in images]
        found: dict[str, list[Configured]] = {"methods": [], "images": []}
        for preset, (part, key, given, asking) in itertools.product(sorted(presets), entries):
            found[part] += _variants(key, given, preset, asking, protocol, real if part == "methods" else {}, problems)
        known_presets = {name for method in registry.list_methods() for name in method.Config.presets}
        for preset in sorted({*presets} - {"", *known_presets}):
            problems.add("preset", f"{preset!r}: no method has a preset of that name: {nearest(preset, known_presets)}")
        _check_yardsticks(real, [v.config for v in found["methods"]], problems)
        asked = [one for v in itertools.chain(*found.values()) for one in methods_of(v.method, v.config)]
        own = all(method.info.source.package == "dfqbench" for method, _ in asked) and not registry.broken
        fixed = not any(files_of(config) for _, config in asked)  # a file's content may be another the next time
        holds = known and own and fixed and not problems.lines and code_state() == code
        return {"holds": holds, **{key: [asdict(Variant.of(v, tasks if holds else ())) for v in variants] for key, variants in found.items()}}

    given = [sweep.methods, images, sorted(presets), sorted(real.items()), sweep.budget.given(), protocol, sweep.bits, sorted(map(str, tasks))]
    key = [code, repr(given)]  # as text: the order of settings and 1 or 1.0 make a difference
    answer = remembered(cache if known else None, "variants", key, ask, lambda answer: bool(answer["holds"]))
    methods, makers = ([Variant(**variant) for variant in answer[part]] for part in ("methods", "images"))
    return methods, makers


def _check_yardsticks(yardsticks: Mapping[str, Any], configs: list[MethodConfig], problems: Problems) -> None:
    """Adds yardsticks that nothing is trained on, and those that are called as a method."""
    hosts, known = {getattr(config, "host", "") for config in configs}, {method.info.name for method in registry.list_methods()}
    for name in yardsticks:
        if name in known:
            problems.add(f"yardsticks.{name}", "a method is called that: take another name")
        elif name not in hosts and not problems.lines:
            problems.add(f"yardsticks.{name}", f"no method is trained on it: one with a host, like {{qat: {{host: {name}}}}}, is expected")


def _variants(
    key: str,
    given: Entry,
    asked: str,
    sweep: Sweep,
    protocol: Protocol | None,
    yardsticks: Mapping[str, dict[str, Any]],
    problems: Problems,
) -> list[Configured]:
    """The method of one entry with each of its settings: a list value spans a grid. asked: the preset, unless the entry has its own."""
    named: dict[str, Any] = {k: given[k] for k in NAMING if k in given} if isinstance(given, Mapping) else {}
    entry = {given: None} if isinstance(given, str) else {k: v for k, v in given.items() if k not in NAMING}
    if len(entry) != 1 or not all(isinstance(v, dict | None) for v in entry.values()) or not all(isinstance(v, str) and v for v in named.values()):
        problems.add(key, f"{given!r}: one method with its settings is expected, like {{gdfq: {{bn_weight: 1.0}}}}, and perhaps a label and a group")
        return []
    name, given_settings = next(iter(entry.items()))
    settings: dict[str, Any] = dict(given_settings or {})  # type: ignore[arg-type]
    key = f"{key}.{name}"
    method = problems.catch(key, lambda: registry.find_method(name))
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
    if "yardstick" in settings:
        problems.add(f"{key}.yardstick", "it is filled in: name the images in `yardsticks` and in `host`")
        return []
    by_preset: dict[str, list[str]] = {}
    for width in (str(width) for width in sweep.bits):
        by_preset.setdefault(preset_of(method.Config.presets, preset or asked, width), []).append(width)
    budget = {k: v for k, v in sweep.budget.given().items() if k in fields}
    axes = {k: v if _spans(v, fields[k].annotation) else [v] for k, v in settings.items() if k in fields}
    sets = [method.Config.presets.get(own, {}) for own in by_preset]
    by_width = sorted({k for k in itertools.chain(*sets) if any(k not in s or s[k] != sets[0].get(k) for s in sets)} - {*axes, *budget})
    variants = []
    for (own, bits), values in itertools.product(by_preset.items(), itertools.product(*axes.values())):
        base, chosen = method.Config.presets.get(own, {}) | budget, dict(zip(axes, values, strict=True))
        on = str(chosen.get("host")) if "yardstick" in fields else ""
        if on in yardsticks and not yardsticks[on]:
            continue  # what is wrong with it is told already
        try:
            config = method.Config(**{**base, **chosen, **({"yardstick": yardsticks[on]} if on in yardsticks else {})})
        except ValidationError as error:
            for line in described(error, key):
                problems.add(*line)
            continue
        if protocol is not None:
            problems.catch(key, partial(protocol.check_grid, name, method.weight_grids(config)))
        required = {k: v for k, v in chosen.items() if k in without_default(method.Config)}
        plain = method.Config(**{**base, **required}).model_dump(mode="json")
        changed = {k: v for k, v in config.model_dump(mode="json").items() if k in chosen and (k in required or v != plain.get(k))}
        changed |= {k: Path(path).name for k, path in files_of(config).items() if k in changed}
        widths = problems.catch(key, partial(method.widths, config, bits))
        label = problems.catch(f"{key}.label", partial(_label, named.get("label", ""), config))
        variants.append(Configured(method, config, changed, widths or [], label or "", named.get("group", ""), asked, own, by_width))
    if "label" in named and len({(v.name, v.preset) for v in variants}) < len(variants):
        problems.add(
            f"{key}.label", f"{named['label']!r}: {len(variants)} variants would have it: put settings into it, like {{{next(iter(axes), 'epochs')}}}"
        )
    return variants


def _label(text: str, config: MethodConfig) -> str:
    """With the values of settings that it names in braces. Raises UserError."""
    try:
        if not all(field is None or field.isidentifier() for _, field, *_ in Formatter().parse(text)):
            raise ValueError("a name alone, or a name with a format like {epochs:d}")
        return text.format_map(dict(config) | config.model_dump(mode="json"))
    except (KeyError, ValueError, IndexError, AttributeError) as error:
        raise UserError(f"{text!r}: braces name settings, like {{epochs}} ({error})") from None


def _spans(value: Any, annotation: Any) -> bool:
    """Whether a setting's value is a list of values to try: for a setting that is a list itself, a list of lists."""
    if not isinstance(value, list):
        return False
    takes_list = annotation is list or get_origin(annotation) in (list, tuple)
    return not takes_list or (bool(value) and all(isinstance(v, list) for v in value))


def steps_of(method: type[Method], settings: dict[str, Any], task: Task) -> dict[str, int] | None:
    """Steps by phase as `dfqbench speed` names them: `images` that only make images, `train` all others where students train; those there are.

    None where the method cannot tell its phases before it is set up.
    """
    teacher: Any = SimpleNamespace(task=task)
    try:
        config = method.Config(**settings)
        planned = method(teacher, config, 0).phases()
        phases = [
            (phase, phase.epochs * int(getattr(config, "iterations", 0) if phase.iterations is None else phase.iterations)) for phase in planned
        ]
    except Exception:  # a plug-in's phases may need what only its `setup` makes
        return None
    trains = any(phase.distill and steps for phase, steps in phases)
    steps = {
        "images": sum(steps for phase, steps in phases if phase.step is not None),
        "train": sum(steps for phase, steps in phases if phase.step is None) if trains else 0,
    }
    return {phase: count for phase, count in steps.items() if count}
