"""What students reached: every configuration beside the others, and over bit widths."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dfqbench.analysis.plots.dots import Dot, Guide, Line, Section, dot_plots
from dfqbench.analysis.plots.drawn import FEWER, Drawn, NothingToDraw, ends_of
from dfqbench.analysis.plots.lines import Curve, Panel, line_panels
from dfqbench.analysis.plots.style import block_title
from dfqbench.analysis.tables.blocks import Block, Entry, Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DASHED, DOTTED = (0, (5, 2)), (0, (1, 1.5))
BARS = 12  # lines over bit widths with intervals; of more they would hide each other
ROUNDING = "round"  # the method that everything else is to beat


def accuracy(drawn: Drawn) -> list[Figure]:
    """A row for each configuration, best first, a panel for each bit width: seeds, intervals over test images and seeds, teacher and rounding."""
    sections = [_section(drawn, block) for block in drawn.blocks]
    return dot_plots(sections, drawn.width, drawn.score, ["dots: seeds", "bars: 95 % intervals of the mean", *_said(drawn, sections)])


def _said(drawn: Drawn, sections: list[Section]) -> list[str]:
    fewer = any(line.dots.keys() & line.lost.keys() for section in sections for line in section.lines)
    """What explains hollow dots, and the names."""
    return ["hollow: the seeds that did not diverge or fail"] * fewer + [drawn.left_out(row for block in drawn.blocks for row in block.rows)]


def _section(drawn: Drawn, block: Block) -> Section:
    lines = [line_of(drawn, row, {width: dot_of(drawn, entry) for width, entry in row.entries.items()}) for row in drawn.best_first(block)]
    guides: dict[str, list[Guide]] = {width: [] for width in block.widths}
    for width, its in guides.items():
        if np.isfinite(block.teacher_top1):
            its.append(Guide(f"teacher {block.teacher_top1:.1f}", block.teacher_top1, DASHED))
        rounded = next(((row, entry) for row in block.rows if _is_rounding(row) and (entry := row.complete(width))), None)
        if rounded:
            its.append(Guide(rounded[0].label, rounded[1].mean, DOTTED, reference=False, short="rounding"))
    return Section(block_title(block, drawn.blocks), lines, block.widths, guides)


def _is_rounding(row: Row) -> bool:
    return row.method == ROUNDING and not row.changed


def line_of(drawn: Drawn, row: Row, dots: dict[str, Dot]) -> Line:
    return Line(row.label, drawn.look[row.label], dots, {width: str(lost) for width, lost in row.lost.items()})


def dot_of(drawn: Drawn, entry: Entry) -> Dot:
    return Dot(entry.mean, *ends_of(entry), drawn.seeds(entry))


def over_widths(drawn: Drawn) -> list[Figure]:
    """Accuracy over three and more bit widths, from wide to narrow, a line for each configuration."""
    panels = []
    for block in drawn.blocks:
        rows = [row for row in drawn.best_first(block) if row.entries]
        lines = [_over_widths(drawn, block, row, (i + 0.5) / len(rows) - 0.5 if len(rows) <= BARS else None) for i, row in enumerate(rows)]
        if len(block.widths) > 2 and lines:
            ticks = [width.upper() for width in block.widths]
            panels.append(Panel(block_title(block, drawn.blocks), lines, block.teacher_top1, "", drawn.score, ticks))
    if not panels:
        raise NothingToDraw("there are no three bit widths to draw a line over: `accuracy` shows them side by side")
    every = [curve for panel in panels for curve in panel.curves]
    shown = [row for block in drawn.blocks if len(block.widths) > 2 for row in block.rows]
    said = ["bars: 95 % intervals of the mean"] * any(curve.ends for curve in every) + [f"faint: {FEWER}"] * any(curve.faint for curve in every)
    return line_panels(panels, drawn.width, [*said, drawn.left_out(shown)])


def _over_widths(drawn: Drawn, block: Block, row: Row, aside: float | None) -> Curve:
    """From the widest width. aside: how far from the middle, so that intervals do not hide each other; None: without them."""
    there = [(i + 0.12 * (aside or 0.0), row.entries[width]) for i, width in enumerate(block.widths) if width in row.entries]
    lost = "".join(f", {width.upper()} {what}" for width, what in row.lost.items())
    return Curve(
        drawn.brief[row.label],
        drawn.look[row.label],
        [x for x, _ in there],
        [entry.mean for _, entry in there],
        [ends_of(entry) for _, entry in there] if aside is not None else [],
        faint=bool(row.lost),
        marker=drawn.look[row.label].marker,
        lost=lost,
    )
