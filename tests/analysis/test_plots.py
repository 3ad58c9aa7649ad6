"""Plots: one colour per method, files that come out the same twice, nothing that overlaps, and a reason where there is nothing to draw."""

from __future__ import annotations

import colorsys
import hashlib
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import Run
from synthetic_store import cells, make_store, write_cell

import dfqbench_methods
from dfqbench.analysis.plots import figures
from dfqbench.analysis.plots.drawn import Drawn, NothingToDraw
from dfqbench.analysis.plots.figures import files, prepare
from dfqbench.analysis.plots.kinds import KINDS, draw
from dfqbench.analysis.plots.style import COLOURS, MARKERS, WIDTHS, inked, styles
from dfqbench.analysis.records import read_store
from dfqbench.method.registry import built_in_names
from dfqbench.store import Store


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Drawn:
    return prepare(read_store(make_store(tmp_path_factory.mktemp("plots") / "r", 500, sized=True)))


def texts(within: Any) -> list[str]:
    """What is written in a figure or in axes, but for ticks."""
    return [text.get_text() for text in within.texts]


MADE = [kind for kind in KINDS if kind not in ("published", "factorial", "budgets")]  # which need cells of their own


@pytest.mark.slow
@pytest.mark.thorough("accuracy", "curves", "size")
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


def hue(color: str) -> int:
    """In degrees, to the nearest 5."""
    red, green, blue = (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return round(colorsys.rgb_to_hsv(red, green, blue)[0] * 72) * 5


def test_a_method_has_one_colour_in_every_plot_and_store(drawn: Drawn, tmp_path: Path) -> None:
    look = drawn.look
    acq = {label: style for label, style in look.items() if label.startswith("acq")}
    assert len({style.color for style in acq.values()}) == len(acq) > 1, "a shade for each variant"
    assert {style.ink for style in acq.values()} == {inked(acq["acq"].color)}
    assert len({hue(style.color) for style in acq.values()}) == 1
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
    assert texts(figure.axes[0]) == ["as published", "gdfq W4A4"]
    (identity,) = [line for line in figure.axes[0].lines if list(line.get_xdata()) == list(line.get_ydata()) and len(line.get_xdata()) == 2]  # type: ignore[arg-type]
    assert tuple(identity.get_xdata()) == figure.axes[0].get_xlim()  # type: ignore[arg-type]


def test_an_ablation_is_against_the_method_as_it_is(drawn: Drawn) -> None:
    figures = draw("ablation", drawn)
    said = [text.replace("\n", " ") for figure in figures for text in texts(figure)]
    assert "points of top-1 against the method as it is" in said
    names = [text for text in said if text.startswith("acq")]
    assert set(names) == {"acq(adversarial_weight=0)", "acq(condition=none, consistency_weight=0)", "acq(matching_weight=0)"}


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
    named = {text for figure in figures for text in texts(figure)}
    assert "gdfq" in named
    assert "zaq" not in named


@pytest.mark.slow
def test_the_command_takes_rows_and_a_width(tmp_path: Path, dfqbench: Run) -> None:
    store = make_store(tmp_path / "r", 75, 100)
    asked = ("plot", "--results", store.root, "--kind", "accuracy", "--format", "svg", "--rows", "acq", "--rows", "rou*")
    for width, points in (("column", WIDTHS["column"] * 72), ("page", WIDTHS["page"] * 72)):
        code, out, _ = dfqbench(*asked, "--width", width, "--out", tmp_path / width)
        assert (code, out.split()) == (0, [str(tmp_path / width / "accuracy.svg")])
        drawn = (tmp_path / width / "accuracy.svg").read_text()
        assert float(drawn.partition('width="')[2].partition("pt")[0]) == pytest.approx(points, abs=0.5)
        assert "<!-- round -->" in drawn
        assert "<!-- gdfq -->" not in drawn
    assert dfqbench(*asked, "--width", "wide")[::2] == (2, "dfqbench: --width 'wide': column or page\n")


def test_an_interruption_while_workers_start_leaves_none_of_them(drawn: Drawn, monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted(ProcessPoolExecutor):
        def _start_executor_manager_thread(self) -> None:
            self._launch_processes()
            assert multiprocessing.active_children()
            raise KeyboardInterrupt

    monkeypatch.setattr(figures, "ProcessPoolExecutor", Interrupted)
    monkeypatch.setattr(figures.os, "cpu_count", lambda: 2)
    with pytest.raises(KeyboardInterrupt):
        list(figures.drawn_kinds(drawn, ["drop", "losses"], ["svg"]))
    for worker in multiprocessing.active_children():
        worker.join(10)
    assert not multiprocessing.active_children(), "Python waits for them at its end"
