"""Each row of a column against the best, in figures. No torch here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from dfqbench.analysis.plots.drawn import Drawn
from dfqbench.analysis.tables.blocks import Block

HEADS = ("difference", "95 % interval", "p (Holm)", "p (McNemar)", "only it / only best")
BOLD_MEANS = (
    "Bold is the best row of a column, and each next one down to the first that can be told from it: the difference, paired over test images and "
    "with the variance between seeds, has p below 5 % after Holm's correction within the column, or is three spreads where seeds are too few for a "
    "test. The variance between seeds is estimated over all rows of the column (empirical Bayes), so that two seeds are enough; a row that "
    "scatters far more than the others keeps its own. With 95 % confidence the truly best row is among the bold ones, while not every row that "
    "equals it need be."
)


@dataclass(frozen=True)
class Comparison:
    """One bit width of a block. lines: (row, what stands below HEADS), best first, then what diverged or failed."""

    title: str
    width: str
    best: str
    lines: list[tuple[str, list[str]]]


def bold_means(drawn: Drawn) -> str:
    """What bold means, in three sentences; empty where nothing is bold."""
    return BOLD_MEANS if any(entry.best for block in drawn.blocks for row in block.rows for entry in row.entries.values()) else ""


def comparisons(drawn: Drawn) -> Iterator[tuple[str, list[Comparison]]]:
    """By the title of a block, for the blocks that have any."""
    for block in drawn.blocks:
        found = [each for width in block.widths if (each := _against_best(drawn, block, width))]
        if found:
            yield block.title, found


def _against_best(drawn: Drawn, block: Block, width: str) -> Comparison | None:
    there = sorted(((row, entry) for row in block.rows if (entry := row.complete(width))), key=lambda pair: -pair[1].mean)
    if len(there) < 2 or not any(entry.against_best for _, entry in there):
        return None
    lines = []
    for row, entry in there:
        against = entry.against_best
        if against is None:
            continue
        test = drawn.per_image.mcnemar(*entry.pair) if entry.pair else None
        figures = [f"{against.value:+.2f}", f"{against.low:+.2f} to {against.high:+.2f}", f"{against.p:.2g}"]
        lines.append((row.label, figures + ([f"{test.p:.2g}", f"{test.only_first} / {test.only_second}"] if test else ["-", "-"])))
    lines += [(row.label, [str(row.lost[width]), *"----"]) for row in block.rows if width in row.lost]
    return Comparison(block.title, width, there[0][0].label, lines)
