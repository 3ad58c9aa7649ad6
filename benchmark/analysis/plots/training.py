"""Plots of what happened while students were trained."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dfqbench.analysis.plots.drawn import FEWER, Drawn, NothingToDraw, panels_of
from dfqbench.analysis.plots.lines import Curve, Panel, line_panels
from dfqbench.analysis.plots.style import block_title
from dfqbench.analysis.records import read_history
from dfqbench.analysis.tables.blocks import Block, Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

POINTS = 2000  # epochs of a history that are read, at most


def curves(drawn: Drawn) -> list[Figure]:
    """Accuracy against student steps: the last is where the name is, the best on test a ring."""
    panels = []
    for block, width in panels_of(drawn):
        lines = [curve for row in drawn.best_first(block) if width in row.entries and (curve := _curve(drawn, block, row, width))]
        if lines:
            title = f"{width.upper()}: {block_title(block, drawn.blocks)}"
            panels.append(Panel(title, lines, block.teacher_top1, "student steps", drawn.score.split(",")[0]))
    if not panels:
        raise NothingToDraw("no cell was evaluated between its epochs: set `evaluate_every` in the config and run it again")
    fewer = any(curve.faint for panel in panels for curve in panel.curves)
    said = ["means over seeds", "rings: the best on test", f"faint: {FEWER}" if fewer else ""]
    return line_panels(panels, drawn.width, said)


def _curve(drawn: Drawn, block: Block, row: Row, width: str) -> Curve | None:
    """None where it has not two values or more, over steps that all seeds have."""
    series = [over_steps(drawn, cell_id, block.metric.key) for cell_id in row.entries[width].ids]
    steps = sorted(set.intersection(*(set(one) for one in series)))
    if len(steps) < 2:
        return None
    values = [float(np.mean([one[step] for one in series])) for step in steps]
    best = int(np.argmax(values))
    rings = [(steps[best], values[best])]
    return Curve(drawn.brief[row.label], drawn.look[row.label], steps, values, faint=width in row.lost, rings=rings)


def over_steps(drawn: Drawn, cell_id: str, column: str) -> dict[float, float]:
    """Values of a history's column by the student steps that were made until then; before the first, the last one."""
    found = read_history(drawn.reading.store.folder(cell_id) / "history.csv", POINTS)
    if not {"epoch", column} <= found.keys():  # not every method logs a loss
        return {}
    epochs = [float(epoch) for epoch in found["epoch"] if isinstance(epoch, float)]
    trained = [epoch for epoch, rate in zip(epochs, found.get("student_lr", [1.0] * len(epochs)), strict=True) if rate is not None]
    if not trained:
        return {}
    each = drawn.steps_per_epoch(cell_id, int(trained[-1] - trained[0]) + 1)
    pairs = zip(epochs, found[column], strict=True)
    return {max(0.0, (epoch - trained[0] + 1) * each): float(value) for epoch, value in pairs if isinstance(value, float)}
