"""Heat map of what is lost against the teacher."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np

from dfqbench.analysis.plots.drawn import FEWER, Drawn, entries_of
from dfqbench.analysis.plots.layout import SMALL, USUAL, extent, wrapped_to
from dfqbench.analysis.plots.sheet import EDGE, LEAST_WIDTH, Sheet, noted
from dfqbench.analysis.plots.style import GREY
from dfqbench.analysis.tables.blocks import Block, Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LABELS = 0.42  # of the width, for the names at most
CELL, WIDEST, PITCH, GAP, TALLEST = 36.0, 50.0, 11.5, 4.0, 640.0  # points: a cell's width, a row, between networks, a page
Columns = list[tuple[Block, str]]


def drop(drawn: Drawn) -> list[Figure]:
    """Heat map of what is lost against the teacher: methods x (network, bits), never mixing protocols, precisions or evaluation sets."""
    groups: dict[tuple[str, str, str], list[Block]] = {}
    for block in drawn.blocks:
        groups.setdefault((block.evaluation, block.protocol, block.precision), []).append(block)
    worst = max([1e-9, *(entry.drop for _, _, _, entry in entries_of(drawn) if np.isfinite(entry.drop))])
    figures = []
    for (evaluation, protocol, precision), group in groups.items():
        labels = _labels(drawn, group)
        names = max(extent(wrapped_to(label, LABELS * drawn.width * 72, USUAL), USUAL)[0] for label in labels) + 5
        title = f"drop in points of {group[0].metric.name} on {evaluation}, {protocol}, {precision}"
        for columns in _pages(group, max(1, int((drawn.width * 72 - 2 * EDGE - names + GAP) // (CELL + GAP)))):
            note = [f"*: {FEWER}" * any(width in row.lost and width in row.entries for block, width in columns for row in block.rows)]
            note.append(drawn.left_out(row for block in group for row in block.rows))
            for some in _that_fit(labels, columns, names):
                figures.append(_map(drawn, some, columns, names, title, note, worst))
    return figures


def _labels(drawn: Drawn, group: list[Block]) -> list[str]:
    """Best first; of several networks by how far rows are above the means of their columns."""
    if len(group) == 1:
        return [row.label for row in drawn.best_first(group[0])]
    return list(dict.fromkeys(row.label for row in sorted((r for b in group for r in b.rows), key=lambda row: -row.above)))


def _pages(group: list[Block], most: int) -> list[Columns]:
    """Columns, page by page; those of a network stay together where they can."""
    pages: list[Columns] = [[]]
    for block in group:
        if pages[-1] and len(pages[-1]) + len(block.widths) > most:
            pages.append([])
        for width in block.widths:
            if len(pages[-1]) == most:
                pages.append([])
            pages[-1].append((block, width))
    return pages


def _that_fit(labels: list[str], columns: Columns, names: float) -> list[list[str]]:
    """Rows, page by page."""
    pages, height = [list[str]()], 0.0
    for label in labels:
        tall = _tall(label, columns, names)
        if pages[-1] and height + tall > TALLEST:
            pages.append([])
            height = 0.0
        pages[-1].append(label)
        height += tall
    return pages


def _tall(label: str, columns: Columns, names: float) -> float:
    lines = [wrapped_to(label, names - 5, USUAL), *(_text(block, width, label)[0] for block, width in columns)]
    return PITCH + max(extent(text, SMALL)[1] for text in lines) - extent("x", SMALL)[1]


def _text(block: Block, width: str, label: str) -> tuple[str, float]:
    """What a cell says, and the drop that colours it (NaN for none)."""
    row: Row | None = next((row for row in block.rows if row.label == label), None)
    if row is None or (width not in row.entries and width not in row.lost):
        return "-", np.nan
    if width not in row.entries:
        return wrapped_to(str(row.lost[width]), CELL - 3), np.nan
    value = row.entries[width].drop
    return f"{value + 0.0:.1f}".replace("-0.0", "0.0") + "*" * (width in row.lost), value


def _map(drawn: Drawn, labels: list[str], columns: Columns, names: float, title: str, said: list[str], worst: float) -> Figure:
    networks = [list(its) for _, its in groupby(columns, key=lambda column: id(column[0]))]
    room = drawn.width * 72 - 2 * EDGE - names - GAP * (len(networks) - 1)
    cell = min(WIDEST, room / len(columns))
    full = max(2 * EDGE + names + cell * len(columns) + GAP * (len(networks) - 1), min(LEAST_WIDTH, drawn.width * 72))
    heads = [wrapped_to(its[0][0].teacher, cell * len(its)) for its in networks]
    head, (note, under) = max(extent(text)[1] for text in heads), noted(said, full)
    title = wrapped_to(title, full - 2 * EDGE, USUAL)
    first = EDGE + extent(title, USUAL)[1] + 3 + head + 11
    talls = [_tall(label, columns, names) for label in labels]
    sheet = Sheet(full, first + sum(talls) + 3 + under + EDGE)
    sheet.write(EDGE, EDGE, title, USUAL, color=GREY)
    edges = np.concatenate([[0], np.cumsum(talls)])
    left = EDGE + names
    for text, its in zip(heads, networks, strict=True):
        sheet.write(left + cell * len(its) / 2, first - 11 - head, text, ha="center")
        _network(sheet, its, labels, (left, first, cell), edges, worst)
        left += cell * len(its) + GAP
    for label, top, tall in zip(labels, edges, talls, strict=False):
        name = wrapped_to(label, names - 5, USUAL)
        look: dict[str, Any] = {"ha": "right", "va": "center" if "\n" in name else "center_baseline"}
        sheet.write(EDGE + names - 4, first + top + tall / 2, name, USUAL, **look)
    sheet.note(first + edges[-1] + 3, note)
    return sheet.figure


def _network(sheet: Sheet, its: Columns, labels: list[str], place: tuple[float, float, float], edges: Any, worst: float) -> None:
    """The columns of one network, cell by cell."""
    left, first, cell = place
    ax = sheet.axes(left, first, cell * len(its), float(edges[-1]))
    ax.grid(False)
    ax.set_axis_off()
    texts = [[_text(block, width, label) for block, width in its] for label in labels]
    values = np.ma.masked_invalid([[value for _, value in row] for row in texts])
    ax.pcolormesh(np.arange(len(its) + 1) * cell, edges, values, cmap="YlOrBr", vmin=0, vmax=worst, edgecolors="white", linewidth=0.6)
    ax.set(xlim=(0, cell * len(its)), ylim=(float(edges[-1]), 0))
    for j, (_, width) in enumerate(its):
        sheet.write(left + (j + 0.5) * cell, first - 10, width.upper(), USUAL, ha="center")
        for i, row in enumerate(texts):
            text, value = row[j]
            color = "white" if value > 0.6 * worst else "black" if np.isfinite(value) else GREY
            look: dict[str, Any] = {"ha": "center", "va": "center" if "\n" in text else "center_baseline", "fontsize": SMALL, "linespacing": 1.1}
            ax.text((j + 0.5) * cell, (edges[i] + edges[i + 1]) / 2, text, color=color, **look)
