"""Text that is measured before it is placed, in points: wrapped to a width, spread along an axis, or put beside points."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise, product
from typing import TYPE_CHECKING, Any

import numpy as np

from dfqbench.analysis.plots.fonts import families_for

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SMALL, USUAL = 6.0, 6.5  # points: the least, and labels of rows
HINTING = 1.02  # letters are a little wider at some resolutions than at others
LEADING = 1.2  # from line to line, in sizes
BESIDE = 7.0  # points: how far a name may be from its point without a line to it
DISTANCES = (4, 7, 11, 15, 20, 25, 32, 40, 50, 60, 70, 82, 100)
BREAKS = re.compile(r"(?<=[,(=_+/-])")  # a label may be broken after these
Box = tuple[float, float, float, float]  # x0, y0, x1, y1


@cache
def _width(line: str, size: float, bold: bool) -> float:
    from matplotlib.backends.backend_agg import RendererAgg
    from matplotlib.font_manager import FontProperties

    font = FontProperties(family=families_for(line), size=size, weight="bold" if bold else "normal")
    return float(RendererAgg(8, 8, 288).get_text_width_height_descent(line, font, ismath=False)[0]) / 4 * HINTING


def extent(text: str, size: float = SMALL, bold: bool = False) -> tuple[float, float]:
    """Width and height in points. Call it within `settings`."""
    lines = text.split("\n")
    return max(_width(line, size, bold) for line in lines), LEADING * size * len(lines)


def wrapped_to(text: str, width: float, size: float = SMALL) -> str:
    """On as many lines as it takes, broken at blanks, within a word that is too long at a sign, and else anywhere."""
    lines = [""]
    for word in text.split(" "):
        pieces = [f" {word}" if lines != [""] else word]
        if extent(word, size)[0] > width:
            pieces = [piece for part in BREAKS.split(pieces[0]) for piece in _broken(part, width, size)]
        for piece in pieces:
            if extent(lines[-1] + piece, size)[0] > width and lines[-1]:
                lines.append(piece.lstrip())
            else:
                lines[-1] += piece
    return "\n".join(lines)


def _broken(text: str, width: float, size: float) -> list[str]:
    """Pieces that fit, of a character at least."""
    pieces: list[str] = []
    while text and extent(text, size)[0] > width and len(text) > 1:
        fits = next((n for n in range(len(text) - 1, 1, -1) if extent(text[:n], size)[0] <= width), 1)
        pieces, text = [*pieces, text[:fits]], text[fits:]
    return [*pieces, text]


def spread(wanted: Sequence[float], heights: Sequence[float], low: float, high: float) -> list[float]:
    """Centres for labels of these heights along an axis: none covers another, together as near as can be (in squares) to where they are wanted.

    They keep their order and stay between low and high where they fit there; where they do not, they begin at low.
    """
    order = np.argsort(wanted, kind="stable")
    tall = np.asarray(heights, float)[order]
    before = np.cumsum(tall) - tall / 2  # of each centre if all stood upon each other
    pools: list[tuple[float, int]] = []  # (mean place of the stack's foot, labels in it)
    for goal in np.asarray(wanted, float)[order] - before:
        pools.append((float(goal), 1))
        while len(pools) > 1 and pools[-2][0] >= pools[-1][0]:
            (a, n), (b, m) = pools[-2:]
            pools[-2:] = [((a * n + b * m) / (n + m), n + m)]
    feet = np.clip(np.repeat([foot for foot, _ in pools], [n for _, n in pools]), low, max(low, high - tall.sum()))
    places = np.empty(len(tall))
    places[order] = feet + before
    return [float(place) for place in places]


@dataclass
class Labels:
    """Names beside points of one pair of axes. What is taken is known in points from the axes' lower left corner."""

    ax: Axes
    taken: list[Box] = field(default_factory=list)
    markers: list[Box] = field(default_factory=list)
    lines: list[Box] = field(default_factory=list)  # from (x0, y0) to (x1, y1): no name stands on one

    @property
    def size(self) -> tuple[float, float]:
        box = self.ax.bbox
        return box.width * self._unit, box.height * self._unit

    @property
    def _unit(self) -> float:
        figure: Any = self.ax.figure
        return 72 / float(figure.dpi)

    def place(self, x: float, y: float) -> tuple[float, float]:
        """A point of the data, in points. The limits of the axes must be what they will be."""
        at = self.ax.transData.transform((x, y)) - [self.ax.bbox.x0, self.ax.bbox.y0]
        return float(at[0]) * self._unit, float(at[1]) * self._unit

    def occupy(self, x: float, y: float, reach: float = 2.4) -> None:
        """A marker, which no name may cover."""
        px, py = self.place(x, y)
        self.markers.append((px - reach, py - reach, px + reach, py + reach))

    def occupy_line(self, xs: Sequence[float], ys: Sequence[float]) -> None:
        """A line through these points of the data."""
        places = [self.place(x, y) for x, y in zip(xs, ys, strict=True)]
        self.lines += [(*a, *b) for a, b in pairwise(places)]

    def occupy_text(self, text: Any) -> None:
        """A text of one line that is there already, in the axes' own coordinates."""
        (x, y), (wide, high) = text.get_position(), extent(text.get_text(), text.get_fontsize())
        foot = y * self.size[1] - high * {"bottom": 0.0, "top": 1.0}[text.get_verticalalignment()]
        left = x * self.size[0] - wide * {"left": 0.0, "center": 0.5, "right": 1.0}[text.get_horizontalalignment()]
        self.taken.append((left, foot, left + wide, foot + high))

    def add(self, xs: Sequence[float], y: float, text: str, color: str, far: float, through: bool = False) -> bool:
        """Writes the name at the nearest free place around a point, at most so far from it (points), with a line to it where it is not beside it.

        xs: of the points that have this name. through: whether that line may pass over markers where there is no other place.
        """
        places, (wide, high) = [self.place(x, y) for x in xs], extent(text)
        for over in (False, True)[: 1 + through]:
            for distance, at, angle in product([d for d in DISTANCES if d <= far], places, np.arange(24) * np.pi / 12):
                toward = np.array([np.cos(angle), np.sin(angle)])
                middle = at + distance * toward + np.sign(np.round(toward, 6)) * [wide / 2, high / 2] * _reach(toward)
                box = (middle[0] - wide / 2, middle[1] - high / 2, middle[0] + wide / 2, middle[1] + high / 2)
                end = float(np.clip(at[0], box[0], box[2])), float(np.clip(at[1], box[1], box[3]))
                leader = (*at, *end) if distance > BESIDE else None
                if self._free(box, leader, over):
                    self.write(box, text, color, leader)
                    return True
        return False

    def _free(self, box: Box, leader: Box | None, over: bool) -> bool:
        wide, high = self.size
        if box[0] < 1 or box[1] < 1 or box[2] > wide - 1 or box[3] > high - 1:
            return False
        if any(_overlap(box, other) for other in (*self.taken, *self.markers)) or any(_crosses(line, box) for line in self.lines):
            return False
        in_its_way = [*self.taken, *(marker for marker in self.markers if not over and leader and not _inside(leader[:2], marker))]
        return not (leader and any(_crosses(leader, other) for other in in_its_way))

    def write(self, box: Box, text: str, color: str, leader: Box | None = None) -> None:
        """In the middle of the box, which is then taken."""
        wide, high = self.size
        self.taken.append(box)
        if leader:
            self.lines.append(leader)
            xs, ys = [leader[0] / wide, leader[2] / wide], [leader[1] / high, leader[3] / high]
            self.ax.plot(xs, ys, color=color, lw=0.4, alpha=0.7, transform=self.ax.transAxes, zorder=1.5, label="_leader")
        middle = (box[0] + box[2]) / 2 / wide, (box[1] + box[3]) / 2 / high
        look: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": SMALL, "color": color, "zorder": 6}
        look["bbox"] = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0}  # the grid is behind it
        self.ax.text(*middle, text, transform=self.ax.transAxes, **look)


def _reach(toward: Any) -> Any:
    """How much of half a box's width and height lies between a point and the box's middle: beside a point its text is at the point's height."""
    across, up = abs(toward)
    return np.array([min(1.0, across * 1.5), min(1.0, up * 1.5)])


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _inside(point: Any, box: Box) -> bool:
    return bool(box[0] <= point[0] <= box[2] and box[1] <= point[1] <= box[3])


def _crosses(line: Box, box: Box) -> bool:
    """Whether a line goes through a box (Liang and Barsky 1984)."""
    first, last = 0.0, 1.0
    x0, y0, x1, y1 = line
    for step, room in ((x0 - x1, x0 - box[0]), (x1 - x0, box[2] - x0), (y0 - y1, y0 - box[1]), (y1 - y0, box[3] - y0)):
        if abs(step) < 1e-12:
            if room < 0:
                return False
        elif step < 0:
            first = max(first, room / step)
        else:
            last = min(last, room / step)
    return first < last
