"""The supervisor: what a job runs. It starts a worker process per lane, replaces one that died, passes signals on, and goes back into the queue.

No torch here: workers import it, and may die of it, in processes of their own.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from dfqbench.store import LEASE_EXPIRES_S, Store, slurm_job
from dfqbench.store.environment import PYTHON, environment_without
from dfqbench_slurm.profile import Profile
from dfqbench_slurm.submission import Lane, Submission, read_submission
from dfqbench_slurm.worker import FAILED, LOST, REFUSED, STOPPED

POLL_S = 0.25
TRIES = 3  # workers that a bundle may cost before it counts as failed; chosen here
STUCK = 5  # starts of a job in a row that got nowhere before it is not requeued any more; chosen here
KILLED_WITHIN_S = 600.0  # a job that was told to end is ended by the cluster; if not within this time, it ends itself
KNOWN_ENDS = {STOPPED: "told to stop", LOST: "its GPU answers no more"}
STOP_SIGNALS = (-signal.SIGTERM, -signal.SIGUSR2, -signal.SIGINT)


class CellsFailed(Exception):
    """Some cells of this job have no result. Raised at the end, so that the job counts as failed."""


class Supervisor:
    """Runs one task of a submission. submitit calls it, and its `checkpoint` when Slurm says that time is up or others want the node."""

    def __init__(self, folder: Path, task: int):
        self.folder, self.task = folder, task
        self.crew: Crew | None = None

    def __call__(self) -> str:
        """Raises CellsFailed."""
        _clear_up(self.folder)
        submission = read_submission(self.folder)
        state = submission.state_of(self.task)
        state |= {"job": slurm_job(), "host": socket.gethostname(), "starts": state.get("starts", 0) + 1, "said": ""}
        submission.write_state(self.task, state)
        self.state, self.submission = state, submission
        self.crew = crew = Crew(submission, submission.tasks[self.task], visible_gpus(submission), state.get("deaths", {}))
        with crew.listening():
            said = crew.run()
            self._note("; ".join(crew.trouble))
            if crew.told_to_stop is not None:
                _await_the_end()
        if crew.trouble:
            raise CellsFailed(said + ": " + "; ".join(crew.trouble))
        return said

    def checkpoint(self) -> Any:
        """Saves every worker's state and returns what goes on; None where going on would never end."""
        from submitit.helpers import DelayedSubmission

        if self.crew is None:  # the signal came before the first worker
            return DelayedSubmission(Supervisor(self.folder, self.task))
        profile = self.crew.profile
        self.crew.stop(profile.save_seconds * 0.8)
        position = self.crew.position()
        self.state["stuck"] = self.state.get("stuck", 0) + 1 if self.state.get("position") == position else 0
        self.state["position"] = position
        if not profile.requeue:
            return self._give_up("its time was over; the next submit goes on")
        if self.state["stuck"] >= STUCK:
            return self._give_up(f"{STUCK + 1} jobs got nowhere: raise the profile's `time`, or lower `save_seconds`")
        self._note("saved, and back in the queue")
        return DelayedSubmission(Supervisor(self.folder, self.task))

    def _give_up(self, why: str) -> None:
        print(why, flush=True)
        self._note(why)

    def _note(self, said: str) -> None:
        self.state |= {"said": said, "deaths": self.crew.deaths if self.crew else {}}
        with contextlib.suppress(OSError):
            self.submission.write_state(self.task, self.state)


