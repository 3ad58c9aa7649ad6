"""Horizontal dot plots: a row for each configuration with its name at the left, a panel for each bit width side by side."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from dfqbench.analysis.plots.drawn import floor_of
from dfqbench.analysis.plots.layout import SMALL, USUAL, extent, wrapped_to
from dfqbench.analysis.plots.sheet import EDGE, LEAST_WIDTH, Sheet, noted
from dfqbench.analysis.plots.style import GREY, Style, mixed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LABELS = 0.38  # of the width, for the names at most
NARROWEST, WIDEST, GAP, RIGHT = 56.0, 200.0, 12.0, 5.0  # points: of a panel, between two, and beside the last
TALLEST, LEAST, JOINED = 676.0, 240.0, 330.0  # points: of a page with its note, of its rows whatever the note, and up to which blocks share one
PITCH = 10.4  # points from row to row of one line
HEAD, LEVEL, TICKS, BETWEEN = 11.0, 8.0, 14.0, 8.0  # points: a panel's name, a line of guides' names, the axis, between blocks


@dataclass(frozen=True)
class Dot:
    """A mean with its interval, and what it is the mean of."""

    value: float
    low: float
    high: float
    seeds: list[float]


@dataclass(frozen=True)
class Line:
    """A row. dots, lost (what became of cells that have no result): by bit width. said: what of the lost its name says, as panels have no room."""

    name: str
    style: Style
    dots: dict[str, Dot]
    lost: dict[str, str]
    said: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Guide:
    """A vertical line. reference: nothing is cut off to show it. short: its name where a panel is narrower than the name."""

    name: str
    value: float
    dashes: Any
    reference: bool = True
    short: str = ""


@dataclass(frozen=True)
class Section:
    """Rows that share panels. guides: by bit width. cut: whether values far below the others may be arrows at the edge."""

    title: str
    lines: list[Line]
    widths: list[str]
    guides: dict[str, list[Guide]]
    cut: bool = True


@dataclass(frozen=True)
class _Plan:
    """What is common to a figure's sections, in points."""

    names: float
    panel: float
    columns: int
    width: float


def dot_plots(sections: list[Section], width: float, xlabel: str, said: list[str]) -> list[Figure]:
    """Pages as wide as `width` (inches) at most. said: the parts of the note below each."""
    plan = _plan(sections, width * 72)
    sections = [replace(section, lines=[_told_in_name(section, line, plan) for line in section.lines]) for section in sections]
    plan = _plan(sections, width * 72)
    figures, page, height = [], list[tuple[Section, float]](), 0.0
    tallest = max(LEAST, TALLEST - noted(said, plan.width)[1] - 8 - EDGE)
    for section in (part for whole in sections for part in _parts(whole, plan, tallest)):
        tall = _height(section, plan)
        if page and height + tall > JOINED:
            figures.append(_page(page, plan, xlabel, said))
            page, height = [], 0.0
        page.append((section, tall))
        height += tall
    return [*figures, _page(page, plan, xlabel, said)]


