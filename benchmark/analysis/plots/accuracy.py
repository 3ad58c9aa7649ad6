"""Plots of what students reached: against bits, against what is published, against seconds, against the teacher."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from dfqbench.analysis.plots.drawn import Drawn, NothingToDraw, entries_of
from dfqbench.analysis.plots.style import COLUMN, HIGH, SETTINGS, add_legend, leave_out_failures, pages, panel_title, wrapped
from dfqbench.analysis.tables.blocks import Block, Entry

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAP_COLUMNS = 14  # of a heat map; more networks go on another page


def accuracy(drawn: Drawn) -> list[Figure]:
    """Accuracy against bits, with intervals over test images and seeds."""
    figures = []
    labels = [row.label for row in drawn.rows()] + ["teacher"]
    for figure, axes in pages("", drawn.blocks, HIGH, labels):
        handles: dict[str, Any] = {}
        for ax, block in axes:
            widths, points = block.widths[::-1], []
            for i, row in enumerate(block.rows[::-1]):
                there = [w for w in widths if w in row.entries]
                entries = [row.entries[w] for w in there]
                x = np.array([widths.index(w) for w in there]) + _dodge(i, len(block.rows))
                style = drawn.look[row.label]
                points += [(float(place), e.mean, style.color) for place, e in zip(x, entries, strict=True)]
                handles[row.label] = ax.errorbar(
                    x, [e.mean for e in entries], yerr=_reach(entries), color=style.color, marker=style.marker, ls=style.dashes, elinewidth=0.8
                )
            handles["teacher"] = ax.axhline(block.teacher_top1, color="#555555", lw=0.9, ls=(0, (5, 2)))
            ax.set_xticks(range(len(widths)), [w.upper() for w in widths])
            ax.set_xlim(-0.5, len(widths) - 0.5)
            ax.set_ylabel(drawn.top1)
            leave_out_failures(ax, points)
            ax.set_title(panel_title(block, drawn.blocks))
        handles = {label: handles[label] for label in labels if label in handles}
        add_legend(figure, handles, 1 if len(axes) == 1 else 2)
        figures.append(figure)
    return figures


def _dodge(i: int, n: int) -> float:
    """Side by side, so that error bars do not hide each other."""
    return 0.0 if n == 1 else (i / (n - 1) - 0.5) * min(0.06 * n, 0.4)


def _reach(entries: list[Entry]) -> list[list[float]]:
    """Below and above the mean: the interval where per-image results are known, two standard errors elsewhere."""
    low = [e.mean - e.estimate.low if e.estimate else 2 * e.error for e in entries]
    high = [e.estimate.high - e.mean if e.estimate else 2 * e.error for e in entries]
    return [low, high]


def published(drawn: Drawn) -> list[Figure]:
    """Measured against published."""
    points = [(block, row, width, entry) for block, row, width, entry in entries_of(drawn) if entry.published]
    if not points:
        whys = sorted({why for block in drawn.blocks for why in block.why_no_claims if "published number" in why})
        raise NothingToDraw("; ".join(whys) or "no published number is about a method that was measured here")
    labels = [*dict.fromkeys(row.label for _, row, _, _ in points), "as published"]
    ((figure, ((ax, _),)),) = pages("", [None], 2.9, labels)
    handles: dict[str, Any] = {}
    for block, row, width, entry in points:
        style, claim = drawn.look[row.label], entry.published
        assert claim is not None
        middle = (claim.low + claim.high) / 2
        handles[row.label] = ax.errorbar(
            [middle],
            [entry.mean],
            xerr=[[middle - claim.low], [claim.high - middle]],
            yerr=_reach([entry]),
            color=style.color,
            marker=style.marker,
            ls="",
        )
        name = width.upper() if len({b.teacher for b, *_ in points}) == 1 else f"{block.teacher} {width.upper()}"
        ax.annotate(name, (middle, entry.mean), (4, -7), textcoords="offset points", fontsize=6, color="#444444")
    values = [v for _, _, _, e in points if e.published for v in (e.mean, e.published.low, e.published.high)]
    margin = max((max(values) - min(values)) * 0.12, 1.0)
    ends = [min(values) - margin, max(values) + margin]
    handles["as published"] = ax.plot(ends, ends, color="#999999", lw=0.8, zorder=0)[0]
    ax.set(xlim=ends, ylim=ends, xlabel="published top-1 (%)", ylabel=f"measured {drawn.top1}")
    add_legend(figure, handles, 1)
    return [figure]


def cost(drawn: Drawn) -> list[Figure]:
    """Accuracy against seconds, with the front of what nothing beats in both, per width."""
    figures = []
    labels = [row.label for row in drawn.rows()]
    for figure, axes in pages("", drawn.blocks, HIGH + 0.15, labels):
        handles: dict[str, Any] = {}
        for ax, block in axes:
            ends: dict[str, tuple[float, float]] = {}
            points: list[tuple[float, float, str]] = []
            for width in block.widths:
                there = sorted((row.entries[width].seconds, -row.entries[width].mean, row.label) for row in block.rows if width in row.entries)
                front: list[tuple[float, float]] = []
                for seconds, minus, _ in there:
                    if not front or -minus > front[-1][1]:
                        front.append((max(seconds, 1e-3), -minus))
                right = max(max(seconds for seconds, _, _ in there), 1e-3)
                ax.step(
                    [x for x, _ in front] + [right * 1.3], [y for _, y in front] + [front[-1][1]], where="post", color="#bbbbbb", lw=0.8, zorder=1
                )
                ends[width.upper()] = (right * 1.3, front[-1][1])
                for seconds, minus, label in there:
                    style = drawn.look[label]
                    points.append((max(seconds, 1e-3), -minus, style.color))
                    handles[label] = ax.plot(max(seconds, 1e-3), -minus, color=style.color, marker=style.marker, ls="", zorder=2)[0]
            ax.set_xscale("log")
            low, high = ax.get_xlim()
            ax.set_xlim(low, high * (high / low) ** 0.1)
            leave_out_failures(ax, points)
            _name_ends(ax, ends)
            ax.set(xlabel=f"{block.time} per cell", ylabel=drawn.top1)
            ax.set_title(panel_title(block, drawn.blocks))
        add_legend(figure, {label: handles[label] for label in labels if label in handles}, 1 if len(axes) == 1 else 2)
        figures.append(figure)
    return figures


def _name_ends(ax: Axes, ends: dict[str, tuple[float, float]]) -> None:
    """Writes names to the right of line ends, moved apart where they would overlap."""
    low, high = ax.get_ylim()
    gap, last = (high - low) * 0.055, -np.inf
    for name, (x, y) in sorted(ends.items(), key=lambda end: end[1][1]):
        last = max(y, last + gap)
        ax.annotate(name, (x, last), (2, 0), textcoords="offset points", va="center", fontsize=6, color="#555555")


def drop(drawn: Drawn) -> list[Figure]:
    """Heat map of what is lost against the teacher: methods x (network, bits), never mixing protocols, precisions or evaluation sets."""
    groups: dict[tuple[str, str, str], list[Block]] = {}
    for block in drawn.blocks:
        groups.setdefault((block.evaluation, block.protocol, block.precision), []).append(block)
    worst = max(1e-9, *(entry.drop for _, _, _, entry in entries_of(drawn)))
    figures = []
    for (evaluation, protocol, precision), group in groups.items():
        page: list[Block] = []
        for block in group:
            if page and sum(len(b.widths) for b in [*page, block]) > MAP_COLUMNS:
                figures.append(_map(page, f"drop in points on {evaluation}, {protocol}, {precision}", worst))
                page = []
            page.append(block)
        figures.append(_map(page, f"drop in points on {evaluation}, {protocol}, {precision}", worst))
    return figures


def _map(group: list[Block], title: str, worst: float) -> Figure:
    from matplotlib.figure import Figure

    columns = [(block, width) for block in group for width in block.widths]
    labels = list(dict.fromkeys(row.label for row in sorted((r for b in group for r in b.rows), key=lambda row: -row.mean)))
    values = np.full((len(labels), len(columns)), np.nan)
    for j, (block, width) in enumerate(columns):
        for row in block.rows:
            if width in row.entries:
                values[labels.index(row.label), j] = row.entries[width].drop
    names = [wrapped(label, 26) for label in labels]
    tall = max(sum(name.count("\n") + 1 for name in names), len(names) * 1.3)
    figure = Figure(figsize=(max(COLUMN, 1.6 + 0.38 * len(columns)), 0.9 + 0.19 * tall), layout="constrained")
    ax = figure.subplots()
    ax.grid(False)
    ax.imshow(values, cmap="YlOrBr", vmin=0, vmax=worst, aspect="auto")
    for (i, j), value in np.ndenumerate(values):
        text = "-" if np.isnan(value) else f"{value + 0.0:.1f}".replace("-0.0", "0.0")
        ax.text(j, i, text, ha="center", va="center", fontsize=6.5, color="white" if value > 0.6 * worst else "black")
    ax.set_yticks(range(len(labels)), names)
    ax.set_xticks(range(len(columns)), [width.upper() for _, width in columns])
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    first = 0
    for block in group:
        ax.text(first + (len(block.widths) - 1) / 2, -0.62, block.teacher, ha="center", va="bottom", fontsize=7)
        first += len(block.widths)
        if first < len(columns):
            ax.axvline(first - 0.5, color="white", lw=2.5)
    figure.suptitle(wrapped(title, 46 if len(columns) < 8 else 100), fontsize=SETTINGS["axes.titlesize"])  # over the labels too, or it is cut off
    return figure
