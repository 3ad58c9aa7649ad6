"""Clusters whose commands are wrapped by their site, and users whose environment is set for other tools, on a real Slurm."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from place import Place

NOTICES = "echo; echo 'NOTICE: maintenance on Monday | see https://intranet'; echo ' '; echo '3 jobs|may|RUN'; echo 'CLUSTER: main'"
SBATCH = {
    "a banner that counts jobs": 'echo "you may queue job 3 of 50"; exec REAL "$@"',
    "a banner with numbers of its own": 'echo 3; echo 50; exec REAL "$@"',
    "its own words instead of the number": 'REAL "$@" >/dev/null && echo "Submitted batch job, thank you"',
    "the number alone": 'REAL "$@" | grep -o "[0-9]*"',
    "the number and the cluster": 'echo "$(REAL "$@");main"',
    "sbatch as it answers without --parsable": 'shift; exec REAL "$@"',
    "a failure after the job was taken": 'REAL "$@" >/dev/null; echo "sbatch: error: Socket timed out on send/recv operation" >&2; exit 1',
    "a second try, though the first was taken": 'REAL "$@"; exec REAL "$@"',
}


def wrapped(place: Place, **scripts: str) -> dict[str, str]:
    """The environment in which commands of these names are a site's own; REAL in a script is Slurm's."""
    folder = place.folder / "site"
    folder.mkdir(exist_ok=True)
    for name, script in scripts.items():
        real = shutil.which(name)
        assert real is not None
        (folder / name).write_text(f"#!/bin/sh\n{script.replace('REAL', real)}\n")
        (folder / name).chmod(0o755)
    return {"PATH": f"{folder}{os.pathsep}{place.environment.get('PATH', os.environ['PATH'])}"}


@pytest.fixture
def held(place: Place) -> tuple[Path, Path]:
    """A sweep of two bundles, and a profile whose jobs wait until they are released."""
    return place.sweep("held", seeds=[0, 1]), place.profile("held", sbatch={"hold": True})


@pytest.mark.slow
@pytest.mark.parametrize("how", SBATCH)
def test_whatever_sbatch_answers_the_job_is_known_and_not_sent_twice(place: Place, held: tuple[Path, Path], how: str) -> None:
    config, profile = held
    site = wrapped(place, sbatch=SBATCH[how])
    sent = place.dfqbench("submit", config, "--profile", profile, **site)
    assert (sent.code, sent.err) == (0, "")
    (submission,) = place.submissions("held")
    job = submission["arrays"][0]["job"]
    assert sorted(place.left()) == [f"{job}_0", f"{job}_1"]
    again = place.dfqbench("submit", config, "--profile", profile, **site)
    assert (again.code, again.out.splitlines()[-1]) == (0, "nothing to submit")
    # and the jobs have what they need to run
    assert all((place.folder / f"results/sweeps/held/{submission['token']}/jobs/{job}_{task}_submitted.pkl").is_file() for task in (0, 1))


@pytest.mark.slow
@pytest.mark.parametrize("script", ["echo 'please read the news of Monday, job 3'", "echo 'slurm_load_jobs: Socket timed out' >&2; exit 1"])
def test_an_answer_that_names_no_job_is_told_and_submitted_again(place: Place, held: tuple[Path, Path], script: str) -> None:
    config, profile = held
    sent = place.dfqbench("submit", config, "--profile", profile, **wrapped(place, sbatch=script))
    assert (sent.code, sent.out, len(sent.err.splitlines())) == (2, "", 1), sent.err
    assert "squeue --name=held-" in sent.err
    assert not place.left()
    assert place.dfqbench("submit", config, "--profile", profile).code == 0
    assert len(place.left()) == 2


@pytest.mark.slow
def test_a_queue_that_falls_silent_after_sbatch_does_not_hide_what_it_took(place: Place, held: tuple[Path, Path]) -> None:
    """sbatch takes the job and fails, and the queue does not answer: nobody says that nothing was submitted, and nothing is sent twice."""
    config, profile = held
    site = wrapped(place, sbatch=f"touch {place.folder}/silent; " + SBATCH["a failure after the job was taken"])
    site |= wrapped(place, squeue=f'[ ! -e {place.folder}/silent ] || {{ echo "squeue: error: no answer" >&2; exit 1; }}; exec REAL "$@"')
    sent = place.dfqbench("submit", config, "--profile", profile, **site)
    assert (sent.code, sent.out) == (2, "")
    assert "whether the job was taken cannot be told" in sent.err
    assert len(place.left()) == 2
    again = place.dfqbench("submit", config, "--profile", profile)
    assert (again.code, again.out.splitlines()[-1]) == (0, "nothing to submit")


@pytest.mark.slow
def test_notices_of_a_site_are_not_taken_for_jobs(place: Place, held: tuple[Path, Path]) -> None:
    config, profile = held
    site = wrapped(place, squeue=f'{NOTICES}; REAL "$@"; {NOTICES}')
    assert place.dfqbench("submit", config, "--profile", profile, **site).code == 0
    again = place.dfqbench("submit", config, "--profile", profile, **site)
    assert (again.code, again.out.splitlines()[-1], again.err) == (0, "nothing to submit", "")
    assert place.dfqbench("status", config, **site).out.splitlines()[-1] == "4 cells: 4 queued"
    assert "2 jobs of held" in place.dfqbench("cancel", config, **site).out


STRANGE = {
    "SQUEUE_PARTITION": "urgent",
    "SQUEUE_ACCOUNT": "nobodys",
    "SQUEUE_STATES": "RUNNING",
    "SQUEUE_NAMES": "other",
    "SQUEUE_USERS": "nobody",
    "SQUEUE_FORMAT": "%i",
    "SQUEUE_SORT": "i",
    "SACCT_FORMAT": "user",
    "SCANCEL_NAME": "other",
    "SCANCEL_STATE": "RUNNING",
    "SCANCEL_PARTITION": "urgent",
    "SBATCH_PARTITION": "nowhere",
    "SBATCH_ACCOUNT": "nobodys",
    "SBATCH_ARRAY_INX": "0-7",
    "SBATCH_EXPORT": "NONE",
    "SBATCH_TIMELIMIT": "1",
    "SLURM_BITSTR_LEN": "1",
    "LOGNAME": "nobody",
    "USER": "nobody",
    "LNAME": "nobody",
    "USERNAME": "nobody",
}


@pytest.mark.slow
def test_the_users_own_defaults_for_slurm_hide_no_job_and_move_none(place: Place, held: tuple[Path, Path]) -> None:
    config, profile = held
    sent = place.dfqbench("submit", config, "--profile", profile, **STRANGE)
    assert (sent.code, sent.err) == (0, "")
    assert len(place.left()) == 2
    again = place.dfqbench("submit", config, "--profile", profile, **STRANGE)
    assert (again.code, again.out.splitlines()[-1]) == (0, "nothing to submit")
    assert place.dfqbench("status", config, **STRANGE).out.splitlines()[-1] == "4 cells: 4 queued"
    assert "2 jobs of held" in place.dfqbench("cancel", config, **STRANGE).out
    place.wait("they are gone", lambda: not place.left())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("export", "environment"),
    [(None, {"SBATCH_EXPORT": "NONE", "SLURM_EXPORT_ENV": "NONE", "SRUN_CPUS_PER_TASK": "7"}), ("NONE", {}), ("LC_ALL=C", {})],
)
def test_a_job_lives_without_the_variables_of_its_user(place: Place, export: str | None, environment: dict[str, str]) -> None:
    config = place.sweep("bare", methods=["round"])
    profile = place.profile("bare", **({"sbatch": {"export": export}} if export else {}))
    sent = place.dfqbench("submit", config, "--profile", profile, **environment)
    assert sent.code == 0, sent.err
    place.wait("it is through", lambda: not place.left())
    assert len(place.results()) == 2, place.logs()
    assert set(place.queue().values()) == {"COMPLETED"}


@pytest.mark.slow
def test_a_job_of_another_cluster_is_refused_with_what_to_do(place: Place, held: tuple[Path, Path]) -> None:
    done = place.dfqbench("submit", held[0], "--profile", place.profile("far", sbatch={"clusters": "far"}))
    assert (done.code, len(done.err.splitlines())) == (2, 1)
    assert "SLURM_CLUSTERS" in done.err
