"""Figures as they are printed: at a column's and a page's width no text covers another, is cut off or too small to read."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from synthetic_store import cells, sizes, write_budgets, write_cell, write_failure

from dfqbench.analysis.names import name_rows
from dfqbench.analysis.plots.dots import Dot, Guide, Line, Section, dot_plots
from dfqbench.analysis.plots.drawn import Drawn, NothingToDraw, floor_of
from dfqbench.analysis.plots.figures import files, prepare
from dfqbench.analysis.plots.kinds import KINDS, draw
from dfqbench.analysis.plots.layout import extent, spread, wrapped_to
from dfqbench.analysis.plots.names import brief_names
from dfqbench.analysis.plots.scatter import Point, Scatter, front_of, scatters
from dfqbench.analysis.plots.style import DPI, WIDTHS, Style, settings
from dfqbench.analysis.plots.ticks import plain, ticks
from dfqbench.analysis.records import read_store
from dfqbench.quantization import Bits
from dfqbench.store import Store

STUDY = Path(__file__).parents[2] / "results" / "reference" / "cifar10-jpeg-study"
LEAST = 6.0  # points
SHARE = 0.2  # of a figure, for legends
LONG = "plain rounding to nearest & nothing else, no training, 100 %"
NARROW = ("w4a4", "w3a3")


def with_three_widths(store: Store) -> None:
    """As the quickstart: every method as it is."""
    for cell in cells(250):
        if str(cell.bits) in ("w5a5", *NARROW) and cell.seed < 2 and not cell.changed:
            write_cell(store, cell, size=sizes(cell))


def with_what_diverged(store: Store) -> None:
    for cell in cells(250):
        if str(cell.bits) in NARROW and cell.seed < 3:
            if cell.method == "zaq" or (cell.method == "lrq" and cell.seed == 0):
                write_failure(store, cell)
            else:
                write_cell(store, cell, size=sizes(cell))


def with_26_rows(store: Store) -> None:
    """Names of several lines, and an accuracy far from the others'."""
    for cell in cells(250):
        if str(cell.bits) in NARROW and cell.seed < 2 and not cell.changed and cell.method != "zaq":
            for rate in (None, 1e-1, 2.5e-1, 5e-1, 1.0)[: 1 if cell.method == "round" else None]:
                changed = {} if rate is None else {"adversarial_weight": rate, "student_learning_rate": rate, "synthesis_iterations": 300}
                other = replace(cell, config=cell.config | changed, changed=changed)
                write_cell(store, other, size=sizes(cell), **({"top1": 12.3} if cell.method == "lrq" and rate == 1.0 else {}))


def with_one_method(store: Store) -> None:
    for cell in cells(250):
        if str(cell.bits) in NARROW and cell.seed < 2 and cell.method == "acq":
            write_cell(store, cell, size=sizes(cell))


def with_eight_widths(store: Store) -> None:
    """More than a column has room for side by side."""
    for cell in cells(250):
        if cell.seed < 2 and str(cell.bits) == "w3a3" and cell.method in ("round", "acq", "lrq"):
            for bits in ("w6a8", "w6a6", "w5a8", "w5a5", "w4a8", "w4a4", "w3a4", "w3a3"):
                write_cell(store, replace(cell, bits=Bits.parse(bits)), size=sizes(cell))


def with_long_names(store: Store) -> None:
    """Also of rounding, whose name stands above a line, too."""
    for cell in cells(250):
        if str(cell.bits) in NARROW and cell.seed < 2 and cell.method in ("round", "acq") and not cell.changed:
            write_cell(store, replace(cell, name=LONG if cell.method == "round" else ""))


def with_one_cell(store: Store) -> None:
    write_cell(store, first := next(iter(cells(1))), size=sizes(first))


STORES: dict[str, Callable[[Store], None]] = {
    made.__name__: made
    for made in (with_three_widths, with_what_diverged, with_26_rows, with_one_method, with_one_cell, with_eight_widths, with_long_names)
}


