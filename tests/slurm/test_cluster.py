"""Sweeps on a real Slurm: whatever happens to jobs, the results are those of `dfqbench run`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from place import SWEEPS, Place, numbers, runs_through

Reference = Callable[[str], tuple[dict[Any, Any], str]]


def test_a_sweep_goes_through_arrays_without_accounting(place: Place, limited: Place, reference: Reference) -> None:
    runs_through(place, reference, jobs=3, arrays=1)
    assert subprocess.run(["sacct"], env=place.environment, capture_output=True).returncode != 0


def test_whatever_hits_a_job_nothing_is_lost(place: Place, limited: Place, reference: Reference) -> None:
    """Four cells' jobs at once: requeued by hand, worker SIGKILLed, task cancelled, and a node daemon that dies and comes back under all of them."""
    expected, _ = reference("slow")
    config, profile = SWEEPS["slow"](place), place.profile("slow")
    sent = place.dfqbench("submit", config, "--profile", profile, PAUSE="0.3")
    assert sent.code == 0, sent.err
    (submission,) = place.submissions("slow")
    array = submission["arrays"][0]["job"]
    cells = [task[0][0] for task in submission["tasks"]]

    def step(cell: str) -> int:
        file = place.folder / "results" / "runs" / cell / "progress.json"
        return int(json.loads(file.read_text())["step"]) if file.exists() else 0

    place.wait("all four are in the middle", lambda: all(step(members[0]) > 0 for members in cells))
    seen = place.dfqbench("status", config).out
    assert seen.count(" running ") == 8, seen
    assert "/60, " in seen
    assert f"job {array}_3" in seen

    place.ask("scontrol", "requeue", f"{array}_0")
    os.kill(json.loads((place.folder / "results" / "runs" / cells[1][0] / "lease.json").read_text())["pid"], signal.SIGKILL)
    place.ask("scancel", f"{array}_2")
    place.wait("the requeued one is back in the queue", lambda: place.queue()[f"{array}_0"] == "PENDING")
    node_daemon = Path(place.environment["SLURM_CONF"]).parent / "slurmd.pid"
    os.kill(int(node_daemon.read_text()), signal.SIGKILL)
    subprocess.run(["slurmd", "-f", place.environment["SLURM_CONF"], "-N", os.uname().nodename.split(".")[0]], check=True, timeout=60)

    place.wait("the cancelled one is gone", lambda: place.queue()[f"{array}_2"] == "CANCELLED")
    lost = place.dfqbench("status", config).out
    assert lost.count(" lost ") == 2, lost
    assert "goes on at step" in lost
    again = place.dfqbench("submit", config, "--profile", profile)
    assert (again.code, "2 cells, 1 process, 1 job" in again.out) == (0, True), again.out

    def through() -> bool:
        if "launch failed" in place.ask("squeue", "-h", "-o", "%r"):  # the node died just while Slurm started a job on it: another submit lets it go
            assert "released" in place.dfqbench("submit", config, "--profile", profile).out
        return not place.left()

    place.wait("all jobs are through", through)
    assert "FAILED" not in place.queue().values()
    assert numbers(place.results()) == expected, place.logs()
    resumed = {cell: (place.folder / "results" / "runs" / cell / "log.txt").read_text().count("resumed at step") for cell, _ in cells}
    assert all(resumed[cells[i][0]] >= 1 for i in (0, 1, 2)), place.logs()
    assert "killed by SIGKILL" in place.logs()


def test_a_cell_longer_than_its_jobs_time_is_requeued_and_ends_with_the_same_bits(limited: Place, reference: Reference) -> None:
    expected, _ = reference("slow")
    limited.wait("it is through", lambda: not limited.left())
    assert list(limited.queue().values()) == ["COMPLETED"]
    assert numbers(limited.results()) == {key: value for key, value in expected.items() if key[0] == 0}, limited.logs()
    log = next(limited.folder.glob("results/runs/*/log.txt")).read_text()
    assert log.count("resumed at step") >= 1
    assert log.count("started") == 1
    (state,) = [json.loads(path.read_text()) for path in limited.folder.glob("results/sweeps/limited/*/tasks/0.json")]
    assert state["starts"] == 1 + log.count("resumed at step")
