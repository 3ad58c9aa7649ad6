"""Cells without an evaluation set: whatever reads a store shows their agreement with the teacher, and nothing takes it for an accuracy."""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from rich.console import Console
from synthetic_store import cells, sizes, without_data, write_cell, write_failure, write_without_data

import dfqbench
from dfqbench.analysis.compare import compare, in_words
from dfqbench.analysis.merge import merge
from dfqbench.analysis.plots.figures import prepare
from dfqbench.analysis.records import Reading, problem_of, read_history, read_store
from dfqbench.analysis.report.report import page
from dfqbench.analysis.tables.blocks import blocks
from dfqbench.analysis.tables.choice import Choice, Columns
from dfqbench.analysis.tables.formats import html, markdown
from dfqbench.analysis.tables.latex import latex
from dfqbench.analysis.tables.means import means_frame
from dfqbench.analysis.tables.printed import Written, names_of, notes_of, texts_of
from dfqbench.analysis.tables.terminal import print_tables
from dfqbench.analysis.tables.wide import side_by_side
from dfqbench.analysis.tables.without_data import agreements, nats
from dfqbench.errors import UserError
from dfqbench.files import write_json
from dfqbench.store import Store
from dfqbench.sweep.cell import Cell
from dfqbench.tracking.runs import summary_of
from dfqbench_slurm.overview import look

Run = Callable[..., tuple[int, str, str]]
KL = {("gdfq", "w8a8"): 0.01, ("gdfq", "w4a4"): 0.4, ("round", "w8a8"): 0.18, ("round", "w4a4"): 0.75, ("acq", "w8a8"): 0.02, ("acq", "w4a4"): 0.2}


def chosen() -> list[Cell]:
    """At eight and four bits with seeds 0 and 1, and an accuracy."""
    return [cell for cell in cells(250) if not cell.changed and (cell.method, str(cell.bits)) in KL and cell.seed < 2]


def blind() -> list[Cell]:
    """The same without data."""
    return [without_data(cell) for cell in chosen()]


def write(store: Store, cell: Cell, **changes: Any) -> dict[str, Any]:
    return write_without_data(store, cell, KL[cell.method, str(cell.bits)] + 0.01 * cell.seed, **changes)


def only(root: Path) -> Store:
    store = Store(root, writable=True)
    for cell in blind():
        write(store, cell, size=sizes(cell))
    return store


def mixed(root: Path) -> Store:
    """With the same cells on an evaluation set, and an acq without data that diverged."""
    store = only(root)
    for cell in chosen():
        write_cell(store, cell, 400)
    lost = next(cell for cell in blind() if (cell.method, str(cell.bits), cell.seed) == ("acq", "w4a4", 1))
    (store.folder(lost.id) / "result.json").unlink()
    write_failure(store, lost)
    return store


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return only(tmp_path_factory.mktemp("alone") / "r")


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return mixed(tmp_path_factory.mktemp("both") / "r")


def table(store: Store, *beside: str) -> Written:
    (found,) = agreements(read_store(store), Choice(columns=Columns.of(",".join(f"+{name}" for name in beside))))
    return found


def lines(written: Written) -> dict[str, list[str]]:
    """What is printed of every row in agreement and KL at eight bits, then at four."""
    wanted = [(width, name) for width in ("w8a8", "w4a4") for name in ("agreement", "KL")]
    return {str(row["method", "method"]): [row[place] for place in wanted] for _, row in written.texts.iterrows()}


# --- reading ----------------------------------------------------------------------------------------------------------


def test_they_are_read_and_kept_apart_from_accuracies(both: Store) -> None:
    reading = read_store(both)
    assert not reading.skipped
    assert (len(reading.results), len(reading.without_data), len(reading.finished)) == (12, 11, 23)
    assert all("top1" in result for result in reading.results)
    assert not any("top1" in result for result in reading.without_data)
    assert (reading.unfinished, [cell["status"] for cell in reading.unfinished_without_data]) == ([], ["diverged"])


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"agreement": None}, "agreement is missing"),
        ({"agreement": 101.0}, "not between 0 and 100"),
        ({"best": {"epoch": 1, "agreement": -1.0}}, "not between 0 and 100"),
        ({"kl": "low"}, "kl is 'low'"),
        ({"kl": -0.5}, "negative or not finite"),
        ({"kl": math.inf}, "negative or not finite"),
        ({"top1": 50.0}, "an accuracy, without an evaluation set"),
    ],
)
def test_a_result_that_cannot_be_is_named(alone: Store, changes: dict[str, Any], why: str) -> None:
    good = read_store(alone).without_data[0]
    assert problem_of(good, good["id"]) == ""
    assert problem_of(good | {"kl": -1e-9}, good["id"]) == "", "rounding"
    assert why in problem_of(good | changes, good["id"])


