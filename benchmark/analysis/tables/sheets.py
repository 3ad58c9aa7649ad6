"""What a table prints, whatever it is printed in: headings, groups of columns, lines. No torch here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from dfqbench.analysis.tables.blocks import Block, Entry, Row
from dfqbench.analysis.tables.wide import WideRow, WideTable

LEFT = ("method", "follows")
BESIDE = ("drop", "published")  # columns that belong to the bit width before them


@dataclass(frozen=True)
class Text:
    """One printed entry of a table."""

    text: str
    bold: bool = False


@dataclass(frozen=True)
class Line:
    """One printed line; `under`: it says more about the line above."""

    cells: list[Text]
    under: bool = False


@dataclass(frozen=True)
class Sheet:
    """One table as every format prints it. groups: headings over columns, each with how many; the first columns stand under none."""

    title: str
    heads: list[str]
    lines: list[Line]
    notes: list[str]
    groups: list[tuple[str, int]] = field(default_factory=list)

    @property
    def first(self) -> int:
        """How many columns stand under no group."""
        return len(self.heads) - sum(count for _, count in self.groups)


def sheet(table: Block | WideTable) -> Sheet:
    if isinstance(table, WideTable):
        return _wide(table)
    heads, rows = grid(table)
    return Sheet(table.title, heads, [Line(row) for row in rows], table.notes)


def widths_of(found: Sheet, stars: bool = False) -> list[int]:
    """Characters of every column; bold takes four more where it is written with stars."""
    extra = 4 if stars else 0
    columns = zip(found.heads, *(line.cells for line in found.lines), strict=True)
    return [max(len(head), *(len(cell.text) + extra * cell.bold for cell in cells)) for head, *cells in columns]


def grid(block: Block) -> tuple[list[str], list[list[Text]]]:
    """Column headings and rows, as every format prints them."""
    columns: list[tuple[str, Callable[[Row], Text]]] = [
        ("method", lambda row: Text(row.label + row.mark)),
        ("follows", lambda row: Text(row.fidelity)),
        ("steps x batch", lambda row: Text(row.budget)),
        ("seeds", lambda row: Text(row.seeds)),
    ]
    for width in block.widths:
        columns += [
            (width, partial(_of_entry, width, lambda e: Text(str(e), e.best))),
            ("drop", partial(_of_entry, width, _drop)),
        ]
        if any(width in row.entries and row.entries[width].published for row in block.rows):
            columns.append(("published", partial(_of_entry, width, lambda e: Text(claim_of(e)))))
    columns.append(
        (f"{block.time}/cell".replace("seconds", "s"), lambda row: Text(f"{row.seconds:.0f}" if row.seconds >= 10 else f"{row.seconds:.2g}"))
    )
    return [head for head, _ in columns], [[text_of(row) for _, text_of in columns] for row in block.rows]


def grouped_by_width(found: Sheet) -> Sheet:
    """A bit width, its drop and what is published about it as one group without a heading, for `in_pieces`; what has groups is left as it is."""
    if found.groups:
        return found
    counts: list[int] = []
    for head in found.heads[found.heads.index("seeds") + 1 :]:
        if head in BESIDE:
            counts[-1] += 1
        else:
            counts.append(1)
    return replace(found, groups=[("", count) for count in counts])


def _of_entry(width: str, text_of: Callable[[Entry], Text], row: Row) -> Text:
    return text_of(row.entries[width]) if width in row.entries else Text("-")


def _drop(entry: Entry) -> Text:
    return Text(f"{entry.drop:.2f}".replace("-0.00", "0.00"))


def claim_of(entry: Entry) -> str:
    """`90.11-90.25 (-3.2 se)`: what is published, and how far the measured mean is from it in its own standard errors."""
    if entry.published is None:
        return "-"
    distance = entry.published.distance(entry.mean)
    return f"{entry.published} ({distance / entry.error:+.1f} se)" if entry.error > 0 else f"{entry.published} ({distance:+.2f})"


def _wide(table: WideTable) -> Sheet:
    """A line of accuracies per row, one of drops under it, and one of what is published where something is."""
    lines = []
    for row in table.rows:
        accuracies = _of_columns(table, row, lambda e: Text(f"{e} ({e.n})", e.best))
        lines.append(Line([Text(row.label + row.mark), Text(row.budget), *accuracies]))
        lines.append(Line([Text("drop"), Text(""), *_of_columns(table, row, _drop)], under=True))
        if any(entry and entry.published for entry in (row.entry(*column) for column in table.columns)):
            lines.append(Line([Text("published"), Text(""), *_of_columns(table, row, lambda e: Text(claim_of(e)))], under=True))
    groups = [(table.heading(i), len(block.widths)) for i, block in enumerate(table.blocks)]
    return Sheet(table.title, ["method", "steps x batch", *(width for _, width in table.columns)], lines, table.notes, groups)


def _of_columns(table: WideTable, row: WideRow, text_of: Callable[[Entry], Text]) -> list[Text]:
    return [text_of(entry) if (entry := row.entry(*column)) else Text("-") for column in table.columns]


def in_pieces(found: Sheet, room: int, widths: Sequence[int]) -> list[Sheet]:
    """The columns under groups dealt out to sheets of at most `room` characters, each with the first columns; a group is kept whole where it fits.

    widths: of every column, with the space between. A single column that is wider than the room is a sheet of its own.
    """
    left, column = room - sum(widths[: found.first]), found.first
    pieces: list[list[tuple[int, int]]] = [[]]  # (group, column)
    taken = 0
    for group, (_, count) in enumerate(found.groups):
        whole = sum(widths[column : column + count])
        if pieces[-1] and taken + whole > left >= whole:
            pieces.append([])
            taken = 0
        for i in range(column, column + count):
            if pieces[-1] and taken + widths[i] > left:
                pieces.append([])
                taken = 0
            pieces[-1].append((group, i))
            taken += widths[i]
        column += count
    return [_piece(found, piece) for piece in pieces]


def _piece(found: Sheet, chosen: list[tuple[int, int]]) -> Sheet:
    counts = Counter(group for group, _ in chosen)
    groups = [(found.groups[group][0], count) for group, count in counts.items()]
    return columns_of(replace(found, groups=groups), [*range(found.first), *(i for _, i in chosen)])


def columns_of(found: Sheet, chosen: Sequence[int]) -> Sheet:
    """Only these columns; groups are left as they are."""
    lines = [Line([line.cells[i] for i in chosen], line.under) for line in found.lines]
    return replace(found, heads=[found.heads[i] for i in chosen], lines=lines)
