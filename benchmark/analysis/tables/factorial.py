"""Source of images by training of the student: the cells of a hosting method as a full-factorial table. No torch here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from dfqbench.analysis.tables.blocks import DECIMALS, Block, Entry, Row
from dfqbench.analysis.tables.choice import REFERENCE
from dfqbench.analysis.tables.printed import Written, accuracy_of, notes_on_lost, notes_on_warnings
from dfqbench.sweep.cell import canonical_json

OF_SOURCE = ("host", "host_settings", "host_preset", "yardstick")  # settings that say where images come from
FILLED_IN = ("host_identity", "student_identity")
IMAGES, MEAN = "images", "mean"


@dataclass
class Factorial:
    """The cells of one block and of the yardsticks beside it: rows by source and training.

    sources: labels, without real images, which are in `real`; trainings: labels; all from best to worst mean.
    """

    block: Block
    sources: list[str] = field(default_factory=list)
    real: list[str] = field(default_factory=list)
    trainings: list[str] = field(default_factory=list)
    rows: dict[tuple[str, str], Row] = field(default_factory=dict)

    @property
    def widths(self) -> list[str]:
        """From wide to narrow, those at which there is a pair."""
        return sorted({width for row in self.rows.values() for width in (*row.entries, *row.lost)}, reverse=True)

    def entry(self, source: str, training: str, width: str) -> Entry | None:
        """What may be compared."""
        row = self.rows.get((source, training))
        return row.complete(width) if row else None

    def mean(self, sources: Sequence[str], trainings: Sequence[str], width: str) -> float | None:
        """Over all pairs of these, percent; None where one is missing or diverged."""
        entries = [self.entry(source, training, width) for source in sources for training in trainings]
        return float(np.mean([entry.mean for entry in entries if entry])) if entries and all(entries) else None

    def shares(self, width: str) -> dict[str, float] | None:
        """Of the sum of squares between the means of data-free pairs, percent: what goes with images, with training, and with which meets which.

        Of one mean per pair the last one also holds the noise. None where a pair is missing, or there are fewer than two of either.
        """
        if min(len(self.sources), len(self.trainings)) < 2 or self.mean(self.sources, self.trainings, width) is None:
            return None
        found = [[self.entry(source, training, width) for training in self.trainings] for source in self.sources]
        values = np.array([[entry.mean for entry in line if entry] for line in found])
        away = values - values.mean()
        images, training = (len(values.T) * away.mean(1) ** 2).sum(), (len(values) * away.mean(0) ** 2).sum()
        whole = (away**2).sum()
        if not whole:
            return None
        parts = {"images": images, "student training": training, "their interaction and noise": whole - images - training}
        return {name: float(100 * part / whole) for name, part in parts.items()}


def factorials(found: Sequence[Block]) -> list[Factorial]:
    """One for each block that has cells of a hosting method, or yardsticks of the same place."""
    made: dict[tuple[Any, ...], Factorial] = {}
    for block in sorted(found, key=lambda block: block.yardstick):
        key = (block.teacher, block.evaluation, block.protocol, block.shared_rules, block.precision, block.teacher_top1)
        hosted = [row for row in block.rows if _is_hosted(row)]
        if hosted:
            _take_in(made.setdefault(key, Factorial(block)), block, hosted)
    for table in made.values():
        table.sources, table.real = (_best_first(its, table.trainings, table) for its in (table.sources, table.real))
        table.trainings = sorted(table.trainings, key=lambda training: -_height(table, table.sources or table.real, [training]))
    return list(made.values())


def _is_hosted(row: Row) -> bool:
    config = _config(row)
    return "host" in config and "student" in config


def _config(row: Row) -> dict[str, Any]:
    return dict(row.settings.get("config", {}))


def _take_in(table: Factorial, block: Block, rows: Sequence[Row]) -> None:
    sources, trainings = _names(rows, "host", _of_source), _names(rows, "student", _of_training)
    for row in rows:
        source, training = sources[_of_source(row)], trainings[_of_training(row)]
        if (source, training) in table.rows:
            source += f" [{row.label}]"
        table.rows[source, training] = row
        into = table.real if block.yardstick else table.sources
        into += [source] * (source not in into)
        table.trainings += [training] * (training not in table.trainings)


def _of_source(row: Row) -> str:
    config = _config(row)
    return canonical_json({name: config.get(name) for name in OF_SOURCE} | {"budget": row.budget})


def _of_training(row: Row) -> str:
    """Settings of the student, but not its training's rate, which is its own unless it was changed."""
    config = _config(row)
    changed = {name: value for name, value in row.changed.items() if name not in (*OF_SOURCE, *FILLED_IN)}
    return canonical_json({"student": config["student"], **changed})


