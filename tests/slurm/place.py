"""A folder with sweeps and profiles in which `dfqbench` runs as its users call it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

ENDED = ("COMPLETED", "CANCELLED", "FAILED", "TIMEOUT")
PATIENCE_S = 400.0  # a hard end for everything that waits; nothing asserts on time

# GDFQ that sleeps in every step for as long as the environment says: the same numbers, at a pace at which something can happen in the middle
SLOW = '''
import os
import time

from dfqbench import register
from dfqbench_methods.gdfq import GDFQ


@register("slow", paper="none", fidelity="paper", shares_synthesis=True)
class Slow(GDFQ):
    """GDFQ that takes its time."""

    def synthesize(self):
        time.sleep(float(os.environ.get("PAUSE", "0")))
        return super().synthesize()
'''


@dataclass
class Done:
    code: int
    out: str
    err: str


class Place:
    """A folder with sweeps and profiles, in which commands run; `environment` says which cluster they meet."""

    def __init__(self, folder: Path, teacher: str, environment: dict[str, str]):
        self.folder, self.teacher = folder, teacher
        # wide enough that no line wraps; a cache of the session's own
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_"))}
        self.environment |= {"COLUMNS": "250", "OMP_NUM_THREADS": "1"} | environment
        (folder / "slow.py").write_text(textwrap.dedent(SLOW))

    def sweep(self, name: str, **changes: Any) -> Path:
        content = {
            "name": name,
            "teachers": [self.teacher],
            "evaluate": "digits",
            "methods": [{"gdfq": {"warmup_epochs": 1, "calibration_epochs": 1}}],
            "bits": ["w4a4", "w3a3"],
            "budget": {"epochs": 3, "iterations": 4, "batch_size": 8},
        } | changes
        return self.write(f"{name}.yaml", {key: value for key, value in content.items() if value is not None})

    def slow_sweep(self, name: str, **changes: Any) -> Path:
        """60 steps of one bundle per seed."""
        methods = [{"slow": {"warmup_epochs": 1, "calibration_epochs": 1}}]
        budget = {"epochs": 3, "iterations": 20, "batch_size": 8}
        return self.sweep(name, **({"methods": methods, "budget": budget, "plugins": ["slow.py"]} | changes))

    def profile(self, name: str, **settings: Any) -> Path:
        return self.write(
            f"{name}-profile.yaml", {"gpus": 0, "cpus": 1, "time": 30, "device": "cpu", "save_seconds": 20, "checkpoint_every": 2} | settings
        )

    def write(self, name: str, content: dict[str, Any]) -> Path:
        path = self.folder / name
        path.write_text(yaml.safe_dump(content))
        return path

    def start(self, *words: object, **environment: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "dfqbench.cli", *map(str, words)]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, cwd=self.folder, env=self.environment | environment, stdout=pipe, stderr=pipe, text=True)

    def dfqbench(self, *words: object, **environment: str) -> Done:
        process = self.start(*words, **environment)
        try:
            out, err = process.communicate(timeout=PATIENCE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        return Done(process.returncode, out, err)

    def ask(self, *words: str) -> str:
        """A command of Slurm's."""
        return subprocess.run(words, env=self.environment, capture_output=True, text=True, check=True, timeout=60).stdout

    def queue(self) -> dict[str, str]:
        """State of this folder's jobs by id."""
        mine = {array["name"] for file in self.folder.glob("results/sweeps/*/*/submission.json") for array in json.loads(file.read_text())["arrays"]}
        lines = [line.split("|") for line in self.ask("squeue", "-h", "-r", "--states=all", "-o", "%i|%T|%j").splitlines()]
        return {job: state for job, state, name in lines if name in mine}

    def left(self) -> list[str]:
        """Jobs that have not ended."""
        return [job for job, state in self.queue().items() if state not in ENDED]

    def clear(self) -> None:
        """Ends whatever is left."""
        for job in self.left():
            subprocess.run(["scancel", job], env=self.environment, capture_output=True, timeout=60)
        self.wait("the queue is empty", lambda: not self.left())

    def results(self, folder: str = "results") -> dict[tuple[int, str, str], dict[str, Any]]:
        """By seed, bits and label."""
        found = [json.loads(path.read_text()) for path in sorted((self.folder / folder).glob("runs/*/result.json"))]
        return {(r["cell"]["seed"], r["cell"]["bits"], r["cell"]["label"]): r for r in found}

    def submissions(self, sweep: str) -> list[dict[str, Any]]:
        return [json.loads(path.read_text()) for path in sorted((self.folder / "results" / "sweeps" / sweep).glob("*/submission.json"))]

    def logs(self) -> str:
        """What the jobs said, for a test that fails."""
        return "\n".join(f"--- {path.name}\n{path.read_text()}" for path in sorted(self.folder.glob("results/sweeps/*/*/jobs/*.out")))

    def wait(self, what: str, condition: Callable[[], Any]) -> Any:
        """What `condition` returns once it is true."""
        deadline = time.monotonic() + PATIENCE_S
        while not (found := condition()):
            if time.monotonic() > deadline:
                pytest.fail(f"waited in vain until {what}\n{self.ask('squeue')}\n{self.logs()}")
            time.sleep(0.3)
        return found


