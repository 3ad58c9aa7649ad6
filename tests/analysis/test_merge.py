"""Merging: nothing is lost, nothing is overwritten, and a conflict is called one."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest
from synthetic_store import cells, make_store, write_cell

from dfqbench.analysis import merge as merging
from dfqbench.analysis.merge import merge, setup_of
from dfqbench.analysis.records import read_store
from dfqbench.errors import UserError
from dfqbench.files import write_json
from dfqbench.store import Store


def snapshot(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def change(store: Store, cell_id: str, **changes: Any) -> None:
    path = store.folder(cell_id) / "result.json"
    result = json.loads(path.read_text())
    for key, value in changes.items():
        first, _, rest = key.partition("__")
        if rest:
            result[first][rest] = value
        else:
            result[first] = value
    write_json(path, result)


@pytest.fixture
def one(tmp_path: Path) -> Store:
    return make_store(tmp_path / "one", 4)


def test_stores_are_united_file_by_file(one: Store, tmp_path: Path) -> None:
    two = Store(tmp_path / "two")
    for cell in list(cells(7))[2:]:
        write_cell(two, cell)
    write_json(two.root / "teachers" / "aa.json", {"top1": 92.0, "correct": 920})
    done = merge([one.root, two.root], tmp_path / "all")
    assert (done.copied, done.duplicates, done.conflicts, done.skipped) == (7, 2, [], [])
    assert snapshot(tmp_path / "all") == snapshot(two.root) | snapshot(one.root)
    again = merge([one.root, two.root], tmp_path / "all")
    assert (again.copied, again.duplicates) == (0, 9)


def test_the_same_cell_from_another_device_or_version_is_a_replicate(one: Store, tmp_path: Path) -> None:
    merge([one.root], tmp_path / "all")
    before = snapshot(tmp_path / "all")
    cell_id = one.ids()[0]
    change(one, cell_id, provenance__device_name="another GPU", student_state="0f")
    assert merge([one.root], tmp_path / "all").replicates == 1
    assert merge([one.root], tmp_path / "all").replicates == 0, "the second time it is known"
    after = snapshot(tmp_path / "all")
    assert {k: after[k] for k in before} == before
    replicates = read_store(Store(tmp_path / "all")).replicates
    assert [r["provenance"]["device_name"] for r in replicates[cell_id]] == ["another GPU"]
    # a store with replicates hands them on
    assert merge([tmp_path / "all"], tmp_path / "third").replicates == 1


@pytest.mark.parametrize("changes", [{"student_state": "0f"}, {"top1": 12.5}, {"best": {"epoch": 3, "top1": 80.0}}])
def test_another_result_from_the_same_device_and_versions_is_a_conflict(one: Store, tmp_path: Path, changes: dict[str, Any]) -> None:
    merge([one.root], tmp_path / "all")
    before = snapshot(tmp_path / "all")
    cell_id = one.ids()[0]
    change(one, cell_id, **changes)
    done = merge([one.root], tmp_path / "all")
    assert len(done.conflicts) == 1
    assert cell_id in done.conflicts[0]
    assert next(iter(changes)) in done.conflicts[0]
    assert snapshot(tmp_path / "all") == before


def test_other_seconds_or_another_day_are_no_conflict(one: Store, tmp_path: Path) -> None:
    merge([one.root], tmp_path / "all")
    change(one, one.ids()[0], finished=1.0, seconds={"own": 1.0, "shared": 0.0, "bundle": []}, provenance__host="ffffffff", provenance__slurm_job="7")
    assert merge([one.root], tmp_path / "all").duplicates == 4


def test_an_unfinished_try_is_set_aside_and_a_running_one_is_left(one: Store, tmp_path: Path) -> None:
    mine = Store(tmp_path / "mine")
    failed, running = one.ids()[:2]
    write_json(mine.folder(failed) / "failed.json", {"kind": "Diverged", "message": "nan", "traceback": "", "time": 0})
    (mine.folder(failed) / "log.txt").write_text("my log\n")
    write_json(mine.folder(running) / "cell.json", {})
    write_json(mine.folder(running) / "lease.json", {"host": "elsewhere", "pid": 1, "started": ""})
    done = merge([one.root], mine.root)
    assert (done.copied, done.set_aside) == (3, 1)
    assert (mine.root / "set-aside" / f"{failed}-1" / "log.txt").read_text() == "my log\n"
    assert len(done.skipped) == 1
    assert "is running this cell" in done.skipped[0]
    assert mine.result(running) is None


def test_failures_come_along_where_nothing_is_known(tmp_path: Path) -> None:
    theirs = make_store(tmp_path / "theirs", 1)
    write_json(theirs.folder("000000000001") / "failed.json", {"kind": "Diverged", "message": "nan", "traceback": "", "time": 0})
    assert merge([theirs.root], tmp_path / "mine").failed == 1
    assert merge([theirs.root], tmp_path / "mine").failed == 0
    assert [f["id"] for f in read_store(Store(tmp_path / "mine")).failures] == ["000000000001"]


def test_damaged_cells_are_named_and_neither_copied_nor_replaced(one: Store, tmp_path: Path) -> None:
    merge([one.root], tmp_path / "all")
    there, here = one.ids()[:2]
    (one.folder(there) / "result.json").write_text("{")
    damaged = tmp_path / "all" / "runs" / here / "result.json"
    damaged.write_text("{")
    done = merge([one.root], tmp_path / "all")
    assert len(done.skipped) == 2
    assert damaged.read_text() == "{"


def test_a_copy_that_fails_leaves_nothing_half_and_is_one_line(one: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, copied = merging.shutil.copytree, []

    def filling(source: Path, target: Path, **options: Any) -> None:
        real(source, target, **options)
        copied.append(target)
        if len(copied) == 3:
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(merging.shutil, "copytree", filling)
        with pytest.raises(UserError, match="No space left on device; what was copied so far is whole"):
            merge([one.root], tmp_path / "all")
    assert len(list((tmp_path / "all" / "runs").iterdir())) == 2
    assert merge([one.root], tmp_path / "all").copied == 2
    assert snapshot(tmp_path / "all") == snapshot(one.root)


def test_what_is_no_store_is_told_before_anything_is_written(one: Store, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for others in ([one.root, tmp_path / "empty"], [one.root, tmp_path / "nowhere"], [one.root, tmp_path / "all"]):
        with pytest.raises(UserError):
            merge(others, tmp_path / "all")
        assert not (tmp_path / "all").exists()
    with pytest.raises(UserError, match="into itself"):
        merge([one.root], one.root)


def test_a_teacher_that_measured_differently_is_a_conflict(one: Store, tmp_path: Path) -> None:
    merge([one.root], tmp_path / "all")
    write_json(tmp_path / "all" / "teachers" / "aa.json", {"top1": 92.0, "correct": 920})
    write_json(one.root / "teachers" / "aa.json", {"top1": 91.0, "correct": 910})
    (conflict,) = merge([one.root], tmp_path / "all").conflicts
    assert "92.0 here, 91.0 there" in conflict


def test_a_setup_is_device_and_versions_and_nothing_else(one: Store) -> None:
    result = read_store(one).results[0]
    other = json.loads(json.dumps(result))
    other["provenance"] |= {"host": socket.gethostname(), "cores": os.cpu_count()}
    assert setup_of(other) == setup_of(result)
    other["provenance"]["packages"]["torch"] = "9"
    assert setup_of(other) != setup_of(result)
