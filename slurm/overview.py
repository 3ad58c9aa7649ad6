"""What `dfqbench status` shows: files on disk decide, then the queue; accounting is asked only why a job is gone. No torch here."""

from __future__ import annotations

import enum
import time
from dataclasses import dataclass
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from dfqbench.errors import counted
from dfqbench.metrics import METRICS
from dfqbench.run.progress import duration
from dfqbench.store import Store
from dfqbench_slurm import cluster
from dfqbench_slurm.cluster import Job, NoAnswer
from dfqbench_slurm.submission import Submission, submissions


class Word(enum.Enum):
    """In the order in which a reader wants to see them."""

    RUNNING = "running"
    FAILED = "failed"
    LOST = "lost"
    PREEMPTED = "pre-empted"
    QUEUED = "queued"
    SUBMITTED = "submitted"
    MISSING = "missing"
    DONE = "done"


COLOURS = {Word.RUNNING: "cyan", Word.FAILED: "red", Word.LOST: "red", Word.PREEMPTED: "yellow", Word.DONE: "green"}

REACHED = {key: f"{metric.name} {{:.2f}} %" if key != "top1" else "{:.2f} %" for key, metric in METRICS.items()}


@dataclass(frozen=True)
class Line:
    """One cell."""

    cell: str
    label: str
    word: Word
    about: str


@dataclass(frozen=True)
class Overview:
    lines: list[Line]
    notes: list[str]

    def counts(self) -> str:
        numbers = {word: sum(line.word is word for line in self.lines) for word in Word}
        return f"{counted(len(self.lines), 'cell')}: " + ", ".join(f"{n} {word.value}" for word, n in numbers.items() if n)

    @property
    def settled(self) -> bool:
        """Whether nothing will change any more without another command."""
        return all(line.word in (Word.DONE, Word.FAILED, Word.LOST, Word.MISSING) for line in self.lines)

    def table(self, lines: list[Line]) -> Table:
        shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
        state_width = max((len(line.word.value) for line in lines), default=0)
        for column, width in (("cell", 12), ("state", state_width), ("what", None), ("about", None)):
            shown.add_column(column, no_wrap=width is not None, overflow="fold", min_width=width)
        for line in lines:
            colour = COLOURS.get(line.word, "")
            shown.add_row(Text(line.cell, style="dim"), Text(line.word.value, style=colour), Text(line.label), Text(line.about))
        return shown

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """In a live display: as much as fits, what moves first, what is done last."""
        order = list(Word)
        room = max((options.height or console.height) - 3 - len(self.notes), 3)
        lines = sorted(self.lines, key=lambda line: order.index(line.word))
        shown = self.table(lines[:room])
        for column in shown.columns:
            column.no_wrap, column.overflow = True, "ellipsis"
        yield shown
        if len(lines) > room:
            yield Text(f"... and {len(lines) - room} more", style="dim")
        for note in self.notes:
            yield Text(note, style="yellow")
        yield Text(f"{self.counts()}   {time.strftime('%H:%M:%S')}", style="bold")


def look(cells: dict[str, str], store: Store, ask_accounting: bool = True) -> Overview:
    """cells: label by id."""
    mine: dict[str, tuple[Submission, int]] = {}
    for one in submissions(store):
        mine |= {cell: (one, task) for cell, task in one.task_of.items() if cell in cells and one.arrays}
    notes: list[str] = []
    jobs: dict[str, Job] | None = {}
    undone = any(store.result(cell) is None for cell in mine)
    if undone:
        try:
            jobs = cluster.queue()
        except NoAnswer as error:
            jobs = None
            notes.append(f"the queue does not answer ({error}): what is queued or lost cannot be told apart")
    states: dict[tuple[str, int], dict[str, Any]] = {}
    lines = []
    for cell, label in cells.items():
        found = mine.get(cell)
        submission, task = found if found else (None, 0)
        if submission and (submission.token, task) not in states:
            states[submission.token, task] = submission.state_of(task)
        lines.append(Line(cell, label, *_state(cell, store, submission, task, states.get((submission.token, task), {}) if submission else {}, jobs)))
    if ask_accounting and jobs is not None:
        lines = _with_endings(lines, mine, jobs)
    return Overview(lines, notes)


