"""What every plot is drawn from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from dfqbench.analysis.per_image import PerImage
from dfqbench.analysis.plots.style import Style, styles
from dfqbench.analysis.records import Reading
from dfqbench.analysis.tables.blocks import Block, Entry, Row, Rule

WIDTH_MARKERS = "osD^vPX"
ALL_WIDTHS = 12  # panels of one width each; with more, only the narrowest width of each block is drawn
FEWER = "some seeds diverged or failed"  # what hollow markers and faint lines mean
LOST = "diverged or failed"


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
        return sorted(best.values(), key=lambda row: -row.above)


def entries_of(drawn: Drawn) -> Iterator[tuple[Block, Row, str, Entry]]:
    for block in drawn.blocks:
        for row in block.rows:
            for width, entry in row.entries.items():
                yield block, row, width, entry


def panels_of(drawn: Drawn) -> list[tuple[Block, str]]:
    """Bit widths one by one."""
    panels = [(block, width) for block in drawn.blocks for width in block.widths]
    return panels if len(panels) <= ALL_WIDTHS else [(block, block.widths[-1]) for block in drawn.blocks]


def fill(row: Row, width: str, color: str) -> str:
    """What a marker is filled with."""
    return "white" if width in row.lost else color


def what_is_lost(row: Row) -> list[str]:
    """`W4A4, W3A3: diverged`, a line for each of what became of some."""
    said: dict[str, list[str]] = {}
    for width, lost in row.lost.items():
        said.setdefault(str(lost), []).append(width.upper())
    return [f"{', '.join(widths)}: {what}" for what, widths in said.items()]
