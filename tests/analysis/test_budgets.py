"""Rows with a width per layer: the figure of accuracy against size, and the report's bars."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from synthetic_store import BITS, cells, sizes, write_budgets, write_cell

from dfqbench.analysis.plots.budgets import EQUAL, _panel, budgets
from dfqbench.analysis.plots.drawn import Drawn, NothingToDraw
from dfqbench.analysis.plots.figures import prepare
from dfqbench.analysis.records import read_store
from dfqbench.analysis.report.report import page
from dfqbench.store import Store


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Drawn:
    return prepare(read_store(write_budgets(tmp_path_factory.mktemp("budgets") / "r")))


def test_each_method_is_drawn_with_each_choice_of_widths(drawn: Drawn) -> None:
    (block,) = drawn.blocks
    panel = _panel(drawn, block)
    assert panel is not None
    assert panel.choosers == [EQUAL, "dnq", "dnq(updates=2)", "pareto"]
    assert {(one.method, one.chooser) for one in panel.series} == {(name, who) for name in ("gdfq", "round") for who in panel.choosers}
    entries = {(row.label, width): entry for row in block.rows for width, entry in row.entries.items()}
    for one in panel.series:
        settings = {EQUAL: "", "pareto": "(allocate=pareto)", "dnq": "(allocate=dnq)", "dnq(updates=2)": "(allocate=dnq(updates=2))"}[one.chooser]
        assert [x for x, *_ in one.points] == [(16_000 + 33_500 * bits) / 2**20 for bits in (3, 4)]
        for (_, mean, (low, high), whole), width in zip(one.points, ("w3a3", "w4a4"), strict=True):
            assert mean == entries[one.method + settings, width].mean
            assert low < mean < high
            assert whole
        assert one.style == drawn.look[one.method], "a method has its colour, whoever chooses"
    (figure,) = budgets(drawn)
    written = [text.get_text() for text in figure.texts]
    assert {"gdfq", "round", EQUAL, "dnq", "dnq(updates=2)", "pareto"} <= {*written}


def test_a_store_of_budgets_alone_is_drawn_and_one_without_is_not(tmp_path: Path) -> None:
    drawn = prepare(read_store(write_budgets(tmp_path / "r", plain=False)))
    (block,) = drawn.blocks
    panel = _panel(drawn, block)
    assert panel is not None
    assert (set(panel.methods), panel.choosers) == ({"gdfq", "round"}, ["dnq", "dnq(updates=2)", "pareto"])
    assert budgets(drawn)
    store = Store(tmp_path / "plain", writable=True)
    for cell in cells(10):
        write_cell(store, cell, 100, size=sizes(cell))
    with pytest.raises(NothingToDraw, match="no row has a width per layer"):
        budgets(prepare(read_store(store)))
    assert "width per layer" not in page(read_store(store), "plain")


def test_the_report_has_a_bar_for_each_layer_with_its_name(drawn: Drawn) -> None:
    """Each choice once, whatever number of methods and seeds share it."""
    text = page(drawn.reading, "budgets")
    (part,) = re.findall(r'<section id="layers">.*?</section>', text, re.DOTALL)
    heads = re.findall(r"<summary>(.*?)</summary>", part)
    assert len(heads) == 6, "three choices at two widths"
    costs = "2.98 bits per weight, KL to the teacher 0.100 nats (equal widths: 0.400); on images that did not choose 0.125 (0.500)"
    assert heads[0] == f"resnet20, lineage, w3a3, dnq: {costs}"
    assert part.count("--average:5.000") == part.count("--average:3.000") == 6
    bars = re.findall(r'<span style="--bits:(\d)" title="(.*?)">(\d)</span>', part)
    assert bars[:4] == [
        ("5", "conv1: 5 bits, 100 weights", "5"),
        ("2", "layer1.0.conv1: 2 bits, 100 weights", "2"),
        ("8", "linear: 8 bits, 100 weights", "8"),
        ("3", "relu: 3 bits, 9 values of an image", "3"),
    ]
    assert len(bars) == 6 * len(BITS)
    assert '<a href="#layers">' in text


def test_a_report_without_budgets_has_no_such_section(tmp_path: Path) -> None:
    store = Store(tmp_path, writable=True)
    write_cell(store, next(cells(1)), 100)
    assert 'id="layers"' not in page(read_store(store), "plain")
