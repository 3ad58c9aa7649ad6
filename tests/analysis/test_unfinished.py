"""Cells that diverged or failed: named wherever a number would stand, never lost from a mean or a ranking, and not shown once they are stale."""

from __future__ import annotations

import dataclasses
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from rich.console import Console
from synthetic_store import cells, write_cell, write_failure

from dfqbench.analysis.compare import compare
from dfqbench.analysis.per_image import PerImage
from dfqbench.analysis.plots.drawn import FEWER, Drawn
from dfqbench.analysis.plots.figures import prepare
from dfqbench.analysis.plots.kinds import draw
from dfqbench.analysis.records import read_store
from dfqbench.analysis.report.report import page
from dfqbench.analysis.tables.blocks import Block, blocks
from dfqbench.analysis.tables.cells import load_frame
from dfqbench.analysis.tables.formats import html, markdown
from dfqbench.analysis.tables.latex import latex
from dfqbench.analysis.tables.means import means_frame, ranking
from dfqbench.analysis.tables.printed import names_of, notes_of, texts_of
from dfqbench.analysis.tables.terminal import print_tables
from dfqbench.analysis.tables.wide import side_by_side
from dfqbench.errors import UserError
from dfqbench.files import read_json, write_json
from dfqbench.store import Store
from dfqbench.sweep.cell import Cell
from dfqbench.sweep.config_file import text_digest

Run = Callable[..., tuple[int, str, str]]
ACQ = "acq(matching_weight=0)"


def chosen(count: int = 250) -> list[Cell]:
    """At four and three bits with seeds 0 to 2: gdfq, round, acq, acq without matching, zaq and lrq."""
    found = [cell for cell in cells(count) if cell.bits.weights < 5 and cell.seed < 3]
    return [cell for cell in found if cell.changed in ({}, {"matching_weight": 0.0}) and cell.method not in ("gznq", "zeroq")]


def fate(cell: Cell) -> str:
    """zaq diverges everywhere, acq without matching at three bits; one seed of gdfq diverges there; lrq loses two seeds at four in two ways."""
    three = cell.bits.weights == 3
    if cell.method == "zaq" or (three and (cell.changed or (cell.method == "gdfq" and cell.seed == 1))):
        return "Diverged"
    return {0: "Diverged", 1: "OutOfMemoryError"}.get(cell.seed, "") if cell.method == "lrq" and not three else ""


def filled(root: Path, found: list[Cell]) -> Store:
    store = Store(root, writable=True)
    for cell in found:
        known = {"steps": 8000} if cell.method == "zaq" else {}  # records of earlier versions lack it
        write_failure(store, cell, fate(cell), **known) if fate(cell) else write_cell(store, cell, 400)
    return store


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return filled(tmp_path_factory.mktemp("lost") / "r", chosen())


@pytest.fixture(scope="module")
def drawn(store: Store) -> Drawn:
    return prepare(read_store(store))


@pytest.fixture(scope="module")
def block(drawn: Drawn) -> Block:
    (found,) = drawn.blocks
    return found


def printed(block: Block) -> dict[str, list[str]]:
    """What a table prints of each row at four and at three bits, without its mean."""
    texts, _ = texts_of(block)
    places = [names_of(texts).index(width) for width in ("w4a4", "w3a3")]
    return {str(line[0]): [line[place].partition(" ± ")[2].partition(" ")[2] or line[place] for place in places] for line in texts.to_numpy()}


def test_what_diverged_or_failed_is_named_where_its_accuracy_would_stand(block: Block) -> None:
    said = printed(block)
    assert said["zaq"] == ["diverged, epoch 5"] * 2, "a row without any finished cell is a row"
    assert said[ACQ][1] == "diverged, epoch 5"
    assert said["gdfq"][1] == "(1 of 3 diverged, epoch 5)"
    texts, _ = texts_of(block)
    assert next(line for line in texts.to_numpy() if line[0] == "lrq")[names_of(texts).index("w4a4")].endswith(
        " (1 diverged, 1 failed of 3, epoch 5)"
    )
    assert next(line for line in texts.to_numpy() if line[0] == "zaq")[2:4].tolist() == ["8000 x 64", "3"]


