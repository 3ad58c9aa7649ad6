"""W&B: what is in its files is what is in the store, once; and whatever it does, no cell is slower or fails."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError
from synthetic_store import cells, make_store, write_cell
from wandb_file import contents, runs

from dfqbench.analysis.records import read_store
from dfqbench.analysis.warning_signs import read_rows
from dfqbench.files import write_json
from dfqbench.store import Store
from dfqbench.store.cache import cache_folder
from dfqbench.sweep.load import load_sweep
from dfqbench.sweep.schema import Tracking, tracking_of
from dfqbench.tracking import process as tracking_process
from dfqbench.tracking.process import WandbObserver
from dfqbench.tracking.runs import is_pushed, sync
from dfqbench.tracking.students import Students

SweepFile = Callable[..., Path]
OFFLINE = Tracking(wandb="offline")


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)


def few(root: Path) -> Store:
    """Three cells: two of GDFQ, one without training; noted as a sweep."""
    store = Store(root, writable=True)
    chosen = [c for c in cells(100) if c.seed == 0 and c.method in ("gdfq", "round") and str(c.bits) in ("w4a4", "w3a3")][:3]
    for cell in chosen:
        write_cell(store, cell)
    write_json(root / "sweeps" / "mine.json", {"config": "", "cells": [c.id for c in chosen]})
    return store


@pytest.mark.slow
def test_a_synced_run_is_the_cell(tmp_path: Path) -> None:
    store = few(tmp_path)
    results = read_store(store).results
    assert sync(store, results, OFFLINE, again=False, say=lambda line: None) == (3, 0)
    found = runs(tmp_path)
    assert set(found) == {f"dfqbench-{r['id']}" for r in results}
    for result in results:
        run, cell = found[f"dfqbench-{result['id']}"], result["cell"]
        assert (run["project"], run["group"], run["job_type"]) == ("dfqbench", "mine", cell["method"])
        assert {cell["bits"], cell["protocol"], cell["precision"], cell["teacher"]["label"]} <= set(run["tags"])
        assert run["config"]["config"] == cell["identity"]["config"]
        assert run["config"]["cell"] == result["id"]
        rows = read_rows(store.folder(result["id"]) / "history.csv")
        logged = [{k: v for k, v in row.items() if not k.startswith("_")} for row in run["history"]]
        assert logged == rows, "every epoch once, with every value"
        assert [row["_step"] for row in run["history"]] == [row["epoch"] for row in rows]
        assert run["summary"]["top1"] == result["top1"]
        assert run["summary"]["best_on_test"] == result["best"]["top1"]
        assert run["summary"]["drop"] == pytest.approx(result["teacher"]["top1"] - result["top1"])
        assert run["exit"] == 0


@pytest.mark.slow
def test_what_was_pushed_is_not_pushed_again_unless_it_changed_or_was_asked_for(tmp_path: Path) -> None:
    store = few(tmp_path)
    results = read_store(store).results
    quiet: Callable[[str], None] = lambda line: None  # noqa: E731
    assert sync(store, results, OFFLINE, False, quiet) == (3, 0)
    assert sync(store, results, OFFLINE, False, quiet) == (0, 3)
    for project in ("other", "other-dfqbench"):
        assert sync(store, results, Tracking(wandb="offline", project=project), False, quiet) == (3, 0)
    results[0]["top1"] = 1.0
    assert sync(store, results, OFFLINE, False, quiet) == (1, 2)
    assert sync(store, results, OFFLINE, True, quiet) == (3, 0)
    assert sync(store, results, OFFLINE, True, quiet) == (3, 0)
    assert len(runs(tmp_path)) == 9, "a folder per cell and project, however often it was pushed"


@pytest.mark.slow
def test_sample_images_go_along(tmp_path: Path) -> None:
    from PIL import Image

    store = few(tmp_path)
    result = read_store(store).results[0]
    Image.new("RGB", (64, 64), "red").save(store.folder(result["id"]) / "samples.png")
    sync(store, [result], OFFLINE, False, lambda line: None)
    (run,) = runs(tmp_path).values()
    media = [row["samples/_type"] for row in run["history"] if "samples/_type" in row]
    assert media == ["image-file"]
    assert list(tmp_path.glob("wandb/offline-run-*/files/media/images/*.png"))


# --- the quantized networks -------------------------------------------------------------------------------------------

STUDENT = "student.safetensors"


@pytest.fixture(scope="module")
def with_students(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: str) -> Path:
    """Four finished cells with their students."""
    folder = tmp_path_factory.mktemp("students")
    content = {"name": "four", "teachers": [tiny_teacher], "evaluate": "digits", "methods": ["round"], "bits": ["w8a8", "w6a6", "w4a4", "w3a3"]}
    (folder / "four.yaml").write_text(yaml.safe_dump(content))
    done = dfqbench("run", folder / "four.yaml", "--results", folder / "r", env=os.environ | {"DFQBENCH_CACHE": str(folder / "cache")})
    assert done.returncode == 0, done.stderr
    return folder / "r"


def copied(with_students: Path, folder: Path) -> tuple[Store, dict[str, dict[str, Any]]]:
    """Its store, and the results by bits."""
    shutil.copytree(with_students, folder)
    return Store(folder), {result["cell"]["bits"]: result for result in read_store(Store(folder)).results}


def artifacts(root: Path) -> dict[str, list[dict[str, Any]]]:
    """Of all offline runs, by cell."""
    return {run["config"]["cell"]: run["artifacts"] for run in runs(root).values()}


@pytest.mark.slow
def test_a_student_goes_along_once_as_an_artifact(with_students: Path, tmp_path: Path) -> None:
    store, found = copied(with_students, tmp_path / "r")
    results, quiet = list(found.values()), Students()
    assert sync(store, results, OFFLINE, False, lambda line: None) == (4, 0)
    assert set(map(len, artifacts(store.root).values())) == {0}, "only where they are asked for"
    assert sync(store, results, OFFLINE, False, lambda line: None, quiet) == (0, 4), "the runs were there"
    assert str(quiet) == "students: 4 pushed"
    for bits, result in found.items():
        (artifact,) = artifacts(store.root)[result["id"]]
        file = store.folder(result["id"]) / STUDENT
        digest = base64.b64encode(hashlib.md5(file.read_bytes()).digest()).decode()
        assert artifact == {
            "name": f"student-{result['id']}",
            "type": "model",
            "metadata": {"cell": result["id"], "method": "round", "bits": bits, "protocol": "lineage", "teacher": "tiny", **result["student"]},
            "files": {STUDENT: (file.stat().st_size, digest, str(file))},
        }
    for again, said, whole in ((False, "students: 0 pushed, 4 already there", (0, 4)), (True, "students: 4 pushed", (4, 0))):
        assert sync(store, results, OFFLINE, again, lambda line: None, students := Students()) == whole
        assert str(students) == said
    assert sync(store, results, OFFLINE, True, lambda line: None) == (4, 0)
    assert set(map(len, artifacts(store.root).values())) == {1}, "a new folder has what the one had that it replaces"


@pytest.mark.slow
def test_a_student_that_is_missing_or_damaged_is_named_and_costs_nothing_else(with_students: Path, tmp_path: Path) -> None:
    store, found = copied(with_students, tmp_path / "r")
    missing, damaged, foreign, off = (found[bits] for bits in ("w8a8", "w6a6", "w4a4", "w3a3"))
    files = {result["id"]: store.folder(result["id"]) / STUDENT for result in found.values()}
    files[missing["id"]].rename(tmp_path / "kept")
    content = bytearray(files[damaged["id"]].read_bytes())
    content[-1] ^= 1
    files[damaged["id"]].write_bytes(content)
    shutil.copy(files[off["id"]], files[foreign["id"]])
    write_json(store.folder(off["id"]) / "result.json", off | {"student": {}})
    files[off["id"]].unlink()
    done = dfqbench("wandb", "sync", "--students", "--offline", "--results", store.root)
    assert done.returncode == 0, done.stderr
    assert "4 pushed; students: 0 pushed, 1 not kept, 3 skipped (" in done.stdout
    said = done.stderr.splitlines()
    assert len(said) == 3
    for result, why in ((missing, "does not exist"), (damaged, "is damaged"), (foreign, "is not the student of this cell's result.json")):
        assert any(line.startswith(f"skipped: {files[result['id']]} {why}") for line in said), said
    assert [*map(len, artifacts(store.root).values())] == [0] * 4
    (tmp_path / "kept").rename(files[missing["id"]])
    before = {path.name for path in (store.root / "wandb").glob("offline-run-*")}
    done = dfqbench("wandb", "sync", "--students", "--offline", "--results", store.root)
    assert "0 pushed, 4 already there; students: 1 pushed, 1 not kept, 2 skipped (" in done.stdout
    assert {cell for cell, its in artifacts(store.root).items() if its} == {missing["id"]}
    assert len(before & {path.name for path in (store.root / "wandb").glob("offline-run-*")}) == 3, "the others' folders are as they were"


class Refused(Exception):
    """As wandb.Error."""


class Online:
    """Stands in for the module: what is asked of a server that may refuse artifacts."""

    Error, Settings, Image = Refused, dict, str

    def __init__(self, refuses: bool = False) -> None:
        self.refuses, self.asked = refuses, list[str]()
        self.summary, self.url, self.dir, self.starting_step = dict[str, Any](), "https://example.org", "/nowhere/run/files", 0

    def init(self, **words: Any) -> Online:
        return self

    def Artifact(self, name: str, **_: Any) -> Online:
        self.asked.append(name)
        return self

    def wait(self, timeout: int) -> None:
        self.asked.append("wait")
        if self.refuses:
            raise ValueError("quota exceeded")

    def log_artifact(self, artifact: Online) -> None:
        self.asked.append("log_artifact")

    def finish(self) -> None:
        self.asked.append("finish")

    def nothing(self, *_: Any, **__: Any) -> None:
        """Of no interest here."""

    define_metric = log = add_file = teardown = nothing


@pytest.mark.slow
def test_online_a_student_counts_as_pushed_when_the_server_has_it(with_students: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, found = copied(with_students, tmp_path / "r")
    result, online = found["w4a4"], Tracking()
    monkeypatch.setitem(sys.modules, "wandb", Online(refuses=True))
    with pytest.raises(Refused, match=f"student of {result['id']}: quota exceeded"):
        sync(store, [result], online, False, lambda line: None, Students())
    assert not is_pushed(store, result, online)
    monkeypatch.setitem(sys.modules, "wandb", there := Online())
    assert sync(store, [result], online, False, lambda line: None, Students()) == (1, 0)
    assert there.asked == [f"student-{result['id']}", "log_artifact", "wait", "finish"]
    assert sync(store, [result], online, True, lambda line: None) == (1, 0)
    assert sync(store, [result], online, False, lambda line: None, students := Students()) == (0, 1)
    assert str(students) == "students: 0 pushed, 1 already there", "also after the run was pushed again without it"
    assert len(there.asked) == 5


def dfqbench(*words: object, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dfqbench.cli", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)


@pytest.mark.slow
def test_a_run_leaves_one_offline_run_per_cell_and_the_same_numbers_as_without(sweep_file: SweepFile, tmp_path: Path) -> None:
    plain = dfqbench("run", sweep_file(evaluate_every=1), "--results", tmp_path / "plain", "--threads", 1)
    config = sweep_file(evaluate_every=1, tracking={"wandb": "offline", "project": "mine"})
    tracked = dfqbench("run", config, "--results", tmp_path / "tracked", "--threads", 1)
    assert (plain.returncode, tracked.returncode) == (0, 0), tracked.stderr
    assert f"W&B: 2 cells in {tmp_path / 'tracked' / 'wandb'}" in tracked.stdout.replace("\n", "")
    one, other = (read_store(Store(tmp_path / name)).results for name in ("plain", "tracked"))
    assert [r["id"] for r in one] == [r["id"] for r in other], "tracking is no part of an identity"
    assert [r["student_state"] for r in one] == [r["student_state"] for r in other]
    found = runs(tmp_path / "tracked")
    assert set(found) == {f"mine-{r['id']}" for r in other}, "cells in lockstep are runs of their own"
    for result in other:
        run = found[f"mine-{result['id']}"]
        assert run["summary"]["cpu_seconds"] == pytest.approx(sum(result["cpu_seconds"].values()))
        assert [row["top1"] for row in run["history"] if "top1" in row][-1] == result["top1"]
        assert run["group"] == "small"
        assert run["history"][-1]["samples/_type"] == "image-file"


OTHERS = {
    "WANDB_MODE": "disabled",
    "WANDB_DISABLED": "true",
    "WANDB_RUN_ID": "theirs",
    "WANDB_RESUME": "must",
    "WANDB_RUN_GROUP": "theirs",
    "WANDB_NAME": "theirs",
    "WANDB_PROJECT": "theirs",
    "WANDB_ENTITY": "theirs",
    "WANDB_DIR": "/nowhere",
    "WANDB_TAGS": "theirs",
    "WANDB_JOB_TYPE": "theirs",
    "WANDB_NOTES": "theirs",
    "WANDB_SERVICE": "3-1-tcp-localhost-1",
    "WANDB_X_SKIP_TRANSACTION_LOG": "true",
}


@pytest.mark.slow
def test_settings_of_other_training_scripts_move_no_run(sweep_file: SweepFile, tmp_path: Path) -> None:
    """Live, and pushed later."""
    theirs = os.environ | OTHERS
    config = sweep_file(tracking={"wandb": "offline", "project": "mine"})
    done = dfqbench("run", config, "--results", tmp_path / "r", "--threads", 1, env=theirs)
    assert done.returncode == 0, done.stderr
    live = runs(tmp_path / "r")
    assert {run["project"] for run in live.values()} == {"mine"}, (tmp_path / "r" / "wandb" / "tracking.log").read_text()
    assert {(run["group"], "theirs" in run["tags"], run["name"] == "theirs") for run in live.values()} == {("small", False, False)}
    assert len(live) == 2
    pushed = dfqbench("wandb", "sync", config, "--results", tmp_path / "r", "--project", "later", "--offline", env=theirs)
    assert pushed.returncode == 0, pushed.stderr
    assert {run["project"] for run in runs(tmp_path / "r").values()} == {"mine", "later"}


@pytest.mark.slow
def test_a_run_that_was_stopped_and_went_on_is_one_run_with_all_epochs(sweep_file: SweepFile, tmp_path: Path) -> None:
    config = sweep_file(bits=["w4a4"], budget={"epochs": 6, "iterations": 10, "batch_size": 8})
    words = [
        sys.executable,
        "-m",
        "dfqbench.cli",
        "run",
        str(config),
        "--results",
        str(tmp_path / "r"),
        "--wandb",
        "offline",
        "--checkpoint-every",
        "0",
    ]
    first = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while not list(tmp_path.glob("r/runs/*/history.csv")) and time.monotonic() < deadline:
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert not list(tmp_path.glob("r/runs/*/result.json")), "killed while it ran"
    assert dfqbench(*words[3:]).returncode == 0
    ((run_id, run),) = runs(tmp_path / "r").items()
    assert [row["_step"] for row in run["history"]] == [1, 2, 3, 4, 5, 6]
    (result,) = read_store(Store(tmp_path / "r")).results
    assert run_id == f"dfqbench-{result['id']}"


# --- W&B absent, slow, down -------------------------------------------------------------------------------------------

BROKEN = {
    "absent": "raise ImportError('No module named wandb')",
    "down": "class Settings:\n    def __init__(self, **words): pass\ndef init(**words):\n    raise ConnectionError('the server is down')",
    "hanging": "import time\nclass Settings:\n    def __init__(self, **words): pass\ndef init(**words):\n    time.sleep(3600)",
    "dying": "import os\nos._exit(9)",
}


def stand_in(folder: Path, code: str) -> dict[str, str]:
    """An environment in which `wandb` is something else."""
    (folder / "stand-in").mkdir(parents=True)
    (folder / "stand-in" / "wandb.py").write_text(code)
    here = Path(__file__).parents[2]
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder / "stand-in"), str(here), os.environ.get("PYTHONPATH", "")])}


@pytest.mark.slow
@pytest.mark.parametrize("how", list(BROKEN))
def test_whatever_wandb_does_cells_end_well_and_the_user_is_told(sweep_file: SweepFile, tmp_path: Path, how: str) -> None:
    code = f"from dfqbench import cli\nfrom dfqbench.tracking import process\nprocess.CLOSE_S = {2.0 if how == 'hanging' else 60.0}\ncli.main()"
    words = ["run", str(sweep_file(methods=["round"])), "--results", str(tmp_path / "r"), "--wandb", "online"]
    done = subprocess.run([sys.executable, "-c", code, *words], env=stand_in(tmp_path, BROKEN[how]), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    said = done.stdout.replace("\n", " ")
    assert "2 done" in said
    assert "W&B: 0 of 2 cells in project dfqbench" in said
    assert "dfqbench wandb sync small" in said
    assert len(read_store(Store(tmp_path / "r")).results) == 2
    if how in ("absent", "down"):
        assert {"absent": "No module named wandb", "down": "the server is down"}[how] in said


@pytest.mark.slow
def test_telling_never_waits_for_a_process_that_does_not_listen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pipe is far too small for what is told; a write that waited would never return."""
    monkeypatch.setattr(tracking_process, "CLOSE_S", 0.1)
    for name, value in stand_in(tmp_path, BROKEN["hanging"]).items():
        monkeypatch.setenv(name, value)
    store = few(tmp_path / "r")
    watching = WandbObserver(store.root, "mine", Tracking())
    for _ in range(50_000):
        watching.epoch(store.ids()[0])
    process = watching._process
    assert process is not None
    watching.close(lambda line: None)
    assert process.wait(30) != 0, "and it does not outlive the run"


