"""Profiles, packing, splitting, records, and what Slurm's commands answer, without Slurm."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dfqbench.engine.device import DeviceLost
from dfqbench.errors import UserError
from dfqbench.store import Store
from dfqbench.store.cache import cache_folder
from dfqbench.sweep.cell import Bundle
from dfqbench.sweep.load import load_sweep
from dfqbench_slurm import cluster
from dfqbench_slurm.cluster import Job, NoAnswer
from dfqbench_slurm.overview import Word, look
from dfqbench_slurm.packing import pack, split
from dfqbench_slurm.profile import Profile, find_profile, minutes, shipped
from dfqbench_slurm.submission import Array, Submission, submissions
from dfqbench_slurm.supervisor import STUCK, TRIES, Crew, Supervisor, visible_gpus
from dfqbench_slurm.worker import LOST, work


@pytest.mark.parametrize(
    ("text", "expected"),
    {
        "240": 240,
        "4h": 240,
        "90min": 90,
        "1.5h": 90,
        "2d": 2880,
        "30s": 1,
        "61s": 2,
        "08:00:00": 480,
        "1-12:00:00": 2160,
        "1-12": 2160,
        "90:00": 90,
        "00:00:30": 1,
        "2-00:30": 2910,
    }.items(),
)
def test_times_are_read_as_slurm_reads_them(text: str, expected: int) -> None:
    assert minutes(text) == expected


def test_every_shipped_profile_is_valid() -> None:
    assert set(shipped()) == {"gpu", "cpu", "preemptible", "test-cluster"}
    for name in shipped():
        assert find_profile(name)[0] == name
    assert Profile() == Profile(**Profile().model_dump())
    text = shipped()["gpu"].read_text()
    assert all(f"\n{key}: " in text or f"\n# {key}: " in text for key in Profile.model_fields), "gpu.yaml explains every key"


def test_threads_and_lanes_share_a_job() -> None:
    profile = Profile(gpus=2, side_by_side=2, cpus=16)
    assert (profile.lanes, profile.threads, profile.runs_on) == (4, 4, "cuda")
    assert (Profile(gpus=0, cpus=1, side_by_side=4).threads, Profile(gpus=0).runs_on) == (1, "cpu")


@pytest.mark.parametrize("tasks", [1, 5, 1000, 1001, 2500])
@pytest.mark.parametrize("limit", [1, 3, 1000])
@pytest.mark.parametrize("parallel", [1, 2, 64])
def test_arrays_cover_every_task_once_within_both_limits(tasks: int, limit: int, parallel: int) -> None:
    parts = split(tasks, limit, parallel)
    assert [task for part in parts for task in range(part.first, part.first + part.count)] == list(range(tasks))
    assert max(part.count for part in parts) <= limit
    assert max(part.count for part in parts) - min(part.count for part in parts) <= 1
    # at any time one array of each chain runs at most
    chains: dict[int, int] = {}
    for i, part in enumerate(parts):
        assert part.after is None or part.after < i
        first = i
        while parts[first].after is not None:
            first = parts[first].after  # type: ignore[assignment]
        chains[first] = max(chains.get(first, 0), part.parallel)
    assert sum(chains.values()) <= max(parallel, 1)
    assert min(part.parallel for part in parts) >= 1


@pytest.fixture
def found(sweep_file: Callable[..., Path]) -> list[Bundle]:
    from dfqbench.sweep.cell import bundles

    loaded = load_sweep(sweep_file(seeds=[0, 1, 2, 3, 4], methods=["gdfq"]), cache_folder())
    return bundles(loaded.cells)


def ids(bundle: Bundle) -> list[str]:
    return [cell.id for cell in bundle.cells]


def test_bundles_are_chained_by_their_measured_time(found: list[Bundle]) -> None:
    by_measure = pack(found, Profile(chain_minutes=10, gpus=0), lambda bundle: 240.0)
    assert by_measure == [[[ids(found[0]), ids(found[1])]], [[ids(found[2]), ids(found[3])]], [[ids(found[4])]]]
    assert [len(task) for task in pack(found, Profile(), lambda bundle: None)] == [1] * 5, "nothing is chained on a guess"
    assert pack(found, Profile(chain=3, side_by_side=2), lambda bundle: None) == [[[ids(b) for b in found[:3]], [ids(b) for b in found[3:]]]]
    assert pack([], Profile(), lambda bundle: None) == []


def test_methods_without_training_are_chained(sweep_file: Callable[..., Path]) -> None:
    from dfqbench.sweep.cell import bundles

    loaded = load_sweep(sweep_file(methods=[{"round": {"n": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]}}], bits=["w8a8", "w4a4", "w3a3"]), cache_folder())
    chosen = bundles(loaded.cells)
    tasks = pack(chosen, Profile(), lambda bundle: None)
    assert [len(lane) for task in tasks for lane in task] == ([16, 2] if len(chosen) == 18 else [len(chosen)])


def commands(folder: Path, monkeypatch: pytest.MonkeyPatch, **scripts: str) -> None:
    """Puts commands of these names, and no other, on PATH."""
    folder.mkdir(exist_ok=True)
    for name, script in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


def test_the_queue_is_read_with_odd_names_and_reasons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = "12|3|PENDING||a-1.0|(Resources|odd)\n13|N/A|RUNNING|n7|b|None\n14|0|CANCELLED|n1|c|None\n15|1|COMPLETING|n1|c|None"
    commands(tmp_path / "bin", monkeypatch, squeue=f"echo '{lines}'")
    jobs = cluster.queue()
    assert jobs["12_3"] == Job("12_3", "a-1.0", "PENDING", "(Resources|odd)", "")
    assert [(jobs[i].live, jobs[i].pending) for i in ("12_3", "13", "14_0", "15_1")] == [(True, True), (True, False), (False, False), (True, False)]


def test_lines_that_are_not_of_the_asked_format_are_no_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notices = "\n\nNOTICE|of|MONDAY|x|y|z\nmaintenance in 3 days\n12|x|PENDING||name|None\n |||||\n13|0|run|n|name|None\n"
    commands(
        tmp_path / "bin",
        monkeypatch,
        squeue=f"echo '{notices}14|N/A|PENDING||a|None{notices}'",
        sacct="echo 'no|such'; echo; echo 'read|the|news'; echo '7_4|NODE_FAIL|n9\n7_4.batch|FAILED|n9\n7_5|CANCELLED by 12|None assigned'",
    )
    assert cluster.queue() == {"14": Job("14", "a", "PENDING", "", "")}
    assert cluster.endings(["7_4", "7_5"]) == {"7_4": "NODE_FAIL on n9", "7_5": "CANCELLED"}


def test_questions_are_asked_by_uid_and_without_the_users_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SQUEUE_PARTITION", "SQUEUE_NEW_IN_30", "SLURM_TIME_FORMAT", "SLURM_CONF", "SACCT_FORMAT"):
        monkeypatch.setenv(name, "theirs")
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.setenv(name, "colleague")
    commands(tmp_path / "bin", monkeypatch, squeue=f'echo "$*" > {tmp_path}/words; /usr/bin/env > {tmp_path}/environment')
    cluster.queue()
    assert f"--user={os.getuid()}" in (tmp_path / "words").read_text().split()
    seen = {line.partition("=")[0] for line in (tmp_path / "environment").read_text().splitlines()}
    assert {name for name in seen if name.startswith(("SQUEUE", "SACCT", "SLURM"))} == {"SLURM_CONF"}


def test_a_number_is_read_from_sbatch_only_where_a_line_is_that_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is not, the name decides; where nothing can be told, nobody says that nothing was submitted."""
    queue = "echo '12|0|PENDING||mine.0|None'; echo '12|1|PENDING||mine.0|None'; echo '3|N/A|RUNNING|n|other|None'"
    queue += "; echo '13|N/A|FAILED||mine.1|BadConstraints'"  # how a refused job is remembered
    monkeypatch.setattr(cluster, "LATE_S", (0.0,))
    for answer, expected in {
        "30": "30",
        "30;big": "30",
        "job 3 of 50\n\n 30 ": "30",
        "you may queue job 3 of 50": "12",
        "3\n50": "12",
        "": "12",
    }.items():
        commands(tmp_path / "bin", monkeypatch, sbatch=f"echo '{answer}'", squeue=queue)
        assert cluster.sbatch(tmp_path / "script", "mine.0") == expected, answer
    commands(tmp_path / "bin", monkeypatch, sbatch="echo 'sbatch: error: invalid partition' >&2; exit 1", squeue=queue)
    assert cluster.sbatch(tmp_path / "script", "mine.0") == "12"
    with pytest.raises(cluster.NotTaken, match="invalid partition"):
        cluster.sbatch(tmp_path / "script", "mine.1")
    commands(tmp_path / "bin", monkeypatch, sbatch="echo 'sbatch: error: Socket timed out' >&2; exit 1", squeue=queue)
    with pytest.raises(cluster.MaybeTaken, match=r"Socket timed out; no job mine\.1 is in the queue"):
        cluster.sbatch(tmp_path / "script", "mine.1")
    commands(tmp_path / "bin", monkeypatch, sbatch="echo news", squeue="exit 1")
    with pytest.raises(cluster.MaybeTaken, match="whether the job was taken cannot be told"):
        cluster.sbatch(tmp_path / "script", "mine.0")


