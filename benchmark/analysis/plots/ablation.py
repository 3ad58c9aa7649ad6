"""What settings that differ from a method's own change."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from dfqbench.analysis.plots.style import LOW, add_legend, pages, panel_title, wrapped
from dfqbench.analysis.tables.blocks import Block, Entry, Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure
from dfqbench.analysis.plots.drawn import WIDTH_MARKERS, Drawn, NothingToDraw, what_is_lost


def ablation(drawn: Drawn) -> list[Figure]:
    """What settings that differ from a method's own change, against the method as it is: paired over test images and seeds."""
    panels = [(block, base, others) for block in drawn.blocks for base, others in _ablations(block)]
    if not panels:
        raise NothingToDraw(
            "no method was run both as it is and with other settings under one budget: give some in the config, like {METHOD: {SETTING: 0}}"
        )
    figures = []
    most = max(len(others) for _, _, others in panels)
    widths = list(dict.fromkeys(width for block, _, _ in panels for width in block.widths))
    for figure, axes in pages("", panels, LOW + 0.3 * most, [w.upper() for w in widths]):
        handles: dict[str, Any] = {}
        for ax, (block, base, others) in axes:
            style = drawn.look[base.label]
            for i, row in enumerate(others):
                there = [w for w in block.widths if row.complete(w) and base.complete(w)]
                for k, width in enumerate(there):
                    ours, theirs = row.entries[width], base.entries[width]
                    value, reach = _difference(drawn, ours, theirs)
                    marker = WIDTH_MARKERS[widths.index(width) % len(WIDTH_MARKERS)]
                    y = i + (k - (len(there) - 1) / 2) * 0.7 / max(len(there), 1)
                    ax.errorbar([value], [y], xerr=reach, color=style.color, marker=marker, mfc="white" if k % 2 else style.color, elinewidth=0.9)
            ax.axvline(0, color="#555555", lw=0.8)
            ax.set_yticks(range(len(others)), ["\n".join([wrapped(_settings(row), 24), *what_is_lost(row)]) for row in others])
            ax.set_ylim(len(others) - 0.45, -0.55)
            ax.set_xlabel("\n".join([f"points of top-1 against {base.label} as it is", *what_is_lost(base)]))
            ax.set_title(panel_title(block, drawn.blocks))
        for k, width in enumerate(widths):
            marker = WIDTH_MARKERS[k % len(WIDTH_MARKERS)]
            handles[width.upper()] = axes[0][0].plot([], [], color="#444444", marker=marker, mfc="white" if k % 2 else "#444444", ls="")[0]
        add_legend(figure, handles, 1 if len(axes) == 1 else 2)
        figures.append(figure)
    return figures


def _ablations(block: Block) -> Iterator[tuple[Row, list[Row]]]:
    """(the method as it is, its other settings under the same budget)"""
    for base in (row for row in block.rows if not row.changed):
        others = [
            r for r in block.rows if r.method == base.method and r.changed and (r.steps, r.batch, r.mark) == (base.steps, base.batch, base.mark)
        ]
        if others:
            yield base, sorted(others, key=lambda row: row.label)


def _settings(row: Row) -> str:
    return row.label.removeprefix(f"{row.method}(").removesuffix(")")


def _difference(drawn: Drawn, ours: Entry, theirs: Entry) -> tuple[float, list[list[float]]]:
    """The difference and its reach below and above."""
    if drawn.rule == "last" and ours.estimate and theirs.estimate:
        found = drawn.per_image.difference(ours.ids, theirs.ids)
        return found.value, [[found.value - found.low], [found.high - found.value]]
    error = 2 * (ours.error**2 + theirs.error**2) ** 0.5
    return ours.mean - theirs.mean, [[error], [error]]
