"""What a run shows while it runs: a live display in a terminal, plain lines elsewhere. No torch here."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

from dfqbench.errors import counted
from dfqbench.metrics import METRICS
from dfqbench.sweep.cell import Bundle, Cell

PLAIN_EVERY_S = 10.0
REASONS = 3  # of earlier failures that are named


class Progress:
    """Plain lines: one when something begins or ends, and at most one every ten seconds in between."""

    def __init__(self, console: Console, name: str = ""):
        """name: what every line begins with, where several processes write side by side."""
        self.console, self.name = console, name
        self.steps = self.step_number = self.first_step = 0
        self.began = self.said = time.monotonic()
        self.left: list[Bundle] = []
        self.cells = self.cells_begun = 0
        self.running: Bundle | None = None
        self.per_step: dict[str, float] = {}  # seconds of a step of one student, by method, as measured so far

    def start(self, todo: Sequence[Bundle], done: int = 0, running: int = 0, failures: Sequence[str] = ()) -> None:
        """done, running: cells that need nothing now. failures: why cells failed earlier that are not tried again, a text for each."""
        self.left, self.cells = list(todo), sum(len(bundle.cells) for bundle in todo)
        others = [f"{done} already done"] * (done > 0) + [f"{running} at work elsewhere"] * (running > 0)
        self.say(", ".join([f"{counted(self.cells, 'cell')} to run", *others]))
        if failures:
            self.say(f"{len(failures)} failed earlier ({most_common(failures)}); --retry-failed tries them again", style="red")

    def bundle(self, bundle: Bundle, steps: int, steps_done: int) -> None:
        """A bundle begins, at a step that is not 0 if it was interrupted before."""
        self._learn_speed()
        self.left = [other for other in self.left if other.cells[0].bundle_key != bundle.cells[0].bundle_key]
        first, self.cells_begun = self.cells_begun + 1, self.cells_begun + len(bundle.cells)
        numbers = f"cell {first}" if first == self.cells_begun else f"cells {first} to {self.cells_begun}"
        left = self._time_left(bundle, steps - steps_done)
        of_all = f" of {self.cells}" if self.cells >= self.cells_begun else ""  # `select` and tests begin bundles that nobody announced
        self.say(f"{numbers}{of_all}: {bundle}" + (f"; about {duration(left)} left for all" if left else ""))
        self.running = bundle
        self.steps, self.step_number, self.first_step, self.began = steps, steps_done, steps_done, time.monotonic()

    def _learn_speed(self) -> None:
        """From the bundle before: its evaluation and what else it took included."""
        done = self.step_number - self.first_step
        if self.running is not None and done:
            self.per_step[self.running.cells[0].method] = (time.monotonic() - self.began) / done / len(self.running.cells)

    def _time_left(self, bundle: Bundle, steps: int) -> float | None:
        """Seconds for this bundle and those after it, by what a step of the same method took, or of the slowest; None where nothing is known."""
        if not self.per_step:
            return None
        total = 0.0
        for other, count in [(bundle, steps), *((b, sum((b.cells[0].steps or {}).values())) for b in self.left)]:
            total += count * len(other.cells) * self.per_step.get(other.cells[0].method, max(self.per_step.values()))
        return total

    def step(self, phase: str) -> None:
        self.step_number += 1
        now = time.monotonic()
        if now - self.said >= PLAIN_EVERY_S:
            rate = (self.step_number - self.first_step) / max(now - self.began, 1e-9)
            left = (self.steps - self.step_number) / rate
            self.say(f"  {phase}: step {self.step_number}/{self.steps}, {rate:.2f} steps/s, {duration(left)} left")

    def evaluating(self) -> None:
        """Test images are running through a student."""

    def epoch(self, epoch: int, epochs: int, rows: dict[str, dict[str, Any]]) -> None:
        """After an epoch: the newest row of each student's history."""
        for metric, about in METRICS.items():
            evaluated = ", ".join(f"{name} {row[metric]:.2f} %" for name, row in rows.items() if metric in row)
            if evaluated:
                self.say(f"  epoch {epoch}/{epochs}: {about.name} {evaluated}")

    def done(self, cell: Cell, said: str) -> None:
        """said: what it reached."""
        self.say(f"  done: {cell}: {said}")

    def failed(self, cell: Cell, why: str) -> None:
        self.say(f"  failed: {cell}: {why}", style="red")

    def say(self, line: str, style: str = "") -> None:
        self.said = time.monotonic()
        self.console.print(Text(self.name + line, style=style), soft_wrap=True)

    def stop(self) -> None:
        """Nothing follows."""


class LiveProgress(Progress):
    """The same lines above a moving bar with speed and time left."""

    def __init__(self, console: Console):
        super().__init__(console)
        self.bar = RichProgress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            refresh_per_second=4,
        )
        self.task: TaskID | None = None

    def bundle(self, bundle: Bundle, steps: int, steps_done: int) -> None:
        self.stop()
        super().bundle(bundle, steps, steps_done)
        if steps:
            self.bar.start()
            self.task = self.bar.add_task("", total=steps, completed=steps_done, rate="")

    def step(self, phase: str) -> None:
        self.step_number += 1
        if self.task is not None:
            rate = (self.step_number - self.first_step) / max(time.monotonic() - self.began, 1e-9)
            self.bar.update(self.task, completed=self.step_number, description=phase, rate=f"{rate:.2f} steps/s")

    def evaluating(self) -> None:
        if self.task is not None:
            self.bar.update(self.task, description="evaluating")

    def stop(self) -> None:
        self.bar.stop()
        if self.task is not None:
            self.bar.remove_task(self.task)
            self.task = None


def make_progress(console: Console) -> Progress:
    """Live in a terminal, plain elsewhere."""
    return LiveProgress(console) if console.is_terminal else Progress(console)


def most_common(reasons: Sequence[str]) -> str:
    """`out of memory`, `2 x out of memory, 1 x diverged`: each reason with how often, the most frequent first; the rest is counted."""
    counts = Counter(reasons).most_common()
    if len(counts) == 1:
        return counts[0][0]
    named = [f"{number} x {reason}" for reason, number in counts[:REASONS]]
    return ", ".join(named) + (f", and {len(counts) - REASONS} other reasons" if len(counts) > REASONS else "")


def duration(seconds: float) -> str:
    """`2 h 05 min`, `3 min 20 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
