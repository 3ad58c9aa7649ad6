"""What students reached against how large they are and how much work they do."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from dfqbench.analysis.plots.drawn import FEWER, Drawn, NothingToDraw, fill
from dfqbench.analysis.plots.style import CROWDED, HIGH, add_legend, leave_out_failures, pages, panel_title
from dfqbench.analysis.size import Size, Sizes, common_sizes, gigabops, megabytes, three_digits
from dfqbench.analysis.tables.blocks import Block, Entry, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MEASURES: dict[str, Callable[[Size], float]] = {"size (MB)": megabytes, "work per image (GBOPs)": gigabops}
Place = tuple[Row, str, Entry, Sizes]


def size(drawn: Drawn) -> list[Figure]:
    """Accuracy against size and against work, a figure for each teacher."""
    results = {result["id"]: result for result in drawn.reading.results}
    by_teacher: dict[str, list[tuple[Block, list[Place]]]] = {}
    for block in drawn.blocks:
        places = [
            (row, width, row.entries[width], sizes)
            for row in block.rows[::-1]
            for width in block.widths[::-1]
            if width in row.entries and (sizes := common_sizes(results[cell_id] for cell_id in row.entries[width].ids))
        ]
        if places:
            by_teacher.setdefault(block.teacher, []).append((block, places))
    if not by_teacher:
        raise NothingToDraw("no result has a size: all were written by earlier versions, which did not count it")
    figures = []
    for found in by_teacher.values():
        there = {row.label for _, places in found for row, *_ in places}
        labels = [row.label for row in drawn.rows() if row.label in there] + ["teacher"]
        labels += [FEWER] * any(width in row.lost for _, places in found for row, width, *_ in places)
        panels = [(block, places, measure) for block, places in found for measure in MEASURES]
        for figure, axes in pages("", panels, HIGH + 0.15, labels):
            handles: dict[str, Any] = {}
            for ax, (block, places, measure) in axes:
                handles |= _draw(ax, drawn, block, places, measure)
                ax.set_title(panel_title(block, drawn.blocks))
            handles[FEWER] = axes[0][0].plot([], [], color="#444444", marker="o", mfc="white", ls="")[0]
            add_legend(figure, {label: handles[label] for label in labels if label in handles}, 2)
            figures.append(figure)
    return figures


def _draw(ax: Axes, drawn: Drawn, block: Block, places: list[Place], measure: str) -> dict[str, Any]:
    """A line for each row through its bit widths; handles by label."""
    of, handles = MEASURES[measure], dict[str, Any]()
    points = [(of(sizes.student), entry.mean, drawn.look[row.label].color) for row, _, entry, sizes in places]
    for label in dict.fromkeys(row.label for row, *_ in places):
        style, its = drawn.look[label], [(point, place) for point, place in zip(points, places, strict=True) if place[0].label == label]
        look: dict[str, Any] = {"color": style.color, "marker": style.marker}
        ax.plot([x for (x, *_), _ in its], [y for (_, y, _), _ in its], color=style.color, ls=style.dashes, lw=0.7)
        for (x, y, color), (row, width, *_) in its:
            ax.plot(x, y, **look, ls="", mfc=fill(row, width, color))
        handles[label] = ax.plot([], [], **look, ls=style.dashes)[0]
    if np.isfinite(block.teacher_top1):
        handles["teacher"] = ax.axhline(block.teacher_top1, color="#555555", lw=0.9, ls=(0, (5, 2)))
    ax.autoscale_view(scalex=False)  # with the teacher
    _set_ticks(ax, [x for x, *_ in points])
    ax.set(xlabel=f"{measure}; the teacher has {three_digits(of(places[0][3].teacher))}", ylabel=drawn.top1)
    leave_out_failures(ax, points)
    means = {w: float(np.mean([x for (x, *_), place in zip(points, places, strict=True) if place[1] == w])) for w in block.widths}
    _name_widths(ax, means)
    return handles


def _name_widths(ax: Axes, means: dict[str, float]) -> None:
    """Above the axes, at the mean place of each width's students; every second name higher where they are crowded."""
    names = [(x, width.upper()) for width, x in sorted(means.items(), key=lambda item: item[1]) if np.isfinite(x)]
    places = [float(ax.transAxes.inverted().transform(ax.transData.transform((x, 1.0)))[0]) for x, _ in names]
    crowded = any(right - left < CROWDED for left, right in pairwise(places))
    top = ax.secondary_xaxis("top")
    top.set_xticks([x for x, _ in names], [name + "\n" * (crowded and i % 2) for i, (_, name) in enumerate(names)], fontsize=5.5, color="#777777")
    top.set_xticks([], minor=True)
    top.tick_params(length=0, pad=1)
    top.spines[:].set_visible(False)


def _set_ticks(ax: Axes, values: list[float]) -> None:
    """A logarithmic axis, of an octave at least, with plain numbers: the most, up to six, that are round."""
    ax.set_xscale("log")
    ratio = max(values) / min(values)
    margin = max(ratio**0.05, (2 / ratio) ** 0.5)
    low, high = ax.set_xlim(min(values) / margin, max(values) * margin)
    powers = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    rounds = ((1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8), (1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,))
    ticks = [[n * 10.0**p for p in powers for n in numbers if low <= n * 10.0**p <= high] for numbers in rounds]
    best = next((its for its in ticks if len(its) <= 6), ticks[-1])
    ax.set_xticks(best, [f"{tick:g}" for tick in best])
    ax.set_xticks([], minor=True)