def test_the_notes_say_what_the_words_mean_and_only_where_they_stand(block: Block, tmp_path: Path) -> None:
    starts = ("diverged: ", "failed: ", "(1 of 3 diverged): ")
    assert [sum(note.startswith(start) for note in notes_of(block)) for start in starts] == [1, 1, 1]
    (plain,) = blocks(read_store(filled(tmp_path / "r", [cell for cell in chosen() if not fate(cell)])).results)
    assert not any(note.startswith(starts) for note in notes_of(plain))


def test_what_is_left_of_a_row_is_in_no_comparison_and_no_ranking(store: Store, block: Block) -> None:
    reading = read_store(store)
    kept = [result for result in reading.results if (result["cell"]["label"], result["cell"]["bits"]) != ("gdfq", "w3a3")]
    best = max(
        (r for r in reading.results if (r["cell"]["label"], r["cell"]["bits"], r["cell"]["seed"]) == ("gdfq", "w3a3", 0)), key=lambda r: r["top1"]
    )
    best["top1"] = 99.0  # the seeds that are left lead the column
    (found,) = blocks([*reading.results, *reading.unfinished], per_image=PerImage(reading))
    (without,) = blocks([*kept, *reading.unfinished], per_image=PerImage(reading))
    rows, expected = ({row.label: row.entries.get("w3a3") for row in its.rows} for its in (found, without))
    assert rows["gdfq"] is not None
    assert (rows["gdfq"].best, rows["gdfq"].against_best) == (False, None)
    for label in ("acq", "lrq", "round"):
        assert rows[label] == expected[label], "the others are compared as if it were not there"
    assert any(entry and entry.best for entry in rows.values())
    assert ranking([found] * 2)[-1] == "not ranked, as they are not in every column with all their seeds: acq(matching_weight=0); gdfq; lrq; zaq"


def test_a_row_is_not_the_better_for_cells_that_diverged_at_hard_widths(block: Block) -> None:
    labels = [row.label for row in block.rows]
    assert labels[0] == "zaq"
    means = {row.label: row.entries for row in block.rows if row.entries}
    assert means[ACQ]["w4a4"].mean > means["round"]["w4a4"].mean + 3, "at the width that finished it is far better"
    assert labels.index(ACQ) < labels.index("acq")
    assert max(labels.index(ACQ), labels.index("round")) < labels.index("gdfq")


def test_every_format_names_it(drawn: Drawn, tmp_path: Path) -> None:
    out = io.StringIO()
    print_tables(drawn.blocks, [], Console(file=out, width=200))
    for text in (markdown(drawn.blocks), latex(drawn.blocks), html(drawn.blocks), out.getvalue()):
        assert sum(text.count(what) for what in ("diverged, epoch 5 |", "diverged, epoch 5 &", "diverged, epoch 5</td>", "  diverged, epoch 5")) >= 3
        assert "(1 of 3 diverged, epoch 5)" in text
    two = read_store(filled(tmp_path / "r", [cell for cell in chosen(500) if cell.teacher.label == "resnet32" or cell.seed == 0]))
    (table,) = side_by_side(blocks([*two.results, *two.unfinished]))
    lines = {line[0]: list(line[2:]) for line in texts_of(table)[0].to_numpy()}
    assert lines["zaq"] == ["diverged, epoch 5"] * 4
    assert [text.rpartition(" (")[2] for text in lines["gdfq"]] == ["1)", "1)", "3)", "1 of 3 diverged, epoch 5)"]
    assert table.rows[0].label == "zaq"


def test_programs_find_it_in_columns_of_their_own(store: Store, drawn: Drawn) -> None:
    reading = read_store(store)
    written = load_frame([*reading.results, *reading.unfinished]).to_csv(index=False)
    assert ",8000," in written
    assert "8000.0" not in written
    cells_csv, means_csv = (pd.read_csv(io.StringIO(text)) for text in (written, means_frame(drawn.blocks).to_csv(index=False)))
    assert cells_csv.status.value_counts().to_dict() == {"done": 24, "diverged": 11, "failed": 1}
    assert (cells_csv.top1.isna() == (cells_csv.status != "done")).all()
    counts = means_csv.set_index(["method", "bits"])[["n", "diverged", "failed"]]
    assert counts.loc[("zaq", "w3a3")].tolist() == [0, 3, 0]
    assert counts.loc[("lrq", "w4a4")].tolist() == [1, 1, 1]
    assert counts.sum().tolist() == [24, 11, 1]
    assert means_csv.set_index(["method", "bits"]).top1.isna().sum() == 3


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]  # type: ignore[attr-defined]