def test_no_answer_is_told_with_its_cause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands(tmp_path / "bin", monkeypatch, squeue="echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1")
    with pytest.raises(NoAnswer, match=r"squeue: slurm_load_jobs error: Unable to contact slurm controller"):
        cluster.queue()
    with pytest.raises(NoAnswer, match="scontrol is not on PATH"):
        cluster.array_limit()
    assert cluster.endings(["1_2"]) == {}


def submission_of(store: Store, cells: list[str], job: str | None = "7") -> Submission:
    made = Submission(
        token="abc123",
        sweep="s",
        config="",
        profile="gpu",
        settings=Profile().model_dump(mode="json"),
        results=str(store.root),
        cwd="/",
        plugins={},
        tasks=[[[[cell]]] for cell in cells],
        arrays=[Array("s-abc123.0", 0, len(cells), job)],
    )
    made.write()
    return made


def words(store: Store, cells: list[str]) -> dict[str, tuple[Word, str]]:
    return {line.cell: (line.word, line.about) for line in look({cell: f"label of {cell}" for cell in cells}, store).lines}


def test_each_state_is_told_from_disk_queue_and_accounting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, cells = Store(tmp_path / "r", writable=True), ["aa", "bb", "cc", "dd", "ee", "ff", "gg"]
    made = submission_of(store, cells)
    rows = [
        "7|0|PENDING||s-abc123.0|Priority",
        "7|1|RUNNING|n3|s-abc123.0|None",
        "7|2|PENDING||s-abc123.0|BeginTime",
        "7|3|RUNNING|n3|s-abc123.0|None",
    ]
    accounts = ["7_4|NODE_FAIL|n9", "7_5|PREEMPTED|n2", "7_6|CANCELLED by 0|None assigned"]
    commands(tmp_path / "bin", monkeypatch, squeue="echo '" + "\n".join(rows) + "'", sacct="echo '" + "\n".join(accounts) + "'")
    made.write_state(2, {"starts": 2})
    progress = {"phase": "train", "step": 30, "steps": 90, "rate": 2.0, "time": time.time()}
    for cell in ("bb", "cc", "ee"):
        store.folder(cell).mkdir()
        store.write_progress(cell, progress)
    store.lease("bb").path.write_text(json.dumps({"host": "n3", "pid": 5, "started": "1", "since": 0.0, "job": "7_1"}))
    assert words(store, [*cells, "hh"]) == {
        "aa": (Word.QUEUED, "job 7_0 (Priority)"),
        "bb": (Word.RUNNING, "train, step 30/90, 2.00 steps/s, 0 min 30 s left, n3, job 7_1"),
        "cc": (Word.PREEMPTED, "job 7_2 (BeginTime), goes on at step 30 of 90"),
        "dd": (Word.QUEUED, "its turn comes in job 7_3 on n3"),
        "ee": (Word.LOST, "job 7_4 is gone: NODE_FAIL on n9, goes on at step 30 of 90 when submitted again"),
        "ff": (Word.PREEMPTED, "job 7_5 is gone: PREEMPTED on n2"),
        "gg": (Word.LOST, "job 7_6 is gone: CANCELLED"),
        "hh": (Word.MISSING, ""),
    }
    store.write_failure("ee", "ValueError", "first\nlast line", "")
    assert words(store, ["ee"])["ee"] == (Word.FAILED, "ValueError: last line")


