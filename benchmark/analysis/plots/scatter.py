"""Accuracy against what it costs: seconds, size, work. Points with their names, and the front of what nothing beats in both."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from dfqbench.analysis.cost import SECONDS, Cost, cost_of
from dfqbench.analysis.plots.drawn import FEWER, Drawn, NothingToDraw, floor_of, panels_of
from dfqbench.analysis.plots.layout import SMALL, USUAL, Labels, extent, spread, wrapped_to
from dfqbench.analysis.plots.sheet import Sheet, columns_in, grid_pages
from dfqbench.analysis.plots.style import GREY, Style, block_title
from dfqbench.analysis.plots.ticks import set_ticks
from dfqbench.analysis.size import Size, common_sizes, gigabops, megabytes, three_digits
from dfqbench.analysis.tables.blocks import Block, Entry, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LEAST = 1e-3  # seconds: the left end of a logarithmic axis
LEFT, BELOW, NARROWEST, WIDEST = 30.0, 26.0, 200.0, 250.0  # points
TALL, TALLER, MANY = 0.72, 0.92, 15  # of a panel's width: its height, and with so many points
STEP = 8.2  # points: from name to name of what lies below the axis
FAR, FARTHEST = 60.0, 100.0  # points: from a point to its name; those of the front may stand farther away
MEASURES: dict[str, Callable[[Size], float]] = {"size (MB)": megabytes, "work per image (GBOPs)": gigabops}


@dataclass(frozen=True)
class Point:
    """low, high: the ends of what is known of its place on the x axis. partial: a mean of what did not diverge. ranked: may be on the front."""

    name: str
    style: Style
    low: float
    high: float
    y: float
    partial: bool = False
    ranked: bool = True


@dataclass(frozen=True)
class Scatter:
    """front: whether it is drawn. teacher: NaN where there is none. above: names of places on the x axis, written above it."""

    title: str
    xlabel: str
    points: Sequence[Point]
    teacher: float
    front: bool = True
    above: Mapping[str, float] = field(default_factory=dict)


def scatters(panels: Sequence[Scatter], width: float, ylabel: str, said: list[str]) -> list[Figure]:
    """Pages as wide as `width` (inches) at most."""
    columns, cell = columns_in(width, len(panels), NARROWEST, 2)
    cell = min(cell, WIDEST)
    inner = cell - LEFT - 7
    tall = inner * (TALL if max(len(panel.points) for panel in panels) <= MANY else TALLER)
    some = any(point.partial for panel in panels for point in panel.points)

    def draw(sheet: Sheet, panel: Scatter, x: float, top: float, axes: float) -> None:
        sheet.write(x, top, wrapped_to(panel.title, cell, USUAL), USUAL, color=GREY)
        sheet.write(x + LEFT + inner / 2, axes + tall + 12.5, panel.xlabel, 7, ha="center")
        sheet.write(x, axes + tall / 2, ylabel, 7, va="center", rotation=90)
        _draw(sheet.axes(x + LEFT, axes, inner, tall), panel)

    def head(panel: Scatter) -> float:
        return extent(wrapped_to(panel.title, cell, USUAL), USUAL)[1] + (10 if panel.above else 3)

    return grid_pages(
        panels, columns, cell, head, tall + BELOW, [*said, f"hollow: {FEWER}" * some, "points have their names where there is room"], draw
    )


def _draw(ax: Axes, panel: Scatter) -> None:
    labels, floor = Labels(ax), floor_of([point.y for point in panel.points])
    there, beyond = ([point for point in panel.points if (point.y < floor) == below] for below in (False, True))
    _set_axes(ax, panel, there, len(beyond), labels.size[1])
    if np.isfinite(panel.teacher):
        _teacher(ax, panel.teacher, labels)
    front = front_of(panel.points)
    if panel.front and front:
        ends = [front[0].high, *(point.high for point in front), ax.get_xlim()[1]]
        steps = [ax.get_ylim()[0], *(point.y for point in front), front[-1].y]
        ax.step(ends, steps, where="post", color="#aaaaaa", lw=0.9, zorder=1)
        labels.occupy_line([x for pair in pairwise(ends) for x in pair], [y for y in steps[:-1] for _ in range(2)])
    _beyond(ax, beyond, labels)
    for point in there:
        _mark(ax, point)
        labels.occupy_line([point.low, point.high], [point.y] * 2)
        for x in {point.low, point.high}:
            labels.occupy(x, point.y, 3.2)
    for point in sorted(there, key=lambda point: (point not in front, -point.y)):
        wanted = point in front
        labels.add(sorted({point.high, point.low}, reverse=True), point.y, point.name, point.style.ink, FARTHEST if wanted else FAR, through=wanted)
    _above(ax, panel.above, labels)


def _set_axes(ax: Axes, panel: Scatter, there: Sequence[Point], beyond: int, tall: float) -> None:
    """Limits and ticks, with room below for the names of what lies beyond and above for the teacher's."""
    values = [point.y for point in there] + [panel.teacher] * bool(np.isfinite(panel.teacher))
    low, high, under = min(values), max(values), (STEP * min(beyond, _places(tall)) + 4) * bool(beyond)
    margin = max(0.06 * (high - low), 0.5)  # two decimals of its ticks would say nothing
    a_point = (high - low + 2 * margin) / (tall - under)
    ax.set_ylim(low - margin - a_point * under, high + max(margin, 9.5 * a_point))
    ax.set_xscale("log")
    ax.set_xlim(_limits([x for point in panel.points for x in (point.low, point.high)]))
    set_ticks(ax.xaxis, *ax.get_xlim(), 6)
    ax.locator_params(axis="y", nbins=6)