def _names(rows: Sequence[Row], factor: str, key_of: Any) -> dict[str, str]:
    """By key: the factor's value, with the fewest other settings that tell it from others of that value."""
    by_value: dict[str, dict[str, dict[str, str]]] = {}
    for row in rows:
        own = _config(row) if factor == "host" else row.changed
        settings = {name: value for name, value in own.items() if (name in OF_SOURCE) == (factor == "host") and name not in (factor, "yardstick")}
        told = {name: canonical_json(value).replace('"', "") for name, value in settings.items() if name not in FILLED_IN}
        by_value.setdefault(str(_config(row)[factor]), {})[key_of(row)] = told | ({"steps": row.budget} if factor == "host" else {})
    names = {}
    for value, keys in by_value.items():
        differing = [name for name in dict.fromkeys(n for told in keys.values() for n in told) if len({told.get(name) for told in keys.values()}) > 1]
        for key, told in keys.items():
            more = ", ".join(f"{name}={told[name]}" for name in differing if name in told)
            names[key] = f"{value}, {more}" if more else value
    return names


def _best_first(sources: list[str], trainings: list[str], table: Factorial) -> list[str]:
    return sorted(sources, key=lambda source: -_height(table, [source], trainings))


def _height(table: Factorial, sources: Sequence[str], trainings: Sequence[str]) -> float:
    """The mean over all that is there."""
    rows = [row for source in sources for training in trainings if (row := table.rows.get((source, training)))]
    means = [entry.mean for row in rows for entry in row.entries.values()]
    return float(np.mean(means)) if means else -np.inf


def written(table: Factorial) -> Written:
    """Sources down, trainings across, a group of columns for each bit width; means over what is complete; the teacher and rounding below."""
    block, lines = table.block, list[dict[tuple[str, str], str]]()
    widths = table.widths

    def line(name: str, of: Any) -> None:
        columns = {(width, column): of(column, width) for width in widths for column in (*table.trainings, MEAN)}
        lines.append({(IMAGES, IMAGES): name} | columns)

    for source in (*table.sources, *table.real):
        name = source + (" (yardstick)" if source in table.real else "")
        line(name, lambda column, width, source=source: _cell(table, source, column, width))
    if len(table.sources) > 1:
        line("mean, without real images" if table.real else MEAN, lambda column, width: _percent(_mean_of(table, column, width)))
    for name, values in beside(block, widths).items():
        line(name, lambda column, width, values=values: _percent(values.get(width)) if column == MEAN else "-")
    texts = pd.DataFrame(lines)
    texts.index = pd.MultiIndex.from_product([range(len(lines)), ["accuracy"]])
    texts.columns = pd.MultiIndex.from_tuples(list(texts.columns))  # type: ignore[arg-type]
    title = f"Images by training of the student: {block.title}"
    return Written(title, texts, _notes(table, widths), [])


def _cell(table: Factorial, source: str, training: str, width: str) -> str:
    if training == MEAN:
        return _percent(table.mean([source], table.trainings, width))
    row = table.rows.get((source, training))
    return (row and accuracy_of(row, width, counted=False)) or "-"


def _mean_of(table: Factorial, training: str, width: str) -> float | None:
    return table.mean(table.sources, table.trainings if training == MEAN else [training], width)


def _percent(value: float | None) -> str:
    return "-" if value is None or not np.isfinite(value) else f"{value:.{DECIMALS}f}"


def beside(block: Block, widths: Sequence[str]) -> dict[str, Mapping[str, float]]:
    """What the pairs are measured by: rows of the group `reference`, or plain rounding; and the teacher."""
    rows = [row for row in block.rows if not _is_hosted(row) and (row.group == REFERENCE or (row.method == "round" and not row.changed))]
    found: dict[str, Mapping[str, float]] = {row.label: {width: entry.mean for width, entry in row.entries.items()} for row in rows}
    return found | {"teacher, full precision": dict.fromkeys(widths, block.teacher_top1)}


def _notes(table: Factorial, widths: Sequence[str]) -> list[str]:
    entries = [entry for row in table.rows.values() for entry in row.entries.values()]
    rows, steps = list(table.rows.values()), sorted({row.budget for row in table.rows.values()})
    notes = [
        f"rows: where images come from; columns: how the student is trained on them ({', '.join(steps)})",
        f"{table.block.metric.name} in %, rule '{table.block.rule}'"
        + "; ± is the standard deviation over seeds" * any(entry.sd is not None for entry in entries),
        "mean: over the row or column where all of it is there; best to worst mean over all bit widths, from the top and from the left",
    ]
    for width in widths:
        if shares := table.shares(width):
            parts = ", ".join(f"{share:.0f} % {name}" for name, share in shares.items())
            notes.append(f"what the means differ by at {width} (squares, without real images): {parts}")
    notes += ["(yardstick): real images, no data-free method; in no mean over rows"] * bool(table.real)
    return notes + notes_on_lost(rows) + notes_on_warnings(rows)