def numbers(results: dict[Any, dict[str, Any]]) -> dict[Any, Any]:
    """What must be the same to the bit."""
    return {key: (r["id"], r["student_state"], r["top1"], r["correct"], r["loss"]) for key, r in results.items()}


def without_seconds(table: str) -> str:
    """A table without its last column: no two runs take the same time."""
    return "\n".join(line.rsplit(None, 1)[0] if "±" in line or line.lstrip().startswith(("gdfq", "round")) else line for line in table.splitlines())


SWEEPS: dict[str, Callable[[Place], Path]] = {
    # 24 cells in 12 bundles
    "grid": lambda here: here.sweep(
        "grid", methods=[{"gdfq": {"warmup_epochs": 1, "calibration_epochs": 1, "bn_weight": [0.1, 0.5, 1.0, 2.0]}}], seeds=[0, 1, 2]
    ),
    "slow": lambda here: here.slow_sweep("slow", seeds=[0, 1, 2, 3]),
}


def runs_through(place: Place, reference: Callable[[str], tuple[dict[Any, Any], str]], jobs: int, arrays: int) -> None:
    """24 cells in arrays of which two tasks run at once, submitted twice at the same time, end as if `dfqbench run` had run them."""
    config = SWEEPS["grid"](place)
    profile = place.profile("grid", chain=4, parallel=2)
    both = [place.start("submit", config, "--profile", profile) for _ in range(2)]
    said = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert sum("nothing to submit" in out for out, _ in said) == 1, said
    (submission,) = place.submissions("grid")
    assert len(submission["arrays"]) == arrays
    assert len(place.queue()) == jobs
    again = place.dfqbench("submit", config, "--profile", profile)
    assert (again.code, again.out.splitlines()[-1]) == (0, "nothing to submit")

    running = []

    def through() -> bool:
        running.append(list(place.queue().values()).count("RUNNING"))
        return not place.left()

    place.wait("all jobs are through", through)
    assert max(running) <= 2, running  # on a busy machine short jobs can pass between two looks
    expected, table = reference("grid")
    assert numbers(place.results()) == expected, place.logs()
    assert len(expected) == 24
    assert without_seconds(place.dfqbench("table", config).out) == table
    # nothing ran twice
    assert sum(log.read_text().count("started") for log in place.folder.glob("results/runs/*/log.txt")) == 24
    status = place.dfqbench("status", config)
    assert status.out.splitlines()[-1] == "24 cells: 24 done"
    jobs_of_results = {result["provenance"]["slurm_job"] for result in place.results().values()}
    assert len(jobs_of_results) == jobs
