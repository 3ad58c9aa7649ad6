"""How plots look: one colour per method everywhere, safe for colour-blind eyes; sizes for a paper's column; files that come out the same twice."""

from __future__ import annotations

import importlib
import io
import logging
import os
import sys
import textwrap
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfqbench.analysis.plots.fonts import families_for
from dfqbench.analysis.tables.blocks import Block
from dfqbench.errors import UserError
from dfqbench.method.registry import built_in_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette without its yellow (too light on white), five of Paul Tol's, and two that stay apart from all of these for every kind of eye
COLOURS = [
    *("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000", "#882255", "#999933", "#44AA99", "#332288", "#777777"),
    *("#5D3A00", "#8A2BE2"),
]
MARKERS = "osD^vPX*<>h"
DASHES: list[Any] = ["-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (4, 1.2, 1, 1.2)), (0, (7, 2))]
HIGH, LOW = 2.25, 1.2  # inches
COLUMN = 3.4  # inches: one column of a paper; two panels side by side take 2 x that
PANELS = 6  # on one page
LEGEND_CHARACTERS = 42  # a column's width of legend text
FORMATS = ("png", "pdf", "svg")
DPI = 200
SETTINGS: Any = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "legend.fontsize": 7,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "axes.linewidth": 0.7,
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
    "legend.frameon": False,
    "svg.hashsalt": "dfqbench",
    "pdf.fonttype": 42,
}
WITHOUT_DATES: dict[str, dict[str, Any]] = {
    "png": {"Software": None},
    "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
    "svg": {"Date": None, "Creator": None},
}


@contextmanager
def settings() -> Iterator[None]:
    """Inside, matplotlib has its own defaults with SETTINGS: the user's matplotlibrc, style files and MPLBACKEND change no plot and print nothing."""
    logger = logging.getLogger("matplotlib")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        matplotlib = _imported()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing")  # said once, by figures.py
            warnings.simplefilter("ignore", matplotlib.MatplotlibDeprecationWarning)  # of settings that only have to be what they are
            own = {key: value for key, value in matplotlib.rcParamsDefault.items() if not key.startswith("backend")}
            with matplotlib.rc_context(own | SETTINGS):
                yield
    finally:
        logger.setLevel(level)


def _imported() -> Any:
    """matplotlib, which reads the user's settings when it is imported: an unknown MPLBACKEND or a damaged file stops it there."""
    if "matplotlib" not in sys.modules:
        given = {name: os.environ.pop(name, None) for name in ("MPLBACKEND", "MATPLOTLIBRC")}
        os.environ["MATPLOTLIBRC"] = os.devnull
        try:
            importlib.import_module("matplotlib")
        except UnicodeDecodeError:
            raise UserError(f"{Path('matplotlibrc').resolve()}: not UTF-8 text, so that matplotlib cannot be imported in this folder") from None
        finally:
            del os.environ["MATPLOTLIBRC"]
            os.environ.update({name: value for name, value in given.items() if value is not None})
    return sys.modules["matplotlib"]


@dataclass(frozen=True)
class Style:
    color: str
    marker: str
    dashes: Any


def styles(found: list[Block]) -> dict[str, Style]:
    """By row label: the colour says which method, marker and dashes which of its settings. Built-in methods come first, in their declared order."""
    known = built_in_names()
    others = sorted({row.method for block in found for row in block.rows} - set(known))
    colour = {method: COLOURS[i % len(COLOURS)] for i, method in enumerate([*known, *others])}
    variants: dict[str, list[str]] = {}
    for row in sorted((row for block in found for row in block.rows), key=lambda row: (len(row.changed), row.label)):
        labels = variants.setdefault(row.method, [])
        if row.label not in labels:
            labels.append(row.label)
    order = list(colour)
    chosen = {}
    for method, labels in variants.items():
        for i, label in enumerate(labels):
            chosen[label] = Style(colour[method], MARKERS[(order.index(method) + i) % len(MARKERS)], DASHES[i % len(DASHES)])
    return chosen