@pytest.fixture(scope="module", params=["study", *STORES])
def drawn(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Drawn:
    if request.param == "study":
        return prepare(read_store(Store(STUDY)))
    store = Store(tmp_path_factory.mktemp("layout") / "r", writable=True)
    STORES[request.param](store)
    return prepare(name_rows(read_store(store)))


def texts_of(figure: Figure) -> list[Text]:
    """What is drawn, and not the labels of ticks beyond the axes."""
    beyond = set()
    for axis in (axis for ax in figure.axes for axis in (ax.xaxis, ax.yaxis)):
        low, high = sorted(axis.get_view_interval())
        ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
        beyond |= {label for tick in ticks if not low <= tick.get_loc() <= high for label in (tick.label1, tick.label2)}
    found: list[Any] = figure.findobj(Text)
    return [text for text in found if text.get_text().strip() and text.get_visible() and text not in beyond]


def renderer_of(figure: Figure) -> Any:
    """What measures the figure as it is printed."""
    with settings():
        figure.dpi = DPI
        canvas = FigureCanvasAgg(figure)
        figure.draw_without_rendering()
        return canvas.get_renderer()


def check(figure: Figure) -> None:
    """That all of its text can be read."""
    renderer = renderer_of(figure)
    page, texts = figure.bbox, texts_of(figure)
    boxes = [(text, Text.get_window_extent(text, renderer)) for text in texts]
    assert len(boxes) > 3
    for text, box in boxes:
        assert text.get_fontsize() >= LEAST, text
        assert "$" not in text.get_text(), f"{text}: the exponents of formulas are smaller"
        assert min(box.x0 - page.x0, page.x1 - box.x1, box.y0 - page.y0, page.y1 - box.y1) > -0.5, f"{text} is cut off"
    upright = [(text, box) for text, box in boxes if text.get_rotation() in (0, 90)]
    for (text, box), (other, covered) in combinations(upright, 2):
        wide, high = min(box.x1, covered.x1) - max(box.x0, covered.x0), min(box.y1, covered.y1) - max(box.y0, covered.y0)
        assert not (wide > 1.5 and high > 1.5), f"{text} and {other} overlap"
    for legend in [*figure.legends, *(ax.legend_ for ax in figure.axes if ax.legend_)]:  # type: ignore[attr-defined]
        box = legend.get_window_extent(renderer)
        assert box.width * box.height < SHARE * page.width * page.height


def figures_of(drawn: Drawn, kind: str, width: str) -> list[Figure]:
    drawn.width = WIDTHS[width]
    try:
        return draw(kind, drawn)
    except NothingToDraw:
        return []


@pytest.mark.slow
@pytest.mark.thorough("column")
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_text_can_be_read(drawn: Drawn, kind: str, width: str) -> None:
    for figure in figures_of(drawn, kind, width):
        assert figure.get_figwidth() <= WIDTHS[width] + 1e-9
        assert figure.get_figheight() < 9.5, "a page's height"
        check(figure)


@pytest.mark.parametrize("width", WIDTHS)
def test_every_text_of_budgets_can_be_read(width: str, tmp_path: Path) -> None:
    drawn = prepare(read_store(write_budgets(tmp_path / "r")))
    (figure,) = figures_of(drawn, "budgets", width)
    assert figure.get_figwidth() <= WIDTHS[width] + 1e-9
    check(figure)
    ax, *_ = figure.axes
    box = ax.get_window_extent(renderer_of(figure))
    places = [line.get_transform().transform(line.get_xydata()) for line in ax.lines if line.get_marker() not in ("None", "", None)]
    assert all(box.x0 < x < box.x1 and box.y0 < y < box.y1 for x, y in np.concatenate(places)), "every marker stands inside"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["cost", "size"])
def test_no_name_covers_a_marker(drawn: Drawn, kind: str) -> None:
    for figure in figures_of(drawn, kind, "page"):
        renderer = renderer_of(figure)
        for ax in figure.axes:
            boxes = [Text.get_window_extent(text, renderer) for text in ax.texts]
            markers = [line for line in ax.lines if line.get_marker() not in ("None", "", None)]
            places = np.concatenate([line.get_transform().transform(line.get_xydata()) for line in markers])
            assert len(boxes) > 1
            assert not any(box.contains(x, y) for box in boxes for x, y in places)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["accuracy", "cost"])
