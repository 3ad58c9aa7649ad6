"""Tables in a terminal: columns that do not fit are left out by name or moved to a table below; a number is never cut, a line breaks between words.

No torch here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import pandas as pd
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dfqbench.analysis.tables.printed import GAP, LEFT, Tables, groups_of, in_pieces, lead_of, names_of, notes_of, texts_of, widths_of
from dfqbench.analysis.tables.wide import WideTable

LEAST_IMPORTANT = ("follows", "drop", "steps x batch", "seeds", "published")  # columns, in the order in which they are left out
NARROWEST = 16  # characters to which a method's name is folded
PARTS = re.compile(r"[^ (,=_/-]*[ (,=_/-]?")  # of a line that may end there


def print_tables(found: Tables, ranks: Sequence[str], console: Console) -> None:
    """In a narrow terminal names fold; a file's lines are as long as need be, with stars around what is bold."""
    place = console if console.is_terminal else Console(file=console.file, width=100_000)
    for table in found:
        texts, bold = texts_of(table)
        lines = texts.map(Text).mask(bold, texts.map(lambda text: Text(text, style="bold") if console.is_terminal else Text(f"**{text}**")))
        wide, room, left_out = isinstance(table, WideTable), place.width + GAP, list[str]()
        narrowest = GAP + (max(NARROWEST, place.width // 4) if wide else NARROWEST)  # names get more room where columns can go below
        for name in LEAST_IMPORTANT:
            widths, naming = widths_of(lines), lead_of(lines)
            needed = min(widths[0], narrowest) + sum(widths[1:naming]) + (max if wide else sum)(widths[naming:])
            if needed > room and name in names_of(lines):
                lines = lines.drop(columns=name, level=1)
                left_out.append(name)
        place.print("", Text(_folded(table.title, place.width), style="bold"), sep="\n", soft_wrap=True)
        widths = widths_of(lines)
        widths[0] = min(widths[0], max(narrowest, room - sum(widths[1:])))
        for number, piece in enumerate(in_pieces(lines, widths, room)):
            if number:
                place.print()
            _print(lines.iloc[:, piece], [widths[i] - GAP for i in piece], place)
        for note in [f"left out, this terminal is narrow: {', '.join(left_out)}"] * bool(left_out) + notes_of(table):
            place.print(Text(f"  {_folded(note, place.width - 2, '    ')}", style="dim"), soft_wrap=True)
    for line in ["", *ranks] if ranks else []:
        place.print(Text(_folded(line, place.width, "  ")), soft_wrap=True)


def _folded(text: str, width: int, indent: str = "", parts: re.Pattern[str] = re.compile(r"\S* ?")) -> str:
    """In lines of at most `width` characters, the second and later ones indented; a part that is longer than a line is cut."""
    rows = [""]
    for part in parts.findall(text):
        if len(rows[-1]) + len(part.rstrip()) > width and rows[-1].strip():
            rows[-1] = rows[-1].rstrip()
            rows.append(indent)
        while len(rows[-1]) + len(part.rstrip()) > width:
            room = max(width - len(rows[-1]), 1)
            rows[-1], part = rows[-1] + part[:room], part[room:]
            rows.append(indent)
        rows[-1] += part
    return "\n".join(rows).rstrip()


def _print(lines: pd.DataFrame, widths: list[int], place: Console) -> None:
    """Headings over their columns, which rich does not have, are a table of their own."""
    headings, body = Table.grid(padding=(0, GAP, 0, 0)), Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0))
    groups = [(heading, sum(widths[i] for i in places) + GAP * (len(places) - 1)) for heading, places in groups_of(lines)]
    for _, width in groups:
        headings.add_column(width=width, justify="center", vertical="bottom", overflow="fold")
    headings.add_row(*(heading for heading, _ in groups))
    headings.add_row(*("─" * width if heading else "" for heading, width in groups))
    if any(heading for heading, _ in groups):
        place.print(headings)
    for name, width in zip(names_of(lines), widths, strict=True):
        body.add_column(name, width=width, justify="left" if name in LEFT else "right", overflow="fold")
    for (_, says), (name, *others) in zip(lines.index, lines.to_numpy(), strict=True):
        under = says != "accuracy"
        shown = Text(_folded(str(name), widths[0], parts=PARTS))
        body.add_row(Text("  ") + shown if under else shown, *others, style="dim" if under else "")
    place.print(body)
