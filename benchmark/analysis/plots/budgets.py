"""Accuracy against size where widths of single layers were chosen: each method with equal widths, and with what each allocator chose."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dfqbench.analysis.plots.drawn import FEWER, Drawn, NothingToDraw, ends_of
from dfqbench.analysis.plots.layout import SMALL, USUAL, extent, wrapped_to
from dfqbench.analysis.plots.sheet import Sheet, columns_in, grid_pages
from dfqbench.analysis.plots.style import GREY, MARKERS, Style, block_title
from dfqbench.analysis.size import common_sizes, megabytes, three_digits
from dfqbench.analysis.tables.blocks import Block, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

EQUAL = "equal widths"
LEFT, BELOW, NARROWEST, WIDEST = 30.0, 26.0, 270.0, 330.0  # points: beside and below the axes, and of a panel with its legend
LINE, KEY, GAP = 10.0, 14.0, 8.0  # points: of the legend: a line of it, its marker, from the axes to it
ASIDE, APART = 5.0, 3.0  # points: from one choice of widths to the next of the same size, and between its outermost methods


@dataclass(frozen=True)
class Series:
    """One method under one choice of widths, from small to large. points: (MB, mean, ends of its interval, whether it is of all seeds)."""

    method: str
    chooser: str
    style: Style
    points: Sequence[tuple[float, float, tuple[float, float], bool]]


@dataclass(frozen=True)
class Panel:
    """methods: by name with their looks; choosers: equal widths first. teacher: NaN where there is none."""

    title: str
    xlabel: str
    series: Sequence[Series]
    teacher: float

    @property
    def methods(self) -> dict[str, Style]:
        return {one.method: one.style for one in self.series}

    @property
    def choosers(self) -> list[str]:
        return sorted({one.chooser for one in self.series}, key=lambda name: (name != EQUAL, name))


def budgets(drawn: Drawn) -> list[Figure]:
    """Accuracy against size, a colour for each method, a marker for each allocator; of the blocks that have a width per layer."""
    panels = [panel for block in drawn.blocks if (panel := _panel(drawn, block))]
    if not panels:
        raise NothingToDraw("no row has a width per layer: `bits` of a sweep takes budgets")
    columns, cell = columns_in(drawn.width, len(panels), NARROWEST, 2)
    cell = min(cell, WIDEST)
    tall = max(150.0, *(LINE * (len(panel.methods) + len(panel.choosers) + 0.5) for panel in panels))
    said = ["bars: 95 % intervals of the mean", "what has the same size stands side by side, equal widths at the left"]
    if not all(whole for panel in panels for one in panel.series for *_, whole in one.points):
        said.append(f"hollow: {FEWER}")

    def draw(sheet: Sheet, panel: Panel, x: float, top: float, axes: float) -> None:
        sheet.write(x, top, wrapped_to(panel.title, cell, USUAL), USUAL, color=GREY)
        inner = cell - LEFT - GAP - KEY - max(extent(name)[0] for name in (*panel.methods, *panel.choosers))
        sheet.write(x + LEFT + inner / 2, axes + tall + 12.5, panel.xlabel, 7, ha="center")
        sheet.write(x, axes + tall / 2, drawn.score, 7, va="center", rotation=90)
        _draw(sheet.axes(x + LEFT, axes, inner, tall), panel)
        _legend(sheet, panel, x + LEFT + inner + GAP, axes)

    return grid_pages(panels, columns, cell, lambda panel: extent(wrapped_to(panel.title, cell, USUAL), USUAL)[1] + 3, tall + BELOW, said, draw)


def has_budgets(blocks: Iterable[Block]) -> bool:
    return any(_chosen(row) for block in blocks for row in block.rows)


def _panel(drawn: Drawn, block: Block) -> Panel | None:
    results = {result["id"]: result for result in drawn.reading.results}
    found = [(row, entry, sizes) for row in block.rows for entry in row.entries.values() if (sizes := common_sizes(results[i] for i in entry.ids))]
    alike: dict[str, list[Row]] = {}
    for row, *_ in found:
        its = alike.setdefault(json.dumps({k: v for k, v in row.settings.items() if k != "widths"}, sort_keys=True), [])
        its += [row] * (row not in its)
    if not any(_chosen(row) for row, *_ in found):
        return None
    choosers = _names({row.label: results[entry.ids[0]]["cell"] for row, entry, _ in found if _chosen(row)})
    series = []
    for rows in alike.values():
        plain = next((row for row in rows if not _chosen(row)), None)
        name, style = (drawn.brief[plain.label], drawn.look[plain.label]) if plain else _of_budgets_alone(drawn, rows[0], results)
        for row in rows:
            points = sorted(
                (megabytes(sizes.student), entry.mean, ends_of(entry), width not in row.lost)
                for width, entry in row.entries.items()
                for other, its, sizes in found
                if other is row and its is entry
            )
            series.append(Series(name, choosers.get(row.label, EQUAL), style, points))
    teacher = found[0][2].teacher
    return Panel(block_title(block, drawn.blocks), f"size (MB); the teacher has {three_digits(megabytes(teacher))}", series, block.teacher_top1)


def _chosen(row: Row) -> bool:
    return "widths" in row.settings


def _names(cells: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Who chose the widths of each row, by its label; with settings where an allocator stands there with several."""
    texts = {label: str(cell["allocation"]["text"]) for label, cell in cells.items()}
    alone = [text.partition("(")[0] for text in {*texts.values()}]
    return {label: short if alone.count(short := text.partition("(")[0]) == 1 else text for label, text in texts.items()}


