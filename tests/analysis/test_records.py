"""Reading a store: what is damaged or foreign is named, skipped and left as it is."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from synthetic_store import cells, make_store, write_cell

from dfqbench.analysis.records import problem_of, read_correct, read_history, read_store
from dfqbench.files import write_atomically, write_json
from dfqbench.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return make_store(tmp_path / "r", 6)


def snapshot(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_a_whole_store_is_read_without_a_word(store: Store) -> None:
    reading = read_store(store)
    assert len(reading.results) == 6
    assert (reading.skipped, reading.failures) == ([], [])


def test_everything_damaged_or_foreign_is_named_skipped_and_left_alone(store: Store) -> None:
    first, second, third, fourth, *whole = store.ids()
    (store.folder(first) / "result.json").write_text('{"id": "')
    changed = json.loads((store.folder(second) / "result.json").read_text())
    del changed["cell"]["teacher"]
    write_json(store.folder(second) / "result.json", changed)
    shutil.rmtree(store.folder(third))
    shutil.copytree(store.folder(whole[0]), store.folder(third))  # a folder copied under another name
    edited = json.loads((store.folder(fourth) / "result.json").read_text())
    edited["cell"]["identity"]["config"]["epochs"] = 1
    write_json(store.folder(fourth) / "result.json", edited)
    half = store.folder(whole[0]) / ".result.json.1.2.tmp"
    half.write_text("{")
    os.utime(half, (0, 0))
    (store.root / "runs" / "notes.txt").write_text("mine")
    (store.folder("holiday") / "photo.jpg").parent.mkdir()
    (store.folder("holiday") / "photo.jpg").write_text("mine")
    before = snapshot(store.root)
    reading = read_store(store)
    assert [r["id"] for r in reading.results] == whole
    said = "\n".join(reading.skipped)
    for what in (
        f"{first}/result.json: damaged",
        f"{second}/result.json: not a result of this suite: cell.teacher.label is missing",
        f"{third}/result.json: it is cell {whole[0]}'s",
        f"{fourth}/result.json: its settings do not have this id",
        ".result.json.1.2.tmp: half-written",
        "notes.txt: a file where cells have folders",
        "holiday: not a cell of this suite",
    ):
        assert what in said
    assert len(reading.skipped) == 7
    assert snapshot(store.root) == before


def test_cells_that_are_waited_for_running_or_failed_are_no_damage(store: Store) -> None:
    (store.folder("000000000001")).mkdir()
    write_json(store.folder("000000000002") / "lease.json", {"host": "h", "pid": 1})
    write_json(store.folder("000000000003") / "failed.json", {"kind": "Diverged", "message": "the loss is nan", "traceback": "", "time": 0})
    reading = read_store(store)
    assert reading.skipped == []
    assert [(f["id"], f["kind"]) for f in reading.failures] == [("000000000003", "Diverged")]


def test_numbers_that_cannot_be_are_refused(store: Store) -> None:
    good = read_store(store).results[0]
    for key, value in (("top1", float("nan")), ("top1", 101.0), ("top1", "high"), ("images", 0), ("seconds", None)):
        assert problem_of(good | {key: value}, good["id"])
    for key, value in (("bits", "wxay"), ("bits", "w2a2"), ("seed", 99)):
        assert (
            problem_of(good | {"cell": good["cell"] | {key: value}}, good["id"]) == f"its {key} {value!r} is not that of its settings: edited by hand"
        )
    assert problem_of(good, good["id"]) == ""
    assert problem_of([1], good["id"]) == "not a result of this suite"


def test_per_image_results_must_be_those_of_the_result(store: Store) -> None:
    result = read_store(store).results[0]
    path = store.folder(result["id"]) / "correct.npy"
    packed = read_correct(path, result)
    assert packed is not None
    assert int(np.unpackbits(packed).sum()) == result["correct"]
    assert read_correct(path, result | {"correct": result["correct"] + 1}) is None
    assert read_correct(path, result | {"images": 2000}) is None
    path.write_bytes(path.read_bytes()[:50])
    assert read_correct(path, result) is None
    path.unlink()
    assert read_correct(path, result) is None


def test_a_history_is_thinned_but_keeps_every_evaluation_and_the_ends(tmp_path: Path) -> None:
    lines = ["epoch,phase,loss,top1"] + [f"{e},train,{1 / e},{50 + e if e % 100 == 0 else ''}" for e in range(1, 401)]
    write_atomically(tmp_path / "history.csv", "\n".join(lines) + "\n")
    found = read_history(tmp_path / "history.csv", points=20)
    assert (found["epoch"][0], found["epoch"][-1]) == (1.0, 400.0)
    assert {100.0, 200.0, 300.0, 400.0} <= set(found["epoch"])
    assert len(found["epoch"]) <= 24
    assert found["top1"][found["epoch"].index(300.0)] == 350.0
    assert found["top1"][0] is None
    assert read_history(tmp_path / "nothing.csv") == {}


def test_a_made_up_store_is_in_the_format_that_a_run_writes(tmp_path: Path) -> None:
    """The generator's cells must look like real ones, or tests on them prove nothing."""
    reference = Path(__file__).parents[2] / "results" / "reference" / "cifar10-jpeg"
    real = read_store(Store(reference)).results[0]
    made = write_cell(Store(tmp_path), next(iter(cells(1))))

    def keys(value: object) -> object:
        return {k: keys(v) for k, v in value.items()} if isinstance(value, dict) else None

    for part in ("config", "packages"):
        real["cell"]["identity"].pop(part, None), made["cell"]["identity"].pop(part, None)
        real["provenance"].pop(part, None), made["provenance"].pop(part, None)
    real["cell"].pop("coordinates", None)  # which earlier versions wrote
    if "source" not in real["cell"]:  # the reference was measured before cells said where their method comes from
        del made["cell"]["source"]
    assert keys(made) == keys(real)
