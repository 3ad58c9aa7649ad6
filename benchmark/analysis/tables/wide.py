"""Blocks side by side: one table of methods by networks and bit widths. What differs in protocol or precision stays apart. No torch here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dfqbench.analysis.tables.blocks import Block, Entry, Row, budget_in_words, make_unique
from dfqbench.analysis.tables.notes import marks_of, table_notes
from dfqbench.sweep.cell import canonical_json, fingerprint, leaves

JOINED = "†"  # marks a row whose cells differ, between networks, in settings that its name does not show


@dataclass
class WideRow:
    """A method with the same changed settings and the same budget, wherever it was measured. parts: its row in each block, by the block's index."""

    label: str
    method: str
    fidelity: str
    steps: int
    batch: int
    parts: dict[int, Row]
    mark: str = ""

    @property
    def budget(self) -> str:
        return budget_in_words(self.steps, self.batch)

    def entry(self, block: int, width: str) -> Entry | None:
        return self.parts[block].entries.get(width) if block in self.parts else None


@dataclass
class WideTable:
    """Two blocks or more under one protocol and precision: their widths are the columns. Rows go from worst to best."""

    title: str
    blocks: list[Block]
    rows: list[WideRow]
    notes: list[str] = field(default_factory=list)

    @property
    def columns(self) -> list[tuple[int, str]]:
        """(index of the block, width) from left to right."""
        return [(i, width) for i, block in enumerate(self.blocks) for width in block.widths]

    def heading(self, block: int) -> str:
        """`resnet20, 92.00 %, on cifar10 (10000 images)`: what a group of columns was measured on."""
        found = self.blocks[block]
        return f"{found.teacher}, {found.teacher_top1:.2f} %, on {found.evaluation} ({found.images} images){found.told_apart}"


def side_by_side(found: Sequence[Block]) -> list[Block | WideTable]:
    """Blocks of equal protocol and precision joined, in the order in which they first appear; a block that has no such neighbour stays as it is."""
    groups: dict[tuple[str, str, str], list[Block]] = {}
    for block in found:
        groups.setdefault((block.protocol, block.shared_rules, block.precision), []).append(block)
    named = [(protocol, precision) for protocol, _, precision in groups]
    tables: list[Block | WideTable] = []
    for (protocol, rules, precision), group in groups.items():
        if len(group) == 1:
            tables.append(group[0])
            continue
        title = f"Methods by networks and bit widths: protocol {protocol}, {precision}"
        if named.count((protocol, precision)) > 1:
            title += f" [rules {fingerprint(rules)[:8]}]"
        tables.append(_joined(title, group))
    return tables


def _joined(title: str, group: list[Block]) -> WideTable:
    rows = [WideRow(r.name, r.method, r.fidelity, r.steps, r.batch, parts) for parts in _matched(group) for r in [next(iter(parts.values()))]]
    table = WideTable(title, group, rows)
    distances = _distances(table)
    rows.sort(key=lambda row: (distances[id(row)], row.label, row.budget))
    make_unique(rows)
    marks = marks_of([_rules(part) for row in rows for part in row.parts.values()])
    own = []
    for row in rows:
        row.mark = marks[_rules(next(iter(row.parts.values())))]
        if differing := _differing([part.settings for part in row.parts.values()]):
            row.mark += JOINED
            own.append(f"{JOINED} {row.label} ({row.budget}) is not the same everywhere, it differs in {', '.join(differing)}")
    own.append("follows " + "; ".join(f"'{fidelity}': {', '.join(names)}" for fidelity, names in _by_fidelity(rows).items()))
    table.notes = ["in a cell: mean ± sd (seeds)", *table_notes(group, rows, marks, own)]
    return table


def _by_fidelity(rows: list[WideRow]) -> dict[str, list[str]]:
    methods = {row.method: row.fidelity for row in rows}
    return {fidelity: sorted(name for name, found in methods.items() if found == fidelity) for fidelity in sorted(set(methods.values()))}


def _matched(group: list[Block]) -> Iterator[dict[int, Row]]:
    """The rows of the blocks that are one row of the table; where one block has several of a name and budget, all their settings must agree."""
    keyed = [
        (i, canonical_json([row.method, row.changed, row.name, row.steps, row.batch]), row) for i, block in enumerate(group) for row in block.rows
    ]
    several = {key for (_, key), rows in Counter((i, key) for i, key, _ in keyed).items() if rows > 1}
    found: dict[tuple[str, str], dict[int, Row]] = {}
    for i, key, row in keyed:
        found.setdefault((key, fingerprint(row.settings) if key in several else ""), {})[i] = row
    yield from found.values()


def _rules(row: Row) -> str:
    return str(sorted(row.settings["protocol"].items()))


def _distances(table: WideTable) -> dict[int, float]:
    """How far each row lies above the mean of its columns, on average: rows need not be in every column to be ordered."""
    above: dict[int, list[float]] = {}
    for column in table.columns:
        there = [(id(row), entry.mean) for row in table.rows if (entry := row.entry(*column))]
        middle = float(np.mean([mean for _, mean in there]))
        for row, mean in there:
            above.setdefault(row, []).append(mean - middle)
    return {row: float(np.mean(values)) for row, values in above.items()}


def _differing(settings: list[dict[str, Any]]) -> list[str]:
    """The settings (`student_lr`, `method_version`, `protocol.ranges`) in which they do not all agree."""
    flat = [dict(leaves(given)) for given in settings]
    names = {name for found in flat for name in found}
    return sorted(name.removeprefix("config.") for name in names if len({canonical_json(found.get(name)) for found in flat}) > 1)
