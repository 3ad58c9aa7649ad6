"""Talking to W&B beside a run: a process that is told what happens through a pipe which nobody waits for. No torch here.

Run as `python -m dfqbench.tracking.process`, a JSON object with root, sweep and tracking as argument, lines `begun ID`, `epoch ID`,
`done ID` and `failed ID` as input.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from dfqbench.files import read_json
from dfqbench.store import Store
from dfqbench.store.environment import PYTHON, WANDB, environment_without
from dfqbench.sweep.schema import Tracking
from dfqbench.tracking.runs import Session, checked_result, is_pushed, open_session, push

CLOSE_S = 60.0  # how long the end of a run waits for W&B at most; nothing waits while cells run
HURRY_S = 5.0  # the same for a run that was told to stop
LOG = "tracking.log"


class Observer:
    """What a run tells while it runs. This one does not listen."""

    def begun(self, cell_id: str) -> None:
        """This process works on the cell."""

    def epoch(self, cell_id: str) -> None:
        """history.csv has a new row."""

    def finished(self, cell_id: str) -> None:
        """result.json is there."""

    def failed(self, cell_id: str) -> None:
        """failed.json is there."""

    def close(self, say: Callable[[str], None], hurry: bool = False) -> None:
        """The run is over, or, with `hurry`, was told to stop."""


class WandbObserver(Observer):
    """Passes everything on to a process of its own, which starts with the first news. Nothing here raises and nothing waits, but for `close`."""

    def __init__(self, root: Path, sweep: str, tracking: Tracking):
        self.root, self.sweep, self.tracking = root, sweep, tracking
        self.done: list[str] = []
        self._process: subprocess.Popen[bytes] | None = None
        self._broken = ""

    def begun(self, cell_id: str) -> None:
        self._tell(f"begun {cell_id}")

    def epoch(self, cell_id: str) -> None:
        if self.tracking.wandb == "online":
            self._tell(f"epoch {cell_id}")

    def finished(self, cell_id: str) -> None:
        self.done.append(cell_id)
        self._tell(f"done {cell_id}")

    def failed(self, cell_id: str) -> None:
        if self.tracking.wandb == "online":
            self._tell(f"failed {cell_id}")

    def _tell(self, line: str) -> None:
        """A full pipe loses the line: at its end the process looks at the store for what became of the cells that were begun."""
        try:
            process = self._process or self._start()
            assert process.stdin is not None
            os.write(process.stdin.fileno(), f"{line}\n".encode())
        except (OSError, ValueError) as error:
            self._broken = self._broken or str(error)

    def _start(self) -> subprocess.Popen[bytes]:
        folder = self.root / "wandb"
        folder.mkdir(parents=True, exist_ok=True)
        settings = {"root": str(self.root), "sweep": self.sweep, "tracking": self.tracking.model_dump()}
        with open(folder / LOG, "ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "dfqbench.tracking.process", json.dumps(settings)],
                stdin=subprocess.PIPE, stdout=log, stderr=log, bufsize=0, start_new_session=True, env=environment_without(WANDB, PYTHON),
            )  # fmt: skip
        assert self._process.stdin is not None
        os.set_blocking(self._process.stdin.fileno(), False)
        return self._process

    def close(self, say: Callable[[str], None], hurry: bool = False) -> None:
        if self._process is not None:
            with contextlib.suppress(OSError):
                assert self._process.stdin is not None
                self._process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(HURRY_S if hurry else CLOSE_S)
            with contextlib.suppress(OSError):
                os.killpg(self._process.pid, signal.SIGTERM)  # what is left of it: W&B's own helper, or all if it hangs
        if not self.done:
            return
        store = Store(self.root)
        there = [cell_id for cell_id in self.done if (result := checked_result(store, cell_id)) and is_pushed(store, result, self.tracking)]
        where = f"project {self.tracking.project}" if self.tracking.wandb == "online" else f"{self.root / 'wandb'}, for `wandb sync`"
        if len(there) == len(self.done):
            say(f"W&B: {len(there)} cells in {where}")
        else:
            say(f"W&B: {len(there)} of {len(self.done)} cells in {where} ({self._why()}); the others later: dfqbench wandb sync {self.sweep}")

    def _why(self) -> str:
        """The last line of what the process wrote."""
        with contextlib.suppress(OSError):
            lines = (self.root / "wandb" / LOG).read_text(encoding="utf-8", errors="replace").strip().splitlines()
            return lines[-1][:200] if lines else self._broken or "no answer"
        return self._broken or "no answer"


def observer(root: Path, sweep: str, tracking: Tracking | None) -> Observer:
    return WandbObserver(root, sweep, tracking) if tracking else Observer()


class _Teller:
    """The process's side."""

    def __init__(self, root: Path, sweep: str, tracking: Tracking):
        self.store, self.sweep, self.tracking = Store(root), sweep, tracking
        self.sessions: dict[str, Session] = {}
        self.given_up: set[str] = set()
        self.begun: dict[str, None] = {}

    def hear(self, line: str) -> None:
        kind, _, cell_id = line.strip().partition(" ")
        if not cell_id or cell_id in self.given_up:
            return
        try:
            if kind == "begun":
                self.begun[cell_id] = None
            elif kind == "done":
                self._finish(cell_id)
            elif kind == "failed":
                self._abandon(cell_id)
            elif kind == "epoch":
                session = self.sessions.get(cell_id) or self._open(cell_id)
                session.replay(finished=False)
        except Exception as error:  # whatever W&B throws: this cell is left to a later sync, the others go on
            traceback.print_exc()
            print(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}", file=sys.stderr, flush=True)
            self.given_up.add(cell_id)
            self.sessions.pop(cell_id, None)

    def end(self, since: float) -> None:
        """Finishes what was begun and not heard of again, and closes what did not end: it may be resumed."""
        for cell_id in self.begun:
            path = self.store.folder(cell_id) / "result.json"
            if path.is_file() and path.stat().st_mtime >= since:
                self.hear(f"done {cell_id}")
        for cell_id in list(self.sessions):
            self.hear(f"failed {cell_id}")

    def _open(self, cell_id: str) -> Session:
        cell = read_json(self.store.folder(cell_id) / "cell.json")
        self.sessions[cell_id] = open_session(self.store, cell, self.sweep, self.tracking)
        return self.sessions[cell_id]

    def _finish(self, cell_id: str) -> None:
        result = checked_result(self.store, cell_id)
        if result is not None and not is_pushed(self.store, result, self.tracking):
            push(self.store, result, self.sweep, self.tracking, self.sessions.pop(cell_id, None))

    def _abandon(self, cell_id: str) -> None:
        session = self.sessions.pop(cell_id, None)
        if session is not None:
            session.replay(finished=True)
            session.run.finish(exit_code=1)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.nice(10)  # cells come first
    given = json.loads(sys.argv[1])
    since = time.time() - 5
    teller = _Teller(Path(given["root"]), given["sweep"], Tracking(**given["tracking"]))
    for line in sys.stdin:
        teller.hear(line)
    teller.end(since)


if __name__ == "__main__":
    main()