def pages(title: str, panels: list[Any], height: float, legend: list[str]) -> list[tuple[Figure, list[tuple[Axes, Any]]]]:
    """Figures with up to PANELS axes each, in two columns if there is more than one, with room for the legend below."""
    from matplotlib.figure import Figure

    made = []
    for first in range(0, len(panels), PANELS):
        here = panels[first : first + PANELS]
        columns = 1 if len(here) == 1 else 2
        rows = -(-len(here) // columns)
        figure = Figure(figsize=(COLUMN * columns, rows * height + 0.35 + 0.145 * _legend_lines(legend, columns)), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False)
        flat = list(axes.flat)
        for spare in flat[len(here) :]:
            spare.set_axis_off()
        if title:
            figure.suptitle(title, fontsize=8.5, fontweight="bold")
        made.append((figure, list(zip(flat, here, strict=False))))
    return made


def _legend_columns(labels: list[str], columns: int) -> int:
    longest = max((len(line) for label in labels for line in wrapped(label).split("\n")), default=1) + 6
    return max(1, min(len(labels), LEGEND_CHARACTERS * columns // longest))


def _legend_lines(labels: list[str], columns: int) -> int:
    if not labels:
        return 0
    across = _legend_columns(labels, columns)
    tall = [wrapped(label).count("\n") + 1 for label in labels]
    per_column = -(-len(tall) // across)
    return max(sum(tall[i : i + per_column]) for i in range(0, len(tall), per_column))


def add_legend(figure: Figure, handles: dict[str, Any], columns: int) -> None:
    """Below the axes; `handles` by label, drawn once each."""
    if handles:
        labels = list(handles)
        figure.legend(
            [handles[label] for label in labels],
            [wrapped(label) for label in labels],
            loc="outside lower center",
            ncols=_legend_columns(labels, columns),
            handlelength=2.2,
            columnspacing=1.2,
        )


CROWDED = 0.1  # of the axis: values nearer to each other are written above each other


def leave_out_failures(ax: Axes, points: list[tuple[float, float, str]]) -> None:
    """Ends the axis above a few points (x, accuracy, colour) that lie below half of the best, so that the others can be told apart.

    Each of them keeps an arrow at the edge, with its value. Where more than a third of the points are like that, nothing is left out.
    """
    best = max((y for _, y, _ in points), default=0.0)
    failed = [point for point in points if point[1] < best / 2]
    if not failed or 3 * len(failed) > len(points):
        return
    low, high = min(y for _, y, _ in points if y >= best / 2), ax.get_ylim()[1]
    ax.get_xlim()  # settles the axis, which places are measured along
    places = [float(ax.transAxes.inverted().transform(ax.transData.transform((x, high)))[0]) for x, _, _ in failed]
    below = [sum(here < there < here + CROWDED for there in places) for here in places]  # values to the right: no arrow goes through one
    ax.set_ylim(low - (0.15 + 0.05 * max(below)) * (high - low), high)
    for (x, y, color), lower in zip(failed, below, strict=True):
        arrow: dict[str, Any] = {"arrowstyle": "-|>", "color": color, "lw": 0.8, "shrinkA": 0, "shrinkB": 0, "relpos": (0, 0)}
        place: dict[str, Any] = {"xycoords": ax.get_xaxis_transform(), "textcoords": "offset points", "arrowprops": arrow}
        ax.annotate(f"{y:.1f}", (x, 0.0), (0, 11 + 9 * lower), ha="left", fontsize=6, color=color, **place)


def wrapped(label: str, width: int = 36) -> str:
    """Long settings on several lines, broken at blanks; what has none is broken anywhere."""
    return "\n".join(textwrap.wrap(label, width)) or label


def panel_title(block: Block, found: Iterable[Block]) -> str:
    """What sets a block apart from the others that are drawn, and always its teacher and evaluation set."""
    others = list(found)
    said = f"{block.teacher} on {block.evaluation}"
    if len({b.protocol for b in others}) > 1:
        said += f", {block.protocol}"
    if len({b.precision for b in others}) > 1:
        said += f", {block.precision}"
    return wrapped(said, 46)


def rendered(figure: Figure, formats: Iterable[str]) -> dict[str, bytes]:
    """The figure's bytes by format; the same figure gives the same bytes."""
    files = {}
    with settings():
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.backends.backend_pdf import FigureCanvasPdf
        from matplotlib.backends.backend_svg import FigureCanvasSVG

        FigureCanvasAgg(figure)
        _take_names_as_they_are(figure)
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # laid out once for all formats; and not by savefig, which draws everything twice
        for kind in formats:
            buffer = io.BytesIO()
            figure.dpi = DPI
            canvas = {"png": FigureCanvasAgg, "pdf": FigureCanvasPdf, "svg": FigureCanvasSVG}[kind](figure)
            getattr(canvas, f"print_{kind}")(buffer, metadata=WITHOUT_DATES[kind])
            files[kind] = buffer.getvalue()
    return files


def _take_names_as_they_are(figure: Figure) -> None:
    """No dollar sign in a name begins a formula, and letters that matplotlib's font lacks are written in another one."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        said = text.get_text()
        if "$" in said and not said.startswith(r"$\mathdefault"):  # the ticks of a logarithmic axis are formulas
            text.set_parse_math(False)
        if not said.isascii():
            text.set_fontfamily(families_for(said))