def _of_budgets_alone(drawn: Drawn, row: Row, results: dict[str, dict[str, Any]]) -> tuple[str, Style]:
    """What a method is called that has no row with equal widths."""
    cell = results[next(iter(row.entries.values())).ids[0]]["cell"]
    return str(cell.get("name") or row.method).removesuffix(f" ({cell['allocation']['text']})"), drawn.look[row.label]


def _draw(ax: Axes, panel: Panel) -> None:
    from matplotlib.transforms import ScaledTranslation

    figure, order, methods = ax.figure, panel.choosers, list(panel.methods)
    if np.isfinite(panel.teacher):
        ax.axhline(panel.teacher, color="#555555", lw=0.8, ls=(0, (5, 2)), zorder=1.2)
        look: dict[str, Any] = {"fontsize": SMALL, "color": GREY, "ha": "left", "va": "bottom", "transform": ax.get_yaxis_transform()}
        ax.text(0.01, panel.teacher, f"teacher {panel.teacher:.1f}", **look)
    for one in panel.series:
        place = order.index(one.chooser)
        apart = (methods.index(one.method) / (len(methods) - 1) - 0.5) * APART if len(methods) > 1 else 0.0
        aside = ScaledTranslation(((place - (len(order) - 1) / 2) * ASIDE + apart) / 72, 0, figure.dpi_scale_trans)
        at: dict[str, Any] = {"transform": ax.transData + aside, "color": one.style.color}
        xs, ys = [x for x, *_ in one.points], [y for _, y, *_ in one.points]
        ax.plot(xs, ys, lw=1.1 if one.chooser == EQUAL else 0.5, ls="-" if one.chooser == EQUAL else (0, (1, 1.5)), zorder=2, **at)
        for x, y, (low, high), whole in one.points:
            ax.plot([x, x], [low, high], lw=0.7, zorder=2.5, **at)
            ax.plot(x, y, marker=MARKERS[place % len(MARKERS)], ms=4, mfc=one.style.color if whole else "white", mew=0.6, ls="", zorder=3, **at)
    sizes = [x for one in panel.series for x, *_ in one.points]
    reach, wide = (len(order) - 1) / 2 * ASIDE + APART + 6, ax.bbox.width * 72 / figure.dpi  # points
    margin = max(max(sizes) - min(sizes), 0.02 * max(sizes)) * reach / (wide - 2 * reach)
    ax.set_xlim(min(sizes) - margin, max(sizes) + margin)
    ends = [y for one in panel.series for _, _, both, _ in one.points for y in both] + [panel.teacher] * bool(np.isfinite(panel.teacher))
    above = 0.07 * max(max(ends) - min(ends), 1.0)
    ax.set_ylim(min(ends) - above / 2, max(ends) + above)
    ax.locator_params(axis="x", nbins=6)
    ax.locator_params(axis="y", nbins=6)


def _legend(sheet: Sheet, panel: Panel, x: float, top: float) -> None:
    """Beside the axes: methods by colour, then who chose by marker."""
    for i, (name, ink, color, marker) in enumerate(_keys(panel)):
        y = top + LINE * i + 3
        if name:
            spot = sheet.axes(x, y - 1, KEY - 4, 6)
            spot.set_axis_off()
            spot.set(xlim=(-1, 1), ylim=(-1, 1))
            look: dict[str, Any] = {"marker": marker, "ms": 4, "mfc": "none"} if marker else {"lw": 2.2}
            spot.plot([0] if marker else [-1, 1], [0] if marker else [0, 0], color=color, clip_on=False, **look)
            sheet.write(x + KEY, y + 2, name, SMALL, va="center_baseline", color=ink)


def _keys(panel: Panel) -> Iterator[tuple[str, str, str, str]]:
    """(text, its colour, the sign's, marker)"""
    yield from ((name, style.ink, style.color, "") for name, style in panel.methods.items())
    yield "", "", "", ""
    yield from ((name, GREY, GREY, MARKERS[i % len(MARKERS)]) for i, name in enumerate(panel.choosers))