def test_the_study_is_drawn_to_the_same_bytes(kind: str) -> None:
    """From reading to writing, twice."""
    once, again = (
        {name: hashlib.sha256(content).hexdigest() for name, content in files(prepare(read_store(Store(STUDY))), kind, ["png", "pdf", "svg"])}
        for _ in range(2)
    )
    assert once == again
    assert {f"{kind}.png", f"{kind}.pdf", f"{kind}.svg"} <= once.keys()


# --- what a dot plot says ------------------------------------------------------------------------------------------------

PLAIN = Style("#0072b2", "o", "-", "#0072b2")


def said(figure: Figure) -> list[str]:
    return [text.get_text() for text in texts_of(figure)]


def test_values_far_below_the_others_are_arrows_with_their_value() -> None:
    lines = [Line(f"row {i}", PLAIN, {"w4a4": Dot(80.0 + i, 79.0 + i, 81.0 + i, [80.0 + i])}, {}) for i in range(6)]
    lines += [Line("far", PLAIN, {"w4a4": Dot(13.7, 13.0, 14.0, [13.7])}, {}), Line("gone", PLAIN, {}, {"w4a4": "diverged"})]
    lines += [Line("half", PLAIN, {"w4a4": Dot(82.0, 81.5, 82.5, [82.0])}, {"w4a4": "1 of 2 diverged"})]
    section = Section("net", lines, ["w4a4"], {"w4a4": [Guide("teacher 87.4", 87.4, "-"), Guide("round", 12.0, ":", reference=False)]})
    with settings():
        for width in WIDTHS.values():
            (figure,) = dot_plots([section], width, "top-1 (%)", ["dots: seeds"])
            low, high = figure.axes[0].get_xlim()
            assert 70 < low < 79
            assert 87.4 < high < 90
            assert {"13.7", "diverged", "teacher 87.4", "W4A4", "far"} <= set(said(figure))
            assert sum("1 of 2 diverged" in text for text in said(figure)) == 1
            assert "round" not in said(figure), "its line is beyond the axis"
            check(figure)


def test_what_has_no_room_beside_its_dot_is_in_the_name() -> None:
    wide = Dot(50.0, 1.0, 99.0, [20.0, 80.0])
    lost = "2 diverged, 1 failed of 5"
    section = Section("net", [Line("gdfq", PLAIN, {"w4a4": wide}, {"w4a4": lost}), Line("acq", PLAIN, {}, {"w4a4": lost * 4})], ["w4a4"], {})
    with settings():
        (figure,) = dot_plots([section], WIDTHS["column"], "", [])
        names = [text.replace("\n", " ") for text in said(figure)]
        assert f"gdfq, W4A4: {lost}" in names
        assert "no result" in names
        check(figure)


def test_a_long_table_goes_over_several_pages() -> None:
    lines = [Line(f"row {i}", PLAIN, {"w4a4": Dot(80.0, 79.0, 81.0, [80.0])}, {}) for i in range(150)]
    with settings():
        figures = dot_plots([Section("net", lines, ["w4a4"], {})], WIDTHS["column"], "", [])
        assert len(figures) == 3
        assert [text for figure in figures for text in said(figure) if text.startswith("row")] == [line.name for line in lines]


@pytest.mark.parametrize(
    ("values", "cut"),
    [
        ([80.0, 81.0, 82.0, 83.0, 84.0, 13.7], {13.7}),
        ([69.0, 72.0, 75.0, 78.0, 80.0, 62.0], set()),
        ([80.0, 70.0, 85.0, 12.0], {12.0}),
        ([80.0, 12.0], set()),
        ([10.0, 11.0, 12.0, 80.0, 82.0], set()),
        ([], set()),
    ],
)
def test_an_axis_is_cut_below_the_bulk(values: list[float], cut: set[float]) -> None:
    assert {value for value in values if value < floor_of(values)} == cut


# --- names ---------------------------------------------------------------------------------------------------------------


