"""Tables in a terminal: columns that do not fit are left out by name or moved to a table below; a number is never cut. No torch here."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

from dfqbench.analysis.tables.blocks import Ranking
from dfqbench.analysis.tables.formats import Tables, ranking_lines
from dfqbench.analysis.tables.sheets import LEFT, Line, Sheet, Text, columns_of, in_pieces, sheet, widths_of

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text as Rich

NARROWEST = 16  # characters to which a method's name is folded
GAP = 2


def print_tables(found: Tables, ranking: Ranking | None, console: Console) -> None:
    """In a narrow terminal long settings wrap; a file's lines are as long as need be."""
    from rich.text import Text as Rich

    for table in map(sheet, found):
        shown, left_out = _fitting(table, console.width if console.is_terminal else None)
        console.print()
        console.print(Rich(table.title, style="bold"), soft_wrap=True)
        if table.groups:
            _print_groups(shown, console)
        else:
            _print_plain(shown, console)
        notes = [f"left out, this terminal is narrow: {', '.join(left_out)}"] if left_out else []
        for note in notes + table.notes:
            console.print(Rich(f"  {note}", style="dim"), soft_wrap=True)
    if ranking:
        console.print()
        for line in ranking_lines(ranking):
            console.print(Rich(line), soft_wrap=True)


def _fitting(table: Sheet, room: int | None) -> tuple[Sheet, list[str]]:
    """Without the least important columns until the rest fits, the method's name folded to no less than NARROWEST."""
    left_out: list[str] = []
    for name in ("follows", "drop", "steps x batch", "seeds", "published"):
        if room is None or _least_width(table) <= room:
            break
        keep = [i for i, head in enumerate(table.heads) if head != name]
        left_out += [name] * (len(keep) < len(table.heads))
        table = columns_of(table, keep)
    return table, left_out


def _least_width(table: Sheet) -> int:
    """Characters of a line with the name folded; of columns under groups only the widest counts, for the others can go below."""
    name, *others = [width + GAP for width in widths_of(table)]
    first = table.first - 1 if table.groups else len(others)
    return min(name, NARROWEST + GAP) + sum(others[:first]) + max(others[first:], default=0)


def _print_plain(table: Sheet, console: Console) -> None:
    from rich.console import Console
    from rich.table import Table

    place = console if console.is_terminal else Console(file=console.file, width=sum(width + GAP for width in widths_of(table, stars=True)))
    shown = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0))
    for head in table.heads:
        shown.add_column(head, justify="left" if head in LEFT else "right", no_wrap=head != "method", overflow="fold")
    for line in table.lines:
        shown.add_row(*(_in_terminal(cell, console.is_terminal) for cell in line.cells))
    place.print(shown)


def _in_terminal(cell: Text, is_terminal: bool) -> Rich:
    from rich.text import Text as Rich

    if not cell.bold:
        return Rich(cell.text)
    return Rich(cell.text, style="bold") if is_terminal else Rich(f"**{cell.text}**")


def _print_groups(table: Sheet, console: Console) -> None:
    """One table below the other, each with the names and as many columns as fit. Written by hand: rich has no heading over several columns."""
    name, *others = widths_of(table, stars=not console.is_terminal)
    first = table.first - 1
    everything = sum(width + GAP for width in (name, *others))
    if console.is_terminal and everything > console.width:  # a long name folds, so that more columns fit beside it
        least = sum(width + GAP for width in others[:first]) + max(others[first:]) + 2 * GAP
        name = min(name, max(NARROWEST, min(console.width // 4, console.width - least)))
    room = console.width if console.is_terminal else everything
    for number, piece in enumerate(in_pieces(table, room, [width + GAP for width in (name, *others)])):
        if number:
            console.print()
        widths = [name, *widths_of(piece, stars=not console.is_terminal)[1:]]
        printed = _headings(piece, widths) + [part for line in piece.lines for part in _printed(line, widths, console.is_terminal)]
        for part in printed:
            console.print(part, soft_wrap=True)


def _headings(table: Sheet, widths: list[int]) -> list[Rich]:
    """The groups over their columns, underlined, then the columns' own headings."""
    from rich.text import Text as Rich

    gap, wrapped, column = " " * GAP, list[tuple[int, list[str]]](), table.first
    for heading, count in table.groups:
        wide = sum(widths[column : column + count]) + GAP * (count - 1)
        wrapped.append((wide, textwrap.wrap(heading, wide)))
        column += count
    deep = max(len(lines) for _, lines in wrapped)
    start = " " * sum(width + GAP for width in widths[: table.first])
    above = [start + gap.join(([""] * (deep - len(lines)) + lines)[i].center(wide) for wide, lines in wrapped) for i in range(deep)]
    above.append(start + gap.join("─" * wide for wide, _ in wrapped))
    heads = gap.join(head.ljust(width) if head in LEFT else head.rjust(width) for head, width in zip(table.heads, widths, strict=True))
    return [Rich(line.rstrip()) for line in above] + [Rich(heads, style="bold")]


def _printed(line: Line, widths: list[int], is_terminal: bool) -> list[Rich]:
    """A line with its name folded; one that says more about the line above is indented and dim."""
    from rich.text import Text as Rich

    name = ("  " if line.under else "") + line.cells[0].text
    first, *more = textwrap.wrap(name, widths[0], subsequent_indent="  ")
    shown = Rich(first.ljust(widths[0]), style="dim" if line.under else "")
    for cell, width in zip(line.cells[1:], widths[1:], strict=True):
        printed = _in_terminal(cell, is_terminal)
        shown.append(" " * (GAP + width - len(printed)))
        shown.append_text(printed)
    return [shown, *(Rich(rest) for rest in more)]
