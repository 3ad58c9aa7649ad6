"""What is submitted, shown and cancelled on a real Slurm, with jobs that are held so that none starts."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from place import Place


@pytest.fixture
def held(place: Place) -> tuple[Path, Path]:
    """A sweep of four bundles, and a profile whose jobs wait until they are released."""
    return place.sweep("held", seeds=[0, 1, 2, 3]), place.profile("held", sbatch={"hold": True})


def test_cancel_ends_the_jobs_of_its_sweep_and_only_those(place: Place, held: tuple[Path, Path]) -> None:
    config, profile = held
    other = place.sweep("other", seeds=[7, 8])
    assert place.dfqbench("submit", config, "--profile", profile).code == 0
    assert place.dfqbench("submit", other, "--profile", profile).code == 0
    shown = place.dfqbench("status", config).out
    assert shown.count(" queued ") == 8
    assert "(JobHeldUser)" in shown
    assert "4 jobs of held" in place.dfqbench("cancel", config).out
    place.wait("they are gone", lambda: len(place.left()) == 2)
    assert place.dfqbench("status", config).out.count("missing  ") == 8
    assert place.dfqbench("status", other).out.splitlines()[-1] == "4 cells: 4 queued"
    assert "no job of held" in place.dfqbench("cancel", config).out
    again = place.dfqbench("submit", config, "--profile", profile)
    assert "8 cells, 4 processes, 4 jobs" in again.out


def test_cells_of_another_sweep_are_not_queued_twice(place: Place, held: tuple[Path, Path]) -> None:
    config, profile = held
    assert place.dfqbench("submit", config, "--profile", profile).code == 0
    more = place.sweep("more", seeds=[3, 4])
    sent = place.dfqbench("submit", more, "--profile", profile)
    assert "2 of 4 cells: in the queue or running" in sent.out
    assert "2 cells, 1 process, 1 job" in sent.out


def test_what_runs_is_what_was_submitted(place: Place) -> None:
    """The config is edited while its jobs wait, and a plug-in too: the first changes nothing, the second is refused and told."""
    config, profile = place.slow_sweep("edited", seeds=[0], bits=["w4a4"]), place.profile("edited", sbatch={"hold": True})
    assert place.dfqbench("submit", config, "--profile", profile).code == 0
    (submission,) = place.submissions("edited")
    place.slow_sweep("edited", seeds=[5], bits=["w8a8"])
    (place.folder / "slow.py").write_text((place.folder / "slow.py").read_text() + "\n# edited\n")
    place.ask("scontrol", "release", submission["arrays"][0]["job"])
    place.wait("it is through", lambda: not place.left())
    assert not place.results()
    assert "is not what was submitted: submit again" in place.logs()
    place.slow_sweep("edited", seeds=[0], bits=["w4a4"])
    shown = place.dfqbench("status", config).out
    assert " lost " in shown
    assert "could not run" in shown
    (place.folder / "slow.py").write_text((place.folder / "slow.py").read_text().removesuffix("\n# edited\n"))
    assert place.dfqbench("submit", config, "--profile", profile).code == 0
    second = next(s for s in place.submissions("edited") if s["token"] != submission["token"])
    place.slow_sweep("edited", seeds=[5], bits=["w8a8"])
    place.ask("scontrol", "release", second["arrays"][0]["job"])
    place.wait("it is through", lambda: not place.left())
    assert [key[:2] for key in place.results()] == [(0, "w4a4")], place.logs()


def test_the_queue_is_filled_up_to_the_profiles_limit(place: Place, held: tuple[Path, Path]) -> None:
    config = held[0]
    profile = place.profile("few", sbatch={"hold": True}, max_queued=3)
    sent = place.dfqbench("submit", config, "--profile", profile)
    assert "2 cells wait for a later submit" in sent.out
    assert len(place.left()) == 3
    sent = place.dfqbench("submit", config, "--profile", profile)
    assert (sent.code, sent.out.splitlines()[-1]) == (0, "nothing to submit")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"partition": "nowhere"}, "invalid partition specified: nowhere"),
        ({"sbatch": {"nonsense": 1}}, "nonsense"),
        ({"gpus": 9}, "Requested node configuration is not available"),
    ],
)
def test_what_the_cluster_refuses_is_one_line_and_nothing_is_submitted(place: Place, settings: dict[str, object], said: str) -> None:
    done = place.dfqbench("submit", place.sweep("refused"), "--profile", place.profile("refused", **settings))
    assert (done.code, done.out) == (2, "")
    assert len(done.err.splitlines()) == 1, done.err
    assert said in done.err
    assert "nothing is submitted" in done.err
    assert not list((place.folder / "results" / "sweeps").glob("refused*"))


def test_a_dry_run_prints_what_would_be_submitted_and_writes_nothing(place: Place, held: tuple[Path, Path]) -> None:
    config, _ = held
    profile = place.profile("dry", setup=["module load cuda"], account="me", array_size=2, parallel=3, gpus=2, gpu_type="a100", memory="4 GB")
    done = place.dfqbench("submit", config, "--profile", profile, "--dry-run")
    assert done.code == 0, done.err
    scripts = done.out.split("#!/bin/bash")[1:]
    assert len(scripts) == 1, "a job has two GPUs, so four bundles are two jobs, and those one array"
    for line in ("--array=0-1%2", "--account=me", "--gpus-per-node=a100:2", "--mem=4G", "--signal=USR2@20", "--time=30", "--requeue"):
        assert f"#SBATCH {line}" in scripts[0]
    assert "\nmodule load cuda\n" in scripts[0]
    assert "nothing is submitted" in done.out
    assert "no figure is known" in done.out
    assert not (place.folder / "results").exists()
    # the script is one that sbatch takes
    script = place.folder / "script.sh"
    script.write_text("#!/bin/bash" + scripts[0].split("\n8 cells")[0].replace("#SBATCH --account=me\n", "").replace("a100:", ""))
    tested = subprocess.run(["sbatch", "--test-only", str(script)], env=place.environment, capture_output=True, text=True)
    assert tested.returncode == 0, tested.stderr


def test_a_killed_submit_leaves_nothing_that_a_second_one_repeats(place: Place, held: tuple[Path, Path]) -> None:
    """Killed after the cluster took the jobs and before their number was noted: they are found by their name."""
    config, profile = held
    assert place.dfqbench("submit", config, "--profile", profile).code == 0
    (file,) = place.folder.glob("results/sweeps/held/*/submission.json")
    record = json.loads(file.read_text())
    record["arrays"][0]["job"] = None
    file.write_text(json.dumps(record))
    lock = place.folder / "results" / "sweeps" / ".submitting.json"
    lock.write_text(json.dumps({"host": os.uname().nodename, "pid": 2**22 + 1, "started": "1"}))
    again = place.dfqbench("submit", config, "--profile", profile)
    assert (again.code, again.out.splitlines()[-1]) == (0, "nothing to submit")
    assert place.dfqbench("status", config).out.count(" queued ") == 8
