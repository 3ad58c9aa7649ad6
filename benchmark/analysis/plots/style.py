"""How plots look: one colour per method everywhere, safe for colour-blind eyes; sizes for a paper's column; files that come out the same twice."""

from __future__ import annotations

import importlib
import io
import logging
import os
import sys
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
    from matplotlib.figure import Figure

# Okabe and Ito's palette without its yellow (too light on white), five of Paul Tol's, and two that stay apart from all of these for every kind of eye
COLOURS = [
    *("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000", "#882255", "#999933", "#44AA99", "#332288", "#777777"),
    *("#5D3A00", "#8A2BE2", "#6B8E23", "#DC143C", "#FF69B4", "#00CED1"),
]
MARKERS = "osD^vPX*<>h"
DASHES: list[Any] = ["-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (4, 1.2, 1, 1.2)), (0, (7, 2))]
LIGHTEST = 0.65  # of the way to white, for the last of a method's variants
WIDTHS = {"column": 3.3, "page": 7.0}  # inches, as they are printed
GREY = "#666666"
FORMATS = ("png", "pdf", "svg")
DPI = 200
SETTINGS: Any = {
    "font.size": 7,
    "axes.titlesize": 7,
    "axes.labelsize": 7,
    "xtick.labelsize": 6.5,
    "ytick.labelsize": 6.5,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "xtick.major.pad": 2,
    "ytick.major.pad": 2,
    "axes.labelpad": 2,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.5,
    "axes.linewidth": 0.6,
    "lines.linewidth": 1.1,
    "lines.markersize": 4,
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
    """color: the method's, in the variant's shade. ink: the method's, dark enough for text."""

    color: str
    marker: str
    dashes: Any
    ink: str


def styles(found: list[Block]) -> dict[str, Style]:
    """By row label: the colour says which method, its shade, marker and dashes which of its settings. Built-in methods come first, as declared."""
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
            shade, ink = mixed(colour[method], "#ffffff", LIGHTEST * i / max(len(labels), 2)), inked(colour[method])
            chosen[label] = Style(shade, MARKERS[(order.index(method) + i) % len(MARKERS)], DASHES[i % len(DASHES)], ink)
    return chosen


def mixed(color: str, other: str, share: float) -> str:
    """So much of the way from one colour (`#rrggbb`) to another."""
    ours, theirs = ([int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in (color, other))
    return "#" + "".join(f"{round(a + (b - a) * share):02X}" for a, b in zip(ours, theirs, strict=True))


def inked(color: str) -> str:
    """Darkened until text in it can be read on white: a contrast of 4.5, as WCAG 2.1 asks for."""
    return next(dark for step in range(21) if _contrast(dark := mixed(color, "#000000", step / 20)) >= 4.5)


def _contrast(color: str) -> float:
    """To white, of WCAG 2.1."""
    values = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values]
    return 1.05 / (0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] + 0.05)


def block_title(block: Block, found: Iterable[Block]) -> str:
    """What sets a block apart from the others that are drawn, and always its teacher and evaluation set."""
    others = list(found)
    said = "Yardsticks (real images), " * block.yardstick + f"{block.teacher} on {block.evaluation}"
    if len({b.protocol for b in others}) > 1:
        said += f", {block.protocol}"
    if len({b.precision for b in others}) > 1:
        said += f", {block.precision}"
    return said


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
        if "$" in said:
            text.set_parse_math(False)
        if not said.isascii():
            text.set_fontfamily(families_for(said))