RECORDING = """
import atexit, json, os, pathlib
calls = pathlib.Path(os.environ["CALLS"])
def note(**what):
    with calls.open("a") as file: file.write(json.dumps(what) + "\\n")
class Settings:
    def __init__(self, **words): pass
class Image:
    def __init__(self, path): self.path = path
class Run:
    url = "https://example.org/run"
    dir = "/nowhere/run/files"
    def __init__(self, words):
        self.id = words["id"]
        self.starting_step = int(os.environ.get("STARTING_STEP", 0))
        self.summary = {}
    def define_metric(self, *names, **words): pass
    def log(self, row, step): note(log=self.id, step=step, keys=sorted(row))
    def finish(self, exit_code=0): note(finish=self.id, exit_code=exit_code, summary=sorted(self.summary))
def init(**words):
    note(init=words["id"], resume=words["resume"], reinit=words["reinit"], mode=words["mode"], group=words["group"])
    return Run(words)
"""


def heard(tmp_path: Path, lines: list[str], **environment: str) -> list[dict[str, Any]]:
    """What the process asks of W&B when it is told these lines."""
    calls = tmp_path / "calls"
    calls.unlink(missing_ok=True)
    env = (
        stand_in(tmp_path, RECORDING)
        if not (tmp_path / "stand-in").exists()
        else {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path / "stand-in"), str(Path(__file__).parents[2])])}
    )
    settings = json.dumps({"root": str(tmp_path / "r"), "sweep": "mine", "tracking": Tracking().model_dump()})
    command = [sys.executable, "-P", "-m", "dfqbench.tracking.process", settings]
    done = subprocess.run(
        command, input="\n".join(lines), env={**env, "CALLS": str(calls), **environment}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in calls.read_text().splitlines()] if calls.exists() else []


