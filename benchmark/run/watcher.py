"""What happens beside the steps of a bundle: progress is shown, and the state saved."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dfqbench.analysis.warning_signs import signs
from dfqbench.engine.checkpoint import save_checkpoint
from dfqbench.engine.lockstep import Interrupted, Lockstep
from dfqbench.method.contract import Phase
from dfqbench.run.options import Options, StopFlag
from dfqbench.run.progress import Progress
from dfqbench.store import Store
from dfqbench.tracking.process import Observer

PROGRESS_EVERY_S = 5.0


class Watcher:
    """Shows progress and saves: every so many seconds, and at the end of the step in which a signal came."""

    def __init__(self, store: Store, path: Path, options: Options, progress: Progress, stop: StopFlag, watching: Observer):
        self.store, self.path, self.options, self.progress, self.stop, self.watching = store, path, options, progress, stop, watching
        self.saved_at = time.monotonic()
        self.noted: dict[str, Any] = {}
        self.lockstep: Lockstep | None = None
        self.when_made: Callable[[], None] = lambda: None  # called once the phases that only make images are over

    def start(self, lockstep: Lockstep) -> None:
        self.lockstep, self.began, self.first_step = lockstep, time.monotonic(), lockstep.steps_done
        self.warned = {(t.name, sign.kind) for t in lockstep.trainees for sign in signs(t.history)}  # before an interruption
        self._note("starting")

    def end(self) -> None:
        """The bundle is over. Students can be evaluated still, and are held by nothing here: `when_made` and the bundle would keep each other."""
        self.lockstep, self.when_made = None, lambda: None

    def evaluating(self) -> None:
        self._note("evaluating")

    def _note(self, phase: str) -> None:
        """How far the bundle is, for `dfqbench status`."""
        if self.lockstep is None:
            return
        done, seconds = self.lockstep.steps_done, time.monotonic() - self.began
        rate = (done - self.first_step) / seconds if seconds > 0 else 0.0
        self.noted = {"phase": phase, "step": done, "steps": self.lockstep.steps, "rate": round(rate, 3), "time": time.time()}
        for trainee in self.lockstep.trainees:
            self.store.write_progress(trainee.cell.id, self.noted)

    def step(self, lockstep: Lockstep, phase: Phase) -> None:
        self.progress.step(phase.name)
        if self.stop.signal is not None or time.time() - self.noted["time"] >= PROGRESS_EVERY_S:
            self._note(phase.name)
        if self.stop.signal is not None:
            save_checkpoint(self.path, lockstep.state())
            raise Interrupted
        if time.monotonic() - self.saved_at >= self.options.checkpoint_every_s:
            try:
                save_checkpoint(self.path, lockstep.state())
            except OSError as error:
                self.progress.say(f"checkpoint not written ({error.strerror}); going on, trying again in {self.options.checkpoint_every_s:g} s")
            self.saved_at = time.monotonic()

    def epoch(self, lockstep: Lockstep, phase: Phase) -> None:
        for trainee in lockstep.trainees:
            self.store.write_history(trainee.cell.id, trainee.history)
            self.watching.epoch(trainee.cell.id)
        if lockstep.epoch == lockstep.making_epochs:
            self.when_made()
        self.warn(lockstep)
        self.progress.epoch(lockstep.epoch, len(lockstep.epochs), {t.name: t.history[-1] for t in lockstep.trainees})

    def warn(self, lockstep: Lockstep) -> None:
        """Says what each history shows of a failing run, once for each kind and cell."""
        for trainee in lockstep.active:
            for sign in signs(trainee.history):
                if (trainee.name, sign.kind) not in self.warned:
                    self.warned.add((trainee.name, sign.kind))
                    self.store.append_log(trainee.cell.id, f"warning: {sign.text} (epoch {sign.epoch})")
                    self.progress.say(f"  warning: {trainee.cell}: {sign.text} (epoch {sign.epoch})", style="yellow")
