"""Plots: one colour per method, files that come out the same twice, nothing that overlaps, and a reason where there is nothing to draw."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import SimpleNamespace

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from synthetic_store import cells, make_store, write_cell

import dfqbench_methods
from dfqbench.analysis.plots.drawn import Drawn, NothingToDraw
from dfqbench.analysis.plots.figures import files, prepare
from dfqbench.analysis.plots.kinds import KINDS, draw
from dfqbench.analysis.plots.style import COLOURS, MARKERS, leave_out_failures, rendered, styles
from dfqbench.analysis.records import read_store
from dfqbench.method.registry import built_in_names
from dfqbench.store import Store


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Drawn:
    return prepare(read_store(make_store(tmp_path_factory.mktemp("plots") / "r", 500, sized=True)))


MADE = [kind for kind in KINDS if kind != "published"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", MADE)
def test_every_kind_is_drawn_in_every_format_the_same_twice(drawn: Drawn, kind: str) -> None:
    once = {name: hashlib.sha256(content).hexdigest() for name, content in files(drawn, kind, ["png", "pdf", "svg"])}
    again = {name: hashlib.sha256(content).hexdigest() for name, content in files(drawn, kind, ["png", "pdf", "svg"])}
    assert once == again
    assert {name.rpartition(".")[2] for name in once} == {"png", "pdf", "svg"}


def test_files_are_what_they_are_called_and_carry_no_date(drawn: Drawn) -> None:
    for name, content in files(drawn, "drop", ["png", "pdf", "svg"]):
        assert content.startswith({"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}[name[-3:]])
        assert not any(word in content for word in (b"CreationDate", b"<dc:date>", b"Matplotlib v"))


def test_a_method_has_one_colour_in_every_plot_and_store(drawn: Drawn, tmp_path: Path) -> None:
    look = drawn.look
    acq = {style.color for label, style in look.items() if label.startswith("acq")}
    assert len(acq) == 1
    plain = [style.color for label, style in look.items() if "(" not in label]
    assert len(set(plain)) == len(plain)
    assert set(plain) <= set(COLOURS)
    variants = [(s.marker, str(s.dashes)) for label, s in look.items() if label.startswith("acq")]
    assert len(set(variants)) == len(variants), "settings of one method differ in marker and dashes"
    few = Store(tmp_path / "few")
    for cell in cells(250):
        if cell.method in ("acq", "zaq") and not cell.changed:
            write_cell(few, cell)
    other = styles(prepare(read_store(few)).blocks)
    assert {label: style.color for label, style in other.items()} == {label: look[label].color for label in other}


# in figures that were published before others came: neither colour nor marker of these may ever move
FIRST = ("acq", "ait", "gdfq", "gznq", "intraq", "lrq", "qimera", "round", "zaq", "zeroq", "checkpoint")


def test_a_new_method_moves_no_others_colour_or_marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither another file in methods/ nor a plug-in, wherever their names stand in the alphabet."""
    (tmp_path / "aaa.py").touch()
    monkeypatch.setattr(dfqbench_methods, "__path__", [str(tmp_path), *dfqbench_methods.__path__])
    methods = ("aardvark", "aaa", *sorted(dfqbench_methods.ORDER))
    rows = [SimpleNamespace(method=method, label=method, changed={}) for method in methods]
    look = styles([SimpleNamespace(rows=rows)])  # type: ignore[list-item]
    assert dfqbench_methods.ORDER[: len(FIRST)] == FIRST
    places = {method: i for i, method in enumerate((*dfqbench_methods.ORDER, "aaa", "aardvark"))}
    wanted = {method: (COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]) for method, i in places.items()}
    assert {label: (style.color, style.marker) for label, style in look.items()} == wanted


def test_every_built_in_method_has_a_declared_place_and_a_colour_of_its_own() -> None:
    assert list(dfqbench_methods.ORDER) == built_in_names(), "dfqbench_methods.ORDER: new methods go to its end"
    assert len(dfqbench_methods.ORDER) <= len(set(COLOURS))


@pytest.mark.slow
@pytest.mark.parametrize("kind", MADE)
def test_no_text_leaves_the_page_or_covers_another(drawn: Drawn, kind: str) -> None:
    from matplotlib.text import Text

    for figure in draw(kind, drawn):
        rendered(figure, ["png"])
        renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
        page = figure.bbox
        outside = set()  # labels of ticks beyond the limits exist, but are not drawn
        for axis in (axis for ax in figure.axes for axis in (ax.xaxis, ax.yaxis)):
            low, high = sorted(axis.get_view_interval())
            ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
            outside |= {label for tick in ticks if not low <= tick.get_loc() <= high for label in (tick.label1, tick.label2)}
        texts = [t for t in figure.findobj(Text) if t.get_text().strip() and t.get_visible() and t not in outside]
        boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in texts]
        assert len(boxes) > 5
        for words, box in boxes:
            assert box.x0 >= page.x0 - 1, words
            assert box.x1 <= page.x1 + 1, words
            assert box.y0 >= page.y0 - 1, words
            assert box.y1 <= page.y1 + 1, words
        for i, (words, box) in enumerate(boxes):
            for other, covered in boxes[i + 1 :]:
                wide = min(box.x1, covered.x1) - max(box.x0, covered.x0)
                high = min(box.y1, covered.y1) - max(box.y0, covered.y0)
                assert not (wide > 1.5 and high > 1.5), f"{kind}: {words!r} and {other!r} overlap"


