"""The students' training loss, a small panel for each method."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from dfqbench.analysis.plots.drawn import FEWER, Drawn, NothingToDraw
from dfqbench.analysis.plots.layout import SMALL, extent, wrapped_to
from dfqbench.analysis.plots.sheet import Sheet, columns_in, grid_pages
from dfqbench.analysis.plots.style import GREY, Style, block_title
from dfqbench.analysis.plots.ticks import set_ticks
from dfqbench.analysis.plots.training import over_steps
from dfqbench.analysis.tables.blocks import Block, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LEFT, BELOW, NARROWEST, WIDEST, TALL = 21.0, 27.0, 106.0, 200.0, 76.0  # points
SWATCH = 11.0  # points: of a line beside the name of a variant
DASHES: list[Any] = ["-", (0, (3, 1.2)), (0, (1, 1)), (0, (4, 1, 1, 1))]  # by bit width
DASH_NAMES = ("solid", "dashed", "dotted", "dash-dotted")


@dataclass(frozen=True)
class Trace:
    """diverged: whether it ends where the loss became infinite or NaN. partial: a mean of the seeds that did not."""

    name: str
    style: Style
    width: str
    steps: list[float]
    values: list[float]
    diverged: bool = False
    partial: bool = False


@dataclass(frozen=True)
class Family:
    """What one method's students lost. block: where that says something."""

    method: str
    block: str
    traces: list[Trace]

    @property
    def name(self) -> str:
        """The method's, or what its only variant is called."""
        return self.method if self.variants else self.traces[0].name

    @property
    def variants(self) -> dict[str, Style]:
        """Named where there are several."""
        found = {trace.name: trace.style for trace in self.traces}
        return found if len(found) > 1 else {}


def losses(drawn: Drawn) -> list[Figure]:
    """The students' training loss against student steps, a panel for each method; a cross is where one diverged."""
    families = [family for block in drawn.blocks for family in _families(drawn, block)]
    if not families:
        raise NothingToDraw("no cell has a training loss: nothing was trained")
    if len({family.block for family in families}) == 1:
        families = [replace(family, block="") for family in families]
    columns, cell = columns_in(drawn.width, len(families), NARROWEST)
    cell = min(cell, WIDEST)
    traces = [trace for family in families for trace in family.traces]
    widths = sorted({trace.width for trace in traces}, reverse=True)
    dashes = {width: DASHES[i % len(DASHES)] for i, width in enumerate(widths)}
    said = ["means over seeds", *(f"{DASH_NAMES[i % len(DASHES)]}: {width.upper()}" for i, width in enumerate(widths))]
    said += ["cross: diverged"] * any(t.diverged for t in traces) + [f"faint: {FEWER}"] * any(t.partial for t in traces)

    def head(family: Family) -> float:
        return sum(extent(text, SMALL)[1] for text, _ in _heading(family, cell)) + 5

    def draw(sheet: Sheet, family: Family, x: float, top: float, axes: float) -> None:
        top = axes - head(family) + 1
        for i, (text, style) in enumerate(_heading(family, cell)):
            if style:
                sheet.line(x, top + 4, x + SWATCH - 3, style.color)
            sheet.write(x + SWATCH * bool(style), top, text, color=GREY if style is None else style.ink, weight="normal" if i else "bold")
            top += extent(text)[1]
        _draw(sheet.axes(x + LEFT, axes, cell - LEFT - 7, TALL), family, dashes)
        sheet.write(x + LEFT + (cell - LEFT - 7) / 2, axes + TALL + 12, "student steps", SMALL, ha="center")

    return grid_pages(families, columns, cell, head, TALL + BELOW, said, draw)


def _families(drawn: Drawn, block: Block) -> Iterator[Family]:
    title = block_title(block, drawn.blocks)
    methods: dict[str, list[Trace]] = {}
    for row in drawn.best_first(block):
        for width in block.widths:
            methods.setdefault(row.method, []).extend(_traces(drawn, row, width))
    for method, traces in methods.items():
        if traces:
            yield Family(method, title, traces)


def _traces(drawn: Drawn, row: Row, width: str) -> Iterator[Trace]:
    """The mean of what finished, over steps that all seeds have, and each that diverged."""
    name, style = drawn.brief[row.label], drawn.look[row.label]
    series = [over_steps(drawn, cell_id, "loss") for cell_id in row.entries[width].ids] if width in row.entries else []
    steps = sorted(set.intersection(*(set(one) for one in series))) if series else []
    if len(steps) > 1:
        yield Trace(name, style, width, steps, [float(np.mean([one[step] for one in series])) for step in steps], partial=width in row.lost)
    for cell_id in row.lost[width].ids if width in row.lost else ():
        if drawn.diverged(cell_id) and (one := over_steps(drawn, cell_id, "loss")):
            yield Trace(name, style, width, list(one), list(one.values()), diverged=True)


def _heading(family: Family, cell: float) -> list[tuple[str, Style | None]]:
    """Lines above a panel, each with the style of what it names: method, block, and variants where there are several."""
    lines: list[tuple[str, Style | None]] = [(wrapped_to(text, cell - 6), None) for text in (family.name, family.block) if text]
    return lines + [(wrapped_to(name, cell - SWATCH), style) for name, style in family.variants.items()]


def _draw(ax: Axes, family: Family, dashes: dict[str, Any]) -> None:
    for trace in family.traces:
        known = [(step, value) for step, value in zip(trace.steps, trace.values, strict=True) if value > 0]
        if known:
            xs, ys = zip(*known, strict=True)
            ax.plot(xs, ys, color=trace.style.color, ls=dashes[trace.width], lw=0.9, alpha=0.45 if trace.partial else None)
            if trace.diverged:
                ax.plot(xs[-1], ys[-1], color=trace.style.ink, marker="x", ms=4.5, mew=1.2, ls="", zorder=4)
    ax.set_yscale("log")
    set_ticks(ax.yaxis, *ax.get_ylim(), 5)
    ax.locator_params(axis="x", nbins=4)
