"""Submits what a sweep still lacks: as job arrays through submitit, or to worker processes on this machine; and cancels it."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfqbench.errors import UserError, counted
from dfqbench.run.status import Status, statuses
from dfqbench.speed.estimate import Speeds, hours, in_words, read_speed_files
from dfqbench.store import Store
from dfqbench.sweep.cell import Bundle, bundles
from dfqbench_slurm import cluster
from dfqbench_slurm.cluster import Job, NoAnswer
from dfqbench_slurm.packing import Split, pack, split
from dfqbench_slurm.profile import Profile
from dfqbench_slurm.submission import Array, Submission, new_token, snapshot, submissions, submitting, write_new
from dfqbench_slurm.supervisor import Crew, Supervisor, visible_gpus

if TYPE_CHECKING:
    from dfqbench.sweep.load import LoadedSweep

Say = Callable[[str], None]
WAIT_FOR_ANOTHER_SUBMIT_S = 300.0
NO_LIMIT = 10**9  # of requeueings after a time limit: long sweeps outlive submitit's three


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
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    submission = plan.submission
    for array, part in zip(submission.arrays, plan.splits, strict=True):
        supervisors = [Supervisor(submission.folder, task) for task in range(part.first, part.first + part.count)]
        after = submission.arrays[part.after].job if part.after is not None else None
        try:
            with _outside_of_a_job(), contextlib.redirect_stderr(io.StringIO()):  # what sbatch says is in the error as well
                sent = _executor(submission.folder, array, part, profile, after).submit_array(supervisors)
        except (FailedJobError, FailedSubmissionError) as error:
            return _refused(plan, array, f"the cluster refused the jobs: {cluster.first_error(str(error)) or 'sbatch failed'}")
        except OSError as error:
            return _refused(plan, array, f"{submission.folder}: {error.strerror}")
        array.job = sent[0].job_id.split("_")[0]
        submission.write()
    return None


@contextlib.contextmanager
def _outside_of_a_job() -> Iterator[None]:
    """Submitting from within a job must not pass that job's own settings on."""
    from submitit.helpers import clean_env

    if "SLURM_JOB_ID" not in os.environ:
        yield
        return
    kept = {name: os.environ[name] for name in ("SLURM_CONF", "SLURM_CLUSTERS") if name in os.environ}
    with clean_env():
        os.environ.update(kept)
        yield
        for name in kept:
            os.environ.pop(name, None)


def _refused(plan: Plan, refused: Array, why: str) -> UserError:
    """Takes back what was not submitted. Raises UserError if that is everything."""
    submission = plan.submission
    if refused is submission.arrays[0]:
        shutil.rmtree(submission.folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            submission.folder.parent.rmdir()
        raise UserError(f"{why}; nothing is submitted")
    submission.arrays = submission.arrays[: submission.arrays.index(refused)]
    kept = sum(array.count for array in submission.arrays)
    lost = sum(len(bundle) for task in submission.tasks[kept:] for lane in task for bundle in lane)
    submission.tasks = submission.tasks[:kept]
    submission.__dict__.pop("task_of", None)
    submission.write()
    return UserError(f"{counted(kept, 'job')} submitted, the rest ({counted(lost, 'cell')}) not: {why}; submit again when there is room")


def _executor(folder: Path, array: Array, part: Split, profile: Profile, after: str | None) -> Any:
    import shlex
    import sys

    from submitit.slurm.slurm import SlurmExecutor

    class Executor(SlurmExecutor):  # type: ignore[misc]
        @classmethod
        def affinity(cls) -> int:
            """`--dry-run` works without Slurm; `submit` has looked for its commands already."""
            return 2

    executor = Executor(folder / "jobs", max_num_timeout=NO_LIMIT, python=f"{shlex.quote(sys.executable)} -P")
    p = profile
    given: dict[str, Any] = {
        "partition": p.partition,
        "account": p.account,
        "qos": p.qos,
        "constraint": p.constraint,
        "gpus_per_node": (f"{p.gpu_type}:{p.gpus}" if p.gpu_type else p.gpus) if p.gpus else None,
        "mem": p.memory,
        "dependency": f"afterany:{after}" if after else None,
        "setup": p.setup or None,
    }
    executor.update_parameters(
        job_name=array.name,
        time=p.time,
        cpus_per_task=p.cpus,
        array_parallelism=part.parallel,
        signal_delay_s=p.save_seconds,
        stderr_to_stdout=True,
        srun_args=[f"--cpus-per-task={p.cpus}"],  # a step does not inherit it from its job in every version of Slurm
        additional_parameters={"requeue" if p.requeue else "no-requeue": True, **p.sbatch},
        **{key: value for key, value in given.items() if value is not None},
    )
    return executor


def scripts(plan: Plan, profile: Profile) -> Iterator[str]:
    """The sbatch script of each array, as it would be submitted."""
    for array, part in zip(plan.submission.arrays, plan.splits, strict=True):
        executor = _executor(
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