def test_without_a_queue_what_was_submitted_is_called_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path / "r", writable=True)
    submission_of(store, ["aa"])
    monkeypatch.setenv("PATH", str(tmp_path))
    seen = look({"aa": "a"}, store)
    assert (seen.lines[0].word, seen.lines[0].about) == (Word.SUBMITTED, "job 7")
    assert "squeue is not on PATH" in seen.notes[0]


def test_a_job_number_that_was_never_noted_is_found_by_name(tmp_path: Path) -> None:
    made = submission_of(Store(tmp_path / "r"), ["aa", "bb"], job=None)
    assert made.job_of(1, {}) is None
    assert made.job_of(1, {"9_0": Job("9_0", "s-abc123.0", "PENDING", "", ""), "8": Job("8", "other", "RUNNING", "", "")}) == "9_1"


def test_damaged_records_are_passed_over(tmp_path: Path) -> None:
    store = Store(tmp_path / "r")
    submission_of(store, ["aa"])
    for token, text in {"x": "{", "y": "[]", "z": '{"token": "z"}'}.items():
        folder = store.root / "sweeps" / "s" / token
        folder.mkdir()
        (folder / "submission.json").write_text(text)
    assert [found.token for found in submissions(store)] == ["abc123"]


def test_a_profile_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    for name, text, said in [("a.yaml", "[1", "line 1: not valid YAML"), ("b.yaml", "- x", "a mapping with keys like partition")]:
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=said):
            find_profile(str(tmp_path / name))
    (tmp_path / "empty.yaml").write_text("")
    assert find_profile(str(tmp_path / "empty.yaml"))[1] == Profile()


