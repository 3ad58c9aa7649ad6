"""What settings that differ from a method's own change."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from dfqbench.analysis.plots.accuracy import line_of
from dfqbench.analysis.plots.dots import Dot, Guide, Line, Section, dot_plots
from dfqbench.analysis.plots.drawn import Drawn, NothingToDraw
from dfqbench.analysis.plots.style import block_title
from dfqbench.analysis.tables.blocks import Block, Entry, Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def ablation(drawn: Drawn) -> list[Figure]:
    """What settings that differ from a method's own change, against the method as it is: paired over test images and seeds."""
    sections = [_section(drawn, block, found) for block in drawn.blocks if (found := list(_ablations(drawn, block)))]
    if not sections:
        raise NothingToDraw(
            "no method was run both as it is and with other settings under one budget: give some in the config, like {METHOD: {SETTING: 0}}"
        )
    xlabel = f"points of {drawn.metric} against the method as it is"
    return dot_plots(sections, drawn.width, xlabel, ["bars: 95 % intervals of the difference", "dots: seeds that both have"])


def _section(drawn: Drawn, block: Block, found: list[tuple[Row, list[Row]]]) -> Section:
    """Method by method, the best first, by the narrowest width."""
    lines = []
    for base, others in found:
        its = [_line(drawn, block, base, row) for row in others]
        lines += sorted(its, key=lambda line: [-_value(line, width) for width in block.widths[::-1]])
    widths = [width for width in block.widths if any(width in line.dots or width in line.lost for line in lines)]
    return Section(block_title(block, drawn.blocks), lines, widths, {width: [Guide("as it is", 0.0, "-")] for width in widths}, cut=False)


def _line(drawn: Drawn, block: Block, base: Row, row: Row) -> Line:
    there = [width for width in block.widths if row.complete(width) and base.complete(width)]
    line = line_of(drawn, row, {width: _difference(drawn, row.entries[width], base.entries[width]) for width in there})
    without = {width: f"{base.label}: {lost}" for width, lost in base.lost.items()}  # nothing to compare with
    return replace(line, lost=without | line.lost)


def _value(line: Line, width: str) -> float:
    return line.dots[width].value if width in line.dots else -1000.0


def _ablations(drawn: Drawn, block: Block) -> Iterator[tuple[Row, list[Row]]]:
    """(the method as it is, its other settings under the same budget)"""
    for base in (row for row in drawn.best_first(block) if not row.changed):
        others = [
            r for r in block.rows if r.method == base.method and r.changed and (r.steps, r.batch, r.mark) == (base.steps, base.batch, base.mark)
        ]
        if others:
            yield base, others


def _difference(drawn: Drawn, ours: Entry, theirs: Entry) -> Dot:
    """Their mean difference with its interval, and that of each seed."""
    mine, other = (dict(zip(entry.seeds, drawn.seeds(entry), strict=True)) for entry in (ours, theirs))
    seeds = [mine[seed] - other[seed] for seed in mine if seed in other]
    if drawn.rule == "last" and ours.estimate and theirs.estimate:
        found = drawn.per_image.difference(ours.ids, theirs.ids)
        return Dot(found.value, found.low, found.high, seeds or [found.value])
    value, error = ours.mean - theirs.mean, 2 * (ours.error**2 + theirs.error**2) ** 0.5
    return Dot(value, value - error, value + error, seeds or [value])
