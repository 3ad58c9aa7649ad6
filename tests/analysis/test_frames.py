"""Results and curves in Python: one row per cell with known types, nothing counted twice, everything left out is said."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from synthetic_store import cells, make_store, write_cell, write_failure

import dfqbench
from dfqbench.analysis.frames import COLUMNS, OPTIONAL, STATES
from dfqbench.errors import Notice, UserError
from dfqbench.files import write_json
from dfqbench.store import Store
from dfqbench.sweep.cell import EvaluationCard

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "results" / "reference" / "cifar10-jpeg-study"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return make_store(tmp_path / "a", 6)


def quietly(*folders: Path, **options: Any) -> pd.DataFrame:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return dfqbench.results(folders, **options)


def change(store: Store, cell_id: str, folder: Path | None = None, **changes: Any) -> None:
    path = (folder or store.folder(cell_id)) / "result.json"
    write_json(path, json.loads(path.read_text()) | changes)


def elsewhere(store: Store, cell_id: str) -> dict[str, Any]:
    """The provenance of a cell measured on another device."""
    return json.loads((store.folder(cell_id) / "result.json").read_text())["provenance"] | {"device_name": "another GPU"}  # type: ignore[no-any-return]


# --- columns ----------------------------------------------------------------------------------------------------------


def test_every_column_has_its_type_whatever_is_in_the_store(store: Store, tmp_path: Path) -> None:
    empty, failed = tmp_path / "empty", tmp_path / "failed"
    (empty / "runs").mkdir(parents=True)
    write_failure(Store(failed, writable=True), next(cells(1)), "OSError")
    for folders in ([store.root], [empty], [failed], [store.root, empty, failed], [REFERENCE]):
        frame = quietly(*folders)
        assert {name: str(kind) for name, kind in frame.dtypes.items()} == {n: kind for n, kind in COLUMNS.items() if n not in OPTIONAL}
    assert quietly(empty).empty


def test_the_columns_are_those_of_the_guide() -> None:
    text = (ROOT / "results" / "README.md").read_text()
    table = re.search(r"^## From Python\n(.*?)^## ", text, re.DOTALL | re.MULTILINE)
    assert table
    documented = {}
    for line in table[1].splitlines():
        if line.startswith("| `"):
            names, kind, _ = (part.strip() for part in line.strip("|").split(" | ", 2))
            documented |= dict.fromkeys(re.findall(r"`(\w+)`", names), kind.replace(", ordered", ""))
    assert documented == COLUMNS
    assert list(documented) == list(COLUMNS)


def test_a_row_says_what_the_store_says(store: Store) -> None:
    frame = quietly(store.root).set_index("id")
    for cell_id in store.ids():
        result = json.loads((store.folder(cell_id) / "result.json").read_text())
        row = frame.loc[cell_id]
        assert (row.top1, row.best, row.best_epoch) == (result["top1"], result["best"]["top1"], result["best"]["epoch"])
        assert row["drop"] == pytest.approx(92.0 - result["top1"])
        assert row.seconds == result["seconds"]["own"] + result["seconds"]["shared"]
        assert (row.bits, row.weight_bits, row.activation_bits, row.seed) == ("w8a8", 8, 8, result["cell"]["seed"]) or row.bits == "w6a6"
        assert json.loads(row.settings) == result["cell"]["identity"]["config"]
        assert row.finished == pd.Timestamp(1.7e9, unit="s", tz="UTC")
        assert (row.status, row.replicate, row.replicates, row.store) == ("done", 0, 0, str(store.root))


def test_a_configuration_is_what_may_be_averaged_over_seeds(store: Store) -> None:
    other = next(c for c in cells(100) if c.changed)
    write_cell(store, other)
    frame = quietly(store.root)
    assert frame.groupby("configuration").method.nunique().tolist() == [1, 1]
    assert frame[frame.configuration == frame[frame.id == other.id].configuration.item()].id.tolist() == [other.id]


def test_bits_are_in_the_order_of_their_widths(tmp_path: Path) -> None:
    frame = quietly(make_store(tmp_path, 25).root)
    assert frame.bits.cat.categories.tolist() == ["w3a3", "w4a4", "w5a5", "w6a6", "w8a8"]
    assert frame.bits.max() == "w8a8"


def test_size_and_work_are_there_for_results_that_have_them(store: Store) -> None:
    first, second, third, *others = store.ids()
    teacher = {"bytes": 1000, "weight_bits": 32.0, "macs": 10, "bops": 10240}
    change(store, first, size={"teacher": teacher, "student": {"bytes": 130, "weight_bits": 4.02, "macs": 10, "bops": 160}})
    change(store, second, size={"teacher": teacher})
    change(store, third, size={"teacher": teacher, "student": teacher | {"bytes": "few"}})
    frame = quietly(store.root).set_index("id")
    row = frame.loc[first]
    assert (row.bytes, row.teacher_bytes, row.compression, row.mean_weight_bits) == (130, 1000, 7.6923, 4.02)
    assert (row.macs, row.bops, row.teacher_bops) == (10, 160, 10240)
    assert frame.loc[[second, third, *others], ["bytes", "compression", "bops"]].isna().all(axis=None)


def test_csv_and_frame_agree(store: Store, dfqbench: Any, tmp_path: Path) -> None:
    _, out, _ = dfqbench("table", "--results", store.root, "--format", "csv")
    (tmp_path / "t.csv").write_text(out)
    printed, frame = pd.read_csv(tmp_path / "t.csv").set_index("id"), quietly(store.root).set_index("id")
    for name in ("top1", "best", "drop", "seconds", "steps", "batch", "method", "bits", "teacher_top1"):
        assert printed[name].to_dict() == frame[name].to_dict(), name


# --- what ended without a number --------------------------------------------------------------------------------------


def test_cells_that_failed_are_rows_without_numbers(store: Store) -> None:
    diverged, failed = (cell for cell in cells(8) if cell.id not in store.ids())
    write_failure(store, diverged, steps=500)
    write_failure(store, failed, "OSError")
    frame = quietly(store.root).set_index("id")
    assert frame.status.value_counts().to_dict() == {"done": 6, "diverged": 1, "failed": 1}
    assert frame.status.cat.categories.tolist() == list(STATES)
    row = frame.loc[diverged.id]
    assert (row.method, row.bits, row.seed, row.steps) == (diverged.label, str(diverged.bits), diverged.seed, 500)
    assert (row.error, frame.loc[failed.id].error) == ("Diverged: diverged: the loss is nan in epoch 5", "OSError: out of luck")
    assert (
        frame.loc[[diverged.id, failed.id], ["top1", "top5", "best", "best_epoch", "drop", "last_epoch", "seconds", "device"]].isna().all(axis=None)
    )
    assert frame.top1.mean() == frame[frame.status == "done"].top1.mean()
    assert frame.loc[diverged.id].configuration in set(frame[frame.status == "done"].configuration)


def test_failures_that_tables_do_not_show_are_left_out_and_said(store: Store) -> None:
    first, second = (cell for cell in cells(8) if cell.id not in store.ids())
    write_failure(store, first)
    (store.folder(first.id) / "cell.json").write_text("{")
    write_failure(store, replace(second, method_version=0))  # an older version of what is done
    write_cell(store, second)
    with pytest.warns(Notice, match="2 failed cells left out: a newer try of the same experiment counts, or cell.json cannot be read") as said:
        frame = dfqbench.results(store.root)
    assert len(said) == 1
    assert set(frame.status) == {"done"}


def test_a_cell_that_failed_in_one_store_and_is_done_in_another_is_done(store: Store, tmp_path: Path) -> None:
    other = Store(tmp_path / "b", writable=True)
    write_failure(other, next(cells(1)))
    for folders in ((store.root, other.root), (other.root, store.root)):
        frame = quietly(*folders)
        assert len(frame) == 6
        assert set(frame.status) == {"done"}
    third = Store(tmp_path / "c", writable=True)
    write_failure(third, next(cells(1)), "OSError")
    assert quietly(other.root, third.root).error.tolist() == ["Diverged: diverged: the loss is nan in epoch 5"], "the first store's"


def test_cells_without_an_evaluation_set_are_rows_without_an_accuracy(store: Store) -> None:
    first, second = (replace(cell, evaluation=EvaluationCard("none", "none 0123456789ab", 10, 20)) for cell in cells(2))
    write_cell(store, first)
    path = store.folder(first.id) / "result.json"
    result = {key: value for key, value in json.loads(path.read_text()).items() if key not in ("top1", "top5")}
    scores = {"metric": "agreement", "agreement": 75.0, "kl": 0.25, "plain_rounding": {"agreement": 50.0, "kl": 0.5}}
    write_json(path, result | scores | {"best": {"epoch": 40, "agreement": 75.0}, "teacher": {"metric": "agreement"}})
    write_failure(store, second)
    frame = quietly(store.root).set_index("id")
    assert frame.metric.value_counts().to_dict() == {"top1": 6, "agreement": 2}
    row = frame.loc[first.id]
    assert (row.agreement, row.kl, row.plain_agreement, row.plain_kl) == (75.0, 0.25, 50.0, 0.5)
    assert frame.loc[[first.id, second.id], ["top1", "best", "drop", "teacher_top1"]].isna().all(axis=None)
    assert frame.loc[second.id].status == "diverged"
    assert frame[frame.metric == "top1"].agreement.isna().all()


# --- several stores ---------------------------------------------------------------------------------------------------


def test_a_cell_in_several_stores_is_counted_once(store: Store, tmp_path: Path) -> None:
    other = make_store(tmp_path / "b", 8)
    assert quietly(store.root, store.root).id.tolist() == quietly(store.root).id.tolist()
    frame = quietly(store.root, other.root)
    assert sorted(frame.id) == other.ids()
    assert frame.store.value_counts().to_dict() == {str(store.root): 6, str(other.root): 2}
    assert frame.replicates.sum() == 0
    assert len(quietly(store.root, other.root, replicates=True)) == 8, "a copy is no replicate"


def test_the_same_cell_from_another_device_is_a_replicate_on_request(store: Store, tmp_path: Path) -> None:
    other = make_store(tmp_path / "b", 6)
    cell_id = store.ids()[0]
    change(other, cell_id, top1=12.5, provenance=elsewhere(store, cell_id))
    frame = quietly(store.root, other.root)
    assert len(frame) == 6
    assert frame.set_index("id").replicates.to_dict() == dict.fromkeys(store.ids(), 0) | {cell_id: 1}
    assert 12.5 not in frame.top1.tolist()
    both = quietly(store.root, other.root, replicates=True)
    assert len(both) == 7
    assert both[both.id == cell_id][["replicate", "store", "device"]].to_numpy().tolist() == [
        [0, str(store.root), "a GPU"],
        [1, str(other.root), "another GPU"],
    ]


def test_merged_replicates_are_told_as_those_of_several_stores(store: Store, tmp_path: Path, dfqbench: Any) -> None:
    other = make_store(tmp_path / "b", 6)
    cell_id = store.ids()[0]
    change(other, cell_id, top1=12.5, provenance=elsewhere(store, cell_id))
    code, _, _ = dfqbench("merge", other.root, "--results", store.root)
    assert code == 0
    frame = quietly(store.root)
    assert frame.set_index("id").replicates[cell_id] == 1
    assert quietly(store.root, other.root).replicates.sum() == 1, "the other store's is the one that was merged"
    assert quietly(store.root, replicates=True).top1.tolist().count(12.5) == 1


@pytest.mark.parametrize("what", ["top1", "correct.npy"])
def test_results_that_contradict_each_other_are_said(store: Store, tmp_path: Path, what: str) -> None:
    other = make_store(tmp_path / "b", 6)
    cell_id = store.ids()[0]
    if what == "top1":
        change(other, cell_id, top1=12.5)
    else:
        path = other.folder(cell_id) / "correct.npy"
        path.write_bytes(path.read_bytes()[:-125] + path.read_bytes()[-125:][::-1])
    with pytest.warns(Notice, match=rf"b/runs/{cell_id}.*another {what}"):
        frame = dfqbench.results([store.root, other.root], replicates=True)
    assert set(frame.store) == {str(store.root)}
    assert len(frame) == 6


# --- errors -----------------------------------------------------------------------------------------------------------


def test_damaged_files_are_left_out_and_said(store: Store) -> None:
    first = store.ids()[0]
    (store.folder(first) / "result.json").write_text("{")
    with pytest.warns(Notice, match=f"{first}/result.json: damaged") as said:
        frame = dfqbench.results(store.root)
    assert len(said) == 1
    assert sorted(frame.id) == store.ids()[1:]


def test_a_folder_that_is_no_store_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such folder"):
        dfqbench.results(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no results folder \(it has no runs/\)"):
        dfqbench.results([tmp_path])
    with pytest.raises(UserError, match="there is no such folder"):
        dfqbench.history("0000", tmp_path / "nowhere")


# --- curves -----------------------------------------------------------------------------------------------------------


def test_curves_of_a_cell_by_id_prefix_or_folder(store: Store) -> None:
    cell_id = store.ids()[0]
    curves = dfqbench.history(cell_id, store.root)
    assert curves.epoch.tolist() == list(range(1, 41))
    assert {name: str(kind) for name, kind in curves.dtypes.items()} == {
        "epoch": "Int64", "phase": "string", "loss": "Float64", "student_lr": "Float64", "top1": "Float64",
    }  # fmt: skip
    assert curves.top1.iloc[-1] == quietly(store.root).set_index("id").top1[cell_id]
    for given in (cell_id[:6], store.folder(cell_id), str(store.folder(cell_id))):
        pd.testing.assert_frame_equal(dfqbench.history(given, store.root), curves)
    pd.testing.assert_frame_equal(dfqbench.history(store.folder(cell_id)), curves)


def test_epochs_that_were_not_evaluated_have_no_accuracy_and_no_training_has_no_epochs() -> None:
    frame = quietly(REFERENCE)
    trained = dfqbench.history(frame[frame.method == "gdfq"].id.iloc[0], REFERENCE)
    assert trained.top1.isna().sum() == len(trained) - 1
    rounded = dfqbench.history(frame[frame.method == "round"].id.iloc[0], REFERENCE)
    assert (len(rounded), list(rounded.columns)) == (0, ["epoch", "phase"])


def test_a_cell_without_whole_curves_is_one_line(store: Store, tmp_path: Path) -> None:
    first, second, third, fourth, *_ = store.ids()
    path = store.folder(first) / "history.csv"
    lines = path.read_text().splitlines(keepends=True)
    for damaged in ("".join(lines[:20]), "".join(lines)[:-30], "", "\0\xff", "".join(lines[:5] + lines[6:])):
        path.write_text(damaged)
        with pytest.raises(UserError, match=r"history.csv: missing or damaged: it does not have the 40 epochs"):
            dfqbench.history(first, store.root)
    path.write_bytes(b"epoch,\xff\n")
    with pytest.raises(UserError, match="damaged"):
        dfqbench.history(first, store.root)
    path.unlink()
    with pytest.raises(UserError, match="missing or damaged"):
        dfqbench.history(first, store.root)
    (store.folder(second) / "result.json").unlink()
    with pytest.raises(UserError, match="not a finished cell"):
        dfqbench.history(second, store.root)
    (store.folder(third) / "result.json").write_text("[1]")
    with pytest.raises(UserError, match="damaged"):
        dfqbench.history(third, store.root)
    with pytest.raises(UserError, match=r"no cell in .* has such an id"):
        dfqbench.history("zzz", store.root)
    with pytest.raises(UserError, match="6 cells have such an id"):
        dfqbench.history("", store.root)
    with pytest.raises(UserError, match="there is no such folder"):
        dfqbench.history(tmp_path / "nowhere")
    shutil.rmtree(store.folder(fourth))
    with pytest.raises(UserError, match="there is no such folder"):
        dfqbench.history(store.folder(fourth))


# --- what it costs ----------------------------------------------------------------------------------------------------


def test_neither_needs_torch(store: Store) -> None:
    code = (
        "import sys, dfqbench\n"
        f"assert len(dfqbench.results({str(store.root)!r})) == 6\n"
        f"assert len(dfqbench.history({store.ids()[0]!r}, results={str(store.root)!r})) == 40\n"
        "assert 'torch' not in sys.modules and 'matplotlib' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
