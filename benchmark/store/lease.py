"""Leases: which process works on what, across all machines that share a folder. No torch here."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

HEARTBEAT_S = 15.0
LEASE_EXPIRES_S = 120.0


class Lease:
    """A claim, kept alive by a heartbeat. Another process, on any machine that shares the folder, takes it over once the heartbeat stops."""

    def __init__(self, path: Path):
        self.path = path
        self._mine = ""

    def holder(self) -> dict[str, Any] | None:
        """Who has it now: host, pid, and job where Slurm runs the process; None if nobody does."""
        found = self._read()
        return self._judge(*found) if found else None

    def content(self) -> dict[str, Any]:
        """Who had it last, whether or not it still runs. Raises OSError or ValueError where nothing can be read."""
        return dict(json.loads(self.path.read_text(encoding="utf-8")))

    def _read(self) -> tuple[str, float] | None:
        """Its text and the time of its last heartbeat."""
        try:
            return self.path.read_text(encoding="utf-8"), self.path.stat().st_mtime
        except FileNotFoundError:
            return None

    def _judge(self, text: str, beat: float, now: float | None = None) -> dict[str, Any] | None:
        if (now or time.time()) - beat > LEASE_EXPIRES_S:
            return None
        try:
            who: dict[str, Any] = json.loads(text)
        except ValueError:
            return {"host": "?", "pid": 0}
        return None if who.get("host") == socket.gethostname() and not _alive(who) else who

    def acquire(self) -> bool:
        """Whether the claim is now ours."""
        found = self._read()
        if found is not None:
            # clocks of machines differ: before a claim is taken from its holder, both times are those of the shared file system
            if self._judge(*found) is not None or self._judge(*found, now=self._file_system_time()) is not None:
                return False
            if not self._put_aside(found[0]):
                return False
        me = {"host": socket.gethostname(), "pid": os.getpid(), "started": _started(os.getpid()), "since": time.time()}
        text = json.dumps(me | ({"job": job} if (job := slurm_job()) else {}))
        try:
            with open(self.path, "x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError:
            return False
        self._mine = text
        return True

    def _file_system_time(self) -> float:
        probe = self.path.with_name(f".{self.path.name}.{socket.gethostname()}.{os.getpid()}.now")
        probe.unlink(missing_ok=True)
        probe.touch()
        try:
            return probe.stat().st_mtime
        finally:
            probe.unlink(missing_ok=True)

    def _put_aside(self, stale: str) -> bool:
        """Removes a claim that was found stale; False, and it stays, if another process has replaced it in the meantime."""
        aside = self.path.with_name(f".{self.path.name}.{socket.gethostname()}.{os.getpid()}.stale")
        try:
            os.rename(self.path, aside)
        except FileNotFoundError:
            return True
        try:
            if aside.read_text(encoding="utf-8") == stale:
                return True
            with contextlib.suppress(FileExistsError):
                os.link(aside, self.path)
            return False
        finally:
            aside.unlink(missing_ok=True)

    def beat(self) -> None:
        with contextlib.suppress(OSError):
            os.utime(self.path)

    def release(self) -> None:
        """Gives it up, unless another process has taken it over."""
        with contextlib.suppress(OSError):
            if self.path.read_text(encoding="utf-8") == self._mine:
                self.path.unlink()


@contextlib.contextmanager
def kept_alive(leases: Iterable[Lease]) -> Iterator[None]:
    """The heartbeat of claims that this process holds; they are released at the end."""
    leases, stopped = list(leases), threading.Event()

    def beat() -> None:
        while not stopped.wait(HEARTBEAT_S):
            for lease in leases:
                lease.beat()

    heart = threading.Thread(target=beat, daemon=True)
    heart.start()
    try:
        yield
    finally:
        stopped.set()
        heart.join()
        for lease in leases:
            lease.release()


def slurm_job() -> str:
    """The Slurm job in which this process runs, `12` or, in an array, `12_3`; empty outside."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID", "")


def _alive(who: dict[str, Any]) -> bool:
    """Whether the process still runs: its number may meanwhile be another's, its start time cannot."""
    pid = int(who.get("pid", 0))
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return _started(pid) == who.get("started")


def _started(pid: int) -> str:
    """A process's start time as the kernel counts it; empty where /proc does not say."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
