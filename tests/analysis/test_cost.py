"""What cells cost: by which clock, and that no figure is a mean over several places."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from synthetic_store import cells, write_cell
from test_blocks import result, shown
from test_report import embedded

from dfqbench.analysis.cost import cost_of
from dfqbench.analysis.plots.figures import prepare
from dfqbench.analysis.plots.kinds import draw
from dfqbench.analysis.records import read_store
from dfqbench.analysis.report.report import page
from dfqbench.analysis.tables.blocks import blocks
from dfqbench.analysis.tables.cells import load_frame
from dfqbench.analysis.tables.means import means_frame
from dfqbench.analysis.tables.printed import names_of, notes_of, texts_of
from dfqbench.store import Store

CPU = {"device_name": "a CPU", "device": "cpu", "host": "one", "threads": 1}
GPU = {"device_name": "a GPU", "device": "cuda", "host": "one", "threads": 4}
TIMED = {"cpu_seconds": {"own": 5.0, "shared": 7.0}}  # beside 30 seconds by the clock on the wall


def heading(*results: dict[str, Any]) -> str:
    (block,) = blocks(list(results))
    return names_of(texts_of(block)[0])[-1]


def test_a_second_is_of_what_was_measured() -> None:
    assert str(cost_of([result(**TIMED)])) == "12"
    assert str(cost_of([result(**TIMED), result(seed=1)])) == "30", "one of them does not know its processor time"
    assert str(cost_of([result(provenance=GPU, **TIMED)])) == "30", "a GPU's seconds are not those of the process that feeds it"
    assert str(cost_of([result(cpu_seconds={"own": float("nan"), "shared": 1.0})])) == "30"
    for changes, name in (
        (TIMED, "CPU-s/cell"),
        ({}, "wall s/cell"),
        ({"provenance": GPU}, "GPU-s/cell"),
        ({"provenance": {"device_name": "?", "device": "mps"}}, "wall s/cell"),
    ):
        assert heading(result(**changes)) == name
    assert load_frame([result(**TIMED), result()]).loc[:, ["seconds", "cpu_seconds"]].fillna(-1).to_numpy().tolist() == [[30.0, 12.0], [30.0, -1.0]]


def test_rows_by_several_clocks_say_theirs_one_by_one() -> None:
    (block,) = blocks([result(**TIMED), result("round"), result("acq", provenance=GPU)])
    assert [shown(block, name, "s/cell") for name in ("gdfq", "round", "acq")] == ["12 CPU", "30 wall", "30 GPU"]
    (note,) = (note for note in notes_of(block) if "per cell" in note)
    assert note.startswith("GPU-seconds or CPU-seconds or wall seconds per cell, images included, on a CPU, a GPU; wall seconds grow with")


def test_that_the_choice_of_widths_is_not_in_the_seconds_is_said() -> None:
    said = "seconds do not count the choice of a width for each layer: it is made once, and cells share it"
    plain, chosen = (blocks([result(**more)])[0] for more in (TIMED, {**TIMED, "allocation": {"seconds": 400.0, "allocator": "dnq"}}))
    assert (said in notes_of(plain), said in notes_of(chosen)) == (False, True)


@pytest.mark.parametrize("elsewhere", [{"host": "two"}, {"device_name": "another CPU"}, {"threads": 2}])
def test_hosts_and_devices_are_never_averaged(elsewhere: dict[str, Any]) -> None:
    here = [result(seed=seed, provenance=CPU, seconds={"own": own, "shared": 0.0}) for seed, own in ((0, 100.0), (1, 120.0))]
    there = result(seed=2, provenance=CPU | elsewhere, seconds={"own": 400.0, "shared": 0.0})
    (block,) = blocks([*here, there])
    assert shown(block, "gdfq", "wall s/cell") == "110-400"
    assert any(note.startswith("seconds a-b: means of several hosts or devices") for note in notes_of(block))
    (line,) = means_frame([block]).to_dict("records")
    assert (line["seconds_low"], line["seconds_high"], line["seconds_of"]) == (110.0, 400.0, "wall")
    (block,) = blocks(here)
    assert shown(block, "gdfq", "wall s/cell") == "110"
    assert not any(note.startswith("seconds a-b") for note in notes_of(block))


def test_a_gpus_seconds_and_a_cpus_have_no_common_figure() -> None:
    (block,) = blocks([result(provenance=CPU), result(seed=1, provenance=GPU), result("round", provenance=CPU)])
    assert shown(block, "gdfq", "wall s/cell") == "-"
    assert "- seconds: the row's cells ran on GPUs and on CPUs" in notes_of(block)
    assert pd.read_csv(io.StringIO(means_frame([block]).to_csv())).seconds_low.isna().tolist() == [True, False]


def stored(root: Path, elsewhere: dict[str, Any]) -> Store:
    """GDFQ and rounding at four and three bits with seeds 0 and 1; seed 1 of GDFQ elsewhere."""
    store = Store(root)
    for cell in cells(250):
        if cell.method in ("gdfq", "round") and cell.bits.weights < 5 and cell.seed < 2:
            on = {"git": "0" * 40, "packages": {}} | CPU | (elsewhere if cell.method == "gdfq" and cell.seed else {})
            write_cell(store, cell, 300, provenance=on, cpu_seconds={"own": 20.0 + 30 * cell.seed, "shared": 1.0})
    return store


@pytest.mark.parametrize(("elsewhere", "ends", "fronts"), [({}, 1, 1), ({"host": "two"}, 2, 1), ({"device_name": "another CPU"}, 2, 0)])
def test_the_plot_of_costs_names_its_clock_and_draws_a_front_over_one_device_only(
    tmp_path: Path, elsewhere: dict[str, Any], ends: int, fronts: int
) -> None:
    (figure,) = draw("cost", prepare(read_store(stored(tmp_path, elsewhere))))
    four, three = figure.axes
    said = [text.get_text() for text in figure.texts]
    assert [text.partition(":")[0] for text in said if "resnet20" in text] == ["W4A4", "W3A3"]
    assert said.count("CPU-seconds per cell") == 2
    assert any("no front where seconds are of several devices" in text.replace("\n", " ") for text in said) == (not fronts)
    for ax in (four, three):
        drawn = [list(line.get_xdata()) for line in ax.lines if line.get_marker() not in ("None", "o")]  # type: ignore[arg-type]
        assert [21.0, 51.0] in drawn if ends == 2 else [36.0] in drawn
        assert sum(line.get_drawstyle() == "steps-post" for line in ax.lines) == fronts


def test_the_report_says_of_every_cell_by_which_clock(tmp_path: Path) -> None:
    store = stored(tmp_path, GPU)
    said = {(cell["method"], cell["seed"]): (cell["seconds"], cell["own"], cell["clock"]) for cell in embedded(page(read_store(store), "t"))["cells"]}
    assert said["gdfq", 0] == (21.0, 20.0, "CPU")
    assert said["gdfq", 1] == (310.0, 110.0, "GPU")
