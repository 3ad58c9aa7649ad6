"""Submits what a sweep still lacks: as job arrays through submitit, or to worker processes on this machine; and cancels it."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dfqbench.errors import UserError, counted
from dfqbench.run.status import Status, statuses
from dfqbench.speed.estimate import Speeds, hours, in_words, read_speed_files
from dfqbench.store import Store
from dfqbench.sweep.cell import Bundle, bundles
from dfqbench_slurm import cluster
from dfqbench_slurm.cluster import Job, MaybeTaken, NoAnswer, NotTaken
from dfqbench_slurm.executor import executor_of
from dfqbench_slurm.packing import Split, pack, split
from dfqbench_slurm.profile import Profile
from dfqbench_slurm.submission import Array, Submission, new_token, snapshot, submissions, submitting, write_new
from dfqbench_slurm.supervisor import Crew, Supervisor, visible_gpus

if TYPE_CHECKING:
    from dfqbench.sweep.load import LoadedSweep

Say = Callable[[str], None]
WAIT_FOR_ANOTHER_SUBMIT_S = 300.0


@dataclass
class Plan:
    """What is to be submitted, and why the rest is not."""

    submission: Submission
    bundles: list[Bundle]
    splits: list[Split]
    skipped: dict[str, int] = field(default_factory=dict)  # reason -> cells
    waiting: int = 0  # cells beyond max_queued
    hours: str = ""
    hours_of_each: list[str] = field(default_factory=list)  # bundles of which something is known
    unread: list[str] = field(default_factory=list)  # files that should say how fast a device is, and do not

    @property
    def cells(self) -> int:
        return len(self.submission.task_of)


def make_plan(
    loaded: LoadedSweep, plugins: list[str], store: Store, profile_name: str, profile: Profile, jobs: dict[str, Job], limit: int, retry_failed: bool
) -> tuple[Plan, str]:
    """The plan, and the text of the config that its jobs will run. Writes nothing."""
    finished, _ = store.results()
    todo, skipped = _todo(loaded, store, finished, jobs, retry_failed)
    measured, unread = read_speed_files(store.speed_folders())
    speeds = Speeds(finished, profile.runs_on, measured)
    chosen = bundles(cell for cell in loaded.cells if cell.id in todo)
    tasks = pack(chosen, profile, speeds.seconds)
    room = len(tasks) if profile.max_queued is None else max(profile.max_queued - sum(job.live for job in jobs.values()), 0)
    waiting = sum(len(bundle) for task in tasks[room:] for lane in task for bundle in lane)
    tasks = tasks[:room]
    text, plugin_files = snapshot(loaded.sweep.model_dump(mode="json"), plugins)
    token = new_token()
    splits = split(len(tasks), min(profile.array_size or limit, limit), profile.parallel)
    submission = Submission(
        token=token,
        sweep=loaded.sweep.name,
        config=loaded.text_sha256,
        profile=profile_name,
        settings=profile.model_dump(mode="json"),
        results=str(store.root.absolute()),
        cwd=os.getcwd(),
        plugins=plugin_files,
        tasks=tasks,
        arrays=[Array(f"{loaded.sweep.name}-{token}.{i}", part.first, part.count) for i, part in enumerate(splits)],
        retry_failed=retry_failed,
    )
    each = [f"{bundle}: {expected}" for bundle in chosen if (expected := in_words(bundle, [speeds]))]
    return Plan(submission, chosen, splits, skipped, waiting, hours(chosen, speeds, profile.side_by_side), each, unread), text


def _todo(
    loaded: LoadedSweep, store: Store, finished: list[dict[str, Any]], jobs: dict[str, Job], retry_failed: bool
) -> tuple[set[str], dict[str, int]]:
    """The cells to submit, and for the others how many there are for each reason."""
    waiting_in = {}
    for submission in submissions(store):
        live = {job.id for job in submission.jobs_in(jobs)}
        waiting_in.update({cell: True for cell, task in submission.task_of.items() if submission.job_of(task, jobs) in live})
    todo, skipped = set(), dict[str, int]()
    for cell_id, state in statuses(loaded.cells, store, finished).items():
        reason = ""
        if state.status is Status.DONE:
            reason = "done"
        elif cell_id in waiting_in:
            reason = "in the queue or running"
        elif state.status is Status.RUNNING and not _job_has_ended(store, cell_id, jobs):
            reason = "running elsewhere"
        elif state.status is Status.FAILED and not retry_failed:
            reason = "failed (--retry-failed tries them again)"
        if reason:
            skipped[reason] = skipped.get(reason, 0) + 1
        else:
            todo.add(cell_id)
    return todo, skipped


def _job_has_ended(store: Store, cell_id: str, jobs: dict[str, Job]) -> bool:
    """Whether the claim on a cell is that of a job which is not in the queue any more: its node died, and the claim will end soon."""
    job = (store.lease(cell_id).holder() or {}).get("job")
    return bool(job) and not (job in jobs and jobs[job].live)


def check_slurm() -> None:
    """Raises UserError where nothing can be submitted from."""
    for program in ("sbatch", "srun", "squeue", "scontrol"):
        if shutil.which(program) is None:
            raise UserError(f"{program} is not on PATH: submit from a login node of a Slurm cluster, or run the jobs here with --local")


def submit(
    loaded: LoadedSweep, plugins: list[str], store: Store, profile_name: str, profile: Profile, retry_failed: bool, say: Say
) -> tuple[Plan, UserError | None]:
    """Submits what is missing, not queued and not running. Returns what it did; with an error if the cluster took only the first arrays of several.

    Raises UserError, with nothing submitted, where Slurm or the folder cannot be used.
    """
    limit = cluster.array_limit()
    with submitting(store, WAIT_FOR_ANOTHER_SUBMIT_S, say):
        jobs = cluster.queue()
        _release(store, loaded.sweep.name, jobs, say)
        plan, text = make_plan(loaded, plugins, store, profile_name, profile, jobs, limit, retry_failed)
        if not plan.submission.tasks:
            return plan, None
        write_new(plan.submission, text)
        return plan, _send(plan, profile)


def _release(store: Store, sweep: str, jobs: dict[str, Job], say: Say) -> None:
    """Jobs that Slurm holds because a node was lost while they came up: nobody meant them to wait."""
    held = [job for one in submissions(store, sweep) for job in one.jobs_in(jobs) if job.reason == cluster.LAUNCH_FAILED]
    try:
        cluster.release(job.id for job in held)
    except NoAnswer as error:
        say(f"{', '.join(job.id for job in held)}: held after a failed launch, and cannot be released: {error}")
    else:
        if held:
            say(f"released {', '.join(job.id for job in held)}: held after a failed launch")


def _send(plan: Plan, profile: Profile) -> UserError | None:
    submission = plan.submission
    for array, part in zip(submission.arrays, plan.splits, strict=True):
        supervisors = [Supervisor(submission.folder, task) for task in range(part.first, part.first + part.count)]
        after = submission.arrays[part.after].job if part.after is not None else None
        try:
            sent = executor_of(submission.folder, array, part, profile, after).submit_array(supervisors)
        except NotTaken as error:
            return _refused(plan, array, f"the cluster refused the jobs: {str(error).removeprefix('sbatch: ')}")
        except MaybeTaken as error:
            return _unsure(plan, array, str(error))
        except OSError as error:
            return _refused(plan, array, f"{submission.folder}: {error.strerror}")
        array.job = sent[0].job_id.split("_")[0]
        submission.write()
    return None


def _unsure(plan: Plan, array: Array, why: str) -> UserError:
    """What was submitted stays noted, this array by its name alone: if its jobs are in the queue, they are found by it."""
    _keep(plan.submission, plan.submission.arrays.index(array) + 1)
    if array is plan.submission.arrays[0]:
        raise UserError(f"{why}; if `squeue --name={array.name}` shows it later, it is found by that name; else submit again")
    return UserError(f"{why}; the rest is not submitted: submit again")


def _keep(submission: Submission, arrays: int) -> int:
    """Cuts off what comes behind that many arrays. Returns how many cells that were."""
    submission.arrays = submission.arrays[:arrays]
    kept = sum(array.count for array in submission.arrays)
    lost = sum(len(bundle) for task in submission.tasks[kept:] for lane in task for bundle in lane)
    submission.tasks = submission.tasks[:kept]
    submission.__dict__.pop("task_of", None)
    submission.write()
    return lost


def _refused(plan: Plan, refused: Array, why: str) -> UserError:
    """Takes back what was not submitted. Raises UserError if that is everything."""
    submission = plan.submission
    if refused is submission.arrays[0]:
        shutil.rmtree(submission.folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            submission.folder.parent.rmdir()
        raise UserError(f"{why}; nothing is submitted")
    lost = _keep(submission, submission.arrays.index(refused))
    kept = len(submission.tasks)
    return UserError(f"{counted(kept, 'job')} submitted, the rest ({counted(lost, 'cell')}) not: {why}; submit again when there is room")


def scripts(plan: Plan, profile: Profile) -> Iterator[str]:
    """The sbatch script of each array, as it would be submitted."""
    for array, part in zip(plan.submission.arrays, plan.splits, strict=True):
        executor = executor_of(
            plan.submission.folder, array, part, profile, "JOB_OF_" + plan.submission.arrays[part.after].name if part.after is not None else None
        )
        if part.count > 1:
            executor.parameters["map_count"] = part.count
        yield executor._make_submission_file_text(executor._submitit_command_str, "")


def run_here(plan: Plan, text: str, profile: Profile, say: Say) -> tuple[str, Crew]:
    """The same plan in worker processes of this machine, as many at a time as its GPUs or cores have room for. Returns how it went."""
    import torch

    gpus = [] if profile.runs_on == "cpu" else visible_gpus() or [str(i) for i in range(torch.cuda.device_count())]
    if profile.runs_on == "cuda" and not gpus:
        raise UserError("this profile asks for GPUs, and none is visible here: take a profile without, like --profile cpu")
    slots = len(gpus) * profile.side_by_side if gpus else max((os.cpu_count() or 1) // profile.threads, 1)
    plan.submission.arrays = []
    write_new(plan.submission, text)
    lanes = [lane for task in plan.submission.tasks for lane in task]
    slots = min(slots, len(lanes))
    say(counted(len(lanes), "process") + (f", {slots} at a time" if len(lanes) > slots else ""))
    crew = Crew(plan.submission, lanes, gpus, {}, slots)
    with crew.listening(also=(signal.SIGINT, signal.SIGUSR2)):
        said = crew.run()
    return said, crew


def cancel(store: Store, sweep: str) -> int:
    """Ends the jobs of a sweep, and no others. Returns how many there were. Raises UserError where Slurm does not answer."""
    mine = submissions(store, sweep)
    jobs = cluster.queue() if mine else {}
    ended: set[str] = set()
    for submission in mine:
        live = submission.jobs_in(jobs)
        if not live:
            continue
        submission.cancelled = time.time()
        submission.write()
        ended |= {job.id for job in live}
    try:
        cluster.cancel({job.split("_")[0] for job in ended})
    except NoAnswer:
        now = cluster.queue()  # one that ended by itself in the meantime is no trouble
        left = sorted(job for job in ended if job in now and now[job].pending)
        if left:
            raise
    return len(ended)