def test_plots_name_it(drawn: Drawn) -> None:
    (figure,) = draw("drop", drawn)
    assert texts(figure).count("diverged") == 3
    assert sum(text.endswith("*") for text in texts(figure)) == 2
    assert any(f"*: {FEWER}" in text.replace("\n", " ") for text in texts(figure))
    (figure,) = draw("accuracy", drawn)
    said = [text.replace("\n", " ") for text in texts(figure)]
    assert said.count("diverged") == 3, "zaq at both widths, acq without matching at one"
    assert {"zaq", "1 of 3 diverged", "1 diverged, 1 failed of 3"} <= set(said)
    assert any("hollow: the seeds that did not diverge or fail" in text for text in said)
    hollow = [line for ax in figure.axes for line in ax.lines if line.get_markerfacecolor() == "white" and len(line.get_xdata())]  # type: ignore[arg-type]
    assert {line.get_markeredgecolor() for line in hollow} == {drawn.look["gdfq"].ink, drawn.look["lrq"].ink}
    (figure,) = draw("ablation", drawn)
    assert {"acq(matching_weight=0)", "diverged"} <= set(texts(figure))
    (figure,) = draw("losses", drawn)
    assert any(f"faint: {FEWER}" in text.replace("\n", " ") for text in texts(figure))
    assert "zaq" not in texts(figure), "no history was written"
    (figure,) = draw("cost", drawn)
    assert any(f"hollow: {FEWER}" in text.replace("\n", " ") for text in texts(figure))
    hollow = [line for ax in figure.axes for line in ax.lines if line.get_markerfacecolor() == "white" and len(line.get_xdata())]  # type: ignore[arg-type]
    assert {line.get_color() for line in hollow} == {drawn.look["gdfq"].color, drawn.look["lrq"].color}


def test_the_loss_of_what_diverged_ends_in_a_cross(tmp_path: Path) -> None:
    store = filled(tmp_path / "r", chosen())
    (lost,) = [cell for cell in chosen() if cell.method == "zaq" and str(cell.bits) == "w3a3" and cell.seed == 0]
    lines = ["epoch,phase,loss,student_lr", "1,train,2.0,0.1", "2,train,50.0,0.1", "3,train,nan,0.1", ""]
    (store.folder(lost.id) / "history.csv").write_text("\n".join(lines))
    (figure,) = draw("losses", drawn := prepare(read_store(store)))
    (cross,) = [line for ax in figure.axes for line in ax.lines if line.get_marker() == "x"]
    assert (list(cross.get_xdata()), list(cross.get_ydata())) == ([400.0], [50.0])  # type: ignore[arg-type]
    assert cross.get_color() == drawn.look["zaq"].ink
    assert any("cross: diverged" in text for text in texts(figure))


def test_plots_without_anything_lost_say_nothing_of_it(tmp_path: Path) -> None:
    plain = prepare(read_store(filled(tmp_path / "r", [cell for cell in chosen() if not fate(cell)])))
    for kind in ("accuracy", "losses", "cost", "drop"):
        for figure in draw(kind, plain):
            assert not any(word in text for text in texts(figure) for word in ("diverge", "fail", "hollow", "faint"))


def test_the_report_and_compare_name_it(store: Store) -> None:
    text = page(read_store(store), "t")
    assert "11 cells diverged. 1 cell failed." in text
    lines = {label: line for line in text.split("<tr") for label in ("zaq", "gdfq") if f">{label}</a></th>" in line}
    assert lines["zaq"].count(">diverged</a><small>epoch 5</small>") == 2
    assert lines["gdfq"].count("<small>1 of 3 diverged, epoch 5</small>") == 1
    ids = {(cell.label, str(cell.bits), cell.seed): cell.id for cell in chosen()}
    with pytest.raises(UserError, match=f"^cell {ids['zaq', 'w4a4', 0]} diverged: the loss is nan in epoch 5$"):
        compare(store, ids["gdfq", "w4a4", 0], ids["zaq", "w4a4", 0])
    with pytest.raises(UserError, match=f"^cell {ids['lrq', 'w4a4', 1]} failed: OutOfMemoryError: out of luck$"):
        compare(store, ids["gdfq", "w4a4", 0], ids["lrq", "w4a4", 1])