def test_what_was_not_measured_is_said_with_what_would_measure_it(tmp_path: Path) -> None:
    store = Store(tmp_path / "r")
    for cell in cells(100):
        if not cell.changed:
            write_cell(store, cell, evaluated=False)
    drawn = prepare(read_store(store))
    for kind, said in (
        ("published", "no published number is about this test set"),
        ("curves", "evaluate_every"),
        ("size", "all were written by earlier versions"),
        ("ablation", "{METHOD: {SETTING: 0}}"),
    ):
        with pytest.raises(NothingToDraw) as why:
            draw(kind, drawn)
        assert said in str(why.value)
    assert draw("losses", drawn)


def test_measured_against_published_is_drawn_where_claims_fit(tmp_path: Path) -> None:
    from test_ledger import papers_cell

    papers_cell(tmp_path)
    drawn = prepare(read_store(Store(tmp_path)))
    # the store's file says 92 % for the teacher, which is another one than the papers'
    with pytest.raises(NothingToDraw, match=r"a teacher of 93\.89 or 94\.03"):
        draw("published", drawn)
    reading = read_store(Store(tmp_path))
    reading.results[0]["teacher"]["top1"] = 94.0
    (figure,) = draw("published", prepare(reading))
    labels = [text.get_text() for text in figure.axes[0].texts]
    assert labels == ["W4A4"]


def test_an_ablation_is_against_the_method_as_it_is(drawn: Drawn) -> None:
    figures = draw("ablation", drawn)
    axes = [ax for figure in figures for ax in figure.axes if ax.get_xlabel()]
    assert {ax.get_xlabel() for ax in axes} == {"points of top-1 against acq as it is"}
    names = [label.get_text() for label in axes[0].get_yticklabels()]
    assert names == ["adversarial_weight=0", "condition=none,\nconsistency_weight=0", "matching_weight=0"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["losses", "curves"])
def test_a_method_that_logs_no_loss_and_no_accuracy_is_left_out_of_the_curves(tmp_path: Path, kind: str) -> None:
    store = make_store(tmp_path / "r", 500)
    silent = {result["id"] for result in read_store(store).results if result["cell"]["method"] == "zaq"}
    assert silent
    for cell_id in silent:
        path = store.folder(cell_id) / "history.csv"
        rows = [line.split(",") for line in path.read_text().splitlines()]
        path.write_text("".join(",".join(row[:2]) + "\n" for row in rows))
    figures = draw(kind, prepare(read_store(store)))
    named = {text.get_text() for figure in figures for legend in figure.legends for text in legend.get_texts()}
    assert "gdfq" in named
    assert "zaq" not in named


def test_a_few_failures_do_not_flatten_the_rest() -> None:
    figure = Figure()
    ax = figure.subplots()
    points = [(0.0, 80.0, "red"), (1.0, 70.0, "blue"), (2.0, 85.0, "green"), (3.0, 12.0, "black")]
    for x, y, color in points:
        ax.plot(x, y, "o", color=color)
    leave_out_failures(ax, points)
    assert 12.0 < ax.get_ylim()[0] < 70.0
    assert [text.get_text() for text in ax.texts] == ["12.0"]
    ax.set_ylim(0, 90)
    leave_out_failures(ax, [*points, (4.0, 11.0, "black"), (5.0, 10.0, "black")])  # half of them: that is the result, not an exception
    assert ax.get_ylim() == (0, 90)


def test_values_of_failures_side_by_side_are_not_written_over_each_other() -> None:
    figure = Figure()
    ax = figure.subplots()
    points = [
        (0.0, 80.0, "red"),
        (0.01, 12.0, "blue"),
        (0.02, 13.0, "green"),
        (1.0, 14.0, "black"),
        *((x, 82.0, "red") for x in (0.2, 0.4, 0.6, 0.8, 0.9)),
    ]
    for x, y, color in points:
        ax.plot(x, y, "o", color=color)
    leave_out_failures(ax, points)
    renderer = FigureCanvasAgg(figure).get_renderer()
    for text in ax.texts:
        text.update_positions(renderer)  # type: ignore[attr-defined]
    boxes = [Text.get_window_extent(text, renderer) for text in ax.texts]  # without their arrows
    assert len(boxes) == 3
    assert not any(a.overlaps(b) for a in boxes for b in boxes if a is not b)
