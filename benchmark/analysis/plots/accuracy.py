"""Plots of what students reached: against bits, against what is published, against seconds, against the teacher."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from dfqbench.analysis.cost import SECONDS, Cost, cost_of
from dfqbench.analysis.plots.drawn import FEWER, LOST, Drawn, NothingToDraw, entries_of, fill, panels_of
from dfqbench.analysis.plots.style import COLUMN, HIGH, SETTINGS, add_legend, leave_out_failures, pages, panel_title, wrapped
from dfqbench.analysis.stats import interval
from dfqbench.analysis.tables.blocks import Block, Entry, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LEAST = 1e-3  # seconds: the left end of a logarithmic axis
MAP_COLUMNS = 14  # of a heat map; more networks go on another page


def accuracy(drawn: Drawn) -> list[Figure]:
    """Accuracy against bits, with intervals over test images and seeds."""
    figures = []
    lost = [(row.entries.keys(), row.lost.keys()) for block in drawn.blocks for row in block.rows]
    labels = [row.label for row in drawn.rows()] + ["teacher"]
    labels += [FEWER] * any(done & gone for done, gone in lost) + [LOST] * any(gone - done for done, gone in lost)
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
                look: dict[str, Any] = {"color": style.color, "marker": style.marker, "ls": style.dashes}
                bars = ax.errorbar(x, [e.mean for e in entries], yerr=_reach(entries), elinewidth=0.8, **look)
                for w, place, entry in zip(there, x, entries, strict=True):
                    if w in row.lost:
                        ax.plot(place, entry.mean, **look, mfc="white", zorder=3)
                gone = [widths.index(w) + _dodge(i, len(block.rows)) for w in widths if w in row.lost and w not in row.entries]
                for place in gone:
                    ax.plot(place, 0.0, color=style.color, marker="x", mew=1.2, transform=ax.get_xaxis_transform(), clip_on=False)
                if there or row.label not in handles:
                    handles[row.label] = bars
            if np.isfinite(block.teacher_top1):
                handles["teacher"] = ax.axhline(block.teacher_top1, color="#555555", lw=0.9, ls=(0, (5, 2)))
            ax.set_xticks(range(len(widths)), [w.upper() for w in widths])
            ax.set_xlim(-0.5, len(widths) - 0.5)
            ax.set_ylabel(drawn.top1)
            leave_out_failures(ax, points)
            if not points:
                ax.set_ylim(0, 100)
            ax.set_title(panel_title(block, drawn.blocks))
        _explain(axes[0][0], labels, handles)
        handles = {label: handles[label] for label in labels if label in handles}
        add_legend(figure, handles, 1 if len(axes) == 1 else 2)
        figures.append(figure)
    return figures


def _explain(ax: Axes, labels: list[str], handles: dict[str, Any]) -> None:
    """What hollow markers and crosses are, where there are some."""
    for name, marker in ((FEWER, "o"), (LOST, "x")):
        if name in labels:
            handles[name] = ax.plot([], [], color="#444444", marker=marker, mfc="white", ls="")[0]


def _dodge(i: int, n: int) -> float:
    """Side by side, so that error bars do not hide each other."""
    return 0.0 if n == 1 else (i / (n - 1) - 0.5) * min(0.06 * n, 0.4)


def _reach(entries: list[Entry]) -> list[list[float]]:
    """Below and above the mean: its 95 % interval, of standard errors alone where there are no per-image results."""
    ends = [(e.estimate.low, e.estimate.high) if e.estimate else interval(e.mean, e.error) for e in entries]
    return [[e.mean - low for e, (low, _) in zip(entries, ends, strict=True)], [high - e.mean for e, (_, high) in zip(entries, ends, strict=True)]]


def published(drawn: Drawn) -> list[Figure]:
    """Measured against published."""
    points = [(block, row, width, entry) for block, row, width, entry in entries_of(drawn) if entry.published]
    if not points:
        whys = sorted({why for block in drawn.blocks for why in block.why_no_claims if "published number" in why})
        raise NothingToDraw("; ".join(whys) or "no published number is about a method that was measured here")
    labels = [*dict.fromkeys(row.label for _, row, _, _ in points), "as published"]
    labels += [FEWER] * any(width in row.lost for _, row, width, _ in points)
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
            mfc=fill(row, width, style.color),
            ls="",
        )
        name = width.upper() if len({b.teacher for b, *_ in points}) == 1 else f"{block.teacher} {width.upper()}"
        ax.annotate(name, (middle, entry.mean), (4, -7), textcoords="offset points", fontsize=6, color="#444444")
    values = [v for _, _, _, e in points if e.published for v in (e.mean, e.published.low, e.published.high)]
    margin = max((max(values) - min(values)) * 0.12, 1.0)
    ends = [min(values) - margin, max(values) + margin]
    handles["as published"] = ax.plot(ends, ends, color="#999999", lw=0.8, zorder=0)[0]
    ax.set(xlim=ends, ylim=ends, xlabel="published top-1 (%)", ylabel=f"measured {drawn.top1}")
    _explain(ax, labels, handles)
    add_legend(figure, {label: handles[label] for label in labels}, 1)
    return [figure]


def cost(drawn: Drawn) -> list[Figure]:
    """Accuracy against seconds, width by width. Cells that ran on several hosts or devices are a line from the least to the greatest mean."""
    panels = [(block, width, costs) for block, width in panels_of(drawn) for costs in _costs(drawn, block, width)]
    if not panels:
        raise NothingToDraw("no row has cells whose seconds can be told together")
    labels = [row.label for row in drawn.rows() if any(row.label == there.label for *_, costs in panels for there, *_ in costs)]
    labels += [FEWER] * any(width in row.lost for _, width, costs in panels for row, *_ in costs)
    figures = []
    for figure, axes in pages("", panels, HIGH + 0.15, labels):
        handles: dict[str, Any] = {}
        for ax, (block, width, costs) in axes:
            points: list[tuple[float, float, str]] = []
            for row, entry, spent, _ in costs:
                style, ends = drawn.look[row.label], [max(spent.low, LEAST), max(spent.high, LEAST)][: 1 + spent.several]
                points.append((ends[0], entry.mean, style.color))
                ax.plot(ends, [entry.mean] * len(ends), color=style.color, lw=0.7, zorder=2)
                look: dict[str, Any] = {"color": style.color, "marker": style.marker, "mfc": fill(row, width, style.color), "ls": ""}
                handles[row.label] = ax.plot(ends, [entry.mean] * len(ends), **look, zorder=2)[0]
            ax.set_xscale("log")
            _draw_front(ax, [each for each in costs if each[0].complete(width)])
            leave_out_failures(ax, points)
            ax.set(xlabel=f"{SECONDS[costs[0][2].clock]} per cell", ylabel=drawn.top1)
            ax.set_title(f"{panel_title(block, drawn.blocks)}, {width.upper()}")
        _explain(axes[0][0], labels, handles)
        add_legend(figure, {label: handles[label] for label in labels if label in handles}, 1 if len(axes) == 1 else 2)
        figures.append(figure)
    return figures


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


def _draw_front(ax: Axes, costs: list[Spent]) -> None:
    """What nothing beats in both, where all seconds are of one device: those of two say nothing of who is faster."""
    if len({place for *_, places in costs for place in places}) != 1:
        return
    front: list[tuple[float, float]] = []
    for seconds, minus in sorted((max(spent.high, LEAST), -entry.mean) for row, entry, spent, _ in costs):
        if not front or -minus > front[-1][1]:
            front.append((seconds, -minus))
    right = max(max(spent.high, LEAST) for _, _, spent, _ in costs) * 1.3
    ax.step([x for x, _ in front] + [right], [y for _, y in front] + [front[-1][1]], where="post", color="#bbbbbb", lw=0.8, zorder=1)


def drop(drawn: Drawn) -> list[Figure]:
    """Heat map of what is lost against the teacher: methods x (network, bits), never mixing protocols, precisions or evaluation sets."""
    groups: dict[tuple[str, str, str], list[Block]] = {}
    for block in drawn.blocks:
        groups.setdefault((block.evaluation, block.protocol, block.precision), []).append(block)
    worst = max([1e-9, *(entry.drop for _, _, _, entry in entries_of(drawn) if np.isfinite(entry.drop))])
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
    labels = list(dict.fromkeys(row.label for row in sorted((r for b in group for r in b.rows), key=lambda row: -row.above)))
    values, lost = np.full((len(labels), len(columns)), np.nan), dict[tuple[int, int], str]()
    for j, (block, width) in enumerate(columns):
        for row in block.rows:
            if width in row.entries:
                values[labels.index(row.label), j] = row.entries[width].drop
            if width in row.lost:
                lost[labels.index(row.label), j] = str(row.lost[width])
    partly = any(np.isfinite(values[place]) for place in lost)
    title += f"; *: {FEWER}" if partly else ""
    names = [wrapped(label, 26) for label in labels]
    tall = max(sum(name.count("\n") + 1 for name in names), len(names) * 1.3)
    figure = Figure(figsize=(max(COLUMN, 1.6 + 0.38 * len(columns)), 0.9 + 0.19 * tall), layout="constrained")
    ax = figure.subplots()
    ax.grid(False)
    ax.imshow(values, cmap="YlOrBr", vmin=0, vmax=worst, aspect="auto")
    for (i, j), value in np.ndenumerate(values):
        text = lost.get((i, j), "-").replace(", ", "\n") if np.isnan(value) else f"{value + 0.0:.1f}".replace("-0.0", "0.0") + "*" * ((i, j) in lost)
        size = 4.5 if len(text) > 7 else 6.5
        ax.text(j, i, text, ha="center", va="center", fontsize=size, color="white" if value > 0.6 * worst else "black")
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
