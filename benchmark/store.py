"""The store: results as files. One folder per cell, small files, each written whole or not at all. No torch here.

<results>/runs/<cell id>/cell.json      what was asked for
                         result.json    exists = done
                         failed.json    the traceback of the last try
                         history.csv    one row per epoch
                         correct.npy    packed bits, one per test image in the set's order
                         samples.png, log.txt
<results>/runs/<cell id>/lease.json     some process works on it; its heartbeat is the file's time
<results>/bundles/<bundle id>/          the checkpoint of unfinished work
<results>/teachers/<key>.json           a teacher's own accuracy
<results>/sweeps/<name>.json            which cells a config's last run stood for
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmark.errors import UserError

HEARTBEAT_S = 15.0
LEASE_EXPIRES_S = 120.0


def write_atomically(path: Path, content: str | bytes) -> None:
    """Under a temporary name in the same folder, flushed to disk, then renamed: readers see the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """None if there is no such file; raises ValueError if it is damaged."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None


class Lease:
    """A claim on one cell, kept alive by a heartbeat. Another process takes it over once the heartbeat stops."""

    def __init__(self, path: Path):
        self.path = path

    def holder(self) -> dict[str, Any] | None:
        """Who works on it now; None if nobody does."""
        try:
            age = time.time() - self.path.stat().st_mtime
            who: dict[str, Any] = json.loads(self.path.read_text())
        except FileNotFoundError:
            return None
        except (OSError, ValueError):
            return None if age > LEASE_EXPIRES_S else {"host": "?", "pid": 0}
        if age > LEASE_EXPIRES_S or (who.get("host") == socket.gethostname() and not _alive(who)):
            return None
        return who

    def acquire(self) -> bool:
        """Whether the claim is now ours."""
        if self.holder() is not None:
            return False
        self.path.unlink(missing_ok=True)
        me = {"host": socket.gethostname(), "pid": os.getpid(), "started": _started(os.getpid())}
        try:
            with open(self.path, "x") as file:
                json.dump(me, file)
        except FileExistsError:
            return False
        return True

    def release(self) -> None:
        self.path.unlink(missing_ok=True)


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
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


class Store:
    """The results folder. Raises UserError if it cannot be one (a file, not writable)."""

    def __init__(self, root: str | Path, writable: bool = False):
        self.root = Path(root)
        if self.root.exists() and not self.root.is_dir():
            raise UserError(f"results folder {self.root} is a file: give a folder with --results")
        if writable:
            try:
                (self.root / "runs").mkdir(parents=True, exist_ok=True)
                probe = self.root / "runs" / f".writable.{os.getpid()}"
                probe.touch()
                probe.unlink()
            except OSError as error:
                raise UserError(f"results folder {self.root} cannot be written: {error.strerror}") from None

    def folder(self, cell_id: str) -> Path:
        return self.root / "runs" / cell_id

    def bundle_folder(self, bundle_id: str) -> Path:
        return self.root / "bundles" / bundle_id

    def ids(self) -> list[str]:
        runs = self.root / "runs"
        return sorted(p.name for p in runs.iterdir() if p.is_dir()) if runs.is_dir() else []

    def result(self, cell_id: str) -> dict[str, Any] | None:
        """The finished cell's result; None if there is none or it cannot be read."""
        with contextlib.suppress(ValueError, OSError):
            found = read_json(self.folder(cell_id) / "result.json")
            return found if isinstance(found, dict) else None
        return None

    def failure(self, cell_id: str) -> dict[str, Any] | None:
        with contextlib.suppress(ValueError, OSError):
            found = read_json(self.folder(cell_id) / "failed.json")
            return found if isinstance(found, dict) else None
        return None

    def lease(self, cell_id: str) -> Lease:
        return Lease(self.folder(cell_id) / "lease.json")

    def results(self) -> tuple[list[dict[str, Any]], list[str]]:
        """All finished cells, and a line for every file that could not be read: those are left where they are."""
        found, damaged = [], []
        for cell_id in self.ids():
            path = self.folder(cell_id) / "result.json"
            try:
                result = read_json(path)
                if result is None:
                    continue
                if not {"id", "top1", "cell"} <= result.keys():
                    raise ValueError("not a result of this suite")
                found.append(result)
            except (ValueError, OSError, AttributeError) as error:
                damaged.append(f"{path}: {error}")
        return found, damaged

    def write_cell(self, record: dict[str, Any]) -> None:
        write_json(self.folder(record["id"]) / "cell.json", record)

    def write_result(self, cell_id: str, result: dict[str, Any]) -> None:
        """Last of a cell's files: with it the cell is done."""
        write_json(self.folder(cell_id) / "result.json", result)
        (self.folder(cell_id) / "failed.json").unlink(missing_ok=True)

    def write_failure(self, cell_id: str, kind: str, message: str, trace: str) -> None:
        write_json(self.folder(cell_id) / "failed.json", {"kind": kind, "message": message, "traceback": trace, "time": time.time()})

    def write_history(self, cell_id: str, rows: list[dict[str, Any]]) -> None:
        """history.csv, whole: columns are all keys of all rows, in the order in which they first appear."""
        columns = list(dict.fromkeys(key for row in rows for key in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(self.folder(cell_id) / "history.csv", text.getvalue())

    def append_log(self, cell_id: str, line: str) -> None:
        with open(self.folder(cell_id) / "log.txt", "a") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")

    def finished_bundle(self, bundle_id: str) -> None:
        """Removes the checkpoint of a bundle that needs it no more."""
        shutil.rmtree(self.bundle_folder(bundle_id), ignore_errors=True)

    @contextlib.contextmanager
    def leases(self, cell_ids: Iterable[str]) -> Iterator[list[str]]:
        """Claims cells for this process and keeps the claims alive; yields those that it got."""
        held = {}
        for cell_id in cell_ids:
            self.folder(cell_id).mkdir(parents=True, exist_ok=True)
            lease = self.lease(cell_id)
            if lease.acquire():
                held[cell_id] = lease
        stopped = threading.Event()

        def beat() -> None:
            while not stopped.wait(HEARTBEAT_S):
                for lease in held.values():
                    with contextlib.suppress(OSError):
                        os.utime(lease.path)

        heart = threading.Thread(target=beat, daemon=True)
        heart.start()
        try:
            yield list(held)
        finally:
            stopped.set()
            heart.join()
            for lease in held.values():
                lease.release()