def _plan(sections: list[Section], width: float) -> _Plan:
    most = LABELS * width
    names = max(extent(wrapped_to(line.name, most, USUAL), USUAL)[0] for section in sections for line in section.lines) + 5
    room, panels = width - 2 * EDGE - names - 4 - RIGHT, max(len(section.widths) for section in sections)
    columns = max(1, min(panels, int((room + GAP) // (NARROWEST + GAP))))
    columns = -(-panels // -(-panels // columns))
    panel = min((room - GAP * (columns - 1)) / columns, WIDEST)
    return _Plan(names, panel, columns, max(names + 4 + columns * panel + GAP * (columns - 1) + 2 * EDGE + RIGHT, LEAST_WIDTH))


def _told_in_name(section: Section, line: Line, plan: _Plan) -> Line:
    """With what was lost in the name, where it has no room beside the dot."""
    said = frozenset(width for width in line.lost if _room(section, line, width, plan.panel - 6) is None)
    return replace(line, name=line.name + "".join(f", {width.upper()}: {line.lost[width]}" for width in section.widths if width in said), said=said)


def _room(section: Section, line: Line, width: str, panel: float) -> Literal["left", "right"] | None:
    """On which side of its dot what was lost can be told, in a panel so wide."""
    needed, dot, (low, high) = extent(line.lost[width])[0] + 4, line.dots.get(width), _limits(section, width)
    if dot is None or dot.value < low:
        return "right" if needed + (0 if dot is None else 30) < panel else None
    right, left = (high - dot.high) / (high - low) * panel, (dot.low - low) / (high - low) * panel
    return "right" if needed < right else "left" if needed < left else None


def _parts(section: Section, plan: _Plan, tallest: float) -> Iterator[Section]:
    """What fits on a page side by side and one below the other."""
    for first in range(0, len(section.widths), plan.columns):
        lines: list[Line] = []
        here = replace(section, widths=section.widths[first : first + plan.columns], lines=lines)
        for line in section.lines:
            if lines and _height(replace(here, lines=[*lines, line]), plan) > tallest:
                yield here
                lines = []
                here = replace(here, lines=lines)
            lines.append(line)
        yield here


def _height(section: Section, plan: _Plan) -> float:
    return _top(section, plan) + sum(_pitches(section, plan)) + TICKS + BETWEEN


def _top(section: Section, plan: _Plan) -> float:
    return extent(_title(section, plan), USUAL)[1] + 3 + HEAD + LEVEL * max(_levels(section, plan), default=0)


def _title(section: Section, plan: _Plan) -> str:
    return wrapped_to(section.title, plan.width - 2 * EDGE, USUAL)


def _name(line: Line, plan: _Plan) -> str:
    return wrapped_to(line.name, plan.names - 5, USUAL)


def _pitches(section: Section, plan: _Plan) -> list[float]:
    return [PITCH + (extent(_name(line, plan), USUAL)[1] - extent("x", USUAL)[1]) for line in section.lines]


def _levels(section: Section, plan: _Plan) -> list[int]:
    """How many lines the names of guides take, panel by panel."""
    return [len({level for *_, level in _guide_places(section, width, plan)}) for width in section.widths]


def _guide_places(section: Section, width: str, plan: _Plan) -> list[tuple[Guide, float, int]]:
    """(guide, the middle of its name in points, level from below)"""
    low, high = _limits(section, width)
    found: list[tuple[Guide, float, int]] = []
    for guide in section.guides.get(width, []):
        if low <= guide.value <= high:
            if guide.short and extent(guide.name)[0] > plan.panel:
                guide = replace(guide, name=guide.short)
            half = extent(guide.name)[0] / 2
            x = (guide.value - low) / (high - low) * plan.panel
            x = min(max(x, half - GAP / 2 + 1), plan.panel - half + (GAP / 2 - 1 if width != section.widths[-1] else EDGE - 1))
            near = [level for other, at, level in found if abs(at - x) < half + extent(other.name)[0] / 2 + 4]
            found.append((guide, x, max(near, default=-1) + 1))
    return found


def _limits(section: Section, width: str) -> tuple[float, float]:
    """Of the axis: what is not far below the bulk, with intervals, seeds and guides."""
    dots = [line.dots[width] for line in section.lines if width in line.dots]
    guides = [guide.value for guide in section.guides.get(width, []) if guide.reference]
    if not dots:
        return (min(guides) - 5, max(guides) + 5) if guides else (0.0, 100.0)
    floor = floor_of([dot.value for dot in dots]) if section.cut else -np.inf
    kept = [dot for dot in dots if dot.value >= floor]
    low = min([max(min(dot.low, *dot.seeds), floor) for dot in kept] + [guide for guide in guides if guide >= floor])
    high = max([max(dot.high, *dot.seeds) for dot in kept] + guides)
    margin = max(0.04 * (high - low), 0.15)
    cut = len(kept) < len(dots)
    return low - margin * (4 if cut else 1), high + margin


def _page(sections: list[tuple[Section, float]], plan: _Plan, xlabel: str, said: list[str]) -> Figure:
    note, tall = noted(said, plan.width)
    sheet = Sheet(plan.width, sum(height for _, height in sections) + 8 + tall + EDGE)
    top = EDGE
    for section, height in sections:
        _draw(sheet, section, plan, top)
        top += height
    panels = max(len(section.widths) for section, _ in sections)
    middle = EDGE + plan.names + 4 + (panels * plan.panel + (panels - 1) * GAP) / 2
    half = extent(xlabel, 7)[0] / 2 + EDGE
    sheet.write(max(half, min(middle, plan.width - half)), top - BETWEEN + 2, xlabel, 7, ha="center")
    sheet.note(top + 6, note)
    return sheet.figure


def _draw(sheet: Sheet, section: Section, plan: _Plan, top: float) -> None:
    sheet.write(EDGE, top, _title(section, plan), USUAL, color=GREY)
    pitches, first = _pitches(section, plan), top + _top(section, plan)
    tall = sum(pitches)
    middles = [sum(pitches[:i]) + pitch / 2 for i, pitch in enumerate(pitches)]
    for i, width in enumerate(section.widths):
        left = EDGE + plan.names + 4 + i * (plan.panel + GAP)
        ax = sheet.axes(left, first, plan.panel, tall)
        sheet.write(left + plan.panel / 2, top + extent(_title(section, plan), USUAL)[1] + 3, width.upper(), 7, ha="center", weight="bold")
        for guide, x, level in _guide_places(section, width, plan):
            sheet.write(left + x, first - 2 - LEVEL * level, guide.name, SMALL, ha="center", va="bottom", color=GREY)
        _panel(ax, section, width, middles, tall, plan.panel)
        if i == 0:
            for line, middle in zip(section.lines, middles, strict=True):
                name = _name(line, plan)
                sheet.write(left - 5, first + middle, name, USUAL, ha="right", va="center" if "\n" in name else "center_baseline")


def _panel(ax: Axes, section: Section, width: str, middles: list[float], tall: float, wide: float) -> None:
    low, high = _limits(section, width)
    ax.set(xlim=(low, high), ylim=(tall, 0))
    ax.set_yticks(middles, [""] * len(middles))
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.locator_params(axis="x", nbins=4 if wide < 90 else 6, steps=[1, 2, 2.5, 5, 10])
    for guide in section.guides.get(width, []):
        if low <= guide.value <= high:
            ax.axvline(guide.value, color="#555555", lw=0.8, ls=guide.dashes, zorder=1.2)
    beyond = False
    for line, y in zip(section.lines, middles, strict=True):
        dot, partial = line.dots.get(width), width in line.lost
        lost = "" if width in line.said else line.lost.get(width, "")
        if dot is None:
            _say(ax, 0.03, y, "no result" if width in line.said else lost, line.style.ink)
        elif dot.value < low:
            beyond = True
            ax.plot(0, y, marker=4, ms=4, color=line.style.ink, transform=ax.get_yaxis_transform(), clip_on=False, zorder=4)
            _say(ax, 5 / wide, y, f"{dot.value:.1f}" + (f" ({lost})" if lost else ""), line.style.ink)
        else:
            _mark(ax, line, dot, y, partial)
            if lost and (side := _room(section, line, width, wide - 6)):
                end = dot.high if side == "right" else dot.low
                x = (end - low) / (high - low) + (3 if side == "right" else -3) / wide
                _say(ax, x, y, lost, line.style.ink, "left" if side == "right" else "right")
    if beyond:  # the axis is cut
        ax.plot([0.02, 0.045], [0, 0], marker=[(-0.4, -1), (0.4, 1)], ms=5, color="#000000", mew=0.6, ls="", transform=ax.transAxes, clip_on=False)


def _mark(ax: Axes, line: Line, dot: Dot, y: float, hollow: bool) -> None:
    color = line.style.color
    ax.plot([dot.low, dot.high], [y, y], color=mixed(color, "#ffffff", 0.45), lw=2.6, solid_capstyle="butt", zorder=2)
    ax.plot([dot.value] * 2, [y - 3, y + 3], color=line.style.ink, lw=1.0, solid_capstyle="butt", zorder=3)
    look: dict[str, Any] = {"marker": "o", "ms": 2.8, "mfc": "white" if hollow else color, "mec": line.style.ink, "mew": 0.5, "ls": ""}
    ax.plot(dot.seeds, [y] * len(dot.seeds), **look, zorder=4)


def _say(ax: Axes, x: float, y: float, text: str, color: str, ha: str = "left") -> None:
    """In a row, at a share of the panel's width."""
    look: dict[str, Any] = {"fontsize": SMALL, "color": color, "ha": ha, "va": "center_baseline", "zorder": 3}
    if text:
        ax.text(x, y, text, transform=ax.get_yaxis_transform(), bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.3}, **look)
