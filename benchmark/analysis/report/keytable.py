"""The table that a block of the report begins with: accuracies beside the names, best row first, each leading to its cells. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from dfqbench.analysis import size
from dfqbench.analysis.plots.drawn import Drawn
from dfqbench.analysis.records import said_of
from dfqbench.analysis.tables.blocks import Block, Row
from dfqbench.analysis.tables.choice import Choice, Columns
from dfqbench.analysis.tables.printed import LEFT, WARNED, arranged, notes_of, texts_of
from dfqbench.analysis.warning_signs import REASONS

SIZES = ("size", "compression", "weight-bits", "bops")
OFF = {size.COLUMNS[name].head for name in SIZES[1:]}  # columns that a reader has to ask for


def arrange(drawn: Drawn, sort: str = "") -> Drawn:
    """With the columns of a report, best rows first. sort: as in Choice."""
    sized = any(entry.sizes for block in drawn.blocks for row in block.rows for entry in row.entries.values())
    beside = ("drop", "published", *(SIZES if sized else ()))
    choice = Choice(columns=Columns((), (), beside, ("follows", "steps", "seeds", "seconds")), sort=sort)
    return replace(drawn, blocks=[arranged(block, choice) for block in drawn.blocks])


@dataclass(frozen=True)
class Heading:
    """kind: by what a reader selects columns; what stands beside every accuracy (`drop`) is one kind. number: set flush right; off: at first."""

    name: str
    kind: str
    number: bool
    off: bool


@dataclass(frozen=True)
class Figure:
    """What stands in one place. value: what it is sorted by, None where its text says it; under: small, below it; more: on hover; to: its cells."""

    text: str
    value: float | None = None
    strong: bool = False
    under: str = ""
    more: str = ""
    to: str = ""


@dataclass(frozen=True)
class Line:
    """A row. group: as its sweep calls it, empty for none; to: its cells."""

    name: str
    group: str
    to: str
    figures: list[Figure]

    def under(self, heads: list[Heading]) -> list[tuple[Heading, Figure]]:
        """Figures with the headings they stand under; heads: all of the table's, or its first."""
        return list(zip(heads, self.figures, strict=False))


@dataclass(frozen=True)
class KeyTable:
    """number: of the block in the page, as links to cells have it."""

    number: int
    block: Block
    heads: list[Heading]
    lines: list[Line]
    notes: list[str]


def key_tables(drawn: Drawn) -> list[KeyTable]:
    """One per block, in their order."""
    said = {failure["id"]: said_of(failure) for failure in drawn.reading.failures}
    return [_key_table(block, number, said) for number, block in enumerate(drawn.blocks)]


def place_of_cells(drawn: Drawn) -> dict[str, tuple[int, int]]:
    """(number of the block, number of the row in it) by cell id."""
    rows = [(place, row) for place, block in enumerate(drawn.blocks) for row in enumerate(block.rows)]
    return {cell_id: (place, number) for place, (number, row) in rows for width in _widths(row) for cell_id in ids_of(row, width)}


def ids_of(row: Row, width: Any) -> list[str]:
    """Finished cells, then those that diverged or failed."""
    entry, lost = row.entries.get(width), row.lost.get(width)
    return [*(entry.ids if entry else ()), *(lost.ids if lost else ())]


def _widths(row: Row) -> set[Any]:
    return row.entries.keys() | row.lost.keys()


def _key_table(block: Block, number: int, said: dict[str, str]) -> KeyTable:
    texts, bold = texts_of(block)
    columns: list[Any] = list(texts.columns)
    accuracies = [columns.index((width, width)) for width in block.widths]
    order = [*accuracies, *(i for i in range(1, len(columns)) if i not in accuracies)]
    lines = []
    for i, row in enumerate(block.rows):
        to = f"#row={number}.{i}"
        figures = []
        for column in order:
            text, strong, width = str(texts.iat[i, column]), bool(bold.iat[i, column]), columns[column][0]
            measured = column in accuracies and ids_of(row, width)
            figures.append(_accuracy(row, width, text, strong, f"{to}.{width}", said) if measured else Figure(text))
        lines.append(Line(row.label + row.mark, row.group, to, figures))
    return KeyTable(number, block, [_heading(columns[i], block, list(texts.iloc[:, i])) for i in order], lines, notes_of(block))


def _heading(column: Any, block: Block, texts: list[str]) -> Heading:
    """texts: what stands below it; a column that is for the most part empty is off."""
    group, name = map(str, column)
    off = name in OFF or 2 * texts.count("-") > len(texts)
    if group not in block.widths:
        return Heading(name, name, name not in LEFT, off)
    return Heading(name.upper(), name, True, False) if name == group else Heading(f"{name} {group.upper()}", name, True, off)


def _accuracy(row: Row, width: str, text: str, strong: bool, to: str, said: dict[str, str]) -> Figure:
    entry, lost = row.entries.get(width), row.lost.get(width)
    more = []
    if entry:
        more.append(f"seeds {', '.join(map(str, sorted(entry.seeds)))}")
        if interval := entry.estimate:
            more.append(f"95 % interval {interval.low:.2f} to {interval.high:.2f}")
        if against := entry.against_best:
            more.append(f"{against.value:+.2f} against the best, p {against.p:.2g} (Holm)")
        more += [REASONS[kind] for kind in entry.warnings]
    more += [f"cell {cell_id}: {said[cell_id]}" for cell_id in (lost.ids if lost else ()) if cell_id in said]
    mark = WARNED * text.endswith(WARNED)
    text, _, under = text.removesuffix(mark).partition(" (" if entry else ", ")  # how many diverged, and when
    return Figure(text + mark, entry.mean if entry else None, strong, under.removesuffix(")"), "\n".join(more), to)