def test_long_names_keep_the_fewest_settings_that_tell_them_apart(drawn: Drawn) -> None:
    rows = drawn.blocks[0].rows
    brief = brief_names(rows)
    assert len(set(brief.values())) == len(brief)
    assert all(len(brief[row.label]) <= len(row.label) for row in rows)


def test_brief_names_of_the_study() -> None:
    brief = brief_names(row for block in prepare(read_store(Store(STUDY))).blocks for row in block.rows)
    full = "acq(adversarial_weight=0, condition=False, consistency_weight=0, matching_weight=0, student_loss=kl)"
    assert (brief["acq"], brief["acq(student_loss=kl)"], brief[full]) == ("acq", "acq(student_loss=kl)", "acq(condition=False +4)")


def test_text_is_wrapped_to_its_width_and_nothing_is_lost() -> None:
    text = "acq(adversarial_weight=0, condition=False, a_name_without_any_blank_that_is_too_long_for_a_line)"
    with settings():
        for width in (40.0, 90.0, 200.0):
            lines = wrapped_to(text, width).split("\n")
            assert all(extent(line)[0] <= width for line in lines)
            assert "".join(lines).replace(" ", "") == text.replace(" ", "")
        assert wrapped_to("a b", 500.0) == "a b"
        assert wrapped_to("", 500.0) == ""


def test_labels_are_spread_so_that_none_covers_another() -> None:
    random = np.random.default_rng(0)
    for _ in range(50):
        wanted, heights = random.uniform(0, 100, 8), random.uniform(2, 9, 8)
        places = np.array(spread(list(wanted), list(heights), 0.0, 100.0))
        order = np.argsort(wanted)
        gaps = np.diff(places[order]) - (heights[order][1:] + heights[order][:-1]) / 2
        assert gaps.min() > -1e-9
        assert (places - heights / 2).min() > -1e-9
        assert (places + heights / 2).max() < 100 + 1e-9
    assert spread([10.0, 50.0], [4.0, 4.0], 0.0, 100.0) == [10.0, 50.0], "where there is room nothing moves"
    assert spread([50.0, 50.0], [4.0, 4.0], 0.0, 100.0) == [48.0, 52.0]


# --- axes and fronts -----------------------------------------------------------------------------------------------------


def test_ticks_of_logarithmic_axes_are_plain_numbers() -> None:
    assert [plain(value) for value in (0.0001, 0.05, 1, 1500, 20_000, 3e6)] == ["0.0001", "0.05", "1", "1500", "20k", "3M"]
    assert ticks(0.8, 120.0, 6) == [1, 3, 10, 30, 100]
    assert len(ticks(1.11, 1.38, 5)) > 1, "a short axis"
    assert 2 <= len(ticks(1e-9, 1e9, 6)) <= 6


def test_the_front_is_what_nothing_beats_in_both() -> None:
    at = {"cheap": (1.0, 60.0), "beaten": (5.0, 59.0), "better": (10.0, 70.0), "partial": (20.0, 99.0), "best": (30.0, 80.0)}
    points = [Point(name, PLAIN, x, x, y, ranked=name != "partial") for name, (x, y) in at.items()]
    assert [point.name for point in front_of(points)] == ["cheap", "better", "best"]


def test_what_lies_below_the_axis_is_named_at_its_edge() -> None:
    """Also two points of one name and value, and no more than there is room for."""
    near = [Point(f"row {i}", PLAIN, 10.0 + i, 10.0 + i, 80.0 + i / 6) for i in range(120)]
    for count in (3, 30):
        far = [Point("far", PLAIN, 1.0 + 4 * i, 1.0 + 4 * i, 12.0) for i in range(count)]
        with settings():
            (figure,) = scatters([Scatter("net", "seconds", [*near, *far], 101.0)], WIDTHS["column"], "top-1 (%)", [])
            assert figure.axes[0].get_ylim()[0] > 12.0
            names = said(figure).count("far: 12.0")
            assert names == 3 if count == 3 else 3 < names < count
            assert sum(line.get_marker() == 7 for line in figure.axes[0].lines) == count
            check(figure)
