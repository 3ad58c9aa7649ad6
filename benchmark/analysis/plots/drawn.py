"""What every plot is drawn from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dfqbench.analysis.per_image import PerImage
from dfqbench.analysis.plots.style import Style, styles
from dfqbench.analysis.records import Reading
from dfqbench.analysis.tables.blocks import Block, Entry, Row, Rule

if TYPE_CHECKING:
    pass

WIDTH_MARKERS = "osD^vPX"


class NothingToDraw(Exception):
    """Why a kind of plot is empty for these cells, and what would fill it."""


@dataclass
class Drawn:
    """Everything that plots are drawn from."""

    reading: Reading
    blocks: list[Block]
    per_image: PerImage
    rule: Rule = "last"
    look: dict[str, Style] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.look = self.look or styles(self.blocks)

    @property
    def top1(self) -> str:
        return "top-1 (%)" if self.rule == "last" else "top-1 (%), best on test"

    def rows(self) -> list[Row]:
        """One per label, best first."""
        best = {row.label: row for block in self.blocks for row in block.rows}
        return sorted(best.values(), key=lambda row: -row.mean)


def entries_of(drawn: Drawn) -> Iterator[tuple[Block, Row, str, Entry]]:
    for block in drawn.blocks:
        for row in block.rows:
            for width, entry in row.entries.items():
                yield block, row, width, entry
