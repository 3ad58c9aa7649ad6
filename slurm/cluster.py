"""What Slurm says: its queue, its limits, its accounting where there is one. Every question has a time limit; no answer is an answer."""

from __future__ import annotations

import getpass
import re
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass

from dfqbench.errors import UserError

TIMEOUT_S = 30.0
ENDED = ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED", "TIMEOUT")
LAUNCH_FAILED = "launch failed requeued held"  # a node was lost while a job came up; Slurm then waits for somebody to release it
PENDING = ("PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD")


@dataclass(frozen=True)
class Job:
    """One job, or one task of a job array, in the queue. `reason` says why a pending job waits."""

    id: str  # 12, or 12_3 in an array
    name: str
    state: str
    reason: str
    node: str

    @property
    def live(self) -> bool:
        return self.state not in ENDED

    @property
    def pending(self) -> bool:
        return self.state in PENDING


class NoAnswer(UserError):
    """Slurm's commands are not here, or its controller does not answer."""


def _ask(*words: str) -> str:
    """A command's standard output. Raises NoAnswer."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=TIMEOUT_S)
    except FileNotFoundError:
        raise NoAnswer(f"{words[0]} is not on PATH") from None
    except OSError as error:
        raise NoAnswer(f"{words[0]}: {error.strerror}") from None
    except subprocess.TimeoutExpired:
        raise NoAnswer(f"{words[0]} did not answer within {TIMEOUT_S:g} s") from None
    if done.returncode:
        raise NoAnswer(f"{words[0]}: {first_error(done.stderr) or f'exit status {done.returncode}'}")
    return done.stdout


def first_error(text: str) -> str:
    """The telling line of what a Slurm command said on standard error."""
    lines = [re.sub(r"^\w+: (error: )?", "", line).strip() for line in text.splitlines() if line.strip()]
    return "; ".join(dict.fromkeys(lines))


def queue() -> dict[str, Job]:
    """This user's jobs by id, those that ended minutes ago included as long as the controller knows them. Raises NoAnswer."""
    lines = _ask("squeue", "--noheader", "--array", "--states=all", f"--user={getpass.getuser()}", "--format=%F|%K|%T|%N|%j|%r").splitlines()
    jobs = {}
    for line in lines:
        number, task, state, node, name, reason = line.split("|", 5)
        job_id = number if task == "N/A" else f"{number}_{task}"
        jobs[job_id] = Job(job_id, name, state, "" if reason == "None" else reason, node)
    return jobs


def array_limit() -> int:
    """How many tasks a job array may have. Raises NoAnswer."""
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", _ask("scontrol", "show", "config"), re.MULTILINE)
    return max(int(found[1]), 1) if found else 1001


def endings(job_ids: Iterable[str]) -> dict[str, str]:
    """How jobs ended, by id, for people: `NODE_FAIL on n12`. Empty where the cluster keeps no accounts."""
    numbers = sorted({job_id.split("_")[0] for job_id in job_ids})
    if not numbers:
        return {}
    words = ("sacct", "--noheader", "--allocations", "--parsable2", "--format=JobID,State,NodeList", f"--jobs={','.join(numbers)}")
    try:
        lines = _ask(*words).splitlines()
    except NoAnswer:
        return {}
    found = {}
    for line in lines:
        job_id, state, nodes = line.split("|")[:3]
        found[job_id] = state.split(" by ")[0] + (f" on {nodes}" if nodes and nodes != "None assigned" else "")
    return found


def release(job_ids: Iterable[str]) -> None:
    """Lets held jobs start. Raises NoAnswer."""
    for job_id in job_ids:
        _ask("scontrol", "release", job_id)


def cancel(job_ids: Iterable[str]) -> None:
    """Ends jobs: workers are told to save, and have the cluster's KillWait (30 s by default) to do so. Raises NoAnswer."""
    ids = sorted(job_ids)
    if ids:
        _ask("scancel", *ids)
