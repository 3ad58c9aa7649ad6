"""The kinds of plots. Each takes the tables' blocks and gives figures, or the reason why there is nothing to draw. No torch here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from dfqbench.analysis.plots.ablation import ablation
from dfqbench.analysis.plots.accuracy import accuracy, over_widths
from dfqbench.analysis.plots.budgets import budgets
from dfqbench.analysis.plots.drawn import Drawn, NothingToDraw
from dfqbench.analysis.plots.drop import drop
from dfqbench.analysis.plots.factorial import factorial
from dfqbench.analysis.plots.losses import losses
from dfqbench.analysis.plots.published import published
from dfqbench.analysis.plots.scatter import cost, size
from dfqbench.analysis.plots.style import settings
from dfqbench.analysis.plots.training import curves

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KINDS: dict[str, tuple[str, Callable[[Drawn], list[Figure]]]] = {
    "accuracy": ("accuracy of every configuration, by bit width", accuracy),
    "widths": ("accuracy over bit widths", over_widths),
    "published": ("measured against published", published),
    "cost": ("accuracy against seconds", cost),
    "size": ("accuracy against size and work", size),
    "budgets": ("accuracy against size, equal widths and a width per layer", budgets),
    "curves": ("accuracy while training, last and best", curves),
    "losses": ("training loss", losses),
    "drop": ("drop against the teacher", drop),
    "ablation": ("what single settings change", ablation),
    "factorial": ("images by training of the student", factorial),
}


WITH_YARDSTICKS = ("accuracy", "widths", "curves", "losses", "factorial")  # where they stand in panels of their own; the others compare rows


def draw(kind: str, drawn: Drawn) -> list[Figure]:
    """Figures of one kind (see KINDS), a page each. Raises NothingToDraw."""
    methods = [block for block in drawn.blocks if not block.yardstick]
    if kind not in WITH_YARDSTICKS and len(methods) < len(drawn.blocks):
        if not methods:
            raise NothingToDraw("these students were trained on real images, which are no data-free methods to be compared")
        drawn = replace(drawn, blocks=methods)
    with settings():
        return KINDS[kind][1](drawn)
