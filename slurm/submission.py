"""Submissions as files: what was submitted, as which jobs, with which cells, and what became of each job.

<results>/sweeps/<name>/<token>/submission.json   jobs and their cells, written before the cluster is asked, completed with its job numbers
                                sweep.yaml        the config as it was then: later edits of the file change nothing
                                jobs/             submitit's files: scripts, logs
                                tasks/<n>.json    how often a job was started, and its last words
"""

from __future__ import annotations

import contextlib
import hashlib
import secrets
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from dfqbench.errors import UserError
from dfqbench.files import read_json, write_atomically, write_json
from dfqbench.store import Lease, Store, kept_alive
from dfqbench.yaml_file import write_yaml
from dfqbench_slurm.cluster import Job

# one job: its lanes run side by side, each a process that works through its bundles, each of those a list of cell ids
Lane = list[list[str]]
Task = list[Lane]


@dataclass
class Array:
    """Tasks `first` to `first + count - 1` as one job array, found in the queue by its name even before its number is noted."""

    name: str
    first: int
    count: int
    job: str | None = None


@dataclass
class Submission:
    """One call of `submit`."""

    token: str
    sweep: str
    config: str  # digest of the file that was submitted
    profile: str
    settings: dict[str, Any]
    results: str
    cwd: str
    plugins: dict[str, str]  # file -> sha256
    tasks: list[Task]
    arrays: list[Array] = field(default_factory=list)
    retry_failed: bool = False
    time: float = field(default_factory=time.time)
    cancelled: float | None = None

    @property
    def folder(self) -> Path:
        return Path(self.results) / "sweeps" / self.sweep / self.token

    @cached_property
    def task_of(self) -> dict[str, int]:
        """By cell."""
        return {cell: number for number, task in enumerate(self.tasks) for lane in task for bundle in lane for cell in bundle}

    def job_of(self, task: int, jobs: dict[str, Job]) -> str | None:
        """A task's job number, if the cluster ever gave it one."""
        for array in self.arrays:
            if array.first <= task < array.first + array.count:
                number = array.job or next((job.id.split("_")[0] for job in jobs.values() if job.name == array.name), None)
                return number and (f"{number}_{task - array.first}" if array.count > 1 else number)
        return None

    def jobs_in(self, jobs: dict[str, Job]) -> list[Job]:
        """Those of its jobs that the cluster still has to do with."""
        names = {array.name for array in self.arrays}
        return [job for job in jobs.values() if job.live and job.name in names]

    def write(self) -> None:
        write_json(self.folder / "submission.json", asdict(self))

    def state_of(self, task: int) -> dict[str, Any]:
        """starts, deaths (by bundle), said: its supervisor's last words."""
        with contextlib.suppress(ValueError, OSError):
            return dict(read_json(self.folder / "tasks" / f"{task}.json") or {})
        return {}

    def write_state(self, task: int, state: dict[str, Any]) -> None:
        write_json(self.folder / "tasks" / f"{task}.json", state)

    def counts(self, failure: dict[str, Any] | None) -> bool:
        """Whether a cell's failure stands, or is what this submission was asked to try again."""
        return failure is not None and not (self.retry_failed and failure.get("time", 0.0) < self.time)


def new_token() -> str:
    return secrets.token_hex(3)


def read_submission(folder: Path) -> Submission:
    """Raises ValueError or KeyError if the file is damaged, FileNotFoundError if there is none."""
    content = read_json(folder / "submission.json")
    if content is None:
        raise FileNotFoundError(folder / "submission.json")
    try:
        found = Submission(**{**content, "arrays": [Array(**array) for array in content["arrays"]]})
    except TypeError as error:
        raise ValueError(f"{folder / 'submission.json'}: {error}") from None
    # the results folder may have been moved, or be mounted elsewhere
    found.results = str(folder.parent.parent.parent.absolute())
    return found


def submissions(store: Store, sweep: str | None = None) -> list[Submission]:
    """All of a store, or of one sweep, oldest first. Damaged ones are left out: the cells themselves say what is done."""
    found = []
    for file in sorted((store.root / "sweeps").glob(f"{sweep or '*'}/*/submission.json")):
        with contextlib.suppress(ValueError, KeyError, OSError):
            found.append(read_submission(file.parent))
    return sorted(found, key=lambda submission: submission.time)


def snapshot(sweep: dict[str, Any], plugins: list[str]) -> tuple[str, dict[str, str]]:
    """A sweep as a config file without variables, and the plug-in files that it needs with their sha256."""
    files = [Path(file).expanduser().resolve() for file in [*sweep["plugins"], *plugins]]
    text = write_yaml({**sweep, "plugins": [str(file) for file in files]}, allow_unicode=True)
    return f"# written by `dfqbench submit`: what the jobs of this folder run\n{text}", {str(file): sha256(file) for file in files}


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def write_new(submission: Submission, sweep: str) -> None:
    """Raises UserError where the folder cannot be written."""
    try:
        write_atomically(submission.folder / "sweep.yaml", sweep)
        submission.write()
    except OSError as error:
        raise UserError(f"{submission.folder} cannot be written: {error.strerror}; nothing is submitted") from None


@contextlib.contextmanager
def submitting(store: Store, wait_s: float, say: Any) -> Iterator[None]:
    """At most one `submit` works on a store at a time: a second one waits for the first, and then sees what it has submitted."""
    (store.root / "sweeps").mkdir(parents=True, exist_ok=True)
    lease, deadline, told = Lease(store.root / "sweeps" / ".submitting.json"), time.monotonic() + wait_s, False
    while not lease.acquire():
        holder = lease.holder()
        if time.monotonic() > deadline:
            where = f"process {holder['pid']} on {holder['host']}" if holder else "another process"
            raise UserError(f"{where} has been submitting to {store.root} for {wait_s:.0f} s: nothing is submitted")
        if holder and not told:
            say(f"waiting for another submit (process {holder['pid']} on {holder['host']})")
            told = True
        time.sleep(0.2)
    with kept_alive([lease]):
        yield