# --- what is stale ----------------------------------------------------------------------------------------------------

OLD = chosen()[0]
NEW = dataclasses.replace(OLD, method_version=2)
LONGER = dataclasses.replace(OLD, config={**OLD.config, "epochs": 80})


@pytest.mark.parametrize(
    ("failed", "done", "named"),
    [
        (OLD, NEW, False),  # an older version diverged: the newer one's result counts
        (NEW, OLD, True),  # the newer version diverges where the older one did not
        (OLD, LONGER, True),  # another budget is another row
        (OLD, dataclasses.replace(OLD, seed=1), True),
    ],
)
def test_a_failure_is_shown_unless_a_newer_version_has_a_result(tmp_path: Path, failed: Cell, done: Cell, named: bool) -> None:
    store = Store(tmp_path / "r", writable=True)
    write_failure(store, failed)
    write_cell(store, done)
    reading = read_store(store)
    assert len(reading.failures) == 1
    assert [cell["id"] for cell in reading.unfinished] == [failed.id] * named
    assert ("not in the tables" in page(reading, "t")) != named


def test_of_two_versions_that_diverged_the_newer_one_is_shown(tmp_path: Path) -> None:
    store = Store(tmp_path / "r", writable=True)
    for cell in (NEW, OLD):
        write_failure(store, cell)
    assert [cell["id"] for cell in read_store(store).unfinished] == [NEW.id]


def test_of_one_version_the_later_try_counts(tmp_path: Path) -> None:
    """The method's defaults changed, and its version did not."""
    store = Store(tmp_path / "r", writable=True)
    other = dataclasses.replace(OLD, config={**OLD.config, "student_lr": 1.0})
    write_failure(store, OLD)
    write_cell(store, other, finished=4e9)
    assert read_store(store).unfinished == []
    write_cell(store, other, finished=1.0)
    assert [cell["id"] for cell in read_store(store).unfinished] == [OLD.id]


def test_a_failure_whose_record_is_damaged_or_anothers_is_in_no_table(tmp_path: Path) -> None:
    store = Store(tmp_path / "r", writable=True)
    write_cell(store, OLD)
    for cell, record in zip(chosen()[1:4], ({}, {**NEW.record()}, {**chosen()[3].record(), "bits": None}), strict=True):
        write_failure(store, cell)
        write_json(store.folder(cell.id) / "cell.json", record)
    reading = read_store(store)
    assert (len(reading.failures), reading.unfinished) == (3, [])


def test_where_nothing_of_a_block_has_finished_the_block_is_shown(tmp_path: Path) -> None:
    store = Store(tmp_path / "r", writable=True)
    for cell in chosen()[:2]:
        write_cell(store, cell)
        write_failure(store, dataclasses.replace(cell, precision="bf16"), steps=8000)
    reading = read_store(store)
    lost, _ = blocks([*reading.results, *reading.unfinished])
    assert "teacher accuracy not measured" in lost.title
    assert [(row.label, row.budget) for row in lost.rows] == [("gdfq", "8000 x 64")]
    assert not any("standard error from the test set's size" in note or "seconds" in note for note in notes_of(lost))
    for kind in ("accuracy", "drop", "losses", "cost"):
        assert draw(kind, prepare(reading))
    identity = chosen()[0].identity()
    from dfqbench.sweep.cell import fingerprint

    write_json(store.root / "teachers" / f"{fingerprint([identity['teacher'], identity['evaluation']])}.json", {"top1": 92.0})
    lost, _ = blocks([*read_store(store).results, *read_store(store).unfinished])
    assert ("teacher 92.00 %" in lost.title, np.isfinite(lost.teacher_top1)) == (True, True)


# --- from the store to the commands ---------------------------------------------------------------------------------


def noted(store: Store, found: list[Cell]) -> Path:
    """A config that last ran for these cells."""
    config = store.root.parent / "mine.yaml"
    config.write_text("name: mine")
    labels = {cell.id: str(cell) for cell in found}
    write_json(store.root / "sweeps" / "mine.json", {"config": text_digest(config), "cells": list(labels), "labels": labels})
    return config


