"""Blocks side by side: one table of methods by networks and bit widths. What differs in protocol or precision stays apart. No torch here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from dfqbench.analysis.tables.blocks import Block, Row, marks_of, worst_first
from dfqbench.sweep.cell import canonical_json, fingerprint, leaves

JOINED = "†"  # marks a row whose cells differ, between networks, in settings that its name does not show


@dataclass
class WideTable:
    """Two blocks or more under one protocol and precision: their widths are the columns, (index of the block, width).

    Rows go from worst to best, until they are `arranged`; order: in words.
    """

    title: str
    blocks: list[Block]
    columns: list[tuple[int, str]]
    rows: list[Row]
    marks: dict[str, str]
    order: str = ""


def side_by_side(found: Sequence[Block]) -> list[Block | WideTable]:
    """Blocks of equal protocol and precision joined, in the order in which they first appear; a block that has no such neighbour stays as it is."""
    groups: dict[tuple[str, str, bool, str], list[Block]] = {}
    for block in found:
        groups.setdefault((block.protocol, block.precision, block.yardstick, block.shared_rules), []).append(block)
    named = Counter(key[:3] for key in groups)
    return [_joined(group, named[key[:3]] > 1) if len(group) > 1 else group[0] for key, group in groups.items()]


def _joined(group: list[Block], names_rules: bool) -> WideTable:
    what = "Yardsticks, trained on real images," if group[0].yardstick else "Methods"
    title = f"{what} by networks and bit widths: protocol {group[0].protocol}, {group[0].precision}"
    title += f" [rules {fingerprint(group[0].shared_rules)[:8]}]" if names_rules else ""
    found = _matched(group)
    rules = [[str(sorted(part.settings["protocol"].items())) for part in parts.values()] for parts in found]
    marks = marks_of([given for its in rules for given in its])
    rows = []
    for parts, (own, *_) in zip(found, rules, strict=True):
        first, flat = next(iter(parts.values())), [dict(leaves(part.settings)) for part in parts.values()]
        names = {name for settings in flat for name in settings}
        differing = sorted(n.removeprefix("config.") for n in names if len({canonical_json(settings.get(n)) for settings in flat}) > 1)
        entries = {(i, width): entry for i, part in parts.items() for width, entry in part.entries.items()}
        lost = {(i, width): of for i, part in parts.items() for width, of in part.lost.items()}
        rows.append(replace(first, label=first.name, entries=entries, lost=lost, mark=marks[own] + JOINED * bool(differing), differing=differing))
    return WideTable(title, group, [(i, width) for i, block in enumerate(group) for width in block.widths], worst_first(rows), marks)


def _matched(group: list[Block]) -> list[dict[int, Row]]:
    """The rows of the blocks that are one row of the table; where one block has several of a name and budget, all their settings must agree."""
    keyed = [(i, canonical_json([r.method, r.changed, r.name, r.steps, r.batch]), r) for i, block in enumerate(group) for r in block.rows]
    several = {key for (_, key), count in Counter((i, key) for i, key, _ in keyed).items() if count > 1}
    found: dict[tuple[str, str], dict[int, Row]] = {}
    for i, key, row in keyed:
        found.setdefault((key, fingerprint(row.settings) if key in several else ""), {})[i] = row
    return list(found.values())