def test_live_the_newest_epoch_waits_for_its_accuracy_and_every_epoch_is_logged_once(tmp_path: Path) -> None:
    store = few(tmp_path / "r")
    cell_id = next(r["id"] for r in read_store(store).results if r["cell"]["method"] == "gdfq")
    calls = heard(tmp_path, [f"epoch {cell_id}", f"epoch {cell_id}", f"done {cell_id}"])
    mine = [c for c in calls if f"dfqbench-{cell_id}" in c.values()]
    assert mine[0] == {"init": f"dfqbench-{cell_id}", "resume": "allow", "reinit": "create_new", "mode": "online", "group": "mine"}
    assert [c["step"] for c in mine if "log" in c] == list(range(1, 41))
    assert mine[-1]["exit_code"] == 0
    assert "top1" in mine[-1]["summary"]
    assert is_pushed(store, store.result(cell_id) or {}, Tracking())


def test_a_requeued_cell_goes_on_behind_what_wandb_already_has(tmp_path: Path) -> None:
    store = few(tmp_path / "r")
    cell_id = next(r["id"] for r in read_store(store).results if r["cell"]["method"] == "gdfq")
    calls = heard(tmp_path, [f"epoch {cell_id}", f"done {cell_id}"], STARTING_STEP="31")
    assert [c["step"] for c in calls if c.get("log") == f"dfqbench-{cell_id}"] == list(range(31, 41))