def test_a_sweep_of_which_every_cell_diverged_has_a_table_and_a_report(dfqbench: Run, tmp_path: Path) -> None:
    store, found = Store(tmp_path / "r", writable=True), [cell for cell in chosen() if cell.method == "zaq"]
    config, where = noted(store, found), ("--results", tmp_path / "r")
    for cell in found:
        write_failure(store, cell, steps=8000)
    for layout in ("blocks", "wide"):
        code, out, err = dfqbench("table", config, *where, "--layout", layout)
        row = next(line for line in out.splitlines() if line.startswith("zaq"))
        assert (code, row.split()[-7:]) == (0, ["diverged,", "epoch", "5"] * 2 + ["-"])
        assert f"6 of 6 cells failed, dfqbench run {config} --results {store.root} --retry-failed tries them again" in err
    _, out, _ = dfqbench("table", config, *where, "--format", "csv")
    assert set(pd.read_csv(io.StringIO(out)).status) == {"diverged"}
    assert dfqbench("report", config, *where)[0] == 0
    assert ">diverged</a><small>epoch 5</small>" in (store.root / "report.html").read_text()
    for command in (("plot", config), ("wandb", "sync", config, "--offline")):
        code, out, err = dfqbench(*command, *where)
        assert (code, out) == (2, "")
        assert f"nothing is finished in {store.root / 'runs'} of {config}" in err
    for cell in found:
        write_failure(store, cell, "OutOfMemoryError")
    assert dfqbench("table", config, *where)[0] == 2, "errors are no result"


def test_a_cell_that_cannot_be_read_is_named_once_and_not_as_one_to_run(dfqbench: Run, tmp_path: Path) -> None:
    store, found = Store(tmp_path / "r", writable=True), [cell for cell in chosen() if cell.method == "gdfq" and cell.seed < 2]
    config, where = noted(store, found[:4]), ("--results", tmp_path / "r")
    done, damaged, lost, never = found
    write_cell(store, done)
    for cell, name in ((damaged, "result.json"), (lost, "failed.json")):
        store.write_cell(cell.record())
        (store.folder(cell.id) / name).write_text("{")
    store.folder("000000000000").write_text("of no cell in this sweep")
    code, _, err = dfqbench("table", config, *where)
    assert code == 0
    for cell, name in ((damaged, "result.json"), (lost, "failed.json")):
        (line,) = [line for line in err.splitlines() if str(cell) in line]
        assert line.startswith(f"skipped: {store.folder(cell.id) / name}: damaged: ")
    assert "2 skipped, nothing was changed" in err
    assert err.splitlines()[-2:] == [f"1 of 4 cells are not done, dfqbench run {config} --results {store.root} runs them:", f"  {never}"]
    (store.folder(done.id) / "result.json").write_text("{")
    code, _, err = dfqbench("table", config, *where)
    assert (code, err.splitlines()[-1].partition(" in ")[0]) == (2, "dfqbench: nothing that can be read is finished")


# --- from the run to the table ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_student_that_diverges_in_a_run_is_named_by_the_commands(dfqbench: Run, sweep_file: Callable[..., Path], tmp_path: Path) -> None:
    quick: dict[str, Any] = {"warmup_epochs": 1, "calibration_epochs": 1}
    config = sweep_file(methods=["round", {"gdfq": {**quick, "student_lr": 1e30}}], bits=["w4a4"])
    where = ("--results", tmp_path / "r")
    assert dfqbench("run", config, *where)[0] == 1
    (path,) = (tmp_path / "r").glob("runs/*/failed.json")
    assert (read_json(path)["kind"], read_json(path)["steps"]) == ("Diverged", 8)
    code, out, err = dfqbench("table", config, *where)
    row = next(line for line in out.splitlines() if line.startswith("gdfq"))
    assert (code, re.findall(r"8 x 8 +1 +diverged, epoch [12] +- +-$", row) != []) == (0, True)
    assert "1 of 2 cells failed" in err
    _, out, _ = dfqbench("table", sweep_file(methods=["round"], bits=["w4a4"], name="other"), *where)
    assert "diverged" not in out, "another sweep does not ask for it"
    _, out, _ = dfqbench("table", *where, "--format", "csv")
    assert pd.read_csv(io.StringIO(out)).set_index("plain_method").status.to_dict() == {"round": "done", "gdfq": "diverged"}