def test_neither_kind_passes_for_the_other(alone: Store, tmp_path: Path) -> None:
    scores = ("metric", "agreement", "kl", "best", "teacher")
    blind_one, seeing = read_store(alone).without_data[0], write_cell(Store(tmp_path, writable=True), chosen()[0], 400)
    assert "top1 is missing" in problem_of({key: value for key, value in seeing.items() if key != "top1"} | {"agreement": 50.0}, seeing["id"])
    swapped = {key: value for key, value in blind_one.items() if key not in scores} | {key: seeing[key] for key in ("top1", "best", "teacher")}
    assert "agreement is missing" in problem_of(swapped, blind_one["id"])
    with pytest.raises(KeyError):
        blocks([blind_one])


# --- tables -----------------------------------------------------------------------------------------------------------


def test_a_table_has_agreement_and_kl_beside_plain_rounding(alone: Store) -> None:
    found, results = table(alone), read_store(alone).without_data
    assert found.title == (
        "resnet20 without data, no accuracy: agreement with the teacher on 64 synthetic images (zeroq, seed 1000), %; protocol lineage, fp32"
    )
    assert list(lines(found)) == ["plain rounding", "acq", "gdfq", "round"], "from the lowest KL to the highest"
    said = lines(found)
    of_gdfq = pd.Series([r["agreement"] for r in results if (r["cell"]["method"], r["cell"]["bits"]) == ("gdfq", "w4a4")])
    assert said["gdfq"][2:] == [f"{of_gdfq.mean():.2f} ± {of_gdfq.std():.2f}", "0.405 ± 0.007"]
    assert said["gdfq"][1] == "0.0150 ± 0.0071"
    assert said["plain rounding"] == ["50.00", "0.750"] * 2
    assert not texts_of(found)[1].any(axis=None), "nothing is bold"
    notes = notes_of(found)
    assert notes[0] == "no accuracy is known: these cells have no evaluation set (`evaluate: none`)"
    error = max(100 * math.sqrt(r["agreement"] / 100 * (1 - r["agreement"] / 100) / 64) for r in results)
    assert any(f"is at most {error:.2f}; ±" in note for note in notes)


def test_what_diverged_is_named_and_the_worst_of_its_column(both: Store) -> None:
    found = table(both)
    assert lines(found)["acq"][2].endswith(" (1 of 2 diverged, epoch 5)")
    assert any(note.startswith("diverged: ") for note in notes_of(found))
    assert list(lines(found)) == ["plain rounding", "gdfq", "round", "acq"]


def test_a_row_of_which_nothing_finished_is_a_row(tmp_path: Path) -> None:
    store = Store(tmp_path, writable=True)
    for cell in blind():
        write_failure(store, cell) if cell.method == "acq" else write(store, cell)
    assert lines(table(store))["acq"] == ["diverged, epoch 5", "-"] * 2


def test_plain_rounding_has_a_row_for_the_rules_of_every_mark_where_they_matter(tmp_path: Path) -> None:
    store = Store(tmp_path, writable=True)
    for cell in blind():
        own = cell.protocol.for_method(cell.method, "minmax", None) if cell.method == "gdfq" else cell.protocol
        plain = {"agreement": 40.0 if cell.method == "gdfq" else 50.0, "kl": 0.9 + 0.1 * cell.seed}
        write_without_data(store, dataclasses.replace(cell, protocol=own), plain_rounding=plain if cell.method != "acq" else None)
    said = lines(table(store))
    assert said["plain rounding"] == ["50.00", "0.900-1.00"] * 2, "rounding may differ from place to place"
    assert said["plain rounding*"] == ["40.00", "0.900-1.00"] * 2
    assert any(note.startswith("* the method's own rules: ranges minmax") for note in notes_of(table(store)))
    assert "no plain rounding where the teacher's batch norms do not say enough for it" in notes_of(table(store))


def test_cells_scored_on_other_images_are_in_another_table(tmp_path: Path) -> None:
    """Settings that are the same make other images where rounding differs."""
    store = Store(tmp_path, writable=True)
    for cell in blind():
        write(store, cell, unseen_sha256=("cd" if cell.seed else "ab") * 32)
    first, second = agreements(read_store(store))
    assert first.title.endswith(" [images abababab]")
    assert second.title.endswith(" [images cdcdcdcd]")
    assert not any("±" in text for written in (first, second) for row in lines(written).values() for text in row)