class Crew:
    """Workers side by side. `slots` lanes run at once; lanes beyond that wait for a free one.

    trouble: a line per thing that went wrong and is not a cell's recorded failure alone.
    """

    def __init__(self, submission: Submission, lanes: list[Lane], gpus: list[str], deaths: dict[str, int], slots: int | None = None):
        self.submission, self.gpus, self.deaths, self.slots = submission, gpus, dict(deaths), slots or len(lanes)
        self.profile = Profile(**submission.settings)
        self.store = Store(submission.results)
        self.lanes = [_Lane(number, [cell for bundle in lane for cell in bundle]) for number, lane in enumerate(lanes)]
        self.several = len(lanes) > 1
        self.trouble: list[str] = []
        self.told_to_stop: int | None = None

    @contextlib.contextmanager
    def listening(self, also: tuple[int, ...] = ()) -> Iterator[None]:
        """Takes note of SIGTERM (and others), on top of whatever handles it already; SIGUSR2 stays submitit's."""
        before: dict[int, Any] = {}

        def caught(number: int, frame: FrameType | None) -> None:
            self.told_to_stop = number
            if callable(before[number]) and before[number] is not signal.default_int_handler:
                before[number](number, frame)

        for number in (signal.SIGTERM, *also):
            before[number] = signal.signal(number, caught)
        try:
            yield
        finally:
            self.stop(0.0)
            for number, handler in before.items():
                signal.signal(number, handler)

    def run(self) -> str:
        """Until every lane is through. Returns how it went."""
        while self.told_to_stop is None:
            free = [slot for slot in range(self.slots) if slot not in {lane.slot for lane in self.lanes if lane.process}]
            for lane in self.lanes:
                self._attend(lane, free)
            if all(lane.over for lane in self.lanes):
                break
            time.sleep(POLL_S)
        if self.told_to_stop is not None:
            self.stop(self.profile.save_seconds)
            self.trouble.append(f"ended by {signal.Signals(self.told_to_stop).name}, saved")
        cells = [cell for lane in self.lanes for cell in lane.cells]
        done = sum(self.store.result(cell) is not None for cell in cells)
        failed = [cell for cell in cells if self.submission.counts(self.store.failure(cell))]
        if failed:
            self.trouble.insert(0, f"{len(failed)} failed")
        return f"{done} of {len(cells)} cells done"

    def stop(self, seconds: float) -> None:
        """Tells the workers to save, and waits for them; those that take longer are left with their last checkpoint."""
        running = [lane.process for lane in self.lanes if lane.process is not None and lane.process.poll() is None]
        for process in running:
            process.send_signal(signal.SIGUSR2)
        deadline = time.monotonic() + seconds
        for process in running:
            try:
                process.wait(max(deadline - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def position(self) -> list[int]:
        """Grows with everything that gets done: finished cells, and steps of the unfinished."""
        cells = [cell for lane in self.lanes for cell in lane.cells]
        steps = [(self.store.progress(cell) or {}).get("step", 0) for cell in cells]
        return [sum(self.store.result(cell) is not None for cell in cells), sum(steps)]

    # --- one lane -----------------------------------------------------------------------------------------------------

    def _attend(self, lane: _Lane, free: list[int]) -> None:
        if lane.over:
            return
        if lane.process is not None:
            status = lane.process.poll()
            if status is None:
                return
            self._ended(lane, lane.process.pid, status)
            lane.process = None
            if lane.over or self.told_to_stop is not None:
                return
        if time.monotonic() < lane.not_before:
            return
        todo = [cell for cell in lane.cells if not self._settled(cell)]
        mine = [cell for cell in todo if self.store.lease(cell).holder() is None]
        if not todo:
            lane.over = True
        elif mine and free:
            self._start(lane, mine, free.pop(0))
        elif not mine:
            self._wait_for_others(lane, len(todo))

    def _settled(self, cell: str) -> bool:
        return self.store.result(cell) is not None or self.submission.counts(self.store.failure(cell))

    def _wait_for_others(self, lane: _Lane, cells: int) -> None:
        """Claims of a node that died end by themselves soon; those of a living process do not, and its cells are left to it."""
        if lane.waiting_since is None:
            lane.waiting_since = time.monotonic()
            self._say(lane, f"another process holds {cells} cells")
        if time.monotonic() - lane.waiting_since > LEASE_EXPIRES_S * 1.5:
            self._say(lane, f"left {cells} cells to another process")
            lane.over = True
        lane.not_before = time.monotonic() + 4 * POLL_S

    def _start(self, lane: _Lane, cells: list[str], slot: int) -> None:
        p = self.profile
        name = f"[{lane.number}] " if self.several else ""
        words = [
            sys.executable,
            "-P",
            "-u",
            "-m",
            "dfqbench_slurm.worker",
            str(self.submission.folder),
            "--device",
            p.runs_on,
            "--threads",
            str(p.threads),
        ]
        graphs = {None: [], True: ["--graphs"], False: ["--no-graphs"]}[p.graphs] + ["--streams"] * p.streams
        words += ["--checkpoint-every", str(p.checkpoint_every), *graphs, "--name", name, *cells]
        environment = environment_without(PYTHON) | ({"CUDA_VISIBLE_DEVICES": self.gpus[slot % len(self.gpus)]} if self.gpus else {})
        lane.process, lane.slot, lane.waiting_since = subprocess.Popen(words, cwd=self.submission.cwd, env=environment), slot, None

    def _ended(self, lane: _Lane, pid: int, status: int) -> None:
        """What a worker's end means for its lane: through, replaced, or given up."""
        if status in (0, FAILED):
            return  # what is left is looked up on the disk
        if self.told_to_stop is not None and (status == STOPPED or status in STOP_SIGNALS):
            return
        if status == REFUSED:
            self.trouble.append(f"lane {lane.number} could not run, its log says why")
            lane.over = True
            return
        why = f"killed by {signal.Signals(-status).name}" if status < 0 else KNOWN_ENDS.get(status, f"exit status {status}")
        if status == -signal.SIGKILL:
            why += " (out of memory?)"
        self._say(lane, f"its worker ended: {why}")
        bundle = self._worked_on(lane, pid)
        key = ",".join(bundle) or f"lane {lane.number}"
        self.deaths[key] = self.deaths.get(key, 0) + 1
        if self.deaths[key] < TRIES:
            return
        del self.deaths[key]
        if not bundle:
            self.trouble.append(f"lane {lane.number}: {TRIES} workers ended before their first cell: {why}")
            lane.over = True
        for cell in bundle:
            self._say(lane, f"failed: {cell}: {TRIES} workers, the last {why}")
            self.store.write_failure(cell, "WorkerDied", f"{TRIES} workers died of it, the last one {why}", "")

    def _worked_on(self, lane: _Lane, pid: int) -> list[str]:
        """The cells whose claims the dead worker left behind."""
        found = []
        for cell in lane.cells:
            with contextlib.suppress(OSError, ValueError):
                who = self.store.lease(cell).content()
                if who.get("pid") == pid and who.get("host") == socket.gethostname():
                    found.append(cell)
        return found

    def _say(self, lane: _Lane, line: str) -> None:
        print(f"[{lane.number}] {line}" if self.several else line, flush=True)


class _Lane:
    def __init__(self, number: int, cells: list[str]):
        self.number, self.cells = number, cells
        self.process: subprocess.Popen[bytes] | None = None
        self.slot = 0
        self.over = False
        self.waiting_since: float | None = None
        self.not_before = 0.0


def _await_the_end() -> None:
    """The cluster ends this job. To end early by itself would look like a job that is through, and cost the requeueing that some clusters do for jobs
    that they pre-empt."""
    deadline = time.monotonic() + KILLED_WITHIN_S
    while time.monotonic() < deadline:
        time.sleep(POLL_S)


def visible_gpus(submission: Submission | None = None) -> list[str]:
    """What this job may use, as CUDA names it. Where the cluster does not say: as many as the job asked for, by their numbers in it."""
    named = [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
    if named or submission is None:
        return named
    profile = Profile(**submission.settings)
    return [str(number) for number in range(profile.gpus)] if profile.runs_on == "cuda" else []


def _clear_up(folder: Path) -> None:
    """submitit refuses to save where an earlier job was killed while saving."""
    for half in (folder / "jobs").glob(f"{slurm_job()}_*.save_tmp"):
        half.unlink(missing_ok=True)