def _state(cell: str, store: Store, submission: Submission | None, task: int, state: dict[str, Any], jobs: dict[str, Job] | None) -> tuple[Word, str]:
    result = store.result(cell)
    if result is not None:
        return Word.DONE, next((said.format(result[name]) for name, said in REACHED.items() if name in result), "")
    progress = store.progress(cell)
    holder = store.lease(cell).holder()
    job_id = submission.job_of(task, jobs or {}) if submission else None
    job = jobs.get(job_id) if jobs and job_id else None
    live = job is not None and job.live
    if holder is not None and not (jobs is not None and holder.get("job") and not (holder["job"] in jobs and jobs[holder["job"]].live)):
        return Word.RUNNING, _running(progress, holder)
    failure = store.failure(cell)
    if failure is not None and not (submission and live and not submission.counts(failure)):
        return Word.FAILED, f"{failure['kind']}: {_last_line(failure)}"
    at = _position(progress)
    if submission is None:
        return Word.MISSING, at and f"goes on {at}"
    if live:
        assert job is not None
        if not job.pending:
            return Word.QUEUED, f"its turn comes in job {job.id} on {job.node}"
        why = f"job {job.id}" + (f" ({job.reason})" if job.reason else "")
        if job.reason == cluster.LAUNCH_FAILED:
            why += ", submit again releases it"
        return (Word.PREEMPTED, f"{why}, goes on {at}" if at else why) if state.get("starts") and progress else (Word.QUEUED, why)
    if jobs is None:
        return Word.SUBMITTED, f"job {job_id}" if job_id else ""
    if submission.cancelled:
        return Word.MISSING, "cancelled" + (f", goes on {at}" if at else "")
    ending = job.state if job else ""
    word = Word.PREEMPTED if ending == "PREEMPTED" else Word.LOST
    log = submission.folder / "jobs" / f"{job_id}_0_log.out"
    parts = [f"job {job_id} is gone" if job_id else "was never queued", ending, state.get("said", ""), at and f"goes on {at} when submitted again"]
    parts.append(f"log {log}" if log.is_file() else "")
    return word, ", ".join(filter(None, parts))


def _running(progress: dict[str, Any] | None, holder: dict[str, Any]) -> str:
    where = f"{holder['host']}" + (f", job {holder['job']}" if holder.get("job") else f", process {holder['pid']}")
    if not progress or progress["time"] < holder.get("since", 0.0):
        return f"starting, {where}"
    parts = [progress["phase"]]
    if progress["steps"]:
        parts.append(f"step {progress['step']}/{progress['steps']}")
    if progress["rate"]:
        parts += [f"{progress['rate']:.2f} steps/s", f"{duration((progress['steps'] - progress['step']) / progress['rate'])} left"]
    return ", ".join([*parts, where])


def _position(progress: dict[str, Any] | None) -> str:
    return f"at step {progress['step']} of {progress['steps']}" if progress and progress["step"] else ""


def _last_line(failure: dict[str, Any]) -> str:
    lines = str(failure["message"]).strip().splitlines()
    return lines[-1] if lines else ""


def _with_endings(lines: list[Line], mine: dict[str, tuple[Submission, int]], jobs: dict[str, Job]) -> list[Line]:
    """What accounting knows about jobs that are gone, where the queue does not know it any more."""
    gone = {}
    for line in lines:
        if line.word is Word.LOST:
            submission, task = mine[line.cell]
            job = submission.job_of(task, jobs)
            if job and job not in jobs:
                gone[line.cell] = job
    found = cluster.endings(gone.values()) if gone else {}
    told = []
    for line in lines:
        ending = found.get(gone.get(line.cell, ""), "")
        if ending:
            word = Word.PREEMPTED if ending.startswith("PREEMPTED") else line.word
            line = Line(line.cell, line.label, word, line.about.replace(" is gone", f" is gone: {ending}", 1))
        told.append(line)
    return told