def _places(tall: float) -> int:
    """For names of what lies below an axis so tall: not in its upper half."""
    return int(tall / 2 // STEP)


def _beyond(ax: Axes, points: Sequence[Point], labels: Labels) -> None:
    """Arrows at the lower edge, each with a name and a value at a height of its own, to the left where there is room."""
    if not points:
        return
    (wide, high), bottom = labels.size, ax.get_ylim()[0]
    said = [(f"{point.name}: {point.y:.1f}", labels.place(point.high, bottom)[0], point.style.ink) for point in points]
    to_the_left = sorted((each for each in said if each[1] - extent(each[0])[0] > 4), key=lambda each: each[1])
    others = sorted((each for each in said if each not in to_the_left), key=lambda each: -each[1])
    for i, (name, x, color) in enumerate([*to_the_left, *others]):
        left, y = i < len(to_the_left), 3 + STEP * (i + 0.5)
        ax.plot(x / wide, 0.0, marker=7, ms=4, color=color, transform=ax.transAxes, clip_on=False, zorder=4)
        if i >= _places(high):  # no room for more names
            continue
        ax.plot([x / wide] * 2, [0.0, y / high], color=color, lw=0.4, transform=ax.transAxes, zorder=1.5)
        labels.lines.append((x, 0.0, x, y))
        edge = x - 3 - extent(name)[0] if left else x + 3
        labels.write((edge, y - STEP / 2, edge + extent(name)[0], y + STEP / 2), name, color)


def _teacher(ax: Axes, top1: float, labels: Labels) -> None:
    ax.axhline(top1, color="#555555", lw=0.8, ls=(0, (5, 2)), zorder=1.2)
    y = labels.place(1.0, top1)[1]
    look: dict[str, Any] = {"fontsize": SMALL, "color": GREY, "ha": "right", "va": "bottom", "transform": ax.transAxes}
    labels.occupy_text(ax.text(0.99, (y + 1) / labels.size[1], f"teacher {top1:.1f}", **look))
    labels.occupy_line(ax.get_xlim(), [top1, top1])


def _above(ax: Axes, names: Mapping[str, float], labels: Labels) -> None:
    """Names of places on the x axis, side by side."""
    wide, high = labels.size
    wanted = [labels.place(x, 1.0)[0] for x in names.values()]
    places = spread(wanted, [extent(name)[0] + 4 for name in names], 0.0, wide)
    for name, x in zip(names, places, strict=True):
        ax.text(x / wide, 1 + 1.5 / high, name, transform=ax.transAxes, fontsize=SMALL, color=GREY, ha="center", va="bottom")


def _mark(ax: Axes, point: Point) -> None:
    """One or, where its place is a range, two markers with a line between them."""
    ends = [point.low, point.high][: 1 + (point.low != point.high)]
    look: dict[str, Any] = {"color": point.style.color, "zorder": 3}
    ax.plot(ends, [point.y] * len(ends), lw=0.7, **look)
    ax.plot(ends, [point.y] * len(ends), marker=point.style.marker, ms=4, mfc="white" if point.partial else point.style.color, ls="", **look)


def front_of(points: Sequence[Point]) -> list[Point]:
    """What nothing beats in both, from cheap to dear."""
    front: list[Point] = []
    for point in sorted((point for point in points if point.ranked), key=lambda point: (point.high, -point.y)):
        if not front or point.y > front[-1].y:
            front.append(point)
    return front


def _limits(values: Sequence[float]) -> tuple[float, float]:
    """Of a logarithmic axis, of a factor of three at least."""
    ratio = max(values) / min(values)
    margin = max(ratio**0.07, (3 / ratio) ** 0.5)
    return min(values) / margin, max(values) * margin


def cost(drawn: Drawn) -> list[Figure]:
    """Accuracy against seconds, width by width. Cells that ran on several hosts or devices are a line from the least to the greatest mean."""
    panels = []
    for block, width in panels_of(drawn):
        for costs in _costs(drawn, block, width):
            points = [_costing(drawn, width, row, entry, spent) for row, entry, spent, _ in costs]
            one_device = len({place for *_, places in costs for place in places}) == 1  # seconds of two say nothing of who is faster
            title, xlabel = f"{width.upper()}: {block_title(block, drawn.blocks)}", f"{SECONDS[costs[0][2].clock]} per cell"
            panels.append(Scatter(title, xlabel, points, block.teacher_top1, one_device))
    if not panels:
        raise NothingToDraw("no row has cells whose seconds can be told together")
    said = ["lines: the lowest and the highest mean of a host or device"] * any(p.low != p.high for panel in panels for p in panel.points)
    if any(not panel.front for panel in panels):
        said.append("no front where seconds are of several devices")
    return scatters(panels, drawn.width, drawn.score, ["grey: the front of what nothing beats in both"] * any(p.front for p in panels) + said)


def _costing(drawn: Drawn, width: str, row: Row, entry: Entry, spent: Cost) -> Point:
    low, high = max(spent.low, LEAST), max(spent.high, LEAST)
    complete = width not in row.lost
    return Point(drawn.brief[row.label], drawn.look[row.label], low if spent.several else high, high, entry.mean, not complete, complete)


Spent = tuple[Row, Entry, Cost, set[tuple[Any, ...]]]  # the last: on which devices, and for wall seconds on which hosts


def _costs(drawn: Drawn, block: Block, width: str) -> Iterator[list[Spent]]:
    """What was computed on GPUs and what on CPUs, each by one clock."""
    results = {result["id"]: result for result in drawn.reading.results}
    there = [(row, row.entries[width]) for row in block.rows if width in row.entries]
    for clocks in (("GPU",), ("CPU", "wall")):
        some = [(row, entry) for row, entry in there if entry.cost.clock in clocks]
        clock = max((entry.cost.clock for _, entry in some), default="")  # wall where only some know their processor time
        found = []
        for row, entry in some:
            its = [results[cell_id] for cell_id in entry.ids]
            places = {(on["device_name"], on.get("host") if clock == "wall" else None) for on in (result["provenance"] for result in its)}
            found.append((row, entry, cost_of(its, clock), places))
        if found:
            yield found


def size(drawn: Drawn) -> list[Figure]:
    """Accuracy against size and against work, over all bit widths."""
    results = {result["id"]: result for result in drawn.reading.results}
    panels = []
    for block in drawn.blocks:
        there = [(row, width, row.entries[width]) for row in block.rows for width in block.widths if width in row.entries]
        sized = [(row, width, entry, its) for row, width, entry in there if (its := common_sizes(results[cell_id] for cell_id in entry.ids))]
        for measure, of in MEASURES.items() if sized else ():
            xlabel = f"{measure}; the teacher has {three_digits(of(sized[0][3].teacher))}"
            points = [_sized(drawn, row, width, entry, of(its.student)) for row, width, entry, its in sized]
            at = {w: [of(its.student) for _, width, _, its in sized if width == w] for w in block.widths}
            above = {w.upper(): float(np.mean(xs)) for w, xs in at.items() if xs}
            panels.append(Scatter(block_title(block, drawn.blocks), xlabel, points, block.teacher_top1, above=above))
    if not panels:
        raise NothingToDraw("no result has a size: all were written by earlier versions, which did not count it")
    return scatters(panels, drawn.width, drawn.score, ["grey: the front of what nothing beats in both"])


def _sized(drawn: Drawn, row: Row, width: str, entry: Entry, x: float) -> Point:
    complete = width not in row.lost
    return Point(drawn.brief[row.label], drawn.look[row.label], x, x, entry.mean, not complete, complete)