def test_news_that_were_lost_are_made_up_for_at_the_end(tmp_path: Path) -> None:
    store = few(tmp_path / "r")
    mine = sorted(store.ids())[:2]  # the third is another process's
    calls = heard(tmp_path, [f"begun {cell_id}" for cell_id in mine])
    assert {c["finish"] for c in calls if "finish" in c} == {f"dfqbench-{cell_id}" for cell_id in mine}


def test_a_cell_that_did_not_end_is_closed_as_failed(tmp_path: Path) -> None:
    store = few(tmp_path / "r")
    cell_id = next(r["id"] for r in read_store(store).results if r["cell"]["method"] == "gdfq")
    (store.folder(cell_id) / "result.json").unlink()
    calls = heard(tmp_path, [f"epoch {cell_id}"])
    (end,) = [c for c in calls if c.get("finish") == f"dfqbench-{cell_id}"]
    assert end["exit_code"] == 1


# --- settings and the command -----------------------------------------------------------------------------------------


def test_tracking_is_given_in_words_or_a_mapping_and_never_changes_an_id(sweep_file: SweepFile) -> None:
    plain = load_sweep(sweep_file(), cache_folder())
    for given, mode in (("wandb", "online"), ({"wandb": "offline"}, "offline"), ({"wandb": "online", "project": "p", "entity": "e"}, "online")):
        loaded = load_sweep(sweep_file(tracking=given), cache_folder())
        assert [c.id for c in loaded.cells] == [c.id for c in plain.cells]
        assert loaded.sweep.tracking is not None
        assert loaded.sweep.tracking.wandb == mode
    assert tracking_of(plain.sweep, None) is None
    assert tracking_of(plain.sweep, "offline") == OFFLINE
    assert tracking_of(loaded.sweep, "off") is None
    assert tracking_of(loaded.sweep, "offline") == Tracking(wandb="offline", project="p", entity="e")
    for wrong in ({"wandb": "sometimes"}, {"project": "a/b"}, {"projekt": "p"}):
        with pytest.raises(ValidationError):
            Tracking(**wrong)  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_mistake_in_tracking_is_one_line_with_its_key(sweep_file: SweepFile, tmp_path: Path) -> None:
    for given, said in (
        ({"wandb": "sometimes"}, "tracking.wandb: 'sometimes'"),
        ({"project": "a/b"}, "tracking.project: 'a/b'"),
        ("tensorboard", "tracking: 'tensorboard'"),
    ):
        done = dfqbench("plan", sweep_file(tracking=given), "--results", tmp_path / "r")
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
        assert said in done.stderr


