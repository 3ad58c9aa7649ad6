"""A figure as a sheet that is measured in points from its upper left corner: what stands where is decided here, not by matplotlib's layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from dfqbench.analysis.plots.layout import SMALL, extent, wrapped_to
from dfqbench.analysis.plots.style import GREY

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Text

LEAST_WIDTH = 230.0  # points: no figure is narrower
EDGE, GAP = 2.0, 10.0  # points: at the edges of a page, and between panels
TALLEST = 640.0  # points: of a page
P = TypeVar("P")


class Sheet:
    """width, height: in points."""

    def __init__(self, width: float, height: float):
        from matplotlib.figure import Figure

        self.width, self.height = width, height
        self.figure: Figure = Figure(figsize=(width / 72, height / 72))

    def axes(self, left: float, top: float, wide: float, high: float) -> Axes:
        return self.figure.add_axes((left / self.width, 1 - (top + high) / self.height, wide / self.width, high / self.height))

    def write(self, x: float, y: float, text: str, size: float = SMALL, **other: Any) -> Text:
        """The upper left corner (or as `ha` and `va` say) at x, y."""
        look: dict[str, Any] = {"ha": "left", "va": "top", "fontsize": size, "linespacing": 1.1} | other
        return self.figure.text(x / self.width, 1 - y / self.height, text, **look)

    def line(self, x: float, y: float, to: float, color: str) -> None:
        """A horizontal one."""
        from matplotlib.lines import Line2D

        ends = [x / self.width, to / self.width]
        self.figure.add_artist(Line2D(ends, [1 - y / self.height] * 2, color=color, lw=1.4, transform=self.figure.transFigure))

    def note(self, y: float, text: str) -> None:
        """What explains a figure, below it."""
        self.write(EDGE, y, text, color=GREY)


def noted(said: list[str], width: float) -> tuple[str, float]:
    """A note on as many lines as it takes, and its height in points."""
    text = wrapped_to("; ".join(each for each in said if each), width - 2 * EDGE)
    return text, extent(text)[1] + 3 if text else 0.0


def grid_pages(
    panels: Sequence[P],
    columns: int,
    cell: float,
    head: Callable[[P], float],
    body: float,
    said: list[str],
    draw: Callable[[Sheet, P, float, float, float], None],
) -> list[Figure]:
    """Panels side by side and one below the other, on as many pages as they take.

    cell: width of a panel with all that belongs to it; head, body: heights of what is above its axes, and of the rest, all in points. draw: a panel
    on a sheet at x, from the top of its head and of its axes. said: the parts of the note below each page.
    """
    rows = [panels[i : i + columns] for i in range(0, len(panels), columns)]
    heads = [max(map(head, row)) for row in rows]
    pages: list[list[int]] = [[]]
    for i, tall in enumerate(heads):
        if pages[-1] and sum(heads[j] + body for j in pages[-1]) + tall + body > TALLEST:
            pages.append([])
        pages[-1].append(i)
    full = max(columns * cell + GAP * (columns - 1) + 2 * EDGE, min(LEAST_WIDTH, cell * 2))
    note, under = noted(said, full)
    figures = []
    for page in pages:
        sheet, top = Sheet(full, sum(heads[i] + body for i in page) + under + 2 * EDGE), EDGE
        for i in page:
            for j, panel in enumerate(rows[i]):
                draw(sheet, panel, EDGE + j * (cell + GAP), top, top + heads[i])
            top += heads[i] + body
        sheet.note(top + 1, note)
        figures.append(sheet.figure)
    return figures


def columns_in(width: float, panels: int, narrowest: float, most: int = 6) -> tuple[int, float]:
    """How many panels there are side by side, and the width of each, in points. width: of the figure, in inches."""
    room = width * 72 - 2 * EDGE
    columns = max(1, min(panels, most, int((room + GAP) // (narrowest + GAP))))
    return columns, (room - GAP * (columns - 1)) / columns
