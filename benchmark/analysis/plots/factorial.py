"""Heat map of sources of images by trainings of the student."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from dfqbench.analysis.plots.drawn import FEWER, Drawn, NothingToDraw, floor_of
from dfqbench.analysis.plots.layout import SMALL, USUAL, extent, wrapped_to
from dfqbench.analysis.plots.sheet import Sheet, columns_in, grid_pages
from dfqbench.analysis.plots.style import GREY, block_title
from dfqbench.analysis.tables.factorial import MEAN, Factorial, beside, factorials

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CELL, PITCH, GAP = 25.0, 13.0, 3.0  # points: a cell's least width, a row, before means and yardsticks
NAMES = 0.38  # of a panel's width, for the names of sources at most


@dataclass(frozen=True)
class Map:
    """One bit width of one table. rows: sources, yardsticks and the mean, with the number of gaps above each."""

    table: Factorial
    width: str
    title: str
    rows: list[tuple[str, int]]

    @property
    def columns(self) -> list[str]:
        return [*self.table.trainings, MEAN]

    def cell(self, source: str, training: str) -> tuple[str, float]:
        """What a place says, and the accuracy that colours it (NaN for none)."""
        table, width = self.table, self.width
        if MEAN in (source, training):
            sources = table.sources if source == MEAN else [source]
            value = table.mean(sources, table.trainings if training == MEAN else [training], width)
            return ("-", np.nan) if value is None else (f"{value:.1f}", value)
        row = table.rows.get((source, training))
        if row is None or (width not in row.entries and width not in row.lost):
            return "-", np.nan
        if width not in row.entries:
            return "lost", np.nan
        value = row.entries[width].mean
        return f"{value:.1f}" + "*" * (width in row.lost), value


def factorial(drawn: Drawn) -> list[Figure]:
    """Accuracy of every source of images with every training of the student, a panel for each bit width, with means and yardsticks set apart."""
    tables = factorials(drawn.blocks)
    if not tables:
        raise NothingToDraw("no student was trained on a host's images: give some in the config, like {qat: {host: gdfq, student: [gdfq, kl]}}")
    blocks = [table.block for table in tables]
    panels = [_map(table, width, block_title(table.block, blocks)) for table in tables for width in table.widths]
    longest = max(len(panel.columns) for panel in panels)
    columns, cell = columns_in(drawn.width, len(panels), CELL * longest / (1 - NAMES))
    head = max(_head(panel, cell) for panel in panels)
    body = max(_tall(panel) for panel in panels) + 8
    said = [f"{drawn.score}; dark: far below the teacher"]
    said += [f"{_title(panel) if len(tables) > 1 else panel.width.upper()}: {_references(panel)}" for panel in panels]
    rows = [row for table in tables for row in table.rows.values()]
    said += [f"*: {FEWER}"] * any(row.lost.keys() & row.entries.keys() for row in rows)
    said += ["lost: diverged or failed"] * any(row.lost.keys() - row.entries.keys() for row in rows)
    said += ["below: real images, no data-free method, in no mean"] * any(table.real for table in tables)
    return grid_pages(panels, columns, cell, lambda _: head, body, said, partial(_draw, cell))


def _map(table: Factorial, width: str, title: str) -> Map:
    rows = [(source, 0) for source in table.sources] + [(MEAN, 1)] * (len(table.sources) > 1)
    return Map(table, width, title, rows + [(source, 2) for source in table.real])


def _references(panel: Map) -> str:
    found = {name: values.get(panel.width, np.nan) for name, values in beside(panel.table.block, [panel.width]).items()}
    return ", ".join(f"{name.removesuffix(', full precision')} {value:.1f}" for name, value in found.items() if np.isfinite(value))


def _tall(panel: Map) -> float:
    return PITCH * len(panel.rows) + GAP * max(gaps for _, gaps in panel.rows)


def _title(panel: Map) -> str:
    return f"{panel.title}, {panel.width.upper()}"


def _head(panel: Map, wide: float) -> float:
    """Title, bit width and the names of columns."""
    return extent(wrapped_to(_title(panel), wide, USUAL), USUAL)[1] + 2 + max(extent(name)[1] for name in _heads(panel, wide)) + 3


def _heads(panel: Map, wide: float) -> list[str]:
    return [wrapped_to(name, _cell(panel, wide) - 2) for name in panel.columns]


def _cell(panel: Map, wide: float) -> float:
    return (wide - _names(panel, wide) - GAP) / len(panel.columns)


def _names(panel: Map, wide: float) -> float:
    return max(extent(wrapped_to(name, NAMES * wide))[0] for name, _ in panel.rows) + 5


def _draw(wide: float, sheet: Sheet, panel: Map, x: float, top: float, first: float) -> None:
    names, cell = _names(panel, wide), _cell(panel, wide)
    sheet.write(x, top, wrapped_to(_title(panel), wide, USUAL), USUAL, color=GREY)
    ax = sheet.axes(x + names, first, wide - names, _tall(panel))
    ax.grid(False)
    ax.set_axis_off()
    ax.set(xlim=(0, wide - names), ylim=(_tall(panel), 0))
    found = [[panel.cell(source, training) for training in panel.columns] for source, _ in panel.rows]
    values = [value for line in found for _, value in line if np.isfinite(value)]
    best = panel.table.block.teacher_top1 if np.isfinite(panel.table.block.teacher_top1) else max(values, default=100.0)
    low = max(min(values, default=0.0), floor_of(values))
    for j, name in enumerate(_heads(panel, wide)):
        left = j * cell + GAP * (panel.columns[j] == MEAN)
        sheet.write(x + names + left + cell / 2, first - 4, name, ha="center", va="baseline")
        for i, (source, gaps) in enumerate(panel.rows):
            text, value = found[i][j]
            place = (left, i * PITCH + gaps * GAP)
            _paint(ax, place, cell, text, min(max((best - value) / max(best - low, 1e-9), 0.0), 1.0) if np.isfinite(value) else None)
            if j == 0:
                called = wrapped_to(source, NAMES * wide)
                middle = "center" if "\n" in called else "center_baseline"
                sheet.write(x + names - 4, first + place[1] + PITCH / 2, called, ha="right", va=middle)


def _paint(ax: Any, place: tuple[float, float], cell: float, text: str, share: float | None) -> None:
    """share: how far below the teacher, of what is farthest; None: nothing is known."""
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    color = "#f4f4f4" if share is None else colormaps["YlOrBr"](share)
    ax.add_patch(Rectangle(place, cell, PITCH, facecolor=color, edgecolor="white", linewidth=0.6))
    ink = GREY if share is None else "white" if share > 0.6 else "black"
    ax.text(place[0] + cell / 2, place[1] + PITCH / 2, text, color=ink, ha="center", va="center_baseline", fontsize=SMALL)
