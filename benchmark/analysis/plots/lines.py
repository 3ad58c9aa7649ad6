"""Lines with their names at their ends: accuracy over bit widths, and while students are trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from dfqbench.analysis.plots.drawn import floor_of
from dfqbench.analysis.plots.layout import SMALL, USUAL, extent, spread, wrapped_to
from dfqbench.analysis.plots.sheet import Sheet, columns_in, grid_pages
from dfqbench.analysis.plots.style import GREY, Style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LEFT, BELOW, LEADER = 30.0, 26.0, 9.0  # points: beside and below a panel, to the names
LOWEST, WIDEST = 115.0, 300.0  # points: of a panel
NARROWEST = 230.0  # points: of a panel with its names


@dataclass(frozen=True)
class Curve:
    """ends: intervals of the points. faint: whether it is only means of what did not diverge. lost: what did. rings: points (x, y) to mark."""

    name: str
    style: Style
    xs: list[float]
    ys: list[float]
    ends: Sequence[tuple[float, float]] = ()
    faint: bool = False
    rings: Sequence[tuple[float, float]] = ()
    marker: str = ""
    lost: str = ""


@dataclass(frozen=True)
class Panel:
    """ticks: names of whole numbers on the x axis. teacher: NaN where there is none."""

    title: str
    curves: list[Curve]
    teacher: float
    xlabel: str
    ylabel: str
    ticks: Sequence[str] = ()
    lost: list[Curve] = field(default_factory=list)


def line_panels(panels: list[Panel], width: float, said: list[str]) -> list[Figure]:
    """Pages as wide as `width` (inches) at most. said: the parts of the note below each."""
    columns, wide = columns_in(width, len(panels), NARROWEST)
    names = max(extent(text)[0] for panel in panels for text, *_ in _ends(panel, wide))
    inner = min(wide - LEFT - LEADER - names, WIDEST)
    cell = LEFT + inner + LEADER + names
    tall = max(LOWEST, *(sum(_heights(panel, wide)) for panel in panels))
    below = BELOW if any(panel.xlabel or "\n" in "".join(_ticks(panel, inner)) for panel in panels) else 15.0

    def draw(sheet: Sheet, panel: Panel, x: float, top: float, axes: float) -> None:
        sheet.write(x, top, wrapped_to(panel.title, cell, USUAL), USUAL, color=GREY)
        _draw(sheet, panel, (x + LEFT, axes, inner, tall), wide)

    return grid_pages(panels, columns, cell, lambda panel: extent(wrapped_to(panel.title, cell, USUAL), USUAL)[1] + 3, tall + below, said, draw)


def _ends(panel: Panel, wide: float) -> list[tuple[str, float | None, float, str]]:
    """(what is written at the right, where its line ends: x or None for the edge, y; colour)"""
    low = _limits(panel)[0]
    names = [curve.name + (f": {curve.ys[-1]:.1f}" if curve.ys[-1] < low else "") + curve.lost for curve in panel.curves]
    found = [(wrapped_to(name, 0.36 * wide), curve.xs[-1], curve.ys[-1], curve.style.ink) for name, curve in zip(names, panel.curves, strict=True)]
    return [*found, *([(f"teacher {panel.teacher:.1f}", None, panel.teacher, GREY)] if np.isfinite(panel.teacher) else [])]


def _heights(panel: Panel, wide: float) -> list[float]:
    return [extent(text)[1] + 0.8 for text, *_ in _ends(panel, wide)]


def _ticks(panel: Panel, inner: float) -> list[str]:
    """On two lines, weights above activations, where one has no room beside the next."""
    room = inner / max(len(panel.ticks) - 1, 1) - 3
    tight = any(extent(tick, USUAL)[0] > room for tick in panel.ticks)
    return [tick.replace("A", "\nA") if tight else tick for tick in panel.ticks]


def _draw(sheet: Sheet, panel: Panel, place: tuple[float, float, float, float], wide: float) -> None:
    left, top, inner, tall = place
    ax = sheet.axes(left, top, inner, tall)
    low, high = _limits(panel)
    xs = [x for curve in panel.curves for x in curve.xs]
    margin = 0.15 if panel.ticks else 0.02 * max(max(xs) - min(xs), 1e-9)
    ax.set(ylim=(low, high), xlim=(min(xs) - margin, max(xs) + margin / (3 if panel.ticks else 1)))
    if panel.ticks:
        ax.set_xticks(range(len(panel.ticks)), _ticks(panel, inner))
        ax.set_xlim(-0.15, len(panel.ticks) - 0.95)
    else:
        ax.locator_params(axis="x", nbins=5)
    ax.locator_params(axis="y", nbins=6)
    sheet.write(left + inner / 2, top + tall + 12.5, panel.xlabel, 7, ha="center")
    sheet.write(left - LEFT, top + tall / 2, panel.ylabel, 7, va="center", rotation=90)
    if np.isfinite(panel.teacher):
        ax.axhline(panel.teacher, color="#555555", lw=0.8, ls=(0, (5, 2)), zorder=1.2)
    for curve in panel.curves:
        _line(ax, curve)
    _names(sheet, ax, panel, place, wide)


def _limits(panel: Panel) -> tuple[float, float]:
    """Where the lines' ends are, and, but for their first quarter, the lines."""
    ends = [curve.ys[-1] for curve in panel.curves]
    floor = floor_of(ends)
    kept = [curve for curve in panel.curves if curve.ys[-1] >= floor]
    start = [curve.ys if panel.ticks else curve.ys[len(curve.ys) // 4 :] for curve in kept]
    low = min(max(min(ys), floor) for ys in start)
    high = max([y for curve in kept for y in curve.ys] + [panel.teacher] * bool(np.isfinite(panel.teacher)))
    margin = max(0.05 * (high - low), 0.5)
    return max(low - margin, min(-margin, low)), high + margin


def _line(ax: Axes, curve: Curve) -> None:
    color = curve.style.color
    look: dict[str, Any] = {"alpha": 0.45 if curve.faint else None}
    ax.plot(curve.xs, curve.ys, color=color, ls=curve.style.dashes, marker=curve.marker, ms=3, mfc="white" if curve.faint else color, **look)
    for x, (low, high) in zip(curve.xs, curve.ends, strict=False):
        ax.plot([x, x], [low, high], color=color, lw=0.7, **look)
    for x, y in curve.rings:
        ax.plot(x, y, color=color, marker="o", ms=4.5, mfc="none", mew=0.8, ls="", **look)


def _names(sheet: Sheet, ax: Axes, panel: Panel, place: tuple[float, float, float, float], wide: float) -> None:
    """At the right, each with a thin line from where its curve ends; one that ends below the axis has its value."""
    left, top, inner, tall = place
    (x0, x1), (low, high) = ax.get_xlim(), ax.get_ylim()
    ends = [(text, 1.0 if x is None else (x - x0) / (x1 - x0), (y - low) / (high - low), color) for text, x, y, color in _ends(panel, wide)]
    places = spread([max(y, 0.0) * tall for _, _, y, _ in ends], _heights(panel, wide), 0.0, tall)
    for (text, x, y, color), at in zip(ends, places, strict=True):
        leader: dict[str, Any] = {"color": color, "lw": 0.4, "alpha": 0.8, "transform": ax.transAxes, "clip_on": False, "zorder": 1.1}
        ax.plot([x, 1 + 1 / inner, 1 + (LEADER - 1.5) / inner], [max(y, 0), max(y, 0), at / tall], **leader)
        if y < 0:
            ax.plot(x, 0.0, marker=7, ms=4, color=color, transform=ax.transAxes, clip_on=False, zorder=4)
        look: dict[str, Any] = {"color": color, "va": "center" if "\n" in text else "center_baseline"}
        sheet.write(left + inner + LEADER, top + tall - at, text, SMALL, **look)