def test_columns_of_size_stand_beside_them(alone: Store) -> None:
    written = table(alone, "size", "bops")
    assert names_of(written.texts)[4:8] == ["agreement", "KL", "MB", "GBOPs"]
    assert set(written.texts["w8a8", "MB"]) == {"0.271", "-"}
    assert any(note.startswith("in full precision, resnet20: ") for note in notes_of(written))


@pytest.mark.parametrize("value", [(0.5, None, "0.500"), (0.00332, 0.0001, "0.00332 ± 0.00010"), (12.34, 1.0, "12.3 ± 1.0"), (-1e-9, None, "<1e-05")])
def test_a_divergence_has_three_digits(value: tuple[float, float | None, str]) -> None:
    assert nats(value[0], value[1]) == value[2]


def test_every_format_says_in_its_heading_that_it_is_no_accuracy(both: Store) -> None:
    reading, out = read_store(both), io.StringIO()
    tables = [*side_by_side(blocks(reading.results)), *agreements(reading)]
    print_tables(tables, [], Console(file=out, width=200))
    for text in (markdown(tables), latex(tables), html(tables), out.getvalue()):
        assert text.count("without data, no accuracy: agreement with the teacher on 64 synthetic images") == 1
        assert text.lower().index("top-1 in ") < text.index("without data, no accuracy"), "after the accuracies"
        assert "plain rounding" in text


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["blocks", "wide"])
def test_the_command_prints_accuracies_as_if_they_were_not_there(both: Store, tmp_path: Path, dfqbench: Run, layout: str) -> None:
    seeing = Store(tmp_path / "r", writable=True)
    for cell in chosen():
        write_cell(seeing, cell, 400)
    for output in ("text", "markdown", "latex", "html", "csv-means"):
        words = ["--format", output] + (["--layout", layout] if output != "csv-means" else [])
        (_, with_them, _), (_, without, _) = (dfqbench("table", "--results", store.root, *words) for store in (both, seeing))
        if output == "csv-means":
            first, second = (pd.read_csv(io.StringIO(text)) for text in (with_them, without))
            kept = first[first.evaluation != "none"].dropna(axis=1, how="all")
            pd.testing.assert_frame_equal(kept, second.dropna(axis=1, how="all"), check_dtype=False)
            continue
        end = "</body></html>\n" if output == "html" else ""
        assert with_them.startswith(without.removesuffix(end).rstrip()), output
        assert with_them != without


def test_a_store_with_only_such_cells_prints_only_them(alone: Store, dfqbench: Run) -> None:
    code, out, err = dfqbench("table", "--results", alone.root)
    assert (code, err) == (0, "")
    assert out.strip().splitlines()[0].startswith("resnet20 without data, no accuracy: ")
    assert "top-1" not in out
    code, out, _ = dfqbench("table", "--results", alone.root, "--format", "csv")
    frame = pd.read_csv(io.StringIO(out))
    assert (code, frame.top1.notna().sum(), frame.agreement.notna().sum()) == (0, 0, 12)


def test_means_have_no_accuracy_and_plain_rounding_beside(both: Store) -> None:
    reading = read_store(both)
    means = means_frame(blocks(reading.results), agreements(reading))
    of = means.set_index(["evaluation", "method", "bits"]).to_dict("index")
    line = of["none", "gdfq", "w4a4"]
    assert (line["n"], line["kl"], line["plain_kl"], line["plain_agreement"]) == (2, pytest.approx(0.405), 0.75, 50.0)
    assert (of["none", "acq", "w4a4"]["n"], of["none", "acq", "w4a4"]["diverged"]) == (1, 1)
    assert means[means.evaluation == "none"][["top1", "drop", "best"]].isna().to_numpy().all()
    assert means[means.evaluation != "none"][["agreement", "kl", "plain_kl"]].isna().to_numpy().all()


# --- everything else --------------------------------------------------------------------------------------------------


def test_curves_have_their_agreement(alone: Store) -> None:
    cell = next(cell for cell in blind() if cell.method == "gdfq")
    found = read_history(alone.folder(cell.id) / "history.csv", points=2)
    assert len(found["agreement"]) == 40, "all epochs that were evaluated"
    assert dfqbench.history(cell.id, alone.root).agreement.notna().all()


def test_rows_of_results_have_no_best_epoch(alone: Store) -> None:
    frame = dfqbench.results(alone.root)
    assert set(frame.metric) == {"agreement"}
    assert frame[["top1", "best", "best_epoch", "teacher_top1", "drop"]].isna().all(axis=None)