@pytest.mark.slow
def test_sync_is_a_command(tmp_path: Path) -> None:
    few(tmp_path / "r")
    done = dfqbench("wandb", "sync", "--offline", "--results", tmp_path / "r")
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert "3 pushed" in done.stdout
    done = dfqbench("wandb", "sync", "--offline", "--results", tmp_path / "r")
    assert "0 pushed, 3 already there" in done.stdout
    no_home = {**os.environ, "HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc")}
    done = dfqbench("wandb", "sync", "--results", tmp_path / "r", env=no_home)
    assert done.returncode == 2
    assert done.stderr.startswith("dfqbench: W&B: not logged in")
    done = dfqbench("wandb", "sync", "--project", "a b", "--results", tmp_path / "r")
    assert (done.returncode, done.stderr.strip()) == (2, "dfqbench: --project 'a b': letters, digits, '.', '_' and '-' only")


def test_the_reader_reads_records_longer_than_a_block(tmp_path: Path) -> None:
    """Or the tests above could miss what they look for."""
    store = make_store(tmp_path, 1)
    result = read_store(store).results[0]
    result["cell"]["identity"]["config"]["long"] = "x" * 100_000
    sync(store, [result], OFFLINE, False, lambda line: None)
    (path,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert contents(path)["config"]["config"]["long"] == "x" * 100_000
