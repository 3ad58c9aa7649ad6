"""What every plot is drawn from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from dfqbench.analysis.per_image import PerImage
from dfqbench.analysis.plots.names import brief_names
from dfqbench.analysis.plots.style import WIDTHS, Style, styles
from dfqbench.analysis.records import Reading
from dfqbench.analysis.stats import interval
from dfqbench.analysis.tables.blocks import Block, Entry, Row, Rule
from dfqbench.analysis.tables.choice import Choice
from dfqbench.metrics import METRICS

ALL_WIDTHS = 12  # panels of one bit width each; with more, only the narrowest width of each block is drawn
FEWER = "some seeds diverged or failed"  # what hollow markers and faint lines mean


class NothingToDraw(Exception):
    """Why a kind of plot is empty for these cells, and what would fill it."""


@dataclass
class Drawn:
    """Everything that plots are drawn from.

    width: of a figure, in inches. choice: which rows come first. brief: what rows are called where there is little room, by label.
    """

    reading: Reading
    blocks: list[Block]
    per_image: PerImage
    rule: Rule = "last"
    width: float = WIDTHS["page"]
    choice: Choice = field(default_factory=Choice)
    look: dict[str, Style] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rows = [row for block in self.blocks for row in block.rows]
        self.look = self.look or styles(self.blocks)
        self.brief = brief_names(rows)
        self._results = {result["id"]: result for result in (*self.reading.results, *self.reading.unfinished)}

    @property
    def metric(self) -> str:
        """What figures are of, in words: the metric of all blocks, or of each."""
        return " or ".join(dict.fromkeys(block.metric.name for block in self.blocks)) or METRICS["top1"].name

    @property
    def score(self) -> str:
        """The same as an axis says it."""
        return f"{self.metric} (%)" if self.rule == "last" else f"{self.metric} (%), best on test"

    def steps_per_epoch(self, cell_id: str, epochs: int) -> float:
        """Student steps of each of the epochs in which a cell's student was trained; of what diverged, as its settings have them."""
        result = self._results[cell_id]
        if "status" not in result:
            return float(result["steps"]) / epochs
        return float(result["cell"]["identity"]["config"].get("iterations") or 1)

    def diverged(self, cell_id: str) -> bool:
        return self._results[cell_id].get("status") == "diverged"

    def seeds(self, entry: Entry) -> list[float]:
        """Each seed's accuracy in percent."""
        results = [self._results[cell_id] for cell_id in entry.ids]
        return [float(result["top1"] if self.rule == "last" else result["best"]["top1"]) for result in results]

    def best_first(self, block: Block) -> list[Row]:
        """As in tables: rows that lack a column or diverged in one come last."""
        return self.choice.ordered(block.rows, block.widths)

    def left_out(self, rows: Iterable[Row]) -> str:
        """`gznq, lrq: images=1280`: what the names of these rows leave out; empty where they leave out nothing."""
        methods: dict[str, list[str]] = {}
        for row in rows:
            if row.left_out and row.method not in methods.setdefault(row.left_out, []):
                methods[row.left_out].append(row.method)
        return "; ".join(f"{', '.join(sorted(its))}: {settings}" for settings, its in methods.items())


def ends_of(entry: Entry) -> tuple[float, float]:
    """Its 95 % interval, of standard errors alone where there are no per-image results."""
    return (entry.estimate.low, entry.estimate.high) if entry.estimate else interval(entry.mean, entry.error)


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


def floor_of(values: list[float]) -> float:
    """Where an axis of accuracies may be cut: what lies below is far from the bulk of these values; minus infinity where nothing is.

    Of five and more, below the lower quartile by more than three times the distance of the quartiles (Tukey's outer fence); of fewer, below half of
    the best, where that is no more than a third.
    """
    if not values:
        return -np.inf
    if len(values) < 5:
        half = max(values) / 2
        return half if 0 < 3 * sum(value < half for value in values) <= len(values) else -np.inf
    low, high = np.quantile(values, [0.25, 0.75])
    fence = float(low - 3 * max(high - low, 1.0))
    return fence if min(values) < fence else -np.inf