def test_a_job_that_gets_nowhere_or_may_not_be_requeued_gives_up_and_says_why(tmp_path: Path) -> None:
    store = Store(tmp_path / "r", writable=True)
    made = submission_of(store, ["aa"])

    def supervisor() -> Supervisor:
        """As it is when the signal comes, in a new process each time."""
        found = Supervisor(made.folder, 0)
        found.submission, found.state, found.crew = made, made.state_of(0), Crew(made, made.tasks[0], [], {})
        return found

    answers = [supervisor().checkpoint() for _ in range(STUCK + 1)]
    assert [answer is not None for answer in answers] == [True] * STUCK + [False]
    assert "raise the profile's `time`" in made.state_of(0)["said"]
    store.folder("aa").mkdir()
    store.write_progress("aa", {"step": 3})
    assert supervisor().checkpoint() is not None, "a step further"
    assert made.state_of(0)["said"] == "saved, and back in the queue"
    made.settings["requeue"] = False
    assert supervisor().checkpoint() is None
    assert made.state_of(0)["said"] == "its time was over; the next submit goes on"


def test_a_checkpoint_before_the_first_worker_goes_on(tmp_path: Path) -> None:
    again = Supervisor(tmp_path, 3).checkpoint()
    assert (again.function.folder, again.function.task) == (tmp_path, 3)


def test_supervisor_and_status_start_without_torch() -> None:
    import subprocess
    import sys

    code = "import sys, slurm.supervisor, slurm.overview, slurm.commands; print([m for m in ('torch', 'submitit', 'pandas') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("said", "settings", "gpus"),
    [
        ("2,5", {"gpus": 2}, ["2", "5"]),
        (None, {"gpus": 2}, ["0", "1"]),
        (None, {"gpus": 0, "device": "cuda"}, []),
        (None, {"gpus": 2, "device": "cpu"}, []),
    ],
)
def test_workers_are_spread_over_the_gpus_of_their_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str | None, settings: dict[str, object], gpus: list[str]
) -> None:
    made = submission_of(Store(tmp_path / "r", writable=True), ["aa", "bb"])
    made.settings = Profile(**{"side_by_side": 1, "graphs": True, "streams": True, **settings}).model_dump(mode="json")  # type: ignore[arg-type]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if said is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", said)
    assert visible_gpus(made) == gpus
    started: list[tuple[list[str], str | None]] = []

    class Process:
        def __init__(self, words: list[str], cwd: str, env: dict[str, str]):
            started.append((words, env.get("CUDA_VISIBLE_DEVICES")))

        def poll(self) -> int:
            return 0

    monkeypatch.setattr("dfqbench_slurm.supervisor.subprocess.Popen", Process)
    crew = Crew(made, [[["aa"]], [["bb"]]], visible_gpus(made), {})
    for slot, lane in enumerate(crew.lanes):
        crew._start(lane, lane.cells, slot)
    assert [visible for _, visible in started] == (gpus or [None, None])
    assert all({"--graphs", "--streams"} <= {*words} for words, _ in started)


def test_a_worker_whose_gpu_is_dead_is_replaced_and_counts_against_its_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path / "r", writable=True)
    made = submission_of(store, ["aa"])
    (made.folder / "sweep.yaml").touch()

    def dies(*_: object) -> None:
        raise DeviceLost("cuda answers no more", ["aa"])

    loaded = type("Loaded", (), {"cells": [type("Cell", (), {"id": "aa"})()]})
    monkeypatch.setattr("dfqbench.sweep.load.load_sweep", lambda *_: loaded)
    monkeypatch.setattr("dfqbench.run.runner.run_cells", dies)
    store.folder("aa").mkdir(parents=True, exist_ok=True)
    assert work(made.folder, ["aa"], "cuda", 1, 300.0, "") == LOST
    crew = Crew(made, [[["aa"]]], ["0"], {})
    for tries in range(1, TRIES + 1):
        assert store.failure("aa") is None
        crew._ended(crew.lanes[0], os.getpid(), LOST)
        assert crew.deaths == ({"aa": tries} if tries < TRIES else {})
    failure = store.failure("aa")
    assert failure is not None
    assert "its GPU answers no more" in failure["message"]
