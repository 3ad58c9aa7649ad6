"""Measured against published."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dfqbench.analysis.plots.drawn import FEWER, Drawn, NothingToDraw, ends_of, entries_of, fill
from dfqbench.analysis.plots.layout import SMALL, Labels
from dfqbench.analysis.plots.sheet import EDGE, Sheet, noted
from dfqbench.analysis.plots.style import GREY
from dfqbench.analysis.tables.blocks import Block, Entry, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LEFT, RIGHT, BELOW, WIDEST = 29.0, 7.0, 25.0, 260.0  # points: beside and below the panel; its width
Measured = tuple[Block, Row, str, Entry]


def published(drawn: Drawn) -> list[Figure]:
    """Measured against published, with the line on which both are equal."""
    points = [each for each in entries_of(drawn) if each[3].published]
    if not points:
        whys = sorted({why for block in drawn.blocks for why in block.why_no_claims if "published number" in why})
        raise NothingToDraw("; ".join(whys) or "no published number is about a method that was measured here")
    side = min(drawn.width * 72 - LEFT - RIGHT - 2 * EDGE, WIDEST)
    full = side + LEFT + RIGHT + 2 * EDGE
    some = any(width in row.lost for _, row, width, _ in points)
    note, under = noted(["bars: 95 % interval of the mean, and from the lowest to the highest claim", f"hollow: {FEWER}" * some], full)
    sheet = Sheet(full, EDGE + 4 + side + BELOW + under + EDGE)
    ax = sheet.axes(EDGE + LEFT, EDGE + 4, side, side)
    sheet.write(EDGE + LEFT + side / 2, EDGE + 4 + side + 12.5, "published top-1 (%)", 7, ha="center")
    sheet.write(EDGE, EDGE + 4 + side / 2, f"measured {drawn.score}", 7, va="center", rotation=90)
    sheet.note(EDGE + 4 + side + BELOW, note)
    _draw(ax, drawn, points)
    return [sheet.figure]


def _draw(ax: Axes, drawn: Drawn, points: list[Measured]) -> None:
    values = [v for _, _, _, e in points if e.published for v in (e.mean, e.published.low, e.published.high)]
    margin = max((max(values) - min(values)) * 0.12, 1.0)
    ends = [min(values) - margin, max(values) + margin]
    ax.set(xlim=ends, ylim=ends)
    ax.locator_params(nbins=6)
    ax.plot(ends, ends, color="#999999", lw=0.8, zorder=1)
    labels = Labels(ax)
    line: dict[str, Any] = {"rotation": 45, "rotation_mode": "anchor", "ha": "left", "va": "bottom", "fontsize": SMALL, "color": GREY}
    ax.text(0.02, 0.03, "as published", transform=ax.transAxes, **line)
    labels.taken += [(d - 7, d - 2, d + 5, d + 9) for d in range(5, 40, 5)]  # that text
    for _, row, width, entry in points:
        style, claim = drawn.look[row.label], entry.published
        assert claim is not None
        middle, (low, high) = (claim.low + claim.high) / 2, ends_of(entry)
        look: dict[str, Any] = {"color": style.color, "marker": style.marker, "mfc": fill(row, width, style.color), "elinewidth": 0.8, "ls": ""}
        ax.errorbar(
            [middle], [entry.mean], xerr=[[middle - claim.low], [claim.high - middle]], yerr=[[entry.mean - low], [high - entry.mean]], **look
        )
        labels.occupy(middle, entry.mean)
    several = len({block.teacher for block, *_ in points}) > 1
    for block, row, width, entry in sorted(points, key=lambda each: -each[3].mean):
        claim = entry.published
        assert claim is not None
        name = f"{drawn.brief[row.label]} {f'{block.teacher} ' * several}{width.upper()}"
        labels.add([(claim.low + claim.high) / 2], entry.mean, name, drawn.look[row.label].ink, 100.0, through=True)
