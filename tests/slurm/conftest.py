"""A real one-node Slurm for the tests of this folder, brought up once per session."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from place import SWEEPS, Place, numbers, without_seconds

SCRIPTS = Path(__file__).parents[2] / "slurm" / "test_cluster"


def needs_slurm(*more: str) -> None:
    """Skips where there is no Slurm; where there must be one, as in CI, that is a failure."""
    missing = [program for program in ("slurmctld", "slurmd", "sbatch", *more) if shutil.which(program) is None]
    why = f"{', '.join(missing)} not installed" if missing else "root is needed" if os.geteuid() else ""
    if why and os.environ.get("DFQBENCH_REQUIRE_SLURM"):
        pytest.fail(f"DFQBENCH_REQUIRE_SLURM is set, and no Slurm can be brought up: {why}")
    if why:
        pytest.skip(f"no Slurm can be brought up here: {why} (slurm/test_cluster/install.sh)")


def bring_up(folder: Path, *words: str) -> Iterator[dict[str, str]]:
    # daemons keep what they inherit open: a pipe would never end
    with open(folder / "up.txt", "w") as output:
        done = subprocess.run([str(SCRIPTS / "up.sh"), str(folder / "cluster"), *words], stdout=output, stderr=output, timeout=180)
    assert done.returncode == 0, (folder / "up.txt").read_text()
    yield {"SLURM_CONF": str(folder / "cluster" / "slurm.conf")}
    subprocess.run([str(SCRIPTS / "down.sh"), str(folder / "cluster")], check=True, capture_output=True, timeout=120)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment that leads to a cluster without accounting."""
    needs_slurm()
    yield from bring_up(tmp_path_factory.mktemp("slurm"))


@pytest.fixture(scope="session")
def accounting_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """One with accounting, whose job arrays hold two tasks at most."""
    needs_slurm("slurmdbd", "mariadbd")
    yield from bring_up(tmp_path_factory.mktemp("slurmdbd"), "--accounting", "--array-size", "2")


@pytest.fixture
def place(tmp_path: Path, tiny_teacher: str, cluster: dict[str, str]) -> Iterator[Place]:
    """A folder of its own on the cluster; whatever is left in the queue at the end is cancelled."""
    here = Place(tmp_path, tiny_teacher, cluster)
    yield here
    here.clear()


@pytest.fixture(scope="session")
def limited(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: str, cluster: dict[str, str]) -> Iterator[Place]:
    """A cell whose job has too little time for it, submitted early, since it takes over a minute by nature: Slurm counts in minutes.

    Slurm looks at its jobs every 30 s and warns up to 30 s early, so it is told to save 30 to 60 s after each start; 60 steps take 66 s asleep alone.
    The other minute is what it may take to save and to go back into the queue on a machine where all these tests run at once.
    """
    here = Place(tmp_path_factory.mktemp("limited"), tiny_teacher, cluster)
    config = here.slow_sweep("limited", seeds=[0])
    profile = here.profile("limited", time=2, save_seconds=60)
    sent = here.dfqbench("submit", config, "--profile", profile, PAUSE="1.1")
    assert sent.code == 0, sent.err
    yield here
    here.clear()


@pytest.fixture
def accounting_place(tmp_path: Path, tiny_teacher: str, accounting_cluster: dict[str, str]) -> Iterator[Place]:
    here = Place(tmp_path, tiny_teacher, accounting_cluster)
    yield here
    here.clear()


@pytest.fixture
def no_cluster(tmp_path: Path, tiny_teacher: str) -> Place:
    """A folder on a machine without Slurm's commands."""
    bare = os.pathsep.join(p for p in os.environ["PATH"].split(os.pathsep) if not (Path(p) / "sbatch").exists())
    return Place(tmp_path, tiny_teacher, {"PATH": bare})


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: str) -> Callable[[str], tuple[dict[Any, Any], str]]:
    """What `dfqbench run` makes of a sweep, and its table; each is run once."""
    known: dict[str, tuple[dict[Any, Any], str]] = {}

    def run(name: str) -> tuple[dict[Any, Any], str]:
        if name not in known:
            here = Place(tmp_path_factory.mktemp(name), tiny_teacher, {"PAUSE": "0"})
            config = SWEEPS[name](here)
            done = here.dfqbench("run", config, "--threads", 1)
            assert done.code == 0, done.out + done.err
            known[name] = numbers(here.results()), without_seconds(here.dfqbench("table", config).out)
        return known[name]

    return run