def test_plots_leave_them_out_and_say_so(alone: Store, both: Store, tmp_path: Path, dfqbench: Run) -> None:
    assert dfqbench("plot", "--results", alone.root, "--out", tmp_path)[::2] == (
        2,
        "dfqbench: nothing to draw of 12 cells without data: there is no accuracy, `dfqbench table` shows the agreement with the teacher\n",
    )
    code, _, err = dfqbench("plot", "--results", both.root, "--out", tmp_path, "--kind", "accuracy", "--format", "svg")
    assert code == 0
    assert err == "not drawn: 11 cells without data: there is no accuracy, `dfqbench table` shows the agreement with the teacher\n"
    (block,) = prepare(read_store(both)).blocks
    assert block.evaluation == "made-up"


def ids(method: str, seed: int = 0) -> tuple[str, str]:
    """Without data, and with them."""
    return tuple(next(c.id for c in of if (c.method, str(c.bits), c.seed) == (method, "w4a4", seed)) for of in (blind(), chosen()))  # type: ignore[return-value]


def test_two_are_compared_by_their_agreement_image_by_image(alone: Store) -> None:
    pair = compare(alone, ids("gdfq")[0], ids("round")[0])
    assert pair.difference.value == pytest.approx(pair.first["agreement"] - pair.second["agreement"])
    assert pair.both + pair.neither + pair.test.only_first + pair.test.only_second == 64
    said = "\n".join(in_words(pair))
    assert f"agreement {pair.first['agreement']:.2f} % ({pair.first['correct']} of 64)" in said
    assert "points of agreement with the teacher" in said
    assert "this is no accuracy" in said
    assert "right" not in said


def test_one_with_and_one_without_data_are_not_compared(both: Store, tmp_path: Path) -> None:
    without, seeing = ids("gdfq")
    with pytest.raises(UserError, match=rf"^{without} was tested without data \(.*\) and {seeing} was tested on made-up \(400 images, .*\): only"):
        compare(both, without, seeing)
    store = only(tmp_path / "r")
    write(store, next(cell for cell in blind() if cell.id == ids("acq")[0]), unseen_sha256="cd" * 32)
    with pytest.raises(UserError, match=r"synthetic images, abababab.*synthetic images, cdcdcdcd"):
        compare(store, without, ids("acq")[0])


def test_stores_are_merged_with_the_images_that_they_were_scored_on(alone: Store, tmp_path: Path) -> None:
    images = alone.root / "unseen" / "0123456789ab.safetensors"
    images.parent.mkdir(exist_ok=True)
    images.write_bytes(b"images")
    here = Store(tmp_path / "r", writable=True)
    assert str(merge([alone.root], here.root)) == "12 new"
    assert len(read_store(here).without_data) == 12
    assert (here.root / "unseen" / images.name).read_bytes() == b"images"
    images.write_bytes(b"others")
    result = read_store(here).without_data[0]
    write_json(here.folder(result["id"]) / "result.json", result | {"kl": result["kl"] + 0.1})
    (conflict,) = merge([alone.root], here.root).conflicts
    assert "another result: kl " in conflict
    assert (here.root / "unseen" / images.name).read_bytes() == b"images", "nothing is overwritten"


def test_status_and_tracking_tell_the_agreement(alone: Store) -> None:
    result = read_store(alone).without_data[0]
    (line,) = look({result["id"]: "a cell"}, alone).lines
    assert line.about == f"agreement {result['agreement']:.2f} %"
    summary = summary_of(result)
    assert (summary["agreement"], summary["kl"]) == (result["agreement"], result["kl"])
    assert (summary["plain_agreement"], summary["plain_kl"]) == (50.0, 0.75)
    assert not {"top1", "drop", "best_on_test", "teacher_top1"} & summary.keys()


@pytest.mark.slow
def test_the_report_has_a_section_for_them(alone: Store, both: Store, tmp_path: Path) -> None:
    text = page(read_store(both), "t")
    section = text.partition('<section id="without-data">')[2].partition("</section>\n\n<section")[0]
    assert "plain rounding" in section
    assert "without data, no accuracy" in section
    assert "11 cells without data: no accuracy is known, only agreement with the teacher. 1 cell diverged." in text
    assert '"agreement":' in text
    assert "not in the tables" not in text
    text = page(read_store(alone), "t")
    assert "No cell has an accuracy." in text
    assert '"top1":' not in text.partition('id="data">')[2].partition("</script>")[0].replace('"curve":', "")
    seeing = Store(tmp_path, writable=True)
    write_cell(seeing, chosen()[0], 400)
    assert "without-data" not in page(read_store(seeing), "t")


def test_nothing_of_it_needs_results_of_the_other_kind(alone: Store) -> None:
    reading: Reading = read_store(alone)
    assert blocks([*reading.results, *reading.unfinished]) == []
    assert prepare(reading).blocks == []
