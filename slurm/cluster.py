"""What Slurm says: its queue, its limits, its accounting where there is one. Every question has a time limit; no answer is an answer."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from dfqbench.errors import UserError
from dfqbench.store.environment import PYTHON, SLURM, environment_without

TIMEOUT_S = 30.0
SUBMIT_TIMEOUT_S = 180.0  # sbatch itself tries again where its controller is busy
LATE_S = (1.0, 4.0)  # between looks for a job whose submission had no clear answer: a busy controller may take it late; chosen here
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


class NotTaken(UserError):
    """The cluster has not taken a job."""


class MaybeTaken(UserError):
    """Whether the cluster has taken a job cannot be told."""


def _ask(*words: str, timeout: float = TIMEOUT_S) -> str:
    """A command's standard output. The user's own defaults for Slurm's commands do not reach it. Raises NoAnswer."""
    environment = environment_without(SLURM, PYTHON)
    try:
        done = subprocess.run(words, capture_output=True, encoding="utf-8", errors="replace", timeout=timeout, env=environment)
    except FileNotFoundError:
        raise NoAnswer(f"{words[0]} is not on PATH") from None
    except OSError as error:
        raise NoAnswer(f"{words[0]}: {error.strerror}") from None
    except subprocess.TimeoutExpired:
        raise NoAnswer(f"{words[0]} did not answer within {timeout:g} s") from None
    if done.returncode:
        raise NoAnswer(f"{words[0]}: {first_error(done.stderr) or f'exit status {done.returncode}'}")
    return done.stdout


def first_error(text: str) -> str:
    """The telling line of what a Slurm command said on standard error."""
    lines = [re.sub(r"^\w+: (error: )?", "", line).strip() for line in text.splitlines() if line.strip()]
    return "; ".join(dict.fromkeys(lines))


def queue() -> dict[str, Job]:
    """This user's jobs by id, those that ended minutes ago included as long as the controller knows them. Raises NoAnswer.

    Lines that are not of the format that is asked for, such as a site's notices, are passed over.
    """
    answer = _ask("squeue", "--noheader", "--array", "--states=all", f"--user={os.getuid()}", "--format=%F|%K|%T|%N|%j|%r")
    jobs = {}
    for line in answer.splitlines():
        if found := re.fullmatch(r"(\d+)\|(N/A|\d+)\|([A-Z_]+)\|([^|]*)\|([^|]*)\|(.*)", line.strip()):
            number, task, state, node, name, reason = found.groups()
            job_id = number if task == "N/A" else f"{number}_{task}"
            jobs[job_id] = Job(job_id, name, state, "" if reason == "None" else reason, node)
    return jobs


def sbatch(script: Path, name: str) -> str:
    """Submits a script whose job is called `name`, as no other is. Returns the job's number.

    Where the answer is no number (the command failed, or is a site's own that prints more or something else), the queue is asked for the name.
    Raises NotTaken, and MaybeTaken where that cannot be told.
    """
    try:
        answer = _ask("sbatch", "--parsable", str(script), timeout=SUBMIT_TIMEOUT_S)
    except NoAnswer as error:
        why, refused = str(error), not re.search("did not answer|timed out|unexpected message|zero bytes", str(error), re.IGNORECASE)
    else:
        numbers = {found[1] for line in answer.splitlines() if (found := re.fullmatch(r"(\d+)(;[^;\s]+)?", line.strip()))}
        if len(numbers) == 1:
            return numbers.pop()
        why, refused = f"sbatch answered {' '.join(answer.split())[:200]!r}, which names no job", False
    try:
        for pause in (0.0,) if refused else (0.0, *LATE_S):
            time.sleep(pause)
            # a job that was refused has a record too, which never had a node
            if taken := sorted({job.id.split("_")[0] for job in queue().values() if job.name == name and (job.live or job.node)}, key=int):
                with contextlib.suppress(NoAnswer):  # a site's own sbatch may have tried several times
                    cancel(taken[1:])
                return taken[0]
    except NoAnswer as error:
        raise MaybeTaken(f"{why}; whether the job was taken cannot be told: {error}") from None
    if refused:
        raise NotTaken(why)
    raise MaybeTaken(f"{why}; no job {name} is in the queue so far")


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
        if told := re.fullmatch(r"(\d+(?:_\d+)?)\|([A-Z_]+)(?: by [^|]*)?\|([^|]*)", line.strip()):  # other lines are a site's notices
            job_id, state, nodes = told.groups()
            found[job_id] = state + (f" on {nodes}" if nodes and nodes != "None assigned" else "")
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
