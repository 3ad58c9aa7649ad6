"""Plots of what happened while students were trained."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from dfqbench.analysis.plots.style import HIGH, add_legend, pages, panel_title
from dfqbench.analysis.records import read_history
from dfqbench.analysis.tables.blocks import Block

if TYPE_CHECKING:
    from matplotlib.figure import Figure
from dfqbench.analysis.plots.drawn import FEWER, Drawn, NothingToDraw, panels_of


def curves(drawn: Drawn) -> list[Figure]:
    """Accuracy while training: the last epoch is a dot, the best on test a ring, the line between them the gap."""
    return _curves(
        drawn, "top1", drawn.top1.split(",")[0], "no cell was evaluated between its epochs: set `evaluate_every` in the config and run it again"
    )


def losses(drawn: Drawn) -> list[Figure]:
    """The students' training loss."""
    return _curves(drawn, "loss", "training loss", "no cell has a training loss: nothing was trained")


def _curves(drawn: Drawn, column: str, name: str, why_not: str) -> list[Figure]:
    panels = panels_of(drawn)
    lines = {(block.title, width): list(_history(drawn, block, width, column)) for block, width in panels}
    panels = [(block, width) for block, width in panels if lines[block.title, width]]
    if not panels:
        raise NothingToDraw(why_not)
    labels = [row.label for row in drawn.rows() if any(row.label == label for there in lines.values() for label, *_ in there)]
    labels += [FEWER] * any(fewer for there in lines.values() for *_, fewer in there)

    figures = []
    for figure, axes in pages("", panels, HIGH, labels):
        handles: dict[str, Any] = {}
        for ax, (block, width) in axes:
            for label, epochs, values, fewer in lines[block.title, width]:
                style, faint = drawn.look[label], 0.4 if fewer else None
                line = ax.plot(epochs, values, color=style.color, ls=style.dashes, alpha=faint)[0]
                if not fewer or label not in handles:
                    handles[label] = line
                if column == "top1":
                    best = int(np.argmax(values))
                    ax.plot([epochs[-1]] * 2, [values[-1], values[best]], color=style.color, lw=0.6)
                    ax.plot(epochs[-1], values[-1], color=style.color, marker="o", ms=3)
                    ax.plot(epochs[best], values[best], color=style.color, marker="o", ms=5, mfc="none", mew=0.8)
            ax.set(xlabel="epoch", ylabel=name)
            ax.set_title(f"{panel_title(block, drawn.blocks)}, {width.upper()}")
        if FEWER in labels:
            handles[FEWER] = axes[0][0].plot([], [], color="#444444", alpha=0.4)[0]
        add_legend(figure, {label: handles[label] for label in labels if label in handles}, 1 if len(axes) == 1 else 2)
        figures.append(figure)
    return figures


def _history(drawn: Drawn, block: Block, width: str, column: str) -> Iterator[tuple[str, list[float], list[float], bool]]:
    """(label, epochs, mean over seeds, whether some have no result) of rows whose cells have two values or more, over epochs that all seeds have."""
    for row in block.rows:
        if width not in row.entries:
            continue
        series = []
        for cell_id in row.entries[width].ids:
            found = read_history(drawn.reading.store.folder(cell_id) / "history.csv")
            pairs = zip(found["epoch"], found[column], strict=True) if {"epoch", column} <= found.keys() else []  # not every method logs a loss
            series.append({float(e): float(v) for e, v in pairs if isinstance(e, float) and isinstance(v, float)})
        epochs = sorted(set.intersection(*(set(s) for s in series)))
        if len(epochs) > 1:
            yield row.label, epochs, [float(np.mean([s[e] for s in series])) for e in epochs], width in row.lost
