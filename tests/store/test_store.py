"""The store: files that are whole or absent, claims that end with their process, and nothing lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dfqbench.errors import UserError
from dfqbench.files import kept_once, read_json, write_atomically, write_json
from dfqbench.store import LEASE_EXPIRES_S, Lease, Store
from dfqbench.store import lease as lease_module


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_json(tmp_path / "a.json", {"old": 1})

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_json(tmp_path / "a.json", {"new": 2})
    assert read_json(tmp_path / "a.json") == {"old": 1}
    assert os.listdir(tmp_path) == ["a.json"]


def test_readers_see_old_or_new_but_never_half(tmp_path: Path) -> None:
    path = tmp_path / "big.json"
    write_json(path, {"n": 0, "filling": "x" * 200_000})
    writer = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, pathlib\nfrom dfqbench.files import write_json\n"
            "for n in range(200): write_json(pathlib.Path(sys.argv[1]), {'n': n, 'filling': 'x' * 200_000})",
            str(path),
        ]
    )
    seen = set()
    while writer.poll() is None:
        found = json.loads(path.read_text())
        assert len(found["filling"]) == 200_000
        seen.add(found["n"])
    assert writer.returncode == 0
    assert len(seen) > 1


def test_of_several_that_write_at_once_the_first_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "shared" / "made.json"
    code = (
        "import pathlib, sys\nfrom dfqbench.files import kept_once\nwith kept_once(pathlib.Path(sys.argv[1])) as mine:\n"
        "    mine.write_text(sys.argv[2]); print(flush=True); sys.stdin.readline()"
    )
    words = [sys.executable, "-c", code, str(path)]
    writers = [subprocess.Popen([*words, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for name in ("one", "two")]
    for writer in writers:
        writer.stdout.readline()  # type: ignore[union-attr]
    assert not path.exists()
    assert len(os.listdir(path.parent)) == 2, "all have written, each under its own name"
    for writer in reversed(writers):
        assert (writer.communicate("go\n"), writer.returncode) == (("", None), 0)
        assert path.read_text() == "two"
    monkeypatch.setattr(os, "link", lambda *names: os.open("/proc/links", os.O_CREAT))  # a file system without links
    with kept_once(path) as mine:
        mine.write_text("three")
    assert path.read_text() == "three"
    assert os.listdir(path.parent) == ["made.json"]


def test_damaged_and_foreign_results_are_named_and_left_alone(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for cell_id, content in {"aa": '{"id": "aa", ', "bb": '{"other": 1}', "cc": "[1]", "dd": '{"id": "dd", "top1": 1.0, "cell": {}}'}.items():
        write_atomically(store.folder(cell_id) / "result.json", content)
    (store.folder("ee")).mkdir()
    found, damaged = store.results()
    assert [r["id"] for r in found] == ["dd"]
    assert len(damaged) == 3
    assert all((store.folder(c) / "result.json").exists() for c in ("aa", "bb", "cc"))
    assert all(any(f"/{c}/" in line for line in damaged) for c in ("aa", "bb", "cc"))


def test_a_lease_is_exclusive_while_its_process_lives(tmp_path: Path) -> None:
    lease = Lease(tmp_path / "lease.json")
    assert lease.acquire()
    assert not Lease(tmp_path / "lease.json").acquire()
    holder = Lease(tmp_path / "lease.json").holder()
    assert holder is not None
    assert holder["pid"] == os.getpid()
    lease.release()
    assert Lease(tmp_path / "lease.json").acquire()


def test_a_lease_of_a_dead_process_on_this_host_is_taken_over_at_once(tmp_path: Path) -> None:
    code = "import sys, pathlib\nfrom dfqbench.store import Lease\nassert Lease(pathlib.Path(sys.argv[1])).acquire()"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "lease.json")], check=True)
    assert (tmp_path / "lease.json").exists()
    assert Lease(tmp_path / "lease.json").acquire()


def test_a_lease_of_another_host_lasts_until_its_heartbeat_stops(tmp_path: Path) -> None:
    path = tmp_path / "lease.json"
    path.write_text(json.dumps({"host": "elsewhere", "pid": 1, "started": "5"}))
    assert not Lease(path).acquire()
    old = time.time() - LEASE_EXPIRES_S - 1
    os.utime(path, (old, old))
    assert Lease(path).acquire()


def test_a_reused_process_number_does_not_keep_a_lease(tmp_path: Path) -> None:
    import socket

    path = tmp_path / "lease.json"
    path.write_text(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "started": "an earlier process"}))
    assert Lease(path).holder() is None


def test_claims_are_kept_alive_and_released(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "HEARTBEAT_S", 0.01)
    store = Store(tmp_path, writable=True)
    with store.leases(["aa", "bb"]) as held:
        assert held == ["aa", "bb"]
        with Store(tmp_path).leases(["bb", "cc"]) as others:
            assert others == ["cc"]
        path = store.lease("aa").path
        os.utime(path, (0, 0))
        deadline = time.monotonic() + 10
        while path.stat().st_mtime == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert path.stat().st_mtime > 0
    assert not store.lease("aa").path.exists()


def test_history_has_every_column_of_every_row(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write_history("aa", [{"epoch": 1, "ce": 2.0}, {"epoch": 2, "loss": 1.5, "top1": 50.0}])
    assert (store.folder("aa") / "history.csv").read_text() == "epoch,ce,loss,top1\n1,2.0,,\n2,,1.5,50.0\n"


def test_a_results_folder_that_is_a_file_or_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        Store(tmp_path / "file")
    with pytest.raises(UserError, match="cannot be written"):
        Store("/proc/results", writable=True)


def test_a_claim_whose_machine_has_a_slow_clock_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine's clock runs minutes ahead of the file server's: the heartbeat looks old, and is not."""
    path = tmp_path / "lease.json"
    path.write_text(json.dumps({"host": "elsewhere", "pid": 1, "started": "5"}))
    now = time.time() + 10 * LEASE_EXPIRES_S
    monkeypatch.setattr(lease_module.time, "time", lambda: now)
    assert not Lease(path).acquire()
    assert json.loads(path.read_text())["host"] == "elsewhere"


def test_two_that_find_a_stale_claim_do_not_both_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one takes over between our judgement and our taking: its new claim stays."""
    path = tmp_path / "lease.json"
    path.write_text(json.dumps({"host": "elsewhere", "pid": 1, "started": "5"}))
    os.utime(path, (0, 0))
    fresh = json.dumps({"host": "another", "pid": 2, "started": "6"})
    honest = Lease._file_system_time

    def meanwhile(lease: Lease) -> float:
        path.write_text(fresh)
        return honest(lease)

    with monkeypatch.context() as patched:
        patched.setattr(Lease, "_file_system_time", meanwhile)
        assert not Lease(path).acquire()
    assert path.read_text() == fresh
    assert [p.name for p in tmp_path.iterdir()] == ["lease.json"]


def test_a_claim_that_was_taken_over_is_not_released_by_its_old_holder(tmp_path: Path) -> None:
    path = tmp_path / "lease.json"
    lease = Lease(path)
    assert lease.acquire()
    path.write_text(json.dumps({"host": "another", "pid": 2, "started": "6"}))
    lease.release()
    assert path.exists()


def test_a_claim_names_its_slurm_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    assert Lease(tmp_path / "a.json").acquire()
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "11")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert Lease(tmp_path / "b.json").acquire()
    assert [json.loads((tmp_path / f"{name}.json").read_text())["job"] for name in "ab"] == ["12", "11_3"]
