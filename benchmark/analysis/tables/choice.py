"""Which rows and columns are shown, and in which order: what `table`, `plot` and `report` are asked for. No torch here."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from dfqbench.analysis import size
from dfqbench.analysis.names import keep
from dfqbench.analysis.records import Reading
from dfqbench.errors import UserError, nearest

WIDTH = re.compile(r"w\d+a\d+")
OF_ROWS = ("follows", "steps", "seeds", "seconds")  # columns with one figure for a row
BESIDE = ("drop", "published", *size.COLUMNS)  # beside each accuracy
SORTABLE = ("method", "steps", "seconds", *size.COLUMNS)
REFERENCE = "reference"  # the group of rows that stand first whatever their accuracy


@dataclass(frozen=True)
class Columns:
    """lead: before the accuracies; widths: in this order, empty for all from wide to narrow; beside: each accuracy; last: after them."""

    lead: tuple[str, ...] = ("follows", "steps", "seeds")
    widths: tuple[str, ...] = ()
    beside: tuple[str, ...] = ("drop", "published")
    last: tuple[str, ...] = ("seconds",)

    @classmethod
    def of(cls, given: str) -> Columns:
        """`w4a4,w3a3,size,seconds`: these alone, in this order; `+size,+bops`: as usual, and these. Raises UserError for an unknown one."""
        names = list(dict.fromkeys(name.strip() for name in given.split(",") if name.strip()))
        for name in names:
            plain = name.removeprefix("+")
            if not WIDTH.fullmatch(name) and plain not in (*OF_ROWS, *BESIDE):
                raise UserError(f"--columns {name!r}: {nearest(plain, [*OF_ROWS, *BESIDE])}, or a bit width like w4a4")
        usual, more, alone = cls(), [n.removeprefix("+") for n in names if n.startswith("+")], [n for n in names if not n.startswith("+")]
        if not alone:
            new = [name for name in more if name not in (*usual.lead, *usual.beside, *usual.last)]
            return cls(beside=(*usual.beside, *(name for name in new if name in BESIDE)))
        if more:
            raise UserError(f"--columns {given}: either these columns alone, or with + before each name the usual ones and these")
        first = next((place for place, name in enumerate(alone) if name not in OF_ROWS), len(alone))
        return cls(
            tuple(alone[:first]),
            tuple(name for name in alone if WIDTH.fullmatch(name)),
            tuple(name for name in alone if name in BESIDE),
            tuple(name for name in alone[first:] if name in OF_ROWS),
        )


USUAL = Columns()


@dataclass(frozen=True)
class Choice:
    """rows: patterns, of which a row matches one; none: all. sort: a bit width or a column, empty for the narrowest width."""

    rows: tuple[str, ...] = ()
    columns: Columns = USUAL
    sort: str = ""
    best_first: bool = True

    def __post_init__(self) -> None:
        if self.sort and not WIDTH.fullmatch(self.sort) and self.sort not in SORTABLE:
            raise UserError(f"--sort {self.sort!r}: {nearest(self.sort, SORTABLE)}, or a bit width like w3a3")

    def of(self, reading: Reading) -> Reading:
        """The chosen cells of a reading whose rows have their names. Only these are compared. Raises UserError for a row or width that it lacks."""
        cells = [record["cell"] for record in (*reading.results, *reading.without_data, *reading.failures)]
        for pattern in self.rows:
            if not any(_matches(pattern, cell) for cell in cells):
                raise UserError(f"--rows {pattern!r}: no row matches; {nearest(pattern, {str(cell.get('label', '')) for cell in cells})}")
        widths = {str(cell.get("bits")) for cell in cells}
        for option, asked in (("--columns", self.columns.widths), ("--sort", [self.sort] if WIDTH.fullmatch(self.sort) else [])):
            for width in asked:
                if width not in widths:
                    raise UserError(f"{option} {width}: no cell has this bit width; there are {', '.join(sorted(widths, reverse=True))}")
        if not (self.rows or self.columns.widths):
            return reading
        return keep(reading, lambda cell: self._holds(cell))

    def _holds(self, cell: dict[str, Any]) -> bool:
        row = not self.rows or any(_matches(pattern, cell) for pattern in self.rows)
        return row and (not self.columns.widths or cell.get("bits") in self.columns.widths)

    def widths(self, there: Iterable[str]) -> list[str]:
        """Those of `there` that are shown, in order."""
        found = list(there)
        return [width for width in self.columns.widths if width in found] if self.columns.widths else found

    def ordered(self, rows: Sequence[Any], columns: Sequence[Any]) -> list[Any]:
        """Rows of a table, blocks.Row, with these columns (bit widths, or of blocks side by side (block, bit width)): those of the group `reference`
        first, then the others from best to worst, last those that lack a column or diverged in one.

        Best is the highest accuracy at the width of `sort`, or at the narrowest; for other columns the least (size, seconds, steps). Blocks side by
        side go by how far a row is above the means of its columns, unless a width is asked for.
        """
        wanted = [column for column in columns if _width(column) == self.sort] or ([] if any(isinstance(c, tuple) for c in columns) else columns[-1:])

        def figure(row: Any) -> float | None:
            if self.sort in ("steps", "seconds"):
                return float(row.steps or 0) if self.sort == "steps" else float(row.cost.low)
            if self.sort in size.COLUMNS:
                known = [entry.sizes for column in columns if (entry := row.entries.get(column)) and entry.sizes]
                return size.COLUMNS[self.sort].value(known[-1]) if known else None
            means = [row.entries[column].mean for column in wanted if column in row.entries] if wanted else [row.above]
            return -float(sum(means)) / len(means) if means else None

        def key(row: Any) -> tuple[Any, ...]:
            lacks = any(not row.complete(column) for column in columns)
            if self.sort == "method":
                return row.group != REFERENCE, False, row.label
            value = figure(row)
            known = value is not None and value == value
            return row.group != REFERENCE, lacks, not known, (value or 0) * (1 if self.best_first else -1) if known else 0, -row.above, row.label

        return sorted(rows, key=key)

    def in_words(self, rows: Sequence[Any], columns: Sequence[Any]) -> str:
        """How `ordered` orders."""
        first = "those of the group reference, then " * any(row.group == REFERENCE for row in rows)
        by = self.sort or ("mean distance to the columns' means" if any(isinstance(column, tuple) for column in columns) else str(columns[-1]))
        if self.sort == "method":
            return f"rows: {first}by name"
        order = "best to worst" if self.best_first else "worst to best"
        last = ", those that lack a column or diverged in one last" * any(not row.complete(column) for row in rows for column in columns)
        return f"rows: {first}{order} by {by}{last}"


EVERYTHING = Choice()


def _width(column: Any) -> Any:
    return column[1] if isinstance(column, tuple) else column


def _matches(pattern: str, cell: dict[str, Any]) -> bool:
    """`/acq|gdfq/` is a regular expression that is looked for, everything else a glob that has to fit; whatever the case."""
    names = [str(cell.get(key) or "") for key in ("label", "settings", "method")]
    if len(pattern) > 2 and pattern.startswith("/") and pattern.endswith("/"):
        try:
            return any(re.search(pattern[1:-1], name, re.IGNORECASE) for name in names)
        except re.error as error:
            raise UserError(f"--rows {pattern!r}: not a regular expression: {error}") from None
    return any(name.lower() == pattern.lower() or fnmatch.fnmatchcase(name.lower(), pattern.lower()) for name in names)
